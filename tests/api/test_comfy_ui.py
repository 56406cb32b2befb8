"""UI format made API format: each of the page's traps, by small workflows."""

import copy
from typing import Any

import pytest
from workflows import SAMPLER, Ui, api, default, item, slot

from handler.api.dialects.comfy.ui import unfolding
from handler.api.dialects.comfy.ui.conversion import Converted, converted
from handler.api.dialects.comfy.ui.prompts import chosen
from handler.core.errors import GraphRefused

CUSTOM = {
    "Custom": {
        "input": {
            "required": {
                "image": ["IMAGE", {}],
                "word": [["one", "two"], {}],
                "way": [
                    "COMFY_DYNAMICCOMBO_V3",
                    {
                        "options": [
                            {"key": "by side", "inputs": {"required": {"side": ["INT", {"default": 8}]}}},
                            {"key": "by area", "inputs": {"required": {"area": ["FLOAT", {"default": 1.0}]}}},
                        ]
                    },
                ],
                "forced": ["STRING", {"forceInput": True}],
            },
            "optional": {"count": ["INT", {"default": 3}], "list": ["COMBO", {"options": ["a", "b"]}]},
        },
        "input_order": {"required": ["word", "image", "way", "forced"], "optional": ["count", "list"]},
        "display_name": "A custom one",
    }
}


def bare(found: Converted) -> dict[str, Any]:
    return {name: {key: one[key] for key in ("class_type", "inputs")} for name, one in found.graph.items()}


def by_id(found: Ui, number: Any) -> dict[str, Any]:
    return next(one for one in found["nodes"] if one["id"] == number)


def between(found: Ui, link: int, number: Any, kind: str, values: Any = (), **more: Any) -> Ui:
    """A node of one input and one output put into a link."""
    old = next(one for one in found["links"] if one[0] == link)
    found["links"].append([100 + link, number, 0, old[3], old[4], old[5]])
    by_id(found, old[3])["inputs"][old[4]]["link"] = 100 + link
    old[3], old[4] = number, 0
    found["nodes"].append(item(number, kind, values, [slot("", "*", link)], (old[5],), **more))
    return found


def without(found: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: one for name, one in found.items() if name not in names}


def test_the_default() -> None:
    found = converted(default())
    assert (bare(found), found.notes) == (api(), ())
    assert found.graph["8"]["_meta"] == {"title": "VAE Decode"}


def test_links_may_be_objects_and_ids_texts() -> None:
    found = default()
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    found["links"] = [dict(zip(keys, one, strict=True)) for one in found["links"]]
    assert bare(converted(found)) == api()
    found["links"] = {str(one["id"]): one for one in found["links"]}
    for one in found["nodes"]:
        one["id"] = str(one["id"])
    assert bare(converted(found)) == api()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([7, 4, 1, "euler", "simple", 1], {}),  # before seeds had a word
        ([7, True, 4, 1, "euler", "simple", 1], {}),  # and when it was a box to tick
        ([7, "fixed", 4, 1, "euler", "simple", 1, "more"], {}),
        ({"seed": 7, "steps": 4, "cfg": 1, "sampler_name": "euler", "scheduler": "simple", "denoise": 1}, {}),
        ([7, "fixed", 4, 1, "euler", "simple"], {"denoise": 1.0}),
        ([7, "fixed", 4, 1, "euler"], {"scheduler": "simple", "denoise": 1.0}),
    ],
)
def test_values_of_every_age(values: Any, expected: dict[str, Any]) -> None:
    found = default()
    by_id(found, 3)["widgets_values"] = values
    made = converted(found)
    assert bare(made) == api()
    assert bool(made.notes) == bool(expected)
    assert all(f"{name} {value!r}" in made.notes[0] for name, value in expected.items())


def test_values_that_newer_pages_keep_by_name() -> None:
    found = default()
    names = ("seed", "control_after_generate", "steps", "cfg", "sampler_name", "scheduler", "denoise")
    by_id(found, 3).update(widgets_values=[], widgets_values_named=dict(zip(names, SAMPLER, strict=True)))
    assert bare(converted(found)) == api()


def test_what_only_the_page_has_is_passed() -> None:
    found = between(between(default(), 1, 20, "Reroute"), 9, 21, "Reroute (rgthree)")
    found["nodes"] += [item(22, "Note", ("hello",)), item(23, "MarkdownNote", ("# hello",))]
    made = converted(found)
    assert (bare(made), made.notes) == (api(), ())


def test_what_is_set_elsewhere() -> None:
    found = default()
    found["nodes"] += [
        item(30, "SetNode", ("model",), [slot("MODEL", "MODEL", 1)], ("*",)),
        item(31, "GetNode", ("model",), (), ("MODEL",)),
    ]
    found["links"][0] = [1, 4, 0, 30, 0, "MODEL"]
    found["links"].append([40, 31, 0, 3, 0, "MODEL"])
    by_id(found, 3)["inputs"][0]["link"] = 40
    assert bare(converted(found)) == api()


def test_a_primitive_gives_its_value_and_a_converted_widget_its_link() -> None:
    found = default()
    by_id(found, 3)["inputs"] += [slot("seed", "INT", 50, True), slot("steps", "INT", 51, True)]
    found["nodes"] += [
        item(41, "PrimitiveNode", (99, "fixed"), (), ("INT",)),
        item(42, "PrimitiveInt", (12, "fixed"), (), ("INT",)),
    ]
    found["links"] += [[50, 41, 0, 3, 4, "INT"], [51, 42, 0, 3, 5, "INT"]]
    made = bare(converted(found))
    assert (made["3"]["inputs"]["seed"], made["3"]["inputs"]["steps"]) == (99, ["42", 0])
    assert made["42"] == {"class_type": "PrimitiveInt", "inputs": {"value": 12}}
    assert "41" not in made


def test_a_text_from_a_primitive_is_sent_as_from_the_widget_itself() -> None:
    found, said = default(), "a {red|blue} cat // a note\non grass"
    by_id(found, 6)["inputs"].append(slot("text", "STRING", 50, True))
    found["nodes"].append(item(41, "PrimitiveNode", (said,), (), ("STRING",)))
    found["links"].append([50, 41, 0, 6, 1, "STRING"])
    made = converted(found)
    assert made.graph["6"]["inputs"]["text"] == "a red cat \non grass"
    assert [note for note in made.notes if "choices in braces" in note] == [
        "Node 6 (CLIPTextEncode): text has choices in braces; the first of each is taken."
    ]


@pytest.mark.parametrize("mode", [0, 2, 4])
def test_whether_a_node_of_the_pages_own_is_muted_does_not_matter(mode: int) -> None:
    """The page asks that of nodes that execute alone."""
    assert bare(converted(between(default(), 1, 20, "Reroute", mode=mode))) == api()
    found = default()
    by_id(found, 3)["inputs"].append(slot("seed", "INT", 50, True))
    found["nodes"].append(item(41, "PrimitiveNode", (99, "fixed"), (), ("INT",), mode=mode))
    found["links"].append([50, 41, 0, 3, 4, "INT"])
    assert bare(converted(found))["3"]["inputs"]["seed"] == 99


def test_a_bypassed_node_passes_what_has_its_type() -> None:
    found = default()
    lora = [slot("model", "MODEL", 1), slot("clip", "CLIP", 3)]
    found["nodes"].append(item(10, "LoraLoader", ("x.safetensors", 1, 1), lora, ("MODEL", "CLIP"), mode=4))
    found["links"][0], found["links"][2] = [1, 4, 0, 10, 0, "MODEL"], [3, 4, 1, 10, 1, "CLIP"]
    found["links"] += [[60, 10, 0, 3, 0, "MODEL"], [61, 10, 1, 6, 0, "CLIP"]]
    by_id(found, 3)["inputs"][0]["link"], by_id(found, 6)["inputs"][0]["link"] = 60, 61
    made = converted(found)
    assert (bare(made), made.notes) == (api(), ("1 bypassed node is left out, as on the page.",))
    by_id(found, 10)["inputs"] = [slot("image", "IMAGE"), *lora]  # no longer at the same place
    assert bare(converted(found)) == api()
    by_id(found, 10)["inputs"] = [slot("image", "IMAGE")]
    assert "model" not in converted(found).graph["3"]["inputs"]


def test_a_muted_node_is_gone_and_so_are_links_to_it() -> None:
    found = default()
    by_id(found, 7)["mode"] = 2
    expected = without(api(), "7")
    del expected["3"]["inputs"]["negative"]
    made = converted(found)
    assert (bare(made), made.notes) == (expected, ("1 muted node is left out, as on the page.",))


def subgraphed(values: Any = (), **more: Any) -> Ui:
    """The default with its sampler and decoder in a subgraph, `inner`; its host is node 57."""
    found = default()
    inner = [by_id(found, 3), by_id(found, 8)]
    inner[0]["inputs"] += [slot("seed", "INT", 20, True), slot("steps", "INT", 21, True)]
    names = [("model", "MODEL", 1), ("positive", "CONDITIONING", 5), ("negative", "CONDITIONING", 6)]
    names += [("latent", "LATENT", 2), ("vae", "VAE", 8)]
    ports = [{"id": name, "name": name, "type": kind, "linkIds": [link]} for name, kind, link in names]
    ports += [
        {"id": name, "name": name, "type": "INT", "linkIds": [link]} for name, link in (("seed", 20), ("steps", 21))
    ]
    links = [
        {"id": link, "origin_id": -10, "origin_slot": place, "target_id": target, "target_slot": slot_}
        for place, (link, target, slot_) in enumerate(
            [(1, 3, 0), (5, 3, 1), (6, 3, 2), (2, 3, 3), (8, 8, 1), (20, 3, 4), (21, 3, 5)]
        )
    ]
    links += [
        {"id": 7, "origin_id": 3, "origin_slot": 0, "target_id": 8, "target_slot": 0},
        {"id": 9, "origin_id": 8, "origin_slot": 0, "target_id": -20, "target_slot": 0},
    ]
    outputs = [{"id": "image", "name": "IMAGE", "type": "IMAGE", "linkIds": [9]}]
    sub = {"id": "inner", "name": "Draw", "nodes": inner, "links": links, "inputs": ports, "outputs": outputs}
    slots = [slot(name, kind, 70 + place) for place, (name, kind, _) in enumerate(names)]
    host = item(57, "inner", values, slots, ("IMAGE",), **more)
    origins = [(4, 0), (6, 0), (7, 0), (5, 0), (4, 2)]
    found["nodes"] = [one for one in found["nodes"] if one["id"] not in (3, 8)] + [host]
    found["links"] = [one for one in found["links"] if one[0] in (3, 4)] + [[9, 57, 0, 9, 0, "IMAGE"]]
    found["links"] += [[70 + place, *origin, 57, place, "*"] for place, origin in enumerate(origins)]
    found["definitions"] = {"subgraphs": [sub]}
    return found


def inside(**changes: Any) -> dict[str, Any]:
    """What `subgraphed` is for the server."""
    made = api()
    made["57:3"], made["57:8"] = made.pop("3"), made.pop("8")
    made["57:8"]["inputs"]["samples"], made["9"]["inputs"]["images"] = ["57:3", 0], ["57:8", 0]
    made["57:3"]["inputs"].update(changes)
    return made


@pytest.mark.parametrize(
    ("values", "more", "changes"),
    [
        ((), {}, {}),
        ((8, 5), {}, {"seed": 8, "steps": 5}),
        ((8, "fixed", 5), {}, {"seed": 8, "steps": 5}),
        ((), {"widgets_values_named": {"steps": 5}}, {"steps": 5}),
        ((5, 8), {"properties": {"proxyWidgets": [["3", "steps"], ["-1", "seed"]]}}, {"seed": 8, "steps": 5}),
        ((2, None), {"properties": {"proxyWidgets": [["3", "cfg"], ["3", "seed"]]}}, {"cfg": 2}),
        (
            (2, "random"),
            {"properties": {"proxyWidgets": [["3", "8: cfg"], ["3", "control_after_generate"]]}},
            {"cfg": 2},
        ),
    ],
)
def test_a_subgraph_is_unfolded_with_what_its_host_says(values: Any, more: Any, changes: Any) -> None:
    assert bare(converted(subgraphed(values, **more))) == inside(**changes)


def test_a_link_to_a_host_is_a_link_inside() -> None:
    found = subgraphed((8, 5))
    host = by_id(found, 57)
    host["inputs"].append(slot("steps", "INT", 90, True))
    found["nodes"].append(item(42, "PrimitiveInt", (12, "fixed"), (), ("INT",)))
    found["links"].append([90, 42, 0, 57, 5, "INT"])
    made = bare(converted(found))
    assert without(made, "42") == inside(seed=8, steps=["42", 0])
    by_id(found, 42)["type"] = "PrimitiveNode"
    assert bare(converted(found)) == inside(seed=8, steps=12)


def nested() -> Ui:
    """`subgraphed` inside another subgraph, whose host, 5, says the steps."""
    found = subgraphed((8, 5))
    sub = found["definitions"]["subgraphs"][0]
    host = by_id(found, 57)
    host["inputs"].append(slot("steps", "INT", 21, True))
    outer = {"id": "outer", "nodes": [one for one in found["nodes"] if one["id"] != 9]}
    outer["links"] = [one for one in found["links"] if one[0] != 9]
    outer["links"] += [[21, -10, 0, 57, 5, "INT"], [9, 57, 0, -20, 0, "IMAGE"]]
    outer["inputs"] = [{"id": "n", "name": "n", "type": "INT", "linkIds": [21]}]
    outer["outputs"] = [{"id": "o", "name": "o", "type": "IMAGE", "linkIds": [9]}]
    nodes = [item(1, "outer", (6,), [slot("n", "INT", None, True)], ("IMAGE",)), by_id(found, 9)]
    return {"nodes": nodes, "links": [[9, 1, 0, 9, 0, "IMAGE"]], "definitions": {"subgraphs": [sub, outer]}}


def test_subgraphs_in_each_other() -> None:
    made = converted(nested()).graph
    assert {"1:57:3", "1:57:8", "1:4", "9"} < made.keys()
    inputs = made["1:57:3"]["inputs"]
    assert (inputs["seed"], inputs["steps"], inputs["model"]) == (8, 6, ["1:4", 0])
    assert made["9"]["inputs"]["images"] == ["1:57:8", 0]


def test_a_subgraph_of_which_nothing_executes_is_left_out() -> None:
    for mode, word in ((2, "muted"), (4, "bypassed")):
        found = subgraphed()
        by_id(found, 57)["mode"] = mode
        made = converted(found)
        assert not [name for name in made.graph if ":" in name]
        assert "images" not in made.graph["9"]["inputs"]
        assert made.notes == (f"1 {word} node is left out, as on the page.",)


def grouped(values: Any) -> Ui:
    """The default with its sampler, a Reroute before it and a primitive in a group node."""
    found = default()
    sampler = by_id(found, 3)
    sampler["inputs"] = [slot(one["name"], one["type"]) for one in sampler["inputs"]] + [
        slot("steps", "INT", None, True)
    ]
    nodes = [item(None, "Reroute", (), [slot("", "*")], ("MODEL",)), sampler]
    nodes.append(item(None, "PrimitiveNode", (3, "fixed"), (), ("INT",)))
    group = {
        "nodes": nodes,
        "links": [[0, 0, 1, 0, 4, "MODEL"], [2, 0, 1, 4, 9, "INT"]],
        "external": [[1, 0, "LATENT"]],
    }
    host = item(3, "workflow>Draw", values, [], ("LATENT",))
    for place, (name, link) in enumerate((("MODEL", 1), ("positive", 5), ("negative", 6), ("latent_image", 2))):
        host["inputs"].append(slot(name, "*", link))
        next(one for one in found["links"] if one[0] == link)[4] = place
    found["nodes"] = [host if one["id"] == 3 else one for one in found["nodes"]]
    found["extra"] = {"groupNodes": {"Draw": group}}
    return found


def test_a_group_node_is_unfolded() -> None:
    expected = api()
    expected["3:1"] = expected.pop("3")
    expected["8"]["inputs"]["samples"] = ["3:1", 0]
    expected["3:1"]["inputs"] |= {"seed": 11, "steps": 9, "cfg": 2}
    assert bare(converted(grouped((11, "fixed", 2, "euler", "simple", 1, 9, "fixed")))) == expected


def test_everywhere() -> None:
    found = default()
    by_id(found, 8)["inputs"][1]["link"] = None
    by_id(found, 3)["inputs"][0]["link"] = None
    found["nodes"].append(item(80, "Anything Everywhere3", (), [slot("anything", "*", 8), slot("anything2", "*", 1)]))
    found["links"][7], found["links"][0] = [8, 4, 2, 80, 0, "VAE"], [1, 4, 0, 80, 1, "MODEL"]
    made = converted(found)
    assert bare(made) == api()
    assert made.notes == ("2 inputs are linked as the file's 'everywhere' nodes say.",)
    by_id(found, 80)["inputs"] = []
    keys = ("downstream", "downstream_slot", "upstream", "upstream_slot")
    links = [(8, 1, "4", 2), (3, 0, "4", 0), (3, 99, "4", 0), ("no", 0, "4", 0), (3, 2, "no", 0)]
    found["extra"]["ue_links"] = [dict(zip(keys, one, strict=True)) for one in links]
    assert (bare(converted(found)), converted(found).notes) == (api(), made.notes)


def test_two_that_go_everywhere_are_told() -> None:
    found = default()
    by_id(found, 3)["inputs"][1]["link"] = None
    slots = [slot("anything", "*", 5), slot("anything2", "*", 50)]
    found["nodes"].append(item(80, "Anything Everywhere3", (), slots))
    found["links"].append([50, 7, 0, 80, 1, "CONDITIONING"])
    made = converted(found)
    assert "positive" not in made.graph["3"]["inputs"]
    assert made.notes == ("Several nodes send a CONDITIONING everywhere, and where each goes is not known.",)


def custom(values: Any, **more: Any) -> Ui:
    found = default()
    found["nodes"].append(item(12, "Custom", values, [slot("image", "IMAGE", 9)], ("IMAGE",), **more))
    return found


def test_a_class_of_an_object_info() -> None:
    made = converted(custom(("two", "by area", 2.5, 4, "b")), CUSTOM).graph["12"]
    expected = {"word": "two", "way": "by area", "way.area": 2.5, "count": 4, "list": "b", "image": ["8", 0]}
    assert made == {"inputs": expected, "class_type": "Custom", "_meta": {"title": "A custom one"}}
    short = converted(custom(("two", "by side")), CUSTOM)
    assert short.graph["12"]["inputs"] == {
        "word": "two", "way": "by side", "way.side": 8, "count": 3, "list": "a", "image": ["8", 0]
    }  # fmt: skip
    assert short.notes == (
        "Node 12 (Custom): the file has no value for way.side 8, count 3, list 'a': the default is taken.",
    )


def test_a_class_that_nobody_knows() -> None:
    made = converted(custom(("two", 5, "fixed")))
    assert made.graph["12"]["inputs"] == {"image": ["8", 0]}
    assert made.notes == (
        "Node 12 (Custom): its values have no names in this file, and its class is not known here: they are left out.",
    )
    found = custom(("two", 5, "fixed"))
    by_id(found, 12)["inputs"] += [slot("word", "COMBO", None, True), slot("seed", "INT", None, True)]
    made = converted(found)
    assert made.graph["12"]["inputs"] == {"image": ["8", 0], "word": "two", "seed": 5}
    assert made.notes == ()


def test_a_class_that_only_renames_is_not_trusted_with_more_values_than_it_has() -> None:
    found = default()
    by_id(found, 9).update(type="Image Save", widgets_values=["[time]", "ComfyUI", "_", 4])
    made = converted(found)
    assert made.graph["9"]["inputs"] == {"images": ["8", 0]}
    assert "no names" in made.notes[0]


def test_values_that_are_lists_are_no_links_and_loras_are_told_apart() -> None:
    found = default()
    loras = [None, {"type": "Header"}, {"on": True, "lora": "a", "strength": 1}, {"on": False, "lora": "b"}, {}, ""]
    found["nodes"] += [
        item(13, "Other", {"points": [[1, 2]], "videopreview": {"x": 1}}),
        item(14, "Power Lora Loader (rgthree)", loras),
    ]
    made = converted(found).graph
    assert made["13"]["inputs"]["points"] == {"__value__": [[1, 2]]}
    assert made["14"]["inputs"] == {"lora_1": loras[2], "lora_2": loras[3]}


@pytest.mark.parametrize(
    ("text", "sent", "free"),
    [
        ("a (red:1.2) circle", "a (red:1.2) circle", False),
        ("a {red|blue} circle", "a red circle", True),
        ("a {{red|green} big|blue} circle", "a red big circle", True),
        (r"a \{red|blue\} \(x\)", r"a {red|blue} \(x\)", False),
        ("one // two\nthree /* four\nfive */six", "one \nthree six", False),
        ("{" * 2000, "{" * 2000, False),
        ("a }{b|c", "a }{b|c", False),
        ("{" * 200 + "a|b" + "}" * 200, "{" * 100 + "a" + "}" * 100, True),
        ("x /* y", "x /* y", False),
    ],
)
def test_prompts_are_sent_as_the_page_sends_them(text: str, sent: str, free: bool) -> None:
    assert chosen(text) == (sent, free)


def test_choices_in_a_prompt_are_noted() -> None:
    found = default()
    by_id(found, 6)["widgets_values"] = ["a {red|blue} circle"]
    made = converted(found)
    assert made.graph["6"]["inputs"]["text"] == "a red circle"
    assert made.notes == ("Node 6 (CLIPTextEncode): text has choices in braces; the first of each is taken.",)


def test_circles_end() -> None:
    found = between(default(), 1, 20, "Reroute")
    by_id(found, 20)["inputs"][0]["link"] = 101
    assert "model" not in converted(found).graph["3"]["inputs"]
    found = subgraphed()
    found["definitions"]["subgraphs"][0]["nodes"].append(item(58, "inner"))
    with pytest.raises(GraphRefused, match="more than 32 deep"):
        converted(found)


def test_more_nodes_than_are_read() -> None:
    subs = [{"id": f"s{n}", "nodes": [item(1, f"s{n + 1}"), item(2, f"s{n + 1}")]} for n in range(20)]
    with pytest.raises(GraphRefused, match=f"more than {unfolding.MOST_NODES} nodes"):
        converted({"nodes": [item(1, "s0")], "definitions": {"subgraphs": subs}})


def test_a_file_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfolding, "LONGEST_S", -1)
    with pytest.raises(GraphRefused, match="takes longer than"):
        converted(default())


def test_a_file_is_as_long_as_its_subgraphs_make_it() -> None:
    sub = {"id": "s", "nodes": [item(1, "X", {"text": "a" * 1_000_000})]}
    with pytest.raises(GraphRefused, match="longer than 16 MB in API format"):
        converted({"nodes": [item(n, "s") for n in range(20)], "definitions": {"subgraphs": [sub]}})


@pytest.mark.parametrize(("kind", "mode"), [("Reroute", 0), ("VAEDecode", 4)])
@pytest.mark.parametrize("type_", ["MODEL", "*"])
def test_a_link_from_before_the_first_output_leads_nowhere(kind: str, mode: int, type_: str) -> None:
    found = between(default(), 1, 20, kind, mode=mode)
    by_id(found, 20)["inputs"][0]["type"] = by_id(found, 3)["inputs"][0]["type"] = type_
    next(one for one in found["links"] if one[1] == 20)[2] = -5
    assert "model" not in converted(found).graph["3"]["inputs"] or kind == "VAEDecode"


def with_everything() -> Ui:
    """All traps in one file."""
    found = nested()
    found["nodes"] += copy.deepcopy(grouped((11, "fixed", 2, "euler", "simple", 1, 9, "fixed"))["nodes"])
    found["links"] += grouped(())["links"]
    found["extra"] = grouped(())["extra"]
    found["nodes"] += [
        item(30, "SetNode", ("model",), [slot("MODEL", "MODEL", 1)], ("*",)),
        item(31, "GetNode", ("model",), (), ("MODEL",)),
        item(80, "Anything Everywhere", (), [slot("anything", "*", 8)]),
        item(41, "PrimitiveNode", (99, "fixed"), (), ("INT",)),
    ]
    return found
