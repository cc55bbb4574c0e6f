// The page that stays open: six panels of the last hour, and what each model and engine is doing now.

import { bar, empty, h, select, write } from "./dom.js";
import { compact, milliseconds, percent, rate } from "./format.js";
import { live } from "./live.js";
import { LinePanel } from "./plots.js";
import { stateBadge } from "./engines.js";
import { Table } from "./table.js";

// Points of the past hold no engines: null, not zero.
const waiting = (point) => (point.engines?.length ? point.engines.reduce((sum, engine) => sum + (engine.waiting ?? 0), 0) : null);

function panels() {
  return [
    new LinePanel({ title: "Requests", unit: "/s", format: rate, axis: compact, floor: 1, series: [{ name: "requests", colour: "--s1", area: true, pick: (p) => p.requests_per_second }] }),
    new LinePanel({
      title: "Output tokens",
      unit: "/s",
      format: rate,
      axis: compact,
      floor: 10,
      series: [{ name: "output", colour: "--s3", area: true, pick: (p) => p.output_tokens_per_second }],
      note: (p) => `prompt ${compact(p.prompt_tokens_per_second)}/s`,
    }),
    new LinePanel({
      title: "Errors",
      unit: "/s",
      format: rate,
      axis: compact,
      floor: 0.5,
      series: [{ name: "errors", colour: "--bad", area: true, pick: (p) => p.errors_per_second }],
      note: (p) => (p.requests_per_second ? `${percent(Math.min(1, p.errors_per_second / p.requests_per_second))} of requests` : ""),
    }),
    new LinePanel({
      title: "Time to first token",
      format: milliseconds,
      floor: 1,
      series: [
        { name: "p50", colour: "--s1", pick: (p) => p.ttft_ms?.p50 },
        { name: "p95", colour: "--s4", pick: (p) => p.ttft_ms?.p95 },
      ],
    }),
    new LinePanel({
      title: "Between tokens",
      format: milliseconds,
      floor: 1,
      series: [
        { name: "p50", colour: "--s1", pick: (p) => p.itl_ms?.p50 },
        { name: "p95", colour: "--s4", pick: (p) => p.itl_ms?.p95 },
      ],
    }),
    new LinePanel({
      title: "Open requests",
      format: compact,
      floor: 4,
      series: [
        { name: "open", colour: "--s2", area: true, pick: (p) => p.open_requests },
        { name: "waiting in engines", colour: "--s4", pick: waiting },
      ],
    }),
  ];
}

export function overview({ tools }) {
  const shown = panels();
  const span = select([["3600", "Last hour"], ["900", "Last 15 min"], ["300", "Last 5 min"]], sessionStorage.getItem("penstock-span") ?? "3600", {
    "aria-label": "Time range",
    onchange: () => {
      sessionStorage.setItem("penstock-span", span.value);
      update();
    },
  });
  tools.append(span);

  const models = new Table({
    caption: "Models, now",
    key: (m) => m.name,
    empty: empty("No models yet", "They stand in the gateway's config, under models."),
    columns: [
      { head: "Model", value: (m) => m.name, class: "strong clip" },
      { head: "Requests/s", class: "number", value: (m) => rate(m.requests_per_second) },
      { head: "Output tok/s", class: "number", value: (m) => rate(m.output_tokens_per_second) },
      { head: "Open", class: "number", value: (m) => compact(m.open_requests) },
    ],
  });
  const engines = new Table({
    caption: "Engines, now",
    key: (e) => e.id,
    empty: empty("No engines yet", "They appear here as soon as the gateway knows of one."),
    columns: [
      { head: "Engine", value: (e) => e.id, class: "strong clip" },
      { head: "State", value: (e) => e.state, cell: stateBadge },
      { head: "Running", class: "number", value: (e) => compact(e.running) },
      { head: "Waiting", class: "number", value: (e) => compact(e.waiting) },
      { head: "KV cache", class: "meter", value: (e) => (e.kv_cache_usage ?? null) === null ? null : Math.round(e.kv_cache_usage * 1000) / 1000, cell: (share, e) => (share === null ? "–" : h("div", { class: "with-bar" }, bar(share, { label: `KV cache of ${e.id}` }), h("span", {}, percent(share)))) },
      { head: "Restarts", class: "number minor", value: (e) => compact(e.restarts) },
    ],
  });
  const old = h("p", { class: "stale", hidden: true }, "");

  function update() {
    const latest = live.latest;
    const points = live.points(Number(span.value));
    for (const panel of shown) panel.update(points, latest, Number(span.value));
    if (!latest) return;
    models.update(latest.models ?? []);
    engines.update(latest.engines ?? []);
  }
  const state = () => {
    const lost = live.state === "waiting" && live.latest;
    old.hidden = !lost;
    if (lost) write(old, "These are the last figures that came; the connection to the gateway is lost.");
    element.classList.toggle("lost", Boolean(lost));
  };
  live.addEventListener("figures", update);
  live.addEventListener("history", update);
  live.addEventListener("state", state);

  const element = h(
    "div",
    { class: "overview" },
    old,
    h("div", { class: "panels" }, shown.map((panel) => panel.element)),
    h("div", { class: "halves" }, h("section", { class: "card", "aria-label": "Models" }, h("h2", {}, "Models"), models.element), h("section", { class: "card", "aria-label": "Engines" }, h("h2", {}, "Engines"), engines.element)),
  );
  update();
  state();
  return {
    element,
    destroy() {
      live.removeEventListener("figures", update);
      live.removeEventListener("history", update);
      live.removeEventListener("state", state);
      shown.forEach((panel) => panel.destroy());
    },
  };
}
