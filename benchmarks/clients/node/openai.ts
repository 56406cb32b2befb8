import OpenAI, { toFile } from "openai";

const client = new OpenAI({ apiKey: "unused", baseURL: process.env.URL + "/v1", maxRetries: 0 });
const answer = await client.images.generate({ model: "spark", prompt: "x", size: "256x256", n: 1 });
const picture = Buffer.from(answer.data![0].b64_json!, "base64");
const edited = await client.images.edit({
  image: await toFile(picture, "a.png", { type: "image/png" }),
  model: "spark",
  prompt: "a red circle",
});
if (!edited.data![0].b64_json || !edited.usage) throw new Error("no picture");
if (!(await client.models.list()).data.some((model) => model.id === "spark")) throw new Error("no model");
