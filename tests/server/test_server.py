"""The real server process with spark, over real HTTP: the official client, bad input, health, limits, keys."""

import base64
import concurrent.futures
import http.client
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from PIL import Image

import forked
from handler.core.errors import SettingsError
from handler.server.process import _ports
from serving import ROOT, Served, serving

PROMPT = "a red circle on a blue background"
OK = {"prompt": PROMPT, "seed": 5, "num_inference_steps": 1}


@pytest.fixture(scope="session")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="unused", base_url=server.url + "/v1", max_retries=0, timeout=120) as client:
        yield client


def post(server: Served, payload: Any, path: str = "/v1/images/generations", **options: Any) -> httpx.Response:
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return httpx.post(server.url + path, content=body, timeout=120, **options)


def picture(data: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    image.load()
    return image


@pytest.fixture(scope="session")
def baseline(server: Served) -> str:
    return str(post(server, OK).json()["data"][0]["b64_json"])


def test_the_official_client_draws(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        model="spark", prompt=PROMPT, n=2, size="320x200", response_format="b64_json", user="me",
        extra_body={"seed": 7, "num_inference_steps": 1},
    )  # fmt: skip
    assert [picture(d.b64_json or "").size for d in answer.data or []] == [(320, 200)] * 2
    assert [d.seed for d in answer.data or []] == [7, 8]  # type: ignore[attr-defined]
    assert (answer.output_format, answer.size, answer.background) == ("png", "320x200", "opaque")
    assert answer.usage
    assert answer.usage.input_tokens_details.image_tokens == answer.usage.output_tokens == 0
    assert answer.usage.input_tokens == answer.usage.total_tokens == answer.usage.input_tokens_details.text_tokens > 4
    extra = answer.model_extra or {}
    assert (extra["width"], extra["height"], extra["model"]) == (320, 200, "spark")
    assert extra["inference_ms"] > 0
    assert answer.created > 1_700_000_000


def test_a_seed_is_drawn_and_told(client: openai.OpenAI) -> None:
    first, second = (client.images.generate(prompt=PROMPT, extra_body={"num_inference_steps": 1}) for _ in range(2))
    seeds = [answer.data[0].seed for answer in (first, second)]  # type: ignore[index,attr-defined]
    assert seeds[0] != seeds[1]
    again = client.images.generate(prompt=PROMPT, extra_body={"num_inference_steps": 1, "seed": seeds[0]})
    assert again.data[0].b64_json == first.data[0].b64_json  # type: ignore[index]


def test_one_of_n_is_the_picture_alone(client: openai.OpenAI) -> None:
    extra = {"num_inference_steps": 1}
    several = client.images.generate(prompt=PROMPT, n=3, extra_body={**extra, "seed": 10})
    alone = client.images.generate(prompt=PROMPT, extra_body={**extra, "seed": 12})
    assert several.data[2].b64_json == alone.data[0].b64_json  # type: ignore[index]


def test_the_repository_name_is_an_alias_and_echoed(client: openai.OpenAI) -> None:
    answer = client.images.generate(model="kindling/spark", prompt=PROMPT, extra_body={"num_inference_steps": 1})
    assert (answer.model_extra or {})["model"] == "kindling/spark"


@pytest.mark.parametrize(("form", "options"), [("jpeg", {"output_compression": 70}), ("webp", {}), ("png", {})])
def test_formats(client: openai.OpenAI, form: Any, options: dict[str, Any]) -> None:
    answer = client.images.generate(prompt=PROMPT, output_format=form, extra_body={"num_inference_steps": 1}, **options)
    assert picture(answer.data[0].b64_json or "").format == form.upper()  # type: ignore[index]
    assert answer.output_format == form


def test_the_official_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as unknown:
        client.images.generate(prompt=PROMPT, extra_body={"stepz": 3})
    assert (unknown.value.param, unknown.value.code) == ("stepz", "unknown_parameter")
    with pytest.raises(openai.UnprocessableEntityError) as steps:
        client.images.generate(prompt=PROMPT, extra_body={"num_inference_steps": 51})
    assert (steps.value.param, steps.value.code) == ("num_inference_steps", "out_of_range")
    with pytest.raises(openai.NotFoundError) as model:
        client.images.generate(model="dall-e-3", prompt=PROMPT)
    assert (model.value.param, model.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("flux-dev")


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["spark", "kindling/spark"]
    assert client.models.retrieve("kindling/spark").owned_by == "kindling"


def test_native_route(server: Served) -> None:
    body = post(server, {**OK, "width": 96, "height": 64}, "/generate").json()
    (image,) = body["images"]
    assert picture(image["b64_json"]).size == (96, 64)
    assert image["parameters"]["steps"] == 1
    assert body["peak_memory_mb"] > 100
    assert set(image["stages_s"]) == {"queue", "encode", "denoise", "decode", "serialize"}


BAD: list[tuple[Any, int, str | None, str]] = [
    (b"", 400, None, "invalid_json"),
    (b"{", 400, None, "invalid_json"),
    (b"\xff\xfe", 400, None, "invalid_json"),
    (b"[1]", 400, None, "invalid_type"),
    (b'"text"', 400, None, "invalid_type"),
    (b'{"prompt": "x", "guidance_scale": NaN}', 400, None, "invalid_json"),
    (b'{"prompt": "x", "guidance_scale": -Infinity}', 400, None, "invalid_json"),
    (b'{"prompt": "x", "prompt": "y"}', 400, None, "invalid_json"),
    (b'{"prompt": "x", "guidance_scale": 1e999}', 400, None, "invalid_json"),
    (b'{"prompt": "x", "guidance_scale": 1e300}', 422, "guidance_scale", "out_of_range"),
    (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400, None, "invalid_json"),
    (b'{"prompt": "x", "seed": ' + b"9" * 500 + b"}", 400, None, "invalid_json"),
    (b'{"prompt": "x", "seed": ' + b"9" * 300 + b"}", 422, "seed", "out_of_range"),
    (b"[" * 100_000, 400, None, "invalid_json"),
    ({}, 400, "prompt", "missing_required_parameter"),
    ({"prompt": ["x"]}, 400, "prompt", "invalid_type"),
    ({"prompt": "x" * 32_001}, 422, "prompt", "out_of_range"),
    ({"prompt": "x" * 100_000}, 422, "prompt", "out_of_range"),
    ({**OK, "size": "17x17"}, 422, "size", "out_of_range"),
    ({**OK, "size": "0x0"}, 422, "size", "out_of_range"),
    ({**OK, "size": "100000x8"}, 422, "size", "out_of_range"),
    ({**OK, "size": "1024x"}, 400, "size", "invalid_value"),
    ({**OK, "n": 11}, 422, "n", "out_of_range"),
    ({**OK, "n": 5}, 422, "n", "out_of_range"),
    ({**OK, "n": "two"}, 400, "n", "invalid_type"),
    ({**OK, "num_inference_steps": 51}, 422, "num_inference_steps", "out_of_range"),
    ({**OK, "num_inference_steps": 10**9}, 422, "num_inference_steps", "out_of_range"),
    ({**OK, "num_inference_steps": 9}, 422, "num_inference_steps", "out_of_range"),
    ({**OK, "scheduler": "lcm"}, 422, "scheduler", "out_of_range"),
    ({**OK, "scheduler": "dpm++"}, 422, "scheduler", "out_of_range"),
    ({**OK, "model": "nope"}, 404, "model", "model_not_found"),
    ({**OK, "model": "spar\u212a"}, 404, "model", "model_not_found"),  # whose lower case is spark, and no header's
    ({**OK, "model": "flux-dev"}, 404, "model", "model_not_found"),
    ({**OK, "response_format": "file"}, 422, "response_format", "out_of_range"),
    ({**OK, "negative_prompt": "blur"}, 400, "negative_prompt", "unsupported_parameter"),
    ({**OK, "colour": "red"}, 400, "colour", "unknown_parameter"),
]


@pytest.mark.parametrize(("payload", "status", "param", "code"), BAD, ids=lambda v: str(v)[:40])
def test_bad_input_is_told_what_is_wrong(
    server: Served, payload: Any, status: int, param: str | None, code: str
) -> None:
    answer = post(server, payload)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code)
    assert error["type"] == "invalid_request_error"
    assert 10 < len(error["message"]) < 300
    assert param is None or param in error["message"] or code == "unsupported_parameter" or param == "model"


def test_after_all_that_the_picture_is_the_same(server: Served, baseline: str) -> None:
    for payload, *_ in BAD[::4]:
        post(server, payload)
    assert post(server, OK).json()["data"][0]["b64_json"] == baseline


def test_unknown_routes_and_methods_speak_the_envelope(server: Served) -> None:
    assert httpx.get(server.url + "/nowhere").json()["error"]["code"] == "not_found"
    wrong = httpx.get(server.url + "/v1/images/generations")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"


def test_requests_at_the_same_time_do_not_mix(server: Served, baseline: str) -> None:
    other = {**OK, "seed": 6}
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda payload: post(server, payload).json(), [OK, other] * 3))
    pictures = [answer["data"][0]["b64_json"] for answer in answers]
    assert pictures[0::2] == [baseline] * 3
    assert len(set(pictures[1::2])) == 1
    assert pictures[1] != baseline


def test_a_client_that_leaves_stops_its_work(server: Served, baseline: str) -> None:
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port)
    slow = json.dumps({"prompt": PROMPT, "size": "2048x2048", "n": 4, "num_inference_steps": 8}).encode()
    connection.request("POST", "/v1/images/generations", slow, {"Content-Type": "application/json"})
    connection.close()  # four such pictures would take minutes; the next request must not wait for them
    answer = post(server, OK, "/generate").json()["images"][0]
    assert answer["b64_json"] == baseline
    assert httpx.get(server.url + "/ping").status_code == 200


def test_health_when_ready(server: Served) -> None:
    assert httpx.get(server.url + "/ping").status_code == 200
    assert httpx.get(server.url + "/health/live").json() == {"status": "live"}
    ready = httpx.get(server.url + "/health/ready")
    assert ready.status_code == 200
    ledger = ready.json()["cold_start"]
    assert (ready.json()["status"], ledger["outcome"], ledger["model"]) == ("ready", "ready", "spark")
    assert [phase["name"] for phase in ledger["phases"]] == ["volume", "import", "weights", "artifacts", "warm"]
    assert sum(phase["seconds"] for phase in ledger["phases"]) <= ledger["total_s"]
    printed = [json.loads(line)["cold_start"] for line in server.lines if line.startswith('{"cold_start"')]
    assert printed == [ledger]


def test_bodies_are_limited_before_they_are_read(server: Served) -> None:
    assert post(server, b" " * 9_000_000).status_code == 413
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    chunks = (b" " * 1_000_000 for _ in range(50))
    try:
        connection.request("POST", "/generate", chunks, encode_chunked=True)
        assert connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError):
        pass  # the server may hang up while we still send
    finally:
        connection.close()
    assert httpx.get(server.url + "/ping").status_code == 200


def test_the_pasted_curl_line_works(server: Served, tmp_path: Path) -> None:
    from handler.server.process import SAVE

    command = (
        f"curl -s {server.url}/v1/images/generations -H 'Content-Type: application/json' "
        f'-d \'{{"prompt": "{PROMPT}"}}\' | {sys.executable} -c "{SAVE}"'
    )
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, timeout=120)
    with Image.open(tmp_path / "circle.png") as image:
        assert image.size == (256, 256)


def test_starting_stopping_and_keys() -> None:
    """One server from its first moment to SIGTERM: 204 while starting, held requests, keys, a clean end."""
    with serving({"KINDLING_API_KEYS": "one,two", "KINDLING_METADATA": "false"}, ready=False, anew=True) as server:
        assert httpx.get(server.url + "/ping").status_code in (200, 204)
        assert httpx.get(server.url + "/health/live").status_code == 200
        for headers in ({}, {"Authorization": "Bearer on"}, {"Authorization": "Basic one"}, {"Authorization": "one"}):
            for path in ("/v1/models", "/health/ready", "/generate", "/nowhere", "/docs"):
                refused = httpx.get(server.url + path, headers=headers)
                assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        key = {"Authorization": "Bearer two"}
        held = post(server, OK, headers=key)  # sent while the model may still be loading: it waits
        assert held.status_code == 200
        assert b"iTXt" not in base64.b64decode(held.json()["data"][0]["b64_json"])
        wrong = openai.OpenAI(api_key="wrong", base_url=server.url + "/v1", max_retries=0)
        with wrong, pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(post, server, {**OK, "size": "1024x1024", "num_inference_steps": 8}, headers=key)
            while not httpx.get(server.url + "/health/ready", headers=key).json()["drawing"]:
                assert not running.done()
            server.process.send_signal(signal.SIGTERM)
            assert running.result().status_code == 200  # what was being drawn is finished and delivered
        assert server.process.wait(60) == 0


def test_stopping_while_loading_is_a_clean_end() -> None:
    with serving(ready=False, anew=True) as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0


def serve(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "handler", "serve", "--port", "0", *arguments]
    start = subprocess.run if "KINDLING_COLD_START_BUDGET_S" in environ else forked.run
    return start(
        command, cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("environ", "arguments", "code", "text"),
    [
        ({"KINDLING_COLD_START_BUDGET_S": "0.6"}, (), 124, "exceeded its budget of 0.6 s in phase"),
        ({"KINDLING_MODEL": "flux-schnell", "KINDLING_VOLUME": "/nonexistent"}, (), 1, "handler fetch flux-schnell"),
        ({"KINDLING_MODEL": "nope"}, (), 2, "There is no model 'nope'"),
        ({"KINDLING_WHAT": "1"}, (), 2, "KINDLING_WHAT is not a setting"),
        ({"KINDLING_DEVICE": "cuda"}, (), 1, "no GPU"),
        ({}, ("--host", "0.0.0.0"), 2, "KINDLING_API_KEYS"),
        ({}, ("--host", "203.0.113.1"), 2, "KINDLING_API_KEYS"),
    ],
)
def test_a_server_that_cannot_start_says_why(
    environ: dict[str, str], arguments: tuple[str, ...], code: int, text: str
) -> None:
    out = serve({"HOME": "/tmp", **environ}, *arguments)
    assert out.returncode == code, out.stderr
    assert text in out.stderr
    assert "Traceback" not in out.stderr.split("Timeout")[0]


def test_a_taken_port_is_named(server: Served) -> None:
    port = str(urlsplit(server.url).port)
    out = serve({"HOME": "/tmp"}, "--port", port)
    assert out.returncode == 2
    assert f"127.0.0.1:{port}" in out.stderr


def test_a_health_port_that_is_none_is_named() -> None:
    out = serve({"HOME": "/tmp", "PORT_HEALTH": "ping"})
    assert (out.returncode, "PORT_HEALTH" in out.stderr) == (2, True)
    for port in ("65536", "-1", "0", "9" * 5000, "\u0663"):
        with pytest.raises(SettingsError, match=r"^PORT_HEALTH should be a port, 1 to 65535, not '.{1,80}'\.$"):
            _ports(8000, {"PORT_HEALTH": port})
    assert _ports(8000, {"PORT_HEALTH": "8001"}) == [8000, 8001]


def test_a_non_commercial_licence_is_logged() -> None:
    environ = {"KINDLING_MODEL": "flux-dev", "KINDLING_VOLUME": "/nonexistent", "HOME": "/tmp"}
    assert "Non-commercial use only" in serve(environ).stderr
