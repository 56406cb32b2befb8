// One picture that is finished: what is told of it, and what can be done with it.

import { aside, ask, button, copy, element, hint, pairs } from "./dom.js";
import { curl, graph, python } from "./snippets.js";

const COPIES = {
  curl: ["As curl", curl],
  Python: ["As Python, with OpenAI's package", python],
  ComfyUI: ["As a ComfyUI workflow, in API format", graph],
};

export function bytes(text, type) {
  return new Blob([Uint8Array.from(atob(text), each => each.charCodeAt(0))], { type });
}

export function address(blob) {
  return new Promise((resolve, reject) => {
    const reader = Object.assign(new FileReader(), { onload: () => resolve(reader.result), onerror: () => reject(reader.error) });
    reader.readAsDataURL(blob);
  });
}

export function facts({ seconds, seed, width, height, steps, price, model }) {
  return pairs("facts", Object.entries({ Time: `${seconds < 10 ? seconds.toFixed(2) : seconds.toFixed(0)} s`, Seed: seed, Size: `${width} × ${height}`,
    ...(steps && { Steps: steps }), ...(price && { Price: `$${price.toPrecision(2)}` }), Model: model }));
}

export function actions(app, picture, url, remove) {
  const name = `kindling-${picture.seed}.${picture.format === "jpeg" ? "jpg" : picture.format}`;
  return element("div", { class: "row actions" },
    element("a", { class: "button", href: url, download: name }, "Download"),
    button("Edit", () => app.edit(picture.blob, name)),
    aside("Copy as"),
    Object.keys(COPIES).map(kind => button(kind, () => show(app, kind, picture))),
    button("Delete", remove, { class: "quiet" }));
}

async function show(app, kind, picture) {
  const [title, written] = COPIES[kind];
  try {
    const text = await written(picture, { root: app.root, key: app.key(), api: app.api, model: await app.model() });
    const hints = [app.key() && kind !== "ComfyUI" && "It takes the key from the variable KINDLING_API_KEY.",
      picture.edited && "Save the picture that was edited as picture.png" + (picture.masked ? ", the mask as mask.png" : "") + (kind === "ComfyUI" ? ", and upload it." : ".")];
    const pre = element("pre", { tabindex: 0 }, text), put = button("Copy", () => copy(pre, app), { class: "primary" });
    ask(title, element("div", {}, pre, hints.filter(Boolean).map(each => hint(each))), put, "Close");
  } catch (error) {
    app.fail(error, document.querySelector(".about"));
  }
}
