"""The birth of a worker: when it was, and the name that tells this worker from all others. One for its cold start, its
bill and every file that it names.
"""

import os
import random
import secrets
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Self

SEED_BYTES = 48  # as much as OpenSSL's generator is seeded with


def process_age() -> float:
    """Seconds since the kernel started this process; its processor time, which is less, where /proc does not tell."""
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            born = int(stat.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
            return max(0.0, float(uptime.read().split()[0]) - born)
    except (OSError, ValueError, IndexError):
        return time.process_time()


def _identity() -> str:
    """Random, for workers that start together in equal containers have all else in common; the rest is for people."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}-{socket.gethostname()}-{secrets.token_hex(8)}"


@dataclass(frozen=True, slots=True)
class Birth:
    """`zero` is when it was, in seconds of `clock`; nobody's wall clock counts after that."""

    zero: float
    identity: str = field(default_factory=_identity)
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def of_process(cls) -> Self:
        """This process's: what platforms bill from."""
        return cls(time.monotonic() - process_age())

    @classmethod
    def anew(cls) -> Self:
        """Of a worker that begins now, in a process that is older: restored from a snapshot, it is one of many alike.

        So random numbers that a process makes of its own memory begin anew: Python's, of which ids of traces are made,
        and OpenSSL's, of which the keys of connections are.
        """
        random.seed()
        ssl.RAND_add(secrets.token_bytes(SEED_BYTES), SEED_BYTES)
        return cls(time.monotonic())

    @property
    def age(self) -> float:
        """Seconds since then."""
        return self.clock() - self.zero
