"""From a request to the recipes of its pictures, for the API and the command line alike."""

from dataclasses import replace

from handler.api.references import decoded
from handler.catalog.spec import ModelSpec
from handler.core.caller import CALLER
from handler.core.errors import OutOfRange
from handler.core.recipe import Embedding, Lora, Recipe
from handler.core.request import MAX_IMAGES, MAX_SEED, ImageRequest, LongPrompts
from handler.core.stepcache import StepCacheSetting


def settled(request: ImageRequest, spec: ModelSpec, served: LongPrompts) -> ImageRequest:
    """`request` with the worker's KINDLING_LONG_PROMPTS where it says nothing of long prompts.

    Where the model cannot read them in chunks they are cut off nevertheless.
    """
    if request.long_prompts is not None:
        return request
    usual = "cut" if served == "chunked" and not spec.reads_chunks else served
    return request.model_copy(update={"long_prompts": usual})


def recipes_of(
    request: ImageRequest,
    spec: ModelSpec,
    served: StepCacheSetting,
    loras: tuple[Lora, ...] = (),
    embeddings: tuple[Embedding, ...] = (),
) -> list[Recipe]:
    """What to draw for each of `request.n` pictures: picture i has seed + i, and after the largest comes 0.

    With `sampling` they have one seed, and picture i is the i-th of one draw of noise, as in ComfyUI.

    `served` is the worker's KINDLING_STEP_CACHE, `loras` and `embeddings` the request's, found. Raises the RequestError
    that names the first thing that cannot be. Images take time to decode: with any, this is not for an event loop.
    """
    if request.n > MAX_IMAGES:
        raise OutOfRange(f"n: at most {MAX_IMAGES} pictures are drawn for a request.", "n")
    spec.validate(request, served)  # of two faults, tell first what no other image would mend
    images, mask = decoded(request, spec)
    first = replace(spec.recipe(request, images, served, mask, loras, embeddings), caller=CALLER.get())
    if first.sampling:
        draws = [first.sampling.model_copy(update={"batch": request.n, "index": i}) for i in range(request.n)]
        return [replace(first, sampling=draw) for draw in (draws if request.n > 1 else [first.sampling])]
    return [replace(first, seed=(first.seed + i) % (MAX_SEED + 1)) for i in range(request.n)]
