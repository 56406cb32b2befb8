"""From a JSON payload to a JSON answer, whatever carried it: HTTP, a job queue or a test.

One place turns a `KindlingError` into an answer; anything else is logged and becomes an opaque 500.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any

from handler import __version__, codec
from handler.catalog import find
from handler.dialects import native, openai
from handler.errors import Internal, InvalidType, KindlingError, ModelNotFound, RouteNotFound
from handler.lane import Lane
from handler.references import references
from handler.request import MAX_SEED, ImageRequest, Picture, Pixels, Recipe

MODELS_ROUTE = "/v1/models"
DIALECTS: dict[str, ModuleType] = {"/v1/images/generations": openai, "/generate": native}
OnStep = Callable[[int, int], None]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer ready to be sent: HTTP's status, a JSON object, extra headers; `fatal` asks for a new worker."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)
    fatal: bool = False


class Api:
    """Answers payloads with the model of one lane."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane

    async def call(self, path: str, payload: Any = None, on_step: OnStep = lambda done, of: None) -> Reply:
        """Answer one request: `payload` for the drawing routes, None to read. Never raises, but for cancellation.

        `on_step(done, of)` counts denoising steps over all pictures, on the lane's thread.
        """
        return await answered(self._route(path, payload, on_step))

    async def _route(self, path: str, payload: Any, on_step: OnStep) -> Reply:
        if path in DIALECTS:
            return Reply(200, await self._draw(DIALECTS[path], payload, on_step))
        if path == MODELS_ROUTE:
            return Reply(200, openai.models(self.lane.spec))
        if path.startswith(MODELS_ROUTE + "/"):
            name = path.removeprefix(MODELS_ROUTE + "/")
            self._require_served(name)
            return Reply(200, openai.model(name))
        raise RouteNotFound(f"There is no route {path}.")

    async def _draw(self, dialect: ModuleType, payload: Any, on_step: OnStep) -> dict[str, Any]:
        if not isinstance(payload, dict):
            raise InvalidType("The body should be a JSON object.")
        start = time.perf_counter()
        request: ImageRequest = dialect.parse(payload)
        self._require_served(request.model)
        pictures = await self.draw(request, on_step)
        answer: dict[str, Any] = dialect.render(request, self.lane.spec, pictures, time.perf_counter() - start)
        return answer

    async def draw(self, request: ImageRequest, on_step: OnStep = lambda done, of: None) -> list[Picture]:
        """Draw all of a request's pictures; picture i has seed + i. One is encoded while the next is drawn."""
        spec = self.lane.spec
        spec.check(request)  # before its images take time and memory
        images = await asyncio.to_thread(references, request.images) if request.images else ()
        first = spec.recipe(request, images)
        encoding = []
        for i in range(request.n):
            recipe = replace(first, seed=(first.seed + i) % (MAX_SEED + 1))
            drawn = await self.lane.submit(recipe, partial(_count, on_step, i * first.steps, request.n * first.steps))
            encoding.append(asyncio.create_task(asyncio.to_thread(self._encode, *drawn, request)))
        return list(await asyncio.gather(*encoding))

    def _encode(self, pixels: Pixels, stages: dict[str, float], request: ImageRequest) -> Picture:
        start = time.perf_counter()
        recipe: Recipe = pixels.recipe
        worker, settings = self.lane.worker, self.lane.settings
        parameters = None
        if settings.metadata and worker:
            parameters = codec.parameters_of(recipe, worker.facts, __version__)
        data = codec.encode(pixels.rgb, request.output_format, request.output_compression, parameters)
        stages = {**stages, "serialize": time.perf_counter() - start}
        return Picture(data, request.output_format, recipe, self.lane.ledger.decision, stages)

    def _require_served(self, name: str | None) -> None:
        spec = self.lane.spec
        if name is not None and find(name) is not spec:
            raise ModelNotFound(f"This worker serves {spec.id}, not '{name}'. Deploy one worker per model.", "model")


def _count(on_step: OnStep, before: int, total: int, done: int) -> None:
    on_step(before + done, total)


async def answered(work: Awaitable[Reply]) -> Reply:
    """Await `work`; an error becomes its Reply."""
    try:
        return await work
    except KindlingError as error:
        return refusal(error)
    except Exception:
        log.exception("a request failed")
        return refusal(Internal("Something went wrong on our side; the log has the details."))


def refusal(error: KindlingError) -> Reply:
    """An error as an answer. Server errors say whether trying again can help, which OpenAI's client obeys."""
    headers = {}
    if error.retryable:
        headers["retry-after"] = "5"
    elif error.status >= 500:
        headers["x-should-retry"] = "false"
    return Reply(error.status, error.body(), headers, error.fatal)
