"""A rendered answer again: with smaller pictures, or with pictures by URL."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from handler.api import codec
from handler.api.store import Store
from handler.core.deadline import Deadline
from handler.core.recipe import Picture
from handler.core.request import Format, ImageRequest

LEAN = 90  # percent: the quality of pictures that have to become smaller


def smaller(
    render: Callable[..., dict[str, Any]], request: ImageRequest, pictures: list[Picture], form: Format
) -> dict[str, Any]:
    """The content with its pictures as JPEG or WebP. For a thread."""
    quality = min(request.output_compression, LEAN)
    recoded = [
        picture if picture.url else replace(picture, data=codec.recode(picture.data, form, quality), format=form)
        for picture in pictures
    ]
    return render(request.model_copy(update={"output_format": form}), pictures=recoded)


async def stored(
    store: Store,
    deadline: Deadline,
    render: Callable[..., dict[str, Any]],
    request: ImageRequest,
    pictures: list[Picture],
) -> dict[str, Any]:
    """The content with its pictures by URL."""
    kept = await asyncio.gather(*(store.keep(picture, deadline) for picture in pictures))
    return render(request, pictures=kept)
