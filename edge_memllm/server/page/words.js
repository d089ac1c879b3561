// The words of one text on the page: coloured, and selected by mouse, finger or arrow keys.

import { make } from "./elements.js";

// What counts for a word of several tokens: the first of these that one of them has.
const ORDER = ["storage", "cache", "shared", "kept"];
const STEPS = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 };

export class Words {
  #trace;
  #pending = [];
  #words = [];
  #selected = -1;
  #onSelect;

  constructor(trace, name, onSelect) {
    this.#trace = trace;
    this.#onSelect = onSelect;
    this.element = make("p", { class: "words", role: "group", tabindex: "0", dir: "auto" });
    this.element.setAttribute("aria-label", `${name}. Arrow keys select its words.`);
    this.element.addEventListener("click", (event) => this.#clicked(event));
    this.element.addEventListener("keydown", (event) => this.#pressed(event));
  }

  // Adds text, which the tokens at these positions made; without text they wait for some.
  add(text, positions) {
    this.#pending.push(...positions);
    if (!text) return;
    const element = make("span", {}, text);
    element.dataset.word = this.#words.length;
    this.#words.push({ element, text, positions: this.#pending });
    this.#pending = [];
    this.element.append(element);
  }

  paint(positions = null) {
    const fresh = positions && new Set(positions);
    for (const word of this.#words) {
      if (fresh && !word.positions.some((each) => fresh.has(each))) continue;
      const places = word.positions.map((each) => this.#trace.places[each]);
      const origin = ORDER.find((each) => places.some((place) => place.origin === each));
      if (origin) word.element.dataset.origin = origin;
      const effect = places.reduce((sum, place) => sum + (place.effect ?? 0), 0);
      const share = Math.max(-1, Math.min(1, effect / this.#trace.deepest));
      word.element.style.setProperty("--v", share.toFixed(3));
    }
  }

  markTwins(positions) {
    const twins = new Set(positions);
    for (const { element, positions: own } of this.#words) {
      element.classList.toggle("twin", own.some((each) => twins.has(each)));
    }
  }

  deselect() {
    this.#words[this.#selected]?.element.classList.remove("selected");
    this.#selected = -1;
  }

  #select(number) {
    const word = this.#words[number];
    if (!word) return;
    this.#onSelect(this, word);
    this.#selected = number;
    word.element.classList.add("selected");
    word.element.scrollIntoView({ block: "nearest" });
  }

  #clicked(event) {
    const number = event.target.dataset?.word;
    if (number !== undefined && getSelection().isCollapsed) this.#select(Number(number));
  }

  #pressed(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const last = this.#words.length - 1;
    let wanted = { Home: 0, End: last }[event.key];
    if (event.key in STEPS) {
      wanted = Math.max(0, Math.min(last, this.#selected + STEPS[event.key]));
    }
    if (wanted === undefined) return;
    event.preventDefault();
    this.#select(wanted);
  }
}
