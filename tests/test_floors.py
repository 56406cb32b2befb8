"""The plan of the house, held by test: a file imports only from lower floors, heavy imports only where allowed."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import handler

ROOT = Path(__file__).parent.parent
FLOOR = {
    "birth": 0,
    "discreet": 0,
    "errors": 0,
    "imports": 0,
    "licenses": 0,
    "stepcache": 0,
    "untrusted": 0,
    "upstream": 0,
    "deadline": 1,
    "hands": 0,
    "pieces": 0,
    "request": 1,
    "clock": 1,
    "watch": 1,
    "room": 1,
    "settings": 1,
    "configured": 2,
    "precisions": 1,
    "kernels": 1,
    "toolchain": 1,
    "blockwise": 1,
    "processor": 1,
    "fp8_attention": 2,
    "hardware": 2,
    "spec": 2,
    "catalog": 3,
    "dialects": 3,
    "volume": 3,
    "boots": 3,
    "reader": 3,
    "vae": 3,
    "lora": 3,
    "quant": 3,
    "rounding": 3,
    "modules": 3,
    "weights": 3,
    "joining": 1,
    "fusing": 2,
    "modulation": 1,
    "blocks": 3,
    "failures": 3,
    "publishing": 3,
    "layout": 3,
    "listing": 3,
    "footprint": 3,
    "filling": 3,
    "compiled": 3,
    "codec": 3,
    "references": 3,
    "preview": 3,
    "batching": 3,
    "stages": 3,
    "store": 3,
    "prices": 3,
    "receipts": 3,
    "spend": 4,
    "decision": 4,
    "chips": 5,
    "offload": 3,
    "families": 3,
    "faults": 3,
    "drawing": 4,
    "environment": 4,
    "attention": 4,
    "line": 4,
    "fit": 3,
    "worker": 5,
    "painter": 5,
    "lane": 6,
    "reply": 5,
    "api": 7,
    "server": 8,
    "models": 7,
    "hub": 6,
    "needed": 7,
    "again": 7,
    "generate": 8,
    "fetch": 8,
    "bake": 8,
    "publisher": 1,
    "findings": 7,
    "doctor": 8,
    "optimize": 8,
    "__init__": 9,
    "__main__": 11,
}
HEAVY = {"torch", "diffusers", "transformers", "PIL", "numpy", "isal", "cache_dit", "skimage", "boto3", "botocore"}
# Imported late as a whole; the others import these late, inside functions.
MAY_BE_HEAVY = {"families", "quant", "rounding", "blockwise", "fp8_attention"}
# What benchmarks of a GPU's code need besides the public names.
DEEP: dict[str, set[str]] = {
    "host.py": {"codec", "families"},
    "quality.py": {"kernels"},
    "cold.py": {"publishing", "volume"},  # of gpurun/, as the next
    "parts.py": {"blocks", "families", "kernels", "quant"},
    "pictures.py": {"attention", "blocks", "failures", "families", "quant"},
    "toolchain.py": {"blocks", "failures", "toolchain"},  # of gpuless/, as the next
    "worker.py": {"blocks", "families", "kernels", "modulation", "quant"},
}
FILES = sorted((ROOT / "handler").rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT / "handler").with_suffix("").parts[0]


def imports(tree: ast.AST, top_level: bool = False) -> set[str]:
    nodes = tree.body if top_level and isinstance(tree, ast.Module) else ast.walk(tree)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_lower_floors(path: Path) -> None:
    mine = FLOOR[room(path)]
    for name in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "handler" and len(parts) > 1 and parts[1] in FLOOR and parts[1] != room(path):
            assert FLOOR[parts[1]] < mine or mine == 3 == FLOOR[parts[1]], f"{path.name} imports {name}"
        assert parts[0] != "spark", "the product never imports the recipe of its embedded model"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_imports_are_late(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(ast.parse(path.read_text()), top_level=True)}
    assert room(path) in MAY_BE_HEAVY or not roots & HEAVY


def test_every_file_has_a_floor() -> None:
    assert {room(path) for path in FILES} == set(FLOOR)


def test_importing_handler_imports_nothing_heavy() -> None:
    names = HEAVY | {"starlette", "uvicorn", "prometheus_client"}
    code = f"import sys, handler; print(sorted({names} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names_are_what_is_listed() -> None:
    public = {name for name in vars(handler) if not name.startswith("_")}
    modules = {name for name in public if type(getattr(handler, name)).__name__ == "module"}
    assert public - modules == set(handler.__all__)


@pytest.mark.parametrize("folder", ["platform", "benchmarks"])
def test_scripts_use_only_public_names(folder: str) -> None:
    deep: dict[str, set[str]] = {}
    for path in (ROOT / folder).rglob("*.py"):
        for name in imports(ast.parse(path.read_text())):
            parts = name.split(".")
            if parts[0] == "handler" and len(parts) > 1 and parts[1] not in handler.__all__:
                deep.setdefault(path.name, set()).add(parts[1])
    assert deep == (DEEP if folder == "benchmarks" else {})


def test_the_map_has_each_room_below_those_it_imports_from() -> None:
    """README's Map, read from above."""
    lines = (ROOT / "README.md").read_text().split("\nhandler/ ")[1].split("\n.runpod/")[0].splitlines()[1:]
    heads = [head[0] for line in lines if (head := re.match(r"  (?:[\w/]+(?:\.py|/)(?:, )?)+", line))]
    told = [name.strip(" /").removesuffix(".py") for head in heads for name in head.split(",")]
    places = {name: place for place, name in enumerate(told) if name in FLOOR}
    assert places.keys() == FLOOR.keys() - {"__init__"}
    for path in FILES:
        names = {name.split(".")[1] for name in imports(ast.parse(path.read_text())) if name.startswith("handler.")}
        for name in names & places.keys() - {room(path)}:
            assert room(path) == "__init__" or places[name] < places[room(path)], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    assert path.read_text().count("\n") <= 260
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 40, f"{path.name}: {node.name}"
