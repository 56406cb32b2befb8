"""What a streamed request is told while it is drawn: each step as an event, and partial pictures."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, Self

from handler.api import codec
from handler.api.asking import Asked
from handler.api.hands import Hands
from handler.core.recipe import Preview

OnRequestStep = Callable[[int, int, Preview], None]
OnPartial = Callable[[dict[str, Any]], object]
_hands = Hands(1, 0, "partial")  # else the thread that keeps the GPU busy would encode


class Showing:
    """Tells `on_partial` of one request: partial pictures are spread evenly over the steps before the last.

    Called on the engine's thread, on one of each worker if there are several; they are encoded on another, one after
    another.
    """

    def __init__(self, asked: Asked, on_step: OnRequestStep, on_partial: OnPartial | None) -> None:
        self._dialect, self._request = asked.dialect, asked.request
        self._on_step, self._on_partial = on_step, on_partial
        self._count = self._request.partial_images if on_partial else 0
        self._shown: list[Future[None]] = []
        self._begun, self._beginning = 0, threading.Lock()

    def __call__(self, done: int, of: int, preview: Preview) -> None:
        """So many steps are done."""
        self._on_step(done, of, preview)
        if self._on_partial and self._request.progress:
            self._on_partial({"type": f"{self._dialect.TYPE}.progress", "steps": done, "of": of})
        if (index := self._due(done, of)) is not None:
            self._shown.append(_hands.run(partial(self._show, index, preview())))

    def _due(self, done: int, of: int) -> int | None:
        """Which partial picture it is time for, if it is; nobody else is told to make that one."""
        with self._beginning:
            if not self._count or done >= of or done * (self._count + 1) < (self._begun + 1) * of:
                return None
            self._begun += 1
            return self._begun - 1

    def _show(self, index: int, rgb: Any) -> None:
        assert self._on_partial
        data = codec.encode(rgb, self._request.output_format, self._request.output_compression, None)
        self._on_partial(self._dialect.partial(self._request, data, (rgb.shape[1], rgb.shape[0]), index))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Wait until all partial pictures were told: they come before the last word, be it an answer or an error."""
        await asyncio.gather(*map(asyncio.wrap_future, self._shown))
