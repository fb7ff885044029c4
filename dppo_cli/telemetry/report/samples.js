// The sample browser: steps, their samples, and the tokens of one, coloured. All text is set as textContent.
"use strict";
function dppoSamples({ steps, delta }, root) {
  const PAGE = 2000; // tokens shown at once
  const state = { step: steps.length - 1, sample: 0, page: 0, colour: "divergence", sort: "problem" };
  let block = null; // of the step: prompts, texts, samples
  let order = []; // indices of samples, sorted
  const node = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
    }
    made.append(...children.filter((c) => c !== null && c !== undefined));
    return made;
  };

  // What cannot be seen is written out: control and format characters, halves of surrogate pairs. Joiners stay: emoji need them.
  const HIDDEN = /(?![\u200c\u200d\ufe0f])[\p{Cc}\p{Cf}\p{Cs}\u2028\u2029]/gu;
  const NAMES = { "\n": "↵", "\r": "␍", "\t": "⇥" };
  const escape = (c) => NAMES[c] || `\\u${c.codePointAt(0).toString(16).padStart(4, "0")}`;
  function fill(place, text, breaks) {
    let end = 0;
    for (const found of text.matchAll(HIDDEN)) {
      place.append(text.slice(end, found.index), node("span", { class: "sign" }, escape(found[0])));
      if (breaks && found[0] === "\n") place.append("\n");
      end = found.index + found[0].length;
    }
    place.append(text.slice(end));
    return place;
  }
  const visible = (text) => text.replace(HIDDEN, escape);

  // Colours: a hue says which way, five levels how far.
  const last = (edges, value) => edges.filter((edge) => value >= edge).length;
  const d = (sample) => (sample.advantage < 0 ? delta.low : delta.high) || delta.high || delta.low || 0.1;
  const number = (v) => (v === null || v === undefined ? "not known" : Math.abs(v) >= 0.001 || v === 0 ? String(Number(v.toPrecision(4))) : v.toExponential(2));
  const ratio = (sample, i) => (sample.mu && sample.pi && sample.mu[i] !== null && sample.pi[i] !== null ? Math.exp(sample.pi[i] - sample.mu[i]) : null);
  const RATIO = [1.05, 1.2, 1.5, 2];
  const ADVANTAGE = [1e-9, 0.25, 0.5, 1];
  const COLOURS = {
    divergence: {
      title: "Divergence of pi from mu",
      of: (s, i) => (s.d ? s.d[i] : null),
      level: (v, s) => ["--divergence", last([0.1 * d(s), 0.5 * d(s), d(s), 2 * d(s)], v)],
      legend: (s) => [0.1, 0.5, 1, 2].map((f, i) => ["--divergence", i + 1, `above ${f === 1 ? "" : f}δ = ${number(f * d(s))}`]),
    },
    ratio: {
      title: "Ratio pi / mu",
      of: ratio,
      level: (v) => (v >= 1 ? ["--above", last(RATIO, v)] : ["--below", last(RATIO, 1 / v)]),
      legend: () => [
        ...[...RATIO].reverse().map((r, i) => ["--below", 4 - i, `below ${number(1 / r)}`]),
        ...RATIO.map((r, i) => ["--above", i + 1, `above ${r}`]),
      ],
    },
    advantage: {
      title: "Advantage of the sample",
      of: (s) => s.advantage,
      level: (v) => [v > 0 ? "--positive" : "--negative", last(ADVANTAGE, Math.abs(v))],
      legend: () => [
        ...[1, 0.5, 0.25, 0].map((v, i) => ["--negative", 4 - i, `below ${v ? "−" : ""}${v}`]),
        ...[0, 0.25, 0.5, 1].map((v, i) => ["--positive", i + 1, `above ${v}`]),
      ],
    },
  };

  // Why a token got no gradient, if it did not: the trust region's mask, or the off-policy filter.
  const why = (s, i) => (s.filtered && s.filtered[i] === 1 ? "filtered" : s.keep && s.keep[i] === 0 ? "masked" : null);
  const masked = (s) => (s.keep ? s.keep.reduce((n, k) => n + (k === 0), 0) : 0);
  const largest = (s) => (s.d ? s.d.reduce((m, v) => (v !== null && v > m ? v : m), -1) : -1);
  const SORTS = {
    problem: ["problem", () => 0],
    low: ["score, lowest first", (s) => s.score ?? Infinity],
    high: ["score, highest first", (s) => -(s.score ?? -Infinity)],
    masked: ["most masked tokens", (s) => -masked(s)],
    divergence: ["largest divergence", (s) => -largest(s)],
    long: ["longest", (s) => -s.n],
  };

  async function unpack(step) {
    const bytes = Uint8Array.from(atob(document.getElementById(`step-${step}`).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  // Parts of the browser
  const select = (label, options, value, onchange) =>
    node("label", {}, label, node("select", { onchange, "aria-label": label }, ...options.map(([v, text]) => node("option", { value: v, selected: v === value }, text))));
  const stepSelect = select("Step", steps.map(([step, n, all], i) => [i, `${step} (${n < all ? `${n} of ${all}` : n} samples)`]), state.step, (e) => go(Number(e.target.value)));
  const before = node("button", { type: "button", "aria-label": "Step before", onclick: () => go(state.step - 1) }, "‹");
  const after = node("button", { type: "button", "aria-label": "Step after", onclick: () => go(state.step + 1) }, "›");
  const sortSelect = select("Order", Object.entries(SORTS).map(([k, [text]]) => [k, text]), state.sort, (e) => { state.sort = e.target.value; sort(); list(); open(order[0] ?? 0); });
  const colourButtons = Object.keys(COLOURS).map((name) =>
    node("button", { type: "button", "data-colour": name, onclick: () => { state.colour = name; paint(); } }, name));
  const colourGroup = node("div", { role: "group", "aria-label": "Colour tokens by" }, node("span", { class: "label" }, "Colour tokens by"), node("div", { class: "row" }, ...colourButtons));
  const samplesList = node("ul", { class: "list", "aria-label": "Samples of this step" });
  const main = node("div", { class: "sample", "aria-live": "off" });
  const detail = node("aside", { class: "detail", "aria-label": "Token", "aria-live": "polite" });
  root.append(
    node("div", { class: "controls" }, node("div", { class: "row" }, before, after), stepSelect, sortSelect, colourGroup),
    node("div", { class: "viewer" }, samplesList, main, detail),
  );

  async function go(step) {
    state.step = Math.max(0, Math.min(steps.length - 1, step));
    stepSelect.querySelector("select").value = state.step;
    before.disabled = state.step === 0;
    after.disabled = state.step === steps.length - 1;
    const asked = state.step;
    try {
      const found = await unpack(steps[asked][0]);
      if (asked !== state.step) return; // another step was chosen meanwhile
      block = found;
    } catch {
      main.replaceChildren(node("p", {}, "This browser cannot unpack the samples; a newer one can."));
      return;
    }
    sort();
    list();
    open(order[0]);
  }

  function sort() {
    const key = SORTS[state.sort][1];
    order = block.samples.map((_, i) => i).sort((a, b) => key(block.samples[a]) - key(block.samples[b]) || a - b);
  }

  function list() {
    samplesList.replaceChildren(...order.map((i) => {
      const s = block.samples[i];
      const n = masked(s);
      const about = [`score ${s.score === null ? "none" : number(s.score)}`, `${s.n} tokens`, n ? `${n} masked` : null];
      return node("li", {}, node("button", { type: "button", "data-sample": i, onclick: () => open(i) },
        `Problem ${s.problem ?? "?"}, sample ${s.sample ?? "?"}`, node("small", {}, about.filter(Boolean).join(" · ")),
        node("small", { class: "start" }, visible((s.completion || (s.tokens || []).slice(0, 80).join("")).slice(0, 80)))));
    }));
  }

  function open(i) {
    state.sample = i;
    state.page = 0;
    samplesList.querySelectorAll("button").forEach((b) => b.setAttribute("aria-current", String(Number(b.dataset.sample) === i)));
    show();
  }

  function show() {
    const s = block.samples[state.sample];
    const about = { score: s.score === null ? "not judged" : number(s.score), advantage: number(s.advantage), status: s.status, answer: s.answer, note: s.note };
    for (const [name, value] of Object.entries(s.parts || {})) about[name] = number(value);
    const facts = Object.entries(about).filter(([, v]) => v !== undefined && v !== null && v !== "")
      .map(([name, value]) => fill(node("span", {}, node("b", {}, `${visible(name)} `)), String(value).slice(0, 2000), false));
    const replies = Array.from(s.sampled || []).filter((sampled) => sampled === 0).length;
    main.replaceChildren(
      node("div", { class: "about" }, ...facts),
      node("div", { class: "label" }, "Prompt"),
      fill(node("div", { class: "prompt", tabindex: 0, role: "region", "aria-label": "Prompt" }), block.prompts[s.prompt].slice(0, 100000), true),
      node("div", { class: "label", id: "tokens-label" }, `Completion, ${s.n} tokens${replies ? `, ${replies} of them by the environment, in italics` : ""}`),
    );
    detail.replaceChildren(node("p", { class: "note" }, "Point at a token or tap it, or move to it with Tab and the arrow keys, to see its figures. M goes to the next masked token."));
    if (!s.tokens && !s.ids) {
      main.append(fill(node("div", { class: "tokens" }), (s.completion || "").slice(0, 100000), true), node("p", { class: "note" }, "The tokens of this sample were not kept."));
      return;
    }
    const start = state.page * PAGE;
    const end = Math.min(s.n, start + PAGE);
    const box = node("div", { class: "tokens", role: "group", "aria-labelledby": "tokens-label", onkeydown: keys, onmouseover: look, onfocusin: look, onclick: look });
    for (let i = start; i < end; i++) {
      const text = s.tokens ? s.tokens[i] : `#${s.ids[i]} `;
      const off = why(s, i);
      const token = node("span", { class: `tok${off ? ` ${off}` : ""}${s.sampled && s.sampled[i] === 0 ? " unsampled" : ""}`, role: "button", tabindex: i === start ? 0 : -1, "data-i": i, "aria-label": `${visible(text)}${off ? `, ${off}` : ""}` });
      box.append(text === "" ? (token.append(node("span", { class: "sign" }, "∅")), token) : fill(token, text, true));
    }
    main.append(box, node("div", { class: "key" }));
    if (s.n > PAGE) {
      const turn = (by) => { state.page += by; show(); };
      main.append(node("div", { class: "pager" },
        node("button", { type: "button", disabled: start === 0, onclick: () => turn(-1) }, "Tokens before"),
        `Tokens ${start + 1} to ${end} of ${s.n}`,
        node("button", { type: "button", disabled: end === s.n, onclick: () => turn(1) }, "Tokens after")));
    }
    paint();
  }

  function paint() {
    colourButtons.forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.colour === state.colour)));
    const s = block.samples[state.sample];
    const colour = COLOURS[state.colour];
    const swatch = (hue, level, text, more = "") => {
      const tok = node("span", { class: `tok${more}` }, "a");
      tok.style.setProperty("--hue", `var(${hue})`);
      tok.style.setProperty("--level", level);
      return node("span", {}, tok, text);
    };
    for (const token of main.querySelectorAll(".tokens > .tok")) {
      const value = colour.of(s, Number(token.dataset.i));
      const [hue, level] = value === null || value === undefined ? ["--faint", 0] : colour.level(value, s);
      token.style.setProperty("--hue", `var(${hue})`);
      token.style.setProperty("--level", level);
    }
    const known = s.n && colour.of(s, 0) !== null && colour.of(s, 0) !== undefined;
    main.querySelector(".key")?.replaceChildren(
      node("b", {}, `${colour.title}${known ? ":" : " was not kept"}`),
      ...(known ? colour.legend(s).map(([hue, level, text]) => swatch(hue, level, text)) : []),
      swatch("--faint", 0, "masked: no gradient", " masked"),
      ...(s.filtered && s.filtered.includes(1) ? [swatch("--faint", 0, "filtered: no gradient", " filtered")] : []),
    );
  }

  // A token's figures
  function look(event) {
    const token = event.target.closest(".tok");
    if (!token) return;
    const i = Number(token.dataset.i);
    const s = block.samples[state.sample];
    if (event.type !== "mouseover") {
      main.querySelectorAll('.tokens > .tok[tabindex="0"]').forEach((t) => t.setAttribute("tabindex", -1));
      token.setAttribute("tabindex", 0);
      if (event.type === "click") token.focus();
    }
    const p = (log) => (log === null || log === undefined ? "not known" : number(Math.exp(log)));
    const kept = s.keep ? s.keep[i] : null;
    const rows = {
      position: `${i + 1} of ${s.n}`,
      id: s.ids ? s.ids[i] : "not known",
      mu: p(s.mu && s.mu[i]),
      pi: p(s.pi && s.pi[i]),
      "pi / mu": number(ratio(s, i)),
      divergence: `${number(s.d ? s.d[i] : null)} (δ ${number(d(s))})`,
      advantage: number(s.advantage),
      gradient: s.sampled && s.sampled[i] === 0 ? "none: not sampled" : kept === null ? "not known" : why(s, i) || "kept",
    };
    const text = s.tokens ? s.tokens[i] : `#${s.ids[i]}`;
    detail.replaceChildren(
      fill(node("div", { class: "token" }), text || "∅", false),
      node("dl", {}, ...Object.entries(rows).flatMap(([k, v]) => [node("dt", {}, k), node("dd", {}, String(v))])),
    );
    const top = s.top && s.top[i];
    if (!top || !top.length) return;
    const bar = (log, pi) => {
      const made = node("span", { class: `pair${pi ? " pi" : ""}` });
      made.style.width = `${log === null ? 0 : 100 * Math.min(1, Math.exp(log))}%`;
      return made;
    };
    const line = ([id, mu, pi]) => node("tr", {},
      fill(node("td", {}), id in block.texts ? block.texts[id] || "∅" : `#${id}`, false),
      node("td", { class: "number" }, p(mu), bar(mu, false)), node("td", { class: "number" }, pi === null ? "–" : p(pi), bar(pi, true)));
    detail.append(node("table", {}, node("caption", {}, `The ${top.length} likeliest under mu`),
      node("thead", {}, node("tr", {}, ...["token", "mu", "pi"].map((t) => node("th", { scope: "col" }, t)))), node("tbody", {}, ...top.map(line))));
  }

  function keys(event) {
    const tokens = [...main.querySelectorAll(".tokens > .tok")];
    const at = tokens.indexOf(document.activeElement);
    if (at < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const beside = (by) => {
      // The token of the next line that lies under this one.
      const { left, top } = tokens[at].getBoundingClientRect();
      let best = at;
      for (let i = at + by, line = null; tokens[i]; i += by) {
        const box = tokens[i].getBoundingClientRect();
        if (Math.abs(box.top - top) < 4) continue;
        if (line === null) { line = box.top; best = i; }
        if (Math.abs(box.top - line) > 4) break;
        if (Math.abs(box.left - left) < Math.abs(tokens[best].getBoundingClientRect().left - left)) best = i;
      }
      return best;
    };
    const off = (i) => tokens[i].classList.contains("masked");
    const moves = {
      ArrowRight: () => at + 1,
      ArrowLeft: () => at - 1,
      ArrowDown: () => beside(1),
      ArrowUp: () => beside(-1),
      Home: () => 0,
      End: () => tokens.length - 1,
      m: () => [...tokens.keys()].find((i) => i > at && off(i)) ?? tokens.findIndex((_, i) => off(i)),
    };
    const to = moves[event.key]?.();
    if (to === undefined) return;
    event.preventDefault();
    tokens[to]?.focus();
  }

  go(state.step);
}
