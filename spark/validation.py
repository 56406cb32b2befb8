"""What steers the training: validation prompts, drawn at every size and judged."""

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image
from torch import Tensor

from spark import flow
from spark.checker import check
from spark.journal import Journal
from spark.latents import LARGE, LARGEST, NATIVE, Size
from spark.measures import mean, measure
from spark.scenes import KINDS, Scene, held_out

SIZES: tuple[Size, ...] = ((128, 128), NATIVE, LARGE, (768, 512), LARGEST)
STEPS, TEXT_TOKENS = 4, 32  # as the shipped model draws
FINAL = -1  # in the place of a step


def trained(folder: Path) -> dict[str, Tensor]:
    """The averaged weights in `folder`/flow.pt."""
    average: dict[str, Tensor]
    [average] = torch.load(folder / "flow.pt", weights_only=True)["average"]
    return average


def averaged(average: dict[str, Tensor]) -> FluxTransformer2DModel:
    """A transformer with these weights."""
    transformer = flow.build()
    transformer.load_state_dict(average)
    return transformer


def drawn(pipeline: FluxPipeline, prompt: str, seed: int, size: Size) -> Image.Image:
    """One picture, as the shipped model draws it unless asked otherwise."""
    picture: Image.Image = pipeline(
        prompt, width=size[0], height=size[1], num_inference_steps=STEPS, guidance_scale=0.0,
        max_sequence_length=TEXT_TOKENS, generator=torch.Generator().manual_seed(seed),
    ).images[0]  # fmt: skip
    return picture


def judged(pictures: Iterable[Image.Image], scenes: list[Scene]) -> dict[str, float]:
    """The share right and the means of the measures, of as many pictures as scenes."""
    both = [
        (check(picture, scene).right, measure(picture, scene)) for picture, scene in zip(pictures, scenes, strict=True)
    ]
    right = round(sum(right for right, _ in both) / len(both), 3)
    return {"right": right, **mean(found for _, found in both)}


def score(pipeline: FluxPipeline, size: Size, prompts: int) -> dict[str, float]:
    """`judged`, over `prompts` of each kind."""
    asked = [pair for kind in KINDS for pair in enumerate(held_out(prompts, "validation", kind, "everyday"))]
    pictures = (drawn(pipeline, prompt, seed, size) for seed, (prompt, _) in asked)
    return judged(pictures, [scene for _, (_, scene) in asked])


def validate(folder: Path, average: dict[str, Tensor], step: int, prompts: int = 2) -> None:
    """Write into `folder`/flow.log how well these weights draw at every size."""
    pipeline = flow.assemble(folder, averaged(average))
    scores = {f"{width}x{height}": score(pipeline, (width, height), prompts) for width, height in SIZES}
    Journal(folder / "flow.log").write(validated=step, **scores)


def conclude(folder: Path, prompts: int = 6) -> None:
    """`validate` the finished weights, by more prompts."""
    validate(folder, trained(folder), FINAL, prompts)


def finished(folder: Path) -> FluxPipeline:
    """The whole FluxPipeline with the averaged weights in `folder`/flow.pt."""
    return flow.assemble(folder, averaged(trained(folder)))
