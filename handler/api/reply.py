"""An answer ready to be sent by any transport, and how an error becomes one.

One place turns a `KindlingError` into an answer; anything else is logged and becomes an opaque 500.
"""

import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from handler.api.pieces import encoded, length, pieces, plain
from handler.core.errors import Internal, KindlingError
from handler.core.recipe import Picture
from handler.core.request import Format
from handler.core.tracebacks import let_go, outline

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer ready to be sent: HTTP's status, an object, extra headers; `fatal` asks for a new worker.

    `content` is JSON with a `File` in the place of each picture, `body` the same as JSON alone.
    `smaller(form)` is the content again, if it has pictures, with those as JPEG or WebP; encoding takes a moment.
    `stored()` is it again with them in the object store, if there is one that has not been asked before, by URL.
    `pictures` are those, for who counts and times them. `lasts_s` is for how long any URL in it surely works.
    """

    status: int
    content: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)
    fatal: bool = False
    smaller: Callable[[Format], dict[str, Any]] | None = None
    stored: Callable[[], Awaitable[dict[str, Any]]] | None = None
    pictures: tuple[Picture, ...] = ()
    lasts_s: float = math.inf

    @property
    def size(self) -> int:
        """How many characters the body has as Python's json writes it. It takes no time to know."""
        return length(self.content)

    @property
    def body(self) -> dict[str, Any]:
        """A JSON object. It takes a moment to make, if there are pictures in it: for a thread then."""
        made: dict[str, Any] = plain(self.content)
        return made

    def json(self) -> bytes:
        """The same as text. It takes as long, but lets others have their turns when it runs in a thread."""
        return b"".join(pieces(encoded(self.content)))


async def answered(work: Awaitable[T]) -> T | Reply:
    """Await `work`; an error becomes its Reply."""
    try:
        return await work
    except KindlingError as error:
        let_go(error)  # whoever waited for it is on its way, with all that was asked for
        return error_reply(error)
    except Exception as error:
        log.error("a request failed\n%s", outline(error))
        return error_reply(Internal("Something went wrong on our side; the log has the details."))


def error_reply(error: KindlingError) -> Reply:
    """An error as an answer. Where OpenAI's client would try again, it is told whether that can help."""
    headers = {}
    if error.retryable:
        headers["retry-after"] = str(error.retry_s)
    elif error.status == 429 or error.status >= 500:
        headers["x-should-retry"] = "false"
    return Reply(error.status, error.body(), headers, error.fatal)
