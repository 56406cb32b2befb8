"""One candidate in a process of its own, under a time limit; and how much its pictures are like the baseline's."""

import contextlib
import io
import json
import logging
import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from handler.cli.optimize.pareto import SAME_DB
from handler.core.errors import StartError
from handler.core.secrets import without_secrets
from handler.core.untrusted import printed
from handler.volume.room import inside, reading

log = logging.getLogger(__name__)
ERROR = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt)\b")  # what ended Python, at the start of its last line


def attempt(command: Sequence[str], limit_s: float) -> dict[str, Any]:
    """The JSON object of the last line that `command` prints; StartError, with the reason, if it fails.

    It is told no secrets, and of what it says itself only our own words are in the reason, which receipts keep.
    Past `limit_s` it is killed with all its children, as it is when this process is interrupted.
    """
    process = subprocess.Popen(  # noqa: S603 - our own command line
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=without_secrets(os.environ),
    )  # fmt: skip
    with process:
        try:
            out, told = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise StartError(f"over the limit of {limit_s:g} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise StartError(_reason(process.returncode, told))
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def _reason(code: int, told: str) -> str:
    """Why a process failed: our own words if it had any, else how it ended, and by which error of Python's.

    What it said last is for the log alone.
    """
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    if ours := [line for line in lines if line.startswith("kindling: ")]:
        return ours[-1].removeprefix("kindling: ")
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    if lines:
        log.warning("it said last: %s", printed(lines[-1]))
    raised = ERROR.match(lines[-1]) if lines else None
    return f"{ended}: {raised[0]}" if raised else ended


def likeness(folder: Path, baseline: Path) -> tuple[float | None, float | None]:
    """PSNR over all pictures, in dB, and mean SSIM of those in `folder` against the same in `baseline`.

    A picture that one of them lacks, or left torn when it was killed, is left out; None and None if none remains.
    """
    import numpy
    from skimage.metrics import mean_squared_error, structural_similarity

    errors, alike = [], []
    for path in (path for path in inside(baseline) if path.suffix == ".png"):
        ours, theirs = _pixels(folder / path.name), _pixels(path)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            continue
        errors.append(mean_squared_error(ours, theirs))
        alike.append(structural_similarity(ours, theirs, channel_axis=2))  # type: ignore[no-untyped-call]
    if not errors:
        return None, None
    error = float(numpy.mean(errors))
    decibels = 10 * float(numpy.log10(255**2 / error)) if error else SAME_DB
    return round(min(decibels, SAME_DB), 2), round(float(numpy.mean(alike)), 4)


def _pixels(path: Path) -> Any:
    """A picture's pixels; None where there is no whole one, whatever Pillow says of it."""
    import numpy
    from PIL import Image

    with reading(path), contextlib.suppress(FileNotFoundError):
        data = path.read_bytes()
        with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as picture:
            return numpy.asarray(picture)
    return None
