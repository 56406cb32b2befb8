"""What receives traces, on loopback: OTLP over HTTP, decoded with the official messages."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue


@dataclass(frozen=True)
class Span:
    """One span as it was sent. Times in nanoseconds since 1970."""

    name: str
    trace: str
    id: str
    parent: str
    start: int
    end: int
    kind: int
    failed: bool
    attributes: dict[str, Any]
    resource: dict[str, Any]


@dataclass
class Receiver:
    """Spans and raw bodies that came; each answer waits for `open`."""

    url: str = ""
    spans: list[Span] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    open: threading.Event = field(default_factory=threading.Event)
    asked: threading.Event = field(default_factory=threading.Event)
    _fresh: "Queue[Span]" = field(default_factory=Queue)

    def take(self, body: bytes) -> None:
        """Keep what one request brought."""
        self.bodies.append(body)
        for span in spans(body):
            self.spans.append(span)
            self._fresh.put(span)

    def wait_for(self, name: str) -> Span:
        """The next span of that name."""
        while (span := self._fresh.get(timeout=60)).name != name:
            pass
        return span

    def below(self, parent: Span) -> list[Span]:
        """Its children, in the order of their starts."""
        return sorted(
            (span for span in self.spans if span.parent == parent.id), key=lambda span: (span.start, span.end)
        )


def spans(body: bytes) -> Iterator[Span]:
    """What one request of OTLP's carries."""
    for group in ExportTraceServiceRequest.FromString(body).resource_spans:
        resource = plain(group.resource.attributes)
        for span in (span for scope in group.scope_spans for span in scope.spans):
            ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
            times = (span.start_time_unix_nano, span.end_time_unix_nano)
            yield Span(span.name, *ids, *times, span.kind, span.status.code == 2, plain(span.attributes), resource)


def plain(attributes: Any) -> dict[str, Any]:
    pairs: list[KeyValue] = list(attributes)
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    return getattr(value, value.WhichOneof("value") or "string_value")


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A receiver on a free port, whose answers do not wait unless `open` is cleared."""
    receiver = Receiver()
    receiver.open.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            assert self.headers["content-type"] == "application/x-protobuf"
            receiver.take(self.rfile.read(int(self.headers["content-length"])))
            receiver.asked.set()
            receiver.open.wait(60)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield receiver
        finally:
            receiver.open.set()
            server.shutdown()
