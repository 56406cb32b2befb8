"""The kernel of ring attention: one that tells the sums of its softmax, by which parts are added up."""

from handler.catalog.attention import KERNELS, KernelChoice, refusal
from handler.core.errors import SettingsError

RING = "KINDLING_RING_DEGREE"
KINDS = ("cudnn", "flash")  # torch's own choice does not tell them, and diffusers shares no other of ours


def choose(asked: str, capability: tuple[int, int] | None, dtype: str) -> KernelChoice:
    """The one that was asked for, else the first that a GPU of this compute capability (None: a CPU) can use.

    SettingsError, with the reasons, if there is none.
    """
    if capability is None:
        raise SettingsError(f"{RING}: a CPU cannot compute ring attention. Use KINDLING_ULYSSES_DEGREE.", RING)
    if asked not in ("auto", *KINDS):
        can = "auto, cudnn or flash, or KINDLING_ULYSSES_DEGREE in the place of the ring"
        raise SettingsError(f"{RING}: ring attention cannot use KINDLING_ATTENTION={asked}. Use {can}.", RING)
    refused = {name: refusal(KERNELS[name], capability, dtype) for name in KINDS if asked in (name, "auto")}
    if usable := [name for name, why in refused.items() if not why]:
        return KernelChoice(usable[0], "several GPUs draw each picture, by ring attention")
    told = "; ".join(f"{name} {why}" for name, why in refused.items())
    told = f"no kernel here can compute ring attention: {told}. Use KINDLING_ULYSSES_DEGREE"
    raise SettingsError(f"{RING}: {told}.", RING)
