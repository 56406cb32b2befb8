"""What the GPU code of every model would do, and how long: lowered by a CUDA build of torch on a machine without a GPU.

    make lower                                  (sets up .gpuless: about 0.8 GB of downloads; then runs this)

For each repeated block, in each precision and for each compute capability: kernels, launches, bytes, the products with
shapes and types, attention kernels, and how often activations are rounded; the same of text encoders and VAE as they
run eagerly. From these counts and the rates in `gpuless/cards.py`, how long a picture would take on each card. Nothing
is run, and nothing here was measured on a GPU.

Rows are kept as they come: interrupted, go on with `--resume`, which makes only those that the file does not have.
`make lower-check` lowers FLUX.1 again for Hopper in bf16 and fp8, compiles and links AOTInductor's C++ half, and fails
where more is launched or moved than the file says.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import report
from gpuless import check, predict
from gpuless.cards import CARDS
from handler import PRECISIONS

HERE = Path(__file__).parent
KEPT = report.RESULTS / "lowered.json"
AMPERE, ADA = (
    ("bf16", *(row.id for row in PRECISIONS.values() if row.quantised and row.capability <= capability))
    for capability in ((8, 6), (8, 9))
)
BLACKWELL = tuple(row.id for row in PRECISIONS.values() if row.capability > (9, 0))
OTHERWISE = ("fp8/cudnn-fp8", "fp8/512", "fp8/512x4", "vae/512", "vae/512x4")  # by variants.py
MODELS = (
    "flux-schnell", "flux-dev", "flux2-klein", "z-image-turbo", "sdxl-turbo", "sd3.5-large", "qwen-image", "chroma",
    "flux2-dev",
)  # fmt: skip
JOBS = (  # model, compute capability, groups: FLUX.1 for all, the others for Hopper, and Blackwell's own precisions
    ("flux-schnell", "9.0", (*ADA, "vae", "t5", *OTHERWISE)),
    ("flux-dev", "9.0", OTHERWISE[:1]),
    *((model, "9.0", (*ADA, "vae")) for model in MODELS[1:]),
    ("flux-schnell", "10.0", (*ADA, *BLACKWELL)),
    *(("flux-schnell", *job) for job in (("8.9", ADA), ("8.6", AMPERE), ("8.0", AMPERE))),
    *((model, "10.0", BLACKWELL) for model in MODELS[1:]),
)
Row = dict[str, Any]


def main() -> None:
    """Lower, print a line for each row, then the table of times, end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL", help="default: all")
    parser.add_argument("--groups", nargs="+", metavar="GROUP", help="precisions, vae, t5 (default: all)")
    parser.add_argument("--capabilities", nargs="+", metavar="CAPABILITY", help="such as 9.0 (default: all)")
    parser.add_argument("--resume", action="store_true", help="keep what the file has, add what it lacks")
    parser.add_argument("--check", action="store_true", help="compare FLUX.1 with the file instead of writing it")
    options = parser.parse_args()
    if options.check:
        sys.exit(checked())
    rows: list[Row] = json.loads(KEPT.read_text())["rows"] if options.resume else []
    for model, capability, groups in JOBS:
        if model in options.models and capability in (options.capabilities or [capability]):
            there = {row["group"] for row in rows if (row["model"], row["capability"]) == (model, capability)}
            asked = [name for name in groups if name in (options.groups or groups) and name not in there]
            for found in worked(model, capability, asked):
                rows += found
                KEPT.write_text(json.dumps({"benchmark": "lowered", "rows": rows}, indent=1) + "\n")
    predictions = predict.all_of(rows)
    table(predictions)
    report.finish("lowered", {"rows": rows, "predictions": predictions}, save=True)


def worked(model: str, capability: str, groups: list[str]) -> Iterator[list[Row]]:
    """Let a process lower these groups; the rows of each, printed too, as they come."""
    if not groups:
        return
    command = [sys.executable, "-m", "gpuless.worker", model, *groups]
    with subprocess.Popen(command, env=environment(capability), stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            found = json.loads(line)
            print(*map(told, found), sep="\n", flush=True)
            yield found
    if process.returncode:
        sys.exit(f"Lowering {model} for {capability} failed: see above. --resume goes on where this stopped.")


def environment(capability: str) -> dict[str, str]:
    """Of a process with a GPU of this compute capability that is not there."""
    path = os.pathsep.join((str(HERE), str(HERE.parent)))
    return {**os.environ, "GPULESS_CAPABILITY": capability, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def checked() -> str | None:
    """Lower FLUX.1 again, compile and link AOTInductor's C++; what is worse than in the file, or None."""
    kept = json.loads(KEPT.read_text())["rows"]
    found = [row for rows in worked("flux-schnell", "9.0", ["bf16", "fp8", "vae"]) for row in rows]
    subprocess.run([sys.executable, HERE / "gpuless" / "toolchain.py"], env=environment("9.0"), check=True)
    return "\n".join(check.worse(kept, found)) or None


def told(row: Row) -> str:
    """A row as a line."""
    names = f"{row['model']:<14}{row['capability']:<6}{row['group']:<13}{row['plan']:<9}"
    head = f"{names}{row['count']:>3} x {row['name']:<50}"
    if "error" in row:
        return f"{head} {row['error']}"
    moved = f"{row['triton_bytes'] / 1e9:>8.3f} +{row['extern_bytes'] / 1e9:>7.3f} GB"
    casts = f"  rounded {row['casts']} for {row['activations']}" if row["casts"] else ""
    return f"{head}{row['launches']:>5} launches{moved}{casts}"


def table(predictions: list[Row]) -> None:
    """Seconds of a picture: a line for each model and precision, a column for each card."""
    print(f"\n{'predicted seconds of a picture':<32}" + "".join(f"{name:>11}" for name in CARDS))
    for model, group in dict.fromkeys((row["model"], row["group"]) for row in predictions):
        mine = {r["card"]: r["seconds"] for r in predictions if (r["model"], r["group"]) == (model, group)}
        print(f"{model:<19}{group:<13}" + "".join(f"{mine.get(name, '-'):>11}" for name in CARDS))


if __name__ == "__main__":
    main()
