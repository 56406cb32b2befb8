"""What steers the training and chooses what is shipped: validation prompts, drawn at every size and judged."""

import json
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


def validate(folder: Path, average: dict[str, Tensor], journal: Journal, step: int, prompts: int = 2) -> float:
    """Write down what each of `flow.SHIFTS` gives at every size; returns the best."""
    found = dict[float, float]()
    for shift in flow.SHIFTS:
        pipeline = flow.assemble(folder, averaged(average), shift)
        scores = {f"{width}x{height}": score(pipeline, (width, height), prompts) for width, height in SIZES}
        found[shift] = sum(each["right"] + each["iou"] for each in scores.values())
        journal.write(validated=step, shift=shift, **scores)
    return max(found, key=lambda shift: found[shift])


def choose(folder: Path, prompts: int = 6) -> None:
    """Decide by validation prompts with which shift the finished transformer is shipped: `folder`/shift.json."""
    shift = validate(folder, trained(folder), Journal(folder / "flow.log"), FINAL, prompts)
    (folder / "shift.json").write_text(json.dumps(shift))


def chosen(folder: Path) -> float:
    """What `choose` decided."""
    shift: float = json.loads((folder / "shift.json").read_text())
    return shift


def finished(folder: Path) -> FluxPipeline:
    """The whole FluxPipeline with the averaged weights in `folder`/flow.pt."""
    return flow.assemble(folder, averaged(trained(folder)), chosen(folder))
