"""Write a workflow in ComfyUI's API format, whatever file it is in: JSON in API or UI format, a PNG, WebP or JPEG.

The graph goes to standard output or to a file, what there is to say of it to standard error. With --json one object
goes to standard output instead: `graph`, `origin` and `notes`.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from handler.core.errors import InvalidValue
from handler.core.untrusted import Malformed, load, printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the action's options on `parser`."""
    parser.add_argument("file", type=Path, help="a workflow, or a picture that has one; - reads standard input")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="the file to write (default: standard output)")
    parser.add_argument(
        "--object-info",
        type=Path,
        metavar="FILE",
        help="what your ComfyUI answers at /object_info, for classes that Kindling does not know",
    )


def run(options: argparse.Namespace) -> int:
    """Convert a file; the exit code."""
    from handler.api.dialects.comfy.opening import opened  # late: its table of classes takes time

    found = opened(_data(options.file), _classes(options.object_info))
    for note in found.notes:
        print(printed(note), file=sys.stderr)
    said = {"graph": found.graph, "origin": found.origin, "notes": found.notes} if options.json else found.graph
    text = json.dumps(said, indent=None if options.json else 2) + "\n"
    if options.output:
        _write(options.output, text)
    else:
        sys.stdout.write(text)
    return 0


def _data(file: Path) -> bytes:
    from handler.api.dialects.comfy.opening import LONGEST

    try:
        if str(file) == "-":
            return sys.stdin.buffer.read(LONGEST + 1)
        with file.open("rb") as stream:
            return stream.read(LONGEST + 1)
    except OSError as error:
        raise InvalidValue(f"{file} cannot be read: {error.strerror}.", "file") from None


def _classes(file: Path | None) -> Mapping[str, Any] | None:
    if file is None:
        return None
    try:
        return load(file)
    except OSError as error:
        raise InvalidValue(f"{file} cannot be read: {error.strerror}.", "object-info") from None
    except Malformed as error:
        raise InvalidValue(f"{file} is no answer of /object_info: {error}.", "object-info") from None


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, "utf-8")
    except OSError as error:
        raise InvalidValue(f"{file} cannot be written: {error.strerror}.", "output") from None
