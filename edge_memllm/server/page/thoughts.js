// What a model that reasons thinks before it replies: open while it does, folded afterwards.

import { make } from "./elements.js";
import { Words } from "./words.js";

export class Thoughts {
  #title = make("summary", {}, "Thinking…");
  #ended = false;

  // `select` is called with the words and the word that is selected.
  constructor(trace, select) {
    this.words = new Words(trace, "Thoughts", select, true);
    this.element = make("details", { class: "thoughts", open: "" }, this.#title, this.words.element);
  }

  // Folds them, unless nothing follows.
  end(open = false) {
    if (this.#ended) return;
    this.#ended = true;
    this.element.classList.add("done");
    this.#title.textContent = "What the model thought";
    this.element.open = open;
  }
}
