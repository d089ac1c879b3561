// The list of conversations: opens, renames and deletes them, and takes the last deletion back.

import { titleOf } from "./conversations.js";
import { count, find, make } from "./elements.js";

export class History {
  #conversations;
  #kind = "chat";
  #current = "";
  #deleted = [];
  #do;

  // `actions`: open(conversation), begin(), gone(ids).
  constructor(conversations, actions) {
    this.#conversations = conversations;
    this.#do = actions;
    find("new").addEventListener("click", () => actions.begin());
    find("forget").addEventListener("click", () => this.#delete(conversations.list(this.#kind)));
    find("undo").addEventListener("click", () => this.#undo());
  }

  show(kind = this.#kind, current = this.#current) {
    this.#kind = kind;
    this.#current = current;
    const found = this.#conversations.list(kind);
    find("conversations").replaceChildren(...found.map((each) => this.#item(each)));
    find("history-title").textContent = kind === "chat" ? "Conversations" : "Texts";
    find("new").textContent = kind === "chat" ? "New chat" : "New text";
    find("forget").hidden = found.length < 2;
    find("undo").hidden = !this.#deleted.length;
    find("kept").textContent = this.#conversations.trouble || "Kept in this browser only.";
  }

  #item(conversation) {
    const title = titleOf(conversation);
    const open = button(title, "open", `Open: ${title}`, () => this.#do.open(conversation));
    if (conversation.id === this.#current) open.setAttribute("aria-current", "true");
    const item = make("li", {}, open);
    item.append(
      button("✎", "rename", `Rename: ${title}`, () => this.#rename(item, conversation)),
      button("✕", "delete", `Delete: ${title}`, () => this.#delete([conversation])),
    );
    return item;
  }

  #rename(item, conversation) {
    const field = make("input", { "aria-label": "Name of the conversation", maxlength: "200" });
    field.value = titleOf(conversation);
    const form = make("form", {}, field);
    let left = false;
    const leave = (keep) => {
      if (left) return;
      left = true;
      if (keep && field.value.trim() !== titleOf(conversation)) {
        conversation.title = field.value.trim();
        this.#conversations.save(conversation);
      }
      this.show();
    };
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      leave(true);
      find("prompt").focus();
    });
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") leave(false);
    });
    field.addEventListener("blur", () => leave(true));
    item.replaceChildren(form);
    field.select();
  }

  #delete(gone) {
    this.#deleted = gone;
    this.#do.gone(gone.map(({ id }) => id));
    for (const { id } of gone) this.#conversations.delete(id);
    this.show();
    find("status").textContent = `Deleted ${count(gone.length, "conversation", "conversations")}`;
    find("undo").focus();
  }

  #undo() {
    for (const each of this.#deleted) this.#conversations.save(each);
    this.#deleted = [];
    this.show();
    find("new").focus();
  }
}

function button(text, what, name, action) {
  const made = make("button", { type: "button", "data-do": what, "aria-label": name, title: name }, text);
  made.addEventListener("click", action);
  return made;
}
