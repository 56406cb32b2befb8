"""Make spark again: `python -m spark.train`. A stage that has ended before, which its `.done` file says, is skipped.

    vae, text           the autoencoder, and the text encoders, each from nothing
    refine              the decoder alone
    latents             draw and encode pictures, in parallel processes
    flow                the transformer; stops and goes on from flow.pt
    polish              the decoder alone, on what the transformer draws
    publish             the finished pipeline -> handler/weights/spark

The defaults follow the run that made the shipped weights; spark/log has its journal. That run was made in two parts
and changed on the way. The first, 104 minutes of `flow`, had noise levels spread wider for 33 minutes, rolled the
sampler's own states at shift 3 from minute 48 on, and drew other sizes in a quarter of its steps; two refinements of
the decoder, 6.5 and 7 minutes, followed. The second went on from those weights (`--adopt`) with new latents, 95 minutes
of `flow` under `FINISH` throughout, and 14 minutes of `polish`.
"""

import argparse
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path

from handler.volume.manifest import write_manifest
from spark import autoencoder, flow, polish, text

SHIPPED = Path(__file__).parent.parent / "handler" / "weights" / "spark"
LOGS = Path(__file__).parent / "log"


def main() -> None:
    """Run every stage that is not done yet."""
    parser = argparse.ArgumentParser(prog="python -m spark.train", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/spark"), help="where intermediate results live")
    parser.add_argument("--vae", type=float, default=14, metavar="MIN", help="minutes for the autoencoder")
    parser.add_argument("--text", type=float, default=7, metavar="MIN", help="minutes for the text encoders")
    parser.add_argument("--refine", type=float, default=6.5, metavar="MIN", help="minutes for the decoder alone")
    parser.add_argument("--latents", type=float, default=17, metavar="MIN", help="minutes of drawing and encoding")
    parser.add_argument("--producers", type=int, default=1, help="processes that draw and encode")
    parser.add_argument("--flow", type=float, default=110, metavar="MIN", help="minutes for the transformer, in all")
    parser.add_argument("--polish", type=float, default=15, metavar="MIN", help="minutes for the decoder at the end")
    parser.add_argument("--publish", action="store_true", help="replace the shipped weights with the result")
    parser.add_argument("--adopt", action="store_true", help="go on from the shipped weights, not from nothing")
    options = parser.parse_args()
    folder: Path = options.folder
    if options.adopt and not folder.exists():
        adopt(folder)
    once(folder, "vae", lambda: autoencoder.train(folder, options.vae))
    once(folder, "refine", lambda: autoencoder.refine(folder, options.refine))
    once(folder, "text", lambda: text.train(folder, options.text))
    once(folder, "latents", lambda: _produce(folder, options.producers, options.latents))
    flow.train(folder, options.flow)
    once(folder, "polish", lambda: polish.polish(folder, options.polish))
    if options.publish:
        publish(folder)


def once(folder: Path, stage: str, work: Callable[[], object]) -> None:
    """Do `work` unless it has ended before; one that was interrupted, whatever it left, begins again."""
    done = folder / f"{stage}.done"
    if not done.exists():
        work()
        done.touch()


def _produce(folder: Path, producers: int, minutes: float) -> None:
    with multiprocessing.get_context("spawn").Pool(producers) as pool:
        pool.starmap(flow.produce, [(folder, seed, minutes) for seed in range(1, producers + 1)])


def adopt(folder: Path) -> None:
    """Begin `folder` with the shipped weights, so that only latents and the transformer's training remain."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(SHIPPED, part)
    for stage in ("vae", "refine", "text"):
        (part / f"{stage}.done").touch()
    part.rename(folder)


def publish(folder: Path) -> None:
    """Replace the shipped weights and logs with `folder`'s."""
    part = SHIPPED.with_name(f"{SHIPPED.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    flow.export(flow.finished(folder), part)
    write_manifest(part, {"model": "spark", "revision": "embedded"})
    shutil.rmtree(SHIPPED, ignore_errors=True)
    part.rename(SHIPPED)
    LOGS.mkdir(exist_ok=True)
    for log in folder.glob("*.log"):
        shutil.copy(log, LOGS)


if __name__ == "__main__":
    main()
