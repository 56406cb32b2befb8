"""What draws is imported without what does not, and whoever has a worker in their program notices nothing of it."""

import gc
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENT, ROOT

from fakes import raises
from handler import Worker
from handler.core.errors import StartError
from handler.model import imports
from handler.model.imports import lean, thawed, uncollected
from handler.model.late import Late

BOOT = """
import collections, gc, json, os, sys
from pathlib import Path
from handler import Clock, Settings, Worker, dedicated
from handler.model import structure, upstream
upstream.KNOWN = {**upstream.KNOWN, **json.loads(sys.argv[1])}
file = Path(sys.argv[2]) if sys.argv[2] else None
if file:
    sys.dont_write_bytecode, structure._file = False, lambda package, version: file
opened = []  # by other threads too
sys.addaudithook(lambda event, about: opened.append(str(about[0])) if event == "open" else None)
before = gc.get_freeze_count()
"""
BOOTED = """
worker = Worker.boot(Settings(compile="off"), Clock(3600, publish=lambda ledger: None))
found = {
    "collects": gc.isenabled(),
    "frozen": gc.get_freeze_count() - before,
    "roots": collections.Counter(name.split(".")[0] for name, module in [*sys.modules.items()] if module),
    "read": len([path for path in opened if path.endswith("/models/bert/modeling_bert.py")]),
    "compiler": sorted({"torch._dynamo", "torch._inductor", "torch.distributed.tensor"} & sys.modules.keys()),
    "ledger": worker.ledger.imports,
    "policy": os.environ.get("OMP_WAIT_POLICY"),
}
"""
USED = """
from diffusers import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler, integrate
from transformers.loss.loss_for_object_detection import linear_sum_assignment
import accelerate.commands.config.sagemaker as sagemaker
import boto3, scipy.integrate, scipy.optimize, scipy.stats, torchao
import transformers.models
from transformers.utils.import_utils import define_import_structure
structure, anew = transformers.models._import_structure, collections.defaultdict(list)
for part in define_import_structure.__wrapped__(transformers.models.__path__[0]).values():
    for key, values in part.items():
        anew[key] += values
EulerDiscreteScheduler(use_beta_sigmas=True).set_timesteps(3)
found |= {
    "scheduler": len(LMSDiscreteScheduler().timesteps),
    "integral": round(integrate.quad(lambda x: x, 0, 2)[0], 6),
    "assigned": [list(map(int, each)) for each in linear_sum_assignment([[1, 0], [0, 1]])],
    "structure": {key: sorted(values) for key, values in structure.items()} == {k: sorted(anew[k]) for k in anew},
    "session": sagemaker.boto3.Session is boto3.Session,
    "real": [type(each).__name__ for each in (boto3, scipy.integrate, scipy.optimize, scipy.stats, torchao)],
}
"""


def said(*code: str, known: dict[str, list[str]] | None = None, kept: Path | str = "", **given: str) -> dict[str, Any]:
    """What a fresh process says that runs this, where these versions are known and variables given, with what is kept
    of transformers; and what its OpenMP says of itself."""
    command = [sys.executable, "-c", "\n".join([BOOT, *code, "print(json.dumps(found))"]), json.dumps(known or {})]
    environ = os.environ | {"OMP_DISPLAY_ENV": "verbose"} | given
    out = subprocess.run([*command, str(kept)], cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(out.stdout)
    return found | {"spins": [int(count) for count in re.findall(r"GOMP_SPINCOUNT = '(\d+)'", out.stderr)]}


def test_a_start_imports_what_draws_and_all_else_is_there_for_who_wants_it(tmp_path: Path) -> None:
    kept = tmp_path / "structure.json"
    found = said(BOOTED, USED, kept=kept)
    roots = found["roots"]
    assert not {"boto3", "botocore", "torchao", "websockets", "skimage", "cache_dit"} & roots.keys()
    assert roots["scipy"] < 40  # the package itself, and nothing in it; there are 490 with what diffusers wants of it
    assert found["compiler"] == [
        "torch.distributed.tensor"
    ]  # a program that has the worker may want it of transformers
    assert (found["collects"], found["frozen"]) == (True, 0)
    assert (found["read"], found["ledger"]) == (1, "")
    assert (found["structure"], found["scheduler"]) == (True, 1000)
    assert (found["integral"], found["assigned"], found["session"]) == (2, [[0, 1], [1, 0]], True)
    assert found["real"] == ["module"] * 5
    assert (found["spins"], found["policy"]) == ([0], None)  # its threads share the cores with all else

    found = said("dedicated()", BOOTED, USED, kept=kept)
    assert (found["read"], found["structure"], found["compiler"]) == (0, True, [])
    assert not {"sympy", "mpmath"} & found["roots"].keys()


@pytest.mark.parametrize("library", ["torch", "transformers", "diffusers"])
def test_a_version_that_nobody_looked_at_is_left_alone_and_that_is_told(library: str, tmp_path: Path) -> None:
    found = said(
        "dedicated()", BOOTED, known={library: ["0.1"]}, kept=tmp_path / "structure.json", OMP_WAIT_POLICY="active"
    )
    assert found["read"] == (2 if library == "transformers" else 1)
    assert {"torch._dynamo", "torch.distributed.tensor"} < {*found["compiler"]}
    assert found["ledger"] == f"{library} {version(library)} is not known"
    assert found["policy"] == "active"  # whoever says how its threads wait is obeyed
    assert min(found["spins"]) > 10**9


def test_who_asks_for_the_device_before_anything_else_has_threads_that_yield_too() -> None:
    found = said("from handler.model.hardware import detect; detect(Settings(device='cpu')); found = {}")
    assert found["spins"] == [0]


@pytest.fixture
def thawing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing frozen, as in a program that does not do so; the tests' own processes do, and count it once."""
    monkeypatch.setattr(imports, "_frozen", imports._frozen.__wrapped__)  # type: ignore[attr-defined]
    gc.unfreeze()
    yield
    gc.enable()
    gc.freeze()


@pytest.mark.usefixtures("thawing")
@pytest.mark.parametrize("collects", [True, False])
def test_whatever_happens_the_collector_is_as_before(collects: bool) -> None:
    def start() -> None:
        with thawed():
            with uncollected():
                assert not gc.isenabled()
            assert (gc.get_freeze_count() > imports.PYTHONS) is collects
            with uncollected():
                raises(ZeroDivisionError())()

    (gc.enable if collects else gc.disable)()
    with pytest.raises(ZeroDivisionError):
        start()
    assert gc.isenabled() is collects
    assert gc.get_freeze_count() < imports.PYTHONS


@pytest.mark.usefixtures("thawing")
def test_what_a_program_froze_itself_stays_frozen_and_nothing_is_added() -> None:
    gc.freeze()
    before = gc.get_freeze_count()
    with thawed(), uncollected():
        kept = [[] for _ in range(2 * imports.PYTHONS)]
    assert before - len(kept) < gc.get_freeze_count() <= before


@pytest.mark.usefixtures("thawing")
def test_a_start_that_fails_leaves_the_collector_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("handler.worker.worker.outlook", lambda *_, **__: raises(OSError("no such device"))())
    with pytest.raises(StartError, match="no such device"):
        Worker.boot(PATIENT.model_copy(update={"volume": tmp_path}))
    assert gc.isenabled()
    assert gc.get_freeze_count() < imports.PYTHONS


PACKAGE = """
ran = True
def twice(number):
    return 2 * number
from latecomer.inner import three
"""


@pytest.fixture
def latecomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An installed package that is late, with a part."""
    folder = tmp_path / "latecomer"
    folder.mkdir()
    (folder / "__init__.py").write_text(PACKAGE)
    (folder / "inner.py").write_text("three = 3")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(imports, "LATE", {"latecomer": ("twice",), "not_installed.at_all": ()})
    yield folder.name
    for name in [name for name in sys.modules if name.split(".")[0] == folder.name]:
        del sys.modules[name]


def test_what_is_late_runs_when_it_is_used_and_not_before(latecomer: str) -> None:
    with lean():
        stand_in, late = importlib.import_module(latecomer), importlib.util.find_spec(latecomer)
        function = stand_in.twice
        assert late
        assert isinstance(sys.modules[latecomer], Late)
    assert latecomer not in sys.modules
    assert function(4) == 8
    assert (stand_in.ran, sys.modules[latecomer].ran) == (True, True)
    assert type(sys.modules[latecomer]) is type(sys)
    with pytest.raises(AttributeError, match="nothing"):
        stand_in.nothing  # noqa: B018


@pytest.mark.parametrize("asked", ["ran", "__version__", "three"])
def test_what_is_late_gives_way_while_others_import_it_too(latecomer: str, asked: str) -> None:
    with lean():
        stand_in = importlib.import_module(latecomer)
        assert hasattr(stand_in, asked) is (asked != "__version__")
        assert not isinstance(sys.modules[latecomer], Late)
    assert not isinstance(sys.modules[latecomer], Late)


def test_a_part_of_what_is_late_is_a_part_of_the_real_one(latecomer: str) -> None:
    with lean():
        inner = importlib.import_module(f"{latecomer}.inner")
    assert importlib.import_module(latecomer).inner is inner


def test_what_was_there_before_stays(latecomer: str) -> None:
    real = importlib.import_module(latecomer)
    with lean():
        assert sys.modules[latecomer] is real
    assert sys.modules[latecomer] is real
