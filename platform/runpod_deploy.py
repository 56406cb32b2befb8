"""Deploy to RunPod: `RUNPOD_API_KEY=... python platform/runpod_deploy.py flux-schnell --image NAME --volume NAME`.

Finds or creates the network volume, fills it where asked to, and creates or updates, by name, one template and one
serverless endpoint. `runpod_environment.py` has the workers' variables, `runpod_endpoint.py` what shall run,
`runpod_volume.py` the volume, `runpod_fill.py` the pod that fills it, `runpod_lease.py` that pod's end, `runpod_pod.py`
what it runs; `runpod_api.py` asks RunPod.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import httpx2

from handler import MODELS, MODES, ModelSpec, Settings, choose_gpus, cuda_build, errors
from runpod_api import API, RefusedError, connected, named, put
from runpod_endpoint import (
    FLASHBOOT,
    TIMEOUT_MS,
    WORKERS,
    Deployment,
    bodies,
    changes,
    raised,
    rented,
    settle,
)
from runpod_environment import SERVING, check_secret, environment, seen
from runpod_fill import PREFIX, STEPS, Filling, fill
from runpod_volume import SIZES_GB, Place, created, found, price

COUNTS = {  # options, RunPod's names of what they set, from where to where, and what it is
    "--workers-min": ("min", 0, 1000, "workers that always run, and are paid for"),
    "--workers-max": ("max", 1, 1000, "workers at most"),
    "--idle": ("idleTimeout", 1, 3600, "seconds that a worker waits for its next job"),
}
MOST_POOLS = 3  # RunPod ranks no more


@dataclass(frozen=True, slots=True)
class Plan:
    """What the command line and the environment ask for."""

    wanted: Deployment
    settings: Settings
    spec: ModelSpec
    place: Place | None  # of the network volume, if there is to be one
    filling: Filling | None  # what is done to it first, if anything
    baked_gb: float = 0  # of rounded weights that this may write


def baked_gb(settings: Settings, spec: ModelSpec, asked: Sequence[str], cuda: str) -> float:
    """What baking may write on the GPUs that are chosen, in GB."""
    offers = choose_gpus(settings, spec, "runpod", asked, cuda_build(cuda))
    return max(offer.outlook.baked for offer in offers) / 1e9


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


def filling_of(wanted: Deployment, spec: ModelSpec, upto: str, token: str) -> Filling:
    """What a pod does to the volume: the workers' settings hold there, but it gets none of their keys."""
    if spec.license.gated and not token:
        raise RefusedError(
            f"Only who has accepted its licence at https://huggingface.co/{spec.repository} may fetch {spec.id}: keep "
            "that account's token as a secret in RunPod's console, and set HF_TOKEN='{{ RUNPOD_SECRET_name }}' here."
        )
    check_secret("HF_TOKEN", token)
    env = {name: value for name, value in Settings.named(wanted.env).items() if name not in SERVING}
    return Filling(
        volume=wanted.volume,
        data_center=wanted.data_centers[0] if wanted.data_centers else "<the volume's>",
        image=wanted.image,
        gpus=wanted.gpus,
        env={**env, "HF_TOKEN": token} if token else env,
        upto=upto,
        min_cuda=wanted.min_cuda,
        disk_gb=wanted.disk_gb,
    )


def requests(plan: Plan) -> list[dict[str, Any]]:
    """What would be sent where nothing exists yet."""
    template, endpoint = bodies(plan.wanted)
    endpoint["templateId"] = "<the template's id>"
    paths = [("templates", template), ("serverless", endpoint)]
    if plan.filling:
        paths.insert(
            0, ("pods", plan.filling.body(f"{PREFIX}-{plan.filling.volume}-<some letters>", plan.wanted.gpus[0]))
        )
    if plan.place and plan.place.ordered:
        paths.insert(0, ("network-volumes", plan.place.body))
    return [{"method": "POST", "url": f"{API}/{path}", "json": body} for path, body in paths]


def deploy(plan: Plan, key: str) -> str:
    """Create or update the volume, the template, then the endpoint; returns the endpoint's id.

    What is there is looked at first, so that what cannot be is refused before anything is changed.
    """
    wanted = plan.wanted
    with connected(key) as client:
        there = named(client, "serverless", "endpoints", wanted.name)
        known = named(client, "templates", "templates", wanted.name)
        volume = found(client, plan.place, plan.spec, plan.baked_gb) if plan.place else {}
        template, endpoint = bodies(wanted)
        if there:
            settle(wanted, plan.settings, plan.spec, there)
            endpoint = changes(wanted, there, known.get("env") or {})
        if more := raised(wanted, endpoint):
            print(more, file=sys.stderr)
        if plan.place:
            endpoint["networkVolumes"] = [stored(client, plan, volume, there)]
        endpoint["templateId"] = put(client, "templates", template, known)
        return put(client, "serverless", endpoint, there)


def stored(client: httpx2.Client, plan: Plan, volume: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    """The id of the volume, which is created and filled where that is asked for."""
    assert plan.place
    if volume:
        print(f"{volume['name']} ({volume['id']}) in {volume['dataCenter']}: {price(volume['size'])}.", file=sys.stderr)
    volume = volume or created(client, plan.place)
    if plan.filling:
        gpus = plan.wanted.gpus if plan.wanted.gpus_asked else tuple(rented(there)) or plan.wanted.gpus
        place = {"volume": volume["id"], "data_center": volume["dataCenter"], "gpus": gpus}
        fill(client, replace(plan.filling, **place))
    return str(volume["id"])


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
    parser.add_argument("--volume", default="", help="name or id of the network volume that holds the model")
    size = partial(count, *SIZES_GB)
    parser.add_argument("--size", type=size, metavar="GB", help="create the volume, in --data-center, if there is none")
    upto = ", ".join(f"{name} ({' and '.join(steps)})" for name, (steps, _) in STEPS.items() if name)
    parser.add_argument(
        "--fill",
        nargs="?",
        const="bake",
        choices=[*filter(None, STEPS)],
        help=f"fill the volume first, on a pod that is rented for it: {upto} (default: bake)",
    )
    parser.add_argument("--load-balancer", action="store_true", help="serve HTTP without RunPod's queue")
    parser.add_argument("--open", action="store_true", help="with --load-balancer: RunPod's key is enough")
    for option, (name, least, most, promise) in COUNTS.items():
        what = f"{promise} (new endpoints: {WORKERS[name]})"
        parser.add_argument(option, dest=name, type=partial(count, least, most), metavar="N", help=what)
    parser.add_argument("--data-center", action="append", default=[], help="where to run, as EU-RO-1; repeat for more")
    parser.add_argument("--flashboot", choices=FLASHBOOT, default="", help="RunPod's faster starts (new endpoints: on)")
    parser.add_argument("--dry-run", action="store_true", help="print the requests as JSON; needs no key")
    return parser.parse_args(arguments)


def planned(args: argparse.Namespace, environ: Mapping[str, str]) -> Plan:
    """What the command line and the environment ask for."""
    spec = MODELS[MODES[args.model].model if args.model in MODES else args.model]
    if (args.fill or args.size) and not args.volume:
        raise RefusedError("--size and --fill are for a network volume: name it with --volume.")
    if not args.volume and not spec.embedded:
        print(f"{spec.id}: without --volume, choose it as the endpoint's cached model in the console.", file=sys.stderr)
    env = environment(args, environ, volume=bool(args.volume) or not spec.embedded)
    settings = seen(env)
    wanted = Deployment(
        name=f"kindling-{args.model}",
        image=args.image,
        gpus=gpus_for(settings, spec, args.gpu, cuda := environ.get("CUDA", "")),
        gpus_asked=bool(args.gpu),
        env=env,
        volume=args.volume,
        load_balancer=args.load_balancer,
        workers={name: count for name in WORKERS if (count := vars(args)[name]) is not None},
        data_centers=tuple(args.data_center),
        flashboot=args.flashboot,
        timeout_ms=max(TIMEOUT_MS, math.ceil(1000 * settings.deadline_s)),
        cuda=cuda,
    )
    place = Place(args.volume, args.size, wanted.data_centers) if args.volume else None
    filling = filling_of(wanted, spec, args.fill, environ.get("HF_TOKEN", "")) if args.fill else None
    bakes = args.fill and "bake" in STEPS[args.fill][0]
    return Plan(wanted, settings, spec, place, filling, baked_gb(settings, spec, args.gpu, cuda) if bakes else 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args, api_key = parse(arguments), os.environ.get("RUNPOD_API_KEY", "")
    try:
        plan = planned(args, os.environ)
        if args.dry_run:
            print(json.dumps(requests(plan), indent=2))
            if plan.place and plan.place.size_gb:
                print(f"The volume, if it is created: {price(plan.place.size_gb)}.", file=sys.stderr)
            return 0
        if not api_key:
            raise RefusedError("Set RUNPOD_API_KEY; RunPod's console makes one under Settings, API Keys.")
        if not re.fullmatch("[!-~]+", api_key):
            raise RefusedError("RUNPOD_API_KEY has something in it that no key has, such as a space or a line's end.")
        endpoint = deploy(plan, api_key)
    except (RefusedError, errors.KindlingError) as error:
        print(f"runpod_deploy: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("runpod_deploy: stopped.", file=sys.stderr)
        return 130
    host = f"https://{endpoint}.api.runpod.ai" if args.load_balancer else f"https://api.runpod.ai/v2/{endpoint}"
    print(host)
    return 0


if __name__ == "__main__":
    sys.exit(main())
