import createClient from "openapi-fetch";
import type { components, paths } from "./made/openapi-typescript";

const client = createClient<paths>({ baseUrl: process.env.URL! });
const smallest: components["schemas"]["GenerationRequest"] = { prompt: "x" };
const { data, error } = await client.POST("/v1/images/generations", { body: smallest });
if (error) throw new Error(error.error.message);
if (typeof data === "string" || !("data" in data)) throw new Error("these are events, or a picture as it is");
if (!data.data[0].b64_json) throw new Error("no picture");
