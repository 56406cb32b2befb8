"""The FLUX family on real pipelines: the embedded spark, and a FLUX.1 built from configs with random weights."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PATIENT
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from handler import MODELS, ImageRequest, Recipe, Worker
from handler.core.errors import Cancelled, NumericalError, StartError
from handler.volume.manifest import write_manifest
from handler.volume.sources import EMBEDDED, fetched_folder, model_source

SPARK = MODELS["spark"]


def recipe(
    seed: int = 1, size: tuple[int, int] = (256, 256), prompt: str = "a red circle on a blue background"
) -> Recipe:
    return SPARK.recipe(ImageRequest(prompt=prompt, seed=seed, width=size[0], height=size[1]))


def digest(worker: Worker, wanted: Recipe) -> str:
    rgb = worker.generate(wanted)[0].rgb
    return hashlib.sha256(np.ascontiguousarray(rgb)).hexdigest()


@pytest.fixture(scope="session")
def tiny_dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume with a real guidance-embedding FLUX.1 of random weights where flux-dev belongs."""
    volume = tmp_path_factory.mktemp("volume")
    spec = MODELS["flux-dev"]
    torch.manual_seed(0)
    shipped = FluxPipeline.from_pretrained(EMBEDDED / "spark", local_files_only=True)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=96, pooled_projection_dim=96, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4), latent_channels=4, norm_num_groups=2, layers_per_block=1,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.36, shift_factor=0.11,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    components = {**shipped.components, "transformer": transformer, "vae": vae, "scheduler": scheduler}
    FluxPipeline(**components).save_pretrained(fetched_folder(spec, volume))
    write_manifest(fetched_folder(spec, volume), {"model": spec.id})
    return volume


def test_spark_is_a_plain_flux_pipeline_below_10_mb_in_bf16() -> None:
    folder = model_source(SPARK, Path("unused")).folder
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 11e6  # the text encoders are in fp32
    assert 2 * (SPARK.parameters + SPARK.other_parameters) < 10e6
    pipeline = FluxPipeline.from_pretrained(folder)
    assert type(pipeline) is FluxPipeline
    models = (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae)
    own, *others = (sum(p.numel() for p in model.parameters()) for model in models)
    assert (own, sum(others)) == pytest.approx((SPARK.parameters, SPARK.other_parameters), abs=5000)  # as rounded
    image = pipeline("a red circle", height=256, width=256, num_inference_steps=1, guidance_scale=0.0).images[0]
    assert image.size == (256, 256)


def test_same_seed_same_picture_whatever_came_between(spark: Worker) -> None:
    first = digest(spark, recipe())
    assert digest(spark, recipe(seed=2)) != first
    digest(spark, recipe(size=(384, 256), prompt="three green stars on a white background"))
    assert digest(spark, recipe()) == first


def test_same_picture_after_a_restart(spark: Worker) -> None:
    assert digest(Worker.boot(PATIENT), recipe()) == digest(spark, recipe())


@pytest.mark.parametrize("size", [(64, 64), (100, 70), (256, 384), (65, 333)])
def test_exactly_the_asked_size(spark: Worker, size: tuple[int, int]) -> None:
    rgb = spark.generate(recipe(size=size))[0].rgb
    assert rgb.shape == (size[1], size[0], 3)
    assert rgb.dtype == np.uint8
    assert rgb.flags.c_contiguous


def test_agrees_with_the_bare_pipeline(spark: Worker) -> None:
    """Our decode is the pipeline's own, to the last bit but rounding."""
    pipeline = FluxPipeline.from_pretrained(model_source(SPARK, Path("unused")).folder, dtype=torch.float32)
    image = pipeline(
        recipe().prompt, height=256, width=256, num_inference_steps=4, guidance_scale=0.0, max_sequence_length=32,
        generator=torch.Generator().manual_seed(1),
    ).images[0]  # fmt: skip
    assert np.abs(np.asarray(image).astype(int) - spark.generate(recipe())[0].rgb).max() <= 1


def test_an_exception_in_a_step_stops_the_run_and_leaves_no_trace(spark: Worker) -> None:
    before, steps = digest(spark, recipe()), []

    def stop(done: int, _: object) -> None:
        steps.append(done)
        if done == 2:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        spark.generate(recipe(), stop)
    assert steps == [1, 2]
    assert digest(spark, recipe()) == before


def nan(parameter: torch.nn.Parameter) -> None:
    parameter.data.fill_(float("nan"))


def very_dark(parameter: torch.nn.Parameter) -> None:
    parameter.data.fill_(-1e6)


@pytest.mark.parametrize(("spoil", "message"), [(nan, "NaN"), (very_dark, "all-black")])
def test_no_broken_picture_is_ever_an_answer(spoil: Callable[[torch.nn.Parameter], None], message: str) -> None:
    worker = Worker.boot(PATIENT)
    spoil(worker._pipeline.vae.decoder.conv_out.bias)
    with pytest.raises(NumericalError, match=message):
        worker.generate(recipe())


def test_flux_dev_runs_through_the_same_worker(tiny_dev: Path) -> None:
    worker = Worker.boot(PATIENT.model_copy(update={"model": "black-forest-labs/FLUX.1-dev", "volume": tiny_dev}))
    request = ImageRequest(prompt="x", width=72, height=64, num_inference_steps=3, seed=1)
    low, high = (worker.spec.recipe(request.model_copy(update={"guidance_scale": g})) for g in (1.0, 9.0))
    assert worker.generate(low)[0].rgb.shape == (64, 72, 3)
    assert digest(worker, low) != digest(worker, high)
    assert digest(worker, low) == digest(worker, low)


@pytest.mark.parametrize("damage", ["truncated", "pickle", "missing"])
def test_damaged_weights_fail_the_boot(tiny_dev: Path, tmp_path: Path, damage: str) -> None:
    import shutil

    volume = tmp_path / "volume"
    shutil.copytree(tiny_dev, volume)
    weights = next((volume / "models").rglob("transformer/*.safetensors"))
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        weights.unlink()
    if damage == "pickle":
        weights.with_suffix(".bin").write_bytes(b"never to be unpickled")
    with pytest.raises(StartError, match="flux-dev"):
        Worker.boot(PATIENT.model_copy(update={"model": "flux-dev", "volume": volume}))


def test_missing_weights_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"python -m handler fetch flux-schnell"):
        Worker.boot(PATIENT.model_copy(update={"model": "flux-schnell", "volume": tmp_path}))


def test_bf16_is_repeatable_and_close_to_fp32(spark: Worker) -> None:
    """The promise in bf16 is per batch shape; the batch is always one, so a seed repeats exactly."""
    worker = Worker.boot(PATIENT.model_copy(update={"precision": "bf16"}))
    assert digest(worker, recipe()) == digest(worker, recipe())
    difference = worker.generate(recipe())[0].rgb.astype(int) - spark.generate(recipe())[0].rgb
    assert np.abs(difference).mean() < 6


@pytest.mark.parametrize("task", ["FluxImg2ImgPipeline", "FluxInpaintPipeline"])
def test_image_to_image_and_inpainting_share_the_components(spark: Worker, task: str) -> None:
    import diffusers
    from PIL import Image

    source = Image.fromarray(spark.generate(recipe())[0].rgb)
    shared = dict(spark._pipeline.components)
    pipeline = getattr(diffusers, task)(**shared)
    pipeline.set_progress_bar_config(disable=True)
    mask = {} if "Img2Img" in task else {"mask_image": Image.new("L", source.size, 255)}
    before = digest(spark, recipe())
    image = pipeline(
        "a green circle on a blue background", image=source, height=256, width=256, strength=0.8,
        num_inference_steps=4, guidance_scale=0.0, max_sequence_length=32, generator=torch.Generator().manual_seed(0),
        **mask,
    ).images[0]  # fmt: skip
    assert image.size == (256, 256)
    assert np.asarray(image).std() > 5
    assert digest(spark, replace(recipe(), seed=1)) == before
