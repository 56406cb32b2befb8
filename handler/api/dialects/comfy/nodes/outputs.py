"""Outputs: pictures that are kept, previews, and what only a page shows."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from handler.api.dialects.comfy.node import ANY, IMAGE, At, Node, maybe, rows, text
from handler.api.dialects.comfy.plan import Folder, Output
from handler.api.dialects.comfy.values import Drawn, Image

PREVIEW = "ComfyUI_temp"
FORMATS = ("format", "format.bit_depth", "extension", "file_extension", "output_ext")


def save(at: At, images: Image, filename_prefix: str = "ComfyUI", **_: Any) -> Output | None:
    """Into the output folder; an image that was sent is not saved again."""
    return shown(at, images, "output", filename_prefix)


def preview(at: At, images: Image, **_: Any) -> Output | None:
    """Into the temp folder."""
    return shown(at, images, "temp", PREVIEW)


def stream(at: At, images: Image) -> Output | None:
    """Over the websocket."""
    found = shown(at, images, "temp", PREVIEW)
    return found and replace(found, streamed=True)


def shown(at: At, images: Image, folder: Folder, prefix: str) -> Output | None:
    """What a drawn picture is; None of any other."""
    if not isinstance(images, Drawn):
        return None
    return Output(at.node, folder, prefix, images.request, (), images.sampler, images.after, before=images.before)


def save_as(at: At, images: Image, filename_prefix: str, rest: Mapping[str, Any]) -> Output | None:
    """With a format of its own, which is PNG with 8 bits here."""
    asked = [str(value).strip(".").lower() for name, value in rest.items() if name in FORMATS]
    odd = [value for value in asked if value not in ("png", "8-bit")]
    if odd:
        at.note(f"{' and '.join(odd)} is not offered; the picture is a PNG with 8 bits.")
    return save(at, images, filename_prefix)


def nothing(at: At, **_: Any) -> None:
    """What a page shows and no client gets."""


PREFIX = text("ComfyUI", multiline=False)
TABLE = rows(
    Node(
        "SaveImage",
        "image",
        save,
        ("IMAGE",),
        {"images": IMAGE, "filename_prefix": PREFIX},
        output=True,
        title="Save Image",
    ),
    Node("PreviewImage", "image", preview, ("IMAGE",), {"images": IMAGE}, output=True, title="Preview Image"),
    Node("SaveImageWebsocket", "api/image", stream, (), {"images": IMAGE}, output=True),
    Node(
        "SaveImageAdvanced",
        "image",
        save_as,
        (),
        {"images": IMAGE, "filename_prefix": maybe(PREFIX)},
        output=True,
        rest="rest",
    ),
    Node("PreviewAny", "utils", nothing, ("STRING",), {"source": ANY}, output=True),
    Node("ImageCompare", "image", nothing, (), {}, output=True, rest="rest"),
    Node("MaskPreview", "mask", nothing, (), {}, output=True, rest="rest"),
)
