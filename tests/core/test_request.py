"""What a caller may ask and how it is told what is wrong; what a recipe says of itself."""

import base64
import dataclasses
import json
from typing import Any

import pytest

from fakes import RECIPE
from handler.core.errors import InvalidType, InvalidValue, MissingParameter, OutOfRange, RequestError, UnknownParameter
from handler.core.recipe import Mask, Picture, Pixels, Recipe, Reference, steps_taken
from handler.core.request import ImageRequest
from handler.core.stepcache import StepCache

FILE = base64.b64encode(b"a file").decode()
LONG = "n" * 100
DEFAULTS = {
    "model": None, "n": 1, "width": None, "height": None, "num_inference_steps": None, "guidance_scale": None,
    "scheduler": None, "seed": None, "negative_prompt": None, "step_cache": None, "images": (), "mask": None,
    "strength": None, "stream": False, "partial_images": 0, "response_format": "b64_json", "output_format": "png",
    "output_compression": 100,
}  # fmt: skip


def ask(**fields: Any) -> ImageRequest:
    return ImageRequest.parse({"prompt": "x"} | fields)


def test_what_is_not_given() -> None:
    assert dict(ask()) == {"prompt": "x"} | DEFAULTS
    assert ask(**dict.fromkeys(DEFAULTS)) == ask()


@pytest.mark.parametrize(
    "file", [b"a file", FILE, f"data:image/png;base64,{FILE}", f"data:image/any;x=y;base64,{FILE}"]
)
def test_how_a_file_may_come(file: Any) -> None:
    found = ask(images=[file, FILE], mask=file)
    assert (found.images, found.mask) == ((b"a file", b"a file"), b"a file")
    assert ask(images=(file,)).images == (b"a file",)
    assert "a file" not in repr(found)


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
        *(
            ({"images": [address]}, InvalidValue, "images",
             "images: image 1 is a URL, which is never fetched; send a data URL or base64.")
            for address in ("http://here/a.png", "https://here/a.png")
        ),
        *(
            ({"images": [head + FILE]}, InvalidValue, "images",
             "images: image 1 should begin with data:image/...;base64, if it is a data URL.")
            for head in ("data:text/plain;base64,", "data:image/png,", ",")
        ),
        *(
            ({"images": [FILE, text]}, InvalidValue, "images", "images: image 2 is not valid base64.")
            for text in ("YQ", "Y Q=", "é", "data:image/png;base64,Y!==")
        ),
        ({"n": "1"}, InvalidType, "n", "n: Input should be a valid integer."),
        ({"n": 5}, OutOfRange, "n", "n: Input should be less than or equal to 4."),
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
    ],
)
def test_what_goes_together(fields: dict[str, Any]) -> None:
    found = dict(ask(**fields))
    assert all(found[name] == value for name, value in fields.items() if value not in (FILE, [FILE]))


@pytest.mark.parametrize(
    ("steps", "strength", "taken"), [(10, 0.7, 7), (10, 0.75, 7), (4, 0.2, 0), (50, 1.0, 50), (50, 0.58, 29)]
)
def test_an_edit_takes_its_share_of_the_steps(steps: int, strength: float, taken: int) -> None:
    assert steps_taken(steps, strength) == taken
    recipe = dataclasses.replace(RECIPE, steps=steps)
    assert recipe.taken == steps
    assert dataclasses.replace(recipe, strength=strength).taken == taken


def test_a_recipe_describes_itself_without_its_images() -> None:
    plain = RECIPE.described()
    assert set(plain) == {field.name for field in dataclasses.fields(Recipe)}
    assert (plain["images"], plain["mask"], plain["prompt"]) == ([], None, RECIPE.prompt)
    images = (Reference(object(), "a" * 64), Reference(object(), "b" * 64))
    edit = dataclasses.replace(RECIPE, images=images, mask=Mask(object(), "c" * 64), step_cache=StepCache())
    told = json.loads(json.dumps(edit.described()))
    assert (told["images"], told["mask"]) == (["a" * 64, "b" * 64], "c" * 64)
    assert told["step_cache"] == dataclasses.asdict(StepCache())


def test_what_holds_images_is_one_thing_and_tells_no_address() -> None:
    assert Reference(1, "a") != Reference(1, "a")
    assert Mask(1, "a") != Mask(1, "a")
    picture = Picture(b"", "png", RECIPE, url="https://store/secret")
    assert "secret" not in repr(picture)
    assert (picture.plan, picture.stages, picture.undelivered) == ("", {}, "")
    assert Pixels(None, RECIPE).batch == 1
