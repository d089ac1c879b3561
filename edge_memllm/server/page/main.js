// The page: asks for texts, shows them as they come, and stops them.

import { Refusal, get, stream, unlock } from "./client.js";
import { measure } from "./effect.js";
import { count, find, short, whole } from "./elements.js";
import { Entry } from "./entry.js";
import { Figures } from "./figures.js";
import { Inspector } from "./inspector.js";
import { Settings } from "./settings.js";

const UNAUTHORIZED = 401;
// Pixels from the end of the texts within which the page follows one that grows.
const NEAR = 120;
const MODES = {
  chat: { label: "Message", send: "Send", path: "/v1/chat/completions" },
  complete: { label: "Text to continue", send: "Write on", path: "/v1/completions" },
};

class Page {
  #inspector = new Inspector();
  #figures = new Figures();
  #texts = { chat: [], complete: [] };
  #settings;
  #mode;
  #writing = null; // what stops the text that is being written
  #measuring = Promise.resolve();

  constructor(model, overlays) {
    this.#settings = new Settings(model, overlays);
    find("model").textContent = document.title = model.id;
    find("facts").textContent = facts(model);
    find("chatless").hidden = model.chat;
    const inputs = [...document.querySelectorAll("[name=mode]")];
    for (const input of inputs) {
      input.disabled = input.value === "chat" && !model.chat;
      input.addEventListener("change", () => this.#enter(input.value));
    }
    const first = model.chat ? "chat" : "complete";
    inputs.find((input) => input.value === first).checked = true;
    for (const input of document.querySelectorAll("[name=colour]")) {
      input.disabled = input.value === "effect" && !model.memory_layers;
      input.addEventListener("change", () => this.#colour());
    }
    find("ask").addEventListener("submit", (event) => this.#submit(event));
    find("prompt").addEventListener("keydown", (event) => this.#typed(event));
    find("stop").addEventListener("click", () => this.#writing?.abort());
    find("clear").addEventListener("click", () => this.#clear());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.#writing?.abort();
    });
    this.#enter(first);
    this.#colour();
  }

  #enter(mode) {
    this.#mode = mode;
    const { label, send } = MODES[mode];
    find("prompt-label").textContent = label;
    find("send").textContent = send;
    find("system").hidden = mode !== "chat";
    this.#inspector.hide();
    this.#list();
  }

  #list() {
    const entries = this.#texts[this.#mode];
    find("log").replaceChildren(...entries.map((entry) => entry.element));
    find("welcome").hidden = entries.length > 0;
    find("clear").hidden = !entries.length;
  }

  #clear() {
    this.#writing?.abort();
    this.#inspector.hide();
    this.#texts[this.#mode] = [];
    this.#list();
    complain("");
    find("prompt").focus();
  }

  #typed(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!this.#writing) find("ask").requestSubmit();
  }

  #submit(event) {
    event.preventDefault();
    const text = find("prompt").value;
    const wishes = this.#settings.wishes();
    if (this.#writing || !text.trim() || !wishes) return;
    const chat = this.#mode === "chat";
    const entry = new Entry({
      asked: text,
      memory: this.#settings.memory(),
      inspector: this.#inspector,
      goOn: chat ? null : (whole) => this.#take(whole),
    });
    const body = chat ? { messages: this.#messages(text) } : { prompt: text };
    this.#texts[this.#mode].push(entry);
    this.#list();
    find("prompt").value = "";
    this.#write(entry, MODES[this.#mode].path, { ...wishes, ...body });
  }

  // Takes a text to where one types.
  #take(text) {
    const prompt = find("prompt");
    prompt.value = text;
    prompt.focus();
    prompt.scrollTop = prompt.scrollHeight;
  }

  #messages(text) {
    const system = this.#settings.system;
    const said = this.#texts.chat.filter((entry) => entry.text).flatMap((entry) => [
      { role: "user", content: entry.asked },
      { role: "assistant", content: entry.text },
    ]);
    return [...(system ? [{ role: "system", content: system }] : []), ...said,
      { role: "user", content: text }];
  }

  async #write(entry, path, body) {
    const controller = new AbortController();
    this.#begin(controller);
    let reason = "broken";
    let statistics = null;
    try {
      const asked = { ...body, trace: true, statistics: true };
      for await (const { choices } of stream(path, asked, controller.signal)) {
        const [choice] = choices;
        following(() => entry.take(choice.text ?? choice.delta.content ?? "", choice.trace));
        if (choice.trace) this.#figures.note(entry.trace);
        reason = choice.finish_reason ?? reason;
        statistics = choice.statistics ?? statistics;
      }
    } catch (error) {
      if (controller.signal.aborted) reason = "left";
      else this.#failed(entry, error);
    }
    following(() => entry.finish(reason, statistics));
    this.#end(entry, statistics, reason);
  }

  #begin(controller) {
    this.#writing = controller;
    complain("");
    say("Writing");
    find("send").hidden = true;
    find("stop").hidden = false;
    this.#figures.begin();
    following(() => {}, true);
  }

  #end(entry, statistics, reason) {
    const focused = document.activeElement === find("stop");
    this.#writing = null;
    find("send").hidden = false;
    find("stop").hidden = true;
    if (focused) find("prompt").focus();
    this.#figures.end(entry.trace, statistics);
    const tokens = count(entry.newTokens, "token", "tokens");
    say(`${{ left: "Stopped", broken: "Broke off" }[reason] ?? "Finished"} after ${tokens}`);
    this.#colour();
  }

  // Says what went wrong; a text that was not begun goes back to where it was typed.
  #failed(entry, error) {
    if (error.status === UNAUTHORIZED) lock();
    if (!entry.trace.places.length) this.#giveBack(entry);
    complain(explained(error));
  }

  #giveBack(entry) {
    for (const mode of Object.keys(MODES)) {
      this.#texts[mode] = this.#texts[mode].filter((each) => each !== entry);
    }
    this.#list();
    if (!find("prompt").value) find("prompt").value = entry.asked;
  }

  #colour() {
    const { value } = document.querySelector("[name=colour]:checked");
    document.body.dataset.colour = value;
    for (const name of ["origin", "effect"]) find(`legend-${name}`).hidden = value !== name;
    if (value !== "effect") return;
    for (const entry of Object.values(this.#texts).flat()) {
      this.#measuring = this.#measuring.then(() => this.#measure(entry));
    }
  }

  async #measure(entry) {
    if (!entry.finished || entry.trace.measured || entry.trace.places.length < 2) return;
    if (entry.memory.without_memory) {
      entry.say("nothing to compare");
      return;
    }
    entry.say("computing it again without memory…");
    try {
      await measure(entry.trace, entry.memory);
      entry.paint();
      entry.say(`deepest colour: ${short(Math.exp(entry.trace.deepest), 2)} times`);
    } catch (error) {
      entry.say(explained(error));
    }
  }
}

function facts(model) {
  const said = [`${whole(model.max_model_len)} tokens of context`];
  if (model.record_bytes) said.push(`records of ${whole(model.record_bytes)} bytes`);
  if (model.reader) said.push(`reader ${model.reader}`);
  if (model.device) said.push(model.device.toUpperCase());
  return said.join(" · ");
}

function explained(error) {
  if (!(error instanceof Refusal)) return "The server cannot be reached. Is it still running?";
  const again = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  return error.message + again;
}

function complain(text) {
  find("trouble").textContent = text;
  find("trouble").hidden = !text;
  if (text) find("trouble").scrollIntoView({ block: "nearest" });
}

function say(text) {
  find("status").textContent = text;
}

// Does something that makes a text longer, and stays at the end of the texts if it was there.
function following(change, always = false) {
  const end = document.querySelector("main");
  const below = () => end.getBoundingClientRect().bottom - innerHeight;
  const near = always || Math.abs(below()) < NEAR;
  change();
  if (near) scrollBy({ top: below(), behavior: "instant" });
}

function lock() {
  if (find("key").value) find("refusal").textContent = "That key does not open it.";
  find("lock").hidden = false;
  find("key").focus();
}

async function start() {
  try {
    const [models, overlays] = await Promise.all([get("/v1/models"), get("/v1/overlays")]);
    find("lock").hidden = true;
    new Page(models.data[0], overlays.data);
    document.body.classList.add("ready");
  } catch (error) {
    const locked = error.status === UNAUTHORIZED;
    if (locked) lock();
    find("facts").textContent = locked ? "Locked" : explained(error);
  }
}

find("lock").addEventListener("submit", (event) => {
  event.preventDefault();
  unlock(find("key").value);
  complain("");
  // A page that runs already goes on with the new key.
  if (document.body.classList.contains("ready")) find("lock").hidden = true;
  else start();
});
find("ask").addEventListener("submit", (event) => event.preventDefault());
start();
