// The tab that makes pictures: what is asked for, the picture as it forms, and those that were made before.

import { aside, bench, button, element, field, note, para, row } from "./dom.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { actions, address, bytes, facts } from "./picture.js";

const EXAMPLES = {
  spark: ["a red circle on a blue background", "three yellow stars on a purple background", "a small green heart on a white background"],
  other: ["a lighthouse at dawn, oil on canvas", "a cup of tea in morning light, photograph", "a paper boat on a lake, risograph"],
};
const LOOK_MS = 700; // between looks at the queue

export async function mount(section, app) {
  const make = new Make(app);
  section.append(element("h1", { class: "unseen" }, "Make pictures"), bench(make.form.element, make.stage), make.gallery.element);
  app.on("load", parameters => make.load(parameters));
  app.on("edit", ({ blob, name }) => make.edit(blob, name).catch(error => app.fail(error, make.form.element)));
  app.on("key", () => make.learn());
  make.gallery.show();
  await make.learn();
}

class Make {
  constructor(app) {
    this.app = app;
    this.form = new Form(() => this.run());
    this.gallery = new Gallery(app, picture => { this.show([picture]); this.load({ ...picture.request, n: 1, seed: picture.seed, size: [picture.width, picture.height] }, picture); });
    this.well = element("div", { class: "well" });
    this.bar = element("progress", { hidden: true, max: 1, "aria-label": "Progress" });
    this.state = element("p", { class: "state" });
    this.stop = button("Cancel", () => this.doing.abort(), { hidden: true });
    this.about = element("div", { class: "about" });
    this.stage = element("section", { class: "stage", "aria-label": "The picture" }, this.well, this.bar, row(this.state, this.stop), this.about);
    this.images = [];
    this.invite([]);
  }

  async learn() {
    try {
      const [model, status] = await Promise.all([this.app.model(), this.app.status().catch(() => null)]);
      this.app.clear(this.form.element);
      this.form.honour(model);
      this.rate = status?.spend.price.dollars_per_s;
      if (!this.well.querySelector("img")) this.invite(EXAMPLES[model.model] || EXAMPLES.other);
    } catch (error) {
      this.app.fail(error, this.form.element);
    }
  }

  invite(examples) {
    this.well.replaceChildren(element("div", { class: "empty" }, para("Say what the picture should show, and it appears here."),
      row(examples.map(text => button(text, () => {
        this.form.prompt.value = text;
        this.run();
      }, { class: "chip" })))));
  }

  async load(parameters, { edited } = {}) {
    if (!this.form.model) await this.learn();
    if (!this.form.model) return;
    this.forget();
    this.form.fill(parameters);
    if (edited || parameters.images?.length) this.tell("It was made from another picture. Choose that one again to make the same.");
    else this.app.say("The picture's settings are in the form.");
  }

  tell(text) { this.state.textContent = text; }

  async run() {
    if (this.doing) return;
    this.app.clear(this.form.element);
    this.doing = new AbortController();
    const begun = performance.now();
    this.busy(true);
    let timer, answer;
    try {
      this.app.check(this.form.element);
      const [path, fields] = await this.request(), images = [];
      timer = this.watch();
      for await (const data of this.app.api.events(path, fields, { signal: this.doing.signal })) {
        clearInterval(timer);
        if (data.steps) this.step(data);
        else if (data.type.endsWith(".partial_image")) this.preview(data);
        else images.push(...((answer = data).images || [data]));
      }
      this.finish(images, answer, fields);
      this.app.say(`Done after ${((performance.now() - begun) / 1000).toFixed(1)} seconds.`);
    } catch (error) {
      const cancelled = error.name === "AbortError" ? "Cancelled." : "";
      this.tell(cancelled);
      this.app.say(cancelled);
      for (const [part, children] of this.shown) part.replaceChildren(...children); // as it was before
      this.app.fail(error, this.form.element);
    } finally {
      clearInterval(timer);
      this.busy(false);
    }
  }

  /** The route and the body: edits go by OpenAI's, which takes larger files. */
  async request() {
    if (!this.form.model) this.form.honour(await this.app.model());
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
    if (document.activeElement === this.stop) this.form.button.focus();
    this.form.button.textContent = on ? "Making…" : "Make";
    this.form.button.setAttribute("aria-disabled", String(on));
    this.stop.hidden = this.bar.hidden = !on;
    this.bar.removeAttribute("value");
    if (!on) return;
    this.shown = [this.well, this.about].map(part => [part, [...part.childNodes]]);
    this.about.replaceChildren();
    this.tell("Sent.");
    this.stage.scrollIntoView({ block: "nearest" });
    this.app.say("Making the picture.");
  }

  /** Tell how many requests are before this one, at most, until the timer that it gives is cleared. */
  watch() {
    let before = Infinity;
    return setInterval(async () => {
      const { status, drawing, waiting } = await this.app.status().catch(() => ({}));
      if (!status || !this.doing || this.bar.hasAttribute("value")) return;
      before = Math.min(before, drawing + waiting - 1);
      this.tell(status === "starting" ? "The worker is loading its model. The picture waits for that."
        : before > 0 ? `Waiting: ${before} request${before > 1 ? "s are" : " is"} before yours.` : "Starting to draw.");
    }, LOOK_MS);
  }

  step({ steps, of }) {
    this.bar.value = steps / of;
    this.tell(steps < of ? `Step ${steps} of ${of}` : "Finishing.");
  }

  preview({ b64_json, output_format }) {
    const image = this.well.querySelector(".forming") || element("img", { class: "forming", alt: "The picture as it forms" });
    image.src = `data:image/${output_format};base64,${b64_json}`;
    if (!image.isConnected) this.well.replaceChildren(image);
  }

  finish(images, answer, { stream, progress, partial_images, image, mask, ...request }) {
    const made = images.map(({ b64_json, format = answer.output_format, parameters, seed, stages_s }, index) => {
      const [width, height] = parameters?.size || [answer.width, answer.height];
      const seconds = stages_s ? Object.values({ ...stages_s, queue: 0 }).reduce((sum, each) => sum + each) : answer.inference_ms / 1000;
      const now = Date.now() + index / 100;
      return { id: `${now}-${seed}`, made: now, blob: bytes(b64_json, `image/${format}`), format, width, height, seed, request, seconds, steps: parameters?.steps,
        model: answer.model, unknown: answer.unknown_words, edited: Boolean(image), masked: Boolean(mask), price: this.rate && this.rate * seconds };
    });
    this.form.last = made[0].seed;
    this.show(made);
    this.gallery.add(made);
  }

  show(pictures, chosen = pictures[0]) {
    const image = element("img", { src: this.gallery.url(chosen), alt: chosen.request.prompt || "A picture without a prompt", width: chosen.width, height: chosen.height });
    this.well.replaceChildren(image);
    this.tell("");
    this.gallery.shown = pictures;
    const others = pictures.length > 1 && row(pictures.map((each, index) => button(`Picture ${index + 1}`,
      () => {
        this.show(pictures, each);
        this.about.querySelector("[aria-pressed=true]").focus();
      }, { class: "chip", "aria-pressed": String(each === chosen) })));
    const strange = chosen.unknown && note(`The model does not know: ${chosen.unknown.join(", ")}. It draws shapes in colours, sizes and places.`);
    this.about.replaceChildren(...[element("p", { class: "caption" }, chosen.request.prompt), facts(chosen), strange, others,
      actions(this.app, chosen, this.gallery.url(chosen), async () => {
        await this.gallery.remove([chosen]);
        this.app.say("The picture is deleted.");
        this.about.replaceChildren();
        this.invite([]);
        this.form.prompt.focus();
      })].filter(Boolean));
  }

  async edit(blob, name = "") {
    const { images, mask, strength } = (await this.app.model()).fields;
    if (images.refused) return this.tell(images.refused), this.app.say(images.refused);
    this.images = [...this.images, { blob, name }].slice(-images.maximum);
    this.brush = null;
    const range = element("input", { type: "range", name: "strength", min: 0.05, max: 1, step: 0.05, value: strength.default,
      disabled: Boolean(strength.refused), oninput: event => { event.target.dataset.said = "yes"; } });
    const marks = button("Mark where to change it", () => this.mark(), { disabled: Boolean(mask.refused) });
    this.form.edit.replaceChildren(element("fieldset", { class: "edit", name: "image" }, element("legend", {}, "Changes this picture"),
      row(this.images.map(each => element("img", { src: URL.createObjectURL(each.blob), onload: event => URL.revokeObjectURL(event.target.src), alt: each.name || "The picture to edit", height: 64 })),
        button("Remove", () => this.forget(), { class: "quiet" })),
      field("How much", range, strength.refused || "Little keeps the picture, much draws it anew."),
      element("div", { class: "field" }, marks, aside(mask.refused || "Only what you mark is drawn anew."))));
    this.form.prompt.focus();
    this.app.say("The picture is in the form. Say what it should show.");
  }

  async mark() {
    const { brush } = await import("./mask.js"), [image] = this.images, picture = await createImageBitmap(image.blob);
    if (image !== this.images[0]) return; // it was taken away meanwhile
    this.easel = this.brush ? this.easel : element("div", { class: "brush" });
    this.well.replaceChildren(this.easel);
    this.about.replaceChildren();
    this.brush ||= brush(this.easel, picture);
  }

  forget() {
    if (this.easel?.isConnected) this.invite([]);
    Object.assign(this, { images: [], brush: null });
    this.form.edit.replaceChildren();
  }
}
