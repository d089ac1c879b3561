// Markdown within a block: emphasis, code and links, as a tree over ranges of a text.

const PUNCTUATION = /[!-/:-@[-`{-~]/;
const WORD = /[\p{L}\p{N}]/u;
// The target of a link and its title: `(target "title")`.
const TARGET = /\((<[^<>\n]*>|[^\s()]*(?:\([^\s()]*\)[^\s()]*)*)(?:[ \t]+"[^"\n]*")?\)/y;
const ADDRESS = /https?:\/\/[^\s<>"'`*()[\]]+/y;
// All else, `javascript:` above all, is shown as text.
const SAFE = /^(?:https?:\/\/|mailto:)[^\s]/i;
// Emphasis within emphasis, at most: keeps hostile texts linear.
const DEEPEST = 24;

// Returns nodes: {type: "text" | "code", from, to}, {type: "strong" | "em" | "del", children}
// and {type: "link", href, children}. Ranges are of `text`; what is between them is markup.
export function inlines(text, from = 0, to = text.length, links = true) {
  return new Scan(text, from, to, links).nodes();
}

class Scan {
  #text;
  #at;
  #end;
  #plain; // where text begins that was not yielded yet
  #frames = [{ children: [] }];
  #brackets;
  #ticks;

  constructor(text, from, to, links) {
    this.#text = text;
    this.#at = this.#plain = from;
    this.#end = to;
    this.#ticks = runsOfTicks(text, from, to);
    this.#brackets = links ? pairsOfBrackets(text, from, to) : null;
  }

  nodes() {
    while (this.#at < this.#end) this.#step(this.#text[this.#at]);
    this.#flush();
    this.#unwind(1);
    return this.#frames[0].children;
  }

  #step(sign) {
    if (sign === "\\" && this.#at + 1 < this.#end && PUNCTUATION.test(this.#text[this.#at + 1])) {
      this.#flush();
      this.#plain = this.#at + 1;
      this.#at += 2;
    } else if (sign === "`") this.#code();
    else if (sign === "*" || sign === "_" || sign === "~") this.#emphasis(sign);
    else if (!this.#brackets || !this.#link(sign)) this.#at += 1;
  }

  #push(node) {
    this.#frames.at(-1).children.push(node);
  }

  #flush() {
    if (this.#plain < this.#at) this.#push({ type: "text", from: this.#plain, to: this.#at });
    this.#plain = this.#at;
  }

  #go(to) {
    this.#at = this.#plain = to;
  }

  #code() {
    const size = runOf(this.#text, this.#at, this.#end);
    const starts = this.#ticks.get(size) ?? []; // none where the first of a run was escaped
    while (starts.length && starts[0] <= this.#at) starts.shift();
    if (!starts.length) {
      this.#at += size;
      return;
    }
    this.#flush();
    this.#push({ type: "code", from: this.#at + size, to: starts[0] });
    this.#go(starts[0] + size);
  }

  #emphasis(sign) {
    const size = runOf(this.#text, this.#at, this.#end);
    const before = this.#text[this.#at - 1] ?? " ";
    const after = this.#text[this.#at + size] ?? " ";
    const inWord = sign === "_" && WORD.test(before) && WORD.test(after);
    if (inWord || (sign === "~" && size !== 2)) {
      this.#at += size;
      return;
    }
    this.#flush();
    const left = /\s/.test(before) ? size : this.#close(sign, size);
    if (left && !/\s/.test(after) && this.#frames.length <= DEEPEST) {
      this.#frames.push({ sign, count: left, from: this.#at, children: [] });
      this.#go(this.#at + left);
    } else {
      this.#at += left;
    }
  }

  // Ends what a run of signs ends; returns how many of them are left.
  #close(sign, size) {
    let left = size;
    while (left) {
      const number = this.#frames.findLastIndex((each) => each.sign === sign);
      if (number < 1) break;
      this.#unwind(number + 1);
      const frame = this.#frames[number];
      const used = Math.min(2, left, frame.count);
      const type = sign === "~" ? "del" : used === 2 ? "strong" : "em";
      const node = { type, children: frame.children };
      frame.count -= used;
      frame.children = [node];
      if (!frame.count) {
        this.#frames.pop();
        this.#push(node);
      }
      left -= used;
      this.#go(this.#at + used);
    }
    return left;
  }

  // Makes text of the signs that began something which has no end.
  #unwind(number) {
    while (this.#frames.length > number) {
      const { from, count, children } = this.#frames.pop();
      this.#frames.at(-1).children.push({ type: "text", from, to: from + count }, ...children);
    }
  }

  #link(sign) {
    if (sign === "h") return this.#address();
    const open = sign === "!" ? this.#at + 1 : this.#at; // pictures are not loaded, but linked to
    const close = this.#brackets.get(open);
    if (close === undefined) return false;
    TARGET.lastIndex = close + 1;
    const found = TARGET.exec(this.#text);
    if (!found || TARGET.lastIndex > this.#end) return false;
    const href = found[1].replace(/^<|>$/g, "");
    if (!SAFE.test(href)) return false;
    this.#flush();
    const children = inlines(this.#text, open + 1, close, false);
    this.#push({ type: "link", href, children });
    this.#go(close + 1 + found[0].length);
    return true;
  }

  #address() {
    if (WORD.test(this.#text[this.#at - 1] ?? " ")) return false;
    ADDRESS.lastIndex = this.#at;
    const found = ADDRESS.exec(this.#text.slice(0, this.#end))?.[0].replace(/[.,;:!?]+$/, "");
    if (!found || !SAFE.test(found)) return false;
    this.#flush();
    const to = this.#at + found.length;
    this.#push({ type: "link", href: found, children: [{ type: "text", from: this.#at, to }] });
    this.#go(to);
    return true;
  }
}

function runOf(text, from, end) {
  let to = from + 1;
  while (to < end && text[to] === text[from]) to += 1;
  return to - from;
}

// Where runs of backticks begin, by their length.
function runsOfTicks(text, from, end) {
  const found = new Map();
  for (let at = text.indexOf("`", from); at >= 0 && at < end; at = text.indexOf("`", at)) {
    const size = runOf(text, at, end);
    if (!found.has(size)) found.set(size, []);
    found.get(size).push(at);
    at += size;
  }
  return found;
}

function pairsOfBrackets(text, from, end) {
  const open = [];
  const pairs = new Map();
  for (let at = from; at < end; at += 1) {
    if (text[at] === "\\") at += 1;
    else if (text[at] === "[") open.push(at);
    else if (text[at] === "]" && open.length) pairs.set(open.pop(), at);
  }
  return pairs;
}
