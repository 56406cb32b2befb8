"""torchao rounds weights, and nobody else loads it: not the libraries that would, nor a worker with baked weights."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from handler import Settings, Worker
from handler.bake import publish_weights
from handler.catalog import SPARK
from handler.precisions import PRECISIONS, ROUNDED_BY
from handler.volume import publishing, served_source, weight_facts, weights_folder

ROOT = Path(__file__).parent.parent
SERVE = """
import json, sys
from handler import ImageRequest, Settings, Worker

def loaded():
    return len([name for name, module in sys.modules.items() if name.split(".")[0] == "torchao" and module])

worker = Worker.boot(Settings(volume=sys.argv[1], precision=sys.argv[2], cold_start_budget_s=3600))
worker.generate(worker.spec.recipe(ImageRequest(prompt="a red circle", width=64, height=64)))
told = {"weights": worker.ledger.weights, "serving": loaded()}
if len(sys.argv) > 3:
    import torch
    from handler.quant import SCHEMES
    told["dtype"] = str(SCHEMES["fp8"].parts(torch.ones(32, 32))[0].dtype)
    told["rounding"] = loaded()
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def baked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume with spark's weights in fp8."""
    volume = tmp_path_factory.mktemp("volume")
    settings = Settings(volume=volume, precision="fp8", compile="off", cold_start_budget_s=3600)
    assert publish_weights(Worker.boot(settings), volume) == weights_folder(SPARK, volume, "fp8")
    return volume


def served(*given: object) -> dict[str, object]:
    code = [sys.executable, "-c", SERVE, *map(str, given)]
    out = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stderr == ""
    told: dict[str, object] = json.loads(out.stdout)
    return told


def test_a_worker_never_loads_it(tmp_path: Path) -> None:
    assert served(tmp_path, "auto")["serving"] == 0


def test_baked_weights_need_none_of_it_and_later_ones_are_rounded_all_the_same(baked: Path) -> None:
    told = served(baked, "fp8", "then round")
    assert (told["weights"], told["serving"]) == (str(weights_folder(SPARK, baked, "fp8")), 0)
    assert told["dtype"] == "torch.float8_e4m3fn"
    assert told["rounding"]


def test_weights_that_are_not_baked_are_rounded_without_a_word(tmp_path: Path) -> None:
    assert served(tmp_path, "int8")["serving"]


def test_weights_that_another_version_rounded_are_not_used(tmp_path: Path, baked: Path) -> None:
    older = {name: fact for name, fact in weight_facts(SPARK, "fp8").items() if name != "rounded_by"}
    with publishing(tmp_path / "baked" / SPARK.id / "fp8-embedded", older) as folder:
        (folder / "model_index.json").write_text("{}")
    assert served_source(SPARK, tmp_path, "fp8").precision == ""
    assert served_source(SPARK, baked, "fp8").precision == "fp8"
    assert weights_folder(SPARK, tmp_path, "fp8").name != "fp8-embedded"
    assert weights_folder(SPARK, tmp_path, "bf16").name == "bf16-embedded"  # nothing rounds these


def test_the_version_is_the_one_that_is_required() -> None:
    [pinned] = re.findall(r"^torchao==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert f"torchao {pinned}" == ROUNDED_BY
    assert pinned == version("torchao")


def test_only_rounded_weights_name_it() -> None:
    named = {precision for precision in PRECISIONS if "rounded_by" in weight_facts(SPARK, precision)}
    assert named == {precision for precision, row in PRECISIONS.items() if row.quantised}
