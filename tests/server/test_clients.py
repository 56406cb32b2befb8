"""What other people's clients send: the real ones where they are installed, else their requests as they were recorded.

The model is a fake that paints the seed, so that only how a request is read and answered is looked at.
"""

import asyncio
import base64
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from fakes import Editor, FakeFamily
from handler import Engine, Settings, Worker, create_app
from handler.core.errors import SettingsError
from serving import Served, live

ROUTE = "/v1/images/generations"
OK: dict[str, Any] = {"prompt": "a red circle", "size": "64x64", "seed": 7}
NAMES = "gpt-image-1, dall-e-2,default"


@contextmanager
def served(family: FakeFamily | None = None, **settings: Any) -> Iterator[str]:
    """A worker's address."""
    with live(create_app(Engine(Settings(**settings), boot=(family or Editor()).boot), public=False)) as url:
        yield url


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A worker with more names, that takes as many pictures as OpenAI's."""
    with served(model_names=NAMES, max_n=10) as found:
        yield found


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="unused", base_url=url + "/v1", max_retries=0, timeout=60) as client:
        yield client


def test_a_fixed_name_is_listed_and_echoed(client: openai.OpenAI) -> None:
    listed = [model.id for model in client.models.list()]
    assert listed == ["spark", "kindling/spark", "gpt-image-1", "dall-e-2", "default"]
    for name in (*listed, "GPT-image-1"):
        answer: Any = client.images.generate(model=name, prompt="x", size="64x64")  # type: ignore[call-overload]
        assert answer.model == name
        assert client.models.retrieve(name).id == name


def test_no_name_is_the_served_model(url: str, client: openai.OpenAI) -> None:
    answer: Any = client.images.generate(model="", prompt="x", extra_body={"size": "64x64"})
    assert answer.model == "spark"
    assert httpx.get(f"{url}/v1/models/").status_code == 404


def test_an_unknown_name_is_told_what_is_served(client: openai.OpenAI) -> None:
    for ask in (
        lambda: client.images.generate(model="dall-e-3", prompt="x"),
        lambda: client.models.retrieve("dall-e-3"),
        lambda: client.images.generate(model="flux-dev", prompt="x"),
    ):
        with pytest.raises(
            openai.NotFoundError, match=r"serves spark, not '.*send 'spark'; KINDLING_MODEL_NAMES"
        ) as no:
            ask()
        assert "qwen" not in str(no.value)


@pytest.mark.parametrize("names", ["a b", "ü", "x" * 201, "a\nb"])
def test_a_name_that_no_request_could_send_stops_the_start(names: str) -> None:
    with pytest.raises(SettingsError, match="model_names"):
        Settings(model_names=names)


def test_as_many_pictures_as_the_worker_allows(url: str, client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="x", n=10, size="64x64", extra_body={"seed": 3})  # type: ignore[call-overload]
    assert [picture.seed for picture in answer.data] == [*range(3, 13)]
    assert httpx.post(url + ROUTE, json=OK | {"n": 11}).status_code == 422
    with served() as usual, pytest.raises(openai.UnprocessableEntityError, match=r"at most 4 .* KINDLING_MAX_N") as no:
        client.with_options(base_url=usual + "/v1").images.generate(prompt="x", n=5)
    assert no.value.param == "n"
    known = httpx.get(f"{url}/openapi.json").json()["components"]["schemas"]
    assert known["GenerationRequest"]["properties"]["n"]["maximum"] == 10
    assert known["ModelName"]["enum"][-2:] == ["default", ""]


@pytest.mark.parametrize("scale", [0, 1, 1.0])
def test_a_scale_that_means_no_guidance(url: str, scale: float) -> None:
    """SGLang's klein sends 1 unless it is told otherwise."""
    assert httpx.post(url + ROUTE, json=OK | {"guidance_scale": scale}).status_code == 200


RED = Image.new("RGB", (64, 64), "red")
EDIT = {"prompt": "a red circle", "seed": 1, "strength": 0.25}


def png(image: Image.Image = RED) -> bytes:
    image.save(out := io.BytesIO(), "PNG")
    return out.getvalue()


SPELLED = {
    "lines": base64.encodebytes(png()).decode(),
    "no padding": base64.b64encode(png()).decode().rstrip("="),
    "safe": base64.urlsafe_b64encode(png()).decode(),
    "octets": f"data:application/octet-stream;base64,{base64.b64encode(png()).decode()}",
    "shouted": f"DATA:image/png;BASE64,{base64.encodebytes(png()).decode()}",
}


@pytest.mark.parametrize("spelled", SPELLED)
def test_base64_as_clients_write_it(url: str, spelled: str) -> None:
    text = SPELLED[spelled]
    hole = base64.encodebytes(png(Image.new("RGBA", (64, 64)))).decode()
    for body in (
        {"json": EDIT | {"image": text, "mask": hole}},
        {"json": EDIT | {"images": [{"image_url": text}]}},
        {"data": EDIT | {"image": text, "mask": hole}, "files": {"user": (None, b"n8n")}},
    ):
        answer = httpx.post(f"{url}/v1/images/edits", **body)  # type: ignore[arg-type]
        assert (answer.status_code, answer.json().get("error")) == (200, None)
    assert httpx.post(url + "/generate", json=EDIT | {"images": [text], "mask": hole}).status_code == 200


@pytest.mark.parametrize("names", [("image[]",) * 2, ("image[0]", "image[1]"), ("images", "images"), ("image",) * 2])
def test_forms_of_several_images(names: tuple[str, ...]) -> None:
    files: Any = [(name, ("a.png", png(), "image/png")) for name in names]
    with served(model="flux2-klein") as klein:
        answer = httpx.post(f"{klein}/v1/images/edits", data={"prompt": "x", "size": "64*64"}, files=files)
    assert (answer.status_code, answer.json().get("error")) == (200, None)


def test_a_browsers_form_has_what_was_left_out(url: str) -> None:
    fields = {"prompt": "x", "size": "", "seed": "", "n": "", "model": "", "output_format": "jpg"}
    files: Any = [("image", ("a.png", png(), "image/png")), ("mask", ("", b"", "application/octet-stream"))]
    answer = httpx.post(f"{url}/v1/images/edits", data=fields, files=files).json()
    assert (answer["size"], answer["output_format"], len(answer["data"])) == ("64x64", "jpeg", 1)


@pytest.mark.parametrize(
    "size",
    [
        {"size": "128*64"},
        {"size": "128X64"},
        {"width": 128, "height": 64},
        {"size": "auto", "width": 128, "height": 64},
    ],
)
def test_sizes_as_clients_spell_them(url: str, size: dict[str, Any]) -> None:
    answer = httpx.post(url + ROUTE, json={"prompt": "x", "output_format": "jpg"} | size).json()
    assert (answer["size"], answer["output_format"]) == ("128x64", "jpeg")


@pytest.mark.parametrize(
    ("base", "told"),
    [("", "Did you mean /v1/images/generations? The client's base URL should end with /v1"), ("/v1/v1", "/v1 once")],
)
def test_a_wrong_base_url_is_told_the_right_one(url: str, client: openai.OpenAI, base: str, told: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.with_options(base_url=url + base).images.generate(prompt="x")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/v1/images/generation", "Did you mean /v1/images/generations?"), ("/v1/images/edits/", "/v1/images/edits?"),
        ("/v1/videos", "serves images"), ("/v1/chat/completions", "serves images"), ("/videos/1", "serves images"),
        ("/nowhere", "GET /openapi.json"), ("/ws", "/ws is a websocket"), ("/" + "x" * 5000, "GET /openapi.json"),
    ],
)  # fmt: skip
def test_a_path_that_is_no_route_is_told_what_is(url: str, path: str, told: str) -> None:
    answer = httpx.post(url + path, json=OK)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert told in answer.json()["error"]["message"]
    assert len(answer.text) < 400


def test_the_root_says_what_is_served(url: str) -> None:
    answer = httpx.get(url)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/plain; charset=utf-8")
    assert "serves spark" in answer.text


def test_what_is_too_large_names_its_setting(url: str) -> None:
    large = {"prompt": "x", "image": "A" * 9_000_000}
    refused = httpx.post(url + ROUTE, json=large)
    assert (refused.status_code, "KINDLING_MAX_BODY_MB" in refused.text) == (413, True)
    assert httpx.post(f"{url}/v1/images/edits", json=large).json()["error"]["code"] == "invalid_value"  # it was read
    for most, name in ((1, "KINDLING_MAX_BODY_MB"), (8.5, "KINDLING_MAX_EDIT_MB")):
        with served(max_edit_mb=most) as small:
            refused = httpx.post(f"{small}/v1/images/edits", json=large)
        assert (refused.status_code, name in refused.text) == (413, True)


def test_openais_client_hears_why_before_it_hangs_up() -> None:
    family = FakeFamily(gate=threading.Event())
    with served(family) as slow, openai.OpenAI(api_key="x", base_url=slow + "/v1", max_retries=0, timeout=4) as client:
        with pytest.raises(openai.InternalServerError) as late:
            client.images.generate(prompt="x")
        family.gate.set()
    assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")


def test_sglangs_benchmark_finds_a_server_its_model_and_the_memory() -> None:
    """Of `bench_serving` 0.5.23: it waits, asks for the model, draws by that name and reads the peak."""
    keyed = {"authorization": "Bearer key"}
    with served(api_keys="key") as url:
        waited = httpx.get(f"{url}/health")
        assert (waited.status_code, waited.content) == (200, b"")
        assert httpx.get(f"{url}/v1/model_info").status_code == 401
        path = httpx.get(f"{url}/v1/model_info", headers=keyed).json()["model_path"]
        assert Path(path).is_dir()
        asked = {"model": path, "prompt": "x", "n": 1, "response_format": "b64_json", "size": "64x64"}
        answer = httpx.post(url + ROUTE, json=asked, headers=keyed).json()
    assert answer["peak_memory_mb"] > 10
    assert answer["model"] == path


def test_sglangs_benchmark_asks_for_a_model_by_its_repository() -> None:
    with served(model="flux-schnell") as url:
        assert httpx.get(f"{url}/v1/model_info").json()["model_path"] == "black-forest-labs/FLUX.1-schnell"


def test_who_is_not_ready_is_unhealthy() -> None:
    engine = Engine(Settings(), boot=Editor().boot)
    app = create_app(engine, public=False)
    for state, status in (("starting", 503), ("ready", 200), ("draining", 503), ("failed", 503)):
        engine.state = state  # type: ignore[assignment]
        answer = asyncio.run(get(app, "/health"))
        assert (answer.status_code, answer.content) == (status, b"")


async def get(app: Any, path: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://kindling") as client:
        return await client.get(path)


@pytest.mark.parametrize("word", ["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"])
def test_openais_words_for_quality(client: openai.OpenAI, word: Any) -> None:
    answer = client.images.generate(prompt="x", size="64x64", quality=word, extra_body={})  # type: ignore[call-overload]
    assert answer.quality == word


LONG: dict[str, Any] = {"prompt": "very " * 119 + "red", "seed": 1, "size": "64x64", "num_inference_steps": 1}


@pytest.fixture(scope="module")
def drawing(server: Served) -> Iterator[openai.OpenAI]:
    """A client of a server that draws with spark."""
    with openai.OpenAI(api_key="unused", base_url=server.url + "/v1", max_retries=0, timeout=60) as client:
        yield client


def test_the_answer_says_how_much_of_a_prompt_was_read(server: Served, drawing: openai.OpenAI) -> None:
    """As a field, in events, and as a header, whatever door it came through."""
    told = {"given": 120, "read": 31}
    raw = drawing.images.with_raw_response.generate(prompt=LONG["prompt"], size="64x64", extra_body={"seed": 1})  # type: ignore[call-overload]
    assert (raw.headers["x-prompt-tokens"], raw.parse().prompt_tokens) == ("31/120", told)
    assert raw.parse().usage.input_tokens == 120
    native = httpx.post(f"{server.url}/generate", json={"prompt": "red"}, timeout=60)
    assert (native.headers["x-prompt-tokens"], native.json()["prompt_tokens"]) == ("1/1", {"given": 1, "read": 1})
    *_, last = drawing.images.generate(prompt=LONG["prompt"], stream=True, extra_body={"size": "64x64"})
    assert last.prompt_tokens == told  # type: ignore[union-attr]


def test_the_answer_names_words_that_spark_does_not_know(server: Served, drawing: openai.OpenAI) -> None:
    """Whatever door it came through, of a stream in its last event; where all are known, there is no such field."""
    asked = {"prompt": "a Cat in a hat", "size": "64x64", "num_inference_steps": 1}
    for path in ("/v1/images/generations", "/generate", "/fal/spark"):
        sizes = {} if path.startswith("/v1") else {"size": None, "width": 64, "height": 64}
        sent = {name: value for name, value in (asked | sizes | {"response_format": "b64_json"}).items() if value}
        answer = httpx.post(server.url + path, json=sent, timeout=60)
        assert answer.json()["unknown_words"] == ["Cat", "hat"], answer.text[:300]
        known = httpx.post(server.url + path, json=sent | {"prompt": "a red circle"}, timeout=60)
        assert "unknown_words" not in known.json()
    *_, last = drawing.images.generate(prompt="a Cat", stream=True, extra_body={"size": "64x64"})
    assert last.unknown_words == ["Cat"]  # type: ignore[union-attr]


def test_a_long_prompt_can_be_refused(server: Served) -> None:
    answer = httpx.post(server.url + ROUTE, json=LONG | {"long_prompts": "refuse"}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "prompt")
    assert "it has 120 tokens, and spark reads 31 of them" in answer.json()["error"]["message"]
    answer = httpx.post(server.url + ROUTE, json=LONG | {"long_prompts": "chunked"}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "long_prompts")


def test_a_worker_can_refuse_all_long_prompts(spark: Worker) -> None:
    engine = Engine(Settings(long_prompts="refuse"), boot=lambda *_: spark)
    with live(create_app(engine, public=False)) as url:
        refused = httpx.post(url + ROUTE, json=LONG, timeout=60)
        cut = httpx.post(url + ROUTE, json=LONG | {"long_prompts": "cut"}, timeout=60)
        short = httpx.post(url + ROUTE, json=LONG | {"prompt": "red"}, timeout=60)
    assert [each.status_code for each in (refused, cut, short)] == [422, 200, 200]
    assert "120 tokens, and spark reads 31" in refused.json()["error"]["message"]
