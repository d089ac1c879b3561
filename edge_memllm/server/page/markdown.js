// Markdown as a tree of blocks. Every leaf is a range of the source, so that each character which
// is shown is known by its place. HTML is text like any other.

import { inlines } from "./inline.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+|$)/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?: {1,4}|$)/;
const RULED = /^:?-+:?$/; // a cell of the line below a table's head
// Lists and quotes within each other, at most.
const DEEPEST = 8;

// Returns the blocks of a source. Each has `type`, and `start` and `end` within the source.
// paragraph, heading (level), table (aligns, rows of cells): inline nodes with `parts` for leaves;
// code (language, parts), quote (blocks), list (ordered, first, items of blocks), rule.
export function parse(source) {
  const lines = [];
  for (let start = 0; start <= source.length; ) {
    const found = source.indexOf("\n", start);
    const end = found < 0 ? source.length : found;
    lines.push({ start, end });
    start = end + 1;
  }
  return new Blocks(source, lines, 0).all();
}

class Blocks {
  #source;
  #lines;
  #depth;
  #at = 0;

  constructor(source, lines, depth) {
    this.#source = source;
    this.#lines = lines;
    this.#depth = depth;
  }

  all() {
    const found = [];
    while (this.#at < this.#lines.length) {
      if (!this.#text().trim()) {
        this.#at += 1;
        continue;
      }
      const first = this.#at;
      const block = this.#next(this.#text());
      block.start = this.#lines[first].start;
      block.end = this.#lines[this.#at - 1].end;
      found.push(block);
    }
    return found;
  }

  #text(number = this.#at) {
    const line = this.#lines[number];
    return line ? this.#source.slice(line.start, line.end) : "";
  }

  #next(text) {
    const fence = FENCE.exec(text);
    if (fence) return this.#code(fence);
    if (HEADING.test(text)) return this.#heading(text);
    if (RULE.test(text)) {
      this.#at += 1;
      return { type: "rule" };
    }
    if (this.#depth < DEEPEST) {
      if (QUOTE.test(text)) return this.#quote();
      if (ITEM.test(text)) return this.#list(text);
    }
    return this.#table(text) ?? this.#paragraph();
  }

  #code([line, fence, language]) {
    const indent = line.search(/\S/);
    const inside = [];
    const ends = (text) => text.trim().length >= fence.length && !text.trim().replaceAll(fence[0], "");
    for (this.#at += 1; this.#at < this.#lines.length; this.#at += 1) {
      if (ends(this.#text())) {
        this.#at += 1;
        break;
      }
      inside.push(stripped(this.#source, this.#lines[this.#at], indent));
    }
    const parts = inside.map(({ start, end }, number) => [start, end + (number < inside.length - 1)]);
    return { type: "code", language, parts };
  }

  #heading(text) {
    const [mark, signs] = HEADING.exec(text);
    const { start } = this.#lines[this.#at];
    const kept = mark.length + text.slice(mark.length).replace(/(?:^|[ \t])#+[ \t]*$/, "").length;
    this.#at += 1;
    return { type: "heading", level: signs.length, children: this.#inline([{ start: start + mark.length, end: start + kept }]) };
  }

  #quote() {
    const inside = [];
    for (; QUOTE.test(this.#text()); this.#at += 1) {
      const { start, end } = this.#lines[this.#at];
      inside.push({ start: start + QUOTE.exec(this.#text())[0].length, end });
    }
    return { type: "quote", blocks: this.#within(inside) };
  }

  #within(lines) {
    return new Blocks(this.#source, lines, this.#depth + 1).all();
  }

  #list(text) {
    const kind = (found) => (/\d/.test(found[2]) ? "1" : found[2]);
    const first = ITEM.exec(text);
    const items = [];
    for (let item = first; item && kind(item) === kind(first) && !RULE.test(this.#text()); item = ITEM.exec(this.#text())) {
      items.push(this.#within(this.#item(item)));
    }
    const ordered = kind(first) === "1";
    return { type: "list", ordered, first: ordered ? parseInt(first[2], 10) : null, items };
  }

  // Takes the lines of one item: what is indented below it, and what its paragraph goes on with.
  #item([mark, indent]) {
    const { start, end } = this.#lines[this.#at];
    const inside = [{ start: start + mark.length, end }];
    for (this.#at += 1; this.#at < this.#lines.length; this.#at += 1) {
      const text = this.#text();
      const column = text.search(/\S/);
      const before = this.#text(this.#at - 1).trim();
      if (column < 0) {
        const next = this.#lines.slice(this.#at + 1, this.#at + 3).find((each) => this.#source.slice(each.start, each.end).trim());
        const deeper = next && this.#source.slice(next.start, next.end).search(/\S/) >= indent.length + 2;
        const sibling = next && ITEM.test(this.#source.slice(next.start, next.end));
        if (!deeper && !sibling) break;
      } else if (column < indent.length + 2 && (!before || this.#begins(text))) break;
      inside.push(stripped(this.#source, this.#lines[this.#at], mark.length));
    }
    return inside;
  }

  // Whether a line begins a block of its own, also right behind a paragraph.
  #begins(text) {
    return [FENCE, HEADING, RULE, QUOTE, ITEM].some((each) => each.test(text));
  }

  #paragraph() {
    const inside = [];
    do {
      const { start, end } = this.#lines[this.#at];
      inside.push({ start: start + Math.max(0, this.#text().search(/\S/)), end });
      this.#at += 1;
    } while (this.#text().trim() && !this.#begins(this.#text()));
    return { type: "paragraph", children: this.#inline(inside) };
  }

  #table(text) {
    if (!text.includes("|")) return null;
    const head = this.#cells(this.#at);
    const ruled = this.#at + 1 < this.#lines.length ? this.#cells(this.#at + 1) : [];
    const signs = ruled.map(({ start, end }) => this.#source.slice(start, end));
    if (!signs.length || signs.length !== head.length || !signs.every((each) => RULED.test(each))) return null;
    const rows = [head];
    for (this.#at += 2; this.#text().includes("|"); this.#at += 1) rows.push(this.#cells(this.#at));
    const aligns = signs.map((each) => (each.endsWith(":") ? (each.startsWith(":") ? "center" : "end") : ""));
    const filled = (row) => head.map((_, number) => (row[number] ? this.#inline([row[number]]) : []));
    return { type: "table", aligns, rows: rows.map(filled) };
  }

  #cells(number) {
    const text = this.#text(number);
    const { start } = this.#lines[number];
    const cells = [];
    let from = text.search(/\S/) + (text.trim().startsWith("|") ? 1 : 0);
    for (let at = from; at <= text.length; at += 1) {
      if (at < text.length && (text[at] !== "|" || text[at - 1] === "\\")) continue;
      const inside = text.slice(from, at);
      const left = from + inside.length - inside.trimStart().length;
      const end = left + inside.trim().length;
      if (at < text.length || inside.trim()) cells.push({ start: start + left, end: start + end });
      from = at + 1;
    }
    return cells;
  }

  // Reads lines together; the ranges of the leaves become ranges of the source.
  #inline(lines) {
    const text = lines.map(({ start, end }) => this.#source.slice(start, end)).join("\n");
    const partsOf = (from, to) => {
      const parts = [];
      let begin = 0;
      for (const { start, end } of lines) {
        const size = end - start + 1; // with the end of the line
        const [left, right] = [Math.max(from, begin), Math.min(to, begin + size)];
        if (left < right) parts.push([start + left - begin, start + right - begin]);
        begin += size;
      }
      return parts;
    };
    const placed = (node) => {
      if (node.children) return { ...node, children: node.children.map(placed) };
      return { type: node.type, parts: partsOf(node.from, node.to) };
    };
    return inlines(text).map(placed);
  }
}

function stripped(source, { start, end }, most) {
  let from = start;
  while (from < end && from < start + most && source[from] === " ") from += 1;
  return { start: from, end };
}
