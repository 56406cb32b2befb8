"""A picture made again from what its PNG says of itself: nothing asked may contradict that, and what differs is told.

What decides a picture is one value, `codec.parameters_of`: a recipe, what a worker is, and our version. A PNG carries
it; a worker that has started has its own. They are compared field by field.
"""

import json
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from handler.api import codec
from handler.catalog.attention import KERNELS, refusal
from handler.catalog.models import find
from handler.catalog.precisions import PRECISIONS
from handler.catalog.spec import ModelSpec
from handler.core.errors import InvalidValue
from handler.core.request import ImageRequest
from handler.core.settings import Settings
from handler.core.stepcache import StepCache
from handler.model.hardware import detect
from handler.volume.autoencoder import label
from handler.volume.hashes import names

SAID: Mapping[str, tuple[str, Callable[[ImageRequest], Any]]] = {  # option -> field of a PNG, and as it is asked
    "prompt": ("prompt", lambda asked: asked.prompt),
    "size": ("size", lambda asked: [asked.width, asked.height]),
    "steps": ("steps", lambda asked: asked.num_inference_steps),
    "guidance": ("guidance", lambda asked: asked.guidance_scale),
    "scheduler": ("scheduler", lambda asked: asked.scheduler),
    "seed": ("seed", lambda asked: asked.seed),
    "negative_prompt": ("negative_prompt", lambda asked: asked.negative_prompt),
}

LORA = ("name", "weight", "clip_weight")
TEXTS = ("model", "revision", "prompt", "scheduler", "precision", "attention", "plan", "vae", "weights", "version")


@dataclass(frozen=True, slots=True)
class Said:
    """What `source` says of its picture, what to ask for to get it again, and of which model."""

    source: Path
    found: Mapping[str, Any]
    request: ImageRequest
    spec: ModelSpec

    @property
    def cached(self) -> StepCache | Literal["off", "on"]:
        """Its step cache, which is never left open."""
        return self.request.step_cache or "off"

    def settings(self, settings: Settings) -> Settings:
        """`settings` for a worker as the one that drew it, as far as that can be had here."""
        found = self.found
        update: dict[str, Any] = {"model": self.spec.id, "precision": found["precision"]}
        if found["vae"] != label(settings.vae):
            update["vae"] = found["vae"]
        if not settings.weights:
            update["weights"] = names(found.get("weights", ""))
        hardware = detect(settings.model_copy(update=update))
        kernel = found.get("attention", "native")
        update["attention"] = "auto" if refusal(KERNELS[kernel], hardware.capability, hardware.dtype) else kernel
        if found["plan"] == "EAGER":  # compiled code rounds differently
            update["compile"] = "off"
        elif settings.compile == "off":
            update["compile"] = "auto"
        return settings.model_copy(update=update)


def read(source: Path, images: list[bytes], mask: bytes | None) -> Said:
    """What a PNG says, checked like any request; InvalidValue if that is not enough, or these are not its files."""
    try:
        found: dict[str, Any] = codec.read_parameters(source)
        spec, (width, height) = find(str(found["model"])), found["size"]
        _check_files(source, images, mask, list(found["images"]), found.get("mask"))
        steps: dict[str, Any] = {"num_inference_steps": found["steps"], "scheduler": found["scheduler"]}
        steps |= {"strength": found.get("strength")}
        fields = {
            "prompt": found["prompt"],
            "width": width,
            "height": height,
            "guidance_scale": found["guidance"] if spec.takes_guidance else None,
            "seed": found["seed"],
            "negative_prompt": found["negative_prompt"],
            "step_cache": found.get("step_cache") or "off",
            "images": images,
            "mask": mask,
            "mask_form": found.get("mask_form"),
            "long_prompts": found.get("long_prompts"),
            "loras": [{name: one[name] for name in LORA if name in one} for one in found.get("loras", ())],
            "reading": found.get("reading"),
            **({"sampling": found["sampling"]} if found.get("sampling") else steps),
        }
        known = found["precision"] in PRECISIONS and found.get("attention", "native") in KERNELS
        texts = "vae" in found and all(isinstance(found.get(name, ""), str) for name in TEXTS)
        texts &= all(isinstance(one["sha256"], str) for one in found.get("loras", ()))
        open_ = None in (found["seed"], found["steps"])
        if open_ or not known or not texts or found["plan"] not in ("EAGER", "COMPILED"):
            raise ValueError("made by nothing that this version knows")
        return Said(source, found, ImageRequest.parse(fields), spec)
    except OSError as error:
        raise InvalidValue(f"cannot read {source}: {error.strerror}", "from") from None
    except (KeyError, TypeError, ValueError):
        raise InvalidValue(f"{source}: its parameters are incomplete.", "from") from None


def _check_files(source: Path, images: list[bytes], mask: bytes | None, marks: list[str], masked: str | None) -> None:
    """Whether these may be the files that the picture was made from."""
    if len(images) != len(marks) or not all(map(_fits, images, marks)):
        told = f"{source} was made from {len(marks)} images; give exactly those, in their order, with --image."
        raise InvalidValue(told, "image")
    if bool(mask) != bool(masked) or (mask and masked and not _fits(mask, masked)):
        told = "with a mask; give exactly that with --mask" if masked else "without a mask; leave --mask out"
        raise InvalidValue(f"{source} was made {told}.", "mask")


def _fits(file: bytes, said: str) -> bool:
    """By the `mark` of it, or, of a picture by an older version, by its SHA-256."""
    return sha256(file).hexdigest().startswith(said)


def refuse_contradiction(said: Said, options: Namespace, asked: ImageRequest) -> None:
    """InvalidValue names the first option that contradicts the picture; `asked` is what all that are given make."""
    for option, (name, value) in SAID.items():
        if vars(options)[option] not in (None, "auto") and value(asked) != said.found.get(name):
            raise _contradiction(said, options, option, name)
    for option in ("strength", "mask_form"):
        if vars(options)[option] not in (None, said.found.get(option)):
            raise _contradiction(said, options, option, option)
    if options.model is not None and find(options.model) is not said.spec:
        raise _contradiction(said, options, "model", "model")
    if asked.loras and asked.loras != said.request.loras:
        raise _contradiction(said, options, "lora", "loras")
    if asked.n != 1:
        raise InvalidValue(f"{said.source} is one picture, and --n says {asked.n}; leave it out.", "n")
    if asked.step_cache is not None and said.spec.caching(asked.step_cache) != said.spec.caching(said.cached):
        raise _contradiction(said, options, "step_cache", "step_cache")


def _contradiction(said: Said, options: Namespace, option: str, name: str) -> InvalidValue:
    told = "the prompt" if option == "prompt" else f"--{option.replace('_', '-')}"
    has = "{}x{}".format(*said.found[name]) if name == "size" else said.found.get(name)
    has = _told(said.found, name) if name == "loras" else has
    asked = vars(options)[option]
    return InvalidValue(f"{said.source} has {name} {has!r}, and {told} says {asked!r}; leave it out.", option)


def differing(found: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In which fields what a picture says is not what a worker would say of it now, in words."""
    now = json.loads(json.dumps(now))
    names = [name for name in sorted({**found, **now}) if found.get(name) != now.get(name)]
    return [f"{name} was {_told(found, name)} and is {_told(now, name)}" for name in names]


def _told(facts: Mapping[str, Any], name: str) -> str:
    if name == "loras":
        return ", ".join(map(_lora, facts.get(name, ()))) or "none"
    if name == "embeddings":
        return ", ".join(f"{x['name']} of {x['sha256'][:12]}" for x in facts.get(name, ())) or "none"
    return str(facts[name]) or "none" if name in facts else "not said"


def _lora(said: Mapping[str, Any]) -> str:
    apart = f" ({said['clip_weight']:g} in text encoders)" if "clip_weight" in said else ""
    return f"{said['name']}:{said['weight']:g}{apart} of {said['sha256'][:12]}"
