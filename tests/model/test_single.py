"""People's own files over a row: what is drawn is what the same weights draw in diffusers' layout, to the bit."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import originals
import pytest
import torch
from conftest import PATIENT, unwarmed
from safetensors.torch import load_file
from test_sd15 import as_on_the_hub

import tiny
from handler.__main__ import main
from handler.api import codec
from handler.catalog.models import MODELS
from handler.catalog.originals import FLUX
from handler.catalog.spec import ModelSpec
from handler.cli.bake import publish_weights
from handler.core.request import ImageRequest
from handler.core.settings import Settings
from handler.model.compiling import artifacts
from handler.model.hardware import detect
from handler.model.loading.packing import BLOCK, unpacked, viewed
from handler.model.loading.weights import load_components
from handler.volume.layout import Slot
from handler.volume.manifest import write_manifest
from handler.volume.overlay import Overlay, overlay
from handler.volume.reader import Reader
from handler.volume.revisions import settled
from handler.volume.sources import EMBEDDED, model_source
from handler.worker.worker import Worker

SPARK = EMBEDDED / "spark"
SDXL = MODELS["sdxl-turbo"]
PROMPT = "three yellow stars"


def drawn(volume: Path, **settings: Any) -> Any:
    """A picture by a worker with these settings."""
    asked = PATIENT.model_copy(update={"volume": volume, "device": "cpu", "compile": "off", **settings})
    with unwarmed(), Worker.boot(asked) as worker:
        request = ImageRequest(prompt=PROMPT, seed=7, width=64, height=64, num_inference_steps=worker.spec.min_steps)
        return worker.generate(worker.spec.recipe(request))[0].rgb


def held_by(worker: Worker) -> dict[str, Any]:
    """All weights of a worker's models."""
    models = {name: part for name, part in worker._pipeline.components.items() if hasattr(part, "state_dict")}
    return {
        f"{name}.{key}": weight.clone() for name, part in models.items() for key, weight in part.state_dict().items()
    }


def spark_transformer() -> originals.Weights:
    return load_file(SPARK / "transformer/diffusion_pytorch_model.safetensors")


def flux_names(weights: originals.Weights) -> originals.Weights:
    return originals.backwards(weights, FLUX)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What spark draws."""
    return drawn(tmp_path_factory.mktemp("volume"))


@pytest.mark.parametrize(("dtype", "prefix"), [("bfloat16", ""), ("float32", "model.diffusion_model.")])
def test_a_denoiser_by_its_first_names_draws_the_same(dtype: str, prefix: str, plain: Any, tmp_path: Path) -> None:
    """In its own type, which is cast, and in the one that is served, of which it is a view.

    Where a view lies decides in which order a CPU sums: one value may come to lie on the other side of a rounding.
    """
    weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in flux_names(spark_transformer()).items()}
    originals.write(weights, tmp_path / "unets/mine.safetensors", prefix)
    assert np.abs(drawn(tmp_path, weights=("mine.safetensors",)).astype(int) - plain).max() <= 1
    found, exact = loaded(tmp_path / "unets", MODELS["spark"], "mine.safetensors")[0], spark_transformer()
    assert all(torch.equal(t, exact[name].float()) for name, t in found["transformer"].state_dict().items())


def test_a_norm_may_be_called_as_later_files_call_it(tmp_path: Path) -> None:
    later = {re.sub(r"_norm\.scale$", "_norm.weight", name): t for name, t in flux_names(spark_transformer()).items()}
    originals.write(later, tmp_path / "mine.safetensors")
    found, _ = loaded(tmp_path, MODELS["spark"], "mine.safetensors")
    exact = spark_transformer()
    assert [
        name for name, t in found["transformer"].state_dict().items() if not torch.equal(t, exact[name].float())
    ] == []


def test_another_denoiser_draws_something_else(plain: Any, tmp_path: Path) -> None:
    weights = {name: 0.9 * tensor for name, tensor in flux_names(spark_transformer()).items()}
    originals.write(weights, tmp_path / "unets/mine.safetensors")
    assert not np.array_equal(drawn(tmp_path, weights=("unets/mine.safetensors",)), plain)


def scaled(pipeline: Any) -> Any:
    """Weights of another model of the same kind."""
    with torch.no_grad():
        for part in pipeline.components.values():
            for weight in part.parameters() if isinstance(part, torch.nn.Module) else ():
                weight.mul_(0.9)
    return pipeline


def loaded(volume: Path, spec: ModelSpec, *names: str, precision: str = "fp32") -> tuple[dict[str, Any], Overlay]:
    """The components of `spec` with these files over it."""
    source = model_source(spec, volume)
    over = overlay(names, spec, source, volume)
    hardware = replace(detect(Settings(volume=volume, device="cpu")), precision=precision)
    with Reader(source, over=over) as reader:
        return load_components(reader, hardware), over


def differing(found: Any, wanted: Any) -> list[str]:
    """The names of the tensors that two models do not share to the bit."""
    mine, theirs = found.state_dict(), wanted.state_dict()
    return [name for name in theirs if not torch.equal(mine[name], theirs[name])]


DENOISERS = ("sdxl", "sd3.5-large", "flux-dev", "flux-schnell", "chroma", "flux2-dev", "flux2-klein", "z-image-turbo",
             "qwen-image")  # fmt: skip


@pytest.mark.parametrize("name", DENOISERS)
def test_denoisers_vaes_and_encoders_load_to_the_bit(name: str, tmp_path: Path) -> None:
    """Each in a file of its own, by the names of the model's first release; nothing else changes."""
    spec = MODELS[name]
    tiny.write(spec, tmp_path)
    pipeline = scaled(tiny.build(spec))
    parts = {part: each for part, each in pipeline.components.items() if isinstance(each, torch.nn.Module)}
    brought = [part for part in parts if not (part == "vae" and name == "qwen-image")]
    for part in brought:
        originals.write(originals.original(parts[part]), tmp_path / f"{part}.safetensors")
    found, over = loaded(tmp_path, spec, *(f"{part}.safetensors" for part in brought))
    assert sorted(over.shares) == sorted(brought)
    assert {part: differing(found[part], parts[part]) for part in brought} == {part: [] for part in brought}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A volume with a tiny SDXL Turbo and the checkpoint of another one; one that has that as diffusers does."""
    volume, other = tmp_path_factory.mktemp("volume"), tmp_path_factory.mktemp("other")
    tiny.write(SDXL, volume)
    pipeline = scaled(tiny.build(SDXL)).to(torch.bfloat16)
    originals.write(originals.checkpoint(pipeline), volume / "ComfyUI/models/checkpoints/merge.safetensors")
    folder = tiny.write(SDXL, other)
    pipeline.save_pretrained(folder)
    write_manifest(folder, {"model": SDXL.id})
    return volume, other


def test_a_checkpoint_of_sdxl_draws_the_same(sdxl: Any) -> None:
    """U-Net, VAE, CLIP and OpenCLIP at once, the last by other names, in other pieces, and transposed."""
    volume, other = sdxl
    expected = drawn(other, model=SDXL.id)
    assert not np.array_equal(drawn(volume, model=SDXL.id), expected)
    assert np.array_equal(drawn(volume, model=SDXL.id, weights=("merge.safetensors",)), expected)


def test_a_checkpoint_fits_a_row_with_old_names(tmp_path: Path) -> None:
    """Stable Diffusion 1.5's own files call the VAE's attention as nobody does any more, and have position_ids."""
    as_on_the_hub(tmp_path)
    spec = settled(MODELS["sd1.5"], tmp_path)
    pipeline = scaled(tiny.build(spec))
    checkpoint = originals.checkpoint(pipeline)
    originals.write(checkpoint, tmp_path / "merge.safetensors")
    broken = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77.0)[None]}
    originals.write(checkpoint | broken, tmp_path / "older.safetensors")
    originals.write(pipeline.vae.state_dict(), tmp_path / "vae.safetensors")
    for name, parts in {"merge": ["text_encoder", "unet", "vae"], "older": ["text_encoder"], "vae": ["vae"]}.items():
        found, over = loaded(tmp_path, spec, f"{name}.safetensors")
        assert set(parts) <= set(over.shares)
        assert {part: differing(found[part], getattr(pipeline, part)) for part in parts} == {part: [] for part in parts}


@pytest.mark.parametrize("names", [("merge", "other"), ("other", "merge")])
def test_a_vae_alone_goes_before_a_checkpoints(names: tuple[str, ...], sdxl: Any) -> None:
    volume, _ = sdxl
    pipeline = scaled(scaled(tiny.build(SDXL)))
    originals.write(originals.original(pipeline.vae), volume / "vae/other.safetensors")
    found, over = loaded(volume, SDXL, *(f"{name}.safetensors" for name in names))
    assert differing(found["vae"], pipeline.vae) == []
    came = {part: share.file.path.stem for part, [share] in over.shares.items()}
    assert came == {"unet": "merge", "text_encoder": "merge", "text_encoder_2": "merge", "vae": "other"}


def test_an_encoder_comes_with_its_checkpoint_whatever_it_is_called(tmp_path: Path) -> None:
    spec = MODELS["z-image-turbo"]
    tiny.write(spec, tmp_path)
    pipeline = scaled(tiny.build(spec))
    checkpoint = {f"model.diffusion_model.{n}": t for n, t in originals.original(pipeline.transformer).items()}
    checkpoint |= {f"text_encoders.qwen3_4b.transformer.{n}": t for n, t in pipeline.text_encoder.state_dict().items()}
    originals.write(checkpoint, tmp_path / "all.safetensors")
    found, _ = loaded(tmp_path, spec, "all.safetensors")
    assert differing(found["text_encoder"], pipeline.text_encoder) == []


MATRICES = re.compile(r".*(blocks|final_layer)\..*\.weight")
FLOAT8 = torch.float8_e4m3fn


def eight_bits(weights: originals.Weights, prefix: str = "") -> originals.Weights:
    """As many files have them: all of it cast."""
    return {prefix + name: tensor.to(FLOAT8) for name, tensor in weights.items()}


def by(
    scale_name: str, dtype: torch.dtype, rows: bool, rotated: int = 0
) -> Callable[[originals.Weights], originals.Weights]:
    """Each matrix with a scale for all of it, or for each row, as ComfyUI's users have them."""

    def made(weights: originals.Weights) -> originals.Weights:
        found = originals.Weights()
        for name, tensor in weights.items():
            if tensor.ndim != 2 or not MATRICES.fullmatch(name) or (rotated and tensor.shape[1] % rotated):
                found[name] = tensor
                continue
            exact = tensor.float()
            if rotated:
                exact = (exact.reshape(len(exact), -1, rotated) @ hadamard(rotated)).reshape(exact.shape)
            most = torch.finfo(dtype).max if dtype.is_floating_point else 127
            scale = exact.abs().amax(1, keepdim=True) / most if rows else exact.abs().max() / most
            kept = exact / scale
            stem = name.removesuffix(".weight")
            found[name] = (kept if dtype.is_floating_point else kept.round()).to(dtype)
            found[stem + scale_name] = scale.squeeze(-1) if rotated else scale
            if scale_name == ".scale_weight":
                found["scaled_fp8"] = torch.zeros(2, dtype=dtype)
                found[f"{stem}.scale_input"] = torch.ones(())
            else:
                kind = {FLOAT8: "float8_e4m3fn", torch.int8: "int8_tensorwise"}[dtype]
                note = {"format": kind} | ({"convrot": True, "convrot_groupsize": rotated} if rotated else {})
                found[f"{stem}.comfy_quant"] = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)
        return found

    return made


def hadamard(size: int) -> Any:
    """comfy-kitchen's, for four and powers of it."""
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float32)
    made = four
    while len(made) < size:
        made = torch.kron(made, four)
    return made / size**0.5


FORMATS: dict[str, tuple[Callable[[originals.Weights], originals.Weights], float]] = {
    "fp8": (eight_bits, 2**-4),  # of each weight: half of the last of three bits; below the least normal one more
    "fp8_scaled": (by(".scale_weight", FLOAT8, rows=False), 2**-4),
    "halves, scaled": (by(".scale_weight", torch.float16, rows=False), 2**-10),
    "fp8 of today": (by(".weight_scale", FLOAT8, rows=False), 2**-4),
    "int8": (by(".weight_scale", torch.int8, rows=True), 0.5 / 127),  # of the largest of a row
    "int8 rotated": (by(".weight_scale", torch.int8, rows=True, rotated=16), 0.5 * 16**0.5 / 127),
}


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_made_smaller_is_read_within_its_rounding(name: str, tmp_path: Path) -> None:
    """By the model's names, in the pieces that it wants; and it draws."""
    make, bound = FORMATS[name]
    exact = {key: tensor.float() for key, tensor in spark_transformer().items()}
    originals.write(make(flux_names(exact)), tmp_path / "unet/mine.safetensors")
    found = loaded(tmp_path, MODELS["spark"], "mine.safetensors")[0]["transformer"].state_dict()
    for key, tensor in exact.items():
        error = (found[key] - tensor).abs()
        assert error.max() <= bound * tensor.abs().max() * 1.001, key
    assert any(not torch.equal(found[key], tensor) for key, tensor in exact.items())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("told", [True, False])
def test_what_is_said_of_a_layer_holds_for_it_below_any_prefix(prefix: str, told: bool, tmp_path: Path) -> None:
    exact = {key: tensor.float() for key, tensor in spark_transformer().items()}
    made = by(".weight_scale", torch.int8, rows=True, rotated=16)(flux_names(exact))
    notes = {name.removesuffix(".comfy_quant"): note for name, note in made.items() if name.endswith(".comfy_quant")}
    layers = {prefix * told + name: json.loads(bytes(note.tolist())) for name, note in notes.items()}
    kept = {name: tensor for name, tensor in made.items() if not name.endswith(".comfy_quant")}
    said = {"_quantization_metadata": json.dumps({"layers": layers})}
    originals.write(kept, tmp_path / "mine.safetensors", prefix, **said)
    found, _ = loaded(tmp_path, MODELS["spark"], "mine.safetensors")
    mine = found["transformer"].state_dict()
    assert max((mine[name].float() - exact[name]).abs().max() / exact[name].abs().max() for name in exact) < 0.05


def test_scaled_weights_are_rounded_anew_for_the_precision_that_is_served(tmp_path: Path) -> None:
    """As the same weights, made exact, would be."""
    smaller = by(".scale_weight", FLOAT8, rows=False)(flux_names(spark_transformer()))
    originals.write(smaller, tmp_path / "unet/small.safetensors")
    spark, names = (
        MODELS["spark"],
        [each for each in smaller if f"{each.removesuffix('.weight')}.scale_weight" in smaller],
    )
    scales = {each: smaller[f"{each.removesuffix('.weight')}.scale_weight"] for each in names}
    plain = {n: t for n, t in smaller.items() if not re.search(r"scale_|scaled_", n)}
    originals.write(plain | {n: plain[n].float() * scales[n] for n in names}, tmp_path / "unet/exact.safetensors")
    small, exact = (loaded(tmp_path, spark, f"{n}.safetensors", precision="int8")[0] for n in ("small", "exact"))
    assert any(tensor.dtype == torch.int8 for tensor in small["transformer"].state_dict().values())
    assert differing(small["transformer"], exact["transformer"]) == []


GGUF = {
    "Q8_0": 0.5 / 127 + 2**-11,
    "Q5_0": 1 / 16,
    "Q4_0": 1 / 8,
    "Q5_1": 1 / 31,
    "Q4_1": 1 / 15,
    "BF16": 2**-8,
    "F16": 2**-11,
}


@pytest.mark.parametrize("kind", GGUF)
def test_gguf_is_read_within_its_rounding(kind: str, tmp_path: Path) -> None:
    """Of the largest of all; a block's own is less. In the pieces that the model wants."""
    pytest.importorskip("gguf")
    exact = {key: tensor.float() for key, tensor in spark_transformer().items()}
    originals.write_gguf(flux_names(exact), tmp_path / "unet/mine.gguf", kind)
    found, over = loaded(tmp_path, MODELS["spark"], "mine.gguf")
    assert over.shares["transformer"][0].file.precision == {"BF16": "bf16", "F16": "fp16"}.get(kind, kind)
    state = found["transformer"].state_dict()
    for key, tensor in exact.items():
        assert (state[key] - tensor).abs().max() <= GGUF[kind] * tensor.abs().max() * 1.01, key
    assert kind == "BF16" or any(not torch.equal(state[key], tensor) for key, tensor in exact.items())


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q5_1", "Q4_1"])
def test_blocks_of_gguf_are_what_its_own_library_makes_of_them(kind: str) -> None:
    """Which does the same sums in another order."""
    gguf = pytest.importorskip("gguf")
    weights, width = BLOCK[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (64, width), dtype=np.uint8)
    for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q8_0": (0,)}.get(kind, (0, 2)):
        blocks[:, at : at + 2] = np.frombuffer(np.float16(0.01).tobytes(), dtype=np.uint8)  # scales that are numbers
    wanted = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]).reshape(64, weights)
    slot = Slot("float32", (64, weights), 0, blocks.size, packed=kind)
    found = unpacked(viewed(torch.from_numpy(blocks.reshape(-1)), slot), slot, None, torch.float32)
    assert torch.allclose(found, torch.from_numpy(wanted), rtol=1e-5, atol=1e-6)


def test_a_gguf_file_draws_in_eight_bits_too(plain: Any, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    originals.write_gguf(flux_names(spark_transformer()), tmp_path / "unet/mine.gguf", "Q8_0")
    picture = drawn(tmp_path, weights=("mine.gguf",), precision="int8")
    assert 0 < np.abs(picture.astype(int) - plain).mean() < 4


def test_what_is_baked_of_a_file_is_served_for_that_file_alone(tmp_path: Path) -> None:
    """By its contents, whatever it is called; to the bit what is rounded at the start.

    Where a file has a weight decides how it is aligned, and so in which order a CPU sums: one value of a picture may
    come to lie on the other side of a rounding.
    """
    weights = {name: 0.9 * tensor for name, tensor in flux_names(spark_transformer()).items()}
    path = originals.write(weights, tmp_path / "unet/mine.safetensors")
    wanted = {"device": "cpu", "compile": "off", "precision": "int8", "weights": ("mine.safetensors",)}
    asked = PATIENT.model_copy(update={"volume": tmp_path, **wanted})
    spark = MODELS["spark"]
    over = overlay(asked.weights, spec=spark, source=model_source(spark, tmp_path), volume=tmp_path)
    with Worker.boot(asked) as worker:
        folder, at_start = publish_weights(worker, tmp_path, over), held_by(worker)
        assert publish_weights(worker, tmp_path, over) is None
    assert folder
    with Worker.boot(asked) as worker:
        assert worker.ledger.weights.startswith(str(folder))
        found = held_by(worker)
    assert found.keys() == at_start.keys()
    assert all(torch.equal(weight, at_start[name]) for name, weight in found.items())
    rounded = drawn(tmp_path, precision="int8", weights=("mine.safetensors",))
    (tmp_path / "moved").mkdir()
    shutil.move(folder, tmp_path / "moved")
    plain = drawn(tmp_path, precision="int8", weights=("mine.safetensors",))
    assert np.abs(plain.astype(int) - rounded).max() <= 1
    shutil.move(tmp_path / "moved" / folder.name, folder)
    path.rename(path.with_name("renamed.safetensors"))
    with Worker.boot(asked.model_copy(update={"weights": ("renamed.safetensors",)})) as worker:
        assert worker.ledger.weights.startswith(f"{EMBEDDED / 'spark'}, under renamed.safetensors@sha256:")  # not known
    with Worker.boot(asked.model_copy(update={"weights": ("renamed.safetensors",)})) as worker:
        assert worker.ledger.weights.startswith(f"{folder}, under renamed.safetensors@sha256:")
    with Worker.boot(asked.model_copy(update={"weights": ()})) as worker:
        assert worker.ledger.weights == str(EMBEDDED / "spark")


def test_a_picture_says_its_files_and_is_made_again_from_that(
    plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {name: 0.9 * tensor for name, tensor in flux_names(spark_transformer()).items()}
    path = originals.write(weights, tmp_path / "unet/mine.safetensors")
    for name, value in {
        "VOLUME": str(tmp_path),
        "DEVICE": "cpu",
        "COMPILE": "off",
        "COLD_START_BUDGET_S": "3600",
    }.items():
        monkeypatch.setenv(f"KINDLING_{name}", value)
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    asked = [PROMPT, "--size", "64x64", "--steps", "1", "--seed", "7"]
    assert main(["generate", *asked, "--weights", "mine.safetensors", "-o", str(first)]) == 0
    said = codec.read_parameters(first)["weights"]
    assert said == f"mine.safetensors@sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    assert main(["generate", "--from", str(first), "-o", str(second)]) == 0
    assert second.read_bytes() == first.read_bytes()
    assert capsys.readouterr().err.count("may come out otherwise") == 0
    originals.write({name: tensor * 1.1 for name, tensor in weights.items()}, path)
    assert main(["generate", "--from", str(first), "-o", str(second)]) == 0
    assert f"weights was {said} and is mine.safetensors@sha256:" in capsys.readouterr().err
    originals.write({"a.lora_down.weight": torch.zeros(2, 2)}, path)
    assert main(["generate", *asked, "--weights", "mine.safetensors", "-o", str(first)]) == 2
    told = "kindling: KINDLING_WEIGHTS: mine.safetensors is a LoRA; spark is FLUX.1 [schnell]."
    assert told in capsys.readouterr().err


def test_one_package_of_compiled_code_is_for_all_files_of_a_row(tmp_path: Path) -> None:
    originals.write(flux_names(spark_transformer()), tmp_path / "unet/mine.safetensors")
    spark, hardware = MODELS["spark"], detect(Settings(volume=tmp_path, device="cpu"))
    own, other = (loaded(tmp_path, spark, *names)[0]["transformer"] for names in ((), ("mine.safetensors",)))
    assert artifacts.name_of(own, spark, hardware) == artifacts.name_of(other, spark, hardware)
