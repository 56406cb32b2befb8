"""Prompts that are read as ComfyUI reads them, from a payload to a PNG, and made again from that."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PATIENT
from safetensors.torch import save_file

from handler import Api, Engine, ImageRequest, Worker
from handler.api.codec import read_parameters
from handler.api.reply import Reply
from handler.cli import again

SMALL = {"prompt": "a red circle", "width": 64, "height": 64, "num_inference_steps": 2, "seed": 5}
READ = SMALL | {"reading": {}}


@pytest.fixture
def api(spark: Worker, tmp_path: Path) -> Iterator[Api]:
    width = spark._pipeline.text_encoder.get_input_embeddings().weight.shape[1]  # T5's too
    (tmp_path / "embeddings").mkdir()
    save_file({"x": torch.ones(2, width)}, tmp_path / "embeddings/ink.safetensors")
    engine = Engine(PATIENT.model_copy(update={"volume": tmp_path, "batch": 4}), boot=lambda *_: spark)
    engine.start()
    engine.wait_booted()
    yield Api(engine)
    engine.stop()


def call(api: Api, payload: dict[str, Any], path: str = "/generate") -> Reply:
    return asyncio.run(api.call(path, payload))


def picture(api: Api, **fields: Any) -> bytes:
    reply = call(api, READ | fields)
    assert reply.status == 200, reply.body
    return bytes(reply.pictures[0].data)


def test_weights_are_read_where_that_is_asked_for(api: Api, tmp_path: Path) -> None:
    """And kept apart from the same words read otherwise."""
    prompt = "a (red:1.8) circle"
    asked = [{"prompt": prompt}, {"prompt": prompt, "reading": None}, {"reading": {"prompts": {"t5": prompt}}}]
    first = [picture(api, **fields) for fields in asked]
    assert len({*first}) == 3
    assert [picture(api, **fields) for fields in asked] == first


def test_a_picture_says_how_it_was_read_and_is_made_again(api: Api, tmp_path: Path) -> None:
    prompt, read = "embedding:ink circle", {"clip_skip": -2, "prompts": {"l": "blue"}}
    data = picture(api, prompt=prompt, reading=read)
    (tmp_path / "it.png").write_bytes(data)
    said = read_parameters(tmp_path / "it.png")
    [embedding] = said["embeddings"]
    assert embedding.keys() == {"name", "sha256"}
    assert said["reading"]["clip_skip"] == -2
    request = again.read(tmp_path / "it.png", [], None).request
    assert request.reading == ImageRequest.parse(READ | {"reading": read}).reading
    told = again.differing(said, said | {"embeddings": [embedding | {"sha256": "0" * 64}]})
    assert told == [f"embeddings was ink of {embedding['sha256'][:12]} and is ink of {'0' * 12}"]
    assert "embeddings" not in call(api, READ).body["images"][0]["parameters"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "embedding:inks"}, "prompt: there is no 'inks' on the volume. Did you mean ink?"),
        ({"reading": {"negative_prompts": {"g": "embedding:../ink"}}}, "prompt: '../ink' is no name of a file"),
        ({"prompt": "a " * 16_000}, "prompt: it is read in chunks, of which it may have 64, not"),
        ({"prompt": "(" * 99 + ")" * 99}, "prompt: its parentheses go more than 32 deep."),
        ({"reading": {"clip_skip": 0}}, "reading.clip_skip: Input should be less than or equal to -1."),
        ({"reading": {"clip_skips": -1}}, "Unknown parameter: 'reading.clip_skips'."),
    ],
)
def test_what_cannot_be_read_is_told(api: Api, fields: dict[str, Any], message: str) -> None:
    reply = call(api, READ | fields)
    assert reply.status in (400, 422)
    assert reply.body["error"]["message"].startswith(message)


def test_without_a_reading_it_is_text(api: Api) -> None:
    assert call(api, SMALL | {"prompt": "embedding:inks"}).status == 200


def test_they_are_drawn_together_and_each_alone(api: Api) -> None:
    """With longer ones between, which do not fit beside them."""
    asked = [{"prompt": prompt, "seed": seed} for prompt in ("red", "(red:1.8)", "blue " * 60) for seed in (1, 2)]

    async def together() -> list[Reply]:
        return list(await asyncio.gather(*(api.call("/generate", READ | fields) for fields in asked)))

    for reply, fields in zip(asyncio.run(together()), asked, strict=True):
        assert reply.status == 200, reply.body
        assert reply.pictures[0].recipe.prompt == fields["prompt"]
