"""The compiler of the tests: what it remembers is what would be compiled now, or it is compiled."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

COMPILER = f"""#!{sys.executable} -SE
import pathlib, sys
words = sys.argv[1:]
log = pathlib.Path(__file__).with_name("log")
log.write_text(log.read_text() + " ".join(words) + "\\n")
(source,) = [word for word in words if word.endswith(".cpp")]
text = pathlib.Path(source).read_text()
if "#error" in text:
    sys.exit(3)
header = pathlib.Path(source).with_name("a header.h")
level = " ".join(word for word in words if word.startswith("-O"))
pathlib.Path(words[words.index("-o") + 1]).write_text(text + header.read_text() + level)
if "-MF" in words:
    told = f"made.o: {{source}} \\\\\\n " + str(header).replace(" ", "\\\\ ")
    pathlib.Path(words[words.index("-MF") + 1]).write_text(told)
"""
Compile = Callable[..., tuple[int, str, int]]


@pytest.fixture
def gxx(tmp_path: Path) -> Compile:
    """Compiles `source`; the exit code, what came of it, and how often the real compiler ran so far."""
    real = tmp_path / "bin"
    real.mkdir()
    (real / "g++").write_text(COMPILER)
    (real / "g++").chmod(0o755)
    (real / "log").write_text("")
    (tmp_path / "a header.h").write_text("one")

    def run(text: str, *options: str, name: str = "source.cpp", **environ: str) -> tuple[int, str, int]:
        source, target = tmp_path / name, tmp_path / f"{name}.o"
        source.write_text(text)
        command = [str(ROOT / "tests/remembered/g++"), str(source), *options, "-o", str(target)]
        path = os.pathsep.join([str(ROOT / "tests/remembered"), str(real), os.environ["PATH"]])
        env = {"PATH": path, "REMEMBERED": str(tmp_path / "kept"), **environ}
        code = subprocess.run(command, env=env, check=False).returncode
        return code, target.read_text() if target.exists() else "", len((real / "log").read_text().splitlines())

    return run


def test_the_same_again_is_not_compiled_again(gxx: Compile) -> None:
    assert gxx("code ", "-O1", "-c") == (0, "code one-O1", 1)
    assert gxx("code ", "-O1", "-c") == (0, "code one-O1", 1)
    assert gxx("code ", "-O1", "-c", name="elsewhere.cpp") == (0, "code one-O1", 1)
    assert gxx("code \n\n// Compile cmd\n// g++ -O1\n", "-O1", "-c") == (0, "code one-O1", 1)
    assert gxx("// Triton kernels are embedded as comments in /tmp/a\n\ncode ", "-O1", "-c") == (0, "code one-O1", 1)
    assert gxx("code \n// g++\ncode", "-O1", "-c")[2] == 2


def test_all_that_decides_it_is_looked_at(gxx: Compile, tmp_path: Path) -> None:
    gxx("code ", "-O1", "-c")
    assert gxx("more ", "-O1", "-c") == (0, "more one-O1", 2)
    assert gxx("code ", "-O3", "-c") == (0, "code one-O3", 3)
    (tmp_path / "a header.h").write_text("two!")
    assert gxx("code ", "-O1", "-c") == (0, "code two!-O1", 4)
    assert gxx("code ", "-O1", "-c") == (0, "code two!-O1", 4)
    with (tmp_path / "bin/g++").open("a") as compiler:
        compiler.write("# a newer one\n")
    assert gxx("code ", "-O1", "-c")[2] == 5


def test_what_nobody_asks_for_in_a_month_goes(gxx: Compile, tmp_path: Path) -> None:
    gxx("asked for again ", "-c")
    gxx("asked for once ", "-c")
    kept = [*(tmp_path / "kept").iterdir()]
    assert len(kept) == 4
    for file in kept:
        os.utime(file, (0, 0))
    assert gxx("asked for again ", "-c") == (0, "asked for again one", 2)
    assert gxx("new ", "-c")[2] == 3
    assert len([*(tmp_path / "kept").iterdir()]) == 4
    assert gxx("asked for again ", "-c")[2] == 3
    assert gxx("asked for once ", "-c")[2] == 4


def test_a_library_of_one_source_is_remembered_too(gxx: Compile, tmp_path: Path) -> None:
    """Inductor makes half a dozen in each process that compiles, to see what the processor can."""
    words = ("-shared", "-lother", "-lm", f"-L{tmp_path}/nowhere", f"-L{tmp_path}")
    (tmp_path / "libother.so").write_text("one")
    assert gxx("code ", *words) == (0, "code one", 1)
    assert gxx("code ", *words) == (0, "code one", 1)
    (tmp_path / "libother.so").write_text("two!")
    assert gxx("code ", *words) == (0, "code one", 2)
    assert gxx("code ", *words[:-1]) == (0, "code one", 3)


def test_so_is_where_the_compiler_looks_and_what_else_it_reads(gxx: Compile, tmp_path: Path) -> None:
    other, words = tmp_path / "other.o", ("-shared", "-lother")
    assert [gxx("code ", "-c", CPATH=path)[2] for path in ("a", "a", "b")] == [1, 1, 2]
    (tmp_path / "libother.a").write_text("one")
    assert [gxx("code ", *words, LIBRARY_PATH=path)[2] for path in ("", f"/nowhere:{tmp_path}")] == [3, 4]
    other.write_text("one")
    assert [gxx("code ", *words, str(other))[2] for _ in range(2)] == [5, 6]


def test_who_has_loaded_what_was_there_keeps_it(gxx: Compile, tmp_path: Path) -> None:
    gxx("code ", "-shared")
    with (tmp_path / "source.cpp.o").open() as loaded:
        assert gxx("code ", "-shared") == (0, "code one", 1)
        assert not os.path.samestat(os.fstat(loaded.fileno()), (tmp_path / "source.cpp.o").stat())


def test_what_is_lost_or_fails_is_compiled(gxx: Compile, tmp_path: Path) -> None:
    assert gxx("#error", "-c") == (3, "", 1)
    assert gxx("#error", "-c") == (3, "", 2)
    gxx("code ", "-c")
    for made in (tmp_path / "kept").glob("*.o"):
        made.unlink()
    assert gxx("code ", "-c")[2] == 4


def test_it_is_the_compiler_itself_unless_told_to_remember(gxx: Compile) -> None:
    for count, given in enumerate([{"FORGETFUL": "1"}, {"REMEMBERED": ""}, {"FORGETFUL": "1"}], start=1):
        assert gxx("code ", "-c", **given) == (0, "code one", count)
    assert gxx("code ") == (0, "code one", 4)  # it links too
    assert gxx("code ")[2] == 5


def test_the_tests_have_it(compiler: None) -> None:
    assert shutil.which("g++") == str(ROOT / "tests/remembered/g++")
    assert Path(os.environ["REMEMBERED"]).is_absolute()
