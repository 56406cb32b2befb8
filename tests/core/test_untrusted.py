"""What others wrote, damaged in every way: files are passed over or named in an error, requests are refused."""

import asyncio
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from handler import MODELS, Settings
from handler.api import codec
from handler.api.dispatch import Api
from handler.core import stepcache, untrusted
from handler.core.errors import InvalidJson, InvalidValue, KindlingError, VolumeFailed, WeightsCorrupt
from handler.core.request import ImageRequest
from handler.core.untrusted import DEEPEST, MARKED, OURS, Malformed, check, load, parse, shaped
from handler.engine.engine import Engine
from handler.model.compiling import failures
from handler.model.compiling.failures import Failures
from handler.model.hardware import detect
from handler.server.bodies import decode
from handler.volume import receipts
from handler.volume.autoencoder import vae_source
from handler.volume.layout import layout
from handler.volume.listing import INDEX, json_of, weight_files
from handler.volume.manifest import MANIFEST, Source, checked, read_manifest
from handler.worker.decision import applicable

SPARK = MODELS["spark"]
NO_JSON = {
    "nothing": b"",
    "half": b'{"a": ',
    "too deep for the parser": b"[" * 100_000,
    "deep and whole": b'{"a":' * (DEEPEST + 1) + b"1" + b"}" * (DEEPEST + 1),
    "no text": b"\xff\xfe\xfd",
    "half a character": b'{"a": "\\ud800"}',
    "half a character as a name": b'{"\\udfff": 1}',
    "half a character in bytes": b'{"a": "\xed\xa0\x80"}',
    "NaN": b'{"a": NaN}',
    "no end": b'{"a": -Infinity}',
    "larger than a float": b'{"a": 1e999}',
    "larger than a float and whole": b'{"a": 1' + b"0" * 400 + b"}",
    "more digits than Python reads": b'{"a": ' + b"1" * 5000 + b"}",
    "a million values": b"[" + b"1," * (1 << 20) + b"1]",
    "two values": b"{} {}",
}
OTHERS = [b"null", b"3", b'"text"', b"[]", b"{}", b'{"files": 5, "facts": 5}', b'{"facts": [], "reason": 1, "when": 2}']
damaged = pytest.mark.parametrize("text", NO_JSON.values(), ids=NO_JSON)


@pytest.mark.parametrize("text", [b"[" + b"1," * MARKED + b"1]", "[" * (MARKED + 1), json.dumps(["," * MARKED])])
def test_too_many_values_are_refused_unread(text: bytes | str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(Malformed, match="too many values"):
        parse(text)


def test_what_is_our_own_may_have_more() -> None:
    assert parse(b"[" + b"1," * MARKED + b"1]", marks=OURS) == [1] * (MARKED + 1)


@damaged
def test_no_json_is_one_error(text: bytes, tmp_path: Path) -> None:
    with pytest.raises(Malformed):
        parse(text)
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(Malformed):
        load(tmp_path / "a.json")


def test_what_is_sound_passes(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True, "ü", "\U0001f600"], "b": {"c": 10**300}}
    assert parse(json.dumps(value)) == value
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        (tmp_path / "a.json").write_text(text)
        assert load(tmp_path / "a.json") == value
    with pytest.raises(Malformed, match="longer than 9 bytes"):
        load(tmp_path / "a.json", 9)


def test_numbers_and_objects_are_read_as_who_asks_wants_them() -> None:
    text = b'{"a": [7.0, 1e2, 7], "a": 1.5}'
    assert parse(text) == {"a": 1.5}
    assert parse(text, str, list) == [("a", ["7.0", "1e2", 7]), ("a", "1.5")]


def test_a_requests_numbers_are_whole_where_they_have_no_fraction() -> None:
    assert [(each, type(each)) for each in decode(b"[7.0, 1e2, 7, 1.5]")] == [
        (7, int),
        (100, int),
        (7, int),
        (1.5, float),
    ]
    with pytest.raises(InvalidJson, match="a key appears twice"):
        decode(b'{"a": 1, "a": 1}')


def test_a_number_of_too_many_digits_is_told_in_our_words() -> None:
    with pytest.raises(Malformed, match=r"^it has a number that is too large$"):
        parse(b"1" * 5000)


@pytest.mark.parametrize(
    "value", [float("nan"), [float("inf")], {"a": "\ud800"}, {"\ud800": 1}, 10**400, {b"": [("\udc00",)]}]
)
def test_values_that_came_through_another_parser(value: object) -> None:
    with pytest.raises(Malformed):
        check(value)


def test_a_value_within_itself() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(Malformed, match="deeply"):
        check(value)


def test_a_shape_says_what_is_missing_or_wrong() -> None:
    with pytest.raises(Malformed, match="facts"):
        shaped(failures.Record, {"reason": "a", "when": "b"})
    with pytest.raises(Malformed, match=r"facts\.a"):
        shaped(failures.Record, {"reason": "a", "when": "b", "facts": {"a": 1}})


@damaged
def test_a_damaged_request_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidJson):
        decode(text)


PROMPTED = {"prompt": "a red circle"}
JOBS = {
    "half a character": {"prompt": "\ud800"},
    "as a name": PROMPTED | {"\ud800": 1},
    "no number": PROMPTED | {"guidance_scale": float("nan")},
    "too large": PROMPTED | {"seed": 10**5000},
    "deep": PROMPTED | {"step_cache": json.loads('{"a":' * 90 + "1" + "}" * 90)},
    "deep text": PROMPTED | {"step_cache": "Fn=" + "[" * 100_000},
    "deep size": PROMPTED | {"width": json.loads("[" * 90 + "]" * 90)},
}


@pytest.mark.parametrize("payload", JOBS.values(), ids=JOBS)
@pytest.mark.parametrize("route", ["/generate", "/v1/images/generations", "/v1/images/edits"])
def test_a_damaged_job_is_a_400_whatever_carried_it(route: str, payload: dict[str, Any], tmp_path: Path) -> None:
    """RunPod's and Modal's jobs do not pass through our parser."""
    reply = asyncio.run(Api(Engine(Settings(volume=tmp_path))).call(route, payload))
    assert reply.status == 400
    json.dumps(reply.body, ensure_ascii=False).encode()


TEXTS = [
    "",
    "Fn=[[[[",
    "Fn=" + "9" * 5000,
    "R=NaN",
    "R=1e999",
    "Fn=1,Fn=2",
    "Fn=1,",
    "=",
    "Fn",
    "Fn=1=2",
    "Fn=\u0661",
    "\ud800=1",
]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_a_damaged_step_cache_is_refused(text: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        ImageRequest.parse(PROMPTED | {"step_cache": text})
    assert (caught.value.param, caught.value.status) == ("step_cache", 400)


def test_spellings_of_a_step_cache() -> None:
    found = stepcache.parse(" Fn = 2, R=0.5 ,MC=3")
    assert found == stepcache.StepCache(Fn=2, R=0.5, MC=3)
    assert TypeAdapter(stepcache.StepCacheSetting).validate_python(str(found)) == found


def manifest(folder: Path, text: bytes) -> None:
    (folder / MANIFEST).write_bytes(text)
    with pytest.raises(WeightsCorrupt, match=MANIFEST):
        read_manifest(folder)


def index(folder: Path, text: bytes) -> None:
    (folder / INDEX).write_bytes(text)
    with pytest.raises(WeightsCorrupt, match=INDEX):
        json_of(Source(folder, None), INDEX)


def autoencoder(folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    with pytest.raises(WeightsCorrupt, match=r"KINDLING_VAE: .*config\.json"):
        vae_source(str(folder), folder)


def receipt(folder: Path, text: bytes) -> None:
    place = receipts.folder(folder, SPARK.id, "CPU")
    place.mkdir(parents=True)
    (place / "current.json").write_bytes(text)
    with pytest.raises(VolumeFailed, match=r"current\.json"):
        receipts.current(folder, SPARK.id, "CPU")
    (place / "current.json").write_text('{"number": 1}')
    (place / "1.json").write_bytes(text)
    with pytest.raises(VolumeFailed, match=r"1\.json"):
        receipts.current(folder, SPARK.id, "CPU")
    found, told = applicable(folder, SPARK, "CPU")
    assert (found, told[:15]) == (None, "receipt ignored")
    assert receipts.listed(place) == []


def failure(folder: Path, text: bytes) -> None:
    (folder / "baked" / SPARK.id).mkdir(parents=True)
    (folder / "baked" / SPARK.id / "x.failed.json").write_bytes(text)
    known = Failures("auto", SPARK, detect(Settings(device="cpu")), folder)
    assert known._before(known._records()) == ""


def header(folder: Path, text: bytes) -> None:
    with pytest.raises(ValueError, match=r"its header|its tensors"):
        layout(memoryview(data := struct.pack("<Q", len(text)) + text + b"\0"), len(data))


def picture(folder: Path, text: bytes) -> None:
    body = b"iTXt" + codec.KEYWORD + b"\0\0\0\0\0" + text
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    (folder / "a.png").write_bytes(codec.PNG_SIGNATURE + chunk)
    with pytest.raises(InvalidValue, match="carries no Kindling parameters"):
        codec.read_parameters(folder / "a.png")


READERS = (manifest, index, autoencoder, receipt, failure, header, picture)


@damaged
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_a_damaged_file_is_named_or_passed_over(
    reader: Callable[[Path, bytes], None], text: bytes, tmp_path: Path
) -> None:
    reader(tmp_path, text)


@pytest.mark.parametrize("text", OTHERS)
@pytest.mark.parametrize("reader", [manifest, autoencoder, receipt, failure], ids=lambda reader: reader.__name__)
def test_so_is_one_that_holds_something_else(
    reader: Callable[[Path, bytes], None], text: bytes, tmp_path: Path
) -> None:
    reader(tmp_path, text)


OUTSIDE = ("../a", "/etc/passwd", "a/../../b", "a/..", "..", "a\0b", "", "b/", "./b", "b//c", ".")


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_names_files_of_its_own_folder(name: str, tmp_path: Path) -> None:
    """Also where that leads to a file of this size, or to none at all: nobody looks."""
    entry = {"size": 1, "sha256": "", "crc32": [1]}
    (folder := tmp_path / "folder" / "a").mkdir(parents=True)
    for path in (tmp_path / "a", tmp_path / "folder" / "b"):
        path.write_bytes(b"1")
    (folder / MANIFEST).write_text(json.dumps({"facts": {}, "files": {name: entry}}))
    with pytest.raises(WeightsCorrupt, match="is not a manifest"):
        checked(folder)


@pytest.mark.parametrize("crc32", [[], [1, 2]])
def test_a_manifest_has_a_checksum_for_each_chunk(crc32: list[int], tmp_path: Path) -> None:
    """One without any would have its file taken unread."""
    entry = {"size": 1, "sha256": "", "crc32": crc32}
    (tmp_path / MANIFEST).write_text(json.dumps({"facts": {}, "files": {"b": entry}}))
    with pytest.raises(WeightsCorrupt, match="is not a manifest"):
        checked(tmp_path)


@pytest.mark.parametrize("kind", ["a FIFO", "endless"])
def test_what_is_no_file_holds_nobody_up(kind: str, tmp_path: Path) -> None:
    """A FIFO that nobody writes to would be waited for, for ever; a device need not end."""
    path = tmp_path / MANIFEST
    os.mkfifo(path) if kind == "a FIFO" else path.symlink_to("/dev/zero")
    with pytest.raises(Malformed, match="it is no file"):
        load(path)
    with pytest.raises(WeightsCorrupt, match="is not a manifest"):
        checked(tmp_path)


@pytest.mark.parametrize("name", ["../../x", "/etc", "a\0b", "a" * 300 + "-", "", "x\n\x1b[31m"])
def test_an_index_names_components(name: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({name: ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(WeightsCorrupt, match=INDEX) as caught:
        weight_files(Source(tmp_path, None))
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("name", ["a", "a/b", "..a", "a..b/c..", "...", "a b"])
def test_names_of_files_inside_are_taken(name: str) -> None:
    assert TypeAdapter(untrusted.Name).validate_python(name) == name


@pytest.mark.parametrize("shape", [[0, 1 << 63], [-1, 0], [1.0], ["a"], 5, [[1]]])
def test_a_tensor_of_an_impossible_shape(shape: object) -> None:
    text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    with pytest.raises(ValueError, match="its header makes no sense"):
        layout(memoryview(data := struct.pack("<Q", len(text)) + text), len(data))


def test_a_file_that_cannot_be_read_is_not_called_missing(tmp_path: Path) -> None:
    os.symlink("config.json", tmp_path / "config.json")  # to itself
    with pytest.raises(KindlingError) as caught:
        vae_source(str(tmp_path), tmp_path)
    assert isinstance(caught.value, VolumeFailed)


def test_how_many_values_a_text_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    assert untrusted.MOST == 1 << 20
    monkeypatch.setattr(untrusted, "MOST", 6)
    for text in ("[1, 2, 3, 4, 5]", "[[1, 2], [3]]", '{"a": [1, 2], "b": [3]}', "[[[[[1]]]]]"):
        untrusted.parse(text)
    for text in ("[1, 2, 3, 4, 5, 6]", "[[1, 2], [3, 4]]", '{"a": [1, 2], "b": [3, 4]}', "[[[[[1, 2]]]]]"):
        with pytest.raises(Malformed, match="too many values"):
            untrusted.parse(text)
