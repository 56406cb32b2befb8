"""ComfyUI's clients, as those of its own examples are, against real servers: one, and two behind a balancer."""

import asyncio
import base64
import contextlib
import itertools
import json
import socket
import struct
import subprocess
import threading
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from comfy_graphs import Graph, graph, node, streamed
from serving import Served, serving

KEY = "canary-key-0451"
PNG = b"\x89PNG"


class Balancer:
    """Gives each connection to the next worker."""

    def __init__(self, ports: list[int]) -> None:
        self._ports = itertools.cycle(ports)
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._connected, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", next(self._ports))
        await asyncio.gather(_piped(reader, there[1]), _piped(there[0], writer))

    def close(self) -> None:
        """Let all go."""

        async def end() -> None:
            self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _piped(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("volume")


@pytest.fixture(scope="module")
def workers(volume: Path) -> Iterator[list[Served]]:
    """Two, of one volume."""
    with contextlib.ExitStack() as stack:
        environ = {"KINDLING_VOLUME": str(volume), "KINDLING_QUEUE": "200"}
        yield [stack.enter_context(serving(environ, ready=False)) for _ in range(2)]


@pytest.fixture(scope="module", params=["one worker", "two workers"])
def url(request: pytest.FixtureRequest, workers: list[Served]) -> Iterator[str]:
    if request.param == "one worker":
        yield workers[0].url
        return
    balancer = Balancer([port_of(worker.url) for worker in workers])
    yield balancer.url
    balancer.close()


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def queue(url: str, made: Graph, **fields: Any) -> str:
    """As the examples post: by urllib, without a type."""
    data = json.dumps({"prompt": made, **fields}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{url}/prompt", data=data)) as answer:
        return str(json.loads(answer.read())["prompt_id"])


def get(url: str, path: str, **query: str) -> Any:
    with urllib.request.urlopen(f"{url}{path}?{urllib.parse.urlencode(query)}") as answer:
        return answer.read() if path == "/view" else json.loads(answer.read())


def listening(url: str, client: str, **options: Any) -> ClientConnection:
    return connect(f"{url.replace('http', 'ws')}/ws?clientId={client}", max_size=None, max_queue=None, **options)


def heard(socket: ClientConnection, prompt_id: str) -> Iterator[tuple[str, Any]]:
    """What is told until a prompt is done: the kind and the data, of a picture its bytes."""
    for said in socket:
        if isinstance(said, bytes):
            yield "picture", said
            continue
        message = json.loads(said)
        data = message["data"]
        yield message["type"], data
        if message["type"] == "executing" and data["node"] is None and data["prompt_id"] == prompt_id:
            return


def test_a_client_that_listens_and_then_asks_for_the_files(url: str) -> None:
    client, prompt_id = str(uuid.uuid4()), str(uuid.uuid4())
    made = graph(seed=uuid.uuid4().int % 2**64)
    with listening(url, client) as socket:
        assert queue(url, made, client_id=client, prompt_id=prompt_id) == prompt_id
        kinds = [kind for kind, _ in heard(socket, prompt_id)]
    assert {"status", "execution_start", "execution_cached", "executing", "executed", "execution_success"} <= {*kinds}
    outputs = get(url, f"/history/{prompt_id}")[prompt_id]["outputs"]
    assert [get(url, "/view", **image)[:4] for output in outputs.values() for image in output["images"]] == [PNG]


def test_a_client_that_is_sent_its_pictures(url: str) -> None:
    """Those come while the node that sends them is executing, and again for an equal prompt."""
    client, made = str(uuid.uuid4()), streamed(seed=uuid.uuid4().int % 2**64)
    with listening(url, client) as socket:
        for _ in range(2):
            prompt_id = queue(url, made, client_id=client)
            current, pictures = "", list[bytes]()
            for kind, data in heard(socket, prompt_id):
                if kind == "executing":
                    current = data["node"]
                elif kind == "picture" and current == "9":
                    pictures.append(data)
            assert [(struct.unpack(">II", one[:8]), one[8:12]) for one in pictures] == [((1, 2), PNG)]


def test_a_client_that_polls(url: str) -> None:
    prompt_id = queue(url, graph(seed=uuid.uuid4().int % 2**64))
    while not (found := get(url, f"/history/{prompt_id}")):
        pass
    assert found[prompt_id]["status"]["completed"]
    assert prompt_id in get(url, "/api/history")
    assert get(url, f"/api/jobs/{prompt_id}")["status"] == "completed"


def test_steps_are_told_as_they_are_taken(workers: list[Served]) -> None:
    """With small pictures of what is coming, which are JPEG, between them."""
    client, url = str(uuid.uuid4()), workers[0].url
    with listening(url, client) as socket:
        socket.send(json.dumps({"type": "feature_flags", "data": {}}))
        prompt_id = queue(url, graph(seed=uuid.uuid4().int % 2**64), client_id=client)
        told = list(heard(socket, prompt_id))
    kinds = [kind for kind, _ in told]
    assert told[0][1]["sid"] == client
    assert "feature_flags" in kinds
    progress = [data for kind, data in told if kind == "progress"]
    assert [data["value"] for data in progress] == [1, 2, 3, 4]
    assert {(data["max"], data["node"], data["prompt_id"]) for data in progress} == {(4, "3", prompt_id)}
    nodes = [data["node"] for kind, data in told if kind == "executing"]
    assert (sorted(nodes[:-1]), nodes[-3:]) == (sorted(graph()), ["8", "9", None])
    previews = [data for kind, data in told if kind == "picture"]
    assert {(struct.unpack(">II", data[:8]), data[8:10]) for data in previews} <= {((1, 1), b"\xff\xd8")}
    assert kinds.index("executed") < kinds.index("execution_success")


def test_a_client_that_leaves_keeps_its_prompt(workers: list[Served]) -> None:
    url, client = workers[0].url, str(uuid.uuid4())
    with listening(url, client):
        prompt_id = queue(url, graph(seed=uuid.uuid4().int % 2**64), client_id=client)
    while not (found := get(url, f"/history/{prompt_id}")):
        pass
    assert found[prompt_id]["status"]["completed"]


def test_clients_that_never_read_harm_nobody(workers: list[Served]) -> None:
    """Ten, to each of whom a hundred pictures are sent."""
    url, made = workers[0].url, streamed(seed=3)
    with contextlib.ExitStack() as stack:
        silent = [str(uuid.uuid4()) for _ in range(10)]
        for each in silent:
            stack.callback(deaf(url, each).close)
        for number in range(100):
            queue(url, made, client_id=silent[number % 10])
        test_a_client_that_listens_and_then_asks_for_the_files(url)


def deaf(url: str, client: str) -> socket.socket:
    """A websocket that is open and not read."""
    made = socket.create_connection(("127.0.0.1", port_of(url)), timeout=60)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    head = f"GET /ws?clientId={client} HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    key = base64.b64encode(b"0" * 16).decode()
    made.sendall(f"{head}sec-websocket-version: 13\r\nsec-websocket-key: {key}\r\n\r\n".encode())
    assert made.recv(12) == b"HTTP/1.1 101"
    return made


@pytest.mark.parametrize("said", ["x" * 100_000, b"\0" * 100_000])
def test_what_is_too_large_is_refused(workers: list[Served], said: str | bytes) -> None:
    with listening(workers[0].url, "large") as socket:
        socket.send(said)
        with pytest.raises(ConnectionClosed) as closed:
            all(socket.recv() for _ in itertools.count())
        assert closed.value.rcvd
        assert closed.value.rcvd.code == 1009


@pytest.mark.parametrize("said", ["no JSON", "[" * 50_000, '{"type": 1}', "null", b"\0binary", ""])
def test_what_means_nothing_is_passed_over(workers: list[Served], said: str | bytes) -> None:
    client, url = str(uuid.uuid4()), workers[0].url
    with listening(url, client) as socket:
        socket.send(said)
        prompt_id = queue(url, graph(seed=3), client_id=client)
        assert "executed" in [kind for kind, _ in heard(socket, prompt_id)]


def test_a_worker_that_starts_later_answers_for_the_others(workers: list[Served], volume: Path) -> None:
    prompt_id = queue(workers[0].url, graph(seed=3))
    while not (found := get(workers[0].url, f"/history/{prompt_id}")):
        pass
    with serving({"KINDLING_VOLUME": str(volume)}, ready=False) as later:
        assert get(later.url, f"/history/{prompt_id}") == found
        [image] = found[prompt_id]["outputs"]["9"]["images"]
        assert get(later.url, "/view", **image)[:4] == PNG


def test_the_shell_commands_of_a_guide_for_comfyui(workers: list[Served], tmp_path: Path) -> None:
    """Convox's for FLUX.1 [schnell] on ComfyUI, with spark's name for the model's, and another host."""
    made = graph(seed=uuid.uuid4().int % 2**64)
    made["4"] = node("UNETLoader", unet_name="spark.safetensors", weight_dtype="fp8_e4m3fn")
    made["10"] = node(
        "DualCLIPLoader", clip_name1="t5xxl_fp16.safetensors", clip_name2="clip_l.safetensors", type="flux"
    )
    made["11"] = node("VAELoader", vae_name="ae.safetensors")
    made["8"]["inputs"]["vae"] = ["11", 0]
    made["6"]["inputs"]["clip"] = made["7"]["inputs"]["clip"] = ["10", 0]
    (tmp_path / "workflow-api.json").write_text(json.dumps(made))
    script = r"""
ENDPOINT=HOST
sleep() { until curl -s "http://$ENDPOINT/prompt" | jq -e '.exec_info.queue_remaining == 0' >/dev/null; do :; done; }
PROMPT_ID=$(jq '{prompt: .}' workflow-api.json | \
curl -s "http://$ENDPOINT/prompt" \
-H "Content-Type: application/json" \
-d @- | jq -r '.prompt_id')
echo "Queued: $PROMPT_ID"
sleep 10
curl -s "http://$ENDPOINT/history/$PROMPT_ID" | jq '.["'"$PROMPT_ID"'"].status'
jq '.["6"].inputs.text = "a cyberpunk cityscape at night, neon lights, rain" | {prompt: .}' workflow-api.json | \
curl -s "http://$ENDPOINT/prompt" \
-H "Content-Type: application/json" \
-d @- | jq .
"""
    script = script.replace("HOST", workers[0].url.removeprefix("http://"))
    done = subprocess.run(
        ["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
    )
    queued, _, rest = done.stdout.partition("\n")
    decoder = json.JSONDecoder()
    status, end = decoder.raw_decode(rest)
    assert uuid.UUID(queued.removeprefix("Queued: "))
    assert (status["status_str"], status["completed"]) == ("success", True)
    assert decoder.raw_decode(rest[end:].strip())[0]["node_errors"] == {}


def test_a_key_may_come_in_each_way_that_these_clients_have(volume: Path) -> None:
    environ = {"KINDLING_API_KEYS": KEY, "KINDLING_VOLUME": str(volume), "KINDLING_LOG_LEVEL": "debug"}
    basic = "Basic " + base64.b64encode(f"anybody:{KEY}".encode()).decode()
    with serving(environ, ready=False) as server:
        url = server.url
        for headers in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}, {"authorization": basic}):
            assert httpx.get(f"{url}/queue", headers=headers).status_code == 200
            with listening(url, "x", additional_headers=headers) as socket:
                assert json.loads(socket.recv())["type"] == "status"
        for path, status in (("/view?filename=none.png", 404), ("/queue?", 401), ("/prompt?", 401), ("/history?", 401)):
            assert httpx.get(f"{url}{path}&token={KEY}").status_code == status
        assert httpx.get(url.replace("//", f"//me:{KEY}@") + "/queue").status_code == 200
        with listening(url, f"x&token={KEY}") as socket:
            assert json.loads(socket.recv())["type"] == "status"
        foreign = {"authorization": basic, "origin": "https://evil.example"}
        assert httpx.get(f"{url}/queue", headers=foreign).status_code == 403
        for client, more in (("x", {}), ("x&token=wrong", {}), ("x", foreign)):
            with pytest.raises(InvalidStatus) as refused, listening(url, client, additional_headers=more):
                pass
            assert refused.value.response.status_code in (401, 403)
    server.reader.join()
    assert "canary" not in "".join(server.lines)


def test_pages_of_others_do_not_listen_here(workers: list[Served]) -> None:
    headers = {"origin": "https://evil.example"}
    with pytest.raises(InvalidStatus), listening(workers[0].url, "x", additional_headers=headers):
        pass


def test_an_upgrade_elsewhere_is_passed_over(workers: list[Served]) -> None:
    headers = {"connection": "upgrade", "upgrade": "websocket"}
    assert httpx.get(f"{workers[0].url}/health/live", headers=headers).json() == {"status": "live"}
