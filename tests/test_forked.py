"""A forked process is what a new interpreter would be, but for what it has imported."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import conftest
import pytest

import forked

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives a grandchild to another parent")
SEEN = """
import json, os, sys
from handler.core.birth import process_age
print("on stderr", file=sys.stderr)
print(json.dumps({
    "argv": sys.argv, "folder": os.getcwd(), "environ": dict(os.environ), "name": __name__, "path": sys.path[0],
    "files": len(os.listdir("/proc/self/fd")), "young": process_age() < 60, "stdin": sys.stdin.read(),
    "main": sys.modules["__main__"].__dict__ is globals(), "encoding": sys.stdout.encoding, "errors": sys.stderr.errors,
    "terminate": str(__import__("signal").getsignal(15)), "group": os.getpgid(0), "torch": "torch" in sys.modules,
}))
sys.exit(7)
"""
ENVIRON = {**forked.START, "KINDLING_QUEUE": "7"}


@pytest.mark.parametrize("how", ["-c", "script"])
def test_it_sees_what_a_new_one_sees(how: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SEEN)
    command = [sys.executable, *(["-c", SEEN] if how == "-c" else [str(tmp_path / "script.py")]), "a", "b c"]
    options: dict[str, Any] = {"cwd": tmp_path, "env": ENVIRON, "capture_output": True, "text": True, "input": "told"}
    fresh, grown = (run(command, **options) for run in (subprocess.run, forked.run))
    assert (fresh.returncode, fresh.stderr) == (grown.returncode, grown.stderr) == (7, "on stderr\n")
    one, other = json.loads(fresh.stdout), json.loads(grown.stdout)
    assert (one.pop("torch"), other.pop("torch")) == (False, True)
    assert one == other


ENDS = {
    "whole": "",
    "by a number": "sys.exit(300)",
    "by words": "sys.exit('why')",
    "by an exception": "raise OSError('why')",
    "with a thread": "threading.Thread(target=lambda: (threading.Event().wait(0.1), print('thread'))).start()",
    "with nowhere to write to": "sys.stdout = open('/dev/full', 'w')",
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_it_ends_as_a_new_one_does(end: str) -> None:
    begin = "import atexit, sys, threading; atexit.register(print, 'atexit', file=sys.stderr)"
    command = [sys.executable, "-c", f"{begin}\n{end}\nprint('last', end='')"]
    fresh, grown = (run(command, env=ENVIRON, capture_output=True, text=True) for run in (subprocess.run, forked.run))
    assert (fresh.returncode, fresh.stdout) == (grown.returncode, grown.stdout)
    assert fresh.stderr.splitlines()[-1] == grown.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("environ", "options"), [({"LC_ALL": "C"}, ()), ({"HF_HUB_OFFLINE": "1"}, ()), ({}, ("-W", "ignore"))]
)
def test_where_imports_may_depend_on_it_a_new_one_is_started(environ: dict[str, str], options: tuple[str, ...]) -> None:
    command = [sys.executable, *options, "-c", "import sys; print('torch' in sys.modules)"]
    assert forked.run(command, env=ENVIRON | environ, capture_output=True, text=True).stdout == "False\n"


def test_what_this_process_has_imported_since_is_no_reason_for_a_new_one() -> None:
    """Such as a variable that an import sets: else all tests would be slow and pass."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    importlib.import_module("cache_dit")
    cache_dir()
    command = [sys.executable, "-c", "import sys; print('torch' in sys.modules)"]
    assert forked.run(command, env=dict(os.environ), capture_output=True, text=True).stdout == "True\n"


def test_nor_is_what_the_tests_of_a_file_leave_in_the_environment(request: pytest.FixtureRequest) -> None:
    """Or lose of it."""
    before = dict(os.environ)
    following = next((item for item in request.session.items if item.path != request.path), None)
    for last, differs in ((request.node, True), (following, False)):
        end = conftest.pytest_runtest_teardown(request.node, last)
        next(end)
        os.environ["CUDA_MODULE_LOADING"] = "LAZY"
        os.environ.pop("OMP_NUM_THREADS", None)
        assert next(end, None) is None
        assert (os.environ != before) == differs
    end = conftest.pytest_runtest_teardown(request.node, following)
    next(end)
    os.environ["CUDA_MODULE_LOADING"] = "LAZY"
    with pytest.raises(LookupError):
        end.throw(LookupError())  # by a fixture's end
    assert os.environ == before


def test_nor_is_where_else_modules_are_looked_for(tmp_path: Path) -> None:
    """By who runs the tests: all that they start shall be of this checkout anyway."""
    tests = Path(forked.__file__).parent
    environ = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}{os.pathsep}{tmp_path}"}
    code = "import os, conftest, forked; print(forked.differing({**os.environ, **forked.HERE}))"
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_it_takes_signals_and_is_a_child() -> None:
    code = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    for sig in (signal.SIGTERM, signal.SIGKILL):
        with forked.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            assert process.stdout.readline() == f"{process.pid}\n"
            process.send_signal(sig)
            assert process.wait(60) == -sig


def test_what_it_leaves_behind_is_not_ours() -> None:
    """Only while one is started this process takes the children of others."""
    code = "import os, sys\nif not os.fork():\n while os.getppid() == int(sys.argv[1]): pass\n print(os.getppid())"
    code = code.replace("sys.argv[1]", "os.environ['KINDLING_PARENT']")
    code = f"import os; os.environ['KINDLING_PARENT'] = str(os.getpid())\n{code}"
    done = forked.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert int(done.stdout) != os.getpid()
