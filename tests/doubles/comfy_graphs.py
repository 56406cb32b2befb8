"""ComfyUI graphs for spark, in API format."""

from typing import Any

Graph = dict[str, dict[str, Any]]


def graph(seed: int = 7, text: str = "a red circle", prefix: str = "ComfyUI", side: int = 64, count: int = 1) -> Graph:
    """The graph that most have: a checkpoint, a prompt, a sampler, a file."""
    sampling = {"sampler_name": "euler", "scheduler": "simple", "steps": 4, "cfg": 1.0, "denoise": 1.0}
    wires = {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
    return {
        "3": node("KSampler", seed=seed, **sampling, **wires),
        "4": node("CheckpointLoaderSimple", ckpt_name="spark.safetensors"),
        "5": node("EmptyLatentImage", width=side, height=side, batch_size=count),
        "6": node("CLIPTextEncode", text=text, clip=["4", 1]),
        "7": node("CLIPTextEncode", text="", clip=["4", 1]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", filename_prefix=prefix, images=["8", 0]),
    }


def streamed(seed: int = 7) -> Graph:
    """The same, with pictures that only a websocket gets."""
    made = graph(seed)
    made["9"] = node("SaveImageWebsocket", images=["8", 0])
    return made


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """One node."""
    return {"class_type": kind, "inputs": inputs}
