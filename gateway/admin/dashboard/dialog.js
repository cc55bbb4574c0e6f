// Dialogs: native ones, so focus is held, Escape closes, and what had the focus gets it back.

import { button, ErrorLine, freshId, h, icon } from "./dom.js";

// Shows a dialog. `build(close)` gives its content and buttons: {content, actions}. Resolves when it is closed.
export function open(title, build, { wide = false, dismissable = true } = {}) {
  return new Promise((resolve) => {
    const id = freshId("dialog");
    const dialog = h("dialog", { "aria-labelledby": id, class: wide ? "wide" : "", "data-dismissable": dismissable });
    let result;
    const close = (value) => {
      result = value;
      dialog.close();
    };
    const { content, actions } = build(close, dialog);
    dialog.append(
      h(
        "header",
        {},
        h("h2", { id }, title),
        dismissable && h("button", { type: "button", class: "icon-button", "aria-label": "Close", onclick: () => close() }, icon("close")),
      ),
      h("div", { class: "dialog-body" }, content),
    );
    if (actions?.length) dialog.append(h("footer", {}, actions));
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(result);
    });
    dialog.addEventListener("cancel", (event) => dismissable || event.preventDefault());
    if (dismissable) dialog.addEventListener("mousedown", (event) => event.target === dialog && close());
    document.body.append(dialog);
    dialog.showModal();
    dialog.querySelector("[autofocus]")?.focus();
  });
}

// What is open belongs to the view that is left; a key that is shown once stays.
export function closeAll({ even = false } = {}) {
  for (const dialog of document.querySelectorAll(even ? "dialog" : "dialog[data-dismissable]")) dialog.close();
}

// Asks before something that others will notice. `act` does it; its error is shown in the dialog, which stays.
export function confirm(title, paragraphs, verb, act, { danger = false, extra = null } = {}) {
  return open(title, (close) => {
    const error = new ErrorLine();
    const go = button(verb, run, { kind: danger ? "danger" : "primary" });
    async function run() {
      go.disabled = true;
      error.clear();
      try {
        const answer = await act();
        close(answer ?? true);
      } catch (problem) {
        error.show(problem);
      }
      go.disabled = false;
    }
    return {
      content: [paragraphs.map((text) => h("p", {}, text)), extra, error.element],
      actions: [button("Cancel", () => close(), { autofocus: true }), go],
    };
  });
}

// A form in a dialog. `act` gets nothing and throws what the API says; a faulty field is marked by the error's `param`.
export function form(title, fields, verb, act, options = {}) {
  return open(
    title,
    (close) => {
      const error = new ErrorLine();
      const go = h("button", { type: "submit", class: "button primary", form: "dialog-form" }, verb);
      const element = h("form", { id: "dialog-form", novalidate: true, onsubmit: run }, fields, error.element);
      async function run(event) {
        event.preventDefault();
        const wrong = element.querySelector("input:invalid, select:invalid");
        if (wrong) {
          wrong.focus();
          error.show(new Error(`${labelOf(wrong)}: ${wrong.validationMessage}`));
          return;
        }
        go.disabled = true;
        error.clear();
        element.querySelectorAll("[aria-invalid]").forEach((faulty) => faulty.removeAttribute("aria-invalid"));
        try {
          close(await act());
        } catch (problem) {
          error.show(problem);
          const place = problem.param && element.querySelector(`[data-param="${CSS.escape(String(problem.param).split(/[.[]/)[0])}"], [data-param="${CSS.escape(problem.param)}"]`);
          if (place) {
            place.setAttribute("aria-invalid", "true");
            place.focus();
          }
        }
        go.disabled = false;
      }
      return { content: element, actions: [button("Cancel", () => close()), go] };
    },
    options,
  );
}

const labelOf = (control) => control.labels?.[0]?.textContent ?? "This field";
