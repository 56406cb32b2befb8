"""Where the noise of a picture comes from, seed by seed: at its start, in its steps, or from a Brownian tree.

`draw(generator)` is one draw of latents from a torch.Generator, one picture's of what its batch draws at once.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch

Draw = Callable[[torch.Generator], Any]
InSteps = Callable[[torch.Tensor, torch.Tensor], Any]  # for a step from one sigma to the following
CPU = torch.device("cpu")
POOL = 24  # words of entropy of each seed in the tree
DIGITS = 6  # that its times are rounded to


def seeded(seed: int, device: torch.device = CPU) -> torch.Generator:
    """A generator of `device`."""
    return torch.Generator(device).manual_seed(seed % 2**64)


def in_steps(draw: Draw, seed: int, device: torch.device) -> InSteps:
    """Noise after noise of one generator, on the device that draws; on a CPU not the one that began the picture."""
    generator = functools.cache(lambda: seeded(seed + 1 if device.type == "cpu" else seed, device))
    return lambda *_: draw(generator())


def of_tree(draw: Draw, seed: int, device: torch.device, sigmas: torch.Tensor) -> InSteps:
    """What a Brownian motion over all of the sigmas adds between two of them, at deviation 1; drawn on `device`."""
    tree = BrownianTree(float(sigmas[sigmas > 0].min()), float(sigmas.max()), seed, lambda s: draw(seeded(s, device)))

    def between(sigma: torch.Tensor, following: torch.Tensor) -> Any:
        low, high = sorted((sigma, following))
        sign = -1 if following < sigma else 1
        return tree.between(float(low), float(high)) * sign / (following - sigma).abs().sqrt()

    return between


@dataclass(frozen=True, slots=True)
class BrownianTree:
    """A Brownian motion from `start` to `end` that a seed decides, whatever it is asked: torchsde's, to the bit.

    Each interval is halved where a question does not end at its ends: the left half's increment is normal around its
    share of the whole's (a Brownian bridge), from a seed by the interval's place (numpy's SeedSequence).
    """

    start: float
    end: float
    seed: int
    draw: Callable[[int], Any]

    def between(self, low: float, high: float) -> Any:
        """The increment from `low` to `high`."""
        start, end = round(self.start, DIGITS), round(self.end, DIGITS)
        low, high = (min(max(round(time, DIGITS), start), end) for time in (low, high))
        whole = self._noise(3) * math.sqrt(self.end - self.start)
        if low == high:
            return whole * 0
        return sum(self._parts((start, end), (0, 0), whole, (low, high)), 0)

    def _parts(
        self, interval: tuple[float, float], place: tuple[int, int], whole: Any, asked: tuple[float, float]
    ) -> list[Any]:
        """The increments of the intervals that make up `asked`. `place` counts from the left, and from the top."""
        if asked == interval:
            return [whole]
        (start, end), (low, high), (key, depth) = interval, asked, place
        middle = round(0.5 * (end + start), DIGITS)
        left_width, right_width, share = middle - start, end - middle, 1 / (end - start)
        noise = self._noise(4, place)
        left = left_width * whole * share + math.sqrt(left_width * right_width * share) * noise
        found = []
        if low < middle:
            found += self._parts((start, middle), (2 * key, depth + 1), left, (low, min(high, middle)))
        if high > middle:
            found += self._parts((middle, end), (2 * key + 1, depth + 1), whole - left, (max(low, middle), high))
        return found

    def _noise(self, words: int, place: tuple[int, ...] = ()) -> Any:
        sequence = numpy.random.SeedSequence(entropy=self.seed, spawn_key=place, pool_size=POOL)
        return self.draw(int(sequence.generate_state(words)[0]))
