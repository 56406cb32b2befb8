"""The HTTP server: `create_app` makes the ASGI app over `api.Api`; `serve.py` is the process that serves it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from handler.engine.engine import Lane


def create_app(lane: "Lane", public: bool) -> "ASGIApp":
    """The app over `lane`. `public`: reachable by others, so that keys are required. Imports the web stack."""
    from handler.server.app import create_app

    return create_app(lane, public)
