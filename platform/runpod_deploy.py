"""Deploy to RunPod: `RUNPOD_API_KEY=... python platform/runpod_deploy.py flux-schnell --image NAME --volume ID`.

Creates or updates, by name, one template and one serverless endpoint. Kindling's settings and what `CARRIED` names, set
while deploying, hold in the workers, but for KINDLING_VOLUME and KINDLING_MODEL, which the command line decides. What
shall run is a value; `bodies` says it in the words of RunPod's REST API.
"""

import argparse
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from handler import GPUS, MODELS, MODES, ModelSpec, Settings, choose_gpus, errors

WORKER = ("python", "-u", "platform/runpod_worker.py")
SERVER = ("python", "-m", "handler", "serve", "--host", "0.0.0.0", "--port", "8000")  # noqa: S104
SERVER_ENV = {  # RunPod's gate has asked for RunPod's key in the one Authorization header there is
    "PORT": "8000",
    "PORT_HEALTH": "8000",
    "KINDLING_ALLOW_OPEN": "true",
}
API = "https://api.runpod.io/v2"  # v1 is retired at the end of 2026
MOUNT = "/runpod-volume"  # of network volumes and of cached models; our image names another
INIT_TIMEOUT_S = 600  # RunPod's patience with the image and us, at least
IMAGE_S = 360  # of it, for the image: our own budget ends before, and says where it went
SECRET = re.compile(r"\{\{ RUNPOD_SECRET_\w+ \}\}")
SECRETS = ("KINDLING_API_KEYS", "BUCKET_SECRET_ACCESS_KEY")
CARRIED = ("BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY", "MAX_CONCURRENCY", "STREAM")
CREATED_ONLY = {"type"}  # refused when something is updated
TIMEOUT_S = 60
TIMEOUT_MS = 600_000  # of a job, at least


RENTALS = [gpu.rentals["runpod"] for gpu in GPUS.values() if "runpod" in gpu.rentals]  # the cheapest first
POOLS = {one.pool: [name for row in RENTALS if row.pool == one.pool for name in row.names] for one in RENTALS}
MOST_POOLS = 3  # RunPod ranks no more


class RefusedError(Exception):
    """Why nothing is, or was, deployed; a sentence that says what to do."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """What shall run on RunPod; the template and the endpoint have the same name."""

    name: str
    image: str
    gpus: tuple[str, ...]  # in order of price
    env: Mapping[str, str]
    volume: str = ""
    load_balancer: bool = False
    workers_max: int = 3
    idle_s: int = 60  # about a cold start: to wait as long as one costs is at most twice the best one could do
    queue_delay_s: int = 4
    waiting: int = 4  # requests per worker behind the load balancer; the engine holds 32
    timeout_ms: int = TIMEOUT_MS
    disk_gb: int = 20
    min_cuda: str = "13.0"  # torch's wheels on PyPI are built for it

    @property
    def command(self) -> tuple[str, ...]:
        """What the container runs."""
        return SERVER if self.load_balancer else WORKER

    @property
    def ports(self) -> list[str]:
        """What the container shows to RunPod."""
        return [f"{SERVER_ENV['PORT']}/http"] if self.load_balancer else []


def bodies(wanted: Deployment) -> tuple[dict[str, Any], dict[str, Any]]:
    """Template and endpoint as RunPod's REST API v2 takes them."""
    template = {
        "name": wanted.name,
        "image": wanted.image,
        "serverless": True,
        "args": shlex.join(wanted.command),
        "env": dict(wanted.env),
        "ports": wanted.ports,
        "disk": wanted.disk_gb,
        "startSsh": False,
        "startJupyter": False,
    }
    pools = [pool for pool, gpus in POOLS.items() if set(gpus) & set(wanted.gpus)]
    by_queue = {"type": "QUEUE_DELAY", "queueDelay": wanted.queue_delay_s}
    by_count = {"type": "REQUEST_COUNT", "requestCount": wanted.waiting}
    endpoint = {
        "name": wanted.name,
        "type": "LOAD_BALANCER" if wanted.load_balancer else "QUEUE",
        "gpu": {
            "pools": pools,
            "excludedTypes": [gpu for pool in pools for gpu in POOLS[pool] if gpu not in wanted.gpus],
            "count": 1,
            "minCudaVersion": wanted.min_cuda,
        },
        "workers": {"min": 0, "max": wanted.workers_max, "idleTimeout": wanted.idle_s},
        "scaling": by_count if wanted.load_balancer else by_queue,
        "flashboot": "FLASHBOOT",
        "timeout": wanted.timeout_ms,
        **({"networkVolumes": [wanted.volume]} if wanted.volume else {}),
    }
    return template, endpoint


def gpus_for(settings: Settings, spec: ModelSpec, asked: Sequence[str]) -> tuple[str, ...]:
    """The GPUs asked for, else those of the cheapest pools that run the model best; in order of price."""
    offers = choose_gpus(settings, spec, "runpod", asked)
    pools = list(dict.fromkeys(offer.rental.pool for offer in offers))
    kept = pools if asked else pools[:MOST_POOLS]
    offers = tuple(offer for offer in offers if offer.rental.pool in kept)
    for warning in filter(None, (offer.warning for offer in offers)):
        print(f"{spec.id}: {warning}", file=sys.stderr)
    rented = [name for offer in offers for name in offer.rental.names]
    return tuple(name for name in rented if not asked or name in asked)


def environment(args: argparse.Namespace, environ: Mapping[str, str], volume: bool) -> dict[str, str]:
    """The workers' variables: the deployer's settings, checked here rather than in the first worker."""
    mine = {name: value for name in CARRIED if (value := environ.get(name))}
    mine |= {name: value for name, value in Settings.named(environ).items() if name != "KINDLING_VOLUME"}
    env = {"KINDLING_DEVICE": "cuda", **mine, "KINDLING_MODEL": args.model}  # never the CPU of a rented GPU
    env |= SERVER_ENV if args.load_balancer else {}
    env |= {"KINDLING_VOLUME": MOUNT} if volume else {}
    settings = Settings.from_env(env)
    check_jobs(env, settings.queue)
    for name in SECRETS:
        if not SECRET.fullmatch(env.get(name, "{{ RUNPOD_SECRET_none }}")):
            raise RefusedError(
                f"{name} would stand readable in the template: keep it as a secret in RunPod's console and set "
                f"{name}='{{{{ RUNPOD_SECRET_name }}}}' here."
            )
    patience = max(INIT_TIMEOUT_S, math.ceil(settings.cold_start_budget_s + IMAGE_S))
    return {**env, "RUNPOD_INIT_TIMEOUT": str(patience)}


def check_jobs(env: Mapping[str, str], queue: int) -> None:
    """Refuse what the first worker would refuse."""
    if env.get("STREAM", "0") not in ("0", "1"):
        raise RefusedError(f"STREAM should be 0 or 1, not {env['STREAM']!r}.")
    held = env.get("MAX_CONCURRENCY", "1")
    if not re.fullmatch("[0-9]{1,9}", held) or not 1 <= int(held) <= queue:
        raise RefusedError(f"MAX_CONCURRENCY should be 1 to {queue} (KINDLING_QUEUE), not {held[:80]!r}.")


def requests(wanted: Deployment) -> list[dict[str, Any]]:
    """What would be sent where nothing exists yet."""
    template, endpoint = bodies(wanted)
    endpoint["templateId"] = "<the template's id>"
    paths = (("templates", template), ("serverless", endpoint))
    return [{"method": "POST", "url": f"{API}/{path}", "json": body} for path, body in paths]


def deploy(wanted: Deployment, key: str) -> str:
    """Create or update the template, then the endpoint; returns the endpoint's id."""
    with httpx2.Client(headers={"authorization": f"Bearer {key}"}, timeout=TIMEOUT_S) as client:
        template, endpoint = bodies(wanted)
        endpoint["templateId"] = put(client, f"{API}/templates", "templates", template)
        return put(client, f"{API}/serverless", "endpoints", endpoint)


def put(client: httpx2.Client, url: str, kind: str, body: dict[str, Any]) -> str:
    """Update what has this name, else create it; returns its id."""
    rows = ask(client, "GET", url)[kind]  # " -fb" is RunPod's mark of FlashBoot
    found = [row["id"] for row in rows if row["name"].removesuffix(" -fb") == body["name"]]
    if len(found) > 1:
        raise RefusedError(f"RunPod has {len(found)} {kind} named {body['name']}: delete or rename all but one.")
    if found:
        changed = {name: value for name, value in body.items() if name not in CREATED_ONLY}
        done = ask(client, "PATCH", f"{url}/{found[0]}", changed)
    else:
        done = ask(client, "POST", url, body)
    print(f"{'updated' if found else 'created'} in {kind}: {body['name']} ({done['id']})", file=sys.stderr)
    return str(done["id"])


def ask(client: httpx2.Client, method: str, url: str, body: dict[str, Any] | None = None) -> Any:
    """One request to RunPod; its refusals become ours."""
    try:
        answer = client.request(method, url, json=body)
    except httpx2.TransportError as error:
        raise RefusedError(f"{url} cannot be reached ({error}). Check the network and try again.") from None
    if answer.status_code in (401, 403):
        raise RefusedError(
            "RunPod does not accept RUNPOD_API_KEY: make a key that may write, under Settings, API Keys."
        )
    if not answer.is_success:
        raise RefusedError(f"RunPod refused {method} {url} with {answer.status_code}: {complaint(answer)}")
    return answer.json()


def complaint(answer: httpx2.Response) -> str:
    """RunPod's own words in a refusal: a detail or a message, and perhaps a list."""
    try:
        body = answer.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        return answer.text[:500]
    said = [body.get("detail") or body.get("message") or body.get("error") or body, *body.get("errors", [])]
    return "; ".join(map(str, said))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="runpod_deploy.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=[*MODELS, *MODES], metavar="MODEL", help="a model id or a mode")
    parser.add_argument("--image", required=True, help="the Dockerfile's image, where RunPod can pull it")
    parser.add_argument(
        "--gpu", action="append", default=[], help="RunPod's GPU id; repeat for more (default: cheapest)"
    )
    parser.add_argument("--volume", default="", help="id of the network volume that holds the model")
    parser.add_argument("--load-balancer", action="store_true", help="serve HTTP without RunPod's queue")
    parser.add_argument("--dry-run", action="store_true", help="print the requests as JSON; needs no key")
    return parser.parse_args(arguments)


def planned(args: argparse.Namespace, environ: Mapping[str, str]) -> Deployment:
    """The deployment that the command line and the environment ask for."""
    spec = MODELS[MODES[args.model].model if args.model in MODES else args.model]
    if not args.volume and not spec.embedded:
        print(f"{spec.id}: without --volume, choose it as the endpoint's cached model in the console.", file=sys.stderr)
    env = environment(args, environ, volume=bool(args.volume) or not spec.embedded)
    name = f"kindling-{args.model}"
    settings = Settings.from_env(env)
    longest = max(TIMEOUT_MS, math.ceil(1000 * settings.deadline_s))
    gpus = gpus_for(settings, spec, args.gpu)
    return Deployment(name, args.image, gpus, env, args.volume, args.load_balancer, timeout_ms=longest)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args, api_key = parse(arguments), os.environ.get("RUNPOD_API_KEY", "")
    try:
        wanted = planned(args, os.environ)
        if args.dry_run:
            print(json.dumps(requests(wanted), indent=2))
            return 0
        if not api_key:
            raise RefusedError("Set RUNPOD_API_KEY; RunPod's console makes one under Settings, API Keys.")
        endpoint = deploy(wanted, api_key)
    except (RefusedError, errors.KindlingError) as error:
        print(f"runpod_deploy: {error}", file=sys.stderr)
        return 1
    host = f"https://{endpoint}.api.runpod.ai" if wanted.load_balancer else f"https://api.runpod.ai/v2/{endpoint}"
    print(host)
    return 0


if __name__ == "__main__":
    sys.exit(main())
