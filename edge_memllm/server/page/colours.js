// What the colours of words tell, and the measurements that they need.

import { measure } from "./effect.js";
import { find, short } from "./elements.js";
import { following } from "./status.js";

export class Colours {
  #queue = Promise.resolve();
  #controller = new AbortController();
  #entries;
  #explain;
  #longest; // tokens that the model reads at once

  // `entries` gives the texts that are shown, `explain` puts an error into words.
  constructor(model, entries, explain) {
    this.#entries = entries;
    this.#explain = explain;
    this.#longest = model.max_model_len;
    for (const input of document.querySelectorAll("[name=colour]")) {
      if (input.value === "effect") input.disabled = !model.memory_layers;
      if (input.value === (model.memory_layers ? "effect" : "none")) input.checked = true;
      input.addEventListener("change", () => this.apply());
    }
    this.#show();
  }

  // Shows the colours that are chosen, for all texts.
  apply() {
    if (this.#show() === "effect") this.#entries().forEach((entry) => this.measure(entry));
  }

  // Computes a text that is finished twice more, once others are.
  measure(entry) {
    const { signal } = this.#controller;
    this.#queue = this.#queue.then(() => signal.aborted || this.#measure(entry, signal));
  }

  // Measures what has come to its end just now, if its effects are to be seen.
  finished(entry) {
    if (document.body.dataset.colour === "effect") this.measure(entry);
  }

  // Leaves the server to a text that is asked for.
  stop() {
    this.#controller.abort();
    this.#controller = new AbortController();
  }

  #show() {
    const { value } = document.querySelector("[name=colour]:checked");
    document.body.dataset.colour = value;
    for (const name of ["origin", "effect"]) find(`legend-${name}`).hidden = value !== name;
    return value;
  }

  async #measure(entry, signal) {
    if (!entry.finished || entry.trace.measured || entry.trace.places.length < 2) return;
    const say = (text) => following(() => entry.say(text));
    if (entry.memory.without_memory) {
      say("nothing to compare");
      return;
    }
    say("finding out what memory changed…");
    try {
      await measure(entry.trace, entry.memory, this.#longest, signal);
      entry.paint();
      say(`deepest colour: ${short(Math.exp(entry.trace.deepest), 2)} times`);
    } catch (error) {
      say(signal.aborted ? "" : this.#explain(error));
    }
  }
}
