"""Answers that are the picture itself: which requests get one, and what its head says. A model that paints its seed."""

import io
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from fakes import Editor
from handler import Engine, Settings, create_app
from handler.core.errors import Unsupported
from handler.server.accept import forms
from serving import live

ACCEPTED = ("image/png", "application/json")

SMALL: dict[str, Any] = {"prompt": "a red circle", "seed": 7}
ROUTES = ("/generate", "/v1/images/generations", "/v1/images/edits")
WANTED = {
    "": (),
    "*/*": (),
    "application/json": (),
    "application/json, image/png": (),
    "text/html": (),
    "image/png;q=0.2, application/json": (),
    "image/png": ("png",),
    "IMAGE/JPEG": ("jpeg",),
    "image/*": ("png", "jpeg", "webp"),
    "image/*;q=0.5, image/webp": ("webp", "png", "jpeg"),
    "image/png;q=0, image/*": ("jpeg", "webp"),
    "image/avif,image/webp,*/*;q=0.8": ("webp",),
    "image/png;q=0.5;x=1, application/json;q=0.4": ("png",),
    "image/png;q=nonsense": ("png",),
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with live(create_app(Engine(Settings(), boot=Editor().boot), public=False)) as found:
        yield found


def post(url: str, route: str, accept: str = "image/png", **fields: Any) -> httpx.Response:
    body = {"json": SMALL | fields}
    if route.endswith("edits"):
        Image.new("RGB", (64, 64)).save(file := io.BytesIO(), "PNG")
        texts = {name: str(value) for name, value in (SMALL | {"strength": 0.5} | fields).items()}
        body = {"data": texts, "files": {"image": ("a.png", file.getvalue())}}  # type: ignore[dict-item]
    return httpx.post(url + route, headers={"accept": accept}, **body)  # type: ignore[arg-type]


@pytest.mark.parametrize("accept", WANTED)
def test_what_is_wanted(accept: str) -> None:
    assert forms(accept) == WANTED[accept]


def test_where_pictures_come_first() -> None:
    assert forms("", pictures_first=True) == forms("*/*", pictures_first=True) == ("png", "jpeg", "webp")
    assert forms("application/json", pictures_first=True) == ()
    assert forms("text/html", pictures_first=True) == ()


def test_only_pictures_that_are_not_made() -> None:
    with pytest.raises(Unsupported, match="image/png, image/jpeg, image/webp"):
        forms("image/gif, image/avif")


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("route", ROUTES)
def test_a_picture_as_it_is(url: str, route: str, form: str) -> None:
    answer = post(url, route, f"image/{form}")
    assert (answer.status_code, answer.headers["content-type"]) == (200, f"image/{form}")
    picture = Image.open(io.BytesIO(answer.content))
    picture.load()
    assert picture.format == form.upper()
    told = [answer.headers[name] for name in ("x-seed", "x-model", "cache-control")]
    assert told == ["7", "spark", "no-store"]
    assert float(answer.headers["x-inference-ms"]) > 0


def test_any_picture_is_as_the_body_says(url: str) -> None:
    said = {"output_format": "jpg", "output_compression": 80}
    assert post(url, "/generate", "image/*", **said).headers["content-type"] == "image/jpeg"
    assert post(url, "/generate", "image/*").headers["content-type"] == "image/png"
    assert post(url, "/generate", "image/*", format="webp").headers["content-type"] == "image/webp"
    hub = {"inputs": "x", "parameters": {"format": "jpg"}}
    assert httpx.post(url, json=hub, headers={"accept": "image/jpeg"}).headers["content-type"] == "image/jpeg"
    assert post(url, ROUTES[1], "image/*", format="webp").json()["error"]["param"] == "format"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"num_images": 2}, "n"),
        ({"response_format": "url"}, "response_format"),
        ({"output_format": "webp"}, "output_format"),
        ({"steps": 100}, "num_inference_steps"),
        ({"output_format": "gif"}, "output_format"),
        ({"format": "webp"}, "format"),
        ({"output_format": ["png"]}, "output_format"),
    ],
)
def test_what_is_refused_is_told_in_json(url: str, fields: dict[str, Any], param: str) -> None:
    answer = post(url, "/generate", **fields)
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["param"] == param


def test_where_one_picture_is_all_there_is_no_other_answer_is_advised(url: str) -> None:
    body = {"inputs": "x", "parameters": {"n": 2}}
    for accept in ACCEPTED:
        answer = httpx.post(url, json=body, headers={"accept": accept}).json()
        assert answer["error"]["message"] == "n: one picture is drawn for a request here."


@pytest.mark.parametrize("count", ["1", -1, 0, [2]])
def test_a_count_that_is_none_is_told_as_where_json_is_wanted(url: str, count: Any) -> None:
    for path, body in (("/generate", {"prompt": "x", "n": count}), ("/", {"inputs": "x", "parameters": {"n": count}})):
        told = [httpx.post(url + path, json=body, headers={"accept": each}).json() for each in ACCEPTED]
        assert told[0] == told[1]
        assert told[0]["error"]["param"] == "n"


def test_events_come_as_events(url: str) -> None:
    hub = httpx.post(url, json={"inputs": "x", "parameters": {"stream": True}}, headers={"accept": "image/png"})
    for answer in (post(url, "/generate", stream=True), hub):
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert (
            '"type": "image_generation.completed"' in answer.text
            or '"type":"image_generation.completed"' in answer.text
        )


def test_under_one_key_a_picture_comes_again_and_no_other(url: str) -> None:
    def ask(accept: str) -> httpx.Response:
        return httpx.post(url + "/generate", json={"prompt": "x"}, headers={"accept": accept, "idempotency-key": "k"})

    first, again = ask("image/png"), ask("image/png")
    assert (again.content, again.headers["idempotent-replayed"]) == (first.content, "true")
    assert ask("image/webp").json()["error"]["code"] == "idempotency_key_reused"


@pytest.mark.parametrize("path", ["", "/", "/models/spark", "/models/kindling/spark"])
def test_hugging_faces_client(url: str, path: str) -> None:
    with InferenceClient(model=url + path) as client:
        picture = client.text_to_image("a red circle", seed=7, width=128, height=64, num_inference_steps=4)
    assert (picture.size, picture.getpixel((0, 0))) == ((128, 64), (8, 8, 8))


def test_hugging_faces_client_by_its_base_url_is_told_what_is_wrong(url: str) -> None:
    with InferenceClient(base_url=url) as client:
        assert client.text_to_image("a red circle").size == (256, 256)
        with pytest.raises(HfHubHTTPError, match="less than or equal to 50"):
            client.text_to_image("a red circle", num_inference_steps=100)
        with pytest.raises(HfHubHTTPError, match="This worker serves spark, not 'flux-dev'"):
            client.text_to_image("a red circle", model=url + "/models/flux-dev")


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_required_parameter", "inputs"),
        ({"inputs": 7}, "invalid_type", "inputs"),
        ({"inputs": "x", "parameters": [7]}, "invalid_type", "parameters"),
        ({"inputs": "x", "parameters": False}, "invalid_type", "parameters"),
        ({"inputs": "x", "options": 7}, "invalid_type", "options"),
        ({"inputs": "x", "prompt": "x"}, "unknown_parameter", "prompt"),
        ({"inputs": "x", "parameters": {"num_images_per_prompt": 2}}, "out_of_range", "n"),
        ({"inputs": "x", "parameters": {"frames": 2}}, "unknown_parameter", "frames"),
        ({"inputs": "eA==", "parameters": {"prompt": "a cat"}}, "invalid_value", "parameters.prompt"),  # an image's
        ({"inputs": "a", "parameters": {"positive_prompt": "b"}}, "invalid_value", "parameters.prompt"),
        ([], "invalid_type", None),
    ],
)
def test_what_hugging_faces_body_may_not_be(url: str, body: Any, code: str, param: str | None) -> None:
    for accept in ("*/*", "application/json"):
        error = httpx.post(url, json=body, headers={"accept": accept}).json()["error"]
        assert (error["code"], error["param"]) == (code, param)


def test_hugging_faces_route_answers_json_where_that_is_wanted(url: str) -> None:
    assert httpx.post(url, json={"inputs": "x", "parameters": None}).headers["content-type"] == "image/png"
    body = {"inputs": "x", "parameters": {"guidance_scale": 1, "seed": 7}, "options": {"wait_for_model": True}}
    answer = httpx.post(url, json=body, headers={"accept": "application/json"}).json()
    assert (answer["seed"], answer["image"]["content_type"]) == (7, "image/png")
    assert "serves spark" in httpx.get(url).text
