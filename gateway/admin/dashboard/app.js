// The shell: login, navigation, theme, and the state of the live stream. Each view is a module that makes an element.

import { get, session } from "./api.js";
import { closeAll, open } from "./dialog.js";
import { button, ErrorLine, field, fill, h, icon, toast, write } from "./dom.js";
import { engines } from "./engines.js";
import { milliseconds } from "./format.js";
import { keys } from "./keys.js";
import { live } from "./live.js";
import { overview } from "./overview.js";
import { playground } from "./playground.js";
import { repaint } from "./plots.js";
import { requests } from "./requests.js";
import { usage } from "./usage.js";

// In the order of the navigation; digits on the keyboard follow it.
const VIEWS = [
  { name: "overview", title: "Overview", make: overview },
  { name: "engines", title: "Engines", make: engines },
  { name: "keys", title: "Keys", make: keys },
  { name: "usage", title: "Usage", make: usage },
  { name: "requests", title: "Requests", make: requests },
  { name: "playground", title: "Playground", make: playground },
];

const root = document.getElementById("app");
let shown = null; // {view, element, update?(rest), destroy?()}

// ---- theme

const THEMES = ["system", "light", "dark"];

function nextTheme() {
  const now = document.documentElement.dataset.theme ?? "system";
  const next = THEMES[(THEMES.indexOf(now) + 1) % THEMES.length];
  if (next === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  localStorage.setItem("penstock-theme", next);
  repaint();
  return next;
}

function themeButton() {
  const words = (theme) => `Theme: ${theme}`;
  const label = h("span", {}, words(document.documentElement.dataset.theme ?? "system"));
  return h("button", { type: "button", class: "nav-button", title: "Light, dark, or as the system has it", onclick: () => write(label, words(nextTheme())) }, icon("theme"), label);
}

// ---- login

function showLogin(message = "") {
  live.stop();
  leave();
  closeAll({ even: true });
  document.title = "Log in · Penstock";
  const error = new ErrorLine();
  const input = h("input", { type: "password", autocomplete: "current-password", required: true, spellcheck: "false" });
  const go = h("button", { type: "submit", class: "button primary" }, "Log in");
  const form = h(
    "form",
    {
      class: "login",
      novalidate: true,
      onsubmit: async (event) => {
        event.preventDefault();
        const key = input.value.trim();
        error.clear();
        if (!key) return error.show(new Error("Enter the admin key."));
        if (!/^[!-~]+$/.test(key)) return error.show(new Error("A key has only visible ASCII characters, without spaces."));
        go.disabled = true;
        try {
          const { version } = await get("session", { key });
          session.key = key;
          showShell(version);
        } catch (problem) {
          error.show(explain(problem));
          input.select();
        }
        go.disabled = false;
      },
    },
    h("div", { class: "brand large" }, mark(), h("span", {}, "Penstock")),
    field("Admin key", input, "The admin_key of the gateway's config. It stays in this tab until you log out or close it."),
    error.element,
    go,
  );
  fill(root, h("main", { class: "login-page" }, form));
  if (message) error.show(new Error(message));
  input.focus();
}

function explain(problem) {
  if (problem.status === 401) return new Error("This is not the admin key.");
  if (problem.status === 403) return new Error("This is a user's key. The dashboard needs the admin key.");
  if (problem.status === 404) return new Error("The admin API is off: the gateway's config has no admin_key.");
  return problem;
}

session.onrefused = () => {
  if (!session.key) return;
  session.key = null;
  showLogin("The admin key is no longer accepted.");
};

function logOut() {
  session.key = null;
  showLogin();
}

function mark() {
  const svg = icon("overview");
  svg.firstChild.setAttribute("d", "M4 7h5c6 0 4 10 10 10h1M4 12h3");
  svg.setAttribute("class", "icon mark");
  return svg;
}

// ---- shell

function showShell(version) {
  const nav = h(
    "nav",
    { "aria-label": "Views" },
    VIEWS.map(({ name, title }, i) => h("a", { href: `#/${name}`, class: "nav-button", "data-view": name, title: `${title} (${i + 1})` }, icon(name), h("span", {}, title))),
  );
  const lag = h("span", { class: "lag", title: "How late the gateway's event loop runs: what it adds to every token" }, "");
  live.addEventListener("figures", () => write(lag, live.latest ? `loop lag ${milliseconds(live.latest.loop_lag_ms)}` : ""));
  fill(
    root,
    h("a", { href: "#content", class: "skip", onclick: (event) => (event.preventDefault(), document.getElementById("content").focus()) }, "Skip to the content"),
    h(
      "div",
      { class: "shell" },
      h(
        "aside",
        {},
        h("div", { class: "brand" }, mark(), h("span", {}, "Penstock")),
        nav,
        h("div", { class: "aside-foot" }, themeButton(), h("button", { type: "button", class: "nav-button", onclick: logOut }, icon("out"), h("span", {}, "Log out")), h("div", { class: "version" }, version ? `v${version}` : "", lag)),
      ),
      h("div", { class: "page" }, h("header", { class: "top" }, h("h1", { tabindex: "-1" }, ""), h("div", { class: "tools" }), connection()), h("main", { id: "content", tabindex: "-1" })),
    ),
  );
  live.start();
  route();
}

function connection() {
  const dot = h("i", { class: "dot" });
  const text = h("span", { "aria-hidden": "true" }, "");
  const spoken = h("span", { class: "offscreen", role: "status" }, ""); // without the seconds, or it would never be quiet
  const retry = h("button", { type: "button", class: "link", hidden: true, onclick: () => live.retryNow() }, "Retry now");
  const element = h("div", { class: "connection" }, dot, text, spoken, retry);
  const update = () => {
    element.dataset.state = live.state;
    retry.hidden = live.state !== "waiting";
    const wait = Math.max(0, Math.ceil((live.retryAt - Date.now()) / 1000));
    write(spoken, { live: "Connected", connecting: "", waiting: "The connection to the gateway is lost", off: "" }[live.state]);
    write(text, { live: "Live", connecting: "Connecting …", waiting: `Connection lost, retry in ${wait} s`, off: "Off" }[live.state]);
    if (live.state === "waiting" && element.isConnected) setTimeout(update, 500);
  };
  live.addEventListener("state", update);
  update();
  return element;
}

function leave() {
  shown?.destroy?.();
  shown = null;
}

function route() {
  if (!session.key || !document.querySelector(".shell")) return;
  const [name, ...rest] = location.hash.replace(/^#\/?/, "").split("/").map(decoded);
  const view = VIEWS.find((v) => v.name === name);
  if (!view) return void location.replace("#/overview");
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${view.title} · Penstock`;
  if (shown?.view === view && shown.update) return shown.update(rest);
  const first = !shown;
  leave();
  const heading = document.querySelector("h1");
  write(heading, view.title);
  const tools = fill(document.querySelector(".tools"));
  const content = document.getElementById("content");
  content.dataset.view = name;
  shown = { view, ...view.make({ rest, tools }) };
  fill(content, shown.element);
  scrollTo(0, 0);
  if (!first) heading.focus({ preventScroll: true });
}

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

// ---- keyboard

const SHORTCUTS = [
  ["1 – 6", "go to a view"],
  ["/", "to the search or filter of the view"],
  ["n", "new key (Keys)"],
  ["p", "pause or go on (Requests)"],
  ["?", "this list"],
  ["Esc", "close a dialog"],
];

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !session.key || document.querySelector("dialog[open]")) return;
  if (event.target.closest("input, textarea, select, [contenteditable]")) return;
  const view = VIEWS[Number(event.key) - 1];
  if (view) location.hash = `#/${view.name}`;
  else if (event.key === "/") document.querySelector("#content input[type=search], #content select")?.focus();
  else if (event.key === "n" || event.key === "p") document.querySelector(`[data-shortcut="${event.key}"]`)?.click();
  else if (event.key === "?") {
    void open("Keyboard", (close) => ({
      content: h("dl", { class: "shortcuts" }, SHORTCUTS.map(([key, what]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, what)])),
      actions: [button("Close", () => close(), { autofocus: true })],
    }));
  } else return;
  event.preventDefault();
});

addEventListener("hashchange", () => {
  closeAll();
  route();
});
addEventListener("unhandledrejection", (event) => event.reason?.name !== "AbortError" && toast(event.reason?.message ?? "Something failed.", "bad"));

// ---- start

async function start() {
  if (!session.key) return showLogin();
  showShell("");
  try {
    const { version } = await get("session");
    const place = document.querySelector(".version");
    if (place) place.prepend(`v${version}`);
  } catch (problem) {
    // A key that was refused has led to the login already; all else the stream's state tells.
    if (problem.status === 403 || problem.status === 404) {
      session.key = null;
      showLogin(explain(problem).message);
    }
  }
}

void start();
