"""What a sampler node asks for, as an `ImageRequest`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from handler.api.dialects.comfy import files, pixels
from handler.api.dialects.comfy.node import At
from handler.api.dialects.comfy.plan import WAITING, Before
from handler.api.dialects.comfy.values import Clip, Conditioning, Drawn, Guider, Latent, Model, Sampler, Sigmas
from handler.catalog.spec import ModelSpec
from handler.core.loras import MOST as MOST_LORAS
from handler.core.loras import Wanted
from handler.core.reading import Reading, Words
from handler.core.request import MAX_PROMPT, MAX_SIDE, MIN_SIDE, ImageRequest
from handler.core.sampling import MAX_STEPS, SAMPLERS

GUIDANCE = 3.5  # of a FLUX whose graph has no FluxGuidance: ComfyUI's own default
NEAREST = {  # samplers of ComfyUI's that are not here, and which is like them
    "heunpp2": "heun",
    "dpm_adaptive": "dpmpp_2m",
    "dpm_fast": "dpmpp_2m",
    "deis": "dpmpp_2m",
    "ipndm_v": "ipndm",
    "lms": "dpmpp_2m",
    "er_sde": "dpmpp_2m_sde",
    "sa_solver": "dpmpp_2m_sde",
    "sa_solver_pece": "dpmpp_2m_sde",
    "seeds_2": "dpmpp_sde",
    "seeds_3": "dpmpp_sde",
}


@dataclass(frozen=True, slots=True)
class How:
    """What a sampler is told beside its guider; `seed` draws the noise, and `add_noise` says if there is any."""

    seed: int
    sampler: Sampler
    sigmas: Sigmas
    add_noise: bool = True
    leftover_noise: bool = False
    custom: bool = False


def draw(at: At, guider: Guider, latent: Latent, how: How) -> Drawn:
    """The request; Refused, or a RequestError, says what cannot be."""
    spec = guider.model.spec
    _check(at, guider, latent)
    seen = _seen(at, guider, latent, how)
    if (drawn := spec.canvas(size := (latent.width, latent.height))) != size:
        told = "{}x{} is drawn as {}x{} and cut, so a seed gives another picture than in ComfyUI".format(*size, *drawn)
        at.note(f"{told}; with sides in steps of {spec.multiple} it would not.")
    fields = {
        "prompt": _prompt(at, guider.positive),
        "seed": how.seed,
        "width": latent.width,
        "height": latent.height,
        "n": latent.n,
        "guidance_scale": _guidance(at, guider, spec),
        "negative_prompt": _negative(guider),
        "sampling": _sampling(at, guider, how),
        "reading": _reading(at, guider),
        "loras": _loras(at, guider.model, guider.positive.clip),
        **seen,
    }
    before = _before(latent.drawn) if latent.drawn and seen["images"] == (WAITING,) else None
    return Drawn(ImageRequest.parse(fields), at.node, (latent.width, latent.height), (), before)


def _before(drawn: Drawn) -> Before:
    return Before(drawn.request, drawn.sampler, drawn.after, drawn.before)


def _check(at: At, guider: Guider, latent: Latent) -> None:
    spec, served = guider.model.spec, at.served
    files.must_serve(spec, served)
    for conditioning in _sides(guider):
        if not files.fits(conditioning.clip.spec, served):
            at.refuse(f"its prompt is read by the text encoders of {conditioning.clip.spec.id}, not of {spec.id}.")
    if latent.n > served.max_n:
        at.refuse(f"batch_size is {latent.n}; at most {served.max_n} pictures are drawn at once.", "latent_image")
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in (latent.width, latent.height)):
        size = f"{latent.width}x{latent.height}"
        at.refuse(f"the picture is {size}; sides may have {MIN_SIDE} to {MAX_SIDE} pixels.", "latent_image")
    if guider.positive.zeros:
        at.refuse("the positive conditioning is zeros; give it a text.", "positive")


def _sides(guider: Guider) -> tuple[Conditioning, ...]:
    return (guider.positive, *_negatives(guider))


def _negatives(guider: Guider) -> tuple[Conditioning, ...]:
    """The negative conditioning, if it changes anything."""
    return (guider.negative,) if guider.negative and guider.cfg != 1 else ()


def _seen(at: At, guider: Guider, latent: Latent, how: How) -> Mapping[str, Any]:
    """The images of the request, and its mask."""
    spec, references = guider.model.spec, guider.positive.references
    begins_in_noise = how.sigmas.denoise == 1 and not how.sigmas.start and not how.sigmas.exact and how.add_noise
    empty = latent.empty
    if begins_in_noise and latent.mask is None and (references or spec.max_images):
        empty = True  # for nothing is left of a picture at the highest level of a flow's noise
    if references and len(references) > spec.max_images:
        most = f"sees at most {spec.max_images} images" if spec.max_images else "draws from text, without images to see"
        at.refuse(f"{spec.id} {most}; the graph has {len(references)}.", "positive")
    if empty:
        return {"images": tuple(pixels.png(one) for one in references)}
    if references:
        at.refuse("it has a picture to draw anew and images to see; use an empty latent.", "latent_image")
    if spec.max_images and latent.mask is None:
        at.refuse(f"{spec.id} works from whole images: use ReferenceLatent, with denoise 1.", "denoise")
    if latent.mask is not None and not spec.masked_pixels:
        at.refuse(f"{spec.id} has no masks; use ReferenceLatent, and say in words what is to change.", "latent_image")
    images = (WAITING if latent.drawn else pixels.png(latent.picture),)
    if latent.mask is None:
        return {"images": images}
    if not latent.mask.grey.any():
        at.refuse("its mask is 0 all over, so that nothing would be drawn anew.", "latent_image")
    return {"images": images, "mask": pixels.cut(latent.mask, latent.width, latent.height)}


def _prompt(at: At, conditioning: Conditioning) -> str:
    if len(conditioning.text) > MAX_PROMPT:
        at.refuse(f"its prompt has {len(conditioning.text)} characters; at most {MAX_PROMPT} are read.", "positive")
    return conditioning.text


def _guidance(at: At, guider: Guider, spec: ModelSpec) -> float | None:
    """The scale that a distilled model is told; None where there is none, or it is the sampler's cfg."""
    asked = guider.positive.guidance
    if spec.takes_guidance and not spec.takes_negative_prompt:
        told, *others = (GUIDANCE if one.guidance is None else one.guidance for one in _sides(guider))
        if others and others != [told]:
            at.note(f"the negative prompt's guidance is the positive one's, {told:g}, and not {others[0]:g}.")
        return told
    if asked is not None:
        at.note(f"FluxGuidance changes nothing: {spec.id} has no guidance that it is told.")
    return None


def _negative(guider: Guider) -> str | None:
    return next((one.text for one in _negatives(guider)), None)


def _sampling(at: At, guider: Guider, how: How) -> Mapping[str, Any]:
    sigmas, spec = how.sigmas, guider.model.spec
    if how.sampler.name not in SAMPLERS:
        name = how.sampler.name.removesuffix("_cfg_pp")
        near = NEAREST.get(name, name if name in SAMPLERS else "euler")
        at.refuse(f"there is no sampler '{how.sampler.name}' here; use {near}.", "sampler_name")
    if guider.cfg < 1:
        at.refuse(f"cfg is {guider.cfg:g}; 1 is no guidance, and there is none below.", "cfg")
    if sigmas.steps > MAX_STEPS:
        at.refuse(f"{sigmas.steps} steps are too many; at most {MAX_STEPS} are taken.", "steps")
    if sigmas.denoise == 0:
        at.refuse("no step is taken, so that nothing is drawn; denoise should be above 0.", "denoise")
    if sigmas.count < 1:
        at.refuse("no step is taken, so that nothing is drawn; it should start before the last of its steps.")
    if sigmas.count > spec.max_steps:
        at.note(f"{sigmas.count} steps are more than the {spec.max_steps} that {spec.id} is made for.")
    if guider.cfg > 1 and spec.family.rpartition(".")[2].startswith("flux2"):
        at.refuse(f"{spec.id} is distilled, and has no classifier-free guidance; set cfg to 1.", "cfg")
    if guider.cfg > 1 and spec.family.endswith("qwen_image"):
        at.note("a guided step of Qwen-Image has the length of the prompt's own, as with CFGNorm.")
    fields: dict[str, Any] = {
        "sampler": how.sampler.name,
        "eta": how.sampler.eta,
        "s_noise": how.sampler.s_noise,
        "cfg": guider.cfg,
        "shift": guider.model.shift,
        "shift_type": guider.model.shift_type,
        "custom": how.custom,
        "add_noise": how.add_noise,
        "leftover_noise": how.leftover_noise,
    }
    if sigmas.exact:
        return fields | {"sigmas": sigmas.exact, "steps": sigmas.count}
    part = {"start": sigmas.start, "end": sigmas.end}
    return fields | {"scheduler": sigmas.scheduler, "steps": sigmas.steps, "denoise": sigmas.denoise} | part


def _reading(at: At, guider: Guider) -> Reading:
    positive, negative = guider.positive, next(iter(_negatives(guider)), None)
    if negative and negative.clip.skip != positive.clip.skip:
        at.refuse("its prompts stop at different layers of CLIP; give both one CLIPSetLastLayer.", "negative")
    if negative and _sums(negative.clip.loras) != _sums(positive.clip.loras):
        at.refuse("its prompts are read with different LoRAs; give both the same CLIP.", "negative")
    return Reading(
        clip_skip=positive.clip.skip,
        prompts=positive.words,
        sizes=positive.sizes,
        negative_prompts=negative.words if negative else Words(),
        negative_sizes=negative.sizes if negative else None,
        zeros=bool(negative and negative.zeros),
    )


def _loras(at: At, model: Model, clip: Clip) -> tuple[Wanted, ...]:
    """Those of the model and of the positive prompt's text encoders, each once."""
    weights, texts = _sums(model.loras), _sums(clip.loras)
    both = {name: (weights.get(name, 0.0), texts.get(name, 0.0)) for name in weights | texts}
    found = {name: pair for name, pair in both.items() if any(pair)}
    if len(found) > MOST_LORAS:
        at.refuse(f"it has {len(found)} LoRAs; at most {MOST_LORAS} are added.", "model")
    return tuple(Wanted(name, one, None if one == other else other) for name, (one, other) in found.items())


def _sums(loras: tuple[tuple[str, float], ...]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, weight in loras:
        found[name] = found.get(name, 0.0) + weight
    return found
