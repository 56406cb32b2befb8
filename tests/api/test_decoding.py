"""Who sends no image waits for nobody's, and who does waits no longer than it has time."""

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest

import image_bombs as bombs
from handler.api import decoding
from handler.api.decoding import MOST, SPARE, apart, begin, perhaps
from handler.api.isolated import NICE
from handler.api.references import references
from handler.core.caller import CALLER
from handler.core.deadline import Deadline
from handler.core.errors import DeadlineExceeded, OutOfRange


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """On an event loop of its own."""

    @wraps(test)
    def on_a_loop() -> None:
        asyncio.run(test())

    return on_a_loop


class Gate:
    """Something to decode that takes until it is opened."""

    def __init__(self) -> None:
        self._open, self._here = threading.Event(), threading.Semaphore(0)

    def __call__(self) -> None:
        begin()
        self._here.release()
        self._open.wait()

    async def reached(self, times: int) -> None:
        for _ in range(times):
            await asyncio.to_thread(self._here.acquire)

    def open(self) -> None:
        self._open.set()


@contextmanager
def closed() -> Iterator[Gate]:
    gate = Gate()
    try:
        yield gate
    finally:
        gate.open()


@run
async def test_what_has_no_image_is_read_while_all_hands_are_full() -> None:
    with closed() as gate:
        slow = [asyncio.create_task(apart(gate, Deadline())) for _ in range(4 * MOST)]
        await gate.reached(MOST)
        assert await perhaps(lambda: "no image", Deadline()) == "no image"
        assert not any(task.done() for task in slow)
        gate.open()
        await asyncio.gather(*slow)


@run
async def test_what_turns_out_to_have_an_image_waits_with_the_others() -> None:
    def read() -> str:
        return str(references([bombs.png_with()])[0].rgb.shape)

    with closed() as gate:
        slow = [asyncio.create_task(apart(gate, Deadline())) for _ in range(MOST)]
        await gate.reached(MOST)
        other = asyncio.create_task(perhaps(read, Deadline()))
        await asyncio.wait({other}, timeout=0.2)
        assert not other.done()
        gate.open()
        assert await other == "(64, 64, 3)"
        await asyncio.gather(*slow)


@run
async def test_what_ran_out_of_time_leaves_its_place_to_another() -> None:
    with closed() as gate:
        late = [apart(gate, Deadline.within(0.1)) for _ in range(MOST)]
        ended = await asyncio.gather(*late, return_exceptions=True)
        assert [type(each) for each in ended] == [DeadlineExceeded] * MOST
        assert all("The images could not be read in the time" in str(each) for each in ended)
        good = [apart(partial(references, [bombs.png_with()]), Deadline()) for _ in range(2 * SPARE)]
        assert len(await asyncio.gather(*good)) == 2 * SPARE


@run
async def test_what_a_process_decodes_holds_up_no_other_image() -> None:
    endless = bombs.ENDLESS()
    slow = [asyncio.create_task(apart(partial(references, [endless]), Deadline.within(60))) for _ in range(3 * MOST)]
    good = partial(references, [bombs.png_with()])
    for _ in range(MOST):
        assert len(await apart(good, Deadline())) == 1
    with pytest.raises(OutOfRange, match="64 scans"):
        await apart(partial(references, [bombs.jpeg_of_scans(8000)]), Deadline())
    assert not all(task.done() for task in slow)
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)


@run
async def test_of_what_nobody_waits_for_no_further_image_is_begun() -> None:
    ended = threading.Event()

    with closed() as gate:

        def several() -> None:
            gate()
            try:
                begin()
            except DeadlineExceeded:
                ended.set()

        gone = asyncio.create_task(apart(several, Deadline()))
        await gate.reached(1)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
    assert await asyncio.to_thread(ended.wait, 60)


def niceness() -> int:
    """Of this thread."""
    return os.getpriority(os.PRIO_PROCESS, 0)


def begun_here() -> Iterator[tuple[str, int, int]]:
    """Of each process that this one has begun: its command, its session and its niceness."""
    for home in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            stat = (home / "stat").read_text().rpartition(") ")[2].split()
            if int(stat[1]) == os.getpid():
                yield (home / "cmdline").read_text(), int(stat[3]), int(stat[16])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a whole process is nice")
@run
async def test_all_else_goes_before_what_is_decoded() -> None:
    """A session of its own would be a group of its own, which the kernel gives as much as all of this process."""
    own = niceness()
    assert await apart(niceness, Deadline()) == min(19, own + NICE)
    assert (niceness(), await asyncio.to_thread(niceness)) == (own, own)
    endless = asyncio.create_task(apart(partial(references, [bombs.ENDLESS()]), Deadline.within(60)))
    wanted = [os.getsid(0), min(19, own + NICE)]
    while wanted not in [told for command, *told in begun_here() if "isolated.py" in command]:
        await asyncio.sleep(0)
        assert not endless.done()
    endless.cancel()
    await asyncio.gather(endless, return_exceptions=True)


@run
async def test_who_asks_is_known_there_too() -> None:
    """For prompts that come with images are kept apart by that as all others are."""

    def decode() -> bytes:
        begin()
        return CALLER.get()

    CALLER.set(b"somebody")
    assert [await way(decode, Deadline()) for way in (apart, perhaps)] == [b"somebody", b"somebody"]
    CALLER.set(b"another")
    assert await apart(decode, Deadline()) == b"another"


@run
async def test_a_refusal_is_told_from_there() -> None:
    refused = partial(references, [bombs.jpeg_of_scans(8000)])
    for way in (apart, perhaps):
        with pytest.raises(OutOfRange, match="64 scans"):
            await way(refused, Deadline())


def test_elsewhere_images_are_decoded_without_an_end() -> None:
    assert decoding.begin().left_s == float("inf")
