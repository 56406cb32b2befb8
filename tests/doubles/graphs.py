"""Small ComfyUI graphs, and workers to read them for."""

import io
from typing import Any

import numpy as np
from PIL import Image

from handler.api.dialects.comfy.graph import read
from handler.api.dialects.comfy.plan import Plan, Served
from handler.catalog.models import MODELS
from handler.core.request import ImageRequest

Graph = dict[str, Any]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def plain(checkpoint: str = "spark.safetensors", **sampler: Any) -> Graph:
    """Text to image: 1 checkpoint, 2 and 3 texts, 4 an empty latent, 5 the sampler, 6 its picture, 7 saved."""
    how = {"seed": 7, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    links = {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]}
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "2": node("CLIPTextEncode", text="a red circle", clip=["1", 1]),
        "3": node("CLIPTextEncode", text="blurry", clip=["1", 1]),
        "4": node("EmptyLatentImage", width=256, height=256, batch_size=1),
        "5": node("KSampler", **(how | links | sampler)),
        "6": node("VAEDecode", samples=["5", 0], vae=["1", 2]),
        "7": node("SaveImage", images=["6", 0], filename_prefix="kindling"),
    }


def with_image(denoise: float = 0.5, **nodes: Any) -> Graph:
    """Image to image: besides, 10 an image and its mask, 11 encoded."""
    graph = plain(denoise=denoise, latent_image=["11", 0])
    graph["10"] = node("LoadImage", image="cat.png")
    graph["11"] = node("VAEEncode", pixels=["10", 0], vae=["1", 2])
    return graph | nodes


def png(width: int = 128, height: int = 64, hole: tuple[int, int, int, int] | None = (32, 16, 64, 48)) -> bytes:
    """A gradient, transparent in the box `hole` (left, top, right, bottom)."""
    y, x = np.mgrid[:height, :width]
    alpha = np.full((height, width), 255)
    if hole:
        alpha[hole[1] : hole[3], hole[0] : hole[2]] = 0
    rgba = np.dstack([x * 255 // width, y * 255 // height, (x + y) % 256, alpha]).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(data: bytes, mode: str = "RGB") -> Any:
    return np.asarray(Image.open(io.BytesIO(data)).convert(mode))


def served(model: str = "spark", weights: tuple[str, ...] = (), vae: str = "", **files: tuple[str, ...]) -> Served:
    return Served(MODELS[model], files, weights, vae)


def load(name: str, subfolder: str, folder: str) -> bytes:
    """Every file is there but `missing.png`."""
    if name == "missing.png":
        raise FileNotFoundError(name)
    return png()


def plan(graph: Graph, model: str = "spark", **worker: Any) -> Plan:
    return read(graph, served(model, **worker), load)


def request(graph: Graph, model: str = "spark", **worker: Any) -> ImageRequest:
    """That of a graph's only output."""
    [output] = plan(graph, model, **worker).outputs
    return output.request
