"""Ends a process in which no Python can run, because native code keeps the GIL: its last words, then its exit code.

Both are functions of the C library, called by timers of its own in threads that know nothing of Python. Each takes one
argument: `system` a shell's command that writes the words, `_exit` the exit code. Where there are no such timers, as
on macOS, there is no such end.
"""

import ctypes
import os
import threading
import time
from contextlib import suppress
from shlex import quote

EXIT_CODE = 124  # as timeout(1) has it
SAYING_S = 1.0  # for the words, before the exit
LONGEST = 64 << 10  # bytes of a command; without what would be longer
SIGEV_THREAD = 2  # of Linux's headers
LIBC = ctypes.CDLL(None, use_errno=True)


class _Event(ctypes.Structure):
    """A `struct sigevent` that calls a function."""

    _fields_ = (
        ("argument", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("rest", ctypes.c_char * 32),
    )


class _Times(ctypes.Structure):
    """A `struct itimerspec`: the interval and the time, each in seconds and nanoseconds."""

    _fields_ = (("interval", ctypes.c_long * 2), ("time", ctypes.c_long * 2))


class _Timer:
    """Calls `function` of the C library with `argument` once it is set; OSError or AttributeError if that has none."""

    def __init__(self, function: str, argument: int) -> None:
        event = _Event(argument, 0, SIGEV_THREAD, ctypes.cast(getattr(LIBC, function), ctypes.c_void_p))
        self._id = ctypes.c_void_p()
        if LIBC.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._id)) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def set(self, seconds: float) -> None:
        """Call it so many seconds from now, not when was said before."""
        times = _Times(time=(int(seconds), int(seconds % 1 * 1e9)))
        LIBC.timer_settime(self._id, 0, ctypes.byref(times), None)

    def delete(self) -> None:
        LIBC.timer_delete(self._id)


class Ending:
    """The end of this process with `EXIT_CODE`, once a time for it is `set`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._commands: dict[str, str] = {}
        self._all = ctypes.create_string_buffer(LONGEST)
        self._timers: list[_Timer] = []

    def set(self, seconds: float) -> bool:
        """End it so many seconds from now and `SAYING_S`, not when was said before; False if that cannot be had."""
        with self._lock, suppress(OSError, AttributeError):
            self._timers = self._timers or [_Timer("system", ctypes.addressof(self._all)), _Timer("_exit", EXIT_CODE)]
            for timer, later in zip(self._timers, (0.0, SAYING_S), strict=True):
                timer.set(seconds + later)
        return bool(self._timers)

    def cancel(self) -> None:
        """Let the process live."""
        with self._lock:
            while self._timers:
                self._timers.pop().delete()

    def say(self, text: str, to: str) -> None:
        """Have `text` written then, `to` some place by what a shell says for that, in the place of what was to be."""
        with self._lock:
            self._commands[to] = f"printf %s {quote(text)} {to}"
            command = os.fsencode(" & ".join(self._commands.values()))
            self._all.value = command if len(command) < LONGEST else b""
