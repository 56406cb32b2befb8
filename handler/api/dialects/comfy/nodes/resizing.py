"""Resizing as custom nodes that are much used do it, where a plain row does not say it."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from handler.api.dialects.comfy import pixels
from handler.api.dialects.comfy.node import IMAGE, MAX_SIDE, At, Input, Node, choice, maybe, rows, whole
from handler.api.dialects.comfy.nodes.images import LARGEST, changed, resized
from handler.api.dialects.comfy.values import Image, Mask

Size = tuple[int, int]
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
    old, cell = image.size, max(multiple_of, 1)
    size = _target(old, width // cell * cell, height // cell * cell, method)
    if method == "pad":
        at.refuse("padding is not offered; use 'keep proportion' or 'fill / crop'.", "method")
    fills = method == "fill / crop"
    if NEEDED[condition](old, _covering(old, size) if fills else size):
        image = resized(at, image, *size, interpolation, "center" if fills else "disabled")
    if multiple_of > 1:
        image = _whole(at, image, multiple_of)
    return image, *image.size


def _target(old: Size, width: int, height: int, method: str) -> Size:
    """0 is the picture's own side, or, where its shape is kept, none."""
    if method != "keep proportion":
        return width or old[0], height or old[1]
    ratio = min(width / old[0] if width else math.inf, height / old[1] if height else math.inf)
    return old if ratio == math.inf else (max(round(old[0] * ratio), 1), max(round(old[1] * ratio), 1))


def _covering(old: Size, size: Size) -> Size:
    """The smallest of the old shape that covers the new size."""
    ratio = max(size[0] / old[0], size[1] / old[1])
    return round(old[0] * ratio), round(old[1] * ratio)


def _whole(at: At, image: Image, cell: int) -> Image:
    width, height = (side // cell * cell for side in image.size)
    return changed(at, image, (width, height), lambda rgb: pixels.whole_cells(rgb, cell))


def of_either(
    at: At,
    input: Image | Mask,  # noqa: A002
    resize_type: str,
    scale_method: str,
    rest: Mapping[str, Any],
) -> Image | Mask:
    """ResizeImageMaskNode: its ways have inputs of their own, such as `resize_type.megapixels`."""
    said = {name.partition(".")[2]: value for name, value in rest.items()}
    try:
        width, height = _way(input.size, resize_type, said)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        at.refuse(f"'{resize_type}' lacks a number that says how large.", "resize_type")
    crop = "center" if resize_type == "scale to multiple" else str(said.get("crop", "disabled"))
    if not isinstance(input, Mask):
        return resized(at, input, width, height, scale_method, crop)
    if max(width, height) > MAX_SIDE or width * height > LARGEST:
        at.refuse(f"it would make a mask of {width}x{height}; at most {LARGEST // 10**6} million pixels are made.")
    at.spend(width * height)
    return Mask(pixels.scaled(input.grey, max(width, 1), max(height, 1), scale_method, crop))


def _way(old: Size, way: str, said: Mapping[str, Any]) -> Size:
    """The size that one of its ways comes to."""
    width, height = old
    match way:
        case "scale dimensions":
            wide, tall = int(said["width"]), int(said["height"])
            factor = (wide or 0) / width or (tall or 0) / height or 1.0
            return wide or round(width * factor), tall or round(height * factor)
        case "scale total pixels":
            return pixels.by_pixels(width, height, float(said["megapixels"]))
        case "match size":
            size: Size = said["match"].size
            return size
        case "scale to multiple":
            cell = int(said["multiple"])
            return width // cell * cell, height // cell * cell
    factor = {
        "scale by multiplier": lambda: float(said["multiplier"]),
        "scale longer dimension": lambda: int(said["longer_size"]) / max(old),
        "scale shorter dimension": lambda: int(said["shorter_size"]) / min(old),
        "scale width": lambda: int(said["width"]) / width,
        "scale height": lambda: int(said["height"]) / height,
    }[way]()
    return round(width * factor), round(height * factor)


WAYS = (
    *("scale dimensions", "scale by multiplier", "scale longer dimension", "scale shorter dimension", "scale width"),
    *("scale height", "scale total pixels", "match size", "scale to multiple"),
)
EITHER = {"input": Input("IMAGE,MASK"), "resize_type": choice(*WAYS), "scale_method": choice(*pixels.METHODS)}
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
    Node("ResizeImageMaskNode", "transform", of_either, ("IMAGE,MASK",), EITHER, rest="rest"),
    Node("ImageResize+", "essentials", essentials, ("IMAGE", "INT", "INT"), RESIZE, names=("IMAGE", "width", "height")),
)
