"""Make spark again: `python -m spark.train`. Whatever ends it, the same command goes on where it was.

    vae, text           the autoencoder, and the text encoders, each from nothing
    refine              all of the autoencoder, on whole pictures of every size
    latents             draw and encode pictures, in parallel processes
    flow                the transformer
    validate            how well it draws validation prompts
    drawings            what the transformer draws, and the scenes that come nearest to it, in parallel processes
    polish              the decoder alone, on these
    publish             the finished pipeline -> handler/weights/spark

Each stage has a budget of wall-clock minutes, saves itself every five or with each shard, and leaves a `.done` file.
One that is done is skipped; so are the first three of the shipped weights. spark/log has the journals of the runs that
made those, and trials.md tells of them.
"""

import argparse
import multiprocessing
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from handler.volume.manifest import write_manifest
from spark import autoencoder, drawings, flow, latents, polish, text, training, validation
from spark.journal import Journal

SHIPPED = Path(__file__).parent.parent / "handler" / "weights" / "spark"
LOGS = Path(__file__).parent / "log"
# Minutes on two idle cores. Beside them some ten are spent on loading, compiling and validation.
MINUTES: dict[str, float] = {"vae": 18, "text": 8, "refine": 34, "latents": 14, "drawings": 9, "polish": 46}
BUDGETS = {"shipped": MINUTES | {"flow": 60}, "nothing": MINUTES | {"flow": 120}}  # 2.5 hours, 4.5


def main() -> None:
    """Run every stage that is not done yet."""
    parser = argparse.ArgumentParser(prog="python -m spark.train", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/spark"), help="where intermediate results live")
    parser.add_argument("--begin", choices=BUDGETS, default="shipped", help="go on from the shipped weights, or not")
    parser.add_argument("--share", type=float, default=1.0, help="of each stage's budget, for a trial or more patience")
    parser.add_argument("--producers", type=int, default=2, help="processes that draw and encode")
    parser.add_argument("--publish", action="store_true", help="replace the shipped weights with the result")
    options = parser.parse_args()
    folder: Path = options.folder
    minutes = {stage: options.share * budget for stage, budget in BUDGETS[options.begin].items()}
    if options.begin == "shipped" and not folder.exists():
        adopt(folder)
    folder.mkdir(parents=True, exist_ok=True)
    once(folder, "vae", lambda: autoencoder.train(folder, minutes["vae"]))
    once(folder, "refine", lambda: autoencoder.refine(folder, minutes["refine"]))
    once(folder, "text", lambda: text.train(folder, minutes["text"]))
    once(folder, "latents", lambda: _produce(folder, latents.produce, options.producers, minutes["latents"]))
    once(folder, "flow", lambda: training.train(folder, minutes["flow"]))
    once(folder, "validate", lambda: validation.conclude(folder))
    once(folder, "drawings", lambda: _produce(folder, drawings.produce, options.producers, minutes["drawings"]))
    once(folder, "polish", lambda: polish.polish(folder, minutes["polish"]))
    if options.publish:
        publish(folder)


def once(folder: Path, stage: str, work: Callable[[], object]) -> None:
    """Do `work` unless it has ended before, and write down how long it took."""
    done, start = folder / f"{stage}.done", time.monotonic()
    if not done.exists():
        work()
        Journal(folder / "stages.log").write(stage=stage, minutes=round((time.monotonic() - start) / 60, 2))
        done.touch()


def _produce(folder: Path, produce: Callable[[Path, int, float], None], producers: int, minutes: float) -> None:
    with multiprocessing.get_context("spawn").Pool(producers) as pool:
        pool.starmap(produce, [(folder, seed, minutes) for seed in range(1, producers + 1)])


def adopt(folder: Path) -> None:
    """Begin `folder` with the shipped weights; latents, the transformer and the decoder remain to be made."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(SHIPPED, part)
    for stage in ("vae", "text", "refine"):
        (part / f"{stage}.done").touch()
    part.rename(folder)


def publish(folder: Path) -> None:
    """Replace the shipped weights and logs with `folder`'s."""
    part = SHIPPED.with_name(f"{SHIPPED.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    flow.export(validation.finished(folder), part)
    write_manifest(part, {"model": "spark", "revision": "embedded"})
    shutil.rmtree(SHIPPED, ignore_errors=True)
    part.rename(SHIPPED)
    LOGS.mkdir(exist_ok=True)
    for log in folder.glob("*.log"):
        shutil.copy(log, LOGS)


if __name__ == "__main__":
    main()
