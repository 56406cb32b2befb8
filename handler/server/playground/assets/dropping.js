// What a file is that is dropped onto the page or chosen: a picture of Kindling's, a workflow, or a picture to edit.

import { ApiError } from "./app.js";
import { button, element, para, style } from "./dom.js";

const PNG = [137, 80, 78, 71, 13, 10, 26, 10];
const LARGEST = 64e6, MOST_PIXELS = 4096 ** 2, LONGEST = 1e6; // bytes of a file, pixels that are edited, bytes of a text
const GRAPH = /(?:prompt|workflow):\s*\{/; // in the EXIF of JPEG and WebP
const latin = bytes => new TextDecoder("latin1").decode(bytes);

export function watch(app) {
  const over = element("div", { class: "dropping", hidden: true }, para("Drop it here: a picture, or a ComfyUI workflow."));
  const input = element("input", { type: "file", hidden: true, accept: "image/*,.json,application/json", onchange: () => {
    take(input.files, app);
    input.value = "";
  } });
  const title = "A picture, or a ComfyUI workflow; it can be dropped anywhere too";
  document.getElementById("key").before(button("Open a file", () => input.click(), { class: "quiet", title }), input);
  document.head.append(style("dropping.css"));
  document.body.append(over);
  let inside = 0; // elements that a file is over
  const steps = { dragenter: () => inside + 1, dragleave: () => Math.max(0, inside - 1), dragover: () => inside, drop: () => 0 };
  for (const [name, count] of Object.entries(steps)) addEventListener(name, event => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    inside = count();
    over.hidden = !inside;
    event.preventDefault();
    if (name === "drop") take(event.dataTransfer.files, app);
  });
}

async function take([file], app) {
  if (!file) return;
  const section = document.querySelector("main > section:not([hidden])");
  app.clear(section);
  try {
    const { parameters, graph } = await look(file, section.id === "workflows");
    if (parameters) await app.load(parameters);
    else if (graph) {
      await app.open("workflows");
      app.emit("drop", file);
    } else await app.edit(file, file.name);
  } catch (error) {
    app.fail(error, section);
  }
}

/** { parameters }, { graph: true }, or {} of any other picture; ApiError if it is nothing of this. Of what has both the
 * graph is taken where `graphs` are wanted. */
async function look(file, graphs) {
  const refuse = why => { throw new ApiError(`${file.name || "The file"} ${why}`); };
  if (file.size > LARGEST) refuse(`is larger than ${LARGEST / 1e6} MB. Take a smaller one.`);
  if (!file.size) refuse("is empty.");
  const bytes = new Uint8Array(await file.arrayBuffer().catch(() => refuse("cannot be read.")));
  if (PNG.every((byte, at) => bytes[at] === byte)) {
    const { texts, pixels } = chunks(bytes), parameters = parsed(texts.kindling), graph = Boolean(texts.prompt || texts.workflow);
    if (graph && (graphs || !parameters)) return { graph };
    if (parameters) return { parameters };
    if (pixels > MOST_PIXELS) refuse(`has ${Math.round(pixels / 1e6)} million pixels; at most ${Math.floor(MOST_PIXELS / 1e6)} million are edited.`);
  } else if (/^(\xef\xbb\xbf)?\s*[[{]/.test(latin(bytes.subarray(0, 64))) || GRAPH.test(latin(bytes))) return { graph: true };
  const image = await createImageBitmap(file).catch(() => refuse("is neither a picture that this browser can show nor a workflow."));
  image.close();
  return {};
}

/** A PNG's size and, by keyword, what follows that in its texts, as far as its chunks are whole. */
function chunks(bytes) {
  const view = new DataView(bytes.buffer), texts = Object.create(null);
  let pixels = 0;
  for (let at = PNG.length, size; at + 12 <= bytes.length; at += 12 + size) {
    size = view.getUint32(at);
    const kind = latin(bytes.subarray(at + 4, at + 8)), body = bytes.subarray(at + 8, at + 8 + size);
    if (body.length < size) break;
    if (kind === "IHDR" && size >= 8) pixels = view.getUint32(at + 8) * view.getUint32(at + 12);
    if (/^(iTXt|tEXt|zTXt)$/.test(kind)) texts[latin(body.subarray(0, Math.min(80, body.indexOf(0))))] ||= body.subarray(body.indexOf(0));
  }
  return { texts, pixels };
}

/** The parameters that Kindling writes, behind the five zeros of a plain iTXt; null if these are others, or damaged. */
function parsed(text) {
  if (!text || text.length > LONGEST || text.subarray(0, 5).some(Boolean)) return null;
  try {
    const found = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(text.subarray(5)));
    const lists = [found.size, found.loras, found.images].every(each => each == null || Array.isArray(each));
    return lists && typeof found.prompt === "string" && Number.isFinite(found.seed) ? found : null;
  } catch {
    return null;
  }
}
