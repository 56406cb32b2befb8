"""ComfyUI's prompts and files in an object store, where workers share no volume."""

import asyncio
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from comfy_graphs import graph
from fakes import FakeFamily
from handler import Settings
from handler.api import store
from handler.api.comfy.archive import FIELDS, Archive
from handler.api.comfy.bucket import Bucket
from handler.api.comfy.shelf import prune
from handler.api.dispatch import Api
from handler.api.workflows.keeping import Library, Workflow
from handler.core.errors import WorkflowMissing
from s3_plane import BUCKET, KEY, S3, SECRET, Broken, s3_server

OUTSIDE = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "none", "AWS_SHARED_CREDENTIALS_FILE": "none"}


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    store._client.cache_clear()
    for name, value in {**OUTSIDE, "BUCKET_ACCESS_KEY_ID": KEY, "BUCKET_SECRET_ACCESS_KEY": SECRET}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with s3_server() as server:
        yield server


def archive(url: str, volume: Path) -> Archive:
    return Archive(Settings(store_bucket=BUCKET, store_endpoint=url, volume=volume, platform="modal"))


def test_any_worker_finds_what_another_has_kept(s3: S3, tmp_path: Path) -> None:
    one, other = (archive(s3.url, tmp_path) for _ in range(2))
    assert isinstance(one.shelf, Bucket)
    place = one.save("output", "a", "x", b"first")
    assert other.save("output", "a", "x", b"second")["filename"] == "x_00002_.png"
    assert other.load(place["filename"], "a", "output") == b"first"
    assert other.has("x_00001_.png", "a", "output")
    assert not other.has("x_00003_.png", "a", "output")
    with pytest.raises(FileExistsError):
        one.shelf.put("output/a/x_00001_.png", b"other", anew=True)
    with pytest.raises(FileNotFoundError):
        one.load("none.png", "", "output")
    record = {**dict.fromkeys(FIELDS), "state": "completed", "created": 1, "prompt": [], "outputs": {}, "meta": {}}
    one.keep("id", record)
    assert other.records() == {"id": record}
    prune(one.shelf, "output", 1, 100)
    assert len(other.shelf.entries("output", deep=True)) == 1
    assert other.shelf.entries("output") == []
    other.forget("id")
    assert one.records() == {}
    assert [*tmp_path.iterdir()] == []


def test_workflows_are_kept_there_too(s3: S3, tmp_path: Path) -> None:
    """Two workers agree, also on what changes within a second."""
    settings = Settings(store_bucket=BUCKET, store_endpoint=s3.url, volume=tmp_path, platform="modal")
    one, other = (Library(settings, Archive(settings)) for _ in range(2))
    first, second = (Workflow("poster", {"1": {"class_type": "SaveImage", "inputs": {"n": n}}}) for n in (1, 2))
    assert [one.put(each) for each in (first, second)] == [True, False]
    assert ([each.version for each in other.all()], other.names()) == ([second.version], ["poster"])
    one.put(first)
    assert [each.version for each in other.all()] == [first.version]
    assert other.get("poster", second.version).graph == second.graph
    other.remove("poster")
    for version in ("", first.version):
        with pytest.raises(WorkflowMissing):
            one.get("poster", version)
    assert one.names() == []


def test_pictures_of_a_workflow_come_by_url(s3: S3, tmp_path: Path, family: FakeFamily) -> None:
    with family.engine(store_bucket=BUCKET, store_endpoint=s3.url, volume=tmp_path) as engine:
        api = Api(engine)
        api.workflows.keep("poster", json.dumps(graph()).encode())
        body = asyncio.run(api.call("/workflows/poster", {"response_format": "url", "seed": 7})).body
        [one] = body["images"]
        assert ("b64_json" in one, httpx.get(one["url"]).content[:4]) == (False, b"\x89PNG")
        assert "upload" in one["stages_s"]
        lacking = asyncio.run(Api(engine).call("/workflows/none", {"response_format": "url"}))
        assert lacking.status == 404


def test_a_store_that_fails_says_so_in_our_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with Broken(403) as broken, pytest.raises(OSError, match="the object store failed") as failed:
        archive(broken.url, tmp_path).load("x.png", "", "output")
    assert SECRET not in caplog.text + str(failed.value)


def test_the_volume_goes_before_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Settings(store_bucket=BUCKET, store_endpoint="http://localhost:1", volume=tmp_path)
    assert not isinstance(Archive(given).shelf, Bucket)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert isinstance(Archive(given).shelf, Bucket)
