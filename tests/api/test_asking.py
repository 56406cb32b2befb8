"""Requests are understood where that takes the least: small ones at once, large ones beside the event loop."""

import asyncio
import threading
from typing import Any

import pytest

from handler.api.asking import LIGHT, VALUE, understood
from handler.core.deadline import Deadline

DEEP: Any = "x" * LIGHT
for _ in range(50):
    DEEP = {"a": [DEEP]}


@pytest.mark.parametrize(
    ("payload", "here"),
    [
        ({"prompt": "a red circle", "loras": [{"path": "ink", "scale": 1}], "n": 2}, True),
        ({"prompt": "x" * (LIGHT // 2)}, True),
        ("no object", True),
        ({"prompt": "x" * LIGHT}, False),
        ({"image": b"x" * LIGHT}, False),
        ({"images": ["x" * (LIGHT // 4)] * 4}, False),
        ({"a": [1] * (LIGHT // VALUE)}, False),
        (dict.fromkeys(map(str, range(LIGHT // VALUE))), False),
        (DEEP, False),
    ],
)
def test_what_is_large_is_understood_on_another_thread(payload: Any, here: bool) -> None:
    found = asyncio.run(understood(threading.current_thread, payload, Deadline()))
    assert (found is threading.current_thread()) == here
