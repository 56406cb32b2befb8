"""What a worker will do, told ahead: on every GPU of every platform, in every precision; and what boot makes of it."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENT, unwarmed

import tiny
from handler import GPUS, MODELS, ModelSpec, Settings, Worker, choose_gpus, outlook
from handler.__main__ import main
from handler.catalog.attention import KERNELS
from handler.catalog.gpus import TARIFFS
from handler.catalog.models import DEV, FLUX2_DEV, SCHNELL, SPARK
from handler.catalog.precisions import PRECISIONS
from handler.core.errors import DoesNotFit, KindlingError, SettingsError, WeightsMissing
from handler.model.compiling.artifacts import Found
from handler.model.hardware import Hardware, detect, expected
from handler.worker.compilation import OFF, STREAMING
from handler.worker.durations import Durations, Took
from handler.worker.memory import TRIED
from handler.worker.outlook import Outlook
from handler.worker.renting import Offer

MISS = Found("MISS", "nothing is compiled yet")
ORDER = TRIED["auto"]  # of memory modes, the best first


def every_offer(spec: ModelSpec, platform: str) -> list[tuple[Settings, tuple[Offer, ...]]]:
    """What would be rented in each precision and way to keep weights, where anything can be."""
    found = []
    for precision, offload in product(("auto", *PRECISIONS), TRIED):
        settings = Settings.model_validate({"precision": precision, "offload": offload})
        try:
            found.append((settings, choose_gpus(settings, spec, platform)))
        except (DoesNotFit, SettingsError):
            with pytest.raises(KindlingError):  # so the GPU that can do most cannot do that
                choose_gpus(settings, spec, platform, GPUS["B200"].rentals[platform].names)
    assert len(found) >= 36  # of 40: what takes 224 GB in 32 bits, no GPU has
    return found


@pytest.mark.parametrize("platform", TARIFFS)
@pytest.mark.parametrize("model", MODELS)
def test_whatever_is_rented_can_do_what_it_is_rented_for(model: str, platform: str) -> None:
    for settings, offers in every_offer(MODELS[model], platform):
        for one in offers:
            row, plan = PRECISIONS[one.outlook.hardware.precision], one.outlook.memory
            assert settings.precision in ("auto", row.id)
            assert one.gpu.capability >= row.capability
            assert one.gpu.capability >= (8, 0) or row.activations != "bfloat16"
            assert plan.fits
            assert plan.needs_gb <= one.gpu.memory_gb
            assert plan.host_gb <= one.rental.host_gb
            assert plan.mode in TRIED[settings.offload]


@pytest.mark.parametrize("platform", TARIFFS)
@pytest.mark.parametrize("model", MODELS)
def test_the_cheapest_that_holds_the_model_best_comes_first(model: str, platform: str) -> None:
    for settings, offers in every_offer(MODELS[model], platform):
        [mode] = {one.outlook.memory.mode for one in offers}
        better = []
        for gpu in (gpu for gpu in GPUS.values() if gpu.rentals.get(platform, None)):
            try:
                [alone] = choose_gpus(settings, MODELS[model], platform, gpu.rentals[platform].names[:1])
            except (KindlingError, ValueError):  # it cannot, or nobody can ask for it
                continue
            better.append((ORDER.index(alone.outlook.memory.mode), list(GPUS).index(alone.gpu.id)))
        rented = [(ORDER.index(mode), list(GPUS).index(one.gpu.id)) for one in offers]
        assert rented == sorted(rented)
        assert rented[0] == min(better)
        prices = [price for one in offers if (price := one.rental.dollars_per_s) is not None]
        assert prices == sorted(prices)


@pytest.mark.parametrize("platform", TARIFFS)
def test_weights_that_stream_are_for_who_asks_or_for_want_of_better(platform: str) -> None:
    assert {one.outlook.memory.mode for one in choose_gpus(Settings(), FLUX2_DEV, platform)} == {"resident"}
    streamed = choose_gpus(Settings(offload="blocks"), FLUX2_DEV, platform)
    assert {one.outlook.memory.mode for one in streamed} == {"blocks"}
    huge = replace(FLUX2_DEV, parameters=100_000_000_000, other_parameters=60_000_000_000)
    waiting = replace(huge, streams=replace(huge.streams, encoders=59_000_000_000))
    if platform != "fal":  # whose hosts hold no 118 GB beside them
        [mode] = {one.outlook.memory.mode for one in choose_gpus(Settings(precision="fp8"), waiting, platform)}
        assert mode == "encoders"


@pytest.mark.parametrize("platform", TARIFFS)
def test_fp8_rents_no_ampere_and_nvfp4_a_blackwell(platform: str) -> None:
    for spec in MODELS.values():
        chips = {p: [o.gpu.id for o in choose_gpus(Settings(precision=p), spec, platform)] for p in ("fp8", "nvfp4")}
        assert not {"A40", "A100 40GB", "A100 80GB", "A10", "RTX 3090"} & {*chips["fp8"]}
        assert {*chips["nvfp4"]} <= {"RTX 5090", "RTX PRO 6000", "B200"}
    assert "H100" in [offer.gpu.id for offer in choose_gpus(Settings(precision="fp8"), FLUX2_DEV, platform)]


def test_the_seeds_row_of_an_l4() -> None:
    seen = outlook(Settings(precision="fp8"), DEV, GPUS["L4"], host_gb=64)
    assert (seen.hardware.precision, seen.memory.mode, round(seen.memory.needs_gb, 1)) == ("fp8", "encoders", 19.5)
    assert "= 19.5 GB, of 23.5 GB on the NVIDIA L4" in seen.memory.reason
    assert not outlook(Settings(precision="fp8"), DEV, GPUS["L4"], host_gb=9).memory.fits
    with pytest.raises(SettingsError, match="KINDLING_PRECISION=fp8: FP8 arithmetic needs"):
        outlook(Settings(precision="fp8"), DEV, GPUS["A40"], host_gb=64)


def test_of_several_gpus_each_loads_all_in_its_part_of_the_host_and_none_streams_blocks() -> None:
    def seen(host_gb: float, **asked: Any) -> Outlook:
        return outlook(Settings(**asked), DEV, GPUS["L4"], host_gb=host_gb)

    assert seen(18, precision="fp8").require().mode == "encoders"
    with pytest.raises(DoesNotFit, match=r"of 9\.0 GB"):
        seen(18, precision="fp8", ulysses_degree=2).require()
    assert seen(128, precision="bf16").require().mode == "blocks"
    with pytest.raises(DoesNotFit):
        seen(256, precision="bf16", ulysses_degree=2).require()


def test_a_worker_of_several_gpus_is_not_rented_with_one() -> None:
    for platform in TARIFFS:
        with pytest.raises(SettingsError, match=f"KINDLING_ULYSSES_DEGREE: workers on {platform} are"):
            choose_gpus(Settings(ulysses_degree=2), DEV, platform)
        with pytest.raises(SettingsError, match=f"KINDLING_WORKERS: workers on {platform} are"):
            choose_gpus(Settings(workers=2), DEV, platform)


def test_a_gpu_that_emulates_is_not_rented_unless_it_need_not() -> None:
    assert "T4" not in [offer.gpu.id for offer in choose_gpus(Settings(), MODELS["sdxl"], "modal")]
    assert choose_gpus(Settings(precision="fp16"), MODELS["sdxl"], "modal")[0].gpu.id == "T4"
    with pytest.raises(SettingsError, match="NVIDIA T4 only emulates bfloat16"):
        choose_gpus(Settings(), MODELS["sdxl"], "modal", ["T4"])


def test_a_kernel_of_attention_is_rented_for_too() -> None:
    """By what GPUs can do: what is installed where one deploys says nothing."""
    for kernel, row in KERNELS.items():
        offers = choose_gpus(Settings.model_validate({"attention": kernel}), DEV, "runpod")
        assert all(row.capability <= one.gpu.capability < row.below for one in offers)
        assert {one.outlook.attention and one.outlook.attention.id for one in offers} == {kernel}
    assert choose_gpus(Settings(), DEV, "runpod")[0].outlook.attention is None  # the worker will measure


def test_nothing_is_rented_for_a_step_cache_that_the_model_cannot_have() -> None:
    for platform in TARIFFS:
        assert choose_gpus(Settings(step_cache="on"), DEV, platform)
        with pytest.raises(SettingsError, match="KINDLING_STEP_CACHE"):
            choose_gpus(Settings(step_cache="on"), SCHNELL, platform)


def test_where_a_cap_shall_hold_only_gpus_of_a_known_price_are_rented() -> None:
    """On any other a worker refuses to start."""
    capped = {"monthly_cap": 10, "cap_action": "refuse"}
    assert [one.gpu.id for one in choose_gpus(Settings(**capped), SPARK, "fal")] == ["H200", "B200"]
    with pytest.raises(SettingsError, match="fal publishes no price of NVIDIA RTX 4090; set KINDLING_GPU_PRICE"):
        choose_gpus(Settings(**capped), SPARK, "fal", ["GPU-RTX4090"])
    freely = choose_gpus(Settings(), SPARK, "fal")
    for uncapped in ({"gpu_price": 1}, {"cap_action": "alert"}, {"monthly_cap": None}):
        assert len(choose_gpus(Settings.model_validate(capped | uncapped), SPARK, "fal")) == len(freely)


@pytest.mark.parametrize("asked", [(), ("A100",)])
def test_a_platform_that_is_not_known_is_told_with_those_that_are(asked: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError, match=r"'aws' is not known here as a platform.*runpod, modal, fal"):
        choose_gpus(Settings(), SPARK, "aws", asked)


def test_whoever_rents_needs_no_torch() -> None:
    """Nor does a worker, before it imports torch: it reads weights meanwhile."""
    code = """
import sys
from handler import MODELS, Settings, choose_gpus, outlook
from handler.model.hardware import expected
for attention in ("auto", "cudnn", "flash3"):
    assert choose_gpus(Settings(attention=attention), MODELS["flux-dev"], "modal")
assert outlook(Settings(), MODELS["spark"], expected(Settings())).require().fits
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def test_another_machines_outlook_reads_no_volume(tmp_path: Path) -> None:
    (tmp_path / "receipts").write_text("no folder")
    settings = Settings(volume=tmp_path)
    elsewhere = outlook(settings, DEV, GPUS["H100"], host_gb=64)
    assert (elsewhere.source, elsewhere.fault, elsewhere.receipt) == (None, None, None)
    assert "ignored" not in elsewhere.hardware.reason
    here = outlook(settings, DEV, replace(elsewhere.hardware, precision="bf16"))
    assert isinstance(here.fault, KindlingError)
    assert "receipt ignored" in here.hardware.reason


def test_what_is_missing_and_would_not_fit_is_told_at_once(tmp_path: Path) -> None:
    small = Hardware("cuda", "a GPU", "bf16", "", 0.5)
    seen = outlook(Settings(volume=tmp_path), SCHNELL, small)
    with pytest.raises(WeightsMissing, match=r"Fetch it with: .* But flux-schnell does not fit at bf16"):
        _ = seen.weights
    with pytest.raises(WeightsMissing, match=r"handler fetch flux-schnell$"):
        _ = replace(seen, hardware=replace(small, memory_gb=80), host_gb=64).weights


@pytest.mark.parametrize(
    ("settings", "plan"),
    [
        ({"offload": "blocks"}, STREAMING),
        ({"compile": "off"}, OFF),
        ({"offload": "blocks", "compile": "on"}, STREAMING),
    ],
)
def test_what_is_never_compiled_is_known_ahead(settings: dict[str, str], plan: object) -> None:
    seen = outlook(Settings.model_validate(settings), DEV, GPUS["H100"], host_gb=640)
    assert seen.eager == plan == seen.compilation(MISS, 240, Durations())


def test_compiling_is_by_the_seconds_that_are_left_and_by_past_starts() -> None:
    seen = outlook(Settings(), DEV, GPUS["H100"], host_gb=64)
    known = Durations((Took(DEV.id, seen.hardware.name, "fp8", "compile", 20.0),))
    assert seen.eager is None
    assert [seen.compilation(MISS, 100, past).mode for past in (Durations(), known)] == ["EAGER", "COMPILED"]
    assert seen.compilation(MISS, 240, Durations(), "no compiler").failure == "no compiler"


def test_boot_doctor_and_models_say_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write(SCHNELL, tmp_path)
    settings = PATIENT.model_copy(update={"model": SCHNELL.id, "volume": tmp_path, "precision": "int8"})
    seen = outlook(settings, SCHNELL, detect(settings))
    with unwarmed():
        worker = Worker.boot(settings)
    assert (worker.hardware, worker.memory) == (replace(seen.hardware, attention="native"), seen.memory)
    assert worker.ledger.weights == str(seen.weights.folder)
    told = {"KINDLING_MODEL": SCHNELL.id, "KINDLING_VOLUME": str(tmp_path), "KINDLING_PRECISION": "int8"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    capsys.readouterr()
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert main(["models", "--json"]) == 0
    state = {one["id"]: one["state"] for one in json.loads(capsys.readouterr().out)["models"]}[SCHNELL.id]
    assert state["fit"]["reason"] == report["cold_start"]["memory"]["reason"] == seen.memory.reason
    assert state["precision"] == report["hardware"]["precision"] == worker.hardware.precision
    assert report["hardware"]["reason"] == worker.hardware.reason
    assert report["hardware"]["attention"] == worker.hardware.attention
    plan = worker.ledger
    assert (report["cold_start"]["plan"]["mode"], report["cold_start"]["plan"]["reason"]) == (
        plan.plan,
        plan.plan_reason,
    )


def test_what_was_not_as_it_seemed_is_looked_at_anew(tmp_path: Path) -> None:
    tiny.write(SCHNELL, tmp_path)
    settings = Settings(volume=tmp_path, model=SCHNELL.id)
    ahead = outlook(settings, SCHNELL, expected(settings))
    same = ahead.corrected(replace(ahead.hardware, memory_gb=5))
    assert same.weights is ahead.weights
    assert "of 5.0 GB" in same.memory.reason
    other = ahead.corrected(Hardware("cuda", "NVIDIA H100", "bf16", "a GPU", 80, (9, 0)))
    assert other.hardware.precision == "fp8"
    assert other.weights.folder == ahead.weights.folder


def test_spark_needs_no_volume_to_be_told() -> None:
    assert outlook(Settings(), SPARK, expected(Settings())).weights.folder.name == "spark"
