// The requests as they end, newest first: a live tail with filters, and everything known about one of them. Never prompts.

import { get, query } from "./api.js";
import { open } from "./dialog.js";
import { button, copyButton, empty, ErrorLine, fill, h, icon, select, setOptions, write } from "./dom.js";
import { clock, compact, dateTime, integer, milliseconds, money, plural } from "./format.js";
import { Poll } from "./refresh.js";
import { Table } from "./table.js";

const PAGE = 100;
const KEPT = 500; // rows in the page; older ones are asked for again
// The outcomes of the access log, in words.
const OUTCOMES = { completed: "completed", refused: "refused", client_cancelled: "client left", engine_failed: "engine failed", error: "failed" };
const STATUSES = [["", "All statuses"], ["2xx", "2xx"], ["4xx", "4xx"], ["5xx", "5xx"], ["200", "200"], ["400", "400"], ["401", "401"], ["404", "404"], ["429", "429"], ["499", "499"], ["500", "500"], ["502", "502"], ["503", "503"], ["504", "504"]];

export function requests({ tools }) {
  const error = new ErrorLine();
  const filters = {
    key: select([["", "All keys"]], "", { "aria-label": "Key", onchange: restart }),
    model: select([["", "All models"]], "", { "aria-label": "Model", onchange: restart }),
    status: select(STATUSES, "", { "aria-label": "Status", onchange: restart }),
    outcome: select([["", "All outcomes"], ...Object.entries(OUTCOMES)], "", { "aria-label": "Outcome", onchange: restart }),
  };
  const find = h("input", { type: "search", placeholder: "Request id, replica, error", "aria-label": "Search the rows shown", oninput: show });
  const pauseWords = h("span", {}, "Pause");
  const pause = h("button", { type: "button", class: "button", "aria-pressed": "false", "data-shortcut": "p", title: "Pause (p)", onclick: () => setPaused(!paused) }, icon("pause"), pauseWords);
  const note = h("span", { class: "hint" });
  tools.append(pause);

  let rows = new Map(); // seq → request
  let paused = false;
  let hidden = 0; // rows that came while paused
  let exhausted = false;
  let shown = []; // what was on the page when it was paused

  const table = new Table({
    caption: "Requests, newest first",
    key: (r) => r.seq,
    empty: h("div", {}),
    onrow: detail,
    most: Infinity,
    columns: [
      { head: "Time", class: "time", value: (r) => r.time, cell: (time) => h("time", { datetime: time, title: dateTime(time) }, clock(time)) },
      { head: "Status", class: "status", value: (r) => [r.status, r.outcome], cell: ([status, outcome]) => [statusBadge(status, outcome)] },
      { head: "Model", class: "clip-col", value: (r) => [r.model, r.endpoint], cell: ([model, endpoint]) => [h("div", { class: "clip", title: model ?? "" }, model ?? "–"), h("small", { class: "clip", title: endpoint }, endpoint?.replace(/^\/v1\//, ""))] },
      { head: "Key", class: "clip-col", value: (r) => [r.key, r.team], cell: ([key, team]) => [h("div", { class: "clip", title: key ?? "" }, key ?? "–"), team && h("small", { class: "clip", title: team }, team)] },
      { head: "Replica", class: "minor clip-col", value: (r) => [r.replica, r.attempts], cell: ([replica, attempts]) => [h("div", { class: "clip" }, replica ?? "–"), attempts > 1 && h("small", {}, plural(attempts, "attempt"))] },
      { head: "Prompt", class: "number", value: (r) => [r.prompt_tokens, r.cached_tokens], cell: ([prompt, cached]) => [integer(prompt), cached ? h("small", {}, `${compact(cached)} cached`) : null] },
      { head: "Output", class: "number", value: (r) => integer(r.completion_tokens) },
      { head: "First token", class: "number", value: (r) => milliseconds(r.ttft_ms) },
      { head: "Duration", class: "number", value: (r) => milliseconds(r.duration_ms) },
      { head: "Tok/s", class: "number minor", value: (r) => speed(r), hint: "Output tokens a second, after the first one" },
      { head: "Error", class: "error-col minor", value: (r) => r.error, cell: (text) => (text ? h("span", { class: "clip bad-text", title: text }, text) : "") },
    ],
  });

  const older = button("Load older ones", loadOlder);

  function matches(r) {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    const text = [r.id, r.replica, r.error, r.key, r.model, r.endpoint].join(" ").toLowerCase();
    return words.every((w) => text.includes(w));
  }

  function show() {
    const all = [...rows.values()].sort((a, b) => b.seq - a.seq);
    if (!paused) shown = all;
    const fitting = shown.filter(matches);
    const filtered = find.value || Object.values(filters).some((f) => f.value);
    fill(table.none, filtered ? empty("No request fits", "Among those that the gateway still remembers.") : empty("No requests yet", "They appear here as they end. Send one from the playground, or with a key of yours."));
    table.update(fitting);
    older.hidden = exhausted || shown.length < PAGE;
    write(note, paused ? `Paused${hidden ? `, ${plural(hidden, "newer request")}` : ""}` : `${plural(fitting.length, "request")} shown`);
  }

  function take(data) {
    let fresh = 0;
    for (const r of data) {
      if (!rows.has(r.seq)) fresh += 1;
      rows.set(r.seq, r);
    }
    return fresh;
  }

  const asked = () => Object.fromEntries(Object.entries(filters).map(([name, control]) => [name, control.value]));
  let generation = 0;

  async function ask(signal) {
    const mine = generation;
    const { data } = await get(`requests${query({ limit: PAGE, ...asked() })}`, { signal });
    if (mine !== generation) return;
    loading.hidden = true;
    card.hidden = false;
    const fresh = take(data);
    if (paused) hidden += fresh;
    else if (rows.size > KEPT) {
      rows = new Map([...rows].sort(([a], [b]) => b - a).slice(0, KEPT));
      exhausted = false;
    }
    if (data.length < PAGE && rows.size === data.length) exhausted = true;
    show();
  }

  async function loadOlder() {
    older.disabled = true;
    try {
      const before = Math.min(...rows.keys());
      const { data } = await get(`requests${query({ limit: PAGE, before, ...asked() })}`);
      take(data);
      exhausted = data.length < PAGE;
      if (paused) shown = [...shown, ...data];
      show();
    } catch (problem) {
      error.show(problem);
    }
    older.disabled = false;
  }

  function restart() {
    generation += 1;
    rows = new Map();
    shown = [];
    exhausted = false;
    hidden = 0;
    if (paused) setPaused(false);
    void poll.now();
  }

  function setPaused(on) {
    paused = on;
    hidden = 0;
    pause.setAttribute("aria-pressed", String(on));
    fill(pause, icon(on ? "play" : "pause"), pauseWords);
    write(pauseWords, on ? "Go on" : "Pause");
    show();
  }

  async function names() {
    const [keys, models] = await Promise.all([get("keys"), get("models")]);
    setOptions(filters.key, [["", "All keys"], ...[...new Set(keys.data.map((k) => k.name))].sort().map((n) => [n, n])]);
    setOptions(filters.model, [["", "All models"], ...models.data.map((m) => [m.name, m.name])]);
  }

  const loading = h("p", { class: "loading" }, "Loading …");
  const card = h("section", { class: "card flush", "aria-label": "Requests", hidden: true }, table.element);
  const poll = new Poll(ask, 1000, error);
  names().catch((problem) => error.show(problem));
  return {
    element: h("div", { class: "requests" }, h("div", { class: "toolbar" }, find, Object.values(filters), note), error.element, loading, card, h("div", { class: "center" }, older)),
    destroy: () => poll.stop(),
  };
}

function statusBadge(status, outcome) {
  const bad = status >= 500 || outcome === "engine_failed";
  const tone = bad ? "bad" : outcome === "client_cancelled" ? "idle" : status >= 400 || outcome === "error" ? "warn" : "good";
  return [h("span", { class: `badge ${tone}` }, String(status)), outcome !== "completed" && h("small", {}, OUTCOMES[outcome] ?? outcome)];
}

function speed(r) {
  const rest = (r.duration_ms ?? 0) - (r.ttft_ms ?? 0);
  return r.ttft_ms && r.completion_tokens > 1 && rest > 0 ? compact(((r.completion_tokens - 1) / rest) * 1000) : "–";
}

function detail(r) {
  const lines = [
    ["Request id", h("code", {}, r.id)],
    ["Time", `${dateTime(r.time)} (${r.time})`],
    ["Status", `${r.status}, ${OUTCOMES[r.outcome] ?? r.outcome}`],
    ["Error", r.error],
    ["Model", r.model],
    ["Endpoint", r.endpoint],
    ["Key", r.key],
    ["Team", r.team],
    ["Replica", r.replica],
    ["Attempts", integer(r.attempts)],
    ["Prompt tokens", `${integer(r.prompt_tokens)}${r.cached_tokens ? `, ${integer(r.cached_tokens)} of them cached` : ""}`],
    ["Output tokens", integer(r.completion_tokens)],
    ["Time to first token", milliseconds(r.ttft_ms)],
    ["Duration", milliseconds(r.duration_ms)],
    ["Output tokens a second", speed(r)],
    ["Cost", money(r.cost)],
  ];
  void open("Request", (close) => ({
    content: h("dl", { class: "detail" }, lines.filter(([, value]) => value !== null && value !== undefined && value !== "").map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
    actions: [copyButton(() => r.id, "Copy the id"), button("Close", () => close(), { autofocus: true })],
  }), { wide: true });
}
