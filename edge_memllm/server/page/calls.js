// Calls of tools: what the model asks for, and where one says what came of it.

import { make } from "./elements.js";

export class Calls {
  #shown = [];
  list = []; // {id, name, arguments}

  constructor(calls = []) {
    this.element = make("div", { class: "calls" });
    for (const each of calls) this.#show({ ...each });
  }

  // Takes the parts of calls that a part of a reply has.
  take(parts) {
    for (const { index, id, function: { name, arguments: more = "" } } of parts) {
      if (!this.list[index]) this.#show({ id, name, arguments: "" });
      this.list[index].arguments += more;
      this.#shown[index].textContent = this.list[index].arguments;
    }
  }

  // Writes arguments on lines of their own, and asks for results where `answer` takes them.
  finish(answer) {
    this.list.forEach((each, number) => {
      this.#shown[number].textContent = indented(each.arguments);
    });
    if (this.list.length && answer) this.element.append(this.#form(answer));
  }

  #show(call) {
    this.list.push(call);
    const text = make("pre", { tabindex: "0", role: "region", "aria-label": "Arguments" });
    text.textContent = call.arguments;
    this.#shown.push(text);
    const title = make("p", { class: "soft" }, "The model calls ", make("code", {}, call.name));
    this.element.append(make("div", { class: "call" }, title, text));
  }

  #form(answer) {
    const areas = this.list.map(({ name }) => {
      const area = make("textarea", { rows: "2", required: "" });
      return [area, make("label", {}, `What ${name} gives back`, area)];
    });
    const send = make("button", { class: "primary small" }, "Send to the model");
    const form = make("form", { class: "results" }, ...areas.map(([, label]) => label), send);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      answer(this.list.map(({ id, name }, number) => ({ id, name, content: areas[number][0].value })));
    });
    return form;
  }
}

function indented(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // cut off
  }
}
