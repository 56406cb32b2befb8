"""A file of ComfyUI's as the command line is given it, and the images that lie beside it."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from handler.api.comfy.foretelling import Machine
from handler.api.comfy.grounds import Ground
from handler.api.comfy.served import files_on
from handler.api.dialects.comfy.opening import Opened, opened
from handler.api.dialects.comfy.plan import Load
from handler.catalog.gpus import GPUS, Gpu, gpu_named
from handler.catalog.models import find
from handler.core.errors import InvalidValue
from handler.core.settings import Settings
from handler.core.untrusted import LONGEST, OURS, Malformed, parse, printed
from handler.model.hardware import expected

STDIN = "-"
FILE = "an API or UI workflow as JSON, or a picture that has its graph; - reads standard input"


def add_file(parser: argparse.ArgumentParser) -> None:
    """The file, and what its classes are."""
    parser.add_argument("file", help=FILE)
    parser.add_argument(
        "--object-info",
        metavar="FILE",
        help="what your ComfyUI answers at /object_info, to convert classes that Kindling does not know",
    )


def add_images(parser: argparse.ArgumentParser) -> None:
    """Images for it."""
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="the image that the graph calls NAME (default: the file of that name beside the graph)",
    )


def read(options: argparse.Namespace) -> Opened:
    """The graph in a file. InvalidValue if it cannot be read, GraphRefused if it has none: one line each."""
    return opened(_data(options.file, "file"), _classes(options.object_info))


def _data(name: str, param: str) -> bytes:
    try:
        with sys.stdin.buffer if name == STDIN else Path(name).open("rb") as file:
            data = file.read(LONGEST + 1)
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or "it is no name of a file"
        raise InvalidValue(f"{printed(name)} cannot be read: {told}.", param) from None
    if len(data) > LONGEST:
        raise InvalidValue(f"{printed(name)} has more than {LONGEST >> 20} MB, and no graph has.", param)
    return data


def _classes(name: str | None) -> Mapping[str, Any] | None:
    if name is None:
        return None
    try:
        data = _data(name, "object-info")
        found = parse(data, constant=lambda name: None, marks=OURS)  # an endless limit is Infinity there
    except Malformed as error:
        raise InvalidValue(f"{printed(name)} is no answer of /object_info: {error}.", "object-info") from None
    if not isinstance(found, dict):
        raise InvalidValue(f"{printed(name)} is no answer of /object_info.", "object-info")
    return found


def ground(options: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Ground:
    """What the graph is judged on: this machine, or the GPU that is named, with the settings of the environment."""
    settings = Settings.from_env(environ)
    return Ground(
        settings=settings,
        spec=find(settings.model),
        machine=Machine(_gpu(options.gpu) if getattr(options, "gpu", None) else expected(settings)),
        load=images(options.file, options.image),
        files=files_on(settings.volume),
        fixed=bool(environ.get("KINDLING_MODEL")),
    )


def _gpu(name: str) -> Gpu:
    if row := GPUS.get(name.upper()) or gpu_named(name):
        return row
    raise InvalidValue(f"'{name:.80}' is not in the table of GPUs. Known: {', '.join(GPUS)}.", "gpu")


def images(graph: str, given: Sequence[str]) -> Load:
    """Reads images by their names: those that are `given`, as NAME=PATH, and those in the folder of the graph.

    A name in a graph never leads out of that folder: its own folders are left out.
    """
    known = dict(_pair(one) for one in given)
    beside = None if graph == STDIN else Path(graph).parent

    def load(name: str, subfolder: str, folder: str) -> bytes:
        path = known.get(f"{subfolder}/{name}") or known.get(name) or (beside / name if beside and name else None)
        if path is None or "\0" in str(path):
            raise FileNotFoundError(name)
        return path.read_bytes()

    return load


def _pair(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not name or not path:
        raise InvalidValue(f"--image {text:.80} should be NAME=PATH.", "image")
    if not Path(path).is_file():
        raise InvalidValue(f"--image: there is no file {path}.", "image")
    return name, Path(path)
