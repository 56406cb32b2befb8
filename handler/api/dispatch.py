"""From a JSON payload to a JSON answer, whatever carried it: HTTP, a job queue or a test."""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

from handler.api import codec, loras, served
from handler.api.dialects import edits, native, openai
from handler.api.pieces import plain
from handler.api.recipes import recipes_of, settled
from handler.api.reply import Reply, answered
from handler.api.store import Store
from handler.core.deadline import Deadline
from handler.core.errors import InvalidJson, InvalidType, RouteNotFound, Unsupported
from handler.core.recipe import Drawn, Picture, Pixels, Preview, Recipe
from handler.core.request import Format, ImageRequest
from handler.core.untrusted import Malformed, check
from handler.core.version import __version__
from handler.engine.engine import Engine
from handler.engine.queue import OnBegin, nobody
from handler.model.hardware import peak_memory
from handler.worker.chips import answer

MODELS_ROUTE = "/v1/models"
MODEL_INFO_ROUTE = "/v1/model_info"  # SGLang's
RECEIPT_ROUTE = "/v1/receipt"
DIALECTS: dict[str, ModuleType] = {
    "/v1/images/generations": openai,
    "/v1/images/edits": edits,
    "/generate": native,
}
TOKENS = "x-prompt-tokens"
RETIRED = {"/v1/images/variations": "OpenAI retired image variations; send the image to /v1/images/edits instead."}
OnRequestStep = Callable[[int, int, Preview], None]
OnPartial = Callable[[dict[str, Any]], object]
NO_STORE = "response_format 'url' needs an object store, and none is configured; use 'b64_json'."
LEAN = 90  # percent: the quality of pictures that have to become smaller


class Api:
    """Answers payloads with the model of one engine.

    `counts` gets each picture that is encoded, on another thread, and `uploaded` the seconds of each upload.
    """

    def __init__(
        self,
        engine: Engine,
        counts: Callable[[Picture], object] = lambda picture: None,
        uploaded: Callable[[float], object] = lambda seconds: None,
    ) -> None:
        self.engine, self._counts, self._uploaded = engine, counts, uploaded
        self.store = Store.of(engine.settings)

    async def call(
        self,
        path: str,
        payload: Any = None,
        on_step: OnRequestStep = lambda *_: None,
        on_partial: OnPartial | None = None,
        deadline: Deadline | None = None,
    ) -> Reply:
        """Answer one request: `payload` for the drawing routes, None to read. Never raises, but for cancellation.

        `on_step(done, of, preview)` counts denoising steps over all pictures, on the engine's thread; `preview()` makes
        a small picture of what is coming, there and then. A transport that can stream gives `on_partial`, which gets
        the events that a request's `partial_images` asks for, on the same thread. All is done by `deadline`, which is
        KINDLING_DEADLINE_S from now if it is not said; then it is DeadlineExceeded.
        """
        deadline = deadline or Deadline.within(self.engine.settings.deadline_s)
        return await answered(self._route(path, payload, on_step, on_partial, deadline))

    async def _route(
        self, path: str, payload: Any, on_step: OnRequestStep, on_partial: OnPartial | None, deadline: Deadline
    ) -> Reply:
        if path in DIALECTS:
            return await self._draw(DIALECTS[path], payload, on_step, on_partial, deadline)
        if path == MODELS_ROUTE:
            found = await loras.listed(self.engine.settings, deadline)
            return Reply(200, openai.models(served.listed(self.engine.spec, self.engine.settings), found))
        if path.startswith(MODELS_ROUTE + "/"):
            name = path.removeprefix(MODELS_ROUTE + "/")
            served.require_name(name, self.engine.spec, self.engine.settings)
            return Reply(200, openai.model(name))
        if path == MODEL_INFO_ROUTE:
            return Reply(200, {"model_path": served.model_path(self.engine.spec), "model": self.engine.spec.id})
        if path == RECEIPT_ROUTE:
            worker = self.engine.worker
            known = (worker.receipt, worker.facts, worker.hardware.reason) if worker else (None, {}, "")
            return Reply(200, answer(self.engine.spec, *known, self.engine.ledger.compile_failure))
        raise RouteNotFound(RETIRED.get(path, f"There is no route {path:.80}."))

    async def _draw(
        self,
        dialect: ModuleType,
        payload: Any,
        on_step: OnRequestStep,
        on_partial: OnPartial | None,
        deadline: Deadline,
    ) -> Reply:
        if not isinstance(payload, dict):
            raise InvalidType("The body should be a JSON object.")
        _check(payload)
        start = time.perf_counter()
        request: ImageRequest = dialect.parse(payload)
        served.require(request, self.engine.spec, self.engine.settings, on_partial is not None)
        if request.partial_images and on_partial:
            on_step = _showing(on_step, on_partial, dialect, request)
        pictures = await self.draw(request, on_step, deadline)
        render = partial(dialect.render, spec=self.engine.spec, seconds=time.perf_counter() - start)
        smaller = partial(_smaller, render, request, pictures)
        linked = self.store if any(picture.url for picture in pictures) else None
        untried = self.store if request.response_format != "url" else None
        return Reply(
            200,
            render(request, pictures=pictures),
            {TOKENS: f"{pictures[0].tokens.read}/{pictures[0].tokens.given}"},
            smaller=smaller,
            stored=partial(_stored, untried, deadline, render, request, pictures) if untried else None,
            pictures=tuple(pictures),
            lasts_s=linked.expires_s - (time.perf_counter() - start) if linked else math.inf,
        )

    async def generate(self, request: ImageRequest) -> list[Picture]:
        """What `request` asks for, in the time that KINDLING_DEADLINE_S leaves it."""
        served.require(request, self.engine.spec, self.engine.settings, streams=False)
        return await self.draw(request, deadline=Deadline.within(self.engine.settings.deadline_s))

    def require_open(self, deadline: Deadline) -> None:
        """Raise what a request that has until `deadline` would be refused with now, whatever it asked for."""
        self.engine.meter.require_budget()
        self.engine.require_open(deadline.left_s)

    async def draw(
        self,
        request: ImageRequest,
        on_step: OnRequestStep = lambda *_: None,
        deadline: Deadline | None = None,
        on_begin: OnBegin = nobody,
        admitted: bool = False,
    ) -> list[Picture]:
        """Draw all of a request's pictures, by `deadline`; picture i has seed + i. Some are encoded while others draw.

        On the engine's thread `on_begin` hears of each. What is `admitted` is never too many, nor too late for a drain.
        """
        deadline = deadline or Deadline()
        self.engine.meter.require_budget()
        if request.response_format == "url" and not self.store:
            raise Unsupported(NO_STORE, "response_format")
        first, *_ = recipes = await self._recipes(request, deadline)
        taken, encoding = [0] * request.n, list[asyncio.Task[Picture]]()

        def count(i: int, done: int, preview: Preview) -> None:
            taken[i] = done
            on_step(sum(taken), request.n * first.taken, preview)

        wanted = [(recipe, partial(count, i)) for i, recipe in enumerate(recipes)]
        try:
            while left := wanted[len(encoding) :]:
                several = left[: self.engine.at_once(first)]
                for drawn in await self.engine.submit_all(several, deadline.at, admitted or bool(encoding), on_begin):
                    encoding.append(asyncio.create_task(self._finish(drawn, request, deadline)))
            return list(await asyncio.gather(*encoding))
        finally:
            for task in encoding:  # what failed first is told, and the others are of no use
                task.cancel()
                task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _recipes(self, request: ImageRequest, deadline: Deadline) -> list[Recipe]:
        """Those of a request's pictures; its LoRAs are looked for, and its images decoded, on other threads."""
        spec, settings = self.engine.spec, self.engine.settings
        request = settled(request, spec, settings.long_prompts)
        spec.validate(request, settings.step_cache)  # before its files take time and memory
        found = await loras.chosen(request, settings, deadline)
        embeddings = await loras.named(request, spec, settings, deadline)
        make = partial(recipes_of, request, spec, settings.step_cache, found, embeddings)
        return await deadline.hold(asyncio.to_thread(make)) if request.images else make()

    async def _finish(self, drawn: Drawn, request: ImageRequest, deadline: Deadline) -> Picture:
        picture = await deadline.hold(asyncio.to_thread(self._encode, *drawn, request))
        if self.store and request.response_format == "url":
            picture = await self.store.keep(picture, deadline)
            self._uploaded(picture.stages["upload"])
        deadline.require_time()
        return picture

    def _encode(self, pixels: Pixels, stages: dict[str, float], request: ImageRequest) -> Picture:
        start = time.perf_counter()
        recipe: Recipe = pixels.recipe
        worker, settings = self.engine.worker, self.engine.settings
        parameters = None
        if settings.metadata and worker:
            facts = worker.facts | ({"batch": str(pixels.batch)} if pixels.batch > 1 else {})
            parameters = codec.parameters_of(recipe, facts, __version__)
        data = codec.encode(pixels.rgb, request.output_format, request.output_compression, parameters)
        stages = {**stages, "serialize": time.perf_counter() - start}
        decision, tokens = self.engine.ledger.decision, pixels.tokens
        peak = peak_memory(worker.hardware.device if worker else "cpu")
        picture = Picture(data, request.output_format, recipe, decision, stages, tokens=tokens, peak_bytes=peak)
        self._counts(picture)
        return picture


def _showing(
    on_step: OnRequestStep, on_partial: OnPartial, dialect: ModuleType, request: ImageRequest
) -> OnRequestStep:
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


def _smaller(
    render: Callable[..., dict[str, Any]], request: ImageRequest, pictures: list[Picture], form: Format
) -> dict[str, Any]:
    quality = min(request.output_compression, LEAN)
    recoded = [
        picture if picture.url else replace(picture, data=codec.recode(picture.data, form, quality), format=form)
        for picture in pictures
    ]
    made: dict[str, Any] = plain(render(request.model_copy(update={"output_format": form}), pictures=recoded))
    return made


async def _stored(
    store: Store,
    deadline: Deadline,
    render: Callable[..., dict[str, Any]],
    request: ImageRequest,
    pictures: list[Picture],
) -> dict[str, Any]:
    kept = await asyncio.gather(*(store.keep(picture, deadline) for picture in pictures))
    made: dict[str, Any] = plain(render(request, pictures=kept))
    return made
