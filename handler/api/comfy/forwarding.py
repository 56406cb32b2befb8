"""What one websocket hears of prompts that another worker draws: all of it at once, when they have ended.

Behind a balancer a client may listen here and post there. There, its prompt leaves a sign on the shelf, which is looked
for here as long as the client listens; what is told then is made of the prompt's record.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from handler.api.comfy.archive import mailbox, tried
from handler.api.comfy.drawing import place
from handler.api.comfy.job import LIVE, Record
from handler.api.comfy.listeners import Listener, message, picture
from handler.api.comfy.service import Comfy
from handler.core.deadline import Deadline

WHAT = "prompts at other workers cannot be told"
BLIND_S = 10.0  # until the next look where nothing can be seen: the volume fails, or is nobody else's
FIRST_S = 2.0  # for which a volume may hang before a client is let in


class Forwarding:
    """Looks for one client's prompts. What had ended before it came is not told again."""

    def __init__(self, comfy: Comfy, listener: Listener) -> None:
        self._comfy, self._listener = comfy, listener
        self._told: set[str] = set()

    async def begin(self) -> None:
        """Pass over what has ended already; what it still waits for, it is yet to hear of."""
        deadline, archive = Deadline.within(FIRST_S), self._comfy.archive
        ids = set(await self._ids(deadline) or ())

        def live(_: object) -> set[str]:
            return {each for each in ids if (record := archive.record(each)) and record["state"] in LIVE}

        self._told |= ids - (await tried(archive.at(live, deadline), set[str](), WHAT) if ids else set())

    async def look(self) -> float:
        """Tell what is new; in how many seconds to look again."""
        ids = await self._ids()
        for prompt_id in set(ids or ()) - self._told:
            record = await self._record(prompt_id)
            if record and record["state"] not in LIVE:
                self._told.add(prompt_id)
                await self._tell(prompt_id, record)
        return BLIND_S if ids is None else self._comfy.archive.shelf.look_s

    async def _ids(self, deadline: Deadline | None = None) -> list[str] | None:
        """The prompts that left a sign; None if none can be seen."""
        box, archive = mailbox(self._listener.client), self._comfy.archive

        def names(_: object) -> list[str] | None:
            entries = archive.shelf.entries(box) if archive.shelf.shared else None
            return None if entries is None else [entry.name.rpartition("/")[2] for entry in entries]

        return await tried(archive.at(names, deadline), None, WHAT)

    async def _record(self, prompt_id: str) -> Record | None:
        """Of a prompt at another worker; one that is here tells itself."""
        if self._comfy.find(prompt_id):
            self._told.add(prompt_id)
            return None
        archive = self._comfy.archive
        return await tried(archive.at(lambda _: archive.record(prompt_id)), None, WHAT)

    async def _tell(self, prompt_id: str, record: Record) -> None:
        archive = self._comfy.archive
        *begun, (kind, last) = (record["status"] or {}).get("messages") or [(None, {})]
        for each, data in begun:
            self._listener.put(message(each, data))
        for node, output in record["outputs"].items():
            self._listener.put(message("executing", {"node": node, "display_node": node, "prompt_id": prompt_id}))
            data = {"node": node, "display_node": node, "output": output, "prompt_id": prompt_id}
            self._listener.put(message("executed", data))
        for node, image in _streamed(record):
            self._listener.put(message("executing", {"node": node, "display_node": node, "prompt_id": prompt_id}))
            load = partial(archive.load, *place(image))
            if data := await tried(archive.at(lambda _: load()), b"", "picture is gone"):  # noqa: B023 awaited here
                self._listener.put(picture(data, "png"))
        if kind:
            self._listener.put(message(kind, last))
        self._listener.put(message("executing", {"node": None, "prompt_id": prompt_id}))
        box = mailbox(self._listener.client)
        await tried(archive.at(lambda shelf: shelf.remove(f"{box}/{prompt_id}")), None, "sign could not be removed")


def _streamed(record: Record) -> Iterator[tuple[str, Any]]:
    for node, images in record["streamed"].items():
        for image in images:
            yield node, image
