"""A host on loopback that callers name: it answers each path as it is told to, in raw HTTP, and remembers who asked."""

import contextlib
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Queue
from typing import Any

Say = Callable[[bytes], object]
Act = Callable[[Say], object]


@dataclass
class Asked:
    """One request as it came."""

    method: str
    where: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Host:
    """`answers` has by path what is said then: bytes, or what says it piece by piece. `asked` are the requests."""

    port: int = 0
    answers: dict[str, bytes | Act | list[bytes]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    came: Queue[Asked] = field(default_factory=Queue)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.port}"


def answer(body: bytes = b"", status: str = "200 OK", **headers: str) -> bytes:
    """A whole answer."""
    lines = {"content-length": str(len(body)), **{name.replace("_", "-"): value for name, value in headers.items()}}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


@contextmanager
def hosting(secure: ssl.SSLContext | None = None) -> Iterator[Host]:
    """A host that listens until the end, perhaps over TLS."""
    host = Host()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                self.speak()

        def speak(self) -> None:
            method, where, _ = self.rfile.readline().decode().split(" ", 2)
            lines = iter(lambda: self.rfile.readline().decode().strip(), "")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
            body = self.rfile.read(int(headers.get("content-length", 0)))
            asked = Asked(method, where, headers, body)
            host.asked.append(asked)
            host.came.put(asked)
            said = host.answers.get(where.partition("?")[0], answer(status="404 Not Found"))
            if isinstance(said, list):
                said = said.pop(0) if len(said) > 1 else said[0]
            said(self.wfile.write) if callable(said) else self.wfile.write(said)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, block_on_close, allow_reuse_address = True, False, True

        def get_request(self) -> tuple[socket.socket, Any]:
            connection, address = super().get_request()
            return (secure.wrap_socket(connection, server_side=True) if secure else connection), address

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Who hangs up is none."""

    with Server(("127.0.0.1", 0), Handler) as server:
        host.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield host
        finally:
            server.shutdown()
            thread.join()
