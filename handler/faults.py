"""What an error of torch's means for the caller and for this process."""

import logging
import traceback
from collections.abc import Callable

from handler.discreet import outline
from handler.errors import DeviceLost, Exhausted, Internal, KindlingError, OutOfMemory

NO_MEMORY = ("out of memory", "cublas_status_alloc_failed", "can't allocate memory", "not enough memory")
# Whatever else CUDA reports may have come from an earlier kernel, and most of it stays: no picture can be trusted then.
# "did not finish successfully" is what compiled code says of what CUDA reported to it.
LOST = (
    "cuda error",
    "cuda driver error",
    "_status_execution_failed",
    "_status_internal_error",
    "did not finish successfully",
)
REFUSED = ("_status_not_supported", "_status_invalid_value")  # libraries that did nothing, so nothing is lost
OOMS = 3  # in a row are enough
log = logging.getLogger(__name__)


def meaning(error: RuntimeError, size: tuple[int, int]) -> Exception:
    """The error to raise for one that came while a picture of `size` was drawn; of one of memory nothing is kept."""
    import torch

    said = str(error).lower()
    if isinstance(error, torch.OutOfMemoryError) or any(sign in said for sign in NO_MEMORY):
        let_go(error)
        torch.cuda.empty_cache()
        return OutOfMemory(f"A {size[0]}x{size[1]} picture does not fit in this worker's memory.", "size")
    if any(sign in said for sign in LOST) and not any(sign in said for sign in REFUSED):
        return DeviceLost("The GPU failed; this worker is being replaced. Try again.")
    return error


def let_go(error: BaseException | None) -> None:
    """Forget the way that `error` and its causes came, with all that is in those frames: tensors, pictures, itself."""
    while error:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__context__


class Triage:
    """Tells what a worker's errors are to callers, and to the worker itself: a fatal one is its last.

    A worker that ran out of memory has to prove that it can go on.
    """

    def __init__(self) -> None:
        self._ooms = 0

    def drawn(self) -> None:
        """A picture came out well."""
        self._ooms = 0

    def judge(self, error: Exception, canary: Callable[[], None], *prompts: str) -> KindlingError:
        """The error that the caller gets. `canary` draws a small picture, or raises why it cannot."""
        if isinstance(error, OutOfMemory):
            return self._out_of_memory(error, canary)
        if isinstance(error, KindlingError):
            return error
        log.error("the worker failed on a request\n%s", outline(error, *prompts))
        return Internal("The worker failed on this request; see its log.")

    def _out_of_memory(self, error: OutOfMemory, canary: Callable[[], None]) -> OutOfMemory:
        self._ooms += 1
        if self._ooms >= OOMS:
            log.error("the worker ran out of memory %s times in a row", self._ooms)
            return Exhausted(f"{error.message} This worker is being replaced.", error.param)
        try:
            canary()
        except Exception:
            log.exception("the worker ran out of memory and cannot draw even a small picture now")
            return Exhausted(f"{error.message} This worker is being replaced.", error.param)
        return error
