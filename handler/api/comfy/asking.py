"""The commands that ask a server for what a graph asks for, to be copied into a shell."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from handler.api.dialects.comfy.nodes.loading import placed
from handler.api.dialects.comfy.plan import Output
from handler.core.request import ImageRequest

LONGEST = 100_000  # bytes of one argument: Linux takes 128 kB
JSON = "Content-Type: application/json"


def prompt(graph: Mapping[str, Any], url: str, keyed: bool) -> str:
    """To `POST /prompt`; empty where the graph is too long for a command."""
    return _curl(f"{url}/prompt", {"prompt": graph}, keyed)


def upload(name: str, url: str, keyed: bool) -> str:
    """Of an image that lies in this folder, under its name, to `POST /upload/image`; empty if that cannot be shown."""
    last, subfolder, folder = placed(name)
    if not name.isprintable():
        return ""
    file = f"image=@{json.dumps(last, ensure_ascii=False)}"  # in quotes, or a comma or semicolon ends it
    places = {"subfolder": subfolder} if subfolder else {}
    places |= {"type": folder} if folder != "input" else {}
    where = (word for key, value in places.items() for word in ("--form-string", shlex.quote(f"{key}={value}")))
    return " ".join(["curl -s", *_key(keyed), shlex.quote(f"{url}/upload/image"), "-F", shlex.quote(file), *where])


def native(outputs: Sequence[Output]) -> tuple[ImageRequest | None, str]:
    """The request to `POST /generate` that draws the same; else why there is none."""
    requests = list(dict.fromkeys(output.request for output in outputs))
    if len(requests) != 1:
        return None, f"It asks for {len(requests)} different pictures, and /generate draws one request."
    if any(output.before for output in outputs):
        return None, "One sampler goes on from another's picture, which one request to /generate cannot say."
    if any(output.after for output in outputs):
        return None, "Its pictures are changed after they are drawn, which /generate does not do."
    if requests[0].images:
        return None, "It works from images, which /generate takes as data URLs in 'images': too long for a command."
    return requests[0], ""


def generate(request: ImageRequest, url: str, keyed: bool) -> str:
    """To `POST /generate`; empty where the request is too long for a command."""
    return _curl(f"{url}/generate", plain(request), keyed)


def plain(request: ImageRequest) -> dict[str, Any]:
    """What a request says, as JSON, without what it leaves open."""
    return request.model_dump(mode="json", exclude_defaults=True, exclude_none=True)


def _curl(url: str, body: Mapping[str, Any], keyed: bool) -> str:
    data = shlex.quote(json.dumps(body))  # ASCII: no control character, nor half of one, gets into a terminal
    if len(data) > LONGEST:
        return ""
    return " ".join(["curl -s", shlex.quote(url), *_key(keyed), "-H", shlex.quote(JSON), "-d", data])


def _key(keyed: bool) -> list[str]:
    return ['-H "Authorization: Bearer $KEY"'] if keyed else []
