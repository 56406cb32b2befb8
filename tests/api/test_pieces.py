"""Answers with large pictures: the same JSON, written piece by piece, and others get their turns meanwhile."""

import asyncio
import base64
import json
import random
from typing import Any

import pytest

from handler.api import pieces
from handler.api.dialects import openai
from handler.api.pieces import PIECE, File, encoded, length, plain, size
from handler.api.reply import Reply
from handler.server.access import response
from handler.server.record import Seen
from handler.server.sse import stream

SIZES = (0, 1, 2, 3, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 2)


def noise(count: int) -> bytes:
    return random.Random(count).randbytes(count)


@pytest.mark.parametrize("count", SIZES)
def test_pieces_are_base64_and_none_is_long(count: int) -> None:
    file = File(noise(count))
    found = list(file.pieces())
    assert b"".join(found) == base64.b64encode(file.data) == file.text().encode()
    assert len(b"".join(found)) == file.size
    assert max(map(len, found), default=0) <= PIECE * 4 // 3


def test_json_with_files_is_that_of_their_base64() -> None:
    value = {"a": [File(noise(count)) for count in SIZES], "b": {"c": 'quotes " and \\ and ☃ and \n'}, "d": [1.5, None]}
    parts = encoded(value)
    said = b"".join(pieces.pieces(parts))
    assert json.loads(said) == plain(value)
    assert plain(value)["a"] == [base64.b64encode(noise(count)).decode() for count in SIZES]
    assert len(said) == size(parts)
    assert length(value) == len(json.dumps(plain(value)))
    assert str(value["a"][4].data[:4]) not in repr(value)  # no picture in a log


def test_nothing_else_becomes_json() -> None:
    with pytest.raises(TypeError, match="set is not JSON"):
        encoded({"a": {1}})


BODY = {"created": 1, "data": [{"b64_json": File(noise(4_000_000)), "seed": i} for i in range(4)], "size": "x"}


async def turns_of_others(work: Any) -> int:
    """How many turns another task has while `work` is done."""
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(others())
    await work
    other.cancel()
    return turns


def test_while_large_pictures_are_sent_others_get_their_turns() -> None:
    said: list[bytes] = []

    async def send(message: Any) -> None:
        said.append(message.get("body", b""))

    async def receive() -> Any:
        return await asyncio.Event().wait()

    async def main() -> int:
        scope = {"type": "http", "state": {"seen": Seen("1", "/generate", 0.0)}, "method": "POST"}
        return await turns_of_others(response(scope, Reply(200, BODY))(scope, receive, send))

    turns = asyncio.run(main())
    assert json.loads(b"".join(said)) == plain(BODY)
    assert turns >= 4 * 4_000_000 // PIECE


def test_so_they_do_while_they_are_streamed() -> None:
    said: list[bytes] = []

    async def call(_: Any) -> Reply:
        return Reply(200, BODY)

    async def main() -> int:
        found = await stream(call, openai.completed)
        assert not isinstance(found, Reply)

        async def sent() -> None:
            said.extend([bytes(chunk) async for chunk in found.body_iterator])  # type: ignore[arg-type]

        return await turns_of_others(sent())

    turns = asyncio.run(main())
    events = [json.loads(block.partition(b"data: ")[2]) for block in b"".join(said).split(b"\n\n") if block]
    assert [event["b64_json"] for event in events] == [each["b64_json"] for each in plain(BODY)["data"]]
    assert turns >= 4 * 4_000_000 // PIECE
