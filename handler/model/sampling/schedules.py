"""ComfyUI's schedules: which sigmas a picture's steps go through, from the highest to zero."""

import functools
import math
from collections.abc import Callable, Mapping

import torch

from handler.core.errors import InvalidValue
from handler.core.sampling import Sampling
from handler.model.sampling.curves import Curve

RHO = 7.0  # Karras et al., 2022, equation 5
BETA = 0.6  # both parameters of the distribution whose quantiles "Beta Sampling is All You Need" (2024) takes
THRESHOLD = 0.025  # Mochi's: how far down the linear half of its steps goes
TWO_A_STEP = ("dpm_2", "dpm_2_ancestral", "uni_pc", "uni_pc_bh2")  # KSampler leaves out their last step but one


def sigmas_of(curve: Curve, sampling: Sampling) -> torch.Tensor:
    """The sigmas that `sampling` goes through: fp32, from high to low. InvalidValue if those are no step."""
    sigmas = torch.tensor(sampling.sigmas) if sampling.sigmas else _denoising(curve, sampling)
    if sampling.end is not None and sampling.end < len(sigmas) - 1:
        sigmas = sigmas[: sampling.end + 1].clone()
        if not sampling.leftover_noise:
            sigmas[-1] = 0
    sigmas = sigmas[sampling.start :]
    if len(sigmas) < 2:
        raise InvalidValue("sampling: start and end leave no step to take.", "sampling")
    return sigmas


def _denoising(curve: Curve, sampling: Sampling) -> torch.Tensor:
    """The last `steps` of as many as it takes for `denoise`; for all, KSampler takes what there is, as BasicScheduler
    does not."""
    whole = sampling.denoise > 0.9999
    found = _scheduled(curve, sampling, sampling.steps if whole else int(sampling.steps / sampling.denoise))
    return found if whole and not sampling.custom else found[-(sampling.steps + 1) :]


def _scheduled(curve: Curve, sampling: Sampling, steps: int) -> torch.Tensor:
    schedule = SCHEDULES[sampling.scheduler]
    if sampling.sampler not in TWO_A_STEP or sampling.custom:
        return torch.tensor(schedule(curve, steps))
    sigmas = schedule(curve, steps + 1)
    return torch.tensor(sigmas[:-2] + sigmas[-1:])


def _ends(curve: Curve) -> tuple[float, float]:
    return float(curve.table[0].float()), float(curve.table[-1].float())


def simple(curve: Curve, steps: int) -> list[float]:
    """Of the table, evenly by place."""
    stride = len(curve.table) / steps
    return [float(curve.table[-(1 + int(i * stride))]) for i in range(steps)] + [0.0]


def ddim_uniform(curve: Curve, steps: int) -> list[float]:
    """Of the table, every so many from the second on; how many steps that makes depends."""
    lowest = float(curve.table[1])
    ends = [] if math.isclose(lowest, 0, abs_tol=0.00001) else [0.0]
    stride = max(len(curve.table) // (steps if ends else steps + 1), 1)
    return [float(sigma) for sigma in curve.table[1::stride].flip(0)] + ends


def normal(curve: Curve, steps: int) -> list[float]:
    """At even times, both ends among them."""
    first, last = (curve.timestep(curve.table[i].float()) for i in (-1, 0))
    if math.isclose(float(curve.sigma(last)), 0, abs_tol=0.00001):
        return [float(curve.sigma(t)) for t in torch.linspace(float(first), float(last), steps + 1)]
    return [float(curve.sigma(t)) for t in torch.linspace(float(first), float(last), steps)] + [0.0]


def sgm_uniform(curve: Curve, steps: int) -> list[float]:
    """At even times, without the last."""
    first, last = (float(curve.timestep(curve.table[i].float())) for i in (-1, 0))
    return [float(curve.sigma(t)) for t in torch.linspace(first, last, steps + 1)[:-1]] + [0.0]


def karras(curve: Curve, steps: int) -> list[float]:
    """Karras et al., 2022, equation 5."""
    low, high = _ends(curve)
    ramp = torch.linspace(0, 1, steps)
    return [*((high ** (1 / RHO) + ramp * (low ** (1 / RHO) - high ** (1 / RHO))) ** RHO).tolist(), 0.0]


def exponential(curve: Curve, steps: int) -> list[float]:
    """At even logarithms."""
    low, high = _ends(curve)
    return [*torch.linspace(math.log(high), math.log(low), steps).exp().tolist(), 0.0]


def kl_optimal(curve: Curve, steps: int) -> list[float]:
    """At even arctangents: "Align Your Steps" (Sabour et al., 2024), theorem 3.1."""
    low, high = _ends(curve)
    share = torch.arange(steps) / (steps - 1) if steps > 1 else torch.full((1,), math.nan)
    return [*(share * math.atan(low) + (1 - share) * math.atan(high)).tan().tolist(), 0.0]


def linear_quadratic(curve: Curve, steps: int) -> list[float]:
    """Mochi's: half of the steps go a little way evenly, the others as a parabola that goes on where those end."""
    if steps == 1:
        return [_ends(curve)[1], 0.0]
    even = steps // 2
    left, slope = even - THRESHOLD * steps, THRESHOLD / even
    bend = left / (even * (steps - even) ** 2)
    line = [i * slope for i in range(even)]
    rest = [bend * (i**2 + even**2) + (slope - 2 * bend * even) * i for i in range(even, steps)]
    return [(1 - done) * _ends(curve)[1] for done in (*line, *rest, 1.0)]


def beta(curve: Curve, steps: int) -> list[float]:
    """Of the table, at the quantiles of the beta distribution; a place that comes twice in a row counts once."""
    most = len(curve.table) - 1
    places = [round(_beta_quantile(1 - i / steps) * most) for i in range(steps)]
    kept = [place for place, before in zip(places, [-1, *places], strict=False) if place != before]
    return [float(curve.table[place]) for place in kept] + [0.0]


@functools.lru_cache(4096)
def _beta_quantile(share: float) -> float:
    """Below which `share` of the beta distribution lies: by bisection of its integral. It is symmetric."""
    if share in (0.5, 1.0):
        return share
    if share > 0.5:
        return 1 - _beta_quantile(1 - share)
    low, high = 0.0, 0.5
    for _ in range(24):  # the largest table has 10,000 places
        middle = (low + high) / 2
        low, high = (middle, high) if _beta_integral(middle) < share else (low, middle)
    return (low + high) / 2


def _beta_integral(x: float) -> float:
    """The regularised incomplete beta function, up to 0.5: its series (DLMF 8.17.7)."""
    term, total = 1.0, 0.0
    for n in range(40):  # each is less than half of the one before
        total += term / (BETA + n)
        term *= (1 - BETA + n) / (n + 1) * x
    return math.pow(x, BETA) * total * math.gamma(2 * BETA) / math.pow(math.gamma(BETA), 2)


SCHEDULES: Mapping[str, Callable[[Curve, int], list[float]]] = {
    each.__name__: each
    for each in (
        *(normal, karras, exponential, sgm_uniform, simple),
        *(ddim_uniform, beta, linear_quadratic, kl_optimal),
    )
}
