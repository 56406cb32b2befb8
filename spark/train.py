"""Make spark again: `python -m spark.train`. Each stage is skipped when its result is already in the folder.

    vae, text           the autoencoder, and the text encoders, each from nothing
    refine              the decoder alone
    latents             draw and encode pictures, in parallel processes
    flow                the transformer; stops and goes on from flow.pt
    publish             the finished pipeline -> handler/weights/spark

The defaults follow the run that made the shipped weights; spark/log has its journal. That run changed on the way:
noise levels were spread wider for its first 33 minutes, and the steps that start from the sampler's own states
(`Trainer._roll`) came in after 48, when pictures of one step showed the right shapes and those of four did not; they
were rolled at shift 3, and the run was stopped at minute 104. The decoder was refined twice, 6.5 and 7 minutes.
"""

import argparse
import multiprocessing
import shutil
from pathlib import Path

from spark import autoencoder, flow, text

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
    parser.add_argument("--publish", action="store_true", help="replace the shipped weights with the result")
    parser.add_argument("--adopt", action="store_true", help="go on from the shipped weights, not from nothing")
    options = parser.parse_args()
    folder: Path = options.folder
    if options.adopt and not folder.exists():
        adopt(folder)
    if not (folder / "vae").exists():
        autoencoder.train(folder, options.vae)
    if not (folder / "refined").exists():
        autoencoder.refine(folder, options.refine)
        (folder / "refined").touch()
    if not (folder / "text_encoder_2").exists():
        text.train(folder, options.text)
    if not (folder / "latents").exists():
        _produce(folder, options.producers, options.latents)
    flow.train(folder, options.flow)
    if options.publish:
        publish(folder)


def _produce(folder: Path, producers: int, minutes: float) -> None:
    with multiprocessing.get_context("spawn").Pool(producers) as pool:
        pool.starmap(flow.produce, [(folder, seed, minutes) for seed in range(1, producers + 1)])


def adopt(folder: Path) -> None:
    """Begin `folder` with the shipped weights, so that only latents and the transformer's training remain."""
    shutil.copytree(SHIPPED, folder)
    (folder / "refined").touch()


def publish(folder: Path) -> None:
    """Replace the shipped weights and logs with `folder`'s."""
    shutil.rmtree(SHIPPED, ignore_errors=True)
    shutil.copytree(folder / "pipeline", SHIPPED)
    LOGS.mkdir(exist_ok=True)
    for log in folder.glob("*.log"):
        shutil.copy(log, LOGS)


if __name__ == "__main__":
    main()
