"""The embedded model keeps its word. `benchmarks/quality.py` measures it fully; this is the floor under it."""

import numpy as np
import pytest
from PIL import Image
from test_flux import recipe

from handler import Worker
from spark.checker import check
from spark.scenes import held_out


@pytest.mark.parametrize("phrasing", ["everyday", "capitals"])
@pytest.mark.parametrize("kind", ["one", "many"])
def test_pictures_show_what_the_prompt_says(spark: Worker, kind: str, phrasing: str) -> None:
    prompts = held_out(12, "validation", kind, phrasing)
    pictures = [Image.fromarray(spark.generate(recipe(i, prompt=text))[0].rgb) for i, (text, _) in enumerate(prompts)]
    wrong = [text for picture, (text, scene) in zip(pictures, prompts, strict=True) if not check(picture, scene).right]
    assert len(wrong) <= 2, wrong


def test_seeds_give_visibly_different_pictures(spark: Worker) -> None:
    drawn = np.stack([spark.generate(recipe(seed))[0].rgb for seed in range(6)]).astype(float)
    moved = (drawn.std(axis=0) > 40).mean()  # share of pixels that are sometimes object, sometimes background
    assert moved > 0.03
