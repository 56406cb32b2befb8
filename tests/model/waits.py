"""A device that only counts: where would a GPU make the host wait?

Tensors of it say that they are on a device, compute on the CPU, and note what cannot go on before the device has done
all it was told: numbers that the host reads, shapes that hang on them, copies to and from pageable memory.

    python tests/model/waits.py   draws from text and edits with every family and scheduler; prints as JSON what waited
                                  in one step, and after the last one: kind of wait, file and function, how often

It changes torch for its whole process, so tests run it in one of its own.
"""

import dataclasses
import functools
import importlib
import json
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

ROOT = Path(__file__).parents[2]
DEVICE = "counting"
SITES = ("diffusers/", "transformers/", "handler/")
READ = {"_local_scalar_dense": "item", "nonzero": "nonzero", "masked_select": "nonzero", "equal": "item"}
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
STEPS, SIDE = 4, 64
noted: Counter[str] = Counter()


class OnDevice(torch.Tensor):
    """A tensor of the device; `held` is what computes."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "OnDevice":
        make: Any = torch.Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made: OnDevice = make(cls, held.size(), **layout, device=torch.device(DEVICE, 0))
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def tolist(self) -> Any:
        """torch has none for tensors that are not its own."""
        note("item")
        return self.held.tolist()


class Counting(TorchDispatchMode):
    """Inside, what is asked to be on the device is there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU what the device was told."""
    name, target = func._schema.name.removeprefix("aten::"), kwargs.get("device")
    arrives = target is not None and torch.device(target).type == DEVICE
    ours: list[OnDevice] = []
    inside = [held(value, ours) for value in args], {key: held(value, ours) for key, value in kwargs.items()}
    if waiting := waits(name, args, kwargs, arrives, bool(ours)):
        note(waiting)
    if arrives:
        inside[1].update(device=torch.device("cpu"), pin_memory=False)
    found = func(*inside[0], **inside[1])
    return on_device(found, ours) if arrives or (ours and target is None) else found


def waits(name: str, args: Any, kwargs: dict[str, Any], arrives: bool, ours: bool) -> str | None:
    """What the host would wait for."""
    if name == "_to_copy" and not kwargs.get("non_blocking"):
        leaves = isinstance(args[0], OnDevice) and kwargs.get("device") is not None and not arrives
        return "to host" if leaves else "to device" if arrives and not isinstance(args[0], OnDevice) else None
    if name == "copy_" and not (kwargs.get("non_blocking") or args[2:] == (True,)):
        here, there = (isinstance(each, OnDevice) for each in args[:2])
        return None if here == there else "to device" if here else "to host"
    if name in INDEXED and ours:
        masks = [each for each in args[1] if each is not None and each.dtype in (torch.bool, torch.uint8)]
        places = [each for each in args[1] if each is not None and not isinstance(each, OnDevice)]
        return "nonzero" if masks else "to device" if places else None
    return READ.get(name) if ours else None


def note(kind: str) -> None:
    """A wait, at the innermost function that is not torch's."""
    for frame in reversed(traceback.extract_stack(limit=60)):
        site = frame.filename.rpartition("site-packages/")[2].removeprefix(f"{ROOT}/")
        if site.startswith(SITES):
            noted[f"{kind}: {site.rpartition('/')[2]} {frame.name}"] += 1
            return


def held(value: Any, seen: list[OnDevice]) -> Any:
    """What computes in the place of the device's tensors in `value`; they are added to those `seen`."""
    if isinstance(value, OnDevice):
        seen.append(value)
        return value.held
    return [held(each, seen) for each in value] if isinstance(value, (list, tuple)) else value


def on_device(value: Any, ours: list[OnDevice]) -> Any:
    """What was computed, as the device's; what was written to is one of `ours`."""
    if isinstance(value, (list, tuple)):
        return type(value)(on_device(each, ours) for each in value)
    if not isinstance(value, torch.Tensor) or isinstance(value, OnDevice):
        return value
    written = [tensor for tensor in ours if tensor.held is value]
    return written[0] if written else OnDevice(value)


def register() -> Any:
    """Make the device known to torch; what this returns has to be kept."""
    _setup_privateuseone_for_python_backend(DEVICE)
    library = torch.library.Library("aten", "IMPL", "PrivateUse1")

    def strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> Any:
        return OnDevice(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))

    def empty(size: Any, dtype: Any = None, **_: Any) -> Any:
        return OnDevice(torch.empty(size, dtype=dtype, device="cpu"))

    def copied(source: Any, target: Any, non_blocking: bool = False) -> Any:
        note("to device")  # inside torch: what it makes of a list of numbers
        held(target, []).copy_(held(source, []))
        return target

    def read(scalar: Any) -> Any:
        note("item")  # likewise, of a list of the device's scalars
        return held(scalar, []).item()

    library.impl("_local_scalar_dense", read)
    library.impl("empty_strided", strided)
    library.impl("empty.memory_format", empty)
    library.impl("_copy_from", copied)
    torch.inference_mode = lambda *_: torch.no_grad()  # type: ignore[misc,assignment]  # it has no tensors of others
    return library


def move(module: torch.nn.Module) -> None:
    """Its weights to the device."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = torch.nn.Parameter(OnDevice(weight.detach()), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnDevice(buffer.detach())


def edits(spec: Any, recipe: Any) -> Iterator[tuple[str, Any]]:
    """The ways a model can draw `recipe`'s size, with a recipe for each."""
    import numpy as np

    from handler.core.recipe import Mask, Reference

    rgb, kept = (
        np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8),
        np.full((SIDE, SIDE), 255, np.uint8),
    )
    kept[16:48, 16:48] = 0
    image, mask = Reference(rgb, "image"), Mask(kept, "mask")
    yield "text", recipe
    if spec.max_images:
        yield "references", dataclasses.replace(recipe, images=(image,))
    elif recipe.sampling or recipe.scheduler in spec.edit_schedulers:
        yield "image", dataclasses.replace(recipe, images=(image,), strength=0.75)
    if spec.masked_pixels and (recipe.sampling or recipe.scheduler in spec.edit_schedulers):
        yield "mask", dataclasses.replace(recipe, images=(image,), strength=0.75, mask=mask)


class Replayed:
    """A function that answers after its first run, `over`, what it answered then."""

    def __init__(self, function: Any) -> None:
        functools.update_wrapper(self, function)  # pipelines look at signatures
        self.over, self._function, self._answer = False, function, None

    def __call__(self, *args: Any, **options: Any) -> Any:
        if not self.over:
            self._answer = self._function(*args, **options)
        return self._answer


def draw(drawing: Any, recipe: Any) -> tuple[dict[str, float], dict[str, int]]:
    """What waits in a turn of the loop that is neither the first nor the last, and after the last; by kind and site."""
    seen: list[Counter[str]] = []

    def on_step(*_: Any) -> None:
        seen.append(noted.copy())

    noted.clear()
    [outcome] = drawing.draw([recipe], [on_step])
    if isinstance(outcome, Exception):
        raise outcome
    turns = len(seen) - 2
    return {site: count / turns for site, count in (seen[-2] - seen[0]).items()}, dict(noted - seen[-1])


def cases() -> Iterator[tuple[str, Any]]:
    """Every family, scheduler and way to draw, with what waits; models run in the first of a family."""
    import tiny
    from handler import MODELS, ImageRequest
    from handler.model.families import constants, quiet
    from handler.model.runner import Runner

    quiet()
    rows = {spec.family: spec for spec in MODELS.values() if spec.max_steps >= STEPS and not spec.embedded}
    for spec in rows.values():
        pipeline, family = tiny.build(spec), importlib.import_module(spec.family)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                move(part)
        constants.settle(pipeline)
        drawing = Runner(spec, family, pipeline, lambda _: False, Mark)
        denoiser, vae = getattr(pipeline, family.DENOISER), pipeline.vae
        denoiser.forward, vae.decode = models = Replayed(denoiser.forward), Replayed(vae.decode)
        request = {"prompt": "a red circle", "width": SIDE, "height": SIDE, "num_inference_steps": STEPS, "seed": 1}
        for name in spec.schedulers:
            for way, recipe in edits(spec, spec.recipe(ImageRequest(**request, scheduler=name))):
                yield f"{spec.id} {name} {way}", draw(drawing, recipe)
                for model in models:
                    model.over = True
        yield from sampled(spec, drawing, request)


def sampled(spec: Any, drawing: Any, request: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """By ComfyUI's samplers, but for those whose noise a generator of the device draws: this one has none."""
    from handler import ImageRequest
    from handler.core.sampling import Sampling

    asked = {name: value for name, value in request.items() if name != "num_inference_steps"}
    cfg = max(spec.guidance, 1.0) if spec.takes_negative_prompt else 1.0  # what is replayed was drawn with guidance
    for name in ("uni_pc", "dpmpp_2m_sde"):  # one that looks back, one with a Brownian tree
        sampling = Sampling(sampler=name, scheduler="karras", steps=STEPS, cfg=cfg)  # type: ignore[arg-type]
        recipe = spec.recipe(ImageRequest(**asked, sampling=sampling))
        for way, edit in edits(spec, recipe):
            if way in (("text", "references") if spec.max_images else ("text", "image", "mask")):
                yield f"{spec.id} comfy-{name} {way}", draw(drawing, edit)


def plain() -> dict[str, int]:
    """What waits in a step of diffusers' own DDIM."""
    from diffusers import DDIMScheduler

    scheduler, latents = DDIMScheduler(), torch.ones(1, 4, 8, 8, device=DEVICE)
    scheduler.set_timesteps(STEPS, device=DEVICE)
    noted.clear()
    scheduler.step(latents, scheduler.timesteps[1], latents)
    return dict(noted)


class Mark:
    """Of the device: it has done at once what it was told, but to wait for it is a wait."""

    def synchronize(self) -> None:
        """Wait."""
        note("mark")

    def elapsed_time(self, _: "Mark") -> float:
        """It has no clock."""
        return 0.0


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests/doubles")]
    library = register()
    with Counting():
        print(json.dumps({"cases": dict(cases()), "plain": plain()}))
