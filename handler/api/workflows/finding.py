"""Which fields a graph has: found by structure, as its samplers are wired, or named by a node's title.

What is equal in several nodes is one field; what differs gets a number, in the order of execution: `prompt`,
`prompt_2`. A title with `$NAME` or `$NAME.INPUT` in it names what its node says, or that input; so does one that begins
with `Input` or `Prompt:`, such as "Input Image" or "Prompt: style".
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from handler.api.dialects.comfy.graph import outputs_of
from handler.api.dialects.comfy.node import LONGEST, Input, Node
from handler.api.dialects.comfy.plan import class_of, title_of
from handler.api.dialects.comfy.table import TABLE
from handler.api.workflows.fields import ALPHA, RESERVED, Field, Kind, Place
from handler.api.workflows.wiring import behind, inputs_of, leaf, linked, ordered, wanted
from handler.core.loras import HEAVIEST
from handler.core.request import MAX_SEED, MAX_SIDE, MIN_SIDE
from handler.core.sampling import MAX_STEPS

MOST = 64  # fields of one workflow
NAMED = re.compile(r"(?<!\S)\$([A-Za-z]\w*)(?:\.(\w+))?")
SPELLED = re.compile(r"(?:input\s*:\s*|input\s+|prompt\s*:\s*)(\S.*)", re.IGNORECASE)
TEXTS = ("CONDITIONING", "STRING", "SDXL_TUPLE", "*")
SAMPLER = "latent_image"  # what all samplers have
BY_INPUT = {"seed": "seed", "noise_seed": "seed", "steps": "steps", "cfg": "cfg", "denoise": "denoise"}
EMPTY = {"width": "width", "height": "height", "empty_latent_width": "width", "empty_latent_height": "height"}
COUNT = "batch_size"
SAME_SIZE = {"width": "width", "target_width": "width", "height": "height", "target_height": "height"}
WEIGHTS = ("strength_model", "strength_clip", "lora_model_strength", "lora_clip_strength")
KINDS: Mapping[str, Kind] = {"INT": "integer", "FLOAT": "number", "STRING": "string", "BOOLEAN": "boolean"}
FILES = ("image", "mask")
ORDER = ("prompt", "negative_prompt", *FILES, "width", "height", "n", "seed", "steps", "guidance", "cfg", "denoise")
LIMITS: Mapping[str, tuple[float, float]] = {
    "width": (MIN_SIDE, MAX_SIDE),
    "height": (MIN_SIDE, MAX_SIDE),
    "seed": (-1, MAX_SEED),
    "steps": (1, MAX_STEPS),
    "cfg": (1, 100),
    "lora": (-HEAVIEST, HEAVIEST),
}
ABOUT = {
    "prompt": "What the picture should show.",
    "negative_prompt": "What to avoid.",
    "seed": "Left out, or -1, it is drawn at random; the answer names it.",
    "n": "How many pictures.",
    "denoise": "How much of the image is drawn anew.",
    "image": "An image file in base64 or as a data URL.",
    "mask": "An image file of the image's size, transparent where it is to be drawn anew; without it the image's own.",
    "lora": "How much of the LoRA is added.",
}


@dataclass(slots=True)
class Found:
    """Values that mean the same, and where they are; `role` is what they mean, `name` what they are called for that."""

    role: str
    name: str
    value: Any
    wanted: Input
    places: list[Place]


@dataclass(slots=True)
class Search:
    """What was found in a graph so far."""

    graph: Mapping[str, Any]
    max_n: int
    found: list[Found] = field(default_factory=list)
    taken: set[Place] = field(default_factory=set)

    def add(self, role: str, places: list[Place], name: str = "") -> None:
        """Values that are not a field yet, with those that are equal and mean the same."""
        fresh = [place for place in places if place not in self.taken]
        if not fresh:
            return
        self.taken.update(fresh)
        values = [self.value(place) for place in fresh]
        value = next((one for one in values if one != ""), values[0])
        called = name or role
        same = next((one for one in self.found if one.name == called and one.role == role and one.value == value), None)
        if same:
            same.places += fresh
        else:
            self.found.append(Found(role, called, value, _wanted(self.graph, fresh[0]), fresh))

    def value(self, place: Place) -> Any:
        """What the graph has there."""
        found = inputs_of(self.graph, place.node)[place.input]
        return found[place.key] if isinstance(found, dict) else found

    def link(self, role: str, node: str, name: str) -> None:
        """The value of an input, wherever it comes from."""
        if place := leaf(self.graph, node, name):
            self.add(role, [place])


def fields(graph: Mapping[str, Any], max_n: int) -> tuple[Field, ...]:
    """Those of a graph in API format; `max_n` is the worker's KINDLING_MAX_N. GraphRefused if it is none."""
    search = Search(graph, max_n)
    nodes = ordered(graph, outputs_of(graph))
    for node in nodes:
        if SAMPLER in (row := _row(graph, node)).inputs:
            _sampler(search, node, row)
    for node in nodes:
        _image(search, node, nodes)
        _loras(search, node)
    _sizes(search, nodes)
    for node, wanted, name in _titled(graph, [node for node in nodes if not _row(graph, node).output]):
        _rename(search, node, wanted, name)
    return tuple(_numbered(search))[:MOST]


def _row(graph: Mapping[str, Any], node: str) -> Node:
    return TABLE[class_of(graph[node])]


def _sampler(search: Search, node: str, row: Node) -> None:
    """What one sampler is told: by itself, its guider, noise and schedule, and what its prompts and latent are."""
    graph = search.graph
    parts = [node, *behind(graph, node, [*row.inputs], ("GUIDER", "NOISE", "SIGMAS"))]
    for part, name in [(part, name) for part in parts for name in ("positive", "conditioning", "sdxl_tuple")]:
        _prompt(search, part, name, "prompt")
    for part in parts:
        _prompt(search, part, "negative", "negative_prompt")
        _prompt(search, part, "sdxl_tuple", "negative_prompt")
    for part, name in [(part, name) for part in parts for name in _row(graph, part).inputs if name in BY_INPUT]:
        if name != "denoise" or inputs_of(graph, part).get(name, 1) != 1:
            search.link(BY_INPUT[name], part, name)
    for part in behind(graph, node, [SAMPLER], ("LATENT",)):
        names = _row(graph, part).inputs
        for name in names if COUNT in names else ():
            if role := {**EMPTY, COUNT: "n"}.get(name):
                search.link(role, part, name)


def _prompt(search: Search, node: str, name: str, role: str) -> None:
    """The texts that lead to one side of a sampler, and the guidance beside them."""
    graph, negative = search.graph, role.startswith("negative")
    ended = ("ConditioningZeroOut",) if negative else ()
    for one in behind(graph, node, [name], TEXTS, ended):
        row, given = _row(graph, one), inputs_of(graph, one)
        strings = [each for each in row.inputs if row.inputs[each].type == "STRING"]
        texts = [each for each in strings if isinstance(given.get(each), str)]
        if "CONDITIONING" in row.outputs or "SDXL_TUPLE" in row.outputs:
            sided = any("negative" in each for each in strings)
            ours = [each for each in texts if not sided or ("negative" in each) == negative]
            search.add(role, [Place(one, each) for each in ours])
            if "guidance" in row.inputs and not negative:
                search.link("guidance", one, "guidance")
        elif texts and not any(linked(given.get(each)) for each in wanted(row, given)):
            search.add(role, [Place(one, texts[0])])


def _image(search: Search, node: str, nodes: list[str]) -> None:
    """A file that a node reads; a mask if nothing else of it is used."""
    row = _row(search.graph, node)
    name = next((name for name, wanted in row.inputs.items() if _is_file(wanted)), "")
    if not isinstance(inputs_of(search.graph, node).get(name), str):
        return
    links = [value for one in nodes for value in inputs_of(search.graph, one).values() if linked(value)]
    used = {slot for source, slot in links if str(source) == node}
    kinds = {row.outputs[slot] for slot in used if slot < len(row.outputs)}
    search.add("image", [Place(node, name)], "mask" if kinds == {"MASK"} else "image")
    if kinds == {"IMAGE", "MASK"} and row.inputs[name].folder:
        search.add("mask", [Place(node, name, ALPHA)])


def _is_file(wanted: Input) -> bool:
    """Whether an input names a file to work from, or has it in base64, which alone may be so long."""
    return wanted.folder == "input" or wanted.longest > LONGEST


def _loras(search: Search, node: str) -> None:
    """The weights of the LoRAs that a node adds, one for both parts of a model where they are equal."""
    row, given = _row(search.graph, node), inputs_of(search.graph, node)
    if isinstance(file := given.get("lora_name"), str) and file != "None":
        weights = [Place(node, name) for name in WEIGHTS if name in row.inputs and _is_number(given.get(name))]
        for place in weights:
            differs = search.value(place) != search.value(weights[0])
            search.add("lora", [place], _called(file) + ("_clip" if differs else ""))
    for name, value in given.items() if row.rest else ():
        if isinstance(value, dict) and value.get("on") and isinstance(value.get("lora"), str):
            if _is_number(value.get("strength")):
                search.add("lora", [Place(node, name, "strength")], _called(value["lora"]))


def _called(file: str) -> str:
    last = file.replace("\\", "/").rpartition("/")[2].removesuffix(".safetensors")
    return f"lora_{_slug(last).removeprefix('field_')}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sizes(search: Search, nodes: list[str]) -> None:
    """What else is told the latents' size goes with it: schedules, shifts, SDXL's prompts."""
    sizes = {one.role: one.value for one in reversed(search.found) if one.role in ("width", "height")}
    for node in nodes:
        row, given = _row(search.graph, node), inputs_of(search.graph, node)
        for name in row.inputs if {"SIGMAS", "MODEL", "CONDITIONING"} & {*row.outputs} else ():
            if (role := SAME_SIZE.get(name)) in sizes and given.get(name) == sizes[role]:
                search.add(role, [Place(node, name)])


def _titled(graph: Mapping[str, Any], nodes: list[str]) -> Iterator[tuple[str, str, str]]:
    """What titles name: a node, an input of it or none in particular, and the field's name."""
    for node in nodes:
        title = title_of(graph[node])
        yield from ((node, wanted, _slug(name)) for name, wanted in NAMED.findall(title))
        if spelled := SPELLED.fullmatch(title.strip()):
            yield node, "", _slug(spelled[1])


def _rename(search: Search, node: str, said: str, name: str) -> None:
    """Give what a title means the name that it says. Of a node of which nothing was found that is its first value."""
    all_places = (place for one in search.found for place in one.places)
    places = {place for place in all_places if place.node == node and place.key != ALPHA}
    theirs = [one for one in search.found if places.intersection(one.places)]
    inputs = [each for each in _row(search.graph, node).inputs if _literal(search.graph, node, each)]
    if said and (Place(node, said) in places or said not in inputs):
        _split(search, [one for one in theirs if Place(node, said) in one.places], [Place(node, said)], name)
    elif said or (inputs and not theirs):
        search.add("titled", [Place(node, said or inputs[0])], name)
    elif len(theirs) == 1:
        _split(search, theirs, [*places], name)


def _split(search: Search, found: list[Found], ours: list[Place], name: str) -> None:
    """Take a titled node's values out of those that happen to be equal."""
    for one in found:
        mine, one.places = [each for each in one.places if each in ours], [each for each in one.places if each not in ours]
        at = search.found.index(one)
        named = Found(one.role, name, one.value, _wanted(search.graph, mine[0]), mine)
        search.found[at : at + 1] = [named, one] if one.places else [named]


def _literal(graph: Mapping[str, Any], node: str, name: str) -> bool:
    """Whether an input of a node has a value that a field can be for."""
    takes, value = _row(graph, node).inputs.get(name), inputs_of(graph, node).get(name)
    simple = takes is not None and (not isinstance(takes.type, str) or takes.type in KINDS)
    return simple and isinstance(value, str | int | float)


def _wanted(graph: Mapping[str, Any], place: Place) -> Input:
    return _row(graph, place.node).inputs.get(place.input, Input("FLOAT"))


def _numbered(search: Search) -> Iterator[Field]:
    """Fields under names of their own."""
    told = any(one.role == "guidance" for one in search.found)
    names = set(RESERVED)
    for one in sorted(search.found, key=lambda one: ORDER.index(one.role) if one.role in ORDER else len(ORDER)):
        called = {"cfg": "cfg" if told else "guidance"}.get(one.name, one.name)
        name, number = called, 1
        while name in names:
            number += 1
            name = f"{called}_{number}"
        names.add(name)
        yield _field(search, one, name, number == 1)


def _field(search: Search, one: Found, name: str, first: bool) -> Field:
    kind, wanted = _kind(one), one.wanted
    low, high = {**LIMITS, "n": (1, search.max_n)}.get(one.role, (wanted.low, wanted.high))
    if kind not in ("integer", "number"):
        low = high = None
    choices = wanted.type if isinstance(wanted.type, tuple) and not wanted.folder else ()
    seed = one.role == "seed"
    default = None if kind == "image" or (seed and first) else one.value
    kept = one.value if one.role == "image" and wanted.folder else None
    about = ABOUT.get(one.role, "") if not seed or first else ""
    return Field(name, kind, tuple(one.places), default, low, high, choices, kept, seed, about)


def _kind(one: Found) -> Kind:
    if one.role in FILES:
        return "image"
    wanted = one.wanted.type
    return KINDS.get(wanted, "string") if isinstance(wanted, str) else "string"


def _slug(text: str) -> str:
    """A title as a field's name."""
    bare = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:40]
    return bare if bare[:1].isalpha() else f"field_{bare}".rstrip("_")
