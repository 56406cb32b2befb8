"""The Hugging Face hub on loopback: repositories, main being what was opened last, troubles, all that was asked of it.

It speaks what huggingface_hub needs to list a repository and download its files over plain HTTP (the tree, HEAD and
GET of resolve, ranges, the hub's own headers and error codes). It offers no Xet and redirects to no CDN.
"""

import hashlib
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

DEADLINE_S = 180.0
TREE = "the tree"  # the path under which a listing is asked for
MAIN = "main"  # the path under which is asked what that is
BRANCH = re.compile(r"/api/models/(?P<repository>.+)/revision/main")
ROUTE = re.compile(r"/(api/models/(?P<listed>.+)/tree|(?P<repository>.+)/resolve)/(?P<revision>[^/]+)(/(?P<file>.+))?")


@dataclass(frozen=True)
class Asked:
    """One request. `path` is a file of the repository, TREE or MAIN."""

    method: str
    repository: str
    path: str
    first_byte: int
    token: str


@dataclass(frozen=True)
class Trouble:
    """How one request goes wrong: another status, other bytes, or a cut after some bytes."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    cut: int | None = None
    reset: bool = False  # the cut is a reset, not an end


@dataclass(frozen=True)
class File:
    """A file as the hub declares it; `size` differs from its bytes only to claim what no test can send."""

    data: bytes
    lfs: bool
    size: int

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def git(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data, usedforsecurity=False).hexdigest()

    def row(self, path: str) -> dict[str, Any]:
        """Its row in the tree."""
        row: dict[str, Any] = {"type": "file", "path": path, "size": self.size, "oid": self.git}
        if self.lfs:
            row["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        return row


class Repository:
    """What a repository has at one revision."""

    def __init__(self, name: str, revision: str) -> None:
        self.name, self.revision = name, revision
        self.files: dict[str, File] = {}
        self.members: set[str] | None = None  # tokens that may download; None: everyone

    def add(self, path: str, data: bytes, size: int | None = None) -> None:
        """Put a file into the repository, by Git LFS if it is a picture or weights."""
        lfs = path.endswith((".safetensors", ".bin", ".jpeg"))
        self.files[path] = File(data, lfs, len(data) if size is None else size)

    def add_folder(self, folder: Path) -> None:
        """Put all of `folder` into the repository."""
        for file in folder.rglob("*"):
            if file.is_file():
                self.add(file.relative_to(folder).as_posix(), file.read_bytes())

    def folders(self) -> list[dict[str, Any]]:
        """Their rows in the tree."""
        paths = {parent.as_posix() for path in self.files for parent in PurePosixPath(path).parents[:-1]}
        return [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(paths)]

    def refusal(self, revision: str, name: str, token: str) -> tuple[int, str] | None:
        """The status and error code that answer a request for `name`, if it is refused."""
        if revision != self.revision:
            return 404, "RevisionNotFound"
        if name == TREE:
            return None  # a gated repository shows what it has
        if self.members is not None and token not in self.members:
            return 403 if token else 401, "GatedRepo"
        return None if name in self.files else (404, "EntryNotFound")


class Hub:
    """Use as a context: `with Hub() as hub`, then `open` repositories, `add` files to them, and `trouble`."""

    def __init__(self) -> None:
        self.repositories: list[Repository] = []
        self.asked: list[Asked] = []
        self._held = ""
        self._released = threading.Event()
        self._changed = threading.Condition()
        self._troubles: dict[tuple[str, str], list[Trouble]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Routes", (_Routes,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "Hub":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def first(self) -> Repository:
        return self.repositories[0]

    def open(self, name: str, revision: str) -> Repository:
        """Another repository, or a later revision of one, without files as yet."""
        self.repositories.append(Repository(name, revision))
        return self.repositories[-1]

    def trouble(self, method: str, path: str, *troubles: Trouble) -> None:
        """Let the next requests for `path` go wrong, one after the other."""
        self._troubles.setdefault((method, path), []).extend(troubles)

    def hold(self, path: str) -> None:
        """Let downloads of `path` begin, but not go on until `release`."""
        self._held = path
        self._released.clear()

    def release(self) -> None:
        """Let what is held go on."""
        self._released.set()

    def find(self, name: str, revision: str = "") -> Repository | None:
        """That repository at that revision; if there is none, at its last; None for another name."""
        named = [one for one in self.repositories if one.name == name]
        return next((one for one in named if one.revision == revision), named[-1] if named else None)

    def pass_by(self, path: str) -> None:
        """Return when `path` is not held."""
        assert path != self._held or self._released.wait(DEADLINE_S)

    def downloads(self, path: str = "") -> list[Asked]:
        """The GETs of `path`, or of all files."""
        return [a for a in self.asked if a.method == "GET" and a.path not in (TREE, MAIN) and path in ("", a.path)]

    def wait_for(self, path: str, times: int = 1) -> None:
        """Wait until a download of `path` has begun, so many times."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.downloads(path)) >= times, DEADLINE_S), (
                f"not seen: {self.asked}"
            )

    def note(self, asked: Asked) -> Trouble:
        """Remember a request; how it is to go."""
        with self._changed:
            self.asked.append(asked)
            self._changed.notify_all()
            waiting = self._troubles.get((asked.method, asked.path))
            return waiting.pop(0) if waiting else Trouble()


class _Routes(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes: with it, each answer takes 40 ms

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def _route(self) -> None:
        path = urlsplit(self.path).path
        if branch := BRANCH.fullmatch(path):
            return self._tell(branch["repository"])
        found = ROUTE.fullmatch(path)
        if not found:
            return self._refuse(404, "NotFound")
        asked, revision, name = found["listed"] or found["repository"], found["revision"], found["file"] or TREE
        first = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        trouble = self.hub.note(Asked(self.command, asked, name, int(first[1]) if first else 0, token))
        if trouble.status != 200:
            return self._answer(trouble.status, trouble.headers, b"")
        repository = self.hub.find(asked, revision)
        if repository is None:
            return self._refuse(404, "RepoNotFound")
        if refusal := repository.refusal(revision, name, token):
            return self._refuse(*refusal)
        if name == TREE:
            everything = "recursive=true" in urlsplit(self.path).query.lower().split("&")
            rows = [*repository.folders(), *(f.row(p) for p, f in repository.files.items())]
            rows = [row for row in rows if everything or "/" not in row["path"]]
            return self._answer(200, {}, json.dumps(rows).encode())
        if self.command == "GET":
            self.hub.pass_by(name)
        return self._send(repository, name, int(first[1]) if first else 0, trouble)

    def _tell(self, name: str) -> None:
        """Which commit main is; `body` of a trouble says another."""
        trouble, found = self.hub.note(Asked("GET", name, MAIN, 0, "")), self.hub.find(name)
        if trouble.status != 200 or found is None:
            return self._refuse(trouble.status if found else 404, "RepoNotFound" if found is None else "")
        told = {"id": name, "modelId": name, "sha": (trouble.body or found.revision.encode()).decode()}
        return self._answer(200, {}, json.dumps(told).encode())

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, {"X-Error-Code": code}, b"")

    def _send(self, repository: Repository, name: str, first: int, trouble: Trouble) -> None:
        file = repository.files[name]
        data = file.data if trouble.body is None else trouble.body
        headers = {"X-Repo-Commit": repository.revision, "ETag": f'"{file.sha256 if file.lfs else file.git}"'}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        self._answer(206 if first else 200, headers, data[first:], trouble)

    def _answer(self, status: int, headers: Mapping[str, str], data: bytes, trouble: Trouble = Trouble()) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: trouble.cut])
        if trouble.cut is not None:
            self._hang_up(trouble.reset)

    def _hang_up(self, reset: bool) -> None:
        self.close_connection = True
        if reset:  # closed at once and without lingering: the client sees a reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

    def log_message(self, *_: object) -> None:
        pass
