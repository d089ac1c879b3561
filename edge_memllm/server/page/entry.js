// One text on the page: what was asked, the words of the reply, and what it took.

import { count, make, short } from "./elements.js";
import { Trace } from "./trace.js";
import { Words } from "./words.js";

const ENDS = { stop: "came to its end", length: "as long as was asked", left: "stopped", broken: "broke off" };

export class Entry {
  #prompt;
  #meta = make("p", { class: "meta soft" });
  #note = make("span", {});
  #beginning = make("details", { class: "beginning", hidden: "" });
  #goOn;

  // With `goOn`, the text stands behind what was asked, and can be taken up again.
  constructor({ asked, memory, inspector, goOn = null }) {
    this.asked = asked;
    this.memory = memory;
    this.trace = new Trace();
    this.text = "";
    this.finished = false;
    const select = (words, word) => inspector.show(words, word, this.trace, this.#all());
    this.words = new Words(this.trace, "Reply", select);
    this.#prompt = new Words(this.trace, "Prompt", select);
    this.element = make("article", { class: "entry", "aria-busy": "true" });
    if (goOn) {
      this.words.element.append(make("span", { class: "given" }, asked));
    } else {
      this.element.append(make("p", { class: "asked", dir: "auto" }, asked));
    }
    this.#goOn = goOn;
    this.#meta.append(this.#note);
    this.element.append(this.words.element, this.#beginning, this.#meta);
  }

  // Takes a part of the reply: text and trace.
  take(text, trace) {
    this.text += text;
    const before = this.trace.places.length;
    const fresh = trace ? this.trace.take(trace) : [];
    if (!before && fresh.length) this.#showPrompt();
    this.words.add(text, fresh);
    this.words.paint(trace?.records.map((each) => each.position));
  }

  finish(reason, statistics) {
    this.finished = true;
    this.element.removeAttribute("aria-busy");
    const said = [count(this.newTokens, "token", "tokens"), ENDS[reason] ?? reason];
    if (this.memory.without_memory) said.push("without memory");
    if (statistics) {
      if (statistics.overlays.length) said.push(`overlays ${statistics.overlays.join(", ")}`);
      const speed = speedOf(statistics);
      if (speed) said.push(`${short(speed)} a second`);
      if (statistics.reused_tokens) {
        said.push(`${count(statistics.reused_tokens, "token", "tokens")} of the prompt kept`);
      }
      said.push(`seed ${statistics.seed}`);
    }
    this.#meta.prepend(make("span", {}, said.join(" · ")));
    if (!this.#goOn || !this.text) return;
    const button = make("button", { type: "button" }, "Go on from here");
    button.addEventListener("click", () => this.#goOn(this.asked + this.text));
    this.#meta.append(button);
  }

  // Says something about it at its end; nothing takes it back.
  say(text) {
    this.#note.textContent = text;
  }

  paint() {
    for (const words of this.#all()) words.paint();
  }

  get newTokens() {
    return this.trace.places.length - this.trace.promptLength;
  }

  #all() {
    return [this.#prompt, this.words];
  }

  #showPrompt() {
    const { places, promptLength } = this.trace;
    for (let position = 0; position < promptLength; position += 1) {
      this.#prompt.add(places[position].text, [position]);
    }
    this.#prompt.paint();
    const distinct = new Set(this.trace.ids.slice(0, promptLength)).size;
    const title = `Prompt as the model reads it: ${count(promptLength, "token", "tokens")}, `;
    const summary = make("summary", {}, `${title}${count(distinct, "record", "records")}`);
    this.#beginning.append(summary, this.#prompt.element);
    this.#beginning.hidden = false;
  }
}

export function speedOf({ completion_tokens, seconds, first_token_seconds }) {
  const after = seconds - (first_token_seconds ?? seconds);
  return completion_tokens > 1 && after > 0 ? (completion_tokens - 1) / after : null;
}
