"""Candidates as points, for a receipt: seconds a picture to the right, likeness or memory upwards."""

from collections.abc import Collection, Mapping
from pathlib import Path

from handler.volume.receipts import Candidate, Figures

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 1000, 520, 70, 70, 660, 450
INK, PALE, FRONT, BEST = "#222222", "#9aa5b1", "#4d9de0", "#3bb273"


def scatter(
    measured: Mapping[Candidate, Figures],
    front: Collection[Candidate],
    winner: Candidate | None,
    path: Path,
    title: str,
) -> None:
    """Save the plot: numbered points, named beside it; the Pareto front in blue, the winner in green."""
    from PIL import Image, ImageDraw, ImageFont

    alike = all(figures.psnr_db is not None for figures in measured.values())
    upwards = {one: (f.psnr_db or 0.0) if alike else f.peak_gb for one, f in measured.items()}
    across, up = _scale([f.p50_s for f in measured.values()], LEFT, RIGHT), _scale(upwards.values(), BOTTOM, TOP)
    font, small = ImageFont.load_default(20), ImageFont.load_default(15)
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    pen.text((20, 16), title, INK, font)
    pen.line((LEFT - 20, TOP - 10, LEFT - 20, BOTTOM + 20, RIGHT + 20, BOTTOM + 20), PALE)
    pen.text((LEFT - 20, BOTTOM + 28), "seconds a picture (p50), faster to the left", INK, small)
    pen.text((LEFT - 12, TOP - 22), "likeness, PSNR in dB" if alike else "memory, GB", INK, small)
    for number, (one, figures) in enumerate(measured.items(), 1):
        x, y = across[0] + figures.p50_s * across[1], up[0] + upwards[one] * up[1]
        colour = BEST if one == winner else FRONT if one in front else PALE
        pen.ellipse((x - 6, y - 6, x + 6, y + 6), colour)
        pen.text((x + 9, y - 9), str(number), INK, small)
        line = f"{number}  {one.name}: {figures.p50_s:.3f} s, {upwards[one]:.1f} {'dB' if alike else 'GB'}"
        pen.ellipse((RIGHT + 34, TOP + 24 * number - 18, RIGHT + 44, TOP + 24 * number - 8), colour)
        pen.text((RIGHT + 52, TOP + 24 * number - 22), line, INK, small)
    image.save(path, optimize=True)


def _scale(values: Collection[float], first: int, last: int) -> tuple[float, float]:
    """(a, b) so that a + b * value is the pixel, the least value at `first`."""
    least, most = min(values), max(values)
    factor = (last - first) / (most - least) if most > least else 0.0
    return first - least * factor, factor
