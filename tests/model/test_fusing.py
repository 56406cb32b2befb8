"""Blocks as they are compiled: nothing is computed twice, layers that multiply the same are one product."""

import json
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import linear, silu

import tiny
from handler import MODELS
from handler.model.compiling import package
from handler.model.compiling.joining import joined
from handler.model.loading import quant

MERGED = {  # for each kind of block of tiny models the layers of each product, by the names of their layers
    "flux-schnell": {
        "FluxTransformerBlock": [
            ["norm1.linear", "norm1_context.linear"],
            ["attn.to_q", "attn.to_k", "attn.to_v"],
            ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        ],
        "FluxSingleTransformerBlock": [["proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v"]],
    },
    "sdxl": {"BasicTransformerBlock": [["attn1.to_q", "attn1.to_k", "attn1.to_v"], ["attn2.to_k", "attn2.to_v"]]},
    "z-image-turbo": {
        "ZImageTransformerBlock": [
            ["attention.to_q", "attention.to_k", "attention.to_v"],
            ["feed_forward.w1", "feed_forward.w3"],
        ]
    },
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's, of what it does itself
TOLERANCE = {"fp32": 1e-4, "fp8": 0.05, "fp8-tensor": 0.05, "int8-dynamic": 0.02}


@cache
def programs(model: str, precision: str = "fp32") -> dict[str, Any]:
    """Each kind of a tiny denoiser's block, its calls at two sizes, and its program, by the class of the block."""
    spec = MODELS[model]
    pipeline = tiny.build(spec)
    denoiser = getattr(pipeline, "transformer", None) or pipeline.unet
    denoiser.requires_grad_(False)
    if precision != "fp32":
        quant.quantise(denoiser, precision, "cpu")

    @torch.inference_mode()
    def draw() -> None:
        tokens = {} if "sdxl" in spec.family else {"max_sequence_length": spec.text_tokens}
        for count, side in ((2, 128), (3, 64)):
            pipeline(
                prompt=["stars"] * count, width=side, height=64, num_inference_steps=1, output_type="latent", **tokens
            )

    firsts = {kind: found[0] for kind, found in package._kinds(denoiser).items()}
    calls = package._calls(firsts, draw)
    return {type(b).__name__: (b, calls[kind], *package.program(b, calls[kind])) for kind, b in firsts.items()}


def targets(module: Any) -> list[str]:
    return [f"{node.target} {node.kwargs}" for node in module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("model", MERGED)
def test_layers_that_multiply_the_same_are_one_product(model: str) -> None:
    for kind, (_, _, module, _, layout) in programs(model).items():
        weights = [parts for parts in json.loads(layout)["merged"].values() if parts[0].endswith(".weight")]
        assert [[part.removesuffix(".weight") for part in parts] for parts in weights] == MERGED[model][kind]
        assert len({name for name, _ in module.named_buffers() if name.startswith("merged")}) >= len(weights)
        left = {name for name, _ in module.named_parameters()}
        assert not left & {part for parts in weights for part in parts}


TENSOR = pytest.param("fp8-tensor", marks=pytest.mark.judge)  # traced as fp8 is, but for one scale instead of many
ROUNDING = ["fp8", TENSOR, "int8-dynamic"]


@pytest.mark.parametrize("precision", ROUNDING)
def test_activations_are_rounded_once(precision: str) -> None:
    cast = "int8" if precision == "int8-dynamic" else "float8_e4m3fn"
    casts = {
        kind: sum(target.startswith("aten._to_copy") and cast in target for target in targets(module))
        for kind, (_, _, module, _, _) in programs("flux-schnell", precision).items()
    }
    assert casts == {"FluxTransformerBlock": 8, "FluxSingleTransformerBlock": 2}


@pytest.mark.parametrize("precision", ROUNDING)
def test_products_of_the_same_activations_are_merged(precision: str) -> None:
    found = [
        sum(target.startswith(("aten._scaled_mm", "aten._int_mm")) for target in targets(module))
        for _, _, module, _, _ in programs("flux-schnell", precision).values()
    ]
    assert found == [8, 2]


def taken(module: Any, call: dict[str, Any], layout: str) -> dict[str, Any]:
    """What the program takes where its block is called so."""
    facts = json.loads(layout)["modulation"]
    weights = [attrgetter(name)(module) for name in facts["weights"]]
    return call | {"temb": linear(silu(call["temb"]), *weights)}


@pytest.mark.parametrize("precision", ["fp32", *ROUNDING])
def test_a_program_computes_what_its_block_does(precision: str) -> None:
    for block, calls, module, _, layout in programs("flux-schnell", precision).values():
        for call in calls:
            for found, want in zip(module(**taken(module, call, layout)), block(**call), strict=True):
                assert (found - want).norm() < TOLERANCE[precision] * want.norm()


@pytest.mark.parametrize("precision", ["fp32", *ROUNDING])
def test_the_peak_of_a_token_is_found_by_the_kernel_that_rounds_it(precision: str) -> None:
    for _, _, module, _, _ in programs("flux-schnell", precision).values():
        assert package.options(module)["split_reductions"] is (precision == "fp32")


class Peak(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs().amax((-2, -1))


def test_the_peak_of_all_tokens_is_found_by_many() -> None:
    """NVFP4 has a scale for each picture."""
    module = torch.export.export(Peak(), (torch.ones(1, 64, 32),)).module()
    assert package.options(module)["split_reductions"] is True


@pytest.mark.parametrize("precision", ROUNDING)
def test_what_rounds_activations_sees_rows(precision: str) -> None:
    """With an axis for pictures, Inductor writes out what is put together of attention and MLP, and reads it again."""
    for _, _, module, _, _ in programs("flux-schnell", precision).values():
        peaks = [node for node in module.graph.nodes if str(node.target) == "aten.amax.default"]
        assert peaks
        assert {node.args[0].meta["val"].ndim for node in peaks} == {2}


def test_tokens_are_joined_after_norm_and_rotation() -> None:
    """So that one kernel reads and writes queries and keys: what it joins, attention takes as it is."""
    _, _, module, _, _ = programs("flux-schnell")["FluxTransformerBlock"]
    joins = [node for node in module.graph.nodes if str(node.target) == "aten.cat.default"]
    assert len(joins) == 3
    assert {str(user.target) for join in joins for user in join.users} == {"aten.permute.default"}


class Reads(torch.nn.Module):
    """What is joined and computed token by token is read before too, and multiplied by what was joined elsewhere."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        one, other = torch.cat([x, y], 1), torch.cat([x + 1, y * 2], 1)
        return (-one * 2).flatten(2), one[:, 1:], one * other


def test_what_is_joined_may_have_other_readers() -> None:
    calls = [{"x": torch.randn(n, 3 * n, 4, 8), "y": torch.randn(n, 5, 4, 8)} for n in (2, 3)]
    module, *_ = package.program(Reads(), calls)
    for call in calls:
        for found, want in zip(module(**call), Reads()(**call), strict=True):
            assert torch.equal(found, want)


PARTS = {"q.weight": (64, 32), "q.bias": (64,), "k.weight": (32, 32), "k.bias": (32,), "v.weight": (96, 32)}
ASKED = {"weights": ["q.weight", "k.weight", "v.weight"], "biases": ["q.bias", "k.bias"]}


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Each in its own memory, in the order of a file's."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(PARTS[name], generator=generator).to(dtype) for name in sorted(PARTS)}


def in_a_file(tensors: dict[str, torch.Tensor], gap: int = 0) -> dict[str, torch.Tensor]:
    """The same as views of one allocation, with `gap` bytes that nobody knows after each."""
    memory = torch.zeros(sum(tensor.nbytes + gap for tensor in tensors.values()), dtype=torch.uint8)
    start, found = 0, {}
    for name, tensor in tensors.items():
        found[name] = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        start += tensor.nbytes + gap
    return found


def held(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes of memory."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()}.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("filed", [False, True])
def test_weights_become_slices_of_one(filed: bool, dtype: torch.dtype) -> None:
    """No byte is there twice, whether each weight had its own memory or all are views of a file's."""
    before = weights(dtype)
    mine = in_a_file(before) if filed else weights(dtype)
    kept, bytes_before = dict(mine), held(mine)
    whole = joined(mine, ASKED)
    for name, tensor in before.items():
        assert mine[name] is kept[name]
        assert torch.equal(mine[name].view(torch.uint8), tensor.view(torch.uint8))
        assert mine[name].is_contiguous()
    for name, parts in ASKED.items():
        assert torch.equal(whole[name].view(torch.uint8), torch.cat([before[part].view(torch.uint8) for part in parts]))
        assert {mine[part].untyped_storage().data_ptr() for part in parts} == {whole[name].untyped_storage().data_ptr()}
    assert held(mine) == bytes_before


def test_once_joined_they_stay_where_they_are() -> None:
    mine = in_a_file(weights())
    first = joined(mine, ASKED)
    assert {name: tensor.data_ptr() for name, tensor in joined(mine, ASKED).items()} == {
        name: tensor.data_ptr() for name, tensor in first.items()
    }


def test_what_lies_between_and_is_not_known_is_not_written_over() -> None:
    mine, before = in_a_file(weights(), gap=64), weights()
    memory = torch.empty(0, dtype=torch.uint8).set_(mine["q.bias"].untyped_storage())  # type: ignore[call-overload]
    copy = memory.clone()
    whole = joined(mine, ASKED)
    assert torch.equal(memory, copy)
    assert torch.equal(whole["weights"], torch.cat([before[part] for part in ASKED["weights"]]))


def test_joined_weights_are_saved_as_before(tmp_path: Path) -> None:
    mine = in_a_file(weights())
    save_file(mine, tmp_path / "before")
    joined(mine, ASKED)
    save_file(mine, tmp_path / "after")
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()
