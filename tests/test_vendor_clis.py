"""The vendors' command lines: they know what the guides say to type. What needs no account is run in test_guides.py."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from test_guides import COMMANDS

TABLE: dict[str, dict[str, list[str]]] = tomllib.loads((Path(__file__).parent / "platform/clis.toml").read_text())
VERBS = {tool: {verb: flags for verb, flags in rows.items() if verb != "source"} for tool, rows in TABLE.items()}


def calls(command: str) -> Iterator[tuple[str, list[str]]]:
    """The vendors' tools that a line of a shell calls, with their words; a container's own command is left out."""
    for part in re.split(r"&&|\||;|\$\(", command):
        tool = part.strip().partition(" ")[0]
        if tool in TABLE:
            words = shlex.split(part.rstrip(") "))[1:]
            yield tool, words[: words.index("python")] if "python" in words else words


def known(tool: str, words: list[str]) -> tuple[str, set[str]]:
    """The longest verb of the table that `words` begin with, and the options that follow; no verb, if it is unknown."""
    verbs = [verb for verb in VERBS[tool] if words[: len(verb.split())] == verb.split()]
    options = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    return max(verbs, key=len, default=""), options


USED = [(tool, *known(tool, words), command) for command in COMMANDS for tool, words in calls(command)]


@pytest.mark.parametrize(("tool", "verb", "options", "command"), USED, ids=[command for *_, command in USED])
def test_a_vendors_tool_knows_the_command(tool: str, verb: str, options: set[str], command: str) -> None:
    assert verb, f"look {tool}'s verb up, and add it to clis.toml"
    assert options <= set(VERBS[tool][verb]), "look them up, and add them to clis.toml"


def test_nothing_is_left_over() -> None:
    for tool, rows in VERBS.items():
        for verb, options in rows.items():
            used = [found for name, found_verb, found, _ in USED if (name, found_verb) == (tool, verb)]
            assert used, f"{tool} {verb}"
            assert set(options) == set().union(*used), f"{tool} {verb}"


@cache
def completions() -> dict[str, Any]:
    """gcloud's own tree of verbs and options, which its completion uses: much faster than asking for help."""
    found = shutil.which("gcloud")
    assert found
    path = Path(found).resolve().parents[1] / "data/cli/gcloud_completions.py"
    spec = importlib.util.spec_from_file_location("gcloud_completions", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tree: dict[str, Any] = module.STATIC_COMPLETION_CLI_TREE
    return tree


def asked(tool: str, verb: str) -> set[str]:
    """The options that the installed tool says it knows there."""
    if tool == "gcloud":
        tree = completions()
        flags = {*tree["flags"]}
        for word in verb.split():
            tree = tree["commands"][word]
            flags |= {*tree.get("flags", {})}
        return flags
    done = subprocess.run([tool, *verb.split(), "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    general = subprocess.run([tool, "options"], capture_output=True, text=True).stdout if tool == "kubectl" else ""
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", done.stdout + general))


ROWS = [(tool, verb) for tool, rows in VERBS.items() for verb in rows]


@pytest.mark.parametrize(("tool", "verb"), ROWS, ids=[f"{tool} {verb}" for tool, verb in ROWS])
def test_the_table_is_what_the_tool_says(tool: str, verb: str) -> None:
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed: the table has what its reference says")
    assert set(VERBS[tool][verb]) <= asked(tool, verb)
