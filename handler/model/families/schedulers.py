"""Schedulers by name: for models that predict flow (velocity) and for those that predict epsilon (noise).

A name that is missing from a table is silently wrong there: it runs, and draws garbage. Which names a model can use is
in its catalogue row; tests/model/test_families.py proves each with a perfect predictor.

They are diffusers', bit for bit, without what a GPU makes the host wait for at each step: they count steps where
diffusers looks up on the device which step a timestep is, and what they decide by is in host memory.
"""

import copy
import functools
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)


class _Counting:
    """Begins where the pipeline says, else at the first step, and counts on."""

    sigmas: Any
    timesteps: Any
    begin_index: int | None
    step_index: int | None

    def _init_step_index(self, _: Any) -> None:
        self._step_index = self.begin_index or 0

    def _sigma(self, like: Any) -> Any:
        """How much noise there is at the step to come, as a scalar of the type of `like`."""
        index = self.begin_index or 0 if self.step_index is None else self.step_index
        return self.sigmas[index].to(like.dtype)


class FlowEuler(_Counting, FlowMatchEulerDiscreteScheduler):
    """diffusers'."""

    def scale_noise(self, sample: Any, timestep: Any, noise: Any = None) -> Any:
        """`sample` with as much noise as there is at the step to come."""
        sigma = self._sigma(sample)
        return sigma * noise + (1.0 - sigma) * sample


class FlowHeun(_Counting, FlowMatchHeunDiscreteScheduler):
    """diffusers', which asks at each turn whether a sigma lies between two numbers: in host memory."""

    @functools.wraps(FlowMatchHeunDiscreteScheduler.set_timesteps)
    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps)  # type: ignore[misc]
        self.timesteps = self.timesteps.to(device)


class _Additive(_Counting):
    def add_noise(self, original_samples: Any, noise: Any, timesteps: Any) -> Any:
        """`original_samples` with as much noise as there is at the step to come."""
        return original_samples + noise * self._sigma(original_samples)


class Euler(_Additive, EulerDiscreteScheduler):
    """diffusers'."""


class EulerAncestral(_Additive, EulerAncestralDiscreteScheduler):
    """diffusers'."""


class Heun(_Additive, HeunDiscreteScheduler):
    """diffusers'."""


class DPM(_Counting, DPMSolverMultistepScheduler):
    """diffusers'."""

    def add_noise(self, original_samples: Any, noise: Any, timesteps: Any) -> Any:
        """`original_samples` with as much noise as there is at the step to come."""
        alpha, sigma = self._sigma_to_alpha_sigma_t(self._sigma(original_samples))  # type: ignore[attr-defined]
        return alpha * original_samples + sigma * noise


class DDIM(DDIMScheduler):
    """diffusers', which looks up by a timestep: one in host memory."""

    alphas_cumprod: Any
    timesteps: Any

    @functools.wraps(DDIMScheduler.set_timesteps)
    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps)  # type: ignore[misc]
        self._known, self._next = self.timesteps.tolist(), 0
        self.timesteps = self.timesteps.to(device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Pipelines call this where there is one, to say which step comes first."""
        self._next = begin_index

    @functools.wraps(DDIMScheduler.step)
    def step(self, model_output: Any, timestep: Any, *rest: Any, **options: Any) -> Any:
        known = self._known[self._next]
        self._next += 1
        return super().step(model_output, known, *rest, **options)  # type: ignore[misc]

    def add_noise(self, original_samples: Any, noise: Any, timesteps: Any) -> Any:
        """`original_samples` with as much noise as there is at the step to come."""
        kept = self.alphas_cumprod[self._known[self._next]].to(original_samples.dtype)
        return kept**0.5 * original_samples + (1 - kept) ** 0.5 * noise


Table = Mapping[str, tuple[Any, Mapping[str, Any]]]  # name -> its class, and how it must be configured

FLOW: Table = {
    "flow-match-euler": (FlowEuler, {}),
    "heun": (FlowHeun, {}),
    "dpm++": (DPM, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
}
EPSILON: Table = {
    "dpm++": (DPM, {}),
    "euler": (Euler, {}),
    "euler-a": (EulerAncestral, {}),
    "heun": (Heun, {}),
    "ddim": (DDIM, {"clip_sample": False}),  # it would clip latents as if they were pixels
}
_made: WeakKeyDictionary[Any, dict[tuple[Any, ...], Any]] = WeakKeyDictionary()  # never run: runs have copies


def make(table: Table, name: str, loaded: Any, differing: Mapping[str, Any]) -> Any:
    """A scheduler for one run: configured as the `loaded` one that came with the weights, but for `differing`."""
    kind, needs = table[name]
    made = _made.setdefault(loaded, {})
    key = kind, repr(needs), repr(differing)
    if key not in made:
        shift = {"flow_shift": loaded.config.get("shift", 1.0)} if table is FLOW else {}  # two names of one thing
        made[key] = kind.from_config(loaded.config, **shift, **needs, **differing)
    return copy.copy(made[key])
