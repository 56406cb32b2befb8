"""Scenes: what spark can draw, as values. Pictures and captions are both made from one `Scene`.

A scene is one object, several equal ones, or a pair of different ones, on a plain background, white unless a caption
names another. Everything that a caption does not say (exact place, size, shade) comes from `Scene.nuisance`, eight
numbers from a standard normal. `flow.py` ties the same eight numbers to the initial noise, so that a seed decides them.

Knows nothing about tensors, models or checking.
"""

import itertools
import math
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
Point = tuple[float, float]

COLORS: dict[str, RGB] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 215, 50),
    "green": (50, 165, 70),
    "cyan": (70, 205, 220),
    "blue": (45, 85, 220),
    "purple": (130, 60, 180),
    "pink": (245, 140, 190),
    "brown": (120, 75, 40),
    "black": (25, 25, 25),
    "white": (245, 245, 245),
    "gray": (140, 140, 140),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "ring", "cross", "heart")
DIAMETER = {"small": 0.28, "medium": 0.44, "large": 0.66}
PLACES: dict[str, Point] = {
    "top left": (0.25, 0.25),
    "top": (0.5, 0.25),
    "top right": (0.75, 0.25),
    "left": (0.25, 0.5),
    "center": (0.5, 0.5),
    "right": (0.75, 0.5),
    "bottom left": (0.25, 0.75),
    "bottom": (0.5, 0.75),
    "bottom right": (0.75, 0.75),
}
ARRANGEMENT: dict[int, tuple[Point, ...]] = {
    2: ((0.27, 0.5), (0.73, 0.5)),
    3: ((0.5, 0.27), (0.27, 0.72), (0.73, 0.72)),
    4: ((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)),
}
PAIR_DIAMETER = {"small": 0.26, "medium": 0.38, "large": 0.5}
PAIR_ROOM = 0.82  # that both diameters take at most; what is left is shared out before, between and after them
KINDS = ("one", "many", "pair", "sized")  # a sized pair has an object whose size is named
NAMED = tuple(itertools.product((None, "small", "large"), repeat=2))[1:]  # sizes of a sized pair
SPLITS = ("test", "validation", "train")
NUISANCES = 8


@dataclass(frozen=True, slots=True)
class Item:
    """One drawn object. `x`, `y` are fractions of width and height, `diameter` of the shorter side."""

    shape: str
    color: str
    x: float
    y: float
    diameter: float
    rgb: RGB


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture's meaning and, in `rgb` and `items`, its look. A pair's items are left/top first."""

    kind: str
    background: str
    size: str | None
    place: str | None
    axis: str | None
    rgb: RGB
    items: tuple[Item, ...]
    nuisance: tuple[float, ...]
    sizes: tuple[str | None, ...] = (None, None)  # of a pair


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a caption says: the part of a scene that is drawn at random before any nuisance is applied."""

    kind: str
    background: str
    objects: tuple[tuple[str, str], ...]  # (shape, colour)
    size: str | None = None
    place: str | None = None
    axis: str | None = None
    sizes: tuple[str | None, ...] = (None, None)  # of a pair


def split_of(shape: str, color: str, background: str) -> str:
    """Which of `SPLITS` a combination belongs to: a tenth is held out for the test, a tenth for validation."""
    bucket = zlib.crc32(f"{shape}|{color}|{background}".encode()) % 10
    return SPLITS[min(bucket, 2)]


def sample_meaning(rng: random.Random, split: str, kind: str | None = None) -> Meaning:
    """A random meaning all of whose (shape, colour, background) combinations belong to `split`."""
    kind = kind or rng.choices(KINDS, (0.45, 0.25, 0.18, 0.12))[0]
    background = rng.choice(list(COLORS))

    def pick() -> tuple[str, str]:
        while True:
            shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
            if color != background and split_of(shape, color, background) == split:
                return shape, color

    first = pick()
    if kind == "many":
        return Meaning(kind, background, (first,) * rng.choice((2, 3, 4)))
    if kind in ("pair", "sized"):
        second = pick()
        while second == first:
            second = pick()
        axis = rng.choice((None, "horizontal", "vertical"))
        sizes = rng.choice(NAMED) if kind == "sized" else (None, None)
        return Meaning("pair", background, (first, second), axis=axis, sizes=sizes)
    size = rng.choices((None, "small", "large"), (0.5, 0.28, 0.22))[0]
    place = rng.choice(list(PLACES)) if size != "large" and rng.random() < 0.45 else None
    return Meaning(kind, background, (first,), size, place)


def compose(meaning: Meaning, nuisance: tuple[float, ...]) -> Scene:
    """Turn a meaning and eight standard-normal numbers into exact places, sizes and shades."""
    u = [math.erf(v / math.sqrt(2)) for v in nuisance]  # standard normal -> uniform on [-1, 1]
    points, diameters = _layout(meaning)
    diameters = [diameter * (1 + 0.08 * u[2]) for diameter in diameters]
    shift_x, shift_y = _room(meaning, diameters[0])
    rgb = _shade(meaning.background, u[3], u[6])
    items = tuple(
        Item(
            shape,
            color,
            x + shift_x * u[0],
            y + shift_y * u[1],
            diameter,
            _shade(color, u[4 + (meaning.kind == "pair") * i], u[7]),
        )
        for i, ((shape, color), (x, y), diameter) in enumerate(zip(meaning.objects, points, diameters, strict=True))
    )
    said = meaning.kind, meaning.background, meaning.size, meaning.place, meaning.axis
    return Scene(*said, rgb, items, tuple(nuisance), meaning.sizes)


def sample_scene(rng: random.Random, split: str = "train", kind: str | None = None) -> Scene:
    """A random scene of `split`."""
    return compose(sample_meaning(rng, split, kind), tuple(rng.gauss(0, 1) for _ in range(NUISANCES)))


def altered(scene: Scene, rng: random.Random) -> Scene:
    """The same scene with one thing changed, of the training split: an object's colour, its shape, or the background.

    Whatever a caption leaves open stays as it was.
    """
    meaning = meaning_of(scene)
    while True:
        (shape, color), *others = meaning.objects
        changed = rng.choice(("color", "shape", "background"))
        first = (
            rng.choice(SHAPES) if changed == "shape" else shape,
            rng.choice(list(COLORS)) if changed == "color" else color,
        )
        background = rng.choice(list(COLORS)) if changed == "background" else meaning.background
        objects = (first,) * len(meaning.objects) if meaning.kind == "many" else (first, *others)
        new = replace(meaning, background=background, objects=objects)
        distinct = meaning.kind != "pair" or first not in others
        allowed = all(c != background and split_of(s, c, background) == "train" for s, c in objects)
        if new != meaning and distinct and allowed:
            return compose(new, scene.nuisance)


def _layout(meaning: Meaning) -> tuple[tuple[Point, ...], list[float]]:
    if meaning.kind == "many":
        return ARRANGEMENT[len(meaning.objects)], [0.36] * len(meaning.objects)
    if meaning.kind == "pair":
        return _side_by_side(meaning)
    diameter = DIAMETER[meaning.size or "medium"]
    if meaning.place:
        return (PLACES[meaning.place],), [min(diameter, 0.38)]
    return (PLACES["center"],), [diameter]


def _side_by_side(pair: Meaning) -> tuple[tuple[Point, ...], list[float]]:
    diameters = [PAIR_DIAMETER[size or "medium"] for size in pair.sizes]
    fitting = min(1.0, PAIR_ROOM / sum(diameters))
    first, second = (fitting * diameter for diameter in diameters)
    gap = (1 - first - second) / 3
    near, far = gap + first / 2, 1 - gap - second / 2
    points = ((0.5, near), (0.5, far)) if pair.axis == "vertical" else ((near, 0.5), (far, 0.5))
    return points, [first, second]


def _room(meaning: Meaning, diameter: float) -> Point:
    """How far the whole layout may wander: far for a lone object without a named place, else a little."""
    if meaning.kind == "one" and not meaning.place:
        room = min(0.14, 0.46 - diameter / 2)
        return room, room
    if meaning.kind == "pair" or len(meaning.objects) == 2:
        free = 0.10
        return (0.03, free) if meaning.axis != "vertical" else (free, 0.03)
    return 0.03, 0.03


def _shade(color: str, lightness: float, warmth: float) -> RGB:
    r, g, b = COLORS[color]
    return tuple(  # type: ignore[return-value]
        int(min(255, max(0, v + 11 * lightness + w * warmth))) for v, w in ((r, 4), (g, 0), (b, -4))
    )


# ---------------------------------------------------------------- drawing


def _star() -> list[Point]:
    tips = [(1 if i % 2 == 0 else 0.42, i * math.pi / 5) for i in range(10)]
    return [(1.05 * r * math.sin(a), 0.08 - 1.05 * r * math.cos(a)) for r, a in tips]


def _heart() -> list[Point]:
    def point(t: float) -> Point:
        height = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        return math.sin(t) ** 3, -(height + 2.5) / 15

    return [point(i / 48 * 2 * math.pi) for i in range(48)]


_W = 0.34
POLYGONS: dict[str, list[Point]] = {  # corners in units of the radius, y down
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -1), (1, 1), (-1, 1)],
    "diamond": [(0, -1), (0.8, 0), (0, 1), (-0.8, 0)],
    "star": _star(),
    "heart": _heart(),
    "cross": [
        (-_W, -1), (_W, -1), (_W, -_W), (1, -_W), (1, _W), (_W, _W),
        (_W, 1), (-_W, 1), (-_W, _W), (-1, _W), (-1, -_W), (-_W, -_W),
    ],
}  # fmt: skip
RING_HOLE = 0.55


def draw(scene: Scene, size: tuple[int, int], supersample: int = 4) -> Image.Image:
    """Draw `scene` at `size` (width, height in pixels), antialiased by supersampling."""
    width, height = size[0] * supersample, size[1] * supersample
    image = Image.new("RGB", (width, height), scene.rgb)
    pen = ImageDraw.Draw(image)
    for item in scene.items:
        radius = item.diameter / 2 * min(width, height)
        _draw_item(pen, item, item.x * width, item.y * height, radius, scene.rgb)
    return image.reduce(supersample)


def _draw_item(pen: ImageDraw.ImageDraw, item: Item, x: float, y: float, radius: float, behind: RGB) -> None:
    if item.shape in POLYGONS:
        pen.polygon([(x + px * radius, y + py * radius) for px, py in POLYGONS[item.shape]], fill=item.rgb)
        return
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=item.rgb)
    if item.shape == "ring":
        hole = radius * RING_HOLE
        pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=behind)


# ---------------------------------------------------------------- captions

SHAPE_WORDS = {
    "circle": ("circle", "circle", "circle", "disc", "disk", "dot", "ball"),
    "square": ("square", "square", "square", "box", "block"),
    "triangle": ("triangle",),
    "star": ("star",),
    "diamond": ("diamond", "diamond", "diamond", "rhombus"),
    "ring": ("ring", "ring", "ring", "hoop", "donut"),
    "cross": ("cross", "cross", "cross", "plus", "plus sign"),
    "heart": ("heart", "heart", "heart", "love heart"),
}
COLOR_WORDS = {
    "yellow": ("yellow", "yellow", "yellow", "golden"),
    "cyan": ("cyan", "cyan", "cyan", "turquoise"),
    "purple": ("purple", "purple", "purple", "violet"),
    "gray": ("gray", "grey"),
}
PLURALS = {"box": "boxes", "cross": "crosses", "plus": "pluses", "rhombus": "rhombuses"}
NUMBERS = {2: ("two", "two", "two", "2", "a pair of"), 3: ("three", "three", "3"), 4: ("four", "four", "4")}
SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge", "giant")}
FILLER = ("nice", "lovely", "simple", "plain", "beautiful", "cute", "clean", "bright", "flat", "solid", "perfect")
OPENERS = (
    "a picture of {}", "a photo of {}", "an image of {}", "a drawing of {}", "an illustration of {}",
    "a painting of {}", "draw {}", "draw me {}", "please draw {}", "show me {}", "make {}", "create {}",
    "generate {}", "i want {}", "i would like {}", "can you draw {}", "there is {}", "give me {}", "render {}",
)  # fmt: skip
PLACE_PHRASES = {
    "center": (" in the center", " in the middle", " at the center"),
    "left": (" on the left", " on the left side", " at the left"),
    "right": (" on the right", " on the right side", " at the right"),
    "top": (" at the top", " on top", " in the top part"),
    "bottom": (" at the bottom", " in the bottom part"),
}
RELATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # axis -> (first before second, second before first)
    "horizontal": (
        (" left of ", " to the left of ", " on the left of "),
        (" right of ", " to the right of ", " on the right of "),
    ),
    "vertical": ((" above ", " over ", " on top of "), (" below ", " under ", " beneath ")),
}
SETTINGS: tuple[tuple[str, float], ...] = (  # {t} the things, {b} the background colour, {ab} with its article
    ("{t} on {ab} background", 40),
    ("{t} on {b}", 10),
    ("{t} on a background of {b}", 3),
    ("{t}, {b} background", 8),
    ("{ab} background with {t}", 7),
    ("{ab} background and {t}", 3),
    ("{t} on {ab} canvas", 4),
    ("{t} in front of {ab} background", 4),
    ("{t} against {ab} background", 4),
    ("{t} against {b}", 2),
    ("{t} with {ab} background", 5),
    ("{t} over {ab} backdrop", 2),
    ("{t}. the background is {b}", 4),
    ("{t} and the background is {b}", 3),
    ("on {ab} background, {t}", 4),
    ("make the background {b} and draw {t}", 2),
)


UNNAMED = 0.5  # of the everyday captions of scenes on white, those that do not say so


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _color(rng: random.Random, color: str, everyday: bool) -> str:
    return rng.choice(COLOR_WORDS.get(color, (color,))) if everyday else color


@cache
def _plural(noun: str) -> str:
    head, _, tail = noun.rpartition(" ")
    return (head + " " if head else "") + PLURALS.get(tail, tail + "s")


def caption(meaning: Meaning | Scene, rng: random.Random, everyday: bool = True) -> str:
    """One way to say `meaning`: the plainest when `everyday` is false, else any of thousands, lower case or not."""
    things = _things(meaning_of(meaning), rng, everyday)
    background = _color(rng, meaning.background, everyday)
    if not everyday:
        return f"{things} on {_article(background)} background"
    if meaning.background == "white" and rng.random() < UNNAMED:
        text = things
    else:
        template = rng.choices([s for s, _ in SETTINGS], [w for _, w in SETTINGS])[0]
        text = template.format(t=things, b=background, ab=_article(background))
    if rng.random() < 0.25 and not text.startswith(("on ", "make ")):
        text = rng.choice(OPENERS).format(text)
    return _dress(text, rng)


def _dress(text: str, rng: random.Random) -> str:
    case: Callable[[str], str] = rng.choices(
        (str, lambda t: t[0].upper() + t[1:], str.upper, str.title), (0.72, 0.16, 0.06, 0.06)
    )[0]
    return case(text) + rng.choices(("", ".", "!"), (0.84, 0.13, 0.03))[0]


def meaning_of(source: Meaning | Scene) -> Meaning:
    """What a caption says of a scene."""
    if isinstance(source, Meaning):
        return source
    objects = tuple((item.shape, item.color) for item in source.items)
    return Meaning(source.kind, source.background, objects, source.size, source.place, source.axis, source.sizes)


def _things(meaning: Meaning, rng: random.Random, everyday: bool) -> str:
    if meaning.kind == "pair":
        return _pair(meaning, rng, everyday)
    shape, color = meaning.objects[0]
    noun = rng.choice(SHAPE_WORDS[shape]) if everyday else shape
    color = _color(rng, color, everyday)
    if meaning.kind == "many":
        words = NUMBERS[len(meaning.objects)]
        number = rng.choice(words) if everyday else words[0]
        return f"{number} {_filler(rng, everyday)}{color} {_plural(noun)}"
    return _one(meaning, noun, color, rng, everyday)


def _one(meaning: Meaning, noun: str, color: str, rng: random.Random, everyday: bool) -> str:
    size = meaning.size or ""
    if everyday:
        size = rng.choice(SIZE_WORDS.get(meaning.size or "", ("", "", "", "medium")))
    if everyday and not size and rng.random() < 0.07:
        text = f"{_article(noun)} that is {color}" if rng.random() < 0.5 else f"{_article(noun)} in {color}"
    else:
        text = _article(f"{size} {_filler(rng, everyday)}{color} {noun}".strip())
        if everyday and rng.random() < 0.1:
            text = text.removeprefix("a ").removeprefix("an ")
    return text + _place(meaning.place, rng, everyday)


def _filler(rng: random.Random, everyday: bool) -> str:
    return rng.choice(FILLER) + " " if everyday and rng.random() < 0.08 else ""


def _place(place: str | None, rng: random.Random, everyday: bool) -> str:
    if place is None:
        return ""
    if place in PLACE_PHRASES:
        return rng.choice(PLACE_PHRASES[place]) if everyday else PLACE_PHRASES[place][0]
    return f" in the {place}" + (rng.choice((" corner", "")) if everyday else " corner")


def _pair(meaning: Meaning, rng: random.Random, everyday: bool) -> str:
    def name(thing: tuple[str, str], size: str | None) -> str:
        shape, color = thing
        noun = rng.choice(SHAPE_WORDS[shape]) if everyday else shape
        words = f"{_color(rng, color, everyday)} {noun}"
        return _article(f"{rng.choice(SIZE_WORDS[size]) if everyday else size} {words}" if size else words)

    first, second = map(name, meaning.objects, meaning.sizes)
    if meaning.axis is None:
        joiner = rng.choice((" and ", " and ", " next to ", " beside ", " with ")) if everyday else " and "
        return first + joiner + second
    reverse = rng.random() < 0.5
    phrases = RELATIONS[meaning.axis][reverse]
    relation = rng.choice(phrases) if everyday else phrases[0]
    return second + relation + first if reverse else first + relation + second


def held_out(count: int, split: str, kind: str, phrasing: str, seed: int = 7) -> list[tuple[str, Scene]]:
    """`count` distinct prompts of a held-out split with the scene each should give (at zero nuisance).

    `phrasing` is "plain", "everyday" or "capitals".
    """
    rng = random.Random(f"{seed}{split}{kind}{phrasing}")
    prompts: dict[str, Scene] = {}
    while len(prompts) < count:
        meaning = sample_meaning(rng, split, kind)
        text = caption(meaning, rng, everyday=phrasing == "everyday")
        prompts[text.upper() if phrasing == "capitals" else text] = compose(meaning, (0.0,) * NUISANCES)
    return list(prompts.items())
