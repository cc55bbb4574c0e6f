// Asks again and again while a view is open and the page can be seen; one question at a time.

import { live } from "./live.js";

export class Poll {
  #timer = null;
  #controller = new AbortController();
  #busy = false;
  #again = false;

  // `ask(signal)` does the asking and shows the answer; what it throws goes to `onerror`, a success to `onsuccess`.
  constructor(ask, interval, error) {
    this.ask = ask;
    this.interval = interval; // ms
    this.error = error; // an ErrorLine
    this.visible = () => document.visibilityState === "visible" && this.now();
    document.addEventListener("visibilitychange", this.visible);
    void this.now();
  }

  async now() {
    if (this.#busy) {
      this.#again = true;
      return;
    }
    clearTimeout(this.#timer);
    this.#busy = true;
    const began = performance.now();
    try {
      await this.ask(this.#controller.signal);
      this.error?.clear();
    } catch (problem) {
      // That the gateway is gone is said at the top of the page, once for all that asks.
      const told = problem.status === 0 && live.state !== "live";
      if (problem.name !== "AbortError" && !told) this.error?.show(problem);
    }
    this.#busy = false;
    if (this.#controller.signal.aborted) return;
    if (this.#again) {
      this.#again = false;
      return this.now();
    }
    if (this.interval && document.visibilityState === "visible") {
      // An answer that takes long costs the gateway something: then it is asked for less often.
      const pause = Math.max(this.interval, 20 * (performance.now() - began));
      this.#timer = setTimeout(() => void this.now(), pause);
    }
  }

  stop() {
    this.#controller.abort();
    clearTimeout(this.#timer);
    document.removeEventListener("visibilitychange", this.visible);
  }
}
