"""Choosing a model: what fits, what is on the volume, and refusals that name what would work."""

import errno
import json
import re
import threading
from pathlib import Path

import pytest
from conftest import PATIENT
from disks import failing

import tiny
from handler import MODELS, Settings, Worker, outlook
from handler.__main__ import main
from handler.catalog.sizes import largest_below
from handler.core.errors import DoesNotFit, WeightsMissing
from handler.core.host import free_memory
from handler.model.hardware import Hardware, detect
from handler.volume import patience
from handler.volume.patience import patiently
from handler.volume.sources import model_source
from handler.worker.footprint import weigh
from handler.worker.memory import MemoryPlan, fit, memory_plan, nearest

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


@pytest.mark.parametrize(
    ("memory_gb", "host_gb", "best"),
    [(24, 12, "z-image-turbo"), (24, 64, "qwen-image"), (12, 8, "sdxl"), (2, 64, "spark"), (141, 64, "flux2-dev")],
)
def test_the_nearest_that_fits(memory_gb: float, host_gb: float, best: str) -> None:
    assert nearest(gpu(memory_gb), host_gb) == f"The largest that fits is {best}."


PLANS = {  # on cards of so many GB, in a machine with 64: what is resident, r; what has its text encoders wait, e; ...
    ("flux-schnell", "bf16"): "8b 12b 16b 24b 48r 80r 141r",
    ("flux-schnell", "fp8"): "8b 12b 16b 24e 48r 80r 141r",
    ("sd3.5-large", "bf16"): "8b 12b 16b 24e 48r 80r 141r",
    ("sdxl-turbo", "bf16"): "8b 12r 16r 24r 48r 80r 141r",
    ("sdxl-turbo", "fp16"): "8b 12r 16r 24r 48r 80r 141r",
    ("sdxl", "int8"): "8r 12r 16r 24r 48r 80r 141r",
    ("z-image-turbo", "bf16"): "8b 12b 16b 24r 48r 80r 141r",
    ("z-image-turbo", "fp8"): "8b 12b 16e 24r 48r 80r 141r",
    ("flux2-dev", "bf16"): "8- 12- 16- 24- 48- 80e 141r",
    ("flux2-dev", "fp8"): "8- 12- 16- 24- 48e 80r 141r",
    ("qwen-image", "bf16"): "8b 12b 16b 24b 48e 80r 141r",
}


@pytest.mark.parametrize(("model", "precision"), PLANS)
def test_what_does_not_fit_waits_in_host_memory(model: str, precision: str) -> None:
    def letter(plan: MemoryPlan) -> str:
        return plan.mode[0] if plan.fits else "-"

    sizes = (8, 12, 16, 24, 48, 80, 141)
    found = (f"{size}{letter(memory_plan(MODELS[model], gpu(size, precision), host_gb=64))}" for size in sizes)
    assert " ".join(found) == PLANS[model, precision]


def test_a_plan_says_what_it_reckons_with() -> None:
    plan = memory_plan(SCHNELL, gpu(24, "fp8"), host_gb=64)
    assert plan.reason == (
        "the text encoders wait in host memory (13.9 GB with the process and what is read, of 64.0 GB): "
        "12.1B parameters x 1.3 bytes + 0.77 GB for parts that come and go + 3 GB to work = 19.5 GB, "
        "of 24.0 GB on the a GPU"
    )
    assert not memory_plan(SCHNELL, gpu(24, "fp8"), host_gb=10).fits


def test_a_host_too_small_to_load_on_is_refused_with_words() -> None:
    """Whatever the precision, and though nothing of the model stays there."""
    assert memory_plan(SCHNELL, gpu(80, "fp8"), host_gb=8).fits
    with pytest.raises(DoesNotFit, match=r"does not fit at fp8: loading takes 3\.7 GB of host memory, of 2\.0 GB: "):
        outlook(Settings(precision="fp8"), SCHNELL, gpu(80, "fp8"), 2).require()


def test_what_fits_to_the_last_byte_fits() -> None:
    """On the GPU and on the host; and one that lacks a little of the host says so of the first that the GPU takes."""
    plan = memory_plan(SCHNELL, gpu(80), host_gb=64)
    assert memory_plan(SCHNELL, gpu(plan.needs_gb), host_gb=64).mode == "resident"
    assert memory_plan(SCHNELL, gpu(plan.needs_gb - 1e-6), host_gb=64).mode != "resident"
    spark = MODELS["spark"]
    host = memory_plan(spark, gpu(80), host_gb=64).host_gb
    exactly, less = (memory_plan(spark, gpu(80), host_gb=gigabytes) for gigabytes in (host, host - 1e-6))
    assert (exactly.fits, less.fits) == (True, False)
    assert ("loading takes" in exactly.reason, "loading takes" in less.reason) == (False, True)
    lacking = memory_plan(SCHNELL, gpu(24, "fp8"), host_gb=10)
    assert (lacking.fits, lacking.mode) == (False, "encoders")


def test_where_there_are_files_their_bytes_are_told() -> None:
    spec = MODELS["spark"]
    source = model_source(spec, Path("unused"))
    held = weigh(spec, gpu(80), source).held / 1e9
    told = f"{held:.3g} GB of weights + 1.1 GB to work = {held + 1.1:.1f} GB, of 80.0 GB on the a GPU"
    assert memory_plan(spec, gpu(80), source).reason == told


def test_the_setting_decides() -> None:
    assert memory_plan(SCHNELL, gpu(80), host_gb=64, offload="blocks").mode == "blocks"
    assert memory_plan(SCHNELL, gpu(80), host_gb=64, offload="encoders").fits
    with pytest.raises(DoesNotFit, match=r"= 36\.9 GB, of 24\.0 GB .* It would with KINDLING_OFFLOAD=auto\."):
        outlook(Settings(offload="off"), SCHNELL, gpu(24), 64).require()
    with pytest.raises(DoesNotFit, match=r"all but the VAE waits .* The largest that fits is chroma\."):
        outlook(Settings(), MODELS["qwen-image"], gpu(24), 32).require()


def test_a_cpu_has_nowhere_else_to_keep_weights() -> None:
    cpu = Hardware("cpu", "CPU", "fp32", "", 16)
    plans = {offload: memory_plan(SCHNELL, cpu, None, 64, offload) for offload in ("auto", "encoders", "blocks")}
    assert [plan.mode for plan in plans.values()] == ["resident", "encoders", "blocks"]
    assert len({plan.needs_gb for plan in plans.values()}) == 1
    assert plans["auto"].tiling == "off"


def test_large_pictures_are_tiled_where_little_is_left() -> None:
    assert memory_plan(SCHNELL, gpu(80), host_gb=64).tiling == "off"
    plan = memory_plan(SCHNELL, gpu(24, "fp8"), host_gb=64)
    assert plan.tiling == f"above {plan.tile_above} pixels"
    assert [plan.tiles(size) for size in ((1024, 1024), (1536, 1536), (2048, 2048))] == [False, False, True]
    turbo = MODELS["sdxl-turbo"]
    assert memory_plan(turbo, gpu(12, "fp16")).tile_above < memory_plan(turbo, gpu(12)).tile_above


def test_the_largest_that_fits_a_disk() -> None:
    assert largest_below(30) == "The largest that fits there is chroma (27.5 GB)."
    assert largest_below(1) == "The largest that fits there is spark (0.0097 GB)."


def test_nothing_fits() -> None:
    with pytest.raises(DoesNotFit, match=r"spark does not fit at bf16: .* No model of the catalogue fits\."):
        outlook(Settings(), MODELS["spark"], gpu(0.5), 64).require()


def test_a_worker_refuses_before_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write(SCHNELL, tmp_path)
    monkeypatch.setattr("handler.model.hardware.host_memory", lambda: 2_000_000_000)
    with pytest.raises(DoesNotFit, match=r"flux-schnell does not fit at fp32: .*The largest that fits is spark\."):
        Worker.boot(PATIENT.model_copy(update={"model": SCHNELL.id, "volume": tmp_path}))


def test_what_would_not_fit_is_not_advised_to_be_fetched_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """34 GB of downloads that could not run."""
    settings = PATIENT.model_copy(update={"model": SCHNELL.id, "volume": tmp_path})
    monkeypatch.setattr("handler.model.hardware.host_memory", lambda: 2_000_000_000)
    with pytest.raises(WeightsMissing, match=r"Fetch it with: .* But flux-schnell does not fit .* fits is spark\."):
        Worker.boot(settings)
    for module in ("model.hardware", "worker.sharing"):
        monkeypatch.setattr(f"handler.{module}.host_memory", lambda: 100_000_000_000)
    with pytest.raises(WeightsMissing, match=r"python -m handler fetch flux-schnell$"):
        Worker.boot(settings)


def test_memory_is_the_machines_or_the_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("handler.core.host.CGROUP_LIMIT", limit)
    machine = detect(Settings()).memory_gb
    assert machine > 1
    limit.write_text("max\n")
    assert detect(Settings()).memory_gb == machine
    limit.write_text("1500000000\n")
    assert detect(Settings()).memory_gb == 1.5
    limit.unlink()
    monkeypatch.setattr("handler.core.host.CGROUP_V1_LIMIT", limit := tmp_path / "memory.limit_in_bytes")
    limit.write_text("1400000000\n")
    assert detect(Settings()).memory_gb == 1.4
    limit.write_text(f"{(1 << 63) - 4096}\n")  # none
    assert detect(Settings()).memory_gb == machine


@pytest.mark.parametrize(
    ("name", "usage"), [("CGROUP_LIMIT", "memory.current"), ("CGROUP_V1_LIMIT", "memory.usage_in_bytes")]
)
def test_free_is_what_neither_the_machine_nor_the_container_has_given_away(
    name: str, usage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, used = tmp_path / "limit", tmp_path / usage
    monkeypatch.setattr(f"handler.core.host.{name}", limit)
    monkeypatch.setattr("handler.core.host.MEMINFO", tmp_path / "meminfo")
    (tmp_path / "memory.stat").write_text("anon 5000\ninactive_file 300\n")
    assert free_memory() == 0  # nobody tells
    (tmp_path / "meminfo").write_text("MemTotal:  90 kB\nMemAvailable:   64 kB\n")
    assert free_memory() == 65_536
    limit.write_text("9000\n")
    assert free_memory() == 0  # of a limit whose use cannot be read nothing is known to be free
    used.write_text("6000\n")
    assert free_memory() == 3_300
    used.write_text("9999\n")
    assert free_memory() == 0


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
    assert not re.search(r"[\d.]+ s on an? ", said)  # nobody has timed anything on a GPU


def test_what_fails_is_not_called_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert patiently(lambda: "7", otherwise=str) == "7"
    assert patiently(lambda: str(1 / 0), otherwise=str) == "ZeroDivisionError: division by zero"
    assert patiently(Path("/nowhere/at/all").read_text, otherwise=str) == "/nowhere/at/all: No such file or directory"
    assert "flux-schnell" in patiently(lambda: str(outlook(Settings(), SCHNELL, gpu(8), 0).require()), otherwise=str)
    monkeypatch.setattr(patience, "PATIENCE_S", 0.01)
    released = threading.Event()
    assert patiently(lambda: str(released.wait(60)), otherwise=str) == "the volume does not answer within 0.01 s"
    assert patiently(lambda: str(released.wait(60)), otherwise=str, where="it") == "it does not answer within 0.01 s"
    released.set()


def test_one_folder_that_cannot_be_read_hides_no_other_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KINDLING_VOLUME", str(tmp_path))
    monkeypatch.setenv("KINDLING_MODEL", "flux-schnell")
    with failing(tmp_path, errno.EIO, lambda call: call.name == "list" and "FLUX.1-schnell" in call.path):
        assert main(["models", "--json"]) == 0
    found = {each["id"]: each["state"] for each in json.loads(capsys.readouterr().out)["models"]}
    assert found["flux-schnell"]["reason"].endswith("FLUX.1-schnell/snapshots: Input/output error.")
    assert (found["flux-dev"]["reason"], found["spark"]["fetched"]) == ("not fetched", True)
    with failing(tmp_path, errno.EIO, lambda call: call.name == "list" and "FLUX.1-schnell" in call.path):
        assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["cold_start"]["reason"].endswith("Input/output error.")
    assert "does not answer" not in json.dumps(told)
