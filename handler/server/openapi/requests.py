"""JSON Schemas of what comes in, for one served model.

They are as strict as `ModelSpec.validate`: what fits is drawn. But for what no schema can tell: whether a file is a
whole image, a mask that draws anything anew, the parts of a `Sampling` in order, what that is sent instead of (more
than schemathesis can follow), and what a workflow takes that is named as the model (its own operation says that).
"""

from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel

from handler.api import served
from handler.api.dialects import aliases
from handler.api.dialects.openai import ACCEPTED, IGNORED, SIDES
from handler.catalog.ceilings import most_steps
from handler.catalog.spec import ModelSpec
from handler.core.loras import HEAVIEST
from handler.core.loras import MOST as MOST_LORAS
from handler.core.reading import Reading
from handler.core.request import Format, ImageRequest
from handler.core.sampling import Sampling
from handler.core.settings import Settings
from handler.core.stepcache import BOUNDS
from handler.server.openapi import fal
from handler.server.openapi.jobs import fields as later_fields
from handler.server.openapi.named import optional, worded
from handler.server.openapi.schema import COUNT, NULL, NUMBER, TEXT, Schema, array, closed, ref
from handler.volume.adapters import names

SIDE = "(6[4-9]|[7-9][0-9]|[1-9][0-9]{2}|1[0-9]{3}|20[0-3][0-9]|204[0-8])"  # MIN_SIDE to MAX_SIDE
SIZE: Schema = {
    **TEXT, "pattern": f"^(auto|{SIDE}[xX*]{SIDE})$", "default": "auto", "description": "WIDTHxHEIGHT."
}  # fmt: skip
BY_URL = "ImageByUrl"
FILE = TEXT | {"format": "picture", "description": "An image file as a data URL or in base64."}
PART = TEXT | {"format": "binary"}
ACCEPTED_TEXT = TEXT | {"description": "Accepted; changes nothing here."}
EXAMPLE = {"examples": [{"prompt": "a red circle on a blue background"}]}
OTHERS = EXAMPLE | {"description": aliases.told()}
SOME: Schema = {"type": "array", "minItems": 1}
SENT: Schema = {"not": NULL}


def requests(spec: ModelSpec, settings: Settings, models: Sequence[str]) -> dict[str, Schema]:
    """The components that bodies are described by; `models` are all that a body may name."""
    native = fields(spec, settings)
    sides = {side: {name: native[side][name] for name in native[side] if name != "default"} for side in SIDES}
    native |= later_fields(settings)
    openai = native | sides | {"size": SIZE}
    openai |= {name: {"enum": list(values), "default": values[0]} for name, values in ACCEPTED.items()}
    openai |= dict.fromkeys(IGNORED, ACCEPTED_TEXT)
    rules, images = _rules(spec), _image_rules(spec)
    bodies = {
        "GenerationRequest": closed(nullable(openai), ("prompt",), [*rules, *images, SIZED]) | EXAMPLE,
        "NativeRequest": closed(nullable(native), ("prompt",), [*rules, *images, TOGETHER]) | OTHERS,
        "FalRequest": fal.request(nullable(native), [*rules, *images, TOGETHER], OTHERS),
        "HubRequest": _hub(native, rules),
        "EditRequest": closed(nullable(_edit(openai, spec)), ("prompt",), [*rules, SIZED, ONE_WAY]),
        "EditForm": closed(_edit_form(openai, spec), ("image", "prompt"), [*rules, SIZED]),
    }
    inputs = {"SamplingInput": _sampling(spec), "ReadingInput": _object(Reading)}
    shapes = {BY_URL: closed({"image_url": FILE}, ("image_url",), []), "ModelName": {"enum": [*models, ""]}, **inputs}
    return {name: worded(schema) for name, schema in (bodies | shapes).items()}


HUB = ("negative_prompt", *SIDES, "num_inference_steps", "guidance_scale", "scheduler", "seed")


def _hub(native: dict[str, Schema], rules: list[Schema]) -> Schema:
    """Hugging Face's."""
    parameters = closed(nullable({name: native[name] for name in HUB}, ()), (), [])
    kept: Schema = {"properties": {"parameters": {"anyOf": [{"allOf": [*rules, TOGETHER]}, NULL]}}}
    told = {
        "description": "All that /generate takes beside the prompt, but for more pictures and for what makes it a job."
    }
    options = {"type": ["object", "null"], "description": "Of Hugging Face's own servers; changes nothing here."}
    fields = {"inputs": native["prompt"], "parameters": {"anyOf": [parameters, NULL]} | told, "options": options}
    return closed(fields, ("inputs",), [kept]) | {"examples": [{"inputs": "a red circle on a blue background"}]}


def fields(spec: ModelSpec, settings: Settings) -> dict[str, Schema]:
    """`ImageRequest`'s, narrowed to what this model takes."""
    narrowed: dict[str, Schema] = {
        "n": {"maximum": settings.max_n},
        "width": {"default": spec.size[0], "description": "Pixels."},
        "height": {"default": spec.size[1], "description": "Pixels."},
        "num_inference_steps": {"minimum": spec.min_steps, "maximum": spec.max_steps, "default": spec.steps},
        "guidance_scale": {"default": spec.guidance} | ({} if spec.takes_guidance else {"maximum": 1, "multipleOf": 1}),
        "scheduler": {"enum": list(served.schedulers(spec.schedulers)), "default": spec.schedulers[0]},
        "negative_prompt": {} if spec.takes_negative_prompt else {"maxLength": 0},
        "images": {"items": FILE, "maxItems": spec.max_images or 1},
        "mask": TEXT | {"format": "picture"},
        "long_prompts": {} if spec.reads_chunks else {"enum": ["cut", "refuse"]},
        "step_cache": _step_cache(spec, settings),
        "loras": _loras(names(settings.volume)),
        "output_format": {"enum": [*get_args(Format), "jpg"]},
    }
    whole = ImageRequest.model_json_schema()["properties"]
    found = {name: plain(schema) | narrowed.get(name, {}) for name, schema in whole.items()}
    own = {"model": ref("ModelName"), "sampling": ref("SamplingInput"), "reading": ref("ReadingInput")}
    found |= {name: schema | {"description": found[name]["description"]} for name, schema in own.items()}
    return found if spec.masked_pixels else {name: found[name] for name in found if name not in MASKING}


def plain(schema: Schema) -> Schema:
    """Without pydantic's titles, and without its null, which `nullable` brings for all."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != NULL]
    kept = {name: value for name, value in schema.items() if name not in ("anyOf", "title") and value is not None}
    return {**kinds[0], **kept} if len(kinds) == 1 else kept


def _object(kind: type[BaseModel]) -> Schema:
    """A model of pydantic's as one schema, without titles."""
    schema = kind.model_json_schema()
    found: Schema = _within(schema, schema.pop("$defs", {}))
    return found


def _within(schema: Any, known: Schema) -> Any:
    if isinstance(schema, list):
        return [_within(each, known) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _within(known[schema["$ref"].rpartition("/")[2]], known)
    return {name: _within(each, known) for name, each in schema.items() if name != "title"}


def _sampling(spec: ModelSpec) -> Schema:
    found, most = _object(Sampling), most_steps(spec)
    fields = found["properties"]
    fields["steps"] |= {"maximum": most, "default": min(most, fields["steps"]["default"])}
    fields["start"] |= {"maximum": most - 1}
    fields["sigmas"] |= {"maxItems": most + 1}
    return found


def _step_cache(spec: ModelSpec, settings: Settings) -> Schema:
    if spec.step_cache is None or settings.step_cache == "off":
        return {"enum": ["off"]}
    bounds = {
        name: {"type": "number" if name == "R" else "integer", "minimum": low, "maximum": high}
        for name, (low, high) in BOUNDS.items()
    }
    names = "|".join(BOUNDS)
    spelled = TEXT | {"pattern": rf"^(off|on|(({names})=[0-9.]+)(,({names})=[0-9.]+)*)$"}
    values = {"type": "object", "properties": bounds, "additionalProperties": False}
    return {"anyOf": [spelled, values]}


def _loras(known: list[str]) -> Schema:
    """Those on the volume now, as objects; texts such as `NAME:0.8` are taken too."""
    if not known:
        return array(TEXT, maxItems=0)
    weight = NUMBER | {"minimum": -HEAVIEST, "maximum": HEAVIEST, "default": 1}
    clip = weight | {"type": ["number", "null"], "default": None, "description": "In text encoders; null: as weight."}
    fields: dict[str, Schema] = {"name": {"enum": known}, "weight": weight, "clip_weight": clip}
    one = {"type": "object", "properties": fields, "required": ["name"], "additionalProperties": False}
    return array({"anyOf": [{"enum": known}, one]}, maxItems=MOST_LORAS)


def _edit(openai: dict[str, Schema], spec: ModelSpec) -> dict[str, Schema]:
    """OpenAI's edits as JSON."""
    one = {"anyOf": [FILE, ref(BY_URL)]}
    several = {"anyOf": [FILE, ref(BY_URL), array(one, minItems=1, maxItems=spec.max_images or 1)]}
    masked = {"mask": one | {"description": openai["mask"]["description"]}} if "mask" in openai else {}
    return openai | {"image": several, "images": several, "input_fidelity": ACCEPTED_TEXT} | masked | _started(spec)


MASKING = ("mask", "mask_form", "strength")
NO_FORM = ("images", "sampling", "reading")  # a form has texts and files


def _edit_form(openai: dict[str, Schema], spec: ModelSpec) -> dict[str, Schema]:
    """The same as a form, which has files for images and no null."""
    fields = {name: schema for name, schema in openai.items() if name not in NO_FORM}
    fields["loras"] = TEXT | {"description": "LoRAs on the worker's volume, such as NAME:0.8,NAME:0.5."}
    image = array(
        PART, minItems=1, maxItems=spec.max_images or 1, description="Image files; also as image[], image[0] or images."
    )
    masked = {"mask": PART | {"description": openai["mask"]["description"]}} if "mask" in openai else {}
    return fields | {"image": image, "input_fidelity": ACCEPTED_TEXT} | masked | _started(spec)


def _started(spec: ModelSpec) -> dict[str, Schema]:
    """The scheduler of an edit that starts from the image."""
    return {} if spec.max_images else {"scheduler": {"enum": list(served.schedulers(spec.edit_schedulers))}}


def nullable(fields: dict[str, Schema], required: Sequence[str] = ("prompt",)) -> dict[str, Schema]:
    """Null counts as not sent."""
    found = {}
    for field, schema in fields.items():
        shared = {name: schema[name] for name in ("default", "description") if name in schema}
        kind = {name: value for name, value in schema.items() if name not in shared}
        found[field] = schema if field in required else optional(kind) | shared
    return found


def _if(field: str, *idle: Any, needed: Schema | None = None, allowed: Schema | None = None) -> Schema:
    """Where `field` is sent, and is more than `idle`, others are needed, or, if they are sent, `allowed` only so."""
    others = {name: {"anyOf": [schema, NULL]} for name, schema in (allowed or {}).items()}
    idly = {"properties": {field: {"enum": [*idle, None]}}}
    return {"anyOf": [idly, {"properties": {**(needed or {}), **others}, "required": list(needed or {})}]}


def _together(**others: Schema) -> Schema:
    """Width and height are sent together, and then others, if they are sent, only so."""
    both = {"width": COUNT, "height": COUNT, **others}
    return {
        "anyOf": [
            {"properties": both, "required": ["width", "height"]},
            {"properties": {"width": NULL, "height": NULL}},
        ]
    }


TOGETHER = _together()
SIZED = _together(size={"enum": ["auto", None]})  # one rule, for schemathesis multiplies the ways out of each
ONE_WAY: Schema = {
    "anyOf": [
        {"properties": {"image": SENT, "images": NULL}, "required": ["image"]},
        {"properties": {"images": SENT, "image": NULL}, "required": ["images"]},
    ]
}


ANSWERED = [  # what fields ask of one another that say how an answer comes
    _if("output_compression", 100, needed={"output_format": {"enum": ["jpeg", "jpg", "webp"]}}),
    _if("partial_images", 0, needed={"stream": {"enum": [True]}}, allowed={"n": {"enum": [1]}}),
]


def _rules(spec: ModelSpec) -> list[Schema]:
    """What fields ask of one another, whatever the route."""
    rules = [*ANSWERED]
    guided = {"guidance_scale": NUMBER | {"exclusiveMinimum": 1}}
    if spec.takes_negative_prompt and spec.guidance > 1:
        rules.append(_if("negative_prompt", "", allowed=guided))
    elif spec.takes_negative_prompt:
        rules.append(_if("negative_prompt", "", needed=guided))
    if spec.max_images and spec.masked_pixels:  # it works from whole images, unless there is a mask
        masked = {"mask": SENT, "scheduler": {"enum": [*served.schedulers(spec.edit_schedulers), None]}}
        whole = {"properties": {"strength": NULL, "mask": NULL}}
        rules.append({"anyOf": [whole, {"properties": masked, "required": ["mask"]}]})
    return rules


def _image_rules(spec: ModelSpec) -> list[Schema]:
    """Where images may be left out."""
    none: Schema = {"images": {"enum": [[], None]}} | dict.fromkeys(("mask", "strength"), NULL)
    free = spec.max_images or spec.edit_schedulers == spec.schedulers
    some = {"images": SOME} | (
        {} if free else {"scheduler": {"enum": [*served.schedulers(spec.edit_schedulers), None]}}
    )
    rule = {"anyOf": [{"properties": none}, {"properties": some, "required": ["images"]}]}
    return [rule] if spec.masked_pixels or not spec.max_images else []
