"""No step waits for the GPU where that can be helped, and the schedulers are diffusers' to the last bit."""

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import ROOT

import tiny
from handler import MODELS
from handler.model.families import chroma, schedulers
from handler.model.families.schedulers import EPSILON, FLOW

PACE = "mark: stages.py step"  # for the step before: what keeps the host from running ahead of what it tells
END = {"mark: stages.py finish": 1}
# What diffusers' own loops do at each step: `torch.tensor([timesteps[i + 1]])`, `t_norm.item()`, and noise of the CPU,
# by which a seed means the same on every device.
INPAINTS = {
    "flux-dev": "pipeline_flux_inpaint.py",
    "sd3.5-large": "pipeline_stable_diffusion_3_inpaint.py",
    "sd1.5": "pipeline_stable_diffusion_inpaint.py",
    "sdxl-lightning": "pipeline_stable_diffusion_xl_inpaint.py",
    "flux2-klein": "pipeline_flux2_klein_inpaint.py",
    "z-image-turbo": "pipeline_z_image_inpaint.py",
    "qwen-image-lightning": "pipeline_qwenimage_inpaint.py",
    "chroma": "pipeline_chroma_inpainting.py",
}
COMFY = "comfy-"
EULER_A = {"to device: torch_utils.py randn_tensor": 1}
Z_IMAGE = {
    "image": {"item: pipeline_z_image_img2img.py __call__": 1},
    "mask": {f"item: {INPAINTS['z-image-turbo']} __call__": 2},
}
# And after the loop: how large the latents are, how they are scaled.
UNPACKS = {("flux2-dev", way): "pipeline_flux2.py" for way in ("text", "references")} | {
    ("flux2-klein", "mask"): INPAINTS["flux2-klein"]
}
SCALES = {
    "text": "pipeline_qwenimage.py",
    "image": "pipeline_qwenimage_img2img.py",
    "mask": "pipeline_qwenimage_inpaint.py",
}


def own_of_a_step(model: str, scheduler: str, way: str) -> dict[str, int]:
    masked = {f"item: {INPAINTS[model]} __call__": 1} if way == "mask" else {}
    return (
        masked
        | (Z_IMAGE.get(way, {}) if model == "z-image-turbo" else {})
        | (EULER_A if scheduler == "euler-a" else {})
    )


def own_of_the_end(model: str, way: str) -> dict[str, int]:
    if "qwen" in model:
        return {f"to device: {SCALES[way]} __call__": 2}
    site = UNPACKS.get((model, way))
    return {f"item: {site} _unpack_latents_with_ids": 3} if site else {}


@pytest.fixture(scope="module")
def counted() -> Any:
    """What tests/model/waits.py says."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests/model/waits.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def cases(counted: Any) -> Any:
    return counted["cases"]


def test_nothing_waits_but_what_is_diffusers_own(cases: Any) -> None:
    """With every family, scheduler and kind of edit: nothing within a step, and once for the whole picture."""
    expected = {}
    for case in cases:
        model, scheduler, way = case.split()
        if scheduler.startswith(COMFY) and way == "mask":
            way = "image"  # by the same pipeline
        expected[case] = [
            {PACE: 1} | own_of_a_step(model, scheduler, way),
            END | own_of_the_end(model, way),
        ]
    assert cases == expected


def test_every_family_and_scheduler_was_counted(cases: Any) -> None:
    """Those of one row of each family, which has all that any of its rows has."""
    ways = {"text": 0, "image": 0, "mask": 0, "references": 0}
    pairs = set()
    for case in cases:
        model, scheduler, way = case.split()
        pairs.add((MODELS[model].family, scheduler))
        ways[way] += 1
    known = dict.fromkeys({spec.family for spec in MODELS.values()}, ("comfy-uni_pc", "comfy-dpmpp_2m_sde"))
    offered = {(spec.family, name) for spec in MODELS.values() for name in (*spec.schedulers, *known[spec.family])}
    assert pairs == offered
    assert min(ways.values()) > 1


def test_the_device_that_counts_sees_waits(counted: Any) -> None:
    """diffusers' own DDIM looks up by the device's timestep, and compares it; so does its variance."""
    assert counted["plain"] == {
        "item: scheduling_ddim.py step": 3,
        "item: scheduling_ddim.py _get_variance": 3,
    }


def plain(scheduler: Any) -> Any:
    """diffusers' own, configured alike."""
    kind = next(base for base in type(scheduler).__mro__ if base.__module__.startswith("diffusers."))
    return kind.from_config(scheduler.config)


def loaded() -> Iterator[Any]:
    for model in ("flux-dev", "sd3.5-large", "qwen-image", "sd1.5", "sdxl", "sdxl-turbo", "sdxl-lightning"):
        spec = MODELS[model]
        own = tiny.build(spec).scheduler
        table = FLOW if "flow-match-euler" in spec.schedulers else EPSILON
        for name in spec.schedulers:
            yield pytest.param(table, name, own, spec.scheduler_config, id=f"{model}-{name}")


EACH = pytest.mark.parametrize(("table", "name", "own", "differing"), list(loaded()))


def run(scheduler: Any, begin: int | None, dtype: torch.dtype, steps: int = 6, stop: int = 99) -> list[torch.Tensor]:
    """Latents of each step, and each time noised ones, as pipelines go about it; `begin` as edits have it."""
    shifted = {"mu": 0.8} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(steps, **shifted)
    start = (begin or 0) * scheduler.order
    if begin is not None and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    draws = torch.Generator().manual_seed(0)
    latents, noise, image = (torch.randn(1, 4, 4, 4, generator=draws).to(dtype) for _ in range(3))
    noised = getattr(scheduler, "scale_noise", None) or (lambda image, t, noise: scheduler.add_noise(image, noise, t))
    random = {"generator": draws} if "Ancestral" in type(plain(scheduler)).__name__ else {}
    timesteps, seen = scheduler.timesteps[start:], []
    if begin is not None:
        seen.append(noised(image, timesteps[:1], noise))
    for i, t in enumerate(timesteps[:stop]):
        given = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
        output = (given * 0.3 + t / 4000).tanh().to(dtype)
        latents = scheduler.step(output, t, latents, **random, return_dict=False)[0]
        seen.append(latents)
        if begin is not None and i + 1 < len(timesteps):
            seen.append(noised(image, timesteps[i + 1 : i + 2], noise))
    return seen


@EACH
@pytest.mark.parametrize("begin", [None, 0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_draws_what_a_fresh_one_of_diffusers_draws(
    table: Any, name: str, own: Any, differing: Any, begin: int | None, dtype: torch.dtype
) -> None:
    """Bit for bit; again; after a run that was broken off; and with other steps in between."""

    def make() -> Any:
        return schedulers.make(table, name, own, differing)

    expected = run(plain(make()), begin, dtype)
    assert same(run(make(), begin, dtype), expected)
    assert same(run(make(), begin, dtype), expected)
    run(make(), begin, dtype, stop=3)
    run(make(), begin, dtype, steps=9)
    assert same(run(make(), begin, dtype), expected)


def same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@EACH
def test_no_run_changes_what_is_copied(table: Any, name: str, own: Any, differing: Any) -> None:
    schedulers.make(table, name, own, differing)
    [kept] = [made for made in schedulers._made[own].values() if type(made) is table[name][0]]
    before = copy.deepcopy(vars(kept))
    run(schedulers.make(table, name, own, differing), None, torch.float32, stop=3)
    assert repr(vars(kept)) == repr(before)


def test_chroma_embeds_as_diffusers_does() -> None:
    """But for where the zeros are made."""
    embeddings = tiny.build(MODELS["chroma"]).transformer.time_text_embed
    forward = chroma._embedded.__wrapped__  # type: ignore[attr-defined]
    for dtype in (torch.float32, torch.bfloat16):
        for timestep in (torch.tensor([0.7], dtype=dtype), torch.tensor([1.0, 0.25, 0.0], dtype=dtype)):
            made = embeddings(timestep)
            assert made.dtype == dtype
            assert torch.equal(made, forward(embeddings, timestep))
