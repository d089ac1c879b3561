// Elements, and figures as people read them. Puts text in as text only, never as HTML.

const SVG = "http://www.w3.org/2000/svg";

export const find = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...inside) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) made.setAttribute(name, value);
  made.append(...inside);
  return made;
}

export function drawn(tag, properties) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(properties)) made.setAttribute(name, value);
  return made;
}

export function rows(pairs) {
  const list = make("dl", { class: "rows" });
  for (const [name, value] of pairs) {
    list.append(make("div", {}, make("dt", {}, name), make("dd", {}, value)));
  }
  return list;
}

export const whole = (value) => value.toLocaleString("en-US");

export function short(value, digits = 3) {
  return value.toLocaleString("en-US", { maximumSignificantDigits: digits });
}

// Decimal units, as everywhere else in the project.
export function bytes(value) {
  const units = ["bytes", "kB", "MB", "GB"];
  let size = value;
  let unit = 0;
  while (Math.abs(size) >= 1000 && unit < units.length - 1) {
    size /= 1000;
    unit += 1;
  }
  return `${unit ? short(size) : whole(Math.round(size))} ${units[unit]}`;
}

export function seconds(value) {
  return value < 1 ? `${short(value * 1000, 2)} ms` : `${short(value)} s`;
}

export function percent(share) {
  if (share > 0 && share < 0.0001) return "under 0.01 %";
  return `${short(100 * share, share < 0.1 ? 2 : 3)} %`;
}

export const count = (number, one, many) => `${whole(number)} ${number === 1 ? one : many}`;

// What nobody sees is shown by a sign: a token may be a space, or the end of a line.
export function visible(text) {
  return text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣").replace(/\p{Cc}/gu, "�");
}
