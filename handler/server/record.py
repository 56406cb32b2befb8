"""One request, as it is kept while it runs."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from handler.api.reply import Reply
from handler.core.deadline import Deadline
from handler.core.recipe import Picture
from handler.engine.queue import nobody

PROMPTS = ("prompt", "positive_prompt", "inputs")  # what the routes that draw call it


@dataclass(slots=True, eq=False)
class Seen:
    """One request: its first byte came at `start`, all of it was there at `begun`, in `time.perf_counter`'s seconds.

    Its `id` is the caller's own, and `admitted` true, only once that was let in. `status` is None until it is known how
    it ends, and `answered` is whether that is on its way. `leave` gives back the
    place in line that was kept for it.
    """

    id: str
    route: str
    start: float
    admitted: bool = False
    deadline: Deadline | None = None
    begun: float = 0.0
    answered: bool = False
    status: int | None = None
    reason: str = ""
    prompt: object = None
    pictures: tuple[Picture, ...] = ()
    leave: Callable[[], object] = nobody

    def let_in(self, name: str) -> None:
        """Whoever asks may, and so choose what its request is called."""
        self.id, self.admitted = name, True

    def read(self, payload: object) -> None:
        """What is asked for is known from now on."""
        self.begun = time.perf_counter()
        said = payload if isinstance(payload, dict) else {}
        self.prompt = next((said[name] for name in PROMPTS if name in said), None)

    def note(self, reply: Reply) -> Reply:
        """Remember how this request ends, for a stream says 200 long before; the last reply counts."""
        self.status, self.pictures = reply.status, reply.pictures
        self.reason = reply.content["error"]["code"] if reply.status >= 400 else ""
        return reply
