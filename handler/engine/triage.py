"""What the errors of drawing are to callers, and to the worker itself: a fatal one is its last."""

import logging
import re
import traceback
from collections.abc import Callable, Iterable

from handler.core.errors import Broken, DeviceLost, Exhausted, Internal, KindlingError, NumericalError, OutOfMemory
from handler.core.tracebacks import outline

REPLACED = "This worker is being replaced."
IN_A_ROW = 3  # requests that fail alike, and not one picture between them: then it is the worker
log = logging.getLogger(__name__)


class Row:
    """How many times in a row requests failed: each once, and those that failed together once."""

    def __init__(self) -> None:
        self._seen: set[object] = set()
        self._times = 0

    def add(self, requests: Iterable[object]) -> int:
        """Once more, unless one of them is known; how many times by now."""
        known = set(requests)
        self._times += not known & self._seen
        self._seen |= known
        return self._times


class Triage:
    """Tells what a worker's errors are to callers, and to the worker itself: a fatal one is its last.

    A worker that ran out of memory, or that draws nothing sound, has to prove that it can go on.
    """

    def __init__(self) -> None:
        self._full, self._alike = Row(), Row()  # out of memory; the same fault
        self._fault = ""

    def drawn(self) -> None:
        """A picture came out well."""
        self._full, self._alike = Row(), Row()

    def judge(self, error: BaseException, canary: Callable[[], None], requests: Iterable[object]) -> KindlingError:
        """The error that callers get. `canary` draws a small picture, or raises why it cannot.

        `requests` are those whose pictures failed by `error`, each always the same object: one may fail in each of its
        pictures, and that counts once.
        """
        if isinstance(error, OutOfMemory):
            return self._out_of_memory(error, canary, requests)
        if isinstance(error, NumericalError):
            often = self._again(type(error).__name__, requests)
            return (_lost(canary, Broken(f"{error.message} {REPLACED}")) if often else None) or error
        if isinstance(error, KindlingError):
            if isinstance(error, DeviceLost) and error.__cause__:
                log.error("the GPU failed\n%s", outline(error.__cause__))
            return error
        log.error("the worker failed on a request\n%s", outline(error))
        if self._again(fault(error), requests):
            log.error("%s requests in a row failed by the same fault", IN_A_ROW)
            return Broken(f"The worker fails on every request; see its log. {REPLACED}")
        return Internal("The worker failed on this request; see its log.")

    def _again(self, fault: str, requests: Iterable[object]) -> bool:
        """Whether `fault` came often enough, with not one picture between, to be the worker's."""
        if fault != self._fault:
            self._fault, self._alike = fault, Row()
        return self._alike.add(requests) >= IN_A_ROW

    def _out_of_memory(
        self, error: OutOfMemory, canary: Callable[[], None], requests: Iterable[object]
    ) -> KindlingError:
        exhausted = Exhausted(f"{error.message} {REPLACED}", error.param)
        if self._full.add(requests) < IN_A_ROW:
            return _lost(canary, exhausted) or error
        log.error("%s requests in a row ran out of memory", IN_A_ROW)
        return exhausted


def _lost(canary: Callable[[], None], fatal: KindlingError) -> KindlingError | None:
    """`fatal`, or that the GPU is lost, if not even `canary` can draw."""
    try:
        canary()
    except Exception as error:
        log.error("the worker cannot draw even a small picture now\n%s", outline(error))
        return error if isinstance(error, DeviceLost) else fatal
    return None


def fault(error: BaseException) -> str:
    """What makes two errors the same fault: their kind, where they were raised, and what they say but for numbers."""
    places = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    return f"{type(error).__name__} {places[-1:]} {re.sub('[0-9]+', '', str(error))}"
