"""What every benchmark says at its end: one JSON line with the figures, the machine, the versions, the command."""

import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # for spark's recipe, which is not installed
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "diffusers", "transformers", "pillow", "isal", "numpy")


@contextmanager
def measuring(name: str, save: bool) -> Iterator[dict[str, Any]]:
    """Figures to fill. In the end the line is printed, and saved as `finish` does.

    Whatever ends this early, an interruption or a failure, what was found until then is printed, and no file replaced.
    """
    figures: dict[str, Any] = {}
    try:
        yield figures
    except BaseException:
        if figures:
            print(json.dumps(facts(name, {"unfinished": True, **figures})), flush=True)
        raise
    finish(name, figures, save)


def environment(*kept: str, **given: str) -> dict[str, str]:
    """This process's variables for one that is measured: of Kindling's settings only those `kept`, and `given`."""
    passed = {name: value for name, value in os.environ.items() if not name.startswith("KINDLING_") or name in kept}
    return passed | given


def finish(name: str, figures: dict[str, Any], save: bool) -> None:
    """Print the line; with `save`, also write it to results/`name`.json."""
    line = facts(name, figures)
    print(json.dumps(line))
    if save:
        write(name, line)


def facts(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """The figures, and what they were measured on and with."""
    return {
        "benchmark": name,
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        **figures,
    }


def write(name: str, line: dict[str, Any], folder: Path | None = None) -> Path:
    """Put the line into results/`name`.json, at once."""
    (folder := folder or RESULTS).mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(line, indent=1) + "\n")
    return part.replace(path)


def machine() -> dict[str, Any]:
    """Processor, cores, threads torch may use, and how busy it was."""
    info = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "load_1min": round(os.getloadavg()[0], 2),
    }
