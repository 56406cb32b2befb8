"""The warm path: recipes in, pixels out, with what is kept from one picture to the next."""

import importlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from handler.faults import meaning
from handler.preview import OnStep, Preview, Projection
from handler.request import Drawn, Pixels, Recipe
from handler.spec import ModelSpec
from handler.stages import Mark, Stages

PROMPTS_KEPT = 16  # encoded ones; of FLUX.2 [dev] each takes 16 MB


class Drawing:
    """Draws with a loaded pipeline. `tiles` says of a size (width, height) whether it is decoded in tiles.

    `mark` leaves a mark in what the pipeline's device is told.
    """

    def __init__(
        self,
        spec: ModelSpec,
        family: ModuleType,
        pipeline: Any,
        tiles: Callable[[tuple[int, int]], bool],
        mark: Callable[[], Mark],
    ) -> None:
        self._spec, self._family, self._pipeline, self._tiles = spec, family, pipeline, tiles
        self._mark = mark
        self._families = importlib.import_module("handler.families")
        self._projection = Projection()
        self._prompts: OrderedDict[tuple[str, str | None, float], dict[str, Any]] = OrderedDict()

    def draw(self, recipes: Sequence[Recipe], on_steps: Sequence[OnStep]) -> list[Drawn | Exception]:
        """Draw alike pictures (`batching.alike`), at once if their prompts allow; each, or why there is none.

        `on_steps[i](done, preview)` may raise to give up picture i; a lone picture's error is raised, as are those
        that end the whole run. It is called when the device has done all steps but the last of `done`. Stages are the
        device's seconds from start to end of all, so equal for all that were drawn at once.
        """
        given_up: dict[int, Exception] = {}

        def step(done: int, previews: Sequence[Preview]) -> None:
            stages.step()
            for i, (on_step, preview) in enumerate(zip(on_steps, previews, strict=True)):
                try:
                    if i not in given_up:
                        on_step(done, preview)
                except Exception as error:
                    given_up[i] = error
                    if len(given_up) == len(recipes):
                        raise

        try:
            stages = Stages(self._mark)
            arguments = self._families.joined([self._encoded(recipe) for recipe in recipes])
            if arguments is None:
                return [self._alone(*each) for each in zip(recipes, on_steps, strict=True)]
            stages.begin("denoise")
            self._families.tile(self._pipeline, self._tiles(recipes[0].size))
            found = self._families.run(
                self._family, self._pipeline, arguments, recipes, self._spec, step, self._projection, stages.finish
            )
            seconds = stages.seconds
        except RuntimeError as error:
            if (meant := meaning(error, recipes[0].size)) is error:
                raise
            raise meant from error
        outcomes = zip(itertools.count(), recipes, found, strict=False)
        return [given_up.get(i) or _outcome(recipe, rgb, len(recipes), seconds) for i, recipe, rgb in outcomes]

    def _alone(self, recipe: Recipe, on_step: OnStep) -> Drawn | Exception:
        try:
            return self.draw([recipe], [on_step])[0]
        except Exception as error:
            return error

    def _encoded(self, recipe: Recipe) -> dict[str, Any]:
        """What the family makes of the prompt, kept for later pictures of the same words."""
        key = (recipe.prompt, recipe.negative_prompt, recipe.guidance)
        if key not in self._prompts:
            self._prompts[key] = self._families.encode(self._family, self._pipeline, recipe, self._spec)
        self._prompts.move_to_end(key)
        if len(self._prompts) > PROMPTS_KEPT:
            self._prompts.popitem(last=False)
        return self._prompts[key]


def _outcome(recipe: Recipe, rgb: Any, batch: int, stages: dict[str, float]) -> Drawn | Exception:
    return rgb if isinstance(rgb, Exception) else (Pixels(rgb, recipe, batch), dict(stages))
