// What is known of a selected word: its tokens, their record, who shares it, what memory did.

import { bytes, count, make, percent, rows, short, visible, whole } from "./elements.js";

const ORIGINS = {
  storage: "read from storage, for this word",
  cache: "found in the record cache",
  shared: "read for another word of the same step",
  kept: "not needed: what the model made of this beginning was kept",
};
const NOT_YET = "not read: a record is read when the model goes on from its word";
// As many places that share a record are named.
const MOST_TWINS = 8;

export class Inspector {
  #panel = make("section", { class: "inspector", "aria-live": "polite" });
  #words = null;

  // Shows a word below the text it stands in, and marks those that share a record with it.
  show(words, word, trace, all) {
    this.#words?.deselect();
    this.#words = words;
    this.#panel.setAttribute("aria-label", "Selected word");
    this.#panel.replaceChildren(...word.positions.map((each) => described(trace, each, word)));
    const twins = word.positions.flatMap((each) => trace.twins(each));
    for (const each of all) each.markTwins(twins);
    words.element.after(this.#panel);
  }

  hide() {
    this.#words?.deselect();
    this.#words = null;
    this.#panel.remove();
  }
}

function described(trace, position, word) {
  const place = trace.places[position];
  const text = place.text ?? (word.positions.length === 1 ? word.text : "");
  const title = make("h3", {}, make("bdi", { class: "token" }, visible(text)));
  title.append(` token ${whole(place.token)}`);
  const pairs = [
    ["position", whole(position)],
    ["its record", place.origin ? bytes(place.bytes) : "–"],
    ["came from", origin(place.origin)],
    ["shared with", sharers(trace, position)],
  ];
  if (typeof place.effect === "number") {
    pairs.push(["likely with memory", percent(Math.exp(place.logprob))]);
    pairs.push(["likely without", percent(Math.exp(place.logprob - place.effect))]);
    pairs.push(["what memory did", verdict(place.effect)]);
  }
  return make("div", {}, title, rows(pairs));
}

function origin(name) {
  if (!name) return NOT_YET;
  const sign = make("i", { class: "sign" });
  sign.dataset.origin = name;
  return make("span", {}, sign, ORIGINS[name]);
}

function sharers(trace, position) {
  const twins = trace.twins(position);
  if (!twins.length) return "no other word so far";
  const named = twins.slice(0, MOST_TWINS).map((each) => whole(each)).join(", ");
  const rest = twins.length - MOST_TWINS;
  const places = count(twins.length, "other place", "other places");
  return `${places}, at ${named}${rest > 0 ? ` and ${whole(rest)} more` : ""}`;
}

function verdict(effect) {
  const factor = Math.exp(Math.abs(effect));
  if (factor < 1.05) return "next to nothing";
  const times = factor < 1000 ? `${short(factor, 2)} times` : "over 1,000 times";
  return `made it ${times} ${effect > 0 ? "likelier" : "less likely"}`;
}
