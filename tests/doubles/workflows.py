"""Workflows as ComfyUI's page saves them, small ones: its default, and what stands between nodes."""

import json
import struct
import zlib
from typing import Any

Ui = dict[str, Any]
SAMPLER = [7, "randomize", 4, 1, "euler", "simple", 1]


def slot(name: str, kind: str, link: Any = None, widget: bool = False) -> dict[str, Any]:
    """An input."""
    return {"name": name, "type": kind, "link": link} | ({"widget": {"name": name}} if widget else {})


def item(number: Any, kind: str, values: Any = (), inputs: Any = (), outputs: Any = (), **more: Any) -> dict[str, Any]:
    """A node; `outputs` are types."""
    named = [{"name": one, "type": one, "links": []} for one in outputs]
    values = list(values) if isinstance(values, tuple) else values
    return {
        "id": number,
        "type": kind,
        "mode": 0,
        "inputs": list(inputs),
        "outputs": named,
        "widgets_values": values,
    } | more


def default(**changes: Any) -> Ui:
    """Text to a picture: nodes 4 (checkpoint), 5, 6, 7, 3 (sampler), 8, 9 (output)."""
    nodes = [
        item(4, "CheckpointLoaderSimple", ("spark.safetensors",), (), ("MODEL", "CLIP", "VAE")),
        item(5, "EmptyLatentImage", (256, 256, 1), (), ("LATENT",)),
        item(6, "CLIPTextEncode", ("a red circle",), [slot("clip", "CLIP", 3)], ("CONDITIONING",)),
        item(7, "ConditioningZeroOut", (), [slot("conditioning", "CONDITIONING", 4)], ("CONDITIONING",)),
        item(
            3,
            "KSampler",
            SAMPLER,
            [
                slot("model", "MODEL", 1),
                slot("positive", "CONDITIONING", 5),
                slot("negative", "CONDITIONING", 6),
                slot("latent_image", "LATENT", 2),
            ],
            ("LATENT",),
        ),
        item(8, "VAEDecode", (), [slot("samples", "LATENT", 7), slot("vae", "VAE", 8)], ("IMAGE",)),
        item(9, "SaveImage", ("kindling",), [slot("images", "IMAGE", 9)]),
    ]
    links = [
        [1, 4, 0, 3, 0, "MODEL"],
        [2, 5, 0, 3, 3, "LATENT"],
        [3, 4, 1, 6, 0, "CLIP"],
        [4, 6, 0, 7, 0, "CONDITIONING"],
        [5, 6, 0, 3, 1, "CONDITIONING"],
        [6, 7, 0, 3, 2, "CONDITIONING"],
        [7, 3, 0, 8, 0, "LATENT"],
        [8, 4, 2, 8, 1, "VAE"],
        [9, 8, 0, 9, 0, "IMAGE"],
    ]
    return {"nodes": nodes, "links": links, "version": 0.4, "extra": {}, **changes}


API = {
    "4": ("CheckpointLoaderSimple", {"ckpt_name": "spark.safetensors"}),
    "5": ("EmptyLatentImage", {"width": 256, "height": 256, "batch_size": 1}),
    "6": ("CLIPTextEncode", {"text": "a red circle", "clip": ["4", 1]}),
    "7": ("ConditioningZeroOut", {"conditioning": ["6", 0]}),
    "3": (
        "KSampler",
        {
            "seed": 7,
            "steps": 4,
            "cfg": 1,
            "sampler_name": "euler",
            "scheduler": "simple",
            "denoise": 1,
            "model": ["4", 0],
            "positive": ["6", 0],
            "negative": ["7", 0],
            "latent_image": ["5", 0],
        },
    ),
    "8": ("VAEDecode", {"samples": ["3", 0], "vae": ["4", 2]}),
    "9": ("SaveImage", {"filename_prefix": "kindling", "images": ["8", 0]}),
}


def api() -> dict[str, Any]:
    """What the page makes of `default` for the server."""
    return {name: {"class_type": kind, "inputs": dict(inputs)} for name, (kind, inputs) in API.items()}


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A picture of one pixel with these chunks before it."""
    head = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(b"\0\0")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )


def text_chunk(name: str, value: Any) -> tuple[bytes, bytes]:
    """A tEXt chunk, as ComfyUI's SaveImage writes it."""
    return b"tEXt", name.encode() + b"\0" + json.dumps(value).encode()
