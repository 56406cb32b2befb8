"""Which dialect each drawing route speaks."""

from types import ModuleType
from typing import Any

from handler.api.dialects import edits, fal, huggingface, native, openai
from handler.core.errors import InvalidValue

DIALECTS: dict[str, ModuleType] = {
    "/v1/images/generations": openai,
    "/v1/images/edits": edits,
    "/generate": native,
}
HUB_ROUTE, HUB_MODELS = "/", "/models/"  # Hugging Face's client asks the root, or one model by its name
FAL_MODELS = "/fal/"  # fal's clients ask for an app by its owner and its name
WORKFLOWS = "/workflows"  # below which each has a name, and answers like our own route; itself for one without


def dialect_of(path: str) -> ModuleType | None:
    """How the bodies of a route are read, if it is one that draws."""
    if path == WORKFLOWS or path.startswith(f"{WORKFLOWS}/"):
        return native
    if path.startswith(FAL_MODELS):
        return fal
    return huggingface if path == HUB_ROUTE or path.startswith(HUB_MODELS) else DIALECTS.get(path)


def for_model(path: str, payload: Any) -> Any:
    """`payload` with the model that the path names, as Hugging Face's and fal's paths do; InvalidValue if both do."""
    name = next((path.removeprefix(start) for start in (HUB_MODELS, FAL_MODELS) if path.startswith(start)), "")
    if not name or not isinstance(payload, dict):
        return payload
    if payload.get("model") is not None:
        raise InvalidValue("The path names the model already; leave it out of the body.", "model")
    return {**payload, "model": name}
