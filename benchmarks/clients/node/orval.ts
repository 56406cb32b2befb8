import axios from "axios";
import { postV1ImagesGenerations } from "./made/orval";

axios.defaults.baseURL = process.env.URL!;
const { data } = await postV1ImagesGenerations({ prompt: "x" });
if (!("data" in data)) throw new Error("these are events");
if (!data.data[0].b64_json) throw new Error("no picture");
