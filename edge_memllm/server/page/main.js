// The page: begins with what the server says of its model, and asks for a key where one is wanted.

import { Refusal, get, unlock, use } from "./client.js";
import { find, whole } from "./elements.js";
import { offer, stateOf } from "./models.js";
import { Page } from "./page.js";
import { complain } from "./status.js";

const UNAUTHORIZED = 401;

function facts(model) {
  const said = [`${whole(model.max_model_len)} tokens of context`];
  if (model.record_bytes) said.push(`records of ${whole(model.record_bytes)} bytes`);
  if (model.reader) said.push(`reader ${model.reader}`);
  if (model.device) said.push(model.device.toUpperCase());
  if (stateOf(model)) said.push(stateOf(model));
  return said.join(" · ");
}

function explained(error) {
  if (error.status === UNAUTHORIZED) lock();
  if (!(error instanceof Refusal)) {
    console.error(error);
    return `This page has failed, not the server: ${error.message}`;
  }
  const again = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  return error.message + again;
}

function lock() {
  if (find("key").value) find("refusal").textContent = "That key does not open it.";
  find("lock").hidden = false;
  find("key").focus();
}

async function start() {
  let told;
  try {
    const { data } = await get("/v1/models");
    const asked = new URLSearchParams(location.search).get("model"); // ?model=NAME, or the first
    const model = data.find((each) => each.id === asked) ?? data[0];
    const overlays = await get(`/v1/overlays?model=${encodeURIComponent(model.id)}`);
    use(model.id);
    told = [model, overlays, data];
  } catch (error) {
    const said = explained(error);
    find("facts").textContent = error.status === UNAUTHORIZED ? "Locked" : said;
    return;
  }
  const [model, { data: overlays }, models] = told;
  find("lock").hidden = true;
  find("model").textContent = document.title = model.id;
  find("facts").textContent = facts(model);
  offer(models, model);
  document.body.classList.add("ready");
  new Page(model, overlays, explained);
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
