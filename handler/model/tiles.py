"""A VAE's tiles, each decoded by one of the ranks that draw together. What is no tile every rank decodes whole."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def share(vae: Any) -> None:
    """Let `vae` decode its tiles together with all other ranks; nothing where its tiles depend on one another."""
    if hasattr(vae, "tile_latent_min_size") and hasattr(vae, "tiled_decode"):  # AutoencoderKL's and FLUX.2's alone
        vae.tiled_decode = Together(vae, vae.tiled_decode).decode


@dataclass(frozen=True, slots=True)
class Together:
    """In the place of the `tiled_decode` of `vae`, which is `alone`: diffusers' own, called twice.

    The first time each rank decodes its tiles, and leaves those of the others out; the second time all are there, to
    be joined. So every rank ends with what one alone would have made of the same tiles.
    """

    vae: Any
    alone: Callable[..., Any]

    def decode(self, z: Tensor, return_dict: bool = True) -> Any:
        """The pictures (picture, channel, height, width) of latents `z`, as `AutoencoderKL.tiled_decode`."""
        tiles = list[Tensor]()
        rank, ranks = dist.get_rank(), dist.get_world_size()
        decoder, scale = self.vae.decoder.forward, 2 ** (len(self.vae.config.block_out_channels) - 1)

        def own(tile: Tensor) -> Tensor:
            height, width = (scale * side for side in tile.shape[2:])
            empty = tile.new_empty(len(tile), self.vae.config.out_channels, height, width)
            tiles.append(decoder(tile).contiguous() if len(tiles) % ranks == rank else torch.empty_like(empty))
            return empty  # what is joined is written to

        try:
            with _decoding(self.vae.decoder, own):
                self.alone(z)
        except Exception:
            _all(has=False)
            raise
        if not _all(has=True):
            raise MemoryError("a process that draws with this one has no room for its tiles")
        for number, tile in enumerate(tiles):
            dist.broadcast(tile, number % ranks)
        there = iter(tiles)
        with _decoding(self.vae.decoder, lambda _: next(there)):
            return self.alone(z, return_dict=return_dict)


def _all(has: bool) -> bool:
    """Whether every rank `has` its tiles: where one lacks memory none waits for it, and a picture is lost, no more."""
    told = torch.tensor(int(has))
    dist.all_reduce(told, dist.ReduceOp.MIN)
    return bool(told)


@contextmanager
def _decoding(decoder: Any, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let `decoder` be `forward` for a while, also in the place of compiled code; its arguments keep their names."""
    before = decoder.__dict__.get("forward")
    decoder.forward = wraps(decoder.forward)(forward)
    try:
        yield
    finally:
        del decoder.forward
        if before:
            decoder.forward = before
