"""Bodies that are meant to be a burden, on a real server: too many values, never whole, too many at once."""

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from test_faults import PATIENCE_S, Faulty, faulty

from fakes import FakeFamily
from handler import Api, Settings
from handler.api.asking import LIGHT
from handler.core.deadline import Deadline
from handler.core.errors import DeadlineExceeded, QueueFull
from handler.core.untrusted import MARKED
from handler.server import bodies
from handler.server.record import Seen
from handler.server.room import SMALL, Room
from serving import editors_site

DRAWING = ("/v1/images/generations", "/v1/images/edits", "/generate", "/", "/models/x", "/fal/x", "/workflows/a")
COMFY = ("/prompt", "/api/prompt", "/queue", "/history", "/interrupt", "/free", "/api/jobs/cancel")
DOORS = [
    *(("POST", path) for path in (*DRAWING, "/workflows", *COMFY, "/explain", "/settings", "/settings/a")),
    ("PUT", "/workflows/a"),
]
FORM = {"content-type": "multipart/form-data; boundary=b"}
KEEPING = ("/userdata/a.json", "/upload/image", "/upload/mask")  # what reads no JSON
HELD, LARGE = 4_000_000, 900_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    """With room for four large bodies, and the routes of ComfyUI's page."""
    room = {"FAULTY_HELD": str(HELD), "KINDLING_MAX_BODY_MB": "1", "KINDLING_MAX_EDIT_MB": "1"}
    volume, site = tmp_path_factory.mktemp("volume"), editors_site(tmp_path_factory.mktemp("site"))
    with faulty(**room, KINDLING_COMFY_UI="on", KINDLING_VOLUME=str(volume), PYTHONPATH=site) as started:
        yield started


def half(server: Faulty, method: str, path: str, size: int, head: str = "") -> socket.socket:
    """A client that never sends the last byte of its body."""
    client = socket.create_connection((urlsplit(server.url).hostname, urlsplit(server.url).port), PATIENCE_S)
    kind = FORM["content-type"] if "/upload/" in path else "application/json"
    lines = (f"{method} {path} HTTP/1.1", "host: 127.0.0.1", f"content-type: {kind}", f"content-length: {size}", head)
    client.sendall("\r\n".join(filter(None, lines)).encode() + b"\r\n\r\n" + b" " * (size - 1))
    return client


def status(client: socket.socket) -> int:
    """Of the answer to it, after which it leaves."""
    with client:
        return int(client.recv(1 << 16).split()[1])


@pytest.mark.parametrize(("method", "path"), DOORS)
def test_json_of_too_many_values_is_refused_at_every_door(server: Faulty, method: str, path: str) -> None:
    body = json.dumps({"prompt": "x", **{f"{i:x}": 0 for i in range(MARKED // 4)}, "more": [0] * (MARKED // 2)})
    kind = {"content-type": "application/json"}
    answer = httpx.request(method, server.url + path, content=body.replace(" ", ""), headers=kind, timeout=PATIENCE_S)
    assert answer.status_code == 400, answer.text
    assert "it has too many values" in answer.text


def test_so_it_is_inside_a_form(server: Faulty) -> None:
    fields = {"original_ref": json.dumps([0] * (MARKED + 1)).replace(" ", "")}
    answer = httpx.post(f"{server.url}/upload/mask", data=fields, files={"image": ("a.png", b"x")}, timeout=PATIENCE_S)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "original_ref")


@pytest.mark.parametrize("path", ["/generate", "/v1/images/generations", "/fal/x"])
def test_as_many_as_are_read_are_told_of_by_one_sentence(server: Faulty, path: str) -> None:
    strange = {f"strange{i}": 0 for i in range(50_000)}
    for payload in (
        {"prompt": "x"} | strange,
        {"prompt": "x", "sampling": strange},
        {"prompt": "x", "n": [0] * 99_999},
    ):
        answer = httpx.post(server.url + path, json=payload, timeout=PATIENCE_S)
        assert answer.status_code in (400, 422)
        assert len(answer.text) < 300


@pytest.mark.parametrize("loras", ["a," * 3000, "," * 400_000, "a " * 3000])
def test_a_list_in_a_text_has_an_end(server: Faulty, loras: str) -> None:
    files = {"image": ("a.png", b"x")}
    form = {"prompt": "x", "loras": loras}
    answer = httpx.post(f"{server.url}/v1/images/edits", data=form, files=files, timeout=PATIENCE_S)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "loras")


def test_a_graph_of_a_thousand_nodes_is_no_burden() -> None:
    node = {"type": "KSampler", "pos": [1, 2], "size": [3, 4], "flags": {}, "order": 1, "mode": 0, "inputs": [], "n": 1}
    text = {"type": "CLIPTextEncode", "widgets_values": ["a red circle, masterpiece, best quality, " * 20]}
    nodes = [{"id": i, "widgets_values": [1, "fixed", 20, 7.5, "euler", 1], **node} for i in range(1000)]
    links = [[i, i, 0, i + 1, 0, "LATENT"] for i in range(2000)]
    graph = {"nodes": [*nodes, *[text] * 200], "links": links}
    payload = {"prompt": graph, "extra_data": {"extra_pnginfo": {"workflow": graph}}}
    assert bodies.decode(json.dumps(payload).encode()) == payload


def test_a_large_body_is_understood_while_others_have_their_turns() -> None:
    """Else this would wait for itself."""
    others = threading.Event()

    def read(body: bytes) -> bool:
        return others.wait(PATIENCE_S)

    async def main() -> bool:
        asyncio.get_running_loop().call_soon(others.set)
        return await bodies.understood(read, bytes(bodies.AT_ONCE + 1), Deadline())

    assert asyncio.run(main())


def test_what_takes_too_long_to_understand_is_waited_for_no_longer() -> None:
    over = threading.Event()

    async def main() -> None:
        with pytest.raises(DeadlineExceeded):
            await bodies.understood(lambda body: over.wait(), bytes(bodies.AT_ONCE + 1), Deadline.within(0.1))

    asyncio.run(main())
    over.set()


def test_so_is_what_a_request_means(family: FakeFamily) -> None:
    """Its images come as base64, of tens of megabytes."""
    others = threading.Event()

    class Payload(dict[str, Any]):
        def items(self) -> Any:
            assert others.wait(PATIENCE_S)
            return super().items()

    with family.engine() as engine:
        engine.wait_booted()

        async def main() -> int:
            call = asyncio.ensure_future(
                Api(engine).call("/generate", Payload(prompt="x" * LIGHT, width=64, height=64))
            )
            asyncio.get_running_loop().call_later(0.05, others.set)
            return (await call).status

        assert asyncio.run(main()) == 200


@pytest.mark.parametrize(("method", "path"), [*DOORS, *(("POST", path) for path in KEEPING)])
def test_a_body_that_is_never_whole_is_waited_for_no_longer_than_its_request(
    server: Faulty, method: str, path: str
) -> None:
    assert status(half(server, method, path, 1000, "x-deadline-s: 0.3")) == 504


def test_bodies_have_so_much_room_together_and_small_ones_always_some(server: Faulty) -> None:
    large = {"prompt": "fine", "seed": 5, "user": "x" * LARGE}
    held = [half(server, "POST", "/generate", LARGE) for _ in range(HELD // LARGE)]
    ask = lambda: httpx.post(f"{server.url}/v1/images/generations", json=large, timeout=PATIENCE_S)  # noqa: E731
    end = time.monotonic() + PATIENCE_S
    while (answer := ask()).status_code != 429:  # they are still on their way
        assert time.monotonic() < end, answer.text
    assert answer.json()["error"]["code"] == "queue_full"
    assert 1 <= int(answer.headers["retry-after"]) <= 120
    assert server.post("fine").status_code == 200
    for client in held:
        client.close()
    while (answer := ask()).status_code != 200:
        assert time.monotonic() < end, answer.text


def test_room_is_had_until_the_answer(tmp_path: Path) -> None:
    room = Room(Settings(volume=tmp_path))
    one, other = Seen("1", "/", 0.0), Seen("2", "/", 0.0)
    room.take(one, 100_000_000)
    room.take(one, 200_000_000)
    with pytest.raises(QueueFull):
        room.take(other, 100_000_000)
    room.take(other, SMALL)
    room.leave(one)
    room.leave(one)
    room.take(other, 100_000_000)


@pytest.mark.parametrize("stream", [False, True])
def test_repetitions_share_the_answer_that_nobody_reads(server: Faulty, stream: bool) -> None:
    """One of 16 MB: each has but the piece that is on its way."""
    asked = {"prompt": "noise", "seed": 5, "size": "2048x2048", "num_inference_steps": 1, "stream": stream}
    body = json.dumps(asked).encode()
    lines = (f"content-length: {len(body)}", "content-type: application/json", f"idempotency-key: shared-{stream}")
    head = "\r\n".join(("POST /v1/images/generations HTTP/1.1", "host: 127.0.0.1", *lines, "\r\n")).encode()

    def repeat() -> socket.socket:
        client = socket.create_connection((urlsplit(server.url).hostname, urlsplit(server.url).port), PATIENCE_S)
        client.sendall(head + body)
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
        return client

    def resident() -> int:
        return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    clients = [repeat()]
    before = resident()
    clients += [repeat() for _ in range(40)]
    assert resident() - before < 160_000_000
    for client in clients:
        client.close()
