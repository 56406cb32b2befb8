"""What an engine drew, encoded, with how it was made."""

import time

from handler.api import codec
from handler.core.recipe import Picture, Pixels
from handler.core.request import ImageRequest
from handler.core.version import __version__
from handler.engine.engine import Engine
from handler.model.hardware import peak_memory


def encoded(pixels: Pixels, stages: dict[str, float], request: ImageRequest, engine: Engine) -> Picture:
    """The picture as `request` wants it. It takes a moment: for a thread."""
    start = time.perf_counter()
    recipe, worker, tokens = pixels.recipe, pixels.worker or engine.worker, pixels.tokens
    parameters = None
    if engine.settings.metadata and worker:
        facts = worker.facts | ({"batch": str(pixels.batch)} if pixels.batch > 1 else {})
        parameters = codec.parameters_of(recipe, facts, __version__)
    data = codec.encode(pixels.rgb, request.output_format, request.output_compression, parameters)
    stages = {**stages, "serialize": time.perf_counter() - start}
    decision = (pixels.worker or engine).ledger.decision
    peak = worker.peak_bytes if worker else peak_memory("cpu")
    return Picture(data, request.output_format, recipe, decision, stages, tokens=tokens, peak_bytes=peak)
