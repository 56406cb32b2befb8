"""The HTTP server: `create_app` makes the ASGI app over `api`; `process.py` is the process that serves it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from handler.engine.engine import Engine


def create_app(engine: "Engine", public: bool = True) -> "ASGIApp":
    """The app over `engine`, to be served by itself or mounted below any prefix of another. Imports the web stack.

    `public`: others reach it, so it needs KINDLING_API_KEYS, or KINDLING_ALLOW_OPEN where something else guards it.
    Served by itself it starts and stops the engine; mounted, whoever mounts it does.
    """
    from handler.server.app import create_app

    return create_app(engine, public)
