"""Baking on this machine: what one worker leaves, the next one starts from, and draws the same."""

from pathlib import Path

import numpy as np
import pytest
from conftest import PATIENT
from test_flux import recipe

from handler import Worker
from handler.__main__ import main
from handler.cli.bake import bake
from handler.core.scratch import prefix
from serving import serving


def test_what_is_baked_is_used_and_draws_the_same(compiler: None, tmp_path: Path, spark: Worker) -> None:
    settings = PATIENT.model_copy(update={"volume": tmp_path})
    first = bake(settings.model_copy(update={"ulysses_degree": 3}))  # which spark's heads do not go with
    assert (first.model, first.compile_s > 0) == ("spark", True)
    assert "MB)" in first.weights  # bf16 as shipped, fp32 as served
    assert "MB)" in first.artifacts

    worker = Worker.boot(settings)
    assert (worker.ledger.plan, worker.ledger.plan_reason[:4]) == ("COMPILED", "HIT:")
    assert Path(worker.ledger.weights).parent == tmp_path / "baked" / "spark"
    assert "compile" not in {phase.name for phase in worker.ledger.phases}
    for size in ((256, 256), (384, 320)):  # the second was never seen while compiling
        compiled, eager = (w.generate(recipe(3, size))[0].rgb.astype(int) for w in (worker, spark))
        assert np.abs(compiled - eager).max() <= 1

    again = bake(settings)
    assert again.compile_s == 0
    assert again.artifacts.startswith("HIT")
    assert again.weights.endswith("nothing to gain")
    assert len(list((tmp_path / "baked" / "spark").iterdir())) == 2
    leaves_nothing(tmp_path, tmp_path / "temporary")


def leaves_nothing(volume: Path, temporary: Path) -> None:
    """A server that draws with what was baked, in the folder for temporary files, when it is told to stop."""
    temporary.mkdir()
    (temporary / f"{prefix()}of-one-that-was-killed").mkdir()
    with serving({"KINDLING_VOLUME": str(volume), "TMPDIR": str(temporary)}, anew=True) as server:
        [unpacked] = temporary.glob("kindling-*")
        assert [*unpacked.rglob("*.so")]
        server.process.terminate()
        assert server.process.wait(60) == 0
    assert not [*temporary.glob("kindling-*")]


def test_a_bake_that_is_not_possible_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KINDLING_VOLUME", str(tmp_path))
        assert main(["bake", "flux-schnell", "--json"]) == 1
        assert main(["bake", "nothing"]) == 2
    said = capsys.readouterr().err
    assert "python -m handler fetch flux-schnell" in said
    assert "There is no model 'nothing'" in said
