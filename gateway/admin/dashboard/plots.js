// Plots on uPlot: lines over time for the live figures, stacked bars for usage.

import { fill, h, write } from "./dom.js";
import { clock, minute } from "./format.js";

const Plot = window.uPlot;
const HEIGHT = 146; // px; the stylesheet reserves the same
const all = new Set();

// What a custom property comes to in the theme that is on; a canvas cannot read it itself.
function colour(name) {
  const probe = document.createElement("i");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

const faded = (rgb, alpha) => rgb.replace(/^rgb\((.*)\)$/, (_, parts) => `rgb(${parts} / ${alpha})`.replaceAll(",", " "));

export function repaint() {
  for (const plot of all) plot.rebuild();
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);

function axes(format) {
  const common = { stroke: colour("--faint"), font: '11px "Inter Variable", system-ui, sans-serif', ticks: { show: false } };
  return [
    { ...common, space: 52, size: 22, gap: 4, grid: { show: false }, values: (_, splits) => splits.map((t) => (t % 60 ? clock(t) : minute(t))) },
    { ...common, space: 28, size: 48, gap: 6, grid: { stroke: colour("--grid"), width: 1 }, values: (_, splits) => splits.map((v) => (v === 0 ? "0" : format(v))) },
  ];
}

// A point without neighbours makes no line: it is drawn as a dot, or one request a minute would be invisible.
function lonely(u, series) {
  const data = u.data[series];
  const found = [];
  const [first, last] = u.series[0].idxs ?? [0, data.length - 1];
  for (let i = first; i <= last; i += 1) {
    if (data[i] !== null && (data[i - 1] ?? null) === null && (data[i + 1] ?? null) === null) found.push(i);
  }
  return found;
}

class Base {
  constructor() {
    this.area = h("div", { class: "plot", role: "img" });
    this.plot = null;
    this.data = null;
    this.observer = new ResizeObserver(() => this.#resize());
    this.observer.observe(this.area);
    all.add(this);
  }

  #resize() {
    const width = Math.floor(this.area.clientWidth);
    if (!width) return;
    if (!this.plot) this.rebuild();
    else if (this.plot.width !== width) this.plot.setSize({ width, height: this.height });
  }

  rebuild() {
    this.plot?.destroy();
    this.plot = null;
    const width = Math.floor(this.area.clientWidth);
    if (!width || !this.data) return;
    this.plot = new Plot(this.options(width), this.data, this.area);
  }

  destroy() {
    this.observer.disconnect();
    this.plot?.destroy();
    all.delete(this);
  }
}

// A panel with a title, the newest values, and lines over time. `series`: {name, colour: "--s1", pick(point), area?}.
export class LinePanel extends Base {
  constructor({ title, format, axis = format, unit = "", series, floor = 1, note = null }) {
    super();
    Object.assign(this, { title, format, axis, unit, series, floor, height: HEIGHT });
    this.values = series.map(() => h("b", {}, "–"));
    this.when = h("span", { class: "when" });
    this.note = note && h("span", { class: "panel-note" });
    this.noteOf = note;
    this.element = h(
      "section",
      { class: "panel", "aria-label": title },
      h("header", {}, h("h2", {}, title), this.when),
      h("div", { class: "now" }, series.map((s, i) => h("span", { class: `value ${i ? "" : "first"}` }, (series.length > 1 || s.always) && h("i", { class: "swatch", vars: { "--swatch": `var(${s.colour})` } }), (series.length > 1) && h("em", {}, s.name), this.values[i], unit && h("small", {}, unit))), this.note),
      this.area,
    );
    this.span = 3600;
    this.end = 0;
  }

  update(points, latest, span) {
    this.span = span;
    this.end = latest?.at ?? points.at(-1)?.at ?? Date.now() / 1000;
    this.data = [points.map((p) => p.at), ...this.series.map((s) => points.map((p) => s.pick(p) ?? null))];
    this.latest = latest;
    if (!this.plot) this.rebuild();
    else this.plot.setData(this.data);
    this.#say();
  }

  #say() {
    const i = this.plot?.cursor.idx;
    const pointed = i !== null && i !== undefined && this.plot.cursor.left >= 0;
    this.series.forEach((s, n) => {
      const value = pointed ? this.data[n + 1][i] : this.latest ? s.pick(this.latest) : null;
      write(this.values[n], this.format(value ?? null));
    });
    write(this.when, pointed ? clock(this.data[0][i]) : "");
    if (this.note) write(this.note, this.latest && !pointed ? this.noteOf(this.latest) : "");
    this.area.setAttribute("aria-label", `${this.title}, now: ${this.series.map((s, n) => `${s.name} ${this.format(this.latest ? s.pick(this.latest) ?? null : null)} ${this.unit}`).join(", ")}`);
  }

  options(width) {
    return {
      width,
      height: this.height,
      padding: [6, 18, 0, 0],
      legend: { show: false },
      cursor: { sync: { key: "overview" }, y: false, drag: { x: false, y: false }, points: { size: 6 } },
      scales: {
        x: { time: true, range: () => [this.end - this.span, this.end] },
        y: { range: (_, __, max) => [0, Math.max(this.floor, (max ?? 0) * 1.12)] },
      },
      axes: axes(this.axis),
      series: [
        {},
        ...this.series.map((s) => ({
          label: s.name,
          stroke: colour(s.colour),
          width: 1.5,
          fill: s.area ? faded(colour(s.colour), 0.13) : undefined,
          points: { show: true, size: 4, fill: colour(s.colour), filter: lonely },
        })),
      ],
      hooks: { setCursor: [() => this.#say()] },
    };
  }
}

const SERIES = ["--s1", "--s2", "--s3", "--s4", "--s5", "--s6", "--s7"];

// Bars over time, stacked by name. Uses equal slots, one for each day or hour.
export class StackedBars extends Base {
  constructor({ format, label }) {
    super();
    Object.assign(this, { format, label, height: 240, names: [], slots: [], slotName: String });
    this.legend = h("div", { class: "legend" });
    this.tip = h("div", { class: "tip" });
    this.element = h("div", { class: "bars" }, this.area, h("div", { class: "bars-foot" }, this.legend, this.tip));
  }

  // `rows`: one array of values for each name, a value for each slot. `slotName` says what a slot is.
  update(slots, names, rows, slotName, format) {
    Object.assign(this, { slots, names, rows, slotName, format });
    const sums = slots.map(() => 0);
    const stacked = rows.map((row) => row.map((value, i) => (sums[i] += value) || null)); // no bar of no height
    // Drawn from the tallest down, so that each lower part covers what is not its own.
    this.data = [slots.map((_, i) => i), ...stacked.reverse()];
    fill(this.legend, names.map((name, i) => h("span", {}, h("i", { class: "swatch", vars: { "--swatch": `var(${SERIES[i % SERIES.length]})` } }), name)));
    this.area.setAttribute("aria-label", `${this.label}; the table below holds the same figures`);
    this.rebuild();
    this.#say();
  }

  #say() {
    const i = this.plot?.cursor.idx;
    if (i === null || i === undefined || this.plot.cursor.left < 0) return write(this.tip, "");
    const total = this.rows.reduce((sum, row) => sum + row[i], 0);
    const parts = this.names.map((name, n) => [name, this.rows[n][i]]).filter(([, value]) => value > 0);
    write(this.tip, `${this.slotName(this.slots[i])}: ${this.format(total)}${parts.length > 1 ? ` (${parts.map(([name, value]) => `${name} ${this.format(value)}`).join(", ")})` : ""}`);
  }

  options(width) {
    const [x, y] = axes((v) => this.format(v));
    const count = this.slots.length;
    return {
      width,
      height: this.height,
      padding: [8, 6, 0, 0],
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false }, points: { show: false } },
      scales: { x: { time: false, range: () => [-0.6, count - 0.4] }, y: { range: (_, __, max) => [0, (max || 1) * 1.08] } },
      axes: [{ ...x, space: 56, incrs: [1, 2, 3, 4, 6, 7, 12, 14, 24, 30, 60, 90], values: (_, splits) => splits.map((i) => (Number.isInteger(i) && this.slots[i] !== undefined ? this.slotName(this.slots[i], true) : "")) }, { ...y, size: 56 }],
      series: [
        {},
        ...this.names.map((name, i) => this.names.length - 1 - i).map((n) => ({
          label: this.names[n],
          fill: colour(SERIES[n % SERIES.length]),
          stroke: colour("--surface"),
          width: 1,
          paths: Plot.paths.bars({ size: [0.72, 42], radius: 0 }),
          points: { show: false },
        })),
      ],
      hooks: { setCursor: [() => this.#say()] },
    };
  }
}
