"""Deploying to RunPod, against its REST API on loopback; and the files that its Hub reads."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from handler import GPUS, MODELS, MODES, ImageRequest, Settings, choose_gpus, cuda_build
from handler.catalog.gpus import Rental
from runpod_endpoint import POOLS
from runpod_plane import DEADLINE_S, clean_environment
from runpod_rest import KEY, Rest

ROOT = Path(__file__).parents[2]
HUB = json.loads((ROOT / ".runpod" / "hub.json").read_text())
HUB_TESTS = json.loads((ROOT / ".runpod" / "tests.json").read_text())
OTHER_SETTINGS = {"HF_TOKEN", "MAX_CONCURRENCY", "RUNPOD_INIT_TIMEOUT"}  # read by fetch, the worker, and RunPod
NOT = Rental()
ARGUMENTS = ["flux-schnell", "--image", "registry/kindling:1", "--volume", "vol1"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("runpod_deploy", ROOT / "platform" / "runpod_deploy.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    return module


@pytest.fixture
def rest(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Rest]:
    """The API that `script` speaks to, with a key that it accepts."""
    with Rest(tmp_path) as rest:
        monkeypatch.setattr("runpod_api.API", f"{rest.base}/v2")
        monkeypatch.setenv("RUNPOD_API_KEY", KEY)
        yield rest


@pytest.fixture
def dry(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[dict[str, Any]]]:
    """The bodies that a dry run prints."""

    def run(*arguments: str) -> list[dict[str, Any]]:
        assert script.main([*arguments, "--dry-run"]) == 0
        return [request["json"] for request in json.loads(capsys.readouterr().out)]

    return run


def refused(script: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a deployment that fails."""
    assert script.main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_creates_a_template_and_an_endpoint(script: ModuleType, rest: Rest, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(ARGUMENTS) == 0
    (template,), (endpoint,) = rest.rows["templates"], rest.rows["endpoints"]
    assert template["name"] == endpoint["name"] == "kindling-flux-schnell"
    assert endpoint["templateId"] == template["id"]
    assert rest.keys == {"Bearer key"}
    assert [method for method, _ in rest.seen] == ["GET", "GET", "GET", "POST", "POST"]
    assert endpoint["workers"] == {"min": 0, "max": 3, "idleTimeout": 60}
    assert endpoint["flashboot"] == "FLASHBOOT"
    assert capsys.readouterr().out == "https://api.runpod.ai/v2/endpoints-0\n"


def test_updates_what_is_there(script: ModuleType, rest: Rest) -> None:
    rest.rows["templates"].append({"id": "other", "name": "kindling-flux-dev"})
    script.main(ARGUMENTS)
    rest.rows["endpoints"][0]["name"] += " -fb"  # as RunPod marks those with FlashBoot
    rest.seen.clear()
    newer = ["flux-schnell", "--image", "registry/kindling:2"]
    assert script.main(newer) == 0
    assert [method for method, _ in rest.seen] == ["GET", "GET", "PATCH", "PATCH"]
    assert len(rest.rows["endpoints"]) == 1
    assert "registry/kindling:2" in rest.rows["templates"][1].values()
    assert rest.rows["templates"][0] == {"id": "other", "name": "kindling-flux-dev"}


CONSOLE = {  # what somebody has set there
    "workers": {"min": 1, "max": 9, "idleTimeout": 5},
    "gpu": {"pools": ["ADA_48_PRO"], "excludedTypes": [], "count": 1, "allowedCudaVersions": ["13.0"]},
    "scaling": {"type": "REQUEST_COUNT", "requestCount": 2},
    "dataCenterIds": ["EU-RO-1"],
    "flashboot": "OFF",
    "timeout": 900_000,
    "env": {"MINE": "1", "KINDLING_STEP_CACHE": "off", "KINDLING_MODEL": "old", "KINDLING_DEVICE": "cuda"},
}


@pytest.fixture
def console(script: ModuleType, rest: Rest) -> dict[str, Any]:
    """An endpoint that was deployed once and then changed in the console."""
    assert script.main(ARGUMENTS) == 0
    [endpoint] = rest.rows["endpoints"]
    endpoint.update(CONSOLE)
    return endpoint


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ([], {}),
        (["--workers-max", "2"], {"workers": {"max": 2}}),
        (["--workers-min", "0", "--idle", "30"], {"workers": {"min": 0, "idleTimeout": 30}}),
        (["--flashboot", "priority"], {"flashboot": "PRIORITY_FLASHBOOT"}),
        (["--data-center", "EU-RO-1", "--data-center", "US-TX-3"], {"dataCenterIds": ["EU-RO-1", "US-TX-3"]}),
        (["--workers-min", "4"], {"workers": {"min": 4}}),
        (["--workers-min", "10"], {"workers": {"min": 10, "max": 10}}),
        (["--gpu", "NVIDIA A40"], {"gpu": {"pools": ["AMPERE_48"], "excludedTypes": ["NVIDIA RTX A6000"]}}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value else "",
)
def test_only_what_is_asked_for_is_changed(
    script: ModuleType, rest: Rest, console: dict[str, Any], options: list[str], changed: dict[str, Any]
) -> None:
    rest.bodies.clear()
    assert script.main([*ARGUMENTS, *options]) == 0
    sent = rest.bodies[-1]
    assert sent.pop("env") == {"MINE": "1", "KINDLING_STEP_CACHE": "off"}  # beside the template's
    expected = {"name": "kindling-flux-schnell", "templateId": "templates-0", "networkVolumes": ["vol1"]}
    assert sent == expected | changed


def test_a_minimum_above_the_maximum_is_said_to_raise_it(
    script: ModuleType, console: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert script.main([*ARGUMENTS, "--workers-min", "9"]) == 0
    assert "maximum" not in capsys.readouterr().err
    assert script.main([*ARGUMENTS, "--workers-min", "10"]) == 0
    assert "more than the endpoint's maximum, which becomes 10 too" in capsys.readouterr().err


def test_a_maximum_below_what_always_runs_is_refused(
    script: ModuleType, rest: Rest, console: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    console["workers"]["min"] = 2
    rest.seen.clear()
    capsys.readouterr()
    assert "less than the 2 workers that always run" in refused(script, capsys, *ARGUMENTS, "--workers-max", "1")
    assert {method for method, _ in rest.seen} == {"GET"}


def test_another_build_of_torch_takes_other_hosts(
    script: ModuleType, rest: Rest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An endpoint that takes older hosts than the next image runs on is left as it is."""
    monkeypatch.setenv("CUDA", "cu126")
    assert "has no code for the B200" in refused(script, capsys, *ARGUMENTS, "--gpu", "NVIDIA B200")
    assert script.main(ARGUMENTS) == 0
    assert rest.rows["endpoints"][0]["gpu"]["minCudaVersion"] == "12.0"
    assert script.main(ARGUMENTS) == 0
    monkeypatch.delenv("CUDA")
    capsys.readouterr()
    told = refused(script, capsys, *ARGUMENTS)
    assert "takes hosts from CUDA 12.0 on, and this image needs 13.0" in told


@pytest.mark.parametrize(
    ("gpu", "least"),
    [({"minCudaVersion": None}, ""), ({"minCudaVersion": None, "allowedCudaVersions": ["13.0", "12.8"]}, "12.8")],
)
def test_an_endpoint_may_have_no_floor_or_a_list(
    script: ModuleType, rest: Rest, capsys: pytest.CaptureFixture[str], gpu: dict[str, Any], least: str
) -> None:
    """RunPod answers with null where none was set (its OpenAPI, EndpointGpuConfig)."""
    assert script.main(ARGUMENTS) == 0
    rest.rows["endpoints"][0]["gpu"] |= gpu
    capsys.readouterr()
    if least:
        assert f"takes hosts from CUDA {least} on" in refused(script, capsys, *ARGUMENTS)
    else:
        assert script.main(ARGUMENTS) == 0
        assert rest.rows["endpoints"][0]["gpu"]["minCudaVersion"] == "13.0"


def test_a_setting_of_the_last_deployment_that_is_set_no_more_is_gone(
    script: ModuleType, rest: Rest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KINDLING_COMPILE", "off")
    assert script.main(ARGUMENTS) == 0
    rest.rows["endpoints"][0]["env"] = dict(rest.rows["templates"][0]["env"])  # as RunPod resolves it
    monkeypatch.delenv("KINDLING_COMPILE")
    assert script.main(ARGUMENTS) == 0
    assert "env" not in rest.bodies[-1]
    assert "KINDLING_COMPILE" not in rest.rows["templates"][0]["env"]


def test_a_longer_deadline_is_asked_for(
    script: ModuleType, rest: Rest, console: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KINDLING_DEADLINE_S", "1200")
    assert script.main(ARGUMENTS) == 0
    assert console["timeout"] == 1_200_000


@pytest.mark.parametrize("there", ["QUEUE", "LOAD_BALANCER"])
def test_a_queue_does_not_become_a_load_balancer(
    script: ModuleType, rest: Rest, console: dict[str, Any], capsys: pytest.CaptureFixture[str], there: str
) -> None:
    console["type"] = there
    rest.seen.clear()
    capsys.readouterr()
    other = ["--load-balancer", "--open"] if there == "QUEUE" else []
    told = refused(script, capsys, *ARGUMENTS, *other)
    assert "RunPod cannot make" in told
    assert f"deploy {'without' if other else 'with'} --load-balancer. Nothing was changed" in told
    assert {method for method, _ in rest.seen} == {"GET"}


def test_gpus_of_the_console_that_do_not_run_the_model_are_refused(
    script: ModuleType,
    rest: Rest,
    console: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    console["gpu"] = {"pools": ["AMPERE_48"], "excludedTypes": ["NVIDIA RTX A6000"]}
    monkeypatch.setenv("KINDLING_PRECISION", "fp8")
    rest.seen.clear()
    capsys.readouterr()
    told = refused(script, capsys, *ARGUMENTS)
    assert "FP8 arithmetic needs" in told
    assert "choose others with --gpu" in told
    assert {method for method, _ in rest.seen} == {"GET"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ["--workers-min", "3", "--workers-max", "2"],
            "--workers-max 2 is less than the 3 workers that always run: set --workers-min too",
        ),
        (["--open"], "--open is for --load-balancer"),
        (["--load-balancer"], "yours as X-API-Key"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_that_make_no_sense_together(
    script: ModuleType, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    assert told in refused(script, capsys, *ARGUMENTS, *options, "--dry-run")


@pytest.mark.parametrize("options", [["--idle", "0"], ["--workers-max", "many"], ["--workers-max", "0"]])
def test_numbers_that_runpod_would_refuse(
    script: ModuleType, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    with pytest.raises(SystemExit):
        script.main([*ARGUMENTS, *options])
    assert "should be" in capsys.readouterr().err


def test_two_of_a_name_are_not_guessed_between(
    script: ModuleType, rest: Rest, capsys: pytest.CaptureFixture[str]
) -> None:
    rest.rows["templates"] += [{"id": row, "name": "kindling-flux-schnell"} for row in "ab"]
    assert "delete or rename all but one" in refused(script, capsys, *ARGUMENTS)


def test_settings_travel(dry: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINDLING_COMPILE", "off")
    monkeypatch.setenv("KINDLING_VOLUME", "/home/me")
    monkeypatch.setenv("MAX_CONCURRENCY", "2")
    monkeypatch.setenv("REFRESH_WORKER", "true")
    monkeypatch.setenv("RUNPOD_LOG_LEVEL", "DEBUG")
    template, _ = dry(*ARGUMENTS)
    assert template["image"] == "registry/kindling:1"
    assert template["serverless"] is True
    assert template["env"] == {
        "KINDLING_COMPILE": "off",
        "KINDLING_DEVICE": "cuda",
        "KINDLING_MODEL": "flux-schnell",
        "KINDLING_VOLUME": "/runpod-volume",
        "MAX_CONCURRENCY": "2",
        "REFRESH_WORKER": "true",
        "RUNPOD_INIT_TIMEOUT": "600",
        "RUNPOD_LOG_LEVEL": "DEBUG",
    }


@pytest.mark.parametrize(("deadline", "most"), [("30", 600_000), ("900", 900_000)])
def test_runpod_waits_as_long_as_a_request_may_take(
    dry: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, deadline: str, most: int
) -> None:
    monkeypatch.setenv("KINDLING_DEADLINE_S", deadline)
    assert dry(*ARGUMENTS)[1]["timeout"] == most


@pytest.mark.parametrize(("budget", "patience"), [("60", "600"), ("240", "600"), ("900", "1260")])
def test_runpod_waits_longer_than_a_start_may_take(
    dry: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, budget: str, patience: str
) -> None:
    monkeypatch.setenv("KINDLING_COLD_START_BUDGET_S", budget)
    assert dry(*ARGUMENTS)[0]["env"]["RUNPOD_INIT_TIMEOUT"] == patience


def test_spark_needs_no_volume(dry: Callable[..., list[dict[str, Any]]]) -> None:
    template, endpoint = dry("spark", "--image", "registry/kindling:1")
    assert "KINDLING_VOLUME" not in template["env"]
    assert "networkVolumes" not in endpoint
    assert endpoint["gpu"]["pools"][0] == "AMPERE_16"


def test_the_queue_endpoint(dry: Callable[..., list[dict[str, Any]]]) -> None:
    template, endpoint = dry(*ARGUMENTS, "--gpu", "NVIDIA L40S")
    assert template["args"] == "python -u platform/runpod_worker.py"
    assert endpoint["type"] == "QUEUE"
    assert endpoint["gpu"]["pools"] == ["ADA_48_PRO"]
    assert endpoint["gpu"]["excludedTypes"] == ["NVIDIA L40", "NVIDIA RTX 6000 Ada Generation"]
    assert endpoint["workers"]["min"] == 0
    assert endpoint["networkVolumes"] == ["vol1"]


def test_a_load_balanced_endpoint_serves_http_behind_both_gates(
    dry: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dry(*ARGUMENTS, "--load-balancer", "--open")[0]["env"]["KINDLING_ALLOW_OPEN"] == "true"
    monkeypatch.setenv("KINDLING_API_KEYS", "{{ RUNPOD_SECRET_keys }}")
    template, endpoint = dry(*ARGUMENTS, "--load-balancer")
    assert "KINDLING_ALLOW_OPEN" not in template["env"]
    port = template["env"]["PORT"]
    assert template["args"] == f"python -m handler serve --host 0.0.0.0 --port {port}"
    probes = template["env"]["PORT_HEALTH"]
    assert probes != port
    assert template["ports"] == [f"{port}/http", f"{probes}/http"]
    assert endpoint["type"] == "LOAD_BALANCER"
    assert endpoint["scaling"]["type"] == "REQUEST_COUNT"


@pytest.mark.parametrize("model", MODELS)
def test_three_pools_of_gpus_that_hold_the_model_whole(script: ModuleType, model: str) -> None:
    names = script.gpus_for(Settings(), MODELS[model], ())
    pools = {
        gpu.rentals["runpod"].pool for gpu in GPUS.values() if set(gpu.rentals.get("runpod", NOT).names) & {*names}
    }
    offers = choose_gpus(Settings(), MODELS[model], "runpod", names)
    assert 1 <= len(pools) <= 3
    assert {offer.outlook.memory.mode for offer in offers} == {"resident"}


@pytest.mark.parametrize(
    ("model", "precision", "pools"),
    [
        ("flux-dev", "auto", ["AMPERE_48", "ADA_48_PRO", "AMPERE_80"]),
        ("flux-dev", "fp8", ["ADA_48_PRO", "BLACKWELL_96", "ADA_80_PRO"]),
        ("flux2-dev", "fp8", ["BLACKWELL_96", "ADA_80_PRO", "HOPPER_141"]),
        ("flux2-dev", "bf16", ["HOPPER_141", "BLACKWELL_180"]),
        ("flux-dev", "nvfp4", ["BLACKWELL_96", "BLACKWELL_180"]),
    ],
)
def test_the_precision_decides_what_is_rented(
    dry: Callable[..., list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    precision: str,
    pools: list[str],
) -> None:
    monkeypatch.setenv("KINDLING_PRECISION", precision)
    assert dry(model, "--image", "x", "--volume", "v")[1]["gpu"]["pools"] == pools


def test_a_gpu_that_holds_the_model_but_for_its_text_encoders(
    dry: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """19.5 GB of 23.5: who asks for it gets it."""
    monkeypatch.setenv("KINDLING_PRECISION", "fp8")
    gpu = dry("flux-dev", "--image", "x", "--volume", "v", "--gpu", "NVIDIA L4")[1]["gpu"]
    assert (gpu["pools"], gpu["excludedTypes"]) == (["AMPERE_24"], ["NVIDIA RTX A5000", "NVIDIA GeForce RTX 3090"])


@pytest.mark.parametrize(
    ("precision", "gpus", "told"),
    [
        ("fp8", ("NVIDIA L4",), "flux-dev: The L4 does not hold flux-dev whole. Its text encoders wait in host memory"),
        ("bf16", ("NVIDIA L4",), "flux-dev: The L4 does not hold flux-dev whole. Its weights stream from host memory"),
        ("fp8", ("NVIDIA L40S",), ""),
        ("fp8", (), ""),
    ],
)
def test_a_gpu_that_does_not_hold_the_model_is_deployed_with_a_warning(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    precision: str,
    gpus: tuple[str, ...],
    told: str,
) -> None:
    monkeypatch.setenv("KINDLING_PRECISION", precision)
    options = [word for gpu in gpus for word in ("--gpu", gpu)]
    assert script.main(["flux-dev", "--image", "x", "--volume", "v", *options, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)
    assert err.startswith(told)
    assert err.count("\n") == bool(told)


@pytest.mark.parametrize(
    ("settings", "gpu", "told"),
    [
        ({"OFFLOAD": "off", "PRECISION": "bf16"}, "NVIDIA L4", "= 36.9 GB, of 23.5 GB on the NVIDIA L4. It would with"),
        ({"PRECISION": "fp8"}, "NVIDIA A40", "KINDLING_PRECISION=fp8: FP8 arithmetic needs"),
        ({"ATTENTION": "flash3"}, "NVIDIA L4", "KINDLING_ATTENTION=flash3: needs compute capability 9.0 (Hopper)"),
        ({}, "GeForce 256", "is not known here"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("NVIDIA") else "",
)
def test_a_gpu_that_will_not_do_is_refused(
    script: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, str],
    gpu: str,
    told: str,
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(f"KINDLING_{name}", value)
    assert told in refused(script, capsys, *ARGUMENTS, "--gpu", gpu, "--dry-run")


def test_a_misspelt_setting_stops_the_deployment(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KINDLING_MODLE", "spark")
    assert "KINDLING_MODLE is not a setting" in refused(script, capsys, *ARGUMENTS, "--dry-run")


@pytest.mark.parametrize("name", ["KINDLING_API_KEYS", "BUCKET_SECRET_ACCESS_KEY"])
def test_keys_travel_only_as_runpods_secrets(
    name: str,
    script: ModuleType,
    dry: Callable[..., list[dict[str, Any]]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(name, "hunter2")
    told = refused(script, capsys, *ARGUMENTS, "--dry-run")
    assert "{{ RUNPOD_SECRET_name }}" in told
    assert "hunter2" not in told
    monkeypatch.setenv(name, "{{ RUNPOD_SECRET_keys }}")
    assert dry(*ARGUMENTS)[0]["env"][name] == "{{ RUNPOD_SECRET_keys }}"


def test_only_what_is_ours_travels(dry: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else begins like a name of ours is somebody's secret, or Kubernetes's word on a Service."""
    ours = {"BUCKET_ACCESS_KEY_ID": "id", "BUCKET_ENDPOINT_URL": "https://s3.example", "STREAM": "1"}
    for name in ("STREAMLIT_SECRET", "BUCKET_BACKUP_PASSWORD", "BUCKET_SECRET_ACCESS_KEY_OLD", "MAX_CONCURRENCY_TOKEN"):
        monkeypatch.setenv(name, "canary")
    monkeypatch.setenv("KINDLING_PORT", "tcp://canary:80")
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    template, _ = dry("spark", "--image", "registry/kindling:1")
    assert template["env"] == {
        "KINDLING_DEVICE": "cuda",
        "KINDLING_MODEL": "spark",
        "RUNPOD_INIT_TIMEOUT": "600",
        **ours,
    }


@pytest.mark.parametrize(
    ("name", "value"), [("STREAM", "true"), *(("MAX_CONCURRENCY", value) for value in ("99", "two", "0", "9" * 5000))]
)
def test_what_the_worker_would_refuse_is_refused_here(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert f"{name} should be" in refused(script, capsys, *ARGUMENTS, "--dry-run")


def test_no_key(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Set RUNPOD_API_KEY" in refused(script, capsys, *ARGUMENTS)


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (401, "", "does not accept RUNPOD_API_KEY"),
        (403, {"title": "Forbidden"}, "does not accept RUNPOD_API_KEY"),
        (400, {"message": "no such volume"}, "with 400: no such volume"),
        (422, {"title": "x", "detail": "bad body", "errors": ["gpu.pools: unknown"]}, "bad body; gpu.pools: unknown"),
        (500, "<html>oops</html>", "with 500: <html>oops</html>"),
    ],
)
def test_refusals_are_told(
    script: ModuleType, rest: Rest, capsys: pytest.CaptureFixture[str], status: int, body: Any, told: str
) -> None:
    rest.refusal = (status, body)
    assert told in refused(script, capsys, *ARGUMENTS)


def test_unreachable(script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_API_KEY", "key")
    monkeypatch.setattr("runpod_api.API", "http://127.0.0.1:9/v2")
    assert "cannot be reached" in refused(script, capsys, *ARGUMENTS)


def test_hub_listing() -> None:
    assert HUB.keys() == {"title", "description", "type", "category", "config"}
    assert (HUB["type"], HUB["category"]) == ("serverless", "image")
    config = HUB["config"]
    kinds = {"runsOn": str, "containerDiskInGb": int, "gpuCount": int, "gpuIds": str, "allowedCudaVersions": list}
    assert config.keys() == {*kinds, "presets", "env"}
    assert all(type(config[name]) is kind for name, kind in kinds.items())


def test_the_hub_takes_the_cuda_that_is_asked_for_and_newer(script: ModuleType) -> None:
    """RunPod compares these exactly, so that newer drivers have to be named too."""
    assert cuda_build().hosts == "13.0"
    for listed in (HUB["config"]["allowedCudaVersions"], HUB_TESTS["config"]["allowedCudaVersions"]):
        assert listed == [f"13.{minor}" for minor in range(6)]


@pytest.mark.parametrize("entry", HUB["config"]["env"], ids=lambda entry: entry["key"])
def test_hub_settings_are_real(entry: dict[str, Any]) -> None:
    key, given = entry["key"], entry.get("input")
    assert key in OTHER_SETTINGS or key.removeprefix("KINDLING_").lower() in Settings.model_fields
    if given is None:
        assert isinstance(entry["value"], str)
        return
    assert given["type"] in ("string", "number", "boolean")
    assert {"name", "type", "description", "default"} <= given.keys()
    choices = [option["value"] for option in given.get("options", [])]
    assert not choices or given["default"] in choices
    if key not in OTHER_SETTINGS:
        for value in choices or [given.get("trueValue", given["default"])]:
            Settings.from_env({key: str(value)})


def test_hub_offers_every_model_and_its_gpus_hold_the_presets(script: ModuleType) -> None:
    inputs = {entry["key"]: entry.get("input") for entry in HUB["config"]["env"]}
    offered = [option["value"] for option in inputs["KINDLING_MODEL"]["options"]]
    assert offered == [*MODELS, *MODES]
    gpus = [gpu for pool in HUB["config"]["gpuIds"].split(",") for gpu in POOLS[pool]]
    for preset in HUB["config"]["presets"]:
        assert preset["defaults"].keys() <= inputs.keys()
        model = preset["defaults"]["KINDLING_MODEL"]
        small = preset["name"].startswith("24 GB cards: ")
        asked = [gpu for pool in ("AMPERE_24", "ADA_24") for gpu in POOLS[pool]] if small else gpus
        settings, spec = Settings.from_env(preset["defaults"]), MODELS[MODES[model].model if model in MODES else model]
        modes = {offer.outlook.memory.mode for offer in choose_gpus(settings, spec, "runpod", asked)}
        assert modes == {"encoders" if preset["name"].endswith("text encoders in host memory") else "resident"}


def test_the_hubs_handler_is_the_worker(tmp_path: Path) -> None:
    given = json.dumps({"input": {"prompt": "x", "frames": 9}})
    command = [sys.executable, ROOT / ".runpod" / "handler.py", "--test_input", given]
    ran = subprocess.run(command, env=clean_environment(tmp_path), capture_output=True, text=True, timeout=DEADLINE_S)
    assert "unknown_parameter" in ran.stdout


def test_hub_tests_are_native_requests() -> None:
    assert HUB_TESTS.keys() == {"tests", "config"}
    assert HUB_TESTS["config"].keys() == {"gpuTypeId", "gpuCount", "env", "allowedCudaVersions"}
    Settings.from_env({entry["key"]: entry["value"] for entry in HUB_TESTS["config"]["env"]})
    for test in HUB_TESTS["tests"]:
        assert test.keys() == {"name", "input", "timeout"}
        MODELS["spark"].validate(ImageRequest.parse(test["input"]))
