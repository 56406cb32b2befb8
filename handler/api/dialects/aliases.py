"""What others call our fields: public RunPod workers for Stable Diffusion and FLUX, and Automatic1111.

worker-sdxl, -sdxl-turbo, -stable_diffusion_v1 and _v2, -a1111, public endpoints and those like them. What is plain is
understood; what changes nothing here is accepted and noted; the others are refused with what to send instead.
"""

import re
from typing import Any

from handler.api.dialects.openai import sides
from handler.core.errors import InvalidValue, OutOfRange, Unsupported

NAMES = {
    "positive_prompt": "prompt",
    **dict.fromkeys(("num_images", "num_outputs", "num_images_per_prompt", "batch_size"), "n"),
    **dict.fromkeys(("steps", "num_steps", "inference_steps"), "num_inference_steps"),
    **dict.fromkeys(("guidance", "cfg_scale", "cfg"), "guidance_scale"),
    **dict.fromkeys(("sampler", "sampler_name"), "scheduler"),
    **dict.fromkeys(("image", "init_image", "init_images", "input_image", "image_url"), "images"),
    **dict.fromkeys(("mask_image", "mask_url"), "mask"),
    **dict.fromkeys(("prompt_strength", "denoising_strength"), "strength"),
}
SCHEDULERS = {  # by their letters, without "Scheduler" and "Discrete" at the end
    **dict.fromkeys(("euler", "keuler", "eulerd"), "euler"),
    **dict.fromkeys(("eulera", "eulerancestral", "keulerancestral"), "euler-a"),
    **dict.fromkeys(("dpm++", "dpm++2m", "dpmpp2m", "kdpmpp2m", "dpmsolvermultistep", "dpmm"), "dpm++"),
    **dict.fromkeys(("heun", "kheun"), "heun"),
    "ddim": "ddim",
    "flowmatcheuler": "flow-match-euler",
}
REFINER = ("refiner_inference_steps", "high_noise_frac")  # beside which worker-sdxl's strength is the refiner's
UNCHECKED = "pictures are not looked through here"
NOTED = {
    **dict.fromkeys(REFINER, "there is no refiner here"),
    **dict.fromkeys(("nsfw", "enable_safety_checker", "disable_safety_checker", "safety_checker"), UNCHECKED),
    "sync_mode": "the answer has the picture in any case",
}
LORAS = "send loras, such as [{'name': 'ink', 'weight': 0.8}], which are on the worker's volume"
INSTEAD = {
    **dict.fromkeys(("lora", "lora_url", "lora_scale", "lora_strength", "lora_weights"), LORAS),
    **dict.fromkeys(("styles", "override_settings", "script_name"), "write it into prompt, or start another worker"),
    **dict.fromkeys(("enable_hr", "hires_fix", "restore_faces", "upscale"), "send width and height of the picture"),
    "n_iter": "send n",
    "workflow": "send a graph to /prompt, or on RunPod as the job's workflow",
    "image_urls": "send images, as data URLs or base64",
}


def understood(payload: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`payload` in our words, without what is null; and a sentence for each field that changes nothing."""
    fields = {name: value for name, value in payload.items() if value is not None}
    for name, why in INSTEAD.items():
        if name in fields:
            raise Unsupported(f"'{name}' is not supported; {why}.", name)
    noted = [name for name in NOTED if name in fields]
    notes = [f"{name} changes nothing: {NOTED[name]}." for name in noted]
    ours = _named({name: value for name, value in fields.items() if name not in noted})
    if any(name in REFINER for name in noted) and not ours.get("images") and "strength" in ours:
        notes.append("strength changes nothing: no image was sent, and there is no refiner here.")
        del ours["strength"]
    for name, value in sides(ours.pop("size", "auto")).items():
        if ours.setdefault(name, value) != value:
            raise InvalidValue("size says another size than width and height; send one of them.", "size")
    if isinstance(ours.get("scheduler"), str):
        ours["scheduler"] = _scheduler(ours["scheduler"])
    return ours, notes


def _named(fields: dict[str, Any]) -> dict[str, Any]:
    """By our names; InvalidValue where two say different things of one."""
    ours: dict[str, Any] = {}
    said: dict[str, str] = {}
    for name, value in fields.items():
        field = NAMES.get(name, name)
        meant = [value] if field == "images" and name != field and not isinstance(value, list) else value
        if field in said and ours[field] != meant:
            raise InvalidValue(f"{said[field]} and {name} say different things; send {field}.", field)
        ours[field], said[field] = meant, name
    return ours


def _scheduler(name: str) -> str:
    letters = re.sub("[^a-z0-9+]", "", name.lower()).removesuffix("scheduler").removesuffix("discrete")
    if letters not in SCHEDULERS:
        ours = ", ".join(dict.fromkeys(SCHEDULERS.values()))
        told = f"scheduler '{name:.40}' is none of {ours}. Send one of these that the model takes, or, as in ComfyUI, "
        raise OutOfRange(f"{told}sampling: {{'sampler': 'dpmpp_2m', 'scheduler': 'karras', 'steps': 20}}.", "scheduler")
    return SCHEDULERS[letters]


def told() -> str:
    """All of this in words, for the description of the fields."""
    names = ", ".join(f"{name} ({field})" for name, field in NAMES.items())
    noted = ", ".join(NOTED)
    return (
        f"Other workers' names are read too: {names}; size as WIDTHxHEIGHT; K_EULER and the like as scheduler. "
        f"Accepted, and noted in the answer as what changes nothing: {noted}."
    )
