"""The routes of what a worker keeps for a while: pictures by URL."""

from handler.api.links import LINKS_ROUTE, MEDIA
from handler.server.openapi.operation import ALWAYS, Answer, Operation
from handler.server.openapi.schema import TEXT, Schema

HEAD = ("x-request-id", "traceparent")
PARAMETERS: dict[str, Schema] = {
    "image_id": {"in": "path", "required": True, "schema": TEXT, "description": "As the answer with its URL has it."},
}
HEADERS: dict[str, Schema] = {
    "cache-control-private": {"required": True, "schema": TEXT, "description": "Private, until the URL ends."},
}
PICTURE = Answer(
    "The picture.", {kind: {} for kind in MEDIA.values()}, ("content-disposition", "cache-control-private")
)
OPERATIONS: dict[str, tuple[Operation, ...]] = {
    LINKS_ROUTE: (
        Operation(
            "get",
            "A picture by URL, where there is no object store; whoever has the URL needs no key",
            {200: PICTURE},
            errors=(*ALWAYS, 404),
            parameters=(*HEAD, "image_id"),
        ),
    ),
}
