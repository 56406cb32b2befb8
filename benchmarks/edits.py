"""What spark makes of images: how often an edit shows what its prompt says, how well that is drawn, and what is kept.

Each image is drawn by rule, and its prompt says the same but for one thing: its objects' colour ("recolour") or shape
("replace"), where its object is ("move"), or that there is another one too ("add"). "right" is `spark.checker`'s word,
as in quality.py; "iou" `spark.measures`' overlap with the shapes that are wanted, low for torn ones. "moved" is how far
objects that should stay are from where they were, in percent of the side: with strength 1, where nothing is kept, it is
what another seed would do. With a mask, boxes around what changes are drawn anew: "outside" is the largest difference
from the image there, and "border" how much the background's colour changes where a box ends, both of 255. The error of
a share p of n edits is about sqrt(p(1-p)/n).

    python benchmarks/edits.py             the table, and benchmarks/results/edits.png; some seven minutes
"""

import argparse
import asyncio
import contextlib
import io
import math
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

import report
from handler import Api, Engine, ImageRequest, Settings
from spark.checker import CONTRAST, border_color, check, look
from spark.measures import measure
from spark.scenes import COLORS, NUISANCES, PLACES, SHAPES, Item, Meaning, Scene, caption, compose, draw, sample_meaning

SIZE = (256, 256)
CALM = (0.0,) * NUISANCES
ROOM = 0.75  # of an object's diameter, from its middle to the sides of its box
BESIDE = 3  # pixels of background that are looked at, to either side of a box's border
WAYS = (*((strength, False) for strength in (0.3, 0.5, 0.75, 1.0)), (1.0, True))
SHOWN = "a yellow star left of a red heart on a blue background"
SHOWN_SEED = 3
EDITS = (
    ("a yellow star left of a white ring on a blue background", (128, 0, 256, 256)),
    ("a yellow star left of a red heart on a purple background", None),
)
Box = tuple[int, int, int, int]
Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Case:
    """An image, the boxes of what is to change, what to make of it, and the scene that this should show."""

    image: Image.Image
    boxes: tuple[Box, ...]
    prompt: str
    wanted: Scene
    stays: bool  # whether objects do


def other(rng: random.Random, some: Iterable[str], *but: str) -> str:
    """One of `some`, and none of the others."""
    return rng.choice([each for each in some if each not in but])


def recoloured(meaning: Meaning, rng: random.Random) -> Meaning:
    """The same with objects of another colour."""
    shape, color = meaning.objects[0]
    new = shape, other(rng, COLORS, color, meaning.background)
    return replace(meaning, objects=(new,) * len(meaning.objects))


def replaced(meaning: Meaning, rng: random.Random) -> Meaning:
    """The same with objects of another shape."""
    shape, color = meaning.objects[0]
    new = other(rng, SHAPES, shape), color
    return replace(meaning, objects=(new,) * len(meaning.objects))


def placed(meaning: Meaning, rng: random.Random) -> Meaning:
    """The same object at another place."""
    return replace(meaning, place=other(rng, PLACES, str(meaning.place)))


def joined(meaning: Meaning, rng: random.Random) -> Meaning:
    """The same object, on the left, and another one right of it."""
    shape, color = meaning.objects[0]
    new = other(rng, SHAPES, shape), other(rng, COLORS, color, meaning.background)
    return Meaning("pair", meaning.background, (meaning.objects[0], new), axis="horizontal")


def any_one(rng: random.Random) -> Meaning:
    """One object or several equal ones."""
    return sample_meaning(rng, "test", rng.choice(("one", "many")))


def lone(rng: random.Random, *places: str) -> Meaning:
    """One object at one of these places."""
    return replace(sample_meaning(rng, "test", "one"), size=None, place=rng.choice(places))


KINDS: dict[str, tuple[Callable[[random.Random], Meaning], Callable[[Meaning, random.Random], Meaning]]] = {
    "recolour": (any_one, recoloured),
    "replace": (any_one, replaced),
    "move": (lambda rng: lone(rng, *PLACES), placed),
    "add": (lambda rng: lone(rng, "left"), joined),
}


@dataclass(frozen=True, slots=True)
class Judged:
    """One edit's measures, NaN where there is nothing to measure."""

    right: float
    iou: float
    moved: float
    outside: float
    border: float


MEASURES = tuple(Judged.__dataclass_fields__)


def main() -> None:
    """Draw, judge, print the table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=50, help="how many of each kind")
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


async def _rows(api: Api, count: int, rows: list[Row]) -> None:
    print(f"{'strength':>8} {'mask':>5} {'kind':>8}" + "".join(f"{name:>8}" for name in MEASURES))
    for strength, masked in WAYS:
        for kind in KINDS:
            found = [
                judged(case, await edited(api, case.prompt, case.image, case.boxes if masked else (), seed, strength))
                for seed, case in enumerate(cases(kind, count))
            ]
            means = {name: _mean([getattr(each, name) for each in found]) for name in MEASURES}
            if not masked:
                means["outside"] = means["border"] = None
            rows.append({"strength": strength, "mask": masked, "kind": kind, "edits": count, **means})
            told = "".join(f"{'' if value is None else value:>8}" for value in means.values())
            print(f"{strength:>8} {masked!s:>5} {kind:>8}{told}", flush=True)


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return round(statistics.mean(known), 3) if known else None


async def edited(
    api: Api, prompt: str, image: Image.Image, boxes: Sequence[Box], seed: int, strength: float | None
) -> Image.Image:
    """The picture that a caller would get."""
    mask = mask_of(boxes) if boxes else None
    request = ImageRequest(prompt=prompt, images=(saved(image),), seed=seed, strength=strength, mask=mask)
    [picture] = await api.draw(request)
    return opened(picture.data)


def cases(kind: str, count: int) -> Iterator[Case]:
    """As many edits of a kind, always the same ones."""
    rng, (sample, change) = random.Random(f"edits: {kind}"), KINDS[kind]
    for _ in range(count):
        meaning = sample(rng)
        scene = compose(meaning, tuple(rng.gauss(0, 1) for _ in CALM))
        asked = change(meaning, rng)
        wanted = compose(asked, CALM)
        gone = scene.items if kind != "add" else ()
        come = {"add": wanted.items[1:], "move": wanted.items}.get(kind, ())
        boxes = tuple(_around(item) for item in (*gone, *come))
        yield Case(draw(scene, SIZE), boxes, caption(asked, rng, everyday=False), wanted, stays=kind != "move")


def _around(item: Item) -> Box:
    half = ROOM * item.diameter
    left, top, right, bottom = (
        round(side * min(1, max(0, at)))
        for side, at in zip(SIZE * 2, (item.x - half, item.y - half, item.x + half, item.y + half), strict=True)
    )
    return left, top, right, bottom


def judged(case: Case, found: Image.Image) -> Judged:
    """What `case` has become."""
    return Judged(
        right=check(found, case.wanted).right,
        iou=measure(found, case.wanted).iou,
        moved=distance(case.image, found) if case.stays else math.nan,
        outside=_outside(case, found),
        border=_border(case, found),
    )


def distance(before: Image.Image, after: Image.Image) -> float:
    """How far the objects of `before` are from the nearest of `after`, in percent of the side; NaN if some went."""
    (_, old), (_, new) = look(before), look(after)
    if not old or len(old) > len(new):
        return math.nan
    return 100 * statistics.mean(min(math.dist((a.x, a.y), (b.x, b.y)) for b in new) for a in old)


def _holes(boxes: Sequence[Box]) -> NDArray[np.bool_]:
    """What the boxes cover, (height, width)."""
    covered = np.zeros(SIZE[::-1], dtype=bool)
    for left, top, right, bottom in boxes:
        covered[top:bottom, left:right] = True
    return covered


def _outside(case: Case, found: Image.Image) -> float:
    """The largest difference from the image outside all boxes, of 255."""
    difference = np.abs(np.asarray(found, dtype=float) - np.asarray(case.image, dtype=float))
    return float(difference[~_holes(case.boxes)].max(initial=0))


def _border(case: Case, found: Image.Image) -> float:
    """How much the background's mean colour differs between just inside the boxes and just outside, of 255."""
    pixels, holes = np.asarray(found, dtype=float), _holes(case.boxes)
    behind = np.linalg.norm(pixels - border_color(pixels), axis=-1) < CONTRAST
    inside = pixels[behind & holes & ~ndimage.binary_erosion(holes, iterations=BESIDE, border_value=1)]
    outside = pixels[behind & ~holes & ndimage.binary_dilation(holes, iterations=BESIDE)]
    if not len(inside) or not len(outside):
        return math.nan
    return float(np.abs(inside.mean(axis=0) - outside.mean(axis=0)).mean())


def mask_of(boxes: Sequence[Box]) -> bytes:
    """Transparent in the boxes."""
    mask = Image.new("RGBA", SIZE, "black")
    for box in boxes:
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
        pictures.append(await edited(api, prompt, pictures[0], (box,) if box else (), SHOWN_SEED, None))
    sheet = Image.new("RGB", (len(pictures) * 264 - 8, SIZE[1]), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (264 * i, 0))
    sheet.save(report.RESULTS / "edits.png", optimize=True)


if __name__ == "__main__":
    main()
