"""Several models behind one address: a request's `model` says which of them draws; the first, if it says none."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from handler.api import loras, served
from handler.api.asking import Asked
from handler.api.dialects import openai
from handler.api.dialects.routes import for_model
from handler.api.dispatch import MODELS_ROUTE, Api
from handler.api.elsewhere.events import Replicas
from handler.api.elsewhere.replicated import Gateway, Replicated
from handler.api.links import Links
from handler.api.reply import Reply
from handler.api.showing import OnPartial, OnRequestStep
from handler.api.workflows.mapping import MODEL
from handler.core.deadline import Deadline
from handler.core.errors import ModelNotFound, SettingsError
from handler.core.recipe import Picture
from handler.core.request import ImageRequest
from handler.core.settings import Settings
from handler.engine.engine import Engine
from handler.engine.queue import OnBegin, nobody


class Many(Api):
    """Answers payloads with the models that `replicas` have, each with its settings. `engine` is a Gateway."""

    def __init__(
        self,
        engine: Engine,
        counts: Callable[[Picture], object],
        uploaded: Callable[[float], object],
        links: Links | None,
        replicas: Sequence[tuple[Settings, Replicas]],
    ) -> None:
        super().__init__(engine, counts, uploaded, links)
        self._served = [Replicated(Gateway(own), counts, uploaded, links, where) for own, where in replicas]
        assert isinstance(engine, Gateway)
        engine.served = self._served
        self._named = dict[str, Replicated]()
        for api in self._served:
            for name in api.names():
                if self._named.setdefault(name.lower(), api) is not api:
                    raise SettingsError(f"Two of the models are called '{name}'; each needs names of its own.", "model")

    def names(self) -> tuple[str, ...]:
        """As `Api.names`, of all models."""
        return tuple(chain.from_iterable(api.names() for api in self._served))

    def of(self, name: str | None) -> Replicated:
        """The model of that name, whatever its case. ModelNotFound names those that there are."""
        if not name:
            return self._served[0]
        if (found := self._named.get(name.lower())) is None:
            known = ", ".join(api.engine.spec.id for api in self._served)
            told = f"'{name:.80}' is not served here, but {known}. Leave model out, or send one of those."
            raise ModelNotFound(told, "model")
        return found

    async def asked(
        self, path: str, payload: Any, deadline: Deadline, streams: bool = False, base: str | None = None
    ) -> Asked:
        """As `Api.asked`, by the model that is asked for. Workflows are the first one's."""
        name = fields.get("model") if isinstance(fields := for_model(path, payload), dict) else None
        named = isinstance(name, str) and not name.startswith(MODEL)  # of what is no text, its dialect tells
        return await Api.asked(self.of(name if named else None), path, payload, deadline, streams, base)

    async def answer(
        self,
        asked: Asked,
        on_step: OnRequestStep = lambda *_: None,
        on_partial: OnPartial | None = None,
        deadline: Deadline | None = None,
        on_begin: OnBegin = nobody,
        admitted: bool = False,
    ) -> Reply:
        """As `Api.answer`, by the model that was asked for."""
        own = self.of(asked.request.model)
        return await own.answer(asked, on_step, on_partial, deadline, on_begin, admitted)

    async def drawn(
        self, request: ImageRequest, on_step: OnRequestStep, deadline: Deadline, on_begin: OnBegin, admitted: bool
    ) -> list[Picture]:
        """As `Api.drawn`, by the model that is asked for."""
        return await self.of(request.model).drawn(request, on_step, deadline, on_begin, admitted)

    def validate(self, request: ImageRequest) -> None:
        """As `Api.validate`, by the model that is asked for."""
        self.of(request.model).validate(request)

    async def told(self, path: str, deadline: Deadline) -> Reply:
        """As `Api.told`, of all models."""
        if path == MODELS_ROUTE:
            names = chain.from_iterable(served.listed(api.engine.spec, api.engine.settings) for api in self._served)
            kept = await self.workflows.names(deadline)
            found = await loras.listed(self.engine.settings, deadline)
            return Reply(200, openai.models((*dict.fromkeys(names), *kept), found))
        name = path.removeprefix(MODELS_ROUTE + "/")
        if name != path and not name.startswith(MODEL):
            return await self.of(name).told(path, deadline)
        return await super().told(path, deadline)
