"""From a JSON payload to a JSON answer, whatever carried it: HTTP, a job queue or a test.

One place turns a `KindlingError` into an answer; anything else is logged and becomes an opaque 500.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any, TypeVar

from handler import __version__, codec
from handler.catalog import find
from handler.chips import answer
from handler.dialects import edits, native, openai
from handler.discreet import outline
from handler.errors import Internal, InvalidJson, InvalidType, KindlingError, ModelNotFound, RouteNotFound, Unsupported
from handler.faults import let_go
from handler.lane import Lane
from handler.preview import Preview
from handler.references import decoded
from handler.request import MAX_SEED, Drawn, Format, ImageRequest, Picture, Pixels, Recipe
from handler.store import Store
from handler.untrusted import Malformed, check

T = TypeVar("T")
MODELS_ROUTE = "/v1/models"
RECEIPT_ROUTE = "/v1/receipt"
DIALECTS: dict[str, ModuleType] = {
    "/v1/images/generations": openai,
    "/v1/images/edits": edits,
    "/generate": native,
}
RETIRED = {"/v1/images/variations": "OpenAI retired image variations; send the image to /v1/images/edits instead."}
OnStep = Callable[[int, int, Preview], None]
OnPartial = Callable[[dict[str, Any]], object]
NO_STORE = "response_format 'url' needs an object store, and none is configured; use 'b64_json'."
LEAN = 90  # percent: the quality of pictures that have to become smaller
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer ready to be sent: HTTP's status, a JSON object, extra headers; `fatal` asks for a new worker.

    `smaller(form)` is the body again, if it has pictures, with those as JPEG or WebP; encoding takes a moment.
    `stored()` is it again with them in the object store, if there is one that has not been asked before, by URL.
    `pictures` are those, for who counts and times them. `lasts_s` is for how long any URL in it surely works.
    """

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)
    fatal: bool = False
    smaller: Callable[[Format], dict[str, Any]] | None = None
    stored: Callable[[], Awaitable[dict[str, Any]]] | None = None
    pictures: tuple[Picture, ...] = ()
    lasts_s: float = math.inf


class Api:
    """Answers payloads with the model of one lane. `counts` gets each picture that is finished, on another thread."""

    def __init__(self, lane: Lane, counts: Callable[[Picture], object] = lambda picture: None) -> None:
        self.lane, self._counts = lane, counts
        self.store = Store.of(lane.settings)

    async def call(
        self,
        path: str,
        payload: Any = None,
        on_step: OnStep = lambda *_: None,
        on_partial: OnPartial | None = None,
        within_s: float = math.inf,
    ) -> Reply:
        """Answer one request: `payload` for the drawing routes, None to read. Never raises, but for cancellation.

        `on_step(done, of, preview)` counts denoising steps over all pictures, on the lane's thread; `preview()` makes
        a small picture of what is coming, there and then. A transport that can stream gives `on_partial`, which gets
        the events that a request's `partial_images` asks for, on the same thread. Drawing takes no longer than
        `within_s`, nor than KINDLING_DEADLINE_S.
        """
        deadline = time.perf_counter() + min(within_s, self.lane.settings.deadline_s)
        return await answered(self._route(path, payload, on_step, on_partial, deadline))

    async def _route(
        self, path: str, payload: Any, on_step: OnStep, on_partial: OnPartial | None, deadline: float
    ) -> Reply:
        if path in DIALECTS:
            return await self._draw(DIALECTS[path], payload, on_step, on_partial, deadline)
        if path == MODELS_ROUTE:
            return Reply(200, openai.models(self.lane.spec))
        if path.startswith(MODELS_ROUTE + "/"):
            name = path.removeprefix(MODELS_ROUTE + "/")
            self._require_served(name)
            return Reply(200, openai.model(name))
        if path == RECEIPT_ROUTE:
            worker = self.lane.worker
            known = (worker.receipt, worker.facts, worker.hardware.reason) if worker else (None, {}, "")
            return Reply(200, answer(self.lane.spec, *known, self.lane.ledger.compile_failure))
        raise RouteNotFound(RETIRED.get(path, f"There is no route {path}."))

    async def _draw(
        self, dialect: ModuleType, payload: Any, on_step: OnStep, on_partial: OnPartial | None, deadline: float
    ) -> Reply:
        if not isinstance(payload, dict):
            raise InvalidType("The body should be a JSON object.")
        _check(payload)
        start = time.perf_counter()
        request: ImageRequest = dialect.parse(payload)
        self._require_served(request.model)
        if on_partial is None and (asked := _streamed(request)):
            raise Unsupported(
                f"{asked} needs a stream of events: over HTTP send stream true, on RunPod set STREAM=1.", asked
            )
        if request.partial_images and on_partial:
            on_step = _showing(on_step, on_partial, dialect, request)
        pictures = await self.draw(request, on_step, deadline)
        render = partial(dialect.render, spec=self.lane.spec, seconds=time.perf_counter() - start)
        smaller = partial(_smaller, render, request, pictures)
        linked = self.store if any(picture.url for picture in pictures) else None
        untried = self.store if request.response_format != "url" else None
        return Reply(
            200,
            render(request, pictures=pictures),
            smaller=smaller,
            stored=partial(_stored, untried, render, request, pictures) if untried else None,
            pictures=tuple(pictures),
            lasts_s=linked.expires_s - (time.perf_counter() - start) if linked else math.inf,
        )

    async def draw(
        self, request: ImageRequest, on_step: OnStep = lambda *_: None, deadline: float = math.inf
    ) -> list[Picture]:
        """Draw all of a request's pictures; picture i has seed + i. Some are encoded while the next are drawn."""
        spec = self.lane.spec
        served = self.lane.settings.step_cache
        self.lane.meter.check()
        if request.response_format == "url" and not self.store:
            raise Unsupported(NO_STORE, "response_format")
        spec.check(request, served)  # before its images take time and memory
        images, mask = await asyncio.to_thread(decoded, request, spec) if request.images else ((), None)
        first = spec.recipe(request, images, served, mask)
        taken, encoding = [0] * request.n, list[asyncio.Task[Picture]]()

        def count(i: int, done: int, preview: Preview) -> None:
            taken[i] = done
            on_step(sum(taken), request.n * first.taken, preview)

        recipes = [replace(first, seed=(first.seed + i) % (MAX_SEED + 1)) for i in range(request.n)]
        wanted = [(recipe, partial(count, i)) for i, recipe in enumerate(recipes)]
        while left := wanted[len(encoding) :]:
            several = left[: self.lane.at_once(first)]
            for drawn in await self.lane.submit_all(several, deadline, admitted=bool(encoding)):
                encoding.append(asyncio.create_task(self._finish(drawn, request)))
        return list(await asyncio.gather(*encoding))

    async def _finish(self, drawn: Drawn, request: ImageRequest) -> Picture:
        picture = await asyncio.to_thread(self._encode, *drawn, request)
        return await self.store.keep(picture) if self.store and request.response_format == "url" else picture

    def _encode(self, pixels: Pixels, stages: dict[str, float], request: ImageRequest) -> Picture:
        start = time.perf_counter()
        recipe: Recipe = pixels.recipe
        worker, settings = self.lane.worker, self.lane.settings
        parameters = None
        if settings.metadata and worker:
            facts = worker.facts | ({"batch": str(pixels.batch)} if pixels.batch > 1 else {})
            parameters = codec.parameters_of(recipe, facts, __version__)
        data = codec.encode(pixels.rgb, request.output_format, request.output_compression, parameters)
        stages = {**stages, "serialize": time.perf_counter() - start}
        picture = Picture(data, request.output_format, recipe, self.lane.ledger.decision, stages)
        self._counts(picture)
        return picture

    def _require_served(self, name: str | None) -> None:
        spec = self.lane.spec
        if name is not None and find(name) is not spec:
            raise ModelNotFound(f"This worker serves {spec.id}, not '{name}'. Deploy one worker per model.", "model")


def _showing(on_step: OnStep, on_partial: OnPartial, dialect: ModuleType, request: ImageRequest) -> OnStep:
    """`on_step`, and the partial pictures that `request` asks for, spread evenly over the steps before the last."""
    shown = 0

    def step(done: int, of: int, preview: Preview) -> None:
        nonlocal shown
        on_step(done, of, preview)
        if done < of and done * (request.partial_images + 1) >= (shown + 1) * of:
            rgb = preview()
            data = codec.encode(rgb, request.output_format, request.output_compression, None)
            on_partial(dialect.partial(request, data, (rgb.shape[1], rgb.shape[0]), shown))
            shown += 1

    return step


def _check(payload: dict[str, Any]) -> None:
    """InvalidJson for what no transport should have let through: others read JSON less strictly than ours."""
    try:
        check(payload)
    except Malformed as error:
        raise InvalidJson(f"The request cannot be understood: {error}.") from None


def _streamed(request: ImageRequest) -> str:
    """Which field of `request` only a stream can honour, if any."""
    return "stream" if request.stream else "partial_images" if request.partial_images else ""


def _smaller(
    render: Callable[..., dict[str, Any]], request: ImageRequest, pictures: list[Picture], form: Format
) -> dict[str, Any]:
    quality = min(request.output_compression, LEAN)
    recoded = [
        picture if picture.url else replace(picture, data=codec.recode(picture.data, form, quality), format=form)
        for picture in pictures
    ]
    return render(request.model_copy(update={"output_format": form}), pictures=recoded)


async def _stored(
    store: Store, render: Callable[..., dict[str, Any]], request: ImageRequest, pictures: list[Picture]
) -> dict[str, Any]:
    return render(request, pictures=await asyncio.gather(*map(store.keep, pictures)))


async def answered(work: Awaitable[T]) -> T | Reply:
    """Await `work`; an error becomes its Reply."""
    try:
        return await work
    except KindlingError as error:
        let_go(error)  # whoever waited for it is on its way, with all that was asked for
        return refusal(error)
    except Exception as error:
        log.error("a request failed\n%s", outline(error))
        return refusal(Internal("Something went wrong on our side; the log has the details."))


def refusal(error: KindlingError) -> Reply:
    """An error as an answer. Where OpenAI's client would try again, it is told whether that can help."""
    headers = {}
    if error.retryable:
        headers["retry-after"] = str(error.retry_s)
    elif error.status == 429 or error.status >= 500:
        headers["x-should-retry"] = "false"
    return Reply(error.status, error.body(), headers, error.fatal)
