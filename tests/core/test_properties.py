"""What holds for all that may come: parsers refuse in one way, what is written is read again, sums stay in bounds."""

import base64
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

import examples  # noqa: F401  # how they are tried
from fakes import RECIPE
from handler import Settings
from handler.api.codec import PNG_SIGNATURE, encode, read_parameters
from handler.api.dialects import openai
from handler.api.references import kept, references
from handler.catalog.models import find
from handler.core.errors import (
    MAX_RETRY_S,
    InvalidValue,
    QueueFull,
    RequestError,
    SettingsError,
    WeightsCorrupt,
)
from handler.core.recipe import steps_taken
from handler.core.request import MAX_SIDE, MIN_SIDE, ImageRequest
from handler.core.stepcache import BOUNDS, DECIMALS, StepCache, parse
from handler.core.untrusted import Malformed, check
from handler.core.untrusted import parse as parse_json
from handler.engine.batching import PIXELS, at_once
from handler.engine.executor import Executor
from handler.engine.queue import why_full
from handler.engine.spend import seconds_this_month
from handler.server import multipart
from handler.volume.hub import LONGEST_WAIT_S, _pause
from handler.volume.manifest import CHUNK, MANIFEST, Entry, Manifest, read_manifest, write_manifest
from handler.worker.clock import Ledger

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SECONDS = st.floats(0, 1e6)
CACHES = st.builds(
    StepCache,
    **{name: st.integers(*bounds) for name, bounds in BOUNDS.items() if name != "R"},
    R=st.floats(0, 1).map(lambda share: round(share, DECIMALS)),
)
NUMBERS = st.sampled_from([*BOUNDS, "fn", ""]).flatmap(
    lambda name: st.sampled_from(["=", " = ", ""]).flatmap(
        lambda sign: (st.integers(-2, 99) | st.floats(-1, 2)).map(lambda number: f"{name}{sign}{number}")
    )
)


def tried(call: Callable[..., Any], *args: Any) -> Any:
    """What `call` gives, or how it refuses."""
    try:
        return call(*args)
    except RequestError as error:
        return error


# ---- parsers


@given(st.text() | st.lists(NUMBERS, max_size=4).map(",".join) | JSON)
def test_a_step_cache_is_one_or_is_refused(value: Any) -> None:
    request = tried(ImageRequest.parse, {"prompt": "x", "step_cache": value})
    if isinstance(request, RequestError):
        assert request.param == "step_cache"
        return
    found = request.step_cache
    assert found is None or found in ("off", "on") or isinstance(found, StepCache)
    if isinstance(found, StepCache):
        for name, (low, high) in BOUNDS.items():
            assert low <= getattr(found, name) <= high


@given(CACHES)
def test_a_step_cache_reads_what_it_writes(cache: StepCache) -> None:
    assert parse(str(cache)) == cache
    assert parse(dataclasses.asdict(cache)) == cache


@given(st.text(max_size=20) | st.from_regex(r"[0-9]{1,6}[xX][0-9]{1,6}", fullmatch=True) | JSON)
def test_a_size_is_one_or_is_refused(size: Any) -> None:
    request = tried(openai.parse, {"prompt": "x", "size": size})
    if isinstance(request, RequestError):
        assert request.param == "size"
    elif size not in (None, "auto"):
        assert f"{request.width}x{request.height}" == size.lower().replace("*", "x")
        assert all(side and MIN_SIDE <= side <= MAX_SIDE for side in (request.width, request.height))


@given(st.integers(MIN_SIDE, MAX_SIDE), st.integers(MIN_SIDE, MAX_SIDE))
def test_each_size_within_bounds_is_taken(width: int, height: int) -> None:
    request = openai.parse({"prompt": "x", "size": f"{width}x{height}"})
    assert (request.width, request.height) == (width, height)


FILES = st.binary(max_size=60)
URLS = FILES.flatmap(
    lambda data: st.tuples(
        st.just(data), st.sampled_from(["", "data:image/png;base64,", "data:image/jpeg;base64,", "data:image/;base64,"])
    )
)


@given(URLS)
def test_a_file_comes_as_it_was_sent(sent: tuple[bytes, str]) -> None:
    data, head = sent
    text = head + base64.b64encode(data).decode()
    assert ImageRequest.parse({"prompt": "x", "images": [text]}).images == (data,)


@given(st.text() | st.text("data:image/png;base64,A=", max_size=60) | JSON)
def test_what_is_no_file_is_refused(value: Any) -> None:
    request = tried(ImageRequest.parse, {"prompt": "x", "images": [value], "mask": value})
    if isinstance(request, RequestError):
        assert request.param in ("images", "mask")
    else:
        assert isinstance(request.images[0], bytes)


@given(st.dictionaries(st.sampled_from([*ImageRequest.model_fields, "other"]), JSON))
def test_a_request_is_one_or_names_what_is_wrong(fields: dict[str, Any]) -> None:
    request = tried(ImageRequest.parse, fields)
    if isinstance(request, RequestError):
        assert request.message
        assert request.param in (*ImageRequest.model_fields, "other")
    else:
        assert request.prompt == fields["prompt"]


PARTS = st.lists(
    st.tuples(
        st.sampled_from([b'form-data; name="prompt"', b'form-data; name="image[]"; filename="a"', b"form-data", b""]),
        st.binary(max_size=30),
    ),
    max_size=3,
).map(lambda parts: b"".join(b"--B\r\nContent-Disposition: %s\r\n\r\n%s\r\n" % part for part in parts))


@given(st.binary(max_size=80) | st.tuples(PARTS, st.sampled_from([b"--B--\r\n", b"--B", b""])).map(b"".join))
def test_a_form_is_one_or_is_refused(body: bytes) -> None:
    headers = Headers({"content-type": "multipart/form-data; boundary=B"})
    try:
        fields = multipart.read(headers, body)
    except InvalidValue:
        return
    assert all(isinstance(name, str) for name in fields)


@given(st.sampled_from([*multipart.NUMBERS, "prompt"]), st.text() | JSON.map(json.dumps))
def test_a_forms_text_becomes_a_number_or_stays(name: str, text: str) -> None:
    found = multipart.typed(name, text)
    assert found == text or (name in multipart.NUMBERS and found == parse_json(text.lower()))


@given(st.binary() | st.text() | JSON.map(json.dumps))
def test_json_is_some_or_malformed(text: bytes | str) -> None:
    try:
        found = parse_json(text)
    except Malformed:
        return
    check(found)
    json.dumps(found, allow_nan=False).encode()


@given(JSON)
def test_json_comes_back(value: Any) -> None:
    try:
        check(value)
    except Malformed:
        return
    assert parse_json(json.dumps(value)) == value


NAMES = st.text(min_size=1, max_size=12).filter(
    lambda name: "\0" not in name and not {"", ".", ".."} & {*name.split("/")} and name.isprintable()
)


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    sums = tuple(draw(st.lists(st.integers(0, 2**32 - 1), max_size=3)))
    size = len(sums) * CHUNK - draw(st.integers(0, CHUNK - 1)) if sums else 0
    return Entry(size, draw(st.text("0123456789abcdef", min_size=64, max_size=64)), sums)


@given(
    st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3), st.dictionaries(NAMES, entries(), max_size=3)
)
def test_a_manifest_comes_back(tmp_path: Path, facts: dict[str, str], files: dict[str, Entry]) -> None:
    written = write_manifest(tmp_path, facts, files)
    assert read_manifest(tmp_path) == written == Manifest(facts, files)


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()) | st.tuples(JSON, JSON).map(
    lambda both: json.dumps({"facts": both[0], "files": {"a": both[1]}}).encode()
))  # fmt: skip
def test_what_is_no_manifest_is_corrupt(tmp_path: Path, data: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(data)
    try:
        found = read_manifest(tmp_path)
    except WeightsCorrupt:
        return
    assert isinstance(found, Manifest)


VALUES = (
    st.text(max_size=12).filter(lambda text: "\0" not in text) | st.integers(-1, 99).map(str) | st.floats().map(str)
)
VARIABLES = st.dictionaries(
    st.sampled_from([f"KINDLING_{name.upper()}" for name in (*Settings.model_fields, "other")]), VALUES, max_size=5
)


@given(VARIABLES)
def test_settings_are_some_or_name_the_variable(environ: dict[str, str]) -> None:
    found, faults = Settings.examined(environ)
    assert faults.keys() <= environ.keys()
    good = {name: value for name, value in environ.items() if name not in faults}
    assert Settings.from_env(good) == found
    assert all(why.startswith(name) for name, why in faults.items())
    if faults:
        with pytest.raises(SettingsError) as caught:
            Settings.from_env(environ)
        assert caught.value.param == min(faults)


@given(st.binary(max_size=100) | st.binary(max_size=60).map(lambda data: PNG_SIGNATURE + data))
def test_what_is_no_picture_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(InvalidValue):
        references([data])
    with pytest.raises(InvalidValue):
        kept(data, data)
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InvalidValue):
        read_parameters(tmp_path / "a.png")


@given(st.dictionaries(st.text(), JSON, min_size=1, max_size=4), st.integers(0, 300), st.integers(0, 255))
def test_parameters_come_back_unless_the_file_is_damaged(
    tmp_path: Path, said: dict[str, Any], at: int, byte: int
) -> None:
    try:
        check(said)
    except Malformed:
        return
    data = bytearray(encode(np.zeros((2, 3, 3), np.uint8), "png", 100, said))
    (tmp_path / "a.png").write_bytes(data)
    assert read_parameters(tmp_path / "a.png") == said
    data[at % len(data)] = byte
    (tmp_path / "a.png").write_bytes(data)
    try:
        assert read_parameters(tmp_path / "a.png") == said
    except InvalidValue:
        return


# ---- sums


@given(st.text() | st.integers(0).map(str) | st.just("9" * 5000), st.integers(0, 5))
def test_a_pause_the_hub_asks_for_is_bounded(asked: str, attempt: int) -> None:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    try:
        response = httpx2.Response(503, headers={"Retry-After": asked}, request=httpx2.Request("GET", "http://hub"))
    except UnicodeEncodeError:
        return
    pause = _pause(HfHubHTTPError("busy", response=response), attempt)
    assert pause is not None
    assert 0 <= pause <= max(LONGEST_WAIT_S, 2**attempt)


@given(SECONDS, SECONDS)
def test_retry_after_is_whole_bounded_and_never_too_soon(one: float, other: float) -> None:
    first, second = (QueueFull("full", retry_s=seconds).retry_s for seconds in sorted((one, other)))
    assert 1 <= first <= second <= MAX_RETRY_S
    assert first >= min(one, other, MAX_RETRY_S)
    assert first < min(one, other) + 1 or first == 1


@given(st.integers(0, 9), SECONDS, SECONDS, st.integers(1, 9), SECONDS, st.integers(0, 9), SECONDS)
def test_who_is_refused_is_refused_behind_more(
    waiting: int, wait_s: float, left_s: float, most: int, most_s: float, more: int, longer: float
) -> None:
    if why_full(waiting, wait_s, left_s, most, most_s):
        assert why_full(waiting + more, wait_s + longer, left_s, most, most_s)
        assert why_full(waiting, wait_s, max(0.0, left_s - longer), most, most_s)
    else:
        assert waiting < most
        assert wait_s <= min(left_s, most_s)


def executor() -> Executor:
    return Executor(Settings(), find("spark"), Ledger(240), lambda *_: None, lambda *_: None)


SIZES = st.tuples(st.integers(MIN_SIDE, MAX_SIDE), st.integers(MIN_SIDE, MAX_SIDE))


@given(SIZES, st.integers(1, 50), st.integers(0, 64), st.floats(0.01, 1))
def test_more_pixels_and_steps_are_more_work(size: tuple[int, int], steps: int, more: int, strength: float) -> None:
    work, recipe = executor().work, dataclasses.replace(RECIPE, size=size, steps=steps)
    larger, longer = (
        dataclasses.replace(recipe, size=(size[0] + more, size[1])),
        dataclasses.replace(recipe, steps=steps + more),
    )
    assert 0 < work(recipe) <= min(work(larger), work(longer))
    assert work(dataclasses.replace(recipe, strength=strength)) <= work(recipe)
    assert work(dataclasses.replace(recipe, size=find("spark").size, steps=find("spark").steps)) == 1


@given(st.integers(1, 50), st.floats(0.001, 1), st.floats(0.001, 1))
def test_an_edits_steps_are_a_share_of_all(steps: int, one: float, other: float) -> None:
    fewer, more = (steps_taken(steps, strength) for strength in sorted((one, other)))
    assert 1 <= fewer <= more <= steps == steps_taken(steps, 1)


GAINS = st.dictionaries(
    SIZES.map(lambda size: f"{size[0]}x{size[1]}"),
    st.dictionaries(st.integers(2, 9).map(str), st.floats(0.5, 4), max_size=4),
    max_size=3,
)


@given(st.just("auto") | st.integers(1, 9), GAINS, SIZES)
def test_pictures_at_once_have_room(asked: Any, gains: dict[str, dict[str, float]], size: tuple[int, int]) -> None:
    count = at_once(asked, gains, size)
    assert count >= 1
    assert count == 1 or count * size[0] * size[1] <= PIXELS
    assert asked == "auto" or count <= asked


@given(st.floats(0, 1e8), st.datetimes())
def test_a_workers_seconds_this_month_are_some_of_its_age(age_s: float, now: Any) -> None:
    assert 0 <= seconds_this_month(age_s, now) <= min(age_s, 31 * 86_400)
