"""What a plan's outputs ask for, drawn in passes: a picture that another one begins with comes first."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator

from handler.api.comfy.inscription import finished
from handler.api.dialects.comfy.plan import Before, Output
from handler.core.deadline import Deadline
from handler.core.recipe import Picture
from handler.core.request import ImageRequest

Step = Output | Before
Draw = Callable[[Step, ImageRequest], Awaitable[list[Picture]]]


class Passes:
    """Draws each distinct request once, in PNG. For one event loop, until `deadline`."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._made: dict[tuple[ImageRequest, Before | None], list[Picture]] = {}

    async def drawn(self, what: Step, draw: Draw) -> list[Picture]:
        """The pictures of one request, from the pictures before it. Raises what `draw` raises."""
        asked, before = what.request, what.before
        if (asked, before) in self._made:
            return self._made[asked, before]
        request = asked
        if before:
            [first] = await self.drawn(before, draw)
            image = await self._deadline.hold(asyncio.to_thread(finished, first.data, before.after, {}))
            request = asked.model_copy(update={"images": (image,)})
        made = self._made[asked, before] = await draw(what, request)
        return made


def steps(output: Output) -> Iterator[Step]:
    """All that is drawn on the way to `output`, the last first."""
    step: Step | None = output
    while step:
        yield step
        step = step.before
