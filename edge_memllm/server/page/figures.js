// Live figures of the text that is being written, and a chart of what was read for it.

import { bytes, count, drawn, find, seconds, short, whole } from "./elements.js";
import { speedOf } from "./entry.js";
import { read } from "./trace.js";

const WIDTH = 300;
const HEIGHT = 60;
// New tokens in the chart: the last ones.
const MOST_BARS = 60;
// Milliseconds between two times the figures are written.
const PULSE = 100;

export class Figures {
  #places = Object.fromEntries(
    [...document.querySelectorAll("[data-figure]")].map((each) => [each.dataset.figure, each]),
  );
  #begun = 0;
  #first = 0;
  #last = 0;
  #shown = 0;

  begin() {
    this.#begun = performance.now();
    this.#first = this.#shown = 0;
    for (const name of ["speed", "perToken", "first", "prompt", "promptBytes"]) this.#set(name);
    for (const name of ["reply", "replyBytes", "cached"]) this.#set(name);
    this.#draw([]);
  }

  // Notes that a part came; writes the figures now and then.
  note(trace) {
    this.#last = performance.now();
    this.#first ||= this.#last;
    if (this.#last - this.#shown > PULSE) this.#show(trace);
  }

  // Writes what the server measured in place of what was seen from here.
  end(trace, statistics) {
    if (trace.places.length) this.#show(trace);
    if (!statistics) return;
    this.#set("speed", speedOf(statistics), short);
    this.#set("first", statistics.first_token_seconds, seconds);
  }

  #show(trace) {
    this.#shown = this.#last;
    const prompt = trace.told(0, trace.promptLength);
    const reply = trace.told(trace.promptLength);
    const made = trace.places.length - trace.promptLength;
    const took = (this.#last - this.#first) / 1000;
    this.#set("speed", made > 1 && took > 0 ? (made - 1) / took : null, short);
    this.#set("first", (this.#first - this.#begun) / 1000, seconds);
    this.#set("perToken", reply.length ? read(reply) / reply.length : null, bytes);
    this.#set("prompt", prompt.length, whole);
    this.#set("promptBytes", read(prompt), bytes);
    this.#set("reply", made, whole);
    this.#set("replyBytes", read(reply), bytes);
    const cached = [...prompt, ...reply].filter((place) => place.origin === "cache").length;
    this.#set("cached", cached, whole);
    for (const name of ["anon", "kv", "file", "peak"]) {
      this.#set(name, trace.memory?.[`${name}_bytes`], bytes);
    }
    this.#draw(reply);
  }

  #set(name, value = null, form = String) {
    this.#places[name].textContent = value === null ? "–" : form(value);
  }

  #draw(places) {
    const chart = find("chart");
    const shown = places.slice(-MOST_BARS);
    const most = Math.max(1, ...shown.map((place) => place.bytes));
    const step = WIDTH / MOST_BARS;
    const bars = shown.map(({ origin, bytes: size }, number) => {
      const height = origin === "storage" ? Math.max(3, (size / most) * (HEIGHT - 4)) : 3;
      const shape = { x: number * step, y: HEIGHT - height, width: step - 1, height };
      const bar = drawn("rect", shape);
      bar.dataset.origin = origin;
      return bar;
    });
    chart.replaceChildren(...bars);
    const stored = shown.filter((place) => place.origin === "storage").length;
    const said = shown.length
      ? `${stored} of the last ${count(shown.length, "record", "records")} came from storage`
      : "Nothing was read yet";
    chart.setAttribute("aria-label", said);
    find("chart-caption").textContent = shown.length ? said : "Bytes read for each new token";
  }
}
