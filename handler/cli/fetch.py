"""Fetch a model, and the VAE, LoRAs and weights that are set, from the hub to the volume: each file is checked.

Whole files stay when a fetch is interrupted. The manifest comes last, so a worker never starts on half a model.
"""

import argparse
import json
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from handler.catalog.models import find
from handler.catalog.spec import ModelSpec
from handler.cli.models import listed
from handler.core.errors import DeviceMissing
from handler.core.loras import pin
from handler.core.settings import Settings
from handler.model.hardware import detect, sees_gpu
from handler.volume.download import fetch, fetch_lora, fetch_vae, fetch_weights
from handler.volume.given import is_pinned
from handler.volume.room import require_folder
from handler.worker.memory import nearest
from handler.worker.outlook import outlook


def run(options: argparse.Namespace) -> int:
    """Fetch and report; the exit code."""
    settings = Settings.from_env(model=options.model, weights=options.weights)
    spec = find(settings.model)
    require_folder(settings.volume)
    if not spec.license.commercial:
        print(f"kindling: {spec.id} is under the {spec.license.name}. {spec.license.obligation}", file=sys.stderr)
    if misfit := _misfit(settings, spec):
        print(f"kindling: {spec.id} does not fit this machine: {misfit}", file=sys.stderr)
    named = settings.vae and not Path(settings.vae).is_absolute()
    vae = fetch_vae(settings.vae, settings.volume, quiet=options.json) if named else None  # first: it is the small one
    loras = [fetch_lora(pin(text), settings.volume, quiet=options.json) for text in settings.loras]
    pinned = [name for name in settings.weights if is_pinned(name)]
    files = [fetch_weights(name, settings.volume, spec.variant, quiet=options.json) for name in pinned]
    fetched = fetch(spec, settings.volume, quiet=options.json)
    if options.json:
        several = {"loras": [asdict(lora) for lora in loras], "weights": [asdict(file) for file in files]}
        print(json.dumps({**asdict(fetched), "vae": asdict(vae) if vae else None, **several}, default=str))
        return 0
    for other in [*([vae] if vae else []), *loras, *files]:
        print(other)
    if not spec.revision:
        print(f"{spec.id} is at {fetched.revision}: what main was when this volume first asked, and for it stays.")
    print(f"{spec.id} ships with Kindling: there is nothing to fetch." if spec.embedded else fetched)
    return 0


def _misfit(settings: Settings, spec: ModelSpec) -> str:
    """Why it does not fit the GPU here; nothing where torch sees none, for there models are only fetched."""
    with suppress(DeviceMissing):
        if sees_gpu() and (hardware := detect(settings)).device == "cuda":
            seen = outlook(settings, spec, hardware)
            if not (found := listed(seen)).fits:
                return f"{found.reason}. {nearest(seen.hardware, seen.host_gb)}"
    return ""
