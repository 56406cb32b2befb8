"""The fields of a kept workflow: which a graph has, what they take, and where their values go."""

import base64
import io
from typing import Any

import pytest
from PIL import Image

from comfy_graphs import Graph, graph, node
from handler.api.workflows.fields import Field, asked
from handler.api.workflows.filling import filled
from handler.api.workflows.finding import fields
from handler.core.errors import RequestError
from handler.core.request import MAX_RANDOM_SEED, MAX_SEED


def found(made: Graph) -> dict[str, Field]:
    return {one.name: one for one in fields(made, 4)}


def defaults(made: Graph) -> dict[str, Any]:
    return {name: one.default for name, one in found(made).items()}


def titled(made: Graph, key: str, title: str) -> Graph:
    return {**made, key: {**made[key], "_meta": {"title": title}}}


def places(one: Field) -> list[tuple[str, str]]:
    return [(place.node, place.input) for place in one.places]


def refined() -> Graph:
    """Two samplers in a row, as a hires fix has them."""
    made = graph()
    again = {**made["3"]["inputs"], "latent_image": ["10", 0], "seed": 11, "steps": 2, "denoise": 0.5}
    made["10"] = node("LatentUpscaleBy", samples=["3", 0], upscale_method="bilinear", scale_by=2)
    made["11"] = node("KSampler", **again)
    made["8"]["inputs"]["samples"] = ["11", 0]
    return made


def painted() -> Graph:
    """An image with a mask of its own, drawn anew."""
    made = graph()
    made["10"] = node("LoadImage", image="photo.png")
    made["11"] = node("VAEEncode", pixels=["10", 0], vae=["4", 2])
    made["5"] = node("SetLatentNoiseMask", samples=["11", 0], mask=["10", 1])
    made["3"]["inputs"]["denoise"] = 0.8
    return made


def png(mode: str, colour: Any, side: int = 64) -> bytes:
    Image.new(mode, (side, side), colour).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def test_what_a_plain_graph_has() -> None:
    assert defaults(graph(text="a hat")) == {
        "prompt": "a hat",
        "negative_prompt": "",
        "width": 64,
        "height": 64,
        "n": 1,
        "seed": None,
        "steps": 4,
        "guidance": 1.0,
    }
    n, seed = found(graph())["n"].schema, found(graph())["seed"].schema
    assert (n["minimum"], n["maximum"]) == (1, 4)
    assert (seed["minimum"], seed["maximum"]) == (-1, MAX_SEED)


def test_it_is_found_by_structure_whatever_the_ids_are() -> None:
    moved = {f"{key}:1": body for key, body in reversed(graph().items())}
    for body in moved.values():
        links = {name: [f"{one[0]}:1", one[1]] for name, one in body["inputs"].items() if isinstance(one, list)}
        body["inputs"] |= links
    assert defaults(moved) == defaults(graph())


def test_what_is_equal_is_one_field_and_what_differs_gets_a_number() -> None:
    made = found(refined())
    assert {name: one.default for name, one in made.items()} == {
        **defaults(graph()),
        "seed_2": 11,
        "steps_2": 2,
        "denoise": 0.5,
    }
    assert places(made["guidance"]) == [("3", "cfg"), ("11", "cfg")]
    assert (made["seed"].default, made["seed_2"].schema["default"]) == (None, 11)


def test_values_are_followed_to_where_they_are() -> None:
    made = graph()
    made |= {"20": node("PrimitiveInt", value=128), "21": node("Seed (rgthree)", seed=5)}
    made |= {"22": node("PrimitiveStringMultiline", value="a cat"), "23": node("PrimitiveString", value="inked")}
    made["24"] = node("StringConcatenate", string_a=["22", 0], string_b=["23", 0], delimiter=", ")
    made["5"]["inputs"] |= {"width": ["20", 0], "height": ["20", 0]}
    made["3"]["inputs"]["seed"] = ["21", 0]
    made["6"]["inputs"]["text"] = ["24", 0]
    one = found(made)
    assert (one["prompt"].default, one["prompt_2"].default) == ("a cat", "inked")
    assert places(one["seed"]) == [("21", "seed")]
    assert places(one["width"]) == [("20", "value")]
    assert "height" not in one


def test_a_switch_is_followed_on_the_side_that_it_chooses() -> None:
    made = graph()
    made |= {"20": node("PrimitiveString", value="left"), "21": node("PrimitiveString", value="right")}
    made["22"] = node("ComfySwitchNode", switch=True, on_false=["20", 0], on_true=["21", 0])
    made["6"]["inputs"]["text"] = ["22", 0]
    assert defaults(made)["prompt"] == "right"
    assert "prompt_2" not in defaults(made)


def test_zeros_are_no_negative_prompt() -> None:
    made = graph()
    made["7"] = node("ConditioningZeroOut", conditioning=["6", 0])
    assert "negative_prompt" not in found(made)


def test_the_parts_of_a_custom_sampler() -> None:
    made = graph()
    made["3"] = node("SamplerCustomAdvanced", noise=["n", 0], guider=["g", 0], sampler=["k", 0], sigmas=["s", 0])
    made["3"]["inputs"]["latent_image"] = ["5", 0]
    made["n"] = node("RandomNoise", noise_seed=9)
    made["k"] = node("KSamplerSelect", sampler_name="euler")
    made["s"] = node("Flux2Scheduler", steps=6, width=64, height=64)
    made["g"] = node("BasicGuider", model=["4", 0], conditioning=["f", 0])
    made["f"] = node("FluxGuidance", conditioning=["6", 0], guidance=3.5)
    one = found(made)
    assert {"prompt", "seed", "steps", "guidance", "width", "height", "n"} == one.keys()
    assert one["guidance"].default == 3.5
    assert places(one["width"]) == [("5", "width"), ("s", "width")]  # the schedule is of that size


def test_several_texts_of_one_encoder_are_one_prompt() -> None:
    made = graph()
    made["6"] = node("CLIPTextEncodeFlux", clip=["4", 1], clip_l="", t5xxl="a long text", guidance=3.5)
    one = found(made)
    assert one["prompt"].default == "a long text"
    assert places(one["prompt"]) == [("6", "clip_l"), ("6", "t5xxl")]
    assert (one["guidance"].default, one["cfg"].default) == (3.5, 1.0)


def test_weights_of_loras() -> None:
    made = graph()
    made["20"] = node("LoraLoader", model=["4", 0], clip=["4", 1], lora_name="styles/Ink v2.safetensors")
    made["20"]["inputs"] |= {"strength_model": 0.8, "strength_clip": 0.8}
    made["21"] = node("LoraLoader", model=["20", 0], clip=["20", 1], lora_name="wash.safetensors")
    made["21"]["inputs"] |= {"strength_model": 0.5, "strength_clip": 0.4}
    power = {"on": True, "lora": "glow.safetensors", "strength": 0.3}
    made["22"] = node("Power Lora Loader (rgthree)", model=["21", 0], clip=["21", 1], lora_1=power)
    made["3"]["inputs"]["model"] = ["22", 0]
    loras = {name: value for name, value in defaults(made).items() if name.startswith("lora")}
    assert loras == {"lora_ink_v2": 0.8, "lora_wash": 0.5, "lora_wash_clip": 0.4, "lora_glow": 0.3}
    done = filled(made, fields(made, 4), {"lora_ink_v2": 0.1, "lora_glow": 0.2}).graph
    assert (done["20"]["inputs"]["strength_model"], done["20"]["inputs"]["strength_clip"]) == (0.1, 0.1)
    assert done["22"]["inputs"]["lora_1"] == {**power, "strength": 0.2}
    assert power["strength"] == 0.3


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("$style", "style"),
        ("Positive $style.text", "style"),
        ("Input style", "style"),
        ("Prompt: style", "style"),
        ("input: Main Style!", "main_style"),
        ("$model", "model_2"),
        ("Inputs", "prompt"),
        ("costs $5", "prompt"),
        ("$style.clip", "prompt"),
        ("CLIP Text Encode (Prompt)", "prompt"),
    ],
)
def test_titles_name_fields(title: str, name: str) -> None:
    one = found(titled(graph(), "6", title))
    assert places(one[name]) == [("6", "text")]
    assert ("prompt" in one) == (name == "prompt")


def test_titles_name_what_no_sampler_is_told_too() -> None:
    made = graph()
    made["20"] = node("ModelSamplingAuraFlow", model=["4", 0], shift=3.0)
    made["3"]["inputs"]["model"] = ["20", 0]
    made = titled(titled(made, "20", "$shift"), "3", "$how.sampler_name $turns.steps")
    made = titled(titled(made, "5", "Input size"), "9", "$output.poster")
    one = found(made)
    assert (one["shift"].kind, one["shift"].default, one["shift"].high) == ("number", 3.0, 100)
    assert "lcm" in one["how"].choices
    assert (one["turns"].default, one["turns"].low) == (4, 1)
    assert not {"steps", "size", "output"} & one.keys()
    assert {"width", "height", "n"} <= one.keys()  # a title says of which: $wide.width


def test_what_no_output_needs_is_no_field() -> None:
    assert defaults({**graph(), "30": titled({"1": node("PrimitiveInt", value=3)}, "1", "$dead")["1"]}) == defaults(
        graph()
    )


def test_an_image_and_its_mask_are_put_together() -> None:
    made = painted()
    one = found(made)
    assert (one["image"].kept, one["mask"].kept, one["image"].kind, one["mask"].kind) == (
        "photo.png",
        None,
        *["image"] * 2,
    )
    assert one["denoise"].default == 0.8
    half = Image.new("RGBA", (64, 64), "white")
    half.paste((0, 0, 0, 0), (0, 0, 32, 64))
    half.save(file := io.BytesIO(), "PNG")
    done = filled(made, fields(made, 4), {"image": png("RGB", "red"), "mask": file.getvalue()})

    def nobody(*_: str) -> bytes:
        raise FileNotFoundError

    data = done.load(nobody)(done.graph["10"]["inputs"]["image"], "", "input")
    with Image.open(io.BytesIO(data)) as picture:
        assert [picture.getpixel((x, 5)) for x in (5, 60)] == [(255, 0, 0, 0), (255, 0, 0, 255)]
    alone = filled(made, fields(made, 4), {"mask": file.getvalue()})
    asked_for = []

    def kept(*where: str) -> bytes:
        asked_for.append(where)
        return png("RGB", "blue")

    alone.load(kept)(alone.graph["10"]["inputs"]["image"], "", "input")
    assert asked_for == [("photo.png", "", "input")]
    other = filled(made, fields(made, 4), {"mask": png("RGBA", "red", 96)})
    with pytest.raises(RequestError, match="send one of the image's size"):
        other.load(kept)(other.graph["10"]["inputs"]["image"], "", "input")


def test_a_mask_by_itself_and_an_image_in_the_graph() -> None:
    made = graph()
    made["10"] = node("ETN_LoadImageBase64", image="")
    made["11"] = node("VAEEncode", pixels=["10", 0], vae=["4", 2])
    made["12"] = node("LoadImageMask", image="mask.png", channel="red")
    made["5"] = node("SetLatentNoiseMask", samples=["11", 0], mask=["12", 0])
    one = found(made)
    assert (places(one["image"]), places(one["mask"])) == ([("10", "image")], [("12", "image")])
    done = filled(made, fields(made, 4), {"image": b"an image"}).graph
    assert done["10"]["inputs"]["image"] == base64.b64encode(b"an image").decode()


def test_seeds_are_random_where_nobody_says_them_and_the_graph_is_left_as_it_is() -> None:
    made = refined()
    before = str(made)
    seeds = [filled(made, fields(made, 4), {}).graph["3"]["inputs"]["seed"] for _ in range(3)]
    assert len({*seeds}) == 3
    assert all(0 <= seed <= MAX_RANDOM_SEED for seed in seeds)
    done = filled(made, fields(made, 4), {"seed": 3, "seed_2": -1}).graph
    assert done["3"]["inputs"]["seed"] == 3
    assert done["11"]["inputs"]["seed"] != 11
    assert filled(made, fields(made, 4), {"seed": 3}).graph["11"]["inputs"]["seed"] == 11
    assert str(made) == before


@pytest.mark.parametrize(
    ("payload", "code", "param"),
    [
        ({"style": "ink"}, "unknown_parameter", "style"),
        ({"x" * 500: 1}, "unknown_parameter", "x" * 80),
        ({"prompt": 3}, "invalid_type", "prompt"),
        ({"prompt": "x" * 32_001}, "out_of_range", "prompt"),
        ({"prompt": ["3", 0]}, "invalid_type", "prompt"),
        ({"width": "64"}, "invalid_type", "width"),
        ({"width": True}, "invalid_type", "width"),
        ({"width": 64.5}, "invalid_type", "width"),
        ({"width": 63}, "out_of_range", "width"),
        ({"width": 10**400}, "out_of_range", "width"),
        ({"seed": -2}, "out_of_range", "seed"),
        ({"seed": MAX_SEED + 1}, "out_of_range", "seed"),
        ({"n": 5}, "out_of_range", "n"),
        ({"guidance": float("nan")}, "out_of_range", "guidance"),
        ({"guidance": 0.5}, "out_of_range", "guidance"),
        ({"size": "64"}, "invalid_value", "size"),
        ({"size": "64x64", "width": 128, "height": 64}, "invalid_value", "size"),
        ({"stream": "yes"}, "invalid_type", "stream"),
        ({"output_format": "gif"}, "out_of_range", "output_format"),
        ({"model": "spark"}, "unknown_parameter", "model"),
    ],
)
def test_what_is_refused(payload: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(RequestError) as refused:
        asked(fields(graph(), 4), payload)
    assert (refused.value.code, refused.value.param) == (code, param)


@pytest.mark.parametrize("image", ["https://example.com/a.png", "%%%", 3])
def test_images_that_are_refused(image: object) -> None:
    with pytest.raises(RequestError, match="image"):
        asked(fields(painted(), 4), {"image": image})


def test_null_is_as_left_out_and_size_is_width_and_height() -> None:
    one = asked(fields(graph(), 4), {"prompt": None, "size": "128x64", "n": 2, "output_format": "jpg", "seed": None})
    assert one.values == {"width": 128, "height": 64, "n": 2}
    assert one.transport.output_format == "jpeg"
    assert asked(fields(graph(), 4), {"size": "auto"}).values == {}


def test_a_chain_of_ten_thousand_nodes_takes_no_stack() -> None:
    made = graph()
    made |= {f"r{i}": node("Reroute", value=[f"r{i + 1}", 0]) for i in range(9_000)}
    made["r9000"] = node("PrimitiveString", value="far away")
    made["6"]["inputs"]["text"] = ["r0", 0]
    assert defaults(made)["prompt"] == "far away"


def test_cycles_end() -> None:
    made = graph()
    made["20"] = node("Reroute", value=["21", 0])
    made["21"] = node("Reroute", value=["20", 0])
    made["6"]["inputs"]["text"] = ["20", 0]
    made["3"]["inputs"]["seed"] = ["20", 0]
    assert not {"prompt", "seed"} & found(made).keys()
