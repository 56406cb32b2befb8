"""LoRAs of requests: what they add, that nothing of them stays, and that no failure leaves half of one."""

import gc
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PATIENT, unwarmed
from safetensors.torch import load_file

import tiny
from handler import MODELS, ImageRequest, Worker
from handler.core.errors import InvalidValue
from handler.core.recipe import Lora, Recipe
from handler.model.adapters import applied, keys, sums
from handler.model.loading.quant import SCHEMES, QuantisedLinear
from loras import LAYERS, matrices, peft, put

ROWS = ("fp8", "fp8-tensor", "int8", "int8-dynamic")  # precisions with a scale for each row


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


def test_a_file_that_diffusers_saved_has_the_alpha_it_was_trained_with(spark: Worker, tmp_path: Path) -> None:
    parts = peft(matrices(spark._pipeline.transformer, LAYERS))
    noted = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 1})}
    half = put(tmp_path / "half.safetensors", parts, metadata=noted)
    plain = put(tmp_path / "plain.safetensors", parts, weight=0.5)
    assert np.array_equal(drawn(spark, half), drawn(spark, plain))


def test_text_encoders_may_have_a_weight_of_their_own(spark: Worker, tmp_path: Path) -> None:
    models, layer = spark._pipeline.components, "encoder.layers.0.mlp.fc1"
    prefix = next(n.removesuffix(layer) for n, _ in models["text_encoder"].named_modules() if n.endswith(layer))
    places = {"transformer": LAYERS[0], "text_encoder": prefix + layer}
    tensors = {name: matrices(models[name], (path,)) for name, path in places.items()}
    lora = put(tmp_path / "both.safetensors", {n: t for part, m in tensors.items() for n, t in peft(m, part).items()})
    before = {name: models[name].get_submodule(path).weight.clone() for name, path in places.items()}
    for weight, clip in ((0.5, None), (0.5, 0.25), (0.0, -1.0), (1.0, 0.0)):
        drawn(spark, replace(lora, weight=weight, clip_weight=clip))
        for name, times in (("transformer", weight), ("text_encoder", weight if clip is None else clip)):
            down, up = tensors[name][places[name]]
            now = models[name].get_submodule(places[name]).weight
            assert torch.allclose(now, before[name] + times * (up @ down), atol=1e-6), (name, weight, clip)


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


def test_layers_that_share_a_weight_are_changed_once(spark: Worker, tmp_path: Path) -> None:
    encoder = spark._pipeline.text_encoder_2
    names = ("shared", "encoder.embed_tokens")
    assert encoder.get_submodule(names[0]).weight is encoder.get_submodule(names[1]).weight
    plain, before = drawn(spark), weights(encoder)
    each = [
        put(tmp_path / f"{i}.safetensors", peft(matrices(encoder, (n,)), "text_encoder_2")) for i, n in enumerate(names)
    ]
    first, second = (drawn(spark, lora) for lora in each)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, plain)
    with pytest.raises(InvalidValue, match="is there under another name too"):
        drawn(spark, put(tmp_path / "both.safetensors", peft(matrices(encoder, names), "text_encoder_2")))
    assert np.array_equal(drawn(spark), plain)
    assert all(torch.equal(weight, before[name]) for name, weight in encoder.state_dict().items())


def test_what_is_saved_has_nothing_of_them(spark: Worker, one: Lora, tmp_path: Path) -> None:
    before = weights(spark._pipeline.transformer)
    drawn(spark, one)
    spark.save(tmp_path / "saved")
    [path] = (tmp_path / "saved/transformer").glob("*.safetensors")
    saved = load_file(path)
    assert all(torch.equal(saved[f"{layer}.weight"], before[f"{layer}.weight"]) for layer in LAYERS)


def test_previews_of_others_are_as_before(spark: Worker, tmp_path: Path) -> None:
    projection = spark._runner._projection  # type: ignore[union-attr]
    latents = torch.randn(1, 4, spark._pipeline.transformer.config.in_channels)
    before = projection.draw(latents, (64, 64))
    [(layer, (down, up))] = matrices(spark._pipeline.transformer, ("proj_out",)).items()
    drawn(spark, put(tmp_path / "large.safetensors", peft({layer: (down * 1e3, up * 1e3)})))
    assert torch.equal(projection.draw(latents, (64, 64)), before)


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
    assert all(now <= then for now, then in zip(tensors_alive(), held, strict=True))
    assert np.array_equal(drawn(spark), plain)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def tensors_alive() -> tuple[int, int]:
    """How many tensors there are, and how many bytes they lie in."""
    gc.collect()
    found = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
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
        (lambda parts: {name: torch.tensor(1.0) for name in parts}, "has another shape"),
        (lambda parts: {name: part[:0] for name, part in parts.items()}, "has another shape"),
        (lambda parts: {n: p if "lora_A" in n else p[:0] for n, p in parts.items()}, "has another shape"),
        (lambda parts: dict([*parts.items()][1:]), "has half of a LoRA"),
        (
            lambda parts: parts | {n.removeprefix("transformer."): part.clone() for n, part in parts.items()},
            "under another name",
        ),
        (lambda parts: {name: part * torch.nan for name, part in parts.items()}, "infinite or none"),
        (lambda parts: parts | {f"transformer.{LAYERS[0]}.alpha": torch.tensor(torch.inf)}, "infinite or none"),
        (lambda parts: parts | {f"transformer.{LAYERS[0]}.alpha": torch.ones(3)}, "has more than one alpha"),
        (lambda parts: {**parts, f"transformer.{LAYERS[0]}.dora_scale": torch.ones(2)}, "dora_scale is no part"),
        (lambda parts: {**parts, "lora_te3_x.lora_down.weight": torch.ones(2, 2)}, "lora_te3_x"),
        (lambda parts: {name: torch.ones(0, 2) for name in parts}, "has another shape"),
        (lambda parts: {n: torch.ones(0 if ".lora_B" in n else 1, 1) for n in parts}, "has another shape"),
        (lambda parts: {n.replace(LAYERS[0], "norm_out.norm"): t for n, t in parts.items()}, "fits no weight"),
        (lambda parts: {**parts, f"{LAYERS[0]}.lora.up.weight": torch.ones(2, 2)}, "under another name"),
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


@pytest.mark.parametrize("factor", [1e30, 1e38])
def test_sums_that_are_no_numbers_are_refused_by_name_and_leave_nothing(
    factor: float, spark: Worker, tmp_path: Path
) -> None:
    """Of finite matrices, whose product is none; the next picture is as ever."""
    tame = put(tmp_path / "tame.safetensors", peft(matrices(spark._pipeline.transformer, LAYERS, seed=7)))
    plain, layer = drawn(spark), LAYERS[0]
    down, up = matrices(spark._pipeline.transformer, LAYERS)[layer]
    wild = put(tmp_path / "wild.safetensors", peft({layer: (down * factor, up * factor)}))
    with pytest.raises(InvalidValue, match=rf"loras: 'wild' would make transformer\.{layer} infinite, or no numbers"):
        drawn(spark, wild)
    with pytest.raises(InvalidValue, match="loras: 'tame' and 'wild' would make"):
        drawn(spark, tame, wild)
    assert np.array_equal(drawn(spark), plain)


@pytest.mark.parametrize("precision", ROWS)
def test_sums_that_are_no_numbers_are_seen_in_rounded_weights(precision: str) -> None:
    layer, wild = quantised(precision), delta_of(0.3)
    first = tuple(part.clone() for part in layer.parts)
    assert sums.add(layer, first, [(wild, 10.0)], torch.device("cpu"))
    assert not sums.add(layer, first, [(replace(wild, scale=1e39), 10.0)], torch.device("cpu"))


def test_what_weights_were_is_kept_as_far_as_there_is_room(spark: Worker, tmp_path: Path) -> None:
    """Of what was given back it is forgotten first; what would be too much alone is refused with both sizes."""
    model = spark._pipeline.transformer
    ones = [put(tmp_path / f"{i}.safetensors", peft(matrices(model, (layer,)))) for i, layer in enumerate(LAYERS)]
    sizes = [model.get_submodule(layer).weight.nbytes for layer in LAYERS]
    assert spark._runner
    assert spark._runner._applied._room == spark.memory.spare_gb * 1e9
    before, owner = weights(model), applied.Applied(spark._pipeline, room=max(sizes))
    for one in ones:
        owner.apply([one])
        assert sum(tensor.nbytes for first in owner._first.values() for tensor in first) <= max(sizes)
    with pytest.raises(InvalidValue, match=r"loras: '0' and '1' and '2' would change .* GB of weights, and for"):
        owner.apply(ones)
    owner.apply(())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_file_that_is_another_by_now_is_not_used(spark: Worker, tmp_path: Path) -> None:
    one = put(
        tmp_path / "one.safetensors", peft(matrices(spark._pipeline.transformer, LAYERS, seed=8))
    )  # never read yet
    one.path.write_bytes(one.path.read_bytes()[:-4])
    with pytest.raises(InvalidValue, match="was changed while it waited"):
        drawn(spark, one)
    torn = replace(one, sha256=hashlib.sha256(one.path.read_bytes()).hexdigest())
    with pytest.raises(InvalidValue, match="'one' cannot be used: its tensors end at byte"):
        drawn(spark, torn)
    one.path.unlink()
    with pytest.raises(InvalidValue, match="'one' cannot be read: No such file or directory"):
        drawn(spark, one)


def quantised(precision: str) -> QuantisedLinear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = torch.nn.Linear(256, 512).requires_grad_(False)
    return QuantisedLinear(linear, SCHEMES[precision], SCHEMES[precision].multiply)


def exact(layer: QuantisedLinear) -> torch.Tensor:
    rounded, scale = layer.parts
    return rounded.float() * scale


def delta_of(share: float) -> keys.Delta:
    """One that is `share` as large as a weight of `quantised`."""
    down, up = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((4, 256), (512, 4)))
    return keys.Delta(down, up, share * 256**-0.5 * 3**-0.5 / 2)


@pytest.mark.parametrize("precision", ROWS)
@pytest.mark.parametrize("share", [0.002, 0.02, 0.3, 3.0])
def test_what_is_added_to_rounded_weights_is_there_on_average(precision: str, share: float) -> None:
    """Also where it is far less than a step of theirs: rounded to the nearest, it would be lost."""
    layer, delta = quantised(precision), delta_of(share)
    first, before = tuple(part.clone() for part in layer.parts), exact(quantised(precision))
    sums.add(layer, first, [(delta, 1.0)], torch.device("cpu"))
    wanted = delta.up @ delta.down * delta.scale
    added = exact(layer) - before
    assert (added * wanted).sum() / wanted.square().sum() == pytest.approx(1, abs=0.05)
    step = 0.07 if "fp8" in precision else 0.01  # of a weight, on average
    assert (added - wanted).norm() < step * (before + wanted).norm() * max(1.0, share)
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(2))
    assert (x @ exact(layer).t() - x @ (before + wanted).t()).norm() < 0.07 * (x @ (before + wanted).t()).norm()


@pytest.mark.parametrize("piece", [1, 1000])
def test_some_rows_after_others_is_all(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    delta, device, plain = delta_of(0.3), torch.device("cpu"), torch.nn.Conv2d(64, 512, 2).requires_grad_(False)
    before, whole = plain.weight.clone(), quantised("fp8")
    sums.add(whole, tuple(part.clone() for part in whole.parts), [(delta, 1.0)], device)
    monkeypatch.setattr(sums, "PIECE", piece)
    layer = quantised("fp8")
    sums.add(layer, tuple(part.clone() for part in layer.parts), [(delta, 1.0)], device)
    assert torch.allclose(layer.parts[1], whole.parts[1], rtol=1e-5)  # sums differ in their last bit
    assert ((exact(layer) - exact(whole)).abs() > 1e-4).float().mean() < 0.001
    sums.add(plain, (before,), [(delta, 0.5), (delta, 1.5)], device)
    wanted = before + (2 * delta.up @ delta.down * delta.scale).view(before.shape)
    assert torch.allclose(plain.weight, wanted, atol=1e-6)


@pytest.mark.parametrize("precision", ROWS)
def test_rounded_weights_are_what_they_were_to_the_bit(precision: str) -> None:
    layer, device = quantised(precision), torch.device("cpu")
    first = tuple(part.clone() for part in layer.parts)
    places = [part.data_ptr() for part in layer.parts]
    sums.add(layer, first, [(delta_of(0.3), 0.0)], device)
    assert all(torch.equal(bits(part), bits(was)) for part, was in zip(layer.parts, first, strict=True))
    sums.add(layer, first, [(delta_of(0.3), 1.0)], device)
    twice = tuple(part.clone() for part in layer.parts)
    sums.add(layer, first, [(delta_of(3.0), 1.0)], device)
    sums.add(layer, first, [(delta_of(0.3), 1.0)], device)
    assert all(torch.equal(bits(part), bits(was)) for part, was in zip(layer.parts, twice, strict=True))
    sums.put(layer.parts, first)
    assert all(torch.equal(bits(part), bits(was)) for part, was in zip(layer.parts, first, strict=True))
    assert [part.data_ptr() for part in layer.parts] == places


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


def test_every_8_bit_float_stays_and_what_lies_between_goes_to_either() -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    every = codes.view(torch.float8_e4m3fn).float()
    for chance in (0.0, 0.5, 1 - 2**-24):
        assert torch.equal(sums._float8(every, torch.full_like(every, chance)).view(torch.uint8), codes)
    for low, share in ((1.0, 0.25), (-2.0, 0.25), (2.0**-9, 0.5), (416.0, 0.75), (0.0, 0.5)):
        power = max(math.floor(math.log2(abs(low))), -6) if low else -6
        high = low + math.copysign(2.0 ** (power - 3), low)
        chance = torch.linspace(0, 0.999, 1000)
        found = sums._float8(torch.full((1000,), low + share * (high - low)), chance).float()
        assert set(found.tolist()) == {low, high}
        assert (found == high).float().mean().item() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("precision", ["fp8", "int8-dynamic", "mxfp8"])
def test_a_quantised_model_draws_with_a_lora_and_as_before(precision: str, tmp_path: Path) -> None:
    spec = MODELS["flux-dev"]
    tiny.write(spec, tmp_path)
    settings = PATIENT.model_copy(update={"model": spec.id, "volume": tmp_path, "precision": precision})
    with unwarmed():
        worker = Worker.boot(settings)
    source = tiny.build(spec)
    layers = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.norm1.linear", "x_embedder")
    tensors = peft(matrices(source.transformer, layers))
    tensors |= peft(matrices(source.text_encoder, ("encoder.layers.0.mlp.fc1",)), "text_encoder")
    lora = put(tmp_path / "loras/one.safetensors", tensors)
    plain = drawn(worker, num_inference_steps=2)
    if precision == "mxfp8":
        with pytest.raises(InvalidValue, match=r"to_q has a scale for each block; a worker"):
            drawn(worker, lora, num_inference_steps=2)
    else:
        assert not np.array_equal(drawn(worker, lora, num_inference_steps=2), plain)
    assert np.array_equal(drawn(worker, num_inference_steps=2), plain)
    worker.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_weights_that_wait_in_host_memory_are_changed_there(precision: str, tmp_path: Path) -> None:
    spec = MODELS["flux-dev"]
    tiny.write(spec, tmp_path)
    source = tiny.build(spec)
    layers = tuple(name for name, module in source.transformer.named_modules() if isinstance(module, torch.nn.Linear))
    encoder = tuple(name for name, module in source.text_encoder.named_modules() if name.endswith("fc1"))
    tensors = peft(matrices(source.transformer, layers)) | peft(matrices(source.text_encoder, encoder), "text_encoder")
    lora = put(tmp_path / "loras/one.safetensors", tensors, 0.3)
    pictures = {}
    for mode in ("off", "blocks"):
        update = {"model": spec.id, "volume": tmp_path, "precision": precision, "offload": mode}
        with unwarmed():
            worker = Worker.boot(PATIENT.model_copy(update=update))
        plain = drawn(worker, num_inference_steps=2)
        pictures[mode] = drawn(worker, lora, num_inference_steps=2)
        assert not np.array_equal(pictures[mode], plain)
        assert np.array_equal(drawn(worker, lora, num_inference_steps=2), pictures[mode])
        assert np.array_equal(drawn(worker, num_inference_steps=2), plain)
        worker.close()
    most = 1 if precision == "fp32" else 40  # sums depend on where weights lie, and random weights amplify
    assert np.abs(pictures["off"].astype(int) - pictures["blocks"].astype(int)).mean() <= most
