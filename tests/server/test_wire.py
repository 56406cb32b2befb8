"""What comes on a connection, byte by byte, on real servers."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest

import forked

SERVER = """
import asyncio, json, os, socket, sys
import uvicorn
from handler.server.connections import Connections, Limits
from handler.server.wire import Wire

left = asyncio.Event()

async def app(scope, receive, send):
    if scope["path"] == "/long":
        await receive()
        gone = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not gone.done():
            await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})
            await asyncio.sleep(0)
        return left.set()
    read = bytearray()
    while scope["path"] != "/unread":
        part = await receive()
        read += part["body"]
        if not part["more_body"]:
            break
    said = b"%d read" % len(read)
    if scope["path"] == "/headers":
        said = b" ".join([*(name for name, _ in scope["headers"]), b"read"])
    if scope["path"] == "/left":
        await left.wait()
    if scope["path"] == "/waiting":
        import gc
        from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
        said = b"%d read" % sum(type(each) is RequestResponseCycle for each in gc.get_objects())
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(said))]})
    await asyncio.sleep(0.5 if scope["path"] == "/slow" else 0)
    await send({"type": "http.response.body", "body": said})

listening = socket.create_server(("127.0.0.1", 0))
listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
limits = Limits(**json.loads(sys.argv[1]))
config = uvicorn.Config(
    app, ws="none", lifespan="off", http=Connections(limits, Wire), log_level="critical", loop=sys.argv[2], backlog=16
)
print(listening.getsockname()[1], flush=True)
uvicorn.Server(config).run(sockets=[listening])
"""
HEAD = 64 << 10
LINE = 16 << 10
SLACK = 8 << 10
HOST = b"host: here\r\n"
UPGRADES = [
    b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n",
    b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: x\r\nsec-websocket-version: 13\r\n",
    b"connection: upgrade\r\nconnection: keep-alive\r\nupgrade: websocket\r\n",
]


class Server(NamedTuple):
    """A process."""

    port: int
    pid: int


def started(loop: str = "asyncio", **limits: float) -> Iterator[Server]:
    command = [sys.executable, "-c", SERVER, json.dumps(limits), loop]
    with forked.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield Server(int(process.stdout.readline()), process.pid)
        process.terminate()


@pytest.fixture(scope="module", params=["asyncio", "uvloop"])  # which RunPod's SDK brings
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    yield from started(request.param)


@pytest.fixture
def port(server: Server) -> int:
    return server.port


@pytest.fixture
def hasty() -> Iterator[int]:
    """A server that waits for a head for no time worth mentioning."""
    for each in started(head_s=0.05):
        yield each.port


class Client:
    """A connection."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)

    def send(self, data: bytes) -> bool:
        """Whether all of it was taken."""
        try:
            self.socket.sendall(data)
        except ConnectionError:
            return False
        return True

    def rest(self) -> bytes:
        """All that is said until it is closed."""
        said = b""
        try:
            while part := self.socket.recv(1 << 20):
                said += part
        except ConnectionError:  # closed while more came
            pass
        return said

    def answer(self) -> bytes:
        """The next body that is answered."""
        said = b""
        while not said.endswith(b" read"):
            part = self.socket.recv(1)
            assert part, said
            said += part
        assert said.count(b"HTTP/1.1 200") == 1
        return said.rpartition(b"\r\n")[2]


@pytest.fixture
def client(port: int) -> Iterator[Client]:
    made = Client(port)
    with made.socket:
        yield made


def refused(said: bytes) -> bool:
    head, _, body = said.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    assert lines[0] == b"http/1.1 400 bad request"
    assert b"connection: close" in lines
    assert "too large" in json.loads(body)["error"]["message"]
    return bool(json.loads(body)["error"]["code"] == "invalid_request")


def padded(size: int, line: bytes = b"GET / HTTP/1.1\r\n") -> bytes:
    """A head of that many bytes, of few headers of which none is too large."""
    full = b"x: %b\r\n" % (b"a" * 8000)
    start = line + HOST + full * (size // len(full) - 1) + b"x: "
    return start + b"a" * (size - len(start) - 4) + b"\r\n\r\n"


@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\nx: ", b"GET /", b"GET / HTTP/1.1\r\n"])
def test_a_head_without_an_end_is_refused_when_it_is_too_large(client: Client, start: bytes) -> None:
    """One header, a path, many headers: after as much as the limit, not when all has come."""
    more = b"x: a\r\n" if start.endswith(b"\n") else b"a"
    client.send(start + more * (HEAD // len(more)) + more * (SLACK // len(more)))
    assert refused(client.rest())


def test_a_head_of_that_size_is_refused_though_it_comes_whole(client: Client) -> None:
    client.send(padded(200_000))
    assert refused(client.rest())


@pytest.mark.parametrize(("size", "count"), [(LINE - 1, 1), (1, 99)])
def test_no_header_is_too_large_and_there_are_not_too_many(client: Client, size: int, count: int) -> None:
    start = b"GET / HTTP/1.1\r\n" + HOST
    client.send(start + (b"x: %b\r\n" % (b"a" * size)) * count + b"\r\n")
    assert client.answer() == b"0 read"
    more = (size + 1, count) if count == 1 else (size, count + 1)
    client.send(start + (b"x: %b\r\n" % (b"a" * more[0])) * more[1] + b"\r\n")
    assert refused(client.rest())


@pytest.mark.parametrize("junk", [b"\x00\x01", b"JUNK\r\n\r\n", padded(2 * HEAD)])
def test_junk_does_not_cost_the_answer_to_what_came_before(client: Client, junk: bytes) -> None:
    client.send(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n" + b"GET / HTTP/1.1\r\n" + HOST + b"\r\n" + junk)
    assert client.answer() == client.answer() == b"0 read"
    rest = client.rest()
    assert not rest or refused(rest)


@pytest.mark.parametrize(("before", "said"), [(1, b""), (3, b""), *((1, upgrade) for upgrade in UPGRADES)])
def test_a_head_after_requests_has_an_end_though_all_lies_here_at_once(
    server: Server, before: int, said: bytes
) -> None:
    """As it does for a server that was busy; this one is stopped meanwhile."""
    client = Client(server.port)
    with client.socket:
        os.kill(server.pid, signal.SIGSTOP)
        client.send((b"GET / HTTP/1.1\r\n" + HOST + said + b"\r\n") * before + padded(2 * HEAD))
        os.kill(server.pid, signal.SIGCONT)
        assert [client.answer() for _ in range(before)] == [b"0 read"] * before
        rest = client.rest()
        assert not rest or refused(rest)


def test_requests_that_lie_here_at_once_are_all_answered(server: Server) -> None:
    client = Client(server.port)
    post = b"POST / HTTP/1.1\r\n" + HOST + b"content-length: 30000\r\n\r\n" + b"a" * 30_000
    with client.socket:
        os.kill(server.pid, signal.SIGSTOP)
        client.send((post + padded(5000)) * 4)
        os.kill(server.pid, signal.SIGCONT)
        assert [client.answer() for _ in range(8)] == [b"30000 read", b"0 read"] * 4


def test_who_asks_ahead_and_leaves_is_answered_no_longer(client: Client) -> None:
    client.send(b"GET /long HTTP/1.1\r\n" + HOST + b"\r\n" + b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
    client.socket.recv(1)
    port = client.socket.getpeername()[1]
    client.socket.close()
    other = Client(port)
    with other.socket:
        other.send(b"GET /left HTTP/1.1\r\n" + HOST + b"\r\n")
        assert other.answer() == b"0 read"


def test_junk_in_a_body_is_refused(client: Client) -> None:
    client.send(b"POST / HTTP/1.1\r\n" + HOST + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\nJUNK\r\n\r\n")
    assert refused(client.rest())


@pytest.mark.parametrize(
    "length",
    [
        b"content-length: 5\r\ntransfer-encoding: chunked",
        b"transfer-encoding: chunked\r\ncontent-length: 5",
        b"content-length: 5\r\ncontent-length: 6",
        b"transfer-encoding: chunked, identity",
        b"transfer-encoding : chunked",
        b"content-length: +5",
    ],
)
def test_a_body_whose_end_two_servers_may_see_in_two_places_is_refused(client: Client, length: bytes) -> None:
    """What follows would be another request to one of them (RFC 9112, 6.3 and 11.2)."""
    client.send(b"POST / HTTP/1.1\r\n" + HOST + length + b"\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n" + HOST + b"\r\n")
    assert refused(client.rest())


def test_heads_count_each_anew_and_bodies_do_not(client: Client) -> None:
    for _ in range(3):
        client.send(padded(HEAD - SLACK))
        assert client.answer() == b"0 read"
    client.send(b"POST / HTTP/1.1\r\n" + HOST + b"content-length: 1000000\r\n\r\n" + b"a" * 1_000_000)
    assert client.answer() == b"1000000 read"
    client.send(b"POST / HTTP/1.1\r\n" + HOST + b"transfer-encoding: chunked\r\n\r\n")
    client.send(b"8000\r\n%b\r\n" % (b"a" * 0x8000) * 4 + b"0\r\n\r\n")
    assert client.answer() == b"131072 read"
    client.send(padded(HEAD + SLACK))
    assert refused(client.rest())


def test_a_body_that_nobody_reads_does_not_count(client: Client) -> None:
    client.send(b"POST /unread HTTP/1.1\r\n" + HOST + b"content-length: 300000\r\n\r\n")
    assert client.answer() == b"0 read"
    assert client.send(b"a" * 300_000 + b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
    assert client.answer() == b"0 read"


def test_trailers_have_an_end_too(client: Client) -> None:
    client.send(b"POST / HTTP/1.1\r\n" + HOST + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx: ")
    client.send(b"a" * (HEAD + SLACK))
    assert refused(client.rest())


def test_trailers_are_no_headers(client: Client) -> None:
    client.send(b"POST /headers HTTP/1.1\r\n" + HOST + b"transfer-encoding: chunked\r\n\r\n0\r\nx-late: a\r\n\r\n")
    assert client.answer() == b"host transfer-encoding read"


def test_a_body_may_be_framed_by_as_much_as_it_has_and_no_more(client: Client) -> None:
    """In chunks with extensions, each of them far below what a head may have."""
    head = b"POST / HTTP/1.1\r\n" + HOST + b"transfer-encoding: chunked\r\n\r\n"
    chunk = b"%x;x=" + b"a" * 60 + b"\r\n%b\r\n"
    client.send(head + chunk % (100, b"b" * 100) * 2000 + b"0\r\n\r\n")
    assert client.answer() == b"200000 read"
    client.send(head + chunk % (1, b"b") * 2000)
    assert refused(client.rest())


def test_requests_wait_unparsed_behind_those_that_are_answered(client: Client) -> None:
    """Ten thousand at once, each of which would have cost memory."""
    client.send(b"GET /slow HTTP/1.1\r\n" + HOST + b"\r\n" + (b"GET /waiting HTTP/1.1\r\n" + HOST + b"\r\n") * 5000)
    assert client.answer() == b"0 read"
    assert int(client.answer().split()[0]) < 200


@pytest.mark.parametrize("upgrade", UPGRADES)
def test_an_upgrade_is_ignored_and_the_body_is_read(client: Client, upgrade: bytes) -> None:
    head = b"POST /a?b HTTP/1.1\r\n" + HOST + upgrade
    for framing, body in [
        (b"content-length: 5", b"abcde"),
        (b"transfer-encoding: chunked", b"5\r\nabcde\r\n0\r\n\r\n"),
    ]:
        client.send(head + framing + b"\r\n\r\n" + body)
        assert client.answer() == b"5 read"
        client.send(head + framing + b"\r\n\r\n")
        client.send(body)
        assert client.answer() == b"5 read"
    client.send(b"GET / HTTP/1.1\r\n" + HOST + upgrade + b"\r\n")
    assert client.answer() == b"0 read"
    client.send(b"GET / HTTP/1.1\r\n" + HOST + b"connection: close\r\n\r\n")
    assert client.rest().endswith(b"0 read")


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize("upgrade", [b"h2c", b"websocket"])
def test_an_upgrade_is_ignored_in_the_last_request_of_a_connection(
    client: Client, version: bytes, upgrade: bytes
) -> None:
    """As of proxies that speak HTTP/1.0 and pass on what asked them."""
    said = b"connection: close, upgrade\r\nupgrade: " + upgrade + b"\r\ncontent-length: 5\r\n\r\nabcde"
    client.send(b"POST / HTTP/" + version + b"\r\n" + HOST + said)
    assert client.rest().endswith(b"\r\n\r\n5 read")


@pytest.mark.parametrize("start", [b"", b"GET / HTTP/1.1\r\nx: "])
def test_a_head_that_is_never_finished_is_waited_for_no_longer_than_a_request(hasty: int, start: bytes) -> None:
    client = Client(hasty)
    with client.socket:
        client.send(start)
        assert client.rest() == b""


def test_a_head_that_began_during_an_answer_is_waited_for_no_longer(hasty: int) -> None:
    client = Client(hasty)
    with client.socket:
        client.send(b"GET /slow HTTP/1.1\r\n" + HOST + b"\r\n")
        client.socket.recv(1, socket.MSG_PEEK)  # its head is here, and all is read so far
        client.send(b"GET /two HT")
        assert client.answer() == b"0 read"
        client.send(b"TP/1.1\r\n")
        assert client.rest() == b""


def test_without_its_parser_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['httptools'] = None; from handler.__main__ import main; sys.exit(main(['serve']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, "pip install -r requirements.txt" in done.stderr) == (2, True), done.stderr
    assert "Traceback" not in done.stderr
