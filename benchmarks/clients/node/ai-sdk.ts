import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { experimental_generateImage as generateImage } from "ai";

const provider = createOpenAICompatible({ name: "kindling", apiKey: "unused", baseURL: process.env.URL + "/v1" });
const { image } = await generateImage({ model: provider.imageModel("spark"), prompt: "x", size: "256x256" });
if (image.uint8Array.length < 100) throw new Error("no picture");
