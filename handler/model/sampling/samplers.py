"""ComfyUI's samplers by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

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
        """At which sigmas it asks the model, in turn: what a run with one number for a picture shows."""
        nothing = torch.zeros(1)
        steps, found = self.solve(nothing, sigmas, Solving(curve, lambda *_: nothing, eta)), []
        try:
            found.append(next(steps)[1])
            while True:
                found.append(steps.send(nothing)[1])
        except StopIteration:
            return found


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
