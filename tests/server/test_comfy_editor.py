"""ComfyUI's editor: the files of its page, and the routes that only it asks for. A stand-in for its package has a few
files; `test_editor_page.py` has the real one in a browser."""

import asyncio
import base64
import contextlib
import gzip
import hashlib
import importlib.util
import threading
import tomllib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from comfy_graphs import graph
from fakes import FakeFamily
from handler import create_app
from handler.api.comfy import userdata
from handler.api.comfy.listeners import Listener, Listeners
from handler.api.comfy.shelf import Disk
from handler.core.errors import SettingsError

Client = httpx.AsyncClient
Story = Callable[[Client, Any], Awaitable[None]]
ROOT = Path(__file__).parents[2]
KEY = "canary-key-0451"
PASSWORD = {"authorization": "Basic " + base64.b64encode(f"me:{KEY}".encode()).decode()}
SCRIPT = "let a = 1\n"
FILES = {
    "index.html": f"<html><script>{SCRIPT}</script><script src='assets/index-AbCd_-12.js'></script></html>",
    "assets/index-AbCd_-12.js": "1;" * 1000,
    "assets/index-AbCd_-12.js.map": "the sources",
    "assets/favicon.ico": "icon",
    "assets/images/wheel.png": "png",
    "scripts/app.js": "export {}",
    "server.py": "secret",
}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package by the editor's name; its files."""
    site = tmp_path / "site"
    for name, text in FILES.items():
        path = site / "comfyui_frontend_package/static" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (site / "comfyui_frontend_package/__init__.py").write_text("raise AssertionError('nobody runs it')")
    monkeypatch.syspath_prepend(site)
    return site / "comfyui_frontend_package/static"


@pytest.fixture
def tell(family: FakeFamily, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Runs a story: it gets a client of an app with the editor, and the app's `Comfy`."""
    with contextlib.ExitStack() as stack:

        def run(story: Story, **settings: Any) -> None:
            given = {"volume": tmp_path / "volume", "comfy_ui": True, **settings}
            app = create_app(stack.enter_context(family.engine(**given)), public=False)

            async def main() -> None:
                async with Client(transport=httpx.ASGITransport(app), base_url="http://kindling") as client:
                    await story(client, app._jobs)

            asyncio.run(main())

        yield run


def test_the_guide_names_the_version_that_is_tested() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"pip install {extras['comfy-ui'][0]}\n" in (ROOT / "docs/comfyui.md").read_text()


def test_it_is_off_unless_it_is_asked_for(tell: Callable[..., None], installed: Path) -> None:
    async def story(client: Client, comfy: Any) -> None:
        for path in ("/comfy", "/comfy/", "/comfy/api/queue", "/comfy/assets/favicon.ico"):
            answer = await client.get(path)
            assert answer.status_code == 404
            assert "KINDLING_COMFY_UI=on" in answer.json()["error"]["message"]
        for path in ("/userdata", "/settings", "/api/settings", "/assets/favicon.ico", "/internal/logs"):
            assert (await client.get(path)).status_code == 404
        welcome = await client.get("/")
        assert (welcome.status_code, "/comfy/" in welcome.text) == (200, False)

    tell(story, comfy_ui=False)


def test_a_package_without_a_page_is_none(family: FakeFamily, installed: Path) -> None:
    (installed / "index.html").unlink()
    with family.engine(comfy_ui=True) as engine, pytest.raises(SettingsError, match="not installed"):
        create_app(engine, public=False)


@pytest.mark.skipif(importlib.util.find_spec("comfyui_frontend_package") is not None, reason="it is installed here")
def test_without_its_package_no_app_is_made(family: FakeFamily) -> None:
    with family.engine(comfy_ui=True) as engine, pytest.raises(SettingsError, match="pip install") as caught:
        create_app(engine, public=False)
    assert caught.value.param == "KINDLING_COMFY_UI"


def test_a_browser_gets_the_page_and_its_files(tell: Callable[..., None], installed: Path) -> None:
    async def story(client: Client, comfy: Any) -> None:
        page = await client.get("/comfy/")
        assert (page.text, page.headers["content-type"]) == (FILES["index.html"], "text/html; charset=utf-8")
        policy = page.headers["content-security-policy"]
        own = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
        assert f"script-src 'self' 'wasm-unsafe-eval' 'sha256-{own}';" in policy
        assert "default-src 'self';" in policy
        assert "frame-ancestors 'none'" in policy
        assert page.headers["cache-control"] == "private, no-cache"
        script = await client.get("/comfy/assets/index-AbCd_-12.js", headers={"accept-encoding": "identity"})
        assert (script.text, script.headers["content-type"]) == ("1;" * 1000, "text/javascript; charset=utf-8")
        assert "immutable" in script.headers["cache-control"]
        for path in ("/comfy/assets/favicon.ico", "/assets/favicon.ico", "/comfy/scripts/app.js"):
            assert "immutable" not in (await client.get(path)).headers["cache-control"]
        assert (await client.get("/assets/images/wheel.png")).headers["content-type"] == "image/png"

    tell(story)


def test_what_a_browser_has_is_not_sent_again_and_what_is_large_is_packed(
    tell: Callable[..., None], installed: Path
) -> None:
    async def story(client: Client, comfy: Any) -> None:
        path = "/comfy/assets/index-AbCd_-12.js"
        async with client.stream("GET", path, headers={"accept-encoding": "gzip"}) as answer:
            packed = b"".join([part async for part in answer.aiter_raw()])
        assert (answer.headers["content-encoding"], answer.headers["vary"]) == ("gzip", "accept-encoding")
        assert gzip.decompress(packed) == b"1;" * 1000
        assert len(packed) < 100
        again = await client.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        (installed / "assets/index-AbCd_-12.js").write_text("2;")
        changed = await client.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert (changed.status_code, changed.text) == (200, "2;")

    tell(story)


@pytest.mark.parametrize(
    "path",
    [
        *("/comfy/server.py", "/comfy/../server.py", "/comfy/%2e%2e/__init__.py", "/comfy/..%2f__init__.py"),
        *("/comfy//etc/passwd", "/comfy/%2fetc%2fpasswd", "/assets/../index.html", "/assets/..%2findex.html"),
        *("/comfy/assets", "/comfy/assets/", "/comfy/assets/index-AbCd_-12.js.map", "/comfy/INDEX.HTML", "/comfy/%00"),
    ],
)
def test_no_other_file_is_shown(tell: Callable[..., None], installed: Path, path: str) -> None:
    async def story(client: Client, comfy: Any) -> None:
        assert (await client.get(path)).status_code == 404

    tell(story)


def test_what_the_page_asks_for_and_is_not_there_is_empty(tell: Callable[..., None], installed: Path) -> None:
    """Else a browser's console has an error for each."""

    async def story(client: Client, comfy: Any) -> None:
        style = await client.get("/comfy/user.css")
        assert (style.status_code, style.text, style.headers["content-type"][:8]) == (200, "", "text/css")
        for name in ("index.json", "index.zh-TW.json", "index_logo.json"):
            assert (await client.get(f"/comfy/templates/{name}")).json() == []
        assert (await client.get("/comfy/templates/spark.json")).status_code == 404
        kept = {"user.css": "", "comfy.templates.json": "[]", "workflows%2F.index.json": "{}"}
        for name, text in kept.items():
            answer = await client.get(f"/comfy/api/userdata/{name}")
            assert (answer.status_code, answer.text) == (200, text)
        for path in ("extensions", "i18n", "workflow_templates", "global_subgraphs", "node_replacements"):
            assert (await client.get(f"/comfy/api/{path}")).json() in ([], {})
        assert (await client.get("/comfy/api/users")).json() == {"storage": "server", "migrated": True}
        assert (await client.get("/comfy/internal/logs")).json() == ""

    tell(story)


def test_the_routes_are_below_the_page_too(tell: Callable[..., None], installed: Path) -> None:
    async def story(client: Client, comfy: Any) -> None:
        made = await client.post("/comfy/api/prompt", json={"prompt": graph()})
        await comfy.active[made.json()["prompt_id"]].over.wait()
        assert [*(await client.get("/comfy/api/history")).json()] == [made.json()["prompt_id"]]
        sent = await client.post("/comfy/api/upload/image", files={"image": ("x.png", b"x")})
        assert sent.json()["name"] == "x.png"
        assert (await client.get("/comfy/internal/files/input")).json() == ["x.png"]
        assert (await client.get("/comfy/queue")).status_code == 404
        stats = (await client.get("/comfy/api/system_stats")).json()
        assert stats["system"]["argv"] == ["--disable-api-nodes"]
        folders = (await client.get("/comfy/api/experiment/models")).json()
        assert {"name": "checkpoints", "folders": ["checkpoints"]} in folders
        found = (await client.get("/comfy/api/experiment/models/checkpoints")).json()
        assert {"name": "spark.safetensors", "pathIndex": 0} in found
        assert (await client.get("/comfy/api/experiment/models/nowhere")).json() == []

    tell(story)


def test_the_root_tells_of_the_editor(tell: Callable[..., None], installed: Path) -> None:
    async def story(client: Client, comfy: Any) -> None:
        bare = await client.get("/comfy")
        assert (bare.status_code, bare.headers["location"]) == (308, "comfy/")
        assert "/comfy/" in (await client.get("/")).text

    tell(story)


def test_with_keys_a_browser_asks_for_one_as_a_password(tell: Callable[..., None], installed: Path) -> None:
    async def story(client: Client, comfy: Any) -> None:
        for path in ("/comfy", "/comfy/", "/comfy/assets/favicon.ico", "/assets/favicon.ico"):
            for headers in ({}, {"authorization": "Basic bm86"}):
                answer = await client.get(path, headers=headers)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"].startswith("Basic realm=")
        for path in ("/", "/queue", "/api/queue", "/v1/models"):
            assert (await client.get(path)).headers["www-authenticate"] == "Bearer"
        assert (await client.get("/comfy/", headers=PASSWORD)).status_code == 200
        assert (await client.get("/comfy/api/queue", headers=PASSWORD)).status_code == 200

    tell(story, api_keys=(KEY,))


@pytest.mark.parametrize("origins", [(), "*"])
def test_pages_of_others_may_not_use_that_password(
    tell: Callable[..., None], installed: Path, origins: str | tuple[str, ...]
) -> None:
    async def story(client: Client, comfy: Any) -> None:
        headers = PASSWORD | {"origin": "https://page.example"}
        for method, path in (
            ("POST", "/comfy/api/prompt"),
            ("POST", "/comfy/api/settings/x"),
            ("DELETE", "/comfy/api/userdata/x.json"),
            ("POST", "/comfy/api/userdata/x.json"),
        ):
            answer = await client.request(method, path, headers=headers, json={})
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_origin")
        assert (await client.get("/comfy/api/userdata?dir=", headers=PASSWORD)).json() == []

    tell(story, api_keys=(KEY,), cors_origins=origins)


def test_settings_are_kept(tell: Callable[..., None], installed: Path) -> None:
    async def story(client: Client, comfy: Any) -> None:
        assert (await client.get("/settings")).json() == {"Comfy.TutorialCompleted": True}
        assert (await client.get("/settings/none")).json() is None
        await asyncio.gather(*(client.post(f"/settings/{each}", content=f"{each}") for each in range(20)))
        await client.post("/settings", content='{"a": {"b": null}, "Comfy.TutorialCompleted": false}')
        assert (await client.get("/settings/a")).json() == {"b": None}
        for path, body in (("/settings/x", "{"), ("/settings/x", "NaN"), ("/settings", "[1]"), ("/settings/x", "")):
            assert (await client.post(path, content=body)).status_code == 400

    async def later(client: Client, comfy: Any) -> None:
        numbers = {str(each): each for each in range(20)}
        found = (await client.get("/comfy/api/settings")).json()
        assert found == numbers | {"a": {"b": None}, "Comfy.TutorialCompleted": False}
        comfy.archive.shelf.put("userdata/comfy.settings.json", b"{")
        assert (await client.get("/settings")).json() == {"Comfy.TutorialCompleted": True}

    tell(story)
    tell(later)


def test_workflows_are_kept_listed_moved_and_removed(tell: Callable[..., None], installed: Path) -> None:
    async def story(client: Client, comfy: Any) -> None:
        path = "/comfy/api/userdata"
        first = await client.post(f"{path}/workflows%2Fa%20b.json?overwrite=false&full_info=true", content='{"x": 1}')
        told = first.json()
        assert (told["path"], told["size"], told["modified"] > 1e12) == ("workflows/a b.json", 8, True)
        taken = await client.post(f"{path}/workflows%2Fa%20b.json?overwrite=false", content="{}")
        assert taken.status_code == 409
        assert (await client.post(f"{path}/workflows/deep/c.json", content="{}")).json() == "workflows/deep/c.json"
        assert (await client.post(f"{path}/workflows%2F.index.json", json={"favorites": []})).status_code == 200
        query = {"dir": "workflows", "recurse": "true", "split": "false", "full_info": "true"}
        found = {each["path"]: each["size"] for each in (await client.get(path, params=query)).json()}
        assert found == {"a b.json": 8, "deep/c.json": 2, ".index.json": 16}
        flat = await client.get(path, params={"dir": "workflows/deep", "split": "true"})
        assert flat.json() == [["c.json", "c.json"]]
        assert (await client.get(path, params={"dir": "workflows/a b.json"})).json() == []  # it is a file
        move = f"{path}/workflows%2Fdeep%2Fc.json/move/workflows%2F100%25.json"
        assert (await client.post(move)).json() == "workflows/100%.json"
        assert (await client.post(move)).status_code == 404
        onto = f"{path}/workflows%2F100%25.json/move/workflows%2Fa%20b.json"
        assert (await client.post(f"{onto}?overwrite=false")).status_code == 409
        assert (await client.post(f"{onto}?overwrite=true&full_info=true")).json()["size"] == 2
        same = f"{path}/workflows%2Fa%20b.json/move/workflows%2Fa%20b.json"
        assert (await client.post(same)).json() == "workflows/a b.json"
        kept = await client.get(f"{path}/workflows%2Fa%20b.json")
        assert (kept.text, kept.headers["content-type"]) == ("{}", "application/json")
        for status in (204, 404):
            assert (await client.delete(f"{path}/workflows%2Fa%20b.json")).status_code == status
        assert (await client.get(f"{path}/workflows%2Fa%20b.json")).status_code == 404
        assert (await client.post(f"{path}/workflows%2Fmove%2Fx.json", content="3")).json() == "workflows/move/x.json"
        assert (await client.get(f"{path}/workflows/move/x.json")).text == "3"  # as some proxies pass it on

    tell(story)


def test_what_is_kept_is_nothing_that_a_browser_runs(tell: Callable[..., None], installed: Path) -> None:
    async def story(client: Client, comfy: Any) -> None:
        for name in ("x.html", "x.svg", "x.js", "x"):
            await client.post(f"/userdata/{name}", content="<script>1</script>")
            answer = await client.get(f"/userdata/{name}")
            assert answer.headers["content-type"] == "application/octet-stream"
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["content-security-policy"].startswith("default-src 'none'")

    tell(story)


@pytest.mark.parametrize(
    "name",
    [
        *("..%2Fjobs%2Fx", "%2Fetc%2Fpasswd", "a%2F..%2F..%2Fx", "%2E%2E", "%2E%2E%2Fx", "...", "a%5Cb", "c:x", "x%00"),
        *("x.part", "a%2F", "x" * 201, "/".join("abcdefghij"), "%7F"),
    ],
)
def test_no_name_leads_elsewhere(tell: Callable[..., None], installed: Path, name: str) -> None:
    async def story(client: Client, comfy: Any) -> None:
        url = httpx.URL("http://kindling/").copy_with(raw_path=f"/userdata/{name}".encode())
        for method in ("GET", "POST", "DELETE"):
            assert (await client.request(method, url)).status_code in (400, 403)
        assert comfy.archive.shelf.entries("userdata", deep=True) == []

    tell(story)


def test_it_keeps_so_much_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userdata, "MOST", 3)
    monkeypatch.setattr(userdata, "BYTES", 10)
    shelf = Disk(tmp_path, shared=False)
    for name in ("a", "b", "c"):
        userdata.write(shelf, name, b"123")
    userdata.write(shelf, "c", b"1234")  # in its own place
    for name, data in (("d", b""), ("c", b"12345")):
        with pytest.raises(userdata.BodyTooLarge, match="Remove some"):
            userdata.write(shelf, name, data)
    assert userdata.read(shelf, "c") == b"1234"


def test_two_tabs_of_one_client_hear_all_and_more_than_there_may_be_end_the_oldest() -> None:
    listeners = Listeners()
    first, second, other = Listener("me"), Listener("me"), Listener("other")
    for each in (first, second, other):
        listeners.add(each)
    listeners.tell("me", "said")
    assert (first.behind, second.behind, other.behind) == (True, True, False)
    assert not listeners.keen("me")
    listeners.remove(first)
    assert (first.over, second.over, "me" in listeners) == (True, False, True)
    for _ in range(63):
        listeners.add(Listener("more"))
    assert (second.over, other.over, len(listeners)) == (True, False, 64)


def test_previews_come_and_say_of_which_node_they_are_to_who_knows_that(
    tell: Callable[..., None], family: FakeFamily, installed: Path
) -> None:
    family.gate = threading.Event()

    async def story(client: Client, comfy: Any) -> None:
        old, new = Listener("me"), Listener("me")
        new.knows = True
        heard: dict[Listener, list[bytes]] = {old: [], new: []}

        async def take(listener: Listener) -> None:
            while (said := await listener.next()) is not None:
                if isinstance(said, bytes):
                    heard[listener].append(said)

        for each in heard:
            comfy.listeners.add(each)
        tasks = [asyncio.create_task(take(each)) for each in heard]
        prompt_id = (await client.post("/prompt", json={"prompt": graph(), "client_id": "me"})).json()["prompt_id"]
        job = comfy.active[prompt_id]
        await asyncio.to_thread(family.entered.wait)
        while job.state == "pending" or old.behind or new.behind:
            await asyncio.sleep(0)
        assert family.gate
        family.gate.set()
        await job.over.wait()
        comfy.listeners.end()
        await asyncio.gather(*tasks)
        plain, told = heard[old][0], heard[new][0]
        assert plain[:8] == bytes([0, 0, 0, 1, 0, 0, 0, 1])
        assert plain[8:10] == b"\xff\xd8"
        size = int.from_bytes(told[4:8], "big")
        assert (told[:4], told[8 + size :]) == (bytes([0, 0, 0, 4]), plain[8:])
        said = httpx.Response(200, content=told[8 : 8 + size]).json()
        assert (said["prompt_id"], said["node_id"], said["image_type"]) == (prompt_id, "3", "image/jpeg")

    tell(story)
