"""What an error of torch's means for the caller and for this process."""

from handler.errors import DeviceLost, OutOfMemory

STICKY = ("illegal memory access", "device-side assert", "unspecified launch failure", "ecc error", "launch timed out")


def meaning(error: RuntimeError, size: tuple[int, int]) -> Exception:
    """The error to raise for one that came while a picture of `size` was drawn."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return OutOfMemory(f"A {size[0]}x{size[1]} picture does not fit in this GPU's memory.", "size")
    if any(sign in str(error).lower() for sign in STICKY):
        return DeviceLost("The GPU failed; this worker is being replaced. Try again.")
    return error
