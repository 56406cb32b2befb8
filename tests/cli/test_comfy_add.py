"""`comfy add`, `list` and `remove`: workflows kept on the volume without a server."""

import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from comfy_graphs import graph, node
from handler.__main__ import main


@pytest.fixture(autouse=True)
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KINDLING_VOLUME", str(tmp_path / "volume"))
    return tmp_path / "volume"


def ran(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["comfy", *words])
    return code, *capsys.readouterr()


def test_a_file_is_kept_listed_and_forgotten(tmp_path: Path, volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made: dict[str, Any] = graph()
    made["10"] = {**node("LoadImage", image="photo.png"), "_meta": {"title": "$photo"}}
    made["11"] = node("VAEEncode", pixels=["10", 0], vae=["4", 2])
    made["3"]["inputs"]["latent_image"] = ["11", 0]
    (tmp_path / "a.json").write_text(json.dumps(made))
    code, told, _ = ran(capsys, "add", "poster", str(tmp_path / "a.json"))
    assert (code, (volume / "comfy/workflows/poster.json").is_file()) == (0, True)
    assert "photo                    image, required" in told
    assert "seed                     integer, -1 to 18446744073709551615" in told
    url = "curl -s http://127.0.0.1:8000/workflows/poster"
    assert f"""{url} -H 'Content-Type: application/json' -d '{{"prompt": "a red circle", "photo": "BASE64"}}'""" in told
    record = json.loads(ran(capsys, "add", "poster", str(tmp_path / "a.json"), "--json")[1])
    assert (record["name"], record["required"], record["drawable"], record["shared"]) == (
        "poster",
        ["photo"],
        True,
        True,
    )
    assert record["version"] in ran(capsys, "list")[1]
    assert [one["name"] for one in json.loads(ran(capsys, "list", "--json")[1])] == ["poster"]
    assert ran(capsys, "remove", "poster") == (0, "poster is forgotten.\n", "")
    assert "comfy add NAME FILE" in ran(capsys, "list")[1]
    assert ran(capsys, "remove", "poster")[0] == 2


def test_the_standard_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = json.dumps(graph()).encode()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert json.loads(ran(capsys, "add", "poster", "-", "--json")[1])["name"] == "poster"


def test_what_is_for_another_model_is_kept_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = graph()
    made["4"]["inputs"]["ckpt_name"] = "sd_xl_base_1.0.safetensors"
    (tmp_path / "a.json").write_text(json.dumps(made))
    code, told, _ = ran(capsys, "add", "poster", str(tmp_path / "a.json"))
    assert (code, "KINDLING_MODEL=sdxl" in told, "KINDLING_MODEL=sdxl" in ran(capsys, "list")[1]) == (0, True, True)


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("Poster", "{}", "is no name for a workflow"),
        ("poster", "no JSON", "The file has no graph"),
        ("poster", None, "No such file or directory"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, data: str | None, why: str
) -> None:
    if data is not None:
        (tmp_path / "a.json").write_text(data)
    code, told, error = ran(capsys, "add", name, str(tmp_path / "a.json"))
    assert (code, told, why in error, error.count("\n")) == (2, "", True, 1)


def test_a_volume_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    (tmp_path / "a.json").write_text(json.dumps(graph()))
    code, _, error = ran(capsys, "add", "poster", str(tmp_path / "a.json"))
    assert (code, "cannot be written, and no store is set" in error) == (1, True)
