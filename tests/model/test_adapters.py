"""LoRAs of requests: what they add, that nothing of them stays, and that no failure leaves half of one."""

import gc
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from handler import ImageRequest, Worker
from handler.core.errors import InvalidValue
from handler.core.recipe import Lora, Recipe
from handler.model.adapters import applied, sums

LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.2", "single_transformer_blocks.0.proj_out")


def matrices(model: Any, layers: tuple[str, ...], rank: int = 2, seed: int = 0) -> dict[str, tuple[Any, Any]]:
    """For each layer of `model` down and up, that together are about a third as large as its weight."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for layer in layers:
        out, into = model.get_submodule(layer).weight.shape
        down, up = torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)
        found[layer] = down * into**-0.5, up * 0.3 * rank**-0.5
    return found


def peft(found: dict[str, tuple[Any, Any]], component: str = "transformer") -> dict[str, Any]:
    """As diffusers and ai-toolkit write them."""
    parts = {f"{component}.{layer}.lora_A.weight": down for layer, (down, _) in found.items()}
    return parts | {f"{component}.{layer}.lora_B.weight": up.contiguous() for layer, (_, up) in found.items()}


def put(path: Path, tensors: dict[str, Any], weight: float = 1.0, metadata: dict[str, str] | None = None) -> Lora:
    """Write a LoRA's file; the LoRA."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)
    return Lora(path.stem, weight, hashlib.sha256(path.read_bytes()).hexdigest(), path)


def recipe_of(worker: Worker, *loras: Lora, **fields: Any) -> Recipe:
    request = ImageRequest.parse({"prompt": "a red circle", "width": 64, "height": 64, "seed": 1} | fields)
    return worker.spec.recipe(request, loras=loras)


def drawn(worker: Worker, *loras: Lora, **fields: Any) -> Any:
    return worker.generate(recipe_of(worker, *loras, **fields))[0].rgb


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def one(spark: Worker, tmp_path: Path) -> Lora:
    return put(tmp_path / "one.safetensors", peft(matrices(spark._pipeline.transformer, LAYERS)))


@pytest.fixture(autouse=True)
def as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test leaves added to the model that all tests share is taken away again."""
    yield
    if "spark" in request.fixturenames:
        drawn(request.getfixturevalue("spark"))


def test_what_is_added_is_the_scaled_product_and_goes_to_the_bit(spark: Worker, one: Lora) -> None:
    model, parts = spark._pipeline.transformer, matrices(spark._pipeline.transformer, LAYERS)
    before, plain = weights(model), drawn(spark)
    pictures = [drawn(spark, replace(one, weight=weight)) for weight in (1.0, -0.5)]
    assert all((picture != plain).any() for picture in pictures)
    for name, weight in before.items():
        down, up = parts.get(name.removesuffix(".weight"), (None, None))
        wanted = weight if down is None else weight - 0.5 * (up @ down)
        assert torch.allclose(model.state_dict()[name], wanted, atol=1e-6)
        assert (down is not None) == (model.state_dict()[name] != weight).any()
    assert np.array_equal(drawn(spark), plain)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_several_add_up_from_what_the_weights_were(spark: Worker, one: Lora, tmp_path: Path) -> None:
    model = spark._pipeline.transformer
    other = put(tmp_path / "other.safetensors", peft(matrices(model, (*LAYERS[1:], "x_embedder"), seed=1)), 0.5)
    alone = drawn(spark, other)
    both = drawn(spark, one, other)
    assert not np.array_equal(alone, both)
    assert np.array_equal(drawn(spark, other), alone)
    assert np.array_equal(drawn(spark, one, other), both)
    drawn(spark)
    assert np.array_equal(drawn(spark, one, other), both)


def test_a_prompt_is_encoded_anew_for_other_weights(spark: Worker, tmp_path: Path) -> None:
    encoder = spark._pipeline.text_encoder
    layers = tuple(name for name, module in encoder.named_modules() if name.endswith(("q_proj", "fc1")))
    lora = put(tmp_path / "words.safetensors", peft(matrices(encoder, layers), "text_encoder"))
    plain = drawn(spark)
    assert not np.array_equal(drawn(spark, lora), plain)
    assert np.array_equal(drawn(spark), plain)


def test_two_hundred_swaps_leave_no_trace(spark: Worker, tmp_path: Path) -> None:
    model = spark._pipeline.transformer
    loras = [put(tmp_path / f"{i}.safetensors", peft(matrices(model, LAYERS, seed=i))) for i in range(4)]
    plain, before, owner = drawn(spark), weights(model), spark._runner._applied  # type: ignore[union-attr]
    for lora in loras:
        owner.apply((lora,))
    held = tensors_alive()
    for i in range(200):
        owner.apply((replace(loras[i % 4], weight=0.1 + i % 7),) if i % 5 else (loras[0], loras[i % 4]))
    owner.apply((loras[3],))
    assert tensors_alive() == held
    assert np.array_equal(drawn(spark), plain)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def tensors_alive() -> tuple[int, int]:
    """How many tensors there are, and how many bytes they lie in."""
    gc.collect()
    found = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    memory = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in found if not each.is_meta}
    return len(found), sum(memory.values())


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_failure_midway_is_repaired_by_the_next_picture(
    spark: Worker, one: Lora, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, with_it = drawn(spark), drawn(spark, one)
    drawn(spark)
    add, calls = sums.add, iter(range(9))

    def failing(*given: Any) -> None:
        if next(calls) == at:
            sums.tensors(given[0])[0].fill_(7.0)  # half of it is there
            raise RuntimeError("a device that failed")
        add(*given)

    for after, wanted in (((), plain), ((one,), with_it)):
        calls = iter(range(9))
        with monkeypatch.context() as patch:
            patch.setattr(sums, "add", failing)
            with pytest.raises(RuntimeError):
                drawn(spark, replace(one, weight=0.9))
        assert np.array_equal(drawn(spark, *after), wanted)


def test_what_is_read_is_kept_within_bounds(spark: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, owner = spark._pipeline.transformer, spark._runner._applied  # type: ignore[union-attr]
    loras = [put(tmp_path / f"{i}.safetensors", peft(matrices(model, LAYERS, seed=i + 9))) for i in range(4)]
    owner.apply(loras[:1])
    size = sum(delta.nbytes for delta in owner._read[loras[0].sha256].values())
    monkeypatch.setattr(applied, "CACHED", 2 * size)
    for some in ([1], [2], [0], [0, 3], [1, 2, 3]):
        owner.apply([loras[i] for i in some])
        assert len(owner._read) == max(2, len(some))
        assert {loras[i].sha256 for i in some} <= owner._read.keys()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda parts: {"transformer.nowhere.lora_A.weight": torch.ones(1, 2), **parts}, "nowhere"),
        (lambda parts: {name: torch.ones(2, 7) for name in parts}, "has another shape"),
        (lambda parts: dict([*parts.items()][1:]), "has half of a LoRA"),
        (lambda parts: {**parts, f"transformer.{LAYERS[0]}.dora_scale": torch.ones(2)}, "dora_scale is no part"),
        (lambda parts: {**parts, "lora_te3_x.lora_down.weight": torch.ones(2, 2)}, "lora_te3_x"),
    ],
)
def test_what_does_not_go_with_the_model_is_told_and_changes_nothing(
    spark: Worker, tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], told: str
) -> None:
    model, plain = spark._pipeline.transformer, drawn(spark)
    lora = put(tmp_path / "bad.safetensors", change(peft(matrices(model, LAYERS))))
    before = weights(model)
    with pytest.raises(InvalidValue, match=f"loras: 'bad' does not go with this model: .*{told}") as caught:
        drawn(spark, lora)
    assert caught.value.param == "loras"
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert np.array_equal(drawn(spark), plain)


def test_a_file_that_is_another_by_now_is_not_used(spark: Worker, one: Lora) -> None:
    one.path.write_bytes(one.path.read_bytes()[:-4])
    with pytest.raises(InvalidValue, match="was changed while it waited"):
        drawn(spark, one)
    torn = replace(one, sha256=hashlib.sha256(one.path.read_bytes()).hexdigest())
    with pytest.raises(InvalidValue, match="'one' cannot be used: its tensors end at byte"):
        drawn(spark, torn)
    one.path.unlink()
    with pytest.raises(InvalidValue, match="'one' cannot be read: No such file or directory"):
        drawn(spark, one)
