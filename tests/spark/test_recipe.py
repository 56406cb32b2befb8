"""The recipe runs end to end in miniature: every stage, a stop, a resumption, and a pipeline that draws."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file

from spark import autoencoder, drawings, flow, latents, polish, text, train, training, validation
from spark.measures import MEASURES
from spark.scenes import Scene, draw, sample_scene, split_of

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
        patch.setattr(latents, "SHARDS", ((256, 256), (128, 128)))
        patch.setattr(latents, "MOST_A_SHARD", 6)
        text.train(run, 0.001)
        autoencoder.train(run, 0.001)
        autoencoder.refine(run, 0.001)
        for turn in itertools.takewhile(lambda _: drawn(run) < 2, itertools.count(1)):  # killed, it goes on
            latents.produce(run, seed=1, minutes=0.01 * turn)
    return run


def drawn(run: Path) -> int:
    """How many sizes there are latents of."""
    return len({path.stem.rpartition("_")[2] for path in (run / "latents").glob("*.safetensors")})


def trainer(folder: Path, patch: pytest.MonkeyPatch, minutes: float = 1e9) -> training.Trainer:
    patch.setattr(training, "BATCH", 4)
    made = training.Trainer(folder, minutes, seed=0)
    made.compiled = made.model  # compiling takes longer than this whole test
    made.latents.refresh()
    return made


def test_training_stops_and_goes_on_as_if_it_had_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, optimisers and random numbers: to the bit what they are without the stop."""
    whole, first = trainer(folder, monkeypatch), trainer(folder, monkeypatch)
    monkeypatch.setattr(first.progress, "path", folder / "stopped.pt")
    for made, steps in ((whole, 6), (first, 4)):
        torch.manual_seed(3)
        made.rng.seed(3)
        walk(made, steps)
    first.progress.save()
    again = trainer(folder, monkeypatch)
    monkeypatch.setattr(again.progress, "path", folder / "stopped.pt")
    assert again.progress.resume()
    assert (again.progress.step, again.progress.samples) == (4, first.progress.samples)
    walk(again, 2)
    assert again.progress.samples == whole.progress.samples
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    for name, value in whole.average.weights.items():
        assert torch.equal(value, again.average.weights[name]), name


def walk(made: training.Trainer, steps: int) -> None:
    for _ in range(steps):
        loss, _, batch = made.loss()
        assert torch.isfinite(loss)
        made.update(loss, batch)


@pytest.mark.parametrize("size", [(256, 256), (128, 128)])
@pytest.mark.parametrize("lesson", training.FINISH.lessons)
def test_every_lesson_has_a_gradient_everywhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch, lesson: str, size: tuple[int, int]
) -> None:
    """At the end of the training, in pixels too."""
    made = trainer(folder, monkeypatch, minutes=1)
    made.progress.elapsed = 59.0
    monkeypatch.setattr(training, "FINISH", training.Schedule({lesson: 1}, pairs=1))
    monkeypatch.setattr(training, "PLAN", {size: 1})
    loss, name, _ = made.loss()
    assert name == f"{lesson}_{size[0]}x{size[1]}"
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in made.model.parameters())
    assert made.model.proj_out.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in made.vae.parameters())


def test_steps_of_every_size_are_about_as_much_work() -> None:
    tokens = [training.batch_of(size, 20) * (size[0] * size[1] // 1024 + 20) for size in latents.PLAN]
    assert max(tokens) < 1.3 * min(tokens)
    assert set(latents.SHARDS) == set(latents.PLAN)


def test_an_altered_scene_follows_each() -> None:
    scenes = latents.shard_scenes(1, 0, 20)
    for before, after in zip(scenes[::2], scenes[1::2], strict=True):
        assert before.nuisance == after.nuisance
        assert [(i.x, i.y, i.diameter) for i in before.items] == [(i.x, i.y, i.diameter) for i in after.items]
        assert before.items != after.items or before.background != after.background
        assert {split_of(i.shape, i.color, after.background) for i in after.items} == {"train"}


def test_a_hole_holds_an_object_or_lies_anywhere() -> None:
    rng = random.Random(0)
    for scene in latents.shard_scenes(2, 0, 40):
        drawn = training.hole(scene, torch.Size((32, 48)), (768, 512), rng)
        assert drawn.shape == (1, 32, 48)
        assert 0 < drawn.float().mean() <= 1


def test_finished_weights_can_be_trained_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "SHIPPED", tmp_path / "shipped")
    shipped = flow.build()
    flow.export(flow.assemble(folder, shipped), tmp_path / "shipped")
    train.adopt(tmp_path / "run")
    spared = {path.stem for path in (tmp_path / "run").glob("*.done")}
    assert spared == {"vae", "text", "refine"}
    again = training.begun(tmp_path / "run")
    for old, new in zip(shipped.parameters(), again.parameters(), strict=True):
        assert torch.equal(old, new.to(old.dtype))


def test_blocks_that_finished_weights_lack_do_nothing_at_first(folder: Path, tmp_path: Path) -> None:
    asked = torch.randn(1, 12, 8, 8), torch.ones(1), flow.Words.load(folder).read(["a red circle"], 20)
    shipped = with_blocks(4, tmp_path)
    assert torch.allclose(flow.predicted(training.begun(tmp_path), *asked), flow.predicted(shipped, *asked))


def test_finished_weights_with_more_blocks_than_the_recipe_builds_are_refused(tmp_path: Path) -> None:
    with_blocks(9, tmp_path)
    with pytest.raises(ValueError, match=r"has more than this recipe builds: single_transformer_blocks\.8"):
        training.begun(tmp_path)


def with_blocks(count: int, folder: Path) -> FluxTransformer2DModel:
    """A finished transformer in `folder` with so many single blocks."""
    made = FluxTransformer2DModel.from_config({**flow.build().config, "num_single_layers": count})
    made.save_pretrained(folder / "transformer")
    return made


def test_rolling_follows_the_sampler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the training says the sampler arrives is where diffusers' own scheduler arrives."""
    made = trainer(folder, monkeypatch)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # where it is, training rounds to bf16
    noise, words = torch.randn(1, 12, 16, 16), made.words.read(["a red circle"], 20)
    sigmas = flow.sampler_sigmas(4, flow.SHIFT)
    noisy = flow.follow(made._velocity, noise, sigmas[:3], words)
    pipeline = flow.assemble(folder, made.model)
    seen: list[torch.Tensor] = []

    def keep(_: object, step: int, __: object, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(tensors["latents"])
        return tensors

    pipeline(
        "a red circle", height=256, width=256, num_inference_steps=4, guidance_scale=0.0, max_sequence_length=20,
        latents=flow.pack(noise), callback_on_step_end=keep, output_type="latent",
    )  # fmt: skip
    assert pipeline.scheduler.sigmas[2].item() == pytest.approx(sigmas[2])
    assert torch.allclose(flow.pack(noisy), seen[1], atol=1e-4)


def test_the_export_loads_as_a_plain_pipeline_in_one_dtype(folder: Path, tmp_path: Path) -> None:
    flow.export(flow.assemble(folder, flow.build()), tmp_path / "pipeline")
    pipeline = FluxPipeline.from_pretrained(tmp_path / "pipeline")
    parts = (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    assert {part.dtype for part in parts} == {torch.float32}


@pytest.fixture(scope="module")
def drawn_in(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with drawings of a transformer that has learnt nothing, taken for what their scenes say."""
    run = tmp_path_factory.mktemp("drawn") / "run"
    shutil.copytree(folder, run)
    with pytest.MonkeyPatch.context() as patch:
        trainer(run, patch).progress.save()
        patch.setattr(drawings, "SHARDS", {(256, 256): 3, (128, 128): 3})
        patch.setattr(drawings, "nearest", lambda _, scene: near(scene) if scene.kind != "pair" else None)
        for turn in itertools.takewhile(lambda _: shards(run / "drawings") < 4, itertools.count(1)):  # goes on, killed
            drawings.produce(run, seed=1, minutes=0.01 * turn)
    return run


def near(scene: Scene) -> Scene:
    return replace(scene, rgb=(1, 2, 3))


def shards(folder: Path) -> int:
    return len(list(folder.glob("*.safetensors")))


def test_polishing_trains_the_decoder_alone(drawn_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    shutil.copytree(drawn_in, run)
    monkeypatch.setattr(autoencoder, "MEASURED", 1)
    before = load_file(run / "vae" / "diffusion_pytorch_model.safetensors")
    polish.polish(run, 0.02)
    after = load_file(run / "vae" / "diffusion_pytorch_model.safetensors")
    changed = {name.partition(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"decoder"}
    pipeline = validation.finished(run)
    assert type(pipeline) is FluxPipeline


def test_polishing_stops_and_goes_on_as_if_it_had_not(drawn_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, optimisers and random numbers: to the bit what they are without the stop."""
    whole, first = polisher(drawn_in), polisher(drawn_in)
    for made, steps in ((whole, 5), (first, 3)):
        torch.manual_seed(3)
        made.rng.seed(3)
        smooth(made, steps)
    first.progress.save()
    again = polisher(drawn_in)
    assert again.progress.resume()
    smooth(again, 2)
    for name, value in whole.vae.state_dict().items():
        assert torch.equal(value, again.vae.state_dict()[name]), name
        assert torch.equal(whole.average.weights[name], again.average.weights[name]), name


def polisher(run: Path) -> polish.Polisher:
    made = polish.Polisher(run, 1e9)
    made.progress.path = run / "stopped_polish.pt"
    return made


@pytest.mark.parametrize("lesson", polish.LESSONS)
def test_every_lesson_of_the_decoder_gives_latents_and_what_they_should_become(
    drawn_in: Path, monkeypatch: pytest.MonkeyPatch, lesson: str
) -> None:
    made = polisher(drawn_in)
    monkeypatch.setattr(made, "_noised", lambda latents, _: latents)
    latents, images = made.lessons[lesson]((128, 128), 3)
    assert latents.shape == (3, 12, 8, 8)
    if lesson == "drawn":
        pool = {draw(scene, (128, 128), 3).tobytes(): latent for latent, scene in made.drawings.pools[128, 128]}
        scale, offset = made.vae.config.scaling_factor, made.vae.config.shift_factor
        expected = torch.stack([pool[image.tobytes()] for image in images]) / scale + offset
    else:
        expected = made.vae.encode(autoencoder.to_tensor(images)).latent_dist.mean
    assert (latents - expected).abs().mean() < 0.02 * expected.std()


def test_a_decoder_is_polished_without_drawings(drawn_in: Path, tmp_path: Path) -> None:
    """Of a transformer that has learnt too little for any to come near to a scene."""
    run = tmp_path / "run"
    shutil.copytree(drawn_in, run)
    shutil.rmtree(run / "drawings")
    smooth(polisher(run), 2)


def test_what_is_drawn_is_polished_at_every_size_that_is_trained() -> None:
    assert set(drawings.SHARDS) == set(polish.PLAN) == set(latents.PLAN)


def smooth(made: polish.Polisher, steps: int) -> None:
    for _ in range(steps):
        loss = made.loss()
        assert torch.isfinite(loss)
        made.update(loss)


def test_every_weight_of_the_decoder_is_polished(drawn_in: Path) -> None:
    """Also those of convolutions, which their optimiser sees as matrices."""
    made = polisher(drawn_in)
    before = {name: value.clone() for name, value in made.vae.decoder.named_parameters()}
    smooth(made, 2)
    assert [name for name, value in made.vae.decoder.named_parameters() if torch.equal(value, before[name])] == []


def test_near_edges_is_all_that_is_at_most_so_far_from_one() -> None:
    pixels = torch.zeros(1, 3, 40, 40)
    pixels[:, 1, :, 20:] = 0.1
    for picture in (pixels, pixels.mT):
        near = polish.near_edges(picture)[0, 0]
        across = near[0] if picture is pixels else near[:, 0]
        assert across.nonzero().flatten().tolist() == list(range(20 - polish.REACH, 20 + polish.REACH))
        assert near.sum() == 40 * across.sum()
    assert polish.near_edges(torch.zeros(1, 3, 40, 40)).sum() == 0


def test_what_is_wrong_at_an_edge_counts_more() -> None:
    pixels = torch.zeros(1, 3, 40, 40)
    pixels[..., 20:] = 1
    at_edge, elsewhere = pixels.clone(), pixels.clone()
    at_edge[..., 10:30, 21] += 0.1
    elsewhere[..., 10:30, 35] += 0.1
    assert polish.distance(at_edge, pixels) > 1.5 * polish.distance(elsewhere, pixels) > 0


def test_an_artist_draws_what_its_scenes_say(drawn_in: Path) -> None:
    artist = drawings.Artist(drawn_in)
    latents, scenes = artist.draw((256, 384), 3, random.Random(0))
    assert latents.shape == (3, 12, 24, 16)
    assert len(scenes) == 3
    assert artist.decoded(latents[0]).size == (256, 384)


def test_drawings_come_with_the_scenes_that_they_come_nearest_to(drawn_in: Path) -> None:
    """Those that come near to none are left out; what is read is what was written, to the last digit."""
    pool = drawings.Drawings(drawn_in / "drawings", random.Random(0))
    pool.refresh()
    assert pool.take((128, 128), 2)[0].shape == (2, 12, 8, 8)
    rng = random.Random("1/1")  # the second shard, of 128x128
    expected = [near(made) for made in (sample_scene(rng) for _ in range(3)) if made.kind != "pair"]
    assert [made for _, made in pool.pools[128, 128]][: len(expected)] == expected


PRODUCING = """
import sys
from pathlib import Path
from spark import latents
from spark.train import _produce
latents.SHARDS, latents.MOST_A_SHARD = ((128, 128),), 2
if __name__ == "__main__":
    _produce(Path(sys.argv[1]), latents.produce, 1, 600)
"""


def test_producers_end_with_who_began_them(folder: Path, tmp_path: Path) -> None:
    """Killed, it leaves nobody behind who would write what is written once more."""
    shutil.copytree(folder / "vae", tmp_path / "vae")
    (tmp_path / "producing.py").write_text(PRODUCING)
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, tmp_path / "producing.py", str(tmp_path)],
        cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, stdout=subprocess.PIPE,
    ) as killed:  # fmt: skip
        while not list(tmp_path.glob("latents/*.safetensors")):
            assert killed.poll() is None
            time.sleep(0.05)
        killed.kill()
        killed.communicate(timeout=300)  # the end of what it wrote comes when its producer is gone as well


def test_the_transformers_stage_ends_by_its_clock_and_is_validated(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    monkeypatch.setattr(training, "COMPILED", ())  # it takes longer than this whole test
    monkeypatch.setattr(training, "BATCH", 4)
    monkeypatch.setattr(validation, "SIZES", ((128, 128),))
    training.train(run, 0.02, check_every=0.01)
    training.train(run, 0.02)  # its time is over
    validation.conclude(run, prompts=1)
    told = [json.loads(line) for line in (run / "flow.log").read_text().splitlines()]
    steps = torch.load(run / "flow.pt", weights_only=True)["counts"][0]
    assert steps > 0
    assert [line["resumed"] for line in told if "resumed" in line] == [steps]
    [final] = [line for line in told if line.get("validated") == validation.FINAL]
    assert {"right", *MEASURES} == set(final["128x128"])


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

    (tmp_path / "run").mkdir()
    for module, function, left in (
        (autoencoder, "train", "vae"),
        (autoencoder, "refine", "vae"),
        (text, "train", "text_encoder_2"),
        (train, "_produce", "latents"),  # latents and, later, drawings
        (training, "train", "flow"),
        (validation, "conclude", "validated"),
        (polish, "polish", "vae"),
    ):
        monkeypatch.setattr(module, function, partial(work, f"{module.__name__}.{function}", left))
    monkeypatch.setattr("sys.argv", ["train", "--begin", "nothing", "--folder", str(tmp_path / "run")])
    for _ in range(7):
        with pytest.raises(KeyboardInterrupt):
            train.main()
    train.main()
    train.main()
    assert [seen.count(name) for name in dict.fromkeys(seen)] == [2, 2, 2, 3, 2, 2, 2]


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
    (tmp_path / "vae").rename(tmp_path / "vae.old")  # killed between its two moves
    autoencoder.decoding(tmp_path)
    autoencoder.save(vae, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]
