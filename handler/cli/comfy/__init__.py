"""Read ComfyUI's files: JSON in API or UI format, or a picture that has its graph."""

import argparse
from collections.abc import Callable, Mapping
from types import ModuleType

from handler.cli.comfy import add, convert, draw, explain, remove
from handler.cli.comfy import list as kept

ACTS: Mapping[str, tuple[ModuleType, str]] = {
    "explain": (explain, "say what a graph means, what it needs and what it will take"),
    "convert": (convert, "write a workflow in API format"),
    "run": (draw, "draw it on this machine, without a server"),
    "add": (add, "keep a file as an endpoint, /workflows/NAME"),
    "list": (kept, "show the files that are kept"),
    "remove": (remove, "forget one"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """An action for each of `ACTS`, with its own."""
    acts = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    for name, (module, promise) in ACTS.items():
        act = acts.add_parser(name, help=promise, description=module.__doc__)
        module.add_arguments(act)
        act.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
        act.set_defaults(act=module.run)


def run(options: argparse.Namespace) -> int:
    """Do it."""
    act: Callable[[argparse.Namespace], int] = options.act
    return act(options)
