"""One process of `lower.py`: a model on a GPU that is not there, a line of JSON for each precision, and for its VAE.

    python -m gpuless.worker flux-schnell bf16 fp8 vae t5        (GPULESS_CAPABILITY set, the stubs on LD_LIBRARY_PATH)

Blocks that are repeated are lowered as a worker of Kindling compiles them, beside two sketches of pictures, and counted
for one picture of the model's own size; what is around them, and text encoders, as they run: eagerly. The autoencoder
is counted eagerly, and compiled where a worker compiles its decoder.
"""

import importlib
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import random_models
from gpuless import denoisers, device, eager, inductor
from gpuless.variants import Variant, variant_of
from gpuless.work import Work, line
from handler import MODELS, ModelSpec
from handler.catalog import attention
from handler.model.compiling import modulation, package
from handler.model.families import autoencoders
from handler.model.loading import quant

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
AROUND = "around the blocks"
Row = dict[str, Any]


def group(model: str, asked: str) -> Iterator[Row]:
    """What a picture of `model` is made of: in a precision its steps and its prompt, or its decoding, `vae`."""
    spec, parts = MODELS[model], random_models.CONFIGS[model][1]
    what, variant = asked.partition("/")[0], variant_of(asked)
    if what == "vae":
        yield from decoded(spec, parts["vae"], variant)
    elif what == "t5":
        for precision in ("bf16", "fp8"):
            yield from prompt_lowered(spec, parts["text_encoder_2"], precision)
    else:
        denoiser = importlib.import_module(spec.family).DENOISER
        yield from steps(spec, denoiser, parts[denoiser], what, variant)
        for name in ENCODERS:
            if name in parts:
                yield encoded(spec, name, parts[name], what, variant)


def steps(spec: ModelSpec, part: str, recipe: random_models.Part, precision: str, variant: Variant) -> Iterator[Row]:
    """A step of the denoiser: its repeated blocks lowered, what is around them eagerly."""
    model, mode = on_gpu(random_models.made(recipe), precision)
    if variant.attention:
        model.set_attention_backend(attention.backend(variant.attention))
    many, times = denoisers.passes(model, spec)
    named = {path: module for path, module in model.named_modules() if type(module).__name__ in model._repeated_blocks}
    (width, height), step = spec.size, partial(denoisers.call, model, spec=spec)
    with mode:  # two sketches as `Worker` draws them, and the picture
        sketches = [step(2 * many, (width, height // 2)), step(3 * many, (width // 2, height // 4), longer=32)]
        picture = step(many * variant.pictures, variant.size(spec.size))
    calls = called(named, lambda: [model(**call) for call in (*sketches, picture)], mode)
    facts = {"part": part, "precision": precision, "calls": spec.steps * times}
    for kind in package._kinds(model).values():
        paths = [path for path, module in named.items() if any(module is block for block in kind)]
        for row in lowered(named[paths[0]], [calls[path] for path in paths], mode):
            yield facts | {"name": paths[0], "plan": "compiled"} | row
            for each in modulated(row, spec.steps * many * variant.pictures, spec.steps * (times - 1)):
                yield facts | each | {"name": f"{paths[0]}: {each['name']}", "plan": "eager"}
    with mode:
        work = eager.counted(lambda: model(**picture), partial(only, named.values(), False))
    yield facts | {"name": AROUND, "plan": "eager", "count": 1, "weight_bytes": weight_bytes(model), **asdict(work)}


def on_gpu(model: Any, precision: str) -> tuple[Any, FakeTensorMode]:
    """A component in this precision, with weights that have no values, and the mode they live in."""
    if precision in quant.SCHEMES:
        quant.quantise(model, precision, "cuda:0")
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with mode:
        return inductor.fill(model), mode


def called(modules: dict[str, Any], draw: Callable[[], object], mode: FakeTensorMode) -> dict[str, list[Row]]:
    """What each module is called with, by parameter name."""
    with mode, torch.inference_mode():
        return package._calls(modules, draw)


def lowered(block: Any, calls: list[list[Row]], mode: FakeTensorMode) -> Iterator[Row]:
    """Rows of one kind of block: one for all of them that are called alike. `calls` has two sketches and a picture."""
    groups = Counter(str(shapes(picture)) for *_, picture in calls)
    examples = {str(shapes(picture)): picture for *_, picture in calls}
    try:
        with mode:
            module, example, layout = package.program(block, calls[0][:-1])
        code = inductor.lower(module, example, package.options(module))
    except Exception as error:
        yield {"count": len(calls), "error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
        return
    for group, count in groups.items():
        work = code.at(taken(examples[group], example, layout))
        if work.casts:
            with mode, torch.inference_mode():
                work.activations = activations(block, examples[group])
        yield {"count": count, **asdict(work), "modulation": modulation_of(block, layout)}


def modulation_of(block: Any, layout: str) -> list[int]:
    """Columns and rows of the weight that makes a block's modulation, outside compiled code; empty if there is none."""
    if not (made := json.loads(layout)["modulation"]):
        return []
    merged, weights = json.loads(layout)["merged"], package._weights(block)
    parts = [weights[name] for name in merged.get(made["weights"][0], made["weights"][:1])]
    return [sum(part.shape[0] for part in parts), parts[0].shape[1]]


def modulated(row: Row, ahead: int, alone: int) -> Iterator[Row]:
    """What makes the modulation of a kind of block: of `ahead` rows many at once, of `alone` one by one."""
    if size := row.get("modulation"):
        for rows, calls in Counter([*_parts(ahead, modulation.ROWS), *[1] * alone]).items():
            work = Work()
            work.add(line("mm", "bfloat16", 1, rows, *size))
            yield {"name": f"modulation, rows: {rows}", "count": row["count"], "calls": calls, **asdict(work)}


def _parts(count: int, most: int) -> list[int]:
    return [min(most, count - start) for start in range(0, count, most)]


def shapes(call: Row) -> list[tuple[int, ...]]:
    """Of the tensors, in order."""
    return [tuple(leaf.shape) for leaf in package._leaves(call) if isinstance(leaf, torch.Tensor)]


def taken(call: Row, example: Row, layout: str) -> list[tuple[int, ...]]:
    """Of the tensors that the code takes, where the block is called so: its modulation for an embedding."""
    found = shapes(call)
    if modulation := json.loads(layout)["modulation"]:
        at = modulation["at"]
        found[at] = (found[at][0], *shapes(example)[at][1:])
    return found


def activations(block: Any, call: Row) -> int:
    """How many different tensors the quantised layers are given in one call."""
    given: dict[int, Any] = {}
    layers = [layer for layer in block.modules() if isinstance(layer, quant.QuantisedLinear)]
    hooks = [layer.register_forward_pre_hook(lambda _, args: given.update({id(args[0]): args[0]})) for layer in layers]
    block(**call)
    for hook in hooks:
        hook.remove()
    return len(given)


def weight_bytes(model: Any) -> int:
    """Of all weights, each once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def only(modules: Any, inside: bool, count: eager.Count) -> None:
    """Let the count be of these modules alone, or of all but them."""

    def pause(paused: bool) -> Callable[..., None]:
        return lambda *_: setattr(count, "paused", paused)

    count.paused = inside
    for module in modules:
        module.register_forward_pre_hook(pause(not inside))
        module.register_forward_hook(pause(inside))


def encoded(spec: ModelSpec, part: str, recipe: random_models.Part, precision: str, variant: Variant) -> Row:
    """A prompt through a text encoder; `layer_bytes`: what its quantised layers move for each value in them."""
    model, mode = on_gpu(random_models.made(recipe), precision)
    layers = [layer for layer in model.modules() if isinstance(layer, quant.QuantisedLinear)]
    with mode:
        ids = prompt(spec, model, variant.pictures)
        work = eager.counted(lambda: model(input_ids=ids))
        inside = eager.counted(lambda: model(input_ids=ids), partial(only, layers, True))
    values = sum(layer.rounded.numel() for layer in layers)
    layer_bytes = round((inside.triton_bytes + inside.extern_bytes) / values, 2) if values else 0
    facts = {"part": part, "precision": precision, "calls": 1, "name": type(model).__name__, "plan": "eager"}
    sizes = {"count": 1, "weight_bytes": weight_bytes(model), "layer_bytes": layer_bytes}
    return facts | sizes | asdict(work)


def prompt(spec: ModelSpec, model: Any, many: int = 1) -> torch.Tensor:
    """As many tokens as the family fills a prompt up to, of each of `many`."""
    tokens = denoisers.CLIP_TOKENS if type(model).__name__.startswith("CLIP") else spec.text_tokens
    return torch.zeros(many, tokens, dtype=torch.long, device="cuda")


def prompt_lowered(spec: ModelSpec, recipe: random_models.Part, precision: str) -> Iterator[Row]:
    """T5 as one program, which nobody runs: only to see that it can be lowered, and what that would save."""
    model, mode = on_gpu(random_models.made(recipe), precision)
    with mode:
        ids = prompt(spec, model)
    [call] = called({"t5": model}, lambda: model(input_ids=ids), mode)["t5"]
    facts = {"part": "text_encoder_2", "precision": precision, "calls": 1, "name": type(model).__name__}
    for row in lowered(model, [[call] * 3], mode):  # a prompt is always as long
        yield facts | {"plan": "compiled"} | row


def decoded(spec: ModelSpec, recipe: random_models.Part, variant: Variant) -> Iterator[Row]:
    """The latents of a picture to pixels: eagerly, and compiled where a worker compiles the decoder."""
    vae = random_models.made(recipe)
    autoencoders.prepare(vae, "cuda")
    vae, mode = on_gpu(vae, "bf16")
    width, height = spec.size

    def latents(many: int, width: int, height: int) -> torch.Tensor:
        channels = vae.config.get("latent_channels") or vae.config.z_dim
        depth = [1] if "z_dim" in vae.config else []  # of videos
        return denoisers.full(many, channels, *depth, height // denoisers.SHRINK, width // denoisers.SHRINK)

    with mode:
        sketches = latents(2, width, height // 2), latents(3, width // 2, height // 4)
        pictures = [*sketches, latents(variant.pictures, *variant.size(spec.size))]
        work = eager.counted(lambda: vae.decode(pictures[-1]))
    facts = {"part": "vae", "precision": "bf16", "calls": 1, "name": type(vae).__name__}
    yield facts | {"plan": "eager", "count": 1, "weight_bytes": weight_bytes(vae), **asdict(work)}
    upcasts = hasattr(random_models.CONFIGS[spec.id][0], "upcast_vae")
    pipeline = SimpleNamespace(vae=vae, **({"upcast_vae": None} if upcasts else {}))
    if not autoencoders.compilable(pipeline, "cuda"):
        return
    calls = called({"decoder": vae.decoder}, lambda: [vae.decode(each) for each in pictures], mode)["decoder"]
    for row in lowered(vae.decoder, [calls], mode):
        yield facts | {"plan": "compiled"} | row


def main() -> None:
    """A line for each group, with its rows."""
    warnings.simplefilter("ignore")
    model, *groups = sys.argv[1:]
    capability = "{}.{}".format(*device.CAPABILITY)
    for asked in groups:
        variant = variant_of(asked)
        facts = {"model": model, "capability": capability, "group": asked}
        facts |= {"size": variant.size(MODELS[model].size), "pictures": variant.pictures}
        print(json.dumps([facts | row for row in group(model, asked)]), flush=True)


if __name__ == "__main__":
    main()
