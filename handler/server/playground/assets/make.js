// The tab that makes pictures: what is asked for, the picture as it forms, and those that were made before.

import { element, field } from "./dom.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { actions, address, bytes, facts } from "./picture.js";

const EXAMPLES = {
  spark: ["a red circle on a blue background", "three yellow stars on a purple background", "a small green heart on a white background"],
  other: ["a lighthouse on a cliff at dawn, oil on canvas", "a cup of tea on a wooden table, morning light, photograph", "a paper boat on a still lake, risograph print"],
};
const LOOK_MS = 1000; // between two looks at the queue

export async function mount(section, app) {
  const make = new Make(app);
  section.append(element("h1", { class: "unseen" }, "Make pictures"), element("div", { class: "bench" }, make.form.element, make.stage), make.gallery.element);
  app.on("load", parameters => make.load(parameters));
  app.on("edit", ({ blob, name }) => make.edit(blob, name));
  app.on("key", () => make.learn());
  await Promise.all([make.learn(), make.gallery.show()]);
}

class Make {
  constructor(app) {
    this.app = app;
    this.form = new Form(app, () => this.run());
    this.gallery = new Gallery(app, picture => { this.show([picture]); this.load(picture.request, picture); });
    this.well = element("div", { class: "well" });
    this.bar = element("progress", { hidden: true, max: 1, "aria-label": "Progress" });
    this.state = element("p", { class: "state" });
    this.stop = element("button", { type: "button", hidden: true, onclick: () => this.doing.abort() }, "Cancel");
    this.about = element("div", { class: "about" });
    this.stage = element("section", { class: "stage", "aria-label": "The picture" }, this.well, this.bar, element("div", { class: "row" }, this.state, this.stop), this.about);
    this.images = [];
    this.invite([]);
  }

  /** What the served model can, and what a second of it costs. */
  async learn() {
    try {
      const [model, status] = await Promise.all([this.app.model(), this.app.status()]);
      this.app.clear(this.form.element);
      this.form.honour(model);
      this.rate = status.spend.price.dollars_per_s;
      if (!this.well.querySelector("img")) this.invite(EXAMPLES[model.model] || EXAMPLES.other);
    } catch (error) {
      this.app.fail(error, this.form.element);
    }
  }

  invite(examples) {
    this.well.replaceChildren(element("div", { class: "empty" }, element("p", {}, "Say what the picture should show, and it appears here."),
      element("div", { class: "row" }, examples.map(text => element("button", { type: "button", class: "chip", onclick: () => {
        this.form.prompt.value = text;
        this.run();
      } }, text)))));
  }

  load(parameters, { edited } = {}) {
    this.form.fill(parameters);
    this.forget();
    if (edited || parameters.images?.length) this.tell("This picture was made from another one. Choose that picture again to make the same.");
    else this.app.say("The picture's settings are in the form.");
  }

  tell(text) { this.state.textContent = text; }

  async run() {
    if (this.doing) return;
    this.app.clear(this.form.element);
    this.doing = new AbortController();
    const begun = performance.now();
    this.busy(true);
    let queue = () => {};
    try {
      const [path, fields] = await this.request();
      queue = this.watch();
      for await (const { data } of this.app.api.events(path, fields, { signal: this.doing.signal })) {
        if (data.type.endsWith(".progress")) this.step(data, queue);
        else if (data.type.endsWith(".partial_image")) this.preview(data);
        else await this.finish(data.images || [data], data, fields, (performance.now() - begun) / 1000);
      }
    } catch (error) {
      this.tell(error.name === "AbortError" ? "Cancelled." : "");
      if (error.name === "AbortError") this.app.say("Cancelled.");
      this.restore();
      this.app.fail(error, this.form.element);
    } finally {
      queue();
      this.busy(false);
    }
  }

  /** The route and the body: edits go by OpenAI's, which takes larger files. */
  async request() {
    const fields = { ...this.form.read(), stream: true, progress: true };
    if (!fields.n) fields.partial_images = 3;
    if (!this.images.length) return ["generate", fields];
    const mask = await this.brush?.blob();
    const strength = this.form.control("strength");
    const images = await Promise.all(this.images.map(image => address(image.blob)));
    return ["v1/images/edits", { ...fields, image: images.length > 1 ? images : images[0],
      ...(strength && !strength.disabled && strength.dataset.said && { strength: Number(strength.value) }), ...(mask && { mask: await address(mask) }) }];
  }

  busy(on) {
    if (!on) this.doing = null;
    this.form.button.textContent = on ? "Making…" : "Make";
    this.form.button.setAttribute("aria-disabled", String(on));
    this.stop.hidden = this.bar.hidden = !on;
    this.stage.setAttribute("aria-busy", String(on));
    if (!on) return this.bar.removeAttribute("value");
    this.shown = [this.well, this.about].map(part => [part, [...part.childNodes]]);
    this.bar.removeAttribute("value");
    this.about.replaceChildren();
    this.tell("Sent.");
    this.stage.scrollIntoView({ block: "nearest" });
    this.app.say("Making the picture.");
  }

  /** What was there before. */
  restore() { for (const [part, children] of this.shown) part.replaceChildren(...children); }

  /** Tell how many pictures are before this one, at most, until what this returns is called. */
  watch() {
    let before = Infinity, over = false;
    const look = async () => {
      const { status, drawing, waiting } = await this.app.status().catch(() => ({}));
      if (over || status === undefined) return;
      before = Math.min(before, drawing + waiting - 1);
      this.tell(status === "starting" ? "The worker is loading its model. The picture waits for that."
        : before > 0 ? `Waiting: ${before} picture${before > 1 ? "s are" : " is"} before yours.` : "Starting to draw.");
    };
    const timer = setInterval(look, LOOK_MS);
    look();
    return () => { over = true; clearInterval(timer); };
  }

  step({ steps, of }, queue) {
    queue();
    this.bar.value = steps / of;
    this.tell(steps < of ? `Step ${steps} of ${of}` : "Finishing.");
  }

  preview({ b64_json, output_format }) {
    const image = this.well.querySelector(".forming") || element("img", { class: "forming", alt: "The picture as it forms" });
    image.src = `data:image/${output_format};base64,${b64_json}`;
    if (!image.isConnected) this.well.replaceChildren(image);
  }

  async finish(images, answer, fields, seconds) {
    const { stream, progress, partial_images, image, mask, ...request } = fields;
    const drawn = images[0].stages_s ? Object.entries(images[0].stages_s).reduce((sum, [name, each]) => sum + (name === "queue" ? 0 : each), 0) : answer.inference_ms / 1000;
    const made = images.map((one, index) => {
      const format = one.format || answer.output_format;
      const blob = bytes(one.b64_json, `image/${format}`);
      const [width, height] = one.parameters?.size || [answer.width, answer.height];
      return { id: crypto.randomUUID?.() || `${Date.now()}-${Math.random()}`, blob, format, width, height, seed: one.seed, request, seconds: drawn, whole: seconds,
        steps: one.parameters?.steps, model: answer.model, edited: Boolean(image), masked: Boolean(mask), price: this.rate && this.rate * drawn, made: Date.now() + index / 100 };
    });
    this.form.last = made[0].seed;
    if (!this.form.keeps) this.form.seed.placeholder = `random (was ${made[0].seed})`;
    this.show(made);
    this.app.say(`Done after ${seconds.toFixed(1)} seconds.`);
    for (const picture of made) await this.gallery.add(picture);
    for (const picture of made) this.app.emit("picture", picture);
  }

  /** Pictures that are finished, the first one large. */
  show(pictures, chosen = pictures[0]) {
    this.chosen = chosen;
    const image = element("img", { src: this.gallery.url(chosen), alt: chosen.request.prompt || "A picture without a prompt", width: chosen.width, height: chosen.height });
    this.well.replaceChildren(image);
    this.tell("");
    const others = pictures.length > 1 && element("div", { class: "row" }, pictures.map((each, index) => element("button", { type: "button", class: "chip",
      "aria-pressed": String(each === chosen), onclick: () => this.show(pictures, each) }, `Picture ${index + 1}`)));
    this.about.replaceChildren(element("p", { class: "caption" }, chosen.request.prompt), facts(chosen), ...(others ? [others] : []),
      actions(this.app, chosen, this.gallery.url(chosen), async () => {
        await this.gallery.remove(chosen);
        this.app.say("The picture is deleted.");
        this.about.replaceChildren();
        this.invite([]);
      }));
  }

  /** Make `blob` the picture to edit, or one more of them where the model looks at several. */
  async edit(blob, name = "") {
    const { images, mask, strength } = (await this.app.model()).fields;
    if (images.refused) return this.tell(images.refused);
    this.images = [...this.images, { blob, name }].slice(-images.maximum);
    this.brush = null;
    const range = element("input", { type: "range", name: "strength", min: 0.05, max: 1, step: 0.05, value: strength.default,
      disabled: Boolean(strength.refused), oninput: event => { event.target.dataset.said = "yes"; } });
    const marks = element("button", { type: "button", disabled: Boolean(mask.refused), onclick: () => this.mark() }, "Mark where to change it");
    this.form.edit.replaceChildren(element("fieldset", { class: "edit", name: "image" }, element("legend", {}, "Changes this picture"),
      element("div", { class: "row" }, this.images.map(each => element("img", { src: this.urlOf(each), alt: each.name || "The picture to edit", height: 64 })),
        element("button", { type: "button", class: "quiet", onclick: () => this.forget() }, "Remove")),
      field("How much", range, strength.refused || "Little keeps the picture, much draws it anew."),
      element("div", { class: "field" }, marks, element("span", { class: "hint" }, mask.refused || "Only what you mark is drawn anew."))));
    this.form.prompt.focus();
    this.app.say("The picture is in the form. Say what it should show.");
  }

  urlOf(image) { return (image.url ||= URL.createObjectURL(image.blob)); }

  /** Let a brush say where the picture is drawn anew. */
  async mark() {
    const { brush } = await import("./mask.js");
    const host = element("div", { class: "brush" });
    this.well.replaceChildren(host);
    this.about.replaceChildren();
    this.brush = await brush(host, await createImageBitmap(this.images[0].blob));
  }

  forget() {
    for (const image of this.images) if (image.url) URL.revokeObjectURL(image.url);
    Object.assign(this, { images: [], brush: null });
    this.form.edit.replaceChildren();
  }
}
