// Several models behind one address: a list of them, and the way to the page of another.

import { find, make } from "./elements.js";

const WORDS = {
  unloaded: "is loaded when it is asked",
  loading: "is being loaded",
  unloading: "is being freed",
  stuck: "does not come back",
};

// What is said of a model beside its name; nothing where it can be asked at once.
export function stateOf(model) {
  return WORDS[model.state] ?? "";
}

// Offers the other models, where there are some. The page is loaded anew for one of them.
export function offer(models, current) {
  const others = models.filter((each) => each.id !== current.id);
  const list = find("models");
  for (const each of others) {
    const state = stateOf(each);
    list.append(make("option", { value: each.id }, state ? `${each.id} (${state})` : each.id));
  }
  find("choice").hidden = !others.length;
  find("choice").addEventListener("submit", (event) => {
    event.preventDefault();
    location.search = new URLSearchParams({ model: list.value });
  });
}
