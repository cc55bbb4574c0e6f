// Makes elements. Whatever is not an element becomes a text node: names, notes and model output are never read as HTML.

const SVG = "http://www.w3.org/2000/svg";

export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) set(element, name, value);
  append(element, children);
  return element;
}

function set(element, name, value) {
  if (value === undefined || value === null || value === false) return;
  if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
  else if (name === "vars") for (const [key, v] of Object.entries(value)) element.style.setProperty(key, v);
  else if (name === "value" || name === "checked" || name === "selected") element[name] = value;
  else if (name === "href" && !String(value).startsWith("#")) throw new Error("links lead to this page alone");
  else element.setAttribute(name, value === true ? "" : String(value));
}

export function append(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : String(child));
  }
}

export function fill(element, ...children) {
  element.replaceChildren();
  append(element, children);
  return element;
}

// Text that is written again and again: leaves the node alone (and a reader's selection in it) if nothing changed.
export function write(element, text) {
  const next = String(text);
  if (element.textContent !== next) element.textContent = next;
}

const ICONS = {
  overview: "M3 12h3l2-7 4 14 3-9 1.5 2H21",
  engines: "M4 5h16v6H4zM4 13h16v6H4zM7.5 8h.01M7.5 16h.01M11 8h6M11 16h6",
  keys: "M14.5 9.5 20 4m-2.5 2.5L20 9m-4-1 1.5 1.5M10 20a5 5 0 1 0 0-10 5 5 0 0 0 0 10Z",
  usage: "M4 20V11m5.3 9V4m5.4 16v-7M20 20V8",
  requests: "M4 6h16M4 12h16M4 18h10",
  playground: "M4 5h16v11H10l-4 4v-4H4zM8 9h8M8 12h5",
  theme: "M12 4v16a8 8 0 0 0 0-16ZM12 4a8 8 0 0 0 0 16",
  out: "M10 5H5v14h5M14 8l4 4-4 4M18 12H9",
  plus: "M12 5v14M5 12h14",
  copy: "M9 9h10v11H9zM5 15V4h10",
  check: "M5 12.5 10 17l9-10",
  close: "M6 6l12 12M18 6 6 18",
  pause: "M9 5v14M15 5v14",
  play: "M8 5v14l11-7z",
  stop: "M7 7h10v10H7z",
  send: "M12 19V6m-5 5 5-5 5 5",
  download: "M12 4v11m-5-4 5 5 5-5M5 20h14",
  search: "M11 17a6 6 0 1 0 0-12 6 6 0 0 0 0 12Zm4.5-1.5L20 20",
  retry: "M19 12a7 7 0 1 1-2-5l2 2m0-5v5h-5",
  split: "M4 5h16v14H4zM12 5v14",
  trash: "M5 7h14M9 7V4h6v3M7 7l1 13h8l1-13",
};

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

export function button(label, onclick, { kind = "", symbol, ...props } = {}) {
  return h("button", { type: "button", class: `button ${kind}`, onclick, ...props }, symbol && icon(symbol), label && h("span", {}, label));
}

let made = 0;
export const freshId = (stem) => `${stem}-${++made}`;

// A labelled input. `control` is an element; the hint is read out with it.
export function field(label, control, hint) {
  control.id ||= freshId("field");
  const note = hint && h("small", { id: `${control.id}-hint` }, hint);
  if (note) control.setAttribute("aria-describedby", note.id);
  return h("div", { class: "field" }, h("label", { for: control.id }, label), control, note);
}

export function select(options, value, props = {}) {
  const control = h("select", props);
  for (const option of options) {
    const [key, label] = Array.isArray(option) ? option : [option, option];
    control.append(h("option", { value: key }, label));
  }
  control.value = value;
  return control;
}

// The options of a <select> that fills up later; the choice is kept.
export function setOptions(control, options) {
  const wanted = JSON.stringify(options);
  if (control.dataset.options === wanted) return;
  control.dataset.options = wanted;
  const kept = control.value;
  fill(control, options.map(([key, label]) => h("option", { value: key }, label)));
  if (options.some(([key]) => key === kept)) control.value = kept;
}

export function bar(share, { tone = "", label }) {
  const percent = Math.max(0, Math.min(1, share || 0)) * 100;
  return h(
    "div",
    {
      class: `bar ${tone || (percent >= 95 ? "bad" : percent >= 80 ? "warn" : "")}`,
      role: "meter",
      "aria-label": label,
      "aria-valuemin": 0,
      "aria-valuemax": 100,
      "aria-valuenow": Math.round(percent),
    },
    h("i", { vars: { "--share": `${percent.toFixed(1)}%` } }),
  );
}

export function empty(title, text, ...actions) {
  return h("div", { class: "empty" }, h("strong", {}, title), text && h("p", {}, text), actions);
}

export function toast(text, tone = "") {
  const box = h("div", { class: `toast ${tone}` }, text);
  document.getElementById("toasts").append(box);
  setTimeout(() => box.remove(), tone === "bad" ? 9000 : 4000);
}

// For an error that belongs to a place: shown there, read out, and gone with the next success.
export class ErrorLine {
  constructor() {
    this.element = h("p", { class: "error-line", role: "alert", hidden: true });
  }
  show(error) {
    if (error?.name === "AbortError") return;
    this.element.hidden = false;
    write(this.element, error?.message ?? String(error));
  }
  clear() {
    this.element.hidden = true;
    this.element.textContent = "";
  }
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Over plain http on another host than this one there is no clipboard API.
    const area = h("textarea", { value: text, readonly: true, class: "offscreen" });
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

export function copyButton(text, label = "Copy") {
  const words = h("span", {}, label);
  const own = h("button", { type: "button", class: "button", onclick: run }, icon("copy"), words);
  async function run() {
    const done = await copy(text());
    write(words, done ? "Copied" : "Press Ctrl+C");
    setTimeout(() => write(words, label), 2000);
  }
  return own;
}
