"""The parts of a picture on a GPU, each alone: matrix products, attention, text encoders, VAE, a block of each kind."""

import contextlib
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from gpurun.scale import DEVICE, Case, Row, Run, Scale, bare, built, kernels, noise, timed
from handler import Settings
from handler.catalog.attention import KERNELS, NATIVE, backend, refusal
from handler.model.compiling.package import bind_blocks, compile_blocks, unbind_blocks
from handler.model.families import autoencoders
from handler.model.hardware import detect
from handler.model.loading.quant import QuantisedLinear, quantise

Call = Callable[[], object]


def ceilings(run: Run) -> Iterator[Case]:
    """What the chip can do at best: bytes read and written by a copy, and a large matrix product."""

    def copy() -> Row:
        source = torch.randint(255, (run.scale.copied,), dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        row = timed(lambda: target.copy_(source))
        return row | {"tbytes_s": 2 * source.numel() / row["ms"] / 1e9}

    side = run.scale.square
    yield "a copy", copy
    yield from ((f"{kind} {side}x{side}x{side}", partial(product, kind, side, side, side)) for kind in ("bf16", "fp8"))


def products(run: Run) -> Iterator[Case]:
    """Every matrix product of a step, as the layers are and fused, and what they add up to; rows x out x in."""
    wanted, spent = shapes(run.scale), dict[str, list[float]]()

    def counted(kind: str, times: int, *sides: int) -> Row:
        row = product(kind, *sides)
        spent.setdefault(kind, []).append(times * row["ms"])
        return row | {"times": times}

    for sides, times in wanted.items():
        for kind in PRODUCTS:
            yield f"{kind} {'x'.join(map(str, sides))}", partial(counted, kind, times, *sides)
    for kind in PRODUCTS:
        if len(spent.get(kind, ())) == len(wanted):
            yield f"products of a step, {kind}", lambda kind=kind: {"ms": sum(spent[kind])}
    for sides in fused(run.scale):
        for kind in PRODUCTS:
            yield f"{kind} {'x'.join(map(str, sides))}, fused", partial(product, kind, *sides)


def sides_of(scale: Scale) -> tuple[int, int, int, Any]:
    """Tokens of picture and of text, the width of a token, the transformer's configuration."""
    config = bare(scale, "transformer").config
    return math.prod(scale.size) // 256, scale.tokens, config.num_attention_heads * config.attention_head_dim, config


def shapes(scale: Scale) -> dict[tuple[int, int, int], int]:
    """The products of a step's blocks, and how often each is in it."""
    image, text, width, _ = sides_of(scale)
    double, single = 19, 38
    found: Counter[tuple[int, int, int]] = Counter()
    for rows in (image, text):
        found += {(rows, width, width): 4 * double, (rows, 4 * width, width): double, (rows, width, 4 * width): double}
    both = image + text
    found += {(both, width, width): 3 * single, (both, 4 * width, width): single, (both, width, 5 * width): single}
    return found


def fused(scale: Scale) -> list[tuple[int, int, int]]:
    """Query, key and value as one product, in single blocks with the MLP's first too."""
    image, text, width, _ = sides_of(scale)
    return [(image, 3 * width, width), (text, 3 * width, width), (image + text, 7 * width, width)]


def product(kind: str, rows: int, out: int, inner: int) -> Row:
    """One product: its time, and the rate that is."""
    row = timed(PRODUCTS[kind](rows, out, inner))
    return row | {"tflops": 2 * rows * out * inner / row["ms"] / 1e9}


def bf16(rows: int, out: int, inner: int) -> Call:
    x, weight = noise(rows, inner), noise(out, inner)
    return lambda: nn.functional.linear(x, weight)


def fp8(rows: int, out: int, inner: int, each_row: bool = True) -> Call:
    x, weight = (noise(n, inner).clamp(-3, 3).to(torch.float8_e4m3fn) for n in (rows, out))
    a, b = (torch.ones(n if each_row else 1, 1, device=DEVICE) for n in (rows, out))
    return lambda: torch._scaled_mm(x, weight.t(), a, b.t(), out_dtype=torch.bfloat16, use_fast_accum=True)


def int8(rows: int, out: int, inner: int) -> Call:
    x, weight = (torch.randint(-127, 128, (n, inner), dtype=torch.int8, device=DEVICE) for n in (rows, out))
    return lambda: torch._int_mm(x, weight.t())


PRODUCTS: Mapping[str, Callable[[int, int, int], Call]] = {
    "bf16": bf16,
    "fp8": fp8,
    "fp8-tensor": partial(fp8, each_row=False),
    "int8": int8,
}


def attentions(run: Run) -> Iterator[Case]:
    """Every kernel of attention that Kindling can choose, and how far its result is from native's."""
    image, text, _, config = sides_of(run.scale)
    small = math.prod(run.scale.small) // 256
    capability = detect(Settings()).capability
    usable = [name for name, kernel in KERNELS.items() if not refusal(kernel, capability, "bfloat16")]
    heads, channels = config.num_attention_heads, config.attention_head_dim
    for tokens in (image + text, image + run.scale.dev_tokens, small + text):
        for name in usable:
            yield f"{name} {heads}x{tokens}x{channels}", partial(attention, name, tokens, heads, channels)


def attention(kernel: str, tokens: int, heads: int, channels: int) -> Row:
    """One call: its time and rate, and `apart`, the share of native's result that it differs by."""
    inputs = [noise(1, tokens, heads, channels) for _ in range(3)]

    def attended(name: str) -> Any:
        return dispatch_attention_fn(*inputs, backend=AttentionBackendName(backend(name)))

    row = timed(lambda: attended(kernel))
    want = attended(NATIVE).float()
    apart = float((attended(kernel).float() - want).norm() / want.norm())
    return row | {"tflops": 4 * tokens**2 * heads * channels / row["ms"] / 1e9, "apart": apart}


def encoders(run: Run) -> Iterator[Case]:
    """T5 in bf16, in fp8 as Kindling has it, and with the scales after the products; CLIP."""
    t5 = built(run.scale, "text_encoder_2")
    for tokens in (run.scale.tokens, run.scale.dev_tokens):
        words = torch.randint(2, 500, (1, tokens), device=DEVICE)
        name = "T5 bf16" if tokens == run.scale.tokens else f"T5 bf16, {tokens} tokens"
        yield name, lambda words=words: timed(lambda: t5(words))
    words = torch.randint(2, 500, (1, run.scale.tokens), device=DEVICE)
    quantise(t5, "fp8", DEVICE)
    yield "T5 fp8", lambda: timed(lambda: t5(words))
    for layer in t5.modules():
        if isinstance(layer, QuantisedLinear):
            layer.multiply = scaled_after
    yield "T5 fp8, scaled after the products", lambda: timed(lambda: t5(words))
    clip = built(run.scale, "text_encoder")
    yield "CLIP", lambda: timed(lambda: clip(words[:, :77]))


def scaled_after(x: Tensor, parts: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
    """Exact activations times rounded weights in one pass over them: the scale of a row is one of a column of y."""
    weight, scale = parts
    y = nn.functional.linear(x, weight.to(x.dtype)) * scale.reshape(-1).to(x.dtype)
    return y if bias is None else y + bias


def decoder(run: Run) -> Iterator[Case]:
    """The VAE's decode of one picture, one change upon the other; and as Kindling has it, not compiled."""
    vae, own = built(run.scale, "vae"), built(run.scale, "vae")
    autoencoders.prepare(own, DEVICE)
    width, height = run.scale.size
    latents = noise(1, vae.config.latent_channels, height // 8, width // 8)

    def decode(vae: Any = vae) -> Row:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Dynamo warns of caches in diffusers
            return timed(lambda: vae.decode(latents))

    yield "VAE decode, as Kindling has it", partial(decode, own)
    yield "VAE decode", decode
    vae.to(memory_format=torch.channels_last)
    yield "VAE decode, channels last", decode
    vae.decoder.mid_block.attentions[0].set_processor(AttnProcessor())
    yield "VAE decode, channels last, attention by matmul", decode
    vae.decoder.forward = torch.compile(vae.decoder.forward, backend=run.scale.backend)
    yield "VAE decode, channels last, attention by matmul, compiled", decode


def blocks(precision: str) -> Callable[[Run], Iterator[Case]]:
    """A block of each kind in `precision`: eager, and as Kindling compiles it for all sizes and for one."""
    return partial(_blocks, precision=precision)


def _blocks(run: Run, precision: str) -> Iterator[Case]:
    if precision not in run.scale.ways:
        return
    model = built(run.scale, "transformer", num_layers=1, num_single_layers=1)
    if precision != "bf16":
        quantise(model, precision, DEVICE)
    calls = dict(_calls(run.scale, model))
    yield from _timings(calls, f"{precision} eager")
    for way in run.scale.ways[precision]:
        sketch = partial(_sketch if way == "dynamic" else _step, run.scale, model)
        with tempfile.TemporaryDirectory() as folder:
            yield f"compiling {precision} {way}", partial(_compiled, model, sketch, Path(folder) / "blocks.pt2")
            if _bound(model):
                yield from _timings(calls, f"{precision} {way}")
        unbind_blocks(model)


def _timings(calls: Mapping[nn.Module, Mapping[str, Any]], how: str) -> Iterator[Case]:
    for block, given in calls.items():
        yield f"{type(block).__name__} {how}", partial(_profiled, partial(block, **given))


def _profiled(call: Call) -> Row:
    return timed(call) | {"kernels": kernels(call)}


def _compiled(model: Any, sketch: Call, package: Path) -> Row:
    with contextlib.redirect_stdout(None):
        seconds = compile_blocks(model, sketch, package)
    bind_blocks(model, package)
    return {"compile_s": seconds}


def _bound(model: Any) -> bool:
    return any("forward" in vars(module) for module in model.modules())


def _calls(scale: Scale, model: Any) -> list[tuple[nn.Module, dict[str, Any]]]:
    """The blocks, each with what it is called with in a step of one picture."""
    found: list[tuple[nn.Module, dict[str, Any]]] = []
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        hook = block.register_forward_pre_hook(lambda b, args, given: found.append((b, given)), with_kwargs=True)
        _step(scale, model)
        hook.remove()
    return found


def _sketch(scale: Scale, model: Any) -> None:
    """Pictures that differ in size and number, as a worker draws them to see what varies."""
    width, height = scale.size
    _step(scale, model, (width, height // 2), 2)
    _step(scale, model, (width // 2, height // 2), 3)


@torch.inference_mode()
def _step(scale: Scale, model: Any, size: tuple[int, int] = (0, 0), count: int = 1) -> None:
    """One step of the model: `count` pictures of `size`."""
    width, height = size if any(size) else scale.size
    config, tokens = model.config, width * height // 256
    model(
        hidden_states=noise(count, tokens, config.in_channels),
        encoder_hidden_states=noise(count, scale.tokens, config.joint_attention_dim),
        pooled_projections=noise(count, config.pooled_projection_dim),
        timestep=noise(count),
        img_ids=torch.zeros(tokens, 3, device=DEVICE),
        txt_ids=torch.zeros(scale.tokens, 3, device=DEVICE),
    )
