"""What Prometheus reads from one app: counters and histograms of its requests, gauges of its engine as it is right now.

No label has free text: routes, statuses, error codes, stages and phases are all there are.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from handler.core.host import host_memory
from handler.core.outlet import dropped
from handler.core.recipe import Picture
from handler.engine.engine import Engine
from handler.engine.intake import EngineState
from handler.engine.queue import Where
from handler.model.readings import readings

PREFIX = "kindling_"
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
Values = Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Gauge:
    """One number of what it is read of, or one for each value of `label`; None is not told."""

    name: str
    help: str
    label: str
    read: Callable[[Any], Values]


def _plan(engine: Engine) -> Values:
    return {engine.ledger.plan: 1} if engine.ledger.plan else {}


def _load(engine: Engine) -> Values:
    return {phase.name: phase.seconds for phase in engine.ledger.phases}


def _spend(engine: Engine) -> Values:
    spend = engine.meter.state()
    return {"process": spend["dollars_this_process"], "all": spend["dollars_this_month"]}


def _readings(engine: Engine) -> dict[str, float]:
    """What the process that draws, or will, and its device tell right now."""
    return engine.worker.readings() if engine.worker else readings("cpu")


SHARED = (  # of the server's own
    Gauge("queue_depth", "Requests that wait.", "", lambda engine: {"": engine.waiting}),
    Gauge("queue_limit", "Requests that may wait.", "", lambda engine: {"": engine.settings.queue}),
    Gauge("inflight", "Requests being drawn.", "", lambda engine: {"": engine.drawing}),
    Gauge("spend_dollars", "This month's, of this process and of all workers here.", "workers", _spend),
)
GAUGES = (  # of each worker
    Gauge(
        "state",
        "1 for what the worker is.",
        "state",
        lambda engine: {s: s == engine.state for s in get_args(EngineState)},
    ),
    Gauge("boot_outcome", "1 for how its cold start went.", "outcome", lambda own: {own.ledger.outcome: 1}),
    Gauge("plan", "1 for how it runs the model.", "plan", _plan),
    Gauge(
        "compile_failed",
        "1 if it is eager because compiling failed, here or before.",
        "",
        lambda engine: {"": bool(engine.ledger.compile_failure) if engine.ledger.plan else None},
    ),
    Gauge("cold_start_seconds", "From birth to ready.", "", lambda own: {"": own.ledger.total_s or None}),
    Gauge("load_seconds", "Cold start by phase.", "phase", _load),
    Gauge(
        "worker_restarts", "How often it was begun again, of several workers.", "", lambda engine: {"": engine.restarts}
    ),
)
KINDS = ("gpu_peak", "gpu_used", "gpu_total", "host_peak")  # of two peaks the first is what matters
READINGS = (  # of each worker's `_readings`, for which its device is asked once
    Gauge(
        "memory_bytes",
        "The GPU's, and this process's own.",
        "kind",
        lambda told: {kind: told[kind] for kind in KINDS if kind in told},
    ),
    Gauge(
        "gpu_utilization_ratio",
        "How much of the time the GPU is busy.",
        "",
        lambda told: {"": told.get("gpu_utilization")},
    ),
    Gauge("gpu_temperature_celsius", "The GPU's temperature.", "", lambda told: {"": told.get("gpu_temperature")}),
)


def machine(engine: Engine) -> dict[str, float]:
    """What the machine tells right now: bytes of memory, how busy (0 to 1) and how warm (Celsius) its GPU is."""
    return {"host_total": host_memory()} | _readings(engine)


ENDS = {  # how a job may have ended: by a counter's name what, and in words
    "cancelled": ("cancelled", "Pictures whose caller went away, or whose request failed with another."),
    "deadline_exceeded": ("deadline_exceeded", "Pictures whose deadline passed."),
    "oom": ("out_of_memory", "Pictures for which the memory was not enough."),
}


@dataclass(frozen=True, slots=True)
class LaneCollector(Collector):
    """Reads all gauges and `ENDS` whenever somebody asks."""

    engine: Engine

    def collect(self) -> Iterator[Metric]:
        for name, (outcome, text) in ENDS.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=["where"])
            for where in get_args(Where):
                counter.add_metric([where], self.engine.queue.ended[outcome, where])
            yield counter
        yield CounterMetricFamily(PREFIX + "log_lines_dropped", "Lines of the log that nobody read.", value=dropped())
        workers = self.engine.workers
        yield from _families(SHARED, {"": self.engine})
        yield from _families(GAUGES, workers)
        yield from _families(READINGS, {worker: _readings(engine) for worker, engine in workers.items()})


def _families(gauges: Iterable[Gauge], workers: Mapping[str, Any]) -> Iterator[Metric]:
    """Each gauge of all workers; of several with their names."""
    for gauge in gauges:
        own, named = [gauge.label] * bool(gauge.label), ["worker"] * (len(workers) > 1)
        family = GaugeMetricFamily(PREFIX + gauge.name, gauge.help, labels=own + named)
        for worker, one in workers.items():
            with contextlib.suppress(Exception):  # a worker that fails meanwhile: the rest is told all the same
                for key, value in gauge.read(one).items():
                    if value is not None:
                        family.add_metric([key] * len(own) + [worker] * len(named), value)
        yield family


class Metrics:
    """The metrics of one app, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(LaneCollector(engine))
        self._requests = self._counter("requests", "Answers; of errors with the code.", "route", "status", "reason")
        self._images = self._counter("images", "Pictures of requests that came out.")
        self._steps = self._counter("steps", "Denoising steps of these pictures.")
        self._seconds = self._histogram("request_seconds", "From a request's head to its answer's end.", "route")
        self._waits = self._histogram("queue_wait_seconds", "How long a picture waited for its turn.")
        self._stages = self._histogram("stage_seconds", "The stages of a picture.", "stage")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(PREFIX + name, text, labels, registry=self._registry, buckets=BUCKETS)

    def count(self, route: str, status: int, reason: str, seconds: float) -> None:
        """One request has ended; `reason` is its error's code, or empty."""
        self._requests.labels(route, status, reason).inc()
        self._seconds.labels(route).observe(seconds)

    def picture(self, picture: Picture) -> None:
        """One picture of a request came out, and so did all others of it, whoever gets them."""
        self._images.inc()
        self._steps.inc(picture.recipe.taken)
        self._waits.observe(picture.stages["queue"])
        for stage in picture.stages.keys() - {"queue"}:
            self._stages.labels(stage).observe(picture.stages[stage])

    def uploaded(self, seconds: float) -> None:
        """The object store took a picture, or was given up."""
        self._stages.labels("upload").observe(seconds)

    def text(self) -> bytes:
        """All of it in Prometheus' text format. Asks the GPU, so not on an event loop."""
        return generate_latest(self._registry)
