"""What shall run on RunPod, as a value; in the words of its REST API; and what of it an endpoint that is there is told.

`bodies` says it as a new template and a new endpoint, `changes` what an endpoint that is there already is told: what
was asked for, and the rest stays as it was set in the console.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from handler import GPUS, ModelSpec, Settings, choose_gpus, cuda_build, errors
from runpod_api import RefusedError

# Idle for about a cold start: to wait as long as one costs is at most twice the best one could do.
WORKERS = {"min": 0, "max": 3, "idleTimeout": 60}
WORKER = ("python", "-u", "platform/runpod_worker.py")
SERVER = ("python", "-m", "handler", "serve", "--host", "0.0.0.0", "--port", "8000")  # noqa: S104
SERVER_ENV = {"PORT": "8000", "PORT_HEALTH": "8001"}
FLASHBOOT = {"off": "OFF", "on": "FLASHBOOT", "priority": "PRIORITY_FLASHBOOT"}
TIMEOUT_MS = 600_000  # of a job, at least
KINDS = {"QUEUE": "a queue", "LOAD_BALANCER": "a load balancer"}

RENTALS = [gpu.rentals["runpod"] for gpu in GPUS.values() if "runpod" in gpu.rentals]  # the cheapest first
POOLS = {one.pool: [name for row in RENTALS if row.pool == one.pool for name in row.names] for one in RENTALS}


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
        return [f"{port}/http" for port in SERVER_ENV.values()] if self.load_balancer else []

    @property
    def min_cuda(self) -> str:
        """What a host's driver should be able to run at least."""
        return cuda_build(self.cuda).hosts

    @property
    def kind(self) -> str:
        """RunPod's word for how requests reach the workers."""
        return "LOAD_BALANCER" if self.load_balancer else "QUEUE"


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
        "type": wanted.kind,
        "gpu": {
            "pools": pools,
            "excludedTypes": [gpu for pool in pools for gpu in POOLS[pool] if gpu not in wanted.gpus],
            "count": 1,
            "minCudaVersion": wanted.min_cuda,
        },
        "workers": {**WORKERS, **counts(wanted.workers, WORKERS)},
        "scaling": by_count if wanted.load_balancer else by_queue,
        "flashboot": FLASHBOOT[wanted.flashboot or "on"],
        "timeout": wanted.timeout_ms,
        **({"networkVolumes": [wanted.volume]} if wanted.volume else {}),
        **({"dataCenterIds": [*wanted.data_centers]} if wanted.data_centers else {}),
    }
    return template, endpoint


def counts(asked: Mapping[str, int], there: Mapping[str, int]) -> dict[str, int]:
    """The numbers of workers to send: those asked for, and a larger maximum where the minimum would be above it."""
    least = asked.get("min", there.get("min", 0))
    if asked.get("max", least) < least:
        raise RefusedError(
            f"--workers-max {asked['max']} is less than the {least} workers that always run: set --workers-min too."
        )
    more = {"max": least} if "max" not in asked and least > there.get("max", least) else {}
    return {**asked, **more}


def raised(wanted: Deployment, endpoint: Mapping[str, Any]) -> str:
    """A sentence where more workers may run than was asked for, since as many always do."""
    least, most = wanted.workers.get("min", 0), endpoint.get("workers", {}).get("max")
    if "max" in wanted.workers or most != least or not least:
        return ""
    return f"--workers-min {least} is more than the endpoint's maximum, which becomes {least} too."


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
        told["workers"] = counts(wanted.workers, there.get("workers") or {})
    if wanted.gpus_asked:
        told["gpu"] = {name: whole["gpu"][name] for name in ("pools", "excludedTypes")}
    gpu = there.get("gpu") or {}
    if gpu and not gpu.get("minCudaVersion") and not gpu.get("allowedCudaVersions"):  # else any host would do
        kept_gpu = {name: gpu[name] for name in ("pools", "excludedTypes") if name in gpu}
        told["gpu"] = {**kept_gpu, **told.get("gpu", {}), "minCudaVersion": wanted.min_cuda}
    has: dict[str, str] = there.get("env") or {}
    if kept := {name: value for name, value in has.items() if last.get(name) != value and name not in wanted.env}:
        told["env"] = kept  # beside the template's; what neither has is removed
    return told


def settle(wanted: Deployment, settings: Settings, spec: ModelSpec, there: Mapping[str, Any]) -> None:
    """Refuse what cannot be made of an endpoint: another kind, or a model that its GPUs do not run."""
    if there.get("type", wanted.kind) != wanted.kind:
        raise RefusedError(
            f"The endpoint {wanted.name} is {KINDS.get(there['type'], there['type'])}, and RunPod cannot make "
            f"{KINDS[wanted.kind]} of it. Delete or rename it in the console, or deploy "
            f"{'without' if wanted.load_balancer else 'with'} --load-balancer. Nothing was changed."
        )
    gpu = there.get("gpu") or {}
    least = min([gpu.get("minCudaVersion") or wanted.min_cuda, *(gpu.get("allowedCudaVersions") or [])], key=_numbers)
    if _numbers(least) < _numbers(wanted.min_cuda):
        raise RefusedError(
            f"The endpoint {wanted.name} takes hosts from CUDA {least} on, and this image needs {wanted.min_cuda}: "
            "raise it in the console, or build the image with CUDA=cu126. Nothing was changed."
        )
    if (has := rented(there)) and not wanted.gpus_asked:
        try:
            choose_gpus(settings, spec, "runpod", has, cuda_build(wanted.cuda))
        except errors.KindlingError as error:
            raise RefusedError(f"{error.message} The endpoint has it: choose others with --gpu.") from None


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def rented(there: Mapping[str, Any]) -> list[str]:
    """The GPUs that an endpoint may get, in order of price; none of what is not there."""
    has = there.get("gpu") or {}
    excluded = has.get("excludedTypes", [])
    return [gpu for pool in has.get("pools", []) for gpu in POOLS.get(pool, []) if gpu not in excluded]
