"""The warm path: recipes in, pixels out, with what is kept from one picture to the next."""

import importlib
import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

from handler.catalog.spec import ModelSpec
from handler.core.errors import DeviceLost
from handler.core.recipe import Drawn, Lora, OnStep, Pixels, Preview, Recipe, Tokens
from handler.model.adapters.applied import Applied
from handler.model.faults import meaning
from handler.model.preview import Projection
from handler.model.stages import Mark, Stages
from handler.model.tokens import counted, require_read

PROMPTS_KEPT = 16  # encoded ones; of FLUX.2 [dev] each takes 16 MB
DrawOutcome = Drawn | BaseException  # a picture, or why there is none
Read = tuple[dict[str, Any], Tokens]  # what a family makes of a prompt, and how many tokens that has


def sound(outcome: DrawOutcome) -> Drawn:
    """The picture; raises why there is none."""
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


class InTurn(ABC):
    """Draws alike pictures in as many runs as they take."""

    @abstractmethod
    def draw_some(self, recipes: Sequence[Recipe], on_steps: Sequence[OnStep]) -> list[DrawOutcome | None]:
        """Draw, in one run, those that fit together; each, or why there is none, and None for the others."""

    @abstractmethod
    def restore(self) -> None:
        """Let the weights be the model's own, without the LoRAs of the last picture."""

    def draw(self, recipes: Sequence[Recipe], on_steps: Sequence[OnStep]) -> list[DrawOutcome]:
        """Draw alike pictures (`batching.alike`), at once where their prompts allow; each, or why there is none."""
        found: dict[int, DrawOutcome] = {}
        while left := [i for i in range(len(recipes)) if i not in found]:
            some = self.draw_some([recipes[i] for i in left], [on_steps[i] for i in left])
            found |= {i: outcome for i, outcome in zip(left, some, strict=True) if outcome is not None}
        return [found[i] for i in range(len(recipes))]


class Runner(InTurn):
    """Draws with a loaded pipeline. `tiles` says of a size (width, height) whether it is decoded in tiles.

    `mark` leaves a mark in what the pipeline's device is told; `room` is as `Applied` has it. `resized` is called
    before a picture of another size than the last.
    """

    def __init__(
        self,
        spec: ModelSpec,
        family: ModuleType,
        pipeline: Any,
        tiles: Callable[[tuple[int, int]], bool],
        mark: Callable[[], Mark],
        room: float = math.inf,
        resized: Callable[[], object] = lambda: None,
    ) -> None:
        self._spec, self._family, self._pipeline, self._tiles = spec, family, pipeline, tiles
        self._mark, self._resized = mark, resized
        self._families = importlib.import_module("handler.model.families")
        self._components = self._families.Components(pipeline)
        self._size = spec.size
        self._projection, self._applied = Projection(), Applied(pipeline, room)
        self._prompts: OrderedDict[tuple[Any, ...], Read] = OrderedDict()

    def restore(self) -> None:
        """Let the weights be the model's own, without the LoRAs of the last picture."""
        self._applied.apply(())

    def draw_some(self, recipes: Sequence[Recipe], on_steps: Sequence[OnStep]) -> list[DrawOutcome | None]:
        """Draw, in one run, the first of alike pictures and those whose prompts fit beside its; None for the others.

        Raises nothing but what ends a program. `on_steps[i](done, preview)` may raise to give up picture i; it is
        called when the device has done all steps but the last of `done`. A lost device is so for all. Stages are the
        device's seconds from start to end, so equal for all that were drawn at once.
        """
        try:
            stages = self._begun(recipes[0].loras)
        except Exception as error:
            return [meaning(error, recipes[0].size)] * len(recipes)
        if (size := recipes[0].size) != self._size:
            self._resized()
            self._size = size
        told = [self._encoded(recipe) for recipe in recipes]
        outcomes: list[DrawOutcome | None] = [each if isinstance(each, BaseException) else None for each in told]
        known = {i: each for i, each in enumerate(told) if not isinstance(each, BaseException)}
        if known and not any(isinstance(each, DeviceLost) for each in told):
            at = self._families.fitting({i: arguments for i, (arguments, _) in known.items()})
            read, some, watching = [known[i] for i in at], [recipes[i] for i in at], [on_steps[i] for i in at]
            for i, outcome in zip(at, self._run(stages, read, some, watching), strict=True):
                outcomes[i] = outcome
        lost = next((each for each in outcomes if isinstance(each, DeviceLost)), None)
        return [lost if outcome is None else outcome for outcome in outcomes]

    def _begun(self, loras: tuple[Lora, ...]) -> Stages:
        """The stages of a drawing that has begun, with `loras` and no others added to the weights."""
        if not self._applied.lacks(loras):
            return Stages(self._mark)
        stages = Stages(self._mark, "loras")
        self._applied.apply(loras)
        stages.begin("encode")
        return stages

    def _run(
        self,
        stages: Stages,
        read: Sequence[Read],
        recipes: Sequence[Recipe],
        on_steps: Sequence[OnStep],
    ) -> list[DrawOutcome]:
        """Draw at once what fits together; each, or why there is none."""
        given_up: dict[int, BaseException] = {}
        step = _step(stages, on_steps, given_up, recipes[0].size)
        try:
            stages.begin("denoise")
            with self._components.lent(), self._families.tiled(self._pipeline, self._tiles(recipes[0].size)):
                found = self._families.run(
                    self._family,
                    self._pipeline,
                    self._families.joined([arguments for arguments, _ in read]),
                    recipes,
                    self._spec,
                    step,
                    self._projection,
                    stages.finish,
                )
            seconds = stages.seconds
        except BaseException as error:
            if not isinstance(error, Exception) and error not in given_up.values():
                raise
            meant = meaning(error, recipes[0].size)
            return [given_up.get(i, meant) for i in range(len(recipes))]
        return [
            given_up.get(i) or self._outcome(recipe, rgb, len(recipes), tokens, seconds)
            for i, (recipe, rgb, (_, tokens)) in enumerate(zip(recipes, found, read, strict=True))
        ]

    def _outcome(self, recipe: Recipe, rgb: Any, batch: int, tokens: Tokens, stages: dict[str, float]) -> DrawOutcome:
        if isinstance(rgb, Exception):
            return rgb
        return Pixels(rgb, self._at(recipe), batch, tokens), dict(stages)

    def _at(self, recipe: Recipe) -> Recipe:
        """`recipe` as it was drawn: of a row that leaves it open, nobody else may have known the revision."""
        return replace(recipe, revision=self._spec.revision)

    def _encoded(self, recipe: Recipe) -> Read | BaseException:
        """What the family makes of the prompt; or why it makes nothing. Kept, with its tokens, for the same words."""
        key = _words(recipe)
        try:
            asked = self._family, self._pipeline, recipe, self._spec
            require_read(*asked)
            if key not in self._prompts:
                with self._components.lent():
                    self._prompts[key] = self._families.encode(*asked), counted(*asked)
        except Exception as error:
            return meaning(error, recipe.size)
        self._prompts.move_to_end(key)
        if len(self._prompts) > PROMPTS_KEPT:
            self._prompts.popitem(last=False)
        return self._prompts[key]


def _words(recipe: Recipe) -> tuple[Any, ...]:
    """All of `recipe` that what its family makes of the prompt depends on, and whose it is.

    How fast a prompt is encoded tells whether it was before, and so what somebody else has asked.
    """
    read = recipe.reading and (recipe.reading, recipe.embeddings, recipe.size)  # SDXL is told sizes
    cfg = recipe.sampling and recipe.sampling.cfg  # which is not guidance of the same scale: FLUX.1 [dev] has both
    chunked = recipe.long_prompts == "chunked"
    return recipe.prompt, recipe.negative_prompt, recipe.guidance, cfg, recipe.loras, read, chunked, recipe.caller


def _step(
    stages: Stages, on_steps: Sequence[OnStep], given_up: dict[int, BaseException], size: tuple[int, int]
) -> Callable[[int, Sequence[Preview]], None]:
    """What a run calls after each step. `given_up` gets the pictures that are, with why; the last one ends the run."""

    def step(done: int, previews: Sequence[Preview]) -> None:
        stages.step()
        for i, (on_step, preview) in enumerate(zip(on_steps, previews, strict=True)):
            try:
                if i not in given_up:
                    on_step(done, preview)
            except BaseException as error:
                if isinstance(meant := meaning(error, size), DeviceLost):
                    raise meant from error
                given_up[i] = meant
                if len(given_up) == len(on_steps):
                    raise

    return step
