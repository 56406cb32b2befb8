"""The runner that breaks code to see whether tests notice, on a tiny project; and its tables, which follow the code."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

TINY = {
    "pytest.toml": '[pytest]\naddopts = ["-p", "no:schemathesis"]\n',
    "house.py": "DOORS = 3\nSPARE = 7\n\n\ndef larger(a, b):\n    return a > b\n\n\ndef end(event):\n    event.set()\n",
    "test_house.py": (
        "import threading\n\nimport house\n\n\n"
        "def test_larger():\n    assert house.larger(2, 1)\n    assert not house.larger(1, 1)\n\n\n"
        "def test_end():\n    event = threading.Event()\n    house.end(event)\n    event.wait()\n"
    ),
    "benchmarks/mutation/modules.toml": 'heavy = []\nslack_s = 1\n[tests]\n"house.py" = ["test_house.py"]\n',
    "benchmarks/mutation/equivalent.toml": (
        '[[equivalent]]\npath = "house.py"\nbefore = "SPARE = 7"\nafter = "SPARE = 8"\nreason = "nobody reads it"\n'
    ),
    "benchmarks/changes/some.toml": (
        '[[change]]\nwhat = "equal is larger"\npath = "house.py"\nbefore = "a > b"\nafter = "a >= b"\n'
        'tests = ["test_house.py::test_larger"]\n'
        '[[change]]\nwhat = "one less to spare"\npath = "house.py"\nbefore = "SPARE = 7"\nafter = "SPARE = 6"\n'
        'tests = ["test_house.py::test_larger", "test_house.py::test_end"]\n'
        '[[change]]\nwhat = "a roof that leaks"\npath = "house.py"\ngone = "it has no roof"\n'
    ),
}
ENTRIES = [
    pytest.param(each, id=f"{file.stem}-{i}")
    for file in sorted((ROOT / "benchmarks" / "changes").glob("*.toml"))
    for i, each in enumerate(tomllib.loads(file.read_text())["change"])
]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A project of one module."""
    for name, text in TINY.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    return tmp_path


def mutate(checkout: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks" / "mutate.py", "--checkout", checkout, *options]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=300)


def test_what_is_noticed_and_what_is_not(tiny: Path) -> None:
    ran = mutate(tiny, "--n", "99")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"noticed .* return a > b  ->  return \(a >= b\)  test_house.py::test_larger", ran.stdout)
    assert re.search(r"hung .* event\.set\(\)  ->  pass", ran.stdout)
    assert re.search(r"SURVIVED .* DOORS = 3  ->  DOORS = 4", ran.stdout)
    assert re.search(r"equivalent .* SPARE = 7  ->  SPARE = 8", ran.stdout)
    [row] = json.loads(ran.stdout.splitlines()[-1])["modules"]
    assert [row[name] for name in ("tried", "noticed", "hung", "equivalent", "noticed_percent")] == [5, 3, 1, 1, 75.0]
    assert [(each["line"], each["reason"]) for each in row["survivors"]] == [(1, ""), (2, "nobody reads it")]
    assert (tiny / "house.py").read_text() == TINY["house.py"]


def test_a_row_is_saved_beside_those_of_other_modules_and_seeds(tiny: Path) -> None:
    results, before = tiny / "benchmarks" / "results" / "mutation.json", {"tried": 4, "noticed": 2, "equivalent": 0}
    samples = (("gone.py", 3), ("house.py", 7), ("house.py", 3), ("roof.py", 3))
    rows = [before | {"module": name, "seed": seed} for name, seed in samples]
    results.parent.mkdir()
    results.write_text(json.dumps({"modules": rows}))
    with (tiny / "benchmarks" / "mutation" / "modules.toml").open("a") as table:
        table.write('"roof.py" = ["test_house.py"]\n')
    ran = mutate(tiny, "house.py", "--n", "1", "--seed", "3", "--save")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    first, *others = (line := json.loads(results.read_text()))["modules"]
    assert (first["module"], first["seed"], first["n"], first["noticed_percent"]) == ("house.py", 3, 1, 100.0)
    assert (others, line["noticed_percent"]) == ([rows[1], rows[3]], 55.6)


def test_tests_run_in_the_order_in_which_they_are_named(tiny: Path) -> None:
    (tiny / "conftest.py").write_text("def pytest_collection_modifyitems(items):\n    items.reverse()\n")
    (tiny / "house.py").write_text("DOORS = 3\n")
    one = "def test_{}():\n    assert house.DOORS == 3\n\n\n"
    (tiny / "test_house.py").write_text(f"import house\n\n\n{one.format('first')}{one.format('second')}")
    assert re.search(r"noticed .* DOORS = 4  test_house.py::test_first", mutate(tiny).stdout)


def test_listed_changes_must_fail_each_test_that_they_name(tiny: Path) -> None:
    ran = mutate(tiny, "--changes")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    noticed, unnoticed, told = ran.stdout.splitlines()
    assert re.fullmatch(r"noticed .* equal is larger  ", noticed)
    assert re.fullmatch(
        r"UNNOTICED .* one less to spare  test_house.py::test_larger test_house.py::test_end", unnoticed
    )
    assert told == "3 changes: 1 noticed, 1 not; 1 have no place any more"


def test_a_module_of_which_no_change_is_listed_runs_no_test(tiny: Path) -> None:
    (tiny / "test_house.py").write_text("def test_larger():\n    assert False\n")
    ran = mutate(tiny, "--changes", "other.py")
    told = "0 changes: 0 noticed, 0 not; 0 have no place any more\n"
    assert (ran.returncode, ran.stdout) == (0, told), ran.stderr


def test_tests_that_fail_anyway_prove_nothing(tiny: Path) -> None:
    (tiny / "test_house.py").write_text("def test_larger():\n    assert False\n")
    ran = mutate(tiny, "--n", "1")
    assert "unchanged, they end with 1" in ran.stdout
    assert (ran.returncode, json.loads(ran.stdout.splitlines()[-1])["unfinished"]) == (1, True), ran.stdout + ran.stderr


def test_the_same_seed_is_the_same_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from mutation.changes import pick

    source = (ROOT / "handler/engine/queue.py").read_bytes()
    first, again, other = (pick("handler/engine/queue.py", source, 20, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 20 > len({change.kind for change in first}) > 12
    for change in first:
        compile(change.made(source), "queue.py", "exec")


@pytest.mark.parametrize("change", ENTRIES)
def test_listed_changes_have_their_place(change: dict[str, Any]) -> None:
    assert change["what"]
    if "gone" in change:
        assert change["gone"]
        return
    before, after = change["before"], change["after"]
    text = (ROOT / change["path"]).read_text()
    assert text.count(before) == 1
    assert before != after
    compile(text.replace(before, after), change["path"], "exec")
    assert change["tests"]
    for test in change["tests"]:
        path, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text()


def test_tables_name_what_there_is() -> None:
    folder = ROOT / "benchmarks" / "mutation"
    for module, tests in tomllib.loads((folder / "modules.toml").read_text())["tests"].items():
        named = [test.removeprefix("--deselect=") for test in tests if test != "--quick"]
        assert all((ROOT / path.partition("::")[0]).is_file() for path in (module, *named)), module
    for each in tomllib.loads((folder / "equivalent.toml").read_text())["equivalent"]:
        assert each["reason"]
        assert each["before"] in " ".join((ROOT / each["path"]).read_text().split()), each["before"]
