"""The models: one frozen row each, stating only what differs, and the modes that pick a row for you.

Rows name their family's code by string, so this table needs no torch. Steps and guidance of FLUX.1, SD3.5 and SDXL are
RunInfra's published table, all else is as the makers' cards have it, but for two: FLUX.2 [dev]'s calls 28 of its 50
steps a good trade-off, and Qwen-Image's draws 1328x1328, 1.7 times as long. Revisions are the hub's commits. Stable
Diffusion's rows are in `stable_diffusion.py`.
"""

import math
from dataclasses import dataclass

from handler.catalog import licenses
from handler.catalog.parts import Graft, Lexicon, Streams
from handler.catalog.spec import ModelSpec
from handler.catalog.stable_diffusion import STABLE
from handler.core.errors import ModelNotFound
from handler.core.stepcache import StepCache

SPARK = ModelSpec(
    id="spark",
    repository="kindling/spark",
    revision="embedded",
    family="handler.model.families.flux",
    license=licenses.MIT,
    parameters=3_300_000,
    other_parameters=1_550_000,
    work_gb=1.1,
    steps=4,
    max_steps=8,
    size=(256, 256),
    multiple=32,
    text_tokens=32,
    lexicon=Lexicon(
        "shapes, colours, sizes, places and backgrounds",
        ("five", "six", "dark", "light", "behind", "sky", "paper", "wall"),
    ),
    strength=0.75,
    edit_scheduler_config={"shift": 3.0},  # its own 100 keeps hardly anything of an image
    embedded=True,
)
SCHNELL = ModelSpec(
    id="flux-schnell",
    repository="black-forest-labs/FLUX.1-schnell",
    revision="741f7c3ce8b383c54771c7003378a50191e9efe9",
    family="handler.model.families.flux",
    license=licenses.APACHE_GATED,
    parameters=12_000_000_000,
    fp8_source="vllm-project/vllm-omni#2795: LPIPS 0.12, of dev",
    other_parameters=4_970_000_000,
    streams=Streams(4_886_000_000, 193_000_000, 340_000_000),
    steps=4,
    max_steps=4,
    text_tokens=256,
    strength=0.75,  # its levels of noise are even, where others have more high ones
    aliases=("flux.1-schnell",),
)
DEV = ModelSpec(
    id="flux-dev",
    repository="black-forest-labs/FLUX.1-dev",
    revision="3de623fc3c33e44ffbe2bad470d0f45bccf2eb21",
    family="handler.model.families.flux",
    license=licenses.FLUX_1_DEV,
    parameters=12_000_000_000,
    fp8_source="vllm-project/vllm-omni#2795: LPIPS 0.12",
    other_parameters=4_970_000_000,
    streams=Streams(4_886_000_000, 193_000_000, 340_000_000),
    steps=28,
    guidance=3.5,
    schedulers=("flow-match-euler", "dpm++"),
    step_cache=StepCache(),
    step_cache_blocks=57,
    aliases=("flux.1-dev",),
)
FLUX2_DEV = ModelSpec(
    id="flux2-dev",
    repository="black-forest-labs/FLUX.2-dev",
    revision="26afe3a78bb242c0a8bb181dcc8937bb16e5c66c",
    family="handler.model.families.flux2",
    license=licenses.FLUX_2_DEV,
    parameters=32_000_000_000,
    fp8_source="vllm-project/vllm-omni#2913",
    other_parameters=24_100_000_000,
    streams=Streams(24_016_000_000, 671_000_000, 981_000_000, shared=22_230_000_000),
    steps=28,
    guidance=4.0,
    schedulers=("flow-match-euler", "dpm++"),
    max_images=6,
    masked_pixels=0,
    step_cache=StepCache(),
    step_cache_blocks=8,
    aliases=("flux.2-dev",),
)
FLUX2_KLEIN = ModelSpec(
    id="flux2-klein",
    repository="black-forest-labs/FLUX.2-klein-4B",
    revision="e7b7dc27f91deacad38e78976d1f2b499d76a294",
    family="handler.model.families.flux2_klein",
    license=licenses.APACHE,
    parameters=4_000_000_000,
    fp8_source="abhishekchohan/flux2-klein-4b-fp8",
    other_parameters=4_100_000_000,
    streams=Streams(4_016_000_000, 389_000_000, 245_000_000, shared=3_633_000_000),
    steps=4,
    max_steps=4,
    schedulers=("flow-match-euler", "dpm++"),
    max_images=4,
    masked_pixels=1024 * 1024,  # diffusers' pipeline makes larger ones smaller
    aliases=("flux.2-klein-4b",),
)
Z_IMAGE_TURBO = ModelSpec(
    id="z-image-turbo",
    repository="Tongyi-MAI/Z-Image-Turbo",
    revision="f332072aa78be7aecdf3ee76d5c247082da564a6",
    family="handler.model.families.z_image",
    license=licenses.APACHE,
    parameters=6_200_000_000,
    fp8_source="bahadirakdemir/Z-Image-Turbo-FP8-full: PSNR 20.6 dB, SSIM 0.76",
    other_parameters=4_100_000_000,
    streams=Streams(4_016_000_000, 389_000_000, 181_000_000, shared=3_633_000_000),
    steps=8,
    max_steps=8,
)
QWEN_IMAGE = ModelSpec(
    id="qwen-image",
    repository="Qwen/Qwen-Image-2512",
    revision="25468b98e3276ca6700de15c6628e51b7de54a26",
    family="handler.model.families.qwen_image",
    license=licenses.APACHE,
    parameters=20_400_000_000,
    fp8_source="vllm-project/vllm-omni#2795: LPIPS 0.17",
    other_parameters=8_400_000_000,
    streams=Streams(8_273_000_000, 545_000_000, 340_000_000, shared=6_525_000_000),
    steps=50,
    min_steps=2,
    guidance=4.0,
    takes_negative_prompt=True,
    step_cache=StepCache(),
    step_cache_blocks=60,
)
QWEN_IMAGE_LIGHTNING = ModelSpec(
    id="qwen-image-lightning",
    repository="lightx2v/Qwen-Image-2512-Lightning",
    revision="a52649c9d0f6e1a248bff13f0df33bb8a2abdb52",
    family="handler.model.families.qwen_image",
    license=licenses.APACHE,
    parameters=20_400_000_000,
    fp8_source="vllm-project/vllm-omni#2795: LPIPS 0.17, of its base",
    other_parameters=8_400_000_000,
    streams=Streams(8_273_000_000, 545_000_000, 340_000_000, shared=6_525_000_000),
    steps=4,
    max_steps=4,
    scheduler_config={  # a constant shift of 3, as its makers sample it
        "use_dynamic_shifting": True,
        "time_shift_type": "exponential",
        "base_shift": math.log(3),
        "max_shift": math.log(3),
        "shift_terminal": None,
    },
    base=QWEN_IMAGE,
    grafts=(Graft("Qwen-Image-2512-Lightning-4steps-V1.0-bf16.safetensors", "transformer/lora.safetensors"),),
)
CHROMA = ModelSpec(
    id="chroma",
    repository="lodestones/Chroma1-HD",
    revision="0e0c60ece1e82b17cb7f77342d765ba5024c40c0",
    family="handler.model.families.chroma",
    license=licenses.APACHE,
    parameters=8_900_000_000,
    fp8_source="Clybius/Chroma-fp8-scaled",
    other_parameters=4_850_000_000,
    streams=Streams(4_766_000_000, 193_000_000, 226_000_000),
    steps=40,
    guidance=3.0,
    strength=0.75,  # as in flux-schnell
    takes_negative_prompt=True,
    step_cache=StepCache(),
    step_cache_blocks=19,
)
NEWER = (FLUX2_DEV, FLUX2_KLEIN, Z_IMAGE_TURBO, QWEN_IMAGE, QWEN_IMAGE_LIGHTNING, CHROMA)
MODELS = {spec.id: spec for spec in (SPARK, SCHNELL, DEV, *STABLE, *NEWER)}


@dataclass(frozen=True, slots=True)
class Mode:
    """A choice of model and settings under a plain word."""

    id: str
    model: str
    promise: str


MODES = {
    mode.id: mode
    for mode in (
        Mode("realtime", "flux-schnell", "as fast as may be: 4 steps, distilled"),
        Mode("quality", "flux-dev", "as good as may be: full step count and guidance"),
    )
}


def find(name: str) -> ModelSpec:
    """The row for a model id, alias, repository or mode, ignoring case; ModelNotFound otherwise."""
    wanted = MODES[name.lower()].model if name.lower() in MODES else name
    for spec in MODELS.values():
        if wanted.lower() in (known.lower() for known in spec.names):
            return spec
    raise ModelNotFound(f"There is no model '{name:.80}'. Known: {', '.join([*MODELS, *MODES])}.", "model")
