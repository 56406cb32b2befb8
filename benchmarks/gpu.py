"""All that is to be measured on a GPU, in one command for a machine that is lent for some minutes and bare.

Weights are random and made on the device: nothing is fetched, written or hashed. Items come in order of worth; what is
found is in the JSON file after each case, so an interrupted run, or one out of seconds, keeps what it has. Beside what
was measured stands what arithmetic had predicted, where it had. Exit code 1: something failed, or a worker that was to
compile serves eagerly.

Here, in the repository's root, right before: `make gpu-wheels`, which notes the commit too. There, each call carries
.whl and begins with these lines (the wheels of CUDA's headers bring a library that torch has already):

    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl
    && rm -rf /tmp/site/nvidia/cu13/lib && export PYTHONPATH=/tmp/site:$PWD PYTHONUNBUFFERED=1 || exit;

Two calls of about 290 s, then one of 200 s with what is left:

    timeout -s INT 270 python3 benchmarks/gpu.py --items 1-4 --seconds 260 --save
    timeout -s INT 295 python3 benchmarks/gpu.py --items 5-7 --seconds 285 --save
    timeout -s INT 190 python3 benchmarks/gpu.py --cold-start --seconds 180 --save

Each leaves its JSON in $OUT. Put it into benchmarks/results before the next call: --save adds to what is there, if
card and commit are the same. Items 8 and 9 are for a call with seconds to spare. Where item 1 says that there is no
compiler: export CUDA_HOME=/tmp/site/nvidia/cu13, and as LIBRARY_PATH a folder with a link libcuda.so to the driver's
libcuda.so.1.
"""

import argparse
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

from gpurun import cold, ground, parts, pictures
from gpurun.log import Log, Record
from gpurun.scale import FULL, TINY, Part, Run


@dataclass(frozen=True, slots=True)
class Item:
    """Some measurements that belong together; `seconds` is what they are expected to take.

    Each part gives cases one by one. `vital`: where it fails, nothing after it is worth the time.
    """

    number: int
    name: str
    seconds: float
    parts: tuple[Part, ...]
    vital: bool = False


ITEMS = (
    Item(1, "the machine, and spark compiled", 40, (ground.machine,), vital=True),
    Item(2, "products and attention", 25, (parts.ceilings, parts.products, parts.attentions)),
    Item(3, "text encoders and VAE", 45, (parts.encoders, parts.decoder)),
    Item(4, "one block of each kind", 120, tuple(map(parts.blocks, FULL.ways))),
    Item(5, "pictures, eager", 40, (pictures.eager,)),
    Item(6, "pictures, compiled in bf16", 100, (pictures.compiled,)),
    Item(7, "pictures, compiled in fp8", 130, (pictures.quantised,)),
    Item(8, "tests", 60, (ground.tests,)),
    Item(9, "dev's steps and text, compiled in fp8", 100, (pictures.dev,)),
)
COLD = (
    Item(1, "baking in memory", 110, (cold.bake,), vital=True),
    Item(2, "cold starts", 60, (cold.starts,)),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure item by item, print a table, end with one JSON line; the exit code."""
    options = parsed(arguments)
    items = COLD if options.cold_start else [item for item in ITEMS if item.number in options.items]
    run = Run(TINY if options.tiny else FULL, options.seconds)
    log = Log("gpu_cold" if options.cold_start else "gpu", options.save)
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _interrupt)
    try:
        for item in items:
            if not measure(item, run, log) and item.vital:
                break
    except KeyboardInterrupt:
        log.code = 130
    finally:
        log.finish()
    return log.code


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=numbers, default=[item.number for item in ITEMS], help="such as 1-4,8")
    parser.add_argument("--cold-start", action="store_true", help="bake fp8 weights in memory and start from them")
    parser.add_argument("--seconds", type=float, default=3600, help="start nothing that would not end by then")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand weights, to try the run itself")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results, and the folder OUT names")
    options = parser.parse_args(arguments)
    if unknown := {*options.items} - {item.number for item in ITEMS}:
        parser.error(f"there is no item {min(unknown)}: they are 1 to {ITEMS[-1].number}")
    if not options.seconds > 0:
        parser.error("--seconds should be more than 0")
    return options


def numbers(text: str) -> list[int]:
    """'1-4,8' -> [1, 2, 3, 4, 8]"""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise argparse.ArgumentTypeError(f"should be numbers of items, such as 1-4,8, not {text}")
    ends = [[int(number) for number in part.split("-")] for part in text.split(",")]
    return [number for end in ends for number in range(end[0], end[-1] + 1)]


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def measure(item: Item, run: Run, log: Log) -> bool:
    """Measure one item, if its seconds are left; whether nothing in it failed."""
    record = log.open(f"{item.number} {item.name}")
    if run.left < item.seconds:
        log.close(record, f"not started: takes about {item.seconds:.0f} s, {max(0, run.left):.0f} are left")
        return True
    outcome = "interrupted"
    try:
        well = [_part(part, run, record, log) for part in item.parts]
        outcome = "done" if all(well) else "failed"
    finally:
        log.close(record, outcome)
    return outcome == "done"


def _part(part: Part, run: Run, record: Record, log: Log) -> bool:
    """Measure cases until there are no more, or no seconds; one that fails leaves its traceback. Whether none did."""
    well = True
    try:
        for name, case in part(run):
            try:
                log.note(record, name, case())
            except Exception:
                well = False
                log.note(record, name, {"error": traceback.format_exc()})
            if run.left <= 0:
                log.note(record, f"after {name}", {"skipped": "no seconds were left"})
                break
    except Exception:
        log.note(record, "what comes next", {"error": traceback.format_exc()})
        return False
    return well


if __name__ == "__main__":
    sys.exit(main())
