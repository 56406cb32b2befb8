"""ComfyUI's samplers behind diffusers' interface of a scheduler, so that its pipelines' loops run them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from handler.core.sampling import Sampling
from handler.model.sampling.curves import Curve, curve_of
from handler.model.sampling.samplers import SAMPLERS
from handler.model.sampling.schedules import sigmas_of
from handler.model.sampling.solving import Solving, Steps


@dataclass(frozen=True, slots=True)
class Kept:
    """What stays where `mask`, 1 where it is drawn anew, is 0: `picture` with its `noise`, latents all."""

    mask: Any
    picture: Any
    noise: Any


class ComfyScheduler:
    """One run. The latents are its own, in fp32: a pipeline is given them in the type of its model.

    `begin` comes between `set_timesteps` and the first `step`; `latents.py` sees to it.
    """

    order = 1  # a timestep for each time that the model is asked
    init_noise_sigma = 1.0
    begin_index: int | None = None

    def __init__(self, curve: Curve, sampling: Sampling, config: Mapping[str, Any]) -> None:
        self.config, self.curve, self.sampler = config, curve, SAMPLERS[sampling.sampler]
        self.whole = sigmas_of(curve, sampling)
        self.sigmas = self.sampler.evaluated(curve, self.whole, sampling.eta)
        self.timesteps = torch.stack([curve.told(sigma) for sigma in self.sigmas])
        self.step_index: int | None = None
        self.add_noise: Any = lambda picture, *_: picture  # what a pipeline makes its first latents of
        self._steps: Steps | None = None
        self._x: Any = None  # as the model sees it
        self._kept: Kept | None = None

    def __len__(self) -> int:
        return len(self.sigmas)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """What a pipeline would have is of no account: the timesteps are known."""
        self.timesteps = self.timesteps.to(device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """It begins at the first step."""

    def scale_noise(self, sample: Any, timestep: Any, noise: Any) -> Any:
        """A flow's name for `add_noise`."""
        return self.add_noise(sample, noise, timestep)

    def begin(self, x: Any, solving: Solving, kept: Kept | None = None) -> Any:
        """The first latents that the model sees of `x`."""
        self._kept, self.step_index = kept, 0
        self._steps = self.sampler.solve(x, self.whole, solving)
        return self._asked(*next(self._steps))

    def end(self) -> None:
        """Let go of the latents of a run that was given up: its steps know whom they ask for noise, who knows this."""
        if self._steps:
            self._steps.close()

    def _asked(self, x: Any, sigma: torch.Tensor) -> Any:
        """`x` as the model sees it: what stays is as noisy as all else."""
        if kept := self._kept:
            x = x * kept.mask + self.curve.noised(kept.picture, kept.noise, sigma) * (1 - kept.mask)
        self._x = x
        return x

    def scale_model_input(self, sample: Any, timestep: Any) -> Any:
        """The latents as often as in `sample`, scaled for the model."""
        assert self.step_index is not None
        scaled = self.curve.scaled(self._x, self.sigmas[self.step_index]).to(sample.dtype)
        return scaled.repeat(len(sample) // len(scaled), *[1] * (sample.ndim - 1))

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = False) -> tuple[Any, Any]:
        """The next latents for the model, and those that it headed for."""
        assert self.step_index is not None and self._steps  # noqa: PT018
        denoised = self.curve.denoised(model_output.float(), self._x, self.sigmas[self.step_index])
        if kept := self._kept:
            denoised = denoised * kept.mask + kept.picture * (1 - kept.mask)
        self.step_index += 1
        try:
            x = self._asked(*self._steps.send(denoised))
        except StopIteration as end:
            x = self.curve.rid(end.value, self.whole[-1])
        return x.to(model_output.dtype), denoised


def scheduler_of(pipeline: Any, config: Mapping[str, Any], sampling: Sampling) -> ComfyScheduler:
    """For one run of `pipeline`, whose model the `config` of a scheduler describes."""
    transformer = getattr(pipeline, "transformer", None)
    curve = curve_of(config, type(transformer).__name__ if transformer else "", sampling)
    return ComfyScheduler(curve, sampling, config)
