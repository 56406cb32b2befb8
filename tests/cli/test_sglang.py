"""SGLang's command lines start a worker."""

import argparse
from typing import Any

import pytest

from handler.cli import sglang
from handler.core.errors import SettingsError
from handler.core.settings import Settings
from handler.core.stepcache import StepCache

DEV = "black-forest-labs/FLUX.1-dev"
CACHE = {  # the cookbook's combined example
    "SGLANG_CACHE_DIT_ENABLED": "true", "SGLANG_CACHE_DIT_FN": "2", "SGLANG_CACHE_DIT_BN": "1",
    "SGLANG_CACHE_DIT_WARMUP": "4", "SGLANG_CACHE_DIT_RDT": "0.4", "SGLANG_CACHE_DIT_MC": "4",
    "SGLANG_CACHE_DIT_TAYLORSEER": "true", "SGLANG_CACHE_DIT_TS_ORDER": "2",
}  # fmt: skip


def read(line: str, **environ: str) -> tuple[Settings, list[str]]:
    """The settings that a command line makes of an environment, and the notes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers")
    sglang.add_arguments(parser)
    found, notes = sglang.translated(parser.parse_args(line.split()), environ)
    return Settings.from_env(found), notes


def test_the_cookbooks_command() -> None:
    settings, notes = read(f"--model-path {DEV} --ulysses-degree=1 --ring-degree=1")
    assert (settings.model, notes) == (DEV, [])
    settings, _ = read(f"--model-path {DEV}", KINDLING_MODEL="spark", **CACHE)
    assert (settings.model, settings.step_cache) == (DEV, StepCache(Fn=2, Bn=1, W=4, R=0.4, MC=4, order=2))


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("--vae-path fal/tiny@main", {"vae": "fal/tiny@main"}), ("--dit-cpu-offload", {"offload": "blocks"}),
        ("--text-encoder-cpu-offload true", {"offload": "encoders"}), ("--dit-cpu-offload false", {"offload": "auto"}),
        ("--text-encoder-cpu-offload --dit-cpu-offload", {"offload": "blocks"}),
        ("--num-gpus 4", {"ulysses_degree": 4, "ring_degree": 1}),
        ("--num-gpus 4 --tp-size 2", {"ulysses_degree": 4, "tp_size": 2}),
        ("--num-gpus 4 --ring-degree 2", {"ulysses_degree": 2, "ring_degree": 2}),
        ("--num-gpus 4 --ulysses-degree 2 --ring-degree 2", {"ulysses_degree": 2, "ring_degree": 2}),
        ("--num-gpus 8 --workers 2 --ring-degree 2", {"ulysses_degree": 2, "ring_degree": 2, "workers": 2}),
        ("--sp-degree 2 --workers 4", {"ulysses_degree": 2, "workers": 4}),
        ("--num-gpus 2 --workers auto", {"ulysses_degree": 2, "workers": "auto"}),
    ],
)  # fmt: skip
def test_what_has_a_meaning_here(line: str, wanted: dict[str, Any]) -> None:
    settings, notes = read(line)
    assert {name: getattr(settings, name) for name in wanted} == wanted
    assert notes == []


@pytest.mark.parametrize("line", ["--vae-cpu-offload", "--pin-cpu-memory=true", "--vae-cpu-offload=1"])
def test_what_has_none_is_accepted_with_a_note(line: str) -> None:
    settings, [note] = read(line)
    assert settings == Settings.from_env({})
    assert note.startswith(line.replace("=", " ").split()[0] + " has no effect: ")
    assert read(line.split("=")[0] + "=0")[1] == []


@pytest.mark.parametrize("line", ["--num-gpus 8 --sp-degree 2", "--num-gpus 8 --ulysses-degree 2 --tp-size 2"])
def test_gpus_that_other_options_leave_without_work_are_told(line: str) -> None:
    settings, [note] = read(line)
    assert (settings.ulysses_degree, settings.ranks) == (2, 2)
    assert note.startswith("--num-gpus 8: only 2 draw")


def test_gpus_that_ring_attention_cannot_share_are_refused() -> None:
    with pytest.raises(SettingsError, match="3 GPUs cannot be shared by 2"):
        read("--num-gpus 3 --ring-degree 2")


@pytest.mark.parametrize("line", ["--num-gpus many", "--num-gpus 0", "--num-gpus", "--sp-degree -1"])
def test_a_count_of_gpus_that_is_none_is_named(line: str) -> None:
    with pytest.raises(SettingsError, match=f"{line.split()[0]} should be a whole number, 1 or more"):
        read(line)


def test_a_cache_that_the_model_cannot_have_is_a_note() -> None:
    settings, [note] = read("", SGLANG_CACHE_DIT_ENABLED="1")
    assert (settings.step_cache, "spark cannot have a step cache" in note) == ("off", True)
    settings, [note] = read(f"--model-path {DEV}", SGLANG_CACHE_DIT_ENABLED="1", SGLANG_CACHE_DIT_RDT="7")
    assert (settings.step_cache, "R should be 0 to 1" in note) == ("off", True)


@pytest.mark.parametrize("name", ["ENABLED", "TAYLORSEER"])
def test_a_switch_that_says_neither_is_named_in_full(name: str) -> None:
    with pytest.raises(SettingsError, match=f"^SGLANG_CACHE_DIT_{name}: should be true or false"):
        read("", **CACHE | {f"SGLANG_CACHE_DIT_{name}": "maybe"})


def test_our_own_setting_wins_and_off_is_off() -> None:
    assert read("", KINDLING_MODEL=DEV, KINDLING_STEP_CACHE="off", **CACHE)[0].step_cache == "off"
    assert read("", KINDLING_MODEL=DEV, **CACHE | {"SGLANG_CACHE_DIT_ENABLED": "false"})[0].step_cache == "off"
    assert read("", KINDLING_MODEL=DEV, SGLANG_CACHE_DIT_ENABLED="true")[0].step_cache == "on"


def test_the_table_has_every_name() -> None:
    table = sglang.table()
    for name in (*CACHE, *(alias.option for alias in sglang.ALIASES)):
        assert name.removeprefix(sglang.PREFIX) in table
    assert max(map(len, table.splitlines())) < 120
