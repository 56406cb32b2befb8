"""RunPod's control plane on loopback: hands out jobs and stop signals, and remembers all that a worker does.

It speaks the routes that the runpod SDK speaks to (job-take, job-take-batch, job-stop, job-done, job-stream, ping)
and knows nothing about what the jobs mean.
"""

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any
from urllib.parse import parse_qs, urlsplit

from forked import Popen

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "platform" / "runpod_worker.py"
HOLD_S = 0.5  # a poll is held this long; the SDK leaves only between polls
DEADLINE_S = 180.0
HOOKS = {
    "RUNPOD_WEBHOOK_GET_JOB": "job-take/$ID",
    "RUNPOD_WEBHOOK_POST_OUTPUT": "job-done/$RUNPOD_POD_ID/$ID",
    "RUNPOD_WEBHOOK_POST_STREAM": "job-stream/$RUNPOD_POD_ID/$ID",
    "RUNPOD_WEBHOOK_PING": "ping/$RUNPOD_POD_ID",
}


def clean_environment(home: Path, **extra: str) -> dict[str, str]:
    """This process's environment without its own settings and credentials, plus `extra`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("KINDLING_", "RUNPOD_", "MODAL_"))}
    checks_off = {"RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true", "RUNPOD_SKIP_GPU_CHECK": "true"}
    here = {"KINDLING_DEVICE": "cpu", "HOME": str(home), "OMP_NUM_THREADS": "1"}
    return {**kept, **checks_off, **here, **extra}


@contextmanager
def started(command: list[str], environment: dict[str, str], log: Path) -> Iterator[Popen]:
    """A process from the repository root that writes to `log`, told to end at the end, and then made to."""
    with log.open("wb") as out:
        process = Popen([sys.executable, "-u", *command], cwd=ROOT, env=environment, stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except TimeoutExpired:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Event:
    """One call of the worker. `kind` is take, stop, progress, done, stream or ping; `body` what it sent or asked."""

    kind: str
    job: str = ""
    body: dict[str, Any] = field(default_factory=dict)
    at: float = field(default_factory=time.monotonic)


class Plane:
    """Use as a context: `with Plane() as plane`, start a worker with `plane.environment`, then `give` it jobs."""

    def __init__(self) -> None:
        self.seen: list[Event] = []
        self.refusals: dict[str, list[int]] = {}  # job -> the statuses its next results are answered with
        self._changed = threading.Condition()
        self._jobs: queue.Queue[dict[str, Any]] = queue.Queue()
        self._stops: queue.Queue[str] = queue.Queue()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Routes", (_Routes,), {"plane": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "Plane":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """What tells the SDK that it runs on RunPod, and that RunPod is here."""
        base = f"http://127.0.0.1:{self._server.server_port}/v2/endpoint"
        hooks = {name: f"{base}/{path}?gpu=none" for name, path in HOOKS.items()}
        identity = {"RUNPOD_AI_API_KEY": "unused", "RUNPOD_POD_ID": "worker", "RUNPOD_ENDPOINT_ID": "endpoint"}
        return {**hooks, **identity, "RUNPOD_PING_INTERVAL": "1000"}

    def give(self, job: str, **given: Any) -> None:
        """Queue a job with the input `given`."""
        self.give_any(job, given)

    def give_any(self, job: str, given: Any) -> None:
        """The same, though `given` is no object."""
        self._jobs.put({"id": job, "input": given})

    def give_with_timeout(self, job: str, timeout_s: float, **given: Any) -> None:
        """Queue a job that RunPod stops once it has run for `timeout_s`."""
        self._jobs.put({"id": job, "input": given, "policy": {"executionTimeout": timeout_s * 1000}})

    def stop(self, job: str) -> None:
        """Tell the worker that a job was cancelled."""
        self._stops.put(job)

    def result(self, job: str) -> dict[str, Any]:
        """Wait for a job's result."""
        return self.wait(lambda event: event.kind == "done" and event.job == job).body

    def of(self, job: str) -> list[Event]:
        """All that was seen of one job, in order."""
        return [event for event in self.seen if event.job == job]

    def wait(self, wanted: Callable[[Event], bool]) -> Event:
        """The first event that is `wanted`, now or within the deadline."""
        with self._changed:
            assert self._changed.wait_for(lambda: any(map(wanted, self.seen)), DEADLINE_S), f"not among {self._told()}"
            return next(filter(wanted, self.seen))

    def _told(self) -> list[str]:
        return [f"{event.kind} {event.job}" for event in self.seen if event.kind != "ping"]

    def note(self, event: Event) -> None:
        with self._changed:
            self.seen.append(event)
            self._changed.notify_all()

    def take(self, most: int) -> list[dict[str, Any]]:
        """The jobs that wait, at most `most`; after the hold perhaps none."""
        jobs: list[dict[str, Any]] = []
        try:
            while len(jobs) < most:
                jobs.append(self._jobs.get(timeout=0 if jobs else HOLD_S))
        except queue.Empty:
            pass
        for job in jobs:
            self.note(Event("take", job["id"], {"asked": most}))
            if "policy" in job:
                threading.Timer(job["policy"]["executionTimeout"] / 1000, self.stop, [job["id"]]).start()
        return jobs

    def stops(self) -> dict[str, Any] | None:
        """The next stop signal, or None after the hold."""
        try:
            job = self._stops.get(timeout=HOLD_S)
        except queue.Empty:
            return None
        self.note(Event("stop", job))
        return {"jobsToStop": [job]}

    def answer(self, job: str) -> int:
        """The status that a result posted for `job` is answered with."""
        waiting = self.refusals.get(job)
        return waiting.pop(0) if waiting else 200


class _Routes(BaseHTTPRequestHandler):
    plane: Plane
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        match url.path.split("/")[3]:
            case "job-take":
                self._answer(next(iter(self.plane.take(1)), None))
            case "job-take-batch":
                self._answer(self.plane.take(int(query["batch_size"])) or None)
            case "job-stop":
                self._answer(self.plane.stops())
            case "ping":
                self.plane.note(Event("ping", body=query))
                self._answer({})

    def do_POST(self) -> None:
        _, _, _, route, _, job = urlsplit(self.path).path.split("/")
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        kind = "progress" if body.get("status") == "IN_PROGRESS" else route.removeprefix("job-")
        self.plane.note(Event(kind, job, body))
        self._answer({}, self.plane.answer(job) if kind == "done" else 200)

    def _answer(self, body: Any, status: int = 200) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        self.send_response(204 if body is None else status)
        if data:
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass
