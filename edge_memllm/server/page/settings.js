// The settings: from the form to the fields of a request, and kept for the next visit.

import { find, make } from "./elements.js";

const STORED = "edge-memllm-settings";
const NUMBERS = ["max_tokens", "seed", "temperature", "top_p", "top_k", "repetition_penalty"];
const KEPT = [...NUMBERS, "stop", "tools"];

export class Settings {
  #form = find("wishes");

  // Shows the model's own values in the empty fields, and its overlays.
  constructor(model, overlays) {
    for (const [name, value] of Object.entries(model.sampling ?? {})) {
      const field = this.#form.elements[name];
      if (field) field.placeholder = String(value);
    }
    for (const { id } of overlays) {
      const box = make("input", { type: "checkbox", name: "overlay", value: id, checked: "" });
      find("overlays").append(make("label", { class: "check" }, box, ` ${id}`));
    }
    find("overlays").hidden = !overlays.length;
    this.#form.elements.memory.disabled = !model.memory_layers;
    this.#restore();
    this.#limit(model.max_tokens ?? model.max_model_len);
    this.#form.addEventListener("input", () => this.#changed());
    this.#form.addEventListener("reset", () => setTimeout(() => this.#changed()));
    this.#form.addEventListener("submit", (event) => event.preventDefault());
    this.#changed();
  }

  // The fields of a request; null when one of them is wrong, which is then shown.
  wishes() {
    if (!this.#form.checkValidity()) {
      find("settings").open = true;
      this.#form.reportValidity();
      return null;
    }
    const found = this.memory();
    for (const name of NUMBERS) {
      const value = this.#form.elements[name].valueAsNumber;
      if (!Number.isNaN(value)) found[name] = value;
    }
    const stops = this.#form.elements.stop.value.split("\n").filter(Boolean);
    if (stops.length) found.stop = stops;
    return found;
  }

  // The fields that say which memory a text is computed with.
  memory() {
    if (!this.#form.elements.memory.checked) return { without_memory: true };
    const boxes = [...this.#form.querySelectorAll("[name=overlay]")];
    if (boxes.every((box) => box.checked)) return {};
    return { overlays: boxes.filter((box) => box.checked).map((box) => box.value) };
  }

  // The tools that a chat tells the model of, as a field of a request.
  tools() {
    const tools = toolsIn(this.#form.elements.tools.value);
    return tools.length ? { tools } : {};
  }

  #limit(most) {
    const field = this.#form.elements.max_tokens;
    field.max = most;
    field.defaultValue = Math.min(field.defaultValue, most);
    field.value = Math.min(field.value || field.defaultValue, most);
  }

  #changed() {
    find("overlays").disabled = !this.#form.elements.memory.checked;
    const { tools } = this.#form.elements;
    const good = toolsIn(tools.value) !== null;
    tools.setCustomValidity(good ? "" : 'Tools are a list in JSON: [{"type": "function", "function": {…}}, …]');
    const kept = KEPT.map((name) => [name, this.#form.elements[name].value]);
    try {
      localStorage.setItem(STORED, JSON.stringify(Object.fromEntries(kept)));
    } catch {
      // then they are as they were with the next visit
    }
  }

  #restore() {
    let kept = {};
    try {
      kept = JSON.parse(localStorage.getItem(STORED)) ?? {};
    } catch {
      return; // nothing was kept, or nothing of ours
    }
    for (const name of KEPT) {
      if (typeof kept[name] === "string") this.#form.elements[name].value = kept[name];
    }
  }
}

// The tools in a text; null if it is no list in JSON.
function toolsIn(text) {
  if (!text.trim()) return [];
  try {
    const found = JSON.parse(text);
    return Array.isArray(found) ? found : null;
  } catch {
    return null;
  }
}
