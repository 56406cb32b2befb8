"""The command line as a newcomer uses it, in real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from handler import MODELS
from handler.codec import read_parameters

ROOT = Path(__file__).parent.parent


def kindling(*arguments: str, cwd: Path = ROOT, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    command = [sys.executable, "-m", "handler", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)


def test_a_first_picture_and_the_same_again(tmp_path: Path) -> None:
    out = kindling("generate", "a red circle on a blue background", "-o", "out.png", "--seed", "3", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    for part in ("out.png", "spark", "256x256", "4 steps", "seed 3", "encode", "denoise", "decode", "loaded in"):
        assert part in out.stdout
    first = (tmp_path / "out.png").read_bytes()
    again = kindling("generate", "--from", "out.png", "-o", "again.png", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again.png").read_bytes() == first
    found = read_parameters(tmp_path / "out.png")
    assert (found["model"], found["seed"], found["steps"], found["precision"]) == ("spark", 3, 4, "fp32")


def test_several_pictures_as_json(tmp_path: Path) -> None:
    out = kindling(
        "generate", "two blue stars", "--n", "2", "--steps", "1", "--seed", "8", "--size", "128x96", "--json",
        "-o", str(tmp_path / "s.webp"), KINDLING_METADATA="0",
    )  # fmt: skip
    reports = [json.loads(line) for line in out.stdout.splitlines()]
    assert [report["seed"] for report in reports] == [8, 9]
    for report in reports:
        with Image.open(report["file"]) as image:
            assert (image.size, image.format) == ((128, 96), "WEBP")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "say what to draw"),
        (("x", "--size", "17x17"), "size"),
        (("x", "--steps", "9"), "at most 8"),
        (("x", "--seed", "-1"), "seed"),
        (("x", "--n", "5"), "n:"),
        (("x", "--guidance", "nan"), "guidance_scale"),
        (("x", "--scheduler", "magic"), "scheduler"),
        (("x", "--model", "nope"), "There is no model 'nope'"),
        (("x", "-o", "out.bmp"), ".png"),
        (("x", "-o", "/no/such/folder/out.png"), "/no/such/folder"),
        (("--from", "README.md"), "README.md"),
        (("--from", "missing.png"), "missing.png"),
    ],
)
def test_bad_usage_is_one_readable_line(arguments: tuple[str, ...], text: str) -> None:
    out = kindling("generate", *arguments)
    assert out.returncode == 2
    assert text in out.stderr
    assert out.stderr.startswith("kindling: ")
    assert out.stderr.count("\n") == 1


def test_unknown_words_are_bad_usage() -> None:
    assert kindling("paint").returncode == 2
    assert kindling("serve", "--port", "many").returncode == 2
    assert kindling().returncode == 2


def test_missing_weights_are_a_failure_not_bad_usage(tmp_path: Path) -> None:
    out = kindling("generate", "x", "--model", "realtime", KINDLING_VOLUME=str(tmp_path))
    assert out.returncode == 1
    assert "hf download black-forest-labs/FLUX.1-schnell" in out.stderr


@pytest.mark.parametrize("verb", ["serve", "generate", "models", "doctor"])
def test_every_verb_has_help(verb: str) -> None:
    out = kindling(verb, "--help")
    assert out.returncode == 0
    assert "usage: kindling" in out.stdout


def test_models_prints_rows_licences_and_modes() -> None:
    out = kindling("models").stdout
    for spec in MODELS.values():
        assert spec.id in out
        assert spec.license.obligation in out
    assert "realtime" in out
    table = json.loads(kindling("models", "--json").stdout)
    assert [row["id"] for row in table["models"]] == list(MODELS)
    assert table["models"][2]["license"]["commercial"] is False


def test_doctor_lists_every_setting() -> None:
    from handler import Settings

    out = kindling("doctor", KINDLING_QUEUE="7")
    assert "* KINDLING_QUEUE" in out.stdout
    assert all(f"KINDLING_{name.upper()}" in out.stdout for name in Settings.model_fields)
    assert json.loads(kindling("doctor", "--json").stdout)["settings"]["queue"] == 32
