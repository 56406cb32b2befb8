"""One job: what it asks for, how far it is, and what is kept of it."""

import asyncio
import json
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, get_args

from handler.api.asking import Asked
from handler.api.dialects.routes import dialect_of
from handler.api.outgoing import Target
from handler.api.reply import Reply
from handler.api.showing import OnPartial
from handler.core.deadline import Deadline
from handler.core.errors import Cancelled, DeadlineExceeded
from handler.core.recipe import Preview
from handler.core.untrusted import Malformed, parse

JOBS_ROUTE = "/v1/jobs"
State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
LIVE: tuple[State, ...] = ("queued", "running")
BAD: tuple[State, ...] = ("failed", "cancelled")
ID = re.compile("job_[0-9a-f]{32}")
GONE_S = 15.0  # after its deadline nobody works at it: a worker ends what it has, and keeps that
GONE = "The worker that had this job is gone. Send it again."
Head = dict[str, Any]
KINDS: dict[str, type | UnionType] = {  # of a head
    "id": str,
    "status": str,
    "route": str,
    "created_at": int,
    "started_at": int | None,
    "ended_at": int | None,
    "progress": dict,
    "error": dict | None,
    "until": int | None,
}


@dataclass(slots=True, eq=False)
class Job:
    """A request that was accepted as a job at `route`. It is drawn by `task`, unless it is `unwanted`.

    `done` counts steps of `of`, once that is known; `ears` hear its events, and `latest` is what they heard last.
    `writing` is held by who keeps it, so that what is older never comes last.
    """

    route: str
    asked: Asked
    deadline: Deadline
    webhook: Target | None = None
    id: str = field(default_factory=lambda: f"job_{secrets.token_hex(16)}")
    state: State = "queued"
    created: int = field(default_factory=lambda: int(time.time()))
    started: int | None = None
    ended: int | None = None
    done: int = 0
    of: int | None = None
    reply: Reply | None = None
    ears: set[OnPartial] = field(default_factory=set)
    latest: dict[str, Any] | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    task: "asyncio.Task[None] | None" = None
    unwanted: bool = False

    def begin(self) -> None:
        """It waits no longer."""
        if self.state == "queued":
            self.state, self.started = "running", int(time.time())

    def step(self, done: int, of: int, preview: Preview) -> None:
        """On the engine's thread: a step has ended."""
        self.done, self.of = done, of

    def hear(self, event: dict[str, Any]) -> None:
        """Tell whoever listens."""
        self.latest = event
        for ear in self.ears:
            ear(event)

    def end(self, reply: Reply) -> None:
        """It is over, in one way or another."""
        bad: State = "cancelled" if reply.status == Cancelled.status else "failed"
        self.reply, self.state, self.ended = reply, bad if reply.status >= 400 else "succeeded", int(time.time())

    def head(self) -> Head:
        """All of it but the answer."""
        failed = self.reply and self.reply.status >= 400
        return {
            "id": self.id,
            "object": "job",
            "status": self.state,
            "route": self.route,
            "created_at": self.created,
            "started_at": self.started,
            "ended_at": self.ended,
            "progress": {"steps": self.done, "of": self.of},
            "error": self.reply.content["error"] if self.reply and failed else None,
            "until": int(time.time() + self.deadline.left_s + GONE_S) if self.state in LIVE else None,
        }

    def answer(self) -> bytes:
        """The answer, if it has one that is good; else nothing. For a thread."""
        return self.reply.json() if self.reply and self.reply.status < 400 else b""

    def file(self) -> bytes:
        """What is kept: the head, and in the next line the answer. For a thread."""
        return json.dumps(self.head()).encode() + b"\n" + self.answer()


@dataclass(frozen=True, slots=True)
class Found:
    """A job as it was kept: its head, and the JSON of its answer, which is empty if there is none."""

    head: Head
    answer: bytes = field(default=b"", repr=False)

    @property
    def live(self) -> bool:
        """Whether it has not ended."""
        return self.head["status"] in LIVE

    def shown(self, base: str) -> Head:
        """The head for callers who find this server at `base`."""
        place = f"{base}{JOBS_ROUTE}/{self.head['id']}"
        urls = {"get": place, "cancel": f"{place}/cancel", "events": f"{place}/events"}
        return {name: value for name, value in self.head.items() if name != "until"} | {"urls": urls}

    def json(self, base: str) -> bytes:
        """All of it for them."""
        return json.dumps(self.shown(base)).encode()[:-1] + b',"result":' + (self.answer or b"null") + b"}"


def read(data: bytes, kept_s: float) -> Found | None:
    """What `Job.file` wrote, maybe of another worker; None if it is too old, or no such thing.

    Of a worker that is gone it says so.
    """
    line, _, answer = data.partition(b"\n")
    try:
        head = parse(line)
    except Malformed:
        return None
    if not _is_record(head, answer):
        return None
    live = head["status"] in LIVE
    over_at = head["until"] if live else head["ended_at"] + kept_s
    if time.time() < over_at:
        return Found(head, answer)
    return Found(_gone(head)) if live and time.time() < over_at + kept_s else None


def _is_record(head: Any, answer: bytes) -> bool:
    """Whether that is what `Job.file` writes: it may be another version's, damaged, or edited by hand."""
    if not isinstance(head, dict) or not all(isinstance(head.get(name, ...), KINDS[name]) for name in KINDS):
        return False
    status, ends = head["status"], head["until" if head["status"] in LIVE else "ended_at"]
    whole = status != "succeeded" or answer[:1] + answer[-1:] == b"{}"
    known = status in get_args(State) and ID.fullmatch(head["id"]) and dialect_of(head["route"])
    return bool(known and whole and ends is not None)


def _gone(head: Mapping[str, Any]) -> Head:
    error = DeadlineExceeded(GONE).body()["error"]
    return {**head, "status": "failed", "ended_at": head["until"], "until": None, "error": error}
