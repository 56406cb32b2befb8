"""A request of another dialect that names a workflow as its model: its fields by the workflow's names."""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from handler.api.dialects import edits
from handler.api.dialects.openai import IGNORED
from handler.api.workflows.fields import TRANSPORT, Field, FieldValues, Kind, checked
from handler.core.errors import InvalidValue, UnknownParameter
from handler.core.request import ImageRequest
from handler.core.untrusted import Malformed, number, parse

MODEL = "workflow/"
OURS = {"num_inference_steps": "steps", "guidance_scale": "guidance", "strength": "denoise"}
IDLE = {
    "n": (1,),
    "quality": ("auto", "standard"),
    "loras": ((),),
    "step_cache": ("off",),
}  # values that ask for nothing


def mapped(dialect: ModuleType, fields: Sequence[Field], payload: Mapping[str, Any]) -> FieldValues:
    """What `payload` asks a workflow for. Whatever the dialect does not know may be a field by its own name."""
    names = {field.name for field in fields}
    files = ("image", "images") if dialect is edits else ()
    own = {name for name in names if name not in ImageRequest.model_fields and name not in files}
    given = {name: value for name, value in payload.items() if value is not None}
    rest = {name: value for name, value in given.items() if name not in own and name != "model"}
    request: ImageRequest = dialect.parse(rest)
    kinds = {field.name: field.kind for field in fields}
    values = {name: _typed(kinds[name], value) for name, value in given.items() if name in own}
    values |= _renamed(request, names) | _images(request, fields)
    return FieldValues(checked(fields, values), request, str(payload["model"]))


def _typed(kind: Kind, value: Any) -> Any:
    """A value as its field has it, for a form has only texts; as it is where that fails, so that it is refused."""
    if kind not in ("integer", "number", "boolean") or not isinstance(value, str):
        return value
    try:
        return parse(value.lower(), number)
    except Malformed:
        return value


def _renamed(request: ImageRequest, names: set[str]) -> dict[str, Any]:
    """Those of a request by the workflow's names; UnknownParameter for one that it has no field for."""
    found = dict[str, Any]()
    for name in sorted(request.model_fields_set - {*TRANSPORT, *IGNORED, "model", "images"}):
        value = getattr(request, name)
        called = OURS.get(name, name)
        if called in names:
            found |= {} if value is None else {called: value}  # a seed of -1 says none
        elif value not in IDLE.get(name, (None,)):
            raise UnknownParameter(
                f"This workflow has no field for '{name}'; it has {', '.join(sorted(names)) or 'none'}.", name
            )
    return found


def _images(request: ImageRequest, fields: Sequence[Field]) -> dict[str, Any]:
    """The images in the order of the fields for them."""
    names = [field.name for field in fields if field.kind == "image" and field.name != "mask"]
    if len(request.images) > len(names):
        raise InvalidValue(f"This workflow takes {len(names) or 'no'} images, got {len(request.images)}.", "images")
    return dict(zip(names, request.images, strict=False))
