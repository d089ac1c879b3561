"use strict";
// Switches between what the page already shows or holds. Puts text in as text only, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const REACH = 14; // pixels of the map within which a point is meant
  const MOST_FOUND = 12; // words named when tokens are searched for
  let switches = 0;

  function make(tag, properties = {}, ...inside) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) made.setAttribute(name, value);
    made.append(...inside);
    return made;
  }

  function drawn(tag, properties) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(properties)) made.setAttribute(name, value);
    return made;
  }

  // As `figure` of the Python side writes numbers.
  function figure(value) {
    if (value === null) return "–";
    const size = Math.abs(value);
    const sign = value > 0 ? "+" : value < 0 ? "−" : "";
    if (size && (size < 1e-3 || size >= 1e5)) return sign + size.toExponential(1);
    const digits = size ? 2 - Math.floor(Math.log10(size)) : 0;
    const decimals = Math.min(3, Math.max(0, digits));
    const form = { minimumFractionDigits: decimals, maximumFractionDigits: decimals };
    return sign + size.toLocaleString("en-US", form);
  }

  function tint(target, value, limit) {
    const share = value === null || !limit ? 0 : Math.max(-1, Math.min(1, value / limit));
    target.style.setProperty("--v", share.toFixed(3));
  }

  // Radio buttons: one of the labels is chosen at any time. Returns how to choose by number.
  function addSwitch(place, name, labels, chosen) {
    const group = `switch-${switches++}`;
    const set = make("fieldset", {}, make("legend", {}, name));
    const inputs = labels.map((label, number) => {
      const input = make("input", { type: "radio", name: group, "aria-label": `${name} ${label}` });
      input.addEventListener("change", () => chosen(number));
      set.append(make("label", {}, input, make("span", {}, label)));
      return input;
    });
    inputs[0].checked = true;
    place.append(set);
    return (number) => {
      inputs[number].checked = true;
      chosen(number);
    };
  }

  function startPanels(box) {
    const panels = [...box.querySelectorAll(":scope > .panel")];
    if (panels.length < 2) return;
    const show = (number) => panels.forEach((panel, each) => (panel.hidden = each !== number));
    const place = make("div", { class: "switches" });
    box.prepend(place);
    box.classList.add("switched");
    addSwitch(place, box.dataset.switch, panels.map((panel) => panel.dataset.name), show);
    show(0);
  }

  function startSentence(box) {
    const facts = data.sentences[Number(box.dataset.sentence)];
    const words = [...box.querySelectorAll(".t")];
    const cells = [...box.querySelectorAll(".heat i")];
    const columns = [...box.querySelectorAll(".heat .word")];
    const detail = box.querySelector(".selected");
    const [low, high] = ["low", "high"].map((name) => box.querySelector(`.legend .${name}`));
    const state = { measure: 0, layer: null, target: 0 };
    const layers = facts.measures[0].layers.length;

    function shown() {
      const measure = facts.measures[state.measure];
      const all = state.layer === null;
      return {
        measure,
        values: all ? measure.total : measure.layers[state.layer],
        limit: measure.limits[all ? 0 : 1],
      };
    }

    function paint() {
      const { measure, values, limit } = shown();
      words.forEach((word, place) => tint(word, values[place], limit));
      for (const cell of cells) {
        tint(cell, measure.layers[cell.dataset.l][cell.dataset.t], measure.limits[1]);
      }
      const edge = figure(limit).slice(limit ? 1 : 0);
      low.textContent = `−${edge} or less`;
      high.textContent = `+${edge} ${measure.unit} or more`;
      box.querySelector(".definition").textContent = measure.definition;
      select(state.target);
    }

    function select(target) {
      state.target = target;
      words.forEach((word, place) => {
        word.setAttribute("aria-pressed", String(place === target));
        word.tabIndex = place === target ? 0 : -1;
      });
      for (const cell of cells) {
        const inLayer = state.layer === null || Number(cell.dataset.l) === state.layer;
        cell.classList.toggle("here", Number(cell.dataset.t) === target && inLayer);
      }
      columns.forEach((column, place) => column.classList.toggle("here", place === target));
      detail.replaceChildren(heading(target), figures(target));
    }

    function heading(target) {
      const chances = ` ${facts.with[target]} probable with memory, ${facts.without[target]} without`;
      return make("div", {}, make("bdi", { class: "token" }, facts.tokens[target]), chances);
    }

    function figures(target) {
      const head = make("tr", {}, make("th", { scope: "col" }, "layer"));
      for (const each of facts.measures) {
        head.append(make("th", { scope: "col" }, `${each.name}, ${each.unit}`));
      }
      const rows = [null, ...Array(layers).keys()].map((layer) => row(target, layer));
      return make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
    }

    function row(target, layer) {
      const all = layer === null;
      const kind = layer === state.layer ? "chosen" : "";
      const made = make("tr", { class: kind }, make("th", { scope: "row" }, all ? "all" : `${layer}`));
      for (const measure of facts.measures) {
        const value = (all ? measure.total : measure.layers[layer])[target];
        const bar = make("span", { class: "bar both" }, make("b", {}, figure(value)));
        tint(bar, value, measure.limits[all ? 0 : 1]);
        made.append(make("td", {}, bar));
      }
      return made;
    }

    function meant(event) {
      const found = event.target.closest("[data-t]");
      return found && box.contains(found) ? found : null;
    }

    const place = box.querySelector(".switches");
    const names = facts.measures.map((measure) => measure.name);
    if (names.length > 1) {
      addSwitch(place, "Colour by", names, (number) => {
        state.measure = number;
        paint();
      });
    }
    const pickLayer = addSwitch(place, "Layer", ["all", ...Array(layers).keys()].map(String), (n) => {
      state.layer = n ? n - 1 : null;
      paint();
    });
    for (const word of words) word.setAttribute("role", "button");
    box.addEventListener("pointerover", (event) => {
      const found = event.pointerType === "mouse" ? meant(event) : null;
      if (found) select(Number(found.dataset.t));
    });
    box.addEventListener("click", (event) => {
      const found = meant(event);
      if (!found) return;
      select(Number(found.dataset.t));
      if (found.dataset.l) pickLayer(Number(found.dataset.l) + 1);
    });
    box.querySelector(".text").addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const last = words.length - 1;
      const ends = { Home: 0, End: last };
      const goal = step ? Math.max(0, Math.min(last, state.target + step)) : ends[event.key];
      if (goal === undefined) return;
      event.preventDefault();
      select(goal);
      words[goal].focus();
    });
    const effects = facts.measures[0].total.map((value) => Math.abs(value ?? 0));
    state.target = effects.indexOf(Math.max(...effects));
    paint();
  }

  function startMap(box) {
    const svg = box.querySelector("svg");
    const tip = box.querySelector(".tip");
    const names = data.clusters.maps[Number(box.dataset.map)];
    const points = [...svg.querySelectorAll(".dots")].flatMap((dots, group) =>
      [...dots.firstChild.getAttribute("d").matchAll(/M(\d+) (\d+)/g)].map((at, place) => ({
        x: Number(at[1]),
        y: Number(at[2]),
        cluster: Number(dots.dataset.c),
        word: data.clusters.words[names[group][place]],
      })),
    );
    const panel = box.closest(".clusters");
    const labels = [...panel.querySelectorAll(".legend-list strong")].map((each) => each.textContent);
    const found = svg.insertBefore(drawn("path", { class: "found" }), svg.querySelector(".dots"));
    const near = svg.appendChild(drawn("circle", { class: "near", r: 7, visibility: "hidden" }));

    function nearest(event) {
      const frame = svg.getBoundingClientRect();
      const scale = svg.viewBox.baseVal.width / frame.width;
      const [x, y] = [(event.clientX - frame.left) * scale, (event.clientY - frame.top) * scale];
      let [best, least] = [null, (REACH * scale) ** 2];
      for (const point of points) {
        const far = (point.x - x) ** 2 + (point.y - y) ** 2;
        if (far < least) [best, least] = [point, far];
      }
      return { point: best, scale };
    }

    function show(event) {
      const { point, scale } = nearest(event);
      tip.hidden = !point;
      near.setAttribute("visibility", point ? "visible" : "hidden");
      if (!point) return;
      near.setAttribute("cx", point.x);
      near.setAttribute("cy", point.y);
      const label = `  ${point.cluster + 1}: ${labels[point.cluster]}`;
      tip.replaceChildren(make("bdi", {}, point.word), label);
      const [outer, inner] = [box, svg].map((each) => each.getBoundingClientRect());
      const room = inner.width - tip.offsetWidth;
      tip.style.left = `${Math.max(0, Math.min(room, point.x / scale + 12))}px`;
      tip.style.top = `${inner.top - outer.top + point.y / scale + 14}px`;
    }

    function hide() {
      tip.hidden = true;
      near.setAttribute("visibility", "hidden");
    }

    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", hide);
    startFinder(box.querySelector(".finder"), points, found);
    startLegend(panel, svg);
  }

  function startFinder(place, points, found) {
    const input = make("input", { type: "search", spellcheck: "false" });
    const output = make("output", { class: "soft" });
    place.append(make("label", {}, "Find a token", input), output);
    input.addEventListener("input", () => {
      const asked = input.value.toLowerCase();
      const hits = asked ? points.filter((each) => each.word.toLowerCase().includes(asked)) : [];
      found.setAttribute("d", hits.map((each) => `M${each.x} ${each.y}h0`).join(""));
      const named = hits.slice(0, MOST_FOUND).map((each) => each.word).join("  ");
      output.textContent = asked ? `${hits.length} on this map  ${named}` : "";
    });
  }

  function startLegend(panel, svg) {
    let pinned = null;
    const focus = (cluster) => {
      svg.classList.toggle("focused", cluster !== null);
      for (const dots of svg.querySelectorAll(".dots")) {
        dots.classList.toggle("on", dots.dataset.c === cluster);
      }
    };
    for (const item of panel.querySelectorAll(".legend-list li")) {
      const swatch = item.querySelector(".swatch");
      const name = `Show cluster ${swatch.textContent}: ${item.querySelector("strong").textContent}`;
      const button = make("button", {
        type: "button",
        class: swatch.className,
        style: swatch.getAttribute("style"),
        "aria-pressed": "false",
        "aria-label": name,
      });
      button.textContent = swatch.textContent;
      swatch.replaceWith(button);
      item.addEventListener("pointerenter", () => focus(item.dataset.c));
      item.addEventListener("pointerleave", () => focus(pinned));
      button.addEventListener("click", () => {
        pinned = pinned === item.dataset.c ? null : item.dataset.c;
        for (const each of panel.querySelectorAll("button.swatch")) {
          each.setAttribute("aria-pressed", String(each === button && pinned !== null));
        }
        focus(pinned);
      });
    }
  }

  document.documentElement.classList.add("scripted");
  document.querySelectorAll(".sentence").forEach(startSentence);
  document.querySelectorAll(".map").forEach(startMap);
  document.querySelectorAll(".panels").forEach(startPanels);
})();
