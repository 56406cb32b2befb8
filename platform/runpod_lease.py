"""Sees to it that a pod which was asked for is gone in the end, whatever happens.

It is found again by its name, which is this run's own, so that it is deleted even if nobody heard that it was made.
"""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from runpod_api import RefusedError, ask

AGAIN_S = (0, 0, 2, 5, 10, 20, 40)  # before each look whether the pod is gone


@dataclass(slots=True)
class Lease:
    """A pod by its name, which is this run's own; while RunPod has not answered whether there is one, it may come."""

    name: str
    answered: bool = True


class Interruption:
    """A handler of signals that interrupts once: a second one must not keep from what is done at the end."""

    def __init__(self) -> None:
        self.told = False
        self.deaf = False

    def __call__(self, *_: object) -> None:
        self.told = True
        if not self.deaf:
            self.deaf = True
            raise KeyboardInterrupt


@contextmanager
def ended_at_last(client: httpx2.Client, lease: Lease) -> Iterator[None]:
    """Deletes the pod at the end, also when the process is told to stop; but `nohup` has it stay deaf to its end."""
    interruption, stops = Interruption(), (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    heard = [number for number in stops if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interruption) for number in heard}
    try:
        try:
            yield
        finally:
            interruption.deaf = True
    finally:
        try:
            delete(client, lease)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if interruption.told:  # while it was deleted
        raise KeyboardInterrupt


def delete(client: httpx2.Client, lease: Lease) -> None:
    """Delete the pod, and look whether it is gone; says so if it cannot be done."""
    why = "it is still there"
    if not lease.answered:
        why = "RunPod has not said whether there is one"
        print(f"Looking for {sum(AGAIN_S)} s whether RunPod has rented {lease.name} after all.", file=sys.stderr)
    for pause in AGAIN_S:
        time.sleep(pause)
        try:
            mine = [pod for pod in there(client) if pod["name"] == lease.name]
            if not mine and lease.answered:
                return
            for pod in mine:
                lease.answered = True
                ask(client, "DELETE", f"pods/{pod['id']}")
                print(f"deleted: {lease.name} ({pod['id']})", file=sys.stderr)
        except RefusedError as error:
            why = str(error)
    print(
        f"The pod {lease.name} could not be deleted ({why}). Look for it in RunPod's console and delete it there, for "
        "it is paid for until it deletes itself.",
        file=sys.stderr,
    )


def there(client: httpx2.Client) -> list[dict[str, Any]]:
    """The account's pods that are not gone."""
    return [pod for pod in ask(client, "GET", "pods")["pods"] if pod["status"] != "TERMINATED"]
