"""How much noise there is at a timestep, and what a model's output means: `Eps` and `Flow`, which a `Curve` is.

Sigma is the deviation of the noise; latents are x0 + sigma * noise for epsilon and v-prediction (the variance-exploding
form of Karras et al., 2022) and (1 - sigma) * x0 + sigma * noise along a flow. All in fp32, as ComfyUI computes it:
sigmas are tensors of no dimension in host memory, so that the device waits for nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from handler.core.sampling import Sampling

AT_ZERO_SNR = 4.8973451890853435e-08  # what is left of the picture where a zero terminal SNR would divide by zero
NEARLY_ALL = 1e-4  # of a flow: its first sigma is taken so far below the highest where a logarithm of 1 / sigma - 1 is
# By transformer, where the scheduler's own shift depends on the size: ComfyUI's (shift, kind), which does not.
OWN_SHIFT: Mapping[str, tuple[float, str]] = {
    "FluxTransformer2DModel": (1.15, "exponential"),
    "Flux2Transformer2DModel": (2.02, "exponential"),
    "ChromaTransformer2DModel": (1.15, "exponential"),
    "QwenImageTransformer2DModel": (1.15, "exponential"),
}


@dataclass(frozen=True)
class Eps:
    """A model of discrete timesteps that predicts the noise, or v (Salimans and Ho, 2022)."""

    betas: torch.Tensor
    v_prediction: bool = False
    zero_snr: bool = False

    flow = False

    @cached_property
    def table(self) -> torch.Tensor:
        """Sigma of each timestep, rising."""
        kept = torch.cumprod(1 - self.betas, dim=0)
        if self.zero_snr:
            kept = _to_zero_snr(kept)
        sigmas: torch.Tensor = ((1 - kept) / kept).sqrt()
        return sigmas

    @cached_property
    def _logs(self) -> torch.Tensor:
        return self.table.log().float()

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """The nearest by its logarithm; of two as near, the one that fp32 finds nearer."""
        return (sigma.log() - self._logs).abs().argmin()

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """Of a timestep that may lie between two, in logarithms."""
        t = timestep.float().clamp(0, len(self._logs) - 1)
        low, high, share = t.floor().long(), t.ceil().long(), t.frac()
        logs: torch.Tensor = (1 - share) * self._logs[low] + share * self._logs[high]
        return logs.exp()

    def told(self, sigma: torch.Tensor) -> torch.Tensor:
        """The timestep that a pipeline of diffusers gives its model."""
        return self.timestep(sigma)

    def scaled(self, x: Any, sigma: torch.Tensor) -> Any:
        """What the model sees of `x`."""
        return x / (sigma**2 + 1) ** 0.5

    def denoised(self, output: Any, x: Any, sigma: torch.Tensor) -> Any:
        """What the model takes to be the picture in `x`."""
        if self.v_prediction:
            return x / (sigma**2 + 1) - output * sigma / (sigma**2 + 1) ** 0.5
        return x - output * sigma

    def noised(self, picture: Any, noise: Any, sigma: torch.Tensor, first: bool = False) -> Any:
        """`picture` with noise. At the very start, of nothing but noise, the model expects a little more of it."""
        return picture + noise * ((1 + sigma**2).sqrt() if first and self._most(sigma) else sigma)

    def _most(self, sigma: torch.Tensor) -> bool:
        highest = float(self.table[-1].float())
        return float(sigma) > highest or math.isclose(highest, float(sigma), rel_tol=1e-05)

    def rid(self, x: Any, sigma: torch.Tensor) -> Any:
        """Latents that stop at `sigma`, as the next sampler or the autoencoder gets them."""
        return x

    def log_snr(self, sigma: torch.Tensor) -> torch.Tensor:
        """Half the logarithm of the ratio of signal to noise: log(alpha / sigma)."""
        return sigma.log().neg()

    def of_log_snr(self, half: torch.Tensor) -> torch.Tensor:
        """Its inverse."""
        return half.neg().exp()

    def below_one(self, sigmas: torch.Tensor) -> torch.Tensor:
        """Sigmas whose logarithms there are."""
        return sigmas


@dataclass(frozen=True)
class Flow:
    """A model that predicts the velocity, noise - x0. `shift` is a factor on sigma / (1 - sigma), or its logarithm.

    "linear" is the form of Stable Diffusion 3 (Esser et al., 2024), "exponential" that of FLUX.1.
    """

    shift: float
    shift_type: str = "linear"

    flow = True

    @cached_property
    def table(self) -> torch.Tensor:
        """Sigmas at even times, rising."""
        count = 10_000 if self.shift_type == "exponential" else 1000
        sigmas: torch.Tensor = self.sigma(torch.arange(1, count + 1) / count)
        return sigmas

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """ComfyUI takes a sigma for its time, whatever the shift."""
        return sigma

    def sigma(self, timestep: Any) -> Any:
        """Of a time from 0 to 1."""
        if self.shift_type == "exponential":
            return math.exp(self.shift) / (math.exp(self.shift) + (1 / timestep - 1))
        return timestep if self.shift == 1 else self.shift * timestep / (1 + (self.shift - 1) * timestep)

    def told(self, sigma: torch.Tensor) -> torch.Tensor:
        """The timestep that a pipeline of diffusers gives its model."""
        return sigma * 1000

    def scaled(self, x: Any, sigma: torch.Tensor) -> Any:
        """What the model sees of `x`."""
        return x

    def denoised(self, output: Any, x: Any, sigma: torch.Tensor) -> Any:
        """What the model takes to be the picture in `x`."""
        return x - output * sigma

    def noised(self, picture: Any, noise: Any, sigma: torch.Tensor, first: bool = False) -> Any:
        """`picture` with noise."""
        return sigma * noise + (1 - sigma) * picture

    def rid(self, x: Any, sigma: torch.Tensor) -> Any:
        """Latents that stop at `sigma`, as the next sampler or the autoencoder gets them."""
        return x / (1 - sigma)

    def log_snr(self, sigma: torch.Tensor) -> torch.Tensor:
        """Half the logarithm of the ratio of signal to noise: log((1 - sigma) / sigma)."""
        return sigma.logit().neg()

    def of_log_snr(self, half: torch.Tensor) -> torch.Tensor:
        """Its inverse."""
        return half.neg().sigmoid()

    def below_one(self, sigmas: torch.Tensor) -> torch.Tensor:
        """Sigmas whose logarithms there are."""
        if sigmas[0] < 1:
            return sigmas
        return torch.cat([torch.tensor([self.sigma(1 - NEARLY_ALL)]), sigmas[1:]])


Curve = Eps | Flow


def curve_of(config: Mapping[str, Any], transformer: str, sampling: Sampling) -> Curve:
    """What `sampling` means for a model, by the `config` of the scheduler that came with it and its class's name."""
    if "prediction_type" in config and "beta_start" in config and not transformer:
        return _eps(config)
    shift, kind = float(config.get("shift", 1.0)), "linear"
    if config.get("use_dynamic_shifting"):
        shift, kind = OWN_SHIFT.get(transformer, (shift, kind))
    return Flow(sampling.shift, sampling.shift_type) if sampling.shift else Flow(shift, kind)


def _eps(config: Mapping[str, Any]) -> Eps:
    """In fp64, as a timestep between two may hang on the last bit."""
    first, last, count = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
    if config.get("beta_schedule") == "linear":
        betas = torch.linspace(first, last, count, dtype=torch.float64)
    else:
        betas = torch.linspace(first**0.5, last**0.5, count, dtype=torch.float64) ** 2
    return Eps(betas, config["prediction_type"] == "v_prediction", bool(config.get("rescale_betas_zero_snr")))


def _to_zero_snr(kept: torch.Tensor) -> torch.Tensor:
    """Lin et al., 2023, algorithm 1."""
    roots = kept.sqrt()
    first, last = roots[0], roots[-1]
    kept = ((roots - last) * first / (first - last)) ** 2
    kept[-1] = AT_ZERO_SNR
    return kept
