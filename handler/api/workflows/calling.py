"""One request to a workflow: drawn output by output, and told with the node that each picture is of."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

from handler.api import codec
from handler.api.comfy.inscription import finished, texts
from handler.api.comfy.passes import Passes, Step, steps
from handler.api.dialects import fal, huggingface, native
from handler.api.dialects.comfy.plan import Output, title_of
from handler.api.workflows.fields import TRANSPORT, FieldValues
from handler.api.workflows.keeping import Workflow
from handler.catalog.spec import ModelSpec
from handler.core.deadline import Deadline
from handler.core.errors import OutOfRange
from handler.core.recipe import Picture, Preview
from handler.core.request import ImageRequest

OnStep = Callable[[int, int, Preview], None]
Draw = Callable[..., Awaitable[list[Picture]]]
Render = Callable[..., dict[str, Any]]
PLAIN = "png"
OURS = (native, huggingface)  # which answer alike
SEVERAL = "One picture can be sent as it is, which Accept wants, and this workflow draws several; accept JSON."


@dataclass(frozen=True, slots=True)
class Made:
    """A picture as an answer has it, the output that it is of, and its width and height."""

    picture: Picture
    output: Output
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Call:
    """What a request to `workflow` asks for: `graph` has its values, `outputs` what is drawn of it.

    `seed` is that of the field of this name, if there is one: sent again it gives the same pictures.
    """

    workflow: Workflow
    dialect: ModuleType
    asked: FieldValues
    graph: Mapping[str, Any]
    outputs: tuple[Output, ...]
    notes: tuple[str, ...] = ()
    seed: int | None = None

    @property
    def count(self) -> int:
        """How many pictures its answer has."""
        return sum(output.request.n for output in self.outputs)

    @property
    def request(self) -> ImageRequest:
        """The first output's, answered as the caller would have it."""
        said = {name: getattr(self.asked.transport, name) for name in TRANSPORT}
        return self.outputs[0].request.model_copy(update=said)

    @property
    def several(self) -> bool:
        """Whether it is answered with more than one picture."""
        return len(self.outputs) > 1 or self.outputs[0].request.n > 1

    def require_one(self) -> None:
        """Refuse what is answered with several, where only one can be sent."""
        if self.several:
            raise OutOfRange(SEVERAL, "n")

    async def drawn(
        self,
        draw: Draw,
        deliver: Callable[[Sequence[Picture], ImageRequest, Deadline], Awaitable[list[Picture]]],
        on_step: OnStep,
        deadline: Deadline,
        metadata: bool,
    ) -> tuple[list[Picture], Render]:
        """The pictures of all outputs, and what renders them. `draw` and `deliver` are `Api`'s; the last that
        `draw` gets is whether some were drawn. Raises what they do."""
        passes, progress = Passes(deadline), Progress(self.outputs, on_step)
        one = partial(self._pass, draw, progress, deadline)
        made = []
        for output in self.outputs:
            for picture in await passes.drawn(output, one):
                made.append(await deadline.hold(asyncio.to_thread(self._made, output, picture, metadata)))
        delivered = await deliver([one.picture for one in made], self.request, deadline)
        return delivered, partial(self._render, made)

    async def _pass(
        self, draw: Draw, progress: "Progress", deadline: Deadline, what: Step, request: ImageRequest
    ) -> list[Picture]:
        found = await draw(request, progress.step, deadline, progress.done > 0)
        progress.done += 1
        return found

    def _made(self, output: Output, picture: Picture, metadata: bool) -> Made:
        """One picture finished and encoded as it shall be answered. For a thread."""
        asked = self.asked.transport
        plain = asked.output_format == PLAIN
        said = texts(self.graph, {}) if metadata and plain else {}
        data = finished(picture.data, output.after, said) if output.after or said else picture.data
        if not plain:
            data = codec.recode(data, asked.output_format, asked.output_compression)
        return Made(replace(picture, data=data, format=asked.output_format), output, codec.size_of(data))

    def _render(
        self, made: Sequence[Made], request: ImageRequest, spec: ModelSpec, pictures: Sequence[Picture], seconds: float
    ) -> dict[str, Any]:
        """As the dialect has it, with the workflow, its version, and of each picture the node."""
        told = request.model_copy(update={"model": self.asked.model or None})
        body: dict[str, Any] = self.dialect.render(told, spec=spec, pictures=pictures, seconds=seconds)
        said = {} if self.seed is None else {"seed": self.seed}
        for image, one in zip(body.get("images") or body["data"], made, strict=True):
            image |= self._told(one, said)
        if "image" in body:  # one alone, as fal has it
            body["image"] |= _sides(made[0])
        workflow = {"workflow": self.workflow.name, "version": self.workflow.version, "notes": list(self.notes)}
        return body | self._summed(made[0], said) | workflow

    def _told(self, one: Made, seed: Mapping[str, int]) -> dict[str, Any]:
        """What the dialect says of one picture beside where it is."""
        if self.dialect is fal:  # which has the seed once for all
            return _sides(one)
        node = {"node": one.output.node, "title": title_of(self.graph[one.output.node]), **_sides(one)}
        return {**seed, **(node if self.dialect in OURS else {})}

    def _summed(self, first: Made, seed: Mapping[str, int]) -> dict[str, Any]:
        """What it says of all."""
        if self.dialect is fal:
            return dict(seed)
        width, height = first.size
        return {"seed": self.seed} if self.dialect in OURS else {**_sides(first), "size": f"{width}x{height}"}


def _sides(one: Made) -> dict[str, int]:
    width, height = one.size
    return {"width": width, "height": height}


class Progress:
    """Tells steps over all that is drawn as a share of the whole; `done` requests have been."""

    def __init__(self, outputs: Sequence[Output], on_step: OnStep) -> None:
        self._of = len({(step.request, step.before) for output in outputs for step in steps(output)})
        self._on_step = on_step
        self.done = 0

    def step(self, done: int, of: int, preview: Preview) -> None:
        """On the engine's thread."""
        self._on_step(self.done * of + done, self._of * of, preview)
