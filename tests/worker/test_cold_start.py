"""Cold starts that go wrong, in real processes and in this one: each ends as promised, and says why on the volume."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import PATIENT, ROOT
from disks import hanging

from fakes import raises
from handler import MODELS, ImageRequest, Worker
from handler.core.birth import Birth
from handler.core.errors import BudgetExceeded, StartError, WeightsCorrupt
from handler.model.compiling import toolchain
from handler.model.compiling.artifacts import PACKAGE, fingerprint, key
from handler.model.compiling.package import digest, kinds_of
from handler.model.hardware import Hardware
from handler.volume.manifest import write_manifest
from handler.volume.publishing import publishing
from handler.volume.sources import EMBEDDED, fetched_folder
from handler.worker.boots import last_boots
from handler.worker.clock import Clock
from handler.worker.durations import Durations
from serving import serving
from threads import until

SPARK = MODELS["spark"]


def on(volume: Path) -> Worker:
    return Worker.boot(PATIENT.model_copy(update={"volume": volume}))


def generate(
    volume: Path, budget_s: float, model: str = "spark", handler: tuple[str, ...] = (sys.executable, "-m", "handler")
) -> subprocess.CompletedProcess[str]:
    environment = {"KINDLING_VOLUME": str(volume), "KINDLING_COLD_START_BUDGET_S": str(budget_s)}
    return subprocess.run(
        [*handler, "generate", "a red circle", "--model", model, "-o", str(volume / "a.png")],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_past_the_budget_the_process_ends_and_leaves_word(tmp_path: Path) -> None:
    out = generate(tmp_path, 0.6)  # nobody imports torch that fast
    assert out.returncode in (1, 124)  # 1: the budget was gone before the watchdog was set
    assert "budget of 0.6 s" in out.stderr
    (boot,) = last_boots(tmp_path, 9)
    assert (boot["outcome"], boot["model"]) == ("failed", "spark")
    assert "budget of 0.6 s in phase" in boot["reason"]


def test_a_worker_that_shall_not_compile_looks_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for packages nor for what compiling took, which are many files on a volume that may be slow."""
    monkeypatch.setattr("handler.worker.worker.Durations.on", raises(AssertionError("read")))
    ledger = Worker.boot(PATIENT.model_copy(update={"volume": tmp_path, "compile": "off"})).ledger
    assert ledger.decision == "EAGER: KINDLING_COMPILE=off"
    assert [phase.name for phase in ledger.phases] == ["volume", "import", "weights", "warm"]


def test_a_volume_that_hangs_ends_the_process_and_names_the_phase(tmp_path: Path) -> None:
    folder = fetched_folder(MODELS["flux-schnell"], tmp_path)
    folder.mkdir(parents=True)
    out = generate(tmp_path, 5, "flux-schnell", tuple(hanging("manifest.json")))
    assert out.returncode == 124
    assert "in phase 'volume'" in out.stderr
    assert "read_manifest" in out.stderr  # the dumped stack
    (boot,) = last_boots(tmp_path, 9)
    assert (boot["outcome"], boot["phase"]) == ("failed", "volume")


HELD = """
import ctypes, sys
import handler.worker.boots
import handler.worker.worker
from handler import Clock, Settings, Worker
if sys.argv[2] == "late":
    handler.worker.boots.BootLog._write = lambda boots: None  # had no turn before the GIL was taken
handler.worker.worker.outlook = lambda *_, **__: ctypes.PyDLL(None).sleep(60)  # which keeps the GIL
Worker.boot(Settings(volume=sys.argv[1]), Clock.anew(1))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing ends it but faulthandler")
@pytest.mark.parametrize("boots", ["in time", "late"])
def test_native_code_that_lets_no_python_run_ends_the_process_and_leaves_word(boots: str, tmp_path: Path) -> None:
    volume = Path(os.fsdecode(b"%s/it's a $HOME\n`volume` \xff" % bytes(tmp_path)))
    volume.mkdir()
    command = [sys.executable, "-c", HELD, volume, boots]
    out = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    assert out.returncode == 124
    assert '{"cold_start": {"model": "spark"' in out.stderr
    (boot,) = last_boots(volume, 9)
    assert (boot["outcome"], boot["phase"], boot["model"]) == ("failed", "volume", "spark")
    assert boot["reason"] in out.stderr
    assert "budget of 1 s in phase 'volume', in native code" in boot["reason"]


@pytest.mark.parametrize("phase", ["volume", "import", "weights", "artifacts", "compile", "warm"])
def test_told_to_stop_in_any_phase(phase: str, tmp_path: Path) -> None:
    environment = {"KINDLING_VOLUME": str(tmp_path), "KINDLING_COMPILE": "on" if phase == "compile" else "auto"}
    with serving(environment, ready=False, anew=True) as served:
        served.wait_for(f"spark: {phase}")
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(60) == 0
    (boot,) = last_boots(tmp_path, 9)
    assert boot["outcome"] in ("stopped", "ready")  # ready: it was that fast
    assert boot["outcome"] == "ready" or "told to stop in phase" in boot["reason"]


def test_a_killed_start_is_seen_afterwards(tmp_path: Path) -> None:
    with serving({"KINDLING_VOLUME": str(tmp_path)}, ready=False, anew=True) as served:
        served.wait_for("spark: weights")  # by now the phase before is on the volume
        served.process.kill()
        served.process.wait(60)
    (boot,) = last_boots(tmp_path, 9)
    assert boot["outcome"] == "starting"
    out = subprocess.run(
        [sys.executable, "-m", "handler", "doctor"],
        cwd=ROOT, env={**os.environ, "KINDLING_VOLUME": str(tmp_path)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "still starting, or killed, in phase" in out.stdout


def test_artifacts_of_another_torch_are_stale_and_the_worker_is_eager(tmp_path: Path, spark: Worker) -> None:
    facts = fingerprint(SPARK, spark.hardware) | {"torch": "1.0"}
    with publishing(tmp_path / "baked" / "spark" / key(facts), facts) as part:
        (part / PACKAGE).write_bytes(b"code")
    worker = on(tmp_path)
    assert worker.ledger.plan == "EAGER"
    assert "STALE" in worker.ledger.plan_reason
    assert "was 1.0" in worker.ledger.plan_reason


@pytest.mark.parametrize("damage", ["changed", "garbage", "missing"])
def test_damaged_artifacts_are_never_loaded_and_go(
    damage: str, tmp_path: Path, spark: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    blocks = digest(kinds_of(spark._pipeline.transformer, spark._decoder))
    facts = fingerprint(SPARK, spark.hardware) | {"blocks": blocks}
    folder = tmp_path / "baked" / "spark" / key(facts)
    with publishing(folder, facts) as part:
        (part / PACKAGE).write_bytes(b"no zip" * 1000)
    if damage == "changed":
        (folder / PACKAGE).write_bytes(b"no zap" * 1000)
    elif damage == "missing":
        (folder / PACKAGE).unlink()
    worker = on(tmp_path)
    assert (worker.ledger.plan, worker.ledger.plan_reason[:6]) == ("EAGER", "ERROR:")
    assert f"spark is served eagerly: {worker.ledger.plan_reason}" in caplog.text
    assert not folder.exists()
    request = ImageRequest(prompt="a red circle", seed=1)
    drawn, expected = (w.generate(SPARK.recipe(request))[0].rgb for w in (worker, spark))
    assert (drawn == expected).all()


def test_damaged_weights_fail_the_start_by_name(tmp_path: Path) -> None:
    """One bit, in a model that was fetched whole."""
    spec = MODELS["flux-schnell"]
    folder = fetched_folder(spec, tmp_path)
    shutil.copytree(EMBEDDED / "spark", folder)
    write_manifest(folder, {"model": spec.id})
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 4
    weights.write_bytes(data)
    settings = PATIENT.model_copy(update={"volume": tmp_path, "model": "flux-schnell"})
    with pytest.raises(WeightsCorrupt, match=r"transformer/diffusion_pytorch_model\.safetensors is damaged"):
        Worker.boot(settings)
    (boot,) = last_boots(tmp_path, 9)
    assert boot["outcome"] == "failed"
    assert boot["phase"] == "weights"


def test_a_volume_that_nobody_may_write_serves(tmp_path: Path) -> None:
    for name in ("boots", "baked"):
        (tmp_path / name).write_text("in the way of every write")
    worker = on(tmp_path)
    assert worker.ledger.outcome == "ready"


def test_a_compilation_that_fails_leaves_the_worker_eager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("handler.worker.worker.compile_blocks", broken)
    worker = Worker.boot(PATIENT.model_copy(update={"volume": tmp_path, "compile": "on"}))
    assert (worker.ledger.plan, worker.unpublished) == ("EAGER", False)
    assert "no compiler here" in worker.ledger.plan_reason
    assert "compiling spark failed" in caplog.text


@pytest.mark.parametrize("spent", [False, True])
def test_how_long_compiling_took_before_it_failed_is_not_how_long_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spent: bool
) -> None:
    """Whether the start goes on or has spent its budget just then."""
    clock = Clock(PATIENT.cold_start_budget_s, Birth.anew(), publish=lambda ledger: None)

    def broken(*_: object) -> None:
        if spent:
            clock.ledger.budget_s = 0.0
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("handler.worker.worker.compile_blocks", broken)
    with contextlib.suppress(BudgetExceeded):
        Worker.boot(PATIENT.model_copy(update={"volume": tmp_path, "compile": "on"}), clock).close()
    assert clock.ledger.outcome == ("failed" if spent else "ready")
    assert "compile" in [phase.name for phase in clock.ledger.phases]
    until(lambda: [boot["outcome"] for boot in last_boots(tmp_path, 9)] == [clock.ledger.outcome])
    known = ("spark", clock.ledger.device, clock.ledger.precision, 90.0)
    assert Durations.on(tmp_path).longest("compile", *known) is None


def test_how_long_compiling_took_is_known_whatever_inductors_cache_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No compilation finds anything of an earlier one's."""
    old = tmp_path / "inductor"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(old))

    def compiles(*_: object) -> None:
        with toolchain.environment():
            (here := Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])).mkdir(exist_ok=True)
            assert not list(here.iterdir())
            (here / "made").touch()

    old.mkdir()
    (old / "of another process").touch()
    monkeypatch.setattr("handler.worker.worker.compile_blocks", compiles)
    monkeypatch.setattr("handler.worker.worker.bind_blocks", lambda *_: None)
    with Worker.boot(PATIENT.model_copy(update={"volume": tmp_path / "volume", "compile": "on"})) as worker:
        known = (worker.ledger.model, worker.ledger.device, worker.ledger.precision, 90.0)
    until(lambda: Durations.on(tmp_path / "volume").longest("compile", *known) is not None)


def test_compiled_code_that_does_not_work_is_taken_off_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spark: Worker
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("bad kernel")

    def bind(transformer: torch.nn.Module, *_: object) -> None:
        for block in transformer.transformer_blocks:
            block.forward = fail

    monkeypatch.setattr("handler.worker.worker.compile_blocks", lambda *_: 0.0)
    monkeypatch.setattr("handler.worker.worker.bind_blocks", bind)
    worker = Worker.boot(PATIENT.model_copy(update={"volume": tmp_path, "compile": "on"}))
    assert (worker.ledger.plan, worker.unpublished) == ("EAGER", False)
    assert worker.ledger.plan_reason == "compiled code failed: RuntimeError: bad kernel"
    assert worker.ledger.compile_failure == worker.ledger.plan_reason
    [record] = tmp_path.rglob("*.failed.json")
    assert json.loads(record.read_text())["reason"] == worker.ledger.plan_reason
    recipe = SPARK.recipe(ImageRequest(prompt="a red circle", seed=1))
    assert (worker.generate(recipe)[0].rgb == spark.generate(recipe)[0].rgb).all()


def test_no_device_is_a_start_error(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(StartError, match="torch sees no GPU"):
        Worker.boot(PATIENT.model_copy(update={"volume": tmp_path, "device": "cuda"}))


def test_every_answer_and_health_name_the_plan() -> None:
    with serving(anew=True) as served:
        body = json.dumps({"prompt": "a red circle", "num_inference_steps": 1, "size": "64x64"}).encode()
        request = urllib.request.Request(f"{served.url}/v1/images/generations", body)
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["plan"].startswith("EAGER: ")
        with urllib.request.urlopen(f"{served.url}/health/ready") as answer:
            found = json.load(answer)["cold_start"]
        assert found["plan"] == "EAGER"
        assert found["device"] == Hardware("cpu", "CPU", "fp32", "").name
