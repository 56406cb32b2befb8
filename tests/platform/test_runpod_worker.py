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
import torch
from graphs import node, plain, png, with_image
from PIL import Image

from runpod_plane import DEADLINE_S, WORKER, Event, Plane, clean_environment, started
from s3_plane import BUCKET, KEY, SECRET, Broken, s3_server

SMALL = {"prompt": "a red circle", "num_inference_steps": 4, "seed": 7}
LONG = {**SMALL, "n": 4, "num_inference_steps": 8, "width": 512, "height": 512}
ENDLESS = {**LONG, "width": 1024, "height": 1024}  # outlasts the second that the SDK may sleep between stop polls
GPULESS = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
LOSES_ITS_GPU = """
import runpy, sys
from handler import Worker
from handler.core.errors import DeviceLost

class Broken:
    hardware = None
    unpublished = False
    gains = {}

    def draw_some(self, *_):
        raise DeviceLost("The GPU failed.")

    def watch(self, alarm):
        pass

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
    answer = ask(api, SMALL | {"workflow": None, "openai_route": None})
    assert answer["status"] == "COMPLETED", answer
    assert answer["output"]["model"] == "spark"
    assert size_of(answer["output"]["images"][0]["b64_json"]) == (256, 256)


def test_openai_job(api: httpx.Client) -> None:
    wanted = {"prompt": "a red circle", "output_format": "webp", "model": "spark"}
    answer = ask(api, {"openai_route": "/v1/images/generations", "openai_input": wanted})
    assert answer["output"]["output_format"] == "webp"
    assert size_of(answer["output"]["data"][0]["b64_json"]) == (256, 256)


def test_an_edit_is_a_job_too(api: httpx.Client) -> None:
    [first] = ask(api, {"openai_route": "/v1/images/generations", "openai_input": SMALL})["output"]["data"]
    image = {"image_url": f"data:image/png;base64,{first['b64_json']}"}
    wanted = {"prompt": "a red circle on a white background", "images": [image]}
    answer = ask(api, {"openai_route": "/v1/images/edits", "openai_input": wanted})
    assert size_of(answer["output"]["data"][0]["b64_json"]) == (256, 256)


@pytest.mark.parametrize("route", ["/v1/models", "v1/models"])
def test_openai_read(api: httpx.Client, route: str) -> None:
    answer = ask(api, {"openai_route": route})
    assert answer["output"]["data"][0]["id"] == "spark"


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({}, "missing_required_parameter"),
        ({"prompt": "x", "frames": 7}, "unknown_parameter"),
        ({"prompt": "x", "sampler": "y"}, "out_of_range"),
        ({"prompt": "x", "num_inference_steps": 9}, "out_of_range"),
        ({"prompt": "x", "model": "flux-dev"}, "model_not_found"),
        ({"openai_route": "/v1/nothing"}, "not_found"),
        ({"openai_route": 5}, "not_found"),
        ({"prompt": "x", "if_too_large": "png"}, "invalid_value"),
        ({"prompt": "x", "if_too_large": ["webp"]}, "invalid_value"),
        ({"prompt": "x", "partial_images": 1}, "unsupported_parameter"),
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
        environment = clean_environment(loop_log.parent, **plane.environment, COMFY_POLLING_MAX_RETRIES="500")
        with started([str(WORKER)], environment, loop_log):
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
    plane.give("bad", prompt="x" * 32_001)
    result = plane.result("bad")
    assert result.keys() == {"error"}
    assert_refused(result["error"], "out_of_range")


@pytest.mark.parametrize(("name", "given"), [("none", None), ("text", "a red circle"), ("list", [SMALL])])
def test_an_input_that_is_no_object_is_told_what_to_send(plane: Plane, name: str, given: Any) -> None:
    plane.give_any(f"input-{name}", given)
    error = plane.result(f"input-{name}")["error"]
    assert_refused(error, "invalid_value")
    assert "{'prompt': ...}" in error


def test_an_input_may_come_as_text(plane: Plane) -> None:
    plane.give_any("input-json", json.dumps({"openai_route": "/v1/models"}))
    assert plane.result("input-json")["output"]["object"] == "list"


def test_a_cancelled_job_stops_within_two_steps_posts_nothing_and_harms_no_other(plane: Plane) -> None:
    before = plane.result("first")
    plane.give("cancelled", **ENDLESS)
    plane.wait(lambda event: event.kind == "progress" and event.job == "cancelled")
    plane.stop("cancelled")
    plane.give("next", **SMALL)
    after = plane.result("next")
    assert_stopped_within_two_steps(plane, "cancelled")
    pictures = [result["output"]["images"][0]["b64_json"] for result in (before, after)]
    assert pictures[0] == pictures[1]


def test_a_job_out_of_time_stops_likewise(plane: Plane) -> None:
    plane.give_with_timeout("late", 0.5, **ENDLESS)
    plane.give("after-late", **SMALL)
    plane.result("after-late")
    assert_stopped_within_two_steps(plane, "late")


def assert_stopped_within_two_steps(plane: Plane, job: str) -> None:
    """Steps told before and after the worker was told to stop; and no result."""
    kinds = [event.kind for event in plane.of(job)]
    told = kinds.index("stop")
    steps = [event.body["output"]["step"] if event.kind == "progress" else 0 for event in plane.of(job)]
    assert max(steps) <= max(steps[:told]) + 2
    assert max(steps) < 32
    assert "done" not in kinds


def test_a_workflow_is_a_job_too(plane: Plane) -> None:
    image = {"name": "cat.png", "image": base64.b64encode(png()).decode()}
    plane.give("workflow", workflow=with_image(denoise=1.0), images=[image])
    [picture] = plane.result("workflow")["output"]["images"]
    assert (picture["filename"], picture["type"]) == ("kindling_00001_.png", "base64")
    assert size_of(picture["data"]) == (128, 64)
    told = [event.body["output"] for event in plane.of("workflow") if event.kind == "progress"]
    assert sorted(steps["step"] for steps in told) == [1, 2, 3]
    assert {steps["of"] for steps in told} == {4}


def test_a_workflow_that_cannot_be_drawn_is_refused_as_worker_comfyui_does(plane: Plane) -> None:
    plane.give("no-image", workflow=with_image())
    assert plane.result("no-image")["error"].startswith("Workflow validation failed:\n• Node 10 (LoadImage): ")
    plane.give("torn-image", workflow=with_image(), images=[{"name": "cat.png", "image": "!"}])
    result = plane.result("torn-image")
    assert result["error"] == "Failed to upload one or more input images"
    assert len(result["output"]["details"]) == 1


def test_a_cancelled_workflow_stops_within_two_steps_and_posts_nothing(plane: Plane) -> None:
    large = {"4": node("EmptyLatentImage", width=1024, height=1024, batch_size=1)}
    plane.give("endless-workflow", workflow=plain(steps=8) | large)
    plane.wait(lambda event: event.kind == "progress" and event.job == "endless-workflow")
    plane.stop("endless-workflow")
    plane.give("after-workflow", **SMALL)
    plane.result("after-workflow")
    assert_stopped_within_two_steps(plane, "endless-workflow")


def test_worker_comfyuis_variables_that_change_nothing_are_named(plane: Plane, loop_log: Path) -> None:
    plane.result("first")
    assert "COMFY_POLLING_MAX_RETRIES changes nothing here: no ComfyUI runs behind this worker" in loop_log.read_text()


def test_a_worker_that_shall_be_fresh_for_each_job_ends_after_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Plane() as plane:
        plane.give("only", **SMALL)
        environment = clean_environment(tmp_path, **plane.environment, REFRESH_WORKER="true")
        with started([str(WORKER)], environment, log) as process:
            assert plane.result("only")["stopPod"] is True
            assert process.wait(DEADLINE_S) == 0, log.read_text()


def test_a_result_that_could_not_be_posted_is_posted_again(plane: Plane) -> None:
    plane.refusals["unlucky"] = [500, 500]
    plane.give("unlucky", **SMALL)
    plane.give("after-unlucky", openai_route="/v1/models")
    plane.result("after-unlucky")
    posted = [event.body for event in plane.of("unlucky") if event.kind == "done"]
    assert len(posted) == 3
    assert posted[0] == posted[2]


@pytest.mark.parametrize("statuses", [[400], [500, 500, 500]])
def test_a_refused_result_is_told_in_the_log_and_the_worker_goes_on(
    plane: Plane, loop_log: Path, statuses: list[int]
) -> None:
    job = f"refused-{statuses[0]}"
    plane.refusals[job] = list(statuses)
    plane.give(job, **SMALL)
    plane.give(f"after-{job}", openai_route="/v1/models")
    plane.result(f"after-{job}")
    assert len([event for event in plane.of(job) if event.kind == "done"]) == len(statuses)
    assert [
        line for line in loop_log.read_text().splitlines() if "Failed to return job results" in line and job in line
    ]


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
    [
        ("KINDLING_MODEL", "flux-schnell", "WeightsMissing"),
        ("KINDLING_MODLE", "spark", "SettingsError"),
        ("MAX_CONCURRENCY", "33", "ValueError: MAX_CONCURRENCY should be 1 to 32"),
        ("MAX_CONCURRENCY", "9" * 5000, "ValueError: MAX_CONCURRENCY should be 1 to 32"),
        ("STREAM", "yes", "ValueError: STREAM should be 0 or 1"),
        (
            "KINDLING_VOLUME_KEY",
            "{{ RUNPOD_SECRET_none }}",
            "SettingsError: RunPod has no secret for KINDLING_VOLUME_KEY=",
        ),
        pytest.param(
            "KINDLING_DEVICE", "", "DeviceMissing: KINDLING_DEVICE=cuda, but torch sees no GPU", marks=GPULESS
        ),
    ],
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


def test_several_jobs_at_once_are_taken_in_a_batch_and_all_answered(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Plane() as plane:
        for i in range(5):
            plane.give(f"job{i}", **SMALL)
        alone = {"KINDLING_BATCH": "1"}  # several at once may differ in a bit
        environment = clean_environment(tmp_path, **plane.environment, MAX_CONCURRENCY="3", **alone)
        with started([str(WORKER)], environment, log):
            pictures = {plane.result(f"job{i}")["output"]["images"][0]["b64_json"] for i in range(5)}
        assert len(pictures) == 1
        assert [event.body["asked"] for event in plane.seen if event.kind == "take"][:3] == [3, 3, 3]


@pytest.fixture(scope="module")
def cramped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    """A worker with low limits: pictures that are too large for the real ones are too slow to draw here."""
    folder = tmp_path_factory.mktemp("cramped")
    lowered = WORKER.read_text().replace("= 10_000_000, 20_000_000", "= 15_000, 300")
    (folder / "worker.py").write_text(lowered)
    with Plane() as plane:
        environment = clean_environment(folder, **plane.environment)
        with started([str(folder / "worker.py")], environment, folder / "log"):
            yield plane


@pytest.mark.parametrize(
    ("job", "given", "limit"),
    [
        ("sync-1", {}, 300),
        ("1", {}, 15000),
        ("sync-2", {"if_too_large": "webp"}, 300),
        ("2", {"output_format": "jpeg", "width": 512, "height": 512}, 15000),
    ],
)
def test_a_result_that_runpod_would_drop_is_refused(
    cramped: Plane, job: str, given: dict[str, Any], limit: int
) -> None:
    cramped.give(job, **SMALL, **given)
    result = cramped.result(job)
    assert_refused(result["error"], "result_too_large")
    assert f"carries {limit} here" in result["error"]
    assert "output" not in result


@pytest.mark.parametrize("form", ["webp", "jpeg"])
def test_a_result_that_is_too_large_is_encoded_again_where_the_job_asks(cramped: Plane, form: str) -> None:
    cramped.give(form, **SMALL, if_too_large=form)
    [picture] = cramped.result(form)["output"]["images"]
    assert (picture["format"], picture["seed"]) == (form, SMALL["seed"])
    assert Image.open(io.BytesIO(base64.b64decode(picture["b64_json"]))).format == form.upper()
    wanted = {**SMALL, "if_too_large": form}
    cramped.give(f"openai-{form}", openai_route="/v1/images/generations", openai_input=wanted)
    output = cramped.result(f"openai-{form}")["output"]
    assert output["output_format"] == form
    assert size_of(output["data"][0]["b64_json"]) == (256, 256)


def test_a_result_that_is_too_large_goes_to_the_object_store_where_there_is_one(tmp_path: Path) -> None:
    log, worker = tmp_path / "log", tmp_path / "worker.py"
    worker.write_text(WORKER.read_text().replace("= 10_000_000, 20_000_000", "= 15_000, 2_500"))
    with s3_server() as s3, Plane() as plane:
        runpods = {"BUCKET_ENDPOINT_URL": s3.url, "BUCKET_ACCESS_KEY_ID": KEY, "BUCKET_SECRET_ACCESS_KEY": SECRET}
        environment = clean_environment(tmp_path, **plane.environment, **runpods, KINDLING_STORE_BUCKET=BUCKET)
        with started([str(worker)], environment, log):
            for job, given in (("1", SMALL), ("sync-1", {**SMALL, "output_format": "webp"})):
                plane.give(job, **given)
                [picture] = plane.result(job)["output"]["images"]
                got = httpx.get(picture["url"])
                assert got.headers["content-type"] == f"image/{picture['format']}"
                assert Image.open(io.BytesIO(got.content)).size == (256, 256)
                assert "b64_json" not in picture
            assert len(s3.objects()) == 2
            plane.give("2", **SMALL, if_too_large="webp")  # asked for first, and small enough
            assert size_of(plane.result("2")["output"]["images"][0]["b64_json"]) == (256, 256)
            wanted = {**SMALL, "response_format": "url"}
            plane.give("3", openai_route="/v1/images/generations", openai_input=wanted)
            [picture] = plane.result("3")["output"]["data"]
            assert httpx.get(picture["url"]).status_code == 200
            assert len(s3.objects()) == 2  # the first picture again
    assert not [secret for secret in (SECRET, KEY, "X-Amz-", SMALL["prompt"]) if secret in log.read_text()]


def test_a_store_that_fails_loses_only_what_runpod_cannot_carry(tmp_path: Path) -> None:
    log, worker = tmp_path / "log", tmp_path / "worker.py"
    worker.write_text(WORKER.read_text().replace("= 10_000_000, 20_000_000", "= 15_000, 300"))
    with Broken(403) as broken, Plane() as plane:
        runpods = {"BUCKET_ENDPOINT_URL": broken.url, "BUCKET_ACCESS_KEY_ID": KEY, "BUCKET_SECRET_ACCESS_KEY": SECRET}
        environment = clean_environment(tmp_path, **plane.environment, **runpods, KINDLING_STORE_BUCKET=BUCKET)
        with started([str(worker)], environment, log):
            plane.give("1", **SMALL, response_format="url", output_format="webp")
            kept = plane.result("1")["output"]
            for job in ("sync-1", "sync-2"):
                plane.give(job, **SMALL, response_format="url" if job == "sync-1" else "b64_json")
            lost = [plane.result(job) for job in ("sync-1", "sync-2")]
    assert "status 403" in kept["delivery"]
    assert size_of(kept["images"][0]["b64_json"]) == (256, 256)
    for result in lost:
        assert_refused(result["error"], "delivery_failed")
        assert "status 403" in result["error"]
    assert broken.tries == 3
    told = log.read_text() + json.dumps([kept, *lost])
    assert not [secret for secret in (SECRET, KEY, "X-Amz-") if secret in told]


@pytest.fixture(scope="module")
def streaming(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    """A worker that streams."""
    folder = tmp_path_factory.mktemp("stream")
    with Plane() as plane:
        environment = clean_environment(folder, **plane.environment, STREAM="1")
        with started([str(WORKER)], environment, folder / "log"):
            yield plane


def streamed(plane: Plane, job: str) -> list[dict[str, Any]]:
    """What a job streamed; the aggregate is the same, and nothing came after it."""
    output = plane.result(job)["output"]
    events = plane.of(job)
    assert events[-1].kind == "done"
    told = [event.body["output"] for event in events if event.kind == "stream"]
    assert told == output
    return told


@pytest.mark.parametrize("route", ["", "/v1/images/generations"])
def test_partial_pictures_are_streamed_and_then_the_result(streaming: Plane, route: str) -> None:
    wanted, job = {**SMALL, "partial_images": 3}, f"partials{route.replace('/', '-')}"
    streaming.give(job, **({"openai_route": route, "openai_input": wanted} if route else wanted))
    streaming.give(f"after-{job}", openai_route="/v1/models")
    assert [item["object"] for item in streamed(streaming, f"after-{job}")] == ["list"]
    *partials, last = streamed(streaming, job)
    assert [partial["partial_image_index"] for partial in partials] == [0, 1, 2]
    for partial in partials:
        assert (partial["type"], partial["size"]) == ("image_generation.partial_image", "32x32")
        assert size_of(partial["b64_json"]) == (32, 32)
    [picture] = last.get("data") or last["images"]
    assert size_of(picture["b64_json"]) == (256, 256)


def test_a_job_that_asks_for_no_partial_pictures_streams_its_result_alone(streaming: Plane) -> None:
    streaming.give("plain", **SMALL)
    [result] = streamed(streaming, "plain")
    assert result["images"][0]["seed"] == SMALL["seed"]


def test_a_bad_job_streams_nothing_and_is_refused(streaming: Plane) -> None:
    streaming.give("bad", **SMALL, partial_images=4)
    result = streaming.result("bad")
    assert_refused(result["error"], "out_of_range")
    assert [event.kind for event in streaming.of("bad")] == ["take", "done"]


def test_a_cancelled_stream_stops_and_posts_no_result(streaming: Plane) -> None:
    streaming.give("endless", **{**ENDLESS, "n": 1, "partial_images": 3})
    streaming.wait(lambda event: event.kind == "stream" and event.job == "endless")
    streaming.stop("endless")
    streaming.give("next", **SMALL)
    streaming.result("next")
    kinds = [event.kind for event in streaming.of("endless")]
    assert "done" not in kinds
    assert kinds.count("stream") < 4
