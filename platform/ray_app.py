"""Kindling on Ray: `serve run --app-dir platform ray_app:app models=spark,flux-schnell` serves both behind one address.

Each model is a deployment of Ray Serve's, with no replica while nobody asks for it; one more, the front, has the
address. Every KINDLING_* variable with which Ray was started on a node holds there, keys among them: through Ray go
`models` and what they are given, and nothing that is secret. KINDLING_VOLUME is a folder that all nodes see.
This file knows how Ray runs replicas; what a request means, it does not know.
"""

import asyncio
import contextlib
import contextvars
import gc
import logging
import math
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import cloudpickle, serve
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from handler import (
    GPUS,
    Api,
    Clock,
    Engine,
    Event,
    ImageRequest,
    Look,
    Lost,
    Settings,
    create_front,
    dedicated,
    draw_events,
    errors,
    replica_need,
)

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # nodes need `handler`, and not this file
ACCELERATOR = re.compile("accelerator_type:(.+)")
GIVEN = re.compile(r"handler\.core\.errors\.\w+: (.+)")  # the reason of a start that failed, in Ray's report of it
CPUS, FRONTS_CPUS = 0.8, 0.1  # of a replica: as many as there are cores find room, beside a front and its successor
LOOKED_S = 1.0  # for which a look at replicas is good
LEAVES_S = 25  # seconds for which the front goes on with jobs when it is told to stop
HELD = 10_000  # requests at the front; the models' queues say how many of them may wait


class Chosen(BaseModel):
    """A model, and how it runs: `settings` are KINDLING_* variables of its own, `gpus` None is as many as it needs.

    `autoscaling` is Ray's AutoscalingConfig, of which what is not said is as here.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    settings: dict[str, str] = {}
    gpus: float | None = Field(None, ge=0)
    autoscaling: dict[str, Any] = {}


class Arguments(BaseModel):
    """What follows `ray_app:app`: the models, of which the first draws where none is named, and the GPU of the nodes.

    The latter need not be said where such a node is up already.
    """

    model_config = ConfigDict(extra="forbid")

    models: list[Chosen]
    gpu: str = ""

    @field_validator("models", mode="before")
    @classmethod
    def _listed(cls, models: Any) -> Any:
        names = models.split(",") if isinstance(models, str) else models
        return [{"model": name.strip()} if isinstance(name, str) else name for name in names]


@serve.deployment
class Model:
    """One replica: one engine, asked by the front."""

    async def __init__(self, variables: dict[str, str]) -> None:
        """Load the model; an exception is how Ray learns that this replica cannot serve."""
        dedicated()
        settings = settled(variables).model_copy(update={"queue": HELD})  # Ray says how many it has at once
        self.engine = Engine(settings, Clock.anew(settings.cold_start_budget_s))  # Ray's processes wait for work
        self.api = Api(self.engine)
        self.engine.start()
        try:
            await asyncio.to_thread(self.engine.wait_booted)
        except errors.StartError as error:
            raise type(error)(error.message) from None
        gc.freeze()  # what a worker has now it keeps: no collection looks through it while somebody waits

    async def draw(self, request: ImageRequest, left_s: float, caller: bytes) -> AsyncIterator[Event]:
        """What becomes of `request`, as it does."""
        told = draw_events(self.api, request, left_s, caller)
        async with contextlib.aclosing(told):
            async for event in told:
                yield event

    def check_health(self) -> None:
        """A lost GPU stays lost: Ray replaces a replica that fails this."""
        if self.engine.error:
            raise self.engine.error

    async def __del__(self) -> None:
        """Ray has waited for what was accepted."""
        await asyncio.to_thread(self.engine.stop)


class Replicas:
    """The replicas of a model, as the front asks them."""

    def __init__(self, name: str, handle: DeploymentHandle) -> None:
        self._name, self._draw = name, handle.options(stream=True).draw
        self._looked = -math.inf

    async def draw(self, request: ImageRequest, left_s: float, caller: bytes) -> AsyncIterator[Event]:
        """What one of them tells. The call is nobody's child to Ray: whoever asked may go, and come back for it."""
        told = contextvars.Context().run(self._draw.remote, request, left_s, caller)
        try:
            async for event in told:
                yield event
        except (ActorDiedError, ActorUnavailableError, RequestCancelledError):
            raise Lost from None
        except BackPressureError:
            raise errors.QueueFull("Too many requests are waiting already; try again later.") from None
        except DeploymentUnavailableError:
            look = await self.look()
            raise errors.StartError(f"{self._name} cannot start: {look.failure or 'see its log'}") from None
        finally:
            told.cancel()

    async def look(self) -> Look:
        """How they are, as of a moment ago."""
        if time.monotonic() - self._looked > LOOKED_S:
            self._looked = time.monotonic()
            self._look = asyncio.ensure_future(asyncio.to_thread(self._found))
        return await asyncio.shield(self._look)

    def _found(self) -> Look:
        name = serve.get_replica_context().app_name
        found = serve.status().applications[name].deployments[self._name]
        reasons = GIVEN.findall(found.message)
        failed = "failed to start" in found.message
        return Look(found.replica_states.get("RUNNING", 0), (reasons or ["see its log"])[-1] if failed else "")


@serve.deployment(
    name="front",
    max_ongoing_requests=HELD,
    max_surge_percent=100,  # the next one is there before this one leaves
    ray_actor_options={"num_cpus": FRONTS_CPUS},
    logging_config={"enable_access_log": False},
)
@serve.ingress()
class Front:
    """The address. It is one replica, for idempotency keys, jobs and counts are its own; the work is elsewhere."""

    def __init__(self, chosen: Sequence[tuple[str, dict[str, str]]], *handles: DeploymentHandle) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s")  # lines on requests are JSON
        models = [(name, settled(own)) for name, own in chosen]
        replicas = [Replicas(name, handle) for (name, _), handle in zip(models, handles, strict=True)]
        self.served = create_front([(own, where) for (_, own), where in zip(models, replicas, strict=True)])

    def __serve_build_asgi_app__(self) -> Any:
        return self.served

    async def __del__(self) -> None:
        """Jobs go on that no open request waits for."""
        end = time.monotonic() + LEAVES_S
        while self.served.busy() and time.monotonic() < end:
            await asyncio.sleep(0.1)


def settled(variables: dict[str, str]) -> Settings:
    """The settings of this node, with these over them."""
    return Settings.from_env({**os.environ, **variables})


def app(given: Arguments) -> serve.Application:
    """All of it. A StartError says what is wrong with a model, its settings, or its GPU."""
    if not ray.is_initialized():  # `serve run` asks for this before it connects
        ray.init(namespace="serve")
    found = [_accelerator(name) for name in ray.cluster_resources()]
    gpu = _gpu(given.gpu or next(filter(None, found), ""))
    models = [_model(one, gpu, len(given.models) > 1) for one in given.models]
    if not models:
        raise errors.SettingsError("No models are named: say models=spark, for one.", "models")
    handles = [deployment.bind(own) for deployment, own in models]
    longest = max(settled(own).deadline_s for _, own in models)  # that a request may take
    front = Front.options(graceful_shutdown_timeout_s=LEAVES_S + math.ceil(longest))
    return front.bind([(deployment.name, own) for deployment, own in models], *handles)


def _accelerator(resource: str) -> str:
    found = ACCELERATOR.fullmatch(resource)
    return found[1] if found else ""


def _gpu(name: str) -> Any:
    """The row of a GPU as Ray calls it; None of none. SettingsError if it is not known here."""
    words = re.sub("0G$", "0GB", name.upper().replace("-", " "))
    row = next((row for row in GPUS.values() if row.id.upper() in (words, f"{words} 40GB")), None)
    if name and row is None:
        raise errors.SettingsError(f"{name!r} is not known here as a GPU. Known: {', '.join(GPUS)}.", "gpu")
    return row


def _model(one: Chosen, gpu: Any, shares: bool) -> tuple[serve.Deployment, dict[str, str]]:
    """The deployment of a model, and the variables that are its own. One that `shares` its GPU takes a part of it."""
    own = {"KINDLING_MODEL": one.model, **one.settings}
    settings = settled(own)
    spec = Engine(settings).spec
    need = replica_need(settings, spec, None if settings.device == "cpu" or one.gpus == 0 else gpu)
    # Never the CPU of a node with a GPU unless it is meant, nor a GPU that others were given.
    own["KINDLING_DEVICE"] = "cuda" if need.gpus else "cpu"
    # Two of one model on one GPU draw no more than one of them, and the second costs a start.
    gpus = one.gpus or (need.gpus if shares else math.ceil(need.gpus))
    return Model.options(
        name=spec.id,
        ray_actor_options={"num_cpus": CPUS, "num_gpus": gpus},
        max_ongoing_requests=4
        * need.together,  # what more comes waits at the front, for whichever replica is free first
        max_queued_requests=settings.queue,
        graceful_shutdown_timeout_s=math.ceil(settings.deadline_s),  # within which what was accepted has ended
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2,
        logging_config={"enable_access_log": False},  # the front writes one line for each request
        autoscaling_config={
            "min_replicas": 0,
            "max_replicas": 4,
            "target_ongoing_requests": 2 * need.together,  # so many are drawn while as many wait
            "upscale_delay_s": 3,
            "look_back_period_s": 10,
            "metrics_interval_s": 1,  # Ray's 10 are added to a cold start, though variables are to say it one day
            # To stay idle for as long as a cold start takes costs at most twice the optimum.
            "downscale_delay_s": settings.cold_start_budget_s,
            **one.autoscaling,
        },
    ), own
