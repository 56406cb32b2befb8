"""OpenAI's words for quality, as what they mean for any model: a share of its usual steps, and whether any is skipped.

benchmarks/results/quality_words.json has what spark makes of each.
"""

import math
from collections.abc import Mapping
from typing import Literal

Quality = Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"]
SHARES: Mapping[str, float] = {  # of the model's usual steps
    "low": 0.5, "medium": 0.75, "auto": 1, "standard": 1, "high": 1.25, "hd": 1.25, "xhigh": 1.5, "max": math.inf,
}  # fmt: skip


def steps(word: Quality | None, usual: int, least: int, most: int) -> int:
    """How many steps `word` means for a model that usually takes `usual`, and may take `least` to `most`."""
    return max(least, math.ceil(min(most, usual * SHARES[word or "auto"])))


def whole(word: Quality | None) -> bool:
    """Whether every step is computed in full, though the worker has a step cache."""
    return SHARES[word or "auto"] > 1
