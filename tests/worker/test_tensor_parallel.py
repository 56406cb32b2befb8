"""Several processes share one text encoder: together they read what a process reads alone, and each holds a part."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import PATIENT, unwarmed

import tiny
from handler import GPUS, MODELS, ImageRequest, Settings, Worker, choose_gpus, outlook
from handler.catalog.models import FLUX2_DEV
from handler.core.errors import SettingsError
from handler.model.adapters import sums
from handler.model.adapters.keys import Delta
from handler.model.hardware import Hardware
from handler.model.loading.lora import Misfit
from handler.model.runner import sound
from handler.model.tensor_parallel import AXES, COLUMNS, ROWS, Shard
from handler.volume import receipts
from handler.volume.receipts import Candidate, Figures, Outcome, Receipt
from handler.volume.sources import model_source
from handler.worker.footprint import weigh
from handler.worker.sharing import require_exact, require_shared, require_splittable

ALIKE = 2  # of 255, as in test_ranks.py
NEAR = 1e-4  # of the largest value: sums of floats in another order, through thirty layers
STYLES = {"colwise": ROWS, "rowwise": COLUMNS}  # transformers' words, which are of the transposed weight
GPU = Hardware("cuda", "a GPU", "bf16", "", 80, (9, 0))
DEGREES = [(2, 2), pytest.param((4, 2), marks=pytest.mark.judge)]
OTHERS = [pytest.param(model, marks=pytest.mark.judge) for model in ("flux2-klein", "flux2-dev")]


@pytest.fixture(autouse=True)
def heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as two processes can share."""
    monkeypatch.setattr(tiny, "HEADS", 4)
    monkeypatch.setattr(tiny, "LLM", 32)


@contextmanager
def booted(model: str, volume: Path, **fields: Any) -> Iterator[Worker]:
    asked = {"model": model, "volume": volume, "precision": "fp32", "compile": "off", **fields}
    with unwarmed(), Worker.boot(PATIENT.model_copy(update=asked)) as worker:
        yield worker


def read(worker: Worker) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
    """What comes out of the text encoder, and the picture."""
    found: list[torch.Tensor] = []
    [encoder] = worker.encoders
    hook = encoder.register_forward_hook(lambda _, __, output: found.append(output.hidden_states[-1]))
    asked = ImageRequest(prompt="a large red star", seed=3, width=128, height=96, num_inference_steps=2)
    pixels, _ = sound(worker.generate(worker.spec.recipe(asked)))
    hook.remove()
    return found[-1], pixels.rgb.astype(int)


@pytest.mark.parametrize("model", ["qwen-image", *OTHERS])
@pytest.mark.parametrize("degrees", DEGREES)
def test_processes_that_share_a_text_encoder_read_what_one_reads(
    model: str, degrees: tuple[int, int], tmp_path: Path
) -> None:
    tiny.write(MODELS[model], tmp_path)
    with booted(model, tmp_path) as worker:
        alone, picture = read(worker)
        whole = [weight.numel() for weight in worker.encoders[0].parameters()]
    ranks, tp_size = degrees
    with booted(model, tmp_path, ulysses_degree=ranks, tp_size=tp_size) as worker:
        shared, other = read(worker)
        assert worker.facts["ranks"] == f"ulysses {ranks}, ring 1, text encoders by {tp_size}"
        parts = {name: weight.numel() for name, weight in worker.encoders[0].named_parameters()}
    assert (shared - alone).abs().max() <= NEAR * alone.abs().max()
    assert np.abs(other - picture).max() <= ALIKE
    of = [tp_size if Shard(0, tp_size).shares(name) else 1 for name in parts]
    assert [count * each for count, each in zip(parts.values(), of, strict=True)] == whole
    assert 2 in of


@pytest.mark.parametrize(
    "config", [transformers.MistralConfig, transformers.Qwen2_5_VLTextConfig, transformers.Qwen3Config]
)
def test_layers_are_cut_as_transformers_plans_it(config: Any) -> None:
    plan = {name.removeprefix("layers.*."): style for name, style in config.base_model_tp_plan.items()}
    assert {name: STYLES[style] for name, style in plan.items() if not style.startswith("replicated")} == AXES


def test_a_shard_has_its_rows_or_columns_and_all_of_the_rest() -> None:
    weight, second = torch.arange(32.0).view(4, 8), Shard(1, 2)
    for name, wanted in {
        "model.layers.0.self_attn.q_proj.weight": weight[2:],
        "layers.31.mlp.down_proj.weight": weight[:, 4:],
        "model.visual.blocks.0.mlp.down_proj.weight": weight,
        "model.vision_tower.transformer.layers.0.feed_forward.down_proj.weight": weight,
        "model.embed_tokens.weight": weight,
        "layers.0.self_attn.q_norm.weight": weight,
    }.items():
        assert torch.equal(second.of(name, weight), wanted)
        assert second.shares(name) == (wanted is not weight)
    assert torch.equal(second.of("layers.0.self_attn.q_proj.bias", weight[:, 0]), weight[2:, 0])
    assert torch.equal(second.of("layers.0.self_attn.o_proj.bias", weight[:, 0]), weight[:, 0])


MISTRAL = transformers.MistralConfig(
    vocab_size=8, hidden_size=5120, intermediate_size=32768, num_hidden_layers=40, head_dim=128
)
QWEN3 = transformers.Qwen3Config(
    vocab_size=8, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_key_value_heads=8, head_dim=128
)
QWEN2 = transformers.Qwen2Config(  # the language model of Qwen2.5-VL
    vocab_size=8, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4,
)  # fmt: skip


@pytest.mark.parametrize(("model", "config"), [("flux2-dev", MISTRAL), ("flux2-klein", QWEN3), ("qwen-image", QWEN2)])
def test_the_catalogue_knows_how_much_can_be_shared(model: str, config: Any) -> None:
    with torch.device("meta"):
        encoder = transformers.AutoModel.from_config(config)
    shared = sum(weight.numel() for name, weight in encoder.named_parameters() if Shard(0, 2).shares(name))
    assert MODELS[model].streams.shared == pytest.approx(shared, rel=1e-3)


def test_each_gpu_is_planned_with_its_part_of_the_text_encoder(tmp_path: Path) -> None:
    shared = Settings(model="flux2-dev", ulysses_degree=4, tp_size=4)
    card = GPUS["H200"]
    whole, part = (outlook(each, FLUX2_DEV, card, 1e4) for each in (shared.model_copy(update={"tp_size": 1}), shared))
    part = replace(part, hardware=whole.hardware)
    saved = 2 * 0.75 * FLUX2_DEV.streams.shared / 1e9
    exact = replace(whole.hardware, precision="bf16")
    needs = [replace(each, hardware=exact).memory.needs_gb for each in (whole, part)]
    assert needs[0] - needs[1] == pytest.approx(saved, rel=1e-3)
    told = replace(part, hardware=exact).memory.reason
    count, width, work, total = map(float, re.findall(r"[0-9.]+(?=B | bytes| GB to| GB,)", told))
    assert count * width + work == pytest.approx(total, abs=0.3)  # the sum that is told is right
    spec = MODELS["qwen-image"]
    tiny.write(spec, tmp_path)
    source = model_source(spec, tmp_path)
    held = [
        {one.name: one.held for one in weigh(spec, GPU, source, shard=Shard(parts=parts)).parts} for parts in (1, 2)
    ]
    with booted(spec.id, tmp_path) as worker:
        names = {name: weight.numel() for name, weight in worker.encoders[0].named_parameters()}
    cut = sum(count for name, count in names.items() if Shard(0, 2).shares(name))
    assert held[0]["text_encoder"] - held[1]["text_encoder"] == cut  # two bytes each, of which one half is elsewhere
    assert {**held[0], "text_encoder": 0} == {**held[1], "text_encoder": 0}


def test_precision_is_not_rounded_by_itself_where_a_text_encoder_is_shared() -> None:
    asked = Settings(model="flux2-dev", ulysses_degree=2)
    found = [outlook(asked.model_copy(update={"tp_size": size}), FLUX2_DEV, GPUS["H200"], 1e4) for size in (1, 2)]
    assert [seen.hardware.precision for seen in found] == ["fp8", "bf16"]
    require_exact(found[1].hardware, found[1].asked)
    with pytest.raises(SettingsError, match=r"rounded to fp8 cannot be split.*; use KINDLING_PRECISION=bf16") as caught:
        require_exact(found[0].hardware, found[1].asked)
    assert caught.value.param == "KINDLING_TP_SIZE"


def test_a_receipt_that_rounds_is_not_followed_where_a_text_encoder_is_shared(tmp_path: Path) -> None:
    """It was measured on one GPU, and would end every start."""
    winner, measured = Candidate("fp8", True), Figures(8, 3.0, 3.0, 1.0, 1.0, 5.0)
    row = (FLUX2_DEV.id, FLUX2_DEV.revision, GPU.identity, winner, (Outcome(winner, "measured", measured),))
    receipts.keep(Receipt(*row, "", "latency", {}, "it", "", {}, "", ""), tmp_path)
    asked = Settings(model=FLUX2_DEV.id, volume=tmp_path, ulysses_degree=2, tp_size=2)
    seen = outlook(asked, FLUX2_DEV, GPU)
    assert (seen.hardware.precision, seen.settings.compile) == ("bf16", "auto")
    assert "receipt 1 ignored: several GPUs share text encoders" in seen.hardware.reason
    require_exact(seen.hardware, seen.asked)
    assert outlook(asked.model_copy(update={"tp_size": 1}), FLUX2_DEV, GPU).hardware.precision == "fp8"


@pytest.mark.parametrize(
    ("model", "ranks", "tp_size", "why"),
    [
        ("spark", 2, 2, "transformers cannot split the text encoders of spark"),
        ("flux-dev", 1, 2, "transformers cannot split the text encoders of flux-dev"),
        ("qwen-image", 1, 2, "as many or a multiple have to draw each picture; set KINDLING_ULYSSES_DEGREE"),
        ("qwen-image", 2, 4, "4 GPUs are to share a text encoder"),
        ("z-image-turbo", 1, 2, "diffusers cannot split z-image-turbo"),
    ],
)
def test_a_text_encoder_that_cannot_be_shared_says_why(model: str, ranks: int, tp_size: int, why: str) -> None:
    settings = Settings(model=model, ulysses_degree=ranks, tp_size=tp_size)
    with pytest.raises(SettingsError, match=why) as caught:
        require_splittable(MODELS[model], settings)
    assert caught.value.param == "KINDLING_TP_SIZE"
    if ranks == 1:
        with pytest.raises(SettingsError, match=why):
            choose_gpus(settings, MODELS[model], "modal")


@pytest.mark.parametrize("nested", [True, False])
def test_heads_of_keys_that_cannot_be_shared_are_told_by_their_number(nested: bool, tmp_path: Path) -> None:
    tiny.write(MODELS["qwen-image"], tmp_path)
    source = model_source(MODELS["qwen-image"], tmp_path)
    heads = {"num_key_value_heads": 4}
    config = source.folder / "text_encoder/config.json"
    config.write_text(json.dumps({"text_config": heads} if nested else heads))
    settings = Settings(ulysses_degree=2, tp_size=8)
    with pytest.raises(SettingsError, match="the text encoder has 4 heads of keys, which 8 GPUs cannot share evenly"):
        require_shared(source, settings)
    require_shared(source, settings.model_copy(update={"tp_size": 4}))


def test_a_lora_for_what_is_shared_is_refused_as_that() -> None:
    layer = torch.nn.Linear(8, 4)
    delta = Delta(torch.zeros(2, 8), torch.zeros(4, 2), 1.0)
    sums.require(layer, "q_proj", delta)
    layer.weight.data = layer.weight.data[:2]
    with pytest.raises(Misfit, match=r"^q_proj is shared by several GPUs \(KINDLING_TP_SIZE\)$"):
        sums.require(layer, "q_proj", delta)
