"""The command line: `python -m handler VERB`. `CODES` are its exit codes."""

import argparse
import atexit
import gc
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from handler.cli import bake, comfy, deploy, doctor, fetch, generate, models, optimize, receipts, sglang
from handler.core.errors import BudgetExceeded, KindlingError, ModelNotFound, RequestError, SettingsError, VolumeFailed
from handler.core.fields import MAX_PORT
from handler.core.settings import Settings
from handler.core.untrusted import printed_lines
from handler.core.version import __version__
from handler.model.upstream import dedicated
from handler.volume.room import remedy
from handler.worker.ending import EXIT_CODE

MODEL = "model id, alias or mode (default: $KINDLING_MODEL or spark)"
WORKERS = "workers, each with GPUs of its own, behind one queue; auto takes all (default: $KINDLING_WORKERS or 1)"
CODES = """exit codes: 0 done, or serve told once to stop; 1 failed; 2 bad usage or a bad setting;
124 past the cold-start budget; 130 Ctrl-C, 143 SIGTERM: of serve when it is told twice"""
INTERRUPTED = 130  # as shells have it: 128 and the signal's number


BAD_USAGE = (RequestError, SettingsError)


def _takes_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help=MODEL)
    parser.add_argument("--weights", metavar="FILES", help=generate.WEIGHTS)


def _takes_nothing(parser: argparse.ArgumentParser) -> None:
    pass


VERBS = (
    ("generate", generate, generate.add_arguments, "make a picture without a server"),
    ("models", models, _takes_nothing, "list the models: what fits here, what is fetched, what their licences ask"),
    ("fetch", fetch, _takes_model, "bring a model to the volume"),
    ("bake", bake, _takes_model, "compile a model for this machine, for later cold starts"),
    ("optimize", optimize, optimize.add_arguments, "measure how a model runs best here; workers follow the receipt"),
    ("receipts", receipts, receipts.add_arguments, "show the receipts of optimize, choose the one that workers follow"),
    ("comfy", comfy, comfy.add_arguments, "explain, convert and draw ComfyUI's files; keep them as endpoints"),
    ("deploy", deploy, deploy.add_arguments, "show how a model is deployed to a platform, and what to expect of it"),
    ("doctor", doctor, _takes_nothing, "look at the machine, the volume, the settings and the last boots"),
)


def command() -> NoReturn:
    """The program. Its end takes no last look through all that was imported, which would take a second."""
    atexit.register(gc.freeze)
    dedicated()
    sys.exit(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code."""
    for stream in (sys.stdout, sys.stderr):  # a file's name, or a prompt, may be more than they can spell
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    verb: Callable[[argparse.Namespace], int] = options.verb
    try:
        code = verb(options)
        _flush()
        return code
    except KindlingError as error:
        todo = "KINDLING_MODEL or the command should name one." if isinstance(error, ModelNotFound) else ""
        if isinstance(error, VolumeFailed):
            todo = remedy(Settings.from_env().volume, error.__cause__)
        print(f"kindling: {printed_lines(f'{error.message} {todo}'.rstrip())}", file=sys.stderr)
        return EXIT_CODE if isinstance(error, BudgetExceeded) else 2 if isinstance(error, BAD_USAGE) else 1
    except BrokenPipeError:  # who reads this has seen enough
        return _silent()
    except OSError as error:
        if error.filename or not (why := _unheard()):  # of a file that has a name, nothing is printed
            raise
        print(f"kindling: what this prints cannot be written ({why}).", file=sys.stderr)
        return _silent()
    except KeyboardInterrupt:
        print("kindling: stopped", file=sys.stderr)
        return INTERRUPTED


def _flush() -> None:
    if sys.stdout:  # which may be closed
        sys.stdout.flush()


def _unheard() -> str:
    """Why nothing can be printed, if nothing can. To find out it prints an empty line."""
    try:
        print(flush=True)
    except OSError as error:
        return str(error.strerror)
    return ""


def _silent() -> int:
    """Nothing more is written at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kindling", description="Text to pictures, on a GPU or on your laptop.", epilog=CODES
    )
    parser.add_argument("--version", action="version", version=f"kindling {__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    serve = verbs.add_parser("serve", help="serve one model over HTTP", description="Serve one model over HTTP.")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=_port, default=8000, help="port; 0 takes a free one (default: %(default)s)")
    serve.add_argument("--model", help=MODEL)
    serve.add_argument("--weights", metavar="FILES", help=generate.WEIGHTS)
    serve.add_argument("--workers", metavar="N", help=WORKERS)
    sglang.add_arguments(serve)
    serve.set_defaults(verb=_serve)

    for name, module, add_arguments, promise in VERBS:
        verb = verbs.add_parser(name, help=promise, description=module.__doc__)
        add_arguments(verb)
        verb.add_argument("--json", action="store_true", help="print JSON")
        verb.set_defaults(verb=module.run)
    return parser


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or (port := int(text[:9])) > MAX_PORT:
        raise argparse.ArgumentTypeError(f"should be a port, 0 to {MAX_PORT}, not {text!r:.80}")
    return port


def _serve(options: argparse.Namespace) -> int:
    from handler.server.process import serve

    environ, notes = sglang.translated(options, os.environ)
    for note in notes:
        print(f"kindling: {note}", file=sys.stderr)
    return serve(Settings.from_env(environ, options.model, options.weights), options.host, options.port)


if __name__ == "__main__":
    command()
