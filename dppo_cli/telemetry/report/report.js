// Figures, theme, values and refreshing. Text of a run is shown with textContent only.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const drawn = new Set();

  // Colours are CSS variables; plotly.js needs them as numbers, and again after a change of theme.
  const probe = document.createElement("i");
  probe.hidden = true;
  document.body.append(probe);
  function resolved(value, cache) {
    if (typeof value === "string") {
      if (!value.startsWith("var(--")) return value;
      if (!cache.has(value)) {
        probe.style.color = value;
        cache.set(value, getComputedStyle(probe).color);
      }
      return cache.get(value);
    }
    if (Array.isArray(value)) {
      return typeof value[0] === "object" || typeof value[0] === "string" ? value.map((v) => resolved(v, cache)) : value;
    }
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, resolved(v, cache)]));
  }

  function draw(place) {
    const figure = resolved(data.figures[place.dataset.figure], new Map());
    const touch = matchMedia("(pointer: coarse)").matches;
    Plotly.react(place, figure.data, figure.layout, {
      responsive: true,
      displaylogo: false,
      displayModeBar: false,
      scrollZoom: false,
      staticPlot: false,
      showTips: false,
      doubleClick: touch ? false : "reset",
    });
    drawn.add(place);
  }

  const places = [...document.querySelectorAll(".curves")];
  const seen = new IntersectionObserver(
    (entries) => entries.filter((e) => e.isIntersecting && !drawn.has(e.target)).forEach((e) => draw(e.target)),
    { rootMargin: "300px" },
  );
  places.forEach((place) => seen.observe(place));
  addEventListener("beforeprint", () => places.filter((p) => !drawn.has(p)).forEach(draw));

  // The same numbers as a table, for those who cannot see or point at a curve.
  const shown = (v) => (v === null || v === undefined ? "–" : typeof v === "number" ? String(Number(v.toPrecision(4))) : String(v));
  const plainText = (text) => (text || "").replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");
  function values(figure) {
    const rows = figure.data
      .filter((t) => t.showlegend !== false && t.y)
      .map((t) => {
        const known = t.y.map((v, i) => [t.x[i], v]).filter((p) => typeof p[1] === "number");
        if (!known.length) return [plainText(t.name), "–", "–", "–", "–"];
        const ys = known.map((p) => p[1]);
        const low = ys.reduce((a, b) => Math.min(a, b));
        const high = ys.reduce((a, b) => Math.max(a, b));
        return [plainText(t.name), shown(ys[0]), shown(ys[ys.length - 1]), shown(low), shown(high)];
      });
    const table = document.createElement("table");
    [["curve", "first", "last", "smallest", "largest"], ...rows].forEach((row, i) => {
      const line = table.insertRow();
      row.forEach((text, k) => {
        const cell = document.createElement(i === 0 || k === 0 ? "th" : "td");
        cell.textContent = text;
        if (k) cell.className = "number";
        line.append(cell);
      });
    });
    return table;
  }
  document.querySelectorAll("figure details").forEach((details) =>
    details.addEventListener("toggle", () => {
      const place = details.querySelector(".values");
      const id = details.closest("figure").querySelector(".curves").dataset.figure;
      if (details.open && !place.firstChild) place.append(values(data.figures[id]));
    }),
  );

  // What a browser does not let a page keep (a file, a private window), it forgets.
  const remember = (key, value) => { try { localStorage.setItem(key, value); } catch { /* nothing to do */ } };
  const recall = (key) => { try { return localStorage.getItem(key); } catch { return null; } };
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const redraw = () => [...drawn].forEach(draw);
  if (["light", "dark"].includes(recall("dppo-theme"))) root.dataset.theme = recall("dppo-theme");
  const button = document.getElementById("theme");
  const label = () => button.setAttribute("aria-label", dark() ? "Switch to light colours" : "Switch to dark colours");
  label();
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    remember("dppo-theme", root.dataset.theme);
    label();
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { label(); redraw(); });

  if (data.samples && document.getElementById("browser")) dppoSamples(data.samples, document.getElementById("browser"));

  if (data.served) {
    setInterval(async () => {
      try {
        const version = await (await fetch("version", { cache: "no-store" })).text();
        if (version !== data.served.version) location.reload();
      } catch { /* the server has ended; the page stays as it is */ }
    }, 1000 * data.served.refresh);
  }
})();
