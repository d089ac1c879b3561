// One turn on the page: what was asked, the words of the reply, what it took, what can be done.

import { Calls } from "./calls.js";
import { copyButton } from "./copying.js";
import { count, make, short } from "./elements.js";
import { Thoughts } from "./thoughts.js";
import { Trace } from "./trace.js";
import { Words } from "./words.js";

const ENDS = {
  stop: "finished", length: "cut at the longest reply", tool_calls: "calls tools",
  left: "stopped", broken: "broke off",
};
const ORIGINS = {
  storage: "read from storage", cache: "found in the record cache",
  shared: "read for another word", kept: "kept from before",
};
const UNANSWERED = "no reply; the model is not told of it";

export class Entry {
  #chat;
  #do;
  #prompt;
  #meta = make("p", { class: "meta soft" });
  #note = make("span", {});
  #origins = make("span", { class: "origins" });
  #actions = make("div", { class: "actions" });
  #beginning = make("details", { class: "beginning", hidden: "" });
  #calls;
  #thoughts;
  #question;

  // `turn` is what is kept: {asked, results, reasoning, reply, calls, notes, ended}. `actions` has `again`
  // and, in a chat, `edit` and `answer`; else `goOn`.
  constructor({ turn, chat, memory, inspector, actions }) {
    this.turn = turn;
    this.memory = memory;
    this.trace = new Trace();
    this.finished = false;
    this.#chat = chat;
    this.#do = actions;
    const select = (words, word) => inspector.show(words, word, this.trace, this.#all());
    this.words = new Words(this.trace, "Reply", select, chat);
    this.#prompt = new Words(this.trace, "Prompt", select);
    this.#calls = new Calls(turn.calls);
    this.#thoughts = new Thoughts(this.trace, select);
    this.element = make("article", { class: "entry", "aria-busy": "true" });
    if (chat) this.#showQuestion();
    else this.words.element.append(make("span", { class: "given" }, turn.asked));
    this.#meta.append(this.#note, this.#origins);
    if (chat) this.element.append(make("h3", { class: "hidden" }, "Reply"));
    this.element.append(this.#thoughts.element, this.words.element, this.#calls.element, this.#meta, this.#actions, this.#beginning);
    if (turn.ended) this.#restore();
  }

  get text() {
    return this.turn.reply;
  }

  get newTokens() {
    return this.trace.places.length - this.trace.promptLength;
  }

  // Takes a part of the reply: text, or reasoning before it, calls of tools, and trace.
  take({ text, reasoning, calls, trace }) {
    this.turn.reply += text;
    this.turn.reasoning += reasoning;
    const before = this.trace.places.length;
    const fresh = trace ? this.trace.take(trace) : [];
    if (!before && fresh.length) this.#showPrompt();
    if (reasoning) this.#thoughts.words.add(reasoning, fresh);
    if (text || !reasoning) this.words.add(text, fresh);
    if (text || calls) this.#thoughts.end();
    const told = trace?.records.map(({ position }) => position) ?? [];
    for (const words of [this.#thoughts.words, this.words]) words.paint(told);
    if (!calls) return;
    this.#calls.take(calls);
    this.turn.calls = this.#calls.list;
  }

  finish(reason, statistics) {
    this.turn.ended = reason;
    this.turn.notes = notesOf(this, reason, statistics);
    this.#end();
    const told = this.trace.told(0);
    const counts = Object.keys(ORIGINS)
      .map((name) => [name, told.filter((place) => place.origin === name).length])
      .filter(([, number]) => number)
      .sort((one, other) => other[1] - one[1]);
    if (!counts.length) return;
    // What most records have in common tells nothing of a single word.
    this.element.dataset.usual = counts[0][0];
    const said = counts.map(([name, number]) => `${number} ${ORIGINS[name]}`).join(", ");
    this.#origins.textContent = `records: ${said}`;
  }

  // Says something about it at its end; nothing takes it back.
  say(text) {
    this.#note.textContent = text;
  }

  paint() {
    for (const words of this.#all()) words.paint();
  }

  #all() {
    return [this.#prompt, this.#thoughts.words, this.words];
  }

  #restore() {
    if (this.turn.reasoning) this.#thoughts.words.show(this.turn.reasoning);
    this.words.show(this.turn.reply);
    this.#end();
  }

  #end() {
    this.finished = true;
    this.#thoughts.end(!this.text);
    this.element.removeAttribute("aria-busy");
    this.#calls.finish(this.#do.answer && ((results) => this.#do.answer(results)));
    const said = this.text || this.turn.calls.length ? this.turn.notes : [...this.turn.notes, UNANSWERED];
    this.#meta.prepend(make("span", {}, said.join(" · ")));
    if (this.text) this.#actions.append(copyButton("Copy", () => this.text));
    this.#act("Write again", "again", () => this.#do.again(this));
    if (!this.#chat && this.text) {
      this.#act("Go on from here", "on", () => this.#do.goOn(this.turn.asked + this.text));
    }
  }

  #act(name, what, action, place = this.#actions) {
    const button = make("button", { type: "button", class: "small", "data-do": what }, name);
    button.addEventListener("click", action);
    place.append(button);
    return button;
  }

  #showQuestion() {
    const { asked, results } = this.turn;
    this.#question = make("div", { class: "question" }, make("h3", { class: "hidden" }, "You"));
    this.element.prepend(this.#question);
    for (const { name, content } of results ?? []) {
      const title = make("span", { class: "soft" }, `${name} gave back `);
      this.#question.append(make("p", { class: "asked", dir: "auto" }, title, content));
    }
    if (results) return;
    this.#question.append(make("p", { class: "asked", dir: "auto" }, asked));
    const line = make("div", { class: "actions" }, copyButton("Copy", () => asked));
    this.#act("Edit", "edit", () => this.#edit(), line);
    this.#question.append(line);
  }

  #edit() {
    const area = make("textarea", { "aria-label": "Your message", rows: "3" });
    area.value = this.turn.asked;
    const form = make("form", { class: "editing" }, area, make("button", { class: "primary small" }, "Send"));
    const leave = () => {
      form.replaceWith(this.#question);
      this.#question.querySelector("[data-do=edit]").focus();
    };
    this.#act("Cancel", "cancel", leave, form);
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") leave();
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.target !== area) return;
      event.preventDefault();
      form.requestSubmit();
    });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (area.value.trim()) this.#do.edit(this, area.value);
    });
    this.#question.replaceWith(form);
    area.focus();
  }

  // Goes back to what was shown before it was edited.
  unedit() {
    this.element.querySelector(".editing")?.replaceWith(this.#question);
  }

  #showPrompt() {
    const { places, promptLength } = this.trace;
    for (let position = 0; position < promptLength; position += 1) {
      this.#prompt.add(places[position].text, [position]);
    }
    this.#prompt.paint();
    const distinct = new Set(this.trace.ids.slice(0, promptLength)).size;
    const title = `What the model read: ${count(promptLength, "token", "tokens")}, `;
    const summary = make("summary", {}, `${title}${count(distinct, "record", "records")}`);
    this.#beginning.append(summary, this.#prompt.element);
    this.#beginning.hidden = false;
  }
}

function notesOf(entry, reason, statistics) {
  const said = [count(entry.newTokens, "token", "tokens"), ENDS[reason] ?? reason];
  if (entry.memory.without_memory) said.push("without memory");
  if (!statistics) return said;
  if (statistics.overlays.length) said.push(`overlays ${statistics.overlays.join(", ")}`);
  const speed = speedOf(statistics);
  if (speed) said.push(`${short(speed)} a second`);
  if (statistics.reused_tokens) {
    said.push(`${count(statistics.reused_tokens, "token", "tokens")} of the prompt kept`);
  }
  return [...said, `seed ${statistics.seed}`];
}

export function speedOf({ completion_tokens, seconds, first_token_seconds }) {
  const after = seconds - (first_token_seconds ?? seconds);
  return completion_tokens > 1 && after > 0 ? (completion_tokens - 1) / after : null;
}
