// The tab of ComfyUI's workflows: what a file means here, its fields as a form, drawn, and kept as an endpoint.

import { ApiError } from "./app.js";
import { ask, element, field } from "./dom.js";
import { address, bytes } from "./picture.js";

const STATES = { read: "read", refused: "refused", waits: "waits for one that is refused", unused: "not used" };
const VERDICTS = { runs: "It runs.", "runs in part": "A part of it runs.", refused: "It cannot run here." };
const NAME = /^[a-z0-9][a-z0-9_-]{0,63}$/;
const SHOWN = 300; // nodes that are listed
const PREVIEWS = 3;

export async function mount(section, app) {
  const tab = new Workflows(section, app);
  app.on("drop", file => tab.open(file));
  app.on("key", () => tab.list());
  await tab.list();
}

class Workflows {
  constructor(section, app) {
    Object.assign(this, { section, app });
    const input = element("input", { type: "file", name: "file", id: "workflow-file", accept: ".json,application/json,image/png,image/webp,image/jpeg", onchange: () => {
      const [file] = input.files;
      input.value = "";
      if (file) this.open(file);
    } });
    this.kept = element("div", {});
    this.editor = element("p", {});
    this.shelf = element("div", { class: "card" }, element("h2", {}, "Workflows"),
      field("Open a ComfyUI workflow", input, "JSON as ComfyUI saves it, in either format, or a picture that carries one. Nothing is run before you say so."),
      this.editor, element("h3", {}, "Kept on this worker"), this.kept);
    this.desk = element("div", { class: "desk" });
    section.append(element("div", { class: "bench" }, this.shelf, this.desk));
  }

  /** The workflows that are kept, and the way to ComfyUI's editor where that is. */
  async list() {
    try {
      const [{ workflows }, features] = await Promise.all([this.app.api.get("workflows"), this.app.api.get("features")]);
      this.most = features.max_upload_size;
      this.editor.replaceChildren(...(features.editor ? [element("a", { href: `${this.app.root}comfy/` }, "Open ComfyUI's own editor")] : []));
      this.kept.replaceChildren(workflows.length ? element("ul", { class: "plain" }, workflows.map(one => this.row(one)))
        : element("p", { class: "hint" }, "None yet. Open one, and keep it under a name: it becomes an endpoint of this worker."));
    } catch (error) {
      this.app.fail(error, this.shelf);
    }
  }

  row(one) {
    const hint = one.drawable ? Object.keys(one.fields).join(", ") : one.why;
    return element("li", { class: "row" },
      element("span", { class: "grow" }, element("b", {}, one.name), element("span", { class: "hint" }, ` ${hint}`)),
      element("button", { type: "button", disabled: !one.drawable, "aria-label": `Use ${one.name}`, onclick: () => this.use(one) }, "Use"),
      !one.fixed && element("button", { type: "button", class: "quiet", "aria-label": `Delete ${one.name}`, onclick: () => this.remove(one.name) }, "Delete"));
  }

  async remove(name) {
    if (!await ask(`Delete ${name}?`, element("p", {}, "Whoever calls it is refused from then on."), "Delete")) return;
    try {
      await this.app.api.send("DELETE", `workflows/${name}`);
      this.app.say(`${name} is deleted.`);
      if (this.used === name) this.desk.replaceChildren();
    } catch (error) {
      this.app.fail(error, this.shelf);
    }
    await this.list();
  }

  /** A kept one: its fields, with the graph's own values in them. */
  use(one) {
    this.stop();
    this.used = one.name;
    const values = Object.fromEntries(Object.entries(one.fields).map(([name, schema]) => [name, schema.default]));
    this.desk.replaceChildren(element("h2", {}, one.name), element("p", { class: "note" }, "Call it with ",
      element("code", {}, `POST ${new URL(`workflows/${one.name}`, this.app.root).pathname}`), `, or with OpenAI's client as the model workflow/${one.name}.`),
      ...this.form(one, values, `workflows/${one.name}`, {}, one.outputs.length));
    this.focus();
  }

  /** A file: what it means, before anything is drawn. */
  async open(file) {
    this.stop();
    this.used = null;
    this.app.clear(this.section);
    this.desk.replaceChildren(element("p", { class: "hint" }, `Reading ${file.name}.`));
    try {
      if (this.most && file.size > this.most) throw new ApiError(`${file.name} is larger than the ${this.most / 1e6} MB that this worker reads. Take the workflow's JSON.`);
      const type = /^image\/(png|webp|jpeg)$/.test(file.type) ? file.type : "application/json";
      const report = await this.app.api.send("POST", "explain", new Blob([file], { type }));
      this.report(file, report);
      this.focus();
      this.app.say(VERDICTS[report.verdict]);
    } catch (error) {
      this.desk.replaceChildren();
      this.app.fail(error, this.desk);
    }
  }

  focus() {
    const head = this.desk.querySelector("h2");
    head.tabIndex = -1;
    head.focus();
  }

  report(file, report) {
    const list = (title, lines) => lines.length ? [element("h3", {}, title), element("ul", {}, lines.map(line => element("li", {}, line)))] : [];
    const words = report.pictures.flatMap(({ passes, changes }) => [...passes.map(({ words }) => words),
      ...(changes ? [`Then it is changed ${changes} times, such as in size.`] : [])]);
    const count = report.pictures.reduce((sum, one) => sum + one.outputs.length, 0), refused = report.verdict === "refused";
    const ahead = report.missing.filter(text => !report.files.some(({ folder, served_by }) => folder === "input" && served_by === text)); // its images are fields
    const runs = !refused && !ahead.length;
    this.desk.replaceChildren(
      element("h2", {}, file.name),
      element("p", { class: `verdict ${runs ? "good" : "error"}` }, runs || refused ? VERDICTS[report.verdict] : "It would run, but not now."),
      ...list(refused ? "Why not" : "What is left out", report.why),
      ...(refused ? [] : list("What has to be done before", ahead)),
      ...(runs ? this.form(report, report.values, "workflows", { workflow: report.graph }, count) : []),
      ...(refused ? [] : [this.keep(file)]),
      element("details", { class: "card" }, element("summary", {}, "What it means here"),
        ...list("Pictures", words), ...list("Takes", this.takes(report)), ...list("Files", report.files.map(({ name, state, served_by }) => `${name}: ${state}${served_by ? `, ${served_by}` : ""}`)),
        ...list("Notes", report.notes)),
      this.nodes(report));
  }

  takes({ model, memory, time }) {
    const seconds = time?.pictures_s == null ? [] : [`${time.pictures_s.toFixed(1)} s${time.dollars == null ? "" : `, $${time.dollars.toPrecision(2)}`} (${time.rests_on})`];
    return [`The model ${model.id}: ${model.because}`, `${model.license}: ${model.obligation}`,
      ...(memory ? [`Memory: ${memory.arithmetic}`, memory.warning] : []), ...seconds].filter(Boolean);
  }

  /** Node by node, what cannot be first. */
  nodes({ nodes }) {
    const order = Object.keys(STATES), rank = ({ state }) => [1, 2, 0, 3].indexOf(order.indexOf(state));
    const bad = nodes.filter(({ state }) => state === "refused").length;
    const sorted = [...nodes].sort((one, other) => rank(one) - rank(other));
    return element("details", { class: "card", open: bad > 0 },
      element("summary", {}, `${nodes.length} node${nodes.length > 1 ? "s" : ""}${bad ? `, ${bad} refused` : ""}`),
      element("ol", { class: "plain nodes" }, sorted.slice(0, SHOWN).map(node => element("li", { class: node.state },
        element("div", { class: "row" }, element("b", {}, node.title && node.title !== node.kind ? `${node.title} (${node.kind})` : node.kind),
          element("span", { class: "chip" }, STATES[node.state]), element("span", { class: "hint" }, `Node ${node.id}`)),
        element("p", {}, node.meaning),
        node.faults.map(text => element("p", { class: "error" }, text)), node.notes.map(text => element("p", { class: "note" }, text))))),
      nodes.length > SHOWN && element("p", { class: "hint" }, `And ${nodes.length - SHOWN} more.`));
  }

  /** The fields as a form, and where its pictures appear. `more` is sent with them. */
  form({ fields, required }, values, path, more, outputs) {
    const controls = Object.entries(fields).map(([name, schema]) => [name, schema, control(name, schema, values[name], required.includes(name))]);
    const button = element("button", { class: "primary" }, "Run");
    const cancel = element("button", { type: "button", hidden: true, onclick: () => this.stop() }, "Cancel");
    const bar = element("progress", { hidden: true, max: 1, "aria-label": "Progress" });
    const state = element("p", { class: "hint" }), stage = element("div", { class: "pictures" });
    const form = element("form", { class: "card fields", novalidate: true, onsubmit: event => { event.preventDefault(); run(); } },
      element("h3", {}, "Its fields"), element("div", { class: "columns" }, controls.map(([name, schema, made]) => field(label(name), made, schema.description || ""))),
      controls.length ? null : element("p", { class: "hint" }, "It has none: it draws what it says."),
      element("div", { class: "row" }, button, cancel, state), bar);

    const run = async () => {
      if (this.doing) return;
      this.app.clear(form);
      const mine = (this.doing = new AbortController());
      const busy = on => { cancel.hidden = bar.hidden = !on; button.setAttribute("aria-disabled", String(on)); button.textContent = on ? "Running…" : "Run"; };
      busy(true);
      bar.removeAttribute("value");
      state.textContent = "Sent.";
      try {
        const given = {};
        for (const [name, schema, made] of controls) given[name] = await value(schema, made);
        const several = outputs !== 1 || (given.n || 1) > 1;
        const body = { ...more, ...given, stream: true, progress: true, partial_images: several ? 0 : PREVIEWS };
        for await (const { data } of this.app.api.events(path, body, { signal: mine.signal })) {
          if (data.steps) [bar.value, state.textContent] = [data.steps / data.of, `Step ${data.steps} of ${data.of}`];
          else if (data.images) this.show(stage, state, data);
          else stage.replaceChildren(element("img", { class: "forming", alt: "The picture as it forms", src: `data:image/${data.output_format};base64,${data.b64_json}` }));
        }
      } catch (error) {
        state.textContent = error.name === "AbortError" ? "Cancelled." : "";
        stage.querySelector(".forming")?.remove();
        if (error.name === "AbortError") this.app.say("Cancelled.");
        this.app.fail(error, form);
      } finally {
        if (this.doing === mine) this.doing = null;
        busy(false);
      }
    };
    return [form, stage];
  }

  stop() { this.doing?.abort(); }

  show(stage, state, { images, notes, inference_ms }) {
    state.textContent = `Done after ${(inference_ms / 1000).toFixed(1)} s.`;
    this.app.say(state.textContent);
    stage.replaceChildren(...images.map(one => {
      const blob = bytes(one.b64_json, `image/${one.format}`), href = URL.createObjectURL(blob), name = `workflow-${one.seed}.${one.format}`;
      return element("figure", {}, element("img", { src: href, width: one.width, height: one.height, alt: one.parameters.prompt || "A picture without a prompt" }),
        element("figcaption", { class: "row" }, element("span", { class: "hint grow" }, `${one.title || `Node ${one.node}`}, seed ${one.seed}`),
          element("a", { class: "button", href, download: name }, "Download"),
          element("button", { type: "button", onclick: () => this.app.edit(blob, name) }, "Edit")));
    }), ...(notes || []).map(text => element("p", { class: "note" }, text)));
  }

  /** Keep the file under a name. */
  keep(file) {
    const name = element("input", { name: "workflow", id: "workflow-name", autocomplete: "off", spellcheck: "false", value: slug(file.name) });
    const form = element("form", { class: "card", novalidate: true, onsubmit: async event => {
      event.preventDefault();
      this.app.clear(form);
      try {
        if (!NAME.test(name.value)) throw new ApiError("A name has 1 to 64 small letters, digits, - and _, and begins with a letter or a digit.", { param: "workflow" });
        const type = /^image\//.test(file.type) ? file.type : "application/json";
        const kept = await this.app.api.send("PUT", `workflows/${encodeURIComponent(name.value)}`, new Blob([file], { type }));
        await this.list();
        said.textContent = `It is kept as ${kept.name}, ${kept.shared ? "for all workers of this volume" : "for as long as this worker runs"}.`;
        this.app.say(said.textContent);
      } catch (error) {
        said.textContent = "";
        this.app.fail(error, form);
      }
    } }, field("Keep it as an endpoint", name, "A name that is taken gets this workflow, as a new version.", [element("button", {}, "Keep")]));
    const said = element("p", { class: "hint" });
    form.append(said);
    return form;
  }
}

const label = name => name === "n" ? "How many" : name[0].toUpperCase() + name.slice(1).replaceAll("_", " ");
const slug = name => name.toLowerCase().replace(/\.\w+$/, "").replace(/[^a-z0-9_-]+/g, "-").replace(/^[-_]+|-+$/g, "").slice(0, 64) || "workflow";

/** What one field is typed into, with the value that it has. */
function control(name, { type, format, enum: choices, minimum, maximum }, value, required) {
  const same = { name, id: `workflow-field-${name}`, "aria-required": required && "true" };
  if (format === "picture") return element("input", { ...same, type: "file", accept: "image/*" });
  if (choices) return element("select", { ...same }, choices.map(each => element("option", { value: each, selected: each === value }, each)));
  if (type === "boolean") return element("input", { ...same, type: "checkbox", checked: Boolean(value) });
  if (type === "string") return element("textarea", { ...same, rows: name.includes("prompt") ? 3 : 1, value: value ?? "" });
  const known = type === "number" || Number.isSafeInteger(value); // a longer number would lose its last digits
  return element("input", { ...same, type: "number", min: minimum, max: maximum, step: type === "integer" ? 1 : "any", placeholder: name === "seed" ? "random" : null, value: known ? value : "" });
}

/** What the request says of a field; undefined, and so nothing, of one that is empty. */
async function value({ type, format }, made) {
  if (format === "picture") return made.files[0] ? address(made.files[0]) : undefined;
  if (type === "boolean") return made.checked;
  if (type === "string") return made.value;
  return made.value === "" ? undefined : Number(made.value);
}
