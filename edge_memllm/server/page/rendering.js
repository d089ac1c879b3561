// Elements for blocks of Markdown: made one by one, never from HTML.

import { copyButton } from "./copying.js";
import { make } from "./elements.js";

const SIGNS = { strong: "strong", em: "em", del: "del", code: "code" };
// Headings of a reply stand below those of the page.
const TOP = 3;

// Returns the element of a block. `leaf` makes the nodes of a range of the source.
export function render(block, leaf) {
  return MAKERS[block.type](block, leaf);
}

const MAKERS = {
  paragraph: ({ children }, leaf) => make("p", {}, ...inside(children, leaf)),
  heading: ({ level, children }, leaf) => {
    return make(`h${Math.min(6, level + TOP)}`, {}, ...inside(children, leaf));
  },
  rule: () => make("hr"),
  quote: ({ blocks }, leaf) => make("blockquote", {}, ...blocks.map((each) => render(each, leaf))),
  list: ({ ordered, first, items }, leaf) => {
    const list = make(ordered ? "ol" : "ul", ordered ? { start: first } : {});
    list.append(...items.map((each) => make("li", {}, ...each.map((block) => render(block, leaf)))));
    return list;
  },
  code: ({ language, parts }, leaf) => {
    const code = make("code", {}, ...leaves(parts, leaf));
    const head = make("div", { class: "code-head" }, make("span", {}, language || "text"));
    head.append(copyButton("Copy code", () => code.textContent));
    const pre = make("pre", { tabindex: "0", role: "region", "aria-label": `Code: ${language || "text"}` }, code);
    return make("div", { class: "code" }, head, pre);
  },
  table: ({ aligns, rows: [head, ...rest] }, leaf) => {
    const cells = (row, tag) => row.map((each, number) => {
      const cell = make(tag, tag === "th" ? { scope: "col" } : {}, ...inside(each, leaf));
      if (aligns[number]) cell.classList.add(`at-${aligns[number]}`);
      return cell;
    });
    const table = make("table", {}, make("thead", {}, make("tr", {}, ...cells(head, "th"))));
    table.append(make("tbody", {}, ...rest.map((row) => make("tr", {}, ...cells(row, "td")))));
    return make("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, table);
  },
};

function inside(nodes, leaf) {
  return nodes.flatMap((node) => {
    if (node.type === "text") return leaves(node.parts, leaf);
    if (node.type === "code") return [make("code", {}, ...leaves(node.parts, leaf))];
    if (node.type === "link") return [linked(node, leaf)];
    return [make(SIGNS[node.type], {}, ...inside(node.children, leaf))];
  });
}

// Where it leads is seen before it is followed; the page there learns nothing of this one.
function linked({ href, children }, leaf) {
  const more = { href, title: href, target: "_blank", rel: "noopener noreferrer nofollow" };
  return make("a", more, ...inside(children, leaf));
}

const leaves = (parts, leaf) => parts.flatMap(([start, end]) => leaf(start, end));
