"""`comfy convert`: any file in, API format out."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from workflows import api, default, item, png, slot, text_chunk

from handler.__main__ import main


def bare(graph: dict[str, Any]) -> dict[str, Any]:
    return {name: {key: one[key] for key in ("class_type", "inputs")} for name, one in graph.items()}


def test_a_file_is_written_in_api_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, out = tmp_path / "saved.json", tmp_path / "api.json"
    saved.write_text(json.dumps(default()))
    assert main(["comfy", "convert", str(saved)]) == 0
    assert bare(json.loads(capsys.readouterr().out)) == api()
    assert main(["comfy", "convert", str(saved), "-o", str(out)]) == 0
    assert (bare(json.loads(out.read_text())), capsys.readouterr().out) == (api(), "")


def test_what_is_said_goes_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = default()
    found["nodes"].append(item(12, "Custom", ("two",), [slot("image", "IMAGE", 9)]))
    picture = tmp_path / "picture.png"
    picture.write_bytes(png(text_chunk("workflow", found)))
    assert main(["comfy", "convert", str(picture)]) == 0
    out, error = capsys.readouterr()
    assert "12" in json.loads(out)
    assert error.startswith("Node 12 (Custom): its values have no names")
    assert main(["comfy", "convert", str(picture), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["origin"], len(said["notes"]), "12" in said["graph"]) == ("the UI format in a picture", 1, True)
    info = tmp_path / "object_info.json"
    said = {"Custom": {"input": {"required": {"word": [["one", "two"], {"max": float("inf")}]}}}}
    info.write_text(json.dumps(said))
    assert main(["comfy", "convert", str(picture), "--object-info", str(info)]) == 0
    out, error = capsys.readouterr()
    assert (json.loads(out)["12"]["inputs"], error) == ({"word": "two", "image": ["8", 0]}, "")
    monkeypatch.setenv("KINDLING_VOLUME", str(tmp_path))
    main(["comfy", "explain", str(picture), "--object-info", str(info), "--json"])
    assert json.loads(capsys.readouterr().out)["notes"] == []


def test_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(json.dumps(api()).encode())))
    assert main(["comfy", "convert", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == api()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing.json"], "nothing.json cannot be read"),
        (["bad.json"], "The file has no graph: It is no JSON"),
        (["good.json", "--object-info", "list.json"], "list.json is no answer of /object_info"),
        (["good.json", "--object-info", "bad.json"], "bad.json is no answer of /object_info"),
        (["good.json", "--object-info", "nothing.json"], "nothing.json cannot be read"),
        (["good.json", "-o", "no/folder"], "cannot be written"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("[" * 100_000)
    Path("list.json").write_text("[]")
    Path("good.json").write_text(json.dumps(default()))
    assert main(["comfy", "convert", *arguments]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert said in error
