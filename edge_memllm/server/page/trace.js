// One text, token by token: what each is, where its record came from, what memory did to it.

// The deepest colour is for an effect that so many of all tokens do not reach; at least, in nats:
const SHARE = 0.9;
const LEAST = 1;

export class Trace {
  #byToken = new Map();

  constructor() {
    this.places = []; // by position, the prompt's first
    this.promptLength = 0;
    this.memory = null; // of the server, when it was last told
    this.measured = false;
    this.deepest = 1; // the effect, in nats, that has the full colour
  }

  // Takes a part of a reply; returns the positions of its new tokens.
  take({ tokens, records, memory }) {
    this.memory = memory;
    for (const { position, token, text, bytes, origin } of records) {
      if (position === this.places.length) this.#add(token);
      Object.assign(this.places[position], { text, bytes, origin });
    }
    if (!this.promptLength) this.promptLength = this.places.length;
    return tokens.map((token) => this.#add(token));
  }

  // Other positions of the same token: they share its record.
  twins(position) {
    return this.#byToken.get(this.places[position].token).filter((other) => other !== position);
  }

  get ids() {
    return this.places.map((place) => place.token);
  }

  // Records that were told of, from one position to another.
  told(start, end = this.places.length) {
    return this.places.slice(start, end).filter((place) => place.origin);
  }

  // Takes the log-probabilities of all tokens, as the model is and without its memory.
  measure(withMemory, without) {
    this.places.forEach((place, position) => {
      place.logprob = withMemory[position] ?? null; // the first has none, nor what was not read
      place.effect = place.logprob === null ? null : place.logprob - without[position];
    });
    this.measured = true;
    const sizes = this.places.map((place) => Math.abs(place.effect ?? 0)).sort((a, b) => a - b);
    this.deepest = Math.max(LEAST, sizes[Math.floor(SHARE * (sizes.length - 1))]);
  }

  #add(token) {
    const position = this.places.push({ token, text: null, bytes: 0, origin: null }) - 1;
    if (!this.#byToken.has(token)) this.#byToken.set(token, []);
    this.#byToken.get(token).push(position);
    return position;
  }
}

export function read(places) {
  const stored = places.filter((place) => place.origin === "storage");
  return stored.reduce((sum, place) => sum + place.bytes, 0);
}
