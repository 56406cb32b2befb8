"""What will be drawn, in words: each row of requests, with its passes."""

from collections.abc import Iterable, Iterator

from handler.api.comfy.asking import plain
from handler.api.comfy.passes import steps
from handler.api.comfy.report import Pass, Pictures
from handler.api.dialects.comfy.meanings import shortened
from handler.api.dialects.comfy.plan import WAITING, Output
from handler.core.loras import Wanted
from handler.core.request import ImageRequest
from handler.core.sampling import Sampling

PROMPT = 300  # characters that are shown


def pictures(outputs: Iterable[Output]) -> Iterator[Pictures]:
    """What outputs give; those that show the same pictures together."""
    alike: dict[object, list[Output]] = {}
    for output in outputs:
        alike.setdefault((output.request, output.before, output.after), []).append(output)
    for same in alike.values():
        passes = [Pass(words(step.request), _kept(step.request)) for step in steps(same[0])]
        nodes = tuple(shortened(output.node) for output in same)
        yield Pictures(nodes, same[0].request.n, tuple(reversed(passes)), len(same[0].after))


def _kept(request: ImageRequest) -> dict[str, object]:
    """A request without its files, of which only the number is said."""
    said = plain(request.model_copy(update={"images": (), "mask": None}))
    return said | ({"images": len(request.images)} if request.images else {}) | ({"mask": 1} if request.mask else {})


def words(request: ImageRequest) -> str:
    """One pass, in sentences."""
    return " ".join(_sentences(request))


def _sentences(request: ImageRequest) -> Iterator[str]:
    count = f"{request.n} pictures" if request.n > 1 else "A picture"
    yield f'{count} of {request.width}x{request.height}: "{shortened(request.prompt, PROMPT)}".'
    if request.negative_prompt is not None and request.sampling and request.sampling.cfg > 1:
        zeros = bool(request.reading and request.reading.zeros)
        yield "Not: nothing (zeros)." if zeros else f'Not: "{shortened(request.negative_prompt, PROMPT)}".'
    if request.sampling:
        yield from _sampled(request.sampling, request.seed)
    if request.guidance_scale is not None:
        yield f"The model is told the guidance {request.guidance_scale:g}."
    yield from _seen(request)
    if request.loras:
        yield f"With the LoRAs {', '.join(map(_lora, request.loras))}."
    if request.reading and request.reading.clip_skip not in (None, -1):
        yield f"CLIP stops at layer {request.reading.clip_skip}."


def _sampled(sampling: Sampling, seed: int | None) -> Iterator[str]:
    schedule = "sigmas of its own" if sampling.sigmas else f"the schedule {sampling.scheduler}"
    cfg = f"cfg {sampling.cfg:g}" if sampling.cfg > 1 else "no guidance (cfg 1)"
    taken = f"{sampling.taken} step{'s' * (sampling.taken != 1)}"
    yield f"{taken} of {sampling.sampler} on {schedule}, {cfg}, {'a random seed' if seed is None else f'seed {seed}'}."
    if sampling.denoise < 1:
        yield f"Denoise {sampling.denoise:g}: these are the last of {int(sampling.steps / sampling.denoise)} steps."
    elif sampling.start or sampling.end:
        yield f"They are those from {sampling.start} to {sampling.end or sampling.steps} of {sampling.steps}."
    if sampling.shift is not None:
        yield f"The flow is shifted by {sampling.shift:.4g}."


def _seen(request: ImageRequest) -> Iterator[str]:
    if not request.images:
        return
    if request.images == (WAITING,):
        yield "It starts from the picture of the pass before."
    elif request.sampling and request.sampling.denoise == 1 and request.mask is None:
        yield f"It sees {len(request.images)} image{'s' * (len(request.images) > 1)}."
    else:
        yield "It starts from an image."
    if request.mask is not None:
        yield "Only what the mask covers is drawn anew."


def _lora(lora: Wanted) -> str:
    clip = "" if lora.clip_weight is None else f", {lora.clip_weight:g} in text encoders"
    return f"{shortened(lora.name)} ({lora.weight:g}{clip})"
