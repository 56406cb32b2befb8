"""What is kept of each request: an id in its answer, numbers in the metrics, a span, and of drawing a line in the log.

The line is JSON. Of the prompt it has the length, and a hash under a key that dies with the process: enough to see that
two were the same, never what they said.
"""

import asyncio
import hashlib
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import partial
from typing import Any

from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from handler.api.comfy.service import Comfy
from handler.api.dialects.routes import DIALECTS, dialect_of
from handler.api.jobs.service import Jobs
from handler.api.pieces import PIECE, encoded, pieces, size
from handler.api.reply import Reply, error_reply
from handler.api.workflows.service import ROUTE
from handler.core.errors import Cancelled, NotReady
from handler.core.recipe import Picture
from handler.core.request import MAX_PROMPT
from handler.engine.intake import OPEN, STOPPING
from handler.server.health import PROBES
from handler.server.metrics import Metrics
from handler.server.mounted import beside, rooted
from handler.server.record import Seen
from handler.server.refusals import Refusals
from handler.server.room import Room
from handler.server.traces import Traces

HEADER = b"x-request-id"
LAST = (b"connection", b"close")
INSTEAD = "instead"  # in the state of one whose server has answered it, with which reply
ARRIVED = "arrived"  # in the state of a request whose server is ours, which knows when its first byte came
VISIBLE = re.compile(rb"[!-~]{1,128}")
JSON = "application/json"
JOB = " (job)"  # of a route: what was accepted there has ended, after its own answer
JOBS = f"/prompt{JOB}"
WORKFLOW = f"{ROUTE}/{{name}}"  # which draws when it is posted to
LOGGED = (*DIALECTS, JOBS)
Around = Callable[[ASGIApp], ASGIApp]
log = logging.getLogger("kindling.requests")


class Observed:
    """Around a whole app, which answers by `api`. Its routes find their `Seen` in the request's state."""

    def __init__(
        self,
        app: ASGIApp,
        routes: Sequence[BaseRoute],
        metrics: Metrics,
        traces: Traces | None,
        comfy: Comfy,
        jobs: Jobs,
        room: Room,
    ) -> None:
        self.app, self._metrics, self.traces, self._jobs, self.later = app, metrics, traces, comfy, jobs
        self._room = room
        self.api = jobs.api
        self._editor = jobs.api.engine.settings.comfy_ui
        self._routes = [route for route in routes if isinstance(route, Route)]
        self._key = secrets.token_bytes(16)
        self._open: set[Seen] = set()
        self._refusals = Refusals()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        scope = beside(rooted(scope)) if self._editor else rooted(scope)
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        state = scope.setdefault("state", {})
        start = state.get(ARRIVED) or time.perf_counter()
        seen = state["seen"] = Seen(secrets.token_hex(16), self._route(scope["path"]), start)
        answer = partial(self._sent, seen, send, ARRIVED in state)
        self._open.add(seen)
        try:
            await self.app(scope, receive, answer)
        finally:
            self._open.discard(seen)
            self._give_back(seen)
            self.ended(scope, seen)

    def hurry(self) -> None:
        """Let all who wait be answered with what is there."""
        for seen in self._open:
            if seen.deadline:
                seen.deadline.hurry()
        self._jobs.hurry()
        self.later.hurry()

    def busy(self) -> bool:
        """Whether something goes on that no open request waits for."""
        return self._jobs.busy or self.later.busy

    async def _sent(self, seen: Seen, send: Send, ours: bool, message: Message) -> None:
        """An answer of a server of `ours` that leaves is the last of its connection: proxies ask again on those that
        they keep."""
        if message["type"] == "http.response.start":
            if message["status"] >= 400 and seen.route not in PROBES:
                self._give_back(seen)  # it waits for its turn, and nobody for it
                await self._refusals.turn()
            seen.status, seen.answered = seen.status or message["status"], True
            last = [LAST] if ours and self.api.engine.state not in OPEN else []
            message = {**message, "headers": [*message.get("headers", ()), (HEADER, seen.id.encode()), *last]}
        await send(message)

    def _give_back(self, seen: Seen) -> None:
        """What was kept for a request: a place in line, and room for its body."""
        seen.leave()
        self._room.leave(seen)

    def _route(self, path: str) -> str:
        return next((route.path for route in self._routes if route.path_regex.match(path)), "other")

    def ended(self, scope: Scope, seen: Seen) -> None:
        """Count what has ended, trace it and, if it drew, log it."""
        if instead := scope["state"].get(INSTEAD):
            seen.note(instead)
        end, status = time.perf_counter(), seen.status or Cancelled.status
        seconds = end - seen.start
        self._metrics.count(seen.route, status, seen.reason, seconds)
        if self.traces:
            self.traces.request(scope, seen, status, end)
        posted = scope["method"] == "POST" and dialect_of(scope["path"])  # of routes that other methods ask too
        if seen.route in LOGGED or seen.begun or posted:
            head = {"request_id": seen.id, "route": seen.route, "status": status, "error": seen.reason or None}
            log.info(
                json.dumps(head | {"seconds": round(seconds, 4)} | self._asked(seen.prompt) | _drawn(seen.pictures))
            )

    def _asked(self, prompt: object) -> dict[str, Any]:
        if not isinstance(prompt, str):
            return {}
        data = prompt[:MAX_PROMPT].encode(errors="surrogatepass")  # a longer one is not drawn
        return {
            "prompt_length": len(prompt),
            "prompt_hash": hashlib.blake2b(data, key=self._key, digest_size=8).hexdigest(),
        }


class Answering:
    """Around an app: what its server cancels, as it ends, is answered by us and not by the server."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except asyncio.CancelledError:
            if scope["type"] == "http" and not scope["state"]["seen"].answered:
                reply = error_reply(NotReady(STOPPING))
                await response(scope, reply)(scope, receive, send)
            raise


def response(scope: Scope, reply: Reply) -> Response:
    """`reply` as the answer of this request, and remembered as that."""
    seen: Seen = scope["state"]["seen"]
    seen.note(reply)
    parts = encoded(reply.content)
    if size(parts) <= PIECE:
        return Response(b"".join(pieces(parts)), reply.status, reply.headers, JSON)
    headers = reply.headers | {"content-length": str(size(parts))}
    return StreamingResponse(spread(pieces(parts)), reply.status, headers, JSON)


async def spread(parts: Iterable[bytes]) -> AsyncIterator[bytes]:
    """`parts` one by one, with room for others between them."""
    for part in parts:
        yield part
        await asyncio.sleep(0)


def request_id(scope: Scope) -> str:
    """The caller's, if it can stand in a header and in a log; else a new one."""
    given: bytes = dict(scope["headers"]).get(HEADER, b"")
    return given.decode() if VISIBLE.fullmatch(given) else secrets.token_hex(16)


def _drawn(pictures: tuple[Picture, ...]) -> dict[str, Any]:
    """What the pictures of one request have in common, the first one's seed, and seconds summed over all."""
    if not pictures:
        return {}
    recipe = pictures[0].recipe
    stages = {name: round(sum(each.stages[name] for each in pictures), 4) for name in pictures[0].stages}
    size = "{}x{}".format(*recipe.size)
    return {"n": len(pictures), "size": size, "steps": recipe.steps, "seed": recipe.seed, "stages_s": stages}
