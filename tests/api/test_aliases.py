"""Bodies as public RunPod workers take them, read by the native dialect. Names and values alone, none of their code."""

from typing import Any

import pytest

from handler.api import served
from handler.api.dialects import aliases, native
from handler.catalog.models import MODELS
from handler.core.errors import KindlingError
from handler.core.loras import Wanted
from handler.core.request import ImageRequest

PICTURE = "data:image/png;base64,iVBORw0KGgo="
SDXL = {  # worker-sdxl's test_input.json, but for the prompts
    "prompt": "a dragon",
    "negative_prompt": "blurry",
    "height": 1024,
    "width": 1024,
    "num_inference_steps": 25,
    "refiner_inference_steps": 50,
    "guidance_scale": 7.5,
    "strength": 0.3,
    "high_noise_frac": 0.8,
    "seed": 42,
    "scheduler": "K_EULER",
    "num_images": 1,
    "image_url": None,
}
SDXL_TURBO = {  # worker-sdxl-turbo's
    "prompt": "a dragon",
    "height": 512,
    "width": 512,
    "num_inference_steps": 1,
    "guidance_scale": 0.0,
    "seed": 1337,
    "num_images": 1,
}
UNDERSTOOD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (SDXL_TURBO, {"n": 1, "num_inference_steps": 1, "guidance_scale": 0.0}),
    ({"num_outputs": 2, "scheduler": "DPMSolverMultistep"}, {"n": 2, "scheduler": "dpm++"}),  # stable_diffusion_v2
    ({"init_image": PICTURE, "prompt_strength": 0.8}, {"images": (b"\x89PNG\r\n\x1a\n",), "strength": 0.8}),  # _v1
    (
        {"steps": 25, "cfg_scale": 7, "sampler_name": "Euler a", "batch_size": 2},  # a1111
        {"num_inference_steps": 25, "guidance_scale": 7.0, "scheduler": "euler-a", "n": 2},
    ),
    ({"guidance": 7.5, "negative_prompt": ""}, {"guidance_scale": 7.5, "negative_prompt": ""}),  # public endpoints
    ({"size": "512*768"}, {"width": 512, "height": 768}),
    ({"size": "512x768", "width": 512}, {"width": 512, "height": 768}),
    ({"image": [PICTURE], "mask_image": PICTURE}, {"mask": b"\x89PNG\r\n\x1a\n"}),
    ({"n": 2, "num_images": 2}, {"n": 2}),
    ({"image_size": "portrait_16_9", "format": "jpeg"}, {"width": 576, "height": 1024, "output_format": "jpeg"}),  # fal
    ({"image_size": {"width": 512, "height": 768}, "image_urls": [PICTURE]}, {"width": 512, "height": 768}),
    ({"loras": [{"path": "ink", "scale": 0.5}]}, {"loras": (Wanted("ink", 0.5),)}),
    ({"embeddings": [], "controlnets": [], "enable_prompt_expansion": False, "image_size": "auto"}, {"width": None}),
]
SCHEDULERS = {
    "K_EULER": "euler",
    "EULER-D": "euler",
    "EulerDiscreteScheduler": "euler",
    "K_EULER_ANCESTRAL": "euler-a",
    "EulerAncestralDiscreteScheduler": "euler-a",
    "DPM++ 2M": "dpm++",
    "DPM-M": "dpm++",
    "HEUN": "heun",
    "DDIM": "ddim",
    "FlowMatchEulerDiscreteScheduler": "flow-match-euler",
}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"n": 1, "num_images": 2}, "n", "n and num_images say different things; send n."),
    ({"steps": 4, "num_steps": 5}, "num_inference_steps", "steps and num_steps say different things"),
    ({"size": "64x64", "width": 65}, "size", "another size than width and height"),
    ({"size": "small"}, "size", "WIDTHxHEIGHT"),
    ({"size": 512}, "size", "should be a string"),
    ({"scheduler": "PNDM"}, "scheduler", "sampling: {'sampler': 'dpmpp_2m'"),
    ({"sampler_name": "DPM++ 2M Karras"}, "scheduler", "sampling: {'sampler': 'dpmpp_2m'"),
    ({"scheduler": 7}, "scheduler", "scheduler: Input should be"),
    ({"lora_url": "https://a.example/b.safetensors"}, "lora_url", "send loras, such as [{'name': 'ink'"),
    ({"workflow": {}}, "workflow", "/prompt"),
    ({"num_images": "two"}, "n", "valid integer"),
    ({"frames": 7}, "frames", "Unknown parameter: 'frames'."),
    ({"image_size": "huge"}, "image_size", "one of square_hd, square"),
    ({"image_size": {"width": 64}}, "image_size", "or an object with width and height"),
    ({"image_size": "square", "width": 64, "height": 64}, "image_size", "another size than width and height"),
    ({"image_size": {"width": "64", "height": 64}}, "width", "valid integer"),
    ({"loras": [{"path": "https://a.example/b.safetensors"}]}, "loras", "nothing is fetched from a URL"),
    ({"embeddings": [{"path": "x"}]}, "embeddings", "as embedding:NAME"),
    ({"expand_prompt": True}, "expand_prompt", "drawn as they are sent"),
]


@pytest.mark.parametrize(("sent", "meant"), UNDERSTOOD, ids=lambda one: "-".join(one))
def test_what_is_plain_is_understood(sent: dict[str, Any], meant: dict[str, Any]) -> None:
    asked = native.parse({"prompt": "x", **sent})
    assert {name: getattr(asked, name) for name in meant} == meant
    assert asked.notes == ()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_by_all_their_names(name: str) -> None:
    assert native.parse({"prompt": "x", "sampler": name}).scheduler == SCHEDULERS[name]


def test_our_own_names_of_schedulers_stay() -> None:
    for name in {name for spec in MODELS.values() for name in spec.schedulers}:
        assert native.parse({"prompt": "x", "scheduler": name}).scheduler == name


def test_what_changes_nothing_is_noted() -> None:
    asked = native.parse(SDXL)
    assert (asked.scheduler, asked.n, asked.strength, asked.images) == ("euler", 1, None, ())
    assert [note.split()[0] for note in asked.notes] == ["refiner_inference_steps", "high_noise_frac", "strength"]
    assert native.parse({"prompt": "x", "nsfw": True}).notes == (
        "nsfw changes nothing: pictures are not looked through here.",
    )


@pytest.mark.parametrize(("sent", "param", "said"), REFUSED)
def test_the_others_are_refused_with_what_to_send_instead(sent: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(KindlingError) as no:
        native.parse({"prompt": "x", **sent})
    assert no.value.param == param
    assert said in no.value.message


def test_eulers_steps_along_a_flow_may_be_called_just_eulers() -> None:
    asked = ImageRequest(prompt="x", scheduler="euler")
    assert served.worded(asked, MODELS["spark"]).scheduler == "flow-match-euler"
    assert served.worded(asked, MODELS["sdxl"]).scheduler == "euler"


def test_every_name_stands_for_a_field_and_is_described() -> None:
    assert {*aliases.NAMES.values()} <= ImageRequest.model_fields.keys()
    names = (*aliases.NAMES, *aliases.NOTED, *aliases.INSTEAD)
    assert len({*names}) == len(names)
    assert not {*names} & ImageRequest.model_fields.keys()
    assert all(name in aliases.told() for name in (*aliases.NAMES, *aliases.NOTED))
