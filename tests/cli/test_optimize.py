"""The sweep: its choice by table, real candidates of spark in their own processes, and those that hang or crash."""

import asyncio
import contextlib
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_receipts import figures

from fakes import FakeFamily, raises
from handler import MODELS, Settings
from handler.__main__ import main
from handler.api.dispatch import Api
from handler.catalog.precisions import PRECISIONS
from handler.cli.optimize.attempt import attempt, likeness
from handler.cli.optimize.journal import Journal, close
from handler.cli.optimize.pareto import SAME_DB, pareto, select
from handler.cli.optimize.sweep import Wishes, place, planned, sweep
from handler.cli.optimize.together import gains
from handler.cli.optimize.trial import Task, _one_by_one
from handler.core.errors import KindlingError, StartError
from handler.model.hardware import Hardware, expected
from handler.volume.receipts import Candidate, Figures, Outcome, current, folder

ROOT = Path(__file__).parents[2]
BASE, INT8, FP8, FP16 = (Candidate(name, False) for name in ("bf16", "int8", "fp8", "fp16"))
COMPILED = Candidate("bf16", True)
BLOCKS = {"mxfp8", "nvfp4"}
B200 = Hardware("cuda", "NVIDIA B200", "bf16", "", 180, (10, 0))
H200 = Hardware("cuda", "NVIDIA H200", "bf16", "", 141, (9, 0))
A100 = Hardware("cuda", "NVIDIA A100-SXM4-80GB", "bf16", "", 80, (8, 0))
CPU = Hardware("cpu", "CPU", "fp32", "")

MEASURED: dict[Candidate, Figures] = {
    BASE: figures(1.0, peak_gb=36.0, psnr_db=SAME_DB, dollars=0.004),
    COMPILED: figures(0.7, peak_gb=36.5, psnr_db=45.0, dollars=0.003),
    INT8: figures(1.3, peak_gb=20.0, psnr_db=38.0, dollars=0.005),
    FP8: figures(0.5, peak_gb=21.0, psnr_db=33.0, dollars=0.002),
    FP16: figures(1.4, peak_gb=37.0, psnr_db=30.0, dollars=0.006),
}


def test_the_front_is_what_nothing_beats() -> None:
    assert pareto(MEASURED) == {BASE, COMPILED, INT8, FP8}
    assert pareto({BASE: figures(1), FP8: figures(1)}) == {BASE, FP8}
    assert pareto({}) == frozenset()


@pytest.mark.parametrize(
    ("priority", "limits", "winner"),
    [
        ("latency", {}, FP8),
        ("throughput", {}, FP8),
        ("cost", {}, FP8),
        ("memory", {}, INT8),
        ("balanced", {}, FP8),
        ("latency", {"min_quality": 35}, COMPILED),
        ("latency", {"min_quality": 50}, BASE),
        ("latency", {"min_quality": 35, "max_memory": 24}, INT8),
        ("memory", {"max_latency": 1.2}, FP8),
        ("memory", {"max_cost_per_image": 0.0025}, FP8),
    ],
)
def test_the_choice(priority: str, limits: dict[str, float], winner: Candidate) -> None:
    found = select(MEASURED, priority, limits)
    assert found.winner == winner
    assert found.reason.startswith(f"best by {priority}: p50 ")
    assert found.winner not in found.refused


def test_nothing_keeps_the_limits() -> None:
    found = select(MEASURED, "latency", {"max_latency": 0.5})
    assert found.winner is None
    assert found.reason == ("nothing keeps the limits; fp8 is nearest: p95 0.55 s misses at most 0.5 by 0.05")
    assert found.refused[BASE] == "p95 1.1 s misses at most 0.5 by 0.6"
    both = select(MEASURED, "latency", {"max_latency": 0.6, "min_quality": 40})
    assert both.refused[FP8] == "likeness 33 dB misses at least 40 by 7"


def test_what_was_not_measured_keeps_no_limit() -> None:
    found = select({FP8: figures(1)}, "latency", {"min_quality": 30})
    assert found.refused == {FP8: "likeness was not measured"}
    assert select({}, "latency", {}).reason == "nothing could be measured"


def test_a_gain_within_the_noise_is_none() -> None:
    near = {BASE: figures(1.0, psnr_db=SAME_DB), FP8: figures(0.99, psnr_db=30.0)}
    found = select(near, "latency", {})
    assert found.winner == BASE
    assert "2 are within 2%" in found.reason


@pytest.mark.parametrize(
    ("hardware", "first", "skipped", "why"),
    [
        (B200, BASE, set(), ""),
        (H200, BASE, BLOCKS, "need compute capability 10.0 (Blackwell); NVIDIA H200 has 9.0"),
        (A100, BASE, {"fp8", "fp8-tensor", *BLOCKS}, "NVIDIA A100-SXM4-80GB has 8.0"),
        (CPU, Candidate("fp32", False), BLOCKS, "a CPU only emulates it"),
    ],
)
def test_every_precision_is_tried_or_told_why_not(
    hardware: Hardware, first: Candidate, skipped: set[str], why: str
) -> None:
    plan = planned(hardware, ())
    assert plan[0].candidate == first
    assert len(plan) == len({one.candidate for one in plan}) == 2 * len(PRECISIONS)
    left_out = [one for one in plan if one.status == "skipped"]
    assert {one.candidate.precision for one in left_out} == skipped
    assert all(one.reason.endswith(why) for one in left_out)


def test_the_baseline_is_always_measured() -> None:
    assert [one.candidate.name for one in planned(H200, ("fp8+compile",))] == ["bf16", "fp8+compile"]


def test_likeness(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    for at, values in ((first, pixels), (second, pixels + 1)):
        at.mkdir()
        Image.fromarray(values).save(at / "0.png")
    assert likeness(first, first) == (SAME_DB, 1.0)
    psnr_db, ssim = likeness(second, first)
    assert psnr_db == pytest.approx(48.13, abs=0.01)  # every value off by one: 10 log10 255^2
    assert 0.99 < ssim <= 1


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os; os.abort()", "killed by SIGABRT"),
        ("raise MemoryError('too much')", "ended with exit code 1: MemoryError$"),
        ("import sys; print('kindling: no room', file=sys.stderr); sys.exit(1)", "no room"),
    ],
)
def test_a_crash_is_told(code: str, why: str) -> None:
    with pytest.raises(StartError, match=why):
        attempt([sys.executable, "-c", code], 60)


def test_a_trial_gets_no_secrets_and_a_receipt_nothing_that_it_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secrets = (
        "KINDLING_API_KEYS",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "BUCKET_ACCESS_KEY_ID",
        "OTEL_EXPORTER_HEADERS",
    )
    for name in (*secrets, "KINDLING_QUEUE", "KINDLING_VOLUME_KEY"):
        monkeypatch.setenv(name, "31")
    told = "import json, os; print(json.dumps({name: 1 for name, value in os.environ.items() if value == '31'}))"
    assert attempt([sys.executable, "-c", told], 60) == {"KINDLING_QUEUE": 1, "KINDLING_VOLUME_KEY": 1}
    with pytest.raises(StartError, match=r"ended with exit code 3$"):
        attempt([sys.executable, "-c", "import sys; print('it was hf_secret', file=sys.stderr); sys.exit(3)"], 60)
    assert "it was hf_secret" in caplog.text


def test_past_the_limit_its_children_die_too(tmp_path: Path) -> None:
    pipe = tmp_path / "held"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(StartError, match="over the limit of 2 s"):
        attempt(["sh", "-c", f"(echo here; exec sleep 600) > {pipe} & wait"], 2)
    os.set_blocking(reading, True)
    with open(reading) as held:  # ends once the grandchild, which holds the other side, is gone
        assert held.read() == "here\n"


def test_one_that_fails_does_not_end_the_sweep(tmp_path: Path) -> None:
    said: list[str] = []

    def attempted(command: list[str], limit_s: float) -> dict[str, Any]:
        task = json.loads(command[-1])
        if task["precision"] == "fp16":
            raise StartError("over the limit of 9 s")
        Image.new("RGB", (64, 64), (task["precision"] == "int8", 0, 0)).save(Path(task["folder"]) / "0.png")
        return {"pictures": 8, "p50_s": 1.0, "p95_s": 1.0, "images_per_s": 2.0, "peak_gb": 1.0, "cold_start_s": 3.0}

    settings = Settings(volume=tmp_path, gpu_price=3.6)
    wished = Wishes(candidates=("fp16", "int8"), limit_s=9)
    found = sweep(settings, MODELS["spark"], CPU, wished, said.append, attempted)
    assert [(one.candidate.name, one.status) for one in found.outcomes] == [
        ("fp32", "measured"),
        ("fp16", "failed"),
        ("int8", "measured"),
    ]
    assert found.measured[Candidate("int8", False)].psnr_db == pytest.approx(52.9, abs=0.01)
    assert found.measured[Candidate("int8", False)].dollars == pytest.approx(0.0005)
    assert found.choice.winner == Candidate("fp32", False)
    assert said[2:4] == ["kindling: 2 of 3: fp16 ...", "  0 s: failed: over the limit of 9 s"]


def test_a_sweep_goes_on_after_an_interruption(tmp_path: Path) -> None:
    """What was measured before is not measured again, and its likeness is still to the first one's baseline."""
    tried: list[str] = []

    def attempted(command: list[str], limit_s: float) -> dict[str, Any]:
        task = json.loads(command[-1])
        tried.append(task["precision"])
        Image.new("RGB", (64, 64), (task["precision"] == "int8", 0, 0)).save(Path(task["folder"]) / "0.png")
        if tried == ["fp32", "bf16", "int8"]:
            raise KeyboardInterrupt
        if task["precision"] == "bf16":
            raise StartError("no")
        return {"pictures": 8, "p50_s": 1.0, "p95_s": 1.0, "images_per_s": 2.0, "peak_gb": 1.0, "cold_start_s": 3.0}

    def swept(**wishes: Any) -> Any:
        wished = Wishes(candidates=("bf16", "int8"), **wishes)
        return sweep(Settings(volume=tmp_path), MODELS["spark"], CPU, wished, lambda line: None, attempted)

    with pytest.raises(KeyboardInterrupt):
        swept()
    found = swept(priority="memory")  # that may be chosen anew
    assert tried == ["fp32", "bf16", "int8", "int8"]
    assert [one.status for one in found.outcomes] == ["measured", "failed", "measured"]
    assert found.measured[Candidate("int8", False)].psnr_db == pytest.approx(52.9, abs=0.01)
    assert len(swept().measured) == 2  # all is there as long as no receipt is
    assert len(tried) == 4
    close(place(Settings(volume=tmp_path), MODELS["spark"], CPU))
    assert list(tmp_path.iterdir()) == []
    swept()
    assert tried[4:] == ["fp32", "bf16", "int8"]


@pytest.mark.parametrize(
    ("change", "to"),
    [('"images_per_s": 1.0', '"images_per_s": NaN'), ("int8", "bf16"), ("{", "["), ("{", '{"a":' * 99)],
)
def test_an_outcome_that_is_none_is_found_out_again(change: str, to: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "sweep", {"rounds": 1})
    journal.begin(INT8)
    journal.keep(outcome := Outcome(INT8, "measured", Figures(1, 1.0, 1.0, 1.0, 1.0, 1.0)))
    assert Journal(tmp_path / "sweep", {"rounds": 1}).known(INT8) == outcome
    [path] = tmp_path.rglob("outcome.json")
    assert change in path.read_text()
    path.write_text(path.read_text().replace(change, to, 1))
    assert journal.known(INT8) is None


def test_a_sweep_by_other_wishes_begins_anew(tmp_path: Path) -> None:
    tried: list[int] = []

    def attempted(command: list[str], limit_s: float) -> dict[str, Any]:
        tried.append(json.loads(command[-1])["rounds"])
        raise KeyboardInterrupt if len(tried) == 2 else StartError("no")

    for rounds in (1, 2):
        wished = Wishes(candidates=("int8",), rounds=rounds)
        with contextlib.suppress(KeyboardInterrupt):
            sweep(Settings(volume=tmp_path), MODELS["spark"], CPU, wished, lambda line: None, attempted)
    assert tried == [1, 1, 2, 2]


def test_a_torn_picture_of_the_baseline_is_left_out(tmp_path: Path) -> None:
    """It was killed while it wrote; the sweep goes on, and what can be compared is."""

    def attempted(command: list[str], limit_s: float) -> dict[str, Any]:
        task = json.loads(command[-1])
        for seed in range(2):
            Image.effect_noise((64, 64), 50).convert("RGB").save(Path(task["folder"]) / f"{seed}.png")
        if task["precision"] == "fp32":
            torn = Path(task["folder"]) / "1.png"
            torn.write_bytes(torn.read_bytes()[:-200])
            raise StartError("over the limit of 9 s")
        return {"pictures": 8, "p50_s": 1.0, "p95_s": 1.0, "images_per_s": 2.0, "peak_gb": 1.0, "cold_start_s": 3.0}

    wished = Wishes(candidates=("int8",))
    found = sweep(Settings(volume=tmp_path), MODELS["spark"], CPU, wished, lambda line: None, attempted)
    assert [one.status for one in found.outcomes] == ["failed", "measured"]
    assert 5 < (found.measured[Candidate("int8", False)].psnr_db or 0) < 30  # noise to noise: the whole ones


def test_likeness_of_nothing_is_not_measured(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"\x89PNG")
    assert likeness(tmp_path, tmp_path) == (None, None)
    assert likeness(tmp_path, tmp_path / "none") == (None, None)


@pytest.mark.parametrize(("until", "count"), [(0.0, 8), (math.inf, 24)])
def test_where_pictures_take_long_one_round_has_to_do(until: float, count: int, tmp_path: Path) -> None:
    with FakeFamily().engine() as engine:
        task = Task("fp32", False, 3, 900.0, "", "", str(tmp_path))
        assert len(asyncio.run(_one_by_one(Api(engine), task, until))) == count
    assert len([*tmp_path.iterdir()]) == 8


@pytest.mark.parametrize("refused", [False, True])
def test_a_trial_that_cannot_draw_ends_with_the_reason(refused: bool) -> None:
    """At its first small picture, be it before that is drawn at all."""
    with FakeFamily(at_step={1: raises(RuntimeError("no kernel image"))}).engine() as engine:
        if refused:
            engine.drain()
        with pytest.raises(KindlingError):
            asyncio.run(asyncio.wait_for(gains(engine), 60))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("names", [["fp32"], pytest.param(["fp32", "int8"], marks=pytest.mark.judge)], ids=len)
def test_a_real_sweep(names: list[str], tmp_path: Path) -> None:
    """Candidates of spark, each in its process and on one device, by the command line; a receipt comes of it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KINDLING_")}
    more = {"KINDLING_ULYSSES_DEGREE": "3"}  # which spark's heads do not go with
    done = subprocess.run(
        [sys.executable, "-m", "handler", "optimize", "spark", "--candidates", ",".join(names), "--rounds", "1"],
        cwd=ROOT, env={**kept, "KINDLING_VOLUME": str(tmp_path), **more}, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"kindling: {len(names)} of {len(names)}: {names[-1]} ..." in done.stderr
    receipt = current(tmp_path, "spark", expected(Settings()).identity)
    assert receipt
    assert [one.candidate.name for one in receipt.outcomes] == names
    for one in receipt.outcomes:
        assert one.figures
        assert one.figures.pictures == 8
        assert 0 < one.figures.p50_s <= one.figures.p95_s
        assert 0.2 < one.figures.peak_gb < 4
        assert one.figures.cold_start_s > 1
    baseline, *others = (one.figures for one in receipt.outcomes)
    assert baseline
    assert (baseline.psnr_db, baseline.ssim) == (SAME_DB, 1.0)
    assert all(20 < (rounded.psnr_db or 0) < SAME_DB for rounded in others if rounded)
    assert f"* {'':<1}{receipt.winner.name}" in done.stdout
    with Image.open(folder(tmp_path, "spark", receipt.device) / "1.png") as plot:
        assert plot.format == "PNG"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--candidates", "fp4"], 2, "There is no candidate 'fp4'; there are fp32, fp32+compile"),
        (["--rounds", "0"], 2, "should be more than 0"),
        (["--max-memory", "-1"], 2, "--max-memory should be more than 0"),
        (["--max-cost-per-image", "0.01"], 2, "a CPU has no list price; set KINDLING_GPU_PRICE"),
    ],
)
def test_what_cannot_end_well_is_refused_first(
    arguments: list[str], code: int, said: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("KINDLING_VOLUME", str(tmp_path))
    assert main(["optimize", "spark", *arguments]) == code
    assert said in capsys.readouterr().err
    assert main(["optimize", "flux-schnell"]) == 1
    assert "python -m handler fetch flux-schnell" in capsys.readouterr().err


def test_a_dry_run_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KINDLING_VOLUME", str(tmp_path))
    assert main(["optimize", "--dry-run", "--candidates", "int8+compile"]) == 0
    assert capsys.readouterr().out.split() == ["measure", "fp32", "measure", "int8+compile"]
    assert main(["optimize", "--dry-run", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["candidates"]) == 2 * len(PRECISIONS)
    assert not (tmp_path / "receipts").exists()


def test_without_a_winner_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def attempted(command: list[str], limit_s: float) -> dict[str, Any]:
        Image.new("RGB", (64, 64)).save(Path(json.loads(command[-1])["folder"]) / "0.png")
        return {"pictures": 8, "p50_s": 1.0, "p95_s": 1.0, "images_per_s": 2.0, "peak_gb": 1.5, "cold_start_s": 3.0}

    monkeypatch.setattr("handler.cli.optimize.sweep", partial(sweep, attempted=attempted))
    monkeypatch.setenv("KINDLING_VOLUME", str(tmp_path))
    assert main(["optimize", "spark", "--candidates", "int8", "--max-memory", "1", "--json"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["winner"] is None
    assert "no receipt: nothing keeps the limits; fp32 is nearest: memory 1.5 GB misses at most 1 by 0.5" in said.err
    assert not (tmp_path / "receipts").exists()
    assert not (tmp_path / "sweeps").exists()
