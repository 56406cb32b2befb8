"""The run for a GPU, on a CPU: the same items over a tiny model, few compiled for real; and runs that go wrong."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from handler.model import families


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The benchmark, with a folder of its own for results."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    import report

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.delenv("OUT", raising=False)
    handlers = {sig: signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM)}
    yield gpu
    for sig, handler in handlers.items():
        signal.signal(sig, handler)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes no time and changes nothing; workers go through every step of it and think that they are."""
    monkeypatch.setattr(
        "handler.worker.worker.compile_blocks", lambda model, draw, package, decoder: package.write_bytes(b"code")
    )
    monkeypatch.setattr("handler.worker.worker.bind_blocks", lambda model, package, decoder: None)


def found(folder: Path, name: str = "gpu") -> dict[str, Any]:
    """The JSON file of a run."""
    line: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return line


def cases(line: dict[str, Any]) -> dict[str, Any]:
    """All rows of a run."""
    return {case: row for item in line["items"].values() for case, row in item["cases"].items()}


def outcomes(line: dict[str, Any]) -> dict[str, str]:
    """How each item went, by its number."""
    return {name.split()[0]: item["outcome"] for name, item in line["items"].items()}


def test_every_item_runs(gpu: Any, uncompiled: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = gpu.main(["--tiny", "--items", "1-3,5-9", "--save"])
    rows = cases(found(tmp_path))
    assert {case: row["error"] for case, row in rows.items() if "error" in row} == {}
    assert code == 0
    assert outcomes(found(tmp_path)) == dict.fromkeys("12356789", "done")
    assert rows["products of a step, fp8"]["ms"] > rows["fp8 128x32x32"]["ms"]
    assert rows["Kindling fp8 compiled: its start"]["plan"].startswith("COMPILED")
    for name in ("plain diffusers bf16", "Kindling bf16 eager", "Kindling bf16 compiled", "Kindling fp8 compiled"):
        assert all(rows[name][figure] > 0 for figure in ("picture_ms", "step_ms", "step_launch_ms", "decode_ms"))
    assert "skipped" in rows["tests/gpu/test_step_loop.py"]["summary"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("  Kindling fp8 compiled, 5 steps, 32 tokens")


def test_blocks_are_compiled_and_their_kernels_named(gpu: Any, compiler: None, tmp_path: Path) -> None:
    assert gpu.main(["--tiny", "--items", "4", "--save"]) == 0
    rows = cases(found(tmp_path))
    assert rows["compiling fp8 dynamic"]["compile_s"] > 0
    for block in ("FluxTransformerBlock", "FluxSingleTransformerBlock"):
        eager, compiled = (rows[f"{block} fp8 {how}"]["kernels"] for how in ("eager", "dynamic"))
        assert len(compiled) < len(eager)


def test_servers_start_from_what_was_baked(gpu: Any, compiler: None, tmp_path: Path) -> None:
    assert gpu.main(["--tiny", "--cold-start", "--save"]) == 0
    line = found(tmp_path, "gpu_cold")
    assert outcomes(line) == {"1": "done", "2": "done"}
    start = cases(line)["start 1"]
    assert start["total_s"] > start["weights_s"] > 0


def item(gpu: Any, number: int, **cases: Any) -> Any:
    """An item of our own, expected to take ten seconds."""
    return gpu.Item(number, "a test", 10, (lambda run: iter(cases.items()),), vital=number == 1)


def fails() -> dict[str, Any]:
    raise ValueError("as if a kernel failed")


def test_what_fails_leaves_its_traceback_and_the_rest_goes_on(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run: Any) -> Iterator[Any]:
        yield "first", lambda: {"ms": 1.0}
        raise MemoryError("as if the GPU had no memory left")

    items = (gpu.Item(2, "broken", 10, (broken,)), item(gpu, 3, a=fails, b=lambda: {"ms": 2.0}))
    monkeypatch.setattr(gpu, "ITEMS", items)
    assert gpu.main(["--tiny", "--items", "2,3", "--save"]) == 1
    assert outcomes(found(tmp_path)) == {"2": "failed", "3": "failed"}
    rows = cases(found(tmp_path))
    assert "as if the GPU" in rows["what comes next"]["error"]
    assert "in fails" in rows["a"]["error"]
    assert (rows["first"]["ms"], rows["b"]["ms"]) == (1, 2)


def test_an_item_starts_only_if_its_seconds_are_left(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = gpu.Item(2, "long", 100, (lambda run: iter({"a": fails}.items()),))
    monkeypatch.setattr(gpu, "ITEMS", (long, item(gpu, 3, b=dict)))
    assert gpu.main(["--tiny", "--seconds", "50", "--save"]) == 0
    assert outcomes(found(tmp_path)) == {"2": "not started: takes about 100 s, 50 are left", "3": "done"}


def test_no_case_starts_once_the_seconds_are_spent(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(run: Any) -> Iterator[Any]:
        def case() -> dict[str, Any]:
            run.seconds = 0
            return {"ms": 1.0}

        yield "slow", case
        yield "never", fails

    monkeypatch.setattr(gpu, "ITEMS", (gpu.Item(2, "slow", 10, (slow,)), item(gpu, 3, b=fails)))
    assert gpu.main(["--tiny", "--save"]) == 0
    assert list(found(tmp_path)["items"]["2 slow"]["cases"]) == ["slow", "after slow"]
    assert outcomes(found(tmp_path))["3"] == "not started: takes about 10 s, 0 are left"


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_keeps_what_it_has(
    sig: signal.Signals, gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = item(gpu, 3, b=lambda: {"ms": 2.0}, c=lambda: signal.raise_signal(sig))
    monkeypatch.setattr(gpu, "ITEMS", (item(gpu, 2, a=lambda: {"ms": 1.0}), cut, item(gpu, 4, d=fails)))
    assert gpu.main(["--tiny", "--save"]) == 130
    assert outcomes(found(tmp_path)) == {"2": "done", "3": "interrupted"}
    assert cases(found(tmp_path)) == {"a": {"ms": 1}, "b": {"ms": 2}}


def test_it_ends_at_once_where_nothing_can_be_compiled(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*_: object) -> None:
        raise OSError("CUDA_HOME environment variable is not set")

    monkeypatch.setattr("handler.worker.worker.compile_blocks", no_compiler)
    assert gpu.main(["--tiny", "--items", "1,2", "--save"]) == 1
    assert outcomes(found(tmp_path)) == {"1": "failed"}
    assert "CUDA_HOME" in cases(found(tmp_path))["compiling spark"]["error"]


def test_what_is_not_compiled_gets_no_figures(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handler.worker.worker.compile_blocks", lambda *_: fails())
    assert gpu.main(["--tiny", "--items", "6", "--save"]) == 1
    assert list(cases(found(tmp_path))) == ["Kindling bf16 compiled: its start"]


def test_two_calls_make_one_file(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(gpu, "ITEMS", (item(gpu, 2, a=dict), item(gpu, 3, b=dict)))
    assert gpu.main(["--tiny", "--items", "2", "--save"]) == gpu.main(["--tiny", "--items", "3", "--save"]) == 0
    assert outcomes(found(tmp_path / "out")) == {"2": "done", "3": "done"}
    monkeypatch.setattr("gpurun.ground.commit", lambda: "another")
    assert gpu.main(["--tiny", "--items", "3", "--save"]) == 0
    assert outcomes(found(tmp_path)) == {"3": "done"}


@pytest.mark.parametrize(
    ("card", "picture_ms", "clip"),
    [
        ("NVIDIA H200", " (395)", 3.5),
        ("NVIDIA H100 80GB HBM3", " (438)", 3.5),
        ("NVIDIA L40S", "", None),
        ("NVIDIA A100-SXM4-40GB", " (999)", None),
    ],
)
def test_a_prediction_stands_beside_the_outcome(
    card: str, picture_ms: str, clip: float | None, gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """As lowered.json has it for this card; else, on Hopper, what is kept for cases it does not know."""
    row = {"model": "flux-schnell", "group": "fp8", "encode_ms": 50.7, "denoise_ms": 328.0, "decode_ms": 30.0}
    known = {"H200": 0.395, "H100": 0.438, "L4": 9.9, "A100-40GB": 0.999}
    rows = [{**row, "card": name, "seconds": seconds} for name, seconds in known.items()]
    (tmp_path / "lowered.json").write_text(json.dumps({"predictions": rows}))
    monkeypatch.setattr("gpurun.ground.card", lambda: card)
    pictures = {"Kindling fp8 compiled": lambda: {"picture_ms": 400.0, "step_ms": 80.0}, "CLIP": lambda: {"ms": 4.0}}
    monkeypatch.setattr(gpu, "ITEMS", (item(gpu, 2, **pictures),))
    assert gpu.main(["--tiny", "--save"]) == 0
    assert cases(found(tmp_path))["CLIP"].get("predicted", {}).get("ms") == clip
    assert f"picture_ms 400{picture_ms}, step_ms 80" in capsys.readouterr().out


def test_lowering_that_was_interrupted_predicts_nothing(gpu: Any, tmp_path: Path) -> None:
    from gpurun import predicted

    (tmp_path / "lowered.json").write_text(json.dumps({"benchmark": "lowered", "rows": []}))
    assert predicted.predictions("NVIDIA H200") == predicted.KEPT


def test_what_is_no_number_is_text(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers other than Python's take no NaN."""
    monkeypatch.setattr(gpu, "ITEMS", (item(gpu, 2, a=lambda: {"ms": 1.0, "apart": float("nan")}),))
    assert gpu.main(["--tiny", "--save"]) == 0
    assert "NaN" not in (tmp_path / "gpu.json").read_text()
    assert cases(found(tmp_path))["a"] == {"ms": 1, "apart": "nan"}


def test_tools_that_are_missing_are_told(gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing here may fail: without it there would be no run."""
    from gpurun import ground

    monkeypatch.setenv("PATH", str(tmp_path))
    row = ground.tools()
    assert (row["nvcc"], row["g++"], row["libcuda"]) == ("None", "None", "")
    assert ground.driver() == ""


def test_plain_diffusers_knows_nothing_of_what_was_settled(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpurun import pictures
    from gpurun.scale import TINY, Run

    def by_diffusers(pipeline: Any, *_: Any) -> dict[str, Any]:
        known = families.constants
        return {"known": pipeline.vae in known._runs_on or pipeline.transformer in known._telling}

    monkeypatch.setattr(pictures, "by_diffusers", by_diffusers)
    run = Run(TINY, 60)
    name, case = next(pictures.eager(run))
    assert name == "plain diffusers bf16"
    assert not case()["known"]
    assert by_diffusers(pictures.studio(run).pipeline)["known"]


def test_kernels_that_are_only_taken_when_asked_for_are_measured(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here by the CPU's half of it."""
    from gpurun import parts
    from gpurun.scale import TINY, Run

    monkeypatch.setattr(parts, "refusal", lambda row, *_: "" if row.id in ("native", "cudnn-fp8") else "not here")
    found = {name: case() for name, case in parts.attentions(Run(TINY, 60))}
    assert 0.001 < found["cudnn-fp8 2x144x16"]["apart"] < 0.1


@pytest.mark.parametrize("items", ["", "x", "1-", "1--3", "1,,2"])
def test_items_are_numbers(items: str, gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--items", items])
    assert "such as 1-4,8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--items", "8-99"], "there is no item 10"), (["--seconds", "nan"], "more than 0"), (["--seconds=-5"], "more")],
)
def test_what_would_measure_nothing_is_refused(
    arguments: list[str], told: str, gpu: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(arguments)
    assert told in capsys.readouterr().err


@pytest.fixture
def gpu_wheels(gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The target's script, which downloads wheels of a mebibyte each."""
    from gpurun import wheels

    folder = tmp_path / "wheels"

    def fetch(how: list[str], wanted: list[str]) -> None:
        for name in wanted:
            (folder / f"{name}.whl").write_bytes(bytes(1 << 20))

    monkeypatch.setattr(wheels, "FOLDER", folder)
    monkeypatch.setattr(wheels, "fetch", fetch)
    monkeypatch.setattr(wheels, "git", lambda *words: "LICENSE" if words[0] == "ls-files" else "abc-dirty")
    return wheels


def test_wheels_are_those_that_requirements_pin(gpu_wheels: Any, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_wheels.FOLDER.mkdir()
    (gpu_wheels.FOLDER / "diffusers==0.1.whl").touch()  # of two versions pip would install none
    assert gpu_wheels.main() == 0
    names = {path.name.removesuffix(".whl") for path in gpu_wheels.FOLDER.iterdir()}
    pins = {line for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line}
    assert {name for name in names if name.startswith(("diffusers", "pydantic", "isal", "uvicorn"))} <= pins
    assert (gpu_wheels.FOLDER / "commit").read_text() == "abc-dirty\n"
    assert f"with the tree {len(names) - 1}.0 of 64 MiB" in capsys.readouterr().out


def test_wheels_that_weigh_too_much_fail(gpu_wheels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_wheels, "MOST", 5 << 20)
    assert gpu_wheels.main() == 1
