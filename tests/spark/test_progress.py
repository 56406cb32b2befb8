"""A stage goes on after a kill at any time: what was saved is whole, and no step of it is lost or done twice."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from spark.progress import Average, Progress, rates

CHILD = """
import io, os, signal, sys
from pathlib import Path
import torch
from test_progress import stage, step

folder, killed, every = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
model, made = stage(folder)
made.resume()
started = made.step
if killed == "in a write":
    save = torch.save
    def torn(state, path):
        whole = io.BytesIO()
        save(state, whole)
        if made.step > started + every:
            path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        path.write_bytes(whole.getvalue())
    torch.save = torn
for _ in range(5 * every):
    step(model, made)
    if made.step % every == 0:
        made.save()
    if killed == "between" and made.step == started + every + 1:
        os.kill(os.getpid(), signal.SIGKILL)
"""
ROOT = Path(__file__).parents[2]


def stage(folder: Path) -> tuple[nn.Module, Progress]:
    """A tiny model with both optimisers that the transformer has, whose gradients come from random numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.ndim == 1], lr=0.1),
        torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.1),
    ]
    parts = {"model": model, "average": Average(model), "optimizers": optimizers}
    return model, Progress(folder / "stage.pt", 60.0, random.Random(0), parts)


def step(model: nn.Module, made: Progress) -> None:
    """One of a training, with random numbers of both kinds."""
    rates(made.parts["optimizers"], 0.1 * made.rng.random())
    loss = (model(torch.randn(3, 4)) - made.rng.random()).square().mean()
    model.zero_grad()
    loss.backward()
    for optimizer in made.parts["optimizers"]:
        optimizer.step()
    [average] = made.parts["average"]
    average.follow(model, 0.9)
    made.tick(3)


def everything(made: Progress) -> str:
    """All that a stage keeps, but for its seconds, as text."""
    state = {name: [each.state_dict() for each in part] for name, part in made.parts.items()}
    return repr((made.step, made.samples, state, made.rng.random(), torch.rand(2)))


@pytest.mark.parametrize("killed", ["in a write", "between"])
def test_a_killed_stage_goes_on_as_if_it_had_not_been(tmp_path: Path, killed: str) -> None:
    """Twice: what went on is killed again."""
    for turn in (1, 2):
        child = subprocess.run(
            [sys.executable, "-c", CHILD, str(tmp_path), killed, "3"],
            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"},
            cwd=ROOT, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert child.returncode == -signal.SIGKILL, child.stderr
        _, again = stage(tmp_path)
        assert again.resume()
        assert again.step == 3 * turn
    straight, whole = stage(tmp_path / "none")
    for _ in range(6):
        step(straight, whole)
    expected = everything(whole)
    again.resume()  # its random numbers too
    assert everything(again) == expected


def test_it_saves_itself_when_that_is_due(tmp_path: Path) -> None:
    model, made = stage(tmp_path)
    step(model, made)
    assert not made.path.exists()
    made.since -= 301  # as if the next step had taken so long
    step(model, made)
    _, again = stage(tmp_path)
    assert again.resume()
    assert again.step == 2
    assert again.elapsed == pytest.approx(301, abs=60)


def test_a_pause_is_not_of_its_time(tmp_path: Path) -> None:
    model, made = stage(tmp_path)
    made.since -= 1000
    made.pause()
    step(model, made)
    assert made.elapsed < 500
    assert made.share < 0.2


def test_nothing_saved_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    _, made = stage(tmp_path)
    assert not made.resume()
    assert (made.step, made.samples, made.share) == (0, 0, 0)
