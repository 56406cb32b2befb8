"""The golden volume: what others left is read to the same values for ever, and written byte for byte as they did."""

import json
from dataclasses import asdict, astuple
from pathlib import Path

import golden
import pytest
from golden import CODE, ELSEWHERE, GOLDEN, H200, HERE, LARGE, NOON, REVISION, SCHNELL, SPARK, VAE

from handler import Settings
from handler.cli.optimize.journal import Journal
from handler.core.birth import Birth
from handler.core.untrusted import load, shaped
from handler.engine.spend import Meter
from handler.model.compiling import artifacts
from handler.model.compiling.failures import Record
from handler.model.hardware import Hardware
from handler.volume import receipts
from handler.volume.autoencoder import vae_source
from handler.volume.listing import INDEX
from handler.volume.manifest import CHUNK, MANIFEST, read_manifest, summarize
from handler.volume.publishing import whole
from handler.volume.reader import Reader
from handler.volume.receipts import Candidate
from handler.volume.sources import baked_sources, model_source, served_source, weight_facts
from handler.worker.boots import last_boots
from handler.worker.durations import Durations
from handler.worker.footprint import weigh

MODEL = f"models/flux-schnell/{REVISION}"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
KEY = "5a7c8a8ccf7261e1"


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    return golden.copy(tmp_path / "volume")


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_todays_writers_write_it_so(tmp_path: Path, volume: Path) -> None:
    """Names and bytes: what they write, workers of other versions on the same volume read."""
    golden.write(tmp_path / "new")
    new, old = files(tmp_path / "new"), files(volume)
    assert sorted(new) == sorted(old)
    assert [name for name in new if new[name] != old[name]] == []
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 16 << 10


def test_a_model_is_read_with_its_checksums(volume: Path) -> None:
    source = model_source(SCHNELL, volume)
    assert source.folder == volume / MODEL
    assert source.manifest
    assert source.manifest.facts == {
        "model": "flux-schnell",
        "repository": "black-forest-labs/FLUX.1-schnell",
        "revision": REVISION,
    }
    assert list(source.manifest.files) == [INDEX, "transformer/config.json", WEIGHTS]
    large = source.manifest.files[WEIGHTS]
    assert (large.size, large.crc32) == (37_748_818, (747742597, 1087245921))
    assert large.sha256 == "ad858d07c9491866d7e882d6cf199d37b09cb22c476f4bed4c218f273bc104ba"
    assert summarize(volume / LARGE) == large
    with Reader(source) as reader:
        [file] = reader.files("transformer")
        assert [stop - start for start, stop in file.chunks] == [32 << 20, 37_748_818 - (32 << 20)]
        for start, _ in file.chunks:
            reader.wait(file, start)
    assert weigh(SCHNELL, Hardware("cuda", H200, "bf16", ""), source).stored == 4 * golden.FLOATS


def test_names_and_formats_are_these() -> None:
    """Where other versions and machines look. Whoever changes one of these leaves every volume behind."""
    assert (CHUNK, MANIFEST, INDEX) == (32 << 20, "manifest.json", "model_index.json")
    assert (artifacts.PACKAGE, receipts.CURRENT) == ("blocks.pt2", "current.json")
    assert artifacts.key(CODE) == KEY
    assert set(json.loads((GOLDEN / MODEL / MANIFEST).read_text())["files"][INDEX]) == {"size", "sha256", "crc32"}


def test_what_is_hidden_is_not_whole_and_never_served(volume: Path) -> None:
    baked = volume / "baked"
    assert [source.folder for source in baked_sources(SPARK, volume)] == [baked / "spark" / KEY]
    found = artifacts.find(CODE, baked_sources(SPARK, volume))
    assert (found.outcome, found.reason) == ("HIT", f"{KEY} was compiled for exactly this")
    assert whole(baked / "spark" / KEY, CODE)
    assert not whole(baked / "spark" / "0badc0de", CODE)
    served = served_source(SCHNELL, volume, "bf16")
    assert (served.folder, served.precision) == (baked / "flux-schnell" / "bf16-741f7c3c", "bf16")
    assert served.manifest
    assert served.manifest.facts == weight_facts(SCHNELL, "bf16")
    assert list(served.manifest.files) == [INDEX]  # no half-written file
    assert read_manifest(baked / "spark" / "0badc0de") is None


def test_receipts_and_sweeps(volume: Path) -> None:
    place = receipts.folder(volume, "spark", H200)
    assert place == receipts.folder(volume, "spark", None) == volume / "receipts/spark/nvidia-h200"
    assert receipts.numbers(place) == [1, 2, 3]
    assert [one.number for one in receipts.listed(place)] == [1, 2]  # the writer of the third died
    found = receipts.current(volume, "spark", H200)
    assert found
    assert (found.number, found.winner, found.format) == (2, Candidate("fp8", True), 1)
    assert found.told == "receipt 2: fp8+compile won by latency on NVIDIA H200, 2025-11-21"
    assert astuple(found.figures) == (24, 0.25, 0.3, 4.0, 20.0, 15.0, 60.0, {}, None, None, 0.0002)
    assert [(one.candidate.name, one.status) for one in found.outcomes] == [
        ("bf16", "measured"),
        ("fp8+compile", "measured"),
        ("nvfp4", "skipped"),
    ]
    assert receipts.rollback(place).number == 1
    assert receipts.current_number(place) == 1
    known = Journal(volume / "sweeps/spark/nvidia-h200", {"revision": SPARK.revision}).known(Candidate("bf16", False))
    assert known == found.outcomes[0]


def test_boots_and_how_compiling_failed(volume: Path) -> None:
    found = last_boots(volume, 9)
    assert [boot["boot"] for boot in found] == [HERE, ELSEWHERE]  # the newest first, and none half written
    assert [(boot["outcome"], boot["phase"]) for boot in found] == [("starting", "warm"), ("failed", "weights")]
    assert Durations.on(volume).longest("compile", "spark", H200, "bf16", 90.0) == 31.5
    for kind, reason in (("failed", "no compiler"), ("lost", "compiled code lost the GPU")):
        record = shaped(Record, load(volume / f"baked/spark/{KEY}.{kind}.json"))
        assert asdict(record) == {"reason": reason, "when": "2025-11-21 12:00 UTC", "facts": CODE}


def test_spend_and_autoencoders(volume: Path) -> None:
    birth = Birth(0.0, "2025-11-21T12-30-00-third-0000000000000000", clock=lambda: 1800.0)
    meter = Meter(Settings(volume=volume, gpu_price=2.5, platform="other"), lambda: H200, birth, lambda: NOON)
    meter.tick()
    assert meter.state()["dollars_this_month"] == pytest.approx(2 * 2.5 + 1.25)
    assert meter.state()["counted"] == "all workers here"
    source = vae_source(VAE, volume)
    assert source.folder == volume / "vae" / "madebyollin--sdxl-vae-fp16-fix" / VAE.split("@")[1]
    assert source.index == {"vae": ["diffusers", "AutoencoderKL"]}
