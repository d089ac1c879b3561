// Conversations as this browser keeps them: one entry of its storage each, and none elsewhere.

const PREFIX = "edge-memllm-conversation-";
const KINDS = ["chat", "complete"];
const LONGEST = 60; // characters of a title made from what was asked

export function begun(kind) {
  const parts = crypto.getRandomValues(new Uint32Array(2));
  const id = [Date.now(), ...parts].map((each) => each.toString(36)).join("-");
  return { id, kind, title: "", system: "", changed: 0, turns: [] };
}

export function titleOf({ title, kind, turns }) {
  const [line = ""] = (turns[0]?.asked ?? "").trim().split("\n");
  const short = line.length > LONGEST ? `${line.slice(0, LONGEST)}…` : line;
  return title || short || (kind === "chat" ? "New chat" : "New text");
}

export class Conversations {
  trouble = ""; // why they are not kept
  #held = new Map();

  // Calls back with the id of what another window changed.
  constructor(onChange) {
    try {
      for (const name of Object.keys(localStorage)) this.#read(name, localStorage.getItem(name));
    } catch {
      this.trouble = "This browser keeps nothing: conversations end with this page.";
    }
    addEventListener("storage", ({ key, newValue }) => {
      if (!key?.startsWith(PREFIX)) return;
      this.#held.delete(key.slice(PREFIX.length));
      this.#read(key, newValue);
      onChange(key.slice(PREFIX.length));
    });
  }

  // Those of a kind, the latest first.
  list(kind) {
    const found = [...this.#held.values()].filter((each) => each.kind === kind);
    return found.sort((one, other) => other.changed - one.changed);
  }

  get(id) {
    return this.#held.get(id);
  }

  save(conversation) {
    this.#held.set(conversation.id, conversation);
    try {
      localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
      this.trouble = "";
    } catch {
      this.trouble = "The browser's storage is full or closed: what is new is not kept. Delete conversations, or copy what you need.";
    }
  }

  delete(id) {
    this.#held.delete(id);
    try {
      localStorage.removeItem(PREFIX + id);
    } catch {
      // then there is nothing to remove
    }
  }

  // What is not of this form was not written by this page, and is left alone.
  #read(name, value) {
    if (!name.startsWith(PREFIX) || value === null) return;
    try {
      const found = JSON.parse(value);
      if (isConversation(found) && PREFIX + found.id === name) this.#held.set(found.id, found);
    } catch {
      // no JSON
    }
  }
}

const isText = (value) => typeof value === "string";
const isObject = (value) => typeof value === "object" && value !== null;
const haveTexts = (list, names) => Array.isArray(list)
  && list.every((each) => isObject(each) && names.every((name) => isText(each[name])));

function isConversation(value) {
  if (!isObject(value) || !["id", "title", "system"].every((name) => isText(value[name]))) return false;
  return KINDS.includes(value.kind) && Number.isFinite(value.changed)
    && haveTexts(value.turns, ["asked", "reply", "ended"]) && value.turns.every(isTurn);
}

function isTurn({ calls, results, notes, reasoning = "" }) {
  return isText(reasoning) && haveTexts(calls, ["id", "name", "arguments"]) && Array.isArray(notes) && notes.every(isText)
    && (results === null || haveTexts(results, ["id", "name", "content"]));
}

// A turn that nothing was written for yet.
export function turnOf(asked, results = null) {
  return { asked, results, reasoning: "", reply: "", calls: [], notes: [], ended: "" };
}

// What the model is told of earlier turns: those that it has replied to.
export function messagesOf({ system, turns }) {
  const told = turns.filter(({ reply, calls }) => reply || calls.length);
  const said = told.flatMap((turn) => [...questionsOf(turn), replyOf(turn)]);
  return [...(system.trim() ? [{ role: "system", content: system.trim() }] : []), ...said];
}

export function questionsOf({ asked, results }) {
  if (!results) return [{ role: "user", content: asked }];
  return results.map(({ id, content }) => ({ role: "tool", tool_call_id: id, content }));
}

// What it thought goes along: the model's template says of which turns it wants to know that.
function replyOf({ reasoning, reply, calls }) {
  const said = { role: "assistant", ...(reasoning && { reasoning_content: reasoning }) };
  if (!calls.length) return { ...said, content: reply };
  const made = calls.map(({ id, name, arguments: given }) => {
    return { id, type: "function", function: { name, arguments: given } };
  });
  return { ...said, content: reply || null, tool_calls: made };
}
