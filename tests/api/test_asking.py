"""Requests are understood where that takes the least: small ones at once, large ones beside the event loop."""

import asyncio
import threading
from typing import Any

import pytest

from handler import MODELS, ImageRequest, Settings
from handler.api import served
from handler.api.asking import LIGHT, VALUE, understood
from handler.core.deadline import Deadline
from handler.core.errors import OutOfRange

SPARK = MODELS["spark"]
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


@pytest.mark.parametrize(
    ("most", "asked", "told"),
    [
        (4, 5, "n: this worker draws at most 4 pictures for a request. KINDLING_MAX_N allows it up to 10."),
        (4, 99, "n: this worker draws at most 4 pictures for a request. KINDLING_MAX_N allows it up to 10."),
        (4, 10**400, "n: this worker draws at most 4 pictures for a request. KINDLING_MAX_N allows it up to 10."),
        (10, 11, "n: this worker draws at most 10 pictures for a request."),
    ],
)
def test_how_many_pictures_is_told_as_this_worker_has_it(most: int, asked: int, told: str) -> None:
    settings = Settings(max_n=most)
    served.require(ImageRequest.parse({"prompt": "", "n": most}), SPARK, settings, streams=False)
    with pytest.raises(OutOfRange) as refused:
        served.require(ImageRequest.parse({"prompt": "", "n": asked}), SPARK, settings, streams=False)
    assert refused.value.message == told
