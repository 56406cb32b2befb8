"""Which dialect each drawing route speaks."""

from types import ModuleType
from typing import Any

from handler.api.dialects import edits, huggingface, native, openai

DIALECTS: dict[str, ModuleType] = {
    "/v1/images/generations": openai,
    "/v1/images/edits": edits,
    "/generate": native,
}
HUB_ROUTE, HUB_MODELS = "/", "/models/"  # Hugging Face's client asks the root, or one model by its name
WORKFLOWS = "/workflows"  # below which each has a name, and answers like our own route; itself for one without


def dialect_of(path: str) -> ModuleType | None:
    """How the bodies of a route are read, if it is one that draws."""
    if path == WORKFLOWS or path.startswith(f"{WORKFLOWS}/"):
        return native
    return huggingface if path == HUB_ROUTE or path.startswith(HUB_MODELS) else DIALECTS.get(path)


def for_model(path: str, payload: Any) -> Any:
    """`payload` with the model that the path names, as Hugging Face's paths do."""
    name = path.removeprefix(HUB_MODELS) if path.startswith(HUB_MODELS) else ""
    return {**payload, "model": name} if name and isinstance(payload, dict) else payload
