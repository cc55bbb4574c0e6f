// Keys and teams: make, change, rotate, revoke, and how much of their limits and budgets is used. And who changed what.

import { call, get } from "./api.js";
import { changesView } from "./changes.js";
import { confirm, form, open } from "./dialog.js";
import { bar, button, copyButton, empty, ErrorLine, field, fill, freshId, h, select, setOptions, toast, write } from "./dom.js";
import { compact, dateTime, day, integer, money, plural, relative } from "./format.js";
import { handOver } from "./playground.js";
import { Poll } from "./refresh.js";
import { Table } from "./table.js";

const LIMITS = [ // name, label, its figure in `now`, the most that the API takes
  ["requests_per_minute", "Requests per minute", "requests", 1e9],
  ["tokens_per_minute", "Tokens per minute", "tokens", 1e12],
  ["parallel_requests", "Open requests at once", "parallel", 1e6],
];
const PERIODS = [["day", "a day"], ["month", "a month"], ["total", "in total"]];
const UNITS = [["tokens", "tokens"], ["money", "money"]];

export function keys({ rest, tools }) {
  const body = h("div", {});
  const tabs = h("div", { class: "tabs", role: "group", "aria-label": "Keys, teams, or what was changed" });
  tools.append(tabs);
  let inner = null;

  function update(parts) {
    const [name] = parts;
    fill(tabs, tab("Keys", "#/keys", name !== "teams" && name !== "changes"), tab("Teams", "#/keys/teams", name === "teams"), tab("Changes", "#/keys/changes", name === "changes"));
    inner?.destroy();
    inner = name === "teams" ? teamsView() : name === "changes" ? changesView() : keysView();
    fill(body, inner.element);
  }
  update(rest);
  return { element: body, update, destroy: () => inner?.destroy() };
}

const tab = (label, href, on) => h("a", { href, class: "tab", "aria-current": on ? "page" : undefined }, label);

// ---- keys

function keysView() {
  const error = new ErrorLine();
  const search = h("input", { type: "search", placeholder: "Name, owner, note, last four", "aria-label": "Search keys", oninput: show });
  const status = select([["active", "Active"], ["expired", "Expired"], ["revoked", "Revoked"], ["", "All"]], "active", { "aria-label": "Status", onchange: show });
  const team = select([["", "All teams"]], "", { "aria-label": "Team", onchange: show });
  const count = h("span", { class: "hint", role: "status" });
  let all = null;
  let teams = [];

  const none = h("div", {});
  const table = new Table({
    caption: "Keys",
    key: (k) => k.id,
    empty: none,
    sorted: { column: 0, down: false },
    rowClass: (k) => k.status !== "active",
    columns: [
      { head: "Key", text: true, sort: (k) => k.name.toLowerCase(), class: "name", value: (k) => [k.name, k.last4, k.note, k.source], cell: ([name, last4, note, source]) => [h("div", { class: "strong clip", title: name }, name), h("small", { class: "clip" }, h("code", {}, last4 ? `…${last4}` : ""), source === "config" && " in the config", note && ` ${note}`)] },
      { head: "Team", text: true, sort: (k) => k.team ?? "", class: "team", value: (k) => [k.team, k.owner], cell: ([name, owner]) => [h("div", { class: "clip", title: name ?? "" }, name ?? "–"), owner && h("small", { class: "clip", title: owner }, owner)] },
      { head: "Models", class: "models minor", value: (k) => k.models, cell: (patterns) => h("span", { class: "clip", title: patterns.join(", ") }, patterns.includes("*") ? "all" : patterns.join(", ")) },
      ...LIMITS.map(([name, , now], i) => ({
        head: ["Requests/min", "Tokens/min", "Open"][i],
        class: "use",
        sort: (k) => k.now?.[now] ?? 0,
        value: (k) => [k.now?.[now] ?? null, k.limits?.[name] ?? null],
        cell: ([used, limit]) => useOf(used, limit, ["requests in this minute", "tokens in this minute", "open requests"][i]),
      })),
      { head: "Budget", class: "use wide", value: (k) => k.budgets ?? [], cell: (budgets) => (budgets.length ? budgets.map(budgetUse) : h("span", { class: "faint" }, "no budget")) },
      { head: "Expires", class: "when-col minor", sort: (k) => k.expires_at ?? "9999", text: true, value: (k) => [k.status, k.expires_at, k.revoked_at], cell: ([state, expires, revoked]) => lifetime(state, expires, revoked) },
      { head: "", class: "actions", value: (k) => [k.source, k.status], cell: ([source, state], _, latest) => keyActions(source, state, latest) },
    ],
  });

  function show() {
    if (!all) return;
    setOptions(team, [["", "All teams"], ...[...new Set([...teams.map((t) => t.name), ...all.map((k) => k.team).filter(Boolean)])].sort().map((n) => [n, n])]);
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = all.filter((k) => {
      const text = [k.name, k.owner, k.note, k.last4, k.team].join(" ").toLowerCase();
      return (!status.value || k.status === status.value) && (!team.value || k.team === team.value) && words.every((w) => text.includes(w));
    });
    fill(none, all.length ? empty("No key fits", "Change the search or the filters.") : empty("No keys yet: make one", "A key lets a client in, and says which models it may use and how much.", button("New key", make, { kind: "primary", symbol: "plus" })));
    write(count, rows.length === all.length ? plural(all.length, "key") : `${integer(rows.length)} of ${plural(all.length, "key")}`);
    table.update(rows);
  }

  const poll = new Poll(
    async (signal) => {
      const [k, t] = await Promise.all([get("keys", { signal }), get("teams", { signal })]);
      all = k.data;
      teams = t.data;
      loading.hidden = true;
      card.hidden = false;
      show();
    },
    4000,
    error,
  );

  function keyActions(source, state, latest) {
    if (source === "config") return h("small", { class: "faint", title: "This key stands in the gateway's config, and changes there" }, "read only");
    const name = latest().name;
    const edit = button("Edit", () => change(latest()), { kind: "small", "aria-label": `Edit ${name}` });
    if (state === "revoked") return null;
    return [
      edit,
      state === "active" && button("Rotate", () => rotate(latest()), { kind: "small", "aria-label": `Rotate ${name}` }),
      button("Revoke", () => revoke(latest()), { kind: "small quiet-danger", "aria-label": `Revoke ${name}` }),
    ];
  }

  async function make() {
    const fields = keyFields(null, teams);
    const made = await form("New key", fields.element, "Make the key", () => call("POST", "keys", fields.read()), { wide: true });
    if (!made) return;
    void poll.now();
    await reveal(made.name, made.key, "The key is made and works at once.");
  }

  async function change(key) {
    const fields = keyFields(key, teams);
    const changed = await form(`Edit ${key.name}`, fields.element, "Save", () => call("PATCH", `keys/${encodeURIComponent(key.id)}`, fields.read()), { wide: true });
    if (changed) toast(`${changed.name}: saved`);
    void poll.now();
  }

  async function rotate(key) {
    const overlap = select([["0", "at once"], ["300", "after 5 minutes"], ["3600", "after an hour"], ["86400", "after a day"], ["604800", "after a week"]], "3600");
    const made = await confirm(`Rotate ${key.name}?`, ["A new key is made with the same rights, limits and budgets. It counts as the same key in usage."], "Make the new key", () => call("POST", `keys/${encodeURIComponent(key.id)}/rotate`, { overlap_seconds: Number(overlap.value) }), {
      extra: field("The old key stops", overlap, "Until then both work, so that clients can change over without a failed request."),
    });
    void poll.now();
    if (made?.key) await reveal(made.name, made.key, made.old_valid_until ? `The old key works until ${dateTime(made.old_valid_until)}.` : "");
  }

  async function revoke(key) {
    const done = await confirm(`Revoke ${key.name}?`, [`Requests with the key …${key.last4} are refused from now on. This cannot be undone; its usage is kept.`, key.now?.parallel ? `${plural(key.now.parallel, "request is", "requests are")} open with it now, and will finish.` : ""].filter(Boolean), "Revoke the key", () => call("DELETE", `keys/${encodeURIComponent(key.id)}`), { danger: true });
    if (done) toast(`${key.name} is revoked`);
    void poll.now();
  }

  const loading = h("p", { class: "loading" }, "Loading …");
  const card = h("section", { class: "card flush", "aria-label": "Keys", hidden: true }, table.element);
  const element = h("div", { class: "keys" }, h("div", { class: "toolbar" }, search, status, team, count, h("span", { class: "spring" }), button("New key", make, { kind: "primary", symbol: "plus", "data-shortcut": "n" })), error.element, loading, card);
  return { element, destroy: () => poll.stop() };
}

function useOf(used, limit, what) {
  if (limit === null) return h("div", { class: "use-line" }, h("span", {}, compact(used)), h("span", { class: "faint" }, "no limit"));
  return [h("div", { class: "use-line" }, h("span", {}, compact(used)), h("span", { class: "faint" }, `of ${compact(limit)}`)), bar(used / limit, { label: `${integer(used ?? 0)} of ${integer(limit)} ${what}` })];
}

const amountOf = (b, n) => (b.unit === "money" ? money(n) : compact(n));
const periodOf = (b) => ({ day: "today", month: "this month", total: "in total" })[b.period] ?? b.period;

function budgetUse(b) {
  const reset = b.resets_at ? `, new ${relative(b.resets_at)}` : "";
  return h("div", { class: "budget", title: `${periodOf(b)}${reset}` }, h("div", { class: "use-line" }, h("span", {}, amountOf(b, b.used ?? 0), h("span", { class: "faint" }, ` of ${amountOf(b, b.amount)}${b.unit === "tokens" ? " tok" : ""}`)), h("span", { class: "faint" }, b.period)), bar((b.used ?? 0) / b.amount, { label: `${amountOf(b, b.used ?? 0)} of ${amountOf(b, b.amount)} ${b.unit} ${periodOf(b)}` }));
}

function lifetime(state, expires, revoked) {
  if (state === "revoked") return [h("span", { class: "badge bad" }, "revoked"), h("small", {}, day(revoked))];
  if (state === "expired") return [h("span", { class: "badge warn" }, "expired"), h("small", {}, day(expires))];
  return expires ? [h("span", { title: dateTime(expires) }, relative(expires)), h("small", {}, day(expires))] : h("span", { class: "faint" }, "never");
}

// Shows a full key, once. The only way out is a button, since it cannot be had again.
async function reveal(name, key, text) {
  const box = h("input", { class: "secret", readonly: true, value: key, "aria-label": "The key", onfocus: (event) => event.target.select() });
  const base = new URL("../v1", document.baseURI).href;
  const sample = `curl ${base}/models -H "Authorization: Bearer ${key}"`;
  const next = await open(
    `Key for ${name}`,
    (close) => ({
      content: [
        h("p", {}, `${text} Copy it now: it is shown this once, and the gateway keeps only its digest.`.trim()),
        h("div", { class: "secret-line" }, box, copyButton(() => key)),
        h("details", {}, h("summary", {}, "Try it from a shell"), h("pre", { class: "sample" }, sample)),
      ],
      actions: [button("Use in the playground", () => close("playground")), button("I have copied it", () => close(), { kind: "primary" })],
    }),
    { dismissable: false, wide: true },
  );
  handOver(name, key);
  if (next === "playground") location.hash = "#/playground";
}

// ---- the form of a key and of a team

function limitsAndBudgets(record) {
  const limits = LIMITS.map(([name, label, , most]) => [name, label, h("input", { type: "number", min: 1, max: most, step: 1, inputmode: "numeric", placeholder: "no limit", value: record?.limits?.[name] ?? "", "data-param": `limits.${name}` })]);
  const rows = h("div", { class: "budget-rows", "data-param": "budgets" });
  const add = (b = { amount: "", unit: "tokens", period: "month" }) => {
    const amount = h("input", { type: "number", min: 0, step: "any", required: true, inputmode: "decimal", value: b.amount, "aria-label": "Amount" });
    const unit = select(UNITS, b.unit, { "aria-label": "Unit" });
    const period = select(PERIODS, b.period, { "aria-label": "Period" });
    const row = h("div", { class: "budget-row" }, amount, unit, period, button("", () => row.remove(), { kind: "icon-only", symbol: "trash", "aria-label": "Remove this budget", title: "Remove this budget" }));
    row.read = () => ({ amount: Number(amount.value), unit: unit.value, period: period.value });
    rows.append(row);
    return amount;
  };
  (record?.budgets ?? []).forEach((b) => add(b));
  return {
    elements: [
      h("fieldset", {}, h("legend", {}, "Limits"), h("div", { class: "thirds" }, limits.map(([, label, input]) => field(label, input)))),
      h("fieldset", {}, h("legend", {}, "Budgets"), rows, button("Add a budget", () => add().focus(), { kind: "small", symbol: "plus" })),
    ],
    read: () => ({
      limits: Object.fromEntries(limits.map(([name, , input]) => [name, input.value === "" ? null : Number(input.value)])),
      budgets: [...rows.children].map((row) => row.read()),
    }),
  };
}

function modelsField(record) {
  const listId = freshId("models");
  const input = h("input", { type: "text", value: (record?.models ?? ["*"]).join(", "), required: true, spellcheck: "false", autocapitalize: "off", "data-param": "models", list: listId });
  const known = h("datalist", { id: listId });
  get("models").then(({ data }) => fill(known, data.map((m) => h("option", { value: m.name }))), () => {});
  return { element: [field("Models", input, "Names or aliases, with commas between; * stands for any characters."), known], read: () => input.value.split(",").map((p) => p.trim()).filter(Boolean) };
}

const textInput = (value, props) => h("input", { type: "text", value: value ?? "", autocomplete: "off", ...props });

function keyFields(key, teams) {
  const name = textInput(key?.name, { required: true, maxlength: 128, autofocus: true, "data-param": "name" });
  const team = select([["", "no team"], ...[...new Set([...teams.map((t) => t.name), key?.team].filter(Boolean))].map((n) => [n, n])], key?.team ?? "", { "data-param": "team" });
  const owner = textInput(key?.owner, { "data-param": "owner" });
  const note = textInput(key?.note, { "data-param": "note" });
  const models = modelsField(key);
  const more = limitsAndBudgets(key);
  const lifetimes = [["", key?.expires_at ? `as it is (${dateTime(key.expires_at)})` : "never"], ["3600", "in an hour"], ["86400", "in a day"], ["604800", "in a week"], ["2592000", "in 30 days"], ["7776000", "in 90 days"], ["31536000", "in a year"], ...(key?.expires_at ? [["never", "never"]] : [])];
  const expires = select(lifetimes, "", { "data-param": "expires_at" });
  const text = (input) => input.value.trim() || null;
  return {
    element: [
      h("div", { class: "pair" }, field("Name", name, "Stands for the key in usage, logs and metrics."), field("Team", team, teams.length ? "Its limits hold as well." : "Teams are made under Keys, Teams.")),
      h("div", { class: "pair" }, field("Owner", owner), field("Note", note)),
      h("div", { class: "pair" }, h("div", {}, models.element), field("Expires", expires)),
      more.elements,
    ],
    read: () => {
      const { limits, budgets } = more.read();
      const out = { name: name.value.trim(), team: team.value || null, owner: text(owner), note: text(note), models: models.read(), limits, budgets };
      if (expires.value === "never") out.expires_at = null;
      else if (expires.value) out.expires_in_seconds = Number(expires.value);
      return key ? out : pruned(out);
    },
  };
}

// For a new record: what is not given is left out, and gets the gateway's default.
function pruned(fields) {
  const limits = Object.fromEntries(Object.entries(fields.limits).filter(([, value]) => value !== null));
  const out = Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== null));
  delete out.limits;
  delete out.budgets;
  if (Object.keys(limits).length) out.limits = limits;
  if (fields.budgets.length) out.budgets = fields.budgets;
  return out;
}

// ---- teams

function teamsView() {
  const error = new ErrorLine();
  const table = new Table({
    caption: "Teams",
    key: (t) => t.id,
    empty: empty("No teams yet: make one", "A team's limits and budgets hold for all of its keys together.", button("New team", make, { kind: "primary", symbol: "plus" })),
    sorted: { column: 0, down: false },
    columns: [
      { head: "Team", text: true, sort: (t) => t.name.toLowerCase(), class: "name", value: (t) => [t.name, t.note], cell: ([name, note]) => [h("div", { class: "strong clip", title: name }, name), note && h("small", { class: "clip", title: note }, note)] },
      { head: "Keys", class: "number", sort: (t) => t.keys, value: (t) => integer(t.keys) },
      { head: "Models", class: "models minor", value: (t) => t.models, cell: (patterns) => h("span", { class: "clip", title: patterns.join(", ") }, patterns.includes("*") ? "all" : patterns.join(", ")) },
      ...LIMITS.map(([name], i) => ({ head: ["Requests/min", "Tokens/min", "Open at once"][i], class: "number", value: (t) => t.limits?.[name] ?? null, cell: (limit) => (limit === null ? h("span", { class: "faint" }, "no limit") : compact(limit)) })),
      { head: "Budget", class: "use wide", value: (t) => t.budgets ?? [], cell: (budgets) => (budgets.length ? budgets.map(budgetUse) : h("span", { class: "faint" }, "no budget")) },
      { head: "", class: "actions", value: () => 0, cell: (_, __, latest) => [button("Edit", () => edit(latest()), { kind: "small", "aria-label": `Edit ${latest().name}` }), button("Delete", () => remove(latest()), { kind: "small quiet-danger", "aria-label": `Delete ${latest().name}` })] },
    ],
  });
  const loading = h("p", { class: "loading" }, "Loading …");
  const card = h("section", { class: "card flush", "aria-label": "Teams", hidden: true }, table.element);
  const poll = new Poll(
    async (signal) => {
      const { data } = await get("teams", { signal });
      loading.hidden = true;
      card.hidden = false;
      table.update(data);
    },
    5000,
    error,
  );

  function teamFields(team) {
    const name = textInput(team?.name, { required: true, maxlength: 128, autofocus: true, "data-param": "name" });
    const note = textInput(team?.note, { "data-param": "note" });
    const models = modelsField(team);
    const more = limitsAndBudgets(team);
    return {
      element: [h("div", { class: "pair" }, field("Name", name), field("Note", note)), models.element, more.elements],
      read: () => {
        const out = { name: name.value.trim(), note: note.value.trim() || null, models: models.read(), ...more.read() };
        return team ? out : pruned(out);
      },
    };
  }
  async function make() {
    const fields = teamFields(null);
    const made = await form("New team", fields.element, "Make the team", () => call("POST", "teams", fields.read()), { wide: true });
    if (made) toast(`${made.name} is made`);
    void poll.now();
  }
  async function edit(team) {
    const fields = teamFields(team);
    const changed = await form(`Edit ${team.name}`, fields.element, "Save", () => call("PATCH", `teams/${encodeURIComponent(team.id)}`, fields.read()), { wide: true });
    if (changed) toast(`${changed.name}: saved`);
    void poll.now();
  }
  async function remove(team) {
    const done = await confirm(`Delete ${team.name}?`, ["Its usage is kept. A team that still has working keys cannot be deleted: revoke or move them first."], "Delete the team", () => call("DELETE", `teams/${encodeURIComponent(team.id)}`), { danger: true });
    if (done) toast(`${team.name} is deleted`);
    void poll.now();
  }

  const element = h("div", { class: "keys" }, h("div", { class: "toolbar" }, h("span", { class: "hint" }, "A request must pass the limits of its key and of its key's team."), h("span", { class: "spring" }), button("New team", make, { kind: "primary", symbol: "plus", "data-shortcut": "n" })), error.element, loading, card);
  return { element, destroy: () => poll.stop() };
}
