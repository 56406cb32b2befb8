"""Deploy to RunPod: `RUNPOD_API_KEY=... python platform/runpod_deploy.py flux-schnell --image NAME --volume ID`.

Creates or updates, by name, one template and one serverless endpoint. Kindling's settings and what `CARRIED` names, set
while deploying, hold in the workers, but for KINDLING_VOLUME and KINDLING_MODEL, which the command line decides; CUDA
is what the image was built with, for it says which hosts will do. What shall run is a value; `bodies` says it in the
words of RunPod's REST API, and `changes` what of it an endpoint that is there already is told: the rest stays as it was
set in the console.
"""

import argparse
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx2

from handler import GPUS, MODELS, MODES, ModelSpec, Settings, choose_gpus, cuda_build, errors

# Idle for about a cold start: to wait as long as one costs is at most twice the best one could do.
WORKERS = {"min": 0, "max": 3, "idleTimeout": 60}
WORKER = ("python", "-u", "platform/runpod_worker.py")
SERVER = ("python", "-m", "handler", "serve", "--host", "0.0.0.0", "--port", "8000")  # noqa: S104
SERVER_ENV = {"PORT": "8000", "PORT_HEALTH": "8000"}
API = "https://api.runpod.io/v2"  # v1 is retired at the end of 2026
MOUNT = "/runpod-volume"  # of network volumes and of cached models; our image names another
INIT_TIMEOUT_S = 600  # RunPod's patience with the image and us, at least
IMAGE_S = 360  # of it, for the image: our own budget ends before, and says where it went
SECRET = re.compile(r"\{\{ RUNPOD_SECRET_\w+ \}\}")
SECRETS = ("KINDLING_API_KEYS", "BUCKET_SECRET_ACCESS_KEY")
CARRIED = ("BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY", "MAX_CONCURRENCY", "STREAM")
FLASHBOOT = {"off": "OFF", "on": "FLASHBOOT", "priority": "PRIORITY_FLASHBOOT"}
COUNTS = {  # options, RunPod's names of what they set, from where to where, and what it is
    "--workers-min": ("min", 0, 1000, "workers that always run, and are paid for"),
    "--workers-max": ("max", 1, 1000, "workers at most"),
    "--idle": ("idleTimeout", 1, 3600, "seconds that a worker waits for its next job"),
}
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
    gpus_asked: bool
    env: Mapping[str, str]
    volume: str = ""
    load_balancer: bool = False
    workers: Mapping[str, int] = field(default_factory=dict)  # what was asked for, by RunPod's names
    data_centers: tuple[str, ...] = ()
    flashboot: str = ""
    queue_delay_s: int = 4
    waiting: int = 4  # requests per worker behind the load balancer; the engine holds 32
    timeout_ms: int = TIMEOUT_MS
    disk_gb: int = 20
    cuda: str = ""  # the image's build of torch

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
            "minCudaVersion": cuda_build(wanted.cuda).hosts,
        },
        "workers": {**WORKERS, "max": max(WORKERS["max"], wanted.workers.get("min", 0)), **wanted.workers},
        "scaling": by_count if wanted.load_balancer else by_queue,
        "flashboot": FLASHBOOT[wanted.flashboot or "on"],
        "timeout": wanted.timeout_ms,
        **({"networkVolumes": [wanted.volume]} if wanted.volume else {}),
        **({"dataCenterIds": [*wanted.data_centers]} if wanted.data_centers else {}),
    }
    return template, endpoint


def changes(wanted: Deployment, there: Mapping[str, Any], last: Mapping[str, str]) -> dict[str, Any]:
    """What an endpoint that is there is told beside the template: what was asked for, and no more.

    `last` are the variables of its last deployment: those that are not among them were set in the console.
    """
    whole = bodies(wanted)[1]
    chosen: list[str] = [name for name in ("networkVolumes", "dataCenterIds") if name in whole]
    chosen += ["flashboot"] * bool(wanted.flashboot)
    chosen += ["timeout"] * (there.get("timeout", 0) < wanted.timeout_ms)
    told = {name: whole[name] for name in ("name", *chosen)}
    if wanted.workers:
        told["workers"] = dict(wanted.workers)
    if wanted.gpus_asked:
        told["gpu"] = {name: whole["gpu"][name] for name in ("pools", "excludedTypes")}
    has: dict[str, str] = there.get("env") or {}
    if kept := {name: value for name, value in has.items() if last.get(name) != value and name not in wanted.env}:
        told["env"] = kept  # beside the template's; what neither has is removed
    return told


def gpus_for(settings: Settings, spec: ModelSpec, asked: Sequence[str], cuda: str = "") -> tuple[str, ...]:
    """The GPUs asked for, else those of the cheapest pools that run the model best; in order of price."""
    offers = choose_gpus(settings, spec, "runpod", asked, cuda_build(cuda))
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
    env |= {"KINDLING_ALLOW_OPEN": "true"} if args.open else {}
    env |= {"KINDLING_VOLUME": MOUNT} if volume else {}
    settings = Settings.from_env(env)
    check_jobs(env, settings.queue)
    check_gate(args, settings)
    for name in SECRETS:
        if not SECRET.fullmatch(env.get(name, "{{ RUNPOD_SECRET_none }}")):
            raise RefusedError(
                f"{name} would stand readable in the template: keep it as a secret in RunPod's console and set "
                f"{name}='{{{{ RUNPOD_SECRET_name }}}}' here."
            )
    patience = max(INIT_TIMEOUT_S, math.ceil(settings.cold_start_budget_s + IMAGE_S))
    return {**env, "RUNPOD_INIT_TIMEOUT": str(patience)}


def check_gate(args: argparse.Namespace, settings: Settings) -> None:
    """Refuse to serve HTTP without a key of ours, unless that is what is wanted."""
    if args.open and not args.load_balancer:
        raise RefusedError("--open is for --load-balancer: RunPod's queue has RunPod's own gate, and no other.")
    if args.load_balancer and not (settings.api_keys or settings.allow_open):
        raise RefusedError(
            "Set KINDLING_API_KEYS='{{ RUNPOD_SECRET_name }}', with the keys as a secret in RunPod's console: callers "
            "send RunPod's key as Authorization, and yours as X-API-Key. With --open RunPod's alone is asked for."
        )


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


def deploy(wanted: Deployment, key: str, settled: Callable[[Mapping[str, Any]], None]) -> str:
    """Create or update the template, then the endpoint; returns the endpoint's id.

    What is there is looked at first, and `settled` may refuse it, before anything is changed.
    """
    with httpx2.Client(headers={"authorization": f"Bearer {key}"}, timeout=TIMEOUT_S) as client:
        there = named(client, "serverless", "endpoints", wanted.name)
        known = named(client, "templates", "templates", wanted.name)
        template, endpoint = bodies(wanted)
        if there:
            settled(there)
            endpoint = changes(wanted, there, known.get("env") or {})
        endpoint["templateId"] = put(client, "templates", template, known)
        return put(client, "serverless", endpoint, there)


def named(client: httpx2.Client, path: str, kind: str, name: str) -> dict[str, Any]:
    """The one that has this name; empty if none has."""
    rows = ask(client, "GET", f"{API}/{path}")[kind]  # " -fb" is RunPod's mark of FlashBoot
    found = [row for row in rows if row["name"].removesuffix(" -fb") == name]
    if len(found) > 1:
        raise RefusedError(f"RunPod has {len(found)} {kind} named {name}: delete or rename all but one.")
    return found[0] if found else {}


def put(client: httpx2.Client, path: str, body: dict[str, Any], there: Mapping[str, Any]) -> str:
    """Update what is there, else create it; returns its id."""
    url = f"{API}/{path}"
    done = ask(client, "PATCH", f"{url}/{there['id']}", body) if there else ask(client, "POST", url, body)
    print(f"{'updated' if there else 'created'} in {path}: {body['name']} ({done['id']})", file=sys.stderr)
    return str(done["id"])


def settle(wanted: Deployment, settings: Settings, spec: ModelSpec, there: Mapping[str, Any]) -> None:
    """Refuse what cannot be made of an endpoint: another kind, or a model that its GPUs do not run."""
    kind = bodies(wanted)[1]["type"]
    if there.get("type", kind) != kind:
        said = {"QUEUE": "a queue", "LOAD_BALANCER": "a load balancer"}
        raise RefusedError(
            f"The endpoint {wanted.name} is {said.get(there['type'], there['type'])}, and RunPod cannot make "
            f"{said[kind]} of it. Delete or rename it in the console, or deploy "
            f"{'without' if wanted.load_balancer else 'with'} --load-balancer. Nothing was changed."
        )
    has, hosts = there.get("gpu") or {}, cuda_build(wanted.cuda).hosts
    if (least := has.get("minCudaVersion", hosts)) < hosts:
        raise RefusedError(
            f"The endpoint {wanted.name} takes hosts from CUDA {least} on, and this image needs {hosts}: raise it in "
            "the console, or build the image with CUDA=cu126. Nothing was changed."
        )
    rented = [gpu for pool in has.get("pools", []) for gpu in POOLS.get(pool, [])]
    rented = [gpu for gpu in rented if gpu not in has.get("excludedTypes", [])]
    if rented and not wanted.gpus_asked:
        try:
            choose_gpus(settings, spec, "runpod", rented, cuda_build(wanted.cuda))
        except errors.KindlingError as error:
            raise RefusedError(f"{error.message} The endpoint has it: choose others with --gpu.") from None


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


def count(least: int, most: int, word: str) -> int:
    """An option's number."""
    if not re.fullmatch("[0-9]{1,4}", word) or not least <= int(word) <= most:
        raise argparse.ArgumentTypeError(f"should be {least} to {most}, not {word[:20]!r}")
    return int(word)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="runpod_deploy.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=[*MODELS, *MODES], metavar="MODEL", help="a model id or a mode")
    parser.add_argument("--image", required=True, help="the Dockerfile's image, where RunPod can pull it")
    parser.add_argument(
        "--gpu", action="append", default=[], help="RunPod's GPU id; repeat for more (default: cheapest)"
    )
    parser.add_argument("--volume", default="", help="id of the network volume that holds the model")
    parser.add_argument("--load-balancer", action="store_true", help="serve HTTP without RunPod's queue")
    parser.add_argument("--open", action="store_true", help="with --load-balancer: RunPod's key is enough")
    for option, (name, least, most, promise) in COUNTS.items():
        what = f"{promise} (new endpoints: {WORKERS[name]})"
        parser.add_argument(option, dest=name, type=partial(count, least, most), metavar="N", help=what)
    parser.add_argument("--data-center", action="append", default=[], help="where to run, as EU-RO-1; repeat for more")
    parser.add_argument("--flashboot", choices=FLASHBOOT, default="", help="RunPod's faster starts (new endpoints: on)")
    parser.add_argument("--dry-run", action="store_true", help="print the requests as JSON; needs no key")
    return parser.parse_args(arguments)


def planned(args: argparse.Namespace, spec: ModelSpec, environ: Mapping[str, str]) -> tuple[Deployment, Settings]:
    """The deployment that the command line and the environment ask for, and what its workers are set to."""
    if not args.volume and not spec.embedded:
        print(f"{spec.id}: without --volume, choose it as the endpoint's cached model in the console.", file=sys.stderr)
    env = environment(args, environ, volume=bool(args.volume) or not spec.embedded)
    settings = Settings.from_env(env)
    workers = {name: count for name in WORKERS if (count := vars(args)[name]) is not None}
    if workers.get("min", 0) > workers.get("max", math.inf):
        raise RefusedError(f"--workers-min {workers['min']} is more than --workers-max {workers['max']}.")
    return Deployment(
        name=f"kindling-{args.model}",
        image=args.image,
        gpus=gpus_for(settings, spec, args.gpu, cuda := environ.get("CUDA", "")),
        gpus_asked=bool(args.gpu),
        env=env,
        volume=args.volume,
        load_balancer=args.load_balancer,
        workers=workers,
        data_centers=tuple(args.data_center),
        flashboot=args.flashboot,
        timeout_ms=max(TIMEOUT_MS, math.ceil(1000 * settings.deadline_s)),
        cuda=cuda,
    ), settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args, api_key = parse(arguments), os.environ.get("RUNPOD_API_KEY", "")
    spec = MODELS[MODES[args.model].model if args.model in MODES else args.model]
    try:
        wanted, settings = planned(args, spec, os.environ)
        if args.dry_run:
            print(json.dumps(requests(wanted), indent=2))
            return 0
        if not api_key:
            raise RefusedError("Set RUNPOD_API_KEY; RunPod's console makes one under Settings, API Keys.")
        endpoint = deploy(wanted, api_key, lambda there: settle(wanted, settings, spec, there))
    except (RefusedError, errors.KindlingError) as error:
        print(f"runpod_deploy: {error}", file=sys.stderr)
        return 1
    host = f"https://{endpoint}.api.runpod.ai" if wanted.load_balancer else f"https://api.runpod.ai/v2/{endpoint}"
    print(host)
    return 0


if __name__ == "__main__":
    sys.exit(main())
