// What a file is that is dropped onto the page or chosen: a picture of Kindling's, a workflow, or a picture to edit.

import { ApiError } from "./app.js";
import { element } from "./dom.js";

const PNG = [137, 80, 78, 71, 13, 10, 26, 10];
const LARGEST = 64e6, MOST_PIXELS = 16e6, LONGEST = 1e6; // bytes of a file, pixels that are edited, bytes of a text
const KEYWORD = "kindling", GRAPHS = ["prompt", "workflow"];
const WORKFLOW = /(?:prompt|workflow):\s*\{/; // in the EXIF of JPEG and WebP

/** Let the whole window take files, and a button in the header choose one. */
export function watch(app) {
  const over = element("div", { class: "dropping", hidden: true }, element("p", {}, "Drop it here: a picture, or a ComfyUI workflow."));
  const input = element("input", { type: "file", hidden: true, accept: "image/*,.json,application/json", "aria-label": "A picture or a workflow", onchange: () => {
    const [file] = input.files;
    input.value = "";
    if (file) take(file, app);
  } });
  const button = element("button", { type: "button", class: "quiet", title: "A picture, or a ComfyUI workflow; it can be dropped anywhere too", onclick: () => input.click() }, "Open a file");
  document.getElementById("key").before(button, input);
  document.head.append(element("link", { rel: "stylesheet", href: new URL("dropping.css", import.meta.url).href }));
  document.body.append(over);
  const files = event => event.dataTransfer?.types.includes("Files");
  let inside = 0;
  const show = count => { inside = Math.max(0, count); over.hidden = !inside; };
  addEventListener("dragenter", event => { if (files(event)) show(inside + 1); });
  addEventListener("dragleave", event => { if (files(event)) show(inside - 1); });
  addEventListener("dragover", event => { if (files(event)) event.preventDefault(); });
  addEventListener("drop", event => {
    show(0);
    if (!files(event)) return;
    event.preventDefault();
    const [file] = event.dataTransfer.files;
    if (file) take(file, app);
  });
}

/** Do with a file what it is for. What is no good is told in one sentence. */
export async function take(file, app) {
  const section = document.querySelector("main > section:not([hidden])");
  app.clear(section);
  try {
    const kind = await look(file, section.id === "workflows");
    if (kind.parameters) await app.load(kind.parameters);
    else if (kind.workflow) {
      await app.open("workflows");
      app.emit("drop", file);
    } else await app.edit(file, file.name);
  } catch (error) {
    app.fail(error, section);
  }
}

/** { parameters }, { workflow: true }, or {} of any other picture; ApiError if it is nothing of this. */
async function look(file, graphs) {
  const name = file.name || "The file";
  if (file.size > LARGEST) throw new ApiError(`${name} is larger than ${LARGEST / 1e6} MB. Take a smaller one.`);
  if (!file.size) throw new ApiError(`${name} is empty.`);
  const bytes = new Uint8Array(await file.arrayBuffer().catch(() => { throw new ApiError(`${name} cannot be read.`); }));
  if (PNG.every((byte, at) => bytes[at] === byte)) {
    const { texts, pixels } = chunks(bytes);
    const parameters = parsed(texts.get(KEYWORD));
    const workflow = GRAPHS.some(key => texts.has(key));
    if (workflow && (graphs || !parameters)) return { workflow };
    if (parameters) return { parameters };
    if (pixels > MOST_PIXELS) throw new ApiError(`${name} has ${Math.round(pixels / 1e6)} million pixels; at most ${MOST_PIXELS / 1e6} million are edited.`);
  } else if (/^\s*[[{]/.test(new TextDecoder("latin1").decode(bytes.subarray(0, 64)).replace("\xef\xbb\xbf", ""))) return { workflow: true };
  else if (WORKFLOW.test(new TextDecoder("latin1").decode(bytes))) return { workflow: true };
  await createImageBitmap(file).then(image => image.close(), () => {
    throw new ApiError(`${name} is neither a picture that this browser can show nor a workflow.`);
  });
  return {};
}

/** A PNG's size and the texts in it, as far as its chunks are whole. */
function chunks(bytes) {
  const view = new DataView(bytes.buffer), texts = new Map();
  let pixels = 0;
  for (let at = PNG.length; at + 12 <= bytes.length;) {
    const size = view.getUint32(at), kind = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    const body = bytes.subarray(at + 8, at + 8 + size);
    if (body.length < size) break;
    if (kind === "IHDR" && size >= 8) pixels = view.getUint32(at + 8) * view.getUint32(at + 12);
    const end = /^[itz](EXt|TXt)$/.test(kind) ? body.indexOf(0) : -1;
    const keyword = end > 0 && String.fromCharCode(...body.subarray(0, Math.min(end, 80)));
    if (keyword && !texts.has(keyword)) texts.set(keyword, kind === "iTXt" && size <= LONGEST ? body.subarray(end + 5) : new Uint8Array());
    at += 12 + size;
  }
  return { texts, pixels };
}

/** The parameters that Kindling writes; null if these are others, or damaged. */
function parsed(text) {
  try {
    const found = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(text));
    return typeof found.prompt === "string" && Number.isFinite(found.seed) ? found : null;
  } catch {
    return null;
  }
}
