"""Whatever a caller sends, however long: it is refused by a sentence that has little of it, and never fails us."""

import asyncio
import json
import socket
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest
from test_faults import PATIENCE_S, Faulty, faulty

from comfy_graphs import graph
from fakes import FakeFamily
from handler import create_app
from handler.api.dialects import aliases
from handler.core.quoting import QUOTED
from handler.core.request import ImageRequest
from serving import editors_site

LONG = 50_000
CANARY = {"in one": "\u2603" * LONG, "in words": "Q " * LONG}
LETTERS = "Q\u2603"
JSON = {"content-type": "application/json"}
DRAWING = ("/v1/images/generations", "/v1/images/edits", "/generate", "/", "/models/x", "/fal/x")
SOURCE = "data:image/png;base64,aGVsbG8="
NAMES = sorted({*ImageRequest.model_fields, *aliases.NAMES, *aliases.NOTED, *aliases.INSTEAD, "size", "image_size"})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    volume, site = tmp_path_factory.mktemp("volume"), editors_site(tmp_path_factory.mktemp("site"))
    with faulty(KINDLING_COMFY_UI="on", KINDLING_VOLUME=str(volume), PYTHONPATH=site) as started, CLIENT:
        yield started


def texts(value: Any) -> Iterator[str]:
    """All that is in a JSON value."""
    if isinstance(value, dict):
        yield from value
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from texts(each)
    if isinstance(value, str):
        yield value


def assert_brief(answer: httpx.Response, *statuses: int) -> None:
    """It is a refusal, and quotes little."""
    said = answer.text[:2000]
    assert answer.status_code in (statuses or range(400, 500)), said
    found = answer.json() if "json" in answer.headers.get("content-type", "") else answer.text
    for text in (*texts(found), *answer.headers.values()):
        assert sum(map(text.count, LETTERS)) <= QUOTED, said
        assert len(text) <= 10 * QUOTED, said


def ask(server: Faulty, method: str, path: str, **options: Any) -> httpx.Response:
    return CLIENT.request(method, server.url + path, **options)


CLIENT = httpx.Client(timeout=PATIENCE_S, verify=False)  # no certificates are read again and again
canaries = pytest.mark.parametrize("canary", CANARY.values(), ids=CANARY)


@canaries
@pytest.mark.parametrize("path", [*DRAWING, "/workflows", "/prompt", "/explain"])
def test_keys_that_nobody_knows(server: Faulty, path: str, canary: str) -> None:
    for payload in (
        {canary: 1}, {"prompt": "x", canary: 1}, {"prompt": {canary: 1}}, {"prompt": "x", "inputs": "x", canary: 1},
        {"prompt": "x", "sampling": {canary: 1}}, {"prompt": "x", "reading": {canary: 1}},
        {"prompt": "x", "reading": {"sizes": {canary: 1}}}, {"prompt": "x", "loras": [{canary: 1}]},
        {"prompt": "x", "step_cache": {canary: 1}}, {"inputs": "x", "parameters": {canary: 1}},
        {"prompt": "x", "image_size": {canary: 1}}, {"prompt": "x", "image": SOURCE, canary: 1},
    ):  # fmt: skip
        assert_brief(ask(server, "POST", path, json=payload))


@canaries
@pytest.mark.parametrize("name", NAMES)
def test_values_of_fields(server: Faulty, name: str, canary: str) -> None:
    for path in ("/generate", "/v1/images/edits"):
        for value in (canary, {canary: canary}, [{"name": canary}]):
            answer = ask(server, "POST", path, json={"prompt": "x", "size": "64x64", name: value})
            if answer.status_code != 200:  # where it changes nothing
                assert_brief(answer)


@canaries
@pytest.mark.parametrize("where", ["id", "class_type", "input", "value", "link", "title", "type"])
def test_graphs(server: Faulty, where: str, canary: str) -> None:
    for node, name in [(node, name) for node, body in graph().items() for name in body["inputs"]]:
        made: dict[str, Any] = json.loads(json.dumps(graph()))
        one = made[node]
        if where == "id":
            made[canary] = made.pop(node)
        elif where in ("class_type", "title"):
            one |= {"class_type": canary} if where == "class_type" else {"_meta": {"title": canary}, "class_type": "X"}
        else:
            change = {"input": {canary: 1}, "value": {name: canary}, "link": {name: [canary, 0]}, "type": {name: {}}}
            one["inputs"] |= change[where]
        for method, path, payload in (
            ("POST", "/prompt", {"prompt": made}),
            ("POST", "/workflows", {"workflow": made}),
            ("PUT", "/workflows/quoted", made),
            ("POST", "/explain", made),
        ):
            answer = ask(server, method, path, json=payload)
            if answer.status_code >= 300:
                assert_brief(answer)


@canaries
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
@pytest.mark.parametrize(
    "start",
    ["", "v1/", "v1/models/", "v1/jobs/", "v1/images/", "workflows/", "workflows/a@", "models/", "fal/", "object_info/",
     "history/", "api/jobs/", "comfy/", "settings/", "userdata/", "images/", "v1/deployments/", "view/"],
)  # fmt: skip
def test_paths(server: Faulty, start: str, method: str, canary: str) -> None:
    path = quote(f"/{start}{canary}")[:60_000].rstrip("%")
    answer = ask(server, method, path, json={"prompt": "x"} if method in ("POST", "PUT") else None)
    if answer.status_code >= 300:
        assert_brief(answer)


@canaries
@pytest.mark.parametrize(
    "path",
    ["/view?filename=a&", "/view?", "/history?", "/api/jobs?", "/userdata?", "/userdata/a?", "/v1/models?", "/x?"],
)
def test_queries(server: Faulty, path: str, canary: str) -> None:
    text = quote(canary)[:50_000].rstrip("%")
    for name in ("filename", "type", "subfolder", "max_items", "limit", "status", "dir", "preview", "channel", text):
        answer = ask(server, "GET", f"{path}{name}={text if name != text else 1}")
        if answer.status_code >= 300:
            assert_brief(answer)


@pytest.mark.parametrize("canary", ["Q" * 30_000, "Q " * 15_000])
@pytest.mark.parametrize(
    "name",
    ["x-deadline-s", "idempotency-key", "accept", "content-type", "content-encoding", "host", "origin", "prefer",
     "authorization", "x-request-id", "x-stainless-read-timeout", "traceparent", "x-forwarded-host", "accept-encoding"],
)  # fmt: skip
def test_headers(server: Faulty, name: str, canary: str) -> None:
    for method, path, payload in (
        ("POST", "/v1/images/generations", {"prompt": "x", "size": "64x64"}),
        ("POST", "/prompt", {}),
        ("GET", "/v1/models", None),
        ("PUT", "/workflows/a", {}),
        ("POST", "/upload/image", {}),
    ):
        answer = ask(server, method, path, json=payload, headers={name: canary.strip()})
        if answer.status_code >= 300:
            assert_brief(answer)


def part(head: bytes, data: bytes = b"x") -> bytes:
    return b"--b\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n--b--" % (head, data)


@canaries
@pytest.mark.parametrize("path", ["/v1/images/edits", "/upload/image", "/upload/mask"])
def test_forms(server: Faulty, path: str, canary: str) -> None:
    kind = {"content-type": "multipart/form-data; boundary=b"}
    long = canary[:7000].replace("\n", " ").encode()
    image = b'name="image"; filename="a.png"\r\n\r\nx\r\n--b\r\nContent-Disposition: form-data; '
    heads = [b'name="%s"' % long, b'name="image"; filename="%s"' % long, b'name="%s"; filename="a"' % long]
    heads += [b'name="prompt"', b'name="type"', b'name="subfolder"', b'name="original_ref"', b'name="model"', long]
    for head in heads:
        for sent in (part(head, canary.encode()), part(image + head, canary.encode())):
            answer = ask(server, "POST", path, content=sent, headers=kind)
            if answer.status_code >= 300:
                assert_brief(answer)


BAD: Mapping[str, tuple[str, bytes]] = {
    **{
        name: (f"; charset={name}", b'name="prompt"') for name in ("punycode", "undefined", "idna", "utf-16", "latin-1")
    },
    "value": ("", b'name="prompt"\r\n\r\n\xff'),
    "name": ("", b'name="\xff"'),
    "file's name": ("", b'name="image"; filename="\xff"'),
}


@pytest.mark.parametrize(("charset", "head"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("path", ["/v1/images/edits", "/upload/image", "/upload/mask"])
def test_forms_are_utf_8(server: Faulty, path: str, charset: str, head: bytes) -> None:
    image = b'name="image"; filename="a.png"\r\n\r\nx\r\n--b\r\nContent-Disposition: form-data; '
    kind = {"content-type": f"multipart/form-data; boundary=b{charset}"}
    answer = ask(server, "POST", path, content=part(image + head), headers=kind)
    assert_brief(answer, 400)
    assert "UTF-8" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "text", ['{"prompt": "\\ud800"}', '{"prompt": "x", "\\udfff": 1}', '{"\\ud800": {"inputs": {}}}']
)
@pytest.mark.parametrize("path", [*DRAWING, "/workflows", "/prompt", "/explain", "/queue", "/settings"])
def test_half_a_character(server: Faulty, path: str, text: str) -> None:
    assert_brief(ask(server, "POST", path, content=text, headers=JSON), 400)


def test_a_path_that_is_no_text(server: Faulty) -> None:
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), PATIENCE_S) as client:
        client.sendall(b"GET /%ff%fe HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 404")


@pytest.mark.parametrize("length", ["x", "-1", "1e3", "1_0", "", " ", "9" * 5000, "\u0661"])
def test_a_length_that_is_none_behind_another_server(family: FakeFamily, length: str) -> None:
    """Ours lets none through."""

    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://kindling") as client:
            head = [(b"content-length", length.encode()), (b"content-type", b"application/json")]
            return await client.post("/generate", content=b"{}", headers=head)

    with family.engine() as engine:
        app = create_app(engine, public=False)
        assert_brief(asyncio.run(main()), 400)
