"""A request, drawn by plain diffusers: its own pipelines and schedulers, called as its documentation calls them.

Nothing here is Kindling's but the catalogue's rows, so this says once more, by itself, what Kindling adds by design: a
canvas on the model's grid with the picture amid it, shares of the steps rounded down, masks that take whole cells, and
the image put back where its mask keeps it. Where diffusers is at fault itself, `mended` says how.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy
import torch
from diffusers.configuration_utils import FrozenDict
from PIL import Image, ImageOps

from handler import ModelSpec

LANCZOS, BILINEAR = Image.Resampling.LANCZOS, Image.Resampling.BILINEAR
SEEN = 1024 * 1024  # pixels of a reference
Size = tuple[int, int]
Pixels = Any  # uint8 (height, width, 3)


@dataclass(frozen=True, slots=True)
class Family:
    """diffusers' classes for text, for images and for masks; how guidance is called; latents to a cell of a mask."""

    text: str
    whole: str = ""
    masked: str = ""
    guidance: str = "guidance_scale"
    cell: int = 1
    no_negative: str | None = None  # what stands for a negative prompt that was left out
    tokens: bool = True  # whether it takes the length of its text
    absent: tuple[str, ...] = ()  # components that are not loaded


FAMILIES = {
    "flux": Family("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
    "sd3": Family("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    "sd15": Family(
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        tokens=False,
        absent=("safety_checker", "feature_extractor"),
    ),
    "sdxl": Family(
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        tokens=False,
    ),
    "flux2": Family("Flux2Pipeline"),
    "flux2_klein": Family("Flux2KleinPipeline", masked="Flux2KleinInpaintPipeline", cell=2),
    "z_image": Family("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
    "qwen_image": Family(
        "QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline", "true_cfg_scale", no_negative=" "
    ),
    "chroma": Family("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline"),
}
FLOW: dict[str, tuple[Any, dict[str, Any]]] = {
    "flow-match-euler": (diffusers.FlowMatchEulerDiscreteScheduler, {}),
    "heun": (diffusers.FlowMatchHeunDiscreteScheduler, {}),
    "dpm++": (
        diffusers.DPMSolverMultistepScheduler,
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    ),
}
EPSILON: dict[str, tuple[Any, dict[str, Any]]] = {
    "dpm++": (diffusers.DPMSolverMultistepScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler-a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What is drawn: fields as `POST /generate` takes them, but for the images and the mask, which are files' bytes."""

    fields: Mapping[str, Any]
    images: Sequence[Image.Image] = ()
    mask: Image.Image | None = None


class Plain:
    """The pipelines of one row, loaded from `folder` as diffusers loads them."""

    def __init__(self, spec: ModelSpec, folder: Path, dtype: torch.dtype) -> None:
        self.spec, self.family = spec, FAMILIES[spec.family.rpartition(".")[2]]
        self._folder, self._dtype = folder, dtype
        self._loaded: dict[str, Any] = {}

    @torch.no_grad()
    def draw(self, asked: Asked) -> list[Pixels]:
        """Each picture of the request, together as one run."""
        spec, given = self.spec, asked.fields
        size = (given["width"], given["height"])
        canvas = tuple(-(-side // spec.multiple) * spec.multiple for side in size)
        pipeline = self._pipeline(asked)
        steps = given.get("num_inference_steps", spec.steps)
        taken = self._taken(asked, steps)
        pipeline.scheduler = self._scheduler(pipeline.scheduler, given.get("scheduler"), taken < steps)
        images = self._images(pipeline, asked, size, canvas, taken / steps)
        count = given.get("n", 1)
        generators = [torch.Generator().manual_seed(given["seed"] + i) for i in range(count)]
        found = pipeline(
            prompt=given["prompt"],
            num_images_per_prompt=count,
            width=canvas[0],
            height=canvas[1],
            num_inference_steps=steps,
            generator=generators if count > 1 else generators[0],
            **images,
            **self._guided(given),
            **({"max_sequence_length": spec.text_tokens} if self.family.tokens else {}),
        ).images
        return [self._finished(image, asked, size) for image in found]

    def _pipeline(self, asked: Asked) -> Any:
        family = self.family
        name = family.masked if asked.mask else family.whole if asked.images and family.whole else family.text
        if name not in self._loaded:
            absent = dict.fromkeys(family.absent)
            kind = getattr(diffusers, name)
            pipeline = kind.from_pretrained(self._folder, dtype=self._dtype, local_files_only=True, **absent)
            pipeline.set_progress_bar_config(disable=True)
            for part in pipeline.components.values():
                if isinstance(part, torch.nn.Module):
                    part.requires_grad_(False)  # or torch multiplies batches in another way, and rounds differently
            if all(parameter.ndim < 5 for parameter in pipeline.vae.parameters()):
                pipeline.vae.to(memory_format=torch.channels_last)  # the same layout
            self._loaded[name] = mended(pipeline), pipeline.scheduler
        pipeline, pipeline.scheduler = self._loaded[name]
        return pipeline

    def _scheduler(self, loaded: Any, name: str | None, in_part: bool) -> Any:
        spec = self.spec
        kind, needs = (FLOW if "flow-match-euler" in spec.schedulers else EPSILON)[name or spec.schedulers[0]]
        differing = {**spec.scheduler_config, **(spec.edit_scheduler_config if in_part else {})}
        if kind is diffusers.DPMSolverMultistepScheduler and "shift" in loaded.config:
            differing = {"flow_shift": loaded.config.shift, **differing}
        return kind.from_config(loaded.config, **needs, **differing)

    def _taken(self, asked: Asked, steps: int) -> int:
        """How many of the steps are taken, rounded down."""
        if not asked.images or not (asked.mask or self.family.whole):
            return steps
        return int(steps * asked.fields["strength"] + 1e-6)

    def _guided(self, given: Mapping[str, Any]) -> dict[str, Any]:
        if not self.spec.takes_guidance:
            return {self.family.guidance: 1.0 if "klein" in self.spec.family else 0.0}
        guided = {self.family.guidance: given.get("guidance_scale", self.spec.guidance)}
        if self.spec.takes_negative_prompt:
            guided["negative_prompt"] = given.get("negative_prompt", self.family.no_negative)
        return guided

    def _images(self, pipeline: Any, asked: Asked, size: Size, canvas: Size, strength: float) -> dict[str, Any]:
        images = [opened(image) for image in asked.images]
        if not images:
            return {}
        if not asked.mask and not self.family.whole:
            return {"image": images}
        first = images[0].resize(size, LANCZOS)
        known = {"image": laid(first, size, canvas), "strength": strength}
        if asked.mask:
            cell = self.family.cell * pipeline.vae_scale_factor
            known["mask_image"] = drawn_anew(kept(asked.mask, size), size, canvas, cell)
        if images[1:]:
            known["image_reference"] = images[1:]
        return known

    def _finished(self, image: Image.Image, asked: Asked, size: Size) -> Pixels:
        left, top = ((whole - part) // 2 for whole, part in zip(image.size, size, strict=True))
        found = image.crop((left, top, left + size[0], top + size[1]))
        if asked.mask:
            found = Image.composite(opened(asked.images[0]).resize(size, LANCZOS), found, kept(asked.mask, size))
        return numpy.asarray(found)


def mended(pipeline: Any) -> Any:
    """The pipeline, without what is wrong in diffusers 0.42.1."""
    if isinstance(pipeline, diffusers.ChromaInpaintPipeline):  # asks for a setting that only FLUX.1 has
        transformer = pipeline.transformer
        transformer._internal_dict = FrozenDict({**transformer.config, "guidance_embeds": False})
    if isinstance(pipeline, diffusers.StableDiffusion3InpaintPipeline):  # forgets the VAE's shift: #13611
        decode, shift = pipeline.vae.decode, pipeline.vae.config.shift_factor
        pipeline.vae.decode = lambda latents, **options: decode(latents + shift, **options)
    return pipeline


def opened(image: Image.Image) -> Image.Image:
    """As `diffusers.utils.load_image` opens a file, but laid on white where it is transparent."""
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
    return upright.convert("RGB")


def kept(mask: Image.Image, size: Size) -> Image.Image:
    """255 where the image stays."""
    return mask.convert("RGBA").getchannel("A").resize(size, BILINEAR)


def laid(image: Image.Image, size: Size, canvas: Size) -> Image.Image:
    """Amid the canvas, its edges continued."""
    left, top = ((whole - part) // 2 for whole, part in zip(canvas, size, strict=True))
    pixels = numpy.asarray(image)
    edges = [(top, canvas[1] - size[1] - top), (left, canvas[0] - size[0] - left), (0, 0)]
    return Image.fromarray(numpy.pad(pixels, edges[: pixels.ndim], mode="edge"))


def drawn_anew(kept: Image.Image, size: Size, canvas: Size, cell: int) -> Image.Image:
    """White in every cell that has a pixel which is not wholly kept."""
    opaque = numpy.asarray(laid(kept, size, canvas)) == 255
    found = Image.new("L", canvas, 0)
    for top in range(0, canvas[1], cell):
        for left in range(0, canvas[0], cell):
            if not opaque[top : top + cell, left : left + cell].all():
                found.paste(255, (left, top, left + cell, top + cell))
    return found
