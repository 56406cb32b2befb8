"""What a warm server adds to its model: Kindling against plain FastAPI + diffusers, with a model that does nothing.

Of spark's pipeline the transformer gives what it was given, and the VAE pictures that were made before; all else is
real, on both sides: HTTP, tokenizers, text encoders, the scheduler, diffusers' loop, PNG, base64, JSON. The plain side
is what one would write by hand: its pipeline in a thread, Pillow's PNG, a dict. "like FLUX.1": every part has as many
modules as FLUX.1's, which diffusers walks. In turns, over one connection each; wall time is the median, processor time
the mean of all that the process used, which others on this machine disturb less.

    python benchmarks/warm.py --save
"""

import argparse
import base64
import contextlib
import functools
import http.client
import io
import json
import runpy
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import nn

import report
from watched import worked

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "handler" / "weights" / "spark"
PROMPT = "a red circle on a blue background"
STEPS, TOKENS, NOISE = 4, 32, 6 / 255
SHAPES = ((64, 1), (64, 4), (256, 1), (512, 1), (1024, 1), (1024, 4))  # side, how many
LIKE_FLUX = ((64, 1), (64, 4), (1024, 1))
MODULES = {"vae": 241, "text_encoder": 151, "text_encoder_2": 464, "transformer": 1275}  # of FLUX.1
BLOCK = 20  # modules below one, as in a block of a transformer
SIDES = ("plain", "kindling")


def main() -> None:
    """Measure, print a line for each shape and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="requests a side and shape (default: 30)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/warm.json")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)  # what a measured process is started with
    parser.add_argument("--like-flux", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        stub(options.like_flux)
        plain() if options.serve == "plain" else kindling()
        return
    with report.measuring("warm", options.save) as figures:
        figures |= {"rounds": options.rounds, "rows": (rows := [])}
        for like_flux, shapes in ((False, SHAPES), (True, LIKE_FLUX)):
            with contextlib.ExitStack() as stack:
                servers = [stack.enter_context(Server.started(side, like_flux)) for side in SIDES]
                for side, count in shapes:
                    rows.append(row := {"like_flux": like_flux, **compared(servers, side, count, options.rounds)})
                    print(told(row), flush=True)


def told(row: dict[str, Any]) -> str:
    """One line for people."""
    which = "like FLUX.1" if row["like_flux"] else "spark"
    return (
        f"{which:<12}{row['side']:>5}  n={row['n']}: plain {row['plain_ms']:7.1f} ms ({row['plain_cpu_ms']:.1f} of a "
        f"processor), Kindling {row['kindling_ms']:6.1f} ({row['kindling_cpu_ms']:.1f}): {row['ratio']:.2f}, "
        f"{row['cpu_ratio']:.2f}"
    )


class Server:
    """One side's process, asked over one connection."""

    def __init__(self, process: "subprocess.Popen[str]", port: int) -> None:
        self.process, self._connection = process, http.client.HTTPConnection("127.0.0.1", port)

    @classmethod
    @contextlib.contextmanager
    def started(cls, side: str, like_flux: bool) -> "Iterator[Server]":
        """Ready to answer; told to leave at the end."""
        command = [sys.executable, __file__, "--serve", side, *(["--like-flux"] if like_flux else [])]
        with subprocess.Popen(
            command, cwd=ROOT, env=report.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr
            try:
                ready = next(line for line in process.stderr if "is ready on" in line)
                reading = threading.Thread(target=process.stderr.read, daemon=True)  # or its pipe would fill
                reading.start()
                yield cls(process, int(ready.split("is ready on http://127.0.0.1:")[1].split()[0]))
            finally:
                process.terminate()

    def ask(self, side: int, count: int, seed: int) -> float:
        """Seconds of one request."""
        body = {"prompt": PROMPT, "size": f"{side}x{side}", "n": count, "seed": seed, "num_inference_steps": STEPS}
        begun = time.perf_counter()
        self._connection.request(
            "POST", "/v1/images/generations", json.dumps(body), {"Content-Type": "application/json"}
        )
        answer = self._connection.getresponse()
        data = answer.read()
        seconds = time.perf_counter() - begun
        assert answer.status == 200, data[:300]
        assert len(json.loads(data)["data"]) == count
        return seconds

    @property
    def cpu_s(self) -> float:
        """Processor seconds of all its threads so far."""
        return worked(Path(f"/proc/{self.process.pid}/stat"))


def compared(servers: list[Server], side: int, count: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of both sides, in turns after some that are not counted."""
    walls: list[list[float]] = [[], []]
    cpus = [0.0, 0.0]
    for seed in range(-WARM, rounds):
        for i, server in enumerate(servers):
            before = server.cpu_s
            taken = server.ask(side, count, seed + WARM)
            if seed >= 0:
                walls[i].append(taken)
                cpus[i] += server.cpu_s - before
    found: dict[str, Any] = {"side": side, "n": count}
    for name, wall, cpu in zip(SIDES, walls, cpus, strict=True):
        found |= {
            f"{name}_ms": round(1000 * statistics.median(wall), 2),
            f"{name}_cpu_ms": round(1000 * cpu / rounds, 2),
        }
    ratios = {"ratio": "_ms", "cpu_ratio": "_cpu_ms"}
    return found | {name: round(found[f"kindling{ms}"] / found[f"plain{ms}"], 3) for name, ms in ratios.items()}


WARM = 8  # requests of a shape before the first that counts: a worker learns how many to draw at once


def stub(like_flux: bool) -> None:
    """Let the transformer and the VAE of all pipelines in this process do nothing."""

    def forward(self: Any, hidden_states: Any, **_: Any) -> Any:
        return (hidden_states,)

    def decode(self: Any, latents: Any, return_dict: bool = True, **_: Any) -> Any:
        height, width = (side * 8 for side in latents.shape[2:])
        return (picture(height, width).expand(len(latents), -1, -1, -1),)

    FluxTransformer2DModel.forward, AutoencoderKL.decode = forward, decode  # type: ignore[method-assign]
    if not like_flux:
        return
    init = FluxPipeline.__init__

    @functools.wraps(init)
    def padded(self: Any, **components: Any) -> None:
        for name, most in MODULES.items():
            pad(components[name], most)
        init(self, **components)

    FluxPipeline.__init__ = padded  # type: ignore[method-assign]


@functools.cache
def picture(height: int, width: int) -> Any:
    """float32 (1, 3, height, width) from -1 to 1: a circle, with noise, or it would deflate too well."""
    rows, columns = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    red, blue = (np.array(colour).reshape(3, 1, 1) for colour in ((0.9, 0.1, 0.1), (0.1, 0.2, 0.8)))
    circle = np.where(rows**2 + columns**2 < 0.4, red, blue)
    noisy = circle + np.random.default_rng(0).normal(0, NOISE, circle.shape)
    return torch.from_numpy(np.clip(noisy * 2 - 1, -1, 1).astype(np.float32))[None]


def pad(part: nn.Module, most: int) -> None:
    """Give `part` modules that do nothing, until it has `most`."""
    missing = most - sum(1 for _ in part.modules())
    blocks = [nn.ModuleList(nn.Identity() for _ in range(BLOCK - 1)) for _ in range(missing // BLOCK)]
    part.add_module("padding", nn.ModuleList(blocks))


def kindling() -> None:
    """Serve, as its command line does."""
    sys.argv = ["handler", "serve", "--port", "0", "--model", "spark"]
    runpy.run_module("handler", run_name="__main__")


def plain() -> None:
    """Serve, as one would by hand."""
    import uvicorn
    from fastapi import FastAPI

    app, lock = FastAPI(), threading.Lock()
    pipeline = FluxPipeline.from_pretrained(WEIGHTS, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    @app.post("/v1/images/generations")
    def draw(asked: dict[str, Any]) -> dict[str, Any]:
        side, count = int(asked["size"].partition("x")[0]), asked["n"]
        with lock:
            images = pipeline(
                asked["prompt"],
                width=side,
                height=side,
                num_images_per_prompt=count,
                num_inference_steps=asked["num_inference_steps"],
                guidance_scale=0.0,
                max_sequence_length=TOKENS,
                generator=[torch.Generator().manual_seed(asked["seed"] + i) for i in range(count)],
            ).images
        return {"data": [{"b64_json": b64(image)} for image in images]}

    def b64(image: Any) -> str:
        image.save(buffer := io.BytesIO(), "PNG")
        return base64.b64encode(buffer.getvalue()).decode()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"it is ready on http://127.0.0.1:{listener.getsockname()[1]} now", file=sys.stderr, flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listener])


if __name__ == "__main__":
    main()
