"""Samplers that add no noise, each from its published formula."""

import math
from typing import Any

import torch

from handler.model.sampling.solving import Solving, Steps, pairs, toward

LAST = 0.001  # the sigma that ComfyUI's UniPC ends at, for zero


def euler(x: Any, sigmas: torch.Tensor, _: Solving) -> Steps:
    """Karras et al., 2022, algorithm 2, without churn. DDIM (Song et al., 2020) takes the same steps."""
    for sigma, following in pairs(sigmas):
        denoised = yield x, sigma
        x = toward(x, denoised, sigma, following)
    return x


def heun(x: Any, sigmas: torch.Tensor, _: Solving) -> Steps:
    """Karras et al., 2022, algorithm 2: Euler's slope and the one found at its end, halved."""
    for sigma, following in pairs(sigmas):
        denoised = yield x, sigma
        ahead = toward(x, denoised, sigma, following)
        if following == 0:
            x = ahead
            continue
        slope = (x - denoised) / sigma
        denoised = yield ahead, following
        x = x + (slope + (ahead - denoised) / following) / 2 * (following - sigma)
    return x


def dpm_2(x: Any, sigmas: torch.Tensor, _: Solving) -> Steps:
    """DPM-Solver-2 (Lu et al., 2022): the slope at the geometric mean."""
    for sigma, following in pairs(sigmas):
        denoised = yield x, sigma
        if following == 0:
            x = toward(x, denoised, sigma, following)
            continue
        middle = sigma.log().lerp(following.log(), 0.5).exp()
        halfway = toward(x, denoised, sigma, middle)
        denoised = yield halfway, middle
        x = x + (halfway - denoised) / middle * (following - sigma)
    return x


def dpmpp_2m(x: Any, sigmas: torch.Tensor, _: Solving) -> Steps:
    """DPM-Solver++(2M) (Lu et al., 2022), of the last two predictions."""
    before: Any = None
    h_before: Any = None
    for sigma, following in pairs(sigmas):
        denoised = yield x, sigma
        h = sigma.log() - following.log()
        blend = denoised
        if before is not None and following > 0:
            half = h / (2 * h_before)
            blend = (1 + half) * denoised - half * before
        x = following / sigma * x - (-h).expm1() * blend
        before, h_before = denoised, h
    return x


def ipndm(x: Any, sigmas: torch.Tensor, _: Solving) -> Steps:
    """Zhang and Chen, 2022: Adams and Bashforth's coefficients over up to four slopes."""
    slopes: list[Any] = []
    for sigma, following in pairs(sigmas):
        denoised = yield x, sigma
        slopes = [(x - denoised) / sigma, *slopes[:3]]
        if following == 0:
            x = denoised
            continue
        weights, of = ADAMS[len(slopes) - 1]
        x = x + (following - sigma) * sum(w * slope for w, slope in zip(weights, slopes, strict=True)) / of
    return x


ADAMS = (((1,), 1), ((3, -1), 2), ((23, -16, 5), 12), ((55, -59, 37, -9), 24))


def gradient_estimation(x: Any, sigmas: torch.Tensor, _: Solving) -> Steps:
    """Permenter and Yuan, 2023, with gamma 2: the slope goes as far beyond the last one again."""
    before: Any = None
    for sigma, following in pairs(sigmas):
        denoised = yield x, sigma
        slope = (x - denoised) / sigma
        x = toward(x, denoised, sigma, following)
        if before is not None and following > 0:
            x = x + (slope - before) * (following - sigma)
        before = slope
    return x


def uni_pc(x: Any, sigmas: torch.Tensor, solving: Solving) -> Steps:
    """UniPC (Zhao et al., 2023) with B(h) = h, of order 3."""
    return (yield from _uni_pc(x, sigmas, solving, exponential=False))


def uni_pc_bh2(x: Any, sigmas: torch.Tensor, solving: Solving) -> Steps:
    """UniPC with B(h) = exp(h) - 1."""
    return (yield from _uni_pc(x, sigmas, solving, exponential=True))


def _uni_pc(x: Any, sigmas: torch.Tensor, solving: Solving, exponential: bool) -> Steps:
    """In its variance-preserving form, whose rounding at the small end shows. The last step has no corrector."""
    ended = bool(sigmas[-1] == 0)
    sigmas = torch.cat([sigmas[:-1], torch.tensor([LAST])]) if ended else sigmas
    log_alphas = 0.5 * torch.log(1 / (sigmas**2 + 1))
    alphas, deviations = log_alphas.exp(), (1 - (2 * log_alphas).exp()).sqrt()
    lambdas = log_alphas - 0.5 * torch.log(1 - (2 * log_alphas).exp())
    steps = len(sigmas) - 1
    most = min(3, steps - 1)
    denoised = yield x, sigmas[0]
    known, x = [denoised], x * alphas[0]
    for i in range(1, steps + 1) if most else ():
        order = i if i < most else min(most, steps + 1 - i)
        h = lambdas[i] - lambdas[i - 1]
        ratios = [(lambdas[i - 1 - k] - lambdas[i - 1]) / h for k in range(1, order)]
        differences = [(known[k] - known[0]) / ratio for k, ratio in enumerate(ratios, 1)]
        predictor, corrector, bent = _weights(h, ratios, exponential)
        base = deviations[i] / deviations[i - 1] * x - alphas[i] * torch.expm1(-h) * known[0]
        x = base - alphas[i] * bent * _weighted(predictor, differences)
        if i < steps:
            denoised = yield x / alphas[i], sigmas[i]
            x = base - alphas[i] * bent * _weighted(corrector, [*differences, denoised - known[0]])
            known = [denoised, *known[:2]]
    x = x / alphas[-1]
    return solving.curve.rid(x, sigmas[-1]) if ended else x


def _weights(h: torch.Tensor, ratios: list[torch.Tensor], exponential: bool) -> tuple[Any, Any, torch.Tensor]:
    """The weights of the differences for predictor and corrector, by the paper's section 3, and B(h)."""
    order = len(ratios) + 1
    bent = torch.expm1(-h) if exponential else -h
    phi, wanted = torch.expm1(-h) / -h - 1, []
    for k in range(1, order + 1):
        wanted.append(phi * math.factorial(k) / bent)
        phi = phi / -h - 1 / math.factorial(k + 1)
    if order == 1:
        return [], [0.5], bent
    matrix = torch.stack([torch.stack([*ratios, torch.tensor(1.0)]) ** k for k in range(order)])
    known = torch.stack(wanted)
    predictor = torch.linalg.solve(matrix[:-1, :-1], known[:-1]) if order > 2 else [0.5]
    return predictor, torch.linalg.solve(matrix, known), bent


def _weighted(weights: Any, differences: list[Any]) -> Any:
    return sum((w * difference for w, difference in zip(weights, differences, strict=True)), 0.0)
