"""The routes of deployments: what the command line says, as JSON, for whoever may ask."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema_rs import Draft202012Validator

from fakes import Editor
from handler import MODELS, Engine, Settings, create_app
from handler.__main__ import main
from handler.api.deploying.platforms import PLATFORMS
from serving import live

ROUTE = "/v1/deployments"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Of a worker that serves spark."""
    settings = Settings(volume=tmp_path_factory.mktemp("volume"))
    with (
        live(create_app(Engine(settings, boot=Editor().boot), public=False)) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def components(client: httpx.Client) -> Any:
    return client.get("/openapi.json").json()["components"]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_it_is_what_the_command_line_says(
    client: httpx.Client,
    components: Any,
    platform: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("KINDLING_VOLUME", str(tmp_path))
    options: dict[str, Any] = {"gpu": "L40S", "precision": "fp8", "min": 1, "max": 3, "region": "eu"}
    if platform == "cloudrun":
        options["gpu"] = "L4"
    for chosen in ({}, {name: value for name, value in options.items() if name not in PLATFORMS[platform].lacks}):
        words = [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
        precise = {} if chosen else {"precision": "auto"}
        assert main(["deploy", platform, "flux-dev", *words, "--json"]) == 0
        answer = client.get(f"{ROUTE}/{platform}", params={"model": "flux-dev", **precise, **chosen})
        assert answer.json() == json.loads(capsys.readouterr().out)
        Draft202012Validator({"$ref": "#/components/schemas/Deployment", "components": components}).validate(
            answer.json()
        )


def test_without_a_model_it_is_the_served_one(client: httpx.Client) -> None:
    assert client.get(f"{ROUTE}/docker").json()["model"] == "spark"
    assert client.get(f"{ROUTE}/docker", params={"model": "", "gpu": "", "min": ""}).json()["model"] == "spark"


def test_what_can_be_chosen(client: httpx.Client, components: Any) -> None:
    found = client.get(ROUTE).json()
    Draft202012Validator({"$ref": "#/components/schemas/Deployments", "components": components}).validate(found)
    assert [row["id"] for row in found["platforms"]] == [*PLATFORMS]
    assert [row["id"] for row in found["models"]] == [*MODELS]
    assert found["precisions"][0]["id"] == "auto"
    gpus = {row["id"]: {gpu["id"]: gpu for gpu in row["gpus"]} for row in found["platforms"]}
    assert [*gpus["cloudrun"]] == ["L4", "RTX PRO 6000"]
    assert 0 < gpus["modal"]["L4"]["dollars_per_s"] < gpus["modal"]["H100"]["dollars_per_s"]
    for row in found["platforms"]:  # each of these can be asked for, or is refused with a reason of its own
        assert row["lacks"] == PLATFORMS[row["id"]].lacks
        for gpu in [] if "gpu" in row["lacks"] else row["gpus"]:
            answer = client.get(f"{ROUTE}/{row['id']}", params={"gpu": gpu["id"]})
            assert answer.status_code == 200 or "bfloat16" in answer.text, answer.text


@pytest.mark.parametrize(
    ("path", "status", "param", "told"),
    [
        ("cloudrun?model=sdxl&gpu=H100", 422, "gpu", "cloudrun has no 'H100', as far as is known here. It has: L4,"),
        ("cloudrun?model=flux-dev&gpu=L4&precision=bf16", 422, "gpu", "On cloudrun these would do: RTX PRO 6000."),
        ("convox?model=flux-dev&precision=nvfp4", 422, "precision", "On convox these would do with --precision auto"),
        ("convox?model=flux2-dev&precision=bf16", 422, "model", "On convox these would do with --precision auto"),
        ("docker?precision=int4", 422, "precision", "precision should be one of auto, fp32,"),
        ("fal?gpu=H100", 422, "gpu", "--gpu means nothing for fal: platform/fal_app.py rents the cheapest"),
        ("convox?min=0", 422, "min", "--min should be 1 or more for convox, not 0."),
        ("modal?min=3&max=2", 422, "max", "--max should be 3 or more, not 2."),
        ("modal?min=some", 400, "min", "min should be a whole number of up to nine digits,"),
        ("modal?max=-1", 400, "max", "max should be a whole number of up to nine digits,"),
        ("modal?max=" + "9" * 5000, 400, "max", "max should be a whole number of up to nine digits,"),
        ("sky?region=eu%0Aruncmd", 422, "region", "--region should be a place's name, such as us-east-1,"),
        ("runpod?region=--image", 422, "region", "--region should be a place's name, such as us-east-1,"),
        ("modal?model=../../etc/passwd", 404, "model", "There is no model '../../etc/passwd'."),
        ("modal?write=/tmp/x", 400, "write", "There is no field 'write'. Known: model, gpu,"),
        ("azure", 404, None, "There is no platform 'azure'. Known: modal,"),
    ],
)
def test_what_cannot_work_is_refused(
    client: httpx.Client, path: str, status: int, param: str | None, told: str
) -> None:
    answer = client.get(f"{ROUTE}/{path}")
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert told in error["message"]
    assert "retry-after" not in answer.headers  # another worker would say the same


def test_it_wants_a_key_and_tells_none(tmp_path: Path) -> None:
    settings = Settings(volume=tmp_path, api_keys=("canary-key",), webhook_secret="whsec_" + "a" * 40)
    app = create_app(Engine(settings, boot=Editor().boot))
    with live(app) as url:
        for path in (ROUTE, *(f"{ROUTE}/{name}" for name in PLATFORMS)):
            assert httpx.get(url + path).status_code == 401
            answer = httpx.get(url + path, headers={"authorization": "Bearer canary-key"})
            assert answer.status_code == 200
            assert not [word for word in ("canary-key", "whsec_", str(tmp_path)) if word in answer.text]
