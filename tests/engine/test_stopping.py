"""How an engine ends, from whatever it does: who is answered, what is waited for, and that each thread has ended."""

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

from fakes import RECIPE, FakeFamily, raises
from handler import Clock, Engine, Settings, Worker
from handler.core.deadline import EXIT_S
from handler.core.errors import BudgetExceeded, NotReady, SettingsError, StartError, VolumeFailed
from handler.core.scratch import Scratch
from handler.engine import spend
from handler.engine.publisher import Publisher
from handler.engine.queue import Job
from handler.server import shutdown
from handler.server.shutdown import Server
from threads import Seconds, begun, have_ended, inside, until

STATES = ("idle", "booting", "drawing", "publishing")
ENDS: dict[str, Callable[[Engine], None]] = {"stop": Engine.stop, "abort": Engine.abort, "drain": Engine.drain}


@dataclass
class Held:
    """An engine that is held in one of its states until `go`; `published` are the volumes on which something was."""

    state: str
    family: FakeFamily = field(default_factory=FakeFamily)
    go: threading.Event = field(default_factory=threading.Event)
    publishes: threading.Event = field(default_factory=threading.Event)
    published: list[Path] = field(default_factory=list)
    error: BaseException | None = None
    compiled: bool = False

    def publish(self, volume: Path) -> Path:
        self.publishes.set()
        assert self.go.wait(30)
        if self.error:
            raise self.error
        self.published.append(volume)
        return volume

    def boot(self, settings: Settings, clock: Clock) -> Worker:
        if self.state == "booting":
            assert self.go.wait(30)
        worker = self.family.boot(settings, clock)
        clock.ledger.device = "NVIDIA H200"
        wrapped: Any = SimpleNamespace(
            unpublished=self.compiled or self.state == "publishing",
            publish=self.publish,
            draw_some=worker.draw_some,
            gains={},
            watch=worker.watch,
        )
        return wrapped

    def start(self, **settings: Any) -> Engine:
        if self.state == "drawing":
            self.family.gate = self.go
        engine = Engine(Settings(**settings), boot=self.boot)
        engine.start()
        if self.state != "booting":
            engine.wait_booted()
        if self.state == "publishing":
            assert self.publishes.wait(30)
        return engine


@contextmanager
def held(state: str, **settings: Any) -> Iterator[tuple[Held, Engine]]:
    """In that state; afterwards each of its threads has ended."""
    it = Held(state)
    with begun() as threads:
        engine = it.start(**settings)
        try:
            yield it, engine
        finally:
            it.go.set()
    assert have_ended(*threads.values()), [name for name, thread in threads.items() if thread.is_alive()]


def aside(act: Callable[[], object]) -> threading.Thread:
    """Run it in a thread that has begun."""
    thread = threading.Thread(target=act, name="aside", daemon=True)
    thread.start()
    return thread


async def drawing(it: Held, engine: Engine) -> "asyncio.Task[Any]":
    """A picture whose first step is held."""
    task = asyncio.create_task(engine.submit(RECIPE))
    assert await asyncio.to_thread(it.family.entered.wait, 30)
    return task


def test_an_idle_lane_stops_at_once_and_leaves_no_thread() -> None:
    with begun() as threads:
        engine = Held("idle").start()
        assert not engine.busy
        running = {thread.name for thread in threading.enumerate()}
        assert {"engine", "watch", "spend"} <= running
        engine.stop()
    assert have_ended(engine._thread, engine._executor.watch._thread, *threads.values())
    assert (engine.state, engine.alive, engine.over.is_set()) == ("stopped", False, True)


@pytest.mark.parametrize("end", ["drain and stop", "abort and stop", "stop and stop"])
@pytest.mark.parametrize("state", STATES)
def test_every_thread_of_a_lane_ends_with_it(state: str, end: str) -> None:
    """Told once or twice, and whoever has a picture in there is answered once."""
    told: list[Any] = []
    with held(state) as (it, engine):
        if state in ("booting", "drawing"):
            engine.queue.join([Job(RECIPE, lambda *_: None, 1.0, float("inf"), told.append)], None, admitted=True)
            assert state == "booting" or it.family.entered.wait(30)
        first = aside(partial(ENDS[end.partition(" ")[0]], engine))
        until(lambda: engine.state in ("draining", "stopped"))
        second = aside(engine.stop)
        it.go.set()
        assert have_ended(first, second)
        assert engine.state == "stopped"
    drawn = {"booting": [NotReady], "drawing": [NotReady if end.startswith("abort") else tuple]}
    assert [type(each) for each in told] == drawn.get(state, [])


def test_stopping_waits_for_the_picture_that_is_being_drawn() -> None:
    with held("drawing") as (it, engine):

        async def main() -> None:
            running = await drawing(it, engine)
            queued = asyncio.create_task(engine.submit(RECIPE))
            await asyncio.sleep(0)
            stopping = aside(engine.stop)
            with pytest.raises(NotReady):
                await queued
            await asyncio.to_thread(inside, stopping, threading.Event.wait)
            assert not engine.over.is_set()
            it.go.set()
            assert (await running)[0].rgb.shape == (256, 256, 3)
            assert await asyncio.to_thread(have_ended, stopping)

        asyncio.run(main())
    assert it.family.drawn == [1]


def test_stopping_does_not_wait_for_a_boot_and_says_in_which_phase_it_was() -> None:
    with held("booting") as (it, engine):

        async def main() -> None:
            waiting = asyncio.create_task(engine.submit(RECIPE))
            await asyncio.sleep(0)
            await asyncio.to_thread(engine.stop)  # it boots until `go`
            with pytest.raises(NotReady):
                await waiting

        asyncio.run(main())
        assert (engine.state, engine.booted, engine.over.is_set()) == ("stopped", False, False)
        assert (engine.ledger.outcome, engine.ledger.reason) == ("stopped", "told to stop in phase 'start'")
        it.go.set()
        assert have_ended(engine._thread)
        assert (engine.state, engine.over.is_set()) == ("stopped", True)


def test_what_boots_after_it_was_told_to_stop_publishes_nothing() -> None:
    with held("booting") as (it, engine):
        it.compiled = True
        engine.stop()
        it.go.set()
        assert have_ended(engine._thread)
    assert not it.publishes.is_set()


@pytest.mark.parametrize("end", ["drain", "stop", "abort"])
def test_who_waits_for_a_boot_is_answered_once_the_worker_is_told_to_leave(end: str) -> None:
    with held("booting") as (it, engine):

        async def main() -> None:
            waiting = [asyncio.create_task(engine.submit(RECIPE)) for _ in range(3)]
            await asyncio.sleep(0)
            assert engine.waiting == 3
            ENDS[end](engine)
            for each in waiting:
                with pytest.raises(NotReady, match="is stopping"):
                    await each
            with pytest.raises(NotReady, match="is stopping"):
                await engine.submit(RECIPE)

        asyncio.run(main())
        assert not it.go.is_set()
        engine.stop()
    assert it.family.drawn == []


def test_a_lane_that_drains_is_busy_until_the_last_of_what_it_accepted_is_answered() -> None:
    with held("drawing") as (it, engine):

        async def main() -> None:
            tasks = [await drawing(it, engine), asyncio.create_task(engine.submit(RECIPE))]
            await asyncio.sleep(0)
            engine.drain()
            assert (engine.state, engine.busy, engine.drawing, engine.waiting) == ("draining", True, 1, 1)
            it.go.set()
            await asyncio.gather(*tasks)
            assert (engine.busy, engine.over.is_set()) == (False, False)

        asyncio.run(main())
        engine.stop()
    assert it.family.drawn == [1, 1]


def test_aborting_answers_all_and_ends_the_picture_at_its_next_step() -> None:
    with held("drawing") as (it, engine):

        async def main() -> None:
            tasks = [await drawing(it, engine), asyncio.create_task(engine.submit(RECIPE))]
            await asyncio.sleep(0)
            engine.abort()
            for each in tasks:
                with pytest.raises(NotReady, match="is stopping"):
                    await each

        asyncio.run(main())
        assert (engine.over.is_set(), engine.busy, engine.alive) == (True, False, True)
        it.go.set()
        engine.stop()
    assert (it.family.drawn, it.family.steps_run) == ([], 1)


def test_stopping_waits_for_what_is_being_published(tmp_path: Path) -> None:
    with held("publishing", volume=tmp_path) as (it, engine):
        stopping = aside(engine.stop)
        inside(stopping, Publisher.join)
        assert not it.published
        it.go.set()
        assert have_ended(stopping)
        assert it.published == [tmp_path]


def test_stopping_gives_up_what_is_not_published_in_time(tmp_path: Path) -> None:
    with held("publishing", volume=tmp_path) as (it, engine):
        engine.exit.begin(0.0)
        engine.stop()
        assert not it.published
        assert engine.state == "stopped"


def test_publishing_that_fails_is_told_in_the_log_and_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "handler.engine.publisher"), held("publishing") as (it, engine):
        it.error = VolumeFailed("The volume is full.")
        it.go.set()
        asyncio.run(engine.submit(RECIPE))
        engine.stop()
    assert "compile artifacts are not published: The volume is full." in caplog.text
    assert it.family.drawn == [1]


@pytest.mark.parametrize("publish", [True, False])
def test_publishing_can_be_switched_off(publish: bool) -> None:
    it = Held("publishing")
    it.go.set()
    engine = Engine(Settings(publish=publish), boot=it.boot)
    engine.start()
    engine.wait_booted()
    asyncio.run(engine.submit(RECIPE))
    engine.stop()
    assert it.publishes.is_set() == publish


def test_a_lane_counts_what_it_costs_from_its_start_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which nobody asked it for: its meter writes as soon as the GPU is known, and a last time when it stops."""
    monkeypatch.setattr(spend, "UNKNOWN_S", 0.01)

    def written() -> list[float]:
        return [json.loads(path.read_bytes())["dollars"] for path in tmp_path.glob("spend/*/*.json")]

    with held("booting", volume=tmp_path, gpu_price=2.0) as (it, engine):
        assert not written()
        it.go.set()
        until(written)
        [before] = written()
        until(lambda: engine.meter.state()["dollars_this_process"] > before)
        engine.stop()
        [after] = written()
    assert 0 < before < after


@pytest.mark.parametrize(
    ("error", "code"), [(StartError("broken"), 1), (SettingsError("no"), 2), (BudgetExceeded("late"), 124)]
)
def test_a_worker_that_failed_ends_its_process_whatever_its_sockets_do(
    error: StartError, code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """There is nobody else to end it: it was not told to leave, and a request may hang for ever."""
    engine = Engine(Settings(), boot=lambda *_: raises(error)())
    server, ended = Server(uvicorn.Config(lambda *_: None), engine, lambda: None), list[Any]()
    monkeypatch.setattr(shutdown.time, "sleep", lambda seconds: ended.append(seconds))
    monkeypatch.setattr(shutdown.os, "_exit", lambda code: ended.append(("exit", code)))
    engine.start()
    with pytest.raises(StartError):
        engine.wait_booted()
    with Scratch() as held_by_the_start:  # which may still go on
        server.watch()
        assert held_by_the_start.path.exists()
    assert ended == [shutdown.ANSWER_S, ("exit", code)]
    assert server.should_exit
    assert server.config.timeout_graceful_shutdown == shutdown.ANSWER_S
    assert f"kindling: {error.message}" in capfd.readouterr().err
    engine.stop()


@pytest.mark.parametrize("signals", [1, 2])
def test_who_is_told_to_leave_closes_its_sockets_and_ends_by_itself(
    signals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once told, an idle worker waits for nothing; told twice, it is gone after `ANSWER_S`, with the signal's code."""
    engine = Held("idle").start()
    server, ended = Server(uvicorn.Config(lambda *_: None), engine, lambda: None), list[Any]()
    sleeps = lambda seconds: None if threading.current_thread().daemon else ended.append(seconds)  # noqa: E731
    monkeypatch.setattr(shutdown, "time", SimpleNamespace(sleep=sleeps))
    monkeypatch.setattr(shutdown.scratch, "leave", lambda code: ended.append(("exit", code)))
    monkeypatch.setattr(Server, "_guard", lambda _: None)
    server.told = [15] * signals
    (server._drain if signals == 1 else server._abort)()
    assert ended == ([] if signals == 1 else [shutdown.ANSWER_S, ("exit", 143)])
    assert server.should_exit
    grace = server.config.timeout_graceful_shutdown  # once told, what is left of the drain
    assert grace == shutdown.ANSWER_S if signals > 1 else shutdown.ANSWER_S < (grace or 0) <= shutdown.DRAIN_S
    engine.stop()
    assert server.code == (0 if signals == 1 else 143)


def test_a_worker_that_is_told_to_leave_while_it_draws_waits_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: list[float] = []
    monkeypatch.setattr(Server, "_obey", lambda _: None)
    with held("drawing") as (it, engine):
        server = Server(uvicorn.Config(lambda *_: None), engine, lambda: None)

        def tick(seconds: float) -> None:
            ticks.append(seconds)
            it.go.set()
            threading.Event().wait(0.001)

        monkeypatch.setattr(shutdown, "time", SimpleNamespace(sleep=tick))
        monkeypatch.setattr(Server, "_guard", lambda _: None)

        async def main() -> None:
            running = await drawing(it, engine)
            await asyncio.to_thread(server._drain)
            await running

        asyncio.run(main())
        assert ticks
        assert server.should_exit
        assert engine.state == "draining"
        engine.stop()


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("state", STATES)
def test_an_exit_has_its_end_from_the_first_word_on(state: str, end: str) -> None:
    with held(state) as (it, engine):
        assert engine.exit.left_s == float("inf")
        it.go.set()
        ENDS[end](engine)
        assert 0 < engine.exit.left_s <= EXIT_S
        at = engine.exit.at
        engine.stop()
        assert engine.exit.at == at


def test_what_is_not_drawn_in_the_time_of_a_drain_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "_obey", lambda _: None)
    monkeypatch.setattr(Server, "_guard", lambda _: None)
    monkeypatch.setattr(shutdown, "DRAIN_S", 0.0)
    with held("drawing") as (it, engine):
        server = Server(uvicorn.Config(lambda *_: None), engine, lambda: None)

        async def main() -> None:
            running = await drawing(it, engine)
            await asyncio.to_thread(server._drain)
            with pytest.raises(NotReady, match="is stopping"):
                await running

        asyncio.run(main())
        assert engine.over.is_set()
        assert (server.should_exit, server.config.timeout_graceful_shutdown) == (True, shutdown.ANSWER_S)
        it.go.set()
        engine.stop()


def test_a_process_that_was_told_to_leave_is_gone_at_its_end_whatever_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "_obey", lambda _: None)
    engine, ended = Engine(Settings(), boot=lambda *_: raises(StartError("broken"))()), list[Any]()
    server = Server(uvicorn.Config(lambda *_: None), engine, lambda: None)
    monkeypatch.setattr(shutdown, "time", SimpleNamespace(sleep=ended.append))
    monkeypatch.setattr(shutdown.os, "_exit", lambda code: ended.append(("exit", code)))
    engine.exit.at = 0.0
    with Scratch() as held:  # on a disk that hangs, maybe
        server._guard()
        assert held.path.exists()
    assert ended == [0.0, ("exit", 0)]


def served(engine: Engine) -> Server:
    return Server(uvicorn.Config(lambda *_: None), engine, lambda: None)


def test_the_first_signal_drains_and_the_second_aborts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in a thread of its own, for the one that is interrupted may hold any lock; a third changes nothing."""
    acts = {"_drain": threading.Event(), "_abort": threading.Event()}
    for name, act in acts.items():
        monkeypatch.setattr(Server, name, lambda _, act=act: act.set())
    with held("idle") as (_, engine):
        server = served(engine)
        server.handle_exit(15, None)
        assert acts["_drain"].wait(30)
        assert not acts["_abort"].is_set()
        server.handle_exit(2, None)
        assert acts["_abort"].wait(30)
        server.handle_exit(15, None)
        assert (server.told, server.code) == ([15, 2, 15], 130)
        engine.stop()


def test_a_drain_waits_for_answers_that_are_being_written_and_is_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    guarded, ticks = threading.Event(), list[float]()
    monkeypatch.setattr(Server, "_obey", lambda _: None)
    monkeypatch.setattr(Server, "_guard", lambda _: guarded.set())
    with held("idle") as (_, engine):
        server = served(engine)
        answer: Any = object()
        server.server_state.tasks.add(answer)

        def tick(seconds: float) -> None:
            ticks.append(seconds)
            assert not server.should_exit
            if len(ticks) == 3:
                server.server_state.tasks.discard(answer)

        monkeypatch.setattr(shutdown, "time", SimpleNamespace(sleep=tick))
        server._drain()
        assert ticks == [shutdown.TICK_S] * 3
        assert (server.should_exit, engine.state, guarded.wait(30)) == (True, "draining", True)
        engine.stop()


def test_a_process_ends_once_its_last_lines_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(Server, "_obey", lambda _: None)
    with held("idle") as (_, engine):
        monkeypatch.setattr(shutdown.outlet, "drain", lambda: told.append("drained"))
        monkeypatch.setattr(shutdown.scratch, "leave", told.append)
        served(engine).end()
        engine.stop()
    assert told == ["drained", 0]


def test_a_process_that_ends_while_it_starts_leaves_its_files_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the start, which goes on meanwhile, would take a compiled package for damaged, and remove it for all."""
    told: list[Any] = []
    monkeypatch.setattr(Server, "_obey", lambda _: None)
    monkeypatch.setattr(shutdown.os, "_exit", told.append)
    engine = Engine(Settings(), boot=lambda *_: raises(StartError("broken"))())
    with Scratch() as held_by_the_start:
        served(engine).end()
        assert (told, held_by_the_start.path.exists()) == ([0], True)


def test_an_exit_keeps_seconds_for_what_comes_after_each_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that stands still: of 28 s, 3 are for tidying up and the last word on spend, 2 for that word alone."""
    monkeypatch.setattr("handler.core.deadline.time", SimpleNamespace(perf_counter=Seconds()))
    waited: list[float] = []
    with held("idle") as (_, engine):

        class Over(threading.Event):
            def wait(self, timeout: float | None = None) -> bool:
                waited.append(timeout or 0.0)
                return super().wait(timeout)

        engine.over = Over()
        monkeypatch.setattr(engine._publisher, "join", waited.append)
        engine.stop()
    assert waited == [25.0, 26.0]


@pytest.mark.parametrize("end", ENDS)
def test_who_asks_a_worker_that_leaves_is_refused_before_anything_is_read(end: str) -> None:
    with held("idle") as (_, engine):
        engine.require_open()
        ENDS[end](engine)
        with pytest.raises(NotReady, match="is stopping"):
            engine.require_open()
        engine.stop()


def test_who_asks_a_worker_that_failed_is_told_its_cause_before_anything_is_read() -> None:
    cause = StartError("broken", "KINDLING_MODEL", retry_s=9)
    cause.__cause__ = OSError("why")
    engine = Engine(Settings(), boot=lambda *_: raises(cause)())
    engine.start()
    with pytest.raises(StartError):
        engine.wait_booted()
    with pytest.raises(StartError) as caught:
        engine.require_open()
    told = caught.value
    assert told is not cause  # whose frames are let go of by all who hold it
    assert (told.body(), told.retry_s, told.__cause__) == (cause.body(), 9, cause.__cause__)
    engine.stop()


def test_a_lane_of_a_model_that_nobody_knows_is_none() -> None:
    with pytest.raises(SettingsError, match="KINDLING_MODEL should name one") as caught:
        Engine(Settings(model="nope"))
    assert caught.value.param == "KINDLING_MODEL"
