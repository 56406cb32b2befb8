"""What arithmetic says of pictures and their parts on a GPU: results/lowered.json where it has it, else what is here.

What is here are milliseconds on an H200, and of an H100 close to it: at 720 TFLOP/s in bf16, 1250 in fp8 and 600 for
attention by cuDNN, and 3.5 TB/s for other kernels, over Inductor's own count of bytes. Other GPUs have only what
lowered.json says. Nothing of either was measured on a GPU.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import report
from handler import MODELS

Figures = Mapping[str, float]
KEPT: Mapping[str, Figures] = {
    "products of a step, bf16": {"ms": 78},
    "products of a step, fp8": {"ms": 45},
    "T5 bf16": {"ms": 10},
    "T5 fp8": {"ms": 35},
    "CLIP": {"ms": 3.5},
    "VAE decode, channels last": {"ms": 40},
    "Kindling bf16 eager": {"step_ms": 150},
    "Kindling bf16 compiled": {"step_ms": 113, "encode_ms": 13, "decode_ms": 40, "picture_ms": 515},
    "Kindling fp8 eager": {"step_ms": 180},
    "Kindling fp8 compiled": {"step_ms": 82, "encode_ms": 38, "decode_ms": 40, "picture_ms": 415},
    "Kindling fp8 compiled, 28 steps": {"step_ms": 82, "picture_ms": 2390},
    "Kindling fp8 compiled, 28 steps, 512 tokens": {"step_ms": 88, "picture_ms": 2540},
}
HOPPER = {"H100", "H200"}
CASES = {  # of lowered.json's models and groups
    ("flux-schnell", "bf16"): "Kindling bf16 compiled",
    ("flux-schnell", "fp8"): "Kindling fp8 compiled",
    ("flux-dev", "fp8"): "Kindling fp8 compiled, 28 steps, 512 tokens",
}


def predictions(card: str) -> dict[str, Figures]:
    """By case, for a GPU of this name; none for a CPU."""
    words = set(re.split(r"[\s-]", card))  # "NVIDIA A100-SXM4-40GB" is an A100-40GB, and an L40S is no L4
    try:
        rows = json.loads((report.RESULTS / "lowered.json").read_text()).get("predictions", [])
    except FileNotFoundError:
        rows = []
    mine = [row for row in rows if words.issuperset(row["card"].split("-"))]
    lowered = {case: _figures(row) for row in mine if (case := _case(row))}
    return {**(KEPT if words & HOPPER else {}), **lowered}


def _case(row: Mapping[str, Any]) -> str | None:
    return CASES.get((row["model"], row["group"]))


def _figures(row: Mapping[str, Any]) -> Figures:
    """Milliseconds under the names that `pictures.py` gives them."""
    found = {
        "step_ms": row["denoise_ms"] / MODELS[row["model"]].steps,
        "encode_ms": row["encode_ms"],
        "decode_ms": row["decode_ms"],
        "picture_ms": 1000 * row["seconds"],
    }
    return {name: round(value, 1) for name, value in found.items()}
