"""Stacked bars as a PNG, for the README."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#9aa5b1", "#f2c14e", "#4d9de0", "#3bb273", "#7768ae", "#e15554", "#f78154", "#5b5f97", "#2f4858", "#c9ada7")
WIDTH, BAR, GAP, LEFT, TOP = 1000, 34, 14, 190, 84
INK = "#222222"


def stacked(
    rows: Mapping[str, Mapping[str, float]], parts: Sequence[str], path: Path, title: str, unit: str = "{:.3g} s"
) -> None:
    """Draw one bar a row, one colour a part, and save it as `path`; `unit` is how the sum of a row is written."""
    font, small = ImageFont.load_default(20), ImageFont.load_default(16)
    longest = max(sum(row.get(part, 0.0) for part in parts) for row in rows.values())
    scale = (WIDTH - LEFT - 90) / longest
    image = Image.new("RGB", (WIDTH, TOP + len(rows) * (BAR + GAP) + GAP), "white")
    pen = ImageDraw.Draw(image)
    pen.text((20, 14), title, INK, font)
    x = 20.0
    for part, colour in zip(parts, cycle(COLOURS), strict=False):
        pen.rectangle((x, 52, x + 14, 66), colour)
        pen.text((x + 20, 49), part, INK, small)
        x += 40 + pen.textlength(part, small)
    for i, (name, row) in enumerate(rows.items()):
        x, y = float(LEFT), TOP + i * (BAR + GAP)
        pen.text((20, y + 8), name, INK, small)
        for part, colour in zip(parts, cycle(COLOURS), strict=False):
            width = row.get(part, 0.0) * scale
            pen.rectangle((x, y, x + width, y + BAR), colour)
            x += width
        pen.text((x + 8, y + 7), unit.format(sum(row.get(part, 0.0) for part in parts)), INK, small)
    path.parent.mkdir(exist_ok=True)
    image.save(path, optimize=True)
