"""A crowd of clients that costs next to nothing itself (clients/flood.c), for the modes of endurance.py."""

import asyncio
import json
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SOURCE = Path(__file__).parent / "clients/flood.c"
MOST = 1000  # clients of an open loop, whose requests are answered one like the other


class Crowd:
    """Sends one and the same request over and over. What comes back is what flood.c prints."""

    def __init__(self, program: str, address: str) -> None:
        self._program, self._port = program, urlsplit(address).port

    async def closed(self, request: str, clients: int, seconds: float, fresh: bool = False) -> dict[str, Any]:
        """Each client asks again as soon as it is answered; if `fresh`, on a connection of its own."""
        return await self._run(request, clients, seconds, fresh, 0)

    async def open(self, request: str, rate: float, seconds: float) -> dict[str, Any]:
        """So many a second are due, Poisson, whatever becomes of those before."""
        return await self._run(request, MOST, seconds, False, rate)

    async def _run(self, request: str, clients: int, seconds: float, fresh: bool, rate: float) -> dict[str, Any]:
        words = map(str, (self._port, clients, seconds, int(fresh), rate))
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(self._program, *words, stdin=pipe, stdout=pipe)
        out, _ = await process.communicate(request.encode())
        found: dict[str, Any] = json.loads(out)
        return found


@contextmanager
def crowd(address: str) -> Iterator[Crowd]:
    """One for the server there; this wants a C compiler."""
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/flood"
        command = ["cc", "-D_GNU_SOURCE", "-O2", "-o", program, str(SOURCE), "-lm"]
        subprocess.run(command, check=True)
        yield Crowd(program, address)
