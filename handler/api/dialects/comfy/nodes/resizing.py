"""Resizing as custom nodes that are much used do it, where a plain row does not say it."""

import math
from collections.abc import Callable

from handler.api.dialects.comfy import pixels
from handler.api.dialects.comfy.node import IMAGE, MAX_SIDE, At, Node, choice, maybe, rows, whole
from handler.api.dialects.comfy.nodes.images import changed, resized
from handler.api.dialects.comfy.values import Image

Size = tuple[int, int]
INTERPOLATIONS = {"nearest": "nearest-exact", "nearest-exact": "nearest-exact"}
NEEDED: dict[str, Callable[[Size, Size], bool]] = {  # ComfyUI_essentials' conditions
    "always": lambda old, new: True,
    "downscale if bigger": lambda old, new: old[0] > new[0] or old[1] > new[1],
    "upscale if smaller": lambda old, new: old[0] < new[0] or old[1] < new[1],
    "if bigger area": lambda old, new: old[0] * old[1] > new[0] * new[1],
    "if smaller area": lambda old, new: old[0] * old[1] < new[0] * new[1],
}


def essentials(
    at: At, image: Image, width: int, height: int, interpolation: str, method: str, condition: str, multiple_of: int
) -> tuple[Image, int, int]:
    """ComfyUI_essentials' ImageResize+."""
    old = image.size
    size = _target(old, width, height, method)
    if method == "pad":
        at.refuse("padding is not offered; use 'keep proportion' or 'fill / crop'.", "method")
    if NEEDED[condition](old, size):
        how = INTERPOLATIONS.get(interpolation, interpolation)
        crop = "center" if method == "fill / crop" else "disabled"
        image = resized(at, image, *size, how, crop)
    if multiple_of > 1:
        image = _whole(at, image, multiple_of)
    return image, *image.size


def _target(old: Size, width: int, height: int, method: str) -> Size:
    """0 is the picture's own side, or, where its shape is kept, none."""
    if method != "keep proportion":
        return width or old[0], height or old[1]
    ratio = min(width / old[0] if width else math.inf, height / old[1] if height else math.inf)
    return old if ratio == math.inf else (max(round(old[0] * ratio), 1), max(round(old[1] * ratio), 1))


def _whole(at: At, image: Image, cell: int) -> Image:
    width, height = (side // cell * cell for side in image.size)
    return changed(at, image, (width, height), lambda rgb: pixels.whole_cells(rgb, cell))


SIDE = whole(512, 0, MAX_SIDE)
RESIZE = {
    "image": IMAGE,
    "width": SIDE,
    "height": SIDE,
    "interpolation": choice("nearest", "bilinear", "bicubic", "area", "nearest-exact", "lanczos"),
    "method": choice("stretch", "keep proportion", "fill / crop", "pad"),
    "condition": choice(*NEEDED),
    "multiple_of": maybe(whole(0, 0, 512)),
}
TABLE = rows(
    Node("ImageResize+", "essentials", essentials, ("IMAGE", "INT", "INT"), RESIZE, names=("IMAGE", "width", "height")),
)
