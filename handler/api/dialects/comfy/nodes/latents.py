"""What a sampler starts from: empty latents, encoded pictures, masks on them, and their size."""

import re
from dataclasses import replace
from typing import Any

from handler.api.dialects.comfy import pixels
from handler.api.dialects.comfy.node import (
    BATCH,
    IMAGE,
    LATENT,
    MASK,
    MAX_SIDE,
    VAE,
    At,
    Node,
    choice,
    maybe,
    number,
    rows,
    text,
    whole,
)
from handler.api.dialects.comfy.values import Drawn, Image, Latent, Mask, Picture, Vae

HALF = 128  # grey, ComfyUI's 0.5
MOST_PASSES = 4  # of samplers, over one picture


def empty(at: At, width: int, height: int, batch_size: int) -> Latent:
    """Of any family: the model knows how many channels it has."""
    return Latent(width // 8 * 8, height // 8 * 8, batch_size)


def empty_of_sixteen(at: At, width: int, height: int, batch_size: int) -> Latent:
    """Of FLUX.2, one of whose cells are 16 pixels a side."""
    return Latent(width // 16 * 16, height // 16 * 16, batch_size)


def picked(
    at: At, resolution: str, batch_size: int, width_override: int, height_override: int
) -> tuple[Latent, int, int]:
    """By a choice such as '1024x1024 (1.0)', where no side is said."""
    sides = re.match(r"(\d{2,5})x(\d{2,5})\b", resolution, re.ASCII)
    if sides is None:
        at.refuse("resolution should begin with two sides, such as 1024x1024.", "resolution")
    width, height = width_override or int(sides[1]), height_override or int(sides[2])
    return empty(at, width, height, batch_size), width, height


def encode(at: At, pixels: Image, vae: Vae, **_: Any) -> Latent:
    """A picture to draw anew, in part or with a mask."""
    if isinstance(pixels, Drawn):
        return again(at, pixels)
    if len(pixels.frames) > 1:
        at.refuse(f"it encodes {len(pixels.frames)} images at once; encode one.", "pixels")
    return encoded(at, pixels.rgb)


def again(at: At, drawn: Drawn) -> Latent:
    """What was drawn, to be drawn anew by another sampler."""
    if drawn.request.n > 1:
        at.refuse("a batch is not drawn anew; set batch_size to 1.")
    if drawn.passes >= MOST_PASSES:
        at.refuse(f"it samples one picture more than {MOST_PASSES} times.")
    width, height = (side // 8 * 8 for side in drawn.size)
    if (width, height) != drawn.size:
        drawn = drawn.then(pixels.whole_cells, (width, height))
    return Latent(width, height, drawn=drawn)


def encoded(at: At, rgb: Any, mask: Mask | None = None) -> Latent:
    """The middle of a picture, as far as an autoencoder takes it."""
    whole = pixels.whole_cells(rgb)
    if not whole.size:
        at.refuse(f"the picture is {rgb.shape[1]}x{rgb.shape[0]}; an autoencoder takes at least 8 pixels a side.")
    return Latent(whole.shape[1], whole.shape[0], picture=whole, mask=mask)


def there(at: At, image: Image) -> Picture:
    """An image that is there, not one that is yet to be drawn."""
    if isinstance(image, Drawn):
        at.refuse("it needs a picture that is yet to be drawn; draw that first, and send it as an image.")
    return image


def for_inpainting(at: At, pixels: Image, vae: Vae, mask: Mask, grow_mask_by: int) -> Latent:
    """Grey where it is masked, and the mask so much larger."""
    import numpy

    from handler.api.dialects.comfy import pixels as change

    rgb = there(at, pixels).rgb
    at.spend(rgb.shape[0] * rgb.shape[1] * (2 + grow_mask_by))
    grey = change.scaled(mask.grey, rgb.shape[1], rgb.shape[0], "bilinear")
    hard = numpy.where(grey > 127, 255, 0).astype(numpy.uint8)
    neutral = numpy.where(hard[..., None] > 0, numpy.uint8(HALF), rgb)
    return encoded(at, neutral, Mask(change.whole_cells(dilated(hard, grow_mask_by))))


def dilated(mask: Any, size: int) -> Any:
    """What a square window of that size would touch, as a convolution of it does."""
    import numpy

    if size <= 1:
        return mask
    before = -(-(size - 1) // 2)
    after = size - 1 - before
    height, width = mask.shape
    padded = numpy.pad(mask, ((before, before), (before, before)))
    found = numpy.zeros_like(mask)
    for y in range(size):
        numpy.maximum(found, padded[y : y + height, before : before + width], out=found)
    padded = numpy.pad(found, ((0, 0), (before, before)))
    found = numpy.zeros_like(mask)
    for x in range(before + after + 1):
        numpy.maximum(found, padded[:, x : x + width], out=found)
    return found


def with_mask(at: At, samples: Latent | Drawn, mask: Mask) -> Latent:
    """Drawn anew only where the mask is 1."""
    before = unsampled(at, samples)
    if before.empty:
        at.note("a mask on an empty latent changes nothing, for nothing is kept.")
        return before
    return replace(before, mask=mask)


def unsampled(at: At, samples: Latent | Drawn) -> Latent:
    """What a sampler made is decoded, to be encoded again."""
    if isinstance(samples, Latent):
        return samples
    if samples.request.sampling and samples.request.sampling.leftover_noise:
        at.refuse("a sampler that goes on from another's noise is not offered; sample once, to the last step.")
    found = again(at, samples)
    at.note("between two samplers a picture is decoded and encoded again: the result is near, not the same.")
    return found


def upscale(at: At, samples: Latent | Drawn, upscale_method: str, width: int, height: int, crop: str) -> Latent:
    """To a size, at least 64 a side; 0 keeps the shape."""
    before = unsampled(at, samples)
    if width == 0 and height == 0:
        return before
    if width == 0:
        width = round(before.width * max(64, height) / before.height)
    elif height == 0:
        height = round(before.height * max(64, width) / before.width)
    return resized(at, before, max(64, width), max(64, height), upscale_method, crop)


def upscale_by(at: At, samples: Latent | Drawn, upscale_method: str, scale_by: float) -> Latent:
    """By a factor."""
    before = unsampled(at, samples)
    width, height = (round(side / 8 * scale_by) * 8 for side in (before.width, before.height))
    return resized(at, before, width, height, upscale_method, "disabled")


def resized(at: At, before: Latent, width: int, height: int, method: str, crop: str) -> Latent:
    """An empty latent just has another size; an encoded picture is scaled before it is encoded."""
    width, height = max(width // 8 * 8, 8), max(height // 8 * 8, 8)
    if before.empty:
        return replace(before, width=width, height=height)
    at.note("the picture is scaled before it is encoded, not its latent after: the result is near, not the same.")
    at.spend(width * height)
    how = method if method in pixels.METHODS else "bilinear"

    def scaled(rgb: Any) -> Any:
        return pixels.scaled(rgb, width, height, how, crop)

    picture = None if before.picture is None else scaled(before.picture)
    drawn = before.drawn and before.drawn.then(scaled, (width, height))
    return replace(before, width=width, height=height, picture=picture, drawn=drawn)


def repeated(at: At, samples: Latent | Drawn, amount: int) -> Latent:
    """Several of it."""
    before = unsampled(at, samples)
    return replace(before, n=before.n * amount)


def one_of(at: At, samples: Latent | Drawn, batch_index: int, length: int) -> Latent:
    """A part of a batch has the noise of its place in it, which a request cannot say."""
    before = unsampled(at, samples)
    if batch_index or length < before.n:
        at.refuse("a part of a batch cannot be drawn alone; set batch_size to what you want.", "batch_index")
    return before


SIZE = {"width": whole(1024, 16, MAX_SIDE, 8), "height": whole(1024, 16, MAX_SIDE, 8), "batch_size": BATCH}
LATENT_METHODS = choice("nearest-exact", "bilinear", "area", "bicubic", "bislerp")
CROP = choice("disabled", "center")
TILES = {
    "tile_size": whole(512, 64, 4096, 64),
    "overlap": maybe(whole(64, 0, 4096, 32)),
    "temporal_size": maybe(whole(64, 8, 4096, 4)),
    "temporal_overlap": maybe(whole(8, 4, 4096, 4)),
}
OUT = ("LATENT",)
TABLE = rows(
    *(
        Node(name, "latent", empty, OUT, SIZE)
        for name in ("EmptyLatentImage", "EmptySD3LatentImage", "EmptyHunyuanImageLatent")
    ),
    Node(
        "SDXLEmptyLatentSizePicker+",  # of ComfyUI_essentials
        "latent",
        picked,
        ("LATENT", "INT", "INT"),
        {
            "resolution": text("1024x1024 (1.0)", multiline=False),
            "batch_size": BATCH,
            "width_override": whole(0, 0, MAX_SIDE, 8),
            "height_override": whole(0, 0, MAX_SIDE, 8),
        },
        names=("LATENT", "width", "height"),
    ),
    Node("EmptyFlux2LatentImage", "latent", empty_of_sixteen, OUT, SIZE),
    Node("VAEEncode", "latent", encode, OUT, {"pixels": IMAGE, "vae": VAE}, title="VAE Encode"),
    Node("VAEEncodeTiled", "latent", encode, OUT, {"pixels": IMAGE, "vae": VAE, **TILES}),
    Node(
        "VAEEncodeForInpaint",
        "latent/inpaint",
        for_inpainting,
        OUT,
        {"pixels": IMAGE, "vae": VAE, "mask": MASK, "grow_mask_by": whole(6, 0, 64)},
    ),
    Node("SetLatentNoiseMask", "latent/inpaint", with_mask, OUT, {"samples": LATENT, "mask": MASK}),
    Node(
        "LatentUpscale",
        "latent",
        upscale,
        OUT,
        {
            "samples": LATENT,
            "upscale_method": LATENT_METHODS,
            "width": whole(512, 0, MAX_SIDE, 8),
            "height": whole(512, 0, MAX_SIDE, 8),
            "crop": CROP,
        },
    ),
    Node(
        "LatentUpscaleBy",
        "latent",
        upscale_by,
        OUT,
        {"samples": LATENT, "upscale_method": LATENT_METHODS, "scale_by": number(1.5, 0.01, 8)},
    ),
    Node("RepeatLatentBatch", "latent/batch", repeated, OUT, {"samples": LATENT, "amount": whole(1, 1, 64)}),
    Node(
        "LatentFromBatch",
        "latent/batch",
        one_of,
        OUT,
        {"samples": LATENT, "batch_index": whole(0, 0, 63), "length": whole(1, 1, 64)},
    ),
)
