"""The embedded model keeps its word. `benchmarks/quality.py` measures it fully; this is the floor under it."""

import numpy as np
import pytest
from PIL import Image
from test_flux import recipe

from handler import Worker
from spark.checker import JUDGED, check
from spark.scenes import held_out


@pytest.mark.parametrize("phrasing", ["everyday", "capitals"])
@pytest.mark.parametrize("kind", ["one", "many"])
def test_pictures_show_what_the_prompt_says(spark: Worker, kind: str, phrasing: str) -> None:
    prompts = held_out(12, "validation", kind, phrasing)
    verdicts = [
        check(Image.fromarray(spark.generate(recipe(seed, prompt=text))[0].rgb), scene)
        for seed, (text, scene) in enumerate(prompts)
    ]
    right = {name: sum(getattr(v, name) for v in verdicts) for name in JUDGED}
    assert all(right[name] >= 11 for name in ("background", "count", "color", "position")), right
    assert right["shape"] >= 8, right  # stars are often too blunt for the judge


def test_seeds_give_visibly_different_pictures(spark: Worker) -> None:
    drawn = np.stack([spark.generate(recipe(seed))[0].rgb for seed in range(6)]).astype(float)
    moved = (drawn.std(axis=0) > 40).mean()  # share of pixels that are sometimes object, sometimes background
    assert moved > 0.03
