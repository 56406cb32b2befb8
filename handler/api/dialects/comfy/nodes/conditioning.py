"""Texts, and what is said beside them: guidance, zeros, sizes, images to see."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from handler.api.dialects.comfy.node import (
    CLIP,
    CONDITIONING,
    IMAGE,
    LATENT,
    MAX_SIDE,
    VAE,
    At,
    Node,
    choice,
    maybe,
    number,
    rows,
    text,
    whole,
)
from handler.api.dialects.comfy.pixels import by_pixels
from handler.api.dialects.comfy.values import Clip, Conditioning, Drawn, Latent, Picture
from handler.core.attachments import MAX_REFERENCES
from handler.core.reading import Sizes, Words


def encode(at: At, text: str, clip: Clip) -> Conditioning:
    """A prompt."""
    return Conditioning(text, clip)


def encode_sdxl(at: At, clip: Clip, text_g: str, text_l: str, **sizes: int) -> Conditioning:
    """One prompt for each of SDXL's encoders, and what it is told of sizes."""
    return Conditioning(text_g, clip, Words(l=text_l, g=text_g), sizes=Sizes(**sizes))


def encode_refiner(at: At, **_: Any) -> Conditioning:
    """For another model."""
    at.refuse("the refiner of SDXL is not offered; use CLIPTextEncodeSDXL and sample to the last step.", "clip")


def encode_flux(at: At, clip: Clip, clip_l: str, t5xxl: str, guidance: float) -> Conditioning:
    """One prompt for each of FLUX's encoders, and its guidance."""
    return Conditioning(t5xxl, clip, Words(l=clip_l, t5=t5xxl), guidance)


def encode_sd3(at: At, clip: Clip, clip_l: str, clip_g: str, t5xxl: str, empty_padding: str) -> Conditioning:
    """One prompt for each of SD3's encoders."""
    if empty_padding == "none" and not (t5xxl and (clip_l or clip_g)):
        at.note("empty_padding none: an empty text is padded here all the same, as with empty_prompt.")
    return Conditioning(t5xxl or clip_g or clip_l, clip, Words(l=clip_l, g=clip_g, t5=t5xxl))


def guidance(at: At, conditioning: Conditioning, guidance: float) -> Conditioning:
    """What a distilled FLUX is told."""
    return replace(conditioning, guidance=guidance)


def zero_out(at: At, conditioning: Conditioning) -> Conditioning:
    """As negative: none."""
    return replace(conditioning, zeros=True)


def reference(at: At, conditioning: Conditioning, latent: Latent | Drawn | None) -> Conditioning:
    """One more image to see."""
    if latent is None:
        return conditioning
    if isinstance(latent, Drawn):
        at.refuse("it shows a picture that is yet to be drawn; draw that first, and send it.", "latent")
    if latent.picture is None:
        at.refuse("an empty latent has nothing to see; encode an image with VAEEncode.", "latent")
    return seeing(at, conditioning, latent.picture)


def seeing(at: At, conditioning: Conditioning, *pictures: Any) -> Conditioning:
    """With more images to see, each uint8 (height, width, 3)."""
    references = (*conditioning.references, *pictures)
    if len(references) > MAX_REFERENCES:
        at.refuse(f"it shows {len(references)} images; at most {MAX_REFERENCES} are looked at.")
    return replace(conditioning, references=references)


def edit(at: At, clip: Clip, prompt: str, vae: Any = None, **images: Picture | Drawn | None) -> Conditioning:
    """Qwen-Image-Edit's prompt with the images that it speaks of."""
    found = [image for image in images.values() if image is not None]
    if any(isinstance(image, Drawn) for image in found):
        at.refuse("it shows a picture that is yet to be drawn; draw that first, and send it.")
    frames = [frame for image in found if isinstance(image, Picture) for frame in image.frames]
    return seeing(at, Conditioning(prompt, clip), *frames)


def edit_of_two(
    at: At, clip: Clip, prompt: str, negative_prompt: str, resolution: int, vae: Any, images: Mapping[str, Any]
) -> tuple[Conditioning, Conditioning, Latent]:
    """Qwen-Image-2.1's: the prompts of both sides, and a latent of the first image's size."""
    seen = {name: image for name, image in images.items() if name.startswith("images.")}
    positive, negative = (edit(at, clip, text, vae, **seen) for text in (prompt, negative_prompt))
    first = positive.references[0] if positive.references else None
    shape = (resolution, resolution) if first is None else (first.shape[1], first.shape[0])
    width, height = by_pixels(shape[0], shape[1], (resolution / 1024) ** 2, 16)
    return positive, negative, Latent(width, height)


def same(at: At, conditioning: Conditioning, **_: Any) -> Conditioning:
    """What changes nothing here."""
    at.note("how several reference images are laid out is the model's own way here, and is left out.")
    return conditioning


def no_guidance(at: At, conditioning: Conditioning) -> Conditioning:
    """Only a model that is told none can do without."""
    if at.served.spec.takes_guidance and not at.served.spec.takes_negative_prompt:
        at.refuse("guidance cannot be taken from a model that is told it; use FluxGuidance.")
    return replace(conditioning, guidance=None)


def joined(at: At, **_: Any) -> Conditioning:
    """What would need more than one prompt at once."""
    at.refuse("prompts are not combined, averaged, or held to areas or steps; write one prompt with CLIPTextEncode.")


SIDE, CROP = whole(1024, 0, MAX_SIDE), whole(0, 0, MAX_SIDE)
PLAIN = {"conditioning": CONDITIONING}
TWO = {"conditioning_1": CONDITIONING, "conditioning_2": CONDITIONING}
TO_FROM = {"conditioning_to": CONDITIONING, "conditioning_from": CONDITIONING}
OUT, FLUX = ("CONDITIONING",), "advanced/conditioning/flux"
SDXL = {
    "clip": CLIP,
    "width": SIDE,
    "height": SIDE,
    "crop_w": CROP,
    "crop_h": CROP,
    "target_width": SIDE,
    "target_height": SIDE,
    "text_g": text(),
    "text_l": text(),
}
REFINER = {"ascore": number(6.0, 0, 1000), "width": SIDE, "height": SIDE, "text": text(), "clip": CLIP}
THREE = {"clip_l": text(), "clip_g": text(), "t5xxl": text(), "empty_padding": choice("none", "empty_prompt")}
IMAGES = {f"image{n}": maybe(IMAGE) for n in (1, 2, 3)}
SQUARE = whole(1024, 64, 4096)
METHODS = choice("offset", "index", "uxo/uno", "index_timestep_zero")
TABLE = rows(
    Node(
        "CLIPTextEncode", "conditioning", encode, OUT, {"text": text(), "clip": CLIP}, title="CLIP Text Encode (Prompt)"
    ),
    Node("CLIPTextEncodeSDXL", "advanced/conditioning", encode_sdxl, OUT, SDXL),
    Node("CLIPTextEncodeSDXLRefiner", "advanced/conditioning", encode_refiner, OUT, REFINER),
    Node(
        "CLIPTextEncodeFlux",
        FLUX,
        encode_flux,
        OUT,
        {"clip": CLIP, "clip_l": text(), "t5xxl": text(), "guidance": number(3.5, 0, 100, 0.1)},
    ),
    Node("CLIPTextEncodeSD3", "advanced/conditioning", encode_sd3, OUT, {"clip": CLIP, **THREE}),
    Node("FluxGuidance", FLUX, guidance, OUT, {**PLAIN, "guidance": number(3.5, 0, 100, 0.1)}),
    Node("FluxDisableGuidance", FLUX, no_guidance, OUT, PLAIN),
    Node("ConditioningZeroOut", "advanced/conditioning", zero_out, OUT, PLAIN),
    Node("ReferenceLatent", "advanced/conditioning/edit_models", reference, OUT, {**PLAIN, "latent": maybe(LATENT)}),
    Node("FluxKontextMultiReferenceLatentMethod", FLUX, same, OUT, {**PLAIN, "reference_latents_method": METHODS}),
    Node(
        "TextEncodeQwenImageEdit",
        "advanced/conditioning",
        edit,
        OUT,
        {"clip": CLIP, "prompt": text(), "vae": maybe(VAE), "image": maybe(IMAGE)},
    ),
    Node(
        "TextEncodeQwenImageEditPlus",
        "advanced/conditioning",
        edit,
        OUT,
        {"clip": CLIP, "prompt": text(), "vae": maybe(VAE), **IMAGES},
    ),
    Node(
        "TextEncodeQwenImage21",
        "advanced/conditioning",
        edit_of_two,
        ("CONDITIONING", "CONDITIONING", "LATENT"),
        {"clip": CLIP, "prompt": text(), "negative_prompt": text(), "resolution": SQUARE, "vae": maybe(VAE)},
        rest="images",
    ),
    Node("ConditioningCombine", "conditioning", joined, OUT, TWO),
    Node("ConditioningConcat", "conditioning", joined, OUT, TO_FROM),
    Node(
        "ConditioningAverage",
        "conditioning",
        joined,
        OUT,
        {**TO_FROM, "conditioning_to_strength": number(1.0, 0, 1)},
    ),
    Node("ConditioningSetArea", "conditioning", joined, OUT, PLAIN),
    Node("ConditioningSetMask", "conditioning", joined, OUT, PLAIN),
    Node("ConditioningSetTimestepRange", "advanced/conditioning", joined, OUT, PLAIN),
)
