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
def map_body(context: Any, body: Any) -> Any:
    """Without what is good by itself in a `Sampling`, but not together."""
    sampling = body.get("sampling") if isinstance(body, dict) else None
    if not isinstance(sampling, dict):
        return body
    try:
        Sampling.model_validate(untrusted.parse(json.dumps(sampling), untrusted.number))
    except ValidationError as error:
        if {each["type"] for each in error.errors()} == {"value_error"}:
            kept = {name: value for name, value in sampling.items() if name not in TOGETHER}
            return {**body, "sampling": kept}
    return body


@schemathesis.hook
def filter_body(context: Any, body: Any) -> bool:
    """Edits of so little strength that there is no step to take are refused, and on FLUX.2 large ones with a mask.

    So is a `Sampling` beside what it stands for.
    """
    if not isinstance(body, dict):
        return True
    if body.get("sampling") is not None and any(body.get(name) is not None for name in INSTEAD):
        return False
    strength, steps = (body.get(name) for name in ("strength", "num_inference_steps"))
    if isinstance(strength, int | float) and strength * (steps if isinstance(steps, int | float) else 4) < 1:
        return False
    sides = [body.get("width"), body.get("height"), *str(body.get("size")).split("x")]
    numbers = [float(side) for side in sides if re.fullmatch(r"\d+(\.0)?", str(side))]
    return body.get("mask") is None or max(numbers, default=0) <= 1024
