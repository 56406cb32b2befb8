"""Processes that begin with their imports done: forked off one that has them, which each test process starts once.

For tests of what a process does, not of how it starts. What comes of it is a child of this process with its own birth,
arguments, environment, folder and pipes; it takes signals and ends as any other. Where imports may depend on a command
or its environment, or the system is not Linux, `Popen` and `run` start a new interpreter, as subprocess does.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import inspect
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

HERE = {"PYTHONPATH": str(Path(__file__).parent.parent)}  # where `handler` is found, said or not
START = HERE | os.environ  # as the tests found it, whichever of them comes first
LATE = (  # read after the imports; the last three are set by some of them, to what they would be set to anyway
    *("KINDLING_", "FAULTY_", "AWS_", "BUCKET_", "RUNPOD_", "COMFY_", "OTEL_", "PORT", "HOME", "PYTEST_"),
    *("TORCHINDUCTOR_CACHE_DIR", "CACHE_DIT_", "FFPA_"),
)
SPECIAL = ("executable", "preexec_fn", "pass_fds", "shell", "start_new_session")
ENDS = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
SUBREAPER = 36  # prctl's PR_SET_CHILD_SUBREAPER: this process is given the children of those that ended below it


class Popen(subprocess.Popen[Any]):
    """`subprocess.Popen`, by a fork where that is the same."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        start = super()._execute_child  # type: ignore[misc]
        given = inspect.signature(start).bind(args, *rest).arguments
        environ = dict(os.environ if given["env"] is None else given["env"])
        asked = {"words": [*map(os.fspath, args)], "cwd": os.fspath(given["cwd"] or "."), "environ": environ}
        if sys.platform != "linux" or any(map(given.get, SPECIAL)) or not trunk().grows(asked):
            return start(args, *rest)  # type: ignore[no-any-return]
        sys.audit("subprocess.Popen", args[0], args, given["cwd"], environ)
        pipes = [own if given[end] == -1 else given[end] for own, end in enumerate(("p2cread", "c2pwrite", "errwrite"))]
        self.pid = trunk().fork(asked, pipes)
        self._child_created = True
        self._close_pipe_fds(*map(given.get, ENDS))  # type: ignore[attr-defined]


def run(command: Any, capture_output: bool = False, check: bool = False, **options: Any) -> Any:
    """`subprocess.run` by this file's Popen."""
    told, timeout = options.pop("input", None), options.pop("timeout", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} if capture_output else {}
    with Popen(command, **pipes, **({} if told is None else {"stdin": subprocess.PIPE}), **options) as process:
        try:
            out, err = process.communicate(told, timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def differing(environ: Mapping[str, str]) -> set[str]:
    """What imports may depend on and is not as the tests found it."""
    differ = dict((HERE | dict(environ)).items() ^ START.items())
    return {name for name in differ if not name.startswith(LATE)}


def restore() -> None:
    """Let the environment be as the tests found it, where imports may depend on it; else nothing is forked any more."""
    for name in differing(os.environ):
        os.environ.pop(name, None)
        os.environ.update({name: START[name]} if name in START else {})


class Trunk:
    """The process that has the imports done. It ends with this one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._line, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command, inherited = [sys.executable, __file__, str(other.fileno())], [other.fileno()]
        with other:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=inherited, env=START)
        atexit.register(lambda: (self._line.close(), process.wait()))

    def grows(self, asked: dict[str, Any]) -> bool:
        """Whether a fork is to this command, in this environment, what a new interpreter is."""
        python, first, *_ = [word for word in asked["words"] if word != "-u"]
        plain = first in ("-m", "-c") or first[0] != "-"
        return python == sys.executable and plain and not differing(asked["environ"])

    def fork(self, asked: dict[str, Any], pipes: list[int]) -> int:
        """Start a process with these as its stdin, stdout and stderr; its id."""
        prctl = ctypes.CDLL(None).prctl
        with self._lock:
            prctl(SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(self._line, [json.dumps(asked).encode()], pipes)
                return int(self._line.recv(20))
            finally:
                prctl(SUBREAPER, 0, 0, 0, 0)


@cache
def trunk() -> Trunk:
    """This process's."""
    return Trunk()


def grow(line: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """In the trunk: fork for each message, and leave with the last; only in a fork this returns, what it shall be."""
    while True:
        told, pipes, *_ = socket.recv_fds(line, 1 << 20, 3)
        if not told:
            sys.exit()
        back, front = os.pipe()
        if not (between := os.fork()):
            if child := os.fork():
                os.write(front, str(child).encode())
                os._exit(0)  # so that the child is given to the test process
            line.close()
            os.closerange(back, front + 1)
            return json.loads(told), pipes
        os.waitpid(between, 0)
        line.send(os.read(back, 20))
        for number in (*pipes, back, front):
            os.close(number)


def become(words: list[str], cwd: str, environ: dict[str, str], pipes: list[int]) -> None:
    """Run a command of Python's in this process."""
    for own, number in enumerate(pipes):
        os.dup2(number, own)
        os.close(number)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    spelled: dict[str, Any] = {"encoding": sys.stdout.encoding, "closefd": False}
    sys.stdin, sys.stdout = os.fdopen(0, **spelled), os.fdopen(1, "w", **spelled)
    sys.stderr = os.fdopen(2, "w", 1, **spelled, errors="backslashreplace")
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    sys.stdout.reconfigure(write_through="-u" in words)
    how, *rest = [word for word in words[1:] if word != "-u"]
    if how == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif how == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    else:
        sys.argv, sys.path[0] = [how, *rest], str(Path(how).parent)
        runpy.run_path(how, run_name="__main__")


def leave(code: int) -> None:
    """End as an interpreter does, but leave all that it has imported to the system: that is most of a short command."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code & 0xFF)
    sys.exit(code)  # what could not be written is for the interpreter to tell


if __name__ == "__main__":
    from handler.model import families, imports

    families.quiet()
    for name in ("model.families.flux", "server.process"):
        importlib.import_module(f"handler.{name}")
    importlib.import_module("torch._dynamo")  # some fork compiles
    gc.freeze()
    imports._frozen = cache(imports._frozen)  # as in conftest.py
    imports._frozen()
    asked, pipes = grow(socket.socket(fileno=int(sys.argv[1])))
    try:
        become(**asked, pipes=pipes)
    except SystemExit as told:
        if isinstance(told.code, int | None):
            leave(told.code or 0)
        raise
    leave(0)
