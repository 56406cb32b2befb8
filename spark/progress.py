"""How far a stage has come, in steps and in seconds of its own work, and all that it needs to go on after a kill.

A budget is wall-clock time: a slow machine takes fewer steps, not more hours. Time counts only while a stage works, and
whatever ends it, at most `SAVE_S` seconds of it are lost: what is saved replaces what was there before in one move.
"""

import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

SAVE_S = 300.0


class Kept(Protocol):
    """What has a state: models, optimisers, averages."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class Average:
    """The moving average of a model's weights."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {name: value.clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def follow(self, model: nn.Module, decay: float) -> None:
        """One step towards `model`, by 1 - `decay` of the way."""
        torch._foreach_lerp_(list(self.weights.values()), list(model.state_dict().values()), 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        return self.weights

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            self.weights[name].copy_(value)


class Progress:
    """A stage of `minutes` minutes, kept in `path`: `parts`, random generators, and what has been counted."""

    def __init__(self, path: Path, minutes: float, rng: random.Random, parts: dict[str, Kept | list[Any]]) -> None:
        self.path, self.minutes, self.rng = path, minutes, rng
        self.parts = {name: part if isinstance(part, list) else [part] for name, part in parts.items()}
        self.step, self.samples, self.elapsed = 0, 0, 0.0
        self.saved, self.since = 0.0, time.monotonic()

    @property
    def share(self) -> float:
        """Of the time: from 0 to 1, and beyond when it is over."""
        return self.elapsed / (60 * self.minutes)

    def resume(self) -> bool:
        """Go on from what was saved; False if nothing was."""
        if not self.path.exists():
            return False
        state = torch.load(self.path, weights_only=True)
        for name, part in self.parts.items():
            for each, kept in zip(part, state[name], strict=True):
                each.load_state_dict(kept)
        self.step, self.samples, self.elapsed = state["counts"]
        torch.set_rng_state(state["torch"])
        version, internal, gauss = state["random"]
        self.rng.setstate((version, tuple(internal), gauss))
        self.saved, self.since = self.elapsed, time.monotonic()
        return True

    def tick(self, samples: int = 0) -> None:
        """Count a step and the time since the last; save if that is due."""
        self.step, self.samples = self.step + 1, self.samples + samples
        self.elapsed += time.monotonic() - self.since
        self.since = time.monotonic()
        if self.elapsed - self.saved >= SAVE_S:
            self.save()

    def pause(self) -> None:
        """What was done since the last step is not of this stage's time."""
        self.since = time.monotonic()

    def save(self) -> None:
        """Replace what was saved before, at once."""
        part = self.path.with_suffix(".part")
        states = {name: [each.state_dict() for each in part] for name, part in self.parts.items()}
        counts = [self.step, self.samples, self.elapsed]
        torch.save({**states, "counts": counts, "torch": torch.get_rng_state(), "random": self.rng.getstate()}, part)
        part.replace(self.path)
        self.saved = self.elapsed


def rates(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Set the learning rate of all groups."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
