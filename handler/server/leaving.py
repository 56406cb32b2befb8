"""Clients that leave a server which does not say so, but cancels what they asked for; Ray Serve is one."""

import asyncio
from functools import partial

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Leaving:
    """Around an app: what its server cancels, or can hear no more of, was left by its client."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        left = asyncio.Event()
        answering = asyncio.ensure_future(self.app(scope, partial(_heard, receive, left), send))
        try:
            await asyncio.shield(answering)
        except asyncio.CancelledError:
            left.set()
            await answering
            raise


async def _heard(receive: Receive, left: asyncio.Event) -> Message:
    hearing, leaving = asyncio.ensure_future(receive()), asyncio.ensure_future(left.wait())
    try:
        await asyncio.wait({hearing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if hearing.done() and not hearing.exception():
            return hearing.result()
        return {"type": "http.disconnect"}
    finally:
        hearing.cancel()
        leaving.cancel()
