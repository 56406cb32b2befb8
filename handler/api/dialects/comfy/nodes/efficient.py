"""Efficiency Nodes: loaders that also encode, and samplers that also decode."""

from collections.abc import Mapping
from typing import Any

from handler.api.dialects.comfy.node import (
    BATCH,
    CFG,
    CONDITIONING,
    DENOISE,
    LATENT,
    MODEL,
    SAMPLER_NAME,
    SCHEDULER,
    SEED,
    STEPS,
    VAE,
    At,
    Input,
    Node,
    choice,
    files,
    maybe,
    rows,
    text,
    whole,
)
from handler.api.dialects.comfy.nodes.conditioning import encode
from handler.api.dialects.comfy.nodes.latents import empty
from handler.api.dialects.comfy.nodes.loaders import autoencoder, checkpoint, clip_skip, lora
from handler.api.dialects.comfy.nodes.samplers import advanced, decode, ksampler
from handler.api.dialects.comfy.values import Clip, Conditioning, Model, Vae

NONE, BAKED = "None", "Baked VAE"
NO_LORA: Mapping[str, Any] = {"lora_name": NONE, "lora_model_strength": 1.0, "lora_clip_strength": 1.0}
MOST = 50  # LoRAs that the stacker has places for
Stack = tuple[tuple[str, float, float], ...]
Tuple = tuple[Model, Conditioning, Conditioning]


def stack(at: At, input_mode: str, lora_count: int, rest: Mapping[str, Any], lora_stack: Stack | None) -> Stack:
    """LoRAs, each with both its strengths."""
    found: Stack = lora_stack or ()
    for n in range(1, min(lora_count, MOST) + 1):
        name = rest.get(f"lora_name_{n}", NONE)
        model, clip = (rest.get(f"{kind}_{n}", 1.0) for kind in ("model_str", "clip_str"))
        if input_mode == "simple":
            model = clip = rest.get(f"lora_wt_{n}", 1.0)
        if not all(isinstance(weight, int | float) for weight in (model, clip)):
            at.refuse("a LoRA's strength should be a number.", f"lora_wt_{n}")
        if name != NONE:
            found = (*found, (str(name), float(model), float(clip)))
    return found


def load(at: At, name: str, vae_name: str, skip: int, loras: Stack | None) -> tuple[Model, Clip, Vae]:
    """A checkpoint with LoRAs."""
    model, clip, vae = checkpoint(at, name)
    for lora_name, strength_model, strength_clip in loras or ():
        model, clip = lora(at, model, clip, lora_name, strength_model, strength_clip)
    return model, clip_skip(at, clip, skip), vae if vae_name == BAKED else autoencoder(at, vae_name)


def plain(at: At, token_normalization: str, weight_interpretation: str) -> None:
    """Refuse other ways to weigh words than ComfyUI's own."""
    if (token_normalization, weight_interpretation) != ("none", "comfy"):
        at.refuse("words are weighed as ComfyUI does it; set token_normalization none and weight_interpretation comfy.")


def loader(
    at: At,
    ckpt_name: str,
    vae_name: str,
    clip_skip: int,
    lora_name: str,
    lora_model_strength: float,
    lora_clip_strength: float,
    positive: str,
    negative: str,
    empty_latent_width: int,
    empty_latent_height: int,
    batch_size: int,
    token_normalization: str,
    weight_interpretation: str,
    lora_stack: Stack | None,
    cnet_stack: None,
) -> tuple[Any, ...]:
    """Efficient Loader."""
    plain(at, token_normalization, weight_interpretation)
    own: Stack = () if lora_name == NONE else ((lora_name, lora_model_strength, lora_clip_strength),)
    model, clip, vae = load(at, ckpt_name, vae_name, clip_skip, (*own, *(lora_stack or ())))
    latent = empty(at, empty_latent_width, empty_latent_height, batch_size)
    return model, encode(at, positive, clip), encode(at, negative, clip), latent, vae, clip, None


def loader_of_sdxl(
    at: At, base_ckpt_name: str, base_clip_skip: int, refiner_ckpt_name: str, **given: Any
) -> tuple[Any, ...]:
    """Eff. Loader SDXL, without a refiner."""
    if refiner_ckpt_name != NONE:
        at.refuse("a refiner is not offered; set it to None.", "refiner_ckpt_name")
    base: dict[str, Any] = {"ckpt_name": base_ckpt_name, "clip_skip": base_clip_skip}
    model, positive, negative, latent, vae, *_ = loader(at, **base, **NO_LORA, **given)
    return (model, positive, negative), latent, vae, None


def sampler(
    at: At, vae_decode: str, optional_vae: Vae | None, preview_method: str, script: None, **given: Any
) -> tuple[Any, ...]:
    """KSampler (Efficient)."""
    drawn = ksampler(at, **given)
    return given["model"], given["positive"], given["negative"], drawn, optional_vae, decode(at, drawn, optional_vae)


def sampler_of_sdxl(
    at: At, sdxl_tuple: Tuple, refine_at_step: int, optional_vae: Vae | None, **given: Any
) -> tuple[Any, ...]:
    """KSampler SDXL (Eff.), with the base model to the last step."""
    if 0 <= refine_at_step < given["steps"]:
        at.refuse("a refiner is not offered; set refine_at_step to -1.", "refine_at_step")
    model, positive, negative = sdxl_tuple
    more: dict[str, Any] = {
        "model": model,
        "positive": positive,
        "negative": negative,
        "add_noise": "enable",
        "end_at_step": 10000,
    }
    wanted = {name: value for name, value in given.items() if name not in ("vae_decode", "preview_method", "script")}
    drawn = advanced(at, **wanted, **more, return_with_leftover_noise="disable")
    return sdxl_tuple, drawn, optional_vae, decode(at, drawn, optional_vae)


STACK, TUPLE, CKPT = Input("LORA_STACK"), Input("SDXL_TUPLE"), files("checkpoints")
VAE_NAME, TEXT, SIDE = files("vae"), text(), whole(512, 64, 16384)
SKIP, STRENGTH = whole(-1, -24, -1), Input("FLOAT", 1.0, -10, 10, 0.01)
SHARED = {
    "positive": TEXT,
    "negative": TEXT,
    "token_normalization": choice("none", "mean", "length", "length+mean"),
    "weight_interpretation": choice("comfy", "A1111", "compel", "comfy++", "down_weight"),
    "empty_latent_width": SIDE,
    "empty_latent_height": SIDE,
    "batch_size": BATCH,
    "lora_stack": maybe(STACK),
    "cnet_stack": maybe(Input("CONTROL_NET_STACK")),
}
LORA = {
    "lora_name": files("loras"),
    "lora_model_strength": STRENGTH,
    "lora_clip_strength": STRENGTH,
}
HOW = {"steps": STEPS, "cfg": CFG, "sampler_name": SAMPLER_NAME, "scheduler": SCHEDULER}
SHOWN = {
    "preview_method": choice("auto", "latent2rgb", "taesd", "vae_decoded_only", "none"),
    "vae_decode": choice("true", "true (tiled)", "false", "output only", "output only (tiled)"),
    "optional_vae": maybe(VAE),
    "script": maybe(Input("SCRIPT")),
}
PAIR = {"positive": CONDITIONING, "negative": CONDITIONING, "latent_image": LATENT}
WHERE = "Efficiency Nodes"
TABLE = rows(
    Node(
        "LoRA Stacker",
        WHERE,
        stack,
        ("LORA_STACK",),
        {"input_mode": choice("simple", "advanced"), "lora_count": whole(3, 0, MOST), "lora_stack": maybe(STACK)},
        rest="rest",
    ),
    Node(
        "Efficient Loader",
        WHERE,
        loader,
        ("MODEL", "CONDITIONING", "CONDITIONING", "LATENT", "VAE", "CLIP", "DEPENDENCIES"),
        {"ckpt_name": CKPT, "vae_name": VAE_NAME, "clip_skip": SKIP, **LORA, **SHARED},
    ),
    Node(
        "Eff. Loader SDXL",
        WHERE,
        loader_of_sdxl,
        ("SDXL_TUPLE", "LATENT", "VAE", "DEPENDENCIES"),
        {
            "base_ckpt_name": CKPT,
            "base_clip_skip": whole(-2, -24, -1),
            "refiner_ckpt_name": CKPT,
            "vae_name": VAE_NAME,
            **SHARED,
        },
    ),
    Node(
        "KSampler (Efficient)",
        WHERE,
        sampler,
        ("MODEL", "CONDITIONING", "CONDITIONING", "LATENT", "VAE", "IMAGE"),
        {"model": MODEL, "seed": SEED, **HOW, **PAIR, "denoise": DENOISE, **SHOWN},
    ),
    Node(
        "KSampler SDXL (Eff.)",
        WHERE,
        sampler_of_sdxl,
        ("SDXL_TUPLE", "LATENT", "VAE", "IMAGE"),
        {
            "sdxl_tuple": TUPLE,
            "noise_seed": SEED,
            **HOW,
            "latent_image": LATENT,
            "start_at_step": whole(0, 0, 10000),
            "refine_at_step": whole(-1, -1, 10000),
            **SHOWN,
        },
    ),
)
