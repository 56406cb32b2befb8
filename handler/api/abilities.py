"""What requests may ask of the served model, field by field: within which bounds, and why not, in the API's own words.

It is found by asking: each field that a model may refuse is tried, so that this never says another thing than drawing.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, get_args

from handler.api import served
from handler.catalog.ceilings import FEWEST_TO_SKIP
from handler.catalog.models import MODES
from handler.catalog.spec import ModelSpec
from handler.core import quality
from handler.core.errors import RequestError
from handler.core.quality import Quality
from handler.core.request import MAX_SIDE, MIN_SIDE, Format, ImageRequest
from handler.core.settings import Settings

Ability = dict[str, Any]
IMAGE = {"images": (b"",)}
TRIED: Mapping[str, Mapping[str, Any]] = {  # what asks for no more than this one field
    "guidance_scale": {"guidance_scale": 2.0},
    "negative_prompt": {"negative_prompt": "x"},
    "step_cache": {"step_cache": "on"},
    "images": IMAGE,
    "mask": {**IMAGE, "mask": b""},
    "strength": {**IMAGE, "strength": 0.5},
}
GUIDED = {"guidance_scale": 2.0}  # through which a negative prompt works


def told(spec: ModelSpec, settings: Settings) -> dict[str, Any]:
    """The model's id, licence and modes, and the fields that it honours or refuses."""
    return {
        "model": spec.id,
        "embedded": spec.embedded,
        "license": {name: value for name, value in asdict(spec.license).items() if name != "gated"},
        "modes": modes(spec),
        "fields": fields(spec, settings),
    }


def modes(spec: ModelSpec) -> list[dict[str, Any]]:
    """The modes, each as the word for `quality` that comes closest to it on this model, and its steps.

    A distilled model is made to be fast: its usual steps are realtime. Of any other they are quality.
    """
    distilled = spec.max_steps < FEWEST_TO_SKIP
    words: dict[str, Quality] = {"realtime": "auto" if distilled else "low", "quality": "max" if distilled else "auto"}
    found: list[dict[str, Any]] = []
    for mode in MODES.values():
        steps = quality.steps(words[mode.id], spec.steps, spec.min_steps, spec.max_steps)
        row = {"id": mode.id, "quality": words[mode.id], "steps": steps}
        alike = f"{spec.id} draws every picture in {steps} steps; {mode.model} is made for this mode."
        found.append(row | ({"refused": alike} if any(steps == other["steps"] for other in found) else {}))
    return found


def fields(spec: ModelSpec, settings: Settings) -> dict[str, Ability]:
    """Those of `ImageRequest` that differ from model to model."""
    side = {"minimum": MIN_SIDE, "maximum": MAX_SIDE}
    found: dict[str, Ability] = {
        "n": {"minimum": 1, "maximum": settings.max_n, "default": 1},
        "width": {**side, "default": spec.size[0], "multiple": spec.multiple},
        "height": {**side, "default": spec.size[1], "multiple": spec.multiple},
        "num_inference_steps": {"minimum": spec.min_steps, "maximum": spec.max_steps, "default": spec.steps},
        "guidance_scale": {"minimum": 0, "maximum": 20, "default": spec.guidance},
        "scheduler": {"values": list(spec.schedulers)},
        "images": {"minimum": 0, "maximum": spec.max_images or 1},
        "strength": {"maximum": 1, "default": spec.strength},
        "output_format": {"values": list(get_args(Format))},
    }
    for name, asked in TRIED.items():
        guided = GUIDED if name == "negative_prompt" and spec.takes_guidance else {}
        why = refusal(spec, settings, {**asked, **guided})
        refused: Ability = {"refused": why} if why else {}
        found[name] = found.get(name, {}) | refused
    return found


def refusal(spec: ModelSpec, settings: Settings, asked: Mapping[str, Any]) -> str:
    """What a request for `asked` would be refused with; empty if it would be drawn."""
    try:
        spec.validate(ImageRequest(prompt="", **asked), settings.step_cache)
    except RequestError as error:
        return error.message
    return ""


def model(name: str, spec: ModelSpec, settings: Settings) -> dict[str, Any]:
    """`told`, if `name` is one of the served model; ModelNotFound if not."""
    served.require_name(name, spec, settings)
    return told(spec, settings)
