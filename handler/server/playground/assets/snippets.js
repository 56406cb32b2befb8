// A picture as a request, to copy: for curl, OpenAI's package, and as a graph in ComfyUI's API format.

const quoted = text => `'${text.replaceAll("'", "'\\''")}'`;
const ENDING = { png: "png", jpeg: "jpg", webp: "webp" };
const STEPS = { // how ComfyUI calls a scheduler: its sampler, and its schedule
  "flow-match-euler": ["euler", "simple"], euler: ["euler", "normal"], "euler-a": ["euler_ancestral", "normal"],
  "dpm++": ["dpmpp_2m", "normal"], heun: ["heun", "normal"], ddim: ["ddim", "ddim_uniform"],
};
const CONSTANTS = new Map([[true, "True"], [false, "False"], [null, "None"]]);
const OPENAI = ["prompt", "quality", "output_format"];

function asked(picture) {
  const { width, height, n, ...rest } = picture.request;
  return { ...rest, seed: picture.seed, size: `${picture.width}x${picture.height}` };
}

const files = ({ edited, masked }) => [...(edited ? [["image", "picture.png"]] : []), ...(masked ? [["mask", "mask.png"]] : [])];

export function curl(picture, { root, key }) {
  const form = picture.request.output_format || "png";
  const fields = asked(picture), sent = files(picture);
  const url = `${root}v1/images/${sent.length ? "edits" : "generations"}`;
  const text = value => typeof value === "string" ? value : JSON.stringify(value);
  const body = sent.length
    ? [...sent.map(([name, file]) => `-F ${name}=@${file}`), ...Object.entries(fields).map(([name, value]) => `--form-string ${quoted(`${name}=${text(value)}`)}`)]
    : ["-H 'Content-Type: application/json'", `-d ${quoted(JSON.stringify(fields))}`];
  return [`curl -s --fail-with-body ${quoted(url)}`, ...(key ? ['-H "Authorization: Bearer $KINDLING_API_KEY"'] : []),
    `-H 'Accept: image/${form}'`, ...body, `-o kindling.${ENDING[form]}`].join(" \\\n  ");
}

export function python(picture, { root, key }) {
  const { size, ...fields } = asked(picture), sent = files(picture);
  const all = Object.entries(fields), known = ([name]) => OPENAI.includes(name), own = all.filter(known);
  const more = Object.fromEntries(all.filter(one => !known(one))
    .map(([name, value]) => [name, sent[0] && value instanceof Object ? JSON.stringify(value) : value])); // a form
  const lines = [...sent.map(([name, file]) => `    ${name}=open("${file}", "rb"),`),
    ...own.map(([name, value]) => `    ${name}=${spelled(value)},`), `    size="${size}",`, `    extra_body=${spelled(more)},`];
  return `import base64
import os
from openai import OpenAI

client = OpenAI(base_url="${root}v1", api_key=${key ? 'os.environ["KINDLING_API_KEY"]' : '"unused"'})
answer = client.images.${sent.length ? "edit" : "generate"}(
    model="${picture.model}",
${lines.join("\n")}
)
with open("kindling.${ENDING[fields.output_format || "png"]}", "wb") as file:
    file.write(base64.b64decode(answer.data[0].b64_json))
`;
}

function spelled(value) {
  if (Array.isArray(value)) return `[${value.map(spelled).join(", ")}]`;
  if (value && typeof value === "object") return `{${Object.entries(value).map(([name, each]) => `${spelled(name)}: ${spelled(each)}`).join(", ")}}`;
  return CONSTANTS.get(value) || JSON.stringify(value);
}

/** The same settings as ComfyUI's page would send them; the noise of its samplers is another. */
export async function graph(picture, { api, model }) {
  const { fields, modes } = model, said = picture.request;
  if (said.sampling) return "It was sampled as its graph says: use that.";
  const loader = (await api.get("object_info/CheckpointLoaderSimple")).CheckpointLoaderSimple.input.required.ckpt_name;
  const [sampler_name, scheduler] = STEPS[said.scheduler || fields.scheduler.values[0]];
  const guidance = said.guidance_scale ?? fields.guidance_scale.default;
  const guided = !fields.negative_prompt.refused && guidance > 1; // else the model is told its guidance, or has none
  const steps = said.num_inference_steps || modes.find(mode => mode.quality === said.quality)?.steps || fields.num_inference_steps.default;
  const nodes = {};
  const node = (id, class_type, inputs) => { nodes[id] = { class_type, inputs }; return id; };
  let weights = [node("4", "CheckpointLoaderSimple", { ckpt_name: loader[0][0] }), 0], clip = ["4", 1];
  (said.loras || []).forEach(({ name, weight, clip_weight }, index) => {
    const id = node(`${20 + index}`, "LoraLoader", { model: weights, clip, lora_name: `${name}.safetensors`, strength_model: weight, strength_clip: clip_weight ?? weight });
    weights = [id, 0];
    clip = [id, 1];
  });
  const text = words => said.reading ? words : words.replace(/[()]/g, "\\$&"); // ComfyUI reads weights in them
  let positive = [node("6", "CLIPTextEncode", { text: text(said.prompt), clip }), 0];
  if (!guided && !fields.guidance_scale.refused) positive = [node("10", "FluxGuidance", { conditioning: positive, guidance }), 0];
  const negative = [node("7", "CLIPTextEncode", { text: text(said.negative_prompt || ""), clip }), 0];
  let latent = [node("5", "EmptyLatentImage", { width: picture.width, height: picture.height, batch_size: 1 }), 0], denoise = 1;
  if (picture.edited) {
    const seen = [node("12", "VAEEncode", { pixels: [node("11", "LoadImage", { image: "picture.png" }), 0], vae: ["4", 2] }), 0];
    const mask = picture.masked && [node("14", "LoadImageMask", { image: "mask.png", channel: "alpha" }), 0];
    if (fields.strength.refused && !mask) positive = [node("13", "ReferenceLatent", { conditioning: positive, latent: seen }), 0];
    else {
      delete nodes[5];
      latent = mask ? [node("15", "SetLatentNoiseMask", { samples: seen, mask }), 0] : seen;
      denoise = said.strength ?? (mask ? 1 : fields.strength.default);
    }
  }
  node("3", "KSampler", { model: weights, positive, negative, latent_image: latent, seed: picture.seed, steps, cfg: guided ? guidance : 1, sampler_name, scheduler, denoise });
  node("8", "VAEDecode", { samples: ["3", 0], vae: ["4", 2] });
  node("9", "SaveImage", { images: ["8", 0], filename_prefix: "Kindling" });
  return JSON.stringify(nodes, null, 2);
}
