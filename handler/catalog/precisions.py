"""The precisions: one row each, with what a GPU must be to use it. What computes in them is `quant.py`."""

from collections.abc import Mapping
from dataclasses import dataclass

from handler.core.errors import SettingsError

AMPERE_FP8 = "FP8 arithmetic needs compute capability 8.9 (Ada) or 9.0 (Hopper); {name} has {has}"
ROUNDED_BY = "torchao 0.18.0"  # other weights than these may be other numbers, and are not used for them
SCHEME = "1"  # likewise: change it with which layers are rounded, or how what they become is laid out
KEPT = ("norm", "mod")  # in the names of layers of a denoiser that stay as they are
TIED = ("lm_head",)  # a text encoder's layer that is its embeddings again, and is not run
BLACKWELL = "matrix products with a scale for each block need compute capability 10.0 (Blackwell); {name} has {has}"


@dataclass(frozen=True, slots=True)
class Precision:
    """How weights are kept and multiplied. `width` is bytes a parameter takes, over a whole model of the catalogue.

    `rounded` is bytes a parameter of a rounded layer takes, with a block's scales; a row's come to that. Both sides of
    its matrix are multiples of `grid`, for the GPU's kernels or for whole blocks. `encoders` is what text encoders are
    rounded to, if that is another. `label` is what a chip says.

    `activations` is what a picture is computed in on a GPU; a CPU computes in float32 where that is not the point.
    `products` is torch's name of what a GPU multiplies where that is not the activations themselves.
    """

    id: str
    width: float
    meaning: str
    label: str
    activations: str = "bfloat16"
    on_cpu: str = "float32"
    products: str = ""
    quantised: bool = False
    rounded: float = 1
    grid: int = 16
    encoders: str = ""
    capability: tuple[int, int] = (0, 0)
    lacking: str = ""  # why a GPU of less cannot, with {name} and {has}
    emulated: bool = False  # on a CPU: right, but slower than what is exact


PRECISIONS: Mapping[str, Precision] = {
    row.id: row
    for row in (
        Precision("fp32", 4, "32-bit floats: exact", "FP32", activations="float32"),
        Precision("bf16", 2, "16-bit floats with fp32's range", "BF16", on_cpu="bfloat16"),
        Precision("fp16", 2, "16-bit floats with a smaller range", "FP16", activations="float16", on_cpu="float16"),
        Precision(
            "fp8",
            1.3,
            "8-bit floats, weights and activations, a scale for each row",
            "FP8 dynamic",
            products="float8_e4m3fn",
            quantised=True,
            capability=(8, 9),
            lacking=AMPERE_FP8,
        ),
        Precision(
            "fp8-tensor",
            1.3,
            "8-bit floats, weights and activations, a scale for each weight and each picture",
            "FP8 dynamic, one scale",
            products="float8_e4m3fn",
            quantised=True,
            capability=(8, 9),
            lacking=AMPERE_FP8,
        ),
        Precision("int8", 1.3, "8-bit integers for weights, a scale for each row", "INT8 weights", quantised=True),
        Precision(
            "int8-dynamic",
            1.3,
            "8-bit integers, weights and activations, a scale for each row",
            "INT8 dynamic",
            products="int8",
            quantised=True,
            capability=(8, 0),
            lacking="fast INT8 matrix products need compute capability 8.0 (Ampere); {name} has {has}",
        ),
        Precision(
            "mxfp8",
            1.3,
            "8-bit floats, weights and activations, a power of two for each 32",
            "MXFP8 dynamic",
            products="float8_e4m3fn",
            quantised=True,
            rounded=1 + 1 / 32,
            grid=32,
            encoders="fp8",
            capability=(10, 0),
            lacking=BLACKWELL,
            emulated=True,
        ),
        Precision(
            "nvfp4",
            1.0,
            "4-bit floats, weights and activations, an 8-bit float for each 16",
            "NVFP4 dynamic",
            products="float4_e2m1fn_x2",
            quantised=True,
            rounded=1 / 2 + 1 / 16,
            grid=32,
            encoders="fp8",
            capability=(10, 0),
            lacking=BLACKWELL,
            emulated=True,
        ),
    )
}


def choose(asked: str, device: str, name: str = "", capability: tuple[int, int] | None = None) -> tuple[str, str]:
    """The precision and why; SettingsError, with the reason, for one this GPU cannot compute in.

    `capability` is the GPU's compute capability, None where that is not known yet.
    """
    if asked == "auto":
        if device == "cuda":
            return "bf16", "a GPU: bf16 halves the bytes and keeps fp32's range"
        return "fp32", "a CPU: fp32 is exact and no slower"
    if reason := refusal(PRECISIONS[asked], device, name, capability):
        raise SettingsError(f"KINDLING_PRECISION={asked}: {reason}. Use auto, or int8.", "KINDLING_PRECISION")
    return asked, f"KINDLING_PRECISION={asked}"


def refusal(row: Precision, device: str, name: str, capability: tuple[int, int] | None) -> str:
    """Why this device cannot compute so; empty if it can."""
    if device == "cpu" or capability is None or capability >= row.capability:
        return ""
    return row.lacking.format(name=name, has="{}.{}".format(*capability))
