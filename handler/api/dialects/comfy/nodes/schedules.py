"""SIGMAS: schedules by name, the parts of them, and those that are numbers."""

import math
from dataclasses import replace
from typing import Any

from handler.api.dialects.comfy.node import (
    DENOISE,
    MODEL,
    SCHEDULER,
    SIGMAS,
    STEPS,
    At,
    Node,
    number,
    rows,
    text,
    whole,
)
from handler.api.dialects.comfy.values import Model, Sigmas

BETAS = (0.00085, 0.012)  # of Stable Diffusion, scaled linear over `TRAINED` timesteps
TRAINED = 1000


def basic(at: At, model: Model, scheduler: str, steps: int, denoise: float) -> Sigmas:
    """By name."""
    return Sigmas(scheduler, steps, denoise)


def turbo(at: At, model: Model, steps: int, denoise: float) -> Sigmas:
    """The levels that SDXL Turbo was distilled at: timesteps 999, 899, ... 99."""
    if "flow-match-euler" in model.spec.schedulers:
        at.refuse(f"SDTurboScheduler is for Stable Diffusion, and {model.spec.id} is a flow; use BasicScheduler.")
    times = [100 * n - 1 for n in range(10, 0, -1)][10 - int(10 * denoise) :][:steps]
    return Sigmas(exact=(*(sigma(time) for time in times), 0.0) if times else (), steps=len(times), denoise=1.0)


def sigma(time: int) -> float:
    """The level of noise at a timestep of Stable Diffusion."""
    low, high = (math.sqrt(beta) for beta in BETAS)
    kept = math.prod(1 - (low + (high - low) * n / (TRAINED - 1)) ** 2 for n in range(time + 1))
    return math.sqrt((1 - kept) / kept)


def flux2(at: At, steps: int, width: int, height: int) -> Sigmas:
    """FLUX.2's own, shifted by size and number of steps.

    The mean is the makers' fit, as diffusers' Flux2Pipeline has it (`compute_empirical_mu`).
    """
    tokens = round(width * height / 256)
    most = 0.00016927 * tokens + 0.45666666
    few = 8.73809524e-05 * tokens + 1.89833333
    mean = most if tokens > 4300 else few + (most - few) / 190 * (steps - 10)
    shift = math.exp(mean)
    times = [1 - n / steps for n in range(steps)]
    return Sigmas(exact=(*(shift / (shift + 1 / time - 1) for time in times), 0.0), steps=steps)


def manual(at: At, sigmas: str) -> Sigmas:
    """Numbers, with commas or spaces."""
    try:
        found = tuple(float(one) for one in sigmas.replace(",", " ").split())
    except ValueError:
        at.refuse("sigmas should be numbers with commas between them.", "sigmas")
    if len(found) < 2 or list(found) != sorted(found, reverse=True):
        at.refuse("sigmas should be two or more numbers that fall, such as 1.0, 0.5, 0.0.", "sigmas")
    return Sigmas(exact=found, steps=len(found) - 1)


def split(at: At, sigmas: Sigmas, step: int) -> tuple[Sigmas, Sigmas]:
    """What is before a step, and what is from it on."""
    if sigmas.exact:
        low = sigmas.exact[min(step, sigmas.count) :]  # one alone is no step
        return replace(sigmas, exact=sigmas.exact[: step + 1]), replace(sigmas, exact=low)
    at_step = sigmas.start + step
    rest = replace(sigmas, start=at_step)
    return (sigmas if step >= sigmas.count else replace(sigmas, end=at_step)), rest


def split_by_share(at: At, sigmas: Sigmas, denoise: float) -> tuple[Sigmas, Sigmas]:
    """The same, by the share of steps that are left."""
    left = round(sigmas.count * denoise)
    step = sigmas.count - left
    high = split(at, sigmas, step if left else 0)[0]  # where none is left, ComfyUI's has none before it, either
    return high, split(at, sigmas, step)[1]


def spread(at: At, steps: int, sigma_max: float, sigma_min: float, rho: float) -> Sigmas:
    """Karras' levels (arXiv 2206.00364, equation 5)."""
    if not 0 < sigma_min < sigma_max or rho <= 0:
        at.refuse("sigma_min should be above 0 and below sigma_max.", "sigma_min")
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    parts = [n / max(steps - 1, 1) for n in range(steps)]
    return Sigmas(exact=(*((high + part * (low - high)) ** rho for part in parts), 0.0), steps=steps)


def exponential(at: At, steps: int, sigma_max: float, sigma_min: float) -> Sigmas:
    """Even steps of the logarithm."""
    if not 0 < sigma_min < sigma_max:
        at.refuse("sigma_min should be above 0 and below sigma_max.", "sigma_min")
    ratio = sigma_min / sigma_max
    return Sigmas(exact=(*(sigma_max * ratio ** (n / max(steps - 1, 1)) for n in range(steps)), 0.0), steps=steps)


def beta(at: At, model: Model, steps: int, alpha: float, beta: float) -> Sigmas:
    """The distribution that the schedule of that name has."""
    if (alpha, beta) != (0.6, 0.6):
        at.refuse("alpha and beta of the beta schedule are 0.6 here.", "alpha")
    return Sigmas("beta", steps)


def reversed_(at: At, **_: Any) -> Sigmas:
    """From picture to noise."""
    at.refuse("sampling from a picture to noise is not offered.", "sigmas")


WHERE, PARTS = "sampling/custom_sampling/schedulers", "sampling/custom_sampling/sigmas"
LIMITS = {"sigma_max": number(14.614642, 0, 5000), "sigma_min": number(0.0291675, 0, 5000)}
SIDE = whole(1024, 16, 16384, 8)
HALVES = ("high_sigmas", "low_sigmas")
OUT, PAIR = ("SIGMAS",), ("SIGMAS", "SIGMAS")
TABLE = rows(
    Node(
        "BasicScheduler",
        WHERE,
        basic,
        OUT,
        {"model": MODEL, "scheduler": SCHEDULER, "steps": STEPS, "denoise": DENOISE},
    ),
    Node("SDTurboScheduler", WHERE, turbo, OUT, {"model": MODEL, "steps": whole(1, 1, 10), "denoise": DENOISE}),
    Node("Flux2Scheduler", WHERE, flux2, OUT, {"steps": whole(20, 1, 4096), "width": SIDE, "height": SIDE}),
    Node("ManualSigmas", WHERE, manual, OUT, {"sigmas": text("1, 0.5", multiline=False)}),
    Node("KarrasScheduler", WHERE, spread, OUT, {"steps": STEPS, **LIMITS, "rho": number(7.0, 0, 100)}),
    Node("ExponentialScheduler", WHERE, exponential, OUT, {"steps": STEPS, **LIMITS}),
    Node(
        "BetaSamplingScheduler",
        WHERE,
        beta,
        OUT,
        {"model": MODEL, "steps": STEPS, "alpha": number(0.6, 0, 50), "beta": number(0.6, 0, 50)},
    ),
    Node("SplitSigmas", PARTS, split, PAIR, {"sigmas": SIGMAS, "step": whole(0, 0, 10000)}, names=HALVES),
    Node("SplitSigmasDenoise", PARTS, split_by_share, PAIR, {"sigmas": SIGMAS, "denoise": DENOISE}, names=HALVES),
    Node("FlipSigmas", PARTS, reversed_, OUT, {"sigmas": SIGMAS}),
)
