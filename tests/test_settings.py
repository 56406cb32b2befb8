import subprocess
import sys

import pytest

from handler import Settings, StartError
from handler.errors import SettingsError


def test_defaults_need_no_environment() -> None:
    settings = Settings.from_env({})
    assert (settings.model, settings.cold_start_budget_s, settings.api_keys) == ("spark", 240, ())


def test_reads_each_kind_of_value() -> None:
    settings = Settings.from_env(
        {
            "KINDLING_API_KEYS": "a, b,,",
            "KINDLING_METADATA": "false",
            "KINDLING_VOLUME": "/v",
            "KINDLING_QUEUE": "",
            "HOME": "/x",
        }
    )
    assert settings.api_keys == ("a", "b")
    assert not settings.metadata
    assert str(settings.volume) == "/v"
    assert settings.queue == 32


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KINDLING_MODLE", "spark"),
        ("KINDLING_COLD_START_BUDGET_S", "soon"),
        ("KINDLING_COLD_START_BUDGET_S", "0"),
        ("KINDLING_QUEUE", "0"),
        ("KINDLING_DEVICE", "tpu"),
    ],
)
def test_bad_variable_stops_the_start_and_names_itself(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name) as caught:
        Settings.from_env({name: value})
    assert isinstance(caught.value, StartError)


def test_keys_are_never_shown() -> None:
    settings = Settings.from_env({"KINDLING_API_KEYS": "canary-key"})
    assert "canary-key" not in repr(settings)
    environ = {"KINDLING_API_KEYS": "canary-key", "KINDLING_QUEUE": "x canary-key"}
    out = subprocess.run(
        [sys.executable, "-m", "handler", "doctor"], env=environ, capture_output=True, text=True, check=False
    )
    assert out.returncode == 2
    assert "KINDLING_QUEUE" in out.stderr
    assert "canary-key" not in out.stdout + out.stderr
