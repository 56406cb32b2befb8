"""Keep a ComfyUI file as an endpoint: the workers that see this volume, or this object store, serve it at once.

FILE is JSON in API or UI format, or a picture that has its graph. What is drawable is told for the model that the
settings name.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from handler.api.workflows.service import ROUTE, Workflows
from handler.catalog.models import find
from handler.core.errors import InvalidValue, VolumeFailed
from handler.core.settings import Settings
from handler.core.untrusted import printed_lines

ADDRESS = "http://127.0.0.1:8000"
NOWHERE = "Workflows are kept on the volume or in the object store. {volume} cannot be written, and no store is set."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its own."""
    parser.add_argument("name", metavar="NAME", help="small letters, digits, - and _: the endpoint is /workflows/NAME")
    parser.add_argument("file", metavar="FILE", help="JSON or a picture; - reads the standard input")


def run(options: argparse.Namespace) -> int:
    """Keep and report; the exit code."""
    workflows = shared()
    try:
        data = sys.stdin.buffer.read() if options.file == "-" else Path(options.file).read_bytes()
        told, fresh = workflows.keep(options.name, data)
    except OSError as error:
        raise InvalidValue(f"{error.filename or options.file}: {error.strerror}.", "file") from None
    if options.json:
        print(json.dumps(told))
        return 0
    print(f"{told['name']} is {'kept' if fresh else 'kept anew'}, at version {told['version']}.")
    for line in report(told):
        print(printed_lines(line))
    return 0


def shared() -> Workflows:
    """The workflows of the volume, or of the object store; VolumeFailed if nothing but this process would see them."""
    settings = Settings.from_env()
    found = Workflows(settings, find(settings.model))
    if not found.archive.shelf.shared:
        raise VolumeFailed(NOWHERE.format(volume=settings.volume))
    return found


def report(told: dict[str, Any]) -> list[str]:
    """A workflow for people: its fields, what keeps it from being drawn, and how to call it."""
    fields = [f"  {name:<24} {_said(schema, name in told['required'])}" for name, schema in told["fields"].items()]
    asked = {name: _example(schema) for name, schema in told["fields"].items() if name in ("prompt", *told["required"])}
    url, head = f"{ADDRESS}{ROUTE}/{told['name']}", "-H 'Content-Type: application/json'"
    curl = f"curl -s {url} {head} -d {shlex.quote(json.dumps(asked))}"
    why = [f"This model cannot draw it: {told['why']}"] if told["why"] else []
    return ["fields:", *fields, *told["notes"], *why, "call it:", f"  {curl}"]


def _said(schema: dict[str, Any], required: bool) -> str:
    kind = "image" if schema.get("format") == "picture" else schema["type"]
    limits = f", {schema['minimum']} to {schema['maximum']}" if {"minimum", "maximum"} <= schema.keys() else ""
    words = f", one of {', '.join(schema['enum'])}" if "enum" in schema else ""
    default = f", else {json.dumps(schema['default'])[:60]}" if "default" in schema else ""
    return f"{kind}{limits}{words}{default}{', required' if required else ''}"


def _example(schema: dict[str, Any]) -> Any:
    return "BASE64" if schema.get("format") == "picture" else schema.get("default") or "a red circle"
