"""What all samplers share. Each is a generator: it yields latents and their sigma where it wants to know what the model
takes to be the picture in them, is sent that, and returns the last latents."""

import itertools
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch

from handler.model.sampling.curves import Curve
from handler.model.sampling.noise import InSteps

Steps = Generator[tuple[Any, torch.Tensor], Any, Any]


@dataclass(frozen=True, slots=True)
class Solving:
    """What a sampler needs besides latents and sigmas. `noise(sigma, following)` is new noise of deviation 1."""

    curve: Curve
    noise: InSteps
    eta: float = 1.0
    s_noise: float = 1.0

    def parted(self, sigma: torch.Tensor, following: torch.Tensor) -> tuple[torch.Tensor, Any, Any]:
        """An ancestral step: the sigma to go down to, what to multiply by there, and how much noise then to add.

        Of k-diffusion, and for a flow, where the picture's share changes too, its rectified form.
        """
        if self.curve.flow:
            down = following * (1 + (following / sigma - 1) * self.eta)
            factor = (1 - following) / (1 - down)
            return down, factor, (following**2 - down**2 * factor**2) ** 0.5 * self.s_noise
        down, up = ancestral(sigma, following, self.eta)
        return down, 1.0, up * self.s_noise


def ancestral(sigma: torch.Tensor, following: torch.Tensor, eta: float) -> tuple[torch.Tensor, Any]:
    """How far to go down, and how much noise to add there, to have the deviation `following`: k-diffusion's."""
    if not eta:
        return following, 0.0
    up = torch.minimum(following, eta * (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5)
    return (following**2 - up**2) ** 0.5, up


def toward(x: Any, denoised: Any, sigma: torch.Tensor, following: torch.Tensor) -> Any:
    """An Euler step."""
    return x + (x - denoised) / sigma * (following - sigma)


def pairs(sigmas: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each step's sigma and the one after it."""
    return list(itertools.pairwise(sigmas))
