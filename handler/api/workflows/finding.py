"""Which fields a graph has: found by structure, as its samplers are wired, or named by a node's title.

What is equal in several nodes is one field; what differs gets a number, in the order of execution: `prompt`,
`prompt_2`. A title with `$NAME` or `$NAME.INPUT` in it names what its node says, or that input; so does one that begins
with `Input` or `Prompt:`, such as "Input Image" or "Prompt: style".
"""

from collections.abc import Mapping
from typing import Any

from handler.api.dialects.comfy.graph import require_graph, require_outputs
from handler.api.dialects.comfy.node import LONGEST, Input, Node
from handler.api.workflows.fields import ALPHA, Field, Place
from handler.api.workflows.naming import numbered, titled
from handler.api.workflows.search import Search, row_of, slug
from handler.api.workflows.wiring import behind, inputs_of, linked, ordered, wanted

MOST = 64  # fields of one workflow
TEXTS = ("CONDITIONING", "STRING", "SDXL_TUPLE", "*")
SAMPLER = "latent_image"  # what all samplers have
BY_INPUT = {"seed": "seed", "noise_seed": "seed", "steps": "steps", "cfg": "cfg", "denoise": "denoise"}
EMPTY = {"width": "width", "height": "height", "empty_latent_width": "width", "empty_latent_height": "height"}
COUNT = "batch_size"
SAME_SIZE = {"width": "width", "target_width": "width", "height": "height", "target_height": "height"}
WEIGHTS = ("strength_model", "strength_clip", "lora_model_strength", "lora_clip_strength")


def fields(graph: Mapping[str, Any], max_n: int) -> tuple[Field, ...]:
    """Those of a graph in API format; `max_n` is the worker's KINDLING_MAX_N. GraphRefused if it is none."""
    search = Search(graph)
    require_graph(graph)
    nodes = ordered(graph, require_outputs(graph))
    for node in nodes:
        if SAMPLER in (row := row_of(graph, node)).inputs:
            _sampler(search, node, row)
    for node in nodes:
        _image(search, node, nodes)
        _loras(search, node)
    _sizes(search, nodes)
    titled(search, nodes)
    return tuple(numbered(search, max_n))[:MOST]


def _sampler(search: Search, node: str, row: Node) -> None:
    """What one sampler is told: by itself, its guider, noise and schedule, and what its prompts and latent are."""
    graph = search.graph
    parts = [node, *behind(graph, node, [*row.inputs], ("GUIDER", "NOISE", "SIGMAS"))]
    for part, name in [(part, name) for part in parts for name in ("positive", "conditioning", "sdxl_tuple")]:
        _prompt(search, part, name, "prompt")
    for part in parts:
        _prompt(search, part, "negative", "negative_prompt")
        _prompt(search, part, "sdxl_tuple", "negative_prompt")
    for part, name in [(each, name) for each in parts for name in row_of(graph, each).inputs if name in BY_INPUT]:
        if name != "denoise" or inputs_of(graph, part).get(name, 1) != 1:
            search.link(BY_INPUT[name], part, name)
    for part in behind(graph, node, [SAMPLER], ("LATENT",)):
        names = row_of(graph, part).inputs
        for name in names if COUNT in names else ():
            if role := {**EMPTY, COUNT: "n"}.get(name):
                search.link(role, part, name)


def _prompt(search: Search, node: str, name: str, role: str) -> None:
    """The texts that lead to one side of a sampler, and the guidance beside them."""
    graph, negative = search.graph, role.startswith("negative")
    ended = ("ConditioningZeroOut",) if negative else ()
    for one in behind(graph, node, [name], TEXTS, ended):
        row, given = row_of(graph, one), inputs_of(graph, one)
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
    row = row_of(search.graph, node)
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
    row, given = row_of(search.graph, node), inputs_of(search.graph, node)
    if isinstance(file := given.get("lora_name"), str) and file != "None":
        weights = [Place(node, name) for name in WEIGHTS if name in row.inputs and _is_number(given.get(name))]
        for place in weights:
            differs = search.value(place) != search.value(weights[0])
            search.add("lora", [place], _called(file) + ("_clip" if differs else ""))
    for name, value in given.items() if row.rest else ():
        one = value if isinstance(value, dict) and value.get("on") else {}
        if isinstance(one.get("lora"), str) and _is_number(one.get("strength")):
            search.add("lora", [Place(node, name, "strength")], _called(one["lora"]))


def _called(file: str) -> str:
    last = file.replace("\\", "/").rpartition("/")[2].removesuffix(".safetensors")
    return f"lora_{slug(last).removeprefix('field_')}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sizes(search: Search, nodes: list[str]) -> None:
    """What else is told the latents' size goes with it: schedules, shifts, SDXL's prompts."""
    sizes = {one.role: one.value for one in reversed(search.found) if one.role in ("width", "height")}
    for node in nodes:
        row, given = row_of(search.graph, node), inputs_of(search.graph, node)
        for name in row.inputs if {"SIGMAS", "MODEL", "CONDITIONING"} & {*row.outputs} else ():
            if (role := SAME_SIZE.get(name)) in sizes and given.get(name) == sizes[role]:
                search.add(role, [Place(node, name)])
