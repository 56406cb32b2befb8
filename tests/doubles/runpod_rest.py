"""RunPod's REST API v2 on loopback: keeps what it is given, refuses what its OpenAPI does, and runs pods as processes.

A pod is a process of this repository with the pod's variables, RunPod's own and a folder for its network volume. As at
RunPod one that ends is started again; its lines are a stream of events; and it may end itself, with a key of its own.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

ROOT = Path(__file__).parents[2]
DEADLINE_S = 120.0
KEY = "key"
SECRET = re.compile(r"\{\{ RUNPOD_SECRET_(\w+) \}\}")
Version = Annotated[str, Field(pattern=r"^\d+\.\d+$")]
Name = Annotated[str, Field(min_length=1)]


class Shape(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Container(Shape):
    image: str | None = None
    args: str | None = None
    disk: int | None = Field(None, ge=1)
    env: dict[str, str] | None = None
    ports: list[str] | None = None
    registry: str | None = None


class Template(Container):
    name: Name
    serverless: bool = False
    startSsh: bool = True
    startJupyter: bool = True


class Network(Shape):
    volumeId: str
    path: str


class Mounts(Shape):
    network: list[Network] = Field(max_length=1)


class PodGpu(Shape):
    id: str
    count: int = Field(1, ge=1)
    minCudaVersion: Version | None = None


class NewPod(Container):
    name: Name
    image: str
    gpu: PodGpu
    mounts: Mounts
    dataCenterIds: list[str] = []
    startSsh: bool = False
    startJupyter: bool = False


class NewVolume(Shape):
    name: Name
    size: int = Field(ge=10, le=4096)
    dataCenter: Name


class EndpointGpu(Shape):
    pools: list[str] = Field(min_length=1)
    excludedTypes: list[str] = []
    count: int = Field(1, ge=1)
    minCudaVersion: Version | None = None


class Workers(Shape):
    min: int | None = Field(None, ge=0)
    max: int | None = Field(None, ge=0)
    idleTimeout: int | None = Field(None, ge=1, le=3600)


class ByDelay(Shape):
    type: Literal["QUEUE_DELAY"]
    queueDelay: int


class ByCount(Shape):
    type: Literal["REQUEST_COUNT"]
    requestCount: int


class Endpoint(Container):
    name: Name | None = None
    gpu: EndpointGpu | None = None
    workers: Workers | None = None
    scaling: ByDelay | ByCount | None = None
    flashboot: Literal["OFF", "FLASHBOOT", "PRIORITY_FLASHBOOT"] | None = None
    timeout: int | None = None
    networkVolumes: list[str] | None = None
    dataCenterIds: list[str] | None = None
    templateId: str | None = None


class NewEndpoint(Endpoint):
    name: Name
    type: Literal["QUEUE", "LOAD_BALANCER"]
    scaling: ByDelay | ByCount


KINDS = {  # path -> the name of its rows, what POST takes, and PATCH
    "templates": ("templates", Template, Template),
    "serverless": ("endpoints", NewEndpoint, Endpoint),
    "network-volumes": ("networkVolumes", NewVolume, None),
    "pods": ("pods", NewPod, None),
}


class Pod:
    """A pod's container: started again whenever it ends, until the pod is deleted."""

    def __init__(self, command: list[str], environment: Mapping[str, str], user: int | None) -> None:
        self.lines: list[str] = []
        self.changed = threading.Condition()
        self.deleted = False
        self.restarts = -1
        self._start = {"cwd": ROOT, "env": environment, "user": user, "group": user, "start_new_session": True}
        self._start |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self._start |= {} if user is None else {"extra_groups": []}
        self._command = command
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._live)
        self._thread.start()

    def _live(self) -> None:
        while True:
            with self.changed:
                if self.deleted:
                    return
                self.restarts += 1
                self._process = subprocess.Popen(self._command, **self._start)  # type: ignore[call-overload]
            with self._process as process:
                for line in process.stdout or ():
                    with self.changed:
                        self.lines.append(line.rstrip("\n"))
                        self.changed.notify_all()

    def delete(self) -> None:
        with self.changed:
            self.deleted = True
            assert self._process
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            self.changed.notify_all()
        self._thread.join()

    def wait(self) -> None:
        """Until it is deleted."""
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def told(self, after: int) -> Iterator[tuple[int, str]]:
        """The lines after the one of this number, with theirs, until the pod is deleted."""
        while True:
            with self.changed:
                while not self.deleted and len(self.lines) <= after:
                    self.changed.wait()
                new = list(enumerate(self.lines[after:], after + 1))
                if not new:
                    return
            yield from new
            after = new[-1][0]


class Rest:
    """The API, with one account whose key is KEY, as a context. It refuses all with `refusal` if that is set."""

    def __init__(self, folder: Path) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind, _, _ in KINDS.values()}
        self.rows["networkVolumes"].append(self.volume("vol1", "weights", "EU-RO-1", 100))
        self.folder = folder  # with a folder for each volume
        self.pods: dict[str, Pod] = {}
        self.burst = 10**9  # events of a stream before it is cut
        self.refuses_log: Callable[[int], bool] = lambda after: False  # after that event
        self.full: set[str] = set()  # GPUs of which no machine is free
        self.secrets: dict[str, str] = {}
        self.variables: dict[str, str] = {}  # of this machine, in every pod
        self.python = sys.executable
        self.users: dict[str, int] = {}  # of images; else this process's
        self.seen: list[tuple[str, str]] = []
        self.bodies: list[Any] = []
        self.keys: set[str] = set()
        self.refusal: tuple[int, Any] | None = None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Routes", (_Routes,), {"rest": self}))
        self.base = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))

    @staticmethod
    def volume(identity: str, name: str, place: str, size: int) -> dict[str, Any]:
        return {"id": identity, "name": name, "dataCenter": place, "size": size, "type": "STANDARD"}

    def __enter__(self) -> "Rest":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for identity in list(self.pods):
            self.delete(identity)
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    def answer(self, method: str, path: str, body: Any, key: str) -> tuple[int, Any]:
        if path == "/graphql":
            return self.graphql(body["query"], key)
        self.seen.append((method, path))
        self.bodies.append(body and dict(body))
        if self.refusal:
            return self.refusal
        if key != f"Bearer {KEY}":
            return problem(401, "Unauthorized")
        _, _, collection, *row = path.split("/")
        kind, new, changed = KINDS[collection]
        rows = self.rows[kind]
        if method == "GET" and not row:
            return 200, {kind: rows}
        if method == "POST" and (wrong := refused(new, body)):
            return wrong
        if method == "POST":
            return self.create(collection, body)
        found = next((known for known in rows if known["id"] == row[0]), None)
        if found is None:
            return problem(404, f"{collection} not found")
        if method == "DELETE":
            self.delete(row[0])
            return 204, None
        if method == "PATCH":
            if changed and (wrong := refused(changed, body)):
                return wrong
            for name, value in body.items():
                found[name] = {**found.get(name, {}), **value} if name in ("workers", "gpu") else value
        return 200, found

    def create(self, collection: str, body: dict[str, Any]) -> tuple[int, Any]:
        kind = KINDS[collection][0]
        row = {**body, "id": f"{kind}-{len(self.rows[kind])}"}
        if collection == "pods":
            mount = body["mounts"]["network"][0]
            volumes = {volume["id"]: volume for volume in self.rows["networkVolumes"]}
            if mount["volumeId"] not in volumes:
                return problem(400, "no such volume")
            if volumes[mount["volumeId"]]["dataCenter"] not in body["dataCenterIds"]:
                return problem(400, "the volume is in another data center")
            if body["gpu"]["id"] in self.full:
                return problem(400, "There are no longer any instances available.")
            row |= {"id": f"pod{len(self.pods)}", "status": "RUNNING", "cost": 0.4}
            self.pods[row["id"]] = self.start(row, mount["volumeId"])
        self.rows[kind].append(row)
        return 201, row

    def start(self, row: dict[str, Any], volume_id: str) -> Pod:
        volume = self.folder / volume_id
        volume.mkdir(exist_ok=True)
        given = {name: SECRET.sub(self._secret, text) for name, text in row["env"].items()}
        given |= {"KINDLING_VOLUME": str(volume)}  # where the mount is on this machine
        its_own = {"RUNPOD_POD_ID": row["id"], "RUNPOD_API_KEY": f"of-{row['id']}", "RUNPOD_API_BASE_URL": self.base}
        environment = {"PATH": os.environ["PATH"], "HOME": str(volume), **given, **its_own, **self.variables}
        command = [self.python, *shlex.split(row["args"])[1:]]
        return Pod(command, environment, self.users.get(row["image"]))

    def _secret(self, match: re.Match[str]) -> str:
        return self.secrets.get(match[1], match[0])

    def delete(self, identity: str) -> None:
        pod = self.pods.pop(identity)
        self.rows["pods"] = [row for row in self.rows["pods"] if row["id"] != identity]
        pod.delete()

    def graphql(self, query: str, key: str) -> tuple[int, Any]:
        """What a pod may do with the key that it has: end itself."""
        self.seen.append(("POST", "/graphql"))
        found = re.search(r'podTerminate\(input: \{ podId: "(\w+)" \}\)', query)
        if not found or found[1] not in self.pods or key != f"Bearer of-{found[1]}":
            return 200, {"errors": [{"message": "Unauthorized"}]}
        self.delete(found[1])  # before it is answered, so the pod asks no other way
        return 200, {"data": {"podTerminate": None}}


def problem(status: int, detail: str, *errors: str) -> tuple[int, Any]:
    """An error as RFC 9457 has it."""
    return status, {"title": "Refused", "status": status, "detail": detail, "errors": list(errors)}


def refused(shape: type[Shape], body: Any) -> tuple[int, Any] | None:
    """What is said of a body that breaks the contract."""
    try:
        shape.model_validate(body)
    except ValidationError as error:
        return problem(422, "invalid body", *(f"{one['loc']}: {one['msg']}" for one in error.errors()))
    return None


class _Routes(BaseHTTPRequestHandler):
    rest: Rest

    def do_GET(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"] or 0)) or "null")
        key = self.headers["authorization"]
        path = self.path.partition("?")[0]
        if path.endswith("/logs"):
            return self.stream(path.split("/")[3])
        self.rest.keys.add(key)
        status, answer = self.rest.answer(self.command, path, body, key)
        data = b"" if answer is None else answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        with suppress(OSError):  # a pod that ended itself does not hear it
            self.end_headers()
            self.wfile.write(data)

    do_POST = do_PATCH = do_DELETE = do_GET

    def stream(self, identity: str) -> None:
        """A pod's log as events."""
        pod = self.rest.pods.get(identity)
        after = int((self.headers["last-event-id"] or "/0").rpartition("/")[2])
        refused = self.rest.refuses_log(after)
        self.send_response(403 if refused else 200 if pod else 404)
        self.end_headers()
        pod = None if refused else pod
        try:
            for number, line in islice(pod.told(after), self.rest.burst) if pod else ():
                event = {"ts": "2026-11-29T08:00:00Z", "source": "container", "line": line}
                self.wfile.write(f"id: {event['ts']}/{number:012}\ndata: {json.dumps(event)}\n\n".encode())
        except OSError:  # who followed has heard enough
            pass

    def log_message(self, *_: object) -> None:
        pass
