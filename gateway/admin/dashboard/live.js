// The live figures: one stream of events, kept up, with the last hour of points.

import { events, fetchApi, session } from "./api.js";

const SILENCE = 8000; // ms without an event after which the stream counts as dead; one comes each second
const HOUR = 3600; // s
const FINE = 600; // points of one second that are kept

class Live extends EventTarget {
  state = "off"; // off | connecting | live | waiting
  retryAt = 0; // when `waiting` ends, ms since the epoch
  latest = null;
  interval = 10; // s of a coarse point
  coarse = []; // the last hour, oldest first; the last point is still growing
  fine = []; // the last minutes, a point a second
  #controller = null;
  #retry = null;
  #wake = null;

  start() {
    if (this.#controller) return;
    this.#controller = new AbortController();
    void this.#run(this.#controller.signal);
  }

  stop() {
    this.#controller?.abort();
    this.#controller = null;
    this.latest = null;
    this.coarse = [];
    this.fine = [];
    this.#wake?.();
    this.#is("off");
  }

  retryNow() {
    this.#wake?.();
  }

  #is(state) {
    this.state = state;
    this.dispatchEvent(new Event("state"));
  }

  async #run(signal) {
    let failures = 0;
    while (!signal.aborted && session.key) {
      this.#is("connecting");
      try {
        await this.#read(signal, () => (failures = 0));
      } catch (error) {
        if (error.status === 401 || error.status === 403) return;
      }
      if (signal.aborted) return;
      failures += 1;
      const wait = Math.min(15, 0.5 * 2 ** (failures - 1)) * (0.75 + Math.random() / 2) * 1000;
      this.retryAt = Date.now() + wait;
      this.#is("waiting");
      await new Promise((resolve) => {
        this.#retry = setTimeout(resolve, wait);
        this.#wake = resolve;
      });
      clearTimeout(this.#retry);
    }
  }

  async #read(signal, onfigures) {
    const attempt = new AbortController();
    const abort = () => attempt.abort();
    signal.addEventListener("abort", abort);
    let watchdog = setTimeout(abort, SILENCE);
    try {
      const response = await fetchApi("events", { signal: attempt.signal, accept: "text/event-stream" });
      for await (const { event, data } of events(response)) {
        clearTimeout(watchdog);
        watchdog = setTimeout(abort, SILENCE);
        if (data === null) continue;
        const content = JSON.parse(data);
        if (event === "history") this.#history(content);
        else if (event === "figures") {
          onfigures();
          this.#figures(content);
          if (this.state !== "live") this.#is("live");
        }
      }
    } finally {
      clearTimeout(watchdog);
      signal.removeEventListener("abort", abort);
    }
  }

  #history({ interval, points }) {
    this.interval = interval;
    this.coarse = points.map((point) => ({ ...point, at: seconds(point.time) }));
    this.fine = this.fine.filter((point) => point.at > Date.now() / 1000 - FINE);
    this.dispatchEvent(new Event("history"));
  }

  #figures(figures) {
    const point = { ...figures, at: seconds(figures.time) };
    this.latest = point;
    this.fine.push(point);
    if (this.fine.length > FINE) this.fine.shift();
    const last = this.coarse.at(-1);
    if (last?.of && point.at - last.at < this.interval) {
      last.of.push(point);
      Object.assign(last, mean(last.of), { at: last.at });
    } else {
      this.coarse.push({ ...point, of: [point] });
      if (last) delete last.of;
    }
    while (this.coarse.length && this.coarse[0].at < point.at - HOUR - this.interval) this.coarse.shift();
    this.dispatchEvent(new Event("figures"));
  }

  // Points of the last `span` seconds, fine where there are fine ones and the span is short enough to show them.
  points(span) {
    const now = this.latest?.at ?? Date.now() / 1000;
    if (span > FINE) return this.coarse.filter((point) => point.at >= now - span);
    const first = this.fine[0]?.at ?? Infinity;
    return [...this.coarse.filter((point) => point.at < first), ...this.fine].filter((point) => point.at >= now - span);
  }
}

const seconds = (time) => new Date(time).getTime() / 1000;

// The mean of points; what is null in some (a percentile when nothing came) is the mean of the others.
function mean(points) {
  const average = (pick) => {
    const values = points.map(pick).filter((value) => value !== null && value !== undefined);
    return values.length ? values.reduce((a, b) => a + b, 0) / values.length : null;
  };
  const out = { ...points.at(-1) };
  for (const name of ["requests_per_second", "output_tokens_per_second", "prompt_tokens_per_second", "errors_per_second", "open_requests", "loop_lag_ms"]) {
    out[name] = average((p) => p[name]);
  }
  for (const name of ["ttft_ms", "itl_ms"]) {
    out[name] = { p50: average((p) => p[name]?.p50), p95: average((p) => p[name]?.p95) };
  }
  return out;
}

export const live = new Live();
addEventListener("online", () => live.retryNow());
document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && live.retryNow());
