"""fal's fields and answer on every worker, at /fal/MODEL: as an app of that owner and name fal's clients ask for it."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from fakes import Editor
from handler import Engine, Settings, create_app
from serving import live

ASKED: dict[str, Any] = {
    "prompt": "a red circle",
    "image_size": {"width": 128, "height": 64},
    "num_images": 2,
    "seed": 7,
    "enable_safety_checker": True,
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    alone = Settings(batch=1)  # a picture's file says how many were drawn together
    with live(create_app(Engine(alone, boot=Editor().boot), public=False)) as found:
        yield found


def ask(url: str, path: str = "/fal/spark", **fields: Any) -> httpx.Response:
    return httpx.post(url + path, json=ASKED | fields, headers={"accept": "image/png"})


def test_pictures_have_addresses_that_can_be_asked(url: str) -> None:
    answer = ask(url).json()
    assert answer.keys() == {"images", "timings", "seed", "has_nsfw_concepts", "prompt", "notes"}
    assert (answer["seed"], answer["prompt"], answer["has_nsfw_concepts"]) == (7, "a red circle", [False, False])
    assert answer["timings"]["inference"] >= 0
    first, second = answer["images"]
    assert {"content_type": "image/png", "width": 128, "height": 64}.items() <= second.items()
    inside = ask(url, sync_mode=True).json()["images"][0]["url"]
    assert inside.startswith("data:image/png;base64,")
    assert httpx.get(first["url"]).content == base64.b64decode(inside.partition(",")[2])


def test_a_model_is_asked_for_by_its_path(url: str) -> None:
    other = ask(url, "/fal/flux-dev")
    assert (other.status_code, other.json()["error"]["param"]) == (404, "model")
    twice = ask(url, "/fal/spark", model="spark")
    assert (twice.status_code, twice.json()["error"]["message"].partition(";")[0]) == (
        400,
        "The path names the model already",
    )


def test_events_end_with_the_answer(url: str) -> None:
    with httpx.stream("POST", url + "/fal/spark", json=ASKED | {"stream": True}) as answer:
        *_, last = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert last["type"] == "image_generation.completed"
    assert len(last["images"]) == 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"sync_mode": "yes"}, "sync_mode"),
        ({"image_size": "huge"}, "image_size"),
        ({"n": 3}, "n"),
        ({"loras": [{"path": "ink", "name": "oil"}]}, "loras"),
    ],
)
def test_what_is_wrong_is_named(url: str, fields: dict[str, Any], param: str) -> None:
    refused = ask(url, **fields)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_fals_clients_send_their_key_in_their_way() -> None:
    """On every route, where it is looked at as any other."""
    keyed = Settings(api_keys=("choose:one",))
    with live(create_app(Engine(keyed, boot=Editor().boot))) as url:
        for key, status in (("choose:one", 200), ("another", 401), ("", 401)):
            head = {"authorization": f"Key {key}".strip()}
            assert httpx.post(url + "/fal/spark", json=ASKED, headers=head).status_code == status
            for path in ("/v1/models", "/v1/deployments", "/metrics", "/queue"):
                assert httpx.get(url + path, headers=head).status_code == status
