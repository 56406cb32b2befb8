"""People's own folders in diffusers' layout over a row: they draw what diffusers' own `from_pretrained` draws."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PATIENT, unwarmed
from safetensors.torch import load_file, save_file
from test_families import differential as differential
from test_families import serving
from test_sd15 import as_on_the_hub
from test_single import scaled

import tiny
from handler import ImageRequest, Worker
from handler.__main__ import main
from handler.api import codec
from handler.catalog.models import MODELS
from handler.catalog.spec import ModelSpec
from handler.cli.bake import publish_weights
from handler.cli.files import files
from handler.core.errors import KindlingError, WeightsMissing
from handler.volume import layout
from handler.volume.given import given
from handler.volume.hashes import content
from handler.volume.overlay import overlay
from handler.volume.revisions import settled
from handler.volume.sources import EMBEDDED, model_source

SDXL, SPARK = MODELS["sdxl"], MODELS["spark"]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def other(spec: ModelSpec, folder: Path, **shards: Any) -> Path:
    """Another model of the same kind, as its owner saves it; with a VAE and a scheduler that are set otherwise."""
    pipeline = scaled(tiny.build(spec))
    pipeline.vae.register_to_config(scaling_factor=0.77)
    pipeline.scheduler.register_to_config(shift=2.0, beta_end=0.01)
    pipeline.save_pretrained(folder, **shards)
    return folder


def prepared(spec: ModelSpec, volume: Path) -> ModelSpec:
    """A tiny one as `fetch` puts it there."""
    if spec.id == "sd1.5":
        as_on_the_hub(volume)
    elif not spec.embedded:
        tiny.write(spec, volume)
    return settled(spec, volume)


@pytest.mark.parametrize("model", ["sd1.5", "sdxl", "flux-dev", "z-image-turbo"])
def test_pictures_are_those_of_plain_diffusers_with_that_folder(model: str, tmp_path: Path, differential: Any) -> None:
    """To the bit; a part of it comes in several files."""
    spec = prepared(MODELS[model], tmp_path)
    folder = other(spec, tmp_path / "ComfyUI/models/diffusers/mine", max_shard_size="100KB")
    wanted = [option for option in differential.options(spec) if option.name == "text"]
    asked = PATIENT.model_copy(update={"model": spec.id, "volume": tmp_path, "compile": "off", "device": "cpu"})
    [(_, theirs)] = differential.plainly(spec, folder, "fp32", wanted)
    with unwarmed():
        worker = Worker.boot(asked.model_copy(update={"weights": ("mine",)}))
    with worker, serving(worker) as engine:
        ours = differential.answered(engine, spec, wanted[0])
        assert worker.weights.startswith("mine@sha256:")
    assert differential.differing(ours, theirs) == (0, 0)


def denoiser(folder: Path, **config: Any) -> Path:
    """spark's with a folder around it: of the pipeline that is all; its weights are others."""
    (folder / "transformer").mkdir(parents=True)
    for name in ("model_index.json", "transformer/config.json"):
        shutil.copy(EMBEDDED / "spark" / name, folder / name)
    change(folder / "transformer/config.json", **config)
    weights = load_file(EMBEDDED / "spark" / WEIGHTS)
    save_file({name: 0.9 * tensor for name, tensor in weights.items()}, folder / WEIGHTS)
    return folder


def change(path: Path, **config: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def test_what_a_folder_lacks_comes_from_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its picture says so, and is made again by what it says; other contents are told."""
    monkeypatch.setenv("KINDLING_VOLUME", str(tmp_path))
    folder = denoiser(tmp_path / "checkpoints/mine")
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    asked = ["generate", "a red circle", "--size", "64x64", "--steps", "1", "--seed", "3"]
    assert main([*asked, "--weights", "mine", "-o", str(first)]) == 0
    said = codec.read_parameters(first)["weights"]
    assert said == f"mine@sha256:{content(given('mine', tmp_path), tmp_path)}"
    assert main(["generate", "--from", str(first), "-o", str(again)]) == 0
    assert again.read_bytes() == first.read_bytes()
    [state] = files(tmp_path)
    assert (state.name, state.rows[:1], f"mine@sha256:{state.sha256}") == ("checkpoints/mine", ("spark",), said)
    assert state.what == "FLUX.1 [schnell], a FluxPipeline"
    change(folder / "transformer/config.json", note="another")
    assert files(tmp_path)[0].sha256 == ""
    assert content(given("mine", tmp_path), tmp_path) not in said


def test_a_folder_is_baked_and_then_nothing_else_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the row's files nor the headers of one's own, which must only be what they were."""
    spec = prepared(MODELS["flux-dev"], tmp_path)
    other(spec, tmp_path / "mine")
    update = {"model": spec.id, "volume": tmp_path, "compile": "off", "device": "cpu", "weights": ("mine",)}
    asked = PATIENT.model_copy(update=update | {"precision": "int8"})
    with unwarmed(), Worker.boot(asked) as worker:
        drawn, said = draw(worker), worker.weights
        over = overlay(asked.weights, spec, model_source(spec, tmp_path), tmp_path)
        folder = publish_weights(worker, tmp_path, over)
    shutil.rmtree(tmp_path / "models")
    read, opened = layout.read_head, list[Path]()
    monkeypatch.setattr(layout, "read_head", lambda path: opened.append(path) or read(path))
    with unwarmed(), Worker.boot(asked) as worker:
        assert worker.ledger.weights == f"{folder}, under {said}"
        assert (draw(worker) == drawn).all()
    assert {path for path in opened if not path.is_relative_to(folder)} == set()
    change(tmp_path / "mine/model_index.json", note="another")
    with pytest.raises(WeightsMissing, match="flux-dev is not on the volume"):
        Worker.boot(asked)


def draw(worker: Worker) -> Any:
    request = ImageRequest(prompt="three stars", seed=7, width=64, height=64, num_inference_steps=1)
    return worker.generate(worker.spec.recipe(request))[0].rgb


def refused(volume: Path, spec: ModelSpec = SPARK) -> str:
    """The one line that refuses the folder `mine`."""
    with pytest.raises(KindlingError) as caught:
        overlay(["mine"], spec, model_source(spec, volume), volume)
    assert "\n" not in caught.value.message
    return caught.value.message


def without_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "transformer/diffusion_pytorch_model.bin")


def in_a_variant(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "transformer/diffusion_pytorch_model.fp16.safetensors")


def torn(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])


def with_a_tensor_more(folder: Path) -> None:
    save_file({**load_file(folder / WEIGHTS), "more": torch.zeros(1)}, folder / WEIGHTS)


def scheduled(folder: Path) -> None:
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text("{}")
    change(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])


@pytest.mark.parametrize(
    ("amiss", "says"),
    [
        (lambda folder: change(folder / "model_index.json", _class_name="FluxFillPipeline"),
         "mine is FLUX.1 [schnell]; spark is FLUX.1 [schnell]. It goes with flux-schnell. It is a FluxFillPipeline,"),
        (lambda folder: change(folder / "transformer/config.json", num_attention_heads=8),
         "mine is not as spark is: its transformer has num_attention_heads 8, and spark has 4."),
        (lambda folder: change(folder / "transformer/config.json", auto_map={"AutoModel": "mine.Model"}),
         "mine has code of its own for its transformer, which is never run."),
        (without_weights, "Component 'transformer' has no plain safetensors weights, only diffusion_pytorch_model.bin. "
         "Save it as safetensors, without a variant."),
        (in_a_variant, "only diffusion_pytorch_model.fp16.safetensors."),
        (torn, "is no whole safetensors file: its tensors end at byte"),
        (with_a_tensor_more, "as spark is, but does not fit it (transformer: it has besides more)"),
        (scheduled, "mine has ['diffusers', 'DDIMScheduler'] as its scheduler, which is of another kind than"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "model_index.json is no JSON object."),
        (lambda folder: (folder / "model_index.json").unlink(), "neither a file nor a folder with model_index.json"),
    ],
)  # fmt: skip
def test_what_does_not_fit_or_is_unsafe_is_refused(amiss: Callable[[Path], Any], says: str, tmp_path: Path) -> None:
    amiss(denoiser(tmp_path / "checkpoints/mine"))
    assert says in refused(tmp_path)


def test_a_folder_of_another_family_is_refused_with_both_names(tmp_path: Path) -> None:
    other(SDXL, tmp_path / "mine")
    assert refused(tmp_path) == (
        "KINDLING_WEIGHTS: mine is SDXL with its VAE and text encoders; spark is FLUX.1 [schnell]. It goes with sdxl "
        "or sdxl-turbo or sdxl-lightning. It is a StableDiffusionXLPipeline, and what draws here is a FluxPipeline."
    )


def test_an_encoder_that_is_set_otherwise_is_refused_and_a_date_is_not(tmp_path: Path) -> None:
    spec = prepared(SDXL, tmp_path)
    folder = other(SDXL, tmp_path / "mine")
    change(folder / "text_encoder/config.json", transformers_version="4.1", attn_implementation="someone/kernel")
    over = overlay(["mine"], spec, model_source(spec, tmp_path), tmp_path)
    assert sorted(over.folders) == ["scheduler", "tokenizer", "tokenizer_2", "unet", "vae"]  # never an encoder's
    change(folder / "text_encoder/config.json", hidden_act="gelu")
    assert "its text_encoder has hidden_act 'gelu', and sdxl has" in refused(tmp_path, spec)


def test_a_single_vae_goes_before_a_folders_with_the_rows_settings(tmp_path: Path) -> None:
    spec = prepared(SDXL, tmp_path)
    folder = other(SDXL, tmp_path / "mine")
    shutil.copy(folder / "vae/diffusion_pytorch_model.safetensors", tmp_path / "vae.safetensors")
    over = overlay(["vae.safetensors", "mine"], spec, model_source(spec, tmp_path), tmp_path)
    assert [share.file.path.name for share in over.shares["vae"]] == ["vae.safetensors"]
    assert "vae" not in over.folders
