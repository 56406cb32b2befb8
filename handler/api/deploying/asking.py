"""Deployments for who asks over HTTP: what can be chosen, and what one choice comes to. Texts in, JSON out."""

from collections.abc import Mapping
from typing import Any

from handler.api.deploying.deployment import OPTIONS, choice_of, deployment, expected, told
from handler.api.deploying.platforms import PLATFORMS, Platform
from handler.catalog.elsewhere import rentals_on
from handler.catalog.models import MODELS
from handler.catalog.precisions import PRECISIONS
from handler.core.errors import InvalidType, OutOfRange, RouteNotFound, StartError, UnknownParameter
from handler.core.settings import Settings

ROUTE = "/v1/deployments"
COUNTS = ("min", "max")
FIELDS = ("model", *OPTIONS)
WORDS = ("auto", *PRECISIONS)
PARAMS = {"KINDLING_PRECISION": "precision", "CUDA": "cuda"}


def choices() -> dict[str, Any]:
    """The platforms with their GPUs, the models and the precisions, for a form."""
    return {
        "platforms": [_platform(name, row) for name, row in PLATFORMS.items()],
        "models": [
            {"id": spec.id, "license": spec.license.name, "obligation": spec.license.obligation}
            for spec in MODELS.values()
        ],
        "precisions": [{"id": "auto", "meaning": "the best for model and GPU"}]
        + [{"id": row.id, "meaning": row.meaning} for row in PRECISIONS.values()],
    }


def _platform(name: str, row: Platform) -> dict[str, Any]:
    gpus = [
        {"id": gpu.id, "memory_gb": gpu.memory_gb, "dollars_per_s": rental.dollars_per_s}
        for gpu, rental in rentals_on(name)
        if rental.names
    ]
    return {"id": name, "gpus": gpus, "least": row.least, "one_region": row.one_region, "lacks": dict(row.lacks)}


def asked(name: str, fields: Mapping[str, str], here: Settings) -> dict[str, Any]:
    """What deploys the choice that `fields` make of the platform `name`, with what to expect of it.

    `here` is the worker that is asked: its model counts where none is named, and what its volume knows. A RequestError
    says what cannot work, in the words of the command line.
    """
    if name not in PLATFORMS:
        raise RouteNotFound(f"There is no platform {name[:40]!r}. Known: {', '.join(PLATFORMS)}.")
    for unknown in (field for field in fields if field not in FIELDS):
        raise UnknownParameter(f"There is no field {unknown[:40]!r}. Known: {', '.join(FIELDS)}.", unknown[:40])
    options: dict[str, Any] = {**fields} | {
        count: _count(count, fields[count]) for count in COUNTS if fields.get(count)
    }
    if (precision := fields.get("precision") or "auto") not in WORDS:
        raise OutOfRange(f"precision should be one of {', '.join(WORDS)}.", "precision")
    try:
        choice = choice_of(name, fields.get("model") or here.model, options | {"precision": precision})
    except StartError as error:  # of a worker that is yet to be, not of this one
        raise OutOfRange(error.message, _blamed(error, fields)) from None
    return told(choice, expected(choice, here), deployment(choice))


def _blamed(error: StartError, fields: Mapping[str, str]) -> str:
    """The field that it is about: the one it names, if that was sent, else the GPU, else the model."""
    named = PARAMS.get(error.param or "", error.param or "")
    return next((name for name in (named, "gpu") if fields.get(name)), "model")


def _count(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise InvalidType(f"{name} should be a whole number of up to nine digits, such as 1.", name)
    return int(text)
