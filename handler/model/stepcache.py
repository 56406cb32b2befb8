"""Step caching: a step that differs little from the last full one reuses what its middle blocks made.

cache-dit's DBCache and TaylorSeer, under the names SGLang gives their values. A transformer is patched for one picture
and is then as it was: nothing of a stopped run is left, and a picture without a cache runs untouched code.
"""

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from handler.core.stepcache import StepCache


@dataclass(frozen=True, slots=True)
class Layout:
    """How a transformer calls its blocks: `lists` has cache-dit's pattern for each of its lists of them."""

    lists: Mapping[str, str]
    joined: tuple[str, ...] = ()  # lists whose blocks follow those of the first list and are called alike
    two_passes: bool = False  # with guidance: one for the prompt, one for the negative prompt, each with its own cache
    drops_text: bool = False  # its last block gives nothing for the prompt
    placed: bool = False  # what it calls a block with depends on the block's place


DOUBLE = {"transformer_blocks": "Pattern_1"}
DOUBLE_AND_SINGLE = DOUBLE | {"single_transformer_blocks": "Pattern_3"}
LAYOUTS = {
    "FluxTransformer2DModel": Layout(DOUBLE, joined=("single_transformer_blocks",)),
    "Flux2Transformer2DModel": Layout(DOUBLE_AND_SINGLE),
    "SD3Transformer2DModel": Layout(DOUBLE, drops_text=True),
    "QwenImageTransformer2DModel": Layout(DOUBLE, two_passes=True),
    "ChromaTransformer2DModel": Layout(DOUBLE_AND_SINGLE, two_passes=True, placed=True),
}


def library() -> Any:
    """cache-dit. A worker that may need it imports it while it starts, so that no request waits for that."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # it logs to stdout
    return importlib.import_module("cache_dit")


@contextmanager
def caching(pipeline: Any, cache: StepCache | None, guided: bool) -> Iterator[None]:
    """While this lasts, `pipeline` draws one picture with `cache`; None changes nothing."""
    if cache is None:
        yield
        return
    transformer = pipeline.transformer
    layout = LAYOUTS[type(transformer).__name__]
    with _as_it_was(transformer), _placed(transformer) if layout.placed else nullcontext():
        _enable(transformer, layout, cache, layout.two_passes and guided)
        yield


@contextmanager
def _as_it_was(*modules: Any) -> Iterator[None]:
    """Whatever is set on these modules inside is gone afterwards."""
    before = [vars(module) | {"_modules": dict(vars(module)["_modules"])} for module in modules]  # also in its order
    try:
        yield
    finally:
        for module, kept in zip(modules, before, strict=True):
            vars(module).clear()
            vars(module).update(kept)


def _enable(transformer: Any, layout: Layout, cache: StepCache, two_passes: bool) -> None:
    from torch.nn import ModuleList

    cache_dit = library()
    first = next(iter(layout.lists))
    blocks = {name: ModuleList(getattr(transformer, name)) for name in layout.lists}  # new ones: it marks what it gets
    for name in layout.joined:
        blocks[first].extend(getattr(transformer, name))
    adapter = cache_dit.BlockAdapter(
        transformer=transformer,
        blocks=list(blocks.values()),
        blocks_name=list(blocks),
        dummy_blocks_names=list(layout.joined),
        forward_pattern=[getattr(cache_dit, pattern) for pattern in layout.lists.values()],
        check_forward_pattern=False,  # compiled code shows no parameters
    )
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=cache.Fn,
        Bn_compute_blocks=cache.Bn,
        max_warmup_steps=cache.W,
        residual_diff_threshold=cache.R,
        max_continuous_cached_steps=cache.MC,
        enable_separate_cfg=two_passes,
    )
    seer = cache_dit.TaylorSeerCalibratorConfig(
        taylorseer_order=cache.order, enable_encoder_calibrator=cache.Bn > 0 or not layout.drops_text
    )
    cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=seer if cache.order else None)


@contextmanager
def _placed(transformer: Any) -> Iterator[None]:
    """Chroma picks a block's modulation by its place in its list, and the cache makes each list look like one block."""
    doubles, singles = transformer.transformer_blocks, transformer.single_transformer_blocks
    places = {block: [(3 * i, 3)] for i, block in enumerate(singles)}
    for i, block in enumerate(doubles):
        places[block] = [(3 * len(singles) + 6 * (i + side * len(doubles)), 6) for side in (0, 1)]
    made: list[Any] = []

    def note(_: Any, __: Any, modulation: Any) -> None:
        made[:] = [modulation]

    hook = transformer.distilled_guidance_layer.register_forward_hook(note)
    try:
        with _as_it_was(*places):
            for block, place in places.items():
                block.forward = _modulated(block.forward, made, place)
            yield
    finally:
        hook.remove()


def _modulated(forward: Callable[..., Any], made: list[Any], place: list[tuple[int, int]]) -> Callable[..., Any]:
    """`forward`, with what was `made` for this place: rows from, and how many."""
    import torch

    def placed(*args: Any, temb: Any, **kwargs: Any) -> Any:
        return forward(*args, temb=torch.cat([made[0][:, at : at + size] for at, size in place], dim=1), **kwargs)

    return placed
