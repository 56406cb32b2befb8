"""ComfyUI's graphs: what is checked and how it is told, and that none takes long."""

import contextlib
import json
import time
from typing import Any

import pytest
from graphs import Graph, load, node, plain, plan, served, with_image
from hypothesis import given
from hypothesis import strategies as st

import examples  # noqa: F401
from handler.api.dialects.comfy.described import object_info
from handler.api.dialects.comfy.table import ALIASES, INSTEAD, TABLE
from handler.api.dialects.comfy.walk import LONGEST_S, Walk
from handler.core.errors import GraphRefused


def refused(graph: Any, model: str = "spark", **worker: Any) -> dict[str, Any]:
    """What ComfyUI's clients are told."""
    with pytest.raises(GraphRefused) as caught:
        plan(graph, model, **worker)
    assert caught.value.status == 400
    answer = dict(caught.value.answer)
    json.dumps(answer, allow_nan=False)
    assert answer["error"].keys() == {"type", "message", "details", "extra_info"}
    return answer


def fault(graph: Any, at: str, model: str = "spark", **worker: Any) -> dict[str, Any]:
    """The only one of a node."""
    entry = refused(graph, model, **worker)["node_errors"][at]
    assert entry.keys() == {"errors", "dependent_outputs", "class_type"}
    assert entry["dependent_outputs"] == ["7"]
    [one] = entry["errors"]
    assert one.keys() == {"type", "message", "details", "extra_info"}
    return dict(one)


def test_a_plain_graph_is_one_output() -> None:
    found = plan(plain())
    [output] = found.outputs
    assert (output.node, output.folder, output.prefix, output.sampler) == ("7", "output", "kindling", "5")
    assert output.order == ("1", "2", "3", "4", "5", "6", "7")
    assert (found.node_errors, found.notes) == ({}, ())


def test_ids_mean_nothing() -> None:
    text = json.dumps(plain())
    for old in "1234567":
        text = text.replace(f'"{old}"', f'"57:{9 - int(old)}"')
    assert plan(json.loads(text)).outputs[0].request == plan(plain()).outputs[0].request


@pytest.mark.parametrize(
    ("change", "kind", "name"),
    [
        ({"steps": "many"}, "invalid_input_type", "steps"),
        ({"steps": 0}, "value_smaller_than_min", "steps"),
        ({"steps": 10**5}, "value_bigger_than_max", "steps"),
        ({"seed": -1}, "value_smaller_than_min", "seed"),
        ({"seed": 2**64}, "value_bigger_than_max", "seed"),
        ({"seed": 10**5000}, "value_bigger_than_max", "seed"),
        ({"seed": "9" * 5000}, "invalid_input_type", "seed"),
        ({"cfg": float("nan")}, "invalid_input_type", "cfg"),
        ({"sampler_name": "eulerr"}, "value_not_in_list", "sampler_name"),
        ({"model": ["1"]}, "bad_linked_input", "model"),
        ({"model": ["nobody", 0]}, "bad_linked_input", "model"),
        ({"model": ["1", 9]}, "bad_linked_input", "model"),
        ({"model": ["1", 2]}, "return_type_mismatch", "model"),
        ({"model": "spark"}, "invalid_input_type", "model"),
        ({"positive": {"__value__": [1, 2]}}, "invalid_input_type", "positive"),
        ({"sampler_name": "dpm_fast"}, "custom_validation_failed", "sampler_name"),
        ({"cfg": 0.5}, "custom_validation_failed", "cfg"),
        ({"denoise": 0}, "custom_validation_failed", "denoise"),
    ],
)
def test_inputs_are_judged_as_comfyui_judges_them(change: dict[str, Any], kind: str, name: str) -> None:
    found = fault(plain(**change), "5")
    assert (found["type"], found["extra_info"]["input_name"]) == (kind, name)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"steps": "{{steps}}"}, "'{{steps}}' is a placeholder of an app's template"),
        ({"cfg": "CFG_PLACEHOLDER"}, "'CFG_PLACEHOLDER' is a placeholder of an app's template"),
        ({"model": ["nobody", 0]}, "model is linked to output 0 of node nobody, which is not there"),
        ({"model": ["1", 9]}, "model is linked to output 9 of node 1, which is not there"),
        ({"model": ["1"]}, "model"),
    ],
)
def test_what_was_meant_is_said_of_what_cannot_be_read(change: dict[str, Any], told: str) -> None:
    assert told in fault(plain(**change), "5")["details"]


@pytest.mark.parametrize("value", [5, None, True, {}, 1.5])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("CheckpointLoaderSimple", "ckpt_name"),
        ("UNETLoader", "unet_name"),
        ("LoraLoaderModelOnly", "lora_name"),
        ("LoadImage", "image"),
    ],
)
def test_a_files_name_is_a_text(kind: str, name: str, value: Any) -> None:
    graph = plain() | {"8": node(kind, **{name: value}), "9": node("PreviewAny", source=["8", 0])}
    graph["7"]["inputs"]["images"] = ["nobody", 0]
    found = [one for one in refused(graph)["node_errors"]["8"]["errors"] if one["extra_info"]["input_name"] == name]
    assert [one["type"] for one in found] == ["value_not_in_list"]


def test_required_inputs_are_asked_for() -> None:
    graph = plain()
    del graph["5"]["inputs"]["scheduler"]
    found = fault(graph, "5")
    assert (found["type"], found["details"]) == ("required_input_missing", "scheduler")


def test_values_are_read_as_comfyui_reads_them() -> None:
    how = {"steps": "4", "seed": 7.9, "cfg": "1", "denoise": {"__value__": 1}}
    assert plan(plain(**how)).outputs == plan(plain()).outputs


def test_numbers_that_links_bring_are_within_limits() -> None:
    graph = plain(steps=["8", 0]) | {"8": node("PrimitiveInt", value=2**40)}
    assert fault(graph, "5")["type"] == "value_bigger_than_max"
    tiny = with_image(
        **{"12": node("ImageScale", image=["10", 0], upscale_method="area", width=7, height=7, crop="center")}
    )
    tiny["11"]["inputs"]["pixels"] = ["12", 0]
    assert "7x7" in fault(tiny, "11")["details"]


def test_what_a_sampler_lacks_is_named_with_what_is_near() -> None:
    assert "use dpmpp_2m" in fault(plain(sampler_name="dpm_fast"), "5")["details"]


@pytest.mark.parametrize(
    ("graph", "kind"),
    [
        ({}, "no_prompt"),
        ([], "no_prompt"),
        ({"nodes": [], "links": []}, "invalid_prompt"),
        ({"1": {"inputs": {}}}, "missing_node_type"),
        ({"1": "KSampler"}, "missing_node_type"),
        ({"1": node("KSampler")}, "prompt_no_outputs"),
        ({"1": node("Nobody")}, "missing_node_type"),
    ],
)
def test_what_is_no_graph(graph: Any, kind: str) -> None:
    assert refused(graph)["error"]["type"] == kind


def test_an_unknown_class_matters_only_where_an_output_reaches_it() -> None:
    graph = plain() | {"8": node("Nobody", image=["6", 0])}
    assert plan(graph).outputs == plan(plain()).outputs
    graph["9"] = node("PreviewImage", images=["8", 0])
    found = plan(graph)
    assert [output.node for output in found.outputs] == ["7"]
    assert found.node_errors["8"]["errors"][0]["type"] == "missing_node_type"
    assert found.node_errors["8"]["dependent_outputs"] == ["9"]
    del graph["7"]
    assert refused(graph)["error"]["extra_info"]["class_type"] == "Nobody"


def test_what_is_refused_by_name_says_what_to_use() -> None:
    graph = plain(positive=["8", 0]) | {"8": node("ControlNetApplyAdvanced", positive=["2", 0])}
    answer = refused(graph)
    assert answer["error"]["type"] == "missing_node_type"
    assert "VAEEncode" in answer["error"]["message"]


@pytest.mark.parametrize("mark", ["{{sampler}}", "SAMPLER_PLACEHOLDER"])
def test_templates_that_nobody_filled_in_are_called_that(mark: str) -> None:
    assert "placeholder" in fault(plain(sampler_name=mark), "5")["details"]
    assert "placeholder" in fault(plain(mark), "1")["details"]


def test_a_cycle_is_named() -> None:
    graph = plain()
    graph["1"] = node("LoraLoaderModelOnly", model=["8", 0], lora_name="a", strength_model=1)
    graph["8"] = node("LoraLoaderModelOnly", model=["1", 0], lora_name="a", strength_model=1)
    graph["2"]["inputs"]["clip"] = graph["3"]["inputs"]["clip"] = ["9", 1]
    graph["9"] = node("CheckpointLoaderSimple", ckpt_name="spark.safetensors")
    graph["6"]["inputs"]["vae"] = ["9", 2]
    found = fault(graph, "8")
    assert (found["type"], found["details"]) == ("dependency_cycle", "1 -> 8 -> 1")


def test_a_node_that_needs_itself() -> None:
    graph = plain(latent_image=["5", 0])
    assert fault(graph, "5")["type"] == "dependency_cycle"


def chain(length: int) -> Graph:
    """A latent that passes through so many nodes."""
    graph = plain(latent_image=[f"r{length - 1}", 0])
    for n in range(length):
        graph[f"r{n}"] = node("Reroute", value=[f"r{n - 1}" if n else "4", 0])
    return graph


def wide(length: int) -> Graph:
    """Each text is made of the one before, twice."""
    graph = plain()
    graph["2"]["inputs"]["text"] = [f"t{length - 1}", 0]
    for n in range(length):
        before = [f"t{n - 1}", 0] if n else "a cat "
        graph[f"t{n}"] = node("StringConcatenate", string_a=before, string_b=before, delimiter="")
    return graph


def test_ten_thousand_nodes_are_read_in_a_line() -> None:
    assert plan(chain(9_900)).outputs[0].request == plan(plain()).outputs[0].request
    assert "10000" in refused(chain(10_000))["error"]["message"]


def test_what_would_double_again_and_again_is_refused() -> None:
    begun = time.process_time()
    assert "characters" in str(refused(wide(9_000))["node_errors"])
    assert time.process_time() - begun < 20


def test_images_are_not_blown_up() -> None:
    graph = with_image()
    for n in range(200):
        before = [f"s{n - 1}", 0] if n else ["10", 0]
        graph[f"s{n}"] = node(
            "ImageScale", image=before, upscale_method="area", width=1536, height=1536, crop="disabled"
        )
    graph["11"]["inputs"]["pixels"] = ["s199", 0]
    assert "million pixels" in str(refused(graph)["node_errors"])
    graph["s0"]["inputs"] |= {"width": 16384, "height": 16384}
    assert "16384x16384" in str(refused(graph)["node_errors"])


def test_a_thousand_outputs_are_too_many() -> None:
    graph = plain() | {f"p{n}": node("PreviewImage", images=["6", 0]) for n in range(1000)}
    assert "1001 outputs" in refused(graph)["error"]["message"]


def test_outputs_of_one_sampler_ask_for_the_same() -> None:
    graph = plain() | {"8": node("PreviewImage", images=["6", 0]), "9": node("SaveImageWebsocket", images=["6", 0])}
    save, preview, stream = plan(graph).outputs
    assert save.request == preview.request == stream.request
    assert (save.folder, preview.folder) == ("output", "temp")
    assert (save.streamed, stream.streamed) == (False, True)


def test_a_lazy_switch_is_followed_on_one_side() -> None:
    graph = plain(positive=["8", 0]) | {
        "8": node("ComfySwitchNode", switch=["9", 0], on_false=["2", 0], on_true=["10", 0]),
        "9": node("PrimitiveBoolean", value=False),
        "10": node("Nobody"),
    }
    [output] = plan(graph).outputs
    assert output.request == plan(plain()).outputs[0].request
    assert "10" not in output.order
    graph["9"]["inputs"]["value"] = True
    assert refused(graph)["error"]["type"] == "missing_node_type"


def test_outputs_that_show_nothing_drawn_are_noted() -> None:
    graph = with_image() | {"12": node("PreviewImage", images=["10", 0]), "13": node("PreviewAny", source=["5", 0])}
    found = plan(graph)
    assert [output.node for output in found.outputs] == ["7"]
    assert [note.split(":")[0] for note in found.notes] == ["Node 12 (PreviewImage)", "Node 13 (PreviewAny)"]
    assert "no output comes from a sampler" in refused({name: graph[name] for name in ("10", "12")})["error"]["message"]


def test_every_class_is_described_as_comfyui_does_it() -> None:
    info = object_info(served("flux-dev", loras=("ink.safetensors",)))
    json.dumps(info, allow_nan=False)
    assert info.keys() == TABLE.keys() >= ALIASES.keys()
    sampler = info["KSampler"]
    assert list(sampler["input"]["required"])[:2] == sampler["input_order"]["required"][:2] == ["model", "seed"]
    assert sampler["input"]["required"]["seed"][1]["control_after_generate"] is True
    assert sampler["input"]["required"]["sampler_name"][0][0] == "euler"
    assert info["SaveImage"]["output_node"]
    assert info["CLIPTextEncode"]["input"]["required"]["text"][1]["dynamicPrompts"] is True
    assert "dynamicPrompts" not in info["PrimitiveStringMultiline"]["input"]["required"]["value"][1]
    assert info["LoraLoader"]["input"]["required"]["lora_name"][0] == ["ink.safetensors"]
    assert "flux1-dev.safetensors" in info["UNETLoader"]["input"]["required"]["unet_name"][0]
    for name, said in info.items():
        assert len(said["output"]) == len(said["output_name"]) == len(said["output_is_list"]), name


def test_a_class_that_is_refused_is_named_with_what_to_use() -> None:
    """Also where it was to be the only output."""
    begin = "Node 'FreeU' (FreeU) cannot be drawn: it changes"
    for graph in ({"1": node("FreeU")}, plain(model=["8", 0]) | {"8": node("FreeU", model=["1", 0])}):
        assert refused(graph)["error"]["message"].startswith(begin)


def test_a_sampler_that_takes_no_step_says_why() -> None:
    start = {"start_at_step": 9, "end_at_step": 10000, "add_noise": "enable", "return_with_leftover_noise": "disable"}
    graph = plain()
    inputs = graph["5"]["inputs"] | start | {"noise_seed": 7}
    graph["5"] = node("KSamplerAdvanced", **{name: inputs[name] for name in TABLE["KSamplerAdvanced"].inputs})
    assert "start before the last" in fault(graph, "5")["details"]


def test_a_checkpoint_without_a_name_is_asked_for() -> None:
    graph = plain()
    graph["1"]["inputs"]["ckpt_name"] = ""
    assert fault(graph, "1")["details"] == "ckpt_name - no file is named; this worker draws with spark."


def test_nothing_is_both_read_and_refused() -> None:
    assert not TABLE.keys() & INSTEAD.keys()


LITERALS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=3)
)
LINKS = st.tuples(st.sampled_from("0123456789"), st.integers(0, 3)).map(list)


@given(st.data())
def test_whatever_is_sent_is_read_or_refused(data: st.DataObject) -> None:
    """Any classes, any links, any values: a plan or a refusal, and never another error."""
    graph = {}
    for name in "0123456789"[: data.draw(st.integers(1, 10))]:
        kind = data.draw(st.sampled_from([*TABLE, "SaveImage", "KSampler", "VAEDecode"]))
        row = TABLE[kind]
        graph[name] = node(kind, **{one: data.draw(LINKS | LITERALS) for one in row.inputs})
    graph |= {"save": node("SaveImage", images=["0", 0], filename_prefix="x")}
    with contextlib.suppress(GraphRefused):
        assert plan(graph).outputs


def test_a_graph_that_takes_too_long_is_not_read_to_its_end() -> None:
    """Each name that is not there is compared with all LoRAs that are."""
    walk = Walk(
        plain() | {"100": node("LoraLoaderModelOnly", model=["1", 0], lora_name="x", strength_model=1.0)},
        served(),
        load,
    )
    walk.begun -= LONGEST_S + 1
    walk.settle("100")
    assert "takes longer than 10 s" in str(walk.wrong)
