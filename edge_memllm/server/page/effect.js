// What memory did to each token of a text: its log-probability with memory, less that without.

import { post } from "./client.js";

// Measures a text that is complete. Asks the server to read it twice, and to write nothing. A text
// that has filled the context is one token longer than that: its last was chosen, and is not read.
export async function measure(trace, wishes, longest, signal) {
  const asked = { prompt: trace.ids.slice(0, longest), echo: true, logprobs: 0, max_tokens: 0 };
  const scores = async (more) => {
    const reply = await post("/v1/completions", { ...asked, ...more }, signal);
    return reply.choices[0].logprobs.token_logprobs;
  };
  const whole = await scores(wishes);
  trace.measure(whole, await scores({ without_memory: true }));
}
