"""What goes between a server and a worker's process: errors, and what the server's side does with one that is gone."""

import math
import pickle
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, cast

import pytest

import forked
from fakes import RECIPE, FakeFamily, raises
from handler import Clock, Settings
from handler.core.errors import DeviceLost, OutOfMemory, StartError
from handler.core.scratch import prefix
from handler.engine.child import Attendant, packed
from handler.engine.pace import Pace
from handler.engine.queue import Job, Queue
from handler.engine.remote import Remote
from handler.worker.clock import Ledger
from handler.worker.orders import Fault
from handler.worker.spawn import LOOK_S, Child, heard


class Process:
    """Of a worker that is a thread here: `kill` is all that is asked of it."""

    killed = False

    def kill(self) -> None:
        self.killed = True


@contextmanager
def hop(family: FakeFamily) -> Iterator[tuple[Remote, Process, Any]]:
    """A worker's own side in a thread, the server's, and the end of the line that the latter has."""
    (ours, far), attendant, process = Pipe(), Attendant(), Process()
    attendant.line = far
    worker = family.boot(Settings(), Clock(240))
    thread = threading.Thread(target=attendant.serve, args=[worker])
    thread.start()
    child: Any = SimpleNamespace(line=ours, lines=[ours], process=process, ended="has ended", hang_up=ours.close)
    yield Remote(child, Clock(240)), process, far
    ours.close()
    thread.join()


def test_pictures_that_failed_together_did_so_by_one_error_in_the_server_too() -> None:
    bug, memory = RuntimeError("a bug"), OutOfMemory("too large", "size")
    sent = pickle.loads(pickle.dumps(packed([bug, memory, None, bug, memory, RuntimeError("another bug")])))
    assert sent[0] is sent[3]
    assert sent[1] is sent[4]
    assert sent[2] is None
    assert isinstance(sent[5], Fault)
    assert sent[5].args != sent[0].args


def test_a_bug_in_a_run_of_several_is_one_bug() -> None:
    with hop(FakeFamily(at_step={1: raises(RuntimeError("a bug"))})) as (remote, process, _):
        first, second = remote.draw_some([RECIPE] * 2, [lambda *_: None] * 2)
    assert isinstance(first, Fault)
    assert first is second
    assert not process.killed


def test_a_preview_that_cannot_be_shown_costs_no_worker() -> None:
    def step(done: int, preview: Any) -> None:
        raise OSError("encoder error -2 when writing image file")

    with hop(FakeFamily()) as (remote, process, _):
        [outcome] = remote.draw_some([RECIPE], [step])
        assert isinstance(outcome, OSError)
        [drawn] = remote.draw_some([RECIPE], [lambda *_: None])
        assert isinstance(drawn, tuple)
    assert not process.killed


def test_a_worker_that_is_gone_while_a_preview_is_wanted_is_lost() -> None:
    with hop(FakeFamily()) as (remote, process, far):

        def step(done: int, preview: Any) -> None:
            far.close()
            preview()

        [outcome] = remote.draw_some([RECIPE], [step])
    assert isinstance(outcome, DeviceLost)
    assert process.killed


def test_a_process_that_cannot_be_ended_is_waited_for_by_nobody() -> None:
    """As one that is stuck in a driver: its end of the line stays open."""
    ours, far = Pipe()
    child: Any = SimpleNamespace(line=ours, process=Process(), ended="has ended")
    child.hang_up = partial(Child.hang_up, child)
    remote, outcomes = Remote(child, Clock(240)), list[Any]()
    drawing = threading.Thread(target=lambda: outcomes.extend(remote.draw_some([RECIPE], [lambda *_: None])))
    drawing.start()
    far.recv()  # it has the picture, and never says another word
    remote.kill()
    drawing.join(60)
    assert isinstance(outcomes[0], DeviceLost)
    far.close()


def test_a_device_that_never_answers_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handler.engine.remote.ASK_S", 0.0)
    monkeypatch.setattr("handler.engine.remote.AGAIN_S", 0.0)
    ours, far = Pipe()
    remote = Remote(cast(Any, SimpleNamespace(lines=[None, ours])), Clock(240))
    assert [remote.readings() for _ in range(3)] == [{}] * 3
    far.recv()
    assert not far.poll()
    far.send({"host_peak": 1.0})  # too late
    assert remote.readings() == {}
    far.recv()
    far.send({"host_peak": 2.0})
    far.close()
    assert remote.readings() == {}


def test_what_comes_late_of_a_start_that_was_stopped_is_not_told() -> None:
    clock = Clock(240)
    clock.finish("stopped", "told to stop")
    clock.follow(Ledger(phase="warm"))
    assert (clock.ledger.outcome, clock.ledger.phase) == ("stopped", "start")


def test_a_process_that_is_not_to_start_ends_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    child = Child("handler.engine.child", ["0"], {}, lines=2)
    child.hang_up()
    assert child.process.wait(60) == 0
    child.close()
    assert "Traceback" not in capfd.readouterr().err


def test_what_a_process_left_in_the_folder_for_temporary_files_is_removed_after_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    child = Child("handler.engine.child", ["0"], {}, lines=2)
    (tmp_path / f"{prefix()}left").mkdir()
    child.process.kill()
    child.close()
    assert not [*tmp_path.iterdir()]


def test_a_process_that_has_begun_nothing_yet_begins_nothing_more_once_it_is_told_to_stop(tmp_path: Path) -> None:
    """Else its start would be found recorded as one that was killed. Of its files none goes, for it may be at them."""
    code = (
        "import sys, tempfile; from handler.core.scratch import Scratch; from handler.engine.child import Attendant\n"
        "tempfile.tempdir = sys.argv[1]; held = Scratch(); Attendant().end(); print('it goes on')"
    )
    done = forked.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, len([*tmp_path.iterdir()])) == (0, "", 1)


def test_a_workers_process_gets_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KINDLING_API_KEYS", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "nobody-sees-this")
    monkeypatch.setenv("KINDLING_VOLUME_KEY", "by-which-it-reads-the-volume")
    child = Child("handler.engine.child", ["0"], {"CUDA_VISIBLE_DEVICES": "3"}, lines=2)
    told = Path(f"/proc/{child.process.pid}/environ").read_bytes()
    child.close()
    assert b"nobody-sees-this" not in told
    assert b"KINDLING_VOLUME_KEY=" in told
    assert b"CUDA_VISIBLE_DEVICES=3" in told


def sockets() -> set[str]:
    """This process's."""
    links = [path.readlink().name for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return {link for link in links if link.startswith("socket:")}


def test_a_start_that_fails_leaves_neither_process_nor_line(tmp_path: Path) -> None:
    before, begun = sockets(), list[Remote]()
    with pytest.raises(StartError) as caught:
        Remote.boot(0, begun.append, Settings(volume=tmp_path, vae="none"), Clock(240))
    assert "none" in caught.value.message
    assert sockets() <= before
    assert begun[0]._child.process.returncode is not None


def test_alike_pictures_are_shared_by_all_who_are_idle() -> None:
    """However many each could draw at once."""
    queue, taken = Queue(9, math.inf), SimpleQueue[int]()
    takers = [threading.Thread(target=lambda: taken.put(len(queue.take(lambda _: 8)))) for _ in range(2)]
    for taker in takers:
        taker.start()
    while queue._takers < 2:
        assert all(taker.is_alive() for taker in takers)
    queue.join([Job(RECIPE, lambda *_: None, 1.0, math.inf, lambda _: None) for _ in range(5)], Pace(), admitted=True)
    for taker in takers:
        taker.join()
    assert sorted([taken.get(), taken.get()]) == [2, 3]
    queue.join([Job(RECIPE, lambda *_: None, 1.0, math.inf, lambda _: None) for _ in range(5)], Pace(), admitted=True)
    assert len(queue.take(lambda _: 4)) == 4


@pytest.mark.parametrize(("comes", "looks"), [(3, 3), (9, 5)])
def test_who_was_frozen_listens_for_as_long_as_it_ran(comes: int, looks: int) -> None:
    """However long a look took on the wall, it is one second of the five: whoever answers was frozen too."""
    asked: list[float] = []

    def poll(seconds: float) -> bool:
        asked.append(seconds)
        return len(asked) == comes

    assert heard(cast(Any, SimpleNamespace(poll=poll)), 5 * LOOK_S) is (comes == looks)
    assert asked == [LOOK_S] * looks
