"""The command line as a newcomer uses it, in real processes."""

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from disks import hanging
from PIL import Image

import forked
import tiny
from fakes import raises
from handler import MODELS, ImageRequest, Settings, Worker
from handler.__main__ import main
from handler.api.codec import encode, parameters_of, read_parameters
from handler.api.dialects import openai
from handler.api.recipes import recipes_of
from handler.cli import again, doctor, findings, generate, models
from handler.cli.configured import described, listed
from handler.core.errors import BudgetExceeded, InvalidValue, SettingsError, StartError, VolumeFailed
from handler.core.reading import Reading
from handler.core.sampling import Sampling
from handler.model.hardware import detect
from handler.server.shutdown import Server
from loras import LAYERS, matrices, peft, put

ROOT = Path(__file__).parents[2]


def kindling(*arguments: str, cwd: Path = ROOT, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    command = [sys.executable, "-m", "handler", *arguments]
    return forked.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)


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


def test_words_that_spark_does_not_know_are_named(tmp_path: Path) -> None:
    asked = ("--steps", "1", "--size", "64x64", "-o", str(tmp_path / "out.png"))
    told = kindling("generate", "a cat in a hat", *asked).stdout
    assert "  spark does not know: cat, hat. It knows shapes, colours, sizes, places and backgrounds.\n" in told
    assert "does not know" not in kindling("generate", "a red circle", *asked).stdout
    assert json.loads(kindling("generate", "a cat", *asked, "--json").stdout)["unknown_words"] == ["cat"]
    assert "unknown_words" not in json.loads(kindling("generate", "a red circle", *asked, "--json").stdout)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "say what to draw"),
        (("x", "--size", "17x17"), "size"),
        (("x", "--steps", "9"), "at most 8"),
        (("x", "--seed", "-2"), "seed"),
        (("x", "--n", "11"), "n:"),
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


def test_ctrl_c_is_told_by_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(options: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "kindling: stopped\n"


@pytest.mark.parametrize("buffered", ["", "1"])
def test_what_cannot_be_printed_is_said_once(buffered: str) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "handler", "models"]
        environ = {**os.environ, "PYTHONUNBUFFERED": buffered}
        out = subprocess.run(
            command, cwd=ROOT, env=environ, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300, check=False
        )
    told = [line for line in out.stderr.splitlines() if line.strip()]
    assert (out.returncode, told) == (1, ["kindling: what this prints cannot be written (No space left on device)."])


def test_an_error_of_a_file_prints_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("handler.cli.models.run", lambda _: Path("/none/there").read_text())
    with pytest.raises(FileNotFoundError):
        main(["models"])
    assert capsys.readouterr().out == ""


def test_unknown_words_are_bad_usage() -> None:
    assert kindling("paint").returncode == 2
    assert kindling("serve", "--port", "many").returncode == 2
    assert kindling().returncode == 2


def test_missing_weights_are_a_failure_not_bad_usage(tmp_path: Path) -> None:
    out = kindling("generate", "x", "--model", "realtime", KINDLING_VOLUME=str(tmp_path))
    assert out.returncode == 1
    assert "Fetch it with: python -m handler fetch flux-schnell" in out.stderr


@pytest.mark.parametrize("verb", ["serve", "generate", "models", "fetch", "bake", "doctor"])
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


def test_doctor_tells_everything(tmp_path: Path) -> None:
    (tmp_path / "boots").mkdir()
    failed = {"model": "spark", "outcome": "failed", "reason": "budget of 1 s in phase 'import'", "total_s": 1.0}
    (tmp_path / "boots" / "2026-01-01T00-00-00-host-1.json").write_text(json.dumps(failed))
    out = kindling("doctor", KINDLING_QUEUE="7", KINDLING_VOLUME=str(tmp_path))
    assert out.returncode == 0, out.stderr
    assert all(f"KINDLING_{name.upper()}" in out.stdout for name in Settings.model_fields)
    for part in ("environment", "default", "GB of memory free", "writable", "not fetched", "in all: fits the budget"):
        assert part in out.stdout
    assert "failed: budget of 1 s in phase 'import'" in out.stdout


def test_doctor_of_a_model_that_nobody_knows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told at once, not as a volume that does not answer."""
    monkeypatch.setenv("KINDLING_MODEL", "nonsense")
    assert main(["doctor"]) == 2
    out = capsys.readouterr()
    assert out.err.startswith("kindling: There is no model 'nonsense'. Known: spark, ")
    assert out.err.endswith("KINDLING_MODEL or the command should name one.\n")
    assert not out.out


def test_doctor_lists_settings_though_some_are_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each that is, with the reason; and never its value, which may be a key in the wrong place."""
    for name, value in {"MODLE": "canary", "QUEUE": "canary", "STEP_CACHE": "off"}.items():
        monkeypatch.setenv(f"KINDLING_{name}", value)
    assert main(["doctor"]) == 2
    out, err = capsys.readouterr()
    rows = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert {f"KINDLING_{name.upper()}" for name in Settings.model_fields} | {"KINDLING_MODLE"} == rows.keys()
    assert "WRONG: KINDLING_MODLE is not a setting. Did you mean KINDLING_MODEL?" in rows["KINDLING_MODLE"]
    assert "WRONG: KINDLING_QUEUE: should be a whole number." in rows["KINDLING_QUEUE"]
    assert "WRONG" not in rows["KINDLING_STEP_CACHE"]
    assert err.startswith("kindling: KINDLING_MODLE is not a setting")
    assert "canary" not in out + err
    assert main(["doctor", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["settings"]["KINDLING_MODLE"]["value"] is None


def test_what_stdout_cannot_spell_is_spelt_otherwise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KINDLING_\udcff", "1")
    assert main(["doctor"]) == 2
    assert r"KINDLING_\udcff is not a setting" in capsys.readouterr().out


def test_a_setting_is_listed_as_its_variable_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINDLING_CORS_ORIGINS", "http://a.example, http://b.example")
    settings, faults = Settings.examined(os.environ)
    rows = {line.split()[0]: line.split()[1:3] for line in listed(described(settings, faults))}
    assert rows["KINDLING_CORS_ORIGINS"] == ["http://a.example,http://b.example", "environment"]
    assert rows["KINDLING_GPU_PRICE"] == rows["KINDLING_VAE"] == ["-", "default"]


def test_doctor_says_where_each_setting_is_from_and_what_has_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", "https://s3.example")
    monkeypatch.setenv("RUNPOD_POD_ID", "p")
    monkeypatch.setenv("KINDLING_CAP_ACTION", "refuse")
    settings, faults = Settings.examined(os.environ)
    rows = described(settings, faults)
    assert rows["KINDLING_STORE_ENDPOINT"]["source"] == "BUCKET_ENDPOINT_URL"
    assert rows["KINDLING_STORE_ENDPOINT"]["meaning"].endswith("NO EFFECT without KINDLING_STORE_BUCKET")
    assert rows["KINDLING_PLATFORM"] | {"value": "runpod", "source": "detected"} == rows["KINDLING_PLATFORM"]
    assert rows["KINDLING_CAP_ACTION"]["meaning"].endswith("NO EFFECT without KINDLING_MONTHLY_CAP")
    assert rows["KINDLING_STORE_REGION"]["source"] == "default"
    assert rows["KINDLING_QUEUE"]["meaning"].endswith("(1 to 10000)")
    assert rows["KINDLING_GPU_PRICE"]["meaning"].endswith("(0 to 1000)")
    assert rows["KINDLING_QUEUE_S"]["meaning"].endswith("(above 0 to 86400)")
    used = settings.model_copy(update={"store_bucket": "b", "monthly_cap": 1})
    assert not [row for row in described(used, {}).values() if "NO EFFECT" in row["meaning"]]


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("vae", "/nonexistent", "KINDLING_VAE: /nonexistent has no config.json."),
        ("vae", "foo", "KINDLING_VAE: 'foo' is not an absolute path"),
        ("step_cache", "on", "KINDLING_STEP_CACHE: spark cannot have a step cache"),
        ("ulysses_degree", 3, "KINDLING_ULYSSES_DEGREE: the model has 4 heads of attention"),
        ("ring_degree", 2, "KINDLING_RING_DEGREE: a CPU cannot compute ring attention"),
        ("cap_action", "refuse", "a CPU has no list price; set KINDLING_GPU_PRICE"),
        ("model", "flux-schnell", "does not fit"),
    ],
)
def test_doctor_knows_what_ends_a_start(name: str, value: Any, told: str, tmp_path: Path) -> None:
    """It was told to fit the budget."""
    tiny.write(MODELS["flux-schnell"], tmp_path)
    settings = Settings(volume=tmp_path, monthly_cap=1, **{name: value})
    hardware = replace(detect(settings), memory_gb=2)
    assert told in doctor.cold_start(settings, hardware)["reason"]


def test_doctor_names_the_phase_of_a_start_that_failed() -> None:
    boot = {"boot": "1", "outcome": "failed", "reason": "no such file", "phase": "weights"}
    assert findings._boot(boot).endswith("failed: no such file (in phase 'weights')")
    assert findings._boot(boot | {"reason": "past its budget in phase 'weights'"}).endswith("in phase 'weights'")
    assert findings._boot(boot | {"boot": "a\udcff", "model": "\x1b[2J"}).isprintable()


def test_a_setting_that_ends_a_start_is_bad_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever verb meets it; and past the budget is 124 for all."""
    engine: Any = SimpleNamespace(error=None)
    server = Server(uvicorn.Config(lambda: None), engine, lambda: None)
    for error, code in ((None, 0), (SettingsError("x"), 2), (StartError("x"), 1), (BudgetExceeded("x"), 124)):
        engine.error = error
        assert server.code == code
    monkeypatch.setenv("KINDLING_STEP_CACHE", "on")
    assert main(["generate", "x", "-o", str(tmp_path / "out.png")]) == 2
    monkeypatch.setattr("handler.cli.generate.Worker.boot", lambda *_: raises(BudgetExceeded("late"))())
    monkeypatch.setenv("KINDLING_STEP_CACHE", "off")
    assert main(["generate", "x", "-o", str(tmp_path / "out.png")]) == 124
    assert "124 past the" in kindling("--help").stdout


def test_a_receipt_to_use_has_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["receipts", "use"]) == 2
    assert "Say which receipt to use" in capsys.readouterr().err


def test_doctor_as_json(tmp_path: Path) -> None:
    found = json.loads(kindling("doctor", "--json", KINDLING_VOLUME=str(tmp_path / "none")).stdout)
    assert found["settings"]["KINDLING_QUEUE"]["value"] == 32
    assert found["settings"]["KINDLING_VOLUME"]["source"] == "environment"
    assert (found["volume"]["there"], found["volume"]["free"], found["boots"]) == (False, None, [])
    estimate = found["cold_start"]
    assert estimate["total_s"] == pytest.approx(sum(part["seconds"] for part in estimate["parts"]))
    assert estimate["plan"]["mode"] == "EAGER"
    assert {model["id"]: model["fetched"] for model in found["models"]}["spark"] is True


VERBS = ("fetch", "bake", "optimize", "receipts list", "receipts show", "generate x", "serve --port 0")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("below", ["", "volume"])
def test_a_volume_that_is_no_folder_ends_each_verb(verb: str, below: str, tmp_path: Path) -> None:
    (volume := tmp_path / "volume").write_text("x")
    out = kindling(*verb.split(), KINDLING_VOLUME=str(volume / below))
    assert out.returncode == 1, out.stdout + out.stderr
    assert f"The volume {volume / below} is not a folder. KINDLING_VOLUME should name one." in out.stderr
    assert "served from" not in out.stderr
    assert "Traceback" not in out.stderr


@pytest.mark.parametrize("verb", VERBS[:3])
def test_one_that_cannot_be_read_is_named_by_those_that_need_it(verb: str, tmp_path: Path) -> None:
    (volume := tmp_path / "volume").symlink_to(volume)
    out = kindling(*verb.split(), KINDLING_VOLUME=str(volume), KINDLING_MODEL="flux-schnell")
    assert out.returncode == 1, out.stdout + out.stderr
    assert re.search(rf"kindling: .*Cannot read {volume}/.*: Too many levels of symbolic links\.", out.stderr)
    assert "Traceback" not in out.stderr


@pytest.mark.parametrize("told", ["is not a folder", "Too many levels of symbolic links"])
def test_doctor_and_models_say_what_is_wrong_with_a_volume(told: str, tmp_path: Path) -> None:
    volume, hardware = tmp_path / "volume", detect(Settings())
    if told == "is not a folder":
        volume.write_text("x")
    else:
        volume.symlink_to(volume)
    with pytest.raises(VolumeFailed, match=told):
        doctor.volume_state(volume)
    assert told in models.state(MODELS["flux-schnell"], Settings(volume=volume), hardware).reason
    assert told in doctor.cold_start(Settings(volume=volume, model="flux-schnell"), hardware)["reason"]


def test_a_volume_that_is_not_there_yet_is_no_failure(tmp_path: Path) -> None:
    found = doctor.volume_state(tmp_path / "volume")
    assert found == {"path": str(tmp_path / "volume"), "there": False, "writable": False, "refusal": "", "free": None}
    assert doctor.volume_state(tmp_path)["free"] > 0


def test_a_volume_that_hangs_does_not_hang_the_doctor(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "flux-schnell" / MODELS["flux-schnell"].revision
    folder.mkdir(parents=True)
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "KINDLING_VOLUME": str(tmp_path)}
    command = hanging("manifest.json", "doctor")
    out = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert out.returncode == 0, out.stderr
    assert "the volume does not answer" in out.stdout


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A picture to be made again, in this process, which is older than a cold start may be."""
    monkeypatch.setenv("KINDLING_COLD_START_BUDGET_S", "3600")
    asked = ["a red circle", "--size", "64x64", "--steps", "1", "--seed", "3", "-o", str(tmp_path / "a.png")]
    assert main(["generate", *asked]) == 0
    return tmp_path / "a.png"


def test_nothing_may_contradict_the_picture_to_be_made_again(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, value in {
        "--seed": "1", "--steps": "8", "--size": "512x512", "--n": "2", "--model": "flux-dev", "--guidance": "2",
        "--scheduler": "heun", "--negative-prompt": "blurry", "--strength": "0.5",
    }.items():  # fmt: skip
        assert main(["generate", "--from", str(source), option, value, "-o", str(tmp_path / "b.png")]) == 2
        told = capsys.readouterr().err
        assert told.startswith("kindling: ")
        assert value in told
        assert option.strip("-") in told
    assert main(["generate", "a green ring", "--from", str(source)]) == 2
    assert "has prompt 'a red circle', and the prompt says 'a green ring'" in capsys.readouterr().err
    said = again.read(source, [], None)
    alike = ["a red circle", "--seed", "3", "--steps", "1", "--size", "64x64", "--n", "1", "--model", "spark"]
    options = _parsed(*alike, "--guidance", "0", "--scheduler", "flow-match-euler", "--step-cache", "off")
    again.refuse_contradiction(said, options, openai.parse(generate._fields(options)))


def test_a_picture_by_comfyuis_sampling_is_made_again(
    spark: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KINDLING_COLD_START_BUDGET_S", "3600")
    sampling = Sampling(sampler="dpmpp_sde", scheduler="karras", steps=2, shift=3.0)
    request = ImageRequest(prompt="a ring", n=2, seed=3, width=64, height=64, sampling=sampling, reading=Reading())
    _, second = recipes_of(request, spark.spec, "off")
    (tmp_path / "one.png").write_bytes(
        encode(spark.generate(second)[0].rgb, "png", 95, generate.parameters_for(spark, second))
    )
    assert main(["generate", "--from", str(tmp_path / "one.png"), "-o", str(tmp_path / "two.png")]) == 0
    assert capsys.readouterr().err == ""
    assert (tmp_path / "two.png").read_bytes() == (tmp_path / "one.png").read_bytes()
    for option, value in (("--steps", "3"), ("--scheduler", "euler")):
        assert (
            main(["generate", "--from", str(tmp_path / "one.png"), option, value, "-o", str(tmp_path / "x.png")]) == 2
        )
        assert f"{option} says" in capsys.readouterr().err


def test_what_differs_from_where_a_picture_was_made_is_told_in_words(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--from", str(source), "-o", str(tmp_path / "same.png")]) == 0
    assert capsys.readouterr().err == ""
    assert (tmp_path / "same.png").read_bytes() == source.read_bytes()
    found = read_parameters(source)
    assert found["threads"] == str(torch.get_num_threads())
    elsewhere = {"threads": "96", "torch": "2.0", "device": "CPU Apple M1", "version": "0.0.1", "batch": "3"}
    source.write_bytes(encode(np.full((64, 64, 3), 9, np.uint8), "png", 95, found | elsewhere))
    assert main(["generate", "--from", str(source), "-o", str(tmp_path / "other.png")]) == 0
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    for name, was in elsewhere.items():
        assert f"{name} was {was} and is " in told
    assert (tmp_path / "other.png").read_bytes() == (tmp_path / "same.png").read_bytes()


def _parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    return parser.parse_args(arguments)


STRANGE = [
    {"precision": "int3"},
    {"attention": []},
    {"vae": None},
    {"plan": 3},
    {"version": 3},
    {"seed": None},
    {"steps": None},
    {"loras": [{"name": "ink", "weight": 1.0}]},
    {"loras": [{"name": "ink", "weight": 1.0, "sha256": 7}]},
]


@pytest.mark.parametrize("strange", STRANGE, ids=str)
def test_what_no_worker_could_have_been_is_no_picture_to_make_again(strange: dict[str, Any], tmp_path: Path) -> None:
    spec, facts = MODELS["spark"], {"precision": "fp32", "attention": "native", "plan": "EAGER", "vae": ""}
    found = parameters_of(spec.recipe(ImageRequest(prompt="a ring", seed=1)), facts, "1")
    (tmp_path / "a.png").write_bytes(encode(np.zeros((8, 8, 3), np.uint8), "png", 95, found))
    assert again.read(tmp_path / "a.png", [], None).settings(Settings()).precision == "fp32"
    (tmp_path / "a.png").write_bytes(encode(np.zeros((8, 8, 3), np.uint8), "png", 95, found | strange))
    with pytest.raises(InvalidValue, match="its parameters are incomplete"):
        again.read(tmp_path / "a.png", [], None)


def test_a_lora_from_the_command_line_and_made_again(
    spark: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = peft(matrices(spark._pipeline.transformer, LAYERS))
    lora = put(tmp_path / "loras/styles/ink.safetensors", parts, 1.0, {"modelspec.trigger_phrase": "inked"})
    (tmp_path / "loras/torn.safetensors").write_bytes(b"torn")
    monkeypatch.setenv("KINDLING_VOLUME", str(tmp_path))
    monkeypatch.setenv("KINDLING_COLD_START_BUDGET_S", "3600")
    monkeypatch.chdir(tmp_path)
    small = ("--size", "64x64", "--steps", "1")
    assert main(["generate", "a ring", *small, "--seed", "1", "--lora", "styles/ink:0.5", "-o", "a.png"]) == 0
    assert main(["generate", "a ring", *small, "--seed", "1", "-o", "plain.png"]) == 0
    assert read_parameters(Path("a.png"))["loras"] == [{"name": "styles/ink", "weight": 0.5, "sha256": lora.sha256}]
    with Image.open("a.png") as one, Image.open("plain.png") as other:
        assert one.tobytes() != other.tobytes()
    assert main(["generate", "--from", "a.png", "-o", "b.png"]) == 0
    assert Path("b.png").read_bytes() == Path("a.png").read_bytes()
    assert capsys.readouterr().err == ""
    for given in (("--lora", "styles/ink"), ("--lora", "styles/ink:0.5", "--lora", "x")):
        assert main(["generate", "--from", "a.png", *given, "-o", "c.png"]) == 2
        assert f"a.png has loras 'styles/ink:0.5 of {lora.sha256[:12]}', and --lora says" in capsys.readouterr().err
    put(lora.path, {name: -each for name, each in parts.items()})
    assert main(["generate", "--from", "a.png", "-o", "c.png"]) == 0
    assert f"loras was styles/ink:0.5 of {lora.sha256[:12]} and is styles/ink:0.5 of " in capsys.readouterr().err
    assert main(["generate", "x", "--lora", "styles/inc"]) == 2
    assert "there is no 'styles/inc' on the volume. Did you mean styles/ink?" in capsys.readouterr().err


def test_loras_are_listed(tmp_path: Path) -> None:
    parts = {"x.lora_down.weight": torch.ones(1, 2), "x.lora_up.weight": torch.ones(2, 1)}
    words = {"modelspec.trigger_phrase": "inked", "modelspec.architecture": "flux-1-dev/lora"}
    put(tmp_path / "loras/ink.safetensors", parts, 1.0, words)
    (tmp_path / "loras/torn.safetensors").write_bytes(b"torn")
    for verb in ("models", "doctor"):
        out = kindling(verb, KINDLING_VOLUME=str(tmp_path)).stdout
        assert "0.0 MB, made for flux-1-dev/lora; trigger words: inked" in out
        assert "0.0 MB, cannot be used: it is no whole safetensors file: its header" in out
        found = json.loads(kindling(verb, "--json", KINDLING_VOLUME=str(tmp_path)).stdout)["loras"]
        assert [(one["name"], one["trigger_words"]) for one in found] == [("ink", ["inked"]), ("torn", [])]


NOBODY = """
import os, sys, tempfile
from handler.__main__ import main
if "HOME" not in os.environ:
    os.getuid = lambda: 54321  # whom no list of users has
if "TMPDIR" in os.environ:
    tempfile._get_default_tempdir = lambda: os.stat("/no such folder")
sys.exit(main(sys.argv[1:]))
"""


def lone(cwd: Path, *arguments: str, without: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    """A command as an odd machine runs it."""
    kept = {name: value for name, value in os.environ.items() if name not in (without, "XDG_CACHE_HOME")}
    return subprocess.run(
        [sys.executable, "-c", NOBODY, *arguments],
        cwd=cwd, env=kept | {"PYTHONPATH": str(ROOT)} | environ,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("verb", ["models", "doctor", "generate x", "serve --port 0"])
def test_a_user_without_a_home_is_told_what_to_set(verb: str, tmp_path: Path) -> None:
    done = lone(tmp_path, *verb.split(), without="HOME")
    told = "kindling: KINDLING_VOLUME: name a folder, for user 54321 has no home here, and HOME is not set.\n"
    assert (done.returncode, done.stderr) == (2, told)


def test_a_machine_without_a_folder_for_temporary_files_is_told_so(tmp_path: Path) -> None:
    done = lone(tmp_path, "generate", "x", TMPDIR="/none", KINDLING_VOLUME=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("kindling: No folder for temporary files can be written: mount one")


@pytest.mark.parametrize("port", ["70000", "-1", "8000.0", "\u0664", "9" * 5000])
def test_a_port_that_is_none_is_named(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--port", port])
    assert ended.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "--port: should be a port, 0 to 65535, not" in told or (port == "-1" and "expected one argument" in told)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("folder.png", "folder.png is a folder; name a file."),
        ("fold.png --n 3", "fold-2.png is a folder; name a file."),
        ("none/a.png", "there is no folder none."),
        ("/proc/a.png", "Cannot write /proc: No such file or directory."),
    ],
)
def test_where_no_picture_can_be_written_nothing_is_loaded(
    name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("folder.png", "fold-2.png"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr("handler.cli.generate.booted", raises(AssertionError("loaded")))
    assert main(["generate", "x", "-o", *name.split()]) > 0
    assert capsys.readouterr().err.endswith(f"{says}\n")
