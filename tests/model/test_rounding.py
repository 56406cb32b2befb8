"""torchao rounds weights, and nobody else loads it: not the libraries that would, nor a worker with baked weights."""

import json
import re
import subprocess
import sys
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import tiny
from handler import MODELS, Settings, Worker
from handler.catalog.models import SPARK
from handler.catalog.precisions import PRECISIONS, ROUNDED_BY, SCHEME
from handler.cli.bake import publish_weights
from handler.model.loading.quant import SCHEMES, quantise
from handler.volume.publishing import publishing
from handler.volume.sources import served_source, weight_facts, weights_folder

ROOT = Path(__file__).parents[2]
SERVE = """
import json, sys
from handler import Clock, ImageRequest, Settings, Worker

def loaded():
    return len([name for name, module in sys.modules.items() if name.split(".")[0] == "torchao" and module])

def serve(precision):
    worker = Worker.boot(Settings(volume=sys.argv[1], precision=precision), Clock(3600, publish=lambda ledger: None))
    worker.generate(worker.spec.recipe(ImageRequest(prompt="a red circle", width=64, height=64)))
    return {"precision": worker.hardware.precision, "weights": worker.ledger.weights, "loaded": loaded()}

print(json.dumps([serve(precision) for precision in sys.argv[2:]]))
"""


@pytest.fixture(scope="module")
def baked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume with spark's weights in fp8."""
    volume = tmp_path_factory.mktemp("volume")
    settings = Settings(volume=volume, precision="fp8", compile="off", cold_start_budget_s=3600)
    assert publish_weights(Worker.boot(settings), volume) == weights_folder(SPARK, volume, "fp8")
    return volume


def test_only_weights_that_are_not_baked_load_it_and_quietly(baked: Path) -> None:
    command = [sys.executable, "-c", SERVE, str(baked), "auto", "fp8", "int8"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stderr == ""
    plain, rounded, rounding = json.loads(out.stdout)
    assert (plain["precision"], plain["loaded"]) == ("fp32", 0)
    assert (rounded["weights"], rounded["loaded"]) == (str(weights_folder(SPARK, baked, "fp8")), 0)
    assert rounding["loaded"]


HOST = """
import sys
if "first" in sys.argv[2:]:
    import torchao
from handler import Clock, Settings, Worker
Worker.boot(Settings(volume=sys.argv[1], precision="fp8"), Clock(3600, publish=lambda ledger: None))
import torchao.quantization
print(torchao.quantization.quantize_.__name__)
"""


@pytest.mark.parametrize("when", ["first", "later"])
def test_a_program_that_boots_a_worker_may_use_it_itself(when: str, baked: Path) -> None:
    command = [sys.executable, "-c", HOST, str(baked), when]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert out.stdout == "quantize_\n", out.stderr


@pytest.mark.parametrize("unknown", ["rounded_by", "scheme"])
def test_weights_that_another_version_rounded_are_not_used(unknown: str, tmp_path: Path, baked: Path) -> None:
    older = {name: fact for name, fact in weight_facts(SPARK, "fp8").items() if name != unknown}
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


def test_the_scheme_is_another_where_layers_or_their_parts_are() -> None:
    """What is baked in scheme 1, of one model: change the number in `precisions.py` with this digest."""
    found = blake2b(digest_size=8)
    values = torch.arange(-1024, 1024).reshape(32, 64) / 100
    for name, scheme in sorted(SCHEMES.items()):
        model = tiny.build(MODELS["flux-schnell"]).transformer
        quantise(model, name, "cpu")
        layers = sorted((key, str(part.dtype), [*part.shape]) for key, part in model.state_dict().items())
        found.update(json.dumps([name, PRECISIONS[name].encoders, layers]).encode())
        for part in scheme.parts(values):
            found.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    assert (SCHEME, found.hexdigest()) == ("1", "7c12dfabc5bc3921")
