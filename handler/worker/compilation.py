"""Whether this worker compiles, decided from the seconds that are left.

It degrades first: eager, with the reason told; only past the budget does a start fail.
"""

from dataclasses import dataclass
from typing import Literal

COMPILE_S = 90.0  # regional AOTInductor of FLUX.1 takes ~30 s on an H200 (Hugging Face's ZeroGPU blog); thrice that
MARGIN = 1.5  # how much longer than last time a compilation may take
FIRST_PICTURE_S = 15.0  # kept back for the warm-up picture after it


@dataclass(frozen=True, slots=True)
class Plan:
    """How this worker runs its model; `compiles`: it must compile first, for no artifact fits.

    `failure` says why it cannot be compiled, where that is the reason to be eager.
    """

    mode: Literal["COMPILED", "EAGER"]
    reason: str
    compiles: bool = False
    failure: str = ""


OFF = Plan("EAGER", "KINDLING_COMPILE=off")
STREAMING = Plan("EAGER", "the denoiser's blocks come from host memory, and compiled code wants them to stay in place")


def plan(
    policy: str, device: str, outcome: str, found: str, remaining_s: float, compile_s: float | None, failure: str = ""
) -> Plan:
    """COMPILED or EAGER, and why.

    `policy` is KINDLING_COMPILE, `device` cpu or cuda, `outcome` and `found` what the search for artifacts gave,
    `compile_s` how long compiling took when last measured, in seconds, `failure` why it would fail, if it would.
    """
    if policy == "off":
        return OFF
    if outcome == "HIT":
        return Plan("COMPILED", f"{outcome}: {found}")
    if device == "cpu" and policy == "auto":
        return Plan("EAGER", f"{outcome}: {found}; on a CPU only 'bake' compiles, or KINDLING_COMPILE=on")
    if failure:
        return Plan("EAGER", f"{outcome}: {found}; {failure}", failure=failure)
    known = compile_s or COMPILE_S
    needed = MARGIN * known + FIRST_PICTURE_S
    guess = f"compiling takes about {known:.0f} s ({'measured' if compile_s else 'assumed'})"
    if needed > remaining_s:
        return Plan("EAGER", f"{outcome}: {found}; {guess}, too much for the {remaining_s:.0f} s left")
    return Plan("COMPILED", f"{outcome}: {found}; {guess}, {remaining_s:.0f} s are left", compiles=True)
