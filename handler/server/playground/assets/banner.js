// What everybody should know whatever they do here: whether the worker can draw, and what the model's licence asks.

import { aside, element, para } from "./dom.js";

export const PHASES = {
  start: "starting Python",
  volume: "looking for the model's files",
  import: "loading the libraries",
  weights: "reading the model",
  attention: "choosing how attention is computed",
  artifacts: "looking for compiled code",
  compile: "compiling",
  warm: "drawing a first picture",
};
export const seconds = value => `${value.toFixed(1)} s`;

export function banner(host, app) {
  const state = element("div"), license = element("div");
  host.append(state, license);
  app.on("key", show);
  show();

  let before = "ready";
  app.on("status", status => {
    const made = STATES[status.status]?.(status);
    state.replaceChildren(...(made ? [made] : []));
    if (status.status === before) return;
    app.say(status.status === "ready" ? "The worker is ready." : made?.firstChild.textContent || "");
    before = status.status;
  });

  async function show() {
    const model = await app.model().catch(() => null); // whoever asks next says why
    if (!model) return license.replaceChildren();
    const { name, commercial, obligation } = model.license;
    const text = [element("strong", {}, `${model.model}: ${name}. `), obligation];
    license.replaceChildren(element("p", { class: commercial ? "terms" : "terms strict" }, text));
  }

  const told = (strict, ...children) => element("div", { class: strict ? "state strict" : "state" }, ...children);
  const STATES = {
    starting: ({ cold_start: { phase, budget_s }, elapsed_s }) => told(false,
      para(`The worker is starting: ${PHASES[phase] || phase}. What you send now waits until it is ready.`),
      element("p", { class: "row" },
        element("progress", { max: budget_s, value: elapsed_s, "aria-label": "Of the time that a start may take" }),
        aside(`${seconds(elapsed_s)} of ${budget_s} s at most`))),
    failed: ({ reason }) => told(true, para(`The worker has failed: ${reason}`)),
    draining: () => told(false, para("The worker is stopping: it draws what it has accepted, and nothing new.")),
    stopped: () => told(true, para("The worker has stopped.")),
    away: ({ reason, before }) => told(true, para(reason), before && para(`Its last word was: ${before}`)),
  };
}
