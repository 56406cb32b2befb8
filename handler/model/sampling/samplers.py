"""ComfyUI's samplers by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from handler.core.errors import InvalidValue
from handler.model.sampling import ode, sde
from handler.model.sampling.curves import Curve
from handler.model.sampling.solving import Solving, Steps

Noise = Literal["own", "tree", "tree on device"]


@dataclass(frozen=True, slots=True)
class Sampler:
    """Its steps, and where the noise in them comes from: a generator of its own, or a Brownian tree."""

    solve: Callable[[Any, torch.Tensor, Solving], Steps]
    noise: Noise = "own"

    def evaluated(self, curve: Curve, sigmas: torch.Tensor, eta: float) -> list[torch.Tensor]:
        """At which sigmas it asks the model, in turn: what a run with one number for a picture shows.

        InvalidValue if that number comes out as none: so would every picture.
        """
        found = list[torch.Tensor]()
        steps = self.solve(torch.tensor([100.0]), sigmas, Solving(curve, self._silence, eta))
        try:
            x, sigma = next(steps)
            while True:
                found.append(sigma)
                x, sigma = steps.send(x / (1 + len(found)))  # no two alike, or what is infinite may cancel
        except StopIteration as end:
            sound = curve.rid(end.value, sigmas[-1]).isfinite() and sigmas.isfinite().all()
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            sound = False
        if not sound:
            raise InvalidValue(
                f"sampling: this sampler cannot take these steps, for {_why(curve, sigmas)}.", "sampling"
            )
        return found

    def _silence(self, sigma: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        """Noise of 0; none where a tree has none."""
        return torch.zeros(1) if self.noise == "own" else 0 / (following - sigma)


def _why(curve: Curve, sigmas: torch.Tensor) -> str:
    """What is wrong with `sigmas` for a sampler of which nothing comes."""
    if not sigmas.isfinite().all():
        return "its schedule needs more of them"
    if (sigmas.diff() == 0).any():
        return "two have the same level of noise; take fewer, or more denoise"
    if curve.flow and sigmas[0] > 1:
        return "their noise goes beyond a flow's, which is 1"
    return "their levels of noise are too near to each other; take fewer, or more denoise"


OWN = (
    *(ode.euler, ode.heun, ode.dpm_2, ode.dpmpp_2m, ode.ipndm, ode.gradient_estimation, ode.uni_pc, ode.uni_pc_bh2),
    *(sde.euler_ancestral, sde.dpm_2_ancestral, sde.dpmpp_2s_ancestral, sde.lcm, sde.ddpm),
    *(sde.res_multistep, sde.res_multistep_ancestral),
)
TREES = (sde.dpmpp_sde, sde.dpmpp_2m_sde, sde.dpmpp_2m_sde_heun, sde.dpmpp_3m_sde)
SAMPLERS: Mapping[str, Sampler] = {
    **{each.__name__: Sampler(each) for each in OWN},
    "ddim": Sampler(ode.euler),
    **{each.__name__: Sampler(each, "tree") for each in TREES},
    **{f"{each.__name__}_gpu": Sampler(each, "tree on device") for each in TREES},
}
