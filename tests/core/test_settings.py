import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import get_args

import pytest

from handler import PRECISIONS, Settings
from handler.catalog.attention import KERNELS
from handler.cli.configured import described, page
from handler.core.errors import SettingsError, StartError
from handler.worker.memory import TRIED

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize(
    ("setting", "table"),
    [("precision", ["auto", *PRECISIONS]), ("attention", ["auto", *KERNELS]), ("offload", TRIED)],
)
def test_the_words_of_a_setting_are_the_rows_of_its_table(setting: str, table: Collection[str]) -> None:
    """The setting has the words, so that type checkers know them; each table has all that is known of its rows."""
    assert get_args(Settings.model_fields[setting].annotation) == (*table,)


def test_a_volume_at_home_is_found_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert Settings.from_env({"KINDLING_VOLUME": "~/pictures"}).volume == Path("/home/me/pictures")
    with pytest.raises(SettingsError, match=r"^KINDLING_VOLUME: begins with ~, and whose home that is cannot be told;"):
        Settings.from_env({"KINDLING_VOLUME": "~nobody-of-that-name/pictures"})


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


LINKS = {  # of a Service `kindling` with a port `http`, of `kindling-web`, and of one that speaks UDP on IPv6
    "KINDLING_SERVICE_HOST": "10.0.171.239",
    "KINDLING_SERVICE_PORT": "80",
    "KINDLING_SERVICE_PORT_HTTP": "80",
    "KINDLING_PORT": "tcp://10.0.171.239:80",
    "KINDLING_PORT_80_TCP": "tcp://10.0.171.239:80",
    "KINDLING_PORT_80_TCP_PROTO": "tcp",
    "KINDLING_PORT_80_TCP_PORT": "80",
    "KINDLING_PORT_80_TCP_ADDR": "10.0.171.239",
    "KINDLING_WEB_SERVICE_HOST": "10.0.171.240",
    "KINDLING_WEB_PORT": "tcp://10.0.171.240:8000",
    "KINDLING_QUEUE_PORT": "udp://[fd00::1]:53",
    "KINDLING_QUEUE_PORT_53_UDP_ADDR": "fd00::1",
    "KINDLING_NAME": "/web/kindling",  # of a container that Docker linked to this one
    "KINDLING_1_NAME": "/app_web_1/app_kindling_1",
    "KINDLING_ENV_PATH": "/usr/bin:/bin",
    "KINDLING_1_ENV_KINDLING_MODEL": "sdxl",
}


def test_what_kubernetes_says_of_a_service_is_no_setting() -> None:
    """Its name is `kindling` in our own manifest."""
    assert Settings.from_env({**LINKS, "KINDLING_QUEUE": "7"}).queue == 7
    assert Settings.named({**LINKS, "KINDLING_QUEUE": "7", "HOME": "/x"}) == {"KINDLING_QUEUE": "7"}


@pytest.mark.parametrize(
    "name", ["KINDLING_PORT", "KINDLING_HOST", "KINDLING_SERVICE", "KINDLING_STORE_PORT", "KINDLING_NAME"]
)
def test_what_only_looks_like_it_is_still_refused(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} is not a setting"):
        Settings.from_env({name: "8000"})


@pytest.mark.parametrize("name", ["KINDLING_FOO", "KINDLING_PORT", "KINDLING_WEB_PORT", "KINDLING_QUEUE"])
def test_an_empty_one_counts_as_unset_whatever_its_name(name: str) -> None:
    assert Settings.from_env({name: ""}) == Settings.from_env({})
    assert Settings.named({name: ""}) == {}


def test_a_misspelt_one_is_told_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r"Did you mean KINDLING_MODEL\?"):
        Settings.from_env({"KINDLING_MODLE": "spark"})


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("KINDLING_QUEUE", "many", "should be a whole number."),
        ("KINDLING_QUEUE_S", "soon", "should be a number."),
        ("KINDLING_QUEUE_S", "0", "should be greater than 0."),
        ("KINDLING_DEADLINE_S", "nan", "should be a finite number."),
        ("KINDLING_MONTHLY_CAP", "inf", "should be a finite number."),
        ("KINDLING_QUEUE", "1" * 5000, "is too large."),
        ("KINDLING_MODEL", "\udcff", "should be text in UTF-8."),
        ("KINDLING_METADATA", "perhaps", "should be true or false."),
        ("KINDLING_BATCH", "9", "should be 'auto', or should be less than or equal to 8."),
        ("KINDLING_STEP_CACHE", "maybe", "should be off, on, or values such as"),
        ("KINDLING_STORE_BUCKET", "s3://mine", "has characters that no such name has."),
        ("KINDLING_API_KEYS", " , ", "should be values, separated by commas; there is none."),
        ("BUCKET_ENDPOINT_URL", "ftp://mine", "should be http:// or https:// and a host"),
    ],
)
def test_what_is_wrong_is_said_in_our_words(name: str, value: str, told: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({name: value})
    assert caught.value.message.startswith(f"{name}: {told}")


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("queue", "many", "queue: should be a whole number."),
        ("batch", 9, "batch: should be 'auto', or should be less than or equal to 8."),
        ("device", "tpu", "device: should be 'auto', 'cpu' or 'cuda'."),
        ("gpu_price", float("inf"), "gpu_price: should be a finite number."),
        ("cors_origins", ("a.example",), "cors_origins: should be * or origins such as https://a.example"),
        ("modle", "spark", "modle is not a setting. Did you mean model?"),
        ("volume", "a\0b", "volume: has characters that no path has."),
        ("volume", Path("a\ud800"), "volume: has characters that no path has."),
        ("vae", "/a\0b", "vae: has characters that no path has."),
    ],
)
def test_settings_made_in_a_program_are_told_of_in_the_same_words(field: str, value: object, told: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings(**{field: value})  # type: ignore[arg-type]
    assert caught.value.message.startswith(told)
    assert caught.value.param == field
    assert caught.value.__cause__ is None


def test_what_is_no_mapping_is_no_settings() -> None:
    with pytest.raises(SettingsError, match="Settings: should be a valid dictionary"):
        Settings.model_validate([])


def test_all_that_is_wrong_is_told_and_the_rest_holds() -> None:
    said = {"KINDLING_QUEUE": "many", "KINDLING_BATCH": "9", "KINDLING_MODLE": "x", "KINDLING_DEVICE": "cpu"}
    settings, faults = Settings.examined({**said, "BUCKET_ENDPOINT_URL": "ftp://x"})
    assert (settings.device, settings.queue, settings.batch, settings.store_endpoint) == ("cpu", 32, "auto", "")
    assert faults.keys() == {*said, "BUCKET_ENDPOINT_URL"} - {"KINDLING_DEVICE"}
    assert all(why.startswith(name) for name, why in faults.items())


@pytest.mark.parametrize("name", [b"a\xffb", "bücher".encode()])
def test_a_volume_may_have_any_name_that_a_file_system_gives(name: bytes, tmp_path: Path) -> None:
    volume = tmp_path / os.fsdecode(name)
    assert Settings(volume=volume).volume == volume
    assert Settings.from_env({"KINDLING_VOLUME": str(volume)}).volume == volume


@pytest.mark.parametrize(("said", "meant"), [("1", True), ("True", True), ("on", True), ("", False), ("no", False)])
def test_a_flag_is_read_as_settings_are(said: str, meant: bool) -> None:
    assert Settings.flag({"MODAL_PROXY_AUTH": said}, "MODAL_PROXY_AUTH") is meant
    assert Settings.flag({}, "MODAL_PROXY_AUTH") is False


def test_a_flag_that_says_neither_is_no_no() -> None:
    with pytest.raises(SettingsError, match="MODAL_PROXY_AUTH: should be true or false"):
        Settings.flag({"MODAL_PROXY_AUTH": "enabled"}, "MODAL_PROXY_AUTH")


def test_where_each_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handler.core.settings.MOUNTS", (tmp_path / "none",))
    environ = {"BUCKET_ENDPOINT_URL": "https://r2.example", "MODAL_TASK_ID": "ta-1", "KINDLING_QUEUE": "3"}
    found = Settings.given({**environ, "XDG_CACHE_HOME": str(tmp_path)})
    assert {name: one.source for name, one in found.items()} == {
        "store_endpoint": "BUCKET_ENDPOINT_URL",
        "platform": "detected",
        "queue": "KINDLING_QUEUE",
        "volume": "XDG_CACHE_HOME",
    }
    assert found["volume"].value == tmp_path / "kindling"
    monkeypatch.setattr("handler.core.settings.MOUNTS", (tmp_path,))
    assert Settings.given({})["volume"].value == tmp_path
    assert Settings.given({"KINDLING_VOLUME": "/v"})["volume"].source == "KINDLING_VOLUME"


def test_the_guide_lists_every_setting_as_it_is() -> None:
    assert page() in (ROOT / "docs/settings.md").read_text()


def test_what_an_option_says_is_read_as_its_variable_is() -> None:
    """Also where the variable, over which it wins, could not be."""
    said = Settings.from_env({"KINDLING_WEIGHTS": ",", "KINDLING_MODEL": "sdxl"}, model="spark", weights="a, b")
    assert (said.model, said.weights) == ("spark", ("a", "b"))
    for weights in (",", "a\0b"):
        with pytest.raises(SettingsError, match="KINDLING_WEIGHTS: "):
            Settings.from_env({}, weights=weights)


def test_a_key_of_the_volume_is_long_and_is_never_shown() -> None:
    for odd in ("k" * 15, " " * 32, "k" * 15 + "\n", "k" * 16 + "\udcff"):
        with pytest.raises(SettingsError, match="KINDLING_VOLUME_KEY: should have 16 characters or more, such as open"):
            Settings.from_env({"KINDLING_VOLUME_KEY": odd})
    settings = Settings.from_env({"KINDLING_VOLUME_KEY": "canary-" * 3 + "\n"})  # as of a secret that was a file
    assert settings.volume_key == "canary-" * 3
    assert "canary" not in repr(settings)
    assert described(settings, {})["KINDLING_VOLUME_KEY"]["value"] == "set"
    assert described(Settings(), {})["KINDLING_VOLUME_KEY"]["value"] == ""


def test_a_secret_that_runpod_does_not_have_is_no_key() -> None:
    """On its machines alone: who deploys writes just these words."""
    said = "{{ RUNPOD_SECRET_key-s }}"
    environ = {"KINDLING_API_KEYS": said}
    assert Settings.from_env(environ).api_keys == (said,)
    with pytest.raises(SettingsError, match="RunPod has no secret for KINDLING_API_KEYS="):
        Settings.from_env(environ | {"RUNPOD_POD_ID": "x"})
    _, faults = Settings.examined({"BUCKET_SECRET_ACCESS_KEY": said, "RUNPOD_POD_ID": "x"})
    assert list(faults) == ["BUCKET_SECRET_ACCESS_KEY"]
