// What this window holds until it is closed, a reload included: the draft, and what is open.

const PREFIX = "edge-memllm-window-";

export function remembered(name) {
  try {
    return sessionStorage.getItem(PREFIX + name) ?? "";
  } catch {
    return ""; // a browser that keeps nothing
  }
}

export function remember(name, value) {
  try {
    sessionStorage.setItem(PREFIX + name, value);
  } catch {
    // then a reload begins anew
  }
}
