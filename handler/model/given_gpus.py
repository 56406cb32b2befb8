"""Which GPUs this process was given, and how many, told without torch."""

import contextlib
import os
from itertools import takewhile

from handler.model import hardware

SEEN = "CUDA_VISIBLE_DEVICES"


def named_gpus() -> list[str]:
    """The GPUs, or parts of them, to which whoever began this process has confined it, by number or UUID, if any."""
    words = [one.strip() for one in os.environ.get(SEEN, "").split(",")]
    return [*takewhile(lambda one: one not in hardware.HIDDEN, words)]  # as CUDA reads them


def gpu_count() -> int:
    """How many GPUs this process sees, told without torch; none where they are hidden from it."""
    if not hardware.sees_gpu():
        return 0
    if named := named_gpus():
        return len(named)
    with contextlib.suppress(Exception):
        import pynvml

        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount())
    return max(1, len([*hardware.GPU_DEVICE.parent.glob("nvidia[0-9]*")]))
