"""Fills a network volume on a pod that it rents, follows and deletes, whatever happens.

The pod runs `runpod_pod.py` from the workers' image on a GPU that workers get, since what `bake` compiles is for one
kind of GPU. `runpod_lease.py` sees to it that it is deleted; and it deletes itself, should this process die.
"""

import json
import secrets
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2

import runpod_pod
from runpod_api import RefusedError, ask, events
from runpod_lease import Lease, ended_at_last, there

STEPS = {  # what --fill may say: what is run for it, and the minutes that this may take
    "": ((), 10),  # only opens the volume
    "fetch": (("fetch",), 60),
    "bake": (("fetch", "bake"), 120),
    "optimize": (("fetch", "optimize", "bake"), 360),  # bakes what optimize has chosen
}
MOUNT = "/runpod-volume"  # as workers have it
PREFIX = "kindling-fill"
LINGER_S = 300  # for which a pod that has ended waits to be deleted
START_S = 1200.0  # for a machine to pull the image
SPARE_S = 600.0  # beyond the pod's own deadline
PAUSE_S = 3.0  # before the log is asked for again
STOCK = "python:3.11-slim-bookworm"  # whose user is root
WHOLE = 'import os; exec(os.environ["PROGRAM"])'


@dataclass(frozen=True, slots=True)
class Filling:
    """What a pod shall do to a volume."""

    volume: str
    data_center: str
    image: str
    gpus: tuple[str, ...]  # in order of preference
    env: Mapping[str, str]
    upto: str
    min_cuda: str
    disk_gb: int

    @property
    def steps(self) -> tuple[str, ...]:
        """Kindling's commands."""
        return STEPS[self.upto][0]

    @property
    def minutes(self) -> int:
        """How long they may take."""
        return STEPS[self.upto][1]

    @property
    def program(self) -> dict[str, Any]:
        """Image, arguments and variables: `runpod_pod.py` in the workers' image, or without steps in one of root's."""
        numbers = (str(self.minutes), str(LINGER_S))
        mounted = {"KINDLING_VOLUME": MOUNT}
        if self.steps:
            command = ("python", "-u", "platform/runpod_pod.py", *numbers, *self.steps)
            return {"image": self.image, "args": shlex.join(command), "env": {**self.env, **mounted}}
        program = Path(runpod_pod.__file__).read_text()
        return {
            "image": STOCK,
            "args": shlex.join(("python", "-u", "-c", WHOLE, *numbers)),
            "env": {"PROGRAM": program, **mounted},
        }

    def body(self, name: str, gpu: str) -> dict[str, Any]:
        """A pod as RunPod's REST API v2 takes it."""
        return {
            "name": name,
            **self.program,
            "disk": self.disk_gb,
            "ports": [],
            "gpu": {"id": gpu, "count": 1, "minCudaVersion": self.min_cuda},
            "mounts": {"network": [{"volumeId": self.volume, "path": MOUNT}]},
            "dataCenterIds": [self.data_center],
            "startSsh": False,
            "startJupyter": False,
        }


def fill(client: httpx2.Client, filling: Filling) -> None:
    """Fill the volume; returns when all is there and no pod is left. RefusedError says what went wrong."""
    require_alone(client, filling)
    outcome = on_pod(client, filling)
    if outcome.get("why") == runpod_pod.UNWRITABLE:
        print("The volume is root's: a second pod gives it to the workers' user.", file=sys.stderr)
        if (opened := on_pod(client, replace(filling, upto="")))["state"] != "done":
            raise RefusedError(f"The volume {filling.volume} could not be opened to user 1000: {opened['why']}")
        outcome = on_pod(client, filling)
    if outcome["state"] != "done":
        raise RefusedError(
            f"The volume {filling.volume} is not filled: {outcome['why']} What was fetched stays there, and the same "
            "command goes on from it. No endpoint was changed."
        )


def require_alone(client: httpx2.Client, filling: Filling) -> None:
    """Refuse to write to a volume that another pod is writing to."""
    mine = f"{PREFIX}-{filling.volume}-"
    for pod in there(client):
        if pod["name"].startswith(mine):
            raise RefusedError(
                f"The pod {pod['name']} ({pod['id']}) is filling the volume already. Wait until it is gone, or "
                "delete it in RunPod's console."
            )


def on_pod(client: httpx2.Client, filling: Filling) -> dict[str, Any]:
    """What a pod says at its end, that is rented for this and deleted whatever happens."""
    lease = Lease(f"{PREFIX}-{filling.volume}-{secrets.token_hex(4)}")
    with ended_at_last(client, lease):
        pod = rent(client, filling, lease)
        most = pod["cost"] * (filling.minutes / 60 + (LINGER_S + START_S) / 3600)
        print(
            f"rented: {lease.name} ({pod['id']}), {pod['gpu']['id']}, ${pod['cost']:.2f} an hour. It is deleted at the "
            f"end, and by itself after {filling.minutes} minutes: ${most:.2f} at most.",
            file=sys.stderr,
        )
        return followed(client, pod["id"], filling)


def rent(client: httpx2.Client, filling: Filling, lease: Lease) -> dict[str, Any]:
    """A pod on the first of the GPUs that RunPod has free where the volume is."""
    refusal = None
    for gpu in filling.gpus:
        lease.answered = False
        try:
            pod = dict(ask(client, "POST", "pods", filling.body(lease.name, gpu)))
            lease.answered = True
            return pod
        except RefusedError as error:
            lease.answered = 0 < error.status < 500
            if error.status not in (400, 403):  # no machine is free, or not for this account
                raise
            refusal = error
    tried = ", ".join(filling.gpus)
    raise RefusedError(
        f"No pod could be rented in {filling.data_center}, of {tried}. {refusal} Try later, or name others with --gpu."
    )


def followed(client: httpx2.Client, pod: str, filling: Filling) -> dict[str, Any]:
    """Print what the pod says, until it says how it ended, which is returned. RefusedError if it never does."""
    begun, started, last = time.monotonic(), False, ""
    while True:
        for event in events(client, f"pods/{pod}/logs?tail=1000", last):
            last = event["id"]
            said = told(event)
            started = started or bool(said)
            if said and said["state"] != "step":
                return said
            require_time(filling, started, time.monotonic() - begun)
        require_alive(client, pod)
        require_time(filling, started, time.monotonic() - begun)
        time.sleep(PAUSE_S)


def require_time(filling: Filling, started: bool, passed_s: float) -> None:
    """Refuse to pay longer for a pod whose program does not begin, or does not end when it should."""
    if not started and passed_s > START_S:
        raise RefusedError(
            f"The pod has begun nothing in {START_S / 60:.0f} minutes. Can RunPod pull {filling.image}, and is that "
            "the image of this version?"
        )
    if passed_s > START_S + 60 * filling.minutes + SPARE_S:
        raise RefusedError("The pod took too long.")


def told(event: Mapping[str, Any]) -> dict[str, Any]:
    """Print a line of the log; what the pod's program says by it, if it is of that."""
    line = str(event["line"])
    if event["source"] == "container" and line.startswith(runpod_pod.SAYS):
        try:
            said = dict(json.loads(line.removeprefix(runpod_pod.SAYS)))
        except ValueError:  # another's, or broken off
            said = {}
        if said.get("state") == "step":
            print(f"pod: {said.get('step')}", file=sys.stderr)
        if "state" in said:
            return said
    print(f"pod | {line}", file=sys.stderr)
    return {}


def require_alive(client: httpx2.Client, pod: str) -> None:
    """Refuse to wait for a pod that has ended; one that cannot be asked about may be well."""
    try:
        status = ask(client, "GET", f"pods/{pod}")["status"]
    except RefusedError as error:
        if error.status != 404:
            return
        status = "TERMINATED"
    if status in ("EXITED", "ERROR", "TERMINATED"):
        raise RefusedError(f"The pod ended ({status}) before it said that the volume is filled. Try again with --fill.")
