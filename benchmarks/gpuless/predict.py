"""The arithmetic's time of a picture on a card, from the rows that `worker.py` makes; nothing was measured on a GPU.

An operation takes as long as its arithmetic or its memory, whichever is longer, at the rates of `cards.py`; generated
kernels take as long as their bytes; each launch costs a gap. What runs eagerly is no faster than a CPU starts it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from gpuless.cards import (
    ATTENTION,
    CARDS,
    CONVOLUTIONS,
    EAGER_US,
    LAUNCH_US,
    MEMORY,
    PRODUCTS,
    Card,
)  # fmt: skip
from gpuless.variants import decoding_of, variant_of
from gpuless.work import flop, moved, operation
from handler import PRECISIONS

STAGES = {"text_encoder": "encode", "text_encoder_2": "encode", "text_encoder_3": "encode", "vae": "decode"}
ALL = ("encode", "denoise", "decode")
# Estimates, by measurements without a GPU: of a PNG of 1024x1024 the 13 stripes take 0.7 ms each, on the four cores or
# more that the host of a GPU has, and the rest 0.9 (results/host.json); from a request's turn to the first kernel's
# launch 1.3 to 1.5 ms pass, and the one wait at a picture's end brings that to about 2.
PNG_MS, WAITS_MS = 4.0, 2.0
ROOM = 1.1  # of the weights' bytes, that a card must have
HOPPER, BLACKWELL = "9.0", "10.0"  # the capabilities that stand for others, in this order
Row = Mapping[str, Any]


def operation_ms(line: str, card: Card) -> float:
    """Of one heavy operation."""
    it = operation(line)
    if it.kernel in ("mm", "wide"):
        rate = card.promised[it.dtype] * PRODUCTS.get(it.dtype, 1)
    elif it.kernel == "conv":
        rate = card.promised[it.dtype] * CONVOLUTIONS
    else:
        kernel = "flash" if it.kernel == "cudnn" and card.capability.startswith("8") else it.kernel
        rate = card.promised[it.dtype] * card.attention.get(kernel, ATTENTION["efficient"])
    whole = sum if it.kernel == "wide" else max  # its parts come one after another
    return whole((flop(line) / rate / 1e9, moved(line) / (card.memory_tb_s * MEMORY) / 1e9))


def work_ms(row: Row, card: Card) -> float:
    """Of all that one row counts, once."""
    heavy = sum(many * operation_ms(line, card) for line, many in row["operations"].items())
    light = row["triton_bytes"] + row["extern_bytes"] - sum(n * moved(line) for line, n in row["operations"].items())
    return float(heavy + light / (card.memory_tb_s * MEMORY) / 1e9 + row["launches"] * LAUNCH_US / 1000)


def picture(rows: Iterable[Row], model: str, group: str, card: Card) -> dict[str, float] | None:
    """Milliseconds of each stage, and seconds of all; None if the card cannot, or something is missing or failed.

    `group` is a precision and, after a slash, how else: attention in FP8, or the size and number of pictures.
    """
    mine = chosen(rows, model, group, card)
    if {STAGES.get(row["part"], "denoise") for row in mine} != set(ALL) or any("error" in row for row in mine):
        return None
    if not able(mine, group, card):
        return None
    gpu, cpu = dict.fromkeys(ALL, 0.0), dict.fromkeys(ALL, 0.0)
    for row in mine:
        stage, times = STAGES.get(row["part"], "denoise"), row["calls"] * row["count"]
        gpu[stage] += times * work_ms(row, card)
        cpu[stage] += times * row["launches"] * EAGER_US / 1000 * (row["plan"] == "eager")
    stages = {stage: max(gpu[stage], cpu[stage]) for stage in gpu}
    width, height = mine[0]["size"]
    stages["host"] = PNG_MS * mine[0]["pictures"] * width * height / 2**20 + WAITS_MS
    return {**{f"{s}_ms": round(ms, 1) for s, ms in stages.items()}, "seconds": round(sum(stages.values()) / 1000, 3)}


def chosen(rows: Iterable[Row], model: str, group: str, card: Card) -> list[Row]:
    """The rows of a picture, each part as Kindling runs it: for the card's capability, else what stands for it."""
    wanted = (group, decoding_of(group))
    mine = [row for row in rows if row["model"] == model and row["group"] in wanted]
    found: list[Row] = []
    for part in dict.fromkeys(row["part"] for row in mine):
        here = [row for row in mine if row["part"] == part]
        if STAGES.get(part) == "decode":  # compiled, where it can be
            here = [row for row in here if row["plan"] == "compiled"] or here
        there = {row["capability"] for row in here}
        best = [capability for capability in (card.capability, HOPPER, BLACKWELL) if capability in there][:1]
        found += [row for row in here if row["capability"] in best]
    return found


def able(rows: list[Row], group: str, card: Card) -> bool:
    """Whether a worker on the card takes the precision and the attention, and its memory holds the weights."""
    served, attention = PRECISIONS.get(group.partition("/")[0]), variant_of(group).attention
    major, minor = map(int, card.capability.split("."))
    if (served and (major, minor) < served.capability) or attention not in {"", *card.attention}:
        return False
    return ROOM * sum(row.get("weight_bytes", 0) for row in rows) <= card.memory_gb * 1e9


def all_of(rows: list[Row]) -> list[dict[str, Any]]:
    """A prediction for each model, group and card that can."""
    pairs = dict.fromkeys((row["model"], row["group"]) for row in rows)
    return [
        {"model": model, "group": group, "card": name, **found}
        for model, group in pairs
        for name, card in CARDS.items()
        if (found := picture(rows, model, group, card))
    ]
