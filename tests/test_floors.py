"""The plan of the house, held by test: nine wings in one straight line, and where heavy libraries may be imported."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import handler

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "handler"
# A wing imports from those before it; the last two, side by side, never from each other.
WINGS = ("core", "catalog", "volume", "model", "worker", "engine", "api", "server", "cli")
# The wings, folders and files that may import these at all.
WEB = ("server",)
MODEL = ("model", "cli/doctor", "cli/optimize")
HEAVY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("starlette", "uvicorn", "h11", "httptools", "prometheus_client", "opentelemetry"), WEB),
    **dict.fromkeys(("transformers", "torchao", "cache_dit", "accelerate", "safetensors"), MODEL),
    "torch": (*MODEL, "catalog/attention"),  # which kernels there are
    "diffusers": (*MODEL, "volume/files"),  # what an autoencoder's files are called
    **dict.fromkeys(("boto3", "botocore"), ("api/store",)),
    "PIL": ("api", "model/families", "cli/optimize"),
    "numpy": ("api", "model/families", "model/sampling/noise", "cli/optimize"),
    "gguf": ("model/loading/packing",),
    "isal": ("api/codec", "volume/manifest", "volume/reader"),
    "skimage": ("cli/optimize",),
    "huggingface_hub": ("volume/hub", "volume/download", "volume/vouched"),
    "pydantic": ("core", "worker/clock", "engine/bills", "server/openapi", "cli/configured"),
}
EARLY = {*(name for name, places in HEAVY.items() if places == WEB), "pydantic", "huggingface_hub"}
# Imported late as a whole, so that they may import all of these at their top.
LATE = (
    "model/split",
    "model/tiles",
    "model/families",
    "model/adapters/sums",
    "model/sampling",
    "model/fp8_attention",
    *(f"model/text/{name}" for name in ("encoders", "prompts")),
    *(f"model/loading/{name}" for name in ("quant", "rounding", "blockwise", "weightless")),
)
# What benchmarks need besides the public names: this may only shrink.
DEEP: dict[str, set[str]] = {
    "artifacts.py": {"model/compiling/package"},
    "comfy_corpus.py": {
        *(f"api/comfy/{name}" for name in ("explaining", "foretelling", "grounds")),
        "api/dialects/comfy/opening",
        "catalog/gpus",
    },
    "comfy_files.py": {f"api/dialects/comfy/{name}" for name in ("opening", "pictured", "ui/conversion", "ui/orders")}
    | {"core/errors", "core/untrusted"},
    "cold.py": {"volume/publishing", "volume/sources"},
    "differential.py": {"volume/revisions", "volume/sources"},
    "host.py": {"api/codec", "model/families/constants"},
    "latency.py": {"model/hardware", "volume/revisions", "volume/sources"},
    "parts.py": {
        "catalog/attention",
        "model/compiling/package",
        "model/families/autoencoders",
        "model/hardware",
        "model/loading/quant",
    },
    "pictures.py": {
        "core/birth",
        "model/compiling/failures",
        "model/compiling/package",
        "model/families",
        "model/families/flux",
        "model/hardware",
        "model/loading/quant",
        "worker/kernel",
    },
    "quality.py": {"catalog/attention"},
    "random_models.py": {"volume/manifest", "volume/sources"},
    "reading.py": {"model/hardware", "model/loading/weights", "volume/manifest", "volume/reader"},
    "toolchain.py": {"model/compiling/failures", "model/compiling/package", "model/compiling/toolchain"},
    "worker.py": {
        "catalog/attention",
        "model/compiling/modulation",
        "model/compiling/package",
        "model/families/autoencoders",
        "model/loading/quant",
    },
}
FILES = sorted(PACKAGE.rglob("*.py"))


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix().removesuffix("/__init__")


def within(inner: str, places: tuple[str, ...]) -> bool:
    return any(inner == outer or inner.startswith(f"{outer}/") for outer in places)


def imports(tree: ast.AST, top_level: bool = False) -> Iterator[str]:
    """Dotted names; of what is imported from a module, with that module's."""
    for node in tree.body if top_level and isinstance(tree, ast.Module) else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported(path: str, source: str) -> set[str]:
    """The places in this package that a module imports from."""
    known = {place(each) for each in FILES}
    found = set()
    for name in imports(ast.parse(source)):
        head, *rest = name.split(".")
        if head == "handler":
            inner = "/".join(rest)
            found.add(inner if inner in known else inner.rpartition("/")[0] or "__init__")
    return found - {path}


def upwards(path: str, source: str) -> list[str]:
    """What this module may not import: of a later wing, of the other of the last two, or the package's public names."""
    wing, *_ = path.split("/")
    below = WINGS[: WINGS.index("server") if wing == "cli" else WINGS.index(wing)]
    return [other for other in sorted(imported(path, source)) if other.split("/")[0] not in (*below, wing)]


def misplaced(path: str, source: str) -> list[str]:
    """Heavy imports where they may not be, or not at the top."""
    tree = ast.parse(source)
    roots, early = ({name.split(".")[0] for name in imports(tree, top)} for top in (False, True))
    wrong = [name for name in sorted(roots & HEAVY.keys()) if not within(path, HEAVY[name])]
    return wrong + [name for name in sorted(early & HEAVY.keys() - EARLY) if not within(path, LATE)]


ROOMS = [path for path in FILES if "/" in place(path) or place(path) in WINGS]


@pytest.mark.parametrize("path", ROOMS, ids=place)
def test_a_wing_imports_only_from_those_before_it(path: Path) -> None:
    assert upwards(place(path), path.read_text()) == []
    assert "spark" not in {name.split(".")[0] for name in imports(ast.parse(path.read_text()))}, "its model's recipe"


@pytest.mark.parametrize("path", FILES, ids=place)
def test_heavy_imports_are_where_they_may_be(path: Path) -> None:
    assert misplaced(place(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        ("core/errors", "from handler.catalog.spec import ModelSpec", ["catalog/spec"]),
        ("model/runner", "def f():\n    from handler.engine import queue", ["engine/queue"]),
        ("cli/doctor", "from handler.server.app import create_app", ["server/app"]),
        ("server/app", "import handler.cli.doctor", ["cli/doctor"]),
        ("api/reply", "from handler import Worker", ["__init__"]),
        ("engine/queue", "from handler.engine import batching", []),
    ],
)
def test_an_import_that_runs_upwards_is_found(path: str, source: str, found: list[str]) -> None:
    assert upwards(path, source) == found


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        ("engine/queue", "def f():\n    import torch.nn", ["torch"]),
        ("model/runner", "import torch", ["torch"]),
        ("model/runner", "def f():\n    import torch", []),
        ("model/families/flux", "import torch", []),
        ("api/codec", "from PIL import Image", ["PIL"]),
        ("volume/hub", "def f():\n    from boto3 import client", ["boto3"]),
    ],
)
def test_a_heavy_import_out_of_place_is_found(path: str, source: str, found: list[str]) -> None:
    assert misplaced(path, source) == found


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_imports_go_round_in_circles() -> None:
    graph = {place(path): imported(place(path), path.read_text()) for path in ROOMS}
    assert circle(graph) == []
    assert circle(graph | {"core/errors": {"cli/doctor"}})


def test_every_file_is_in_a_wing() -> None:
    assert {place(path).split("/")[0] for path in ROOMS} == set(WINGS)
    assert {place(path) for path in FILES} - {place(path) for path in ROOMS} == {"__init__", "__main__"}


def test_importing_handler_imports_nothing_heavy() -> None:
    names = HEAVY.keys() - {"pydantic"}
    code = f"import sys, handler; print(sorted({set(names)} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_server_starts_without_what_only_graphs_need() -> None:
    """Most workers never see one of ComfyUI's."""
    table = "handler.api.dialects.comfy.table"
    code = f"import sys, handler.server.app; print([name for name in sys.modules if name == {table!r}])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names_are_what_is_listed() -> None:
    public = {name for name in vars(handler) if not name.startswith("_")}
    assert public - set(WINGS) == set(handler.__all__) - {"__version__"}


@pytest.mark.parametrize("folder", ["platform", "benchmarks"])
def test_scripts_use_only_public_names(folder: str) -> None:
    deep: dict[str, set[str]] = {}
    for path in (ROOT / folder).rglob("*.py"):
        if found := imported(folder, path.read_text()) - {"__init__"}:
            deep[path.name] = found
    assert deep == (DEEP if folder == "benchmarks" else {})


def test_every_file_is_on_the_map() -> None:
    """In its wing's part of docs/architecture.md, and no other file."""
    text = (ROOT / "docs/architecture.md").read_text().split("```")[1]
    for wing in WINGS:
        part = text.split(f"\n{wing}/\n")[1].split("\n\n")[0]
        told = set(re.findall(r"\w+\.py", part))
        assert told == {path.name for path in (PACKAGE / wing).rglob("*.py")} - {"__init__.py"}, wing


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    assert path.read_text().count("\n") <= 260
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 40, f"{path.name}: {node.name}"
