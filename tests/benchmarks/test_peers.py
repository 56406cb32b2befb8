"""Kindling beside its peers: each of them draws the same pictures, and a row says who is ahead."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import ROOT
from diffusers import FluxPipeline

PEERS = ROOT / ".venv/peers"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark, which finds its own `serving` and not that of the tests."""
    for folder in ("benchmarks/contestants", "benchmarks"):
        monkeypatch.syspath_prepend(ROOT / folder)
    monkeypatch.delitem(sys.modules, "serving", raising=False)
    import peers

    return peers


def environment(name: str) -> Path:
    """Where its server is installed; FastAPI is among what the tests need anyhow."""
    module = {"fastapi": "fastapi", "litserve": "litserve"}.get(name.partition("-")[0])
    if not module or importlib.util.find_spec(module):
        return Path(sys.prefix)
    if (PEERS / "ready").exists():
        return PEERS
    pytest.skip(f"{module} is not installed: `make peers` installs it")


@pytest.fixture(params=["kindling", "fastapi", "litserve"])
def running(peers: Any, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    with peers.running(request.param, tmp_path, environment(request.param)) as found:
        yield found


@pytest.fixture(scope="module")
def pipeline() -> Any:
    found = FluxPipeline.from_pretrained(ROOT / "handler/weights/spark", dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    return found


def test_it_draws_the_pictures_that_diffusers_draws(peers: Any, running: Any, pipeline: Any) -> None:
    """For a crowd too, of which each gets its own; and what it took is counted."""
    import plainly

    case = peers.Case(64, 2, 3, 3, 1)
    took = peers.turn(running, case, 1)
    assert 0 < took["picture_s"] <= took["latency_p50_s"] <= took["latency_p99_s"]
    assert took["processor_s"] > 0
    memory = running.memory_mb()
    assert 100 < memory["held_mb"] <= memory["peak_mb"]
    for body, outcome in zip(case.bodies(1), peers.complete(running.server.load(case.bodies(1), 3)[1]), strict=True):
        seeds = [body["seed"], body["seed"] + 1]
        images = plainly.drawn(pipeline, [body["prompt"]] * 2, 1, seeds, body["size"], peers.STEPS)
        for png, image in zip(peers.pngs(outcome), images, strict=True):
            assert abs(peers.pixels(png) - numpy.asarray(image, int)).max() <= 2


def test_a_row_says_who_is_ahead(peers: Any, capsys: pytest.CaptureFixture[str]) -> None:
    took = {"kindling": 1.0, "fastapi": 2.0, "litserve": 0.5, "fastapi-compiled": 0.25}
    row = peers.row(
        "a row", {name: {"picture_s": seconds, "processor_s": 2} for name, seconds in took.items()}, "picture_s"
    )
    assert row["ratios"] == {"kindling/fastapi": 0.5, "kindling/litserve": 2}
    assert row["processor_ratios"] == {"kindling/fastapi": 1, "kindling/litserve": 1}
    assert peers.behind([row]) == ["a row: kindling/litserve 2.0"]
    assert "behind: a row: kindling/litserve 2.0" in capsys.readouterr().out


def test_without_their_environment_it_says_how_to_make_it(
    peers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["peers.py", "--environment", str(tmp_path)])
    with pytest.raises(SystemExit, match="`make peers` installs"):
        peers.main()


def test_a_server_that_ends_is_no_endless_wait(peers: Any, tmp_path: Path) -> None:
    """Its interpreter has no FastAPI, say; here it is none."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to("/bin/false")
    with pytest.raises(SystemExit, match="did not start"), peers.running("fastapi", tmp_path, tmp_path):
        pass
