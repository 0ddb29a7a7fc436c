// Draws the curves of stages from /api/curves: live, with zoom, smoothing, and runs over each other. Knows no metric's meaning.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const SIZE = { width: 440, height: 230, left: 52, right: 8, top: 8, bottom: 26 };
const POLL_MS = 3000;

function make(name, attributes = {}, text = "") {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text) node.textContent = text;
  return node;
}

function html(name, attributes = {}, text = "") {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text) node.textContent = text;
  return node;
}

const shown = (value) => (value === 0 ? "0" : Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4))));

// Exponential moving average that begins at the first value; `weight` of what was before.
function smoothed(values, weight) {
  let last = null;
  return values.map((value) => (last = last === null ? value : weight * last + (1 - weight) * value));
}

// None where the step is lost in the rounding of the values: adding it would never reach the end.
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((one) => one * power >= rough) * power;
  const found = [];
  if (!(low + step > low && high - step < high)) return found;
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) found.push(Math.abs(value) < step * 1e-9 ? 0 : value);
  return found;
}

// The metrics of a panel, those with `*` as they were logged.
function named(wanted, logged) {
  return wanted.flatMap((one) => {
    const [head, tail] = one.split("*");
    return tail === undefined ? [one] : logged.filter((name) => name.startsWith(head) && name.endsWith(tail));
  });
}

class CurvePanel {
  constructor(group, panel) {
    this.group = group;
    this.panel = panel;
    this.figure = html("figure", { hidden: "" });
    this.svg = make("svg", { viewBox: `0 0 ${SIZE.width} ${SIZE.height}`, role: "img", tabindex: "0" });
    this.names = html("ul", { class: "names" });
    const caption = html("figcaption");
    caption.append(html("strong", {}, `${panel.title}. `), panel.meaning);
    this.values = html("details");
    this.values.append(html("summary", {}, `Values of ${panel.title}`));
    this.values.addEventListener("toggle", () => this.fillTable());
    this.figure.append(this.svg, this.names, caption, this.values);
    this.listen();
  }

  listen() {
    const step = (event) => {
      const box = this.svg.getBoundingClientRect();
      const [low, high] = this.span;
      const x = ((event.clientX - box.left) / box.width) * SIZE.width;
      return low + (Math.min(Math.max((x - SIZE.left) / (SIZE.width - SIZE.left - SIZE.right), 0), 1)) * (high - low);
    };
    let from = null;
    this.svg.addEventListener("pointerdown", (event) => { if (this.span) { from = step(event); this.svg.setPointerCapture(event.pointerId); } });
    this.svg.addEventListener("pointermove", (event) => { if (this.span) from === null ? this.point(step(event)) : this.select(from, step(event)); });
    this.svg.addEventListener("pointerup", (event) => {
      if (from === null) return;
      const [low, high] = [from, step(event)].sort((a, b) => a - b);
      from = null;
      this.select(0, 0);
      if (high - low > (this.span[1] - this.span[0]) / 50) this.group.zoom(Math.floor(low), Math.ceil(high));
    });
    this.svg.addEventListener("dblclick", () => this.group.zoom(null, null));
    this.svg.addEventListener("keydown", (event) => this.group.key(event));
  }

  draw(windows) {
    this.curves = [];
    windows.forEach((window, place) => {
      for (const name of named(this.panel.metrics, Object.keys(window.curves))) {
        const curve = Object.hasOwn(window.curves, name) ? window.curves[name] : null;
        if (curve && (curve.points.length || curve.num_nonfinite)) this.curves.push({ name, place, label: windows.length > 1 ? `${"ABCDEFGH"[place]} ${name}` : name, ...curve });
      }
    });
    this.figure.hidden = this.curves.length === 0;
    if (!this.curves.length) return;
    const points = this.curves.flatMap((curve) => curve.points);
    const steps = points.map((one) => one[0]);
    const low = steps.reduce((a, b) => Math.min(a, b), Infinity), high = steps.reduce((a, b) => Math.max(a, b), -Infinity);
    this.span = points.length ? [low, high > low ? high : low + Math.max(1, Math.abs(low) * 1e-9)] : [0, 1];
    const weight = this.group.weight;
    for (const curve of this.curves) curve.smooth = smoothed(curve.points.map((one) => one[3]), weight);
    let bottom = points.reduce((a, one) => Math.min(a, one[1]), Infinity), top = points.reduce((a, one) => Math.max(a, one[2]), -Infinity);
    if (!points.length) [bottom, top] = [0, 1];
    if (top - bottom <= 1e-12 * Math.max(Math.abs(top), Math.abs(bottom))) [bottom, top] = [bottom - Math.abs(bottom || 1) * 0.1, top + Math.abs(top || 1) * 0.1];
    this.range = [bottom, top];
    this.paint();
  }

  x(step) { return SIZE.left + ((step - this.span[0]) / (this.span[1] - this.span[0])) * (SIZE.width - SIZE.left - SIZE.right); }
  y(value) { return SIZE.height - SIZE.bottom - ((value - this.range[0]) / (this.range[1] - this.range[0])) * (SIZE.height - SIZE.top - SIZE.bottom); }

  paint() {
    const nodes = [];
    for (const value of ticks(...this.range, 4)) {
      nodes.push(make("line", { class: "grid-line", x1: SIZE.left, x2: SIZE.width - SIZE.right, y1: this.y(value), y2: this.y(value) }));
      nodes.push(make("text", { x: SIZE.left - 5, y: this.y(value) + 4, "text-anchor": "end" }, shown(value)));
    }
    for (const value of ticks(...this.span, 5)) if (Number.isInteger(value)) nodes.push(make("text", { x: this.x(value), y: SIZE.height - 8, "text-anchor": "middle" }, String(value)));
    for (const step of this.group.findings) if (step >= this.span[0] && step <= this.span[1]) nodes.push(make("line", { class: "finding", x1: this.x(step), x2: this.x(step), y1: SIZE.top, y2: SIZE.height - SIZE.bottom }));
    const path = (points, value) => points.map((one, place) => `${place ? "L" : "M"}${this.x(one[0]).toFixed(1)} ${this.y(value(one, place)).toFixed(1)}`).join("");
    this.curves.forEach((curve, number) => {
      const style = `s${number % 8}`, points = curve.points;
      if (points.some((one) => one[1] !== one[2])) nodes.push(make("path", { class: `band ${style}`, d: `${path(points, (one) => one[2])}${path([...points].reverse(), (one) => one[1]).replace("M", "L")}Z` }));
      if (this.group.weight > 0) nodes.push(make("path", { class: `raw ${style}`, d: path(points, (one) => one[3]) }));
      if (points.length === 1) nodes.push(make("path", { class: `dot ${style}`, d: `${path(points, (one) => one[3])}h0` }));
      nodes.push(make("path", { class: style, d: path(points, (_, place) => curve.smooth[place]) }));
    });
    this.selected = make("rect", { class: "select", y: SIZE.top, height: SIZE.height - SIZE.top - SIZE.bottom, width: 0, x: 0 });
    this.cursor = make("line", { class: "cursor", y1: SIZE.top, y2: SIZE.height - SIZE.bottom, visibility: "hidden" });
    this.svg.replaceChildren(...nodes, this.selected, this.cursor);
    this.svg.setAttribute("aria-label", `${this.panel.title}, steps ${this.span[0]} to ${this.span[1]}: ${this.curves.map((curve) => this.inWords(curve)).join("; ")}. Plus and minus zoom, arrows move, 0 shows all.`);
    this.label(null);
    if (this.values.open) this.fillTable();
  }

  inWords(curve) {
    const first = curve.points[0], last = curve.points[curve.points.length - 1];
    const bad = curve.num_nonfinite ? `, ${curve.num_nonfinite} values are no numbers` : "";
    return first ? `${curve.label} from ${shown(first[3])} to ${shown(last[3])}${bad}` : `${curve.label}${bad}`;
  }

  // The names under the plot, each with its value at `step`, or at the end.
  label(step) {
    this.names.replaceChildren(...this.curves.map((curve, number) => {
      const item = html("li");
      const key = make("svg", { class: "key-line", viewBox: "0 0 22 10", "aria-hidden": "true" });
      key.append(make("path", { class: `s${number % 8}`, d: "M0 5H22" }));
      const at = this.nearest(curve, step);
      const bad = curve.num_nonfinite ? ` (${curve.num_nonfinite} not finite)` : "";
      item.append(key, ` ${curve.label} ${at < 0 ? "–" : `${shown(curve.smooth[at])} at ${curve.points[at][0]}`}${bad}`);
      return item;
    }));
  }

  nearest(curve, step) {
    if (step === null) return curve.points.length - 1;
    let low = 0, high = curve.points.length - 1;
    while (low < high) { const middle = (low + high) >> 1; curve.points[middle][0] < step ? (low = middle + 1) : (high = middle); }
    return curve.points.length ? low : -1;
  }

  point(step) {
    for (const [key, value] of Object.entries({ x1: this.x(step), x2: this.x(step), visibility: "visible" })) this.cursor.setAttribute(key, value);
    this.label(step);
  }

  select(from, to) {
    const [left, right] = [this.x(from), this.x(to)].sort((a, b) => a - b);
    this.selected.setAttribute("x", left);
    this.selected.setAttribute("width", right - left);
  }

  fillTable() {
    if (!this.values.open || !this.curves) return;
    const table = html("table"), head = html("tr"), body = html("tbody");
    head.append(...["Curve", "Step", "Mean", "Lowest", "Highest"].map((name) => html("th", { scope: "col" }, name)));
    for (const curve of this.curves) for (const one of curve.points.slice(-50)) {
      const row = html("tr");
      row.append(html("th", { scope: "row" }, curve.label), ...[String(one[0]), shown(one[3]), shown(one[1]), shown(one[2])].map((value) => html("td", { class: "n" }, value)));
      body.append(row);
    }
    table.append(html("caption", {}, "The last values that are drawn"), head, body);
    const scroll = html("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Values" });
    scroll.append(table);
    this.values.replaceChildren(this.values.firstElementChild, scroll);
  }
}

class CurveGroup {
  constructor(root) {
    this.root = root;
    this.series = JSON.parse(root.dataset.series);
    this.findings = JSON.parse(root.dataset.findings);
    const panels = JSON.parse(root.dataset.panels);
    this.wanted = [...new Set(panels.flatMap((panel) => panel.metrics))];
    this.weight = 0;
    this.range = [null, null];
    this.panels = panels.map((panel) => new CurvePanel(this, panel));
    root.replaceChildren(this.tools(), ...this.panels.map((panel) => panel.figure));
    this.load();
  }

  tools() {
    const bar = html("div", { class: "line tools", role: "group", "aria-label": "Curves" });
    const slider = html("input", { type: "range", min: "0", max: "0.99", step: "0.01", value: "0", id: "smoothing" });
    slider.addEventListener("input", () => { this.weight = Number(slider.value); this.redraw(); });
    const button = (text, act) => { const one = html("button", { type: "button" }, text); one.addEventListener("click", act); return one; };
    this.more = html("select", { "aria-label": "Draw another metric" });
    this.more.append(html("option", { value: "" }, "another metric…"));
    this.more.addEventListener("change", () => this.add(this.more.value));
    this.state = html("span", { class: "soft", role: "status" });
    bar.append(html("label", { for: "smoothing" }, "Smoothing"), slider, button("Zoom in", () => this.scale(0.5)), button("Zoom out", () => this.scale(2)), button("All steps", () => this.zoom(null, null)), this.more, this.state);
    return bar;
  }

  add(name) {
    if (!name) return;
    this.more.value = "";
    this.wanted.push(name);
    const panel = new CurvePanel(this, { title: name, meaning: "As it was logged.", metrics: [name] });
    this.panels.push(panel);
    this.root.append(panel.figure);
    this.load();
  }

  key(event) {
    const acts = { "+": () => this.scale(0.5), "=": () => this.scale(0.5), "-": () => this.scale(2), 0: () => this.zoom(null, null), ArrowLeft: () => this.move(-0.25), ArrowRight: () => this.move(0.25) };
    if (!acts[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    acts[event.key]();
  }

  now() { return [this.range[0] ?? this.all[0], this.range[1] ?? this.all[1]]; }
  scale(factor) {
    if (!this.all) return;
    const [low, high] = this.now(), half = Math.max(1, ((high - low) * factor) / 2), middle = (low + high) / 2;
    this.zoom(Math.floor(middle - half), Math.ceil(middle + half));
  }
  move(share) {
    if (!this.all) return;
    const [low, high] = this.now(), by = Math.round((high - low) * share);
    if (low + by >= this.all[0] - 1 && high + by <= this.all[1] + 1) this.zoom(low + by, high + by);
  }
  zoom(low, high) {
    if (low !== null && this.all && low <= this.all[0] && high >= this.all[1]) [low, high] = [null, null];
    this.range = [low, high];
    this.load();
  }

  async load() {
    const turn = (this.turn = (this.turn || 0) + 1);
    clearTimeout(this.timer);
    let windows;
    try {
      windows = await Promise.all(this.series.map((one) => this.fetch(one)));
    } catch (error) {
      this.state.textContent = `Not read: ${error.message}`;
      if (turn === this.turn) this.timer = setTimeout(() => this.load(), 5 * POLL_MS);
      return;
    }
    if (turn !== this.turn) return;
    this.windows = windows;
    const ends = windows.map((window) => window.steps).filter(Boolean);
    this.all = ends.length ? [Math.min(...ends.map((one) => one[0])), Math.max(...ends.map((one) => one[1]))] : null;
    this.redraw();
    const share = Math.min(...windows.map((window) => window.share_read));
    const rows = windows.reduce((sum, window) => sum + window.num_rows, 0);
    const problems = windows.flatMap((window) => window.problems);
    const zoomed = this.range[0] === null ? "" : `, steps ${this.range.join(" to ")}`;
    const said = this.all === null && share === 1 ? "No step was logged yet." : `${rows.toLocaleString("en")} logged steps${zoomed}${share < 1 ? `, ${Math.floor(100 * share)} % read` : ""}${problems.length ? `; ${problems.join("; ")}` : ""}`;
    if (this.state.textContent !== said) this.state.textContent = said;
    this.offer(windows);
    this.root.dataset.drawn = String(turn);
    this.timer = setTimeout(() => this.load(), share < 1 ? 0 : document.hidden ? 10 * POLL_MS : POLL_MS);
  }

  async fetch(one) {
    const query = new URLSearchParams({ run: one.run, stage: one.stage, points: "400" });
    for (const name of this.wanted) query.append("name", name);
    if (this.range[0] !== null) { query.set("low", this.range[0]); query.set("high", this.range[1]); }
    const answer = await fetch(`/api/curves?${query}`);
    const said = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new Error(said.error?.message ?? said.error ?? `the server answers ${answer.status}; load the page again`);
    return said;
  }

  offer(windows) {
    const names = [...new Set(windows.flatMap((window) => window.names))].filter((name) => !this.wanted.includes(name)).sort();
    if (names.join() === this.offered) return;
    this.offered = names.join();
    this.more.replaceChildren(this.more.firstElementChild, ...names.map((name) => html("option", {}, name)));
  }

  redraw() { if (this.windows) for (const panel of this.panels) panel.draw(this.windows); }
}

for (const root of document.querySelectorAll(".curves")) root.group = new CurveGroup(root);
