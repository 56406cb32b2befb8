"""A real server process with a fake model that fails on demand; tests/README.md says which fault is tested where."""

import ast
import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from PIL import Image

import forked
from serving import Served

TESTS = Path(__file__).parents[1]
ROUTE = "/v1/images/generations"
PATIENCE_S = 60
GONE = "cancelled"


class Faulty(Served):
    """The process of tests/doubles/faulty.py, and what it has been asked so far."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        super().__init__(process)
        self.pool = concurrent.futures.ThreadPoolExecutor(100)

    def post(
        self, prompt: str, headers: dict[str, str] | None = None, path: str = ROUTE, **fields: Any
    ) -> httpx.Response:
        payload = {"prompt": prompt, "seed": 5} | fields
        return httpx.post(self.url + path, json=payload, headers=headers, timeout=PATIENCE_S)

    def begin(self, prompt: str, headers: dict[str, str] | None = None, **fields: Any) -> "Future[httpx.Response]":
        """Post from another thread."""
        return self.pool.submit(self.post, prompt, headers, **fields)

    def connect(self, prompt: str, headers: dict[str, str] | None = None, **fields: Any) -> http.client.HTTPConnection:
        """Post, and leave the answer for later: `close` is how a client goes away."""
        address = urlsplit(self.url)
        connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=PATIENCE_S)
        body = json.dumps({"prompt": prompt} | fields)
        connection.request("POST", ROUTE, body, {"content-type": "application/json"} | (headers or {}))
        return connection

    def hold(self, prompt: str = "hold", headers: dict[str, str] | None = None) -> "Future[httpx.Response]":
        """A request that is being drawn, and stays so until `release`."""
        running = self.begin(prompt, headers)
        self.wait_for("^holding")
        return running

    def release(self) -> None:
        """Let what holds go on."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def state(self) -> dict[str, Any]:
        return dict(httpx.get(self.url + "/health/ready").json())

    def until(self, true: Callable[[dict[str, Any]], bool]) -> None:
        """Ask for the state until it is as wanted."""
        end = time.monotonic() + PATIENCE_S
        while not true(self.state()):
            assert time.monotonic() < end, self.state()

    def waiting(self, count: int) -> None:
        self.until(lambda state: state["waiting"] == count)

    def count(self, name: str, **labels: str) -> float:
        """A counter; 0 if there is none yet."""
        wanted = "".join(f'(?=.*{label}="{value}")' for label, value in labels.items())
        found = re.search(rf"(?m)^kindling_{name}{{?{wanted}.* (\S+)$", httpx.get(self.url + "/metrics").text)
        return float(found[1]) if found else 0.0

    def steps(self, prompt: str) -> int:
        """How many steps of it have begun; what was printed before an answer is there by then."""
        mark = f"mark {time.monotonic_ns()}"
        assert self.post(mark, num_inference_steps=1).status_code == 200
        self.wait_for(f"of {mark}$")
        return sum(line.rstrip().endswith(f" of {prompt}") for line in self.lines)

    def ends(self) -> int:
        """The exit code, once all that was said has been read."""
        self.reader.join(PATIENCE_S)
        return self.process.wait(PATIENCE_S)


@contextlib.contextmanager
def faulty(ready: bool = True, **environ: str) -> Iterator[Faulty]:
    process = forked.Popen(
        [sys.executable, str(TESTS / "doubles/faulty.py"), "--port", "0"],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent), **environ},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        server = Faulty(process)
        if ready:
            server.wait_for("is ready on")
        yield server
        server.pool.shutdown()
    finally:
        process.kill()
        with process:
            process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[Faulty]:
    """For all faults that it survives."""
    with faulty(KINDLING_QUEUE="8") as started:
        yield started


@pytest.fixture
def own() -> Iterator[Faulty]:
    """For a fault that it does not survive."""
    with faulty() as started:
        yield started


def error(answer: httpx.Response) -> tuple[int, str, str | None]:
    """Status, code, and whether OpenAI's client is told not to try again."""
    return answer.status_code, answer.json()["error"]["code"], answer.headers.get("x-should-retry")


def assert_worth_another_try(answer: httpx.Response, status: int, code: str) -> None:
    assert error(answer) == (status, code, None)
    assert 1 <= int(answer.headers["retry-after"]) <= 120


def test_while_it_starts_requests_are_held_as_long_as_they_can_wait() -> None:
    with faulty(ready=False, FAULTY_BOOT="hold") as server:
        patient = server.begin("fine")
        server.waiting(1)
        assert httpx.get(server.url + "/ping").status_code == 204
        assert_worth_another_try(server.post("hasty", {"x-deadline-s": "0.2"}), 503, "not_ready")
        assert not patient.done()
        server.release()
        assert patient.result().status_code == 200
        assert server.steps("hasty") == 0


def test_who_waits_for_a_start_that_takes_too_long_is_told_so() -> None:
    with faulty(ready=False, FAULTY_BOOT="spend") as server:
        patient = server.begin("fine")
        server.waiting(1)
        server.release()
        assert_worth_another_try(patient.result(), 503, "cold_start_budget_exceeded")
        assert server.ends() == 124


def test_a_full_queue_refuses_and_harms_nobody(server: Faulty) -> None:
    running = server.hold()
    accepted = [server.begin("fine") for _ in range(8)]
    server.waiting(8)
    assert_worth_another_try(server.post("one too many"), 429, "queue_full")
    server.release()
    assert {each.result().status_code for each in (running, *accepted)} == {200}
    assert server.steps("one too many") == 0


def test_overloaded_it_answers_everybody(server: Faulty) -> None:
    answers = [each.result() for each in [server.begin("slow", num_inference_steps=2) for _ in range(90)]]
    drawn = [answer for answer in answers if answer.status_code == 200]
    assert len(drawn) >= 9
    pictures = [Image.open(BytesIO(b64decode(answer.json()["data"][0]["b64_json"]))) for answer in drawn]
    assert len({picture.tobytes() for picture in pictures}) == 1  # its metadata say how many were drawn at once
    for answer in answers:
        if answer not in drawn:
            assert_worth_another_try(answer, 429, "queue_full")


def test_a_deadline_that_passes_in_the_queue_costs_no_step(server: Faulty) -> None:
    before = server.count("deadline_exceeded_total", where="queue")
    running = server.hold()
    late = server.post("late", {"x-deadline-s": "0.2"})
    assert error(late) == (504, "deadline_exceeded", "false")
    assert server.count("deadline_exceeded_total", where="queue") == before + 1
    server.release()
    assert running.result().status_code == 200
    assert server.steps("late") == 0


def test_a_deadline_that_passes_while_drawing_stops_at_the_next_step(server: Faulty) -> None:
    late = server.hold("hold late", {"x-deadline-s": "4"})
    assert error(late.result()) == (504, "deadline_exceeded", "false")
    server.release()
    assert server.steps("hold late") == 2


@pytest.mark.parametrize("given", ["", "0", "-1", "soon", "inf", "1e3"])
def test_a_deadline_that_is_none_is_refused(server: Faulty, given: str) -> None:
    answer = server.post("fine", {"x-deadline-s": given})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-deadline-s")


def test_the_patience_of_the_official_client_is_a_deadline(server: Faulty) -> None:
    running = server.hold()
    impatient = {"x-stainless-read-timeout": "0.2"}
    assert error(server.post("impatient", impatient)) == (504, "deadline_exceeded", "false")
    streaming = server.begin("streaming", impatient, stream=True)
    server.waiting(1)
    server.release()
    assert running.result().status_code == 200
    assert "image_generation.completed" in streaming.result().text


def test_a_client_that_leaves_stops_its_picture_at_the_next_step(server: Faulty) -> None:
    before = server.count("cancelled_total", where="denoise")
    connection = server.connect("hold leaving")
    server.wait_for("^holding")
    connection.close()
    server.until(lambda _: server.count("cancelled_total", where="denoise") == before + 1)
    server.release()
    assert server.steps("hold leaving") == 2


@pytest.mark.parametrize(("partial_images", "first"), [(0, ""), (3, "event: image_generation.partial_image")])
def test_a_client_that_leaves_a_stream_stops_its_picture_at_the_next_step(
    server: Faulty, partial_images: int, first: str
) -> None:
    """Before the first event, when it has heard nothing at all, and after that."""
    before, prompt = server.count("cancelled_total", where="denoise"), f"hold stream {partial_images}"
    fields = {"stream": True, "partial_images": partial_images, "num_inference_steps": 4}
    connection = server.connect(prompt, **fields)
    server.wait_for("^holding")
    answer = connection.getresponse() if first else None
    assert answer is None or answer.readline().decode().strip() == first
    connection.close()
    if answer:
        answer.close()
    server.until(lambda _: server.count("cancelled_total", where="denoise") == before + 1)
    server.release()
    assert server.steps(prompt) == 2


def test_a_client_that_leaves_the_queue_costs_no_step(server: Faulty) -> None:
    before = server.count("cancelled_total", where="queue")
    running = server.hold()
    connection = server.connect("leaving")
    server.waiting(1)
    connection.close()
    server.waiting(0)
    assert server.count("cancelled_total", where="queue") == before + 1
    server.release()
    assert running.result().status_code == 200
    assert server.steps("leaving") == 0


def test_a_storm_of_clients_that_leave_leaves_nothing_behind(server: Faulty) -> None:
    def handles() -> int:
        return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))

    picture, before = server.post("fine").content, handles()
    for _ in range(200):
        server.connect("slow", num_inference_steps=8).close()
    server.until(lambda state: not state["drawing"] and state["waiting"] == 0)
    server.until(lambda _: handles() <= before)
    again = server.post("fine").json()
    assert again["data"][0]["b64_json"] == json.loads(picture)["data"][0]["b64_json"]


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ("oom", "out_of_memory"),
        ("black", "numerical_error"),
        ("nan", "numerical_error"),
        ("bug", "internal_error"),
    ],
)
def test_the_official_client_does_not_repeat_what_would_fail_again(server: Faulty, prompt: str, code: str) -> None:
    before = server.count("requests_total", route=ROUTE, status="500", reason=code)
    with (
        openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=2) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.images.generate(prompt=prompt)
    assert caught.value.code == code
    assert "detail" not in caught.value.message
    assert server.count("requests_total", route=ROUTE, status="500", reason=code) == before + 1
    assert server.post("fine").status_code == 200


def test_the_official_client_comes_back_to_a_full_queue(server: Faulty) -> None:
    running = server.hold()
    accepted = [server.begin("fine") for _ in range(8)]
    server.waiting(8)
    before = server.count("requests_total", route=ROUTE, status="429")
    with openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=2) as client:
        asking = server.pool.submit(client.images.generate, prompt="fine")
        server.until(lambda _: server.count("requests_total", route=ROUTE, status="429") == before + 1)
        server.release()
        assert asking.result().data
    assert {each.result().status_code for each in (running, *accepted)} == {200}


def test_a_full_queue_refuses_what_it_has_not_read_but_finds_what_is_running(server: Faulty) -> None:
    key = {"idempotency-key": "full"}
    running = server.hold(headers=key)
    accepted = [server.begin("fine") for _ in range(8)]
    server.waiting(8)
    before = server.count("requests_total", route=ROUTE, status="429")
    unread = httpx.post(server.url + ROUTE, content=b"{", headers={"content-type": "application/json"})
    assert error(unread) == (429, "queue_full", None)
    assert error(server.post("fine", {"idempotency-key": "another"})) == (429, "queue_full", None)
    again = server.begin("hold", key)
    server.release()
    assert again.result().json()["data"] == running.result().json()["data"]
    assert {each.result().status_code for each in accepted} == {200}
    assert server.count("requests_total", route=ROUTE, status="429") == before + 2


def test_after_running_out_of_memory_a_small_picture_proves_the_worker(server: Faulty) -> None:
    before, proofs = server.count("oom_total", where="denoise"), server.steps("warm-up")
    assert error(server.post("oom")) == (500, "out_of_memory", "false")
    assert server.count("oom_total", where="denoise") == before + 1
    assert server.steps("warm-up") == proofs + 1


def test_a_slow_reader_holds_up_nobody(server: Faulty) -> None:
    fields = {"size": "1024x1024", "stream": True, "partial_images": 3, "seed": 1}
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # megabytes are coming
        slow.settimeout(PATIENCE_S)
        slow.connect((urlsplit(server.url).hostname, urlsplit(server.url).port))
        body = json.dumps({"prompt": "noise"} | fields).encode()
        head = f"POST {ROUTE} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        slow.sendall(head.encode() + body)
        server.wait_for("step 4 of noise")
        assert server.post("fine").status_code == 200
        said = b"".join(iter(lambda: slow.recv(1 << 20), b""))
    assert said.count(b"event: image_generation.partial_image") == 3
    assert said.count(b"event: image_generation.completed") == 1


def test_told_to_stop_when_idle_it_leaves(own: Faulty) -> None:
    own.process.send_signal(signal.SIGTERM)
    assert own.ends() == 0


def test_told_to_stop_it_draws_what_it_accepted_and_refuses_the_rest(own: Faulty) -> None:
    running, queued = own.hold(), own.begin("fine")
    own.waiting(1)
    own.process.send_signal(signal.SIGTERM)
    own.until(lambda state: state["status"] == "draining")
    assert httpx.get(own.url + "/ping").status_code == 503
    assert_worth_another_try(own.post("late"), 503, "not_ready")
    own.release()
    assert (running.result().status_code, queued.result().status_code) == (200, 200)
    assert own.ends() == 0
    assert not [line for line in own.lines if line.endswith("of late\n")]


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_told_twice_it_answers_all_and_is_gone(own: Faulty, sign: signal.Signals) -> None:
    running, queued = own.hold(), own.begin("fine")
    own.waiting(1)
    own.process.send_signal(sign)
    own.until(lambda state: state["status"] == "draining")
    own.process.send_signal(sign)
    for each in (running, queued):
        assert_worth_another_try(each.result(), 503, "not_ready")
    assert own.ends() == 128 + sign


def test_out_of_memory_a_few_times_in_a_row_retires_the_worker(own: Faulty) -> None:
    for _ in range(2):
        assert error(own.post("oom")) == (500, "out_of_memory", "false")
    assert own.post("fine").status_code == 200
    for _ in range(3):
        assert own.state()["status"] == "ready"
        assert error(own.post("oom")) == (500, "out_of_memory", "false")
    assert own.ends() == 1


def test_a_lost_gpu_ends_the_worker_and_sends_the_others_elsewhere(own: Faulty) -> None:
    running = own.hold()
    lost = own.begin("lose")
    own.waiting(1)
    queued = own.begin("fine")
    own.waiting(2)
    own.release()
    assert running.result().status_code == 200
    assert_worth_another_try(lost.result(), 500, "device_lost")
    assert_worth_another_try(queued.result(), 503, "start_failed")
    with contextlib.suppress(httpx.TransportError):  # gone already
        assert httpx.get(own.url + "/ping").status_code == 503
    assert own.ends() == 1
    assert any(line.startswith("kindling: The GPU failed") for line in own.lines)


def test_a_step_that_hangs_ends_the_worker() -> None:
    with faulty(KINDLING_HANG_S="3") as own:
        hung = own.begin("hang")
        own.wait_for("step 2 of hang")
        queued = own.begin("fine")
        assert_worth_another_try(hung.result(), 500, "device_lost")
        assert_worth_another_try(queued.result(), 503, "start_failed")
        assert own.ends() == 1
        assert any("faulty.py" in line and "in hang" in line for line in own.lines)  # the place where it hangs


KEYED = {"idempotency-key": "one"}


def test_the_same_request_under_the_same_key_attaches_to_the_running_job(server: Faulty) -> None:
    key = {"idempotency-key": "attach"}
    first = server.hold("hold attach", key)
    second, streamed = server.begin("hold attach", key), server.begin("hold attach", key, stream=True)
    assert streamed.result().json()["error"]["code"] == "idempotency_key_reused"  # another body
    server.release()
    assert first.result().json() == second.result().json()
    assert "idempotent-replayed" not in first.result().headers
    assert second.result().headers["idempotent-replayed"] == "true"
    drawn = server.count("images_total")
    assert server.post("hold attach", key).json() == first.result().json()  # it does not hold: it is remembered
    assert server.count("images_total") == drawn
    assert server.steps("hold attach") == 4


def test_a_client_under_a_key_finds_its_job_again(server: Faulty) -> None:
    """Its patience ends, by event and not by time, while the picture is held; so it comes again."""
    gone, tries = server.count("requests_total", route=ROUTE, status="499"), list[httpx.Request]()

    class Impatient(httpx.HTTPTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            tries.append(request)
            if len(tries) > 1:
                server.release()
                return super().handle_request(request)
            address = urlsplit(server.url)
            connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=PATIENCE_S)
            connection.request("POST", request.url.path, request.read(), dict(request.headers))
            server.wait_for("^holding")
            connection.close()
            server.until(lambda _: server.count("requests_total", route=ROUTE, status="499") > gone)
            raise httpx.ReadTimeout("nobody waits that long", request=request)

    transport = httpx.Client(transport=Impatient())
    with openai.OpenAI(base_url=server.url + "/v1", api_key="unused", http_client=transport) as client:
        options: Any = {"extra_headers": {"Idempotency-Key": "again"}, "prompt": "hold again"}
        assert client.images.generate(**options).data
    assert len(tries) == 2
    assert server.steps("hold again") == 4


def test_a_key_belongs_to_its_body(server: Faulty) -> None:
    """Where there are no API keys all who ask are one."""
    first = server.post("fine", KEYED, seed=1)
    for others in ({}, {"authorization": "Bearer other"}):
        assert error(server.post("fine", KEYED | others, seed=2)) == (422, "idempotency_key_reused", None)
    assert server.post("fine", KEYED, seed=1).json() == first.json()
    for bad in ("", "a b", "x" * 256):
        assert server.post("fine", {"idempotency-key": bad}).json()["error"]["param"] == "Idempotency-Key"


def test_a_failure_may_be_tried_again_under_its_key(server: Faulty) -> None:
    for steps in (4, 8):
        assert error(server.post("black twice", {"idempotency-key": "black"}))[0] == 500
        assert server.steps("black twice") == steps


def table() -> list[tuple[int, str, str]]:
    """The rows of tests/README.md."""
    rows = re.findall(r"(?m)^\| (\d+) \| (.+?) \| (.+?) \|$", (TESTS / "README.md").read_text())
    return [(int(number), fault, where) for number, fault, where in rows]


def test_every_fault_of_the_plan_has_its_place() -> None:
    assert [number for number, *_ in table()] == list(range(1, len(table()) + 1))


@cache
def functions(file: str) -> set[str]:
    """What is defined there."""
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("row", table(), ids=lambda row: str(row[0]))
def test_every_named_test_exists(row: tuple[int, str, str]) -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", row[2])
    for file, name in named:
        assert name in functions(file), f"{file}::{name}"
    assert named or row[2].startswith("not here: ")
