"""What a graph is judged on, and which worker would draw it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from handler.api.comfy.foretelling import Machine
from handler.api.comfy.holding import Holding
from handler.api.comfy.planning import planned, require_drawable
from handler.api.dialects.comfy import faults
from handler.api.dialects.comfy.graph import require_graph
from handler.api.dialects.comfy.judging import Judgement, judged, standing_in, wrong
from handler.api.dialects.comfy.plan import Load, Plan, Served
from handler.api.dialects.comfy.wanted import Named, Serving, named, serving, workers
from handler.catalog.spec import ModelSpec
from handler.core.settings import Settings


@dataclass(frozen=True, slots=True)
class Ground:
    """Settings, the machine, and the model that serves, which is `fixed` if somebody said so.

    `files` are the names of those on the volume by ComfyUI's folders, `load` reads an image, and raises OSError for one
    that is not there. `running`: this is a server, which cannot become another; it is at `url`.
    """

    settings: Settings
    spec: ModelSpec
    machine: Machine
    load: Load
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fixed: bool = True
    running: bool = False
    url: str = "http://127.0.0.1:8000"

    @property
    def served(self) -> Serving:
        """The worker that serves, or would."""
        told = "which this worker serves" if self.running else "as KINDLING_MODEL says"
        return Serving(self.spec, self.settings.weights, self.settings.vae, told)

    @property
    def holding(self) -> Holding:
        """What is on its volume."""
        return Holding(self.settings.volume, self.files, self.load, self.spec if self.running else None)


def weighed(graph: Mapping[str, Any], ground: Ground) -> tuple[list[Named], Judgement]:
    """The files that a graph names, and what comes of it on the worker that suits it; GraphRefused if it is no graph.

    What is not there yet is taken to be there: files, and grey images in the place of others.
    """
    require_graph(graph)
    files = named(graph)
    wished = workers(graph, files, ground.holding.look)
    thought_of = [ground.served, *wished] if ground.fixed or not wished else wished

    def admit(plan: Plan, served: Served) -> None:
        require_drawable(plan, graph, served.spec, ground.settings.step_cache)

    def made(worker: Serving) -> Served:
        return serving(worker, files, ground.files, ground.settings.max_n)

    found = judged(graph, thought_of, made, standing_in(ground.load), admit)
    for one in (one for each in wrong(found.walk).values() for one in each if one["type"] == "dependency_cycle"):
        raise faults.no(one["type"], "The graph goes round in a circle", one["details"])
    return files, found


def drawable(graph: Mapping[str, Any], ground: Ground, worker: Serving) -> Plan:
    """The plan of a graph on `worker`, with nothing but the files that are there; GraphRefused as `POST /prompt`."""
    served = Served(worker.spec, ground.files, worker.weights, worker.vae, ground.settings.max_n)
    return planned({"prompt": graph}, served, ground.load, worker.spec, ground.settings.step_cache)


def as_set(settings: Settings, worker: Serving) -> Settings:
    """`settings` of such a worker."""
    return settings.model_copy(update={"model": worker.spec.id, "weights": worker.weights, "vae": worker.vae})
