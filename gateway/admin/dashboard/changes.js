// The audit table: who changed what, and what it was before.

import { get } from "./api.js";
import { open } from "./dialog.js";
import { button, empty, ErrorLine, h } from "./dom.js";
import { dateTime, relative } from "./format.js";
import { Poll } from "./refresh.js";
import { Table } from "./table.js";

export function changesView() {
  const error = new ErrorLine();
  const table = new Table({
    caption: "Changes, newest first",
    key: (entry) => entry.place,
    empty: empty("Nothing has been changed yet", "Whatever is done through the admin API is kept here, with who did it."),
    onrow: detail,
    columns: [
      { head: "Time", class: "moment", value: (e) => e.time, cell: (time) => h("time", { datetime: time, title: relative(time) }, dateTime(time)) },
      { head: "Who", class: "team", value: (e) => e.who, cell: (who) => h("span", { class: "clip", title: who }, who) },
      { head: "What", class: "team", value: (e) => e.what, cell: (what) => h("span", { class: "strong" }, what.replaceAll("_", " ")) },
      { head: "Of", class: "name", value: (e) => [e.target, nameOf(e)], cell: ([target, name]) => [h("div", { class: "clip" }, name ?? target), name && h("small", { class: "clip" }, target)] },
      { head: "Change", class: "change", value: (e) => differences(e.before, e.after), cell: (parts) => parts.slice(0, 3).map(([field, before, after]) => h("div", { class: "clip" }, `${field}: ${before} → ${after}`)) },
    ],
  });
  const loading = h("p", { class: "loading" }, "Loading …");
  const card = h("section", { class: "card flush", "aria-label": "Changes", hidden: true }, table.element);
  const poll = new Poll(
    async (signal) => {
      const { data } = await get("audit?limit=200", { signal });
      loading.hidden = true;
      card.hidden = false;
      // The oldest of those shown is 0, so that a row keeps its key while newer ones come.
      table.update(data.map((entry, i) => ({ ...entry, place: `${entry.time} ${entry.what} ${entry.target} ${data.length - i}` })));
    },
    5000,
    error,
  );
  return { element: h("div", {}, error.element, loading, card), destroy: () => poll.stop() };
}

// A record is JSON, or text that holds it.
function record(value) {
  if (typeof value !== "string") return value ?? {};
  try {
    return JSON.parse(value) ?? {};
  } catch {
    return { value };
  }
}

const nameOf = ({ before, after }) => record(after).name ?? record(before).name ?? null;

// What is absent, null or empty is the same to a reader.
function said(value) {
  if (value === undefined || value === null || value === "") return "–";
  if (typeof value !== "object") return String(value);
  if (!Array.isArray(value)) value = Object.fromEntries(Object.entries(value).filter(([, v]) => v !== null));
  return Object.keys(value).length ? JSON.stringify(value) : "–";
}

// What differs between two records, field by field. Of something new or gone, what was said of it.
function differences(before, after) {
  const [was, is] = [record(before), record(after)];
  const fields = [...new Set([...Object.keys(was), ...Object.keys(is)])];
  return fields.filter((field) => said(was[field]) !== said(is[field])).map((field) => [field, said(was[field]), said(is[field])]);
}

function detail(entry) {
  const parts = differences(entry.before, entry.after);
  void open(
    `${entry.what.replaceAll("_", " ")}: ${nameOf(entry) ?? entry.target}`,
    (close) => ({
      content: [
        h("p", {}, `${dateTime(entry.time)}, by ${entry.who}, on ${entry.target}`),
        parts.length ? h("dl", { class: "detail" }, parts.map(([field, before, after]) => [h("dt", {}, field), h("dd", {}, h("code", {}, before), " → ", h("code", {}, after))])) : h("p", {}, "No field differs."),
      ],
      actions: [button("Close", () => close(), { autofocus: true })],
    }),
    { wide: true },
  );
}
