"""What becomes of a drawn picture before it is kept: what an output does to its pixels, and the graph in its PNG."""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from handler.api import codec
from handler.api.dialects.comfy.plan import Pixels


def texts(graph: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, str]:
    """A PNG's text chunks that ComfyUI's page reads a graph from: the API's, and the page's own where it was sent."""
    page = extra.get("extra_pnginfo")
    workflow = page.get("workflow") if isinstance(page, dict) else None
    return {"prompt": json.dumps(graph)} | ({"workflow": json.dumps(workflow)} if workflow else {})


def finished(png: bytes, after: Sequence[Pixels], said: Mapping[str, str]) -> bytes:
    """`png` with `after` done to its pixels, and with the texts in it. What was changed is not what our own text says,
    which it loses."""
    if after:
        import numpy
        from PIL import Image

        with Image.open(io.BytesIO(png)) as picture:
            rgb = numpy.asarray(picture)
        for change in after:
            rgb = change(rgb)
        png = codec.encode(numpy.ascontiguousarray(rgb), "png", 100, None)
    return codec.inscribed(png, said)
