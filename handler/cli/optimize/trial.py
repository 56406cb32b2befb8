"""One candidate, measured in this process through an engine, as the server has it: from prompt to encoded PNG."""

import asyncio
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from handler.api.dispatch import Api
from handler.cli.optimize.together import gains
from handler.core.errors import StartError
from handler.core.request import ImageRequest
from handler.core.settings import Settings
from handler.engine.batching import at_once
from handler.engine.engine import Engine
from handler.volume.manifest import write_atomically
from handler.volume.receipts import Candidate, Figures
from handler.worker.sharing import alone

PATIENT_S = 3600.0  # the sweep's own limit ends what takes too long
STATUS = Path("/proc/self/status")
# Prompt i has seed i. The embedded model knows only the first kind.
SHAPES = (
    "a red circle on a blue background",
    "three yellow stars on a purple background",
    "a small green heart in the top left corner on a white background",
    "two orange squares on a black background",
    "a large pink diamond on a gray background",
    "a cyan ring in the center on a brown background",
    "a white cross on a red background",
    "four blue triangles on a yellow background",
)
SCENES = (
    "a lighthouse in a storm, waves breaking over the rocks, oil painting",
    "portrait of an old woman laughing, natural light, 85 mm photograph",
    "a neon sign that says OPEN above a diner door, rain, night",
    "isometric drawing of a tiny library with a spiral staircase",
    "macro photograph of a bee on a sunflower, sharp pollen grains",
    "a bowl of fruit on a checkered cloth, watercolor",
    "an empty subway platform, fluorescent light, long perspective",
    "a snow leopard on a ridge at dawn, fog in the valley below",
)


@dataclass(frozen=True, slots=True)
class Task:
    """What a process of the sweep is told; its pictures go to `folder`, as <i>.png.

    A third of `limit_s` after its start no further round is begun: what heavy models draw on small GPUs takes long.
    """

    precision: str
    compiled: bool
    rounds: int
    limit_s: float
    volume: str
    device: str
    folder: str


def trial(task: Task, settings: Settings) -> Figures:
    """Boot a worker of this candidate and measure it; a StartError if it would run otherwise than asked."""
    until, policy = time.monotonic() + task.limit_s / 3, "on" if task.compiled else "off"
    asked = {"precision": task.precision, "compile": policy, "volume": Path(task.volume), "device": task.device}
    patient = {"cold_start_budget_s": PATIENT_S, "queue_s": PATIENT_S, "queue": 32, "batch": 1}
    engine = Engine(
        alone(settings).model_copy(update={**asked, **patient, "vae": "", "weights": (), "step_cache": "off"})
    )
    engine.start()
    try:
        engine.wait_booted()
        if (engine.ledger.plan == "COMPILED") != task.compiled:
            raise StartError(f"{Candidate(task.precision, task.compiled).name} runs {engine.ledger.decision}")
        seconds = asyncio.run(_one_by_one(Api(engine), task, until))
        batches = asyncio.run(gains(engine))
        engine.batch = at_once("auto", batches, engine.spec.size)
        rate = asyncio.run(_rate(Api(engine), task))
        held = peak_gb(engine.ledger.device)
    finally:
        engine.stop()
    compile_s = sum(phase.seconds for phase in engine.ledger.phases if phase.name == "compile")
    p95, cold = statistics.quantiles(seconds, n=20, method="inclusive")[-1], engine.ledger.total_s - compile_s
    return Figures(len(seconds), statistics.median(seconds), p95, rate, held, cold, compile_s, batches)


def _round(api: Api, turn: int) -> list[ImageRequest]:
    """Pictures of the model's own size. No prompt comes twice: a worker remembers what it made of one."""
    prompts = SHAPES if api.engine.spec.embedded else SCENES
    return [
        ImageRequest(prompt=text + f", version {turn}" * (turn > 0), seed=seed) for seed, text in enumerate(prompts)
    ]


async def _one_by_one(api: Api, task: Task, until: float) -> list[float]:
    """Seconds of each picture, one after another. The first round is what likeness is judged by."""
    seconds: list[float] = []
    for turn in range(task.rounds):
        if turn and time.monotonic() > until:
            break
        for seed, request in enumerate(_round(api, turn)):
            begun = time.perf_counter()
            [picture] = await api.draw(request)
            seconds.append(time.perf_counter() - begun)
            if turn == 0:
                write_atomically(Path(task.folder) / f"{seed}.png", picture.data)
    return seconds


async def _rate(api: Api, task: Task) -> float:
    """Pictures a second, all asked for at once."""
    requests, begun = _round(api, task.rounds), time.perf_counter()
    await asyncio.gather(*map(api.draw, requests))
    return len(requests) / (time.perf_counter() - begun)


def peak_gb(device: str) -> float:
    """The most memory this process ever held, loading included: of the GPU, or of the host where there is none."""
    if device != "CPU":
        import torch

        return torch.cuda.max_memory_allocated() / 1e9
    [line] = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e9
