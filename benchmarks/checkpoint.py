"""A checkpoint of SD1.5's true size over the row, against diffusers' `from_single_file` of that file, bit by bit.

VOLUME holds the row (random_models.py writes one of random weights) and FILE, below `checkpoints/`, in the original
layout. Each side draws in a process of its own, in fp32 on a CPU; diffusers' autoencoder is channels last, as ours is,
for other layouts round otherwise. Beside that: the peak of host memory while loading, by the bytes that are served.

    python benchmarks/random_models.py sd1.5 VOLUME
    python benchmarks/checkpoint.py VOLUME FILE --save
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy

from report import environment, measuring
from single_file import booted

ROOT = Path(__file__).parents[1]
PROMPT, SEED, STEPS, SIDE, GUIDANCE = "a red circle on a blue background", 7, 3, 256, 7.5
OURS = """
from handler import Clock, ImageRequest, Settings, Worker
settings = Settings(model="sd1.5", volume=volume, weights=(file,), device="cpu", precision="fp32", compile="off")
with Worker.boot(settings, Clock(3600)) as worker:
    asked = ImageRequest(prompt=prompt, seed=seed, num_inference_steps=steps, width=side, height=side,
                         guidance_scale=guidance, scheduler="euler")
    rgb = worker.generate(worker.spec.recipe(asked))[0].rgb
"""
THEIRS = """
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
[folder] = (volume / "models" / "sd1.5").iterdir()
pipeline = StableDiffusionPipeline.from_single_file(
    str(volume / "checkpoints" / file), config=str(folder), local_files_only=True, torch_dtype=torch.float32,
    safety_checker=None, feature_extractor=None, requires_safety_checker=False)
pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
pipeline.vae.to(memory_format=torch.channels_last)
drawn = pipeline(prompt, generator=torch.Generator().manual_seed(seed), num_inference_steps=steps, width=side,
                 height=side, guidance_scale=guidance, output_type="pt").images[0]
rgb = (drawn * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
"""
GIVEN = """
import sys
from pathlib import Path
import numpy
volume, file, out = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
prompt, seed, steps, side, guidance = {!r}, {}, {}, {}, {}
"""


def drawn(code: str, volume: Path, file: str) -> numpy.ndarray:
    """The picture that `code` draws."""
    given = GIVEN.format(PROMPT, SEED, STEPS, SIDE, GUIDANCE)
    with tempfile.NamedTemporaryFile(suffix=".npy") as out:
        command = [sys.executable, "-c", f"{given}{code}\nnumpy.save(out, rgb)", str(volume), file, out.name]
        subprocess.run(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, check=True)
        return numpy.load(out.name)


def main() -> None:
    """Draw twice, compare, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volume", type=Path)
    parser.add_argument("file", help="its name below checkpoints/")
    parser.add_argument("--save", action="store_true", help="write results/checkpoint.json")
    options = parser.parse_args()
    with measuring("checkpoint", options.save) as figures:
        ours, theirs = (drawn(code, options.volume, options.file).astype(int) for code in (OURS, THEIRS))
        figures |= {"values": ours.size, "differing": int((ours != theirs).sum()), "spread": round(ours.std(), 1)}
        base = booted(options.volume, "spark")["peak"]
        for name, files in {"own": [], "file": [options.file]}.items():
            found = booted(options.volume, "sd1.5", *files)
            figures[name] = {"peak_bytes": found["peak"] - base, "seconds": found["seconds"]}
        figures["peak"] = round(figures["file"]["peak_bytes"] / served_bytes(options.volume), 3)


def served_bytes(volume: Path) -> int:
    """Of the row's weights as they are served, in fp32."""
    from safetensors import safe_open

    total = 0
    [folder] = (volume / "models" / "sd1.5").iterdir()
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(4 * numpy.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118, no dict
    return int(total)


if __name__ == "__main__":
    main()
