"""Images that are there: files, and what is in the graph itself."""

from dataclasses import replace
from typing import Any

from handler.api import references
from handler.api.dialects.comfy.node import At, Node, choice, files, rows, text
from handler.api.dialects.comfy.plan import Folder
from handler.api.dialects.comfy.values import Mask, Picture
from handler.core import attachments

FOLDERS: dict[str, Folder] = {"[input]": "input", "[output]": "output", "[temp]": "temp"}
NO_MASK = 64  # pixels a side of the mask of an image that has no alpha


def load(at: At, image: str, **_: Any) -> tuple[Picture, Mask]:
    """A file of the input folder; the mask is what its alpha leaves out."""
    return opened(at, fetched(at, image), f"image: {image:.80}")


def fetched(at: At, name: str) -> bytes:
    """A file by ComfyUI's name of it."""
    try:
        return at.load(*placed(name))
    except OSError:  # there is none, or a file where its folder should be
        told = "send it with POST /upload/image first, on RunPod as one of the job's images"
        at.refuse(f"Invalid image file: {name:.200}; {told}.", "image")


def placed(name: str) -> tuple[str, str, Folder]:
    """File, subfolder and folder of a name that may have a folder before it, and `[output]` or the like behind it."""
    path, _, mark = name.strip().rpartition(" ")
    path, folder = (path, FOLDERS[mark]) if mark in FOLDERS else (name.strip(), FOLDERS["[input]"])
    subfolder, _, last = path.replace("\\", "/").rpartition("/")
    return last, subfolder, folder


def opened(at: At, data: bytes, name: str) -> tuple[Picture, Mask]:
    """Decoded within limits: colours as they are stored, and 1 - alpha."""
    import numpy

    found = numpy.asarray(references.upright(data, name))
    at.spend(found.shape[0] * found.shape[1])
    grey = 255 - found[..., 3] if found.shape[2] == 4 else numpy.zeros((NO_MASK, NO_MASK), numpy.uint8)
    return Picture((numpy.ascontiguousarray(found[..., :3]),)), Mask(grey)


def load_mask(at: At, image: str, channel: str) -> Mask:
    """One channel of a file; of alpha, what it leaves out."""
    picture, alpha = load(at, image)
    return alpha if channel == "alpha" else Mask(picture.rgb[..., ("red", "green", "blue").index(channel)])


def sent(at: At, image: str, **_: Any) -> tuple[Picture, Mask]:
    """An image in the graph itself, as base64."""
    body = image.partition(",")[2] if image.startswith("data:") else image
    try:
        data = attachments.decoded(body.encode("ascii"))
    except ValueError:
        at.refuse("it is not valid base64 of an image.", "image")
    return opened(at, data, "image: the base64")


def sent_mask(at: At, mask: str, **_: Any) -> Mask:
    """A mask in the graph itself: its red channel, as ETN_LoadMaskBase64 reads it."""
    return Mask(sent(at, mask)[0].rgb[..., 0])


FILE = files("input")
BASE64 = replace(text(), longest=64 << 20)  # more than a body has
WITH_MASK = ("IMAGE", "MASK")
TABLE = rows(
    Node("LoadImage", "image", load, WITH_MASK, {"image": FILE}, title="Load Image"),
    Node("LoadImageOutput", "image", load, WITH_MASK, {"image": FILE}),
    Node(
        "LoadImageMask",
        "mask",
        load_mask,
        ("MASK",),
        {"image": FILE, "channel": choice("alpha", "red", "green", "blue")},
    ),
    Node("ETN_LoadImageBase64", "external_tooling", sent, WITH_MASK, {"image": BASE64}),
    Node("ETN_LoadMaskBase64", "external_tooling", sent_mask, ("MASK",), {"mask": BASE64}),
)
