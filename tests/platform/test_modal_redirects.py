"""Modal's edge on loopback: after 150 s it answers 303 to where the result will be, again and again until it is there.

What docs/deploy/modal.md promises of clients is held here, with the clients themselves.
"""

import base64
import io
import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from openai import OpenAI
from PIL import Image

from serving import Served

WAITS = 2  # redirects before the result: a cold start of more than five minutes
PATH = "/v1/images/generations"
ASKED = {"prompt": "a red circle", "size": "64x64", "seed": 7}
HEADERS = {"Authorization": "Bearer secret", "Modal-Key": "wk-1"}


class Edge(ThreadingHTTPServer):
    """Passes what is posted to `worker`, and keeps the answer until it has been asked for often enough."""

    def __init__(self, worker: str) -> None:
        super().__init__(("127.0.0.1", 0), Visit)
        self.worker, self.seen = worker, list[tuple[str, Any]]()
        self.answer = httpx.Response(503)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Visit(BaseHTTPRequestHandler):
    """One request to the edge."""

    server: Edge

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.answer = httpx.post(self.server.worker + self.path, content=body, timeout=60)
        self._note()
        self._redirect()

    def do_GET(self) -> None:
        self._note()
        if len(self.server.seen) <= WAITS:
            return self._redirect()
        self.send_response(self.server.answer.status_code)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(self.server.answer.content)

    def _note(self) -> None:
        self.server.seen.append((self.command, [self.headers[name] for name in HEADERS]))

    def _redirect(self) -> None:
        self.send_response(303)
        self.send_header("Location", f"{PATH}?__modal_function_call_id=fc-1")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def edge(server: Served) -> Iterator[Edge]:
    with Edge(server.url) as edge:
        thread = threading.Thread(target=edge.serve_forever, args=(0.05,))
        thread.start()
        yield edge
        edge.shutdown()
        thread.join()


def by_openai(edge: Edge) -> Any:
    with OpenAI(base_url=f"{edge.url}/v1", api_key="secret", default_headers={"Modal-Key": "wk-1"}) as client:
        answer = client.images.generate(prompt="a red circle", size="64x64", extra_body={"seed": 7})
    assert answer.data
    return answer.data[0].b64_json


def by_curl(edge: Edge) -> Any:
    headers = [word for name, value in HEADERS.items() for word in ("-H", f"{name}: {value}")]
    command = ["curl", "-sL", edge.url + PATH, *headers, "-d", json.dumps(ASKED)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return json.loads(told)["data"][0]["b64_json"]


def by_httpx(edge: Edge) -> Any:
    answer = httpx.post(edge.url + PATH, json=ASKED, headers=HEADERS, follow_redirects=True, timeout=60)
    return answer.json()["data"][0]["b64_json"]


@pytest.mark.parametrize("client", [by_openai, by_curl, by_httpx])
def test_a_client_gets_what_it_asked_for_once(edge: Edge, client: Any) -> None:
    assert Image.open(io.BytesIO(base64.b64decode(client(edge)))).size == (64, 64)
    assert edge.seen == [(method, list(HEADERS.values())) for method in ["POST", *["GET"] * WAITS]]
