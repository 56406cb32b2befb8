// The tab that says how a model is deployed: the command line's choices as a form, and what it prints.

import { element, field } from "./dom.js";

const NAMES = { modal: "Modal", runpod: "RunPod", fal: "fal", kubernetes: "Kubernetes", cloudrun: "Google Cloud Run", convox: "Convox", sky: "SkyPilot, on a cloud of yours", docker: "Docker, on a machine of yours" };
const FACTS = { memory: "Memory", cold_start: "Cold start", price: "Price", licence: "Licence" };
const HINTS = {
  platform: "Where the worker runs.",
  model: "What it draws with.",
  gpu: "The cheapest that holds the model is usually right.",
  precision: "How weights are kept. Fewer bits take less memory.",
  min: "Workers that always run, and are paid for. Empty: mostly none.",
  max: "Workers, so that the bill has an end.",
  region: "By the platform's name, such as us-east-1. Empty: anywhere.",
};
const option = (value, text = value) => element("option", { value }, text);

export async function mount(section, app) {
  const select = name => element("select", { name, id: `deploy-${name}` });
  const input = (name, more) => element("input", { name, id: `deploy-${name}`, autocomplete: "off", ...more });
  const count = { type: "number", step: 1, inputmode: "numeric" };
  const controls = { platform: select("platform"), model: select("model"), gpu: select("gpu"), precision: select("precision"),
    min: input("min", count), max: input("max", count), region: input("region") };
  const labels = { platform: "Platform", model: "Model", gpu: "GPU", precision: "Precision", min: "At least", max: "At most", region: "Region" };
  const fields = Object.entries(controls).map(([name, control]) => field(labels[name], control, HINTS[name]));
  const form = element("form", { class: "card", novalidate: true, onsubmit: event => event.preventDefault(), onchange: show },
    element("h2", {}, "Deploy"), element("p", { class: "hint" }, "Nothing is rented here: these are commands to run yourself."), fields);
  const result = element("div", { class: "result", "aria-live": "off" });
  section.append(element("div", { class: "deploying" }, form, result));

  const urls = [];
  let choices, asking;
  app.on("key", start);
  await start();

  async function start() {
    try {
      const [found, model] = await Promise.all([app.api.get("v1/deployments"), app.model()]);
      choices = found;
      controls.platform.replaceChildren(...found.platforms.map(({ id }) => option(id, NAMES[id] || id)));
      controls.model.replaceChildren(...found.models.map(({ id }) => option(id)));
      controls.model.value = model.model;
      controls.precision.replaceChildren(...found.precisions.map(({ id, meaning }) => option(id === "auto" ? "" : id, `${id}: ${meaning}`)));
      await show();
    } catch (error) {
      app.fail(error, form);
    }
  }

  /** What the platform has: its GPUs, and fields that mean nothing there, with the reason. */
  function adapt({ gpus, lacks, least }) {
    const kept = controls.gpu.value;
    controls.gpu.replaceChildren(option("", "The cheapest that holds it"), ...gpus.map(({ id, memory_gb, dollars_per_s }) =>
      option(id, `${id}, ${Math.round(memory_gb)} GB${dollars_per_s ? `, $${(dollars_per_s * 3600).toFixed(2)} an hour` : ""}`)));
    controls.gpu.value = gpus.some(({ id }) => id === kept) ? kept : "";
    controls.min.min = least;
    for (const [name, control] of Object.entries(controls)) {
      control.disabled = name in lacks;
      control.closest(".field").querySelector(".hint").textContent = name in lacks ? `Not here: ${lacks[name]}.` : HINTS[name];
    }
  }

  async function show() {
    const at = document.activeElement;
    asking?.abort();
    const mine = (asking = new AbortController());
    adapt(choices.platforms.find(({ id }) => id === controls.platform.value));
    const given = Object.entries(controls).filter(([name, { disabled, value }]) => name !== "platform" && !disabled && value);
    const query = new URLSearchParams(given.map(([name, { value }]) => [name, value]));
    try {
      const found = await app.api.get(`v1/deployments/${controls.platform.value}?${query}`, { signal: mine.signal });
      app.clear(form);
      result.replaceChildren(...told(found));
      app.say(`Commands for ${found.model} on ${NAMES[found.platform] || found.platform}.`);
    } catch (error) {
      if (error.name === "AbortError") return;
      result.replaceChildren();
      app.fail(error, form);
      if (form.contains(at)) at.focus();
    }
  }

  function told(found) {
    for (const url of urls.splice(0)) URL.revokeObjectURL(url);
    const facts = Object.entries(FACTS).map(([name, label]) => element("div", {}, element("dt", {}, label), element("dd", {}, found[name])));
    return [
      element("h2", {}, `${found.model} on ${NAMES[found.platform] || found.platform}`),
      element("dl", { class: "reckoning" }, element("div", {}, element("dt", {}, "GPU"), element("dd", {}, found.gpus.join(", "))), facts),
      found.note && element("p", { class: "note" }, found.note),
      text("Commands", found.commands.join("\n"), "deploy.sh", found.script),
      element("p", { class: "hint" }, "They run in a checkout of Kindling. Capitals and dots stand for what is yours."),
      Object.entries(found.files).map(([name, content]) => text(name, content, name, content)),
    ].flat().filter(Boolean);
  }

  /** A text to copy, or to download as a file. */
  function text(title, shown, name, file) {
    const pre = element("pre", { tabindex: 0, "aria-label": title }, shown);
    const href = URL.createObjectURL(new Blob([file], { type: "text/plain" }));
    urls.push(href);
    return element("section", { class: "text" },
      element("div", { class: "row" }, element("h3", {}, title), element("button", { type: "button", onclick: () => copy(pre) }, "Copy"),
        element("a", { class: "button", href, download: name }, "Download")), pre);
  }

  async function copy(pre) {
    try {
      await navigator.clipboard.writeText(pre.textContent);
      app.say("Copied.");
    } catch { // where the page is not served securely
      getSelection().selectAllChildren(pre);
      app.say("It is selected. Copy it with your keyboard.");
    }
  }
}
