"""How many steps a model takes, and which a request may ask for; what `ModelSpec.validate` and its callers ask."""

from typing import Protocol

from handler.core.errors import OutOfRange, Unsupported
from handler.core.request import ImageRequest

FEWEST_TO_SKIP = 20  # steps; models that take fewer are distilled, and each of their steps counts
MOST_STEPS = 50  # of any model


class Ceiling(Protocol):
    """What of a row is asked here."""

    @property
    def id(self) -> str:
        """The model."""

    @property
    def min_steps(self) -> int:
        """Fewest that it takes."""

    @property
    def max_steps(self) -> int:
        """Most that it is made for."""


def most_steps(spec: Ceiling) -> int:
    """How many a request may ask for in ComfyUI's words."""
    return spec.max_steps if spec.max_steps >= FEWEST_TO_SKIP else MOST_STEPS


def check_steps(spec: Ceiling, request: ImageRequest, steps: int) -> None:
    """Raise the error that says why `spec` cannot take `steps` for `request`.

    In ComfyUI's words a distilled model may take more than it was made for, as there.
    """
    if request.sampling is None:
        if not spec.min_steps <= steps <= spec.max_steps:
            takes = f"{spec.min_steps} to {spec.max_steps}" if spec.min_steps > 1 else f"at most {spec.max_steps}"
            raise OutOfRange(f"num_inference_steps: {spec.id} takes {takes}, got {steps}.", "num_inference_steps")
        return
    if steps > (most := most_steps(spec)):
        raise OutOfRange(f"sampling: {spec.id} takes at most {most} steps, got {steps}.", "sampling")
    if request.step_cache not in (None, "off"):
        raise Unsupported("ComfyUI's sampling skips no steps; leave step_cache out.", "step_cache")
