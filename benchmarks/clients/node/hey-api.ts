import { postV1ImagesGenerations } from "./made/hey-api";
import { client } from "./made/hey-api/client.gen";

client.setConfig({ baseUrl: process.env.URL! });
const { data, error } = await postV1ImagesGenerations({ body: { prompt: "x" } });
if (error) throw new Error(error.error.message);
if (!data || !("data" in data)) throw new Error("these are events");
if (!data.data[0].b64_json) throw new Error("no picture");
