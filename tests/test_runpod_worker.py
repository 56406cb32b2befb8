"""The RunPod adapter, on the SDK's own local API and in a real worker loop against a control plane on loopback."""

import base64
import io
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx
import pytest
from PIL import Image

from runpod_plane import DEADLINE_S, WORKER, Event, Plane, clean_environment, started

SMALL = {"prompt": "a red circle", "num_inference_steps": 4, "seed": 7}
LONG = {**SMALL, "n": 4, "num_inference_steps": 8, "width": 512, "height": 512}
ENDLESS = {**LONG, "width": 1024, "height": 1024}  # outlasts the second that the SDK may sleep between stop polls
LOSES_ITS_GPU = """
import runpy, sys
from handler import Worker
from handler.errors import DeviceLost

class Broken:
    hardware = None
    unpublished = False

    def generate(self, *_, **__):
        raise DeviceLost("The GPU failed.")

Worker._load = lambda *_: Broken()
Broken.hardware = type("Hardware", (), {"reason": "none", "precision": "none"})
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def size_of(b64: str) -> tuple[int, int]:
    """The size of a picture that decodes."""
    picture = Image.open(io.BytesIO(base64.b64decode(b64)))
    picture.load()
    return picture.size


def assert_refused(error: Any, code: str) -> None:
    """`error` is a JSON string that says what is wrong and nothing about the worker."""
    assert isinstance(error, str)
    told = json.loads(error)
    assert told["code"] == code
    assert told["message"]
    assert not {"error_traceback", "hostname", "worker_id"} & told.keys()
    assert "Traceback" not in error


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until_answering(url: str, process: Popen[bytes], log: Path) -> None:
    """Poll until the server answers, or fail with its log."""
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end and process.poll() is None:
        try:
            httpx.get(url)
        except httpx.TransportError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """`--rp_serve_api`: what a developer runs before deploying."""
    folder = tmp_path_factory.mktemp("local")
    port, log = free_port(), folder / "log"
    command = [str(WORKER), "--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", str(port)]
    with started(command, clean_environment(folder), log) as process:
        until_answering(f"http://127.0.0.1:{port}/", process, log)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=DEADLINE_S) as client:
            yield client


def ask(api: httpx.Client, given: Any) -> dict[str, Any]:
    answer = api.post("/runsync", json={"input": given})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_native_job(api: httpx.Client) -> None:
    answer = ask(api, SMALL)
    assert answer["status"] == "COMPLETED"
    assert answer["output"]["model"] == "spark"
    assert size_of(answer["output"]["images"][0]["b64_json"]) == (256, 256)


def test_openai_job(api: httpx.Client) -> None:
    wanted = {"prompt": "a red circle", "output_format": "webp", "model": "spark"}
    answer = ask(api, {"openai_route": "/v1/images/generations", "openai_input": wanted})
    assert answer["output"]["output_format"] == "webp"
    assert size_of(answer["output"]["data"][0]["b64_json"]) == (256, 256)


def test_openai_read(api: httpx.Client) -> None:
    answer = ask(api, {"openai_route": "/v1/models"})
    assert answer["output"]["data"][0]["id"] == "spark"


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({}, "missing_required_parameter"),
        ({"prompt": "x", "sampler": "y"}, "unknown_parameter"),
        ({"prompt": "x", "num_inference_steps": 9}, "out_of_range"),
        ({"prompt": "x", "model": "flux-dev"}, "model_not_found"),
        ({"openai_route": "/v1/nothing"}, "not_found"),
        ({"openai_route": 5}, "not_found"),
        ({"openai_route": "/v1/images/generations"}, "invalid_type"),
    ],
)
def test_bad_input(api: httpx.Client, given: dict[str, Any], code: str) -> None:
    answer = ask(api, given)
    assert answer["status"] == "FAILED"
    assert_refused(answer["error"], code)


@pytest.fixture(scope="module")
def loop_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loop") / "log"


@pytest.fixture(scope="module")
def plane(loop_log: Path) -> Iterator[Plane]:
    """A control plane with one worker in the loop that runs on RunPod, and a job that waits from the start."""
    with Plane() as plane:
        plane.give("first", **SMALL)
        plane.note(Event("start"))
        with started([str(WORKER)], clean_environment(loop_log.parent, **plane.environment), loop_log):
            yield plane


def test_takes_no_job_before_the_model_is_loaded(plane: Plane, loop_log: Path) -> None:
    plane.result("first")
    line = next(line for line in loop_log.read_text().splitlines() if '"cold_start"' in line)
    ledger = json.loads(line)["cold_start"]
    assert ledger["outcome"] == "ready"
    begun, taken = (plane.wait(lambda event, kind=kind: event.kind == kind).at for kind in ("start", "take"))
    assert taken - begun > ledger["total_s"] - 0.05  # the kernel counts a birth in hundredths


def test_posts_the_result(plane: Plane) -> None:
    output = plane.result("first")["output"]
    assert size_of(output["images"][0]["b64_json"]) == (256, 256)
    assert output["images"][0]["seed"] == SMALL["seed"]


def test_posts_progress_and_never_after_the_result(plane: Plane) -> None:
    plane.give("steps", **LONG)
    plane.result("steps")
    plane.give("after", openai_route="/v1/models")
    plane.result("after")
    kinds = [event.kind for event in plane.of("steps")]
    assert kinds == ["take", *["progress"] * (len(kinds) - 2), "done"]
    told = [event.body["output"] for event in plane.of("steps") if event.kind == "progress"]
    assert {steps["step"] for steps in told} == set(range(1, 32))
    assert {steps["of"] for steps in told} == {32}


def test_a_bad_job_is_refused_without_a_traceback(plane: Plane) -> None:
    plane.give("bad", prompt="")
    result = plane.result("bad")
    assert result.keys() == {"error"}
    assert_refused(result["error"], "out_of_range")


def test_a_cancelled_job_posts_nothing_and_harms_no_other(plane: Plane) -> None:
    before = plane.result("first")
    plane.give("cancelled", **ENDLESS)
    plane.wait(lambda event: event.kind == "progress" and event.job == "cancelled")
    plane.stop("cancelled")
    plane.give("next", **SMALL)
    after = plane.result("next")
    assert "done" not in [event.kind for event in plane.of("cancelled")]
    pictures = [result["output"]["images"][0]["b64_json"] for result in (before, after)]
    assert pictures[0] == pictures[1]


def test_pings(plane: Plane) -> None:
    ping = plane.wait(lambda event: event.kind == "ping")
    assert "status" not in ping.body


def test_sigterm_finishes_the_job_and_exits_cleanly(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Plane() as plane, started([str(WORKER)], clean_environment(tmp_path, **plane.environment), log) as process:
        plane.give("last", **{**SMALL, "n": 4})
        plane.wait(lambda event: event.kind == "progress")
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0, log.read_text()
        assert len(plane.result("last")["output"]["images"]) == 4


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [("KINDLING_MODEL", "flux-schnell", "WeightsMissing"), ("KINDLING_MODLE", "spark", "SettingsError")],
)
def test_a_worker_that_cannot_start_takes_no_job(tmp_path: Path, setting: str, value: str, reason: str) -> None:
    with Plane() as plane:
        plane.give("never", **SMALL)
        extra = {**plane.environment, "KINDLING_VOLUME": str(tmp_path), setting: value}
        with started([str(WORKER)], clean_environment(tmp_path, **extra), tmp_path / "log") as process:
            assert process.wait(DEADLINE_S) == 1
        ping = plane.wait(lambda event: event.kind == "ping").body
        assert (ping["status"], ping["check"]) == ("unhealthy", "boot")
        assert ping["reason"].startswith(reason)
        assert plane.of("never") == []


def test_a_worker_that_loses_its_gpu_asks_to_be_replaced_and_ends(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Plane() as plane:
        plane.give("lost", **SMALL)
        environment = clean_environment(tmp_path, **plane.environment)
        with started(["-c", LOSES_ITS_GPU, str(WORKER)], environment, log) as process:
            result = plane.result("lost")
            assert process.wait(DEADLINE_S) == 0, log.read_text()
    assert result["stopPod"] is True
    assert_refused(result["error"], "device_lost")


def test_a_result_that_runpod_would_drop_is_refused(tmp_path: Path) -> None:
    """Four noisy pictures are too slow to draw here, so the limit is lowered instead."""
    lowered = WORKER.read_text().replace("MAX_RESULT = 20_000_000", "MAX_RESULT = 100")
    (tmp_path / "worker.py").write_text(lowered)
    log = tmp_path / "log"
    command = [str(tmp_path / "worker.py"), "--test_input", json.dumps({"input": {"openai_route": "/v1/models"}})]
    with started(command, clean_environment(tmp_path), log) as process:
        assert process.wait(DEADLINE_S) == 1
    assert "result_too_large" in log.read_text()
