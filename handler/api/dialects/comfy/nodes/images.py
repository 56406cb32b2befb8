"""Images and how they are changed, before they are encoded or after they are drawn."""

import math
from collections.abc import Mapping
from typing import Any

from handler.api.dialects.comfy import pixels
from handler.api.dialects.comfy.node import (
    BATCH,
    FLAG,
    IMAGE,
    MASK,
    MAX_SIDE,
    At,
    Node,
    choice,
    maybe,
    number,
    rows,
    whole,
)
from handler.api.dialects.comfy.nodes.latents import there
from handler.api.dialects.comfy.plan import Pixels
from handler.api.dialects.comfy.values import Drawn, Image, Mask, Picture
from handler.core.attachments import MAX_REFERENCES

LARGEST = 4096 * 4096  # pixels of one image
MOST = 16  # changes of a drawn picture
RATIOS = {
    "1:1 (Square)": (1, 1),
    "2:3 (Portrait Photo)": (2, 3),
    "3:2 (Photo)": (3, 2),
    "3:4 (Portrait Standard)": (3, 4),
    "4:3 (Standard)": (4, 3),
    "9:16 (Portrait Widescreen)": (9, 16),
    "16:9 (Widescreen)": (16, 9),
    "21:9 (Ultrawide)": (21, 9),
}
UPRIGHT = ((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104))
TRAINED = (*UPRIGHT, (1024, 1024), *((height, width) for width, height in UPRIGHT))  # sizes, of FLUX.1 Kontext


def changed(at: At, image: Image, size: tuple[int, int], change: Pixels) -> Image:
    """`image` after a change that makes pictures of `size`: at once, or once it is drawn."""
    frames = 1 if isinstance(image, Drawn) else len(image.frames)
    if not 0 < size[0] * size[1] <= LARGEST or max(size) > MAX_SIDE:
        at.refuse(
            f"it would make a picture of {size[0]}x{size[1]}; at most {LARGEST // 10**6} million pixels are made."
        )
    at.spend((math.prod(size) + math.prod(image.size)) * frames)
    if isinstance(image, Picture):
        return Picture(tuple(change(frame) for frame in image.frames))
    if len(image.after) >= MOST:
        at.refuse(f"a picture is changed at most {MOST} times after it is drawn.")
    return image.then(change, size)


def resized(at: At, image: Image, width: int, height: int, method: str, crop: str = "disabled") -> Image:
    """To a size."""
    width, height = max(width, 1), max(height, 1)
    return changed(at, image, (width, height), lambda rgb: pixels.scaled(rgb, width, height, method, crop))


def scale(at: At, image: Image, upscale_method: str, width: int, height: int, crop: str) -> Image:
    """0 keeps the shape; two of them the size."""
    if not width and not height:
        return image
    old_width, old_height = image.size
    width = width or max(1, round(old_width * height / old_height))
    height = height or max(1, round(old_height * width / old_width))
    return resized(at, image, width, height, upscale_method, crop)


def scale_by(at: At, image: Image, upscale_method: str, scale_by: float) -> Image:
    """By a factor."""
    width, height = (round(side * scale_by) for side in image.size)
    return resized(at, image, width, height, upscale_method)


def to_pixels(at: At, image: Image, upscale_method: str, megapixels: float, resolution_steps: int) -> Image:
    """To an area."""
    return resized(at, image, *pixels.by_pixels(*image.size, megapixels, resolution_steps), upscale_method)


def to_longest(at: At, image: Image, upscale_method: str, largest_size: int) -> Image:
    """By the longer side."""
    width, height = image.size
    factor = largest_size / max(width, height)
    return resized(at, image, round(width * factor), round(height * factor), upscale_method)


def for_kontext(at: At, image: Image) -> Image:
    """To the size among those trained that is nearest in shape."""
    shape = image.size[0] / image.size[1]
    width, height = min(TRAINED, key=lambda size: abs(shape - size[0] / size[1]))
    return resized(at, image, width, height, "lanczos", "center")


def crop(at: At, image: Image, width: int, height: int, x: int, y: int) -> Image:
    """A part."""
    old_width, old_height = image.size
    left, top = min(x, old_width - 1), min(y, old_height - 1)
    size = min(width, old_width - left), min(height, old_height - top)
    return changed(at, image, size, lambda rgb: rgb[top : top + size[1], left : left + size[0]])


def invert(at: At, image: Image) -> Image:
    """The negative."""
    return changed(at, image, image.size, lambda rgb: 255 - rgb)


def pad(at: At, image: Image, left: int, top: int, right: int, bottom: int, feathering: int) -> tuple[Picture, Mask]:
    """Room around it in grey, and a mask of that, which reaches into the picture by `feathering` pixels."""
    import numpy

    picture = there(at, image)
    width, height = picture.size
    whole_size = (width + left + right, height + top + bottom)
    found = changed(
        at, picture, whole_size, lambda rgb: numpy.pad(rgb, ((top, bottom), (left, right), (0, 0)), constant_values=128)
    )
    grey = numpy.full(whole_size[::-1], 255, numpy.uint8)
    grey[top : top + height, left : left + width] = feathered(width, height, (left, top, right, bottom), feathering)
    return there(at, found), Mask(grey)


def feathered(width: int, height: int, sides: tuple[int, int, int, int], far: int) -> Any:
    """A mask that falls with the square from those sides at which something was added."""
    import numpy

    if not far or far * 2 >= width or far * 2 >= height:
        return numpy.zeros((height, width), numpy.uint8)
    x, y = numpy.arange(width), numpy.arange(height)
    left, top, right, bottom = sides
    across = numpy.minimum(x if left else width, width - x if right else width)
    down = numpy.minimum(y if top else height, height - y if bottom else height)
    near = numpy.minimum(numpy.broadcast_to(across, (height, width)), numpy.broadcast_to(down, (width, height)).T)
    return numpy.rint(255 * (numpy.clip(far - near, 0, far) / far) ** 2).astype(numpy.uint8)


def composite(
    at: At, destination: Image, source: Image, x: int, y: int, resize_source: bool, mask: Mask | None
) -> Image:
    """One on the other; one of the two may be drawn."""
    width, height = destination.size if resize_source else source.size
    grey = None if mask is None else pixels.scaled(mask.grey, width, height, "bilinear")
    at.spend(width * height * 2)

    def fitted(rgb: Any) -> Any:
        return pixels.scaled(rgb, width, height, "bilinear")

    if isinstance(source, Drawn):
        below = there(at, destination).rgb
        return changed(at, source, destination.size, lambda rgb: pixels.pasted(below, fitted(rgb), x, y, grey))
    above = fitted(source.rgb)
    return changed(at, destination, destination.size, lambda rgb: pixels.pasted(rgb, above, x, y, grey))


def two(at: At, image1: Image, image2: Image) -> Picture:
    """Both as one batch."""
    return batch(at, {"image1": image1, "image2": image2})


def batch(at: At, rest: Mapping[str, Any]) -> Picture:
    """Several images as one batch, the sizes of all as the first's."""
    found = [image for image in rest.values() if isinstance(image, Picture | Drawn)]
    frames = [frame for image in found for frame in there(at, image).frames]
    if not 0 < len(frames) <= MAX_REFERENCES:
        at.refuse(f"it batches {len(frames)} images; 1 to {MAX_REFERENCES} can be.")
    height, width = frames[0].shape[:2]
    at.spend(height * width * len(frames))
    return Picture(tuple(pixels.scaled(frame, width, height, "bilinear", "center") for frame in frames))


def plain(at: At, width: int, height: int, batch_size: int, color: int) -> Picture:
    """One colour."""
    import numpy

    if batch_size > MAX_REFERENCES:
        at.refuse(f"it batches {batch_size} images; 1 to {MAX_REFERENCES} can be.", "batch_size")
    at.spend(width * height)
    rgb = numpy.empty((height, width, 3), numpy.uint8)
    rgb[:] = (color >> 16 & 255, color >> 8 & 255, color & 255)
    return Picture((rgb,) * batch_size)


def size(at: At, image: Image) -> tuple[int, int, int]:
    """Width, height, and how many there are."""
    return *image.size, image.request.n if isinstance(image, Drawn) else len(image.frames)


def resolution(at: At, aspect_ratio: str, megapixels: float, multiple: int) -> tuple[int, int]:
    """Width and height of a shape and an area."""
    return pixels.by_pixels(*RATIOS[aspect_ratio], megapixels, multiple)


METHOD, SIDE = choice(*pixels.METHODS), whole(512, 0, MAX_SIDE)
CROPS = choice("disabled", "center")
EDGE, AT = whole(0, 0, MAX_SIDE, 8), whole(0, 0, MAX_SIDE)
UP = "image/upscaling"
WITH_MASK = ("IMAGE", "MASK")
SIZED = {"image": IMAGE, "upscale_method": METHOD, "width": SIDE, "height": SIDE, "crop": CROPS}
AREA = {
    "image": IMAGE,
    "upscale_method": METHOD,
    "megapixels": number(1.0, 0.01, 16),
    "resolution_steps": maybe(whole(1, 1, 256)),
}
PADS = {"image": IMAGE, **dict.fromkeys(("left", "top", "right", "bottom"), EDGE), "feathering": whole(40, 0, MAX_SIDE)}
CUT = {"image": IMAGE, "width": whole(512, 1, MAX_SIDE), "height": whole(512, 1, MAX_SIDE), "x": AT, "y": AT}
ON = {"destination": IMAGE, "source": IMAGE, "x": AT, "y": AT, "resize_source": FLAG, "mask": maybe(MASK)}
PLAIN = {
    "width": whole(512, 1, 4096),
    "height": whole(512, 1, 4096),
    "batch_size": BATCH,
    "color": whole(0, 0, 0xFFFFFF),
}
SHAPE = {
    "aspect_ratio": choice(*RATIOS),
    "megapixels": number(1.0, 0.1, 16, 0.1),
    "multiple": maybe(whole(8, 8, 128, 4)),
}
TABLE = rows(
    Node("ImageScale", UP, scale, ("IMAGE",), SIZED, title="Upscale Image"),
    Node(
        "ImageScaleBy",
        UP,
        scale_by,
        ("IMAGE",),
        {"image": IMAGE, "upscale_method": METHOD, "scale_by": number(1.0, 0.01, 8)},
    ),
    Node("ImageScaleToTotalPixels", UP, to_pixels, ("IMAGE",), AREA),
    Node(
        "ImageScaleToMaxDimension",
        UP,
        to_longest,
        ("IMAGE",),
        {"image": IMAGE, "upscale_method": METHOD, "largest_size": whole(512, 1, MAX_SIDE)},
    ),
    Node("FluxKontextImageScale", "advanced/conditioning/flux", for_kontext, ("IMAGE",), {"image": IMAGE}),
    Node("ImageCrop", "image/transform", crop, ("IMAGE",), CUT),
    Node("ImageInvert", "image", invert, ("IMAGE",), {"image": IMAGE}),
    Node("ImagePadForOutpaint", "image", pad, WITH_MASK, PADS),
    Node("ImageCompositeMasked", "image", composite, ("IMAGE",), ON),
    Node("ImageBatch", "image", two, ("IMAGE",), {"image1": IMAGE, "image2": IMAGE}),
    Node("BatchImagesNode", "image", batch, ("IMAGE",), {}, rest="rest"),
    Node("EmptyImage", "image", plain, ("IMAGE",), PLAIN),
    Node(
        "GetImageSize", "image", size, ("INT", "INT", "INT"), {"image": IMAGE}, names=("width", "height", "batch_size")
    ),
    Node("ResolutionSelector", "utils", resolution, ("INT", "INT"), SHAPE, names=("width", "height")),
)
