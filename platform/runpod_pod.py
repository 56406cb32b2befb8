"""What a pod runs to fill the network volume that it mounts: `python -u platform/runpod_pod.py 120 60 fetch bake`.

The numbers are the minutes that it may take, and the seconds that it waits to be deleted. RunPod starts a container
that ends once more, and charges for it, so this never ends: it says how it went, in lines that begin with SAYS, waits
for `runpod_fill.py` to delete the pod, and deletes it itself if nobody does. It needs nothing but Python, so that it
can run in any image: without steps it only opens the volume to the workers' user.
"""

import http.client
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

SAYS = "kindling-fill "
WORKER = 1000  # the user of the image
SECRET = re.compile(r"\{\{ *RUNPOD_SECRET_[^{}]+\}\}")  # what RunPod leaves of one that the console does not have
UNWRITABLE = "unwritable"  # by that user, and this process is no other: what only root can change
AGAIN_S = 30.0  # between two attempts to delete the pod
SECRETS = ("RUNPOD_API_KEY", "HF_TOKEN")  # for this process, and for fetch


class FailedError(Exception):
    """Why the volume is not filled, in a sentence; or UNWRITABLE."""


def say(state: str, **facts: Any) -> None:
    """One line for who follows the log."""
    print(SAYS + json.dumps({"state": state, **facts}), flush=True)


class Filling:
    """One volume, until a deadline."""

    def __init__(self, volume: Path, minutes: float) -> None:
        self.volume, self.until = volume, time.monotonic() + 60 * minutes
        self.begun = volume / f".filling-{os.environ['RUNPOD_POD_ID']}"
        self.root = os.geteuid() == 0

    def run(self, *command: str, as_worker: bool = True, secrets: bool = False) -> int:
        """The exit code of a command, as the workers' user where this process may choose."""
        kept = {name: value for name, value in os.environ.items() if secrets or name not in SECRETS}
        kept.pop("RUNPOD_API_KEY", None)
        drop: dict[str, Any] = {}
        if as_worker and self.root:
            drop = {"user": WORKER, "group": WORKER, "extra_groups": []}
            kept["HOME"] = "/home/kindling"
        try:
            left_s = self.until - time.monotonic()
            return subprocess.run(command, env=kept, timeout=left_s, **drop).returncode  # noqa: S603
        except subprocess.TimeoutExpired:
            raise FailedError(f"{' '.join(command)} was not done in the time that the pod has.") from None

    def open(self) -> None:
        """Make the volume the workers' own: new ones are root's, and so is what root wrote there."""
        if self.root and self.run("chown", "-R", f"{WORKER}:{WORKER}", str(self.volume), as_worker=False):
            self.run("chmod", "-R", "a+rwX", str(self.volume), as_worker=False)  # some volumes keep their owner
        if self.begun.exists():
            raise FailedError(
                "The container was started a second time: its first run ended, perhaps for want of memory."
            )
        if self.run(sys.executable, "-c", "import sys; open(sys.argv[1], 'x')", str(self.begun)):
            raise FailedError(UNWRITABLE)

    def step(self, name: str) -> None:
        """One of Kindling's commands."""
        say("step", step=name)
        if code := self.run(sys.executable, "-m", "handler", name, secrets=name == "fetch"):
            raise FailedError(f"{name} failed with exit code {code}; the lines above say why.")


def fill(volume: Path, minutes: float, steps: list[str]) -> None:
    """Open the volume and take all steps. FailedError says what went wrong."""
    for name, value in os.environ.items():
        if SECRET.fullmatch(value):
            raise FailedError(f"RunPod has no secret for {name}={value}: make it in the console.")
    filling = Filling(volume, minutes)
    filling.open()
    try:
        for step in steps:
            filling.step(step)
    finally:
        filling.begun.unlink(missing_ok=True)


def terminate() -> None:
    """Delete this pod with the key that RunPod gives it, as `runpodctl remove pod` does; else by the REST API."""
    base = os.environ.get("RUNPOD_API_BASE_URL", "https://api.runpod.io")
    pod = os.environ["RUNPOD_POD_ID"]
    query = json.dumps({"query": f'mutation {{ podTerminate(input: {{ podId: "{pod}" }}) }}'}).encode()
    for method, url, body in (("POST", f"{base}/graphql", query), ("DELETE", f"{base}/v2/pods/{pod}", None)):
        headers = {
            "Authorization": f"Bearer {os.environ.get('RUNPOD_API_KEY', '')}",
            "Content-Type": "application/json",
        }
        request = urllib.request.Request(url, body, headers, method=method)  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                print(f"{method} {url}: {answer.status} {answer.read(500)!r}", flush=True)
        except (OSError, http.client.HTTPException) as error:
            print(f"{method} {url}: {error}", flush=True)


def main(arguments: list[str]) -> None:
    """Fill, say how it went, and see to it that the pod goes."""
    minutes, linger_s, *steps = arguments
    try:
        fill(Path(os.environ["KINDLING_VOLUME"]), float(minutes), steps)
        say("done")
    except FailedError as error:
        say("failed", why=str(error))
    except Exception as error:
        say("failed", why=f"{type(error).__name__}: {error}.")
    time.sleep(float(linger_s))
    while True:
        terminate()
        time.sleep(AGAIN_S)


if __name__ == "__main__":
    main(sys.argv[1:])
