"""Which requests a worker serves at all, whatever its model can draw: by the model's name, by count, by transport."""

from handler.catalog.models import MODES
from handler.catalog.spec import ModelSpec
from handler.core.errors import ModelNotFound, OutOfRange, Unsupported
from handler.core.request import MAX_IMAGES, ImageRequest
from handler.core.settings import Settings
from handler.volume.sources import EMBEDDED

EULER, FLOW = "euler", "flow-match-euler"


def listed(spec: ModelSpec, settings: Settings) -> tuple[str, ...]:
    """The names that `/v1/models` tells: the model's id and repository, and KINDLING_MODEL_NAMES, each once."""
    return tuple(dict.fromkeys((spec.id, spec.repository, *settings.model_names)))


def names(spec: ModelSpec, settings: Settings) -> tuple[str, ...]:
    """Every name that a request may use, whatever its case: those, the model's aliases and its modes."""
    modes = (mode.id for mode in MODES.values() if mode.model == spec.id)
    return tuple(dict.fromkeys((*spec.names, *modes, *settings.model_names)))


def model_path(spec: ModelSpec) -> str:
    """Where SGLang's clients look for what the model is: its repository, or of the embedded model its folder here."""
    return str(EMBEDDED / spec.id) if spec.embedded else spec.repository


def require_name(name: str, spec: ModelSpec, settings: Settings) -> None:
    """ModelNotFound, with what is served, if `name` is none of `names`, nor `model_path`, which clients send again."""
    named = name.isascii() and name.lower() in (known.lower() for known in names(spec, settings))
    if not named and name != model_path(spec):
        told = f"This worker serves {spec.id}, not '{name:.80}'. Leave model out, or send '{spec.id}'"
        raise ModelNotFound(f"{told}; KINDLING_MODEL_NAMES adds names for it.", "model")


def require(request: ImageRequest, spec: ModelSpec, settings: Settings, streams: bool) -> None:
    """Raise why `request` is none for this worker; `streams` says whether events can be sent. No name means it."""
    if request.model:
        require_name(request.model, spec, settings)
    if request.n > settings.max_n:
        more = "" if settings.max_n == MAX_IMAGES else f" KINDLING_MAX_N allows it up to {MAX_IMAGES}."
        raise OutOfRange(f"n: this worker draws at most {settings.max_n} pictures for a request.{more}", "n")
    if not streams and (asked := _streamed(request)):
        raise Unsupported(
            f"{asked} needs a stream of events: over HTTP send stream true, on RunPod set STREAM=1.", asked
        )


def schedulers(names: tuple[str, ...]) -> tuple[str, ...]:
    """What requests may call these schedulers: Euler's steps along a flow, just Euler's too."""
    return (*names, EULER) if FLOW in names and EULER not in names else names


def worded(request: ImageRequest, spec: ModelSpec) -> ImageRequest:
    """`request` as the model's row calls its schedulers."""
    if request.scheduler == EULER and EULER not in spec.schedulers and FLOW in spec.schedulers:
        return request.model_copy(update={"scheduler": FLOW})
    return request


def _streamed(request: ImageRequest) -> str:
    """Which field of `request` only a stream can honour, if any."""
    return next((name for name in ("stream", "partial_images") if getattr(request, name)), "")
