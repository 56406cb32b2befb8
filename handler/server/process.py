"""The serving process: its sockets, one engine, one exit code."""

import contextlib
import gc
import importlib
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from handler.core import outlet
from handler.core.errors import BudgetExceeded, SettingsError, StartError
from handler.core.fields import MAX_PORT
from handler.core.loopback import is_loopback
from handler.core.settings import Settings
from handler.engine.engine import Engine
from handler.server.access import Observed
from handler.server.access import log as requests
from handler.server.app import create_app
from handler.server.connections import Connections, Limits, room
from handler.server.probes import answer_probes
from handler.server.shutdown import BACKLOG, Server, say
from handler.server.traces import Traces
from handler.server.wire import Wire
from handler.worker.clock import Clock, Ledger, print_ledger
from handler.worker.sharing import require_workers

if TYPE_CHECKING:  # few begin several
    from handler.engine.box import Box

SAVE = (
    "import sys,json,base64;"
    "open('circle.png','wb').write(base64.b64decode(json.load(sys.stdin)['data'][0]['b64_json']))"
)
SOCKET_BYTES = 64 << 10  # of one message that comes by websocket, of which none means much
ACCEPTED = 16  # connections at once, before any of them, or those that were there before, has its turn


def serve(settings: Settings, host: str, port: int) -> int:
    """Serve until told to stop; returns the exit code, `Server.code`."""
    outlet.install()
    _log(settings.log_level.upper())
    signal.signal(signal.SIGTERM, _leave)

    def clock(worker: int | str = "") -> Clock:
        name = f"worker {worker}, " if worker != "" else ""
        return Clock(
            settings.cold_start_budget_s,
            announce=lambda phase: say(f"{name}{settings.model}: {phase} ..."),
            publish=lambda ledger: _tell(ledger, app.traces),
            spent=lambda reason: server.give_up(BudgetExceeded(reason)),
        )

    engine = _engine(settings, clock)
    app = create_app(engine, public=not is_loopback(host))
    if not engine.spec.license.commercial:
        logging.getLogger("kindling").warning("%s: %s", engine.spec.id, engine.spec.license.obligation)
    with contextlib.ExitStack() as stack:
        listener, *probed = (stack.enter_context(_listen(host, each)) for each in _ports(port, os.environ))
        server = Server(_config(app), engine, app.hurry, app.busy)
        for probes in probed:
            answer_probes(probes, engine, server.stuck)
        for each in (signal.SIGTERM, signal.SIGINT):  # before uvicorn does: uvloop swallows what is raised as it starts
            signal.signal(each, server.handle_exit)
        address = _address(listener)
        say(f"listening on {address}, loading {engine.spec.id}")
        threading.Thread(target=_report, args=(engine, server, address), daemon=True).start()
        server.run(sockets=[listener])
        server.end()
    return server.code


def _engine(settings: Settings, clock: Callable[..., Clock]) -> Engine:
    """One worker in this process, or several in others."""
    if (count := require_workers(settings)) == 1:
        return Engine(settings.model_copy(update={"workers": 1}), clock())
    box: type[Box] = importlib.import_module("handler.engine.box").Box
    return box(settings, count, clock)


def _config(app: Observed) -> uvicorn.Config:
    limits = Limits(room())
    return uvicorn.Config(
        app,
        http=Connections(limits, Wire),  # type: ignore[arg-type]
        backlog=ACCEPTED,
        ws="websockets-sansio",
        ws_max_size=SOCKET_BYTES,
        ws_per_message_deflate=False,  # a small message may be a large one then
        lifespan="on",
        log_level="warning",
        access_log=False,
        timeout_keep_alive=limits.idle_s,
    )


def _log(level: str) -> None:
    """Lines for people, but of requests pure JSON, for those who collect it."""
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    requests.addHandler(logging.StreamHandler())
    requests.propagate = False


def _tell(ledger: Ledger, traces: Traces | None) -> None:
    """How the cold start went."""
    print_ledger(ledger)
    # Whatever becomes of a trace, the watchdog goes on to end the process.
    with contextlib.suppress(Exception):
        if traces:
            traces.cold_start(ledger)


def _leave(signum: int, frame: FrameType | None) -> None:
    """Before there is a server to be told."""
    raise SystemExit(0)


def _report(engine: Engine, server: Server, address: str) -> None:
    """Say when the model is ready; then see to it that the server ends if it fails."""
    with contextlib.suppress(StartError):
        engine.wait_booted()
        gc.freeze()  # what a worker has now it keeps: no collection looks through it while somebody waits
        _invite(engine, address)
    server.watch()


def _invite(engine: Engine, address: str) -> None:
    key = " -H 'Authorization: Bearer YOUR_KEY'" if engine.settings.api_keys else ""
    say(f"{engine.spec.id} is ready on {address} after {engine.ledger.total_s:.1f} s. Try:")
    print(
        f"\ncurl -s {address}/v1/images/generations -H 'Content-Type: application/json'{key} "
        f'-d \'{{"prompt": "a red circle on a blue background"}}\' | python3 -c "{SAVE}"\n\n'
        "It writes circle.png. Stop the server with Ctrl-C.",
        flush=True,
    )


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _ports(port: int, environ: Mapping[str, str]) -> list[int]:
    """`port`, and PORT_HEALTH if that is another: where probes are answered that load does not reach."""
    if not (health := environ.get("PORT_HEALTH")):
        return [port]
    if not (re.fullmatch("[0-9]{1,9}", health) and 1 <= int(health) <= MAX_PORT):
        raise SettingsError(f"PORT_HEALTH should be a port, 1 to {MAX_PORT}, not {health[:80]!r}.", "PORT_HEALTH")
    return [port] if int(health) == port else [port, int(health)]


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        told = getattr(error, "strerror", None) or error
        raise SettingsError(f"cannot listen on {host}:{port}: {told}. Try another port.") from None
    # As its connections are then: an answer's body waits for no acknowledgement of its head, which takes 40 ms. asyncio
    # does that only for sockets that name their protocol, as these do not.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
