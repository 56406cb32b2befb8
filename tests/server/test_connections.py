"""Connections of clients that are silent, send too slowly, do not read, or still send when they were answered."""

import asyncio
import contextlib
import http.client
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from test_faults import ROUTE, TESTS, faulty
from uvicorn.server import ServerState

import forked
from handler.server.connections import TAKEN, Connections, Limits
from handler.server.wire import Wire
from serving import Served

SERVER = """
import asyncio, json, resource, socket, sys
import uvicorn
from handler.server.connections import Connections, Limits, room
from handler.server.wire import Wire

async def app(scope, receive, send):
    path = scope["path"]
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        while True:
            await send({"type": "websocket.send", "bytes": bytes(1 << 16)})
    more = path in ("/read", "/held")
    while more:
        message = await receive()
        more = message.get("more_body", False)
    if instead := scope["state"].get("instead"):
        print(instead.status, flush=True)
    if path == "/held":
        print("held", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
    status = int(path[1:]) if path[1:].isdigit() else 200
    said = bytes(int(50e6)) if path == "/large" else b"%d %d" % (
        len(connections._open), sum(each._buffered for each in connections._open)
    )
    headers = [(b"content-length", b"%d" % len(said)), (b"retry-after", b"7")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    if path == "/stream":
        said = b""
    while path == "/stream":
        await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})
    await send({"type": "http.response.body", "body": said})

limits = json.loads(sys.argv[1])
if "descriptors" in limits:
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits["descriptors"],) * 2)
    limits = {"most": room()}
connections = Connections(Limits(**limits), Wire)
listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
config = uvicorn.Config(
    app, ws="websockets-sansio", lifespan="off", http=connections, log_level="critical", loop=sys.argv[2], backlog=16
)

class Server(uvicorn.Server):
    async def startup(self, sockets):
        await super().startup(sockets)
        listening.listen(2048)  # as ours does: clients for whom there is no room there try again after seconds

print(listening.getsockname()[1], flush=True)
Server(config).run(sockets=[listening])
"""
FEW = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
sys.argv.pop(0)
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
HOST = b"host: here\r\n"
PATIENCE_S = 120
NEVER = 1000.0
DATA_SEGS_IN = 152  # where Linux has it in its struct tcp_info


class Server:
    """A process."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.port = int(self.said())
        self.asking = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)

    def said(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()

    def release(self) -> None:
        """Let who is held go on."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def open(self, sent: bytes = b"") -> socket.socket:
        """A connection on which this was sent. It has room for little that it does not read."""
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        client.settimeout(PATIENCE_S)
        client.connect(("127.0.0.1", self.port))
        client.sendall(sent)
        return client

    def state(self) -> tuple[int, int]:
        """How many connections there are beside the one that asks, and the bytes that wait in them."""
        self.asking.request("GET", "/")
        count, unsent = self.asking.getresponse().read().split()
        return int(count) - 1, int(unsent)

    def until_alone(self) -> None:
        """Wait until all others are closed."""
        while self.state()[0]:
            pass


@contextmanager
def started(loop: str = "asyncio", **limits: float) -> Iterator[Server]:
    command = [sys.executable, "-c", SERVER, json.dumps(limits), loop]
    pipe = subprocess.PIPE
    with forked.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            server = Server(process)
            yield server
            server.asking.close()
        finally:
            process.kill()


@pytest.fixture(params=["asyncio", "uvloop"])  # the second comes with RunPod's SDK
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def rest(client: socket.socket) -> bytes:
    said = b""
    with contextlib.suppress(ConnectionError):
        while part := client.recv(1 << 20):
            said += part
    return said


def test_silent_clients_give_way_to_who_asks_the_longest_silent_first(loop: str) -> None:
    """Three hundred, though there are 256 descriptors; and what was asked is answered all the same."""
    with started(loop, descriptors=256) as server, contextlib.ExitStack() as stack:
        asking = stack.enter_context(server.open(b"GET /held HTTP/1.1\r\n" + HOST + b"connection: close\r\n\r\n"))
        assert server.said() == "held\n"
        sent = [b"", b"GET / HT", b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"]
        silent = [stack.enter_context(server.open(sent[n % 3])) for n in range(300)]
        count, _ = server.state()
        assert count < 128
        assert rest(silent[0]) == rest(silent[1]) == b""  # they are closed
        server.release()
        assert rest(asking).startswith(b"HTTP/1.1 200")


def test_bodies_that_do_not_come_give_way_too(loop: str) -> None:
    with started(loop, most=20) as server, contextlib.ExitStack() as stack:
        post = b"POST /read HTTP/1.1\r\n" + HOST + b"content-length: 9\r\nexpect: 100-continue\r\n\r\n"
        for _ in range(60):
            assert stack.enter_context(server.open(post)).recv(12) == b"HTTP/1.1 100"  # it is waited for
        assert server.state()[0] <= 20


def test_where_all_are_answered_one_more_is_told_to_come_back(loop: str) -> None:
    with started(loop, most=1) as server, server.open(b"GET /held HTTP/1.1\r\n" + HOST + b"\r\n"):
        assert server.said() == "held\n"
        with server.open() as crowded:
            answer = rest(crowded)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: " in answer
        server.release()


def test_a_body_that_stops_coming_is_refused(loop: str) -> None:
    with started(loop, body_s=0.05) as server:
        with server.open(b"POST /read HTTP/1.1\r\n" + HOST + b"content-length: 9\r\n\r\nsome") as client:
            answer = rest(client)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
        assert server.said() == "408\n"  # what was answered in its stead, for who counts


def test_a_body_that_stops_coming_costs_no_answer_to_what_came_before(loop: str) -> None:
    late = b"POST /read HTTP/1.1\r\n" + HOST + b"content-length: 9\r\n\r\nsome"
    first = b"GET /held HTTP/1.1\r\n" + HOST + b"\r\n"
    with started(loop, body_s=0.05) as server, server.open(first + late) as client:
        assert server.said() == "held\n"
        with server.open(late) as another:
            assert rest(another).startswith(b"HTTP/1.1 408 ")  # so much time is over
        server.release()
        assert rest(client).startswith(b"HTTP/1.1 200 ")


def test_a_connection_is_kept_for_no_longer_after_a_body_that_nobody_read(loop: str) -> None:
    head = b"POST /429 HTTP/1.1\r\n" + HOST + b"content-length: 4\r\n\r\n"
    with started(loop, idle_s=0.05) as server, server.open(head) as client:
        assert client.recv(1)
        client.sendall(b"body")
        rest(client)


SOCKET = b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: %b\r\n"
KEY = b"MDEyMzQ1Njc4OWFiY2RlZg=="
UNREAD = {
    "whole": b"GET /large HTTP/1.1\r\n" + HOST + b"\r\n",
    "closed": b"GET /large HTTP/1.1\r\n" + HOST + b"connection: close\r\n\r\n",
    "stream": b"GET /stream HTTP/1.0\r\n" + HOST + b"\r\n",
    "websocket": b"GET /ws HTTP/1.1\r\n" + HOST + SOCKET % KEY + b"\r\n",
}


@pytest.mark.parametrize("kind", UNREAD)
def test_who_does_not_read_an_answer_is_given_up(loop: str, kind: str) -> None:
    with started(loop, write_s=0.05) as server, server.open(UNREAD[kind]) as client:
        assert client.recv(1)
        server.until_alone()
        assert len(rest(client)) < 50e6


async def answered_largely(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": bytes(int(50e6))})


def test_who_takes_an_answer_slowly_is_waited_for() -> None:
    """Though the kernel, which holds much of it already, takes on no more for a long time."""

    async def take() -> None:
        here, connections = asyncio.get_running_loop(), Connections(Limits(write_s=1.0), Wire)
        config = uvicorn.Config(answered_largely, http=connections)  # type: ignore[arg-type]
        speak = partial(connections, config=config, server_state=ServerState(), app_state={}, _loop=here)
        with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as client:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
            client.setblocking(False)
            await here.create_server(speak, sock=listening)
            await here.sock_connect(client, listening.getsockname())
            await here.sock_sendall(client, UNREAD["whole"])
            assert await here.sock_recv(client, 1)
            [one], looking, now = connections._open, connections._looking, here.time()
            assert looking
            looking.cancel()  # it is looked at here, by a time of ours
            handed = []
            for _ in range(20):
                before = one._written - one._buffered - one._sending
                while one._written - one._buffered - one._sending - before < TAKEN:
                    await here.sock_recv(client, 1 << 12)
                one.look(now := now + 0.9)
                assert not one.is_closing()
                handed.append(one._written - one._buffered)
            assert len(set(handed)) < len(handed) / 2
            one.look(now + 3.0)
            assert one.is_closing()

    asyncio.run(take())


@pytest.mark.parametrize("times", [1, 2])
def test_where_much_is_unsent_who_does_not_read_is_given_up_sooner(loop: str, times: int) -> None:
    """Also who has asked for more already."""
    with started(loop, write_s=NEVER, unsent=60 << 20, hurry_s=0.05) as server:
        with server.open(UNREAD["whole"] * times) as one:
            assert one.recv(1)
            with server.open(UNREAD["whole"] * times) as another:
                assert another.recv(1)
                while server.state()[0] > 1:
                    pass
        server.until_alone()


def test_no_more_of_an_answer_waits_than_a_client_takes_at_once(loop: str) -> None:
    with started(loop, write_s=NEVER) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.open(UNREAD["whole"])) for _ in range(10)]
        assert all(client.recv(1) for client in clients)
        assert server.state()[1] < 10 * (200 << 10)


REFUSALS = [401, 404, 413, 415, 429, 503]


def test_who_is_refused_before_its_body_is_read_sees_why(loop: str) -> None:
    body = bytes(4_000_000)
    with started(loop) as server:
        keeping = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
        for status in REFUSALS * 20:
            with pytest.raises(urllib.error.HTTPError) as caught:  # it says that it will close
                urllib.request.urlopen(f"http://127.0.0.1:{server.port}/{status}", body, PATIENCE_S)
            assert (caught.value.code, caught.value.headers["retry-after"]) == (status, "7")
            caught.value.close()
            keeping.request("POST", f"/{status}", body)
            answer = keeping.getresponse()
            assert (answer.status, len(answer.read()) > 0) == (status, True)
        keeping.close()
        server.until_alone()


REFUSED = b"POST /429 HTTP/1.1\r\n" + HOST + b"content-length: 90000000\r\n"


@pytest.mark.parametrize("head", [REFUSED, REFUSED + b"connection: close\r\n"], ids=["kept", "close"])
@pytest.mark.parametrize("limits", [{"silent_s": 0.05}, {"rest": 1 << 20}])
def test_what_is_still_sent_is_read_for_a_while(loop: str, head: bytes, limits: dict[str, float]) -> None:
    """Where it stops coming, or does not end."""
    with started(loop, **limits) as server, server.open(head + b"\r\n") as client:
        assert client.recv(1)
        if "rest" in limits:
            with pytest.raises(ConnectionError):
                client.sendall(bytes(90_000_000))
        server.until_alone()


def test_who_asks_before_it_sends_a_body_begins_anew_when_it_is_refused(loop: str) -> None:
    """It may send another request where the body would have been."""
    with started(loop) as server, server.open(REFUSED + b"expect: 100-continue\r\n\r\n") as client:
        answer = rest(client)
        assert answer.startswith(b"HTTP/1.1 429 ")
        assert b"\r\nconnection: close\r\n" in answer


def test_what_is_still_sent_holds_up_no_end(loop: str) -> None:
    with started(loop, silent_s=NEVER) as server, server.open(REFUSED + b"connection: close\r\n\r\n") as client:
        assert b"HTTP/1.1 429" in rest(client)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE_S) == -signal.SIGTERM  # uvicorn's own end


def test_a_server_of_ours_says_why_to_clients_that_hang_up() -> None:
    json_, png = {"content-type": "application/json"}, {"content-type": "image/png"}
    with faulty(KINDLING_QUEUE="1") as server:

        def refusals(path: str, headers: dict[str, str]) -> set[int]:
            found = set()
            for _ in range(20):
                asked = urllib.request.Request(server.url + path, bytes(9_000_000), headers)
                with pytest.raises(urllib.error.HTTPError) as caught:
                    urllib.request.urlopen(asked, timeout=PATIENCE_S)
                found.add(caught.value.code)
                caught.value.close()
            return found

        assert refusals("/v1/none", json_) == {404}
        assert refusals(ROUTE, json_) == {413}
        assert refusals(ROUTE, png) == {415}
        held = [server.hold(), server.begin("fine")]
        server.waiting(1)
        assert refusals(ROUTE, json_) == {429}
        server.release()
        assert [each.result().status_code for each in held] == [200, 200]


def test_a_server_of_ours_answers_with_few_descriptors_whoever_is_silent() -> None:
    command = [sys.executable, "-c", FEW, str(TESTS / "doubles/faulty.py"), "--port", "0"]
    environ = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    process = forked.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)
    with process, contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        server = Served(process)
        server.wait_for("is ready on")
        address = urlsplit(server.url)
        for _ in range(300):
            stack.enter_context(socket.create_connection((address.hostname, address.port)))
        assert httpx.get(server.url + "/ping", timeout=PATIENCE_S).status_code == 200


def test_an_answer_goes_out_at_once() -> None:
    """Not when its head was acknowledged."""
    from handler.server import process

    with process._listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how many came")
def test_an_answer_is_one_packet_with_its_head(loop: str) -> None:
    with started(loop) as server, server.open(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n") as client:
        assert client.recv(1 << 10).endswith(b"1 0")
        told = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    assert struct.unpack_from("I", told, DATA_SEGS_IN) == (1,)


def test_room_is_half_of_the_descriptors() -> None:
    from handler.server import connections

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert connections.room() == min(connections.MOST, soft // 2)
    assert os.sysconf("SC_OPEN_MAX") >= connections.room()
