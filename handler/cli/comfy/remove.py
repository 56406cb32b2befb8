"""Forget a ComfyUI file that was kept as an endpoint, with what it was before."""

import argparse
import json

from handler.cli.comfy.add import shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its name."""
    parser.add_argument("name", metavar="NAME", help="as list shows it")


def run(options: argparse.Namespace) -> int:
    """Forget it; the exit code."""
    shared().forget(options.name)
    print(json.dumps({"removed": options.name}) if options.json else f"{options.name} is forgotten.")
    return 0
