// A table whose rows stay in place while their figures change: a cell is made anew only if its own value changed, so that
// focus, selection and scrolling survive a refresh.

import { append, button, fill, h, write } from "./dom.js";
import { integer } from "./format.js";

const collator = new Intl.Collator("en", { numeric: true });
const ROWS = 100; // at once: ten thousand keys must not freeze the page

// A column: {head, value(row) → anything JSON, cell?(value, row, latest) → text or elements, sort?(row), text? (sorts from A),
// class?, hint?}.
// `latest()` gives the newest state of the row, for buttons that live longer than it.
export class Table {
  constructor({ caption, columns, key, empty, sorted = null, onrow = null, rowClass = null, most = ROWS }) {
    this.columns = columns;
    this.key = key;
    this.rows = new Map(); // key → {row, tr, cells: [{td, signature}]}
    this.onrow = onrow;
    this.rowClass = rowClass;
    this.sorted = sorted; // {column index, down: bool}
    this.most = most;
    this.all = [];
    this.body = h("tbody");
    this.heads = columns.map((column, i) => this.#head(column, i));
    this.none = h("div", { class: "table-empty", hidden: true }, empty);
    this.foot = h("tfoot", { hidden: true });
    this.table = h("table", {}, h("caption", { class: "offscreen" }, caption), h("thead", {}, h("tr", {}, this.heads)), this.body, this.foot);
    this.count = h("span", {});
    this.more = h("div", { class: "more", hidden: true }, this.count, button("Show more", () => this.#showMore(), { kind: "small" }));
    this.element = h("div", { class: "table", tabindex: "-1" }, this.table, this.none, this.more);
    this.#mark();
  }

  #head(column, i) {
    const content = column.sort
      ? h("button", { type: "button", class: "sort", onclick: () => this.#sortBy(i), title: column.hint }, column.head)
      : column.hint ? h("span", { title: column.hint }, column.head) : column.head;
    return h("th", { scope: "col", class: column.class }, content);
  }

  #sortBy(i) {
    this.sorted = { column: i, down: this.sorted?.column === i ? !this.sorted.down : !this.columns[i].text };
    this.#mark();
    this.update(this.all);
  }

  #showMore() {
    this.most += ROWS;
    this.update(this.all);
  }

  #mark() {
    this.heads.forEach((head, i) => {
      if (this.sorted?.column === i) head.setAttribute("aria-sort", this.sorted.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
  }

  update(rows) {
    this.all = rows;
    const ordered = (this.sorted ? this.#ordered(rows) : rows).slice(0, this.most);
    this.more.hidden = ordered.length === rows.length;
    write(this.count, `${integer(ordered.length)} of ${integer(rows.length)}`);
    const seen = new Set();
    let previous = null;
    for (const row of ordered) {
      const key = this.key(row);
      seen.add(key);
      const entry = this.rows.get(key) ?? this.#add(key);
      entry.row = row;
      this.#paint(entry);
      const place = previous ? previous.nextSibling : this.body.firstChild;
      if (place !== entry.tr) this.body.insertBefore(entry.tr, place);
      previous = entry.tr;
    }
    for (const [key, { tr }] of this.rows) {
      if (seen.has(key)) continue;
      tr.remove();
      this.rows.delete(key);
    }
    this.none.hidden = rows.length > 0;
    this.table.classList.toggle("vacant", rows.length === 0);
  }

  total(cells) {
    this.foot.hidden = !cells;
    if (cells) fill(this.foot, h("tr", {}, cells.map((cell, i) => h(i ? "td" : "th", { class: this.columns[i].class, "data-label": i ? this.columns[i].head : undefined, scope: i ? undefined : "row" }, cell))));
  }

  #ordered(rows) {
    const { column, down } = this.sorted;
    const by = this.columns[column].sort;
    const sign = down ? -1 : 1;
    return rows
      .map((row, i) => [by(row), i, row])
      .sort(([a, i], [b, j]) => {
        const one = a ?? (typeof b === "string" ? "" : -Infinity);
        const two = b ?? (typeof a === "string" ? "" : -Infinity);
        const order = typeof one === "string" ? collator.compare(one, two) : one - two;
        return sign * order || i - j;
      })
      .map(([, , row]) => row);
  }

  #add(key) {
    const cells = this.columns.map((column) => ({ td: h("td", { class: column.class, "data-label": column.head || undefined }), signature: undefined }));
    const tr = h("tr", {}, cells.map(({ td }) => td));
    const entry = { row: null, tr, cells };
    if (this.onrow) {
      tr.tabIndex = 0;
      tr.classList.add("clickable");
      tr.addEventListener("click", (event) => event.target.closest("button, a, input") || this.onrow(entry.row));
      tr.addEventListener("keydown", (event) => event.key === "Enter" && event.target === tr && this.onrow(entry.row));
    }
    this.rows.set(key, entry);
    return entry;
  }

  #paint(entry) {
    if (this.rowClass) entry.tr.classList.toggle("dim", this.rowClass(entry.row));
    this.columns.forEach((column, i) => {
      const cell = entry.cells[i];
      const value = column.value(entry.row);
      const signature = JSON.stringify(value) ?? "";
      if (cell.signature === signature) return;
      cell.signature = signature;
      cell.td.replaceChildren();
      append(cell.td, [column.cell ? column.cell(value, entry.row, () => entry.row) : value ?? "–"]);
    });
  }
}
