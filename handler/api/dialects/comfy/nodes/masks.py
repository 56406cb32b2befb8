"""Masks: 1 is where a picture is drawn anew."""

import math
from typing import Any

from handler.api.dialects.comfy import pixels
from handler.api.dialects.comfy.node import (
    CONDITIONING,
    IMAGE,
    MASK,
    MAX_SIDE,
    VAE,
    YES,
    At,
    Node,
    choice,
    maybe,
    number,
    rows,
    whole,
)
from handler.api.dialects.comfy.nodes.latents import encoded, there
from handler.api.dialects.comfy.values import Conditioning, Image, Latent, Mask, Picture


def invert(at: At, mask: Mask) -> Mask:
    """1 - mask."""
    at.spend(math.prod(mask.size))
    return Mask(255 - mask.grey)


def grow(at: At, mask: Mask, expand: int, tapered_corners: bool) -> Mask:
    """By pixels; below 0 it shrinks."""
    at.spend(mask.size[0] * mask.size[1] * abs(expand))
    return Mask(pixels.grown(mask.grey, expand, not tapered_corners))


def to_image(at: At, mask: Mask) -> Picture:
    """In greys."""
    import numpy

    at.spend(math.prod(mask.size))
    return Picture((numpy.repeat(mask.grey[..., None], 3, axis=2),))


def of_image(at: At, image: Image, channel: str) -> Mask:
    """One channel; an image here has no alpha."""
    rgb = there(at, image).rgb
    if channel == "alpha":
        at.refuse("the image has no alpha; take LoadImage's mask.", "channel")
    return Mask(rgb[..., ("red", "green", "blue").index(channel)])


def of_colour(at: At, image: Image, color: int) -> Mask:
    """Where an image is of one colour."""
    import numpy

    rgb = there(at, image).rgb
    at.spend(math.prod(image.size))
    same = (rgb == numpy.array([color >> 16 & 255, color >> 8 & 255, color & 255])).all(-1)
    return Mask(numpy.where(same, 255, 0).astype(numpy.uint8))


def solid(at: At, value: float, width: int, height: int) -> Mask:
    """One value all over."""
    import numpy

    at.spend(width * height)
    return Mask(numpy.full((height, width), round(255 * value), numpy.uint8))


def threshold(at: At, mask: Mask, value: float) -> Mask:
    """1 above a value, else 0."""
    import numpy

    at.spend(math.prod(mask.size))
    return Mask(numpy.where(mask.grey > 255 * value, 255, 0).astype(numpy.uint8))


def crop(at: At, mask: Mask, x: int, y: int, width: int, height: int) -> Mask:
    """A part."""
    found = mask.grey[y : y + height, x : x + width]
    if not found.size:
        at.refuse("it cuts out nothing of the mask.", "x")
    return Mask(found)


def feather(at: At, mask: Mask, left: int, top: int, right: int, bottom: int) -> Mask:
    """Falling to its edges, as far as is said of each."""
    import numpy

    at.spend(math.prod(mask.size))
    height, width = mask.grey.shape
    across, down = _ramp(width, left, right), _ramp(height, top, bottom)
    return Mask(numpy.rint(mask.grey * down[:, None] * across).astype(numpy.uint8))


def _ramp(length: int, first: int, last: int) -> Any:
    import numpy

    found = numpy.ones(length)
    for far, order in ((min(first, length), 1), (min(last, length), -1)):
        steps = numpy.arange(far)
        found[order * steps] *= (steps + 1) / max(far, 1)  # as ComfyUI has it: from the end on its first is the first
    return found


def combine(at: At, destination: Mask, source: Mask, x: int, y: int, operation: str) -> Mask:
    """One on the other."""
    import numpy

    at.spend(math.prod(destination.size))
    left, top = min(x, destination.size[0]), min(y, destination.size[1])
    found = destination.grey.copy()
    part = found[top : top + source.size[1], left : left + source.size[0]]
    one, two = part.astype(numpy.int32), source.grey[: part.shape[0], : part.shape[1]].astype(numpy.int32)
    hard = ((one > 127) & (two > 127), (one > 127) | (two > 127), (one > 127) ^ (two > 127))
    results = {
        "multiply": one * two / 255,
        "add": one + two,
        "subtract": one - two,
        **{name: flags * 255 for name, flags in zip(("and", "or", "xor"), hard, strict=True)},
    }
    part[:] = numpy.clip(numpy.rint(results[operation]), 0, 255).astype(numpy.uint8)
    return Mask(found)


def inpainting(
    at: At, positive: Conditioning, negative: Conditioning, vae: Any, pixels: Image, mask: Mask, noise_mask: bool
) -> tuple[Conditioning, Conditioning, Latent]:
    """What a model of its own would see, a plain one does not: the picture and the mask are what is left."""
    at.note("the served model has no channels for a mask: it draws anew where the mask is, as with SetLatentNoiseMask.")
    return positive, negative, encoded(at, there(at, pixels).rgb, mask if noise_mask else None)


SIDE, EDGE = whole(512, 1, 4096), whole(0, 0, MAX_SIDE)
COLOURS = ("red", "green", "blue", "alpha")
OUT = ("MASK",)
INPAINT = {
    "positive": CONDITIONING,
    "negative": CONDITIONING,
    "vae": VAE,
    "pixels": IMAGE,
    "mask": MASK,
    "noise_mask": maybe(YES),
}
ON = {
    "destination": MASK,
    "source": MASK,
    "x": EDGE,
    "y": EDGE,
    "operation": choice("multiply", "add", "subtract", "and", "or", "xor"),
}
GROW = {"mask": MASK, "expand": whole(0, -MAX_SIDE, MAX_SIDE), "tapered_corners": YES}
TABLE = rows(
    Node("InvertMask", "mask", invert, OUT, {"mask": MASK}),
    Node("GrowMask", "mask", grow, OUT, GROW),
    Node("MaskToImage", "mask", to_image, ("IMAGE",), {"mask": MASK}),
    Node("ImageToMask", "mask", of_image, OUT, {"image": IMAGE, "channel": choice(*COLOURS)}),
    Node("ImageColorToMask", "mask", of_colour, OUT, {"image": IMAGE, "color": whole(0, 0, 0xFFFFFF)}),
    Node("SolidMask", "mask", solid, OUT, {"value": number(1.0, 0, 1), "width": SIDE, "height": SIDE}),
    Node("ThresholdMask", "mask", threshold, OUT, {"mask": MASK, "value": number(0.5, 0, 1)}),
    Node("CropMask", "mask", crop, OUT, {"mask": MASK, "x": EDGE, "y": EDGE, "width": SIDE, "height": SIDE}),
    Node(
        "FeatherMask", "mask", feather, OUT, {"mask": MASK, **dict.fromkeys(("left", "top", "right", "bottom"), EDGE)}
    ),
    Node("MaskComposite", "mask", combine, OUT, ON),
    Node(
        "InpaintModelConditioning",
        "conditioning/inpaint",
        inpainting,
        ("CONDITIONING", "CONDITIONING", "LATENT"),
        INPAINT,
        names=("positive", "negative", "latent"),
    ),
)
