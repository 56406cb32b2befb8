"""A volume as workers leave it, a few kilobytes in golden/: what today's code must read, for others wrote it before.

    python tests/volume/golden.py   writes it anew, by the product's writers and what dead processes leave half written

Only a change of format that means to leave old volumes behind may do that; `test_golden.py` holds what is read of it,
and that today's writers write it so. `copy` makes it whole: git keeps neither dates nor a file of many zeros.
"""

import json
import os
import shutil
import struct
import sys
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

from handler.catalog.models import MODELS
from handler.cli.optimize.journal import Journal
from handler.core.birth import Birth
from handler.core.settings import Settings
from handler.engine.spend import Meter
from handler.model.compiling.artifacts import PACKAGE, key
from handler.model.compiling.failures import Record
from handler.volume.autoencoder import fetched_vae
from handler.volume.listing import INDEX
from handler.volume.manifest import write_atomically, write_manifest
from handler.volume.publishing import publishing
from handler.volume.receipts import Candidate, Figures, Outcome, Receipt, keep, use
from handler.volume.sources import fetched_folder, weight_facts, weights_folder
from handler.worker.boots import BootLog
from handler.worker.clock import Ledger, Phase

GOLDEN = Path(__file__).parent / "golden"
REVISION = "741f7c3ce8b383c54771c7003378a50191e9efe9"
SCHNELL, SPARK = (replace(MODELS[name], revision=REVISION) for name in ("flux-schnell", "spark"))  # for ever
H200 = "NVIDIA H200"
VAE = "madebyollin/sdxl-vae-fp16-fix@207b116dae70ace3637169f1ddd2434b91b3a8cd"
NOON = datetime(2025, 11, 21, 12, tzinfo=UTC)
FLOATS = 9 << 20  # of the denoiser: 36 MiB, so it has two chunks
LARGE = fetched_folder(SCHNELL, Path()) / "transformer/diffusion_pytorch_model.safetensors"
CODE = {"kind": "code", "model": SPARK.id, "revision": SPARK.revision, "device": H200, "torch": "2.11.0+cu130"}
ELSEWHERE = "2025-11-21T11-59-00-anotherhost-0011223344556677"  # another worker's identity
HERE = "2025-11-21T12-00-00-somehost-8899aabbccddeeff"
COMPILE = Phase("compile", 9.0, 31.5)
BOOTS = (  # identity, ledger, seconds after noon at which it was written last
    (ELSEWHERE, Ledger(model="spark", device=H200, precision="bf16", outcome="failed", phase="weights"), 0),
    (HERE, Ledger(model="spark", device=H200, precision="bf16", phase="warm", phases=[COMPILE]), 60),
)


def write(volume: Path) -> None:
    """The whole of it, its dates and zeros too."""
    _models(volume)
    _baked(volume)
    _receipts(volume)
    _workers(volume)
    for folder in ("boots", "spend/2025-11"):
        (volume / folder / f".{HERE}.json.01234567").write_text('{"half')  # of processes that died while writing
    _date(volume)


def copy(to: Path) -> Path:
    """What is checked in, made whole at `to`."""
    shutil.copytree(GOLDEN, to)
    os.truncate(to / LARGE, len(_header()) + 4 * FLOATS)
    _date(to)
    return to


def _header() -> bytes:
    text = json.dumps({"w": {"dtype": "F32", "shape": [FLOATS], "data_offsets": [0, 4 * FLOATS]}}).encode()
    return struct.pack("<Q", len(text)) + text


def _models(volume: Path) -> None:
    folder = fetched_folder(SCHNELL, volume)
    (folder / "transformer").mkdir(parents=True)
    (folder / INDEX).write_text('{"transformer": ["diffusers", "FluxTransformer2DModel"]}')
    (folder / "transformer/config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    (volume / LARGE).write_bytes(_header())
    os.truncate(volume / LARGE, len(_header()) + 4 * FLOATS)
    write_manifest(folder, {"model": SCHNELL.id, "repository": SCHNELL.repository, "revision": SCHNELL.revision})
    vae = fetched_vae(VAE, volume)
    (vae / "vae").mkdir(parents=True)
    (vae / "vae/config.json").write_text('{"_class_name": "AutoencoderKL"}')
    write_manifest(vae, {"kind": "vae", "repository": VAE.split("@")[0], "revision": VAE.split("@")[1]})


def _baked(volume: Path) -> None:
    with publishing(weights_folder(SCHNELL, volume, "bf16"), weight_facts(SCHNELL, "bf16")) as part:
        (part / INDEX).write_text("{}")
        (part / f".{INDEX}.01234567").write_text('{"half')
    home = volume / "baked" / SPARK.id
    with publishing(home / key(CODE), CODE) as part:
        (part / PACKAGE).write_bytes(b"compiled")
    died = home / f".{key(CODE)}.01234567"  # its publisher, after the manifest and before the move
    died.mkdir()
    (died / PACKAGE).write_bytes(b"compiled too")
    write_manifest(died, CODE)
    (home / "0badc0de").mkdir()  # in a time when folders were filled in their place
    (home / "0badc0de" / PACKAGE).write_bytes(b"half")
    for kind, reason in (("failed", "no compiler"), ("lost", "compiled code lost the GPU")):
        found = Record(reason, "2025-11-21 12:00 UTC", CODE)
        write_atomically(home / f"{key(CODE)}.{kind}.json", json.dumps(asdict(found), indent=1).encode() + b"\n")


def _receipts(volume: Path) -> None:
    outcomes = (
        Outcome(Candidate("bf16", False), "measured", Figures(24, 0.5, 0.6, 2.0, 30.5, 20.0, psnr_db=99.0, ssim=1.0)),
        Outcome(Candidate("fp8", True), "measured", Figures(24, 0.25, 0.3, 4.0, 20.0, 15.0, 60.0, dollars=0.0002)),
        Outcome(Candidate("nvfp4", False), "skipped", reason="no FP4 here"),
    )
    facts = ("best by latency", "latency", {"max_memory": 40.0}, "256x256 in 4 steps", "4 dollars an hour")
    told = (*facts, {"torch": "2.11.0"}, "python -m handler optimize spark", NOON.isoformat())
    for winner in (Candidate("bf16", False), Candidate("fp8", True), Candidate("fp8", True)):
        kept = keep(Receipt(SPARK.id, SPARK.revision, H200, winner, outcomes, *told), volume)
    place = volume / "receipts" / SPARK.id / "nvidia-h200"
    (place / f"{kept.number}.json").write_text('{"half')  # its writer died
    use(place, 2)
    journal = Journal(volume / "sweeps" / SPARK.id / "nvidia-h200", {"revision": SPARK.revision})
    journal.begin(outcomes[0].candidate)
    journal.keep(outcomes[0])


def _workers(volume: Path) -> None:
    for identity, ledger, _ in BOOTS:
        log = BootLog(volume, Birth(0.0, identity))
        log(ledger)  # one that failed waits by itself
        assert ledger.outcome != "starting" or log.flush()
        birth = Birth(0.0, identity, clock=lambda: 3600.0)
        Meter(Settings(volume=volume, gpu_price=2.5, platform="other"), lambda: H200, birth, lambda: NOON).tick()


def _date(volume: Path) -> None:
    for identity, _, seconds in BOOTS:
        when = NOON.timestamp() + seconds
        os.utime(volume / f"boots/{identity}.json", (when, when))


if __name__ == "__main__":
    shutil.rmtree(GOLDEN, ignore_errors=True)
    write(GOLDEN)
    os.truncate(GOLDEN / LARGE, len(_header()))
    print(f"{sum(path.stat().st_size for path in GOLDEN.rglob('*') if path.is_file())} bytes", file=sys.stdout)
