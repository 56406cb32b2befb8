"""A new worker takes the place of an old one, behind a balancer that follows /health, while requests come all the time.

None is lost: not where the new one never becomes ready, however it fails, and not where it does and the old one leaves.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import pytest
from test_faults import ROUTE, Faulty, faulty

from balancer import Balancer
from serving import Served, serving

ASKED = {"prompt": "fine", "num_inference_steps": 1, "size": "64x64"}
CALLERS, SOME, PROBES, PATIENCE_S = 4, 5, 5, 120


class Stream:
    """Callers that ask again as soon as they are answered; `answers` has what each was told, "" for no answer."""

    def __init__(self, url: str) -> None:
        self._url, self._over = url, threading.Event()
        self.sent, self.answers = 0, list[tuple[int, str]]()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._call) for _ in range(CALLERS)]
        for thread in self._threads:
            thread.start()

    def _call(self) -> None:
        with httpx.Client(timeout=PATIENCE_S) as client:
            while not self._over.is_set():
                with self._lock:
                    self.sent += 1
                try:
                    answer = client.post(self._url + ROUTE, json=ASKED)
                    told = answer.status_code, answer.headers.get("retry-after", "")
                except httpx.HTTPError as error:
                    told = 0, repr(error)
                with self._lock:
                    self.answers.append(told)

    def end(self) -> None:
        """No more are sent; wait for the answers to those that were."""
        self._over.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    @property
    def lost(self) -> list[tuple[int, str]]:
        """What was not answered with a picture."""
        return [answer for answer in self.answers if answer[0] != 200] + [(0, "")] * (self.sent - len(self.answers))


@contextmanager
def asked(balancer: Balancer) -> Iterator[Stream]:
    stream = Stream(balancer.url)
    try:
        yield stream
    finally:
        stream.end()


def more(balancer: Balancer, worker: str) -> None:
    """`worker` has answered some more."""
    before = balancer.answered[worker]
    balancer.until(lambda: balancer.answered[worker] >= before + SOME)


@pytest.fixture(scope="module")
def stays() -> Iterator[Faulty]:
    """An old one whose place nobody takes."""
    with faulty() as server:
        yield server


@pytest.fixture
def old() -> Iterator[Faulty]:
    """One that leaves."""
    with faulty() as server:
        yield server


@contextmanager
def hangs(_: Path) -> Iterator[Faulty]:
    """While it loads, for ever."""
    with faulty(ready=False, FAULTY_BOOT="hold") as server:
        server.wait_for("^holding")
        yield server


@contextmanager
def spends(_: Path) -> Iterator[Faulty]:
    """Its budget."""
    with faulty(ready=False, FAULTY_BOOT="spend") as server:
        server.wait_for("^holding")
        yield server


@contextmanager
def lacks(volume: Path) -> Iterator[Served]:
    """Its weights."""
    with serving({"KINDLING_VOLUME": str(volume), "KINDLING_MODEL": "flux-schnell"}, ready=False) as server:
        yield server


@pytest.mark.parametrize(("fails", "code"), [(hangs, None), (spends, 124), (lacks, 1)])
def test_where_the_new_one_never_becomes_ready_the_old_one_answers_all(
    fails: Callable[[Path], AbstractContextManager[Served]], code: int | None, stays: Faulty, tmp_path: Path
) -> None:
    with Balancer() as balancer:
        balancer.add(stays.url)
        balancer.until(lambda: stays.url in balancer.inside)
        with asked(balancer) as stream, fails(tmp_path) as new:
            more(balancer, stays.url)
            balancer.add(new.url)
            balancer.until(lambda: balancer.probed[new.url] >= PROBES)
            if isinstance(new, Faulty) and code:
                new.release()
            if code:
                assert new.process.wait(PATIENCE_S) == code
            more(balancer, stays.url)
            stream.end()
    assert balancer.let_in == {stays.url}
    assert (stream.lost, balancer.answered) == ([], {stays.url: stream.sent})


def both(balancer: Balancer, old: Faulty, new: Faulty) -> None:
    """Let the new one in beside the old one, which has been asked for a while."""
    more(balancer, old.url)
    balancer.add(new.url)
    assert httpx.get(new.url + "/ping").status_code == 204
    more(balancer, old.url)
    new.release()
    balancer.until(lambda: new.url in balancer.inside)
    for each in (old, new):
        more(balancer, each.url)


def test_a_new_one_that_is_ready_takes_over_and_the_old_one_leaves(old: Faulty) -> None:
    """As platforms do it: it is sent no more, and then told to stop, while it still draws and others wait there."""
    with Balancer() as balancer, faulty(ready=False, FAULTY_BOOT="hold") as new:
        balancer.add(old.url)
        balancer.until(lambda: old.url in balancer.inside)
        with asked(balancer) as stream:
            both(balancer, old, new)
            held = old.hold()
            old.waiting(CALLERS)
            balancer.remove(old.url)
            old.process.send_signal(signal.SIGTERM)
            old.until(lambda state: state["status"] == "draining")
            old.release()
            assert held.result().status_code == 200
            assert old.ends() == 0
            more(balancer, new.url)
            stream.end()
    assert (stream.lost, balancer.answered.total()) == ([], stream.sent)


def test_one_that_is_told_to_stop_ends_each_connection_with_its_answer(old: Faulty) -> None:
    """So that a proxy does not ask again on one that is about to be closed."""
    with httpx.Client(base_url=old.url, timeout=PATIENCE_S) as client:
        assert "connection" not in client.get("/ping").headers
        held = old.hold()
        old.process.send_signal(signal.SIGTERM)
        old.until(lambda state: state["status"] == "draining")
        assert client.get("/ping").headers["connection"] == "close"
        old.release()
        answer = held.result()
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")  # though it was asked before
    assert old.ends() == 0


@pytest.mark.parametrize("impatient", [True, False])
def test_one_that_is_told_to_stop_while_it_is_still_asked_refuses_in_words(old: Faulty, impatient: bool) -> None:
    """Where nobody takes it out first: each is told when to come back, and a balancer that asks another loses none."""
    with Balancer(impatient) as balancer, faulty(ready=False, FAULTY_BOOT="hold") as new:
        balancer.add(old.url)
        balancer.until(lambda: old.url in balancer.inside)
        with asked(balancer) as stream:
            both(balancer, old, new)
            old.process.send_signal(signal.SIGTERM)
            assert old.ends() == 0
            balancer.until(lambda: balancer.inside == {new.url})
            more(balancer, new.url)
            stream.end()
    assert len(stream.answers) == stream.sent
    refused = {(status, bool(come_back)) for status, come_back in stream.lost}
    assert refused <= (set() if impatient else {(503, True)})
