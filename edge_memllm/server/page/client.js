// Talks to the server: JSON, and streams of events. Knows the key, and nothing of the page.

const STORED = "edge-memllm-key";
const DONE = "[DONE]";

let key = stored();
let model; // of every request, once it is known

function stored() {
  try {
    return sessionStorage.getItem(STORED) ?? "";
  } catch {
    return ""; // a browser that keeps nothing
  }
}

export function use(name) {
  model = name;
}

export function unlock(given) {
  key = given;
  try {
    sessionStorage.setItem(STORED, given);
  } catch {
    // then it is asked for again with the next visit
  }
}

// What the server said instead of a reply.
export class Refusal extends Error {
  constructor(status, error, retryAfter = null) {
    super(error?.message ?? `The server answered with status ${status}.`);
    this.status = status;
    this.param = error?.param ?? null;
    this.retryAfter = retryAfter;
  }
}

export async function get(path) {
  return (await send(path, {})).json();
}

export async function post(path, body, signal) {
  return (await send(path, posted(body), signal)).json();
}

// Yields the events of a stream. Leaving early must abort `signal`.
export async function* stream(path, body, signal) {
  const response = await send(path, posted({ ...body, stream: true }), signal);
  for await (const data of events(response.body, signal)) {
    if (data === DONE) return;
    const event = JSON.parse(data);
    if (event.error) throw new Refusal(response.status, event.error);
    yield event;
  }
  throw new Refusal(response.status, { message: "The connection ended before the reply did." });
}

function posted(body) {
  const headers = { "Content-Type": "application/json" };
  return { method: "POST", headers, body: JSON.stringify({ model, ...body }) };
}

async function send(path, options, signal) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const asked = fetch(path, { ...options, headers, signal, cache: "no-store" });
  const response = await asked.catch((error) => unreached(error, signal));
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  throw new Refusal(response.status, answer.error, response.headers.get("Retry-After"));
}

// Fails as the network did, in words; who has stopped it is told nothing else.
function unreached(error, signal) {
  if (signal?.aborted) throw error;
  throw new Refusal(0, { message: "The server cannot be reached. Is it still running?" });
}

async function* events(body, signal) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => unreached(error, signal));
      if (done) return;
      rest += value;
      const blocks = rest.split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        if (block.startsWith("data: ")) yield block.slice(6); // others are comments
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
