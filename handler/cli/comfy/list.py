"""List the ComfyUI files that are kept as endpoints, and whether the model that the settings name can draw them."""

import argparse
import json

from handler.cli.comfy.add import shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def run(options: argparse.Namespace) -> int:
    """Print them; the exit code."""
    found = shared().all()
    if options.json:
        print(json.dumps(found))
        return 0
    for one in found:
        print(f"{one['name']:<24} {one['version'] or '-':<14} {one['why'] or ', '.join(one['fields'])}")
    if not found:
        print("No workflow is kept: python -m handler comfy add NAME FILE keeps one.")
    return 0
