"""RunPod's REST API v2, as `runpod_deploy.py` asks it: one request, what there is of a name, and refusals in words."""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx2

BASE = os.environ.get("RUNPOD_API_BASE_URL", "https://api.runpod.io")  # the variable of RunPod's own SDK
API = f"{BASE}/v2"  # v1 has been retired
TIMEOUT_S = 60
QUIET_S = 20.0  # without an event
LATER = (404, 429)  # of a log that is not there yet, or not now


class RefusedError(Exception):
    """Why nothing is, or was, done; a sentence that says what to do. `status` is RunPod's, if it answered at all."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def connected(key: str) -> Iterator[httpx2.Client]:
    """A client that asks with this key."""
    with httpx2.Client(headers={"authorization": f"Bearer {key}"}, timeout=TIMEOUT_S) as client:
        yield client


def ask(client: httpx2.Client, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """One request; None where the answer has no body. RunPod's refusals become RefusedErrors."""
    url = f"{API}/{path}"
    try:
        answer = client.request(method, url, json=body)
    except httpx2.TransportError as error:
        raise RefusedError(f"{url} cannot be reached ({error}). Check the network and try again.") from None
    status = answer.status_code
    if status in (401, 403):
        advice = "make a key that may write, under Settings, API Keys."
        raise RefusedError(f"RunPod does not accept RUNPOD_API_KEY for {method} {path}: {advice}", status)
    if not answer.is_success:
        raise RefusedError(f"RunPod refused {method} {url} with {status}: {complaint(answer)}", status)
    try:
        return answer.json() if answer.content else None
    except ValueError:
        raise RefusedError(f"{url} answered {method} with {status} and no JSON. Try again.", status) from None


def complaint(answer: httpx2.Response) -> str:
    """RunPod's own words in a refusal: a detail or a message, and perhaps a list."""
    try:
        body = answer.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        return answer.text[:500]
    said = [body.get("detail") or body.get("message") or body.get("error") or body, *(body.get("errors") or [])]
    return "; ".join(map(str, said))


def named(client: httpx2.Client, path: str, kind: str, name: str) -> dict[str, Any]:
    """The one that has this name; empty if none has. RefusedError if several have."""
    rows = ask(client, "GET", path)[kind]  # " -fb" is RunPod's mark of FlashBoot
    found = [row for row in rows if row["name"].removesuffix(" -fb") == name]
    if len(found) > 1:
        raise RefusedError(f"RunPod has {len(found)} {kind} named {name}: delete or rename all but one.")
    return found[0] if found else {}


def put(client: httpx2.Client, path: str, body: dict[str, Any], there: Mapping[str, Any]) -> str:
    """Update what is there, else create it; returns its id."""
    done = ask(client, "PATCH", f"{path}/{there['id']}", body) if there else ask(client, "POST", path, body)
    print(f"{'updated' if there else 'created'} in {path}: {body['name']} ({done['id']})", file=sys.stderr)
    return str(done["id"])


def events(client: httpx2.Client, path: str, last: str) -> Iterator[dict[str, Any]]:
    """Events of a stream after the one with the id `last`, each with its `id`, until none comes for a while.

    RefusedError if it may not be read. What refuses to go on after `last` is read from where it begins.
    """
    resumed = {"last-event-id": last} if last else {}
    try:
        with client.stream("GET", f"{API}/{path}", headers=resumed, timeout=QUIET_S) as answer:
            if answer.is_success or answer.status_code in LATER or answer.is_server_error:
                yield from read(answer.iter_lines() if answer.is_success else (), last)
                return
            answer.read()
    except httpx2.TransportError:
        return
    if not last:
        raise RefusedError(f"RunPod answered {answer.status_code} for a log: {complaint(answer)}", answer.status_code)
    yield from events(client, path, "")


def read(lines: Iterable[str], last: str) -> Iterator[dict[str, Any]]:
    """The events of these lines. One that was cut off is left out, and a server's signs of life are no events."""
    identity, heard = "", time.monotonic()
    for line in lines:
        name, _, value = line.partition(":")
        if name == "id":
            identity = value.strip()
        elif name == "data" and identity != last:
            try:
                event = json.loads(value)
            except ValueError:
                continue
            yield {"source": "", "line": "", **event, "id": identity}
            heard = time.monotonic()
        if time.monotonic() - heard > QUIET_S:
            return
