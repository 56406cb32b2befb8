"""Prompts and keys stay out of all that a worker says of itself: its output, metrics, health, traces and volume.

Canaries go through a real server process at its most talkative, in every way a request can carry them, and are looked
for wherever an operator, or whoever reads over the operator's shoulder, could see them.
"""

import base64
import contextlib
import gzip
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

import forked
from handler.core.tracebacks import UNSAID, outline
from otlp_plane import Receiver, receiving
from serving import Served

ROOT = Path(__file__).parents[2]
WORD, KEY, WRONG, TOKEN = "xylocanary", "key-canary-0451", "key-canary-wrong", "otlp-canary-77"
CANARIES = ("canary", base64.b64encode(WORD.encode()).decode()[:12].lower())
PROMPT = f"a {WORD} on a blue background"
GENERATIONS, NATIVE = "/v1/images/generations", "/generate"
QUICK: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 1}
FAULTS = 1_000_000  # the first of six seeds that fail, as the table in `FAULTY` says
FAULTY = f"""
import sys
import torch
from handler.core import errors
from handler.model import families

def boom(recipe):
    raise [
        ValueError(f"Cannot forward both `prompt`: {{recipe.prompt}} and `prompt_embeds`"),  # as diffusers words it
        RuntimeError(f"no such token: {{recipe.prompt!r}}"),
        KeyError(recipe.prompt),
        torch.OutOfMemoryError(f"CUDA out of memory while drawing {{recipe.prompt}}"),
        errors.NumericalError("NaN."),
        RuntimeError(f"CUDA error: an illegal memory access was encountered ({{recipe.prompt}})"),
    ][recipe.seed - {FAULTS}]

def run(family, pipeline, arguments, recipes, *others):
    if {FAULTS} <= recipes[0].seed < {FAULTS} + 6:
        boom(recipes[0])
    return drawn(family, pipeline, arguments, recipes, *others)

drawn, families.run = families.run, run
from handler.__main__ import main
sys.exit(main(["serve", "--port", "0"]))
"""


@dataclass
class Watched:
    """A talkative server, where its traces go, and its volume."""

    url: str
    receiver: Receiver
    volume: Path
    output: Path
    process: subprocess.Popen[str]
    served: Served

    def post(self, body: Any, path: str = GENERATIONS, key: str = KEY, **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"authorization": f"Bearer {key}", "content-type": "application/json", **headers}
        return httpx.post(self.url + path, content=content, headers=given, timeout=120)

    def get(self, path: str, method: str = "GET", **headers: str) -> httpx.Response:
        return httpx.request(method, self.url + path, headers={"authorization": f"Bearer {KEY}", **headers})

    def send(self, text: bytes) -> None:
        """Say `text` to the server, and hang up when it has answered or hung up itself."""
        address = urlsplit(self.url)
        with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
            connection.sendall(text)
            with contextlib.suppress(ConnectionResetError):
                connection.recv(1)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("secrecy")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("KINDLING_", "OTEL_"))}
    with receiving() as receiver, open(folder / "stdout", "w") as stdout:
        environ = {
            "KINDLING_LOG_LEVEL": "debug",
            "KINDLING_API_KEYS": KEY,
            "KINDLING_VOLUME": str(folder / "volume"),
            "KINDLING_GPU_PRICE": "1",
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
            "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer {TOKEN}",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        command = [sys.executable, "-c", FAULTY]
        with forked.Popen(
            command, cwd=ROOT, env={**clean, **environ}, stdout=stdout, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                served = Served(process)
                served.wait_for("is ready on")
                yield Watched(served.url, receiver, folder / "volume", folder / "stdout", process, served)
            finally:
                process.kill()


def drawn(server: Watched) -> None:
    """What is drawn."""
    assert server.post(QUICK | {"n": 2, "user": WORD}).status_code == 200
    assert server.post(QUICK, NATIVE).status_code == 200
    assert server.post(QUICK | {"prompt": f"{PROMPT} " * 200}).status_code == 200  # far more tokens than a model reads
    assert WORD in base64.b64decode(server.post(QUICK).json()["data"][0]["b64_json"]).decode("latin-1")
    for _ in range(2):
        assert server.post(QUICK, **{"idempotency-key": f"{WORD}-1"}).status_code == 200
    streamed = {"prompt": PROMPT, "stream": True, "partial_images": 2}
    assert "image_generation.completed" in server.post(streamed).text
    linked = server.post(QUICK | {"response_format": "url"}).json()["data"][0]["url"]
    assert WORD in httpx.get(linked).content.decode("latin-1")


def refused(server: Watched) -> None:
    """What is not, by what is wrong with it."""
    wrong: list[Any] = [
        {"prompt": [PROMPT]},
        {"prompt": {WORD: WORD}},
        {"prompt": PROMPT * 4000},
        QUICK | {"negative_prompt": WORD},
        QUICK | {WORD: 1},
        QUICK | {"model": WORD},
        QUICK | {"size": WORD},
        QUICK | {"size": 7, "quality": [WORD]},
        QUICK | {"scheduler": WORD},
        QUICK | {"step_cache": WORD},
        QUICK | {"output_format": WORD},
        QUICK | {"images": [f"http://{WORD}.example/a.png"]},
        QUICK | {"images": [f"data:image/png;base64,{base64.b64encode(WORD.encode()).decode()}"]},
        QUICK | {"stream": WORD},
        [PROMPT],
        PROMPT,
        b'{"prompt": "' + PROMPT.encode(),
        PROMPT.encode("utf-16"),
        b'{"prompt": "' + PROMPT.encode() + b'", "prompt": "' + PROMPT.encode() + b'"}',
        b'{"prompt": NaN, "user": "' + PROMPT.encode() + b'"}',
    ]
    for body in wrong:
        for path in (GENERATIONS, NATIVE):
            assert 400 <= server.post(body, path).status_code < 500, body
    # what these two are is for the model to say, as long as it says it to nobody else
    server.post(b'{"num_inference_steps": 1, "prompt": "\\ud800 ' + PROMPT.encode() + b'"}')
    server.post(b'{"num_inference_steps": 1, "prompt": "\\u0000 ' + PROMPT.encode() + b'"}')
    assert server.post(b" " * 9_000_000 + PROMPT.encode()).status_code == 413
    server.post(gzip.compress(json.dumps(QUICK).encode()), **{"content-encoding": "gzip"})
    server.post(PROMPT.encode(), **{"content-type": f"text/{WORD}"})
    form = {"data": {"prompt": PROMPT, WORD: WORD}, "files": {"image": (f"{WORD}.png", WORD.encode(), "image/png")}}
    for path in (GENERATIONS, "/v1/images/edits"):
        headers = {"authorization": f"Bearer {KEY}"}
        assert 400 <= httpx.post(server.url + path, headers=headers, timeout=60, **form).status_code < 500  # type: ignore[arg-type]


def strangers(server: Watched) -> None:
    """Keys that do not fit, and those in the wrong place."""
    for key in (WRONG, KEY + "x", f"{KEY} {KEY}", "-"):
        assert server.post(QUICK, key=key).status_code == 401
    assert server.get("/v1/models", authorization=f"Basic {KEY}").status_code == 401
    assert server.get("/v1/models", authorization=KEY).status_code == 401
    assert server.get(f"/v1/models?api_key={KEY}&prompt={WORD}").status_code == 200
    assert server.get("/ping", authorization=f"Bearer {WRONG}", cookie=f"key={KEY}").status_code == 200


def lost(server: Watched) -> None:
    """Ways that lead nowhere, and what is hardly HTTP."""
    for path in (f"/nowhere?prompt={WORD}&key={KEY}", f"/{WORD}", f"/v1/models/{WORD}", f"/%ff/{WORD}"):
        assert server.get(path).status_code == 404
    assert server.get(f"{NATIVE}?prompt={WORD}").status_code == 405
    server.get(GENERATIONS, "OPTIONS", origin=f"https://{WORD}.example", **{"access-control-request-method": "POST"})
    server.get("/metrics", origin=f"https://{WORD}.example", referer=f"https://{WORD}.example")
    server.get("/v1/models", traceparent=f"00-{WORD}", tracestate=f"{WORD}={WORD},{WORD}", baggage=f"{WORD}={KEY}")
    server.get("/v1/models", traceparent=f"00-{'ab' * 16}-{'cd' * 8}-01", tracestate=f"{WORD}!!={WORD}")
    server.get("/v1/models", **{"x-request-id": f"{WORD} {KEY}"})  # a space: it is not taken over
    for line in (f"GET /{WORD} canary\r\n\r\n", f"{WORD} / HTTP/1.1\r\n\r\n", f"GET / HTTP/1.1\r\n{WORD}\r\n\r\n"):
        server.send(line.encode())
    upgrade = f"GET /{WORD} HTTP/1.1\r\nHost: {WORD}\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    server.send(upgrade.encode())
    head = f"POST {NATIVE} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 500\r\n\r\n"
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(head.encode() + PROMPT.encode())  # and gone before the rest


def faults(server: Watched) -> None:
    """What breaks while it draws; the last fault breaks the worker."""
    for seed in range(FAULTS, FAULTS + 5):
        answer = server.post(QUICK | {"seed": seed})
        assert answer.status_code == 500
        assert WORD not in answer.text
        assert server.post(QUICK | {"seed": seed, "stream": True}).status_code == 500
    assert server.post(QUICK | {"seed": FAULTS + 5}).status_code == 500


def test_no_canary_is_ever_seen(watched: Watched) -> None:
    for kind in (drawn, refused, strangers, lost):
        kind(watched)
    told = [watched.get(path).text for path in ("/metrics", "/health/ready", "/v1/receipt", "/v1/models")]
    faults(watched)
    told += [watched.receiver.wait_for("POST /generate").name]
    watched.process.terminate()
    watched.process.wait(60)
    watched.served.reader.join(60)
    output = "".join(watched.served.lines) + watched.output.read_text()
    assert "DEBUG " in output
    assert '"prompt_length": ' in output
    kept = watched.volume / "kept"  # pictures by URL, with the parameters that every PNG has
    assert [path for path in kept.rglob("*") if path.is_file()]
    files = [path for path in watched.volume.rglob("*") if path.is_file() and not path.is_relative_to(kept)]
    written = [path.read_bytes().decode("latin-1") for path in files]
    assert written
    sent = [body.decode("latin-1") for body in watched.receiver.bodies]
    seen = [*output.splitlines(), *told, *written, *sent]
    assert not [text for text in seen if any(canary in text.lower() for canary in CANARIES)]


def raised(act: Callable[[], object]) -> Exception:
    try:
        act()
    except Exception as error:
        return error
    raise AssertionError


def test_the_log_says_what_went_wrong_and_nothing_that_was_said() -> None:
    def inner() -> None:
        raise KeyError(WORD)

    def outer() -> None:
        try:
            inner()
        except KeyError as error:
            raise RuntimeError(f"CUDA error: an illegal memory access was encountered in {WORD}") from error

    told = outline(raised(outer))
    assert told.index(", in inner") < told.index(f"KeyError: {UNSAID}") < told.rindex(", in outer")
    assert told.endswith(f"RuntimeError: CUDA error, illegal memory access {UNSAID}\n")
    assert WORD not in told


@pytest.mark.parametrize(
    "said",
    ["no such token: 猫", repr("caf\xe9".encode()), "12 47", "ID 4711", "p r o m p t", "Prompt!", "31415926"],
)
def test_no_part_of_a_prompt_is_told_however_it_is_quoted(said: str) -> None:
    assert said not in outline(ValueError(said))


def test_an_error_that_is_its_own_cause_is_told_once() -> None:
    error = RuntimeError("a loop")
    error.__cause__ = error
    assert outline(error) == f"RuntimeError: {UNSAID}\n"
