"""The GPUs whose times are predicted: a row each. Rates are what large operations reach, not what data sheets promise.

Memory, bandwidth and the promised rates (dense: half of what those sheets say that count sparse ones; 16-bit floats
accumulated in 32 bits) are those of NVIDIA's data sheets: L4, L40S, A100 40GB SXM4, H100 SXM5, H200 SXM, and B200 in an
HGX B200 (an eighth of the board's); A10G's are those of NVIDIA's sheet for AWS's G5. What is reached is told from
published measurements on H100 and H200, as parts of the promise, and taken over to the other cards: estimates.

- products in bf16: 720 of 989 TFLOP/s; in fp8 1250 of 1979 (FBGEMM's pull request 2764 measures 1160 to 1360 on an
  H100, with a scale for each row, at FLUX.1's sizes); int8 and fp4 like fp8, for want of a measurement
- attention: cuDNN's 600 of 989 on Hopper; FlashAttention 2 on an A100 225 of 312 (its paper), on an H100 370 of 989
  (FlashAttention 3's paper); the memory-efficient kernel half of that, for want of a measurement
- attention in fp8: 870 of 1979, as much more than 600 as NVIDIA publishes of both (973 against 671 TFLOP/s, in the
  documentation of cuDNN's front end, on an H200)
- convolutions: half, for channels are few and pictures large
- generated kernels: 3.5 of an H200's 4.8 TB/s
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

PRODUCTS = {"bfloat16": 0.73, "float16": 0.73, "float8_e4m3fn": 0.63, "int8": 0.63, "float4_e2m1fn_x2": 0.63}
CONVOLUTIONS = 0.5
ATTENTION = {"cudnn": 0.61, "flash": 0.7, "efficient": 0.35}  # of what products in bf16 are promised
FP8_ATTENTION = "cudnn-fp8"  # of what products in fp8 are promised; from Hopper on
ON_HOPPER = {"flash": 0.37, "efficient": 0.18, FP8_ATTENTION: 0.44}
MEMORY = 0.73
LAUNCH_US = 1.0  # between two kernels of compiled code: 1.5 ms in a step of FLUX.1 with its 1,300 launches
EAGER_US = 5.0  # of a CPU, for each operation that is not compiled


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU: compute capability, memory in GB and TB/s, and TFLOP/s promised by type of what is multiplied."""

    name: str
    capability: str
    memory_gb: int
    memory_tb_s: float
    promised: Mapping[str, float]
    attention: Mapping[str, float] = field(default_factory=lambda: ATTENTION)


def _promised(bf16: float, fp8: float = 0, int8: float = 0, fp4: float = 0, fp32: float = 0) -> dict[str, float]:
    rates = {"bfloat16": bf16, "float16": bf16, "float8_e4m3fn": fp8, "int8": int8, "float4_e2m1fn_x2": fp4}
    return {dtype: rate for dtype, rate in {**rates, "float32": fp32}.items() if rate}


HOPPER = _promised(989, 1979, 1979, fp32=67)
HOPPER_ATTENTION = ATTENTION | ON_HOPPER
CARDS = {
    card.name: card
    for card in (
        Card("L4", "8.9", 24, 0.3, _promised(121, 242, 242, fp32=30)),
        Card("A10G", "8.6", 24, 0.6, _promised(70, 0, 140, fp32=35)),
        Card("L40S", "8.9", 48, 0.864, _promised(362, 733, 733, fp32=91)),
        Card("A100-40GB", "8.0", 40, 1.555, _promised(312, 0, 624, fp32=19.5)),
        Card("H100", "9.0", 80, 3.35, HOPPER, HOPPER_ATTENTION),
        Card("H200", "9.0", 141, 4.8, HOPPER, HOPPER_ATTENTION),
        Card("B200", "10.0", 180, 8.0, _promised(2250, 4500, 4500, 9000, fp32=75), HOPPER_ATTENTION),
    )
}
