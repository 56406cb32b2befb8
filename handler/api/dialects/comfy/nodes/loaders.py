"""Checkpoints, diffusion models, text encoders, autoencoders, LoRAs, and what is set on them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from handler.api.dialects.comfy import files as names
from handler.api.dialects.comfy.node import CLIP, FLAG, MODEL, At, Node, choice, files, maybe, number, rows, whole
from handler.api.dialects.comfy.values import Clip, Loras, Model, Vae
from handler.core.loras import HEAVIEST

WITHOUT_CLIP = ("flux2", "flux2_klein", "z_image", "qwen_image")
MOST = 32  # LoRAs in a row of loaders, those of no weight included


def checkpoint(at: At, ckpt_name: str, **_: Any) -> tuple[Model, Clip, Vae]:
    """All three of one model."""
    row = names.model(at, ckpt_name, "checkpoints")
    return Model(row), Clip(row), Vae(row)


def unet(at: At, unet_name: str, weight_dtype: str = "default") -> Model:
    """The model alone. Its precision is the worker's."""
    if weight_dtype != "default":
        at.note(f"weight_dtype {weight_dtype} changes nothing: how weights are kept is KINDLING_PRECISION.")
    return Model(names.model(at, unet_name, "diffusion_models"))


def text_encoders(at: At, **given: Any) -> Clip:
    """Those of the served model, whatever order their files are named in."""
    for field, name in given.items():
        if field.startswith("clip_name"):
            names.part(at, name, "text_encoders", field)
    return Clip(at.served.spec)


def autoencoder(at: At, vae_name: str) -> Vae:
    """The served model's."""
    names.part(at, vae_name, "vae", "vae_name")
    return Vae(at.served.spec)


def lora(at: At, model: Model, clip: Clip, lora_name: str, strength_model: float, strength_clip: float) -> Any:
    """One more LoRA, on both."""
    name = names.lora(at, lora_name) if strength_model or strength_clip else ""
    return (
        replace(model, loras=added(at, model.loras, name, strength_model)),
        replace(clip, loras=added(at, clip.loras, name, strength_clip)),
    )


def lora_of_model(at: At, model: Model, lora_name: str, strength_model: float) -> Model:
    """One more LoRA, on the model alone."""
    name = names.lora(at, lora_name) if strength_model else ""
    return replace(model, loras=added(at, model.loras, name, strength_model))


def added(at: At, loras: Loras, name: str, weight: float) -> Loras:
    """`loras` with one more, if its weight is not 0."""
    if abs(weight) > HEAVIEST:
        at.refuse(f"a LoRA's strength of {weight:g} is too much; at most {HEAVIEST:g} either way.", "strength_model")
    if len(loras) >= MOST:
        at.refuse("there are too many LoRAs in a row.", "lora_name")
    return (*loras, (name, weight)) if name and weight else loras


def power_loras(at: At, model: Model, clip: Clip | None, rest: Mapping[str, Any]) -> Any:
    """rgthree's: `lora_1` and so on are objects with on, lora, strength and, maybe, strengthTwo."""
    clip = clip or Clip(model.spec)
    for field, one in rest.items():
        if not field.lower().startswith("lora_") or not isinstance(one, dict) or not one.get("on"):
            continue
        if one.get("lora") in (None, "", "None"):  # a slot where none was chosen
            continue
        weight, second = one.get("strength", 1.0), one.get("strengthTwo")
        second = weight if second is None else second
        if not all(isinstance(each, int | float) for each in (weight, second)):
            at.refuse("a LoRA's strength should be a number.", field)
        model, clip = lora(at, model, clip, str(one.get("lora")), weight, second)
    return model, clip


def padded(at: At, clip: Clip, min_padding: int, min_length: int) -> Clip:
    """T5TokenizerOptions."""
    at.note("T5's prompts are padded as the model learnt it; min_padding and min_length change nothing.")
    return clip


def flow_shift(at: At, model: Model, shift: float, shift_type: str = "linear") -> Model:
    """ModelSamplingAuraFlow and ModelSamplingSD3."""
    if "flow-match-euler" not in model.spec.schedulers:
        at.refuse(f"{model.spec.id} is no flow, which alone can be shifted; leave the node out.", "model")
    if shift <= 0:
        at.refuse("a shift should be above 0.", "shift")
    return replace(model, shift=shift, shift_type=shift_type)


def flux_shift(at: At, model: Model, max_shift: float, base_shift: float, width: int, height: int) -> Model:
    """By size, linear in the number of tokens between 256 and 4096, as ModelSamplingFlux has it."""
    slope = (max_shift - base_shift) / (4096 - 256)
    return flow_shift(at, model, (width * height / 256 - 256) * slope + base_shift, "exponential")


def discrete(at: At, model: Model, sampling: str, zsnr: bool) -> Model:
    """The model's own kind of prediction passes."""
    own = {"eps", "lcm"} if "flow-match-euler" not in model.spec.schedulers else set()
    if sampling not in own or zsnr:
        at.refuse(f"{model.spec.id} keeps its own kind of prediction; leave the node out.", "sampling")
    if sampling == "lcm":
        at.note("the lcm sampling's skipped timesteps are not kept apart; with the sampler lcm they hardly differ.")
    return model


def clip_skip(at: At, clip: Clip, stop_at_clip_layer: int) -> Clip:
    """The layer of CLIP to stop at."""
    if clip.spec.family.rpartition(".")[2] in WITHOUT_CLIP:
        if stop_at_clip_layer == -1:
            return clip
        at.refuse(f"{clip.spec.id} has no CLIP whose last layer could be set; leave the node out.", "clip")
    return replace(clip, skip=stop_at_clip_layer)


def same_model(at: At, model: Model, **_: Any) -> Model:
    """A patch that only makes it faster, or changes little."""
    at.note("it only changes how fast a picture comes, or what KINDLING_* settings decide here, and is left out.")
    return model


CKPT = files("checkpoints")
WEIGHT_DTYPE = choice("default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2")
ENCODER, DEVICE = files("text_encoders"), maybe(choice("default", "cpu"))
SINGLE = (
    *("stable_diffusion", "stable_cascade", "sd3", "stable_audio", "mochi", "ltxv", "pixart", "cosmos", "lumina2"),
    *("wan", "hidream", "chroma", "ace", "omnigen2", "qwen_image", "hunyuan_image", "flux2", "ovis", "krea2", "flux"),
)
DOUBLE = ("sdxl", "sd3", "flux", "hunyuan_video", "hidream", "hunyuan_image")
STRENGTH = number(1.0, -100, 100)
LORA = files("loras")
LOADERS, ADVANCED, SAMPLING = "loaders", "advanced/loaders", "advanced/model"
THREE = ("MODEL", "CLIP", "VAE")
BOTH = {"model": MODEL, "clip": CLIP, "lora_name": LORA, "strength_model": STRENGTH, "strength_clip": STRENGTH}
FOR_FLUX = {
    "model": MODEL,
    "max_shift": number(1.15, 0, 100),
    "base_shift": number(0.5, 0, 100),
    "width": whole(1024, 16, 16384, 8),
    "height": whole(1024, 16, 16384, 8),
}
ENCODERS = {f"clip_name{n}": ENCODER for n in range(1, 5)}
TABLE = rows(
    Node("CheckpointLoaderSimple", LOADERS, checkpoint, THREE, {"ckpt_name": CKPT}, title="Load Checkpoint"),
    Node(
        "UNETLoader",
        ADVANCED,
        unet,
        ("MODEL",),
        {"unet_name": files("diffusion_models"), "weight_dtype": maybe(WEIGHT_DTYPE)},
    ),
    Node(
        "CLIPLoader",
        ADVANCED,
        text_encoders,
        ("CLIP",),
        {"clip_name": ENCODER, "type": choice(*SINGLE), "device": DEVICE},
    ),
    Node(
        "DualCLIPLoader",
        ADVANCED,
        text_encoders,
        ("CLIP",),
        {"clip_name1": ENCODER, "clip_name2": ENCODER, "type": choice(*DOUBLE), "device": DEVICE},
    ),
    Node("TripleCLIPLoader", ADVANCED, text_encoders, ("CLIP",), {f"clip_name{n}": ENCODER for n in (1, 2, 3)}),
    Node("QuadrupleCLIPLoader", ADVANCED, text_encoders, ("CLIP",), ENCODERS),
    Node("VAELoader", LOADERS, autoencoder, ("VAE",), {"vae_name": files("vae")}, title="Load VAE"),
    Node("LoraLoader", LOADERS, lora, ("MODEL", "CLIP"), BOTH, title="Load LoRA"),
    Node(
        "LoraLoaderModelOnly",
        LOADERS,
        lora_of_model,
        ("MODEL",),
        {"model": MODEL, "lora_name": LORA, "strength_model": STRENGTH},
    ),
    Node(
        "Power Lora Loader (rgthree)",
        "rgthree",
        power_loras,
        ("MODEL", "CLIP"),
        {"model": MODEL, "clip": maybe(CLIP)},
        rest="rest",
    ),
    Node("ModelSamplingAuraFlow", SAMPLING, flow_shift, ("MODEL",), {"model": MODEL, "shift": number(1.73, 0, 100)}),
    Node("ModelSamplingSD3", SAMPLING, flow_shift, ("MODEL",), {"model": MODEL, "shift": number(3.0, 0, 100)}),
    Node("ModelSamplingFlux", SAMPLING, flux_shift, ("MODEL",), FOR_FLUX),
    Node(
        "ModelSamplingDiscrete",
        SAMPLING,
        discrete,
        ("MODEL",),
        {
            "model": MODEL,
            "sampling": choice("eps", "v_prediction", "lcm", "x0", "img_to_img"),
            "zsnr": FLAG,
        },
    ),
    Node(
        "T5TokenizerOptions",
        "conditioning",
        padded,
        ("CLIP",),
        {"clip": CLIP, "min_padding": whole(0, 0, 10000), "min_length": whole(0, 0, 10000)},
    ),
    Node(
        "CLIPSetLastLayer",
        "conditioning",
        clip_skip,
        ("CLIP",),
        {"clip": CLIP, "stop_at_clip_layer": whole(-1, -24, -1)},
        title="CLIP Set Last Layer",
    ),
)
