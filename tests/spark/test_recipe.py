"""The recipe runs end to end in miniature: every stage, a stop, a resumption, and a pipeline that draws."""

import random
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file

from spark import autoencoder, flow, polish, text, train

# torch.compile, which the trainer prepares, imports parts of torch that still use torch.jit
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),  # bf16 training
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder after its first stages, each a few steps long."""
    run = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BATCH", 8)
        patch.setattr(autoencoder, "POOL", 12)
        patch.setattr(autoencoder, "MEASURED", 1)
        patch.setattr(flow, "SHARDS", (((256, 256), 6), ((128, 192), 4)))
        text.train(run, 0.001)
        autoencoder.train(run, 0.001)
        autoencoder.refine(run, 0.001)
        flow.produce(run, seed=1, minutes=0.02)
    return run


def trainer(folder: Path, patch: pytest.MonkeyPatch) -> flow.Trainer:
    patch.setattr(flow, "BATCH", 4)
    made = flow.Trainer(folder, minutes=1, seed=0)
    made.compiled = made.model  # compiling takes longer than this whole test
    made.latents.refresh()
    return made


def test_training_stops_and_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trainer(folder, monkeypatch)
    for _ in range(6):  # both kinds of step
        loss = first.loss()
        assert torch.isfinite(loss)
        first.update(loss)
    first.elapsed = 7.5
    first.save()
    again = trainer(folder, monkeypatch)
    again.resume()
    assert (again.step, again.samples, again.elapsed) == (6, first.samples, 7.5)
    for old, new in zip(first.average.parameters(), again.average.parameters(), strict=True):
        assert torch.equal(old, new)
    again.update(again.loss())


def test_finished_weights_can_be_trained_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "SHIPPED", tmp_path / "shipped")
    shipped = flow.build()
    flow.export(flow.assemble(folder, shipped), tmp_path / "shipped")
    train.adopt(tmp_path / "run")
    again = trainer(tmp_path / "run", monkeypatch)
    again.resume()
    for old, new in zip(shipped.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(old, new.to(old.dtype))


def test_rolling_follows_the_sampler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the training says the sampler arrives is where diffusers' own scheduler arrives."""
    made = trainer(folder, monkeypatch)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # where it is, training rounds to bf16
    noise, words = torch.randn(1, 12, 16, 16), made.words.read(["a red circle"], 20)
    monkeypatch.setattr(made.rng, "choice", lambda options: 4)
    monkeypatch.setattr(made.rng, "randint", lambda low, high: 2)
    noisy, sigma = made._roll(noise, words)
    pipeline = flow.assemble(folder, made.model)
    seen: list[torch.Tensor] = []

    def keep(_: object, step: int, __: object, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(tensors["latents"])
        return tensors

    pipeline(
        "a red circle", height=256, width=256, num_inference_steps=4, guidance_scale=0.0, max_sequence_length=20,
        latents=flow.pack(noise), callback_on_step_end=keep, output_type="latent",
    )  # fmt: skip
    assert torch.allclose(sigma, pipeline.scheduler.sigmas[2])
    assert torch.allclose(flow.pack(noisy), seen[1], atol=1e-4)


def test_the_export_loads_as_a_plain_pipeline_in_one_dtype(folder: Path, tmp_path: Path) -> None:
    flow.export(flow.assemble(folder, flow.build()), tmp_path / "pipeline")
    pipeline = FluxPipeline.from_pretrained(tmp_path / "pipeline")
    parts = (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    assert {part.dtype for part in parts} == {torch.float32}


def test_polishing_trains_the_decoder_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    trainer(run, monkeypatch).save()
    monkeypatch.setattr(autoencoder, "MEASURED", 1)
    monkeypatch.setattr(polish, "DRAWN", 4)
    before = load_file(run / "vae" / "diffusion_pytorch_model.safetensors")
    polish.polish(run, 0.02)
    after = load_file(run / "vae" / "diffusion_pytorch_model.safetensors")
    changed = {name.partition(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"decoder"}
    pipeline = flow.finished(run)
    assert type(pipeline) is FluxPipeline


def test_an_artist_draws_what_its_scenes_say(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    trainer(run, monkeypatch).save()
    latents, scenes = polish.Artist(run).draw((256, 384), 3, random.Random(0))
    assert latents.shape == (3, 12, 24, 16)
    assert len(scenes) == 3


def test_case_does_not_matter_to_t5(folder: Path) -> None:
    words = flow.Words.load(folder)
    _, lower = words.read(["a red circle on a blue background"], 20)
    for said in ("A RED CIRCLE ON A BLUE BACKGROUND", "A Red Circle On A Blue Background"):
        pooled, tokens = words.read([said], 20)
        assert torch.allclose(tokens, lower, atol=1e-5)
        assert torch.isfinite(pooled).all()


def test_a_stage_that_was_interrupted_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it left: each makes the folder of its result first, and is stopped there once."""
    seen: list[str] = []

    def work(name: str, left: str, folder: Path, *_: object) -> None:
        (folder / left).mkdir(parents=True, exist_ok=True)
        seen.append(name)
        if seen.count(name) == 1:
            raise KeyboardInterrupt

    for module, function, left in (
        (autoencoder, "train", "vae"),
        (autoencoder, "refine", "vae"),
        (text, "train", "text_encoder_2"),
        (train, "_produce", "latents"),
        (polish, "polish", "vae"),
    ):
        monkeypatch.setattr(module, function, partial(work, f"{module.__name__}.{function}", left))
    monkeypatch.setattr(flow, "train", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["train", "--folder", str(tmp_path / "run")])
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            train.main()
    train.main()
    train.main()
    assert [seen.count(name) for name in dict.fromkeys(seen)] == [2] * 5


def test_an_autoencoder_is_saved_whole_or_not(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder / "vae", tmp_path / "vae")
    vae = autoencoder.build()

    def torn(part: Path) -> None:
        part.mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(vae, "save_pretrained", torn)
        with pytest.raises(KeyboardInterrupt):
            autoencoder.save(vae, tmp_path)
    before = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors").keys() == before.keys()
    autoencoder.save(vae, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]
