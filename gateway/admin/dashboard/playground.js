// A chat with one model, or with two side by side, through the gateway's public API and with a user's key.

import { ApiError, events, get, problem } from "./api.js";
import { append, button, ErrorLine, field, fill, h, icon, select, setOptions, write } from "./dom.js";
import { compact, integer, milliseconds } from "./format.js";

// Keys that this tab has made, and the one in use. In memory alone: a reload forgets them.
const made = new Map(); // name → key
let current = "";

export function handOver(name, key) {
  made.set(name, key);
  current = key;
}

const kept = { panes: [[], []], models: ["", ""], both: false, system: "", temperature: "", maxTokens: "256" };

export function playground({ tools }) {
  const error = new ErrorLine();
  const keyInput = h("input", { type: "password", value: current, autocomplete: "off", spellcheck: "false", placeholder: "sk-…", oninput: () => (current = keyInput.value.trim()) });
  const madeHere = made.size ? select([["", "typed in"], ...[...made].map(([name, key]) => [key, name])], [...made.values()].includes(current) ? current : "", { "aria-label": "A key made in this tab", onchange: () => ((current = madeHere.value), (keyInput.value = current)) }) : null;
  const temperature = h("input", { type: "number", min: 0, max: 2, step: 0.1, placeholder: "default", inputmode: "decimal", value: kept.temperature, oninput: () => (kept.temperature = temperature.value) });
  const maxTokens = h("input", { type: "number", min: 1, step: 1, placeholder: "default", inputmode: "numeric", value: kept.maxTokens, oninput: () => (kept.maxTokens = maxTokens.value) });
  const system = h("input", { type: "text", placeholder: "none", value: kept.system, oninput: () => (kept.system = system.value) });
  const settings = () => ({
    system: system.value.trim(),
    temperature: temperature.value === "" ? null : Number(temperature.value),
    max_tokens: maxTokens.value === "" ? null : Number(maxTokens.value),
  });

  const panes = [0, 1].map((i) => pane(i));
  const grid = h("div", { class: "panes" }, panes.map((p) => p.element));
  const compareWords = h("span", {}, "");
  const compare = h("button", { type: "button", class: "button", "aria-pressed": String(kept.both), onclick: () => ((kept.both = !kept.both), layout()) }, icon("split"), compareWords);
  const clear = button("New chat", () => (stop(), panes.forEach((p) => p.clear()), prompt.focus()), { symbol: "trash" });
  tools.append(compare, clear);
  const prompt = h("textarea", { rows: 2, placeholder: "Ask something", "aria-label": "Message", onkeydown: (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing && (event.preventDefault(), void send()) });
  const sendButton = button("Send", () => void send(), { kind: "primary", symbol: "send" });
  const stopButton = button("Stop", stop, { kind: "", symbol: "stop", hidden: true });
  const keyField = field("API key", keyInput);

  function layout() {
    compare.setAttribute("aria-pressed", String(kept.both));
    write(compareWords, kept.both ? "One model" : "Compare two");
    panes[1].element.hidden = !kept.both;
    grid.classList.toggle("both", kept.both);
  }

  function busy() {
    const on = panes.some((p) => p.busy);
    sendButton.hidden = on;
    stopButton.hidden = !on;
  }

  function stop() {
    panes.forEach((p) => p.stop());
  }

  async function send() {
    const text = prompt.value.trim();
    error.clear();
    if (panes.some((p) => p.busy) || !text) return;
    if (!current) {
      error.show(new Error("Enter an API key first: one of a user, not the admin key. You can make one under Keys."));
      keyInput.focus();
      return;
    }
    if (!/^[!-~]+$/.test(current)) return error.show(new Error("A key has only visible ASCII characters, without spaces."));
    for (const control of [temperature, maxTokens]) {
      if (!control.checkValidity()) {
        control.focus();
        return error.show(new Error(`${control.labels[0].textContent}: ${control.validationMessage}`));
      }
    }
    prompt.value = "";
    const both = kept.both ? panes : panes.slice(0, 1);
    const running = both.map((p) => p.send(text, current, settings()));
    busy();
    await Promise.all(running);
    busy();
  }

  get("models").then(
    ({ data }) => {
      const options = data.flatMap((m) => [[m.name, m.ready ? m.name : `${m.name} (not ready)`], ...(m.aliases ?? []).map((alias) => [alias, `${alias} → ${m.name}`])]);
      if (!options.length) error.show(new Error("The gateway's config has no model."));
      panes.forEach((p, i) => p.models(options, i));
    },
    (problem) => error.show(problem),
  );
  layout();

  return {
    element: h(
      "div",
      { class: "playground" },
      h("div", { class: "settings" }, h("div", { class: "key-field" }, keyField, madeHere && field("Made in this tab", madeHere)), field("Temperature", temperature), field("Max tokens", maxTokens), h("div", { class: "system-field" }, field("System prompt", system))),
      grid,
      error.element,
      h("div", { class: "composer" }, prompt, h("div", { class: "composer-side" }, sendButton, stopButton)),
    ),
    destroy: stop,
  };
}

function pane(i) {
  const turns = kept.panes[i]; // {role, content, thought?, model?, stats?, failure?}
  const model = select([["", "…"]], "", { "aria-label": i ? "Second model" : "Model", onchange: () => (kept.models[i] = model.value) });
  const figures = h("div", { class: "pane-figures" });
  const talk = h("div", { class: "talk", role: "log", "aria-label": i ? "Second chat" : "Chat", tabindex: "0" });
  const none = h("p", { class: "talk-empty" }, "The answer comes here, token by token, with its time to first token and its speed.");
  let controller = null;

  const bubble = (turn) => {
    const thought = h("div", { class: "thought", hidden: !turn.thought }, turn.thought ?? "");
    const text = h("div", { class: "text" }, turn.content, turn.failure && failureOf(turn));
    const stats = h("div", { class: "stats" }, turn.stats ?? "");
    const element = h("div", { class: `turn ${turn.role} ${turn.failure ? "failed" : ""}` }, h("span", { class: "who" }, turn.role === "user" ? "You" : turn.model ?? ""), thought, text, turn.role === "assistant" && stats);
    return { element, text, thought, stats };
  };

  const failureOf = (turn) => h("div", { class: "failure", role: "alert" }, turn.failure);

  function draw() {
    fill(talk, turns.length ? turns.map((turn) => bubble(turn).element) : none);
    talk.scrollTop = talk.scrollHeight;
  }

  async function send(text, key, { system, ...settings }) {
    const name = model.value;
    turns.push({ role: "user", content: text });
    const turn = { role: "assistant", content: "", thought: "", model: name };
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...turns.filter((t) => !t.failure && (t.content || t.role === "user")).map(({ role, content }) => ({ role, content }))];
    turns.push(turn);
    draw();
    const live = bubble(turn);
    live.element.classList.add("busy");
    live.element.setAttribute("aria-busy", "true"); // read out when it is whole, not token by token
    talk.lastElementChild.replaceWith(live.element);
    controller = new AbortController();
    const timing = { start: performance.now(), first: null, last: null, pieces: 0, usage: null, finish: null };
    const ticking = setInterval(() => tell(timing, figures), 100);
    try {
      const body = { model: name, messages, stream: true, stream_options: { include_usage: true } };
      for (const [field, value] of Object.entries(settings)) if (value !== null) body[field] = value;
      await stream(body, key, controller.signal, timing, (delta) => {
        const atEnd = talk.scrollTop + talk.clientHeight >= talk.scrollHeight - 40;
        if (delta.thought) {
          turn.thought += delta.thought;
          live.thought.hidden = false;
          live.thought.append(delta.thought);
        }
        if (delta.text) {
          turn.content += delta.text;
          live.text.append(delta.text);
        }
        if (atEnd) talk.scrollTop = talk.scrollHeight;
      });
    } catch (failure) {
      if (failure.name === "AbortError") timing.finish = "stopped";
      else {
        turn.failure = failure.code ? `${failure.message} (${failure.status ? `${failure.status} ` : ""}${failure.code})` : failure.message;
        live.element.classList.add("failed");
        live.text.append(failureOf(turn));
      }
    }
    clearInterval(ticking);
    controller = null;
    live.element.classList.remove("busy");
    live.element.removeAttribute("aria-busy");
    turn.stats = summary(timing);
    write(live.stats, turn.stats);
    tell(timing, figures, true);
    talk.scrollTop = talk.scrollHeight;
  }

  draw();
  return {
    element: h("section", { class: "pane", "aria-label": i ? "Second model" : "First model" }, h("header", {}, model, figures), talk),
    models(options) {
      setOptions(model, options);
      if (kept.models[i] && options.some(([key]) => key === kept.models[i])) model.value = kept.models[i];
      else if (i && options.length > 1) model.value = options.find(([key, label]) => key === label && key !== options[0][0])?.[0] ?? options[1][0];
    },
    get busy() {
      return controller !== null;
    },
    send,
    stop: () => controller?.abort(),
    clear() {
      turns.length = 0;
      fill(figures);
      draw();
    },
  };
}

// Sends a chat and calls `ondelta({text, thought})` for each piece. Throws ApiError for a refusal, and for an error in mid-stream.
async function stream(body, key, signal, timing, ondelta) {
  let response;
  try {
    response = await fetch("../v1/chat/completions", { method: "POST", headers: { "Content-Type": "application/json", Authorization: `Bearer ${key}` }, body: JSON.stringify(body), signal, cache: "no-store", credentials: "omit" });
  } catch (failure) {
    if (failure.name === "AbortError") throw failure;
    throw new ApiError("The gateway does not answer.");
  }
  if (!response.ok) throw await problem(response);
  let ended = false;
  for await (const { data } of events(response)) {
    if (data === null) continue;
    if (data === "[DONE]") {
      ended = true;
      continue;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(String(chunk.error.message), { code: chunk.error.code });
    if (chunk.usage) timing.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (!choice) continue;
    if (choice.finish_reason) timing.finish = choice.finish_reason;
    const text = choice.delta?.content ?? "";
    const thought = choice.delta?.reasoning_content ?? choice.delta?.reasoning ?? "";
    if (!text && !thought) continue;
    timing.last = performance.now();
    timing.first ??= timing.last;
    timing.pieces += 1;
    ondelta({ text, thought });
  }
  if (!ended) throw new ApiError("The answer broke off.");
}

const tokens = (t) => t.usage?.completion_tokens ?? t.pieces;

function perSecond(t) {
  const n = tokens(t);
  return n > 1 && t.last > t.first ? ((n - 1) / (t.last - t.first)) * 1000 : null;
}

function tell(t, element, done = false) {
  if (!element.firstChild) append(element, ["First token", "Speed"].map((name) => h("span", {}, `${name} `, h("b", {}, "–"))));
  const [first, speed] = element.querySelectorAll("b");
  write(first, t.first === null ? (done ? "–" : `${((performance.now() - t.start) / 1000).toFixed(1)} s …`) : milliseconds(t.first - t.start));
  write(speed, perSecond(t) === null ? "–" : `${compact(perSecond(t))} tok/s`);
}

function summary(t) {
  if (t.first === null && t.finish !== "stopped") return "";
  const parts = [`first token ${milliseconds(t.first === null ? null : t.first - t.start)}`];
  if (perSecond(t) !== null) parts.push(`${compact(perSecond(t))} tok/s`);
  parts.push(t.usage ? `${integer(t.usage.prompt_tokens)} + ${integer(t.usage.completion_tokens)} tokens` : `${integer(t.pieces)} pieces`);
  if (t.last !== null) parts.push(`${milliseconds(t.last - t.start)} in all`);
  if (t.finish) parts.push(t.finish);
  return parts.join(" · ");
}
