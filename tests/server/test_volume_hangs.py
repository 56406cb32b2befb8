"""A volume that never answers: what asks it for LoRAs waits, and nothing else does."""

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from disks import Call, failing

from handler import Engine, Settings, create_app
from handler.api import loras

PATHS = ("/openapi.json", "/v1/models")
MANY = 40  # more than asyncio has threads


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until this is set, folders are not told."""
    event, walk = threading.Event(), os.walk

    def waiting(*given: Any, **options: Any) -> Any:
        assert event.wait(60)
        return walk(*given, **options)

    monkeypatch.setattr(os, "walk", waiting)
    yield event
    event.set()


@pytest.mark.parametrize("path", PATHS)
def test_nobody_else_waits_for_a_thread(path: str, tmp_path: Path, go: threading.Event) -> None:
    async def asked() -> list[int]:
        app = create_app(Engine(Settings(volume=tmp_path)), public=False)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://worker") as client:
            asking = [asyncio.create_task(client.get(path)) for _ in range(MANY)]
            await asyncio.wait(asking, timeout=0.5)  # they are as far as they come
            try:
                assert await asyncio.wait_for(asyncio.to_thread(int), 10) == 0
            finally:
                go.set()
                answers = await asyncio.gather(*asking)
            return [answer.status_code for answer in answers]

    assert asyncio.run(asked()) == [200] * MANY


def asked(path: str, settings: Settings, headers: dict[str, str] | None = None) -> httpx.Response:
    async def get() -> httpx.Response:
        app = create_app(Engine(settings), public=False)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://worker") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(get())


def test_who_asks_is_told_when_time_is_up(tmp_path: Path, go: threading.Event) -> None:
    answer = asked("/openapi.json", Settings(volume=tmp_path, deadline_s=1))
    error = answer.json()["error"]
    assert error["code"] == "deadline_exceeded"
    assert error["message"] == "The volume did not answer in the time that this request may take; try again."


def test_who_asks_a_gpu_that_hangs_is_told_of_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = threading.Event()
    monkeypatch.setattr("handler.server.watching.told", lambda _: said.wait(60))
    try:
        answer = asked("/v1/status", Settings(volume=tmp_path), {"x-deadline-s": "0.5"})
    finally:
        said.set()
    assert answer.status_code == 504
    assert answer.json()["error"]["message"].startswith("The GPU did not say in time")


def test_the_list_of_models_comes_without_loras(
    tmp_path: Path, go: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It told of no volume before there were LoRAs, and whoever asks may mean to see whether the worker is well."""
    monkeypatch.setattr(loras, "LISTING_S", 0.1)
    answer = asked("/v1/models", Settings(volume=tmp_path))
    assert (answer.status_code, answer.json()["loras"]) == (200, [])
    assert answer.json()["data"][0]["id"] == "spark"


WAITING = (
    "/workflows",
    "/workflows/poster",
    "/openapi.json",
    "/object_info",
    "/models/loras",
    "/v1/deployments/docker",
)


@pytest.mark.parametrize("path", WAITING)
def test_who_asks_waits_as_long_as_it_says(path: str, tmp_path: Path) -> None:
    released = threading.Event()

    def hang(call: Call) -> bool:
        assert released.wait(60)
        return False

    with failing(tmp_path, chosen=hang):
        try:
            answer = asked(path, Settings(volume=tmp_path), {"x-deadline-s": "0.5"})
        finally:
            released.set()
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")


@pytest.mark.parametrize("path", WAITING)
def test_who_says_it_badly_is_told(path: str, tmp_path: Path) -> None:
    answer = asked(path, Settings(volume=tmp_path), {"x-deadline-s": "soon"})
    assert answer.status_code == 400
    assert "x-deadline-s should be seconds" in answer.text


PROMPTED = ("/v1/status", "/metrics", "/system_stats")


@pytest.mark.parametrize("path", PROMPTED)
def test_a_gpu_that_never_answers_keeps_no_thread_of_others(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often its state is asked for."""
    released = threading.Event()

    def hang(*_: Any) -> int:
        assert released.wait(60)
        return 1

    for name in ("handler.server.metrics.host_memory", "handler.api.comfy.stats.host_memory"):
        monkeypatch.setattr(name, hang)
    monkeypatch.setattr("handler.model.readings.cuda_of", lambda _: hang() - 1)  # there is none

    async def asking() -> list[int]:
        app = create_app(Engine(Settings(volume=tmp_path)), public=False)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://worker") as client:
            hasty = [client.get(path, headers={"x-deadline-s": "0.5"}) for _ in range(MANY)]
            statuses = [answer.status_code for answer in await asyncio.gather(*hasty)]
            assert await asyncio.wait_for(asyncio.to_thread(int), 10) == 0
            released.set()
            while (await client.get(path)).status_code != 200:  # once those are gone that nobody waits for
                pass
            return statuses

    try:
        assert asyncio.run(asking()) == [504] * MANY
    finally:
        released.set()
