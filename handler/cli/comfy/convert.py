"""Write a workflow in ComfyUI's API format, whatever file it is in: JSON in API or UI format, a PNG, WebP or JPEG.

The graph goes to standard output or to a file, what there is to say of it to standard error. With --json one object
goes to standard output instead: `graph`, `origin` and `notes`.
"""

import argparse
import json
import sys
from pathlib import Path

from handler.cli.comfy import looking
from handler.core.errors import InvalidValue
from handler.core.untrusted import printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the action's options on `parser`."""
    looking.add_file(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="the file to write (default: standard output)")


def run(options: argparse.Namespace) -> int:
    """Convert a file; the exit code."""
    found = looking.read(options)
    for note in found.notes:
        print(printed(note), file=sys.stderr)
    said = {"graph": found.graph, "origin": found.origin, "notes": found.notes} if options.json else found.graph
    text = json.dumps(said, indent=None if options.json else 2) + "\n"
    if options.output:
        _write(options.output, text)
    else:
        sys.stdout.write(text)
    return 0


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, "utf-8")
    except OSError as error:
        raise InvalidValue(f"{file} cannot be written: {error.strerror}.", "output") from None
