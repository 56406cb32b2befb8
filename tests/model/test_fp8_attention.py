"""Attention in FP8: its roundings, what it refuses, compiled code that calls it, and what cuDNN is told."""

import dataclasses
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)

from handler.catalog import attention as kernels
from handler.model import attention, fp8_attention
from handler.model.compiling.package import bind_blocks, compile_blocks
from handler.model.fp8_attention import BACKEND, E4M3, NUMERATOR, attend, attention_fp8


def tensors(tokens: int = 200, channels: int = 64, pictures: int = 2, seed: int = 0) -> Any:
    """Queries, keys, values: pictures, tokens, heads, channels; normalised as models do it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, pictures, tokens, 4, channels, generator=generator).bfloat16()


def dispatched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str, **given: Any) -> torch.Tensor:
    return dispatch_attention_fn(q, k, v, backend=AttentionBackendName(backend), **given)


@pytest.mark.parametrize("channels", [16, 32, 64, 128])
def test_it_is_attention_but_for_eight_bits(channels: int) -> None:
    """Too far from native for a kernel that is chosen unasked."""
    q, k, v = tensors(channels=channels)
    want, got = (dispatched(q, k, v, name).float() for name in ("native", BACKEND))
    assert got.shape == want.shape
    assert attention.BOUND < (got - want).norm() / want.norm() < 0.065


def test_a_scale_and_keys_of_another_length() -> None:
    q, k, v = tensors()
    want, got = (dispatched(q, k[:, :77], v[:, :77], name, scale=0.3).float() for name in ("native", BACKEND))
    assert (got - want).norm() / want.norm() < 0.08


@pytest.mark.parametrize("beside", [4.0, 1e6, torch.nan, torch.inf])
def test_a_picture_is_the_same_in_any_batch(beside: float) -> None:
    q, k, v = tensors()
    v[1] *= beside
    v[1, 0] = float("nan")
    assert torch.equal(attend(q, k, v)[:1], attend(q[:1], k[:1], v[:1]))


@pytest.mark.parametrize("size", [0.5, 1.0, 50.0])
def test_values_of_many_sizes(size: float) -> None:
    q, k, v = tensors()
    want, got = (dispatched(q, k, v * size, name).float() for name in ("native", BACKEND))
    assert (got - want).norm() / want.norm() < 0.065


def test_nothing_overflows() -> None:
    q, k, v = tensors()
    assert attend(q * 1000, k * 1000, v * 1000).isfinite().all()
    assert (attend(q, k, v * 0) == 0).all()


def test_what_it_cannot_do_is_told() -> None:
    q, k, v = tensors()
    for given in ({"attn_mask": torch.zeros(200, 200)}, {"is_causal": True}, {"enable_gqa": True}):
        with pytest.raises(ValueError, match="takes no mask and no grouped heads"):
            dispatched(q, k, v, BACKEND, **given)
    for channels in (20, 256):
        with pytest.raises(ValueError, match=f"heads of 16 to 128 channels, by 16, not {channels}"):
            dispatched(*tensors(channels=channels), BACKEND)


def test_the_operator_keeps_torchs_rules() -> None:
    given = (*(x.to(E4M3) for x in tensors(tokens=24)), 0.125)
    torch.library.opcheck(attention_fp8, given, test_utils="test_faketensor")


class Attends(torch.nn.Module):
    """What a block does around its attention, by the dispatcher's name."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = torch.nn.Linear(64, 192)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dispatched(*self.to_qkv(x).unflatten(2, (3, 4, 16)).unbind(2), BACKEND).flatten(2)


class Model(torch.nn.Sequential):
    _repeated_blocks = ("Attends",)


def test_compiled_code_keeps_it_and_calls_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call by torch's dispatcher, and the roundings in the kernels around it; for any number of tokens."""
    torch.manual_seed(0)
    model, package = Model(Attends(), Attends()).eval(), tmp_path / "blocks.pt2"
    draw = torch.inference_mode()(model)
    shown, asked = ([torch.randn(shape) for shape in shapes] for shapes in (((2, 24, 64), (3, 40, 64)), ((4, 50, 64),)))
    wanted = [draw(x) for x in asked]
    compile_blocks(model, lambda: [draw(x) for x in shown], package)
    with zipfile.ZipFile(package) as files:
        [nodes] = [json.loads(files.read(name))["nodes"] for name in files.namelist() if name.endswith("wrapper.json")]
    assert [node["node"]["target"] for node in nodes] == ["kindling::attention_fp8"]
    bind_blocks(model, package)
    monkeypatch.setattr(_AttentionBackendRegistry, "_backends", {})  # what is eager fails from here on
    for x, want in zip(asked, wanted, strict=True):
        assert (draw(x) - want).norm() / want.norm() < 0.02  # a last bit of a product may round the other way


class Graph:
    """cuDNN's graph for SDPA in FP8, as its documentation has it, computed by torch on a CPU."""

    def __init__(self, **given: Any) -> None:
        self.given, self.made, self.outputs = given, dict[int, dict[str, Any]](), list[Any]()

    def tensor(self, **described: Any) -> int:
        self.made[described["uid"]] = described
        return int(described["uid"])

    def sdpa_fp8(self, attn_scale: float, generate_stats: bool, **inputs: int) -> list[Any]:
        assert not generate_stats
        self.inputs, self.scale = inputs, attn_scale
        self.outputs = [Output(), None, Output(), Output()]
        return self.outputs

    def build(self, heuristics: list[str]) -> None:
        self.built = heuristics

    def get_workspace_size(self) -> int:
        assert self.built
        return 16

    def execute(self, tensors: dict[int, torch.Tensor], workspace: torch.Tensor, handle: int) -> None:
        out, _, *most = self.outputs
        assert set(tensors) == set(self.made) | {one.uid for one in (out, *most)}
        assert (workspace.numel(), handle) == (16, 7)
        given = {name: tensors[uid] for name, uid in self.inputs.items()}
        for name in "qkv":
            seen = given[name].transpose(1, 2)  # heads before tokens
            told = self.made[self.inputs[name]]
            assert (told["dim"], told["stride"], told["data_type"]) == ([*seen.shape], [*seen.stride()], E4M3)
        q, k, v = (given[n].transpose(1, 2).float() * given[f"descale_{n}"] for n in "qkv")
        scores = q @ k.mT * self.scale
        shares = (scores - scores.amax(-1, keepdim=True)).exp()
        rounded = (shares * given["scale_s"]).to(E4M3).float() * given["descale_s"]
        result = (rounded @ v / shares.sum(-1, keepdim=True) * given["scale_o"]).transpose(1, 2)
        seen = tensors[out.uid].transpose(1, 2)
        assert (out.dim, out.stride, out.kind) == ([*seen.shape], [*seen.stride()], E4M3)
        tensors[out.uid].copy_(result.to(E4M3))


class Output:
    """One of its results, which is described after it was asked for."""

    def set_uid(self, uid: int) -> "Output":
        self.uid = uid
        return self

    def set_output(self, wanted: bool) -> "Output":
        assert wanted
        return self

    def set_dim(self, dim: list[int]) -> "Output":
        self.dim = dim
        return self

    def set_stride(self, stride: list[int]) -> "Output":
        self.stride = stride
        return self

    def set_data_type(self, kind: torch.dtype) -> None:
        self.kind = kind


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Graph]]:
    """cuDNN's front end on a CPU; the graphs that were built."""
    graphs, streams = list[Graph](), list[int]()
    module = SimpleNamespace(
        data_type=SimpleNamespace(FP8_E4M3=E4M3, FLOAT=torch.float32),
        heur_mode=SimpleNamespace(A="A", FALLBACK="FALLBACK"),
        pygraph=lambda **given: graphs.append(Graph(**given)) or graphs[-1],
        create_handle=lambda: 7,
        set_stream=lambda handle, stream: streams.append(stream),
    )
    monkeypatch.setitem(sys.modules, "cudnn", module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=11))
    kept = fp8_attention._handle, fp8_attention._numbers, fp8_attention._graph
    yield graphs
    assert set(streams) == {11}
    for cached in kept:
        cached.cache_clear()


def test_cudnn_is_told_the_same_as_a_cpu_computes(cudnn: list[Graph]) -> None:
    """Once for each shape; in the memory's own order; with every number that the graph names."""
    for tokens, keys, built in ((200, 200, 1), (200, 200, 1), (200, 77, 2), (130, 77, 3)):
        q, k, v = (x.to(E4M3) for x in tensors())
        q, k, v = q[:, :tokens].contiguous(), k[:, :keys].contiguous(), v[:, :keys].contiguous()
        got, want = (compute(q, k, v, 0.125) for compute in (fp8_attention._by_cudnn, attention_fp8))
        assert (got.float() == want.float()).all()
        assert len(cudnn) == built
    assert cudnn[0].given["handle"] == 7
    assert NUMERATOR == 256


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert kernels._no_cudnn_fp8() == "the package nvidia-cudnn-frontend is not installed"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    assert kernels._no_cudnn_fp8() == "needs cuDNN 91501 or newer, torch has 91002"
    row = dataclasses.replace(kernels.KERNELS["cudnn-fp8"], lacking=str)
    assert kernels.refusal(row, (8, 9), "bfloat16") == "needs compute capability 9.0 or newer, this GPU has 8.9"
    assert kernels.refusal(row, None, "float32") == "a CPU has only native"
    assert kernels.refusal(row, (10, 0), "bfloat16") == ""
