"""Traces over OTLP, where one of OpenTelemetry's own variables names an endpoint: each request with the stages of its
pictures, and the cold start with its phases.

Spans are made of what has ended, and a thread of the SDK's sends them from a bounded queue: a receiver that is slow or
gone costs spans, never requests. Attributes are numbers and words of ours; of what a caller wrote only the request id.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from starlette.types import Scope

from handler.core.errors import SettingsError
from handler.core.recipe import Picture
from handler.core.version import __version__
from handler.worker.clock import Ledger

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

    from handler.server.record import Seen

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROBES = ("/ping", "/health", "/health/live", "/health/ready", "/v1/status", "/metrics")  # asked again and again
METHODS = ("GET", "POST", "HEAD", "OPTIONS")
LANE = ("queue", "encode", "denoise", "decode")  # while a picture holds up the next
FLUSH_S = 3.0  # how long a process that ends waits for its last spans to be taken
Attributes = Mapping[str, str | int | float]


def tracing(model: str) -> "Traces | None":
    """What sends traces, if the environment names an endpoint; all other OTEL_* variables are the SDK's to read."""
    asked = next((name for name in ENDPOINTS if os.environ.get(name)), None)
    if asked is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        packages = "opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
        raise SettingsError(f"{asked} asks for traces: pip install {packages}, or unset it.", asked) from None
    ours = {"service.name": "kindling", "service.version": __version__, "kindling.model": model}
    resource = Resource.create(ours).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # which would wait for half a minute
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Traces(provider)


class Traces:
    """Makes the spans. Starts are `time.perf_counter`'s, or seconds since the process was born."""

    def __init__(self, provider: "TracerProvider") -> None:
        self._provider, self._tracer = provider, provider.get_tracer("kindling", __version__)

    def request(self, scope: Scope, seen: "Seen", status: int, end: float) -> None:
        """A request that was answered with `status` at `end`: if it was let in, below the span that it names."""
        if seen.route in PROBES:
            return
        method = scope["method"] if scope["method"] in METHODS else "_OTHER"
        attributes: dict[str, str | int] = {
            "http.request.method": method,
            "http.route": seen.route,
            "http.response.status_code": status,
            "kindling.request_id": seen.id,
            "kindling.pictures": len(seen.pictures),
        }
        if seen.reason:
            attributes["error.type"] = seen.reason
        if seen.pictures:
            recipe = seen.pictures[0].recipe
            attributes |= {"kindling.steps": recipe.steps, "kindling.size": "{}x{}".format(*recipe.size)}
        at = _since(time.perf_counter())
        with_parent = _parent(dict(scope["headers"]).get(b"traceparent", b"") if seen.admitted else b"")
        inner = self._span(f"{method} {seen.route}", at(seen.start), at(end), attributes, with_parent, status >= 500)
        for name, number, start, seconds in laid_out(seen.pictures, seen.begun, end):
            self._span(name, at(start), at(start + seconds), {"kindling.picture": number}, inner)

    def cold_start(self, ledger: Ledger) -> None:
        """A cold start that has ended just now. The process may end after one that failed: that is sent at once."""
        at, ready = _since(ledger.total_s), ledger.outcome == "ready"
        told = ("outcome", "reason", "phase", "device", "plan", "plan_reason", "budget_s")
        attributes = {f"kindling.{name}": getattr(ledger, name) for name in told}
        inner = self._span("cold start", at(0), at(ledger.total_s), attributes, failed=not ready)
        for phase in ledger.phases:
            self._span(phase.name, at(phase.start_s), at(phase.start_s + phase.seconds), {}, inner)
        if not ready:
            _within(FLUSH_S, self._provider.force_flush)

    def close(self) -> None:
        """Send what is left, as far as time allows."""
        _within(FLUSH_S, self._provider.shutdown)

    def _span(
        self,
        name: str,
        start: int,
        end: int,
        attributes: Attributes,
        parent: "Context | None" = None,
        failed: bool = False,
    ) -> "Context":
        """The context for spans below this one. Without `parent` a trace begins."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        kind = SpanKind.SERVER if "http.route" in attributes else SpanKind.INTERNAL
        span = self._tracer.start_span(name, parent or Context(), kind, attributes, start_time=start)
        if failed:
            span.set_status(StatusCode.ERROR)
        span.end(end)
        return set_span_in_context(span, Context())


def _since(now: float) -> Callable[[float], int]:
    """From the seconds of a clock that shows `now` to nanoseconds since 1970."""
    zero = time.time_ns() - round(now * 1e9)
    return lambda seconds: zero + round(seconds * 1e9)


def _parent(traceparent: bytes) -> "Context":
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent.decode("latin-1")})


def laid_out(pictures: Sequence[Picture], start: float, end: float) -> Iterator[tuple[str, int, float, float]]:
    """Each stage's name, picture, start and seconds; only the last is known, and that a picture's follow each other.

    The next picture went into the queue when this one was drawn; or all did at once, if there was no time for that.
    """
    drawn = [sum(picture.stages.get(name, 0) for name in LANE) for picture in pictures]
    apart = sum(drawn) <= end - start
    for number, picture in enumerate(pictures):
        at = start + sum(drawn[:number]) * apart
        for name, seconds in picture.stages.items():
            yield name, number, at, seconds
            at += seconds


def _within(seconds: float, act: Callable[[], object]) -> None:
    """Run `act`, but wait no longer; the SDK keeps no deadlines of its own."""
    thread = threading.Thread(target=act, name="traces", daemon=True)
    thread.start()
    thread.join(seconds)
