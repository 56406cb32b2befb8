// The tab that tells the truth about the worker: what it runs and what was measured of that, how it started, how it is.

import { PHASES, seconds } from "./banner.js";
import { element, hint, note, para, wrong } from "./dom.js";

const STATES = {
  starting: "starting", ready: "ready to draw", draining: "stopping; it draws what it has accepted", stopped: "stopped",
  failed: "failed", away: "it does not answer; these figures are old",
};
const gigabytes = bytes => `${(bytes / 1e9).toFixed(1)} GB`;
const percent = part => `${Math.round(part * 100)} %`;
const dollars = value => `$${value < 1 ? value.toFixed(4) : value.toFixed(2)}`;

let look = () => {};
export const shown = () => look();

export function mount(section, app) {
  look = () => app.emit("look");
  const [runs, chips] = card("What it runs");
  const [start, ledger] = card("How it started");
  const [now, figures] = card("Right now");
  section.append(element("h1", { class: "unseen" }, "The worker"), runs, now, start);
  let receipt = "";

  app.on("status", status => {
    if (section.hidden) return;
    ledger.replaceChildren(...started(status));
    figures.replaceChildren(...current(status));
    const made = `${status.status} ${status.cold_start?.device}`;
    if (made !== receipt && status.status !== "away") measured(receipt = made);
  });

  app.on("barred", why => figures.replaceChildren(why));

  async function measured() {
    try {
      const [model, found] = await Promise.all([app.model(), app.api.get("v1/receipt")]);
      chips.replaceChildren(...described(model, found));
    } catch (error) {
      receipt = "";
      app.fail(error, chips);
    }
  }
}

function card(title) {
  const body = element("div");
  return [element("div", { class: "card" }, element("h2", {}, title), body), body];
}

function described(model, { chips, reason, how, compile_failure }) {
  const { name, commercial, obligation } = model.license;
  return [
    para(element("strong", {}, model.model), `, under the ${name}. `, commercial ? obligation : element("strong", {}, obligation)),
    tips(chips),
    reason && hint(reason),
    compile_failure && wrong(`It should have been compiled and is not: ${compile_failure}`),
    how && note(how.includes(" -m ") ? ["Nobody has measured this model here yet. This does: ", element("code", {}, how)] : how),
  ].filter(Boolean);
}

function tips(chips) {
  const list = element("ul", { class: "chips row", "aria-label": "Settings, each with what was measured" }, chips.map(({ label, value, measured }, i) =>
    element("li", {},
      element("button", { type: "button", class: "chip", "aria-describedby": `tip-${i}` }, element("span", { class: "unseen" }, `${label}: `), value),
      element("span", { class: "tip", role: "tooltip", id: `tip-${i}` }, `${label}: ${measured}`))));
  const hush = event => { if (event.key === "Escape") list.classList.add("quietly"); };
  list.addEventListener("keydown", hush);
  for (const name of ["focusin", "pointerover"]) list.addEventListener(name, () => list.classList.remove("quietly"));
  return list;
}

function started({ status, reason, elapsed_s, cold_start: ledger }) {
  if (!ledger) return [];
  const { phases, phase, budget_s, outcome } = ledger;
  const done = phases.reduce((sum, each) => Math.max(sum, each.start_s + each.seconds), 0);
  const unfinished = outcome !== "ready" && !phases.some(({ name }) => name === phase);
  const birth = phases[0] ? [{ name: "start", seconds: phases[0].start_s }] : [];
  const rows = [...birth, ...phases, ...(unfinished ? [{ name: phase, seconds: Math.max(0, elapsed_s - done), going: outcome === "starting" }] : [])];
  const bar = element("div", { class: "bar", role: "img", "aria-label": `${seconds(elapsed_s)} of the ${budget_s} s that a start may take` });
  const list = element("dl", { class: "figures" });
  rows.forEach(({ name, seconds: took, going }, i) => {
    const [part, swatch] = [element("i", { class: going && "going" }), element("i", { class: "swatch" })];
    for (const each of [part, swatch]) each.style.setProperty("--hue", `hsl(${17 + 137 * i} 75% 40%)`);
    part.style.width = `${100 * took / budget_s}%`;
    bar.append(part);
    list.append(element("dt", {}, swatch, PHASES[name] || name), element("dd", { class: "number" }, `${seconds(took)}${going ? " so far" : ""}`));
  });
  const verdict = { ready: `Ready after ${seconds(elapsed_s)}`, starting: `${seconds(elapsed_s)} so far`, failed: `Failed after ${seconds(elapsed_s)}` };
  return [
    para(`${verdict[outcome] || `Stopped after ${seconds(elapsed_s)}`}, of ${budget_s} s that a start may take.`),
    bar, list,
    status === "failed" && wrong(reason),
    ...[["Plan", ledger.plan && `${ledger.plan}: ${ledger.plan_reason}`], ["Memory", ledger.memory], ["Attention", ledger.attention]]
      .map(([name, text]) => text && hint(element("strong", {}, `${name}: `), text)),
  ].filter(Boolean);
}

function current({ status, drawing, waiting, queue, spend, machine = {}, cold_start }) {
  const share = (used, total, text) => [element("meter", { min: 0, max: total, value: used, "aria-label": text }), text];
  const rows = {
    State: STATES[status],
    Device: cold_start?.device || "not known yet",
    Drawing: `${drawing} request${drawing === 1 ? "" : "s"}`, Waiting: queue && share(waiting, queue, `${waiting} of at most ${queue} requests`),
    "GPU memory": machine.gpu_total && share(machine.gpu_used, machine.gpu_total, `${gigabytes(machine.gpu_used)} of ${gigabytes(machine.gpu_total)}`),
    "Most GPU memory used": machine.gpu_peak && gigabytes(machine.gpu_peak),
    "GPU busy": machine.gpu_utilization != null && percent(machine.gpu_utilization),
    "GPU temperature": machine.gpu_temperature && `${machine.gpu_temperature} °C`,
    "Most memory used": machine.host_peak && share(machine.host_peak, machine.host_total, `${gigabytes(machine.host_peak)} of ${gigabytes(machine.host_total)}`),
    "Cost of this worker": spend?.dollars_this_process != null && dollars(spend.dollars_this_process),
    "Cost this month": spend?.dollars_this_month != null && (spend.cap ? share : (_, __, text) => text)(spend.dollars_this_month, spend.cap, dollars(spend.dollars_this_month)),
    "Monthly cap": spend?.cap != null && dollars(spend.cap),
  };
  const list = element("dl", { class: "figures" }, Object.entries(rows).filter(([, said]) => said || said === 0)
    .flatMap(([name, said]) => [element("dt", {}, name), element("dd", {}, said)]));
  return [list, spend && element("p", { class: spend.verdict.outcome === "OK" ? "hint" : "error" }, `Spend: ${spend.verdict.reason}; ${spend.price.reason}.`)].filter(Boolean);
}
