"""The HTTP server: `create_app` makes the ASGI app over `api`; `process.py` is the process that serves it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from handler.engine.engine import Engine


def create_app(engine: "Engine", public: bool) -> "ASGIApp":
    """The app over `engine`. `public`: reachable by others, so that keys are required. Imports the web stack."""
    from handler.server.app import create_app

    return create_app(engine, public)
