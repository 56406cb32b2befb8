// The tab that makes pictures.

import { element, field } from "./dom.js";

export function mount(section, app) {
  const prompt = element("textarea", { name: "prompt", rows: 3, required: true });
  const form = element("form", { class: "card", onsubmit: event => { event.preventDefault(); make(); } },
    field("What should the picture show?", prompt), element("button", { class: "primary" }, "Make"));
  const stage = element("div", { class: "stage" });
  section.append(form, stage);

  async function make() {
    app.clear(form);
    try {
      for await (const { data } of app.api.events("generate", { prompt: prompt.value, stream: true, partial_images: 3 })) {
        const shown = data.images ? data.images[0] : data;
        stage.replaceChildren(element("img", { src: `data:image/png;base64,${shown.b64_json}`, alt: prompt.value }));
      }
    } catch (error) {
      app.fail(error, form);
    }
  }
}
