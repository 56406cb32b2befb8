"""What is changed in libraries does what it did, and is put back; what they are told later they are told in full."""

import importlib.metadata
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from handler.model import structure, upstream
from handler.model.compiler import is_compiled_module, lru_cache_unless_export
from handler.model.loading.weightless import Weightless

LEAN = """
import threading
from handler.model import imports, upstream
upstream.dedicated()
with imports.lean():
    import handler.model.families.flux
"""
RACE = """
from handler.model import imports
with imports.lean():
    import diffusers.utils
    other = threading.Thread(target=lambda: __import__("torch._dynamo.guards"))
    other.start()
    other.join()
"""
COMPILED = """
import json, sys
import diffusers, torch
waited = "torch._dynamo" not in sys.modules
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.utils.torch_utils import is_compiled_module
from transformers.integrations import deepgemm

model = FluxTransformer2DModel(
    in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
)
given = {
    "hidden_states": torch.ones(1, 4, 4), "encoder_hidden_states": torch.ones(1, 3, 8),
    "pooled_projections": torch.ones(1, 8), "timestep": torch.tensor([0.5]),
    "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3), "return_dict": False,
}
graphs = []

def backend(graph, _):
    graphs.append(len(graph.graph.nodes))
    return graph.forward

compiled = torch.compile(model, backend=backend, fullgraph=True)
with torch.no_grad():
    equal = torch.equal(model(**given)[0], compiled(**given)[0])

class Bar:
    _progress_bar_config = {"disable": True}
    progress_bar = diffusers.DiffusionPipeline.progress_bar

def use(tensor):
    Bar().progress_bar([1])
    return tensor + 1

try:
    torch.compile(use, backend="eager", fullgraph=True)(torch.ones(1))
    broken = ""
except torch._dynamo.exc.Unsupported as error:
    broken = str(error).splitlines()[0]
import torch._dynamo._trace_wrapped_higher_order_op as part
import torch._inductor.config, torch.distributed.fsdp, torch.distributed.tensor
told = vars(diffusers.DiffusionPipeline.progress_bar)
print(json.dumps({
    "equal": equal, "graphs": graphs, "broken": broken,
    "loose": torch.compile(use, backend="eager")(torch.ones(1)).item(),
    "allowed": id(BasicTransformerBlock) in torch._dynamo.trace_rules._allowed_callable_ids,
    "constant": sorted(n for n, f in vars(deepgemm).items() if getattr(f, "_dynamo_marked_constant", False)),
    "disabled": {name: told[name] for name in told if name.endswith(("_disable", "_recursive", "_msg"))},
    "asked": [is_compiled_module(compiled), is_compiled_module(model)],
    "part": torch._dynamo._trace_wrapped_higher_order_op is part,
    "available": torch.distributed.is_available(),
}))
print(waited)
"""


def compiled(first: str) -> tuple[dict[str, Any], bool]:
    """How torch compiles diffusers' models and functions in a process that begins like this; whether it had to come."""
    run = [sys.executable, "-c", f"import threading\n{first}\n{COMPILED}"]
    out = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return json.loads(out[-2]), out[-1] == "True"


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """The same where nothing is changed."""
    found, waited = compiled("")
    assert not waited
    assert found["constant"]
    return found


@pytest.mark.parametrize(("first", "waits"), [(LEAN, True), (RACE, False)])
def test_what_compiles_later_compiles_as_if_the_compiler_had_been_there(
    first: str, waits: bool, plain: dict[str, Any]
) -> None:
    assert compiled(first) == (plain, waits)


LATER = """
from handler.model import imports
with imports.lean():
    from torch._dynamo import disable
import torch
print(disable(torch.nn.Identity())(3))
"""


def test_who_took_a_function_of_the_compiler_along_has_all_of_it() -> None:
    out = subprocess.run([sys.executable, "-c", LATER], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout == "3\n", out.stderr


FINGERPRINT = """
import sys
from handler.model import upstream
from handler.model.compiling.artifacts import _inductor
alone = _inductor(), "torch._dynamo" in sys.modules
import torch, torch._inductor
assert torch._inductor.config is upstream.inductor()
upstream.MEASURES = {}
print(alone == (_inductor(), False), torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())
"""


def test_inductors_settings_are_the_same_without_inductor() -> None:
    out = subprocess.run([sys.executable, "-c", FINGERPRINT], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["True", "2.0"]


def test_what_was_changed_is_as_before_when_the_last_has_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = importlib.import_module("transformers.utils.import_utils")

    def now() -> list[Any]:
        found = utils.define_import_structure, importlib.metadata.packages_distributions
        return [*found, torch.distributed.is_available, [*sys.meta_path]]

    monkeypatch.setattr(upstream, "_alone", True)
    before, inner = now(), upstream.changed()
    with upstream.changed():
        inner.__enter__()
        assert not torch.distributed.is_available()
        assert importlib.metadata.packages_distributions is upstream.Distributions
    assert not torch.distributed.is_available()
    threading.Thread(target=inner.__exit__, args=(None, None, None)).run()
    assert now() == before


def test_a_change_that_fails_is_taken_back_and_made_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [*sys.meta_path]
    with monkeypatch.context() as without:
        without.delattr(importlib.metadata, "packages_distributions")
        with pytest.raises(AttributeError, match="packages_distributions"), upstream.changed():
            pass
    assert sys.meta_path == before
    with upstream.changed():
        assert importlib.metadata.packages_distributions is upstream.Distributions
    assert importlib.metadata.packages_distributions is not upstream.Distributions


def test_distributions_are_what_they_are_and_asked_once_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = importlib.metadata.packages_distributions(), list[int]()
    monkeypatch.setattr(upstream.Distributions, "_ask", staticmethod(lambda: asked.append(1) or real))
    found = upstream.Distributions()
    assert asked == []
    assert (found, found["PIL"], found.get("nothing", []), len(found)) == (real, ["pillow"], [], len(real))
    assert asked == [1]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of transformers' models, in an environment where byte code is written."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    folder = tmp_path / "transformers" / "models"
    (folder / "clip").mkdir(parents=True)
    (folder / "__init__.py").touch()
    return folder


FOUND: structure.Structure = {
    frozenset(): {"clip.configuration": {"B", "A"}},
    frozenset({"torch"}): {"clip.modeling": {"C"}},
}


def test_models_are_looked_through_once_and_anew_where_others_are(models: Path) -> None:
    looked: list[Path] = []
    find = structure.kept(lambda folder, prefix=None: looked.append(folder) or FOUND, "5.0")  # type: ignore[func-returns-value]
    [first, again, beside] = [find(models), find(models / "__init__.py"), find(models, prefix="models")]
    assert (first, again, looked) == (FOUND, FOUND, [models])
    assert beside[frozenset({"torch"})] == {"models.clip.modeling": {"C"}}
    find(models / "clip")
    assert looked == [models, models / "clip"]  # a model's own files are few

    [file] = models.parent.parent.glob("__pycache__/transformers-5.0.*.json")
    assert file.stat().st_mode & 0o044  # as byte code: one user builds an image, another runs it
    (models / "t5").mkdir()
    assert find(models) == FOUND
    kept = file.read_text()
    for damaged in ("", "{}", "[]", '{"models": 1}', kept.replace("structure", "other")):
        file.write_text(damaged)
        assert find(models) == FOUND
    file.write_text(json.dumps(json.loads(file.read_text()) | {"structure": [[[], 5]]}))  # of another release of ours
    assert find(models) == FOUND
    assert looked[2:] == [models] * 7
    structure.kept(lambda folder, prefix=None: looked.append(folder) or FOUND, "5.1")(models)  # type: ignore[func-returns-value]
    assert len(looked) == 10


def test_models_are_looked_through_anew_once_the_package_is_installed_again(models: Path) -> None:
    looked: list[Path] = []
    find = structure.kept(lambda folder, prefix=None: looked.append(folder) or FOUND, "5.0")  # type: ignore[func-returns-value]
    find(models)
    [file] = models.parent.parent.glob("__pycache__/transformers-5.0.*.json")
    (record := models.parent.parent / "transformers-5.0.dist-info" / "RECORD").parent.mkdir()
    record.touch()
    for before, times in ((1, 1), (0, 1), (-1, 2)):  # an image's files may all have one date
        date = file.stat().st_mtime - before
        os.utime(record, (date, date))
        assert (find(models), len(looked)) == (FOUND, times)


def test_where_no_byte_code_is_written_nothing_is(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    find = structure.kept(lambda folder, prefix=None: FOUND, "5.0")
    assert find(models) == find(models) == FOUND
    assert [path.name for path in models.parent.parent.iterdir()] == ["transformers"]


def test_what_is_made_without_values_is_what_it_would_be() -> None:
    def made() -> list[torch.Tensor]:
        with torch.device("meta"):
            layer, counted = torch.nn.Linear(2, 3), torch.arange(1, 9, 2, dtype=torch.int32)
        torch.nn.init.normal_(layer.weight, std=9.0)
        likes = [torch.empty_like(counted, device="cpu", dtype=dtype) for dtype in (None, torch.float16)]
        return [layer.weight, layer.bias, counted, *likes, torch.arange(3)]

    with Weightless():
        found = made()
        torch.manual_seed(1)
        filled = torch.nn.init.normal_(torch.empty(5))
    told = [[(t.shape, t.dtype, t.device, type(t), t.requires_grad) for t in each] for each in (found, made())]
    assert told[0] == told[1]
    assert found[-1].tolist() == [0, 1, 2]
    torch.manual_seed(1)
    assert torch.equal(filled, torch.nn.init.normal_(torch.empty(5)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of its own
def test_what_is_looked_up_is_kept_but_for_the_compiler() -> None:
    calls: list[int] = []
    twice = lru_cache_unless_export(maxsize=4)(lambda number: calls.append(number) or 2 * number)  # type: ignore[func-returns-value]
    assert [twice(2), twice(2), calls] == [4, 4, [2]]
    seen = torch.compile(lambda tensor: tensor * twice(3), backend="eager")
    assert seen(torch.ones(1)).item() == 6
    assert (is_compiled_module(seen), is_compiled_module(torch.compile(torch.nn.Identity()))) == (False, True)
