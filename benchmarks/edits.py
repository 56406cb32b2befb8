"""What spark makes of images: how often an edit shows what its prompt says, and how much of the image it keeps.

Each image is drawn by rule, and its prompt says the same but for the objects' colour, their shape or the background.
"right" is `spark.checker`'s word, as in quality.py; "moved" is how far the objects are from where they were, in percent
of the side: with strength 1, where nothing is kept, it is what another seed would do. With a mask, the object stands in
a box that is drawn anew. The error of a share p of n edits is about sqrt(p(1-p)/n).

    python benchmarks/edits.py             the table, and benchmarks/results/edits.png; about three minutes
"""

import argparse
import asyncio
import contextlib
import io
import math
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace

from PIL import Image

import report
from handler import Api, Engine, ImageRequest, Settings
from spark.checker import check, look
from spark.scenes import COLORS, NUISANCES, SHAPES, Item, Scene, caption, compose, draw, sample_meaning

SIZE = (256, 256)
CALM = (0.0,) * NUISANCES
WAYS = (*((strength, False) for strength in (0.25, 0.5, 0.75, 1.0)), (1.0, True))
JUDGED = ("right", "background", "color", "shape")
SHOWN = "a yellow star left of a red heart on a blue background"
SHOWN_SEED = 3
EDITS = (
    ("a yellow star left of a white ring on a blue background", (128, 0, 256, 256)),
    ("a yellow star left of a red heart on a purple background", None),
)


@dataclass(frozen=True, slots=True)
class Case:
    """An image, where its object is, what to make of it, and the scene that this should show."""

    image: bytes
    box: tuple[int, ...]
    prompt: str
    wanted: Scene


def main() -> None:
    """Draw, judge, print the table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=60, help="how many of each kind")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/edits.json and edits.png")
    options = parser.parse_args()
    engine = Engine(Settings.from_env(model="spark"))
    engine.start()
    engine.wait_booted()
    with report.measuring("edits", options.save) as figures, contextlib.ExitStack() as stack:
        stack.callback(engine.stop)
        asyncio.run(_rows(Api(engine), options.edits, figures.setdefault("rows", [])))
        if options.save:
            asyncio.run(_sheet(Api(engine)))


async def _rows(api: Api, count: int, rows: list[dict[str, object]]) -> None:
    print(f"{'strength':>8} {'mask':>5}  right  behind colour  shape  moved")
    for strength, masked in WAYS:
        verdicts, moved = [], []
        for seed, case in enumerate(cases(count, masked)):
            mask = mask_of(case.box) if masked else None
            found = await edited(api, case.prompt, case.image, mask, seed, strength)
            verdicts.append(check(found, case.wanted))
            moved += distance(opened(case.image), found)
        shares = {name: round(statistics.mean(getattr(v, name) for v in verdicts), 2) for name in JUDGED}
        shares["moved"] = round(statistics.mean(moved), 1)
        rows.append({"strength": strength, "mask": masked, "edits": count, **shares})
        print(f"{strength:>8} {masked!s:>5} " + " ".join(f"{share:>6}" for share in shares.values()), flush=True)


async def edited(
    api: Api, prompt: str, image: bytes, mask: bytes | None, seed: int, strength: float | None
) -> Image.Image:
    """The picture that a caller would get."""
    known = {"mask": mask} if mask else {}
    request = ImageRequest(prompt=prompt, images=(image,), seed=seed, strength=strength, **known)
    [picture] = await api.draw(request)
    return opened(picture.data)


def cases(count: int, masked: bool) -> Iterator[Case]:
    """As many edits, in turn of colour, of shape and, without a mask, of the background."""
    rng, kinds, turns = random.Random("edits"), ("one",) if masked else ("one", "many"), 2 if masked else 3
    for i in range(count):
        meaning = sample_meaning(rng, "test", kinds[i % len(kinds)])
        scene = compose(meaning, tuple(rng.gauss(0, 1) for _ in CALM))
        (shape, color), *_ = meaning.objects
        other = rng.choice([each for each in COLORS if each not in (color, meaning.background)])
        another = rng.choice([each for each in SHAPES if each != shape])
        new = [(shape, other), (another, color), (shape, color)][i % turns]
        asked = replace(meaning, objects=(new,) * len(meaning.objects))
        if new == (shape, color):
            asked = replace(asked, background=other)
        wanted = compose(asked, CALM)
        yield Case(saved(draw(scene, SIZE)), _around(scene.items[0]), caption(asked, rng, everyday=False), wanted)


def _around(item: Item) -> tuple[int, ...]:
    half = 0.75 * item.diameter
    sides = (item.x - half, item.y - half, item.x + half, item.y + half)
    return tuple(round(SIZE[0] * min(1, max(0, side))) for side in sides)


def distance(before: Image.Image, after: Image.Image) -> list[float]:
    """How far each object of `before` is from the nearest of `after`; nothing if there are more or fewer."""
    (_, old), (_, new) = look(before), look(after)
    if len(old) != len(new):
        return []
    return [100 * min(math.dist((a.x, a.y), (b.x, b.y)) for b in new) for a in old]


def mask_of(box: tuple[int, ...]) -> bytes:
    """Transparent in `box`."""
    mask = Image.new("RGBA", SIZE, "black")
    mask.paste((0, 0, 0, 0), box)
    return saved(mask)


def saved(image: Image.Image) -> bytes:
    """As PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    """From a file's bytes."""
    return Image.open(io.BytesIO(data)).convert("RGB")


async def _sheet(api: Api) -> None:
    """The README's pictures: what spark draws, and two edits of it."""
    [first] = await api.draw(ImageRequest(prompt=SHOWN, seed=SHOWN_SEED))
    pictures = [opened(first.data)]
    for prompt, box in EDITS:
        pictures.append(await edited(api, prompt, first.data, mask_of(box) if box else None, SHOWN_SEED, None))
    sheet = Image.new("RGB", (len(pictures) * 264 - 8, SIZE[1]), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (264 * i, 0))
    sheet.save(report.RESULTS / "edits.png", optimize=True)


if __name__ == "__main__":
    main()
