// The tab that says how a model is deployed: the command line's choices as a form, and what it prints.

import { bench, button, copy, element, field, hint, pairs, row } from "./dom.js";

const PLATFORMS = { modal: "Modal", runpod: "RunPod", kubernetes: "Kubernetes", cloudrun: "Google Cloud Run", convox: "Convox", sky: "SkyPilot", docker: "Docker" };
const FIELDS = {
  platform: ["Platform", ""],
  model: ["Model", ""],
  gpu: ["GPU", "The cheapest that holds the model is mostly right."],
  precision: ["Precision", "How weights are kept. Fewer bits take less memory."],
  cuda: ["CUDA", "The image's build, such as cu130. Empty: one that runs there."],
  min: ["At least", "Workers that always run, and are paid for. Empty: mostly none."],
  max: ["At most", "Workers, so that the bill has an end."],
  region: ["Region", "By the platform's name, such as us-east-1. Empty: anywhere."],
};
const FACTS = { gpus: "GPU", memory: "Memory", cold_start: "Cold start", price: "Price", licence: "Licence" };
const option = (value, text = value) => element("option", { value }, text);
const called = platform => PLATFORMS[platform] || platform;

function control(name) {
  const same = { name, id: `deploy-${name}` };
  if (["platform", "model", "gpu", "precision"].includes(name)) return element("select", same);
  return element("input", { ...same, autocomplete: "off", ...(name[0] === "m" && { type: "number", step: 1 }) });
}

export async function mount(section, app) {
  const controls = Object.fromEntries(Object.keys(FIELDS).map(name => [name, control(name)]));
  const form = element("form", { class: "card choices", novalidate: true, onsubmit: event => event.preventDefault(), onchange: show },
    element("h1", {}, "Deploy"), hint("Nothing is rented here: these are commands to run yourself."),
    Object.entries(FIELDS).map(([name, [label, hint]]) => field(label, controls[name], hint)));
  const result = element("div"), urls = [];
  let choices, asking;
  section.append(bench(form, result));
  app.on("key", start);
  await start();

  async function start() {
    try {
      const [found, { model }] = await Promise.all([app.api.get("v1/deployments"), app.model()]);
      choices = found;
      controls.platform.replaceChildren(...found.platforms.map(({ id }) => option(id, called(id))));
      controls.model.replaceChildren(...found.models.map(({ id }) => option(id)));
      controls.model.value = model;
      controls.precision.replaceChildren(...found.precisions.map(({ id, meaning }) => option(id === "auto" ? "" : id, `${id}: ${meaning}`)));
      await show();
    } catch (error) {
      app.fail(error, form);
    }
  }

  function adapt({ gpus, lacks, least }) {
    const kept = controls.gpu.value;
    controls.gpu.replaceChildren(option("", "The cheapest that holds it"), ...gpus.map(({ id, memory_gb, dollars_per_s }) =>
      option(id, `${id}, ${Math.round(memory_gb)} GB${dollars_per_s ? `, $${(dollars_per_s * 3600).toFixed(2)} an hour` : ""}`)));
    controls.gpu.value = gpus.some(({ id }) => id === kept) ? kept : "";
    controls.min.min = least;
    for (const [name, each] of Object.entries(controls)) {
      each.disabled = name in lacks;
      each.closest(".field").querySelector(".hint").textContent = name in lacks ? `Not here: ${lacks[name]}.` : FIELDS[name][1];
    }
  }

  async function show() {
    if (!choices) return start();
    const at = document.activeElement, { platform, ...others } = controls;
    asking?.abort();
    asking = new AbortController();
    adapt(choices.platforms.find(({ id }) => id === platform.value));
    const query = new URLSearchParams(Object.entries(others).filter(([, { disabled, value }]) => !disabled && value).map(([name, { value }]) => [name, value]));
    try {
      app.check(form);
      const found = await app.api.get(`v1/deployments/${platform.value}?${query}`, { signal: asking.signal });
      app.clear(form);
      result.replaceChildren(...told(found));
      app.say(`Commands for ${found.model} on ${called(found.platform)}.`);
    } catch (error) {
      if (error.name === "AbortError") return;
      result.replaceChildren();
      app.fail(error, form);
      if (form.contains(at)) at.focus();
    }
  }

  function told(found) {
    for (const url of urls.splice(0)) URL.revokeObjectURL(url);
    const said = { ...found, gpus: found.gpus.join(", ") };
    return [
      element("h2", {}, `${found.model} on ${called(found.platform)}`),
      pairs("reckoning", Object.entries(FACTS).map(([name, label]) => [label, said[name]])),
      element("p", { class: "note", hidden: !found.note }, found.note),
      text("Commands", found.commands.join("\n"), "deploy.sh", found.script),
      hint("They run in a checkout of Kindling. Capitals and dots stand for what is yours."),
      ...Object.entries(found.files).map(([name, content]) => text(name, content, name, content)),
    ];
  }

  function text(title, shown, download, file) {
    const pre = element("pre", { tabindex: 0, "aria-label": title }, shown), href = URL.createObjectURL(new Blob([file]));
    urls.push(href);
    return element("section", { class: "text" }, row(element("h3", {}, title),
      button("Copy", () => copy(pre, app)), element("a", { class: "button", href, download }, "Download")), pre);
  }
}
