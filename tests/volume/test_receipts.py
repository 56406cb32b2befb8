"""Receipts: kept for good, chosen, gone back from; followed by workers; shown as chips. Damaged ones harm no start."""

import asyncio
import errno
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import PATIENT

from fakes import FakeFamily
from handler import MODELS, PRECISIONS, Engine, Settings, Worker, create_app
from handler.__main__ import main
from handler.cli.bake import publish_weights
from handler.core.errors import InvalidValue, VolumeFailed
from handler.core.processor import processor
from handler.model.hardware import Hardware, detect, expected
from handler.volume.receipts import (
    CURRENT,
    Candidate,
    Figures,
    Outcome,
    Receipt,
    current,
    current_number,
    folder,
    keep,
    listed,
    numbers,
    read,
    rollback,
    use,
)
from handler.worker.chips import chips, dollars_of
from handler.worker.decision import Decision, applicable, decide
from handler.worker.outlook import outlook

SPARK, H200 = MODELS["spark"], "NVIDIA H200"
CPU = Hardware("cpu", "CPU", "fp32", "a CPU", processor=processor().name)
HERE = CPU.identity


def figures(p50_s: float, **others: Any) -> Figures:
    row: dict[str, Any] = {"p95_s": p50_s * 1.1, "images_per_s": 1 / p50_s, "peak_gb": 1.0, "cold_start_s": 5.0}
    alike = {"ssim": 0.99} if "psnr_db" in others else {}
    return Figures(24, p50_s, **{**row, **alike, **others})


MEASURED = (
    Outcome(Candidate("fp32", False), "measured", figures(0.1, psnr_db=99.0, ssim=1.0, dollars=0.0002)),
    Outcome(Candidate("int8", False), "measured", figures(0.08, psnr_db=41.25, ssim=0.9876, dollars=0.0001)),
    Outcome(Candidate("int8", True), "measured", figures(0.05, psnr_db=41.0, ssim=0.98)),
    Outcome(Candidate("fp8", False), "skipped", reason="no FP8 here"),
)


def receipt(precision: str = "int8", compiled: bool = False, **others: Any) -> Receipt:
    row: dict[str, Any] = {
        "model": "spark",
        "revision": SPARK.revision,
        "device": HERE,
        "outcomes": MEASURED,
        "reason": "best by latency",
        "priority": "latency",
        "limits": {},
        "picture": "256x256 in 4 steps",
        "price": "a CPU has no list price",
        "versions": {"torch": "2"},
        "command": "python -m handler optimize spark",
        "when": "2026-11-21T12:00:00+00:00",
    }
    return Receipt(winner=Candidate(precision, compiled), **{**row, **others})


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A volume with three receipts for the CPU, the last one current."""
    for precision, compiled in (("fp32", False), ("int8", False), ("int8", True)):
        keep(receipt(precision, compiled), tmp_path)
    return folder(tmp_path, "spark", HERE)


def test_kept_for_good_and_read_again(tmp_path: Path, place: Path) -> None:
    assert place.parent == tmp_path / "receipts" / "spark"
    assert place.name.startswith("cpu-")
    assert [one.number for one in listed(place)] == [1, 2, 3]
    assert current(tmp_path, "spark", HERE) == receipt("int8", True, number=3)
    assert current(tmp_path, "spark", H200) is None
    assert keep(receipt(), tmp_path).number == 4
    assert read(place, 3) == receipt("int8", True, number=3)


def test_two_writers_get_two_numbers(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handler.volume.receipts.numbers", lambda _: [])  # as both saw the folder before either wrote
    assert keep(receipt(), tmp_path).number == 4
    assert read(place, 1).winner == Candidate("fp32", False)


def test_a_receipts_number_is_the_name_of_its_file(place: Path) -> None:
    for name in ("10", "5", "0123456789", "x", "+7", "7.1", ".8"):
        (place / f"{name}.json").write_bytes((place / "3.json").read_bytes())
    (place / "9.json.part").touch()
    assert numbers(place) == [1, 2, 3, 5, 10]
    assert [one.number for one in listed(place)] == [1, 2, 3, 5, 10]
    assert rollback(place).number == 2
    use(place, 10)
    assert rollback(place).number == 5


def test_a_receipt_is_on_the_disk_before_it_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: said.append(os.fstat(descriptor).st_size > 0))
    assert keep(receipt(), tmp_path).number == 1
    assert said == [True, True]  # itself, and that it is current


def test_of_a_full_disk_no_half_of_a_receipt_stays(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(VolumeFailed, match="No space left"):
            keep(receipt(), tmp_path)
    assert numbers(place) == [1, 2, 3]
    assert keep(receipt(), tmp_path).number == 4


def test_where_no_receipt_is_followed_there_is_no_way_back(tmp_path: Path, place: Path) -> None:
    (place / CURRENT).unlink()
    with pytest.raises(InvalidValue, match="there is no current receipt") as caught:
        rollback(place)
    assert caught.value.param == "number"
    (empty := tmp_path / "receipts" / "spark" / "empty").mkdir()
    (empty / CURRENT).write_text("{")
    with pytest.raises(InvalidValue, match="no whole receipt is before 1"):
        rollback(empty)
    with pytest.raises(InvalidValue, match=r"There are no receipts in .* yet"):
        read(empty, 1)


def test_use_and_rollback(place: Path) -> None:
    assert rollback(place).number == 2
    assert rollback(place).number == 1
    with pytest.raises(InvalidValue, match="no whole receipt is before 1"):
        rollback(place)
    assert use(place, 3).number == 3 == current_number(place)
    with pytest.raises(InvalidValue, match=r"no receipt 7 in .*; there are: 1, 2, 3"):
        use(place, 7)
    assert current_number(place) == 3
    with pytest.raises(InvalidValue, match="no current receipt"):
        rollback(place.parent / "other")


def test_a_device_that_cannot_be_told_is_the_only_one_there_is(tmp_path: Path, place: Path) -> None:
    assert folder(tmp_path, "spark", None) == place
    assert folder(tmp_path, "flux-dev", None).name == "unknown"
    keep(receipt(device=H200), tmp_path)
    assert folder(tmp_path, "spark", None).name == "unknown"
    assert folder(tmp_path, "spark", H200).name == "nvidia-h200"


def test_the_gpus_name_is_told_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handler.model.hardware._from_nvml", lambda: None)
    assert expected(Settings()).name == "CPU"
    monkeypatch.setattr("handler.model.hardware.GPU_DRIVER", tmp_path)
    monkeypatch.setattr("handler.model.hardware.GPU_FOLDER", tmp_path)
    assert expected(Settings(device="cpu")).name == "CPU"
    assert expected(Settings()).name == ""
    for bus, name in (("1", H200), ("2", H200), ("3", "NVIDIA L4")):
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "information").write_text(f"Model: \t\t {name}\nIRQ:   \t 17\n")
        assert expected(Settings()).name == (H200 if name == H200 else "")


def test_follow(tmp_path: Path, place: Path) -> None:
    settings = Settings(volume=tmp_path)
    found = decide(settings, SPARK, CPU)
    assert (found.settings.precision, found.settings.compile) == ("int8", "on")
    told = f"receipt 3: int8+compile won by latency on {HERE}, 2026-11-21"
    assert (found.hardware.precision, found.hardware.reason) == ("int8", told)
    assert outlook(settings, SPARK, expected(settings)).hardware.precision == "int8"
    use(place, 2)
    assert decide(settings, SPARK, CPU).settings.compile == "off"
    for said in ({"precision": "fp32"}, {"compile": "on"}):
        mine = settings.model_copy(update=said)
        found = decide(mine, SPARK, CPU)
        assert (found.settings, found.hardware) == (mine, CPU)
        assert found.receipt  # there to be shown
        assert outlook(mine, SPARK, expected(mine)).hardware.precision == "fp32"
    other = replace(CPU, name=H200, processor="")
    assert decide(settings, SPARK, other) == Decision(settings, other, None)


@pytest.mark.parametrize(
    "odd",
    [
        {"batches": {"big": {"2": 1.5}}},
        {"batches": {"big": {}}},
        {"batches": {"256": {"2": 1.5}}},
        {"batches": {"256x": {"2": 1.5}}},
        {"batches": {"0x256": {"2": 1.5}}},
        {"batches": {"256x256": {"two": 1.5}}},
        {"batches": {"256x256": {"": 1.5}}},
        {"batches": {"256x256": {"2": "NaN"}}},
        {"batches": {"256x256": [1.5]}},
        {"psnr_db": 41.0, "ssim": None},
        {"p50_s": "Infinity"},
    ],
    ids=str,
)
def test_a_receipt_with_odd_figures_is_ignored_at_the_start(tmp_path: Path, place: Path, odd: dict[str, Any]) -> None:
    """Not found out by the first request, or by who asks for the receipt."""
    said = json.loads((place / "3.json").read_text())
    for each in said["outcomes"]:
        each["figures"] = each["figures"] and each["figures"] | odd
    (place / "3.json").write_text(json.dumps(said))
    found, told = applicable(tmp_path, SPARK, HERE)
    assert found is None
    assert "3.json is not a receipt" in told


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda place: (place / "3.json").write_text('{"format": 1'), "3.json is not a receipt"),
        (
            lambda place: (place / "3.json").write_text((place / "3.json").read_text().replace('"int8"', '"int3"')),
            "not a",
        ),
        (lambda place: (place / "3.json").unlink(), "There is no receipt 3"),
        (lambda place: (place / CURRENT).write_text("[]"), "current.json is not a receipt"),
    ],
)
def test_what_cannot_be_read_is_told_and_ignored(tmp_path: Path, place: Path, damage: Any, why: str) -> None:
    damage(place)
    found, told = applicable(tmp_path, SPARK, HERE)
    assert found is None
    assert told.startswith("receipt ignored: ")
    assert why in told
    assert dollars_of(tmp_path, "spark", HERE) is None


def test_another_revision_is_told_and_ignored(tmp_path: Path) -> None:
    keep(receipt(revision="older"), tmp_path)
    assert applicable(tmp_path, SPARK, HERE) == (None, "receipt 1 ignored: it measured revision older, not embedded")


def test_one_processors_is_not_anothers(tmp_path: Path, place: Path) -> None:
    assert decide(Settings(volume=tmp_path), SPARK, CPU).receipt
    assert decide(Settings(volume=tmp_path), SPARK, replace(CPU, processor="ARM (0x61 0x022)")).receipt is None
    assert expected(Settings(device="cpu")).identity == detect(Settings(device="cpu")).identity == HERE


@pytest.mark.parametrize("other", [{"model": "flux-dev"}, {"device": "NVIDIA L4"}], ids=str)
def test_one_that_measured_something_else_is_told_and_never_followed(
    tmp_path: Path, place: Path, other: dict[str, str]
) -> None:
    (place / "3.json").write_text(json.dumps(asdict(receipt(**other))))
    found, told = applicable(tmp_path, SPARK, HERE)
    assert found is None
    assert "receipt ignored: " in told
    assert "does not hold here" in told
    assert dollars_of(tmp_path, "spark", HERE) is None
    with pytest.raises(VolumeFailed, match="does not hold here"):
        use(place, 3)
    assert [one.number for one in listed(place)] == [1, 2]


def test_going_back_passes_over_what_is_not_whole(place: Path) -> None:
    (place / "2.json").write_text('{"format": 1')
    assert rollback(place).number == 1
    (place / CURRENT).write_text('{"num')
    assert rollback(place).number == 3


def test_a_volume_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "receipts").write_text("in the way")
    with pytest.raises(VolumeFailed, match="Cannot write"):
        keep(receipt(), tmp_path)


def test_a_receipt_names_a_winner_it_measured() -> None:
    with pytest.raises(ValueError, match="nothing was measured of the winner"):
        receipt("fp8")


def test_a_worker_boots_from_its_receipt(
    tmp_path: Path, place: Path, spark: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(place, 2)
    settings = PATIENT.model_copy(update={"volume": tmp_path})
    worker = Worker.boot(settings)
    assert worker.hardware.precision == "int8"
    assert worker.ledger.plan == "EAGER"
    assert worker.receipt == read(place, 2)
    told = f"receipt 2: int8 won by latency on {HERE}, 2026-11-21"
    assert worker.ledger.reason == worker.hardware.reason == worker.ledger.plan_reason == told

    baked = publish_weights(worker, tmp_path)
    wrong = replace(CPU, name=H200, processor="")
    monkeypatch.setattr("handler.worker.worker.expected", lambda _: wrong)  # so fp32 is being read
    again = Worker.boot(settings)
    assert (again.hardware.precision, again.ledger.weights) == ("int8", str(baked))

    (place / "2.json").write_text("{}")
    plain = Worker.boot(settings)
    assert plain.hardware.precision == "fp32"
    assert "receipt ignored: " in plain.ledger.reason


def test_a_chip_names_each_precision() -> None:
    labels = [chips(SPARK, None, {"precision": each, "plan": "EAGER"})[3]["value"] for each in PRECISIONS]
    assert labels[:5] == ["FP32", "BF16", "FP16", "FP8 dynamic", "FP8 dynamic, one scale"]
    assert len({*labels}) == len(PRECISIONS)
    assert chips(SPARK, None, {})[3]["value"] == "AUTO"


def test_chips_are_backed_by_what_was_measured() -> None:
    found = chips(SPARK, receipt(), {"precision": "int8", "plan": "EAGER"})
    assert " / ".join(chip["value"] for chip in found) == "4 steps / gs 0 / FlowMatch / INT8 weights / eager"
    said = {chip["label"]: chip["measured"] for chip in found}
    assert said["steps"] == "24 pictures, 256x256 in 4 steps: p50 0.080 s, p95 0.088 s"
    assert said["precision"] == "1.00 GB at most; 41.2 dB and SSIM 0.988 to fp32"
    assert said["compile"] == "p50 0.080 s, 0.050 s compiled"
    assert [chip["value"] for chip in chips(SPARK, receipt("int8", True), {})][3:] == ["INT8 weights", "compiled"]


@pytest.mark.parametrize("one", [None, receipt()])
def test_chips_say_what_nobody_measured(one: Receipt | None) -> None:
    for chip in chips(SPARK, one, {"precision": "fp16", "plan": "COMPILED"}):
        assert chip["measured"] == "not measured; measure it with: python -m handler optimize spark"


def test_the_route(tmp_path: Path) -> None:
    engine = Engine(Settings(volume=tmp_path, api_keys=("secret",)), boot=FakeFamily().boot)
    transport = httpx.ASGITransport(create_app(engine, public=True))

    async def ask(*keys: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://kindling") as client:
            headers = [("authorization", f"Bearer {key}") for key in keys]
            return await client.get("/v1/receipt", headers=headers)

    assert asyncio.run(ask()).status_code == 401
    starting = asyncio.run(ask("secret")).json()
    assert (starting["receipt"], starting["how"]) == (None, "This worker is still starting.")
    assert starting["chips"][0]["value"] == "4 steps"
    engine.start()
    engine.wait_booted()
    assert engine.worker
    assert asyncio.run(ask("secret")).json()["how"] == "python -m handler optimize spark"
    engine.worker.receipt = receipt()
    ready = asyncio.run(ask("secret")).json()
    engine.stop()
    assert ready["receipt"]["winner"] == {"precision": "int8", "compiled": False}
    assert {chip["label"]: chip for chip in ready["chips"]}["precision"]["value"] == "FP32"


def test_the_verb(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KINDLING_VOLUME", str(tmp_path))
    assert main(["receipts", "list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["receipts"]
    assert [(row["number"], row["current"]) for row in rows] == [(1, False), (2, False), (3, True)]
    assert main(["receipts", "rollback"]) == 0
    assert "workers now follow it" in capsys.readouterr().out
    assert main(["receipts", "list"]) == 0
    assert "> 2 " in capsys.readouterr().out
    assert main(["receipts", "use", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["receipt"]["number"] == 1
    assert main(["receipts", "show", "3"]) == 0
    shown = capsys.readouterr().out
    assert "4 steps / gs 0 / FlowMatch / INT8 weights / compiled" in shown
    assert "skipped    fp8: no FP8 here" in shown
    assert main(["receipts", "use"]) == 2
    assert main(["receipts", "rollback", "--model", "flux-dev"]) == 2
    assert "there is no current receipt" in capsys.readouterr().err


def test_models_shows_the_price(tmp_path: Path, place: Path) -> None:
    from handler.cli.models import lines, state
    from handler.model.hardware import detect

    use(place, 2)
    found = state(SPARK, Settings(volume=tmp_path), detect(Settings()))
    assert found.dollars == 0.0001
    assert "0.000100 dollars a picture" in lines(SPARK, found)[0]
    assert "dollars" not in lines(SPARK, replace(found, dollars=None))[0]
