"""Small pictures of latents that are still being denoised, at an eighth of the picture's size.

Latents stand on a grid of cells, a vector of channels each. One matrix makes a cell's colours of its channels: a ridge
regression, learned from the finished latents and the decoded pictures of what this worker draws, the warm-up first. So
it fits every family and every autoencoder. Nothing here waits for the device until a preview is asked for.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SHRINK = 8  # pixels of the picture to one of the preview, along each side
LEARNED = 48  # pictures; later ones change nothing anyone could see
RIDGE = 1.0  # worth as much as one cell that says: grey
GREY = 0.5


class Projection:
    """Latents to colours. `latents` are one picture's as a pipeline has them, `size` is (width, height) in pixels."""

    def __init__(self) -> None:
        self._pictures = 0
        self._squares: Any = None  # of the cells, and
        self._products: Any = None  # of cells and colours: what least squares need to know
        self._solved: Any = None  # what they came to, unless something was learned since

    def learn(self, latents: Any, picture: Any) -> None:
        """Learn from finished latents and their picture, (3, height, width) from 0 to 1."""
        if self._pictures == LEARNED:
            return
        from torch.nn.functional import avg_pool2d

        height, width = picture.shape[1:]
        cells, (rows, columns, block) = _cells(latents, (width, height))
        small = avg_pool2d(picture.float(), SHRINK) - GREY
        colours = small.reshape(3, rows, block, columns, block).permute(1, 3, 2, 4, 0).reshape(rows * columns, -1)
        self._begin(cells, block)
        self._squares += cells.T @ cells
        self._products += cells.T @ colours
        self._pictures += 1
        self._solved = None

    def draw(self, latents: Any, size: tuple[int, int]) -> Any:
        """The preview: uint8 (height, width, 3) on the device. Grey as long as nothing was learned."""
        import torch

        cells, (rows, columns, block) = _cells(latents, size)
        self._begin(cells, block)
        if self._solved is None:  # to solve makes the host wait for the device
            self._solved = torch.linalg.solve(self._squares, self._products)
        colours = cells @ self._solved + GREY
        pixels = (colours * 255).round_().clamp_(0, 255).to(torch.uint8)
        blocks = pixels.reshape(rows, columns, block, block, 3).permute(0, 2, 1, 3, 4)
        return blocks.reshape(rows * block, columns * block, 3)

    def _begin(self, cells: Any, block: int) -> None:
        if self._squares is None:
            channels = cells.shape[1]
            self._squares = RIDGE * cells.new_ones(channels).diag()
            self._products = cells.new_zeros(channels, 3 * block**2)


def _cells(latents: Any, size: tuple[int, int]) -> tuple[Any, tuple[int, int, int]]:
    """(cells, channels and a one), row by row; rows, columns, and how many preview pixels a cell is high and wide."""
    from torch.nn.functional import pad

    width, height = size
    cells = latents[0].float().squeeze()  # of frames there is one, if any
    if cells.ndim == 3:
        cells = cells.flatten(1).T
    side = math.isqrt(width * height // len(cells))
    return pad(cells, (0, 1), value=1.0), (height // side, width // side, side // SHRINK)


@contextmanager
def watched(scheduler: Any) -> Iterator[Callable[[], Any]]:
    """Inside, the callable gives the latents that `scheduler` would finish with, as its last step saw them."""
    step = scheduler.step
    last: list[Any] = []

    @functools.wraps(step)  # pipelines look at its signature
    def watching(output: Any, timestep: Any, sample: Any, *rest: Any, **options: Any) -> Any:
        found = step(output, timestep, sample, *rest, **options)
        last[:] = output, sample, found
        return found

    scheduler.step = watching
    try:
        yield lambda: _finished(scheduler, *last)
    finally:
        del scheduler.step  # or scheduler and latents would live until the garbage collector finds their circle


def _finished(scheduler: Any, output: Any, sample: Any, found: tuple[Any, ...]) -> Any:
    """The latents that the last step headed for."""
    if len(found) > 1:
        return found[1]
    if hasattr(scheduler, "model_outputs"):  # DPM++ keeps what it headed for
        return scheduler.model_outputs[-1]
    sigma = scheduler.sigmas[scheduler.step_index - 1]
    return sample.float() - sigma * output.float()  # flow goes straight
