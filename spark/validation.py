"""What steers the training and chooses what is shipped: validation prompts, drawn at every size and judged."""

import json
from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from spark import flow
from spark.checker import check
from spark.journal import Journal
from spark.latents import LARGE, LARGEST, NATIVE, Size
from spark.measures import mean, measure
from spark.scenes import KINDS, held_out

SIZES: tuple[Size, ...] = ((128, 128), NATIVE, LARGE, (768, 512), LARGEST)
STEPS = 4
FINAL = -1  # in the place of a step


def averaged(average: dict[str, Tensor]) -> FluxTransformer2DModel:
    """A transformer with these weights."""
    transformer = flow.build()
    transformer.load_state_dict(average)
    return transformer


def score(pipeline: FluxPipeline, size: Size, prompts: int) -> dict[str, float]:
    """The share right and the measures, over `prompts` of each kind."""
    verdicts, measured = [], []
    for kind in KINDS:
        for seed, (prompt, scene) in enumerate(held_out(prompts, "validation", kind, "everyday")):
            image = pipeline(
                prompt, width=size[0], height=size[1], num_inference_steps=STEPS, guidance_scale=0.0,
                max_sequence_length=32, generator=torch.Generator().manual_seed(seed),
            ).images[0]  # fmt: skip
            verdicts.append(check(image, scene).right)
            measured.append(measure(image, scene))
    return {"right": round(sum(verdicts) / len(verdicts), 3), **mean(measured)}


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
    average = torch.load(folder / "flow.pt", weights_only=True)["average"][0]
    shift = validate(folder, average, Journal(folder / "flow.log"), FINAL, prompts)
    (folder / "shift.json").write_text(json.dumps(shift))


def chosen(folder: Path) -> float:
    """What `choose` decided."""
    shift: float = json.loads((folder / "shift.json").read_text())
    return shift


def finished(folder: Path) -> FluxPipeline:
    """The whole FluxPipeline with the averaged weights in `folder`/flow.pt."""
    average = torch.load(folder / "flow.pt", weights_only=True)["average"][0]
    return flow.assemble(folder, averaged(average), chosen(folder))
