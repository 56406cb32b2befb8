"""The count of workflows: each is judged as on a worker that has what it names, and the guide says what was counted."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from graphs import node, plain, with_image

ROOT = Path(__file__).parents[2]


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import comfy_corpus

    monkeypatch.setattr(comfy_corpus, "RESULT", tmp_path / "result.json")
    return comfy_corpus


def test_workflows_are_counted_by_kind(corpus: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = plain("sd_xl_base_1.0.safetensors") | {"8": node("Nobody", image=["6", 0])}
    part["9"] = node("SaveImage", images=["8", 0], filename_prefix="x")
    files = {
        "own.json": (
            "image to image",
            "SD1.5 family",
            with_image() | {"1": node("CheckpointLoaderSimple", ckpt_name="a.ckpt")},
        ),
        "part.json": ("text to image", "SDXL family", {"prompt": part}),
        "no.json": ("controlnet", "SD1.5 family", plain(positive=["8", 0]) | {"8": node("ControlNetApply")}),
    }
    (tmp_path / "workflows").mkdir()
    for name, (_, _, graph) in files.items():
        (tmp_path / "workflows" / name).write_text(json.dumps(graph))
    about = [{"file": name, "what": what, "family": family} for name, (what, family, _) in files.items()]
    (tmp_path / "index.json").write_text(json.dumps(about))
    assert corpus.main([tmp_path / "workflows"]) == 0
    report = json.loads((tmp_path / "result.json").read_text())
    assert report["text_and_image_to_image"] == {"all": 2, "drawn": 2}
    assert report["kinds"]["text to image"] == {"runs": 0, "in part": 1, "refused": 0}
    assert "ControlNet is not offered" in capsys.readouterr().out


def test_the_guide_says_what_was_counted() -> None:
    report = json.loads((ROOT / "benchmarks/results/comfy_corpus.json").read_text())
    told = re.findall(r"^\| ([a-z][^|]+) \| (\d+) \| (\d+) \| (\d+) \|$", (ROOT / "docs/comfyui.md").read_text(), re.M)
    counted = {kind: tuple(each.values()) for kind, each in report["kinds"].items()}
    assert {kind: tuple(map(int, counts)) for kind, *counts in told} == counted
