"""The variables of RunPod's workers, from those of who deploys: no key among them stands there readable.

They are Kindling's settings and what CARRIED names; KINDLING_VOLUME and KINDLING_MODEL are what the command line says.
What the first worker would refuse is refused here.
"""

import argparse
import math
import re
from collections.abc import Mapping

from handler import Settings
from runpod_api import RefusedError
from runpod_endpoint import SERVER_ENV
from runpod_fill import MOUNT

INIT_TIMEOUT_S = 600  # RunPod's patience with the image and us, at least
IMAGE_S = 360  # of it, for the image: our own budget ends before, and says where it went
SECRET = re.compile(r"\{\{ RUNPOD_SECRET_\w+ \}\}")
SHAPED = ("KINDLING_WEBHOOK_SECRET",)  # whose values are looked at: RunPod's word for a secret is none of them
# What fills a volume does without.
SERVING = ("KINDLING_API_KEYS", "KINDLING_ADMIN_KEYS", *SHAPED, "BUCKET_SECRET_ACCESS_KEY", "HF_TOKEN")
SECRETS = (*SERVING, "KINDLING_VOLUME_KEY")
CARRIED = (
    "BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY", "MAX_CONCURRENCY", "STREAM",
    "REFRESH_WORKER", "RUNPOD_LOG_LEVEL",
)  # fmt: skip


def environment(args: argparse.Namespace, environ: Mapping[str, str], volume: bool) -> dict[str, str]:
    """The workers' variables: the deployer's settings, checked here rather than in the first worker."""
    mine = {name: value for name in CARRIED if (value := environ.get(name))}
    mine |= {name: value for name, value in Settings.named(environ).items() if name != "KINDLING_VOLUME"}
    env = {"KINDLING_DEVICE": "cuda", **mine, "KINDLING_MODEL": args.model}  # never the CPU of a rented GPU
    env |= SERVER_ENV if args.load_balancer else {}
    env |= {"KINDLING_ALLOW_OPEN": "true"} if args.open else {}
    env |= {"KINDLING_VOLUME": MOUNT} if volume else {}
    for name in SECRETS:
        check_secret(name, env.get(name, ""))
    settings = seen(env)
    check_jobs(env, settings.queue)
    check_gate(args, settings)
    patience = max(INIT_TIMEOUT_S, math.ceil(settings.cold_start_budget_s + IMAGE_S))
    return {**env, "RUNPOD_INIT_TIMEOUT": str(patience)}


def seen(env: Mapping[str, str]) -> Settings:
    """The settings, but for secrets that only a worker sees."""
    return Settings.from_env({name: value for name, value in env.items() if name not in SHAPED})


def check_secret(name: str, value: str) -> None:
    """Refuse what everybody could read who may look at the account's templates and pods."""
    if value and not SECRET.fullmatch(value):
        raise RefusedError(
            f"{name} would stand readable in RunPod's template or pod: keep it as a secret in RunPod's console and set "
            f"{name}='{{{{ RUNPOD_SECRET_name }}}}' here."
        )


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
