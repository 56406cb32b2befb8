"""An app below a prefix: mounted in a FastAPI app or in Starlette's, or behind a proxy, over a real server."""

import asyncio
import base64
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from openai import OpenAI
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from fakes import Editor, FakeFamily
from handler import Engine, Settings, create_app
from handler.api.codec import encode
from handler.core.errors import SettingsError
from handler.server.auth import OPEN_ROUTES
from handler.server.mounted import rooted
from handler.server.openapi.operations import OPERATIONS, operations

PNG = base64.b64encode(encode(np.zeros((64, 64, 3), np.uint8), "png", 100, None)).decode()
ROOT = Path(__file__).parents[2]
KEY = {"authorization": "Bearer canary-key-0451"}
SETTINGS: dict[str, Any] = {"api_keys": ("canary-key-0451",)}


def mounted_in_fastapi(app: ASGIApp) -> ASGIApp:
    parent = FastAPI()
    parent.add_api_route("/ping", lambda: "the parent's")
    parent.mount("/images", app)
    return parent


def mounted_twice(app: ASGIApp) -> ASGIApp:
    return Starlette(routes=[Mount("/a/v1", routes=[Mount("/v1", app)])])


def mounted_behind_a_prefix(app: ASGIApp) -> ASGIApp:
    """Whose server says that all of this lies below /outer, as a proxy has it that strips that."""
    return Starlette(routes=[Mount("/images", app)])


def served(app: ASGIApp) -> ASGIApp:
    return app


class Below:
    """As a proxy leaves requests that strips a prefix, before a framework that says so in root_path alone."""

    def __init__(self, app: ASGIApp, root: str) -> None:
        self.app, self.root = app, root

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app({**scope, "root_path": self.root}, receive, send)


def below_said(app: ASGIApp) -> ASGIApp:
    return Below(Starlette(routes=[Mount("/images", app)]), "/outer")


# How an app is served: what is around it, uvicorn's root_path, the prefix that is asked below, and what callers see.
PLACES: dict[str, tuple[Callable[[ASGIApp], ASGIApp], str, str, str]] = {
    "alone": (served, "", "", ""),
    "FastAPI": (mounted_in_fastapi, "", "/images", "/images"),
    "twice, and named as a route begins": (mounted_twice, "", "/a/v1/v1", "/a/v1/v1"),
    "root_path": (served, "/images", "", "/images"),
    "root_path and a mount": (mounted_behind_a_prefix, "/outer", "/images", "/outer/images"),
    "root_path that is said and not in the path": (below_said, "", "/images", "/outer/images"),
}


@pytest.fixture
def family() -> Editor:
    """That can edit, too."""
    return Editor()


@asynccontextmanager
async def serving(app: ASGIApp, root_path: str = "") -> AsyncIterator[httpx.AsyncClient]:
    """A client of `app`, which uvicorn serves on loopback."""
    config = uvicorn.Config(app, port=0, log_level="warning", root_path=root_path)
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    try:
        [listener] = server.servers[0].sockets
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=url) as client:
            yield client
    finally:
        server.force_exit = False
        await server.shutdown()


@pytest.fixture(params=PLACES)
def talk(request: pytest.FixtureRequest, family: Editor) -> Callable[..., Any]:
    """Talks to an app below a prefix: `main(client, prefix, root)`."""
    around, root_path, prefix, root = PLACES[request.param]

    @contextmanager
    def talking(**settings: Any) -> Iterator[ASGIApp]:
        with family.engine(**{**SETTINGS, **settings}) as engine:
            yield around(create_app(engine))

    def run(main: Callable[..., Any], **settings: Any) -> Any:
        async def whole(app: ASGIApp) -> Any:
            async with serving(app, root_path) as client:
                return await main(client, prefix, root)

        with talking(**settings) as app:
            return asyncio.run(whole(app))

    return run


def test_every_route_answers_below_a_prefix(talk: Callable[..., Any]) -> None:
    async def main(client: httpx.AsyncClient, prefix: str, root: str) -> None:
        for path, operation in OPERATIONS.items():
            where = prefix + path.replace("{id}", "spark")
            options = {"json": {"prompt": "x"}} if operation.body else {}
            if path == "/v1/images/edits":
                options = {"json": {"prompt": "x", "image": PNG}}
            told = await client.request(operation.method, where, headers=KEY, **options)
            wanted = 404 if operation.retired else 200
            assert told.status_code == wanted, (where, told.text)
            assert not operation.retired or "retired" in told.text
            stranger = await client.request(operation.method, where, **options)
            assert (stranger.status_code == 401) == (path not in OPEN_ROUTES), where
        form = {"files": {"image": ("x.png", base64.b64decode(PNG), "image/png")}, "data": {"prompt": "x"}}
        assert (await client.post(prefix + "/v1/images/edits", headers=KEY, **form)).status_code == 200

    talk(main)


def test_what_is_not_there_is_told_as_callers_see_it(talk: Callable[..., Any]) -> None:
    async def main(client: httpx.AsyncClient, prefix: str, root: str) -> None:
        for path in ("/nowhere", "/ping/", "/v1/models/", "/images/images/ping", "/v1//ping"):
            told = await client.get(prefix + path, headers=KEY)
            assert told.status_code == 404, path
            stranger = await client.get(prefix + path)
            assert stranger.status_code == 401, path
        told = await client.get(prefix + "/nowhere", headers=KEY)
        assert f"no route {root}/nowhere." in told.json()["error"]["message"]
        told = await client.get(prefix + "/generate", headers=KEY)
        assert f"not allowed on {root}/generate." in told.json()["error"]["message"]

    talk(main)


def test_the_description_says_where_its_routes_are(talk: Callable[..., Any]) -> None:
    async def main(client: httpx.AsyncClient, prefix: str, root: str) -> None:
        told = (await client.get(prefix + "/openapi.json", headers=KEY)).json()
        assert told.get("servers") == ([{"url": root}] if root else None)
        assert told["paths"].keys() == operations().keys()

    talk(main)


def test_routes_are_logged_and_counted_by_their_own_names(
    talk: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kindling.requests")

    async def main(client: httpx.AsyncClient, prefix: str, root: str) -> str:
        await client.post(prefix + "/v1/images/generations", headers=KEY, json={"prompt": "x", "seed": 7})
        await client.get(prefix + "/v1/models/spark", headers=KEY)
        await client.get(prefix + "/nowhere", headers=KEY)
        return (await client.get(prefix + "/metrics", headers=KEY)).text

    told = talk(main)
    routes = re.findall(r'kindling_requests_total\{.*?route="(.*?)".*?\} 1\.0', told)
    assert sorted(routes) == ["/v1/images/generations", "/v1/models/{id:path}", "other"]
    [line] = [json.loads(record.message) for record in caplog.records if record.name == "kindling.requests"]
    assert (line["route"], line["seed"]) == ("/v1/images/generations", 7)


def test_a_request_that_comes_again_finds_its_answer(talk: Callable[..., Any], family: FakeFamily) -> None:
    async def main(client: httpx.AsyncClient, prefix: str, root: str) -> list[httpx.Response]:
        headers = {**KEY, "idempotency-key": "one"}
        ask = [client.post(prefix + "/generate", headers=headers, json={"prompt": "x", "seed": 7}) for _ in range(2)]
        return [await each for each in ask]

    first, second = talk(main)
    assert first.content == second.content
    assert ("idempotent-replayed" in first.headers, second.headers["idempotent-replayed"]) == (False, "true")
    assert family.drawn == [7]


def test_a_stream_comes_through(talk: Callable[..., Any]) -> None:
    async def main(client: httpx.AsyncClient, prefix: str, root: str) -> str:
        body = {"prompt": "x", "stream": True}
        return (await client.post(prefix + "/v1/images/generations", headers=KEY, json=body)).text

    assert "event: image_generation.completed" in talk(main)


def test_a_page_of_an_allowed_origin_may_ask_below_a_prefix(talk: Callable[..., Any]) -> None:
    async def main(client: httpx.AsyncClient, prefix: str, root: str) -> httpx.Response:
        headers = {"origin": "https://page.example", "access-control-request-method": "POST"}
        return await client.options(prefix + "/generate", headers=headers)

    answer = talk(main, cors_origins="https://page.example")
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://page.example")


def test_the_parents_own_routes_stay_its_own(family: FakeFamily) -> None:
    async def main(app: ASGIApp) -> list[int]:
        async with serving(app) as client:
            paths = ("/ping", "/images/ping", "/imagesx/ping", "/v1/models")
            return [(await client.get(path)).status_code for path in paths]

    with family.engine(**SETTINGS) as engine:
        assert asyncio.run(main(mounted_in_fastapi(create_app(engine)))) == [200, 200, 404, 404]


@pytest.mark.parametrize(
    ("root_path", "app_root_path", "path", "wanted"),
    [
        ("", None, "/ping", "/ping"),
        ("/images", None, "/images/ping", "/ping"),
        ("/images", None, "/images", "/"),
        ("/images", None, "/images/", "/"),
        ("/images/", None, "/images/ping", "/ping"),
        ("/images", None, "/imagesx/ping", "/imagesx/ping"),
        ("/images", None, "/ping", "/ping"),
        ("/v1", None, "/v1/v1/models", "/v1/models"),
        ("/outer/images", "/outer", "/images/ping", "/ping"),
        ("/outer/images", "/outer", "/outer/images/ping", "/ping"),
        ("/images", "/images", "/ping", "/ping"),
    ],
)
def test_what_is_asked_below_a_prefix(root_path: str, app_root_path: str | None, path: str, wanted: str) -> None:
    given = {"path": path, "root_path": root_path} | ({"app_root_path": app_root_path} if app_root_path else {})
    told = rooted(given)
    assert (told["path"], told["root_path"], told["app_root_path"]) == (wanted, "", root_path.rstrip("/"))
    assert given["path"] == path


def test_an_app_that_is_served_by_itself_owns_its_engine(family: FakeFamily) -> None:
    """And none that somebody else has started, who ends it too."""
    engine = Engine(Settings(**SETTINGS), boot=family.boot)

    async def main() -> None:
        async with serving(create_app(engine)) as client:
            assert engine.begun
            body = {"prompt": "x", "seed": 7}
            assert (await client.post("/generate", headers=KEY, json=body)).status_code == 200
        assert engine.state == "stopped"

    asyncio.run(main())

    async def beside(other: Engine) -> None:
        async with serving(create_app(other)) as client:
            assert (await client.get("/ping")).status_code == 200
        assert other.state == "ready"

    with family.engine(**SETTINGS) as other:
        asyncio.run(beside(other))


def test_an_app_wants_keys_unless_somebody_says_otherwise() -> None:
    engine = Engine(Settings())
    with pytest.raises(SettingsError, match="KINDLING_API_KEYS"):
        create_app(engine)
    assert create_app(engine, public=False)
    assert create_app(Engine(Settings(allow_open=True)))


def test_the_app_of_the_guide_serves(tmp_path: Path) -> None:
    """As the guide says it: its program, its commands; and SIGTERM ends it."""
    text = (ROOT / "docs/embedding.md").read_text()
    [program] = re.findall(r"Save this as `app.py`[^\n]*:\n\n```python\n(.*?)```", text, re.S)
    [(serve, ask)] = re.findall(r"```sh\n(uvicorn app:app .*)\n(curl .*)\n```", text)
    (tmp_path / "app.py").write_text(program)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KINDLING_")}
    environment = {**kept, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = serve.replace("8000", "0").split()
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr
            heard = (re.search(r"running on (http://127.0.0.1:\d+)", line) for line in server.stderr)
            url = next(found[1] for found in heard if found)
            here = ask.replace("http://127.0.0.1:8000", url)
            subprocess.run(["bash", "-c", here], cwd=tmp_path, check=True, timeout=60)
            answer = json.loads((tmp_path / "answer.json").read_text())
            assert base64.b64decode(answer["data"][0]["b64_json"]).startswith(b"\x89PNG")
            with OpenAI(base_url=f"{url}/images/v1", api_key="a-key-of-yours", max_retries=0) as openai:
                assert next(model.id for model in openai.models.list()) == "spark"
            assert httpx.get(f"{url}/images/ping").status_code == 200
            assert httpx.get(f"{url}/images/metrics").status_code == 401
        finally:
            server.terminate()
            server.stderr.read()
    assert server.returncode in (0, -signal.SIGTERM)  # uvicorn raises what it was told once more
