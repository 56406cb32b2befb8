"""Compile artifacts: spark's blocks compiled once, bound by a second pipeline, refused when damaged or foreign."""

import ast
import dataclasses
import gc
import importlib
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

import tiny
from handler import MODELS
from handler.core import processor
from handler.core.errors import Cancelled
from handler.model.adapters.applied import Applied
from handler.model.compiling import artifacts
from handler.model.compiling import package as blocks
from handler.model.compiling.modulation import Run, ahead
from handler.model.compiling.package import bind_blocks, compile_blocks, kind_of, kinds_in, kinds_of
from handler.model.hardware import Hardware
from handler.model.loading.weights import free
from handler.volume.manifest import read_manifest, write_manifest
from handler.volume.publishing import publishing
from handler.volume.sealing import SEAL
from handler.volume.sources import EMBEDDED
from loras import matrices, peft, put

ROOT = Path(__file__).parents[2]
SPARK = MODELS["spark"]
CPU = Hardware("cpu", "CPU", "fp32", "a test")
NATIVE, UNSEEN = (256, 256), (384, 320)


def load() -> Any:
    """spark, ready to draw, in its own memory."""
    pipeline = FluxPipeline.from_pretrained(EMBEDDED / "spark", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.requires_grad_(False)
    return pipeline


@torch.inference_mode()
def draw(pipeline: Any, size: tuple[int, int] = NATIVE, steps: int = 4, n: int = 1, **more: Any) -> torch.Tensor:
    """Pixels from 0 to 255 (n, 3, height, width)."""
    pixels: torch.Tensor = pipeline(
        "two green stars on a black background", width=size[0], height=size[1], num_inference_steps=steps,
        guidance_scale=0.0, max_sequence_length=SPARK.text_tokens, num_images_per_prompt=n, output_type="pt",
        generator=torch.Generator().manual_seed(3), **more,
    ).images  # fmt: skip
    return pixels * 255


@pytest.fixture(scope="session")
def eager() -> Any:
    return load()


@pytest.fixture(scope="session")
def package(compiler: None, eager: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """spark's blocks compiled, from steps at two sizes; neither is UNSEEN."""
    path = tmp_path_factory.mktemp("compiled") / "any name.pt2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(path.parent / "known"))
        patch.setattr("torch._inductor.codecache._HEADER_DIR", str(path.parent / "known" / "headers"))
        patch.setenv("FORGETFUL", "1")  # once in a run the compiler itself compiles
        assert compile_blocks(eager.transformer, lambda: [draw(eager, size, 1) for size in (NATIVE, (128, 64))], path)
    return path


def test_nothing_is_run_or_left_where_others_know_the_folder(package: Path) -> None:
    """Inductor runs what it finds in its cache, and builds with the headers there."""
    assert [path.name for path in package.parent.iterdir()] == [package.name]


@pytest.fixture(scope="session")
def bound(package: Path) -> Any:
    pipeline = load()
    bind_blocks(pipeline.transformer, package)
    return pipeline


@pytest.fixture
def volume(package: Path, tmp_path: Path) -> Path:
    """A volume where spark's package was published."""
    artifacts.publish(package, SPARK, CPU, tmp_path)
    return tmp_path


def baked(volume: Path) -> Path:
    """The one package on `volume`."""
    (path,) = volume.rglob(artifacts.PACKAGE)
    return path


def forwards(transformer: Any) -> list[bool]:
    """Which of the repeated blocks have a bound forward."""
    return ["forward" in vars(b) for b in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]]


@pytest.mark.parametrize("size", [NATIVE, UNSEEN, (64, 64)])
def test_bound_blocks_draw_the_same_picture_at_every_size(eager: Any, bound: Any, size: tuple[int, int]) -> None:
    assert all(forwards(bound.transformer))
    assert not any(forwards(eager.transformer))
    assert (draw(eager, size) - draw(bound, size)).abs().max() < 0.01


def test_tokens_that_ranks_share_unevenly_are_left_to_the_blocks_themselves(eager: Any, package: Path) -> None:
    """Code is compiled for even shares, and would wait for what never comes."""
    split = SimpleNamespace(ulysses_anything=True)
    (pipeline := load()).transformer._parallel_config = SimpleNamespace(context_parallel_config=split)
    bind_blocks(pipeline.transformer, package)
    assert torch.equal(draw(pipeline), draw(eager))
    split.ulysses_anything = False
    assert not torch.equal(draw(pipeline), draw(eager))  # another order of sums


def test_a_restored_worker_draws_what_the_compiling_one_drew(bound: Any, volume: Path) -> None:
    pipeline = load()
    found = artifacts.restore(pipeline.transformer, SPARK, CPU, volume)
    assert (found.outcome, found.source and found.source.folder) == ("HIT", baked(volume).parent)
    baked(volume).unlink()  # the volume may vanish once a worker has started
    assert torch.equal(draw(pipeline), draw(bound))


def test_what_the_code_was_not_compiled_for_stays_eager(eager: Any, bound: Any) -> None:
    assert (draw(eager, n=2) - draw(bound, n=2)).abs().max() < 0.01
    context, pooled, _ = eager.encode_prompt("a ring", None, max_sequence_length=16)
    prompt = {"prompt_embeds": context, "pooled_prompt_embeds": pooled}

    def other(pipeline: Any) -> torch.Tensor:
        with torch.inference_mode():
            return pipeline(
                **prompt, width=256, height=256, num_inference_steps=1, guidance_scale=0.0, output_type="latent",
                generator=torch.Generator().manual_seed(3),
            ).images  # fmt: skip

    assert torch.allclose(other(eager), other(bound), atol=1e-5)


TAKES = [(torch.float32, [None, 16, 64]), (torch.bfloat16, [])]


@pytest.mark.parametrize(
    ("shapes", "dtypes", "fits"),
    [
        (((1, 16, 64), ()), (torch.float32, torch.bfloat16), True),
        (((9, 16, 64), ()), (torch.float32, torch.bfloat16), True),
        (((1, 17, 64), ()), (torch.float32, torch.bfloat16), False),
        (((1, 16, 65), ()), (torch.float32, torch.bfloat16), False),
        (((16, 64), ()), (torch.float32, torch.bfloat16), False),
        (((1, 1, 16, 64), ()), (torch.float32, torch.bfloat16), False),
        (((1, 16, 64), ()), (torch.float16, torch.bfloat16), False),
        (((1, 16, 64), ()), (torch.float32, torch.float32), False),
        (((1, 16, 64),), (torch.float32,), False),
        (((1, 16, 64), (), ()), (torch.float32, torch.bfloat16, torch.float32), False),
    ],
)
def test_what_code_is_called_with_is_what_it_was_compiled_for(shapes: Any, dtypes: Any, fits: bool) -> None:
    given = [torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    assert blocks._fits(given, TAKES) == fits
    assert not blocks._fits([*given[:-1], 1.0], TAKES)  # no tensor


def test_a_model_without_repeated_blocks_is_told_and_a_decoder_is_a_kind_of_its_own(eager: Any) -> None:
    with pytest.raises(ValueError, match="Linear names no repeated blocks"):
        kinds_of(type("Linear", (torch.nn.Linear,), {"_repeated_blocks": None})(2, 2))
    alone, decoder = kinds_of(eager.transformer), eager.vae.decoder
    assert len(alone) == 2
    assert kinds_of(eager.transformer, decoder) == sorted([*alone, kind_of(decoder)])


def test_code_runs_on_one_thread_and_gives_way_to_a_blocks_own(
    package: Path, eager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[Any, ...]] = []

    class Loader(torch._C._aoti.AOTIModelPackageLoader):
        def __init__(self, *given: Any) -> None:
            told.append(given)
            super().__init__(*given)

    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", Loader)
    pipeline = load()
    bind_blocks(pipeline.transformer, package)
    assert {given[1] for given in told} == {*kinds_of(eager.transformer)}
    assert {given[2:] for given in told} == {(True, 1, -1)}  # one thread, one at a time, wherever it was compiled for
    blocks.unbind_blocks(pipeline.transformer)
    assert not any(forwards(pipeline.transformer))
    assert not hasattr(pipeline.transformer, "modulations")
    assert (draw(pipeline, (64, 64), 1) - draw(eager, (64, 64), 1)).abs().max() < 0.01


def test_what_is_unpacked_of_a_package_goes_with_the_transformer(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch would leave it in the folder for temporary files at the end of each process."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pipeline = load()
    bind_blocks(pipeline.transformer, package)
    assert len([*tmp_path.rglob("*.so")]) == sum(forwards(pipeline.transformer))
    blocks.unbind_blocks(pipeline.transformer)
    assert not [*tmp_path.iterdir()]
    bind_blocks(pipeline.transformer, package)
    assert [*tmp_path.iterdir()]
    del pipeline
    gc.collect()
    assert not [*tmp_path.iterdir()]


def test_weights_are_shared(package: Path) -> None:
    """Changing a loaded weight changes what the code draws; each block has its own."""
    pipeline = load()
    bind_blocks(pipeline.transformer, package)
    before = draw(pipeline)
    for block in pipeline.transformer.single_transformer_blocks[1:]:
        block.proj_out.weight.zero_()
    reference = load()
    for block in reference.transformer.single_transformer_blocks[1:]:
        block.proj_out.weight.zero_()
    assert (draw(pipeline) - draw(reference)).abs().max() < 0.01
    assert (draw(pipeline) - before).abs().max() > 10


def test_compiled_code_sees_a_lora_come_and_go(package: Path, tmp_path: Path) -> None:
    """In weights that it reads as they are, joined to others, or not at all, as those of the modulation."""
    pipeline, reference = load(), load()
    layers = [name for name, module in reference.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    few = [name for name in layers if name.endswith((".to_k", "add_q_proj")) and ".1." in name]
    bind_blocks(pipeline.transformer, package)
    everything, some = (
        put(tmp_path / f"{len(names)}.safetensors", peft(matrices(reference.transformer, tuple(names))), 0.4)
        for names in (layers, few)
    )
    owner, plainly = Applied(pipeline), Applied(reference)
    with ahead(pipeline):
        before = draw(pipeline)
    for loras in ([everything], [some], [everything, some], [some], [everything]):
        owner.apply(loras)
        plainly.apply(loras)
        with ahead(pipeline):
            found = draw(pipeline)
        assert (found - draw(reference)).abs().max() < 0.01
        assert (found - before).abs().max() > 5
    owner.apply(())
    with ahead(pipeline):
        assert torch.equal(draw(pipeline), before)


def test_weights_are_freed_though_torch_keeps_its_references(package: Path) -> None:
    pipeline = load()
    transformer = pipeline.transformer
    bind_blocks(transformer, package)
    weights = [*transformer.parameters(), *transformer.buffers()]
    free(pipeline)
    assert sum(weight.untyped_storage().nbytes() for weight in weights) == 0


def test_weights_made_in_inference_mode(package: Path, eager: Any) -> None:
    with torch.inference_mode():
        pipeline = load()
        pipeline.transformer.load_state_dict(
            {name: weight.clone() for name, weight in eager.transformer.state_dict().items()}, assign=True
        )
    assert pipeline.transformer.single_transformer_blocks[0].proj_out.weight.is_inference()
    bind_blocks(pipeline.transformer, package)
    assert (draw(pipeline) - draw(eager)).abs().max() < 0.01


def test_a_run_may_be_cancelled(bound: Any) -> None:
    def cancel(*_: Any) -> Any:
        raise Cancelled("stopped")

    before = draw(bound)
    with pytest.raises(Cancelled):
        draw(bound, callback_on_step_end=cancel)
    assert torch.equal(draw(bound), before)


def test_a_run_makes_the_modulation_of_all_its_steps_at_once(
    eager: Any, bound: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block multiplies those weights once, and draws what it draws when it does so at each step."""
    found, find = [], Run.find
    monkeypatch.setattr(Run, "find", lambda *given: found.append(find(*given)) or found[-1])
    with ahead(bound):
        picture = draw(bound)
        made = bound.transformer.modulations.run._made
    count = len(forwards(bound.transformer))
    assert (len(made), len(found), sum(each is None for each in found)) == (count, 4 * count, 0)
    assert (picture - draw(eager)).abs().max() < 0.01
    assert (picture - draw(bound)).abs().max() < 0.01
    assert len(found) == 4 * count


def test_an_empty_volume_is_a_miss(eager: Any, tmp_path: Path) -> None:
    found = artifacts.restore(eager.transformer, SPARK, CPU, tmp_path / "not there")
    assert (found.outcome, found.reason) == ("MISS", "nothing is compiled for spark yet")


def test_stale_names_what_differs_from_the_nearest(package: Path, volume: Path) -> None:
    facts = artifacts.fingerprint(SPARK, CPU)
    baked(volume).with_name("manifest.json").unlink()
    for other in ({"torch": "2.0.0"}, {"torch": "2.0.0", "device": "NVIDIA L4"}):
        with publishing(volume / "baked" / "spark" / artifacts.key(facts | other), facts | other) as folder:
            (folder / artifacts.PACKAGE).write_bytes(b"never looked at")
    found = artifacts.look(SPARK, CPU, volume)
    assert found.outcome == "STALE"
    assert found.reason == f"compiled for another worker: torch is {facts['torch']}, was 2.0.0"
    half = dataclasses.replace(CPU, precision="bf16")
    assert "precision is bf16, was fp32; torch is" in artifacts.look(SPARK, half, volume).reason


def test_every_field_is_in_the_key() -> None:
    facts = artifacts.fingerprint(SPARK, CPU)
    named = {"device", "torch", "triton", "diffusers", "revision", "precision", "attention", "shapes"}
    assert named < facts.keys()
    assert "torchao" not in facts  # it rounds weights, whose bytes code does not know
    assert all(value and isinstance(value, str) for value in facts.values())
    keys = {artifacts.key(facts | {name: "other"}) for name in facts}
    assert len(keys | {artifacts.key(facts)}) == len(facts) + 1


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    return data[:4000] + bytes([data[4000] ^ 1]) + data[4001:]


@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_damaged_package_is_refused_and_replaced(
    package: Path, volume: Path, damage: Callable[[bytes], bytes]
) -> None:
    transformer = load().transformer
    baked(volume).write_bytes(damage(package.read_bytes()))
    found = artifacts.restore(transformer, SPARK, CPU, volume)
    assert found.outcome == "ERROR"
    assert "is not what its manifest says" in found.reason
    assert not any(forwards(transformer))
    artifacts.publish(package, SPARK, CPU, volume)
    assert baked(volume).read_bytes() == package.read_bytes()


def test_an_unreadable_manifest_is_a_miss_and_replaced(package: Path, volume: Path) -> None:
    baked(volume).with_name("manifest.json").write_text("{")
    assert artifacts.look(SPARK, CPU, volume).outcome == "MISS"
    artifacts.publish(package, SPARK, CPU, volume)
    assert artifacts.look(SPARK, CPU, volume).outcome == "HIT"


KEY, ANOTHER = "k" * 32, "a" * 32


def test_a_worker_with_a_key_runs_what_was_sealed_by_it_alone(package: Path, tmp_path: Path) -> None:
    """Who has none runs all, and publishes what no other runs; who has one puts its own in the place of that."""
    transformer = load().transformer
    for volume_key in ("", ANOTHER):
        artifacts.publish(package, SPARK, CPU, tmp_path, volume_key=volume_key)
        found = artifacts.restore(transformer, SPARK, CPU, tmp_path, volume_key=KEY)
        told = "nothing is compiled for spark yet; 1 published without this KINDLING_VOLUME_KEY: never run"
        assert (found.outcome, found.reason) == ("MISS", told)
        assert not any(forwards(transformer))
        assert artifacts.packaged(SPARK, CPU, tmp_path, ["native"], volume_key=KEY) == ""
        assert artifacts.packaged(SPARK, CPU, tmp_path, ["native"]) == "native"
        artifacts.publish(package, SPARK, CPU, tmp_path, volume_key=KEY)
        assert artifacts.look(SPARK, CPU, tmp_path, volume_key=KEY).outcome == "HIT"
    artifacts.publish(package, SPARK, CPU, tmp_path)  # which leaves a whole one alone
    assert artifacts.look(SPARK, CPU, tmp_path, volume_key=ANOTHER).outcome == "MISS"
    assert artifacts.restore(transformer, SPARK, CPU, tmp_path, volume_key=KEY).outcome == "HIT"
    assert all(forwards(transformer))


def planted(volume: Path) -> None:
    """Other code, under checksums and in a manifest that belong to it."""
    facts = read_manifest(baked(volume).parent).facts  # type: ignore[union-attr]
    baked(volume).write_bytes(b"other code")
    write_manifest(baked(volume).parent, facts)


def swapped(volume: Path) -> None:
    """Other code under the sealed manifest."""
    baked(volume).write_bytes(b"other code".ljust(baked(volume).stat().st_size, b"-"))


def moved(volume: Path) -> None:
    """A sealed package of another fingerprint, said to be of this one."""
    manifest = json.loads(baked(volume).with_name("manifest.json").read_text())
    manifest["facts"]["precision"] = "bf16"
    baked(volume).with_name("manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("attack", [planted, swapped, moved, lambda volume: (baked(volume).parent / SEAL).unlink()])
def test_what_was_changed_after_it_was_sealed_is_never_run(
    attack: Callable[[Path], object], package: Path, tmp_path: Path
) -> None:
    artifacts.publish(package, SPARK, CPU, tmp_path, volume_key=KEY)
    attack(tmp_path)
    transformer = load().transformer
    for hardware in (CPU, dataclasses.replace(CPU, precision="bf16")):
        assert artifacts.restore(transformer, SPARK, hardware, tmp_path, volume_key=KEY).outcome != "HIT"
    assert not any(forwards(transformer))
    artifacts.publish(package, SPARK, CPU, tmp_path, volume_key=KEY)
    assert artifacts.restore(transformer, SPARK, CPU, tmp_path, volume_key=KEY).outcome == "HIT"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"hmac_sha256": null}', '{"hmac_sha256": "\u00e9"}'])
def test_a_seal_that_is_none(text: str, package: Path, tmp_path: Path) -> None:
    artifacts.publish(package, SPARK, CPU, tmp_path, volume_key=KEY)
    (baked(tmp_path).parent / SEAL).write_text(text)
    assert artifacts.look(SPARK, CPU, tmp_path, volume_key=KEY).outcome == "MISS"


def test_all_that_looks_for_code_to_run_or_leaves_it_says_by_which_key() -> None:
    """Who forgot would run what anybody has put there."""
    calls = []
    for path in (ROOT / "handler").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                whose = getattr(node.func.value, "id", "")
                if whose in ("artifacts", "compiled") and node.func.attr in ("look", "packaged", "restore", "publish"):
                    calls.append((path.name, node.lineno, "volume_key" in [keyword.arg for keyword in node.keywords]))
    assert len(calls) >= 6
    assert all(says for _, _, says in calls), calls


def test_blocks_of_another_shape_are_stale(package: Path, tmp_path: Path) -> None:
    """One kind of block fits, the other does not: neither is bound, nor where a package lacks what it should have."""
    config = {**FluxTransformer2DModel.load_config(EMBEDDED / "spark" / "transformer")}
    other = FluxTransformer2DModel.from_config({**config, "num_layers": 1}).requires_grad_(False)
    other.single_transformer_blocks[3].proj_mlp.bias = None
    artifacts.publish(package, SPARK, CPU, tmp_path)
    found = artifacts.restore(other, SPARK, CPU, tmp_path)
    assert found.outcome == "STALE"
    assert "blocks is" in found.reason
    with pytest.raises(RuntimeError, match="FluxSingleTransformerBlock"):
        bind_blocks(other, package)
    assert not any(forwards(other))


def spark_with(**differing: Any) -> Any:
    config = {**FluxTransformer2DModel.load_config(EMBEDDED / "spark" / "transformer")}
    with torch.device("meta"):
        return FluxTransformer2DModel.from_config({**config, **differing}).requires_grad_(False)


def test_blocks_of_other_heads_epsilons_flags_or_functions_are_other_kinds() -> None:
    """Of weights that are alike in all."""
    config = FluxTransformer2DModel.load_config(EMBEDDED / "spark" / "transformer")
    changed = [spark_with() for _ in range(5)]
    changed[1].transformer_blocks[0].norm1.norm.eps = 1e-3
    changed[2].transformer_blocks[0].attn.heads = 2 * config["num_attention_heads"]
    changed[3].transformer_blocks[0].ff.net[0].approximate = "none"
    changed[4].transformer_blocks[0].attn.processor = type("Other", (), {})()
    kinds = [kind_of(model.transformer_blocks[0]) for model in changed]
    assert len({*kinds}) == 5
    assert kind_of(spark_with().transformer_blocks[0]) == kinds[0]


@pytest.mark.parametrize("spec", [s for s in MODELS.values() if not s.base and not s.embedded], ids=lambda s: s.id)
def test_blocks_that_differ_in_nothing_but_their_place_are_one_kind(spec: Any) -> None:
    """Else each would be compiled for itself."""
    pipeline = tiny.build(spec)
    model = getattr(pipeline, importlib.import_module(spec.family).DENOISER)
    kinds = blocks._kinds(model)
    weights = {
        f"{type(some[0])} {[(n, w.shape) for n, w in blocks._weights(some[0]).items()]}" for some in kinds.values()
    }
    assert len(kinds) == len(weights)


def test_what_is_published_says_of_which_blocks(eager: Any, package: Path) -> None:
    assert kinds_in(package) == kinds_of(eager.transformer)


APPLE = (
    "processor\t: {i}\nFeatures\t: fp asimd {more}\nCPU implementer\t: 0x61\nCPU variant\t: 0x1\nCPU part\t: {part}\n\n"
)
NEOVERSE = "processor\t: {i}\nFeatures\t: fp asimd sve bf16\nCPU implementer\t: 0x41\nCPU part\t: {part}\n\n"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (APPLE.format(i=0, more="", part="0x022"), APPLE.format(i=0, more="", part="0x032")),  # M1, M2
        (APPLE.format(i=0, more="", part="0x000"), APPLE.format(i=0, more="i8mm bf16", part="0x000")),  # in a machine
        (NEOVERSE.format(i=0, part="0xd40"), NEOVERSE.format(i=0, part="0xd4f")),  # Graviton 3, 4
        ("model name\t: AMD EPYC\nmodel\t: 1\nflags: avx2\n", "model name\t: AMD EPYC\nmodel\t: 17\nflags: avx2\n"),
    ],
)
def test_processors_are_told_apart(one: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for text in (one, one + one.replace("processor\t: 0", "processor\t: 1"), other):
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
        found.append(artifacts.fingerprint(SPARK, CPU))
    assert found[0] == found[1] != found[2]
    assert artifacts.differing(found[0], found[2]) in (["device"], ["instructions"])


def test_all_code_that_makes_a_package_is_in_its_key() -> None:
    """What blocks' compiler and layers import of ours, but for what reads, finds or rounds weights or fails."""
    needed, wanted = set[str](), ["model/compiling/package", "model/loading/quant", "model/attention"]
    aside = (
        "core/",
        "volume/",
        "model/hardware",
        "model/faults",
        "model/loading/rounding",
        "model/compiling/toolchain",
    )
    while wanted:
        needed.add(name := wanted.pop())
        found = ast.walk(ast.parse((ROOT / "handler" / f"{name}.py").read_text()))
        froms = [node for node in found if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "handler"]
        names = {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
        places = {place for name in names for place in (name, name.rpartition(".")[0])}
        paths = {place.removeprefix("handler.").replace(".", "/") for place in places}
        there = {path for path in paths if (ROOT / "handler" / f"{path}.py").exists()}
        wanted += [path for path in there - needed if not path.startswith(aside)]
    assert needed <= {*artifacts.CODE}
    assert all((ROOT / "handler" / f"{name}.py").exists() for name in artifacts.CODE)


def test_code_that_only_moved_is_the_same_code(tmp_path: Path) -> None:
    before, moved, changed = (tmp_path / f"{name}.py" for name in ("before", "moved", "changed"))
    before.write_text("from handler.a import (\n    b,\n    c,\n)\n\n\ndef f():\n    import torch\n    return b(c)\n")
    moved.write_text("import torch\nfrom handler.d.a import b, c\n\ndef f():\n    return b(c)\n")
    assert artifacts.code_of(before) == artifacts.code_of(moved) == ["b", "c", "torch", "def f():", "    return b(c)"]
    for other in ("return c(b)", "from handler.a import b, d as c"):
        old = "return b(c)" if other.startswith("return") else "from handler.d.a import b, c"
        changed.write_text(moved.read_text().replace(old, other))
        assert artifacts.code_of(changed) != artifacts.code_of(moved)


def test_what_was_compiled_before_files_moved_is_still_good() -> None:
    """Where the code that compiles is changed in earnest, its row of `SAME` goes."""
    assert artifacts.fingerprint(SPARK, CPU)["code"] in artifacts.SAME.values()


def test_inductors_settings_and_torchs_precision_are_in_the_key() -> None:
    from torch._inductor import config

    found = [artifacts.fingerprint(SPARK, CPU)]
    with config.patch(epilogue_fusion=False):
        found.append(artifacts.fingerprint(SPARK, CPU))
    torch.set_float32_matmul_precision("high")
    found.append(artifacts.fingerprint(SPARK, CPU))
    torch.set_float32_matmul_precision("highest")
    assert [artifacts.differing(found[0], each) for each in found[1:]] == [["inductor"], ["matmul"]]
    assert artifacts.fingerprint(SPARK, CPU) == found[0]


def test_two_builders_leave_one_copy(package: Path, tmp_path: Path) -> None:
    threads = [threading.Thread(target=artifacts.publish, args=(package, SPARK, CPU, tmp_path)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in (tmp_path / "baked" / "spark").iterdir()] == [baked(tmp_path).parent.name]
    assert artifacts.look(SPARK, CPU, tmp_path).outcome == "HIT"


def test_restoring_starts_no_compiler(volume: Path) -> None:
    """A fresh process that restores has neither Dynamo's tracer nor Inductor's code generator loaded afterwards."""
    code = f"""
import sys, pathlib, torch, diffusers
from handler import MODELS
from handler.model.compiling import artifacts
from handler.model.hardware import Hardware
from handler.model.compiling.modulation import Run, ahead
from handler.volume.sources import EMBEDDED
from diffusers import FluxTransformer2DModel
transformer = FluxTransformer2DModel.from_pretrained(EMBEDDED / "spark" / "transformer").requires_grad_(False)
known = set(sys.modules)
hardware = Hardware("cpu", "CPU", "fp32", "a test")
found = artifacts.restore(transformer, MODELS["spark"], hardware, pathlib.Path({str(volume)!r}))
print(found.outcome, sorted(name for name in set(sys.modules) - known if name.startswith("torch._")))
print([name for name in ("torch._inductor.graph", "torch._inductor.compile_fx") if name in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split("\n")[:2] == ["HIT []", "[]"]
