"""Jobs: requests to draw that outlive whoever sent them, on real servers; and the webhooks that tell of their end."""

import base64
import contextlib
import hashlib
import hmac
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hosts import Host, answer, hosting
from PIL import Image

from fakes import FakeFamily, raises
from handler import Engine, Settings, create_app
from handler.api.jobs import service, webhooks
from handler.api.jobs.webhooks import Webhooks
from handler.core.errors import NotReady, NumericalError, SettingsError
from handler.engine.intake import STOPPING
from handler.server import idempotency
from serving import live, serving
from threads import until

ROUTE, EDITS, NATIVE = "/v1/images/generations", "/v1/images/edits", "/generate"
ASKED: dict[str, Any] = {"prompt": "a circle", "size": "64x64", "seed": 7}
LATER = {"prefer": "respond-async"}
SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
Worker = tuple[str, Any]


@contextlib.contextmanager
def worker(volume: Path, family: FakeFamily | None = None, **settings: Any) -> Iterator[Worker]:
    """A worker's address, and its app; its pictures cost nothing."""
    with (family or FakeFamily()).engine(**{"volume": volume, **settings}) as engine:
        app = create_app(engine, public=False)
        with live(app) as url:
            yield url, app


@pytest.fixture
def held() -> Iterator[FakeFamily]:
    """A model that draws when its gate is opened."""
    family = FakeFamily(gate=threading.Event())
    yield family
    assert family.gate
    family.gate.set()


def post(url: str, path: str = ROUTE, headers: Any = LATER, **fields: Any) -> dict[str, Any]:
    """A job that was accepted."""
    asked = {name: value for name, value in ASKED.items() if path != NATIVE or name != "size"}
    answer = httpx.post(url + path, json=asked | fields, headers=headers, timeout=60)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert answer.headers["location"] == job["urls"]["get"]
    assert answer.headers["preference-applied"] == "respond-async"
    assert (job["status"], job["result"]) == ("queued", None)
    return dict(job)


def look(place: str) -> dict[str, Any]:
    found = httpx.get(place, timeout=60)
    assert found.status_code == 200, found.text
    return dict(found.json())


def ended(place: str, **more: Any) -> dict[str, Any]:
    """A job, once it has ended: its events end then, wherever they are asked for."""
    httpx.get(f"{place}/events", timeout=60)
    return look(place)


@pytest.mark.parametrize("way", ["header", "field", "text"])
@pytest.mark.parametrize("path", [ROUTE, NATIVE])
def test_a_job_ends_with_the_answer_that_would_have_been_waited_for(tmp_path: Path, path: str, way: str) -> None:
    with worker(tmp_path) as (url, _):
        size = {} if path == ROUTE else {"width": 64, "height": 64}
        fields: dict[str, Any] = {"header": {}, "field": {"async": True}, "text": {"async": "true"}}[way]
        job = post(url, path, LATER if way == "header" else {}, **fields, **size)
        assert job["urls"]["get"] == f"{url}/v1/jobs/{job['id']}"
        found = ended(job["urls"]["get"])
        asked = {name: value for name, value in ASKED.items() if name != "size"} | {"width": 64, "height": 64}
        now = httpx.post(url + path, json=asked | {"async": False}, headers={"prefer": "wait=5"}).json()
        assert (found["status"], found["error"], found["route"]) == ("succeeded", None, path)
        group = "data" if path == ROUTE else "images"
        assert [each["b64_json"] for each in found["result"][group]] == [each["b64_json"] for each in now[group]]
        assert found["result"].keys() == now.keys()
        assert found["progress"] == {"steps": 4, "of": 4}
        assert found["created_at"] <= found["started_at"] <= found["ended_at"]


def test_a_job_is_followed_from_the_queue_to_its_end(tmp_path: Path) -> None:
    reached, go = threading.Semaphore(0), threading.Semaphore(0)

    def pause() -> None:
        reached.release()
        assert go.acquire(timeout=30)

    with worker(tmp_path, FakeFamily(at_step={3: pause})) as (url, app):
        first, second = [post(url, seed=seed)["urls"]["get"] for seed in (1, 2)]
        assert reached.acquire(timeout=30)
        assert look(first)["status"] == "running"
        assert look(first)["progress"] == {"steps": 2, "of": 4}
        assert (look(second)["status"], look(second)["started_at"]) == ("queued", None)
        assert look(second)["progress"] == {"steps": 0, "of": None}
        go.release()
        assert ended(first)["status"] == "succeeded"
        go.release()
        assert ended(second)["result"]["data"][0]["seed"] == 2
        assert not app.busy()


def test_its_events_are_those_of_a_stream(tmp_path: Path, held: FakeFamily) -> None:
    """Also for who comes late: the last partial picture, and the end; after the end, that."""
    with worker(tmp_path, held) as (url, app):
        asked = {"partial_images": 2, "stream": True}
        job = post(url, **asked)
        place = job["urls"]["get"]
        assert held.entered.wait(30)
        heard: list[str] = []
        listening = threading.Thread(target=lambda: heard.append(httpx.get(f"{place}/events", timeout=60).text))
        listening.start()
        [own] = app.later.active.values()
        until(lambda: bool(own.ears))
        assert held.gate
        held.gate.set()
        listening.join()
        streamed = httpx.post(url + ROUTE, json=ASKED | asked, timeout=60).text
        late = httpx.get(f"{place}/events", timeout=60)
    kinds = [[line for line in text.splitlines() if line.startswith("event:")] for text in (heard[0], streamed)]
    assert kinds[0] == kinds[1] == ["event: image_generation.partial_image"] * 2 + ["event: image_generation.completed"]
    assert late.headers["content-type"].startswith("text/event-stream")
    picture = json.loads(late.text.split("data: ", 1)[1])["b64_json"]
    assert picture == json.loads(streamed.split("data: ")[-1])["b64_json"]


@pytest.mark.parametrize("fault", [NumericalError("NaN."), ZeroDivisionError("a detail")])
def test_a_job_fails_with_the_error_that_would_have_been_answered(tmp_path: Path, fault: Exception) -> None:
    with worker(tmp_path, FakeFamily(at_step={1: raises(fault)})) as (url, _):
        found = ended(post(url)["urls"]["get"])
        now = httpx.post(url + ROUTE, json=ASKED, timeout=60).json()
        assert (found["status"], found["error"], found["result"]) == ("failed", now["error"], None)
        assert json.loads(httpx.get(found["urls"]["events"]).text.split("data: ")[1]) == now


def test_a_job_has_its_deadline(tmp_path: Path, held: FakeFamily) -> None:
    with worker(tmp_path, held, deadline_s=1) as (url, _):
        found = ended(post(url)["urls"]["get"])
        assert (found["status"], found["error"]["code"]) == ("failed", "deadline_exceeded")
    family = FakeFamily(gate=threading.Event())
    with worker(tmp_path, family) as (url, _):
        found = ended(post(url, headers=LATER | {"x-deadline-s": "1"})["urls"]["get"])
        assert found["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"prompt": 7}, 400, "prompt"),
        ({"colour": "red"}, 400, "colour"),
        ({"num_inference_steps": 9}, 422, "num_inference_steps"),
        ({"model": "nope"}, 404, "model"),
        ({"async": 1}, 400, "async"),
        ({"async": []}, 400, "async"),
        ({"async": "later"}, 400, "async"),
        ({"webhook": "https://a.example"}, 400, "webhook"),
        ({"webhook": 7}, 400, "webhook"),
    ],
)
def test_what_is_wrong_is_refused_at_once(tmp_path: Path, fields: dict[str, Any], status: int, param: str) -> None:
    with worker(tmp_path) as (url, app):
        answer = httpx.post(url + ROUTE, json=ASKED | fields, headers=LATER)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
        assert not app.later.active


def test_who_awaits_the_answer_gives_no_webhook(tmp_path: Path) -> None:
    with worker(tmp_path, webhook_hosts=("a.example",), webhook_secret=SECRET) as (url, _):
        answer = httpx.post(url + ROUTE, json=ASKED | {"webhook": "https://a.example/"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "webhook")
        assert "async" in answer.json()["error"]["message"]


def test_a_job_is_cancelled_in_the_queue_and_while_it_is_drawn(tmp_path: Path, held: FakeFamily) -> None:
    with worker(tmp_path, held) as (url, app):
        first, second = [post(url, seed=seed)["urls"] for seed in (1, 2)]
        assert held.entered.wait(30)
        assert held.gate
        for urls in (second, first):
            for _ in range(2):  # twice is as once
                found = httpx.post(urls["cancel"], timeout=60).json()
                assert (found["status"], found["error"]["code"]) == ("cancelled", "cancelled")
        assert not app.later.active
        held.gate.set()
        third = ended(post(url, seed=3)["urls"]["get"])
        assert third["status"] == "succeeded"
        assert httpx.post(third["urls"]["cancel"]).json() == third
        assert held.drawn == [3]
        assert "cancelled" in httpx.get(first["events"]).text


def test_of_what_is_cancelled_as_it_ends_there_is_one_end(tmp_path: Path) -> None:
    with worker(tmp_path) as (url, _):
        for seed in range(8):
            urls = post(url, seed=seed)["urls"]
            found = httpx.post(urls["cancel"], timeout=60).json()
            assert found["status"] in ("cancelled", "succeeded")
            assert ended(urls["get"]) == found


def test_ids_that_were_guessed_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "secret").write_text("{}")
    with worker(tmp_path) as (url, _):
        job_id = ended(post(url)["urls"]["get"])["id"]
        for guess in (job_id[:-1], job_id + "0", job_id.upper(), "job_" + "0" * 32, "..", "..%2fsecret", "%00", "é"):
            for place, method in (("", "GET"), ("/cancel", "POST"), ("/events", "GET")):
                answer = httpx.request(method, f"{url}/v1/jobs/{guess}{place}")
                assert answer.status_code == 404, (guess, place)
                assert answer.json()["error"]["code"] in ("file_not_found", "not_found")


def test_a_key_is_asked_for(tmp_path: Path) -> None:
    key = {"authorization": "Bearer one"}
    with worker(tmp_path, api_keys=("one",)) as (url, _):
        assert httpx.post(url + ROUTE, json=ASKED, headers=LATER).status_code == 401
        urls = post(url, headers=LATER | key)["urls"]
        assert [httpx.get(urls[name]).status_code for name in ("get", "events")] == [401, 401]
        assert httpx.post(urls["cancel"]).status_code == 401
        assert httpx.get(urls["get"], headers=key).status_code == 200


def test_another_worker_and_a_later_one_know_a_job(
    tmp_path: Path, held: FakeFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How far it is, its events, its answer; and one that is cancelled there stops here."""
    monkeypatch.setattr(service, "WATCH_S", 0.05)
    with worker(tmp_path, held) as (one, _), worker(tmp_path) as (two, _):
        first, second = [post(one, seed=seed)["urls"]["get"] for seed in (1, 2)]
        there, other = [place.replace(one, two) for place in (first, second)]
        assert look(there)["status"] in ("queued", "running")
        assert held.entered.wait(30)
        found = httpx.post(f"{other}/cancel").json()
        assert found["status"] == "queued"
        assert ended(other)["status"] == "cancelled"
        assert held.gate
        held.gate.set()
        assert ended(there)["result"] == ended(first)["result"]
        assert ended(there)["urls"]["get"] == there
        assert "image_generation.completed" in httpx.get(f"{there}/events").text
    with worker(tmp_path) as (three, _):
        assert look(first.replace(one, three))["status"] == "succeeded"


def test_a_job_whose_worker_died_says_so_after_its_deadline(
    tmp_path: Path, held: FakeFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    with worker(tmp_path, held) as (one, _):
        place = post(one)["urls"]["get"]
        kept = next((tmp_path / "kept" / "jobs").iterdir()).read_bytes()
        httpx.post(f"{place}/cancel")
    job_id, file = place.rpartition("/")[2], next((tmp_path / "kept" / "jobs").iterdir())
    file.write_bytes(kept)  # as a worker leaves it that ends at once
    with worker(tmp_path) as (two, _):
        there = f"{two}/v1/jobs/{job_id}"
        assert look(there)["status"] in ("queued", "running")
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 600 + 20)
        found = look(there)
        assert (found["status"], found["error"]["code"]) == ("failed", "deadline_exceeded")
        assert "gone" in found["error"]["message"]
        assert "gone" in httpx.get(f"{there}/events").text
        monkeypatch.setattr(time, "time", lambda: now + 600 + 20 + 3600)
        assert httpx.get(there).status_code == 404


@pytest.mark.parametrize("junk", [b"", b"{", b"[]\n", b'{"id": 1, "status": "succeeded"}\n', b"\xff\n", b"null\n"])
def test_a_damaged_record_is_none(tmp_path: Path, junk: bytes) -> None:
    with worker(tmp_path) as (one, _):
        job_id = ended(post(one)["urls"]["get"])["id"]
    next((tmp_path / "kept" / "jobs").iterdir()).write_bytes(junk)
    with worker(tmp_path) as (two, _):
        assert httpx.get(f"{two}/v1/jobs/{job_id}").status_code == 404


@pytest.mark.parametrize(
    "change",
    [
        {"status": "running", "until": "soon"},
        {"status": "running", "until": None},
        {"ended_at": None},
        {"route": "/nope"},
        {"progress": 7},
        {"error": "no"},
        {"result": b""},
        {"result": b"{cut o"},
    ],
    ids=str,
)
def test_a_record_that_was_edited_by_hand_is_none(tmp_path: Path, change: dict[str, Any]) -> None:
    with worker(tmp_path) as (one, _):
        job_id = ended(post(one)["urls"]["get"])["id"]
    file = next((tmp_path / "kept" / "jobs").iterdir())
    head, _, result = file.read_bytes().partition(b"\n")
    result = change.get("result", result)
    file.write_bytes(json.dumps({**json.loads(head), **change, "result": 0}).encode() + b"\n" + result)
    with worker(tmp_path) as (two, _):
        for place in ("", "/events"):
            assert httpx.get(f"{two}/v1/jobs/{job_id}{place}").status_code == 404


def test_an_answer_that_cannot_be_read_ends_its_events_with_an_error(tmp_path: Path) -> None:
    with worker(tmp_path) as (one, _):
        job_id = ended(post(one)["urls"]["get"])["id"]
    file = next((tmp_path / "kept" / "jobs").iterdir())
    file.write_bytes(file.read_bytes().partition(b"\n")[0] + b"\n{what}")
    with worker(tmp_path) as (two, _):
        assert "internal_error" in httpx.get(f"{two}/v1/jobs/{job_id}/events").text.splitlines()[-2]


@pytest.mark.parametrize("place", ["/v1/jobs/{}", "/v1/jobs/{}/events", "/v1/images/7fffffff{:0>43}/content"])
def test_where_the_volume_fails_nothing_is_said_to_be_gone(tmp_path: Path, place: str) -> None:
    """Who polls would give up; what it asks for may be there in a moment."""
    (tmp_path / "kept").mkdir()
    for folder in ("jobs", "pictures"):
        (tmp_path / "kept" / folder).mkdir()
        name = "job_" + "0" * 32 if folder == "jobs" else hashlib.sha256(b"7fffffff" + b"0" * 43).hexdigest()
        (tmp_path / "kept" / folder / name).symlink_to("elsewhere")  # not followed: the system says that it fails
    with worker(tmp_path) as (url, _):
        answer = httpx.get(url + place.format("job_" + "0" * 32 if "jobs" in place else "0"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    assert answer.headers["retry-after"]


def test_a_job_that_comes_again_under_its_key_is_the_same(tmp_path: Path) -> None:
    with worker(tmp_path) as (url, _):
        key = {"idempotency-key": "one"}
        first, again = [httpx.post(url + ROUTE, json=ASKED, headers=LATER | key) for _ in range(2)]
        assert first.json()["id"] == again.json()["id"]
        assert again.headers["idempotent-replayed"] == "true"
        assert again.headers["location"] == first.headers["location"]
        assert httpx.post(url + ROUTE, json=ASKED, headers=key).status_code == 422, "awaited, it is another request"
        assert httpx.post(url + ROUTE, json=ASKED | {"n": 2}, headers=LATER | key).status_code == 422


def test_a_job_that_comes_again_is_shown_as_it_is_by_then(tmp_path: Path) -> None:
    with worker(tmp_path) as (url, _):
        headers = LATER | {"idempotency-key": "one"}
        first = post(url, headers=headers)
        ended(first["urls"]["get"])
        again = httpx.post(url + ROUTE, json=ASKED, headers=headers).json()
        assert (again["id"], again["status"], again["result"]) == (first["id"], "succeeded", None)


def test_a_job_that_failed_or_was_cancelled_may_be_asked_for_again(tmp_path: Path, held: FakeFamily) -> None:
    with worker(tmp_path, held) as (url, _):
        headers = LATER | {"idempotency-key": "one"}
        first = post(url, headers=headers)
        assert httpx.post(first["urls"]["cancel"], timeout=60).json()["status"] == "cancelled"
        assert held.gate
        held.gate.set()
        second = httpx.post(url + ROUTE, json=ASKED, headers=headers)
        assert second.json()["id"] != first["id"]
        assert "idempotent-replayed" not in second.headers
        assert ended(second.json()["urls"]["get"])["status"] == "succeeded"


def test_a_job_of_which_nothing_can_be_known_now_is_not_begun_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with worker(tmp_path) as (url, app):
        headers = LATER | {"idempotency-key": "one"}
        first = post(url, headers=headers)
        ended(first["urls"]["get"])

        async def unknown(job_id: str) -> Any:
            raise NotReady("The place of jobs does not answer; try again.")

        monkeypatch.setattr(app.later, "found", unknown)
        assert httpx.post(url + ROUTE, json=ASKED, headers=headers).status_code == 503
        monkeypatch.undo()
        assert httpx.post(url + ROUTE, json=ASKED, headers=headers).json()["id"] == first["id"]


def test_a_job_is_found_under_its_key_for_as_long_as_it_is_kept(
    tmp_path: Path, held: FakeFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it takes, and whatever else is answered meanwhile."""
    monkeypatch.setattr(idempotency, "KEPT_S", 0.0)
    monkeypatch.setattr(idempotency, "KEPT", 0)
    with worker(tmp_path, held) as (url, _):

        def job(key: str) -> str:
            answer = httpx.post(url + ROUTE, json=ASKED, headers=LATER | {"idempotency-key": key}, timeout=60)
            return str(answer.json()["id"])

        assert (first := job("one")) == job("one")
        monkeypatch.setattr(idempotency, "KEPT_JOBS", 1)
        assert (other := job("two")) == job("two")
        assert job("one") not in (first, other)


def test_a_form_with_another_webhook_is_another_request(tmp_path: Path, host: Host, held: FakeFamily) -> None:
    Image.new("RGB", (64, 64)).save(file := io.BytesIO(), "PNG")
    key = {"idempotency-key": "one"}
    with worker(tmp_path, held, **hooked(host)) as (url, _):
        post(url)
        assert held.entered.wait(30)  # so that what comes next waits
        fields = {"prompt": "x", "strength": "0.5", "async": "True"}  # as some clients spell it
        answers = [
            httpx.post(
                f"{url}/v1/images/edits",
                data=fields | {"webhook": f"{host.url}/{path}"},
                files={"image": ("a.png", file.getvalue())},
                headers=key,
            )
            for path in "aab"
        ]
    assert [answer.status_code for answer in answers] == [202, 202, 422]
    assert answers[0].json()["id"] == answers[1].json()["id"]


def test_the_images_of_a_job_hold_their_room_until_it_has_ended(tmp_path: Path, held: FakeFamily) -> None:
    Image.new("RGB", (64, 64)).save(file := io.BytesIO(), "PNG")
    sent = base64.b64encode(file.getvalue() + bytes(200_000)).decode()
    with worker(tmp_path, held) as (url, app):
        job = post(url, images=[sent], strength=0.5)
        assert app._room._all > 200_000
        assert held.gate
        held.gate.set()
        ended(job["urls"]["get"])
        until(lambda: not app._room._all)


def test_no_more_wait_than_may(tmp_path: Path, held: FakeFamily) -> None:
    with worker(tmp_path, held, queue=2) as (url, app):
        post(url)
        assert held.entered.wait(30)
        until(lambda: {job.state for job in app.later.active.values()} == {"running"})
        for _ in range(2):  # a job is one, however many pictures it asks for
            post(url, n=2)
        answer = httpx.post(url + ROUTE, json=ASKED, headers=LATER)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert answer.json()["error"]["message"] == "2 requests are waiting already; try again later."
        assert answer.headers["retry-after"]
        status = look(f"{url}/v1/status")
        assert (status["drawing"], status["waiting"], status["queue"]) == (1, 2, 2)


def test_a_job_that_was_accepted_is_drawn_though_the_worker_is_told_to_stop(tmp_path: Path, held: FakeFamily) -> None:
    with worker(tmp_path, held) as (url, app):
        first, second = [post(url, seed=seed)["urls"]["get"] for seed in (1, 2)]
        assert held.entered.wait(30)
        app.api.engine.drain()
        assert app.busy()
        assert httpx.post(url + ROUTE, json=ASKED, headers=LATER).status_code == 503
        assert held.gate
        held.gate.set()
        assert [ended(each)["status"] for each in (first, second)] == ["succeeded"] * 2
        assert not app.busy()


def test_a_real_server_that_is_told_to_stop_ends_its_jobs_first(tmp_path: Path) -> None:
    """With SIGTERM right after the answer; who asks a later worker finds the picture."""
    with serving({"KINDLING_VOLUME": str(tmp_path)}) as served:
        place = post(served.url, size="128x128")["urls"]["get"]
        served.process.terminate()
        assert served.process.wait(60) == 0
    with worker(tmp_path) as (url, _):
        found = look(f"{url}/v1/jobs/{place.rpartition('/')[2]}")
    assert (found["status"], found["result"]["data"][0]["seed"]) == ("succeeded", 7)


def test_the_end_of_a_job_is_counted_and_logged_as_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "kindling.requests")
    with worker(tmp_path) as (url, _):
        answer = httpx.post(url + ROUTE, json=ASKED, headers=LATER | {"x-request-id": "mine"})
        ended(answer.json()["urls"]["get"])
        told = httpx.get(f"{url}/metrics").text
    lines = [json.loads(record.message) for record in caplog.records if record.name == "kindling.requests"]
    found = {(line["route"], line["status"]) for line in lines if line["request_id"] == "mine"}
    assert found == {(ROUTE, 202), (f"{ROUTE} (job)", 200)}
    [last] = [line for line in lines if line["route"].endswith("(job)")]
    assert (last["n"], last["seed"], last["prompt_length"]) == (1, 7, 8)
    assert f'kindling_requests_total{{reason="",route="{ROUTE} (job)",status="200"}} 1.0' in told
    assert "a circle" not in caplog.text


def test_a_picture_of_a_job_may_have_a_url(tmp_path: Path) -> None:
    with worker(tmp_path) as (url, _):
        found = ended(post(url, response_format="url")["urls"]["get"])
        assert httpx.get(found["result"]["data"][0]["url"]).headers["content-type"] == "image/png"


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(webhooks, "WAITS_S", (0.01, 0.01, 0.01))
    with hosting() as found:
        found.answers["/told"] = answer(status="204 No Content")
        yield found


def hooked(host: Host) -> dict[str, Any]:
    return {"webhook_hosts": (host.name,), "webhook_secret": SECRET}


def verified(asked: Any) -> dict[str, Any]:
    """What a webhook says, if its signature is right: as a receiver checks it."""
    head = asked.headers
    signed = f"{head['webhook-id']}.{head['webhook-timestamp']}.".encode() + asked.body
    digest = hmac.digest(bytes(range(32)), signed, hashlib.sha256)
    assert head["webhook-signature"] == f"v1,{base64.b64encode(digest).decode()}"
    assert abs(int(head["webhook-timestamp"]) - time.time()) < 60
    assert head["content-type"] == "application/json"
    return dict(json.loads(asked.body))


def test_a_webhook_is_told_of_the_end_and_signed(tmp_path: Path, host: Host) -> None:
    with worker(tmp_path, **hooked(host)) as (url, app):
        job = post(url, webhook=f"{host.url}/told?canary", response_format="url")
        asked = host.came.get(timeout=30)
        said = verified(asked)
        assert (asked.method, asked.where) == ("POST", "/told?canary")
        assert asked.headers["webhook-id"] == f"msg_{job['id']}"
        assert said["type"] == "job.succeeded"
        assert said["data"] == look(job["urls"]["get"])
        until(lambda: not app.busy())
    assert len(host.asked) == 1


@pytest.mark.parametrize("fault", [True, False])
def test_a_webhook_is_told_of_failures_and_of_what_was_cancelled(tmp_path: Path, host: Host, fault: bool) -> None:
    family = FakeFamily(at_step={1: raises(NumericalError("NaN."))}) if fault else FakeFamily(gate=threading.Event())
    with worker(tmp_path, family, **hooked(host)) as (url, _):
        job = post(url, webhook=f"{host.url}/told")
        if not fault:
            httpx.post(job["urls"]["cancel"])
        said = verified(host.came.get(timeout=30))
        assert said["type"] == ("job.failed" if fault else "job.cancelled")
        assert said["data"]["error"]["code"] == ("numerical_error" if fault else "cancelled")


def test_who_waits_for_a_job_is_told_when_the_app_ends_before_it(tmp_path: Path, host: Host, held: FakeFamily) -> None:
    """And nothing is left on the event loop, which closes then."""
    with worker(tmp_path, held, **hooked(host)) as (url, app):
        job = post(url, webhook=f"{host.url}/told")
        assert held.entered.wait(30)
    said = verified(host.came.get(timeout=30))
    assert (said["type"], said["data"]["id"]) == ("job.failed", job["id"])
    assert (said["data"]["error"]["code"], said["data"]["error"]["message"]) == ("not_ready", STOPPING)
    assert not app.busy()


def test_an_app_that_ends_says_which_receiver_was_not_told(
    tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was to be tried again in an hour."""
    monkeypatch.setattr(webhooks, "WAITS_S", (3600.0,))
    host.answers["/told"] = answer(status="500 Oh")
    with worker(tmp_path, **hooked(host)) as (url, app):
        post(url, webhook=f"{host.url}/told")
        host.came.get(timeout=30)
    assert f"{host.name} was not there before this worker ended" in caplog.text
    assert not app.busy()


def test_an_app_that_ends_waits_for_no_receiver_that_says_nothing(
    tmp_path: Path, held: FakeFamily, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service, "ENDS_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        name = f"127.0.0.1:{deaf.getsockname()[1]}"
        with worker(tmp_path, held, webhook_hosts=(name,), webhook_secret=SECRET) as (url, app):
            post(url, webhook=f"http://{name}/")
            assert held.entered.wait(30)
    assert f"{name} was not there before this worker ended" in caplog.text
    assert not app.busy()


def test_an_app_that_owns_its_engine_draws_at_its_end_what_it_accepted(tmp_path: Path, held: FakeFamily) -> None:
    engine = Engine(Settings(volume=tmp_path), boot=held.boot)

    def let_go() -> None:
        until(lambda: engine.state == "draining")
        assert held.gate
        held.gate.set()

    with live(create_app(engine, public=False)) as url:
        engine.wait_booted()
        jobs = [post(url) for _ in range(2)]
        assert held.entered.wait(30)
        threading.Thread(target=let_go).start()
    assert engine.state == "stopped"
    with worker(tmp_path) as (url, _):
        assert {look(f"{url}/v1/jobs/{job['id']}")["status"] for job in jobs} == {"succeeded"}


def test_a_large_answer_is_not_told_but_asked_for(tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "TOLD", 100)
    with worker(tmp_path, **hooked(host)) as (url, _):
        post(url, webhook=f"{host.url}/told")
        said = verified(host.came.get(timeout=30))
        assert said["data"]["result"] is None
        assert look(said["data"]["urls"]["get"])["result"]["data"]


def test_a_receiver_that_is_down_and_then_up_is_told_in_the_end(tmp_path: Path, host: Host) -> None:
    host.answers["/told"] = [b"", answer(status="500 Oh"), answer(status="302 Found", location="/other"), answer()]
    with worker(tmp_path, **hooked(host)) as (url, app):
        post(url, webhook=f"{host.url}/told")
        tries = [host.came.get(timeout=30) for _ in range(4)]
        until(lambda: not app.busy())
    assert len({each.headers["webhook-id"] for each in tries}) == 1
    assert {each.where for each in host.asked} == {"/told"}, "no redirect is followed"
    assert all(verified(each) for each in tries)


@pytest.mark.parametrize(("said", "tries"), [("500 Oh", 4), ("410 Gone", 1)])
def test_a_receiver_that_stays_down_is_given_up(
    tmp_path: Path, host: Host, caplog: pytest.LogCaptureFixture, said: str, tries: int
) -> None:
    host.answers["/told"] = answer(status=said)
    with worker(tmp_path, **hooked(host)) as (url, app):
        post(url, webhook=f"{host.url}/told?canary")
        until(lambda: "a webhook was not taken" in caplog.text)
        assert not app.busy()
    assert len(host.asked) == tries
    assert "canary" not in caplog.text


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("https://other.example/", "does not list other.example"),
        ("http://hooks.example/", "should be an https URL"),
        ("https://hooks.example:8443/", "does not list hooks.example:8443"),
        ("https://hooks.example@evil.example/", "no http or https URL"),
        ("ftp://hooks.example/", "no http or https URL"),
        ("x", "no http or https URL"),
    ],
)
def test_only_listed_hosts_are_told_and_over_https(tmp_path: Path, url: str, told: str) -> None:
    settings = {"webhook_hosts": ("hooks.example",), "webhook_secret": SECRET}
    with worker(tmp_path, **settings) as (place, app):
        answer = httpx.post(place + ROUTE, json=ASKED | {"webhook": url}, headers=LATER)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "webhook")
        assert told in answer.json()["error"]["message"]
        assert not app.later.active


def test_a_webhook_at_an_address_inside_is_not_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, host: Host
) -> None:
    settings = {"webhook_hosts": ("hooks.example",), "webhook_secret": SECRET}
    with worker(tmp_path, **settings) as (place, app):
        app.later.webhooks._outgoing._resolve = lambda *_: ["10.0.0.1"]
        post(place, webhook="https://hooks.example/?canary")
        until(lambda: "a webhook was not taken" in caplog.text)
    assert "hooks.example is at an address that is not public" in caplog.text
    assert "canary" not in caplog.text


def test_a_secret_is_needed_and_never_shown(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="KINDLING_WEBHOOK_SECRET"):
        Webhooks(Settings(webhook_hosts=("a.example",)))
    for wrong in ("whsec_", "whsec_c2hvcnQ=", SECRET.removeprefix("whsec_"), SECRET + "!"):
        with pytest.raises(SettingsError, match="KINDLING_WEBHOOK_SECRET") as caught:
            Settings.from_env({"KINDLING_WEBHOOK_SECRET": wrong})
        assert wrong[6:] not in caught.value.message or wrong == "whsec_"
    assert SECRET not in repr(Settings(webhook_secret=SECRET))


def test_a_job_that_has_ended_has_its_answer_before_that_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow volume: who asks until it says "succeeded" needs to ask no more, and who cancels it then is told so."""
    keeping, go = threading.Event(), threading.Event()
    put: Callable[..., bool] = service.Keeper._put

    def hang(self: Any, name: str, data: bytes, wanted: Any) -> bool:
        if b'"succeeded"' in data:
            keeping.set()
            assert go.wait(30)
        return put(self, name, data, wanted)

    monkeypatch.setattr(service.Keeper, "_put", hang)
    monkeypatch.setattr(service, "CANCEL_S", 0.01)
    with worker(tmp_path) as (url, _):
        urls = post(url)["urls"]
        assert keeping.wait(30)
        found, cancelled = look(urls["get"]), httpx.post(urls["cancel"], timeout=60).json()
        go.set()
        assert found == cancelled == ended(urls["get"])
    assert found["status"] == "succeeded"
    assert found["result"]["data"]


def test_who_leaves_before_a_job_is_accepted_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A volume that hangs as the job is kept: its client goes, and nothing is drawn for nobody."""
    hanging, noticed, go = threading.Event(), threading.Event(), threading.Event()
    put: Callable[..., None] = service.Keeper._put
    stop: Callable[..., None] = service.Jobs._stop

    def hang(self: Any, *given: Any) -> None:
        hanging.set()
        assert go.wait(30)
        put(self, *given)

    family = FakeFamily(gate=threading.Event())
    with worker(tmp_path, family) as (url, app):
        monkeypatch.setattr(service.Keeper, "_put", hang)
        monkeypatch.setattr(service.Jobs, "_stop", lambda *given: (stop(*given), noticed.set()))
        asks = httpx.Request("POST", url + ROUTE, json=ASKED, headers=LATER)
        head = "".join(f"{name}: {value}\r\n" for name, value in asks.headers.items())
        with socket.create_connection((asks.url.host, asks.url.port)) as client:
            client.sendall(f"POST {ROUTE} HTTP/1.1\r\n{head}\r\n".encode() + asks.content)
            assert hanging.wait(30)
        assert noticed.wait(30)
        go.set()
        until(lambda: not app.later.active)
        assert family.drawn == []
