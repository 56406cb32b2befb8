"""Modulation for several steps at once: compiled blocks are given what their own layer makes of a step's embedding.

A block of FLUX.1, SD3.5 or Qwen-Image begins with `linear(silu(temb))`: for one row for each picture it reads the
weights of that layer, a fourth of FLUX.1's, at every step. Which rows the next steps bring is known: they differ in the
timestep alone. So this layer is not in the compiled code, which takes its result, and it gets their rows together.
"""

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

ROWS = 16  # multiplied together: about as fast as one, and what FLUX.1's blocks make of them is 34 MB, Qwen-Image's 71
# What pipeline and transformer make of the scheduler's timesteps; the latter works with this dtype.
CONVERTED: Mapping[str, Callable[[Any, Any], Any]] = {
    "FluxTransformer2DModel": lambda timesteps, dtype: timesteps.to(dtype) / 1000 * 1000,
    "SD3Transformer2DModel": lambda timesteps, _: timesteps,
    "QwenImageTransformer2DModel": lambda timesteps, dtype: timesteps.to(dtype) / 1000,
}


def take_out(module: Any, example: dict[str, Any]) -> dict[str, Any] | None:
    """Let `module`, a block's graph, take the result of its modulation; how that is made, as `Modulations` reads it.

    It comes in the place of the embedding (batch, width), also in `example`. None if another node reads that too.
    """
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    tensors = [n for n in module.graph.nodes if n.op == "placeholder" and hasattr(n.meta["val"], "shape")]
    for at, node in enumerate(tensors):
        silu = _only_user(node, "aten.silu.default")
        linear = silu and _only_user(silu, "aten.linear.default")
        if node.name in example and linear and all(weight.op == "get_attr" for weight in linear.args[1:]):
            weights = linear.args[1:]
            columns = operator.attrgetter(weights[0].target)(module).shape[0]
            with unset_fake_temporarily():  # each makes one of its own kind
                for holder, name in ((node.meta, "val"), (example, node.name)):
                    holder[name] = holder[name].new_zeros(holder[name].shape[0], columns)
            linear.replace_all_uses_with(node)
            for gone in (linear, silu):
                module.graph.erase_node(gone)
            module.graph.eliminate_dead_code()
            module.recompile()
            return {"at": at, "weights": [weight.target for weight in weights]}
    return None


def _only_user(node: Any, target: str) -> Any:
    users = [*node.users]
    return users[0] if [str(user.target) for user in users] == [target] else None


class Modulations:
    """Of all blocks of one transformer."""

    def __init__(self) -> None:
        self.run: Run | None = None  # that goes on
        self.proven: set[tuple[str, str]] = set()  # pipelines and schedulers whose timesteps are as they are predicted

    def maker(self, layout: Mapping[str, Any], weights: Mapping[str, Any]) -> Callable[[Any], Any]:
        """What makes a block's modulation (batch, columns) of an embedding (batch, width)."""
        from torch.nn.functional import linear, silu

        names = ("weight", "bias")[: len(layout["weights"])]
        layer: Any = partial(linear, **dict(zip(names, (weights[name] for name in layout["weights"]), strict=True)))

        def make(temb: Any) -> Any:
            known = self.run and self.run.find(layer, temb)
            return layer(silu(temb)) if known is None else known

        return make


class Run:
    """The embeddings of one run, a row for each picture: for this step and some after it, and what is made of them."""

    def __init__(self, transformer: Any, scheduler: Any, proven: bool) -> None:
        self.right = True
        self._plain, self._convert = transformer.time_text_embed.forward, CONVERTED[type(transformer).__name__]
        self._scheduler, self._proven = scheduler, proven
        self._prompt: list[Any] = []
        self._first, self._at, self._temb = 0, 0, None
        self._timesteps: Any = ()  # (steps, batch), from the first on
        self._rows: Any = ()  # (steps, batch, width)
        self._activations: Any = None
        self._made: dict[Any, Any] = {}

    def embed(self, timestep: Any, *others: Any) -> Any:
        """What `time_text_embed` gives; `others` are alike at every step, and the prompt's is the last of them.

        Where anything is not as predicted, it is what diffusers' own gives. That takes a look at the device's values
        until one run has shown that it is right.
        """
        self._prompt = self._prompt or [others[-1]]
        index = self._scheduler.step_index
        index = self._scheduler.begin_index or 0 if index is None else index
        if others[-1] is not self._prompt[0] or not self.right:
            return self._plain(timestep, *others)
        if not 0 <= index - self._first < len(self._rows):
            self._look_ahead(index, timestep, others)
        self._at = index - self._first
        if not (self._proven or self._timesteps[self._at].equal(timestep)):
            self.right = False
            return self._plain(timestep, *others)
        self._temb = self._rows[self._at]
        return self._temb

    def _look_ahead(self, index: int, timestep: Any, others: tuple[Any, ...]) -> None:
        from torch.nn.functional import silu

        self._made.clear()
        batch = len(timestep)
        steps = self._scheduler.timesteps[index : index + max(1, ROWS // batch)].to(timestep.device)
        self._first, self._timesteps = index, self._convert(steps, timestep.dtype)[:, None].expand(-1, batch)
        rows = [each.repeat(len(steps), *[1] * (each.ndim - 1)) if _is_row(each) else each for each in others]
        self._rows = self._plain(self._timesteps.flatten(), *rows).unflatten(0, (-1, batch))
        self._activations = silu(self._rows)

    def find(self, layer: Any, temb: Any) -> Any:
        """The modulation of the step that `temb` is of; None if that is not this run's."""
        if temb is not self._temb:
            return None
        if layer not in self._made:
            self._made[layer] = layer(self._activations)
        return self._made[layer][self._at]


def _is_row(value: Any) -> bool:
    """Whether each picture has its own; of what is larger only the dtype matters."""
    return value is not None and value.ndim < 3


@contextmanager
def ahead(pipeline: Any) -> Iterator[None]:
    """While this lasts, a run of `pipeline`, its bound blocks have their modulation made for several steps at once."""
    transformer: Any = getattr(pipeline, "transformer", None)
    modulations: Modulations | None = getattr(transformer, "modulations", None)
    if modulations is None or type(transformer).__name__ not in CONVERTED:
        yield
        return
    kind = type(pipeline).__name__, type(pipeline.scheduler).__name__
    run = modulations.run = Run(transformer, pipeline.scheduler, kind in modulations.proven)
    transformer.time_text_embed.forward = run.embed
    try:
        yield
        modulations.proven |= {kind} if run.right else set()
    finally:
        del transformer.time_text_embed.forward
        modulations.run = None
