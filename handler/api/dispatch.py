"""From a JSON payload to a JSON answer, whatever carried it: HTTP, a job queue or a test."""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from handler.api import abilities, again, decoding, loras, served
from handler.api.asking import Asked, fields_of, understood
from handler.api.delivery import delivered, give_up
from handler.api.dialects import openai
from handler.api.dialects.routes import dialect_of, for_model
from handler.api.encoding import encoded
from handler.api.fetching import filled
from handler.api.links import Links
from handler.api.outgoing import Outgoing
from handler.api.recipes import recipes_of, settled
from handler.api.reply import Reply, answered
from handler.api.showing import OnPartial, OnRequestStep, Showing
from handler.api.store import Store
from handler.api.workflows.mapping import MODEL
from handler.api.workflows.service import Workflows
from handler.core.deadline import Deadline
from handler.core.errors import RouteNotFound, Unsupported
from handler.core.recipe import Drawn, Picture, Preview, Recipe
from handler.core.request import ImageRequest
from handler.engine.engine import Engine
from handler.engine.queue import OnBegin, nobody
from handler.worker.chips import answer

MODELS_ROUTE = "/v1/models"
MODEL_INFO_ROUTE = "/v1/model_info"  # SGLang's
RECEIPT_ROUTE = "/v1/receipt"
TOKENS = "x-prompt-tokens"
RETIRED = {"/v1/images/variations": "OpenAI retired image variations; send the image to /v1/images/edits instead."}
NO_STORE = "response_format 'url' needs an object store here, and KINDLING_STORE_BUCKET names none; use 'b64_json'."


class Api:
    """Answers payloads with the model of one engine.

    `counts` gets each picture of a request all of whose pictures came out, and `uploaded` the seconds of each upload.
    `links` has pictures by URL where there is no store.
    """

    def __init__(
        self,
        engine: Engine,
        counts: Callable[[Picture], object] = lambda picture: None,
        uploaded: Callable[[float], object] = lambda seconds: None,
        links: Links | None = None,
    ) -> None:
        self.engine, self._counts, self._uploaded = engine, counts, uploaded
        self.store, self.links = Store.of(engine.settings), links
        self.workflows = Workflows(engine.settings, engine.spec)
        self.fetches = Outgoing(engine.settings.fetch_hosts)

    async def call(
        self,
        path: str,
        payload: Any = None,
        on_step: OnRequestStep = lambda *_: None,
        on_partial: OnPartial | None = None,
        deadline: Deadline | None = None,
        base: str | None = None,
        alone: bool = False,
    ) -> Reply:
        """Answer one request: `payload` for the drawing routes, None to read. Never raises, but for cancellation.

        `on_step(done, of, preview)` counts denoising steps over all pictures, on the engine's thread; `preview()` makes
        a small picture of what is coming, there and then. A transport that can stream gives `on_partial`, which gets
        the events that a request asks for, on any thread. All is done by `deadline`, which is KINDLING_DEADLINE_S from
        now if it is not said; then it is DeadlineExceeded. `base` is where callers find the server that answers, if
        there is one. `alone` is whether the answer can have one picture only.
        """
        deadline = deadline or Deadline.within(self.engine.settings.deadline_s)
        if dialect_of(path):
            return await answered(self._draw(path, payload, on_step, on_partial, deadline, base, alone))
        return await answered(self.told(path, deadline))

    async def _draw(
        self,
        path: str,
        payload: Any,
        on_step: OnRequestStep,
        on_partial: OnPartial | None,
        deadline: Deadline,
        base: str | None,
        alone: bool,
    ) -> Reply:
        asked = await self.asked(path, payload, deadline, on_partial is not None, base)
        if alone and asked.call:
            asked.call.require_one()
        return await self.answer(asked, on_step, on_partial, deadline)

    async def told(self, path: str, deadline: Deadline) -> Reply:
        """The routes that only tell."""
        if path == MODELS_ROUTE:
            found = await loras.listed(self.engine.settings, deadline)
            kept = await self.workflows.names(deadline)
            return Reply(200, openai.models((*served.listed(self.engine.spec, self.engine.settings), *kept), found))
        if path.startswith(MODELS_ROUTE + "/"):
            name = path.removeprefix(MODELS_ROUTE + "/")
            workflow = name.startswith(MODEL) and name in await self.workflows.names(deadline)
            more = {} if workflow else abilities.model(name, self.engine.spec, self.engine.settings)
            return Reply(200, openai.model(name) | more)
        if path == MODEL_INFO_ROUTE:
            return Reply(200, {"model_path": served.model_path(self.engine.spec), "model": self.engine.spec.id})
        if path == RECEIPT_ROUTE:
            worker = self.engine.worker
            known = (worker.receipt, worker.facts, worker.hardware.reason) if worker else (None, {}, "")
            return Reply(200, answer(self.engine.spec, *known, self.engine.ledger.compile_failure))
        raise RouteNotFound(RETIRED.get(path, f"There is no route {path:.80}."))

    async def asked(
        self, path: str, payload: Any, deadline: Deadline, streams: bool = False, base: str | None = None
    ) -> Asked:
        """What `payload` asks of a drawing route; raises what refuses it before anything is drawn."""
        most = int(self.engine.settings.max_edit_mb * 1e6)
        dialect = dialect_of(path)
        assert dialect
        fields = await understood(lambda: fields_of(for_model(path, payload)), payload, deadline)
        names = await self.workflows.images(path, fields, deadline) if self.fetches else ()
        fields = await filled(fields, self.fetches, most, deadline, names)
        call = await self.workflows.called(path, dialect, fields, deadline)
        ask = partial(Asked.of, dialect, fields, self.engine, streams, base, call)
        asked = await understood(ask, fields, deadline)
        self._require_way(asked.request, base)
        return asked

    async def answer(
        self,
        asked: Asked,
        on_step: OnRequestStep = lambda *_: None,
        on_partial: OnPartial | None = None,
        deadline: Deadline | None = None,
        on_begin: OnBegin = nobody,
        admitted: bool = False,
    ) -> Reply:
        """Draw what was asked, as `draw` does, and make its answer."""
        start, deadline, request = time.perf_counter(), deadline or Deadline(), asked.request
        async with Showing(asked, on_step, on_partial) as showing:
            pictures, render = await self._pictures(asked, showing, deadline, on_begin, admitted)
        render = partial(render, spec=self.engine.spec, seconds=time.perf_counter() - start)
        linked = (self.store or self.links) if any(picture.url for picture in pictures) else None
        untried = self.store if request.response_format != "url" else None
        return Reply(
            200,
            render(request, pictures=pictures),
            {TOKENS: f"{pictures[0].tokens.read}/{pictures[0].tokens.given}"},
            smaller=partial(again.smaller, render, request, pictures),
            stored=partial(again.stored, untried, deadline, render, request, pictures) if untried else None,
            pictures=tuple(pictures),
            lasts_s=linked.expires_s - (time.perf_counter() - start) if linked else math.inf,
        )

    async def _pictures(
        self, asked: Asked, on_step: OnRequestStep, deadline: Deadline, on_begin: OnBegin, admitted: bool
    ) -> tuple[list[Picture], Callable[..., dict[str, Any]]]:
        """The pictures, and what renders them."""
        if not asked.call:
            found = await self.draw(asked.request, on_step, deadline, on_begin, admitted, asked.base)
            return found, asked.dialect.render

        async def draw(request: ImageRequest, on_step: OnRequestStep, until: Deadline, begun: bool) -> list[Picture]:
            return await self.draw(request, on_step, until, on_begin, admitted or begun)

        deliver = partial(self._delivered, base=asked.base)
        return await asked.call.drawn(draw, deliver, on_step, deadline, self.engine.settings.metadata)

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
        base: str | None = None,
    ) -> list[Picture]:
        """Draw all of a request's pictures, by `deadline`; picture i has seed + i. Some are encoded while others draw.

        On the engine's thread `on_begin` hears of each. What is `admitted` is never too many, nor too late for a drain.
        Only when all came out are they counted, and kept where their URLs lead.
        """
        deadline = deadline or Deadline()
        self.engine.meter.require_budget()
        self._require_way(request, base)
        pictures = await self.drawn(request, on_step, deadline, on_begin, admitted)
        found = await self._delivered(pictures, request, deadline, base)
        for picture in pictures:
            self._counts(picture)
        return found

    async def drawn(
        self, request: ImageRequest, on_step: OnRequestStep, deadline: Deadline, on_begin: OnBegin, admitted: bool
    ) -> list[Picture]:
        """The pictures, encoded, and neither counted nor kept."""
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
                    encoding.append(asyncio.create_task(self._encoded(drawn, request, deadline)))
            return await asyncio.gather(*encoding)
        finally:
            give_up(encoding)

    def names(self) -> tuple[str, ...]:
        """Every name that a request may use, whatever its case."""
        return served.names(self.engine.spec, self.engine.settings)

    def validate(self, request: ImageRequest) -> None:
        """Raise what the model refuses of it, before its files take time and memory."""
        spec, settings = self.engine.spec, self.engine.settings
        spec.validate(served.worded(settled(request, spec, settings.long_prompts), spec), settings.step_cache)

    async def _recipes(self, request: ImageRequest, deadline: Deadline) -> list[Recipe]:
        """Those of a request's pictures; its LoRAs are looked for, and its images decoded, on other threads."""
        spec, settings = self.engine.spec, self.engine.settings
        request = settled(served.worded(request, spec), spec, settings.long_prompts)
        self.validate(request)
        found = await loras.chosen(request, settings, deadline)
        embeddings = await loras.named(request, spec, settings, deadline)
        make = partial(recipes_of, request, spec, settings.step_cache, found, embeddings)
        return await decoding.apart(make, deadline) if request.images else make()

    def _require_way(self, request: ImageRequest, base: str | None) -> None:
        """Refuse a picture by URL where nobody would have it."""
        if request.response_format == "url" and not (self.store or (self.links and base)):
            raise Unsupported(NO_STORE, "response_format")

    async def _delivered(
        self, pictures: Sequence[Picture], request: ImageRequest, deadline: Deadline, base: str | None
    ) -> list[Picture]:
        found = await delivered(pictures, request, deadline, self.store, self.links, base)
        for seconds in [picture.stages["upload"] for picture in found if "upload" in picture.stages]:
            self._uploaded(seconds)
        return found

    async def _encoded(self, drawn: Drawn, request: ImageRequest, deadline: Deadline) -> Picture:
        return await deadline.hold(asyncio.to_thread(encoded, *drawn, request, self.engine))
