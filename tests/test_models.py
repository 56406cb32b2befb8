"""Choosing a model: what fits, what is on the volume, and refusals that name what would work."""

import json
from pathlib import Path

import pytest
from conftest import PATIENT

import tiny
from handler import MODELS, Settings, Worker
from handler.__main__ import main
from handler.errors import DoesNotFit
from handler.fit import fit, largest_below, nearest, require
from handler.hardware import Hardware, detect

SCHNELL = MODELS["flux-schnell"]


def gpu(memory_gb: float, precision: str = "bf16") -> Hardware:
    return Hardware("cuda", "a GPU", precision, "", memory_gb)


def test_the_arithmetic_is_told() -> None:
    found = fit(SCHNELL, gpu(80))
    assert found.fits
    assert found.needs_gb == pytest.approx(2 * (12 + 4.97) + 3)
    assert found.reason == "17B parameters x 2 bytes + 3 GB to work = 36.9 GB, of 80.0 GB on the a GPU"
    assert not fit(SCHNELL, gpu(24)).fits
    assert not fit(SCHNELL, gpu(48, "fp32")).fits


def test_the_files_that_are_there_say_more_than_the_catalogue() -> None:
    small = fit(SCHNELL, gpu(24), stored_gb=10)
    assert small.fits
    assert small.reason.startswith("10 GB of weights + 3 GB")
    assert fit(SCHNELL, gpu(80), stored_gb=70).needs_gb == fit(SCHNELL, gpu(80)).needs_gb


@pytest.mark.parametrize(("memory_gb", "best"), [(24, "z-image-turbo"), (12, "sdxl"), (2, "spark"), (141, "flux2-dev")])
def test_the_nearest_that_fits(memory_gb: float, best: str) -> None:
    assert nearest(gpu(memory_gb)) == f"The largest that fits is {best}."


def test_the_largest_that_fits_a_disk() -> None:
    assert largest_below(30) == "The largest that fits there is chroma (27.5 GB)."
    assert largest_below(1) == "The largest that fits there is spark (0.0076 GB)."


def test_nothing_fits() -> None:
    with pytest.raises(DoesNotFit, match=r"spark does not fit at bf16: .* No model of the catalogue fits\."):
        require(MODELS["spark"], gpu(0.5), 0.01)


def test_a_worker_refuses_before_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write(SCHNELL, tmp_path)
    monkeypatch.setattr("handler.hardware.host_memory", lambda: 2_000_000_000)
    with pytest.raises(DoesNotFit, match=r"flux-schnell does not fit at fp32: .*The largest that fits is spark\."):
        Worker.boot(PATIENT.model_copy(update={"model": SCHNELL.id, "volume": tmp_path}))


def test_memory_is_the_machines_or_the_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("handler.hardware.CGROUP_LIMIT", limit)
    machine = detect(Settings()).memory_gb
    assert machine > 1
    limit.write_text("max\n")
    assert detect(Settings()).memory_gb == machine
    limit.write_text("1500000000\n")
    assert detect(Settings()).memory_gb == 1.5


def test_models_shows_each_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write(SCHNELL, tmp_path)
    monkeypatch.setenv("KINDLING_VOLUME", str(tmp_path))
    assert main(["models"]) == 0
    said = capsys.readouterr().out
    for spec in MODELS.values():
        assert spec.id in said
        assert spec.license.obligation in said
    assert "ships with Kindling" in said
    assert main(["models", "--json"]) == 0
    found = {model["id"]: model for model in json.loads(capsys.readouterr().out)["models"]}
    assert found["flux-schnell"]["state"]["fetched"]
    assert found["flux-schnell"]["state"]["baked"] == "MISS"
    assert not found["flux-dev"]["state"]["fetched"]
    assert found["sdxl-lightning"]["base"]["id"] == "sdxl"
    assert "GB to work" in found["flux-dev"]["state"]["fit"]["reason"]
