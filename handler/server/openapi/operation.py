"""What one method of one route is described by."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from handler.server.openapi.schema import Schema

ALWAYS = (405, 500)  # and 401 or 403, but for who asks after its health
JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Answer:
    """What comes with one status: for each media type the schema, and the headers."""

    description: str
    content: Mapping[str, Schema] = field(default_factory=dict)
    headers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one route. `body` has its schemas by media type, `errors` are the statuses of its refusals."""

    method: str
    summary: str
    answers: Mapping[int, Answer]
    body: Mapping[str, Schema] = field(default_factory=dict)
    errors: tuple[int, ...] = ALWAYS
    parameters: tuple[str, ...] = ("x-request-id", "traceparent")
    retired: bool = False
    optional: bool = False  # whether a body may be left out
