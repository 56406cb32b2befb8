"""What schemathesis cannot know from a schema: what is a picture, and what only fits together with something else."""

import base64
import io
import json
import re
from typing import Any

import schemathesis
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from handler.core import untrusted
from handler.core.sampling import Sampling


def picture(form: str) -> bytes:
    """A small file, transparent, so that it is a mask too; all are of one size."""
    out = io.BytesIO()
    Image.new("RGBA", (64, 64), (255, 0, 0, 128)).save(out, form)
    return out.getvalue()


TEXTS = st.sampled_from([base64.b64encode(picture(form)).decode() for form in ("PNG", "WEBP")])
schemathesis.openapi.format("picture", st.one_of(TEXTS, TEXTS.map(lambda text: f"data:image/png;base64,{text}")))


INSTEAD = ("num_inference_steps", "scheduler", "strength", "step_cache", "mask")
TOGETHER = ("steps", "denoise", "start", "end", "sigmas", "batch", "index")


@schemathesis.hook
def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:
    """Of a stream the description has what its events' data say, as clients have it; schemathesis wants the events."""
    for operations in raw_schema["paths"].values():
        for operation in operations.values():
            for answer in operation["responses"].values():
                if event := answer.get("content", {}).get("text/event-stream"):
                    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": event["schema"]}
                    fields = {"event": {"type": "string"}, "data": data}
                    event["schema"] = {"type": "object", "properties": fields, "required": ["data"]}


@schemathesis.hook
def filter_headers(context: Any, headers: Any) -> bool:
    """How a body's length is said is for the server's own parser, which answers before the app does."""
    return not any(name.lower() == "transfer-encoding" for name in headers or ())


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Without what is good by itself in a `Sampling`, but not together."""
    if not contradicts(body):
        return body
    return {**body, "sampling": {name: value for name, value in body["sampling"].items() if name not in TOGETHER}}


def contradicts(body: Any) -> bool:
    """Whether it has such a `Sampling`."""
    sampling = body.get("sampling") if isinstance(body, dict) else None
    if not isinstance(sampling, dict):
        return False
    try:
        Sampling.model_validate(untrusted.parse(json.dumps(sampling), untrusted.number))
    except ValidationError as error:
        return {each["type"] for each in error.errors()} == {"value_error"}
    return False


@schemathesis.hook
def filter_case(context: Any, case: Any) -> bool:
    """The same of cases that bodies were not made for one by one: those at the bounds of each field."""
    return filter_body(context, case.body)


@schemathesis.hook
def filter_body(context: Any, body: Any) -> bool:
    """On FLUX.2 large edits with a mask are refused, and everywhere a `Sampling` beside what it stands for."""
    if not isinstance(body, dict):
        return True
    if contradicts(body):  # where nothing was mapped
        return False
    if body.get("sampling") is not None and any(body.get(name) is not None for name in INSTEAD):
        return False
    sides = [body.get("width"), body.get("height"), *str(body.get("size")).split("x")]
    numbers = [float(side) for side in sides if re.fullmatch(r"\d+(\.0)?", str(side))]
    return body.get("mask") is None or max(numbers, default=0) <= 1024
