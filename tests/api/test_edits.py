"""Edits: images drawn anew in part, or where a mask says, by every family's pipelines; and all ways they come in."""

import asyncio
import base64
import functools
import hashlib
import io
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai as client_library
import pytest
import torch
from conftest import PATIENT, unwarmed
from diffusers import Flux2KleinPipeline
from PIL import Image
from starlette.datastructures import Headers
from test_cli import kindling
from test_families import NOISE_LEFT, PERFECT, differ, packed
from test_images import exif, moving, png_of, saved, text, url

import tiny
from handler import MODELS, Api, Engine, ImageRequest, ModelSpec, Worker
from handler.api import codec, references
from handler.api.dialects import edits as dialect
from handler.core.errors import (
    Cancelled,
    InvalidType,
    InvalidValue,
    KindlingError,
    OutOfRange,
    RequestError,
    Unsupported,
)
from handler.core.recipe import Mask, Reference
from handler.model.families import edits, schedulers
from handler.model.preview import Projection
from handler.server import multipart
from handler.volume.sources import fetched_folder
from serving import Served
from spark.checker import look

SPARK, KLEIN, FLUX2 = MODELS["spark"], MODELS["flux2-klein"], MODELS["flux2-dev"]
ROWS = list(MODELS.values())
REDRAWING = [spec for spec in ROWS if not spec.max_images]
MASKED = [spec for spec in ROWS if spec.masked_pixels]
of = pytest.mark.parametrize
WAYS = [
    pytest.param(spec, name, masked, id=f"{spec.id}-{name}-{'masked' if masked else 'whole'}")
    for masked, specs in ((False, REDRAWING), (True, MASKED))
    for spec in specs
    for name in spec.edit_schedulers
    if (spec.id, name) not in NOISE_LEFT  # what is left differs, for an edit's noise comes after its image's sample
]
WIDE, HIGH = 100, 72  # on no model's grid
RNG = np.random.default_rng(0)
ONE, OTHER = (Reference(RNG.integers(0, 256, (HIGH, WIDE, 3), np.uint8), str(i)) for i in range(2))
KEPT = np.full((HIGH, WIDE), 255, np.uint8)
KEPT[20:50, 30:71], KEPT[20:50, 71] = 0, 128
MASK = Mask(KEPT, "mask")


def each(spec: ModelSpec) -> str:
    return spec.id


@pytest.fixture(scope="module")
def boot(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Worker]:
    """Boots a worker for a row, once, from tiny weights."""
    volume = tmp_path_factory.mktemp("volume")

    @functools.cache
    def booted(model: str) -> Worker:
        if not MODELS[model].embedded and not fetched_folder(MODELS[model], volume).exists():
            tiny.write(MODELS[model], volume)
        with unwarmed():
            return Worker.boot(PATIENT.model_copy(update={"model": model, "volume": volume, "compile": "off"}))

    return booted


def recipe_of(spec: ModelSpec, images: tuple[Reference, ...] = (ONE,), mask: Mask | None = None, **fields: Any) -> Any:
    asked = {"prompt": "a red circle", "seed": 1, "num_inference_steps": min(4, spec.max_steps)} | fields
    request = ImageRequest(**asked, images=(b"x",) * len(images), mask=b"x" if mask else None)
    return spec.recipe(request, images, mask=mask)


def drawn(worker: Worker, *given: Any, **fields: Any) -> Any:
    return worker.generate(recipe_of(worker.spec, *given, **fields))[0].rgb.astype(int)


@of("spec", REDRAWING, ids=each)
def test_an_image_is_drawn_anew_in_part(spec: ModelSpec, boot: Callable[[str], Worker]) -> None:
    worker = boot(spec.id)
    first = drawn(worker, strength=0.5)
    assert first.shape == (HIGH, WIDE, 3)
    assert (drawn(worker, strength=0.5) == first).all()
    assert differ(drawn(worker, (OTHER,), strength=0.5), first)
    assert differ(drawn(worker, strength=0.5, seed=2), first)
    assert (drawn(worker, strength=0.75) != first).any()


@of("spec", REDRAWING, ids=each)
def test_strength_is_where_the_steps_begin(
    spec: ModelSpec, boot: Callable[[str], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, make, seen = boot(spec.id), schedulers.make, []

    def watched(*given: Any) -> Any:
        scheduler = make(*given)
        step = scheduler.step

        @functools.wraps(step)
        def watch(output: Any, timestep: Any, *rest: Any, **options: Any) -> Any:
            seen.append(float(timestep))
            return step(output, timestep, *rest, **options)

        scheduler.step = watch
        return scheduler

    monkeypatch.setattr(schedulers, "make", watched)

    def steps(*given: Any, **fields: Any) -> list[float]:
        seen.clear()
        drawn(worker, *given, **fields)
        return list(seen)

    of_text, whole = steps((), width=128, height=128), steps(strength=1.0, width=128, height=128)
    half, quarter = steps(strength=0.5), steps(strength=0.25)
    assert whole == of_text
    assert whole[0] > half[0] > quarter[0]
    assert (len(whole), len(half), len(quarter)) == (4, 2, 1)
    assert steps((ONE,), MASK, strength=0.5) == half
    assert steps(strength=0.01) == quarter


@of("spec", REDRAWING, ids=each)
def test_at_strength_1_nothing_is_left_but_of_epsilon_models(spec: ModelSpec, boot: Callable[[str], Worker]) -> None:
    """As the guide says: their noise is finite, a flow's begins as nothing else."""
    first, second = (
        drawn(boot(spec.id), (image,), strength=1.0, num_inference_steps=spec.min_steps) for image in (ONE, OTHER)
    )
    assert (first == second).all() == ("flow-match-euler" in spec.schedulers)


@of("spec", MASKED, ids=each)
def test_outside_the_mask_nothing_changes(spec: ModelSpec, boot: Callable[[str], Worker]) -> None:
    worker, inside = boot(spec.id), KEPT < 255
    first = drawn(worker, (ONE,), MASK)
    assert (first[~inside] == ONE.rgb[~inside]).all()
    assert np.abs(first - ONE.rgb)[inside].mean() > 20
    assert (drawn(worker, (ONE,), MASK) == first).all()
    for other in (drawn(worker, (ONE,), MASK, seed=2), drawn(worker, (ONE,), MASK, prompt="yellow stars")):
        assert differ(other[inside], first[inside])
        assert (other[~inside] == first[~inside]).all()


@of("spec", MASKED, ids=each)
def test_what_is_around_the_mask_matters(spec: ModelSpec, boot: Callable[[str], Worker]) -> None:
    first, second = (drawn(boot(spec.id), (image,), MASK)[KEPT == 0] for image in (ONE, OTHER))
    assert (first != second).any()


def noise(width: int, height: int) -> Reference:
    return Reference(RNG.integers(0, 256, (height, width, 3), np.uint8), "")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Callable[[Worker], list[torch.Tensor]]:
    """Notes what a worker's VAE is given to decode."""

    def watched(worker: Worker) -> list[torch.Tensor]:
        kind, seen = type(worker._pipeline.vae), []
        decode = kind.decode

        def decoding(vae: Any, latents: torch.Tensor, *given: Any, **options: Any) -> Any:
            seen.append(latents.clone())
            return decode(vae, latents, *given, **options)

        monkeypatch.setattr(kind, "decode", decoding)
        return seen

    return watched


@of("spec", MASKED, ids=each)
def test_a_hole_of_any_place_is_drawn_anew_whole(
    spec: ModelSpec, boot: Callable[[str], Worker], decoded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a perfect predictor, not one latent that a hole touches keeps any of the image, and others keep it."""
    worker = boot(spec.id)
    seen = decoded(worker)
    perfect = PERFECT.get(spec.family.rpartition(".")[2], packed)
    monkeypatch.setattr(getattr(worker._pipeline, worker._family.DENOISER), "forward", perfect)
    image, kept = noise(128, 96), np.full((96, 128), 255, np.uint8)
    for x, y in ((0, 0), (17, 33), (46, 31), (127, 95)):
        kept[y, x] = 254
    drawn(worker, (image,), Mask(np.zeros_like(kept), ""))
    drawn(worker, (image,), Mask(kept, ""))
    whole, holes = (latents.flatten(0, -3) for latents in seen)
    cell = 128 // whole.shape[-1]
    touched = (kept < 255).reshape(96 // cell, cell, 128 // cell, cell).any((1, 3))
    equal = (whole - holes).abs().amax(0).numpy() < 1e-4
    assert equal[touched].all()
    assert equal.mean() < 0.3  # the rest is the image's, of each token that was not touched


def test_half_kept_is_half_of_both(boot: Callable[[str], Worker]) -> None:
    recipe, red = recipe_of(SPARK, (ONE,), MASK), np.zeros((HIGH, WIDE, 3), np.uint8)
    found = edits.pasted(red, recipe).astype(int)[20:50, 71]
    assert np.abs(found - ONE.rgb[20:50, 71].astype(int) * 128 / 255).max() <= 1


@of("spec", [spec for spec in ROWS if spec not in (FLUX2,)], ids=each)
def test_no_second_copy_of_weights(spec: ModelSpec, boot: Callable[[str], Worker]) -> None:
    worker = boot(spec.id)
    before, pipeline = worker.weight_bytes, worker._pipeline
    own = dict(pipeline.components)
    for mask in (None, MASK) if not spec.max_images else (MASK,):
        made = edits.pipeline_for(recipe_of(spec, (ONE,), mask), worker._family, pipeline)
        assert made is not pipeline
        assert all(part is own[name] for name, part in made.components.items())
        drawn(worker, (ONE,), mask)
    assert pipeline.components == own
    assert all(part is own[name] for name, part in pipeline.components.items())
    assert worker.weight_bytes == before


@of("mask", [None, MASK], ids=["whole", "masked"])
@of("spec", REDRAWING, ids=each)
def test_cancelling_midway_leaves_no_trace(spec: ModelSpec, mask: Mask | None, boot: Callable[[str], Worker]) -> None:
    worker, steps = boot(spec.id), []
    before = drawn(worker, (ONE,), mask)
    plain = worker.generate(spec.recipe(ImageRequest(prompt="x", seed=1, width=64, height=64)))[0].rgb

    def stop(done: int, _: object) -> None:
        steps.append(done)
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        worker.generate(recipe_of(spec, (ONE,), mask), stop)
    assert len(steps) == 1
    assert (drawn(worker, (ONE,), mask) == before).all()
    assert (worker.generate(spec.recipe(ImageRequest(prompt="x", seed=1, width=64, height=64)))[0].rgb == plain).all()


@of(("spec", "name", "masked"), WAYS)
def test_every_allowed_scheduler_solves_what_the_model_predicts(
    spec: ModelSpec, name: str, masked: bool, boot: Callable[[str], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a perfect predictor, edits end where drawing from text ends, with the same pixels."""
    mask = Mask(np.zeros((96, 128), np.uint8), "") if masked else None
    worker, image = boot(spec.id), Reference(np.zeros((96, 128, 3), np.uint8), "")
    perfect = PERFECT.get(spec.family.rpartition(".")[2], packed)
    monkeypatch.setattr(getattr(worker._pipeline, worker._family.DENOISER), "forward", perfect)
    steps = {"num_inference_steps": min(spec.max_steps, 8), "scheduler": name}
    wanted = drawn(worker, (), width=128, height=96, **steps)
    for strength in (1.0, 0.5):
        assert np.abs(drawn(worker, (image,), mask, strength=strength, **steps) - wanted).max() <= 1


@of("model", ["flux-dev", "sdxl", "qwen-image"])
def test_edits_are_the_same_when_weights_wait_in_host_memory(model: str, boot: Callable[[str], Worker]) -> None:
    resident = boot(model)
    volume = Path(resident.ledger.weights).parents[2]
    update = {"model": model, "volume": volume, "compile": "off", "offload": "blocks"}
    streaming = Worker.boot(PATIENT.model_copy(update=update))
    assert streaming.memory.mode == "blocks"
    for mask in (None, MASK):
        assert np.abs(drawn(streaming, (ONE,), mask) - drawn(resident, (ONE,), mask)).max() <= 1


@of("mask", [None, MASK], ids=["whole", "masked"])
def test_an_edit_with_previews_tiles_and_a_step_cache(mask: Mask | None, boot: Callable[[str], Worker]) -> None:
    worker, shown, before = boot("flux-dev"), [], drawn(boot("flux-dev"), (ONE,), mask)
    request = ImageRequest(
        prompt="a red circle", seed=1, num_inference_steps=10, images=(b"x",), mask=b"x" if mask else None,
        step_cache={"R": 1, "W": 1}, strength=0.8,
    )  # fmt: skip
    cached = worker.spec.recipe(request, (ONE,), "on", mask)
    whole = replace(cached, step_cache=None)
    pictures = [worker.generate(each, lambda _, preview: shown.append(preview()))[0].rgb for each in (cached, whole)]
    assert (pictures[0] != pictures[1]).any()
    assert len(shown) == 16
    assert {preview.shape for preview in shown} == {(9, 13, 3)}
    worker.memory = replace(worker.memory, tile_above=1)
    try:
        assert worker.generate(whole)[0].rgb.shape == (HIGH, WIDE, 3)
    finally:
        worker.memory = replace(worker.memory, tile_above=0)
    assert (drawn(worker, (ONE,), mask) == before).all()


def test_klein_edits_under_a_mask_with_references(boot: Callable[[str], Worker]) -> None:
    worker, small = boot(KLEIN.id), Reference(RNG.integers(0, 256, (64, 80, 3), np.uint8), "")
    pictures = [drawn(worker, images, MASK)[KEPT == 0] for images in ((ONE,), (ONE, small), (ONE, small, OTHER))]
    assert all(differ(pictures[i], pictures[j]) for i in range(3) for j in range(i))


def test_previews_learn_nothing_under_a_mask(spark: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step heads for other latents than those that the image is put back into."""
    learned = []
    monkeypatch.setattr(Projection, "learn", lambda *given: learned.append(given))
    drawn(spark, (ONE,), MASK)
    assert not learned
    drawn(spark, (ONE,))
    assert len(learned) == 1


def test_under_kleins_mask_references_are_what_they_are_without(
    boot: Callable[[str], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any shape, and those above a megapixel as small as plain diffusers makes them: the very same tokens."""
    worker, seen = boot(KLEIN.id), []
    plain = Flux2KleinPipeline(**worker._pipeline.components, is_distilled=True)
    plain.set_progress_bar_config(disable=True)
    forward = plain.transformer.forward

    def watching(hidden_states: torch.Tensor, img_ids: torch.Tensor, **given: Any) -> Any:
        seen.append((hidden_states.clone(), img_ids.clone()))
        return forward(hidden_states=hidden_states, img_ids=img_ids, **given)

    monkeypatch.setattr(plain.transformer, "forward", watching)
    images = (noise(128, 96), noise(72, 200), noise(1300, 900), noise(65, 500))
    mask = Mask(np.zeros((96, 128), np.uint8), "")
    drawn(worker, images, mask, num_inference_steps=1)
    plain([Image.fromarray(image.rgb) for image in images], "a red circle", 96, 128, num_inference_steps=1)
    (ours, places), (theirs, their_places) = seen
    own = (128 // 16) * (96 // 16)
    assert ours.shape == theirs.shape
    assert (ours[:, own:] == theirs[:, own:]).all()
    assert (places == their_places).all()


def test_families_have_what_their_rows_say(boot: Callable[[str], Worker]) -> None:
    for spec in ROWS:
        family = boot(spec.id)._family
        assert hasattr(family, "INPAINT") == bool(spec.masked_pixels), spec.id
        assert hasattr(family, "IMAGE_TO_IMAGE") == (not spec.max_images), spec.id


# What spark makes of it.


def circle(color: str) -> Any:
    image = Image.new("RGB", (256, 256), (45, 87, 222))
    image.paste(color, (70, 80, 180, 190), Image.open(io.BytesIO(disc())).convert("L"))
    return Reference(np.asarray(image), "")


def disc() -> bytes:
    y, x = np.ogrid[:110, :110]
    return saved(Image.fromarray((((x - 55) ** 2 + (y - 55) ** 2 < 55**2) * 255).astype(np.uint8)))


def test_spark_recolours_what_it_is_given(spark: Worker) -> None:
    source = circle("red")
    request = ImageRequest(prompt="a green circle on a blue background", seed=3, images=(b"x",))
    background, found = look(Image.fromarray(spark.generate(SPARK.recipe(request, (source,)))[0].rgb))
    assert (background, [each.color for each in found]) == ("blue", ["green"])


def test_the_stronger_an_edit_the_further_what_should_stay_moves(spark: Worker) -> None:
    """spark follows the words at every strength; the less of it, the more of the place is the image's."""
    source, moved = circle("red"), []
    _, [given] = look(Image.fromarray(source.rgb))
    for strength in (0.25, 0.75, 1.0):
        far = 0.0
        for seed in range(4):
            rgb = drawn(spark, (source,), strength=strength, seed=seed, prompt="a green circle on a white background")
            background, [found] = look(Image.fromarray(rgb.astype(np.uint8)))
            assert (background, found.color) == ("white", "green")
            far += math.hypot(found.x - given.x, found.y - given.y) / 4
        moved.append(far)
    assert moved == sorted(moved)
    assert moved[0] < 0.05 < moved[2]


def test_spark_replaces_what_is_under_a_mask(spark: Worker) -> None:
    kept = np.full((256, 256), 255, np.uint8)
    kept[48:208, 48:208] = 0
    rgb = drawn(spark, (circle("red"),), Mask(kept, ""), seed=3, prompt="a yellow star on a blue background")
    background, found = look(Image.fromarray(rgb.astype(np.uint8)))
    assert (background, [each.color for each in found]) == ("blue", ["yellow"])


# What a request may ask.


@of(
    ("spec", "fields", "steps", "strength"),
    [
        (SPARK, {}, 4, 0.75),
        (SPARK, {"strength": 0.15}, 7, 0.15),
        (SPARK, {"strength": 0.1, "num_inference_steps": None}, 8, 0.1),
        (SPARK, {"strength": 0.1, "num_inference_steps": 4}, 4, 0.1),
        (SPARK, {"mask": b"x"}, 4, 1.0),
        (SPARK, {"mask": b"x", "strength": 0.7}, 4, 0.7),
        (MODELS["sdxl-turbo"], {}, 2, 0.6),
        (MODELS["sdxl-turbo"], {"strength": 0.3}, 4, 0.3),
        (MODELS["sdxl-turbo"], {"mask": b"x"}, 1, 1.0),
        (MODELS["flux-dev"], {}, 28, 0.6),
        (MODELS["flux-dev"], {"scheduler": "dpm++"}, None, "scheduler 'dpm\\+\\+'; it takes flow-match-euler"),
        (MODELS["sdxl"], {"scheduler": "dpm++"}, 20, 0.6),
        (FLUX2, {}, 28, None),
        (FLUX2, {"mask": b"x"}, None, "flux2-dev works from whole images; leave mask out"),
        (FLUX2, {"strength": 0.5}, None, "flux2-dev works from whole images; leave strength out"),
        (KLEIN, {"strength": 0.5}, None, "flux2-klein works from whole images without a mask; leave strength out"),
        (KLEIN, {"mask": b"x", "strength": 0.5}, 4, 0.5),
        (KLEIN, {"mask": b"x", "width": 1040, "height": 1024}, None, "at most 1048576 pixels, not 1040x1024"),
    ],
)  # fmt: skip
def test_what_a_model_makes_of_an_edit(spec: ModelSpec, fields: Any, steps: int | None, strength: Any) -> None:
    request = ImageRequest.parse({"prompt": "x", "images": [b"x"]} | fields)
    mask = MASK if request.mask else None
    if steps is None:
        with pytest.raises(RequestError, match=strength):
            spec.recipe(request, (ONE,), mask=mask)
        return
    recipe = spec.recipe(request, (ONE,), mask=mask)
    assert (recipe.steps, recipe.strength, recipe.mask) == (steps, strength, mask)
    assert recipe.described()["mask"] == (mask and "ma")
    assert recipe.described()["strength"] == strength


@of("spec", ROWS, ids=each)
def test_whatever_strength_is_taken_takes_a_step(spec: ModelSpec) -> None:
    for hundredths in range(1, 101):
        fields = {"prompt": "x", "images": [b"x"], "mask": b"x" if spec.masked_pixels else None}
        if spec is FLUX2:
            continue
        request = ImageRequest.parse(fields | {"strength": hundredths / 100})
        recipe = spec.recipe(request, (ONE,), mask=MASK)
        assert 1 <= recipe.taken <= recipe.steps


@of(
    ("fields", "kind", "param"),
    [
        ({"strength": 0.5}, InvalidValue, "strength"),
        ({"mask": b"x"}, InvalidValue, "mask"),
        ({"images": [b"x"], "strength": 0}, OutOfRange, "strength"),
        ({"images": [b"x"], "strength": 1.01}, OutOfRange, "strength"),
        ({"images": [b"x"], "strength": "1"}, InvalidType, "strength"),
        ({"images": [b"x"], "mask": "https://example.com/a.png"}, InvalidValue, "mask"),
        ({"images": [b"x"], "mask": "no base64!"}, InvalidValue, "mask"),
        ({"images": [b"x"], "mask": 7}, InvalidType, "mask"),
        ({"images": [b"x"], "mask": ["x"]}, InvalidType, "mask"),
    ],
)
def test_refused_at_once(fields: dict[str, Any], kind: type[RequestError], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        ImageRequest.parse({"prompt": "x"} | fields)
    assert (type(caught.value), caught.value.param) == (kind, param)


@of(
    ("shape", "size"),  # (height, width) and (width, height)
    [((200, 100), (100, 200)), ((72, 101), (101, 72)), ((512, 512), (256, 256)), ((300, 600), (362, 181))],
)
def test_an_edit_has_its_images_size(shape: tuple[int, int], size: tuple[int, int]) -> None:
    image = Reference(np.zeros((*shape, 3), np.uint8), "")
    assert recipe_of(SPARK, (image,)).size == size
    assert recipe_of(SPARK, (image,), width=512, height=300).size == (512, 300)


@of("shape", [(3000, 4000), (1025, 1023), (1024, 1024), (2000, 300), (72, 100), (1536, 2048)])
def test_an_image_of_any_size_fits_under_kleins_mask(shape: tuple[int, int]) -> None:
    image = Reference(np.zeros((*shape, 3), np.uint8), "")
    size = recipe_of(KLEIN, (image,), MASK).size
    assert np.prod(KLEIN.canvas(size)) <= KLEIN.masked_pixels
    assert abs(size[0] / size[1] - shape[1] / shape[0]) < 0.1 * shape[1] / shape[0]
    assert size == (shape[1], shape[0]) or shape[0] * shape[1] > 1000 * 1000


# Masks.

PHOTO = Image.fromarray(ONE.rgb)


def hole(size: tuple[int, int] = (WIDE, HIGH), mode: str = "RGBA", **options: Any) -> bytes:
    """Transparent in a corner of 40 by 30 pixels."""
    image = Image.new("RGBA", size, (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 40, 30))
    return saved(image.convert(mode), **options)


def test_a_mask_is_its_alpha_channel() -> None:
    wanted = np.full((HIGH, WIDE), 255)
    wanted[:30, :40] = 0
    for data in (hole(), hole(mode="LA"), hole(form="WEBP", lossless=True)):
        found = references.kept(data, saved(PHOTO))
        assert (found.kept == wanted).all()
        assert found.sha256 == hashlib.sha256(data).hexdigest()
    sideways = references.kept(hole((HIGH, WIDE)), saved(PHOTO, "JPEG", exif=exif(6)))  # a photo that stands upright
    assert sideways.kept.shape == (WIDE, HIGH)
    large = references.kept(hole((3000, 2000)), saved(PHOTO.resize((3000, 2000))), 1_000_000)
    assert large.kept.shape == (816, 1224)
    assert set(np.unique(large.kept[40:, 40:])) == {255}


def drawing(form: str = "PNG", mode: str = "L", size: tuple[int, int] = (WIDE, HIGH), black: bool = False) -> bytes:
    """White, or black, in that corner, without alpha that says so."""
    image = Image.new("L", (WIDE, HIGH), 255 if black else 0)
    image.paste(0 if black else 255, (0, 0, 40, 30))
    if mode == "I;16":
        return saved(Image.fromarray(np.asarray(image).astype(np.uint16) * 257))
    return saved(image.resize(size).convert(mode), form, **({"quality": 100} if form == "JPEG" else {}))


@of(
    ("data", "form"),
    [
        (drawing(), None), (drawing(mode="RGB"), None), (drawing(mode="RGBA"), None), (drawing(mode="1"), None),
        (drawing(mode="I;16"), None), (drawing(mode="P"), "white"), (drawing("JPEG"), None), (drawing("WEBP"), None),
        (drawing(black=True), "black"), (drawing(size=(WIDE * 3, HIGH * 3)), None), (drawing(size=(50, 36)), "white"),
        (hole(), None), (hole(), "alpha"),
    ],
)  # fmt: skip
def test_a_mask_without_alpha_is_white_where_it_is_drawn_anew(data: bytes, form: Any) -> None:
    """As diffusers' and ComfyUI's, of whatever size."""
    found = references.kept(data, saved(PHOTO), form=form).kept
    assert found.shape == (HIGH, WIDE)
    scaled = np.asarray(Image.open(io.BytesIO(data)).size) != (WIDE, HIGH)
    soft = 3 if scaled.any() or data[:4] in (b"\xff\xd8\xff\xe0", b"RIFF") else 0
    assert (found[: 28 - soft, : 38 - soft] <= 4 * soft).all()
    assert (found[32 + soft :] >= 255 - 4 * soft).all()
    assert (found[:, 42 + soft :] >= 255 - 4 * soft).all()


def test_a_mask_can_be_told_what_it_is() -> None:
    red = Image.new("RGB", (WIDE, HIGH))
    red.paste("red", (0, 0, 40, 30))
    assert references.kept(saved(red), saved(PHOTO), form="white").kept[0, 0] == 255 - 76
    assert references.kept(hole(), saved(PHOTO), form="black").kept.max() == 0
    with pytest.raises(InvalidValue, match="make it transparent where"):
        references.kept(drawing(), saved(PHOTO), form="alpha")


def test_references_are_decoded_no_larger_than_they_are_looked_at() -> None:
    large = saved(PHOTO.resize((1600, 1200)))
    request = ImageRequest(prompt="x", images=(large, large), mask=hole((1600, 1200)))
    images, mask = references.decoded(request, KLEIN)
    assert [image.rgb.shape for image in images] == [(1200, 1600, 3), (886, 1182, 3)]
    assert mask
    assert mask.kept.shape == (1200, 1600)


def pinhole() -> bytes:
    """A mask 30 times as large as the photo, with one transparent pixel."""
    mask = Image.new("RGBA", (30 * WIDE, 30 * HIGH), "black")
    mask.putpixel((7, 7), (0, 0, 0, 0))
    return saved(mask)


BAD_MASKS: list[tuple[str, bytes, type[RequestError], str]] = [
    ("no alpha", saved(PHOTO), InvalidValue, "neither transparent anywhere nor black and white"),
    ("jpeg", saved(PHOTO, "JPEG"), InvalidValue, "neither transparent"),
    ("opaque", saved(PHOTO.convert("RGBA")), InvalidValue, "neither transparent"),
    ("black", saved(Image.new("RGBA", (WIDE, HIGH), "black")), InvalidValue, "make it transparent, or white on black,"),
    ("a hole that is lost when it is scaled", pinhole(), InvalidValue, "it keeps all of its image"),
    ("no image", b"hello" * 99, InvalidValue, "the file is not a whole PNG"),
    ("cut", hole()[:-30], InvalidValue, "the file is not a whole PNG"),
    ("moving", moving("PNG"), InvalidValue, "an animation"),
    ("bomb", png_of(30_000, 30_000), OutOfRange, "too large"),
    ("gif", saved(PHOTO, "GIF"), InvalidValue, "the file is a GIF; send a PNG"),
]


@of(("name", "data", "kind", "told"), BAD_MASKS, ids=[name for name, *_ in BAD_MASKS])
def test_unusable_masks(name: str, data: bytes, kind: type[RequestError], told: str) -> None:
    image = saved(PHOTO)
    with pytest.raises(RequestError, match=told) as caught:
        references.decoded(ImageRequest(prompt="x", images=(image,), mask=data), SPARK)
    assert (type(caught.value), caught.value.param) == (kind, "mask")


# OpenAI's shapes.


@of(
    "sent",
    [
        {"image": b"A"},
        {"image": [b"A"]},
        {"image": text(b"A")},
        {"image": url(b"A")},
        {"images": [url(b"A")]},
        {"images": [{"image_url": url(b"A")}]},
        {"image": {"image_url": url(b"A")}, "images": None},
        {"image": {"image_url": url(b"A"), "file_id": None}},
    ],
)
def test_where_images_may_be(sent: dict[str, Any]) -> None:
    known = {"prompt": "x", "mask": {"image_url": url(b"M")}, "input_fidelity": "high", "user": "me", "quality": "low"}
    request = dialect.parse(known | sent)
    assert (request.images, request.mask) == ((b"A",), b"M")
    assert dialect.parse({"prompt": "x", "image": [b"A", b"B"]}).images == (b"A", b"B")


@of(
    ("sent", "kind", "param"),
    [
        ({}, KindlingError, "image"),
        ({"image": []}, KindlingError, "image"),
        ({"image": b"A", "images": [url(b"A")]}, InvalidValue, "images"),
        ({"images": [{"file_id": "file-1"}]}, Unsupported, "images"),
        ({"image": "https://example.com/a.png"}, InvalidValue, "images"),
        ({"images": [{"image_url": "http://127.0.0.1/a.png"}]}, InvalidValue, "images"),
        ({"image": 7}, InvalidType, "images"),
        ({"image": b"A", "mask": {"file_id": "file-1"}}, Unsupported, "mask"),
        ({"image": b"A", "markup": b"B"}, Unsupported, "markup"),
        ({"image": b"A", "input_fidelity": 3}, InvalidType, "input_fidelity"),
        ({"image": b"A", "background": "transparent"}, Unsupported, "background"),
        ({"image": b"A", "frames": 3}, KindlingError, "frames"),
    ],
)
def test_refused_shapes(sent: dict[str, Any], kind: type[KindlingError], param: str) -> None:
    with pytest.raises(kind) as caught:
        dialect.parse({"prompt": "x"} | sent)
    assert caught.value.param == param


@of(
    ("name", "spelled", "value"),
    [
        ("n", "2", 2), ("seed", "7", 7), ("strength", "0.5", 0.5), ("strength", "1", 1), ("stream", "true", True),
        ("stream", "False", False), ("prompt", "7", "7"), ("size", "64x64", "64x64"), ("n", "two", "two"),
        ("n", "", ""), ("n", "2.5", 2.5), ("seed", "[" * 100_000, "[" * 100_000), ("guidance_scale", "NaN", "NaN"),
        ("n", "٢", "٢"), ("n", "1_0", "1_0"), ("seed", "1e400", "1e400"),
    ],
)  # fmt: skip
def test_a_forms_text_becomes_what_the_field_is(name: str, spelled: str, value: Any) -> None:
    found = multipart.typed(name, spelled)
    assert (found, type(found)) == (value, type(value))


# Over HTTP, with OpenAI's own client.

SOURCE, HOLE = saved(Image.fromarray(circle("red").rgb)), hole((256, 256))


@pytest.fixture
def client(server: Served) -> Iterator[client_library.OpenAI]:
    with client_library.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0) as client:
        yield client


def pixels(picture: Any) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.b64_json))))


PROMPT = "a small yellow star in the top left corner on a blue background"


def test_openais_client_edits(client: client_library.OpenAI, server: Served, tmp_path: Path) -> None:
    answer = client.images.edit(
        image=SOURCE, mask=HOLE, prompt=PROMPT, model="spark", n=2, size="auto", quality="auto",
        input_fidelity="high", extra_body={"seed": 7},
    )  # fmt: skip
    assert answer.size == "256x256"
    first, second = map(pixels, answer.data)
    source = np.asarray(Image.open(io.BytesIO(SOURCE)))
    assert (first[30:] == source[30:]).all()
    assert (first[:30, 40:] == source[:30, 40:]).all()
    assert (first[:30, :40] != source[:30, :40]).any()
    assert (first != second).any()
    (tmp_path / "a.png").write_bytes(base64.b64decode(answer.data[0].b64_json))
    told = codec.read_parameters(tmp_path / "a.png")
    assert told["images"] == [hashlib.sha256(SOURCE).hexdigest()[:2]]
    assert (told["mask"], told["strength"]) == (hashlib.sha256(HOLE).hexdigest()[:2], 1.0)

    for payload in ({"image": url(SOURCE)}, {"images": [{"image_url": url(SOURCE)}]}):
        asked = {"prompt": PROMPT, "mask": url(HOLE), "seed": 7, **payload}
        again = httpx.post(f"{server.url}/v1/images/edits", json=asked, timeout=120).json()
        assert again["data"][0]["b64_json"] == answer.data[0].b64_json
    asked = {"prompt": PROMPT, "mask": url(HOLE), "seed": 7, "images": [text(SOURCE)]}
    for path, kind in (("/generate", "images"), ("/v1/images/generations", "data")):
        again = httpx.post(server.url + path, json=asked, timeout=120).json()
        assert again[kind][0]["b64_json"] == answer.data[0].b64_json


def test_a_black_and_white_mask_comes_in_by_all_doors(server: Served, tmp_path: Path) -> None:
    """And draws what the same one as alpha does, which another size does not change much."""
    grey = Image.new("L", (256, 256))
    grey.paste(255, (0, 0, 40, 30))
    alpha = Image.merge("RGBA", [grey.point(lambda _: 0)] * 3 + [grey.point(lambda white: 255 - white)])
    asked, found = {"prompt": "", "seed": 7, "num_inference_steps": 2}, list[str]()
    edits = f"{server.url}/v1/images/edits"
    for mask, said in (
        (saved(alpha), {}),
        (saved(grey), {}),
        (saved(grey.point(lambda v: 255 - v)), {"mask_form": "black"}),
    ):
        fields = asked | said
        files = {"image": SOURCE, "mask": mask}
        answers = [
            httpx.post(edits, data=fields, files=files, timeout=120),
            httpx.post(edits, json=fields | {"image": text(SOURCE), "mask": text(mask)}, timeout=120),
            httpx.post(
                f"{server.url}/generate", json=fields | {"images": [text(SOURCE)], "mask": text(mask)}, timeout=120
            ),
        ]
        found += [(one.get("data") or one["images"])[0]["b64_json"] for one in (each.json() for each in answers)]
    assert len(found) == 9
    assert [found[0] == each for each in found] == [True] * 3 + [False] * 6  # their files are others, and so their PNGs
    pictures = [Image.open(io.BytesIO(base64.b64decode(each))) for each in found]
    assert all((np.asarray(each) == np.asarray(pictures[0])).all() for each in pictures)


def test_openais_client_says_neither_strength_nor_size(client: client_library.OpenAI) -> None:
    wanted = "a green circle on a blue background"
    [answer] = client.images.edit(image=[io.BytesIO(SOURCE)], prompt=wanted, extra_body={"seed": 3}).data
    background, found = look(Image.fromarray(pixels(answer)))
    assert (background, [each.color for each in found]) == ("blue", ["green"])
    [other] = client.images.edit(image=SOURCE, prompt=wanted, extra_body={"seed": 3, "strength": 0.3}).data
    assert (pixels(other) != pixels(answer)).any()


def test_openais_client_streams_an_edit(client: client_library.OpenAI) -> None:
    asked = {"image": SOURCE, "mask": HOLE, "prompt": PROMPT, "extra_body": {"seed": 7}}
    whole = client.images.edit(**asked)
    *partials, last = client.images.edit(**asked, stream=True, partial_images=2)
    assert [event.type for event in partials] == ["image_edit.partial_image"] * 2
    assert [event.partial_image_index for event in partials] == [0, 1]
    assert last.type == "image_edit.completed"
    assert last.b64_json == whole.data[0].b64_json
    with pytest.raises(client_library.UnprocessableEntityError, match="strength"):
        list(client.images.edit(**asked | {"extra_body": {"strength": 7}}, stream=True))


def test_two_images_are_one_too_many(client: client_library.OpenAI) -> None:
    with pytest.raises(client_library.UnprocessableEntityError, match="spark edits one image, got 2"):
        client.images.edit(image=[SOURCE, SOURCE], prompt=PROMPT)


def test_variations_are_retired(client: client_library.OpenAI, server: Served) -> None:
    told = "retired image variations; send the image to /v1/images/edits"
    with pytest.warns(DeprecationWarning, match="deprecated"), pytest.raises(client_library.NotFoundError, match=told):
        client.images.create_variation(image=SOURCE)
    answer = httpx.post(f"{server.url}/v1/images/variations", content=b"anything")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_a_form_comes_again_under_its_key(server: Served) -> None:
    """Each try has a boundary of its own."""

    def ask(seed: str) -> httpx.Response:
        return httpx.post(
            f"{server.url}/v1/images/edits", files={"image": SOURCE}, data={"prompt": PROMPT, "seed": seed},
            headers={"Idempotency-Key": "edit-1"}, timeout=120,
        )  # fmt: skip

    first, second, other = ask("7"), ask("7"), ask("8")
    assert first.json()["data"] == second.json()["data"]
    assert second.headers["idempotent-replayed"] == "true"
    assert other.json()["error"]["code"] == "idempotency_key_reused"


def part(name: str, content: bytes, *headers: str) -> bytes:
    head = "\r\n".join([f'Content-Disposition: form-data; name="{name}"{headers[0] if headers else ""}', *headers[1:]])
    return b"--b\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n"


def file(name: str, content: bytes) -> bytes:
    return part(name, content, '; filename="a.png"', "Content-Type: image/png")


FORM = 'multipart/form-data; boundary="b"'
END = b"--b--\r\n"
OK = file("image", SOURCE) + part("prompt", b"x")
ABUSE: list[tuple[str, bytes, str, int, str, str]] = [
    ("no boundary", OK + END, "multipart/form-data", 400, "invalid_value", "boundary"),
    ("another boundary", OK + END, 'multipart/form-data; boundary="c"', 400, "invalid_value", "form cannot be read"),
    ("as json", OK + END, "application/json", 400, "invalid_json", "not valid JSON"),
    ("as text", OK + END, "text/plain", 415, "unsupported_media_type", "or as multipart/form-data"),
    ("json as a form", b'{"prompt": "x"}', FORM, 400, "invalid_value", "form cannot be read"),
    ("nothing", b"", FORM, 400, "missing_required_parameter", "'image'"),
    ("no image", part("prompt", b"x") + END, FORM, 400, "missing_required_parameter", "'image'"),
    ("no prompt", file("image", SOURCE) + END, FORM, 400, "missing_required_parameter", "'prompt'"),
    ("a part without a name", b"--b\r\n\r\nx\r\n" + END, FORM, 400, "invalid_value", "form cannot be read"),
    ("many files", file("image", SOURCE[:99]) * 18 + END, FORM, 400, "invalid_value", "Too many files"),
    ("many fields", part("user", b"x") * 65 + END, FORM, 400, "invalid_value", "Too many fields"),
    ("large file", file("image", bytes(51_000_000)) + END, FORM, 413, "body_too_large", "at most 50 MB"),
    ("twice", OK + part("seed", b"1") + part("seed", b"2") + END, FORM, 400, "invalid_value", "'seed' appears twice"),
    ("no number", OK + part("n", b"two") + END, FORM, 400, "invalid_type", "n: Input should be a valid integer"),
    ("half a number", OK + part("n", b"1.5") + END, FORM, 400, "invalid_type", "n: Input should be a valid integer"),
    ("strength", OK + part("strength", b"2") + END, FORM, 422, "out_of_range", "strength: Input should be less"),
    ("unknown", OK + part("stepz", b"2") + END, FORM, 400, "unknown_parameter", "'stepz'"),
    ("prompt as a file", file("image", SOURCE) + file("prompt", b"x") + END, FORM, 400, "invalid_type", "prompt"),
    ("seed as a file", OK + file("seed", b"1") + END, FORM, 400, "invalid_type", "seed"),
    ("no picture", file("image", b"hello") + part("prompt", b"x") + END, FORM, 400, "invalid_value", "not a whole PNG"),
    ("a bomb", file("image", png_of(30_000, 30_000)) + part("prompt", b"x") + END, FORM, 422, "out_of_range", "too la"),
    ("moving", file("image", moving("WEBP")) + part("prompt", b"x") + END, FORM, 400, "invalid_value", "animation"),
    ("mask form", OK + part("mask_form", b"grey") + END, FORM, 422, "out_of_range", "mask_form: Input should be"),
    ("mask as text", OK + part("mask", b"none") + END, FORM, 400, "invalid_value", "mask: the file is not a whole PNG"),
    ("an address", part("image", b"http://a/b") + part("prompt", b"x") + END, FORM, 400, "invalid_value", "fetched"),
]  # fmt: skip


@of(("name", "body", "kind", "status", "code", "told"), ABUSE, ids=[name for name, *_ in ABUSE])
def test_abused_forms(name: str, body: bytes, kind: str, status: int, code: str, told: str, server: Served) -> None:
    answer = httpx.post(f"{server.url}/v1/images/edits", content=body, headers={"content-type": kind}, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), error
    assert told in error["message"]
    assert len(error["message"]) < 250


def test_a_form_is_for_edits_alone(server: Served) -> None:
    answer = httpx.post(f"{server.url}/v1/images/generations", content=OK + END, headers={"content-type": FORM})
    assert answer.json()["error"]["code"] == "unsupported_media_type"


def test_no_file_touches_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one larger than what starlette keeps in memory."""
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", lambda _: pytest.fail("written to disk"))
    body = file("image", bytes(3_000_000)) + END
    found = multipart.read(Headers({"content-type": FORM}), body)
    assert found == {"image": [bytes(3_000_000)]}


def test_jobs_of_a_queue_edit_by_the_same_route(spark: Worker) -> None:
    """As RunPod's worker hands them on: a route, and JSON."""
    engine, steps = Engine(PATIENT, boot=lambda *_: spark), []
    engine.start()
    engine.wait_booted()

    def call(**payload: Any) -> Any:
        asked = {"prompt": PROMPT, "image": url(SOURCE), "seed": 7, **payload}
        return asyncio.run(Api(engine).call("/v1/images/edits", asked, lambda done, of, _: steps.append((done, of))))

    try:
        first, again = call(mask=url(HOLE)), call(images=[url(SOURCE)], image=None, mask=url(HOLE))
        assert first.status == again.status == 200
        assert first.body["data"] == again.body["data"]
        steps.clear()
        assert call(strength=0.5, n=2).status == 200
        assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
        assert call(image=None).body["error"]["param"] == "image"
        assert asyncio.run(Api(engine).call("/v1/images/variations", {})).status == 404
    finally:
        engine.stop()


# On the command line.


def test_the_command_line_edits(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(SOURCE)
    (tmp_path / "m.png").write_bytes(HOLE)
    (tmp_path / "n.png").write_bytes(hole((256, 256), mode="LA"))
    ask = ["--image", "a.png", "--mask", "m.png", "--strength", "0.8"]
    made = kindling("generate", PROMPT, *ask, "--seed", "2", "-o", "out.png", cwd=tmp_path)
    assert (made.returncode, made.stderr) == (0, "")
    again = kindling("generate", "--from", "out.png", *ask[:4], "-o", "again.png", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "out.png").read_bytes()
    for arguments, told in (
        (["--from", "out.png", *ask[:2]], "was made with a mask; give exactly that with --mask"),
        (["--from", "out.png", *ask[:2], "--mask", "n.png"], "was made with a mask"),
        (["--from", "out.png"], "was made from 1 images"),
        ([PROMPT, "--mask", "m.png"], "send the image too"),
        ([PROMPT, *ask[:2], "--mask", "none.png"], "cannot read none.png"),
        ([PROMPT, *ask[:2], "--mask", "a.png"], "neither transparent anywhere"),
        ([PROMPT, "--strength", "0.5"], "send the image too"),
    ):
        out = kindling("generate", *arguments, cwd=tmp_path)
        assert (out.returncode, out.stderr.count("\n")) == (2, 1)
        assert told in out.stderr
