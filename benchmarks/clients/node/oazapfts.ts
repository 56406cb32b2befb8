import * as api from "./made/oazapfts";

api.defaults.baseUrl = process.env.URL!;
const answer = await api.postV1ImagesGenerations({ prompt: "x" });
if (answer.status !== 200) throw new Error(String(answer.status));
if (!JSON.stringify(answer.data).includes("b64_json")) throw new Error("no picture");
