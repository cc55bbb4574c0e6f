// Usage by key, team, model and day: a chart over time, a table with totals, and the same as CSV.

import { fetchApi, get, query } from "./api.js";
import { bar, button, empty, ErrorLine, fill, h, select } from "./dom.js";
import { compact, day, integer, minute, money, percent, shortDay } from "./format.js";
import { StackedBars } from "./plots.js";
import { Poll } from "./refresh.js";
import { Table } from "./table.js";

const HOUR = 3_600_000;
const DAY = 24 * HOUR;
const RANGES = [["1", "Last 24 hours"], ["7", "Last 7 days"], ["30", "Last 30 days"], ["90", "Last 90 days"], ["month", "This month"], ["custom", "From – to"]];
const MEASURES = {
  tokens: { label: "Tokens", of: (r) => (r.prompt_tokens ?? 0) + (r.completion_tokens ?? 0), format: compact },
  output: { label: "Output tokens", of: (r) => r.completion_tokens ?? 0, format: compact },
  requests: { label: "Requests", of: (r) => r.requests ?? 0, format: compact },
  errors: { label: "Errors", of: (r) => r.errors ?? 0, format: compact },
  cost: { label: "Cost", of: (r) => r.cost ?? 0, format: money },
};
const NAMED = 6; // parts of a bar that get a colour of their own

export function usage({ tools }) {
  const error = new ErrorLine();
  const groups = segmented("Group by", [["key", "Key"], ["team", "Team"], ["model", "Model"], ["day", "Day"]], sessionStorage.getItem("penstock-usage-by") ?? "key", (value) => {
    sessionStorage.setItem("penstock-usage-by", value);
    rebuild();
  });
  const measure = select(Object.entries(MEASURES).map(([key, { label }]) => [key, label]), "tokens", { "aria-label": "Measure", onchange: () => show() });
  const range = select(RANGES, sessionStorage.getItem("penstock-usage-range") ?? "7", {
    "aria-label": "Time range",
    onchange: () => {
      sessionStorage.setItem("penstock-usage-range", range.value);
      custom.hidden = range.value !== "custom";
      void poll.now();
    },
  });
  const today = new Date().toISOString().slice(0, 10);
  const from = h("input", { type: "date", value: new Date(Date.now() - 7 * DAY).toISOString().slice(0, 10), max: today, "aria-label": "From (UTC)", onchange: () => void poll.now() });
  const to = h("input", { type: "date", value: today, max: today, "aria-label": "To, this day included (UTC)", onchange: () => void poll.now() });
  const custom = h("span", { class: "custom-range", hidden: range.value !== "custom" }, from, "–", to);
  const csv = button("CSV", download, { symbol: "download", title: "Download the table below as CSV" });
  tools.append(h("span", { class: "hint" }, "Days are UTC"));

  const chart = new StackedBars({ format: compact, label: "Usage over time" });
  const tableBox = h("div", {});
  const sums = h("dl", { class: "figures big" });
  const none = empty("Nothing used in this time", "Usage appears here as soon as a key has been used; it is written in batches, so it may take a few seconds.");
  none.hidden = true;
  const loading = h("p", { class: "loading" }, "Loading …");
  let table = null;
  let answer = null; // {by, span, rows, total, slots: rows by slot}

  function span() {
    const end = new Date();
    if (range.value === "custom") return { from: `${from.value}T00:00:00Z`, to: new Date(Date.parse(`${to.value}T00:00:00Z`) + DAY).toISOString().replace(".000Z", "Z") };
    let start = new Date(end.getTime() - Number(range.value) * DAY);
    if (range.value === "month") start = new Date(Date.UTC(end.getUTCFullYear(), end.getUTCMonth(), 1));
    // Whole hours and days: then the chart has no half bar at its beginning, and sums are read from the kept ones.
    const unit = range.value === "1" ? HOUR : DAY;
    const whole = (t) => new Date(Math.floor(t / unit) * unit + (t === end.getTime() ? unit : 0)).toISOString().replace(".000Z", "Z");
    return { from: range.value === "month" ? start.toISOString().replace(".000Z", "Z") : whole(start.getTime() + unit), to: whole(end.getTime()) };
  }

  async function ask(signal) {
    const by = groups.value;
    const times = span();
    if (!(Date.parse(times.from) < Date.parse(times.to))) throw new Error("The first day must not be after the last one.");
    const slot = Date.parse(times.to) - Date.parse(times.from) <= 2 * DAY ? "hour" : "day";
    const over = by === "day" ? slot : `${slot},${by}`;
    const [whole, parts] = await Promise.all([get(`usage${query({ ...times, group_by: by })}`, { signal }), get(`usage${query({ ...times, group_by: over })}`, { signal })]);
    if (by !== groups.value) return;
    answer = { by, slot, times, rows: whole.data, total: whole.total, parts: parts.data };
    loading.hidden = true;
    show();
  }

  function rebuild() {
    table = null;
    answer = null;
    fill(tableBox);
    void poll.now();
  }

  function show() {
    if (!answer) return;
    const { rows, total, by } = answer;
    none.hidden = rows.length > 0;
    card.hidden = rows.length === 0;
    if (!rows.length) return;
    fill(sums, [["Requests", integer(total.requests)], ["Errors", `${integer(total.errors)}`], ["Prompt tokens", compact(total.prompt_tokens)], ["of these cached", compact(total.cached_tokens)], ["Output tokens", compact(total.completion_tokens)], ["Cost", money(total.cost)]].map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
    drawChart();
    if (!table) {
      table = makeTable(by, () => answer, measure);
      fill(tableBox, table.element);
    }
    table.update(numbered(rows, by));
    table.total(["Total", integer(total.requests), integer(total.errors), integer(total.prompt_tokens), integer(total.cached_tokens), integer(total.completion_tokens), money(total.cost), ""]);
  }

  function drawChart() {
    const { parts, by, slot, times } = answer;
    const { of, format } = MEASURES[measure.value];
    const unit = slot === "hour" ? HOUR : DAY;
    const start = Date.parse(times.from);
    const slots = [];
    for (let t = start; t < Date.parse(times.to); t += unit) slots.push(t);
    const place = (row) => Math.floor((Date.parse(slotTime(row[slot])) - start) / unit);
    const sums = new Map();
    for (const row of parts) {
      const name = by === "day" ? MEASURES[measure.value].label : label(row[by], by);
      if (!sums.has(name)) sums.set(name, slots.map(() => 0));
      const i = place(row);
      if (i >= 0 && i < slots.length) sums.get(name)[i] += of(row);
    }
    const total = (values) => values.reduce((a, b) => a + b, 0);
    const ordered = [...sums].sort(([, a], [, b]) => total(b) - total(a));
    const shown = ordered.slice(0, NAMED);
    const others = ordered.slice(NAMED);
    if (others.length) shown.push([`${others.length} others`, slots.map((_, i) => others.reduce((sum, [, values]) => sum + values[i], 0))]);
    chart.update(slots, shown.map(([name]) => name), shown.map(([, values]) => values), (t, short) => slotLabel(new Date(t), slot, short), format);
  }

  async function download() {
    csv.disabled = true;
    try {
      const times = span();
      const response = await fetchApi(`usage${query({ ...times, group_by: groups.value, format: "csv" })}`, { accept: "text/csv" });
      const url = URL.createObjectURL(await response.blob());
      const link = document.createElement("a");
      link.href = url;
      link.download = `penstock-usage-by-${groups.value}-${times.from.slice(0, 10)}-${times.to.slice(0, 10)}.csv`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(url), 10_000);
    } catch (problem) {
      error.show(problem);
    }
    csv.disabled = false;
  }

  const card = h("div", { class: "stack", hidden: true }, h("section", { class: "card", "aria-label": "Usage over time" }, sums, chart.element), h("section", { class: "card flush", "aria-label": "Usage" }, tableBox));
  const poll = new Poll(ask, 5000, error);
  return {
    element: h("div", { class: "usage" }, h("div", { class: "toolbar" }, groups.element, range, custom, measure, h("span", { class: "spring" }), csv), error.element, loading, none, card),
    destroy() {
      poll.stop();
      chart.destroy();
    },
  };
}

// Two keys may have had the same name at different times: each has a row of its own.
function numbered(rows, by) {
  const seen = new Map();
  return rows.map((row) => {
    const number = (seen.get(row[by]) ?? 0) + 1;
    seen.set(row[by], number);
    return { ...row, place: `${row[by]} ${number}` };
  });
}

// Hours are shown in the reader's own time zone, like everything else; days are what the gateway sums up, and UTC.
const slotLabel = (when, slot, short) => (slot === "day" ? shortDay(when) : short ? minute(when) : `${day(when)} ${minute(when)}`);

// A day is "2026-11-24", an hour a whole time.
const slotTime = (value) => (String(value).length === 10 ? `${value}T00:00:00Z` : value);
const label = (value, by) => value ?? (by === "team" ? "no team" : "–");

function makeTable(by, latest, measure) {
  const head = { key: "Key", team: "Team", model: "Model", day: "Day" }[by];
  const share = (r) => {
    const { of } = MEASURES[measure.value];
    const whole = of(latest()?.total ?? {});
    return whole ? of(r) / whole : 0;
  };
  return new Table({
    caption: `Usage by ${head.toLowerCase()}`,
    key: (r) => r.place,
    empty: "",
    sorted: by === "day" ? { column: 0, down: true } : { column: 5, down: true },
    columns: [
      { head, text: by !== "day", sort: (r) => label(r[by], by), class: "name", value: (r) => label(r[by], by), cell: (name) => h("div", { class: "strong clip", title: name }, name) },
      { head: "Requests", class: "number", sort: (r) => r.requests, value: (r) => integer(r.requests) },
      { head: "Errors", class: "number", sort: (r) => r.errors, value: (r) => r.errors, cell: (n) => h("span", { class: n ? "bad-text" : "faint" }, integer(n)) },
      { head: "Prompt tokens", class: "number", sort: (r) => r.prompt_tokens, value: (r) => integer(r.prompt_tokens) },
      { head: "Cached", class: "number minor", sort: (r) => r.cached_tokens, value: (r) => integer(r.cached_tokens), hint: "Prompt tokens that an engine had in its cache" },
      { head: "Output tokens", class: "number", sort: (r) => r.completion_tokens, value: (r) => integer(r.completion_tokens) },
      { head: "Cost", class: "number", sort: (r) => r.cost, value: (r) => money(r.cost) },
      { head: "Share", class: "meter minor", value: (r) => Math.round(share(r) * 1000) / 1000, cell: (part) => h("div", { class: "with-bar" }, bar(part, { tone: "plain", label: "Share" }), h("span", {}, percent(part))) },
    ],
  });
}

// Radio buttons that look like one switch.
export function segmented(legend, options, value, onchange) {
  const name = `segment-${legend.replace(/\W/g, "")}`;
  const inputs = options.map(([key, text]) => {
    const input = h("input", { type: "radio", name, value: key, checked: key === value, onchange: () => onchange(key) });
    return [input, h("label", {}, input, h("span", {}, text))];
  });
  return {
    element: h("fieldset", { class: "segmented" }, h("legend", { class: "offscreen" }, legend), inputs.map(([, l]) => l)),
    get value() {
      return inputs.find(([input]) => input.checked)?.[0].value ?? options[0][0];
    },
  };
}
