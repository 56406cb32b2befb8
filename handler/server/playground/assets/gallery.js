// The pictures that were made, kept in this browser: the newest, as many as there is room for, until they are deleted.

import { aside, ask, button, element, para, row } from "./dom.js";

const MOST = 60, MOST_BYTES = 150e6;
const opened = () => new Promise((resolve, reject) => {
  const opening = indexedDB.open("kindling", 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore("pictures", { keyPath: "id" });
  opening.onsuccess = () => resolve(opening.result);
  opening.onerror = () => reject(opening.error);
});

/** One thing, once it is on the disk. It opens the base anew, for a browser may throw that away at any time. */
async function act(mode, what) {
  const base = await opened();
  try {
    const deal = base.transaction("pictures", mode), asked = what(deal.objectStore("pictures"));
    await new Promise((resolve, reject) => Object.assign(deal, { oncomplete: resolve, onabort: () => reject(deal.error) }));
    return asked.result;
  } finally {
    base.close();
  }
}

/** Where pictures are: in IndexedDB, or for as long as the tab is open where the browser denies that. */
async function store() {
  try {
    (await opened()).close();
    return {
      kept: true,
      all: () => act("readonly", pictures => pictures.getAll()),
      put: picture => act("readwrite", pictures => pictures.put(picture)),
      drop: id => act("readwrite", pictures => pictures.delete(id)),
    };
  } catch {
    const held = new Map();
    return { kept: false, all: async () => [...held.values()], put: async picture => held.set(picture.id, picture), drop: async id => held.delete(id) };
  }
}

export class Gallery {
  constructor(app, chosen) {
    Object.assign(this, { app, chosen, store: store(), urls: new Map(), shown: [], full: false, grid: element("ul", { class: "grid" }), note: aside() });
    this.element = element("section", { class: "gallery", "aria-label": "Your pictures" },
      row(element("h2", {}, "Your pictures"), this.note, button("Delete all", () => this.forget(), { class: "quiet" })), this.grid);
    this.others = new BroadcastChannel("kindling-pictures"); // this page in other tabs
    this.others.addEventListener("message", () => this.show());
  }

  url(picture) {
    if (!this.urls.has(picture.id)) this.urls.set(picture.id, URL.createObjectURL(picture.blob));
    return this.urls.get(picture.id);
  }

  async add(pictures) {
    const kept = await this.store;
    try {
      for (const each of pictures) await kept.put(each);
      await this.remove(bounded(await kept.all())[1]);
    } catch {
      this.full = true;
      await this.show();
      this.app.say(this.note.textContent);
    }
  }

  async remove(pictures) {
    const kept = await this.store;
    for (const { id } of pictures) await kept.drop(id);
    this.full = false;
    this.others.postMessage("changed");
    await this.show();
  }

  async forget() {
    if (!await ask("Delete all pictures?", para("They are kept nowhere else."), "Delete")) return;
    await this.remove(await (await this.store).all());
    this.app.say("All pictures are deleted.");
  }

  async show() {
    const kept = await this.store;
    this.note.textContent = this.full ? "This browser has no room to keep the last picture. Download it, or delete others." : kept.kept ? "Kept in this browser only." : "This browser keeps nothing: they go when this tab is closed.";
    const [all] = bounded(await kept.all().catch(() => []));
    for (const [id, url] of this.urls) {
      if ([...all, ...this.shown].some(each => each.id === id)) continue;
      URL.revokeObjectURL(url);
      this.urls.delete(id);
    }
    this.element.hidden = !all.length && !this.full;
    this.grid.replaceChildren(...all.map(picture => element("li", {},
      button(element("img", { src: this.url(picture), alt: picture.request.prompt || "A picture without a prompt", loading: "lazy" }),
        () => this.chosen(picture), { title: picture.request.prompt }))));
  }
}

function bounded(all) {
  let bytes = 0;
  const newest = all.sort((one, other) => other.made - one.made);
  const fits = newest.map((each, index) => (bytes += each.blob.size) <= MOST_BYTES && index < MOST);
  return [newest.filter((_, index) => fits[index]), newest.filter((_, index) => !fits[index])];
}
