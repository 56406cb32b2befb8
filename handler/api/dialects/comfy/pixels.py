"""What is done to the pixels of images and masks, as ComfyUI does it: uint8, (height, width, 3) or (height, width).

Methods other than lanczos have no antialiasing and are torch's of `interpolate`, with its a of -0.75 for bicubic.
"""

import io
import math
from typing import Any

from handler.api.dialects.comfy.values import Mask

NEAREST = {"nearest-exact": 0.5, "nearest": 0.0}  # where in a new pixel it is looked for, as torch does it
METHODS = ("nearest-exact", "bilinear", "area", "bicubic", "lanczos")
CUBIC = -0.75
WIDE = 4096 * 16384  # pixels between two passes


def png(rgb: Any) -> bytes:
    """A file of it; large rather than slow."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def cut(mask: Mask, width: int, height: int) -> bytes:
    """A request's mask, of that size: a PNG that is transparent where ComfyUI's mask is 1."""
    import numpy

    kept = 255 - scaled(mask.grey, width, height, "bilinear")
    return png(numpy.dstack([numpy.zeros((height, width, 3), numpy.uint8), kept]))


def scaled(image: Any, width: int, height: int, method: str, crop: str = "disabled") -> Any:
    """To that size; with the crop "center", only what has its shape is taken."""
    import numpy
    from PIL import Image

    if crop == "center":
        image = _shaped(image, width, height)
    if image.shape[:2] == (height, width):
        return image
    if method == "lanczos":
        if width * image.shape[0] > WIDE:  # Pillow's first pass makes that
            image = scaled(image, image.shape[1], height, method)
        return numpy.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
    if method in NEAREST:
        pairs = zip(image.shape[:2], (height, width), strict=True)
        rows, columns = (_nearest(old, new, NEAREST[method]) for old, new in pairs)
        return image[rows[:, None], columns]
    taps = {"bilinear": _linear, "bicubic": _cubic, "area": _area}[method]
    found = image.astype(numpy.float32)
    # What is between is the smaller of two: of a long picture that is to be a tall one, the other is huge.
    for axis in (0, 1) if height * image.shape[1] <= width * image.shape[0] else (1, 0):
        found = _along(found.swapaxes(0, axis), *taps(image.shape[axis], (height, width)[axis])).swapaxes(0, axis)
    return numpy.ascontiguousarray(numpy.clip(numpy.rint(found), 0, 255).astype(numpy.uint8))


def _shaped(image: Any, width: int, height: int) -> Any:
    """The middle, of the shape of width x height."""
    old_height, old_width = image.shape[:2]
    old, new = old_width / old_height, width / height
    x = min(round((old_width - old_width * (new / old)) / 2), (old_width - 1) // 2) if old > new else 0
    y = min(round((old_height - old_height * (old / new)) / 2), (old_height - 1) // 2) if old < new else 0
    return image[y : old_height - y, x : old_width - x]


def _nearest(old: int, new: int, within: float) -> Any:
    import numpy

    return numpy.minimum(((numpy.arange(new) + within) * old / new).astype(int), old - 1)


def _linear(old: int, new: int) -> tuple[Any, Any]:
    import numpy

    at = numpy.maximum((numpy.arange(new) + 0.5) * old / new - 0.5, 0)
    first = numpy.minimum(at.astype(int), old - 1)
    part = at - first
    return numpy.stack([first, numpy.minimum(first + 1, old - 1)]), numpy.stack([1 - part, part])


def _cubic(old: int, new: int) -> tuple[Any, Any]:
    import numpy

    at = (numpy.arange(new) + 0.5) * old / new - 0.5
    first = numpy.floor(at).astype(int)
    offsets = numpy.arange(-1, 3)[:, None]
    far = numpy.abs(at - first - offsets)
    near = (CUBIC + 2) * far**3 - (CUBIC + 3) * far**2 + 1
    outer = CUBIC * far**3 - 5 * CUBIC * far**2 + 8 * CUBIC * far - 4 * CUBIC
    return numpy.clip(first + offsets, 0, old - 1), numpy.where(far <= 1, near, outer)


def _area(old: int, new: int) -> tuple[Any, Any]:
    """Means over windows of whole pixels."""
    import numpy

    begin = numpy.arange(new) * old // new
    end = -(-(numpy.arange(new) + 1) * old // new)
    taps = begin + numpy.arange((end - begin).max())[:, None]
    return numpy.minimum(taps, old - 1), (taps < end) / (end - begin)


def _along(image: Any, taps: Any, weights: Any) -> Any:
    """Weighted sums of rows."""
    shape = (-1,) + (1,) * (image.ndim - 1)
    found = 0
    for rows, weight in zip(taps, weights.astype("float32"), strict=True):
        found = found + image[rows] * weight.reshape(shape)
    return found


def by_pixels(width: int, height: int, megapixels: float, step: int = 1) -> tuple[int, int]:
    """A size of the same shape with so many times 1024 x 1024 pixels, each side a multiple of `step`."""
    scale = math.sqrt(int(megapixels * 1024 * 1024) / (width * height))
    return max(round(width * scale / step) * step, step), max(round(height * scale / step) * step, step)


def whole_cells(image: Any, cell: int = 8) -> Any:
    """The middle, whose sides are multiples of what an autoencoder makes one of."""
    height, width = (side // cell * cell for side in image.shape[:2])
    y, x = (image.shape[0] % cell) // 2, (image.shape[1] % cell) // 2
    return image[y : y + height, x : x + width]


def pasted(below: Any, above: Any, x: int, y: int, mask: Any = None) -> Any:
    """`above` at (x, y) on `below`, where the mask, of the size of `above`, says so."""
    import numpy

    left, top = max(x, 0), max(y, 0)
    right, bottom = min(x + above.shape[1], below.shape[1]), min(y + above.shape[0], below.shape[0])
    if right <= left or bottom <= top:
        return below
    part = above[top - y : bottom - y, left - x : right - x]
    if mask is not None:
        share = (mask[top - y : bottom - y, left - x : right - x] / numpy.float32(255))[..., None]
        part = numpy.rint(part * share + below[top:bottom, left:right] * (1 - share)).astype(numpy.uint8)
    found = below.copy()
    found[top:bottom, left:right] = part
    return found


def grown(mask: Any, pixels: int, corners: bool) -> Any:
    """A mask that is so many pixels larger, or smaller; with `corners` along both ways at once, else by a cross."""
    import numpy

    better = numpy.maximum if pixels > 0 else numpy.minimum
    for _ in range(abs(pixels)):
        wide = better(better(mask, _moved(mask, 0, 1)), _moved(mask, 0, -1))
        tall = wide if corners else mask
        mask = better(wide, better(_moved(tall, 1, 0), _moved(tall, -1, 0)))
    return mask


def _moved(mask: Any, down: int, right: int) -> Any:
    import numpy

    padded = numpy.pad(mask, 1, mode="edge")
    return padded[1 - down : padded.shape[0] - 1 - down, 1 - right : padded.shape[1] - 1 - right]
