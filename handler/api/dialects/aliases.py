"""What others call our fields: public RunPod workers for Stable Diffusion and FLUX, Automatic1111, and fal.

worker-sdxl, -sdxl-turbo, -stable_diffusion_v1 and _v2, -a1111, public endpoints, fal's models and those like them.
What is plain is understood; what changes nothing here is accepted and noted; the others are refused with what to send
instead.
"""

import re
from typing import Any

from handler.api.dialects.openai import sides
from handler.core.attachments import FETCHED
from handler.core.errors import InvalidValue, OutOfRange, Unsupported

NAMES = {
    "positive_prompt": "prompt",
    **dict.fromkeys(("num_images", "num_outputs", "num_images_per_prompt", "batch_size"), "n"),
    **dict.fromkeys(("steps", "num_steps", "inference_steps"), "num_inference_steps"),
    **dict.fromkeys(("guidance", "cfg_scale", "cfg"), "guidance_scale"),
    **dict.fromkeys(("sampler", "sampler_name"), "scheduler"),
    **dict.fromkeys(("image", "init_image", "init_images", "input_image", "image_url", "image_urls"), "images"),
    **dict.fromkeys(("mask_image", "mask_url"), "mask"),
    **dict.fromkeys(("prompt_strength", "denoising_strength"), "strength"),
    "format": "output_format",
}
SIZES = {  # fal's, in pixels
    "square_hd": (1024, 1024),
    "square": (512, 512),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
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
    **dict.fromkeys(("safety_tolerance", "safety_checker_version"), UNCHECKED),
    "sync_mode": "the answer has the picture in any case",
    "acceleration": "how fast pictures are drawn is the worker's, as optimize has measured",
}
EXPANDING = ("expand_prompt", "enable_prompt_expansion")  # which nobody does here
LORAS = "send loras, such as [{'name': 'ink', 'weight': 0.8}], which are on the worker's volume"
INSTEAD = {
    **dict.fromkeys(("lora", "lora_url", "lora_scale", "lora_strength", "lora_weights"), LORAS),
    **dict.fromkeys(("styles", "override_settings", "script_name"), "write it into prompt, or start another worker"),
    **dict.fromkeys(("enable_hr", "hires_fix", "restore_faces", "upscale"), "send width and height of the picture"),
    "n_iter": "send n",
    "workflow": "send a graph to /prompt, or on RunPod as the job's workflow",
    "embeddings": "name those on the worker's volume in the prompt, as embedding:NAME, and send reading {}",
    **dict.fromkeys(("controlnets", "controlnet_unions", "control_loras", "ip_adapters"), "send images, to start from"),
}


def understood(payload: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`payload` in our words, without what is null; and a sentence for each field that changes nothing."""
    unsaid = {name for name, value in payload.items() if value is None or (name in INSTEAD and value == [])}
    unsaid |= {name for name in EXPANDING if payload.get(name) is False}
    fields = {name: value for name, value in payload.items() if name not in unsaid}
    for name, why in (INSTEAD | dict.fromkeys(EXPANDING, "prompts are drawn as they are sent")).items():
        if name in fields:
            raise Unsupported(f"'{name}' is not supported; {why}.", name)
    noted = [name for name in NOTED if name in fields]
    notes = [f"{name} changes nothing: {NOTED[name]}." for name in noted]
    ours = _named({name: value for name, value in fields.items() if name not in noted})
    if any(name in REFINER for name in noted) and not ours.get("images") and "strength" in ours:
        notes.append("strength changes nothing: no image was sent, and there is no refiner here.")
        del ours["strength"]
    for field, read in (("size", sides), ("image_size", _pixels)):
        for name, value in read(ours.pop(field, "auto")).items():
            if ours.setdefault(name, value) != value:
                raise InvalidValue(f"{field} says another size than width and height; send one of them.", field)
    if isinstance(ours.get("loras"), list):
        ours["loras"] = [_lora(each) for each in ours["loras"]]
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


def _pixels(size: Any) -> dict[str, Any]:
    """Width and height of fal's `image_size`: an object with both, or the name of one; none where it is 'auto'."""
    if isinstance(size, dict) and size.keys() == {"width", "height"}:
        return size
    if size == "auto":
        return {}
    if not isinstance(size, str) or size not in SIZES:
        known = ", ".join(SIZES)
        raise InvalidValue(f"image_size should be one of {known}, or an object with width and height.", "image_size")
    return dict(zip(("width", "height"), SIZES[size], strict=True))


def _lora(item: Any) -> Any:
    """fal's object with path and scale as ours with name and weight."""
    renamed = {"path": "name", "scale": "weight"}
    if not isinstance(item, dict) or "path" not in item or any(renamed.get(name) in item for name in item):
        return item  # which is refused where it has one thing by both names
    if isinstance(item["path"], str) and FETCHED.match(item["path"]):
        raise Unsupported(f"loras: nothing is fetched from a URL; {LORAS}.", "loras")
    return {renamed.get(name, name): value for name, value in item.items()}


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
        f"Other workers' names are read too: {names}; size as WIDTHxHEIGHT, and fal's image_size; loras with path and "
        f"scale; K_EULER and the like as scheduler. Accepted, and noted in the answer as what changes nothing: {noted}."
    )
