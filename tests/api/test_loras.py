"""LoRAs from a payload to a PNG: beside other requests, listed, and made again."""

import asyncio
import base64
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from conftest import PATIENT
from PIL import Image

from handler import Api, Engine, ImageRequest, Worker
from handler.api.codec import read_parameters
from handler.api.reply import Reply
from handler.cli.again import read
from handler.core.loras import Wanted
from handler.core.recipe import Lora
from loras import LAYERS, matrices, peft, put

SMALL = {"prompt": "a red circle", "width": 64, "height": 64, "num_inference_steps": 2, "seed": 5}
OPENAI = {name: value for name, value in SMALL.items() if name not in ("width", "height")} | {"size": "64x64"}


@pytest.fixture
def loras(spark: Worker, tmp_path: Path) -> list[Lora]:
    model = spark._pipeline.transformer
    tensors = [peft(matrices(model, LAYERS, seed=seed)) for seed in range(2)]
    metadata = {"modelspec.trigger_phrase": "inked"}
    return [
        put(tmp_path / f"loras/{name}.safetensors", each, 1.0, metadata)
        for name, each in zip("ab", tensors, strict=True)
    ]


@pytest.fixture
def api(spark: Worker, loras: list[Lora], tmp_path: Path) -> Iterator[Api]:
    engine = Engine(PATIENT.model_copy(update={"volume": tmp_path, "batch": 4}), boot=lambda *_: spark)
    engine.start()
    engine.wait_booted()
    yield Api(engine)
    engine.stop()
    spark.generate(spark.spec.recipe(ImageRequest.parse(SMALL)))


def call(api: Api, payload: dict[str, Any] | None, path: str = "/generate") -> Reply:
    return asyncio.run(api.call(path, payload))


def picture(reply: Reply) -> bytes:
    assert reply.status == 200, reply.body
    return reply.pictures[0].data


def test_neighbours_have_each_their_own(api: Api) -> None:
    """All at once, with other requests of the same and of no LoRA between: each picture is as it is alone."""
    large = SMALL | {"width": 128, "height": 128}  # so that there is more to see of each
    chosen: tuple[list[str], ...] = ([], ["a:2"], ["b:3"], ["a:2", "b:2"])
    asked = [large | {"loras": some, "seed": seed} for seed in (1, 2) for some in chosen]
    alone = [picture(call(api, payload)) for payload in asked]
    assert len({*alone}) == len(alone)

    async def together() -> list[Reply]:
        return list(await asyncio.gather(*(api.call("/generate", payload) for payload in asked * 2)))

    for payload, reply, one in zip(asked * 2, asyncio.run(together()), alone * 2, strict=True):
        found = reply.pictures[0]
        wanted = [one.split(":")[0] for one in payload["loras"]]
        assert [lora.name for lora in found.recipe.loras] == wanted
        assert levels(found.data, one) <= 1  # several at once round otherwise
        assert all(levels(found.data, other) > 1 for other in alone if other is not one)


def levels(one: bytes, other: bytes) -> int:
    """By how many of 255 two pictures differ at most."""
    pictures = [numpy.asarray(Image.open(io.BytesIO(data))).astype(int) for data in (one, other)]
    return int(abs(pictures[0] - pictures[1]).max())


def pixels(data: bytes) -> bytes:
    """Without the text, which says how many were drawn at once."""
    return data[data.index(b"IDAT") :]


def test_only_the_same_with_the_same_weights_are_drawn_together(api: Api, loras: list[Lora]) -> None:
    from handler.engine.batching import alike

    spec, request = api.engine.spec, ImageRequest.parse(SMALL)
    one = spec.recipe(request, loras=tuple(loras))
    assert alike(one, replace(one, prompt="other", seed=9))
    for other in ((), loras[:1], loras[::-1], [loras[0], replace(loras[1], weight=0.5)]):
        assert not alike(one, replace(one, loras=tuple(other)))
    assert not alike(one, replace(one, loras=(loras[0], replace(loras[1], sha256="0" * 64))))


@pytest.mark.parametrize(("path", "fields"), [("/generate", SMALL), ("/v1/images/generations", OPENAI)])
def test_every_dialect_takes_them(api: Api, path: str, fields: dict[str, Any]) -> None:
    with_it = picture(call(api, fields | {"loras": [{"name": "a", "weight": 0.5}]}, path))
    assert pixels(with_it) == pixels(picture(call(api, SMALL | {"loras": ["a.safetensors:0.5"]})))
    assert pixels(with_it) != pixels(picture(call(api, fields, path)))


def test_a_form_takes_them_as_text(api: Api) -> None:
    image = base64.b64encode(picture(call(api, SMALL))).decode()
    edit = {"prompt": "x", "image": image, "size": "64x64", "seed": 1, "strength": 0.6}
    plain, adapted = (picture(call(api, edit | {"loras": some}, "/v1/images/edits")) for some in ("", "a:1,b:0.5"))
    assert pixels(plain) != pixels(adapted)


def test_the_png_says_which_they_were(api: Api, loras: list[Lora], tmp_path: Path) -> None:
    (tmp_path / "out.png").write_bytes(picture(call(api, SMALL | {"loras": ["a:0.5", "b"]})))
    found = read_parameters(tmp_path / "out.png")["loras"]
    assert found == [replace(loras[0], weight=0.5).described(), loras[1].described()]
    (tmp_path / "plain.png").write_bytes(picture(call(api, SMALL)))
    assert "loras" not in read_parameters(tmp_path / "plain.png")


def test_a_weight_apart_in_text_encoders_is_told_and_made_again(api: Api, loras: list[Lora], tmp_path: Path) -> None:
    """Where it is the same, nothing is told: it is the same picture."""
    path = tmp_path / "out.png"
    for clip, told in ((0.25, {"clip_weight": 0.25}), (0.5, {}), (None, {})):
        given = {"name": "a", "weight": 0.5, "clip_weight": clip}
        path.write_bytes(picture(call(api, SMALL | {"loras": [given]})))
        [found] = read_parameters(path)["loras"]
        assert found == {"name": "a", "weight": 0.5, "sha256": loras[0].sha256} | told
        [again] = read(path, [], None).request.loras
        assert again == Wanted("a", 0.5, told.get("clip_weight"))


def test_those_there_are_are_listed(api: Api, tmp_path: Path) -> None:
    (tmp_path / "loras/torn.safetensors").write_bytes(b"torn")
    body = call(api, None, "/v1/models").body
    assert [one["id"] for one in body["data"]] == ["spark", "kindling/spark"]
    words = {"made_for": "", "trigger_words": ["inked"]}
    assert body["loras"] == [{"name": "a"} | words, {"name": "b"} | words]


def test_what_cannot_be_is_one_line_and_the_worker_goes_on(
    spark: Worker, api: Api, loras: list[Lora], tmp_path: Path
) -> None:
    plain = picture(call(api, SMALL))
    parts = peft(matrices(spark._pipeline.transformer, LAYERS))
    put(tmp_path / "loras/other.safetensors", {f"unet.{name}": each for name, each in parts.items()})
    (tmp_path / "loras/torn.safetensors").write_bytes(loras[0].path.read_bytes()[:-9])
    for name, told in (
        ("other", ".lora_A.weight fits no weight of the model"),
        ("torn", "'torn' cannot be used: it is no whole safetensors file"),
        ("../a", "is no name of a file below loras/"),
        ("aa", "there is no 'aa' on the volume. Did you mean a?"),
    ):
        reply = call(api, SMALL | {"loras": [name]})
        assert (reply.status, reply.body["error"]["param"]) == (400, "loras")
        assert told in reply.body["error"]["message"]
        assert api.engine.state == "ready"
    assert pixels(picture(call(api, SMALL))) == pixels(plain)
