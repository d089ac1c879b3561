// What one can do: open conversations, ask, edit, have it written again, stop.

import { stream } from "./client.js";
import { Colours } from "./colours.js";
import { Conversations, begun, messagesOf, questionsOf, titleOf, turnOf } from "./conversations.js";
import { remember, remembered } from "./draft.js";
import { count, find } from "./elements.js";
import { Entry } from "./entry.js";
import { Figures } from "./figures.js";
import { History } from "./history.js";
import { Inspector } from "./inspector.js";
import { Settings } from "./settings.js";
import { complain, following, say } from "./status.js";

const MODES = {
  chat: { label: "Message", send: "Send", path: "/v1/chat/completions" },
  complete: { label: "Text to continue", send: "Write on", path: "/v1/completions" },
};
const WIDE = matchMedia("(min-width: 1100px)");

export class Page {
  #inspector = new Inspector();
  #figures = new Figures();
  #conversations = new Conversations((id) => this.#changedElsewhere(id));
  #history;
  #settings;
  #colours;
  #explain;
  #open; // the conversation that is shown
  #latest = {}; // by mode, what was open last
  #shown = new Map(); // by conversation, the entries of its turns
  #writing = null; // what stops the text that is being written

  // `explain` puts an error into words.
  constructor(model, overlays, explain) {
    this.#explain = explain;
    this.#settings = new Settings(model, overlays);
    this.#colours = new Colours(model, () => this.#entries, explain);
    this.#history = new History(this.#conversations, {
      open: (conversation) => this.#show(conversation),
      begin: () => this.#show(begun(this.#open.kind)),
      gone: (ids) => this.#gone(ids),
    });
    const chats = model.chat !== false; // null: it is not known before it is loaded
    find("chatless").hidden = chats;
    this.#listen(model);
    const last = this.#conversations.get(remembered("conversation"));
    const kinds = chats ? ["chat", "complete"] : ["complete"];
    find("prompt").value = remembered("draft");
    this.#show(last && kinds.includes(last.kind) ? last : begun(kinds[0]));
  }

  get #entries() {
    return this.#shown.get(this.#open.id);
  }

  #listen(model) {
    for (const input of document.querySelectorAll("[name=mode]")) {
      input.disabled = input.value === "chat" && model.chat === false;
      input.addEventListener("change", () => {
        this.#show(this.#latest[input.value] ?? begun(input.value));
      });
    }
    find("ask").addEventListener("submit", (event) => this.#submit(event));
    find("prompt").addEventListener("keydown", (event) => this.#typed(event));
    find("prompt").addEventListener("input", () => remember("draft", find("prompt").value));
    find("system").addEventListener("input", () => this.#instruct());
    find("stop").addEventListener("click", () => this.#writing?.abort());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.#writing?.abort();
    });
    addEventListener("pagehide", () => this.#writing && this.#save());
    find("history").open = WIDE.matches;
    WIDE.addEventListener("change", () => { find("history").open = WIDE.matches; });
  }

  #show(conversation) {
    this.#writing?.abort();
    this.#inspector.hide();
    complain("");
    this.#open = this.#latest[conversation.kind] = conversation;
    remember("conversation", conversation.id);
    const { kind, id, system, turns } = conversation;
    if (!this.#shown.has(id)) this.#shown.set(id, turns.map((turn) => this.#restored(turn)));
    document.querySelector(`[name=mode][value=${kind}]`).checked = true;
    find("prompt-label").textContent = MODES[kind].label;
    find("send").textContent = MODES[kind].send;
    find("instructions").hidden = kind !== "chat";
    find("instructions").open = Boolean(system);
    find("system").value = system;
    this.#list();
    this.#history.show(kind, id);
    following(() => {}, true);
    // On a phone, the keyboard would cover what is there to be read.
    if (!matchMedia("(pointer: coarse)").matches) find("prompt").focus({ preventScroll: true });
  }

  #list() {
    find("log").replaceChildren(...this.#entries.map((entry) => entry.element));
    find("welcome").hidden = this.#entries.length > 0;
  }

  #save() {
    this.#open.turns = this.#entries.map((entry) => entry.turn);
    this.#open.changed = Date.now();
    this.#conversations.save(this.#open);
    this.#history.show();
  }

  #instruct() {
    this.#open.system = find("system").value;
    this.#save();
  }

  #gone(ids) {
    const open = ids.includes(this.#open.id);
    for (const [mode, { id }] of Object.entries(this.#latest)) {
      if (ids.includes(id)) delete this.#latest[mode];
    }
    if (open) this.#show(begun(this.#open.kind));
  }

  // Another window has gone on with it, or deleted it.
  #changedElsewhere(id) {
    const now = this.#conversations.get(id);
    if (id !== this.#open?.id) this.#shown.delete(id);
    else if (now && !this.#writing) {
      this.#shown.delete(id);
      this.#show(now);
    }
    this.#history.show();
  }

  #typed(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!this.#writing) find("ask").requestSubmit();
  }

  #submit(event) {
    event.preventDefault();
    const text = find("prompt").value;
    if (!text.trim() || !this.#ask(turnOf(text), this.#entries, () => this.#giveBack(text))) return;
    this.#type("");
  }

  #giveBack(text) {
    if (!find("prompt").value) this.#type(text);
  }

  #type(text) {
    find("prompt").value = text;
    remember("draft", text);
  }

  // Takes a text to where one types.
  #take(text) {
    this.#type(text);
    find("prompt").focus();
    find("prompt").scrollTop = find("prompt").scrollHeight;
  }

  #entry(turn, memory) {
    const again = (entry) => this.#replace(entry, entry.turn.asked, entry.turn.results);
    const actions = this.#open.kind === "chat"
      ? { again, edit: (entry, text) => this.#replace(entry, text),
        answer: (results) => this.#ask(turnOf("", results), this.#entries) }
      : { again, goOn: (text) => this.#take(text) };
    const chat = this.#open.kind === "chat";
    return new Entry({ turn, chat, memory, inspector: this.#inspector, actions });
  }

  #restored(turn) {
    // The page was closed, or another window writes it.
    const kept = turn.ended ? turn : { ...turn, ended: "broken", notes: ["broke off"] };
    return this.#entry(kept, {});
  }

  // Asks anew in place of a turn. If others follow it, all of them are kept as a conversation.
  #replace(entry, asked, results = null) {
    if (this.#writing) return;
    const before = this.#entries;
    const number = before.indexOf(entry);
    const copy = number < before.length - 1 ? this.#copy() : null;
    const begunIt = this.#ask(turnOf(asked, results), before.slice(0, number), () => {
      this.#shown.set(this.#open.id, before);
      if (copy) this.#conversations.delete(copy.id);
    });
    if (begunIt) before.forEach((each) => each.unedit());
    else if (copy) this.#conversations.delete(copy.id);
  }

  #copy() {
    const { id, changed } = begun(this.#open.kind);
    const title = `${titleOf(this.#open)} (before)`;
    const copy = structuredClone({ ...this.#open, id, title, changed: changed || Date.now() });
    this.#conversations.save(copy);
    return copy;
  }

  // Asks for a reply behind the entries; `undo` is for when there comes none. Returns whether
  // it could begin.
  #ask(turn, entries, undo = () => {}) {
    const wishes = this.#settings.wishes();
    if (this.#writing || !wishes) return false;
    const chat = this.#open.kind === "chat";
    const turns = entries.map((each) => each.turn);
    const body = chat
      ? { messages: [...messagesOf({ ...this.#open, turns }), ...questionsOf(turn)], ...this.#settings.tools() }
      : { prompt: turn.asked };
    const entry = this.#entry(turn, this.#settings.memory());
    this.#inspector.hide();
    this.#shown.set(this.#open.id, [...entries, entry]);
    this.#list();
    this.#save();
    this.#write(entry, { ...wishes, ...body }, undo);
    return true;
  }

  async #write(entry, body, undo) {
    const controller = new AbortController();
    const conversation = this.#open;
    this.#begin(controller);
    let reason = "broken";
    let statistics = null;
    let failure = null;
    try {
      const asked = { ...body, trace: true, statistics: true };
      for await (const { choices } of stream(MODES[conversation.kind].path, asked, controller.signal)) {
        const [choice] = choices;
        const { content, reasoning_content: reasoning, tool_calls: calls } = choice.delta ?? { content: choice.text };
        const part = { text: content ?? "", reasoning: reasoning ?? "", calls, trace: choice.trace };
        following(() => entry.take(part));
        if (choice.trace) this.#figures.note(entry.trace);
        reason = choice.finish_reason ?? reason;
        statistics = choice.statistics ?? statistics;
      }
    } catch (error) {
      if (controller.signal.aborted) reason = "left";
      else failure = error;
    }
    following(() => entry.finish(reason, statistics));
    this.#end(entry, statistics, reason, conversation);
    if (failure) this.#failed(entry, failure, conversation, undo);
    else if (reason !== "left") this.#colours.finished(entry);
  }

  #begin(controller) {
    this.#writing = controller;
    this.#colours.stop();
    complain("");
    say("Writing");
    document.body.classList.add("writing");
    find("send").hidden = true;
    find("stop").hidden = false;
    this.#figures.begin();
    following(() => {}, true);
  }

  #end(entry, statistics, reason, conversation) {
    const focused = [find("stop"), document.body].includes(document.activeElement);
    this.#writing = null;
    document.body.classList.remove("writing");
    find("send").hidden = false;
    find("stop").hidden = true;
    if (focused) find("prompt").focus();
    this.#figures.end(entry.trace, statistics);
    const tokens = count(entry.newTokens, "token", "tokens");
    say(`${{ left: "Stopped", broken: "Broke off" }[reason] ?? "Finished"} after ${tokens}`);
    if (conversation === this.#open) this.#save();
    else this.#saveLeft(conversation);
  }

  // What was left keeps what it got, unless it was deleted.
  #saveLeft(conversation) {
    if (!this.#conversations.get(conversation.id)) return;
    conversation.turns = this.#shown.get(conversation.id).map((each) => each.turn);
    this.#conversations.save(conversation);
    this.#history.show();
  }

  // Says what went wrong; a text that was not begun goes back to where it was typed.
  #failed(entry, error, conversation, undo) {
    if (!entry.trace.places.length && conversation === this.#open) {
      this.#shown.set(conversation.id, this.#entries.filter((each) => each !== entry));
      undo();
      this.#list();
      this.#forgetEmpty() || this.#save();
    }
    complain(this.#explain(error));
  }

  #forgetEmpty() {
    if (this.#entries.length || this.#open.system || this.#open.title) return false;
    this.#conversations.delete(this.#open.id);
    this.#open.turns = [];
    this.#history.show();
    return true;
  }
}
