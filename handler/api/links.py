"""Pictures that a worker serves itself, for answers that carry a URL where there is no object store.

The id in a URL is its secret, as the signature in a presigned one is: who has it needs no key. It says when it
ends, and files are named by its hash: so its end cannot be changed, and who lists the folder has no URL yet.
"""

import hashlib
import re
import secrets
import time
from dataclasses import dataclass, replace

from handler.api.hands import Hands
from handler.api.keeping import Keeper
from handler.core.deadline import Deadline
from handler.core.errors import FileMissing
from handler.core.recipe import Picture
from handler.core.settings import Settings

LINKS_ROUTE = "/v1/images/{image_id}/content"
BYTES = 32  # of chance in an id
ID = re.compile(r"([0-9a-f]{8})[A-Za-z0-9_-]{43}")  # when it ends, in seconds since 1970; 32 bytes
_hands = Hands(4, 4, "pictures")  # their own: anybody may ask for pictures, and shall hold up no writing
MEDIA = {b"\x89PNG": "image/png", b"RIFF": "image/webp", b"\xff\xd8\xff": "image/jpeg"}  # by how a file begins


@dataclass(frozen=True, slots=True)
class Content:
    """A picture's bytes and media type, and for how many seconds its URL still works."""

    data: bytes
    media: str
    left_s: int


class Links:
    """Keeps pictures, and finds them by the ids in their URLs."""

    def __init__(self, settings: Settings) -> None:
        self.expires_s = settings.kept_s
        self._keeper = Keeper(settings, "pictures", _hands)

    async def keep(self, picture: Picture, base: str, deadline: Deadline) -> Picture:
        """`picture` with its URL at the server that callers find at `base`."""
        image_id = f"{int(time.time() + self.expires_s):08x}{secrets.token_urlsafe(BYTES)}"
        await self._keeper.put(_named(image_id), picture.data, deadline)
        return replace(picture, url=base + LINKS_ROUTE.format(image_id=image_id))

    async def content(self, image_id: str) -> Content:
        """The picture whose URL has this id. FileMissing if there is none, any more or at all."""
        found = ID.fullmatch(image_id)
        left_s = int(found[1], 16) - int(time.time()) if found else 0
        # What has ended is not looked for: anybody may ask.
        data = await self._keeper.get(_named(image_id)) if left_s > 0 else None
        media = next((media for head, media in MEDIA.items() if data and data.startswith(head)), "")
        if not data or not media:
            raise FileMissing("There is no picture here, or it is no longer kept.")
        return Content(data, media, left_s)


def _named(image_id: str) -> str:
    return hashlib.sha256(image_id.encode()).hexdigest()
