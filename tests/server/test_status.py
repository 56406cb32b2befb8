"""What /v1/status tells people who look on: of a worker that starts, one that serves, and one that has failed."""

import threading
from typing import Any

import httpx
import pytest

from fakes import FakeFamily
from handler import Clock, Engine, Settings, Worker, create_app
from handler.core.errors import StartError
from handler.model import readings
from serving import Served, live

ROUTE = "/v1/status"


def status(url: str) -> dict[str, Any]:
    answer = httpx.get(url + ROUTE)
    assert answer.status_code == 200
    return dict(answer.json())


def test_of_one_that_serves(server: Served) -> None:
    found = status(server.url)
    ready = httpx.get(f"{server.url}/health/ready").json()
    assert {name: found[name] for name in ("status", "model", "drawing", "waiting", "cold_start")} == {
        name: ready[name] for name in ("status", "model", "drawing", "waiting", "cold_start")
    }
    assert (found["spend"].keys(), found["queue"], found["reason"]) == (ready["spend"].keys(), 32, "")
    assert found["elapsed_s"] == ready["cold_start"]["total_s"] > 0
    assert 0 < found["machine"]["host_peak"] < found["machine"]["host_total"]


def test_while_it_starts_its_seconds_go_on(family: FakeFamily) -> None:
    begun, go = threading.Event(), threading.Event()

    def boot(settings: Settings, clock: Clock) -> Worker:
        with clock.phase("volume"):
            pass
        with clock.phase("weights"):
            begun.set()
            assert go.wait(30)
        return family.boot(settings, clock)

    engine = Engine(Settings(queue=3), Clock.anew(240), boot)
    with live(create_app(engine, public=False)) as url:
        assert begun.wait(30)
        first, second = status(url), status(url)
        assert 0 < first["elapsed_s"] < second["elapsed_s"]
        ledger = second["cold_start"]
        assert (second["status"], ledger["phase"], ledger["total_s"]) == ("starting", "weights", 0)
        assert [phase["name"] for phase in ledger["phases"]] == ["volume"]
        assert second["queue"] == 3
        go.set()
        engine.wait_booted()
        third = status(url)
        assert (third["status"], third["elapsed_s"]) == ("ready", third["cold_start"]["total_s"])


def test_of_one_that_failed_it_tells_why() -> None:
    def boot(settings: Settings, clock: Clock) -> Worker:
        with clock.start("spark"), clock.phase("weights"):
            raise StartError("model.safetensors is damaged; fetch it again.")

    engine = Engine(Settings(), Clock.anew(240), boot)
    with live(create_app(engine, public=False)) as url:
        assert engine.over.wait(30)
        found = status(url)
    assert (found["status"], found["reason"]) == ("failed", "model.safetensors is damaged; fetch it again.")
    assert (found["cold_start"]["phase"], found["cold_start"]["outcome"]) == ("weights", "failed")


def test_a_gpu_is_told_as_far_as_it_answers(family: FakeFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cuda:
        mem_get_info = staticmethod(lambda: (3, 10))
        max_memory_allocated = staticmethod(lambda: 8)
        utilization = staticmethod(lambda: 50)

    monkeypatch.setattr(readings, "cuda_of", lambda device: Cuda)
    with family.engine() as engine, live(create_app(engine, public=False)) as url:
        found = status(url)["machine"]
    assert found | {"host_total": 0, "host_peak": 0} == {
        **{"gpu_used": 7, "gpu_total": 10, "gpu_peak": 8, "gpu_utilization": 0.5},
        **{"host_total": 0, "host_peak": 0},
    }
