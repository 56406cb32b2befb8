"""Samplers that add noise in the steps, each from its published formula; and `res_multistep`, which may."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from handler.model.sampling.solving import Solving, Steps, ancestral, pairs, toward

NEARLY_ONE = 0.9999  # where a flow begins at 1, its first middle


def euler_ancestral(x: Any, sigmas: torch.Tensor, solving: Solving) -> Steps:
    """An Euler step further down, and noise up again."""
    for sigma, following in pairs(sigmas):
        denoised = yield x, sigma
        down, factor, up = solving.parted(sigma, following)
        if (following if solving.curve.flow else down) == 0:
            x = denoised
            continue
        x = toward(x, denoised, sigma, down)
        if solving.eta:
            x = factor * x + solving.noise(sigma, following) * up
    return x


def dpm_2_ancestral(x: Any, sigmas: torch.Tensor, solving: Solving) -> Steps:
    """DPM-Solver-2 further down, and noise up again."""
    for sigma, following in pairs(sigmas):
        denoised = yield x, sigma
        down, factor, up = solving.parted(sigma, following)
        if down == 0:
            x = toward(x, denoised, sigma, down)
            continue
        middle = sigma.log().lerp(down.log(), 0.5).exp()
        halfway = toward(x, denoised, sigma, middle)
        denoised = yield halfway, middle
        x = x + (halfway - denoised) / middle * (down - sigma)
        x = factor * x + solving.noise(sigma, following) * up
    return x


def dpmpp_2s_ancestral(x: Any, sigmas: torch.Tensor, solving: Solving) -> Steps:
    """DPM-Solver++(2S) further down, and noise up again."""
    curve = solving.curve
    for sigma, following in pairs(sigmas):
        denoised = yield x, sigma
        down, factor, up = solving.parted(sigma, following)
        if (following if curve.flow else down) == 0:
            x = toward(x, denoised, sigma, down)
        else:
            half = (curve.log_snr(sigma) + curve.log_snr(down)) / 2
            middle = torch.tensor(NEARLY_ONE) if curve.flow and sigma == 1 else curve.of_log_snr(half)
            denoised = yield middle / sigma * x + (1 - middle / sigma) * denoised, middle
            x = down / sigma * x + (1 - down / sigma) * denoised
        if following > 0 and solving.eta:
            x = factor * x + solving.noise(sigma, following) * up
    return x


def dpmpp_sde(x: Any, sigmas: torch.Tensor, solving: Solving) -> Steps:
    """DPM-Solver++ for stochastic equations (Lu et al., 2022), with a prediction halfway."""
    curve = solving.curve
    for sigma, following in pairs(curve.below_one(sigmas)):
        denoised = yield x, sigma
        if following == 0:
            x = denoised
            continue
        middle = curve.of_log_snr(curve.log_snr(sigma) + 0.5 * (curve.log_snr(following) - curve.log_snr(sigma)))
        halfway = _noisy(x, denoised, sigma, middle, solving)
        second = yield halfway, middle
        x = _noisy(x, second, sigma, following, solving)
    return x


def _noisy(x: Any, denoised: Any, sigma: torch.Tensor, following: torch.Tensor, solving: Solving) -> Any:
    """A first-order step in half the logarithm of the signal-to-noise ratio: further down, and noise up again."""
    start, end = solving.curve.log_snr(sigma), solving.curve.log_snr(following)
    alpha, alpha_after = sigma * start.exp(), following * end.exp()
    down, up = ancestral(start.neg().exp(), end.neg().exp(), solving.eta)
    h = down.log().neg() - start
    x = alpha_after / alpha * (-h).exp() * x - alpha_after * (-h).expm1() * denoised
    if solving.eta and solving.s_noise:
        x = x + alpha_after * solving.noise(sigma, following) * solving.s_noise * up
    return x


def dpmpp_2m_sde(x: Any, sigmas: torch.Tensor, solving: Solving) -> Steps:
    """DPM-Solver++(2M) for stochastic equations, in its midpoint form."""
    return (yield from _multistep(x, sigmas, solving, _midpoint))


def dpmpp_2m_sde_heun(x: Any, sigmas: torch.Tensor, solving: Solving) -> Steps:
    """DPM-Solver++(2M) for stochastic equations, in Heun's form."""
    return (yield from _multistep(x, sigmas, solving, _second))


def dpmpp_3m_sde(x: Any, sigmas: torch.Tensor, solving: Solving) -> Steps:
    """DPM-Solver++(3M) for stochastic equations, of the last three predictions."""
    return (yield from _multistep(x, sigmas, solving, _third))


Known = list[tuple[Any, torch.Tensor]]  # the last predictions, the newest first, each with the step h after it
Correct = Callable[[Known, torch.Tensor], Any]


def _multistep(x: Any, sigmas: torch.Tensor, solving: Solving, correct: Correct) -> Steps:
    """Exponential integrator steps; `correct` is what earlier predictions add, by them and h * (1 + eta)."""
    known: Known = []
    curve, eta = solving.curve, solving.eta
    for sigma, following in pairs(curve.below_one(sigmas)):
        denoised = yield x, sigma
        if following == 0:
            x = denoised
            continue
        end = curve.log_snr(following)
        h = end - curve.log_snr(sigma)
        wide, alpha = h * (eta + 1), following * end.exp()
        known = [(denoised, h), *known[:2]]
        x = following / sigma * (-h * eta).exp() * x - alpha * (-wide).expm1() * denoised
        if len(known) > 1:
            x = x + alpha * correct(known, wide)
        if eta and solving.s_noise:
            up = following * (-2 * h * eta).expm1().neg().sqrt() * solving.s_noise
            x = x + solving.noise(sigma, following) * up
    return x


def _midpoint(known: Known, wide: torch.Tensor) -> Any:
    (newest, h), (before, h_before), *_ = known
    return -0.5 * (-wide).expm1() * (h / h_before) * (newest - before)


def _second(known: Known, wide: torch.Tensor) -> Any:
    (newest, h), (before, h_before), *_ = known
    return ((-wide).expm1() / wide + 1) * (h / h_before) * (newest - before)


def _third(known: Known, wide: torch.Tensor) -> Any:
    if len(known) < 3:
        return _second(known, wide)
    (newest, h), (before, h_before), (first, h_first) = known
    near, far = h_before / h, h_first / h
    slope, slope_before = (newest - before) / near, (before - first) / far
    bend = (slope - slope_before) / (near + far)
    phi_2 = (-wide).expm1() / wide + 1
    return phi_2 * (slope + bend * near) - (phi_2 / wide - 0.5) * bend


def lcm(x: Any, sigmas: torch.Tensor, solving: Solving) -> Steps:
    """Latent consistency models (Luo et al., 2023): what the model takes for the picture, with new noise."""
    for sigma, following in pairs(sigmas):
        x = yield x, sigma
        if following > 0:
            x = solving.curve.noised(x, solving.noise(sigma, following), following)
    return x


def ddpm(x: Any, sigmas: torch.Tensor, solving: Solving) -> Steps:
    """Ho et al., 2020, algorithm 2, between any two timesteps."""
    for sigma, following in pairs(sigmas):
        denoised = yield x, sigma
        noise, x = (x - denoised) / sigma, x / (1 + sigma**2).sqrt()
        kept, kept_after = 1 / (sigma**2 + 1), 1 / (following**2 + 1)
        ratio = kept / kept_after
        x = (1 / ratio).sqrt() * (x - (1 - ratio) * noise / (1 - kept).sqrt())
        if following > 0:
            x = x + ((1 - ratio) * (1 - kept_after) / (1 - kept)).sqrt() * solving.noise(sigma, following)
            x = x * (1 + following**2).sqrt()
    return x


def res_multistep(x: Any, sigmas: torch.Tensor, solving: Solving) -> Steps:
    """Zhang et al., 2023 (arXiv:2308.02157), of second order, without noise."""
    return (yield from res_multistep_ancestral(x, sigmas, replace(solving, eta=0.0)))


def res_multistep_ancestral(x: Any, sigmas: torch.Tensor, solving: Solving) -> Steps:
    """The same further down, and noise up again: that of k-diffusion, also along a flow."""
    before: Any = None
    last: Any = None
    for sigma, following in pairs(sigmas):
        denoised = yield x, sigma
        down, up = ancestral(sigma, following, solving.eta)
        if down == 0 or before is None:
            x = toward(x, denoised, sigma, down)
        else:
            h = sigma.log() - down.log()
            phi_1 = (-h).expm1() / -h
            share = ((phi_1 - 1) / -h / ((last[1].log() - last[0].log()) / h)).nan_to_num(0.0)
            x = (-h).exp() * x + h * ((phi_1 - share) * denoised + share * before)
        if following > 0 and solving.eta:
            x = x + solving.noise(sigma, following) * solving.s_noise * up
        before, last = denoised, (sigma, down)
    return x
