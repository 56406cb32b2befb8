"""Fetch a model, and what KINDLING_VAE and KINDLING_WEIGHTS name, from the hub to the volume: each file is checked.

Whole files stay when a fetch is interrupted. The manifest comes last, so a worker never starts on half a model.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from handler.catalog.models import find
from handler.cli.models import listed
from handler.core.settings import Settings
from handler.model.hardware import detect, sees_gpu
from handler.volume.download import fetch, fetch_file, fetch_vae
from handler.worker.memory import nearest
from handler.worker.outlook import outlook


def run(options: argparse.Namespace) -> int:
    """Fetch and report; the exit code."""
    settings = Settings.from_env(model=options.model, weights=options.weights)
    spec = find(settings.model)
    if not spec.license.commercial:
        print(f"kindling: {spec.id} is under the {spec.license.name}. {spec.license.obligation}", file=sys.stderr)
    seen = outlook(settings, spec, detect(settings)) if sees_gpu() else None
    if seen and not (found := listed(seen)).fits:
        advice = nearest(seen.hardware, seen.host_gb)
        print(f"kindling: {spec.id} does not fit this machine: {found.reason}. {advice}", file=sys.stderr)
    named = settings.vae and not Path(settings.vae).is_absolute()
    vae = fetch_vae(settings.vae, settings.volume, quiet=options.json) if named else None  # first: it is the small one
    pinned = [name for name in settings.weights if "@" in name and not Path(name).is_absolute()]
    files = [fetch_file(name, settings.volume, quiet=options.json) for name in pinned]
    fetched = fetch(spec, settings.volume, quiet=options.json)
    if options.json:
        beside = {"vae": asdict(vae) if vae else None, "weights": [asdict(file) for file in files]}
        print(json.dumps({**asdict(fetched), **beside}, default=str))
        return 0
    for each in [*([vae] if vae else []), *files]:
        print(each)
    print(f"{spec.id} ships with Kindling: there is nothing to fetch." if spec.embedded else fetched)
    return 0
