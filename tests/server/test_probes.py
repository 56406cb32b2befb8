"""The port that PORT_HEALTH names, of real processes: what is answered there, and that nothing keeps it from that."""

import contextlib
import http.client
import signal
import socket
from collections.abc import Iterator

import httpx
import pytest
from test_faults import PATIENCE_S, Faulty, faulty

from handler.server.auth import DEFAULTS
from handler.server.probes import CONNECTIONS, HEAD

HERE = "127.0.0.1"


@contextlib.contextmanager
def probed(ready: bool = True, **environ: str) -> Iterator[tuple[Faulty, int]]:
    """A server, and the port of its probes."""
    with socket.socket() as free:
        free.bind((HERE, 0))
        port = free.getsockname()[1]
    with faulty(ready, PORT_HEALTH=str(port), **environ) as server:
        yield server, port


@pytest.fixture(scope="module")
def probes() -> Iterator[int]:
    with probed(KINDLING_API_KEYS="one") as (_, port):
        yield port


def ask(port: int, path: str, method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(HERE, port, timeout=PATIENCE_S)
    connection.request(method, path)
    answer = connection.getresponse()
    assert DEFAULTS.items() <= {name.lower(): value for name, value in answer.getheaders()}.items()
    return answer.status, answer.read()


def said(connection: socket.socket) -> bytes:
    """All that is answered until the other side closes."""
    with connection, contextlib.suppress(ConnectionResetError):
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))
    return b""


@pytest.mark.parametrize(
    ("method", "path", "status", "body"),
    [
        ("GET", "/ping", 200, b""),
        ("HEAD", "/ping?x=1", 200, b""),
        ("GET", "/health", 200, b""),
        ("GET", "/health/live", 200, b'{"status":"live"}'),
        ("HEAD", "/health/live", 200, b""),
        ("POST", "/ping", 405, b""),
        ("GET", "/", 404, b""),
        ("GET", "/v1/models", 404, b""),
        ("GET", "/metrics", 404, b""),
        ("POST", "/v1/images/generations", 405, b""),
    ],
)
def test_what_needs_no_key_is_answered_there_and_nothing_else(
    probes: int, method: str, path: str, status: int, body: bytes
) -> None:
    assert ask(probes, path, method) == (status, body)


def test_probes_are_answered_while_the_event_loop_is_held_up() -> None:
    with probed() as (server, port):
        server.process.send_signal(signal.SIGUSR1)
        server.wait_for("^holding")
        waiting = server.pool.submit(httpx.get, server.url + "/ping", timeout=PATIENCE_S)
        assert [ask(port, path)[0] for path in ("/ping", "/health", "/health/live")] == [200, 200, 200]
        server.release()
        assert waiting.result().status_code == 200


def test_an_event_loop_that_is_held_up_for_ever_is_told() -> None:
    with probed(FAULTY_STUCK_S="1") as (server, port):
        server.process.send_signal(signal.SIGUSR1)
        server.wait_for("^holding")
        for path in ("/ping", "/health", "/health/live"):
            while ask(port, path)[0] != 503:
                pass
        assert ask(port, "/")[0] == 404
        server.release()
        while ask(port, "/health/live")[0] != 200:
            pass


def test_probes_tell_of_a_start_and_of_an_end() -> None:
    with probed(ready=False, FAULTY_BOOT="hold") as (server, port):
        assert [ask(port, path)[0] for path in ("/ping", "/health", "/health/live")] == [204, 503, 200]
        server.release()
        server.wait_for("is ready on")
        server.hold()
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("stopping")
        while ask(port, "/ping")[0] == 200:
            pass
        assert [ask(port, path)[0] for path in ("/ping", "/health", "/health/live")] == [503, 503, 200]
        server.release()
        assert server.ends() == 0


def test_who_says_nothing_gives_way_to_a_probe(probes: int) -> None:
    silent = [socket.create_connection((HERE, probes), PATIENCE_S) for _ in range(CONNECTIONS + 1)]
    assert said(silent.pop(0)) == b""
    assert ask(probes, "/ping")[0] == 200
    for connection in silent:
        connection.close()


def test_a_head_without_an_end_is_not_read_on(probes: int) -> None:
    connection = socket.create_connection((HERE, probes), PATIENCE_S)
    with contextlib.suppress(ConnectionError):
        connection.sendall(b"GET /ping HTTP/1.1\r\nx: " + b"x" * 2 * HEAD)
    assert said(connection) == b""


def test_a_head_may_come_in_parts(probes: int) -> None:
    connection = socket.create_connection((HERE, probes), PATIENCE_S)
    for part in (b"GET /ping HT", b"TP/1.1\r\nHost: x\r", b"\n\r\n"):
        connection.sendall(part)
    assert said(connection).startswith(b"HTTP/1.1 200 OK\r\n")
