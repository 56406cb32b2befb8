"""Quantised layers: how exact they are, beside torchao too; in every model, loaded, baked and compiled."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PATIENT
from torch import nn

import tiny
from handler import ImageRequest, Settings, Worker, blockwise
from handler.bake import publish_weights
from handler.catalog import MODELS, SCHNELL, SPARK
from handler.errors import SettingsError
from handler.hardware import Hardware
from handler.precisions import PRECISIONS, choose
from handler.quant import LEAST, SCHEMES, QuantisedLinear, is_quantised, quantise
from handler.request import Recipe
from handler.spec import ModelSpec

QUANTISED = [row.id for row in PRECISIONS.values() if row.quantised]
BLOCKS = ["mxfp8", "nvfp4"]
ERROR = {  # of a layer, relative, in the mean
    "fp8": 0.04,
    "fp8-tensor": 0.04,
    "int8": 0.008,
    "int8-dynamic": 0.012,
    "mxfp8": 0.04,
    "nvfp4": 0.14,
}
FAR = {  # of 255, mean, from fp32: random weights amplify
    "fp8": 30,
    "fp8-tensor": 30,
    "int8": 8,
    "int8-dynamic": 8,
    "mxfp8": 30,
    "nvfp4": 60,
}
OWN = [spec for spec in MODELS.values() if not spec.base and spec is not MODELS["sdxl-turbo"]]
needs_torchao = pytest.mark.skipif(
    not importlib.util.find_spec("torchao"), reason="torchao is not installed here; make test has it"
)


def by_id(spec: ModelSpec) -> str:
    return spec.id


@pytest.fixture
def unwarmed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warm-up picture is as large as the model's own; what is drawn here is not."""
    monkeypatch.setattr(Worker, "_warm", lambda worker, clock: None)


def layer(precision: str, linear: nn.Linear) -> QuantisedLinear:
    return QuantisedLinear(linear, SCHEMES[precision], SCHEMES[precision].multiply)


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(256, 512).to(dtype).requires_grad_(False)


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found - exact).float().norm() / exact.float().norm()).item()


def test_every_quantised_precision_has_a_scheme() -> None:
    assert set(QUANTISED) == set(SCHEMES)


@pytest.mark.parametrize("rows", [1, LEAST - 1, LEAST, 300])
@pytest.mark.parametrize("precision", QUANTISED)
def test_a_layer_is_nearly_exact_for_any_number_of_rows(precision: str, rows: int) -> None:
    exact = linear()
    x = torch.randn(2, rows, 256, generator=torch.Generator().manual_seed(rows))
    found = layer(precision, exact)(x)
    assert found.shape == (2, rows, 512)
    assert off(found, exact(x)) < ERROR[precision]
    assert torch.isfinite(layer(precision, exact)(torch.zeros(rows, 256))).all()


@needs_torchao
@pytest.mark.parametrize("precision", [each for each in QUANTISED if each not in BLOCKS])
def test_errors_are_no_larger_than_those_of_torchao(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchao.quantization as ao

    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda *given, **named: None)
    theirs = {
        "fp8": lambda: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow()),
        "fp8-tensor": lambda: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerTensor()),
        "int8": ao.Int8WeightOnlyConfig,
        "int8-dynamic": ao.Int8DynamicActivationInt8WeightConfig,
    }
    exact, other = linear(torch.bfloat16), nn.Sequential(linear(torch.bfloat16))
    ao.quantize_(other, theirs[precision]())
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours = layer(precision, exact)(x)
    assert off(ours, other(x)) < 0.02
    assert off(ours, exact(x)) < 1.05 * off(other(x), exact(x))


@needs_torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_are_rounded_as_torchao_rounds_them(dtype: torch.dtype) -> None:
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale
    from torchao.prototype.mx_formats.utils import to_blocked

    values = uneven().to(dtype)
    scales, theirs = to_mx(values, torch.float8_e4m3fn, blockwise.MX_BLOCK, ScaleCalculationMode.RCEIL)
    ours, tiles = blockwise.mxfp8(values)
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    assert torch.equal(tiles, to_blocked(scales.view(torch.uint8)))
    scales, theirs = nvfp4_quantize(values, blockwise.NV_BLOCK, per_tensor_amax_to_scale(values.abs().max()))
    ours, tiles, _ = blockwise.nvfp4(values)
    assert torch.equal(tiles, to_blocked(scales.view(torch.uint8)))
    # it multiplies by 1 / scale, which for halves between two levels may fall to the other side
    assert (ours != theirs.view(torch.uint8)).float().mean() < (0.002 if dtype is torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("precision", BLOCKS)
def test_a_block_of_zeros_and_one_far_larger_than_the_others(precision: str) -> None:
    scheme, values = SCHEMES[precision], uneven()
    values[:64, :32], values[3, 40] = 0, 1e4
    found = scheme.exact(*scheme.parts(values))
    assert found.shape == values.shape
    assert (found[:64, :32] == 0).all()
    assert abs(found[3, 40] - 1e4) < 500
    assert torch.isfinite(found).all()
    assert torch.isfinite(scheme.exact(*scheme.parts(torch.zeros(8, 64)))).all()


def test_every_four_bit_float() -> None:
    levels = torch.tensor([*blockwise.E2M1, *(-level for level in blockwise.E2M1)])
    packed, scale, whole = blockwise.nvfp4(levels.repeat(8, 4))
    assert torch.equal(blockwise.from_nvfp4(packed, scale, whole), levels.repeat(8, 4))


@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (128, 4), (130, 9), (300, 96)])
def test_scales_in_tiles_and_back(rows: int, blocks: int) -> None:
    scales = torch.randint(0, 256, (rows, blocks), dtype=torch.uint8)
    tiles = blockwise.in_tiles(scales)
    assert tiles.numel() % 512 == 0
    assert torch.equal(blockwise.from_tiles(tiles, rows, blocks), scales)


@pytest.mark.parametrize("precision", BLOCKS)
def test_a_traced_layer_takes_any_number_of_rows(precision: str) -> None:
    module, rows = layer(precision, linear()), torch.export.Dim("rows", min=2, max=4096)
    traced = torch.export.export(module, (torch.randn(64, 256),), dynamic_shapes=({0: rows},)).module()
    x = torch.randn(200, 256)
    assert torch.equal(traced(x), module(x))


def uneven() -> torch.Tensor:
    """Rows from small to large, (200, 320)."""
    values = torch.randn(200, 320, generator=torch.Generator().manual_seed(4))
    return values * torch.logspace(-3, 3, 200).unsqueeze(1)


def test_what_matters_most_stays_exact() -> None:
    model = tiny.build(SCHNELL).transformer
    quantise(model, "int8", "cpu")
    rounded = {name for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}
    exact = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert "single_transformer_blocks.0.proj_out" in rounded
    assert "transformer_blocks.0.attn.to_q" in rounded
    assert {"proj_out", "x_embedder", "context_embedder", "transformer_blocks.0.norm1.linear"} <= exact


@pytest.mark.parametrize("spec", OWN, ids=by_id)
def test_every_model_draws_quantised(spec: ModelSpec, tmp_path: Path, unwarmed: None) -> None:
    settings, recipe = small(spec, tmp_path)
    exact = Worker.boot(settings.model_copy(update={"precision": "fp32"}))
    picture = exact.generate(recipe)[0].rgb.astype(int)
    for precision in QUANTISED:
        worker = Worker.boot(settings.model_copy(update={"precision": precision}))
        assert 0 < np.abs(worker.generate(recipe)[0].rgb - picture).mean() < FAR[precision], precision
        assert worker.weight_bytes < exact.weight_bytes


@pytest.mark.parametrize(
    "spec", [SPARK, MODELS["sdxl"], MODELS["flux2-klein"], MODELS["qwen-image"]], ids=lambda s: s.id
)
def test_what_was_baked_is_the_same(spec: ModelSpec, tmp_path: Path) -> None:
    settings, recipe = small(spec, tmp_path)
    settings = settings.model_copy(update={"precision": "fp8"})
    first = Worker.boot(settings)
    target = publish_weights(first, tmp_path)
    second = Worker.boot(settings)
    assert Path(second.ledger.weights) == target
    assert publish_weights(second, tmp_path) is None
    parts = {name: part for name, part in first._pipeline.components.items() if isinstance(part, nn.Module)}
    others = second._pipeline.components
    for name, part in parts.items():
        kept = others[name].state_dict()
        assert all(torch.equal(tensor, kept[key]) for key, tensor in part.state_dict().items())
        assert is_quantised(part) == is_quantised(others[name])
    assert is_quantised(parts[first._family.DENOISER])
    assert not is_quantised(parts["vae"])
    # sums run in another order where weights start elsewhere in memory, and roundings then fall otherwise
    pictures = [worker.generate(recipe)[0].rgb.astype(int) for worker in (first, second)]
    assert np.abs(pictures[0] - pictures[1]).mean() < FAR["fp8"] / 10


def small(spec: ModelSpec, volume: Path) -> tuple[Settings, Recipe]:
    """Settings for an eager worker with a tiny model, and a small picture."""
    if not spec.embedded:
        tiny.write(spec, volume)
    request = ImageRequest(prompt="a red circle", width=64, height=64, seed=3, num_inference_steps=2)
    return PATIENT.model_copy(update={"model": spec.id, "volume": volume, "compile": "off"}), spec.recipe(request)


def test_compiled_code_for_rounded_weights(compiler: None, tmp_path: Path) -> None:
    settings = PATIENT.model_copy(update={"volume": tmp_path, "precision": "int8-dynamic", "compile": "on"})
    compiled = Worker.boot(settings)
    assert compiled.ledger.plan == "COMPILED"
    compiled.publish(tmp_path)
    eager = Worker.boot(settings.model_copy(update={"compile": "off"}))
    for side in (64, 320):
        recipe = SPARK.recipe(ImageRequest(prompt="a red circle", width=side, height=side, seed=3))
        pictures = [worker.generate(recipe)[0].rgb.astype(int) for worker in (compiled, eager)]
        assert np.abs(pictures[0] - pictures[1]).mean() < 1


def test_a_gpu_that_cannot_is_told_why() -> None:
    with pytest.raises(SettingsError, match=r"FP8 arithmetic needs .* NVIDIA A100 has 8\.0"):
        choose("fp8", "cuda", "NVIDIA A100", (8, 0))
    assert choose("fp8", "cuda", "NVIDIA L4", (8, 9))[0] == "fp8"
    assert choose("int8-dynamic", "cuda", "NVIDIA A100", (8, 0))[0] == "int8-dynamic"


def test_a_quantised_model_needs_less_memory() -> None:
    from handler.fit import fit

    card = Hardware("cuda", "NVIDIA L40S", "bf16", "", 48)
    whole, rounded = (fit(MODELS["qwen-image"], dataclasses.replace(card, precision=p)) for p in ("bf16", "fp8"))
    assert (whole.fits, rounded.fits) == (False, True)
