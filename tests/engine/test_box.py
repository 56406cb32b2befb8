"""Several workers behind one queue, as real processes: what is drawn, and what becomes of those that are lost."""

import base64
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from conftest import ROOT

from fakes import RECIPE
from handler.__main__ import main
from handler.cli import doctor, findings
from handler.core.birth import Birth
from handler.core.errors import DeviceLost, Exhausted, SettingsError, StartError
from handler.core.settings import Settings
from handler.engine.box import IN_A_ROW, STEADY_S, Box, Lane
from handler.engine.engine import Engine
from handler.engine.pace import Pace, Run
from handler.engine.queue import Job, Queue
from handler.engine.spend import Meter
from handler.model.given_gpus import gpu_count
from handler.model.hardware import Hardware
from handler.worker.clock import Clock, Ledger
from handler.worker.sharing import require_workers, visible
from serving import Served, children, serving
from threads import Seconds

ROUTE = "/v1/images/generations"
SMALL = {"prompt": "a star", "size": "64x64", "seed": 1}
LONG = {"prompt": "a star", "size": "768x768", "seed": 1, "stream": True, "partial_images": 3}
BOX = {"KINDLING_WORKERS": "2", "KINDLING_BATCH": "1", "KINDLING_COLD_START_BUDGET_S": "600"}
CHILD = "handler.engine.child"


def workers(server: Served) -> dict[str, int]:
    """The process of each worker."""
    begun = children(server.process.pid).items()
    return {words[words.index(CHILD) + 1]: pid for pid, words in begun if CHILD in words}


def ready(server: Served) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/health/ready", timeout=60).json()
    return found


def each(server: Served) -> dict[str, dict[str, Any]]:
    """What health says of each worker."""
    return {one["worker"]: one for one in ready(server)["workers"]}


def until(server: Served, seen: Callable[[dict[str, dict[str, Any]]], object]) -> dict[str, dict[str, Any]]:
    """What health says of the workers, once `seen` is true of it."""
    while not seen(found := each(server)):
        assert server.process.poll() is None
    return found


def all_ready(found: dict[str, dict[str, Any]]) -> bool:
    return all(one["status"] == "ready" for one in found.values())


def picture(server: Served, **fields: Any) -> bytes:
    answer = httpx.post(server.url + ROUTE, json=SMALL | fields, timeout=240)
    assert answer.status_code == 200, answer.text
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


class Request(threading.Thread):
    """A streamed picture that takes long; `drawing` is set at its first partial picture."""

    def __init__(self, server: Served, **fields: Any) -> None:
        super().__init__()
        self.asked, self.url = LONG | fields, server.url + ROUTE
        self.drawing, self.events = threading.Event(), list[dict[str, Any]]()
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", self.url, json=self.asked, timeout=240) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    self.events.append(json.loads(line.removeprefix("data: ")))
                    self.drawing.set()

    def drawn(self) -> bool:
        self.join(240)
        return "b64_json" in self.events[-1] and "partial_image_index" not in self.events[-1]


def drawing(server: Served) -> str:
    """Which worker draws, once one does."""
    found = until(server, lambda found: any(one["drawing"] for one in found.values()))
    return next(name for name, one in found.items() if one["drawing"])


def ended(pid: int) -> None:
    """Wait until this process, which is nobody's child here, is no more."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    assert select.select([handle], [], [], 60)[0], "it goes on"
    os.close(handle)


@pytest.fixture(scope="module")
def box() -> Iterator[Served]:
    """With two workers, for tests that leave it with two."""
    with serving(BOX | {"KINDLING_HANG_S": "5"}) as server:
        until(server, all_ready)
        yield server


def test_a_picture_is_what_one_worker_draws(box: Served, server: Served) -> None:
    assert picture(box) == picture(server)


def test_two_pictures_are_drawn_at_the_same_time_and_are_streamed(box: Served) -> None:
    requests = [Request(box, seed=seed) for seed in (1, 2)]
    assert all(request.drawing.wait(120) for request in requests)
    found = until(box, lambda found: all(one["drawing"] for one in found.values()))
    assert [one["drawing"] for one in found.values()] == [1, 1]
    assert all(request.drawn() for request in requests)
    assert [event["type"] for event in requests[0].events].count("image_generation.partial_image") >= 1


def test_what_a_worker_begins_does_not_hold_its_lines(box: Served) -> None:
    """Else the server would wait for the end of one that is gone."""
    for pid in workers(box).values():
        *_, first, second, _ = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        for line in (first, second):
            [flags] = re.findall(r"flags:\s*(\d+)", Path(f"/proc/{pid}/fdinfo/{line}").read_text())
            assert int(flags, 8) & os.O_CLOEXEC


def test_the_pictures_of_one_request_are_shared(box: Served) -> None:
    answer = httpx.post(box.url + ROUTE, json=SMALL | {"n": 4}, timeout=240).json()
    assert [len(each["b64_json"]) > 100 for each in answer["data"]] == [True] * 4
    assert answer["data"][0] == {"b64_json": base64.b64encode(picture(box)).decode()} | answer["data"][0]


def test_health_and_metrics_tell_of_each_worker(box: Served) -> None:
    for pid in workers(box).values():
        os.kill(pid, signal.SIGINT)  # as a terminal does, which is the server's business alone
    picture(box)
    found = each(box)
    assert sorted(found) == ["0", "1"]
    assert all((one["device"], one["phase"]) == ("CPU", "warm") for one in found.values())
    told = httpx.get(f"{box.url}/metrics").text
    for worker in found:
        assert f'kindling_state{{state="ready",worker="{worker}"}} 1.0' in told
        assert f'kindling_load_seconds{{phase="import",worker="{worker}"}}' in told
        assert re.search(rf'kindling_memory_bytes{{kind="host_peak",worker="{worker}"}} \d', told)
    assert "kindling_queue_depth 0.0" in told
    assert [one["type"] for one in httpx.get(f"{box.url}/system_stats").json()["devices"]] == ["cpu", "cpu"]
    assert sorted(workers(box)) == ["0", "1"]


def test_who_leaves_stops_the_picture_in_the_process_that_draws_it(box: Served) -> None:
    with httpx.stream("POST", box.url + ROUTE, json=LONG, timeout=240) as answer:
        next(line for line in answer.iter_lines() if line.startswith("data: {"))
    until(box, lambda found: not any(one["drawing"] for one in found.values()))
    late = httpx.post(box.url + ROUTE, json=SMALL | {"size": "1024x1024"}, headers={"x-deadline-s": "1"}, timeout=240)
    assert late.status_code == 504
    assert picture(box) == picture(box)


def test_a_worker_that_ends_costs_no_picture_and_comes_back(box: Served) -> None:
    before = each(box)
    request = Request(box)
    assert request.drawing.wait(120)
    lost = drawing(box)
    other = Request(box, seed=7)
    os.kill(workers(box)[lost], signal.SIGKILL)
    assert request.drawn()
    assert other.drawn()
    found = until(box, all_ready)
    assert found[lost]["restarts"] == before[lost]["restarts"] + 1
    told = httpx.get(f"{box.url}/metrics").text
    assert f'kindling_worker_restarts{{worker="{lost}"}} {found[lost]["restarts"]}.0' in told


def test_a_worker_that_hangs_is_ended_alone(box: Served) -> None:
    request = Request(box, size="512x512")  # ten times what it takes are waited for
    assert request.drawing.wait(120)
    lost = drawing(box)
    pids = workers(box)
    os.kill(pids[lost], signal.SIGSTOP)
    assert request.drawn()
    ended(pids[lost])
    until(box, all_ready)
    now = workers(box)
    assert now[lost] != pids[lost]
    assert {name: now[name] for name in now if name != lost} == {name: pids[name] for name in pids if name != lost}


def test_a_picture_that_takes_two_workers_along_takes_no_more(box: Served) -> None:
    request = Request(box)
    assert request.drawing.wait(120)
    for _ in range(2):
        os.kill(workers(box)[drawing(box)], signal.SIGKILL)
        until(box, lambda found: not all_ready(found))
    request.join(240)
    assert request.events[-1]["error"]["code"] == "device_lost"
    until(box, all_ready)
    assert picture(box).startswith(b"\x89PNG")


def test_told_to_stop_it_draws_what_it_has_and_takes_its_workers_along() -> None:
    with serving(BOX) as server:
        until(server, all_ready)
        pids = workers(server)
        requests = [Request(server, seed=seed, size="256x256") for seed in (1, 2, 3)]
        assert requests[0].drawing.wait(120)
        os.kill(server.process.pid, signal.SIGTERM)
        assert all(request.drawn() for request in requests)
        assert server.process.wait(60) == 0
        for pid in pids.values():
            ended(pid)


def test_the_first_that_is_ready_draws_and_all_end_with_their_server_also_while_they_start() -> None:
    with serving(BOX, ready=False) as server:
        while len(pids := workers(server)) < 2:
            assert server.process.poll() is None
        os.kill(pids["1"], signal.SIGSTOP)
        server.wait_for("is ready on")
        assert picture(server).startswith(b"\x89PNG")
        assert [one["status"] for one in each(server).values()] == ["ready", "starting"]
        server.process.kill()
        for pid in pids.values():
            ended(pid)


def test_told_to_stop_while_all_start_it_leaves_word_of_each_and_does_not_say_that_it_is_ready(tmp_path: Path) -> None:
    with serving(BOX | {"KINDLING_VOLUME": str(tmp_path)}, ready=False) as server:
        for _ in "01":
            server.wait_for("worker [01], spark: import")
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.process.wait(60) == 0
        server.reader.join()
    outcomes = [json.loads(path.read_text())["outcome"] for path in (tmp_path / "boots").glob("*.json")]
    assert len(outcomes) == 2
    assert {*outcomes} <= {"stopped", "ready"}  # on a busy machine one may have been quicker
    assert any("is ready on" in line for line in server.lines) is ("ready" in outcomes)
    assert not [line for line in server.lines if "is lost" in line]


def test_workers_that_start_have_seconds_to_leave_word_that_they_were_told_to_stop(tmp_path: Path) -> None:
    with serving(BOX | {"KINDLING_VOLUME": str(tmp_path)}, ready=False) as server:
        for _ in "01":
            server.wait_for("worker [01], spark: import")
        pids = workers(server).values()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        os.kill(server.process.pid, signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(1.5)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        assert server.process.wait(60) == 0
    outcomes = [json.loads(path.read_text())["outcome"] for path in (tmp_path / "boots").glob("*.json")]
    assert len(outcomes) == 2
    assert {*outcomes} <= {"stopped", "ready"}


def test_what_fails_in_all_workers_ends_the_server_as_it_ends_one_alone(tmp_path: Path) -> None:
    told = []
    for count in ("1", "2"):
        environ = BOX | {"KINDLING_WORKERS": count, "KINDLING_VAE": "none", "KINDLING_VOLUME": str(tmp_path)}
        with serving(environ, ready=False) as server:
            code = server.process.wait(120)
            server.reader.join()
            told.append((code, [line for line in server.lines if line.startswith("kindling: ") and "none" in line][-1]))
            assert not [line for line in server.lines if "begun again" in line]
    assert told[0] == told[1]
    assert told[0][0] in (1, 2)


def test_the_budget_holds_in_each_process_and_each_start_leaves_its_record(tmp_path: Path) -> None:
    environ = BOX | {"KINDLING_COLD_START_BUDGET_S": "0.5", "KINDLING_VOLUME": str(tmp_path)}
    with serving(environ, ready=False) as server:
        assert server.process.wait(120) == 124
    outcomes = [json.loads(path.read_text())["outcome"] for path in (tmp_path / "boots").glob("*.json")]
    assert outcomes == ["failed", "failed"]


def unbegun(count: int = 2) -> Box:
    """A box none of whose workers was begun."""
    return Box(Settings(), count, lambda _: Clock(240))


def lane(box: Box, number: int) -> Lane:
    found = box.workers[str(number)]
    assert isinstance(found, Lane)
    return found


def job(queue: Queue, answers: list[Any]) -> Job:
    """One that waits, and was taken."""
    made = Job(RECIPE, lambda *_: None, 1.0, math.inf, answers.append)
    queue.join([made], Pace(), admitted=True)
    assert queue.take(lambda _: 1) == [made]
    return made


def test_a_lost_worker_is_begun_again_later_each_time_until_it_has_served_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = Seconds()
    monkeypatch.setattr("handler.engine.box.time", SimpleNamespace(monotonic=now))
    one, waits = lane(unbegun(), 0), list[float]()
    for _ in range(8):
        one.fail(DeviceLost("gone"))
        assert one.due_s is None  # its thread is not over
        one.ended = True
        waits.append(one.due_s or 0)
        now.pass_s(waits[-1])
        assert one.due_s == 0
        one = one.again(Clock(240))
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    one._served_from = now.now - STEADY_S
    one.fail(DeviceLost("gone"))
    one.ended = True
    assert one.due_s == 1
    assert one.restarts == 8


def test_what_is_set_wrong_is_not_begun_again() -> None:
    one = lane(unbegun(), 0)
    one.fail(SettingsError("wrong"))
    one.ended = True
    assert one.due_s is None


def test_a_picture_goes_to_another_worker_before_all_others_and_once_only() -> None:
    box, answers = unbegun(), list[Any]()
    first, later = job(box.queue, answers), Job(RECIPE, lambda *_: None, 1.0, math.inf, answers.append)
    box.queue.join([later], Pace(), admitted=True)
    lane(box, 0).fail(DeviceLost("gone"), [first])
    assert box.queue.take(lambda _: 1) == [first]
    lane(box, 1).fail(DeviceLost("gone too"), [first])
    assert [type(answer) for answer in answers] == [DeviceLost]
    assert box.queue.take(lambda _: 1) == [later]


def test_a_workers_last_fault_is_its_requests_own() -> None:
    box, answers = unbegun(), list[Any]()
    lane(box, 0).fail(Exhausted("no memory"), [job(box.queue, answers)])
    assert [type(answer) for answer in answers] == [Exhausted]


def test_a_machine_whose_workers_are_lost_again_and_again_is_given_up() -> None:
    box = unbegun()
    box._booted.set()  # one was ready once
    for _ in range(IN_A_ROW):
        assert not box.over.is_set()
        for number in (0, 1):
            one = lane(box, number)
            one.fail(DeviceLost("gone"))
            one.ended = True
        assert box._settled() is (one.losses == IN_A_ROW)
        box._lanes = [one.again(Clock(240)) for one in box._lanes]
    assert (box.state, type(box.error)) == ("failed", StartError)


def test_a_box_that_cannot_begin_its_workers_is_waited_for_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(lane: Lane) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Lane, "start", full)
    box = unbegun()
    box._run()
    with pytest.raises(StartError, match="This server failed"):
        box.wait_booted()
    assert box.over.is_set()


def test_what_is_told_of_a_start_that_is_stopped_holds_up_no_other_worker() -> None:
    """A receiver of traces may take seconds to hear it."""
    held = list[bool]()

    def publish(_: Ledger) -> None:
        other = threading.Thread(target=box.look)
        other.start()
        other.join(5)
        held.append(other.is_alive())

    box = Box(Settings(), 2, lambda _: Clock(240, publish=publish))
    box.over.set()
    box.stop()
    assert held == [False, False]


def test_what_waits_is_shared_by_those_that_are_ready() -> None:
    box = unbegun(3)
    lane(box, 1)._executor.pace = Pace.of((Run(1.0, 6.0),))
    assert box.pace.seconds([1.0]) == pytest.approx(6)
    for number in (0, 1):
        lane(box, number).state = "ready"
    assert box.pace.seconds([1.0]) == pytest.approx(3)


def test_how_many_workers_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handler.worker.sharing.gpu_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [require_workers(Settings(workers=each)) for each in (1, "auto", 4)] == [1, 4, 4]
    assert require_workers(Settings(workers="auto", ulysses_degree=2)) == 2
    assert require_workers(Settings(workers="auto", ulysses_degree=8)) == 1
    assert require_workers(Settings(workers="auto", device="cpu")) == 1
    for settings in (Settings(workers=5), Settings(workers=3, ring_degree=2)):
        with pytest.raises(SettingsError, match="more than this machine has room for: it has 4 GPUs"):
            require_workers(settings)
    monkeypatch.setattr("handler.worker.sharing.gpu_count", lambda: 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert [require_workers(Settings(workers=each)) for each in ("auto", 2)] == [1, 2]
    with pytest.raises(SettingsError, match="it has 2 processors and no GPU"):
        require_workers(Settings(workers=3))


@pytest.mark.parametrize(
    ("named", "count"),
    [("MIG-a, MIG-b", 2), ("0,2,-1,3", 2), ("", 0), ("-1", 0), ("-1,0", 0), (" none", 0), ("GPU-a", 1)],
)
def test_how_many_gpus_this_process_was_given(named: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handler.model.hardware.GPU_DEVICE", Path("/dev/null"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert gpu_count() == count


def test_each_worker_sees_its_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible(2, 2) == {"CUDA_VISIBLE_DEVICES": "2,3"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c,GPU-d")
    assert visible(2, 2) == {"CUDA_VISIBLE_DEVICES": "GPU-c,GPU-d"}
    assert visible(1) == {"CUDA_VISIBLE_DEVICES": "GPU-b"}


def test_all_gpus_are_paid_for() -> None:
    prices = [
        Meter(Settings(workers=count, ulysses_degree=2, gpu_price=3.6), lambda: "", Birth.of_process()).price
        for count in (1, 2)
    ]
    assert [price.dollars_per_s for price in prices] == pytest.approx([0.002, 0.004])


def test_doctor_tells_the_gpus_of_each_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handler.worker.sharing.gpu_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpu = Hardware("cuda", "a GPU", "bf16", "")
    found = doctor.workers(Settings(workers="auto", ulysses_degree=2), gpu)
    assert findings._workers(found) == ["workers: 2, a process each, on GPU 0,1; 2,3"]
    [told] = findings._workers(doctor.workers(Settings(workers=9), gpu))
    assert told.startswith("workers: KINDLING_WORKERS: 9 workers are more than this machine has room for")
    assert findings._workers(doctor.workers(Settings(), gpu)) == []


def test_doctor_foretells_the_start_of_as_many_workers_as_auto_means(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("handler.worker.sharing.gpu_count", lambda: 4)
    monkeypatch.setenv("KINDLING_WORKERS", "auto")
    monkeypatch.setattr(doctor, "cold_start", lambda settings, _: {"reason": settings.workers})
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cold_start"]["reason"] == 4


@pytest.mark.parametrize("several", [2, "auto"])
def test_who_is_no_server_has_one_worker(several: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handler.worker.sharing.gpu_count", lambda: 2)
    with pytest.raises(SettingsError, match=r"^KINDLING_WORKERS: 2 workers are what `serve` begins"):
        Engine(Settings(workers=several))


ALONE = """
import sys
from handler.core.settings import Settings
from handler.server.process import _engine
from handler.worker.clock import Clock, Ledger
_engine(Settings(), lambda: Clock(240))
print(*{"handler.engine.box", "handler.engine.remote", "pynvml", "torch"} & sys.modules.keys())
"""


def test_one_worker_alone_loads_nothing_of_this() -> None:
    out = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True)
    assert (out.returncode, out.stdout.strip()) == (0, ""), out.stderr
