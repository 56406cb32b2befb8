"""Pictures by URL that a worker serves itself: who gets them, for how long, and at which address."""

import asyncio
import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Scope

from fakes import FakeFamily, raises
from handler import Settings, create_app
from handler.api import keeping, links
from handler.api.keeping import Keeper
from handler.core.errors import SettingsError
from handler.server.mounted import base
from serving import live, serving

KEY = "canary-key-0451"
HEADERS = {"authorization": f"Bearer {KEY}"}
ASKED: dict[str, Any] = {"prompt": "a xylocanary", "size": "64x64", "response_format": "url"}
ROUTE = "/v1/images/generations"


@contextlib.contextmanager
def worker(volume: Path, **settings: Any) -> Iterator[str]:
    """A worker's address; its pictures cost nothing."""
    with FakeFamily().engine(**{"volume": volume, **settings}) as engine, live(create_app(engine, public=False)) as url:
        yield url


def drawn(url: str, **fields: Any) -> str:
    """The URL of a picture that is drawn now."""
    answer = httpx.post(url + ROUTE, json=ASKED | fields, headers=HEADERS, timeout=60)
    assert answer.status_code == 200, answer.text
    [picture] = answer.json()["data"]
    assert "b64_json" not in picture
    return str(picture["url"])


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_a_picture_is_had_by_its_url_and_without_a_key(tmp_path: Path, form: str) -> None:
    with worker(tmp_path, api_keys=(KEY,)) as url:
        found = drawn(url, output_format=form)
        assert re.fullmatch(re.escape(url) + r"/v1/images/[\w-]{51}/content", found)
        answer, head = httpx.get(found), httpx.head(found)
        assert answer.status_code == head.status_code == 200
        assert answer.headers["content-type"] == head.headers["content-type"] == f"image/{form}"
        assert answer.headers["content-disposition"] == f'inline; filename="image.{form}"'
        assert re.fullmatch("private, max-age=3[56][0-9]{2}, immutable", answer.headers["cache-control"])
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert (len(answer.content), head.content) == (int(head.headers["content-length"]), b"")
        assert links.MEDIA.keys() & {answer.content[:4], answer.content[:3]}


def test_an_id_is_a_secret_that_no_two_pictures_share(tmp_path: Path) -> None:
    """32 bytes of chance in each; of what was guessed, cut or changed there is no picture, nor of another method."""
    with worker(tmp_path, api_keys=(KEY,)) as url:
        one, two = [drawn(url, seed=1) for _ in range(2)]
        assert one != two
        image_id = one.split("/")[-2]
        later = f"{int(image_id[:8], 16) + 3600:08x}{image_id[8:]}"
        guessed = [image_id[:-1], image_id + "A", image_id[:-1] + "%0a", later, "0" * 51, "..", "%2e%2e%2fx", "x", "é"]
        for guess in [*guessed, image_id[:8] + "A" * 43, image_id[:8] + image_id[8:].swapcase()]:
            answer = httpx.get(f"{url}/v1/images/{guess}/content")
            assert answer.status_code in (401, 404), guess  # 401 is of another route
            assert guess not in answer.text
        assert [httpx.request(method, one).status_code for method in ("POST", "DELETE", "OPTIONS")] == [401] * 3
        assert httpx.get(f"{url}/v1/models").status_code == 401
        names = [each.name for each in tmp_path.rglob("*") if each.is_file()]
        assert len(names) == 2
        assert not [name for name in names if image_id in name]


def test_another_worker_of_the_volume_has_it_too_and_so_has_a_later_one(tmp_path: Path) -> None:
    with worker(tmp_path) as one, worker(tmp_path) as two:
        found = drawn(one)
        there = httpx.get(found.replace(one, two))
        assert there.content == httpx.get(found).content
    with worker(tmp_path) as three:
        assert httpx.get(found.replace(one, three)).content == there.content


def test_without_a_volume_it_goes_with_its_worker(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "shared", lambda *_: None)
    with worker(tmp_path) as one, worker(tmp_path) as two:
        found = drawn(one)
        assert httpx.get(found).status_code == 200
        assert httpx.get(found.replace(one, two)).json()["error"]["code"] == "file_not_found"


def test_a_volume_that_fails_loses_nothing_at_this_worker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with worker(tmp_path) as url:
        (tmp_path / "kept").mkdir()
        (tmp_path / "kept" / "pictures").write_bytes(b"")  # where a folder should be
        found = drawn(url)
        assert httpx.get(found).status_code == 200
    assert "pictures cannot be kept or found where other workers see them" in caplog.text
    assert found.split("/")[-2] not in caplog.text


def test_it_ends_when_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    with worker(tmp_path, kept_s=100) as url:
        monkeypatch.setattr(links.time, "time", lambda: now)
        found = drawn(url)
        assert httpx.get(found).headers["cache-control"] == "private, max-age=100, immutable"
        monkeypatch.setattr(links.time, "time", lambda: now + 99)
        assert httpx.get(found).status_code == 200
        monkeypatch.setattr(links.time, "time", lambda: now + 101)
        assert httpx.get(found).status_code == 404


@pytest.mark.parametrize("shared", [True, False])
def test_the_latest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    """By count and by bytes, in memory and where workers share them."""
    if not shared:
        monkeypatch.setattr(keeping, "shared", lambda *_: None)
    monkeypatch.setattr(keeping, "SHARE", 0)

    async def main(settings: Settings, size: int) -> list[bool]:
        keeper = Keeper(settings, "pictures")
        for name in "abcde":
            await keeper.put(name, name.encode() * size)
        other = Keeper(settings, "pictures") if shared else keeper
        return [await other.get(name) is not None for name in "abcde"]

    few = Settings(volume=tmp_path / "few", kept=2)
    small = Settings(volume=tmp_path / "small", kept_mb=0.003)
    assert asyncio.run(main(few, 1)) == [False, False, False, True, True]
    assert asyncio.run(main(small, 1000)) == [False, False, True, True, True]


class Full:
    """A shelf on a disk without room."""

    def put(self, name: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    def get(self, name: str) -> bytes:
        raise FileNotFoundError


def test_what_no_volume_has_taken_stays_with_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as may be kept; of what others find too only a part."""
    monkeypatch.setattr(keeping, "NEAR", 2500)

    async def near(settings: Settings) -> list[bool]:
        keeper = Keeper(settings, "pictures")
        for name in "abcde":
            await keeper.put(name, name.encode() * 1000)
        return [keeper._near.get(name) is not None for name in "abcde"]

    assert asyncio.run(near(Settings(volume=tmp_path))) == [False, False, False, True, True]
    monkeypatch.setattr(keeping, "shared", lambda *_: Full())
    assert asyncio.run(near(Settings(volume=tmp_path))) == [True] * 5
    assert asyncio.run(near(Settings(volume=tmp_path, kept_mb=0.003))) == [False, False, True, True, True]


def test_what_may_not_be_removed_is_kept_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a bucket whose keys may neither list nor delete."""
    denied = raises(OSError(None, "the object store failed (AccessDenied)"))
    monkeypatch.setattr(keeping, "prune", lambda *_: denied())

    async def main() -> bool:
        keeper = Keeper(Settings(volume=tmp_path), "jobs")
        await keeper.put("one", b"new")
        return "one" in keeper._near._doubled

    assert asyncio.run(main())


def test_what_is_no_longer_wanted_is_not_written(tmp_path: Path) -> None:
    async def main() -> None:
        keeper, other = (Keeper(Settings(volume=tmp_path), "jobs") for _ in range(2))
        await keeper.put("one", b"new")
        await keeper.put("one", b"old", wanted=lambda: False)
        assert await other.get("one") == b"new"
        answers = iter([True, False])  # it hung while the last was written
        await keeper.put("two", b"new")
        await asyncio.to_thread(keeper._put, "two", b"old", lambda: next(answers))
        assert await other.get("two") == b"new"

    asyncio.run(main())


def test_who_asks_for_pictures_holds_up_no_writing() -> None:
    assert links._hands is not keeping._hands


def scope(host: bytes = b"", scheme: str = "http", root: str = "", server: Any = ("127.0.0.1", 8000)) -> Scope:
    headers = [(b"host", host)] if host else []
    return {"headers": headers, "scheme": scheme, "app_root_path": root, "server": server}


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (scope(b"images.example"), "http://images.example"),
        (scope(b"images.example:8443", "https", "/a/b"), "https://images.example:8443/a/b"),
        (scope(b"[::1]:8000"), "http://[::1]:8000"),
        (scope(b"localhost", root='/a"b'), "http://localhost/a%22b"),
        (scope(), "http://127.0.0.1:8000"),
        (scope(server=("::1", 80)), "http://[::1]:80"),
        (scope(server=None), "http://localhost"),
        *((scope(host), "http://127.0.0.1:8000") for host in (b"a/b", b"a@b", b'a"b', b"a b", b"a?b", b"a#b", b"a\\b")),
        *((scope(host), "http://127.0.0.1:8000") for host in (b"a:b", b"a:1:2", b"\xff", b"<script>", b"a" * 254)),
    ],
)
def test_a_url_is_at_the_address_that_was_asked(asked: Scope, found: str) -> None:
    assert base(asked, Settings()) == found
    public = Settings.from_env({"KINDLING_PUBLIC_URL": "https://images.example/kindling/"})
    assert base(asked, public) == "https://images.example/kindling"


@pytest.mark.parametrize(
    "wrong", ["images.example", "ftp://a", "https://a?b", "https://a/#b", "https://u:p@a", 'https://a/"', "https:///a"]
)
def test_a_public_url_is_one(wrong: str) -> None:
    with pytest.raises(SettingsError, match="KINDLING_PUBLIC_URL"):
        Settings.from_env({"KINDLING_PUBLIC_URL": wrong})


def test_no_header_counts_where_the_address_is_set(tmp_path: Path) -> None:
    with worker(tmp_path, api_keys=(KEY,), public_url="https://images.example/x") as url:
        poisoned = {"host": "evil.example", "x-forwarded-host": "evil.example", "x-forwarded-proto": "https"}
        answer = httpx.post(url + ROUTE, json=ASKED, headers=HEADERS | poisoned)
        assert answer.json()["data"][0]["url"].startswith("https://images.example/x/v1/images/")


def test_nobody_else_gets_an_address_that_somebody_made_up(tmp_path: Path) -> None:
    """Without keys a loopback server answers to no other name; with keys who asks so gets it back, uncached."""
    with worker(tmp_path) as url:
        assert httpx.post(url + ROUTE, json=ASKED, headers={"host": "evil.example"}).status_code == 403
        found = drawn(url)
        assert httpx.get(found, headers={"host": "evil.example"}).status_code == 403
        assert httpx.get(found, headers={"origin": "https://evil.example"}).status_code == 403
    with worker(tmp_path, api_keys=(KEY,)) as url:
        answer = httpx.post(url + ROUTE, json=ASKED, headers=HEADERS | {"host": "other.example"})
        assert answer.json()["data"][0]["url"].startswith("http://other.example/v1/images/")
        assert answer.headers["cache-control"] == "no-store"
        assert drawn(url).startswith(url)


def test_a_real_server_says_no_id_however_talkative(tmp_path: Path) -> None:
    """And believes a proxy on its own machine, as uvicorn does."""
    environ = {"KINDLING_ALLOW_OPEN": "true", "KINDLING_LOG_LEVEL": "debug", "KINDLING_VOLUME": str(tmp_path)}
    with serving(environ) as served:
        answer = httpx.post(served.url + ROUTE, json=ASKED, headers={"x-forwarded-proto": "https"}, timeout=60)
        found = answer.json()["data"][0]["url"]
        assert found.startswith(served.url.replace("http://", "https://"))
        here, image_id = found.replace("https://", "http://"), found.split("/")[-2]
        assert httpx.get(here).status_code == 200
        assert httpx.get(here.replace(image_id, "0" * 51)).status_code == 404
        told = httpx.get(f"{served.url}/metrics").text
        assert 'route="/v1/images/{image_id}/content",status="200"' in told
        process, lines = served.process, served.lines
    assert process.returncode == 0
    assert not [line for line in [*lines, *told.splitlines()] if image_id[8:] in line]
