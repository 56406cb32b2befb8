"""Files of ComfyUI's routes: what they are called, and that none lies outside its folder."""

import io
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from comfy_graphs import graph
from handler import Settings
from handler.api.codec import inscribed
from handler.api.comfy.archive import BOUNDS, FIELDS, GONE, Archive
from handler.api.comfy.naming import filled, following
from handler.api.comfy.shelf import Disk, disk_of, named, prune
from handler.api.comfy.viewing import annotated, masked, shown
from handler.api.dialects.comfy import pictured
from handler.core.errors import InvalidValue, OutsideFolder, RequestError

OUT = [
    "../x", "/etc/x", "a/../../x", "..", ".", "../output-2/x", "a\\..\\..\\x", "C:\\x", "c:x", "a\0b", "a\nb",
    ".hidden", "a/b/c/d/e/f/g/h/i/x", "x" * 201, "/",
]  # fmt: skip


@pytest.mark.parametrize("prefix", OUT)
def test_a_prefix_never_leads_out(prefix: str) -> None:
    with pytest.raises(RequestError):
        filled(prefix, {}, (64, 64))


@pytest.mark.parametrize("prefix", ["%6.text%", "%6.text%/x", "x/%6.text%", "%date:../../yyyy%"])
def test_nor_does_what_a_placeholder_means(prefix: str) -> None:
    folder, start = filled(prefix, graph(text="../../../etc/cron.d"), (64, 64))
    assert ".." not in [*folder.split("/"), start]
    assert "/" not in start


@pytest.mark.parametrize(
    ("prefix", "found"),
    [
        ("ComfyUI", ("", "ComfyUI")),
        ("people/ComfyUI", ("people", "ComfyUI")),
        ("a//b/./c", ("a/b", "c")),
        ("a/../b", ("", "b")),
        ("%width%x%height%", ("", "64x32")),
        ("%KSampler.seed%_%3.steps%", ("", "7_4")),
        ("%Of the picture.text%", ("", "a red circle")),
        ("%nobody.knows%", ("", "%nobody.knows%")),
        ("%batch_num%", ("", "0")),
        ("100%", ("", "100%")),
        ("", ("", "ComfyUI")),
        ("%6.none%", ("", "%6.none%")),
        ("2024\\11\\x", ("2024/11", "x")),
    ],
)
def test_what_a_prefix_means(prefix: str, found: tuple[str, str]) -> None:
    nodes = graph()
    nodes["6"]["_meta"] = {"title": "Of the picture"}
    assert filled(prefix, nodes, (64, 32)) == found


@pytest.mark.parametrize("body", [{"_meta": "x"}, {"_meta": ["title"]}, {"inputs": ["seed"]}])
def test_a_node_of_another_shape_means_nothing(body: Any) -> None:
    assert filled("%KSampler.seed%", {"1": {"class_type": "KSampler"} | body}, (1, 1)) == ("", "%KSampler.seed%")


def test_few_placeholders_are_looked_for() -> None:
    """Each may be looked for in ten thousand nodes."""
    nodes = {"6": {"class_type": "A", "inputs": {"cfg": 1}}}
    assert filled("%6.cfg%" * 13, nodes, (1, 1)) == ("", "1" * 12 + "%6.cfg%")


@pytest.mark.parametrize("broken", [{"_meta": [1]}, {"_meta": "x"}, {"inputs": [1]}, {"inputs": "seed"}])
def test_what_is_no_node_gives_a_prefix_nothing(broken: dict[str, Any]) -> None:
    nodes: dict[str, Any] = {"55": {"class_type": "Note", **broken}, **graph()}
    assert filled("%KSampler.seed%_%Some.text%", nodes, (1, 1)) == ("", "7_%Some.text%")


def test_dates_are_today() -> None:
    before = time.strftime("%Y-%m-%d")
    assert filled("%date:yyyy-MM-dd%/%year%", {}, (1, 1)) in [
        (day, day[:4]) for day in (before, time.strftime("%Y-%m-%d"))
    ]


def test_the_next_number_follows_the_highest() -> None:
    assert following("a", []) == 1
    assert following("a", ["a_00007_.png", "a_00009_.jpg", "ab_00020_.png", "a_x_.png", "b_00030_.png"]) == 10
    assert following("a.b", ["aXb_00007_.png"]) == 1


@pytest.mark.parametrize(
    ("subfolder", "name", "error"),
    [
        *(("", name, InvalidValue) for name in ("", ".", "..", "a/b", "a\\b", "C:x", "\0", "x\n", ".x", "y" * 201)),
        *((folder, "x", OutsideFolder) for folder in ("..", "a/..", "/", "/etc", "a/../..", "/".join("abcdefghi"))),
        *((folder, "x", InvalidValue) for folder in ("a\\..", "C:", "a\0", ".ssh")),
    ],
)
def test_names_that_could_mean_another_place(subfolder: str, name: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        named("output", subfolder, name)


@pytest.mark.parametrize(
    "name", ["3.45.12\u202fPM.png", "a\u3000b.png", "a\xa0b.png", "\U0001f468\u200d\U0001f467.png"]
)
def test_a_name_may_have_any_space_or_sign(name: str) -> None:
    assert named("input", "", name) == f"input/{name}"


@pytest.mark.parametrize("side", ["\x1b", "\x7f", "\x85", "\u2028", "\u202e", "\u2066", "\ud800"])
def test_but_nothing_that_steers(side: str) -> None:
    with pytest.raises(InvalidValue):
        named("input", "", f"a{side}b.png")


def test_links_lead_nowhere(tmp_path: Path) -> None:
    """Neither a file that is one, nor a folder, nor the folder itself."""
    disk, secret = Disk(tmp_path / "root", shared=True), tmp_path / "secret"
    secret.mkdir()
    (secret / "key.png").write_bytes(b"secret")
    disk.put("output/x.png", b"fine")
    (tmp_path / "root/output/link.png").symlink_to(secret / "key.png")
    (tmp_path / "root/output/folder").symlink_to(secret)
    (tmp_path / "root/temp").symlink_to(secret)
    for name in ("output/link.png", "output/folder/key.png", "temp/key.png"):
        with pytest.raises((OutsideFolder, OSError)):
            disk.get(name)
        assert not _has(disk, name)
    for name in ("output/folder/new.png", "temp/new.png"):
        with pytest.raises(OutsideFolder):
            disk.put(name, b"x")
    disk.put("output/link.png", b"mine")  # in its place, not where it led
    assert (secret / "key.png").read_bytes() == b"secret"
    assert [entry.name for entry in disk.entries("output", deep=True)] == ["output/x.png", "output/link.png"]
    assert {path.name for path in secret.iterdir()} == {"key.png"}


def _has(disk: Disk, name: str) -> bool:
    try:
        return disk.has(name)
    except OutsideFolder:
        return False


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    os.mkfifo(tmp_path / "output/pipe.png")
    disk = Disk(tmp_path, shared=True)
    (tmp_path / "output/folder.png").mkdir()
    (tmp_path / "output/file").write_bytes(b"x")
    for name in ("output/pipe.png", "output/none.png", "output/folder.png", "output/file/x.png", "output/file/y/x.png"):
        with pytest.raises(FileNotFoundError):
            disk.get(name)


@pytest.mark.parametrize("anew", [True, False])
def test_a_file_is_no_folder(tmp_path: Path, anew: bool) -> None:
    """Which is not said in the words for a name that is taken: then a next one would be tried for ever."""
    disk = Disk(tmp_path, shared=True)
    disk.put("output/file", b"x")
    for name in ("output/file/x.png", "output/file/y/x.png"):
        with pytest.raises(NotADirectoryError):
            disk.put(name, b"y", anew)


def test_workers_that_save_at_once_overwrite_nothing(tmp_path: Path) -> None:
    """Two archives look for the next number at the same time."""
    first, second = (Archive(Settings(volume=tmp_path)) for _ in range(2))
    first.save("output", "a", "x", b"0")
    places = [each.save("output", "a", "x", data) for data in (b"1", b"2") for each in (first, second)]
    assert [place["filename"] for place in places] == [f"x_0000{number}_.png" for number in (2, 3, 4, 5)]
    with pytest.raises(FileExistsError):
        first.shelf.put("output/a/x_00001_.png", b"mine", anew=True)
    assert first.load("x_00001_.png", "a", "output") == b"0"


def test_folders_are_bounded_by_count_and_age(tmp_path: Path) -> None:
    disk = Disk(tmp_path, shared=True)
    for number in range(6):
        disk.put(f"output/{number % 2}/{number}.png", b"")
        age = 1000 if number == 5 else 10 - number
        os.utime(tmp_path / f"output/{number % 2}/{number}.png", (time.time() - age,) * 2)
    prune(disk, "output", 4, 100)
    assert [entry.name[-5] for entry in disk.entries("output", deep=True)] == ["1", "2", "3", "4"]
    prune(disk, "output", 4, 8)
    assert [entry.name[-5] for entry in disk.entries("output", deep=True)] == ["3", "4"]
    assert min(BOUNDS.values())[0] > 100
    for number in range(3):
        disk.put(f"temp/{number}.png", bytes(1000))
    prune(disk, "temp", 100, 100, 2500)
    assert len(disk.entries("temp")) == 2


def test_what_was_never_written_whole_goes_after_a_day(tmp_path: Path) -> None:
    disk = Disk(tmp_path, shared=True)
    disk.put("output/a/x.png", b"")
    old, new, other = "0" * 16, "1" * 16, "film"
    for name, age in ((f"{old}.part", 2), (f"{new}.part", 0), (f"{other}.part", 2), ("y.png", 2)):
        (tmp_path / f"output/a/{name}").touch()
        os.utime(tmp_path / f"output/a/{name}", (time.time() - age * 86400,) * 2)
    prune(disk, "output", 10, 1e9)
    assert sorted(path.name for path in tmp_path.glob("output/a/*")) == [f"{new}.part", f"{other}.part", "x.png"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"elsewhere/{old}.part").touch()
    os.utime(tmp_path / f"elsewhere/{old}.part", (0, 0))
    (tmp_path / "temp").symlink_to("elsewhere")
    disk.sweep("temp", time.time())
    assert (tmp_path / f"elsewhere/{old}.part").exists()


def test_a_clock_that_is_ahead_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too old is so by the clock of the file system."""
    disk = Disk(tmp_path, shared=True)
    disk.put("output/x.png", b"")
    ahead = time.time() + 7200
    monkeypatch.setattr("handler.api.comfy.shelf.time.time", lambda: ahead)
    prune(disk, "output", 10, 3600)
    assert len(disk.entries("output")) == 1
    assert Disk(tmp_path / "none", shared=True).now() == ahead


def test_records_count_as_what_they_take_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small lists take some twenty times as much as their text."""
    monkeypatch.setattr("handler.api.comfy.archive.LISTED", 20_000)
    archive = Archive(Settings(volume=tmp_path))
    record = {**dict.fromkeys(FIELDS), "state": "completed", "created": 1, "outputs": {}, "meta": {}}
    for name, prompt in (("plain", ["x" * 3000]), ("lists", [[]] * 1000)):
        archive.keep(name, {**record, "prompt": prompt})
        time.sleep(0.01)
    assert [*archive.records()] == []
    archive.forget("lists")
    assert [*archive.records()] == ["plain"]


def test_a_volume_that_cannot_be_written_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    archive = Archive(Settings(volume=tmp_path))
    archive.save("output", "", "x", b"0")
    assert (archive.shelf.shared, [*tmp_path.iterdir()]) == (False, [])


def test_a_prompt_whose_worker_is_gone_ends(tmp_path: Path) -> None:
    """Its record says until when somebody works at it."""
    archive = Archive(Settings(volume=tmp_path))
    record = {"state": "pending", "client": "", "created": 1, "started": None, "ended": None, "outputs": {}}
    record |= {"prompt": [1, "x", {}, {}, []], "streamed": {}, "status": None, "meta": {}}
    archive.keep("x", record | {"until": 10**15})
    archive.keep("y", record | {"until": 2})
    waits, gone = archive.record("x"), archive.record("y")
    assert waits
    assert gone
    assert (waits["state"], waits["status"], gone["state"]) == ("pending", None, "failed")
    assert gone["status"]["messages"][0][1]["exception_message"] == GONE
    assert archive.record("z") is None
    (tmp_path / "comfy/jobs/torn.json").write_text(json.dumps(record)[:20])
    assert archive.record("torn") is None


@pytest.mark.parametrize("name", ["page.html", "x.svg", "x.js", "x.xml", "x.unknown", "x", "x.css", "x.pdf"])
def test_what_a_browser_might_run_is_an_attachment(name: str) -> None:
    found = shown(b"<script>", name, "", "")
    assert (found.attached, found.media) == (True, "application/octet-stream")


@pytest.mark.parametrize("size", [(512, 40), (48, 48), (17_000, 100)])
@pytest.mark.parametrize("form", ["webp;90", "jpeg"])
def test_a_picture_of_any_shape_has_a_preview(size: tuple[int, int], form: str) -> None:
    """WebP has no side above 16,383 pixels."""
    data = io.BytesIO()
    Image.new("RGB", size, "red").save(data, "PNG")
    assert shown(data.getvalue(), "a.png", form, "").media == f"image/{form[:4]}"


def test_a_workflow_that_is_none_is_not_kept_under_a_mask() -> None:
    data = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(data, "PNG")
    for text in ("[" * 200_000, "{"):
        original = inscribed(data.getvalue(), {"workflow": text, "prompt": "{}"})
        assert pictured.texts(masked(original, data.getvalue())) == {"prompt": b"{}"}


def test_a_name_may_say_its_folder() -> None:
    assert annotated("x.png [input]", "output") == ("x.png", "input")
    assert annotated("x [y].png", "output") == ("x [y].png", "output")


def test_a_folder_that_others_remove_is_made_again(tmp_path: Path) -> None:
    """Whoever takes the last sign of a client takes its folder, while the next one comes."""
    disk, over = Disk(tmp_path / "comfy", shared=True), threading.Event()

    def remove() -> None:
        while not over.is_set():
            disk.remove("clients/one/sign")

    remover = threading.Thread(target=remove)
    remover.start()
    for _ in range(2000):
        disk.put("clients/one/sign", b"")
    over.set()
    remover.join()


def test_a_folder_on_the_volume_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "comfy").write_bytes(b"")
    assert disk_of(tmp_path) is None


def record(prompt_id: str, **fields: Any) -> dict[str, Any]:
    kept = dict.fromkeys(FIELDS) | {"state": "completed", "created": 0, "prompt": [1, prompt_id, {}, {}, []]}
    kept |= {"outputs": {}, "meta": {}}
    return kept | fields


@pytest.mark.parametrize("field", ["state", "created", "prompt", "outputs", "meta"])
def test_a_record_of_another_shape_is_none(field: str, tmp_path: Path) -> None:
    archive = Archive(Settings(volume=tmp_path))
    archive.keep("a", record("a") | {field: None})
    archive.keep("b", record("b"))
    assert list(archive.records()) == ["b"]
    assert archive.record("a") is None


def test_a_prompt_that_was_sent_again_is_the_newer_one(tmp_path: Path) -> None:
    one, two = Archive(Settings(volume=tmp_path)), Archive(Settings(volume=tmp_path))
    one.keep("a", record("a", state="failed"))
    assert two.records()["a"]["state"] == "failed"
    one.keep("a", record("a"))
    os.utime(tmp_path / "comfy/jobs/a.json", (2**31, 2**31))
    assert (two.record("a") or {})["state"] == two.records()["a"]["state"] == "completed"
    one.forget("a")
    assert (two.record("a"), two.records()) == (None, {})


def test_the_latest_records_are_listed_as_far_as_memory_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handler.api.comfy.archive.LISTED", 6_500)
    archive = Archive(Settings(volume=tmp_path))
    for at in range(4):
        archive.keep(str(at), record(str(at), created=at, meta={"x": "x" * 1000}))
        os.utime(tmp_path / f"comfy/jobs/{at}.json", (at, at))
    assert [*archive.records()] == [*archive.records()] == ["2", "3"]
