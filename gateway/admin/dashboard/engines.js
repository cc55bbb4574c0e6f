// Models and the engines that serve them: load, logs, and restart, drain, resume.

import { engineAction, engineLog, get } from "./api.js";
import { confirm } from "./dialog.js";
import { bar, button, copyButton, empty, ErrorLine, fill, h, toast, write } from "./dom.js";
import { compact, integer, money, percent, plural } from "./format.js";
import { live } from "./live.js";
import { Poll } from "./refresh.js";
import { Table } from "./table.js";

// The states of a replica, as the gateway names them.
const TONES = { ready: "good", starting: "busy", draining: "warn", unhealthy: "bad", failed: "bad", stopped: "idle" };

export function stateBadge(state) {
  return h("span", { class: `badge ${TONES[state] ?? "idle"}` }, state);
}

export function engines() {
  const error = new ErrorLine();
  const cards = new Map(); // model → {element, update}
  const list = h("div", { class: "stack" });
  const none = empty("No models yet", "Models and their engines stand in the gateway's config; a reload takes up what was added.");
  const loading = h("p", { class: "loading" }, "Loading …");
  let known = { models: [], engines: [] };

  function show() {
    loading.hidden = true;
    const { models } = known;
    const fresh = new Map((live.latest?.engines ?? []).map((e) => [e.id, e]));
    for (const model of models) {
      if (!cards.has(model.name)) {
        const card = modelCard(poll);
        cards.set(model.name, card);
        list.append(card.element);
      }
      const own = known.engines.filter((e) => e.model === model.name).map((e) => newest(e, fresh.get(e.id)));
      cards.get(model.name).update(model, own);
    }
    for (const [name, card] of cards) {
      if (models.some((m) => m.name === name)) continue;
      card.destroy();
      card.element.remove();
      cards.delete(name);
    }
    none.hidden = models.length > 0;
  }

  none.hidden = true;
  const poll = new Poll(
    async (signal) => {
      const [models, all] = await Promise.all([get("models", { signal }), get("engines", { signal })]);
      known = { models: models.data, engines: all.data };
      show();
    },
    3000,
    error,
  );
  const update = () => known.models.length && show();
  live.addEventListener("figures", update);
  return {
    element: h("div", {}, error.element, loading, none, list),
    destroy() {
      poll.stop();
      live.removeEventListener("figures", update);
      cards.forEach((card) => card.destroy());
    },
  };
}

// The live figures are younger than what was asked for, but hold no reason: an old one must not stand beside a new state.
function newest(engine, figures) {
  return { ...engine, ...figures, reason: figures && figures.state !== engine.state ? null : engine.reason };
}

function modelCard(poll) {
  const title = h("h2", {}, "");
  const about = h("p", { class: "about" });
  const figures = h("dl", { class: "figures" });
  let log = null;

  const rows = new Table({
    caption: "Engines of the model",
    key: (e) => e.id,
    empty: empty("No engine", "This model has neither an engine nor endpoints."),
    columns: [
      { head: "Engine", class: "strong", value: (e) => [e.id, e.url, e.managed], cell: ([id, url, managed]) => [id, h("small", { class: "clip" }, managed ? "run by Penstock" : url ?? "remote")] },
      { head: "State", value: (e) => [e.state, e.reason], cell: ([state, reason]) => [stateBadge(state), reason && h("small", { class: "reason", title: reason }, reason)] },
      { head: "Open", class: "number", value: (e) => compact(e.open_requests), hint: "Requests that the gateway has open on it" },
      { head: "Running", class: "number", value: (e) => compact(e.running), hint: "Requests in the engine's batch" },
      { head: "Waiting", class: "number", value: (e) => compact(e.waiting), hint: "Requests in the engine's own queue" },
      { head: "KV cache", class: "meter", value: (e) => ((e.kv_cache_usage ?? null) === null ? null : Math.round(e.kv_cache_usage * 1000) / 1000), cell: (share, e) => (share === null ? "–" : h("div", { class: "with-bar" }, bar(share, { label: `KV cache of ${e.id}` }), h("span", {}, percent(share)))) },
      { head: "Context", class: "number minor", value: (e) => integer(e.max_model_len), hint: "Tokens that a prompt and its answer may have together" },
      { head: "Restarts", class: "number", value: (e) => integer(e.restarts) },
      { head: "", class: "actions", value: (e) => [e.managed, idle(e.state)], cell: ([managed, drained], _, latest) => actions(managed, drained, latest) },
    ],
  });

  function actions(managed, drained, latest) {
    return [
      managed && button("Log", () => toggleLog(latest()), { kind: "small", "aria-label": `Log of ${latest().id}` }),
      drained
        ? button("Resume", () => ask(latest(), "resume"), { kind: "small", "aria-label": `Resume ${latest().id}` })
        : button("Drain", () => ask(latest(), "drain"), { kind: "small", "aria-label": `Drain ${latest().id}` }),
      managed && button("Restart", () => ask(latest(), "restart"), { kind: "small", "aria-label": `Restart ${latest().id}` }),
    ];
  }

  async function ask(engine, action) {
    const open = engine.open_requests ?? 0;
    const work = open ? `${plural(open, "request is", "requests are")} open on it now.` : "No request is open on it now.";
    const what = {
      restart: [`Restart ${engine.id}?`, [`The engine takes no new requests, finishes the open ones, and is started again. ${work}`, "Until it is ready, the model's other replicas do its work; with no other replica, requests are refused."], "Restart"],
      drain: [`Drain ${engine.id}?`, [`It takes no new requests and finishes the open ones. ${work}`, "It stays out of service until you resume it."], "Drain"],
      resume: [`Resume ${engine.id}?`, ["It takes requests again."], "Resume"],
    }[action];
    const done = await confirm(what[0], what[1], what[2], () => engineAction(engine.id, action), { danger: action === "restart" });
    if (done) toast(`${engine.id}: ${action} asked for`);
    void poll.now();
  }

  function toggleLog(engine) {
    const same = log?.id === engine.id;
    log?.destroy();
    log = null;
    if (!same) {
      log = logPane(engine.id, () => {
        log?.destroy();
        log = null;
      });
      element.append(log.element);
      log.element.scrollIntoView({ block: "nearest" });
    }
  }

  const element = h("section", { class: "card" }, h("div", { class: "card-head" }, h("div", {}, title, about), figures), rows.element);
  return {
    element,
    update(model, own) {
      write(title, model.name);
      element.setAttribute("aria-label", `Model ${model.name}`);
      const names = model.aliases?.length ? `also called ${model.aliases.join(", ")}` : "";
      write(about, [`${own.filter((e) => e.state === "ready").length} of ${plural(own.length, "replica")} ready`, names, `failover ${model.failover}`, price(model.price)].filter(Boolean).join(" · "));
      const wanted = [["Requests", compact(model.requests)], ["Prompt tokens", compact(model.prompt_tokens)], ["Output tokens", compact(model.completion_tokens)], ["Open", compact(model.open_requests)]];
      if (figures.dataset.shown !== JSON.stringify(wanted)) {
        figures.dataset.shown = JSON.stringify(wanted);
        fill(figures, wanted.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
      }
      rows.update(own);
    },
    destroy: () => log?.destroy(),
  };
}

// A drained engine is one that can be resumed.
const idle = (state) => state === "draining" || state === "stopped";

const price = (p) => (p ? `per million tokens: ${money(p.prompt)} prompt, ${money(p.completion)} output${p.cached === null || p.cached === undefined ? "" : `, ${money(p.cached)} cached`}` : "");

function logPane(id, onclose) {
  const error = new ErrorLine();
  const text = h("pre", { class: "log", tabindex: "0", "aria-label": `Log of ${id}` }, "Loading …");
  let lines = [];
  const poll = new Poll(
    async (signal) => {
      const answer = await engineLog(id, 300, { signal });
      const atEnd = text.scrollTop + text.clientHeight >= text.scrollHeight - 24;
      const first = lines.length === 0;
      lines = answer.lines;
      write(text, lines.length ? lines.join("\n") : "The log is empty.");
      if (atEnd || first) text.scrollTop = text.scrollHeight;
    },
    2000,
    error,
  );
  const element = h("div", { class: "log-pane" }, h("div", { class: "log-head" }, h("h3", {}, `Log of ${id}`), h("span", { class: "hint" }, "the last 300 lines; follows while you are at its end"), copyButton(() => lines.join("\n")), button("Close", onclose, { kind: "" })), error.element, text);
  return {
    id,
    element,
    destroy() {
      poll.stop();
      element.remove();
    },
  };
}
