"""The cold-start benchmark: its servers end, what it has measured it keeps, and eager is never called compiled."""

import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from conftest import ROOT

from handler.core.deadline import Deadline
from handler.server.shutdown import Server

COLD = ("EAGER: off", "EAGER: off", "COMPILED: HIT")


@pytest.fixture
def cold_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The benchmark, with a folder of its own for results, and nothing to bake."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import cold_start
    import report

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(cold_start, "bake", lambda model, volume: (volume / "baked" / model).mkdir(parents=True) or 0.0)
    monkeypatch.setattr(cold_start.pagecache, "drop", lambda volume: "not at all")
    monkeypatch.setattr("sys.argv", ["cold_start.py", "--rounds", "1", "--save"])
    return cold_start


def test_a_server_starts_draws_and_ends(cold_start: Any, tmp_path: Path) -> None:
    found = cold_start.start("spark", tmp_path, "off", "bf16")
    assert found.plan == "EAGER: KINDLING_COMPILE=off"
    assert found.seconds["total"] > found.seconds["import"] > 0
    [boot] = (tmp_path / "boots").iterdir()
    assert json.loads(boot.read_text())["outcome"] == "ready"


def test_what_its_head_tells_to_set_holds(cold_start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else: a key would have the picture refused, another volume have it found elsewhere."""
    for name, value in {"PRECISION": "bf16", "ATTENTION": "native", "API_KEYS": "mine", "VOLUME": "/nowhere"}.items():
        monkeypatch.setenv(f"KINDLING_{name}", value)
    assert cold_start.start("spark", tmp_path, "off").plan == "EAGER: KINDLING_COMPILE=off"
    [boot] = (tmp_path / "boots").iterdir()
    assert json.loads(boot.read_text())["precision"] == "bf16"


def test_no_phase_is_missing_from_the_bars(cold_start: Any) -> None:
    import chart

    phases = re.findall(r'phase\("(\w+)"\)', (ROOT / "handler/worker/worker.py").read_text())
    assert {*phases, "attention"} <= set(cold_start.PHASES)
    assert len(set(chart.COLOURS)) >= len(cold_start.PHASES)


def test_what_is_measured_survives_a_failure(
    cold_start: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import report

    def fails() -> None:
        with report.measuring("mine", save=True) as figures:
            figures["rows"] = [1]
            raise KeyboardInterrupt

    (tmp_path / "mine.json").write_text("whole")
    with pytest.raises(KeyboardInterrupt):
        fails()
    line = json.loads(capsys.readouterr().out)
    assert (line["benchmark"], line["rows"], line["unfinished"]) == ("mine", [1], True)
    assert (tmp_path / "mine.json").read_text() == "whole"
    with report.measuring("mine", save=True) as figures:
        figures["rows"] = [1, 2]
    assert json.loads((tmp_path / "mine.json").read_text())["rows"] == [1, 2]


class Unread(io.StringIO):
    """A pipe whose reader is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(text)


def test_a_server_drains_though_nobody_reads_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", Unread())
    drained = threading.Event()
    engine: Any = SimpleNamespace(drain=drained.set, busy=False, error=None, exit=Deadline.within(1e6))
    Server(uvicorn.Config(lambda: None), engine, hurry=lambda: None).handle_exit(15, None)
    assert drained.wait(30)


def starting(cold_start: Any, *plans: str | BaseException) -> Callable[..., Any]:
    """In place of `start`: plans in turn, or what is raised."""
    left = list(plans)

    def start(*_: object, **__: object) -> Any:
        plan = left.pop(0)
        if isinstance(plan, BaseException):
            raise plan
        return cold_start.Start({"compile": 1.0, "total": 2.0}, 100, plan)

    return start


def test_interrupted_it_keeps_the_starts_it_has(
    cold_start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = ("EAGER: off", "EAGER: off", "COMPILED: now", KeyboardInterrupt())
    monkeypatch.setattr(cold_start, "start", starting(cold_start, *plans))
    with pytest.raises(KeyboardInterrupt):
        cold_start.main()
    line = json.loads((tmp_path / "cold_start.json").read_text())
    assert line["rows"]["no artifacts"]["total"] == 2
    assert list(line["rows"]) == ["all imports", "eager", "no artifacts"]
    assert line["ratios"] == {"eager_over_all_imports": 1}
    assert line["cache_dropped_by"] == []


def test_a_start_called_compiled_that_is_not_is_told(
    cold_start: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = (*["EAGER: off"] * 2, "COMPILED: now", "EAGER: compiling failed", "COMPILED: HIT", *COLD)
    monkeypatch.setattr(cold_start, "start", starting(cold_start, *plans))
    assert cold_start.main() == 1
    assert capsys.readouterr().err == "'artifacts' is not compiled: EAGER: compiling failed\n"


def test_a_variant_has_what_it_may_find_and_no_word_of_failures(cold_start: Any, tmp_path: Path) -> None:
    baked = tmp_path / "baked" / "spark"
    for kind in ("code", "weights"):
        (baked / kind).mkdir(parents=True)
        (baked / kind / "manifest.json").write_text(json.dumps({"facts": {"kind": kind}}))
    (baked / "code.failed.json").write_text("{}")
    seen = {}
    for variant in cold_start.VARIANTS:
        if not variant.cold:
            with cold_start.arranged(variant, "spark", tmp_path) as folder:
                seen[variant.name] = {path.name for path in (folder / "baked" / "spark").iterdir()}
    assert seen["eager"] == seen["no artifacts"] == set()
    assert seen["artifacts"] == {"code"}


def test_all_as_it_should_be(cold_start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold_start, "start", starting(cold_start, *["EAGER: off"] * 2, *["COMPILED: now"] * 3, *COLD))
    assert cold_start.main() == 0
    line = json.loads((tmp_path / "cold_start.json").read_text())
    assert line["ratios"]["baked_over_eager"] == line["ratios"]["cold_cache_over_warm"] == 1
    assert line["cache_dropped_by"] == ["not at all"]


def test_a_start_with_all_imports_has_them(cold_start: Any, tmp_path: Path) -> None:
    """Else the row would say of the measures what is not so."""
    shown = "import atexit, sys; atexit.register(lambda: print('boto3' in sys.modules))"
    draw = ["generate", "a red circle", "--size", "64x64", "-o", str(tmp_path / "circle.png")]
    for begin, told in (
        ("from handler.__main__ import command; command()", "False"),
        (cold_start.ALL_IMPORTS[2], "True"),
    ):
        command = [sys.executable, "-c", f"{shown}; {begin}", *draw]
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert out.stdout.splitlines()[-1] == told


def test_what_is_read_next_comes_from_the_disk(cold_start: Any, tmp_path: Path) -> None:
    file, kept = tmp_path / "folder" / "file", tmp_path / "kept"
    file.parent.mkdir()
    for each in (file, kept):
        each.write_bytes(bytes(1 << 16))
    os.sync()
    assert cold_start.pagecache.cached(file)
    cold_start.pagecache.drop_files([file.parent])
    if cold_start.pagecache.cached(file):
        pytest.skip("this file system keeps its files in memory")
    assert cold_start.pagecache.cached(kept)
