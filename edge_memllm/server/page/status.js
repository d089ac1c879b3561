// What the page says of itself, and how it follows a text that grows.

import { find } from "./elements.js";

// Pixels from the end of the texts within which the page follows one that grows.
const NEAR = 120;

export function complain(text) {
  find("trouble").textContent = text;
  find("trouble").hidden = !text;
  if (text) find("trouble").scrollIntoView({ block: "nearest" });
}

export function say(text) {
  find("status").textContent = text;
}

// Does something that makes a text longer, and stays at the end of the texts if it was there.
export function following(change, always = false) {
  const end = document.querySelector("main");
  const below = () => end.getBoundingClientRect().bottom - innerHeight;
  const near = always || Math.abs(below()) < NEAR;
  change();
  if (near) scrollBy({ top: below(), behavior: "instant" });
}
