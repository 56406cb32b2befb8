"""HEIC and AVIF, decoded by a process of their own, which ends when it has taken too long or too much memory.

What their files have refers to what refers to more: two kilobytes can ask for hours, and libavif reads an index with
the interpreter locked. The process takes a tenth of a second and 20 MB, and knows nothing of this one, no secret
either. It runs this file alone, so that nothing else of ours is imported there.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

CPU_S = 10  # of all threads; 16 million pixels take one or two
BYTES = 3 << 29  # of address space; 16 million pixels in 10 bits with alpha take half
WALL_S = 60.0  # where the machine is busy, or a thread waits for ever
LOOK_S = 0.2  # between two looks whether anybody waits
THREADS = 4
NICE = 10  # who sends no such image comes first where there are few cores
KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")  # of the environment, without which Python may not start
ORIENTATION = 0x0112
EXHAUSTED = 3  # as exit status: there was no memory
ENDED = (EXHAUSTED, -signal.SIGXCPU, -signal.SIGKILL)
STOPPED = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)  # as whoever stops a whole service does


class Exhausted(Exception):
    """It would have taken too long, or too much memory."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """`pixels` row by row, none of what has too many of them or several frames. `icc` may be empty."""

    size: tuple[int, int]
    mode: str
    frames: int
    orientation: int
    icc: bytes
    pixels: bytes


def decoded(data: bytes, heic: bool, most: int, left_s: Callable[[], float]) -> Decoded:
    """An image of at most so many pixels, if that is there before no time is left; ValueError if it is none.

    OSError where no process can be started, or it was stopped from outside: that says nothing of the image.
    """
    environ = {name: os.environ[name] for name in KEPT if name in os.environ}
    environ |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "-S", "-P", __file__, "HEIF" if heic else "AVIF", *map(str, (most, CPU_S, BYTES))]
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    # Ctrl+C lets a server end what it has begun. In a session of its own it would be nice to itself alone (sched(7)).
    options |= {"env": environ, "process_group": 0}
    with subprocess.Popen(command, **options) as process:  # noqa: S603 - ours
        over = threading.Event()
        threading.Thread(target=_end, args=(process, over, left_s), name="images", daemon=True).start()
        try:
            found, _ = process.communicate(data)
        finally:
            over.set()
            process.kill()
    if process.returncode in ENDED:
        raise Exhausted
    if process.returncode in STOPPED:
        raise InterruptedError
    if process.returncode:
        raise ValueError("it cannot be decoded")
    head, _, rest = found.partition(b"\n")
    width, height, mode, frames, orientation, profile = json.loads(head)
    return Decoded((width, height), mode, frames, orientation, rest[:profile], rest[profile:])


def _end(process: subprocess.Popen[bytes], over: threading.Event, left_s: Callable[[], float]) -> None:
    """Kill it once nobody waits any more."""
    end = time.monotonic() + WALL_S
    while not over.wait(LOOK_S):
        if not left_s() or time.monotonic() > end:
            process.kill()


def _main(form: str, most: int, cpu_s: int, bytes_: int) -> None:
    """In the process: a line of JSON, the profile, the pixels."""
    with suppress(ValueError):  # macOS knows no bound of address space
        resource.setrlimit(resource.RLIMIT_AS, (bytes_, bytes_))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    os.nice(max(0, NICE - os.nice(0)))  # on Linux the thread that began this is as nice already
    from PIL import AvifImagePlugin, Image

    AvifImagePlugin.DEFAULT_MAX_THREADS, Image.MAX_IMAGE_PIXELS = THREADS, None  # `most` is known here
    if form == "HEIF":
        import pi_heif  # libheif without its encoders

        pi_heif.register_heif_opener(thumbnails=False)
    with Image.open(sys.stdin.buffer, formats=(form,)) as image:
        frames, profile = getattr(image, "n_frames", 1), image.info.get("icc_profile") or b""
        whole = frames == 1 and image.width * image.height <= most
        pixels = image.tobytes() if whole else b""
        turned = image.getexif().get(ORIENTATION, 1)
        head = [*image.size, image.mode, frames, turned if isinstance(turned, int) else 1, len(profile)]
    sys.stdout.buffer.write(b"".join([json.dumps(head).encode(), b"\n", profile, pixels]))


if __name__ == "__main__":
    try:
        _main(sys.argv[1], *map(int, sys.argv[2:]))
    except MemoryError:
        sys.exit(EXHAUSTED)
