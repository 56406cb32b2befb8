"""What a caller may ask and how it is told what is wrong; what a recipe says of itself."""

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import RECIPE
from handler.core import attachments, loras
from handler.core.errors import InvalidType, InvalidValue, MissingParameter, OutOfRange, RequestError, UnknownParameter
from handler.core.recipe import OPTIONAL, Lora, Mask, Picture, Pixels, Recipe, Reference, steps_taken
from handler.core.request import ImageRequest
from handler.core.sampling import Sampling
from handler.core.stepcache import StepCache

FILE = base64.b64encode(b"a file").decode()
LONG = "n" * 100
DEFAULTS = {
    "model": None, "n": 1, "width": None, "height": None, "num_inference_steps": None, "guidance_scale": None,
    "scheduler": None, "seed": None, "negative_prompt": None, "step_cache": None, "images": (), "mask": None,
    "mask_form": None, "long_prompts": None, "loras": (), "strength": None, "stream": False, "partial_images": 0,
    "progress": False,
    "response_format": "b64_json",
    "output_format": "png", "output_compression": 100, "sampling": None, "reading": None, "quality": None,
}  # fmt: skip


def ask(**fields: Any) -> ImageRequest:
    return ImageRequest.parse({"prompt": "x"} | fields)


def test_what_is_not_given() -> None:
    assert dict(ask()) == {"prompt": "x"} | DEFAULTS
    assert ask(**dict.fromkeys(DEFAULTS)) == ask()


@pytest.mark.parametrize(
    "file",
    [
        b"a file",
        FILE,
        f"data:image/png;base64,{FILE}",
        f"data:image/any;x=y;base64,{FILE}",
        f"data:application/octet-stream;base64,{FILE}",
        f"DATA:IMAGE/PNG;BASE64,{FILE}",
        f"data:;base64,{FILE}",
        f" data:text/plain; base64,{FILE[:4]}\n {FILE[4:]}",
        "data:image/png;base64," + FILE.replace("=", "%3D"),
        "\r\n".join(FILE),
        f"\t{FILE}\f\n",
    ],
)
def test_how_a_file_may_come(file: Any) -> None:
    found = ask(images=[file, FILE], mask=file)
    assert (found.images, found.mask) == ((b"a file", b"a file"), b"a file")
    assert ask(images=(file,)).images == (b"a file",)
    assert "a file" not in repr(found)


@given(st.binary(max_size=40), st.booleans(), st.integers(0, 2), st.integers(1, 9))
def test_base64_is_forgiven_its_alphabet_its_padding_and_its_lines(
    data: bytes, safe: bool, left_out: int, width: int
) -> None:
    text = (base64.urlsafe_b64encode if safe else base64.b64encode)(data)
    padding = len(text) - len(text.rstrip(b"="))
    text = text[: len(text) - min(padding, left_out)]
    lines = b"\r\n".join(text[i : i + width] for i in range(0, len(text), width))
    assert attachments.decoded(lines) == data


@pytest.mark.parametrize("text", [b"Y", b"YWJjZ", b"YQ===", b"Y=Q=", b"=YQ=", b"Y!Q=", b"YQ=\0", b"YQ\xa0=="])
def test_what_is_no_base64_is_none(text: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        attachments.decoded(text)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["ink"], [("ink", 1)]),
        ("ink:0.8, styles/wash:-1", [("ink", 0.8), ("styles/wash", -1)]),
        ([{"name": "ink:3", "weight": 2}, "a:b", "a:.5", "a:"], [("ink:3", 2), ("a:b", 1), ("a", 0.5), ("a:", 1)]),
        ([], []),
    ],
)
def test_how_loras_may_come(given: Any, wanted: list[tuple[str, float]]) -> None:
    found = ask(loras=given)
    assert found.loras == tuple(loras.Wanted(*one) for one in wanted)
    assert ask(loras=found.loras) == found
    assert found.model_dump()["loras"] == [f"{name}:{weight:g}" for name, weight in wanted]


def test_a_lora_may_weigh_otherwise_in_text_encoders() -> None:
    given = {"name": "ink", "weight": 0.8, "clip_weight": 0.5}
    found = ask(loras=[given, {"name": "wash", "clip_weight": None}])
    assert found.loras == (loras.Wanted("ink", 0.8, 0.5), loras.Wanted("wash"))
    assert found.model_dump()["loras"] == [given, "wash:1"]
    assert ask(loras=found.model_dump()["loras"]) == found


def test_how_many_images_may_come() -> None:
    assert len(ask(images=[FILE] * 16).images) == 16


@pytest.mark.parametrize(
    ("fields", "kind", "param", "told"),
    [
        ({"prompt": None}, MissingParameter, "prompt", "Missing required parameter: 'prompt'."),
        ({LONG: 1}, UnknownParameter, LONG[:80], f"Unknown parameter: '{LONG[:80]}'."),
        ({"images": FILE}, InvalidType, "images", "images: Input should be a list of images."),
        ({"images": [FILE] * 17}, OutOfRange, "images", "images: Input should have at most 16 images, got 17."),
        ({"images": [FILE, 7]}, InvalidType, "images", "images: image 2 should be a string."),
        ({"images": [FILE], "mask": 7}, InvalidType, "mask", "mask: the file should be a string."),
        ({"loras": {"name": "x"}}, InvalidType, "loras", "loras: Input should be a list of LoRAs."),
        ({"loras": ["x"] * 5}, OutOfRange, "loras", "loras: Input should have at most 4 LoRAs, got 5."),
        ({"loras": ["x", 7]}, InvalidType, "loras", f"loras: LoRA 2 {loras.SHAPE}."),
        ({"loras": [{"weight": 1}]}, InvalidType, "loras", f"loras: LoRA 1 {loras.SHAPE}."),
        ({"loras": [{"name": "x", "weight": "1"}]}, InvalidType, "loras", "loras: LoRA 1: weight should be a number."),
        ({"loras": [{"name": "x", "weight": True}]}, InvalidType, "loras", "loras: LoRA 1: weight should be a number."),
        ({"loras": ["x:10.5"]}, OutOfRange, "loras", "loras: LoRA 1: weight should be -10 to 10."),
        ({"loras": [{"name": "x", "weight": float("nan")}]}, OutOfRange, "loras",
         "loras: LoRA 1: weight should be -10 to 10."),
        ({"loras": [{"name": "x", "scale": 1}]}, InvalidValue, "loras",
         "loras: LoRA 1 has 'scale', and should have just name, weight and clip_weight."),
        ({"loras": [{"name": "x", "clip_weight": "1"}]}, InvalidType, "loras",
         "loras: LoRA 1: clip_weight should be a number."),
        ({"loras": [{"name": "x", "clip_weight": 11}]}, OutOfRange, "loras",
         "loras: LoRA 1: clip_weight should be -10 to 10."),
        *(({"loras": [{"name": name}]}, InvalidValue, "loras",
           "loras: LoRA 1 should have a name of 1 to 200 characters that can be printed.")
          for name in ("", "a\nb", "n" * 201)),
        *(
            ({"images": [address]}, InvalidValue, "images",
             "images: image 1 is a URL, fetched only from hosts in KINDLING_FETCH_HOSTS; send a data URL or base64.")
            for address in ("http://here/a.png", "https://here/a.png")
        ),
        *(
            ({"images": [head + FILE]}, InvalidValue, "images",
             "images: image 1 should have ;base64, before its data if it is a data URL.")
            for head in ("data:text/plain,", "data:image/png,", "DATA:,")
        ),
        *(
            ({"images": [FILE, text]}, InvalidValue, "images", "images: image 2 is not valid base64.")
            for text in ("Y", "YQ===", "é", "," + FILE, "data:image/png;base64,Y!==")
        ),
        ({"n": "1"}, InvalidType, "n", "n: Input should be a valid integer."),
        ({"n": 0}, OutOfRange, "n", "n: Input should be greater than or equal to 1."),
        ({"guidance_scale": float("nan")}, OutOfRange, "guidance_scale",
         "guidance_scale: Input should be a finite number."),
        ({"width": 64}, InvalidValue, "width", "width and height must be given together."),
        ({"height": 64}, InvalidValue, "width", "width and height must be given together."),
        ({"output_compression": 99}, InvalidValue, "output_compression",
         "output_compression below 100 needs output_format jpeg or webp; PNG is lossless."),
        ({"partial_images": 1, "n": 2}, InvalidValue, "partial_images",
         "partial_images are of one picture; send n 1."),
        ({"mask": FILE}, InvalidValue, "mask",
         "mask says where an image is drawn anew; send the image too."),
        ({"strength": 0.5}, InvalidValue, "strength",
         "strength says how much of an image is drawn anew; send the image too."),
        ({"sampling": {}, "num_inference_steps": 4}, InvalidValue, "sampling",
         "sampling says all of scheduler, num_inference_steps and strength; send none of those."),
        ({"sampling": {"steps": 4, "start": 4}}, InvalidValue, "sampling",
         "sampling: start and end leave no step to take."),
        ({"sampling": {"sigmas": [1.0]}}, InvalidValue, "sampling",
         "sampling: start and end leave no step to take."),
        ({"sampling": {"denoise": 5e-324}}, InvalidValue, "sampling",
         "sampling: denoise is too small for so many steps."),
        ({"sampling": {"sigmas": [0.5, 1.0, 0.0]}}, InvalidValue, "sampling", "sampling: sigmas should fall."),
        *(({"sampling": {"sigmas": sigmas}}, InvalidValue, "sampling",
           "sampling: of sigmas only the last may be 0, where no noise is left.")
          for sigmas in ([0.0, 0.0], [1.0, 0.0, 0.0])),
        ({"sampling": {"steps": 101, "denoise": 0.01}}, InvalidValue, "sampling",
         "sampling: denoise is too small for so many steps."),
        ({"sampling": {"batch": 2, "index": 2}}, InvalidValue, "sampling", "sampling: index should be below batch."),
        ({"sampling": {"cfg": 0.5}}, OutOfRange, "sampling",
         "sampling.cfg: Input should be greater than or equal to 1."),
        ({"sampling": {"steps": "4"}}, InvalidType, "sampling", "sampling.steps: Input should be a valid integer."),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(fields: dict[str, Any], kind: type[RequestError], param: str, told: str) -> None:
    with pytest.raises(RequestError) as caught:
        ask(**fields)
    assert (type(caught.value), caught.value.param, caught.value.message) == (kind, param, told)


@pytest.mark.parametrize(
    "fields",
    [
        {"width": 64, "height": 64},
        {"output_compression": 99, "output_format": "jpeg"},
        {"output_compression": 99, "output_format": "webp"},
        {"output_compression": 100, "output_format": "png"},
        {"partial_images": 3, "n": 1},
        {"partial_images": 0, "n": 4},
        {"mask": FILE, "images": [FILE]},
        {"strength": 0.5, "images": [FILE]},
        {"sampling": Sampling(sampler="uni_pc", sigmas=(3.0, 1.0, 0.0))},
        {"sampling": Sampling(steps=100, denoise=0.01)},
    ],
)
def test_what_goes_together(fields: dict[str, Any]) -> None:
    found = dict(ask(**fields))
    assert all(found[name] == value for name, value in fields.items() if value not in (FILE, [FILE]))


@pytest.mark.parametrize(
    ("steps", "strength", "taken"), [(10, 0.7, 7), (10, 0.75, 7), (4, 0.2, 1), (50, 1.0, 50), (50, 0.58, 29)]
)
def test_an_edit_takes_its_share_of_the_steps(steps: int, strength: float, taken: int) -> None:
    assert steps_taken(steps, strength) == taken
    recipe = dataclasses.replace(RECIPE, steps=steps)
    assert recipe.taken == steps
    assert dataclasses.replace(recipe, strength=strength).taken == taken


@pytest.mark.parametrize(
    ("fields", "taken", "name"),
    [
        ({}, 20, "euler/normal"),
        ({"steps": 8, "start": 3}, 5, "euler/normal"),
        ({"steps": 8, "start": 3, "end": 5, "scheduler": "karras"}, 2, "euler/karras"),
        ({"steps": 8, "end": 900}, 8, "euler/normal"),
        ({"sigmas": [3.0, 2.0, 1.0, 0.0], "start": 1, "sampler": "lcm"}, 2, "lcm/sigmas"),
    ],
)
def test_a_sampling_counts_and_names_its_steps(fields: dict[str, Any], taken: int, name: str) -> None:
    sampling = ask(sampling=fields).sampling
    assert sampling
    assert (sampling.taken, sampling.name) == (taken, name)
    assert dataclasses.replace(RECIPE, steps=30, strength=0.5, sampling=sampling).taken == taken
    assert ask(sampling=json.loads(sampling.model_dump_json())).sampling == sampling


def test_a_recipe_describes_itself_without_its_images() -> None:
    plain = RECIPE.described()
    assert {*plain, *OPTIONAL} == {field.name for field in dataclasses.fields(Recipe)}
    assert not {*OPTIONAL} & {*plain}  # so a picture without is told as ever
    assert (plain["images"], plain["mask"], plain["prompt"]) == ([], None, RECIPE.prompt)
    images = (Reference(object(), "a" * 64), Reference(object(), "b" * 64))
    edit = dataclasses.replace(RECIPE, images=images, mask=Mask(object(), "c" * 64), step_cache=StepCache())
    told = json.loads(json.dumps(edit.described()))
    assert (told["images"], told["mask"]) == (["aa", "bb"], "cc")
    assert told["step_cache"] == dataclasses.asdict(StepCache())
    lora = Lora("ink", 0.8, "d" * 64, Path("/somewhere"))
    adapted = dataclasses.replace(RECIPE, loras=(lora,))
    assert adapted.described() == plain | {"loras": [{"name": "ink", "weight": 0.8, "sha256": "d" * 64}]}
    apart = dataclasses.replace(lora, clip_weight=0.0).described()
    assert apart == {"name": "ink", "weight": 0.8, "clip_weight": 0.0, "sha256": "d" * 64}
    assert "somewhere" not in repr(adapted)
    assert adapted == dataclasses.replace(RECIPE, loras=(dataclasses.replace(lora, path=Path()),))


def test_what_holds_images_is_one_thing_and_tells_no_address() -> None:
    assert Reference(1, "a") != Reference(1, "a")
    assert Mask(1, "a") != Mask(1, "a")
    picture = Picture(b"", "png", RECIPE, url="https://store/secret")
    assert "secret" not in repr(picture)
    assert (picture.plan, picture.stages, picture.undelivered) == ("", {}, "")
    assert Pixels(None, RECIPE).batch == 1
