"""The HTTP server: `create_app` makes the ASGI app over `api`; `process.py` is the process that serves it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import ASGIApp

    from handler.api.elsewhere.events import Replicas
    from handler.core.settings import Settings
    from handler.engine.engine import Engine


def create_app(engine: "Engine", public: bool = True) -> "ASGIApp":
    """The app over `engine`, to be served by itself or mounted below any prefix of another. Imports the web stack.

    `public`: others reach it, so it needs KINDLING_API_KEYS, or KINDLING_ALLOW_OPEN where something else guards it.
    Served by itself it starts and stops the engine; mounted, whoever mounts it does.
    """
    from handler.server.app import create_app

    return create_app(engine, public)


def create_front(models: "Sequence[tuple[Settings, Replicas]]") -> "ASGIApp":
    """One app in front of several models that others draw, each by its settings; the first one's are the app's, too.

    Others reach it. It has no engine to start or stop; `busy` and `hurry` say and do the same as any app's. What its
    server cancels was left by its client.
    """
    from functools import partial

    from handler.api.elsewhere.many import Many
    from handler.api.elsewhere.replicated import Gateway
    from handler.server.app import create_app
    from handler.server.leaving import Leaving

    (first, _), *_ = models
    return create_app(Gateway(first), public=True, api=partial(Many, replicas=models), around=Leaving)
