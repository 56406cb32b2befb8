// The tab of ComfyUI's workflows: what a file means here, its fields as a form, drawn, and kept as an endpoint.

import { ApiError } from "./app.js";
import { ask, bench, button, element, field, hint, note, para, row, wrong } from "./dom.js";
import { address, bytes } from "./picture.js";

const STATES = { refused: "refused", waits: "waits for one that is refused", read: "read", unused: "not used" }; // what is bad first
const VERDICTS = { runs: "It runs.", "runs in part": "A part of it runs.", refused: "It cannot run here." };
const NAME = /^[a-z0-9][a-z0-9_-]{0,63}$/;
const MOST_NODES = 300; // that are listed

const small = text => element("span", { class: "hint grow" }, text);
const list = (title, lines) => lines.length ? [element("h3", {}, title), element("ul", {}, lines.map(line => element("li", {}, line)))] : [];
const body = file => new Blob([file], { type: /^image\/(png|webp|jpeg)$/.test(file.type) ? file.type : "application/json" });

export async function mount(section, app) {
  const tab = new Workflows(section, app);
  app.on("drop", file => tab.open(file));
  app.on("key", () => tab.list());
  await tab.list();
}

class Workflows {
  constructor(section, app) {
    Object.assign(this, { section, app, kept: element("div"), editor: element("p"), desk: element("div", { class: "desk" }), urls: [] });
    const input = element("input", { type: "file", name: "file", id: "workflow-file", accept: ".json,image/png,image/webp,image/jpeg", onchange: () => {
      const [file] = input.files;
      input.value = "";
      if (file) this.open(file);
    } });
    this.shelf = element("div", { class: "card" }, element("h1", {}, "Workflows"),
      field("Open a ComfyUI workflow", input, "JSON, or a picture that carries one. Nothing runs before you say so."),
      this.editor, element("h2", {}, "Kept here"), this.kept);
    section.append(bench(this.shelf, this.desk));
  }

  async list() {
    try {
      const [{ workflows }, { editor, max_upload_size }] = await Promise.all([this.app.api.get("workflows"), this.app.api.get("features")]);
      this.app.clear(this.shelf);
      this.most = max_upload_size;
      this.editor.replaceChildren(editor ? element("a", { href: `${this.app.root}comfy/` }, "Open ComfyUI's own editor") : "");
      this.kept.replaceChildren(workflows.length ? element("ul", { class: "plain" }, workflows.map(one => this.row(one)))
        : hint("None yet. Open one, and keep it under a name: it becomes an endpoint of this worker."));
    } catch (error) {
      this.app.fail(error, this.shelf);
    }
  }

  row(one) {
    return element("li", { class: "row" }, element("b", {}, one.name), small(one.drawable ? Object.keys(one.fields).join(", ") : one.why),
    button("Use", () => this.use(one), { disabled: !one.drawable, "aria-label": `Use ${one.name}` }),
    !one.fixed && button("Delete", () => this.remove(one.name), { class: "quiet", "aria-label": `Delete ${one.name}` }));
  }

  async remove(name) {
    if (!await ask(`Delete ${name}?`, para("Whoever calls it is refused from then on."), "Delete")) return;
    try {
      await this.app.api.send("DELETE", `workflows/${name}`);
      this.app.say(`${name} is deleted.`);
    } catch (error) {
      this.app.fail(error, this.shelf);
    }
    await this.list();
  }

  use(one) {
    const values = Object.fromEntries(Object.entries(one.fields).map(([name, schema]) => [name, schema.default]));
    const path = `workflows/${one.name}`;
    this.opened = one;
    this.put(one.name, note(`Call it with POST ${new URL(path, this.app.root).pathname}, or with OpenAI's client as the model workflow/${one.name}.`),
      this.form(one, values, path, {}));
  }

  async open(file) {
    this.put(file.name, hint("Reading it."));
    this.opened = file;
    try {
      if (this.most && file.size > this.most) throw new ApiError(`${file.name} is larger than the ${this.most / 1e6} MB that this worker reads.`);
      const report = await this.app.api.send("POST", "explain", body(file));
      if (this.opened === file) this.report(file, report);
    } catch (error) {
      if (this.opened !== file) return;
      this.desk.replaceChildren();
      this.app.fail(error, this.desk);
    }
  }

  put(title, ...parts) {
    this.doing?.abort();
    this.release();
    this.app.clear(this.section);
    const head = element("h2", { tabindex: -1 }, title);
    this.desk.replaceChildren(head, ...parts.flat(2));
    head.focus();
  }

  report(file, report) {
    const { verdict, why, missing, pictures, files, notes, model, memory, time } = report, refused = verdict === "refused";
    const ahead = missing.filter(text => !files.some(({ folder, served_by }) => folder === "input" && served_by === text)); // its images are fields
    const runs = !refused && !ahead.length, said = runs || refused ? VERDICTS[verdict] : "It would run, but not now.";
    const takes = [`The model ${model.id}: ${model.because}`, `${model.license}: ${model.obligation}`, memory && `Memory: ${memory.arithmetic}`, memory?.warning,
      time?.pictures_s != null && `${time.pictures_s.toFixed(1)} s${time.dollars == null ? "" : `, $${time.dollars.toPrecision(2)}`} (${time.rests_on})`];
    this.put(file.name, element("p", { class: `verdict ${runs ? "good" : "error"}` }, said),
      list(refused ? "Why not" : "What is left out", why), list("What has to be done before", refused ? [] : ahead),
      runs ? this.form(report, report.values, "workflows", { workflow: report.graph }) : [],
      refused ? [] : this.keep(file),
      element("details", { class: "card" }, element("summary", {}, "What it means here"),
        list("Pictures", pictures.flatMap(({ passes }) => passes.map(({ words }) => words))), list("It takes", takes.filter(Boolean)),
        list("Files", files.map(({ name, state, served_by }) => `${name}: ${[state, served_by].filter(Boolean).join(", ")}`)), list("Notes", notes)),
      this.nodes(report.nodes));
    this.app.say(said);
  }

  nodes(nodes) {
    const order = Object.keys(STATES), bad = nodes.filter(({ state }) => state === "refused").length;
    const sorted = [...nodes].sort((one, other) => order.indexOf(one.state) - order.indexOf(other.state));
    return element("details", { class: "card", open: bad > 0 }, element("summary", {}, `Nodes: ${nodes.length}${bad ? `, ${bad} refused` : ""}`),
      element("ol", { class: "plain nodes" }, sorted.slice(0, MOST_NODES).map(({ id, kind, title, state, meaning, faults, notes }) => element("li", { class: state },
        row(element("b", {}, title && title !== kind ? `${title} (${kind})` : kind),
          element("span", { class: "chip" }, STATES[state]), small(`Node ${id}`)),
        para(meaning), faults.map(text => wrong(text)), notes.map(each => note(each))))),
      nodes.length > MOST_NODES && hint(`And ${nodes.length - MOST_NODES} more.`));
  }

  /** A form, and where its pictures appear. `more` is sent with its fields. */
  form({ fields, required }, values, path, more) {
    const controls = Object.entries(fields).map(([name, schema]) => [name, schema, control(name, schema, values[name], required.includes(name))]);
    const run = element("button", { class: "primary" }, "Run"), cancel = button("Cancel", () => this.doing.abort(), { hidden: true });
    const bar = element("progress", { hidden: true, max: 1, "aria-label": "Progress" }), state = hint(""), stage = element("div", { class: "pictures" });
    const busy = on => { if (document.activeElement === cancel) run.focus(); cancel.hidden = bar.hidden = !on; run.setAttribute("aria-disabled", on); run.textContent = on ? "Running…" : "Run"; };

    const begin = async event => {
      event.preventDefault();
      if (this.doing) return;
      this.app.clear(form);
      this.doing = new AbortController();
      busy(true);
      bar.removeAttribute("value");
      state.textContent = "Sent.";
      const before = [...stage.childNodes];
      try {
        this.app.check(form);
        const given = {};
        for (const [name, schema, made] of controls) given[name] = await value(schema, made);
        for await (const data of this.app.api.events(path, { ...more, ...given, stream: true, progress: true, partial_images: given.n > 1 ? 0 : 3 }, { signal: this.doing.signal })) {
          if (data.steps) [bar.value, state.textContent] = [data.steps / data.of, `Step ${data.steps} of ${data.of}`];
          else if (data.images) this.show(stage, state, data);
          else stage.replaceChildren(element("img", { class: "forming", alt: "The picture as it forms", src: `data:image/${data.output_format};base64,${data.b64_json}` }));
        }
      } catch (error) {
        state.textContent = error.name === "AbortError" ? "Cancelled." : "";
        this.app.say(state.textContent);
        stage.replaceChildren(...before);
        this.app.fail(error, form);
      } finally {
        this.doing = null;
        busy(false);
      }
    };
    const form = element("form", { class: "card fields", novalidate: true, onsubmit: begin }, element("h3", {}, "Its fields"),
      element("div", { class: "columns" }, controls.map(([name, schema, made]) => field(label(name), made, schema.description || ""))),
      row(run, cancel, state), bar);
    return [form, stage];
  }

  show(stage, state, { images, notes = [], inference_ms }) {
    this.release();
    state.textContent = `Done after ${(inference_ms / 1000).toFixed(1)} s.`;
    this.app.say(state.textContent);
    stage.replaceChildren(...images.map(one => {
      const blob = bytes(one.b64_json, `image/${one.format}`), href = this.urls[this.urls.push(URL.createObjectURL(blob)) - 1], download = `workflow-${one.seed}.${one.format}`;
      return element("figure", {}, element("img", { src: href, width: one.width, height: one.height, alt: one.parameters.prompt || "A picture without a prompt" }),
        element("figcaption", { class: "row" }, small(`${one.title || `Node ${one.node}`}, seed ${one.seed}`),
          element("a", { class: "button", href, download }, "Download"), button("Edit", () => this.app.edit(blob, download))));
    }), ...notes.map(each => note(each)));
  }

  release() { for (const url of this.urls.splice(0)) URL.revokeObjectURL(url); }

  keep(file) {
    const proposed = file.name.toLowerCase().replace(/\.\w+$/, "").replace(/[^a-z0-9_-]+/g, "-").replace(/^[-_]+|-+$/g, "").slice(0, 64);
    const name = element("input", { name: "workflow", id: "workflow-name", autocomplete: "off", spellcheck: "false", value: proposed }), said = hint("");
    const form = element("form", { class: "card", novalidate: true, onsubmit: async event => {
      event.preventDefault();
      this.app.clear(form);
      said.textContent = "";
      try {
        if (!NAME.test(name.value)) throw new ApiError("A name has 1 to 64 small letters, digits, - and _, a letter or digit first.", { param: "workflow" });
        const kept = await this.app.api.send("PUT", `workflows/${name.value}`, body(file));
        await this.list();
        said.textContent = `It is kept as ${kept.name}, ${kept.shared ? "for all workers of this volume" : "for as long as this worker runs"}.`;
        this.app.say(said.textContent);
      } catch (error) {
        this.app.fail(error, form);
      }
    } }, field("Keep it as an endpoint", name, "A name that is taken gets a new version.", [element("button", {}, "Keep")]), said);
    return form;
  }
}

const label = name => name === "n" ? "How many" : name[0].toUpperCase() + name.slice(1).replaceAll("_", " ");

function control(name, { type, format, enum: choices, minimum, maximum }, value, required) {
  const same = { name, id: `workflow-field-${name}`, "aria-required": required && "true" };
  if (format === "picture") return element("input", { ...same, type: "file", accept: "image/*" });
  if (choices) return element("select", same, choices.map(each => element("option", { value: each, selected: each === value }, each)));
  if (type === "boolean") return element("input", { ...same, type: "checkbox", checked: Boolean(value) });
  if (type === "string") return element("textarea", { ...same, rows: name.includes("prompt") ? 3 : 1, value: value ?? "" });
  const whole = type === "integer"; // a longer one than JavaScript's would lose its last digits
  return element("input", { ...same, type: "number", min: minimum, max: maximum, step: whole ? 1 : "any", value: !whole || Number.isSafeInteger(value) ? value ?? "" : "" });
}

/** What the request says of a field; undefined, and so nothing, of one that is empty. */
async function value({ type, format }, { value, checked, files }) {
  if (format === "picture") return files[0] && address(files[0]);
  if (type === "boolean") return checked;
  return type === "string" ? value : value === "" ? undefined : Number(value);
}
