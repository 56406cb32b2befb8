"""Quantised layers: how exact they are, beside torchao's too; in every model, loaded, baked and compiled."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PATIENT
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tiny
from handler import ImageRequest, Settings, Worker
from handler.catalog.models import MODELS, SCHNELL, SPARK
from handler.catalog.precisions import PRECISIONS, choose
from handler.catalog.spec import ModelSpec
from handler.cli.bake import publish_weights
from handler.core.errors import SettingsError
from handler.core.recipe import Recipe
from handler.model.hardware import Hardware
from handler.model.loading import blockwise
from handler.model.loading.quant import LEAST, SCHEMES, QuantisedLinear, is_quantised, quantise, weights_alone
from loras import matrices, peft, put

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


def by_id(spec: ModelSpec) -> str:
    return spec.id


@pytest.fixture
def unwarmed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warm-up picture is as large as the model's own; what is drawn here is not."""
    monkeypatch.setattr(Worker, "_warm", lambda *_: None)


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


@pytest.mark.parametrize("precision", [each for each in QUANTISED if each not in BLOCKS])
def test_a_layer_is_as_torchao_makes_it(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights to the bit; and pictures' activations, which are rounded here, lose no more than there."""
    import torchao.quantization as ao

    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda *given, **named: None)
    theirs = {
        "fp8": lambda: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow()),
        "fp8-tensor": lambda: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerTensor()),
        "int8": ao.Int8WeightOnlyConfig,
        "int8-dynamic": ao.Int8DynamicActivationInt8WeightConfig,
    }
    exact, other = linear(torch.bfloat16), nn.Sequential(linear(torch.bfloat16))
    options = torch._inductor.config.save_config()
    mine = layer(precision, exact)
    assert torch._inductor.config.save_config() == options  # torchao would have them as it likes
    ao.quantize_(other, theirs[precision]())
    torch._inductor.config.load_config(options)
    assert torch.equal(mine.rounded.view(torch.uint8), other[0].weight.qdata.view(torch.uint8))
    assert torch.equal(mine.scale, other[0].weight.scale.expand_as(mine.scale))
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours = mine(x)
    assert off(ours, other(x)) < 0.02
    assert off(ours, exact(x)) < 1.05 * off(other(x), exact(x))


@pytest.mark.parametrize("precision", QUANTISED)
def test_rows_of_zeros_stay_zeros(precision: str) -> None:
    exact = linear(torch.bfloat16)
    exact.weight[7:9] = 0
    found = layer(precision, exact)(torch.randn(20, 256).bfloat16())
    assert torch.isfinite(found).all()
    assert torch.equal(found[:, 7:9], exact.bias[7:9].expand(20, 2))
    exact.weight.zero_()
    assert torch.equal(layer(precision, exact)(torch.ones(20, 256).bfloat16()), exact.bias.expand(20, 512))


@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize("rows", [32, 304])
def test_a_layer_without_memory_has_the_same_parts(precision: str, rows: int) -> None:
    def kinds(module: nn.Module) -> dict[str, object]:
        return {name: (part.shape, part.dtype) for name, part in module.named_buffers()}

    real, nothing = nn.Linear(256, rows), nn.Linear(256, rows, device="meta")
    assert kinds(layer(precision, real)) == kinds(layer(precision, nothing))
    assert all(part.is_meta for part in layer(precision, nothing).parts)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        real.weight = nn.Parameter(mode.from_tensor(real.weight.data))
        assert kinds(layer(precision, real)) == kinds(layer(precision, nothing))


@pytest.mark.parametrize("precision", ["fp8", "int8"])
@pytest.mark.parametrize(("dtype", "more"), [(torch.float32, 1), (torch.bfloat16, 1.01)])
def test_a_product_scaled_is_as_near_as_weights_scaled(precision: str, dtype: torch.dtype, more: float) -> None:
    exact = linear(torch.bfloat16)
    parts, errors = SCHEMES[precision].parts(exact.weight), torch.zeros(2)
    weight = (parts[0].float() * parts[1]).to(dtype)
    for seed in range(8):
        x = torch.randn(300, 256, generator=torch.Generator().manual_seed(seed)).bfloat16().to(dtype)
        for i, found in enumerate((weights_alone(x, parts, None), nn.functional.linear(x, weight))):
            errors[i] += off(found.double(), x.double() @ exact.weight.double().T)
    assert errors[0] < more * errors[1] + 1e-6


@pytest.mark.parametrize("tokens", [256, 512])
def test_text_encoders_move_few_bytes(tokens: int) -> None:
    """Of T5-XXL's layers, at FLUX's prompts: 8 bits read, 16 written and read. It was 21 and more."""
    moved, parameters = Moved(), 0
    for rows, columns in ((4096, 4096), (10240, 4096), (4096, 10240)):
        with torch.device("meta"):
            module = layer("fp8", nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16))
            module.multiply, x = weights_alone, torch.empty(1, tokens, columns, dtype=torch.bfloat16)
        with torch.no_grad(), moved:
            assert module.weight.dtype == torch.bfloat16  # T5 asks its layers
            assert module(x).shape == (1, tokens, rows)
        parameters += rows * columns
    assert moved.bytes < 6 * parameters


class Moved(TorchDispatchMode):
    """Counts the bytes that operations read and write; a view moves none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operation: Any, _: Any, given: Any = (), named: Any = None) -> Any:
        made = operation(*given, **(named or {}))
        if not operation.is_view and "view" not in operation.__name__:
            tensors = [one for one in tree_leaves((given, named, made)) if isinstance(one, torch.Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return made


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
    exact = {"mxfp8": blockwise.from_mxfp8, "nvfp4": blockwise.from_nvfp4}[precision]
    found = exact(*scheme.parts(values))
    assert found.shape == values.shape
    assert (found[:64, :32] == 0).all()
    assert abs(found[3, 40] - 1e4) < 500
    assert torch.isfinite(found).all()
    assert torch.isfinite(exact(*scheme.parts(torch.zeros(8, 64)))).all()


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


# Which layers are rounded hangs on the model, how on the precision: here each model has two precisions in turn.
TWO = {spec.id: {*QUANTISED[row % 3 :: 3]} for row, spec in enumerate(OWN)}


@pytest.mark.parametrize("others", [False, pytest.param(True, marks=pytest.mark.judge)], ids=["two", "others"])
@pytest.mark.parametrize("spec", OWN, ids=by_id)
def test_every_model_draws_quantised(spec: ModelSpec, others: bool, tmp_path: Path, unwarmed: None) -> None:
    settings, recipe = small(spec, tmp_path)
    exact = Worker.boot(settings.model_copy(update={"precision": "fp32"}))
    picture = exact.generate(recipe)[0].rgb.astype(int)
    for precision in {*QUANTISED} - TWO[spec.id] if others else TWO[spec.id]:
        worker = Worker.boot(settings.model_copy(update={"precision": precision}))
        assert 0 < np.abs(worker.generate(recipe)[0].rgb - picture).mean() < FAR[precision], precision
        assert worker.weight_bytes < exact.weight_bytes


@pytest.mark.parametrize(
    "spec", [SPARK, MODELS["sdxl"], MODELS["flux2-klein"], MODELS["qwen-image"]], ids=lambda s: s.id
)
def test_what_was_baked_is_the_same(spec: ModelSpec, tmp_path: Path, unwarmed: None) -> None:
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


@pytest.mark.parametrize("precision", QUANTISED)
def test_a_layer_rounds_each_picture_by_itself(precision: str) -> None:
    """Whatever is beside it: far larger values, or none at all."""
    made, x = layer(precision, linear()), torch.randn(3, 40, 256, generator=torch.Generator().manual_seed(5))
    want = made(x)[0]
    for other in (x[1] * 1e4, torch.full_like(x[1], torch.nan), torch.full_like(x[1], torch.inf)):
        assert torch.equal(made(torch.stack((x[0], other, x[2])))[0], want)


@pytest.mark.parametrize(
    "spec", [SPARK, MODELS["sdxl"], MODELS["sd3.5-large"], MODELS["z-image-turbo"]], ids=lambda s: s.id
)
def test_a_picture_is_the_same_beside_any_other(spec: ModelSpec, tmp_path: Path, unwarmed: None) -> None:
    """In one precision with a scale for all tokens of a picture, so in all; and every layer knows its pictures."""
    settings, recipe = small(spec, tmp_path)
    worker = Worker.boot(settings.model_copy(update={"precision": "nvfp4"}))
    beside = [dataclasses.replace(recipe, prompt=words, seed=4) for words in ("a red circle", "a blue star and a ring")]
    drawn = [worker.draw([recipe, other], [lambda *_: None] * 2)[0] for other in beside]
    first, second = (each[0] for each in drawn if not isinstance(each, Exception))
    assert first.batch == second.batch == 2
    assert np.array_equal(first.rgb, second.rgb)


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
    layers = [name for name, part in eager._pipeline.transformer.named_modules() if isinstance(part, QuantisedLinear)]
    lora = put(tmp_path / "one.safetensors", peft(matrices(eager._pipeline.transformer, tuple(layers))), 1.0)
    plain = dataclasses.replace(recipe, loras=())
    for adapted in (dataclasses.replace(recipe, loras=(lora,)), plain):  # in the same memory, and away again
        found, wanted = (worker.generate(adapted)[0].rgb.astype(int) for worker in (compiled, eager))
        assert np.abs(found - wanted).mean() < 1
        assert (np.abs(found - pictures[0]).mean() > 2) == bool(adapted.loras)
    assert np.array_equal(found, pictures[0])


def test_a_gpu_that_cannot_is_told_why() -> None:
    with pytest.raises(SettingsError, match=r"FP8 arithmetic needs .* NVIDIA A100 has 8\.0"):
        choose("fp8", "cuda", "NVIDIA A100", (8, 0))
    assert choose("fp8", "cuda", "NVIDIA L4", (8, 9))[0] == "fp8"
    assert choose("int8-dynamic", "cuda", "NVIDIA A100", (8, 0))[0] == "int8-dynamic"


def test_a_quantised_model_needs_less_memory() -> None:
    from handler.worker.memory import fit

    card = Hardware("cuda", "NVIDIA L40S", "bf16", "", 48)
    whole, rounded = (fit(MODELS["qwen-image"], dataclasses.replace(card, precision=p)) for p in ("bf16", "fp8"))
    assert (whole.fits, rounded.fits) == (False, True)
