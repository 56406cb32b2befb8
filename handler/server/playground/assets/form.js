// The form's fields, which of them the served model honours, and what they say.

import { aside, button, element, field, hint } from "./dom.js";

const SHAPES = { Square: 1, Landscape: 4 / 3, Portrait: 3 / 4, Wide: 16 / 9, Tall: 9 / 16 };
const WORDS = { realtime: ["Realtime", "as fast as can be"], quality: ["Quality", "as good as can be"] };
const CARRIED = { sampling: "ComfyUI's sampling", reading: "ComfyUI's reading", step_cache: "Step cache", long_prompts: "Long prompts" };

const NUMBERS = ["width", "height", "num_inference_steps", "guidance_scale", "n"], TEXTS = ["scheduler", "output_format", "negative_prompt"];
const FILLED = ["prompt", "seed", ...NUMBERS, ...TEXTS]; // by what a file says

const number = (name, more) => element("input", { type: "number", name, inputmode: "decimal", step: "any", ...more });
const options = values => values.map(value => element("option", { value }, value));
const pair = (...fields) => element("div", { class: "pair" }, fields);

export class Form {
  constructor(submitted) {
    this.carried = {}; // what of a picture has no field here
    this.last = null; // the seed of the latest picture
    this.prompt = element("textarea", { name: "prompt", rows: 4, onkeydown: event => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.element.requestSubmit();
    } });
    this.modes = element("fieldset", { class: "modes", name: "quality" }, element("legend", {}, "Mode"));
    this.button = element("button", { class: "primary wide" }, "Make");
    this.notes = element("div", { class: "row" });
    this.edit = element("div");
    this.element = element("form", { class: "card ask", novalidate: true, onsubmit: event => { event.preventDefault(); submitted(); } },
      field("What should the picture show?", this.prompt, "Ctrl and Enter make it."),
      this.edit, this.modes, this.notes, this.button, this.advanced());
  }

  advanced() {
    this.shape = element("select", { name: "size", onchange: () => this.reshape() });
    this.seed = element("input", { name: "seed", inputmode: "numeric", placeholder: "random", autocomplete: "off", oninput: () => this.lock(this.seed.value !== "") });
    this.locked = button("Keep", () => this.lock(!this.keeps), { "aria-pressed": "false", title: "Keep this seed" });
    const dice = button("⚄", () => {
      this.seed.value = Math.floor(Math.random() * 2 ** 31);
      this.lock(true);
    }, { title: "A new random seed", "aria-label": "A new random seed" });
    this.loras = element("fieldset", { name: "loras", tabindex: -1 }, element("legend", {}, "LoRAs"));
    return element("details", { class: "advanced" }, element("summary", {}, "Advanced"),
      field("Size", this.shape),
      pair(field("Width", number("width"), "Pixels"), field("Height", number("height"), "Pixels")),
      pair(field("Steps", number("num_inference_steps"), "More take longer and show more detail. Empty: as the mode says."),
        field("Guidance", number("guidance_scale"), "How closely the picture keeps to the prompt.")),
      field("Seed", this.seed, "One seed with the same settings makes one picture.", [dice, this.locked]),
      field("Leave out", element("textarea", { name: "negative_prompt", rows: 2 }), "What the picture should not show."),
      pair(field("How many", number("n"), "Their seeds follow each other."),
        field("File", element("select", { name: "output_format" }), "PNG keeps the settings inside.")),
      field("Scheduler", element("select", { name: "scheduler" }), "The way from noise to a picture."),
      this.loras,
      hint("Poses, edges and depth (ControlNet) cannot guide pictures here yet."));
  }

  get keeps() { return this.locked.getAttribute("aria-pressed") === "true"; }
  lock(on) {
    if (on && !this.seed.value && this.last != null) this.seed.value = this.last;
    this.locked.setAttribute("aria-pressed", String(on && this.seed.value !== ""));
  }
  control(name) { return this.element.querySelector(`[name="${name}"]`); }

  honour(model) {
    this.model = model;
    const { fields } = model;
    for (const [name, { refused, minimum, maximum, values, default: usual }] of Object.entries(fields)) {
      const control = this.control(name);
      if (!control) continue;
      control.disabled = Boolean(refused);
      if (refused) control.closest(".field").querySelector(".hint").textContent = refused;
      else if (control.type === "number") Object.assign(control, { min: minimum, max: maximum, placeholder: usual ?? "" });
      if (values) control.replaceChildren(...options(values));
    }
    this.shapes(fields.width, fields.height);
    this.offer(model.modes);
    this.list(model.loras);
  }

  shapes(width, height) {
    const area = width.default * height.default, grid = width.multiple;
    const near = side => Math.min(width.maximum, Math.max(width.minimum, Math.round(side / grid) * grid));
    this.shape.replaceChildren(...Object.entries(SHAPES).map(([name, ratio]) => {
      const wide = near(Math.sqrt(area * ratio)), high = near(Math.sqrt(area / ratio));
      return element("option", { value: `${wide}x${high}` }, `${name}, ${wide} × ${high}`);
    }), element("option", { value: "own" }, "Your own"));
    this.reshape();
  }

  reshape() {
    const [width, height] = this.shape.value.split("x"), own = !height;
    this.control("width").closest(".pair").hidden = !own;
    if (!own) this.put({ width, height });
  }

  offer(modes) {
    const chosen = modes.find(mode => mode.quality === "auto" && !mode.refused) || modes[0];
    this.modes.replaceChildren(this.modes.firstChild, ...modes.map(mode => {
      const [name, promise] = WORDS[mode.id] || [mode.id, ""];
      const radio = element("input", { type: "radio", name: "mode", value: mode.quality, checked: mode === chosen, disabled: Boolean(mode.refused) });
      return element("label", {}, radio, element("b", {}, name),
        aside(mode.refused || `${promise}: ${mode.steps} step${mode.steps > 1 ? "s" : ""}`));
    }));
  }

  list(loras) {
    const rows = loras.map(lora => {
      const weight = number("", { value: 1, min: -10, max: 10, "aria-label": `Weight of ${lora.name}` });
      const box = element("input", { type: "checkbox", value: lora.name });
      const words = lora.trigger_words.length ? `say ${lora.trigger_words.join(", ")}` : lora.made_for;
      return element("div", { class: "row tight lora" }, element("label", {}, box, ` ${lora.name} `, aside(words)), weight);
    });
    this.loras.disabled = !rows.length;
    this.loras.replaceChildren(this.loras.firstChild, ...(rows.length ? rows : [hint("Files that teach a style or a subject. There are none in loras/.")]));
  }

  /** The request's fields as the API calls them, without images; only what differs from the worker's own. */
  read() {
    const said = { prompt: this.prompt.value, ...this.carried };
    const { fields } = this.model;
    for (const name of NUMBERS) {
      const control = this.control(name);
      if (control.value !== "" && !control.disabled) said[name] = Number(control.value);
    }
    if (this.shape.value === `${fields.width.default}x${fields.height.default}`) delete said.width, delete said.height;
    for (const name of TEXTS) {
      const control = this.control(name);
      if (control.value && !control.disabled && control.value !== fields[name]?.values?.[0]) said[name] = control.value;
    }
    const mode = this.element.elements.mode?.value;
    if (mode && mode !== "auto" && !said.num_inference_steps && !said.sampling) said.quality = mode;
    if (said.n === 1) delete said.n;
    if (this.keeps) said.seed = this.seeded();
    const loras = [...this.loras.querySelectorAll(":checked")].map(box => {
      const { value, clip } = this.weight(box);
      return { name: box.value, weight: Number(value || 1), ...(clip?.[value] != null && { clip_weight: clip[value] }) };
    });
    return loras.length ? { ...said, loras } : said;
  }

  seeded() {
    const text = this.seed.value.trim();
    return /^\d+$/.test(text) && Number.isSafeInteger(Number(text)) ? Number(text) : text; // longer ones lose digits
  }

  /** Put a picture's parameters into the fields: a request's names, or those that a PNG carries. */
  fill(given) {
    const { width, height } = this.model.fields, [wide, high] = given.size || [given.width || width.default, given.height || height.default];
    this.put({ ...Object.fromEntries(FILLED.map(name => [name, ""])), num_inference_steps: given.steps, guidance_scale: given.guidance, ...given });
    this.shape.value = `${wide}x${high}`;
    if (this.shape.selectedIndex < 0) this.shape.value = "own";
    this.reshape();
    this.put({ width: wide, height: high });
    this.lock(this.seed.value !== "");
    const radios = [...this.modes.querySelectorAll("input:enabled")];
    (radios.find(radio => radio.value === (given.quality || "auto")) || radios[0]).checked = true;
    for (const box of this.loras.querySelectorAll("[type=checkbox]")) {
      const one = given.loras?.find(lora => lora?.name === box.value);
      box.checked = Boolean(one);
      Object.assign(this.weight(box), one ? { value: one.weight, clip: { [one.weight]: one.clip_weight } } : { clip: 0 });
    }
    this.carry(given);
  }

  put(values) {
    for (const name of FILLED) {
      const control = this.control(name);
      if (control.disabled || !(name in values)) continue;
      control.value = values[name] ?? "";
      if (control.selectedIndex < 0) control.selectedIndex = 0;
    }
  }

  weight(box) { return box.closest(".lora").querySelector("[type=number]"); }

  carry(given) {
    this.carried = Object.fromEntries(Object.keys(CARRIED).filter(name => given[name]).map(name => [name, given[name]]));
    if (given.sampling) this.put({ num_inference_steps: "", scheduler: "" });
    this.notes.replaceChildren(...Object.keys(this.carried).map(name => button(`${CARRIED[name]} ×`, event => {
      delete this.carried[name];
      event.currentTarget.remove();
    }, { class: "chip" })));
  }
}
