// The words of one text on the page: coloured, and selected by mouse, finger or arrow keys.

import { make } from "./elements.js";
import { parse } from "./markdown.js";
import { render } from "./rendering.js";

// What counts for a word of several tokens: the first of these that one of them has.
const ORDER = ["storage", "cache", "shared", "kept"];
const STEPS = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 };

export class Words {
  #trace;
  #markdown;
  #source = "";
  #pending = [];
  #words = []; // {text, start, end, positions, origin, share, elements}: markup has no element
  #blocks = [];
  #selected = -1;
  #onSelect;

  // With `markdown`, the text is shown as what its Markdown means, otherwise as it is.
  constructor(trace, name, onSelect, markdown = false) {
    this.#trace = trace;
    this.#onSelect = onSelect;
    this.#markdown = markdown;
    this.element = make("div", { class: "words", role: "group", tabindex: "0", dir: "auto" });
    this.element.classList.toggle("markdown", markdown);
    this.element.setAttribute("aria-label", `${name}. Arrow keys select its words.`);
    this.element.addEventListener("click", (event) => this.#clicked(event));
    this.element.addEventListener("keydown", (event) => this.#pressed(event));
  }

  // Adds text, which the tokens at these positions made; without text they wait for some.
  add(text, positions) {
    this.#pending.push(...positions);
    if (!text) return;
    const start = this.#source.length;
    const word = { text, start, end: start + text.length, positions: this.#pending, elements: [] };
    word.number = this.#words.push(word) - 1;
    this.#pending = [];
    this.#source += text;
    if (this.#markdown) this.#render();
    else this.element.append(this.#element(word, text));
  }

  // Shows a text whose tokens are not known.
  show(text) {
    this.#source = text;
    if (this.#markdown) this.#render();
    else this.element.append(text);
  }

  paint(positions = null) {
    const fresh = positions && new Set(positions);
    for (const word of this.#words) {
      if (fresh && !word.positions.some((each) => fresh.has(each))) continue;
      const places = word.positions.map((each) => this.#trace.places[each]);
      word.origin = ORDER.find((each) => places.some((place) => place.origin === each));
      const effect = places.reduce((sum, place) => sum + (place.effect ?? 0), 0);
      word.share = Math.max(-1, Math.min(1, effect / this.#trace.deepest));
      word.elements.forEach((each) => dress(each, word));
    }
  }

  markTwins(positions) {
    const twins = new Set(positions);
    for (const { elements, positions: own } of this.#words) {
      const marked = own.some((each) => twins.has(each));
      for (const element of elements) element.classList.toggle("twin", marked);
    }
  }

  deselect() {
    for (const each of this.#words[this.#selected]?.elements ?? []) each.classList.remove("selected");
    this.#selected = -1;
  }

  // Blocks that have not changed stay as they are: a text grows at its end.
  #render() {
    const blocks = parse(this.#source).map((block) => {
      return { block, key: `${block.start} ${this.#source.slice(block.start, block.end)}` };
    });
    let same = 0;
    while (same < blocks.length && this.#blocks[same]?.key === blocks[same].key) same += 1;
    for (const { element } of this.#blocks.splice(same)) element.remove();
    const stands = (each) => this.element.contains(each);
    const from = blocks[same]?.block.start ?? this.#source.length;
    for (let number = this.#after(from); number < this.#words.length; number += 1) {
      this.#words[number].elements = this.#words[number].elements.filter(stands);
    }
    for (const each of blocks.slice(same)) {
      each.element = render(each.block, (start, end) => this.#leaf(start, end));
      this.element.append(each.element);
      this.#blocks.push(each);
    }
  }

  // The number of the first word that ends behind a place of the source.
  #after(place) {
    let [low, high] = [0, this.#words.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.#words[middle].end > place) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  #leaf(start, end) {
    if (!this.#words.length) return [this.#source.slice(start, end)];
    const found = [];
    for (let number = this.#after(start); this.#words[number]?.start < end; number += 1) {
      const word = this.#words[number];
      const text = this.#source.slice(Math.max(start, word.start), Math.min(end, word.end));
      found.push(this.#element(word, text));
    }
    return found;
  }

  #element(word, text) {
    const element = make("span", {}, text);
    element.dataset.word = word.number;
    element.classList.toggle("selected", word.number === this.#selected);
    dress(element, word);
    word.elements.push(element);
    return element;
  }

  #select(number) {
    const word = this.#words[number];
    if (!word?.elements.length) return;
    this.#onSelect(this, word);
    this.#selected = number;
    for (const each of word.elements) each.classList.add("selected");
    word.elements[0].scrollIntoView({ block: "nearest" });
  }

  #clicked(event) {
    const number = event.target.dataset?.word;
    if (event.target.closest("a") || number === undefined) return;
    if (getSelection().isCollapsed) this.#select(Number(number));
  }

  #pressed(event) {
    if (event.target !== this.element || event.altKey || event.ctrlKey || event.metaKey) return;
    const seen = this.#words.filter((word) => word.elements.length);
    const at = seen.findIndex((word) => word.number === this.#selected);
    let wanted = { Home: 0, End: seen.length - 1 }[event.key];
    if (event.key in STEPS) {
      wanted = Math.max(0, Math.min(seen.length - 1, at + STEPS[event.key]));
    }
    if (wanted === undefined || !seen.length) return;
    event.preventDefault();
    this.#select(seen[wanted].number);
  }
}

function dress(element, { origin, share }) {
  if (origin) element.dataset.origin = origin;
  if (share !== undefined) element.style.setProperty("--v", share.toFixed(3));
}
