"""Pictures by URL: what arrives in a real S3 server, what happens when the store fails, and that no secret is told."""

import asyncio
import base64
import gc
import hashlib
import io
import json
import logging
import os
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import botocore.exceptions
import httpx
import pytest
from botocore.exceptions import ClientError
from openai import OpenAI
from PIL import Image

import forked
from fakes import FakeFamily
from handler import Api, Engine, Picture, Recipe, Settings
from handler.api import store
from handler.api.hands import Hands
from handler.api.store import Store
from handler.cli import doctor
from handler.core.deadline import Deadline
from handler.core.errors import SettingsError
from s3_plane import BUCKET, KEY, S3, SECRET, Broken, s3_server
from serving import ROOT, Served, serving

OPENAI, NATIVE = "/v1/images/generations", "/generate"
WANTED = {"prompt": "a red circle", "seed": 7, "num_inference_steps": 1}
RECIPE = Recipe("spark", "1", "a red circle", (64, 64), 1, 0.0, "flow-match-euler", 7)
DRAWN = Picture(b"drawn", "png", RECIPE)
OUTSIDE = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "none", "AWS_SHARED_CREDENTIALS_FILE": "none"}
HIDDEN = (KEY, SECRET, "X-Amz-", "AWS4-HMAC", "canary", "Canary")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """RunPod's variables, nothing of boto3's own, the log at its most talkative; and no secret in it afterwards."""
    store._client.cache_clear()
    for name, value in {**OUTSIDE, "BUCKET_ACCESS_KEY_ID": KEY, "BUCKET_SECRET_ACCESS_KEY": SECRET}.items():
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.DEBUG)
    yield
    records = [each for each in caplog.get_records("call") if each.name != "httpx"]  # which is the test's own client
    assert_hidden("\n".join(map(logging.Formatter().format, records)))


def assert_hidden(text: str) -> None:
    for secret in HIDDEN:
        assert secret not in text


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with s3_server() as server:
        yield server


def settings(url: str, **more: Any) -> Settings:
    return Settings(**{"store_bucket": BUCKET, "store_endpoint": url, "metadata": False, **more})


async def keeping(found: Store, picture: Picture) -> Picture:
    return await found.keep(picture, Deadline())


def keep(url: str, picture: Picture = DRAWN, **more: Any) -> Picture:
    found = Store.of(settings(url, **more))
    assert found
    return asyncio.run(keeping(found, picture))


def draw(given: Settings, route: str, **more: Any) -> dict[str, Any]:
    """What `Api` answers, with a model that paints one colour."""
    engine = Engine(given, boot=FakeFamily().boot)
    engine.start()
    engine.wait_booted()
    try:
        reply = asyncio.run(Api(engine).call(route, {**WANTED, **more}))
    finally:
        engine.stop()
    assert reply.status == 200, reply.body
    return reply.body


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_what_is_kept_is_the_picture_under_its_own_hash_however_often(s3: S3, form: Any) -> None:
    picture = Picture(f"a {form}".encode(), form, RECIPE, stages={"queue": 0.0})
    first, again = keep(s3.url, picture, store_expires_s=600), keep(s3.url, picture, store_expires_s=600)
    assert (first.undelivered, first.data, set(first.stages)) == ("", picture.data, {"queue", "upload"})
    name = f"kindling/spark/{hashlib.sha256(picture.data).hexdigest()}.{form}"
    assert s3.objects().count(name) == 1
    for kept in (first, again):
        found, query = urlsplit(kept.url), parse_qs(urlsplit(kept.url).query)
        assert found.path == f"/{BUCKET}/{name}"
        assert (query["X-Amz-Expires"], query["X-Amz-Algorithm"]) == (["600"], ["AWS4-HMAC-SHA256"])
        answer = httpx.get(kept.url)
        assert (answer.content, answer.headers["content-type"]) == (picture.data, f"image/{form}")
        assert answer.headers["cache-control"] == "private, max-age=600, immutable"
    assert_hidden(repr(first))


def test_a_prefix_may_be_empty(s3: S3) -> None:
    assert urlsplit(keep(s3.url, store_prefix="").url).path.startswith(f"/{BUCKET}/spark/")


@pytest.mark.parametrize("route", [OPENAI, NATIVE])
def test_every_dialect_answers_with_urls_where_they_are_asked_for(s3: S3, route: str) -> None:
    given = settings(s3.url)
    plain, by_url = draw(given, route, n=2), draw(given, route, n=2, response_format="url")
    group = "data" if route == OPENAI else "images"
    for bare, kept in zip(plain[group], by_url[group], strict=True):
        assert "url" not in bare
        assert "b64_json" not in kept
        assert httpx.get(kept["url"]).content == base64.b64decode(bare["b64_json"])
        assert bare["seed"] == kept["seed"]
        assert route == OPENAI or kept["stages_s"].keys() - bare["stages_s"].keys() == {"upload"}
    assert "delivery" not in by_url


@pytest.mark.parametrize(
    ("endpoint", "bucket", "found"),
    [
        ("", "", None),
        ("https://account.r2.example", "", None),
        ("", "mine", ("mine", "", "")),
        ("https://account.r2.example/", "mine", ("mine", "https://account.r2.example/", "")),
        ("https://s3.eu-west-1.amazonaws.com", "mine", ("mine", "https://s3.eu-west-1.amazonaws.com", "")),
        ("https://my.own.s3.eu-west-1.amazonaws.com", "", ("my.own", "", "eu-west-1")),
        ("https://own.s3-eu-west-1.amazonaws.com/", "", ("own", "", "eu-west-1")),
    ],
)
def test_which_store_settings_and_runpods_variables_name(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, bucket: str, found: tuple[str, ...] | None
) -> None:
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", endpoint)
    made = Store.of(Settings.from_env({"KINDLING_STORE_BUCKET": bucket}))
    assert (made and (made.bucket, made.endpoint, made.region)) == found
    assert_hidden(repr(made))


@pytest.mark.parametrize(
    "endpoint", ["r2.example", "ftp://r2.example", f"https://{KEY}:{SECRET}@r2.example", "https://r2.example/bucket"]
)
def test_a_malformed_endpoint_stops_the_start_and_is_not_repeated(endpoint: str) -> None:
    with pytest.raises(SettingsError, match="KINDLING_STORE_ENDPOINT") as caught:
        Settings.from_env({"KINDLING_STORE_ENDPOINT": endpoint})
    assert_hidden(str(caught.value))
    assert "r2.example" not in str(caught.value)


def test_without_a_store_a_url_is_refused_before_anything_is_drawn() -> None:
    family = FakeFamily()
    engine = Engine(Settings(), boot=family.boot)
    engine.start()
    engine.wait_booted()
    replies = [asyncio.run(Api(engine).call(r, {**WANTED, "response_format": "url"})) for r in (OPENAI, NATIVE)]
    engine.stop()
    for reply in replies:
        assert (reply.status, reply.body["error"]["param"]) == (400, "response_format")
    assert family.drawn == []


def assert_not_lost(url: str, why: str, bucket: str = BUCKET) -> None:
    """Both dialects answer with the same bytes as without a store, and say why."""
    for route, group in ((OPENAI, "data"), (NATIVE, "images")):
        body = draw(settings(url, store_bucket=bucket), route, response_format="url")
        [bare], [picture] = draw(Settings(metadata=False), route)[group], body[group]
        assert picture["b64_json"] == bare["b64_json"]
        assert "url" not in picture
        assert why in body["delivery"]
        assert_hidden(json.dumps(body))


def test_a_missing_bucket(s3: S3) -> None:
    assert_not_lost(s3.url, "there is no such bucket", "nowhere")


def test_wrong_keys_and_right_ones(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    key, secret = s3.member()
    with s3.strict():
        assert_not_lost(s3.url, "it does not know the access key")
        monkeypatch.setenv("BUCKET_ACCESS_KEY_ID", key)
        assert_not_lost(s3.url, "the secret does not fit the access key")
        monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", secret)
        assert keep(s3.url).undelivered == ""
        for name, value in {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}.items():
            monkeypatch.setenv(name, value)
        for name in ("BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        assert keep(s3.url).undelivered == ""


def test_a_store_that_was_made_once_asks_with_the_keys_of_now(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container restored from a snapshot may have new ones; no connection is made before there is a picture."""
    made = Api(Engine(settings(s3.url))).store
    assert made
    assert store._client.cache_info().currsize == 0
    keys = s3.member("renewed")
    with s3.strict():
        assert asyncio.run(keeping(made, DRAWN)).undelivered == "it does not know the access key"
        old = weakref.ref(store._client(made, KEY, SECRET))
        for name, value in zip(("BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY"), keys, strict=True):
            monkeypatch.setenv(name, value)
        assert asyncio.run(keeping(made, DRAWN)).undelivered == ""
    gc.collect()
    assert old() is None, "the client with the old keys stays"


@pytest.mark.parametrize(
    ("unset", "why"),
    [
        (("BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY"), "no credentials were found"),
        (("BUCKET_ACCESS_KEY_ID",), "of the credentials one half is missing"),
    ],
)
def test_missing_credentials(s3: S3, monkeypatch: pytest.MonkeyPatch, unset: tuple[str, ...], why: str) -> None:
    for name in unset:
        monkeypatch.delenv(name)
    assert_not_lost(s3.url, why)


def test_a_store_that_is_down() -> None:
    with Broken(500) as gone:
        pass
    assert_not_lost(gone.url, "it cannot be reached")


@pytest.mark.parametrize(("status", "tries"), [(500, store.TRIES), (503, store.TRIES), (400, 1), (403, 1)])
def test_a_store_that_fails_is_tried_again_where_that_may_help(status: int, tries: int) -> None:
    with Broken(status) as broken:
        assert keep(broken.url).undelivered == f"it answered with status {status}"
        assert broken.tries == tries


def test_a_store_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "READ_S", 0.2)
    with Broken(0) as broken:
        assert keep(broken.url).undelivered == "it does not answer"
        assert broken.tries == store.TRIES


def test_all_tries_together_have_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "DEADLINE_S", 0.5)
    with Broken(0) as broken:
        found = Store.of(settings(broken.url))
        assert found
        found.client()  # which may take longer than that, and then nothing is sent at all
        assert_not_lost(broken.url, "it took longer than")
        assert broken.tries == 2  # one for each answer


def test_uploads_that_are_overdue_keep_no_others_from_the_store(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "READ_S", 60)
    monkeypatch.setattr(store, "_hands", Hands(1, 1, "upload"))
    with Broken(0) as broken:
        with monkeypatch.context() as soon:
            soon.setattr(store, "DEADLINE_S", 0.5)
            assert keep(broken.url).undelivered == store.SLOW
        assert keep(s3.url).undelivered == ""


def test_what_cannot_be_foreseen_loses_no_picture_either(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET_ACCESS_KEY_ID", f"{KEY}\n")  # which the library quotes in what it raises
    assert_not_lost(s3.url, "HTTPClientError")


@pytest.fixture(scope="module")
def served(s3: S3) -> Iterator[Served]:
    """A real server whose log tells all it can."""
    runpods = {"BUCKET_ENDPOINT_URL": s3.url, "BUCKET_ACCESS_KEY_ID": KEY, "BUCKET_SECRET_ACCESS_KEY": SECRET}
    with serving({**OUTSIDE, **runpods, "KINDLING_STORE_BUCKET": BUCKET, "KINDLING_LOG_LEVEL": "debug"}) as server:
        yield server
    assert_hidden("".join(server.lines))


def test_openais_client_downloads_what_it_asked_for(served: Served) -> None:
    ask: dict[str, Any] = {"prompt": "a red circle", "size": "128x64", "response_format": "url"}
    with OpenAI(base_url=f"{served.url}/v1", api_key="unused") as client:
        answer = client.images.generate(**ask, output_format="webp", extra_body={"seed": 7, "num_inference_steps": 1})
        *partials, last = client.images.generate(**ask, stream=True, partial_images=1, extra_body={"seed": 7})
    assert answer.data
    assert answer.data[0].b64_json is None
    assert answer.data[0].url
    got = httpx.get(answer.data[0].url)
    assert got.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(got.content)).size == (128, 64)
    assert [event.type for event in partials] == ["image_generation.partial_image"]
    assert Image.open(io.BytesIO(httpx.get(last.model_extra["url"]).content)).size == (128, 64)
    line = served.wait_for(r'(\{.*"upload".*\})')[1]
    assert json.loads(line)["stages_s"]["upload"] > 0
    assert 'stage_seconds_count{stage="upload"} 2.0' in httpx.get(f"{served.url}/metrics").text


def test_doctor_says_whether_there_is_a_store_and_it_answers(s3: S3, tmp_path: Path) -> None:
    told = {url: doctor.store_state(settings(url, store_bucket=bucket)) for url, bucket in ((s3.url, BUCKET), ("", ""))}
    assert told[s3.url] == {"bucket": BUCKET, "endpoint": s3.url, "reachable": True, "reason": ""}
    assert told[""]["bucket"] is None
    around = {**os.environ, "KINDLING_VOLUME": str(tmp_path), "BUCKET_ENDPOINT_URL": s3.url}
    for bucket, found in ((BUCKET, "reachable"), ("nowhere", "there is no such bucket")):
        command = [sys.executable, "-m", "handler", "doctor"]
        environ = {**around, "KINDLING_STORE_BUCKET": bucket}
        done = forked.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
        assert f"object store: bucket {bucket} at {s3.url}, {found}\n" in done.stdout
        assert_hidden(done.stdout + done.stderr)


def test_doctor_says_that_keys_are_refused(s3: S3) -> None:
    with s3.strict():
        told = doctor.store_state(settings(s3.url))
    assert (told["reachable"], told["reason"]) == (False, store.WHY["403"])


REASONS = {
    "NoSuchBucket": "there is no such bucket",
    "404": "there is no such bucket",
    "InvalidAccessKeyId": "it does not know the access key",
    "SignatureDoesNotMatch": "the secret does not fit the access key",
    "ExpiredToken": "the credentials have expired",
    "AccessDenied": "the credentials may not do this",
    "403": "it refuses the credentials, or they may only write",
    "RequestTimeTooSkewed": "this machine's clock is wrong",
    "SlowDown": "it answered with status 503",
}
ERRORS = {
    "NoCredentialsError": "no credentials were found",
    "PartialCredentialsError": "of the credentials one half is missing",
    "EndpointConnectionError": "it cannot be reached",
    "ConnectTimeoutError": "it cannot be reached",
    "ReadTimeoutError": "it does not answer",
    "ConnectionClosedError": "the connection broke",
    "SSLError": "its certificate is not trusted",
    "ParamValidationError": "ParamValidationError",
}


@pytest.mark.parametrize("code", REASONS)
def test_what_a_store_says_is_told_in_our_words(code: str) -> None:
    error = ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": 503}}, "PutObject")  # type: ignore[typeddict-item]
    assert store.reason(error) == REASONS[code]


@pytest.mark.parametrize("name", ERRORS)
def test_what_its_library_says_is_told_in_our_words(name: str) -> None:
    kind = getattr(botocore.exceptions, name)
    assert store.reason(kind.__new__(kind)) == ERRORS[name]


@pytest.mark.parametrize("response", [{}, {"Error": {}}, {"ResponseMetadata": {}}, None])
def test_an_answer_without_words_is_told_too(response: Any) -> None:
    error = type("OddError", (Exception,), {"response": response})()
    assert store.reason(error) == ("OddError" if response is None else "it answered with status None")
    assert store.reason(type("OddError", (Exception,), {})()) == "OddError"


def test_how_a_store_is_talked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    made = Store("mine", "https://account.r2.example", "", "", 60)
    client, config = store._client(made, KEY, SECRET), store._client(made, KEY, SECRET).meta.config
    assert (client.meta.region_name, client.meta.endpoint_url) == ("us-east-1", "https://account.r2.example")
    assert (config.connect_timeout, config.read_timeout, config.max_pool_connections) == (10, 10, 64)
    assert config.retries == {"total_max_attempts": 3, "mode": "standard"}
    assert (config.signature_version, config.s3) == ("s3v4", {"addressing_style": "path"})
    assert (config.request_checksum_calculation, config.response_checksum_validation) == ("when_required",) * 2
    assert logging.getLogger("botocore").level == logging.WARNING
    assert store._client(made, KEY, SECRET) is client
    aws = store._client(Store("mine", "", "eu-west-1", "", 60), KEY, SECRET)
    assert (aws.meta.region_name, aws.meta.config.s3) == ("eu-west-1", {"addressing_style": "auto"})
    assert aws.meta.endpoint_url.endswith("amazonaws.com")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-north-1")
    assert store._client(Store("mine", "", "", "", 60), KEY, SECRET).meta.region_name == "eu-north-1"


def test_how_long_all_may_take_and_how_many_upload_at_once() -> None:
    assert (store.SLOW, store.DEADLINE_S) == ("it took longer than 30 s", 30.0)
    assert (store._hands._most, store._hands._spare) == (8, 56)


def test_nothing_is_left_of_an_upload(s3: S3) -> None:
    async def main() -> set[Any]:
        found = Store.of(settings(s3.url))
        assert found
        kept = await found.keep(DRAWN, Deadline())
        assert 0 < kept.stages["upload"] < 60
        await asyncio.sleep(0)  # for what was cancelled
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(main()) == set()


def test_whether_a_bucket_can_be_reached_is_told(s3: S3) -> None:
    found, gone = (Store.of(settings(s3.url, store_bucket=name)) for name in (BUCKET, "none"))
    assert found
    assert gone
    assert (found.unreachable(), gone.unreachable()) == ("", "there is no such bucket")


@pytest.mark.parametrize(("bucket", "told"), [(BUCKET, []), ("none", ["there is no such bucket"])])
def test_a_picture_that_is_not_taken_is_a_line(
    s3: S3, bucket: str, told: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert keep(s3.url, store_bucket=bucket).undelivered == "".join(told)
    line = "the object store did not take a picture: "
    assert [each.getMessage() for each in caplog.records if each.name == "handler.api.store"] == [
        line + why for why in told
    ]
