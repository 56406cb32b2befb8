"""What an error that came while a picture was drawn means, for the caller and for this process."""

import logging

from handler.core.errors import DeviceLost, KindlingError, OutOfMemory
from handler.core.tracebacks import causes, let_go

NO_MEMORY = (
    "out of memory",
    "error_out_of_memory",
    "cublas_status_alloc_failed",
    "can't allocate memory",
    "not enough memory",
)
# Whatever else CUDA reports may have come from an earlier kernel, and most of it stays: no picture can be trusted then.
# "did not finish successfully" is what compiled code says of what CUDA reported to it.
LOST = (
    "cuda error",
    "cuda_error_",
    "cuda driver error",
    "triton error [cuda]",
    "_status_execution_failed",
    "_status_internal_error",
    "did not finish successfully",
)
REFUSED = ("_status_not_supported", "_status_invalid_value")  # libraries that did nothing, so nothing is lost
log = logging.getLogger(__name__)


def meaning(error: BaseException, size: tuple[int, int]) -> BaseException:
    """What an error that came while a picture of `size` was drawn means: OutOfMemory, DeviceLost, or itself.

    It may have been caught, and another raised meanwhile. Of one of memory nothing is kept.
    """
    if isinstance(error, DeviceLost | OutOfMemory):
        return error
    kinds = {_kind(each) for each in causes(error)}
    if DeviceLost not in kinds and OutOfMemory not in kinds:
        return error
    if DeviceLost not in kinds:
        let_go(error)
        if give_back():
            return OutOfMemory(f"A {size[0]}x{size[1]} picture does not fit in this worker's memory.", "size")
    lost = DeviceLost("The GPU failed; this worker is being replaced. Try again.")
    lost.__cause__ = error
    return lost


def _kind(error: BaseException) -> type[KindlingError] | None:
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError | OutOfMemory):
        return OutOfMemory
    if isinstance(error, DeviceLost):
        return DeviceLost
    said = str(error).lower() if isinstance(error, RuntimeError) else ""
    if any(sign in said for sign in NO_MEMORY):
        return OutOfMemory
    return DeviceLost if any(sign in said for sign in LOST) and not any(sign in said for sign in REFUSED) else None


def give_back() -> bool:
    """Give memory that nobody uses back to the GPU; False if that does not answer."""
    import torch

    try:
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
