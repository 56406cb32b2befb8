"""What loading a single file takes, by its format: the peak of host memory beside the model's bytes, and seconds.

The model is FLUX.1's pipeline with small encoders and a transformer of 0.2 billion parameters and random weights; files
have FLUX.1's own names for it. Each worker boots in a process of its own, whose peak is less what one with spark
has, which is small. Served in fp32 on a CPU; no picture is drawn.

    python benchmarks/single_file.py --save
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from report import environment, measuring

ROOT = Path(__file__).parents[1]
WIDE = {"num_attention_heads": 16, "attention_head_dim": 128, "axes_dims_rope": (32, 48, 48)}
BLOCKS = {"num_layers": 1, "num_single_layers": 1}
BOOT = """
import os, sys, time
from pathlib import Path
from handler import Clock, Settings, Worker
began = {}
def announce(phase):
    began[phase] = time.perf_counter()
    if phase == "warm":
        rows = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        seconds = began["warm"] - began["weights"]
        print(f'{{"peak": {int(rows["VmHWM"].split()[0]) << 10}, "seconds": {seconds:.2f}}}', flush=True)
        os._exit(0)
settings = Settings(volume=sys.argv[1], model=sys.argv[2], weights=sys.argv[3:], device="cpu", compile="off")
Worker.boot(settings, Clock(3600, announce=announce))
"""


def made(volume: Path) -> Iterator[tuple[str, int]]:
    """The row's own files, then a file for each format, by its name; with bytes of the transformer, as it is served."""
    sys.path.insert(0, str(ROOT / "tests/doubles"))
    import originals
    import torch
    from diffusers import FluxTransformer2DModel

    import tiny
    from handler import MODELS

    spec = MODELS["flux-schnell"]
    folder = tiny.write(spec, volume)
    config = FluxTransformer2DModel.load_config(folder / "transformer")
    model = FluxTransformer2DModel.from_config({**config, **WIDE, **BLOCKS})
    model.save_pretrained(folder / "transformer")
    tiny.write_manifest(folder, {"model": spec.id})
    weights = originals.original(model)
    del model
    held = sum(weight.numel() * weight.element_size() for weight in weights.values())
    yield "", held
    for dtype in ("float32", "bfloat16", "float8_e4m3fn"):
        cast = {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights.items()}
        yield originals.write(cast, volume / f"{dtype}.safetensors").name, held
    for kind in ("Q8_0", "Q5_0"):
        yield originals.write_gguf(weights, volume / f"{kind}.gguf", kind).name, held


def booted(volume: Path, model: str, *names: str) -> dict[str, Any]:
    """What one worker took."""
    command = [sys.executable, "-c", BOOT, str(volume), model, *names]
    env = environment(MALLOC_MMAP_THRESHOLD_="1048576")  # what is let go of is gone
    out = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if out.returncode:
        sys.exit(out.stderr)
    found: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="write results/single_file.json")
    options = parser.parse_args()
    with TemporaryDirectory() as folder, measuring("single_file", options.save) as figures:
        volume = Path(folder)
        base = booted(volume, "spark")
        figures["formats"] = {}
        for name, held in made(volume):
            found = booted(volume, "flux-schnell", *([name] if name else []))
            ratio = (found["peak"] - base["peak"]) / held
            figures["held_bytes"] = held
            figures["formats"][name or "the row's own"] = {"peak": round(ratio, 3), "seconds": found["seconds"]}
            print(f"{name or 'own':<26} {ratio:6.3f} of the model  {found['seconds']:6.2f} s", flush=True)


if __name__ == "__main__":
    main()
