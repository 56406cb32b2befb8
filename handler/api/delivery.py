"""Pictures by URL: those of a request are kept once all of them came out, and all are, or none is any longer."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from handler.api.links import Links
from handler.api.store import Store
from handler.core.deadline import Deadline
from handler.core.recipe import Picture
from handler.core.request import ImageRequest

Keep = Callable[[Picture], Coroutine[Any, Any, Picture]]


async def delivered(
    pictures: Sequence[Picture],
    request: ImageRequest,
    deadline: Deadline,
    store: Store | None,
    links: Links | None,
    base: str | None,
) -> list[Picture]:
    """With the URLs that were asked for, in time. What fails first is raised, and the others are given up."""
    keep = _keep(store, links, base, deadline) if request.response_format == "url" else None
    keeping = [asyncio.create_task(keep(picture)) for picture in pictures] if keep else []
    try:
        found = await asyncio.gather(*keeping) if keep else [*pictures]
        deadline.require_time()
        return found
    finally:
        give_up(keeping)


def _keep(store: Store | None, links: Links | None, base: str | None, deadline: Deadline) -> Keep | None:
    if store:
        return partial(store.keep, deadline=deadline)
    return partial(links.keep, base=base, deadline=deadline) if links and base else None


def give_up(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel what has not ended; how it ends then is told to nobody."""
    for task in tasks:
        task.cancel()
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
