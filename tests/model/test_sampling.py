"""ComfyUI's sampling, against what ComfyUI itself drew and computed (tests/model/comfy), and every family by it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from handler import ImageRequest, Recipe, Worker
from handler.core.errors import InvalidValue
from handler.core.recipe import Mask, Reference
from handler.core.sampling import SAMPLERS as NAMES
from handler.core.sampling import SCHEDULES as SCHEDULE_NAMES
from handler.core.sampling import Sampling
from handler.model.sampling.curves import Eps, Flow, curve_of
from handler.model.sampling.noise import CPU, BrownianTree, in_steps, of_tree, seeded
from handler.model.sampling.samplers import SAMPLERS
from handler.model.sampling.scheduler import ComfyScheduler
from handler.model.sampling.schedules import SCHEDULES, sigmas_of
from handler.model.sampling.solving import Solving

COMFY = Path(__file__).parent / "comfy"
CROP = slice(64, 192)  # what is kept of ComfyUI's pictures, along each side
GOLDEN = sorted(path for path in COMFY.glob("*-d*.png"))
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
EPS = curve_of(SD | {"prediction_type": "epsilon"}, "", Sampling())
CURVES = {
    "eps (SD1.5, SDXL)": EPS,
    "FLUX.1 dev shift 1.15": Flow(1.15, "exponential"),
    "FLUX.1 schnell shift 1.0 (discrete flow)": Flow(1.0),
    "SD3 shift 3": Flow(3.0),
    "AuraFlow node shift 3 (Z-Image template)": Flow(3.0),
    "AuraFlow node shift 3.1 (Qwen template)": Flow(3.1),
}
STARS = "three yellow stars on a purple background"


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def asked(worker: Worker, images: tuple[Reference, ...] = (), mask: Mask | None = None, **fields: Any) -> Recipe:
    known: dict[str, Any] = {"prompt": "a red circle", "width": 64, "height": 64, "seed": 1} | fields
    request = ImageRequest(**known, images=tuple(b"x" for _ in images), mask=mask and b"x")
    return worker.spec.recipe(request, images, mask=mask)


def draw(worker: Worker, recipe: Recipe) -> Any:
    return worker.generate(recipe)[0].rgb.astype(int)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_comfyuis_own_pictures(path: Path, spark: Worker) -> None:
    """By the weights of spark: the file's name says how."""
    sampler, schedule, steps, denoise = path.stem.split("-")
    sampling = Sampling(sampler=sampler, scheduler=schedule, steps=int(steps), denoise=float(denoise[1:]))
    images = (Reference(pixels(COMFY / "init_red_circle_seed3.png"), "init"),) if sampling.denoise < 1 else ()
    recipe = asked(spark, images, prompt=STARS, width=256, height=256, seed=7, sampling=sampling)
    off = np.abs(draw(spark, recipe)[CROP, CROP] - pixels(path))
    assert off.max() <= 1
    assert off.mean() < 0.001


@pytest.mark.parametrize("kind", CURVES)
def test_sigmas_are_comfyuis(kind: str) -> None:
    known = json.loads((COMFY / "sigmas.json").read_text())[kind]
    assert known.keys() == set(SCHEDULE_NAMES)
    for schedule, counts in known.items():
        for steps, wanted in counts.items():
            found = sigmas_of(CURVES[kind], Sampling(scheduler=schedule, steps=int(steps)))
            assert found.tolist() == pytest.approx(wanted, abs=2e-6), (schedule, steps)


def test_a_timestep_between_two_is_the_one_that_fp32_finds_nearer() -> None:
    halfway = sigmas_of(EPS, Sampling(scheduler="sgm_uniform", steps=4))[2]
    assert float(EPS.sigma(torch.tensor(499.5))) == float(halfway)
    assert int(EPS.told(halfway)) == 500
    assert int(EPS.told(sigmas_of(EPS, Sampling(scheduler="normal", steps=5))[2])) == 500
    assert [int(EPS.told(EPS.table[i].float())) for i in (0, 1, 499, 500, 999)] == [0, 1, 499, 500, 999]


def test_denoise_takes_the_last_of_more_steps() -> None:
    whole = sigmas_of(EPS, Sampling(scheduler="normal", steps=8))
    assert sigmas_of(EPS, Sampling(scheduler="normal", steps=5, denoise=0.6)).tolist() == whole[-6:].tolist()
    assert len(sigmas_of(EPS, Sampling(scheduler="beta", steps=1, denoise=0.01))) == 2


def test_part_of_the_steps() -> None:
    whole = sigmas_of(EPS, Sampling(scheduler="karras", steps=8)).tolist()

    def part(**fields: Any) -> list[float]:
        return sigmas_of(EPS, Sampling(scheduler="karras", steps=8, **fields)).tolist()

    assert part(start=3) == whole[3:]
    assert part(end=5) == [*whole[:5], 0.0]
    assert part(start=2, end=5, leftover_noise=True) == whole[2:6]
    assert part(end=8, leftover_noise=True) == part(end=900) == whole
    assert part(sigmas=(3.0, 2.0, 0.0)) == [3.0, 2.0, 0.0]
    with pytest.raises(InvalidValue, match="leave no step"):  # this schedule has fewer than asked
        sigmas_of(Flow(1.0), Sampling(scheduler="beta", steps=1000, start=980))


def test_samplers_of_two_orders_leave_out_their_last_step_but_one() -> None:
    whole = sigmas_of(EPS, Sampling(steps=6)).tolist()
    for sampler in ("uni_pc", "uni_pc_bh2", "dpm_2", "dpm_2_ancestral"):
        assert sigmas_of(EPS, Sampling(sampler=sampler, steps=5)).tolist() == whole[:5] + whole[-1:]
        assert sigmas_of(EPS, Sampling(sampler=sampler, steps=6, custom=True)).tolist() == whole


@pytest.mark.parametrize("steps", [20, 28, 30, 35])
def test_a_schedule_that_has_more_steps_than_asked_gives_basic_scheduler_its_last(steps: int) -> None:
    """As ComfyUI's `get_sigmas` cuts; KSampler takes them all."""
    whole = sigmas_of(EPS, Sampling(scheduler="ddim_uniform", steps=steps)).tolist()
    assert (len(whole) > steps + 1) == (steps != 20)
    cut = sigmas_of(EPS, Sampling(scheduler="ddim_uniform", steps=steps, custom=True)).tolist()
    assert cut == whole[-(steps + 1) :]


def test_all_names_mean_something() -> None:
    assert SAMPLERS.keys() == set(NAMES)
    assert SCHEDULES.keys() == set(SCHEDULE_NAMES)


@pytest.mark.parametrize(
    ("config", "transformer", "sampling", "wanted"),
    [
        ({"shift": 3.0}, "SD3Transformer2DModel", {}, Flow(3.0)),
        ({"shift": 3.0, "use_dynamic_shifting": True}, "FluxTransformer2DModel", {}, Flow(1.15, "exponential")),
        ({"shift": 1.0, "use_dynamic_shifting": False}, "FluxTransformer2DModel", {}, Flow(1.0)),
        ({"use_dynamic_shifting": True}, "QwenImageTransformer2DModel", {}, Flow(1.15, "exponential")),
        ({"shift": 3.0}, "", {"shift": 0.9, "shift_type": "exponential"}, Flow(0.9, "exponential")),
    ],
)  # fmt: skip
def test_which_curve_a_model_has(config: Any, transformer: str, sampling: Any, wanted: Flow) -> None:
    assert curve_of(config, transformer, Sampling(**sampling)) == wanted


def test_v_prediction_and_zero_terminal_snr() -> None:
    config = SD | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    curve = curve_of(config, "", Sampling())
    assert isinstance(curve, Eps)
    assert float(curve.table[-1]) == pytest.approx(4518.7, abs=0.1)
    assert float(curve.table[0]) == pytest.approx(float(EPS.table[0]), rel=1e-6)
    picture, noise, sigma = torch.tensor([0.5]), torch.tensor([-1.25]), torch.tensor(2.0)
    alpha = 1 / (1 + sigma**2).sqrt()
    velocity = alpha * noise - alpha * sigma * picture
    assert curve.denoised(velocity, curve.noised(picture, noise, sigma), sigma) == pytest.approx(0.5, abs=1e-6)


TORCHSDE = {
    (0.0292, 14.6): [-2.155967950820923, 0.35492733120918274, 2.062206268310547, 0.44973495602607727],
    (7.25, 14.6): [-1.042567491531372, 0.5311521291732788, 3.5236406326293945, -0.7769376039505005],
    (0.5, 7.25): [-0.8558428287506104, 0.6497588753700256, -1.5006935596466064, -0.11963377892971039],
    (0.0292, 0.5): [-0.25755757093429565, -0.8259837031364441, 0.03925951197743416, 1.3463062047958374],
    (3.1, 3.2): [-0.26627278327941895, 0.14750739932060242, 0.036026619374752045, -0.5432167649269104],
}


def test_the_brownian_tree_is_torchsdes() -> None:
    """Numbers of torchsde 0.2.6's BrownianTree(0.0292, zeros(2, 2), 14.6, entropy=2**63 + 5)."""
    tree = BrownianTree(0.0292, 14.6, 2**63 + 5, lambda seed: torch.randn(2, 2, generator=seeded(seed)))
    for (low, high), wanted in TORCHSDE.items():
        assert tree.between(low, high).flatten().tolist() == wanted
    assert not tree.between(3.0, 3.0).any()
    assert tree.between(0.0, 99.0).tolist() == tree.between(0.0292, 14.6).tolist()


def test_noise_in_the_steps_is_another_than_the_first() -> None:
    def made(generator: torch.Generator) -> Any:
        return torch.randn(3, generator=generator)

    sigma, noise = torch.tensor(1.0), in_steps(made, 2**64 - 1, CPU)
    again = seeded(0)
    for _ in range(2):
        assert noise(sigma, sigma).tolist() == made(again).tolist()


TOY = json.loads((COMFY / "samplers.json").read_text())


@pytest.mark.parametrize("case", TOY)
def test_samplers_take_comfyuis_own_steps(case: str) -> None:
    """A toy's: what ComfyUI 0.3.64's functions made of it, every fifth of 16 numbers."""
    kind, name, eta, s_noise = case.split()
    curve, sampler = {"eps": EPS, "flow": Flow(3.0)}[kind], SAMPLERS[name]
    sigmas = sigmas_of(curve, Sampling(sampler=name, scheduler="simple", steps=6))

    def drawn(generator: torch.Generator) -> Any:
        return torch.randn(16, generator=generator)

    noise = in_steps(drawn, 11, CPU) if sampler.noise == "own" else of_tree(drawn, 11, CPU, sigmas)
    first = curve.noised(torch.zeros(16), drawn(seeded(11)), sigmas[0], first=True)
    steps, seen = sampler.solve(first, sigmas, Solving(curve, noise, float(eta), float(s_noise))), []

    def run(x: Any, sigma: Any) -> None:
        while True:
            seen.append(sigma)
            x, sigma = steps.send(0.9 * torch.tanh(x / (sigma**2 + 1) ** 0.5 + torch.linspace(-1, 1, 16)))

    with pytest.raises(StopIteration) as end:
        run(*next(steps))
    assert seen == sampler.evaluated(curve, sigmas, float(eta))
    assert curve.rid(end.value.value, sigmas[-1])[::5].tolist() == pytest.approx(TOY[case], abs=2e-5)


SENSELESS = {  # what is asked, and why nothing comes of it
    "one step of a schedule for two": ({"scheduler": "kl_optimal", "steps": 1}, "needs more"),
    "the same level twice": ({"sigmas": (1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0), "custom": True}, "same level"),
    "more steps than levels": ({"scheduler": "simple", "steps": 20, "denoise": 0.01}, "same level"),
    "more than a flow's noise": ({"sigmas": (1e6, 1e3, 1.0, 0.0), "custom": True}, "beyond a flow's"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", SENSELESS)
@pytest.mark.parametrize("curve", [EPS, Flow(1.0), Flow(1.15, "exponential")], ids=["eps", "flow", "exponential"])
def test_steps_of_which_nothing_comes_are_refused(curve: Any, kind: str, name: str) -> None:
    """Such a run would give none, or would end a sound worker at its third failure."""
    given, why = SENSELESS[kind]
    sampling = Sampling(sampler=name, **given)
    try:
        scheduler = ComfyScheduler(curve, sampling, {})
    except InvalidValue as error:
        assert why in str(error)  # noqa: PT017
        return
    generator = torch.Generator().manual_seed(1)

    def noise(of: torch.Generator) -> torch.Tensor:
        return torch.randn(1, 4, 2, 2, generator=of)

    own = scheduler.sampler.noise == "own"
    between = in_steps(noise, 1, CPU) if own else of_tree(noise, 1, CPU, scheduler.whole)
    x = scheduler.begin(noise(generator), Solving(curve, between, sampling.eta, sampling.s_noise))
    for timestep in scheduler.timesteps:
        x, _ = scheduler.step(scheduler.scale_model_input(x, timestep) / 10, timestep, x)
    assert x.isfinite().all()


def test_every_sampler_has_its_case() -> None:
    assert {tuple(case.split()[:2]) for case in TOY} == {(kind, name) for kind in ("eps", "flow") for name in NAMES}
