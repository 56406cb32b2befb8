"""The serving process: its sockets, one lane, one exit code."""

import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from types import FrameType

import uvicorn

from handler.clock import EXIT_CODE, Clock
from handler.errors import BudgetExceeded, SettingsError, StartError
from handler.lane import Lane
from handler.server.app import create_app
from handler.settings import Settings

SAVE = (
    "import sys,json,base64;"
    "open('circle.png','wb').write(base64.b64decode(json.load(sys.stdin)['data'][0]['b64_json']))"
)
DRAIN_S = 30
MAX_PORT = 65_535


def serve(settings: Settings, host: str, port: int) -> int:
    """Serve until told to stop; returns the exit code: 0, or 1 if the model could not be loaded, 124 if not in time."""
    logging.basicConfig(level=settings.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, _leave)
    clock = Clock(settings.cold_start_budget_s, announce=lambda phase: _say(f"{settings.model}: {phase} ..."))
    lane = Lane(settings, clock)
    app = create_app(lane, public=not _is_loopback(host))
    if not lane.spec.license.commercial:
        logging.getLogger("kindling").warning("%s: %s", lane.spec.id, lane.spec.license.obligation)
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(_listen(host, each)) for each in _ports(port, os.environ)]
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=DRAIN_S)
        )
        address = _address(listeners[0])
        _say(f"listening on {address}, loading {lane.spec.id}")
        threading.Thread(target=_report, args=(lane, server, address), daemon=True).start()
        try:
            with contextlib.suppress(KeyboardInterrupt):
                server.run(sockets=listeners)
        finally:
            if not lane.booted:  # its thread is in native code; Python's own way out would pull the floor from under it
                os._exit(0)
    if isinstance(lane.error, BudgetExceeded):
        return EXIT_CODE  # as the watchdog has it
    return 1 if lane.error else 0


def _leave(signum: int, frame: FrameType | None) -> None:
    """uvicorn drains on SIGTERM and then raises it again; by then all is done."""
    raise SystemExit(0)


def _report(lane: Lane, server: uvicorn.Server, address: str) -> None:
    """Say when the model is ready, or end the server when it never will be."""
    try:
        lane.wait_booted()
    except StartError as error:
        _say(error.message)
        server.should_exit = True
        return
    key = " -H 'Authorization: Bearer YOUR_KEY'" if lane.settings.api_keys else ""
    _say(f"{lane.spec.id} is ready on {address} after {lane.ledger.total_s:.1f} s. Try:")
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
    """`port`, and PORT_HEALTH if that is another: where RunPod's load balancer may ask for /ping."""
    health = environ.get("PORT_HEALTH") or str(port)
    if not (health.isdecimal() and int(health) <= MAX_PORT):
        raise SettingsError(f"PORT_HEALTH should be a port, 1 to {MAX_PORT}, not {health!r}.", "PORT_HEALTH")
    return [port] if int(health) == port else [port, int(health)]


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise SettingsError(f"cannot listen on {host}:{port}: {error.strerror or error}. Try another port.") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _say(text: str) -> None:
    print(f"kindling: {text}", file=sys.stderr, flush=True)
