// Copies texts, and says so.

import { find, make } from "./elements.js";

const SHOWN = 1600; // milliseconds for which a button says what it did

export function copyButton(name, text) {
  const button = make("button", { type: "button", class: "small" }, name);
  button.addEventListener("click", async () => {
    const done = (await copied(text())) ? "Copied" : "This browser does not let me copy";
    button.textContent = done;
    find("status").textContent = done;
    setTimeout(() => { button.textContent = name; }, SHOWN);
  });
  return button;
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copiedByHand(text); // pages that came without TLS have no clipboard
  }
}

function copiedByHand(text) {
  const area = make("textarea", { class: "hidden", readonly: "" });
  const before = document.activeElement;
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  before?.focus();
  return done;
}
