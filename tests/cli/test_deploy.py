"""`deploy`: the commands and files of every platform, held against what ships there, its scripts and the guide."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from handler import GPUS, MODELS, Settings
from handler.__main__ import main
from handler.api.deploying import platforms
from handler.catalog.elsewhere import ELSEWHERE, PLATFORMS, rentals_on
from handler.volume.receipts import Candidate, Figures, Outcome, Receipt, keep
from handler.worker.clock import Ledger
from handler.worker.memory import TRIED
from handler.worker.renting import choose_gpus
from test_guides import in_blocks

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "platform"
FILES = [name for name, row in platforms.PLATFORMS.items() if row.file]


@pytest.fixture
def deploy(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """What the verb says as JSON."""

    def run(*arguments: str) -> dict[str, Any]:
        assert main(["deploy", *arguments, "--json"]) == 0, capsys.readouterr().err
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


@pytest.fixture(autouse=True)
def volume(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("KINDLING_VOLUME", str(tmp_path))
    return tmp_path


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a YAML file with where they are; an entry of a list with a name is found by that."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    if not isinstance(tree, dict | list):
        yield path, tree
    for key, value in pairs:
        named = value.get("name", value.get("kind", key)) if isinstance(value, dict) else key
        yield from leaves(value, f"{path}.{named if isinstance(tree, list) else key}")


def different(platform: str, made: str) -> dict[str, Any]:
    """What a generated file says otherwise than the one that ships: by where, the value there, None if left out."""
    name = platforms.PLATFORMS[platform].file
    shipped, found = (dict(leaves(list(yaml.safe_load_all(text)))) for text in ((SHIPPED / name).read_text(), made))
    paths = shipped.keys() | found.keys()
    return {path: found.get(path) for path in paths if shipped.get(path) != found.get(path)}


def test_the_platforms_are_those_whose_gpus_are_known() -> None:
    assert set(platforms.PLATFORMS) == set(PLATFORMS)
    assert all(row in GPUS for known in ELSEWHERE.values() for row in known)


@pytest.mark.parametrize("platform", platforms.PLATFORMS)
@pytest.mark.parametrize("model", ["spark", "sdxl-turbo", "flux-schnell", "flux-dev"])
def test_every_platform(deploy: Callable[..., dict[str, Any]], platform: str, model: str) -> None:
    found = deploy(platform, model)
    spec = MODELS[model]
    assert spec.license.obligation in found["licence"]
    assert "parameters x" in found["memory"]
    assert "not measured here" in found["cold_start"]
    assert "{" not in found["note"]
    named = [name for row, rental in rentals_on(platform) for name in rental.names]
    assert set(found["gpus"]) <= set(named)
    said = [*found["commands"], *found["files"].values()]
    fetched = any("fetch" in text or "--fill" in text for text in said)
    assert fetched is (not spec.embedded or platform in ("kubernetes", "sky"))  # whose files have it
    assert any("HF_TOKEN" in command or "hf-token" in command for command in found["commands"]) is spec.license.gated
    for text in found["files"].values():
        assert model in str(list(yaml.safe_load_all(text)))


@pytest.mark.parametrize("platform", platforms.PLATFORMS)
def test_what_is_rented_holds_the_model(platform: str) -> None:
    for model in ("sdxl", "flux-dev", "flux2-dev"):
        modes = {offer.outlook.memory.mode for offer in choose_gpus(Settings(), MODELS[model], platform)}
        assert len(modes) == 1
        assert modes <= set(TRIED["auto"])


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        (
            "kubernetes flux-schnell",
            {".Deployment.spec.template.spec.containers.kindling.resources.requests.memory": "12Gi"}
            | {".Deployment.spec.template.spec.containers.kindling.resources.limits.memory": "12Gi"},
        ),
        (
            "kubernetes flux2-dev --gpu H200 --precision bf16 --min 1 --max 9",
            {
                ".PersistentVolumeClaim.spec.resources.requests.storage": "300Gi",
                ".Job.metadata.name": "kindling-fetch-flux2-dev",
                ".Job.spec.template.spec.containers.fetch.env.KINDLING_MODEL.value": "flux2-dev",
                ".Job.spec.template.spec.containers.fetch.env.KINDLING_PRECISION.name": "KINDLING_PRECISION",
                ".Job.spec.template.spec.containers.fetch.env.KINDLING_PRECISION.value": "bf16",
                ".Deployment.spec.template.spec.containers.kindling.env.KINDLING_MODEL.value": "flux2-dev",
                ".Deployment.spec.template.spec.containers.kindling.env.KINDLING_PRECISION.name": "KINDLING_PRECISION",
                ".Deployment.spec.template.spec.containers.kindling.env.KINDLING_PRECISION.value": "bf16",
                ".Deployment.spec.template.spec.containers.kindling.resources.requests.memory": "12Gi",
                ".Deployment.spec.template.spec.containers.kindling.resources.limits.memory": "12Gi",
                ".ScaledObject.spec.minReplicaCount": 1,
                ".ScaledObject.spec.maxReplicaCount": 9,
            },
        ),
        ("cloudrun sdxl-turbo", {}),
        (
            "cloudrun flux-dev --min 5",
            {
                ".Service.spec.template.metadata.annotations.autoscaling.knative.dev/minScale": "5",
                ".Service.spec.template.metadata.annotations.autoscaling.knative.dev/maxScale": "5",
                ".Service.spec.template.spec.nodeSelector.run.googleapis.com/accelerator": "nvidia-rtx-pro-6000",
                ".Service.spec.template.spec.containers.kindling.env.KINDLING_MODEL.value": "flux-dev",
                ".Service.spec.template.spec.containers.kindling.resources.limits.cpu": "20",
                ".Service.spec.template.spec.containers.kindling.resources.limits.memory": "80Gi",
            },
        ),
        ("convox flux-schnell --gpu A10G --precision int8", {}),
        (
            "convox sdxl --gpu L40S --min 2 --max 3",
            {
                ".0.services.web.environment.1": "KINDLING_MODEL=sdxl",
                ".0.services.web.environment.2": "KINDLING_PRECISION=auto",
                ".0.services.web.scale.count": "2-3",
                ".0.services.web.scale.memory": 40960,
            },
        ),
        (
            "sky flux-schnell --gpu L4 --precision fp8 --min 0 --region aws/us-east-1",
            {
                ".kindling.envs.KINDLING_PRECISION": "fp8",
                ".kindling.resources.accelerators.L4:1": None,
                ".kindling.resources.accelerators.L40S:1": None,
                ".kindling.resources.accelerators.A100:1": None,
                ".kindling.resources.accelerators.A100-80GB:1": None,
                ".kindling.resources.accelerators.H100:1": None,
                ".kindling.resources.memory": "18+",
                ".kindling.resources.infra": "aws/us-east-1",
                ".kindling.service.replica_policy.min_replicas": 0,
            },
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_is_what_ships_with_other_values(
    deploy: Callable[..., dict[str, Any]], arguments: str, changed: dict[str, Any]
) -> None:
    [text] = deploy(*arguments.split())["files"].values()
    platform = arguments.split()[0]
    found = different(platform, text)
    asked = {path: value for path, value in changed.items() if value is not None}
    assert found.items() >= asked.items()
    assert found.keys() - changed.keys() == set(), found
    assert text.startswith(f"# Made by `python -m handler deploy {arguments}`")


def test_the_values_of_the_guides_example_are_those_that_ship(deploy: Callable[..., dict[str, Any]]) -> None:
    """So that whoever reads the manifest and whoever lets one be made rent the same."""
    [text] = deploy("sky", "flux-schnell")["files"].values()
    assert different("sky", text).keys() == {".kindling.resources.memory"}


# Of a page's commands up to the first picture those that `deploy` leaves to whoever has no such nodes yet.
BEFORE = (
    "helm repo add nvidia https://helm.ngc.nvidia.com/nvidia",
    "helm install gpu-operator nvidia/gpu-operator --namespace gpu-operator --create-namespace --wait",
    "convox rack params set 'additional_node_groups_config=",
)


@pytest.mark.parametrize("platform", platforms.PLATFORMS)
def test_the_commands_are_those_of_the_platforms_page(deploy: Callable[..., dict[str, Any]], platform: str) -> None:
    """All of them, in that order, for the model of the page."""
    page = (ROOT / f"docs/deploy/{platform}.md").read_text().split("\n## ")[1]
    shown = [command for command in in_blocks(page) if command and not command.startswith(BEFORE)]
    [model] = {word for word in re.findall(r"[\w.-]+", "\n".join(shown)) if word in MODELS} or {"flux-schnell"}
    printed = [command for command in deploy(platform, model)["commands"] if not command.startswith("#")]
    name = platforms.PLATFORMS[platform].file
    assert [re.sub(rf"(?<= ){name}", f"platform/{name}", command) if name else command for command in printed] == shown


def test_the_script_is_a_shells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for platform in platforms.PLATFORMS:
        folder = tmp_path / platform
        assert main(["deploy", platform, "flux-dev", "--write", str(folder)]) == 0
        assert "Written to" in capsys.readouterr().out
        subprocess.run(["sh", "-n", folder / "deploy.sh"], check=True)
        name = platforms.PLATFORMS[platform].file
        assert {path.name for path in folder.iterdir()} == {"deploy.sh", *([name] if name else [])}
        assert str(folder / name) in (folder / "deploy.sh").read_text() or not name
        assert main(["deploy", platform, "flux-dev", "--write", str(folder)]) == 0  # the same once more
        (folder / "deploy.sh").write_text("mine")
        assert main(["deploy", platform, "flux-dev", "--write", str(folder)]) == 2
        assert "name another folder" in capsys.readouterr().err
        assert (folder / "deploy.sh").read_text() == "mine"


def test_what_cannot_be_written_over_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "deploy.sh"
    script.write_bytes(b"\xff")
    assert main(["deploy", "docker", "spark", "--write", str(tmp_path)]) == 2
    assert "name another folder" in capsys.readouterr().err


@pytest.fixture
def runpod(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("runpod_deploy", SHIPPED / "runpod_deploy.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_runpods_script_takes_what_is_printed(
    deploy: Callable[..., dict[str, Any]],
    runpod: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = ["--gpu", "A100 80GB", "--precision", "int8", "--min", "1", "--max", "2", "--region", "US-KS-2"]
    commands = deploy("runpod", "flux-dev", *chosen)["commands"]
    [words] = [shlex.split(command) for command in commands if "runpod_deploy.py" in command]
    assert "export KINDLING_PRECISION=int8" in commands
    monkeypatch.setenv("KINDLING_PRECISION", "int8")
    name, _, token = words[0].partition("=")
    monkeypatch.setenv(name, token)
    capsys.readouterr()
    assert runpod.main([*words[words.index("platform/runpod_deploy.py") + 1 :], "--dry-run"]) == 0
    volume, pod, template, endpoint = (request["json"] for request in json.loads(capsys.readouterr().out))
    assert (volume["dataCenter"], volume["size"] > 50) == ("US-KS-2", True)
    assert pod["env"]["HF_TOKEN"] == "{{ RUNPOD_SECRET_hub }}"
    assert template["env"]["KINDLING_PRECISION"] == "int8"
    assert endpoint["gpu"]["pools"] == ["AMPERE_80"]
    assert endpoint["workers"] == {"min": 1, "max": 2, "idleTimeout": 60}
    assert endpoint["dataCenterIds"] == ["US-KS-2"]


@pytest.mark.parametrize("platform", platforms.PLATFORMS)
def test_a_command_uses_nothing_that_none_before_it_has_set(
    deploy: Callable[..., dict[str, Any]], platform: str
) -> None:
    """For `deploy.sh` ends at such a one."""
    known = {"HOME"}
    for command in deploy(platform, "flux-dev")["commands"]:
        if command.startswith("export ") or re.fullmatch(r"([A-Z]+=(\S+|\$\(.+\)) ?)+", command):
            known |= {*re.findall(r"\b([A-Z_]+)=", command)}
        assert {*re.findall(r"\$([A-Z_]+)", command)} <= known, command


@pytest.mark.parametrize(
    ("platform", "told"),
    [
        ("modal", "export KINDLING_MODEL=sdxl CUDA=cu126"),
        ("fal", "export KINDLING_MODEL=sdxl CUDA=cu126"),
        ("runpod", "export CUDA=cu126"),
        ("docker", "docker build --build-arg CUDA=cu126 -t kindling ."),
        ("kubernetes", "docker build --build-arg CUDA=cu126 -t REGISTRY/kindling:0.1.0 . && docker push"),
        ("convox", "convox build -a kindling -m convox.yml --build-args CUDA=cu126"),
    ],
)
def test_another_build_of_torch_is_told_to_what_builds(
    deploy: Callable[..., dict[str, Any]], platform: str, told: str
) -> None:
    found = deploy(platform, "sdxl", "--cuda", "cu126")
    assert any(command.startswith(told) for command in found["commands"]), found["commands"]
    assert not any("CUDA=" in command for command in deploy(platform, "sdxl")["commands"])
    if "{driver}" in platforms.PLATFORMS[platform].note:
        assert "525 or newer" in found["note"]


def test_modals_script_knows_what_is_exported(deploy: Callable[..., dict[str, Any]]) -> None:
    commands = deploy("modal", "sdxl", "--gpu", "L4", "--min", "1", "--max", "2", "--region", "eu")["commands"]
    assert "export MODAL_GPU=L4 MODAL_MAX=2 MODAL_REGION=eu" in commands
    assert [command for command in commands if "MODAL_MIN" in command] == [
        "MODAL_MIN=1 modal deploy platform/modal_app.py"  # `modal run` creates the whole app, with what always runs
    ]
    script = (SHIPPED / "modal_app.py").read_text()
    assert all(f'"{name}"' in script for name in ("MODAL_GPU", "MODAL_MIN", "MODAL_MAX", "MODAL_REGION"))
    assert not any("MODAL_" in command for command in deploy("modal", "sdxl")["commands"])
    assert "export MODAL_MAX=5" in deploy("modal", "sdxl", "--min", "5")["commands"]  # 4 would be too few


def test_fals_scale_is_set_by_command(deploy: Callable[..., dict[str, Any]]) -> None:
    """For later deployments leave it as it is, whatever platform/fal_app.py says."""
    commands = deploy("fal", "sdxl", "--min", "5")["commands"]
    assert "fal apps scale kindling --min-concurrency 5 --max-concurrency 5" in commands  # 4 would be too few
    assert "fal apps scale kindling --max-concurrency 2" in deploy("fal", "sdxl", "--max", "2")["commands"]
    assert not any("scale" in command for command in deploy("fal", "sdxl")["commands"])


def test_cloud_runs_image_is_for_the_gpus_driver(deploy: Callable[..., dict[str, Any]]) -> None:
    for gpu, cuda in (("L4", "cu126"), ("RTX PRO 6000", "cu130")):
        [build] = [line for line in deploy("cloudrun", "sdxl", "--gpu", gpu)["commands"] if "builds submit" in line]
        assert build.endswith(f",_CUDA={cuda}")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ("cloudrun sdxl --gpu H100", 2, "cloudrun has no 'H100', as far as is known here. It has: L4, RTX PRO 6000."),
        ("cloudrun flux-dev --gpu L4 --precision bf16", 1, "On cloudrun these would do: RTX PRO 6000."),
        ("runpod flux-dev --gpu A40 --precision fp8", 2, "FP8 arithmetic needs"),
        ("convox flux2-dev --precision bf16", 1, "On convox these would do with --precision auto: L40S."),
        ("modal sdxl --gpu T4", 2, "only emulates bfloat16. Use fp16, or another GPU. On modal these would do: L4"),
        ("convox flux-dev --precision nvfp4", 2, "On convox these would do with --precision auto: L40S."),
        ("fal sdxl --gpu GPU-H100", 2, "--gpu means nothing for fal: platform/fal_app.py rents the cheapest"),
        ("kubernetes sdxl --region eu", 2, "--region means nothing for kubernetes: the cluster is where it is."),
        ("docker sdxl --min 1", 2, "--min means nothing for docker: it is one worker on one machine."),
        ("convox sdxl --min 0", 2, "--min should be 1 or more for convox, not 0."),
        ("modal sdxl --min 3 --max 2", 2, "--max should be 3 or more, not 2."),
        ("modal sdxl --max 10000", 2, "--max should be 9999 or less for modal, not 10000."),
        ("runpod sdxl --min 1001", 2, "--min should be 1000 or less for runpod, not 1001."),
        ("modal sdxl --max 0", 2, "--max should be 1 or more, not 0."),
        ("sky sdxl --region eu,us", 2, "--region should name one place for sky, not 2."),
        ("sky sdxl --region $(reboot)", 2, "--region should be a place's name, such as us-east-1, not '$(reboot)'."),
        ("docker sdxl --gpu B200 --cuda cu126", 2, "has no code for the B200. On docker these would do: RTX A4000"),
        ("cloudrun sdxl --gpu L4 --cuda cu130", 2, "the L4 have one of 535. On cloudrun these would do: RTX"),
        ("sky sdxl --cuda cu126", 2, "--cuda means nothing for sky: the machines install the packages for CUDA 13"),
        ("modal stable-diffusion-9", 2, "stable-diffusion-9"),
    ],
)
def test_what_cannot_work_is_refused(capsys: pytest.CaptureFixture[str], arguments: str, code: int, told: str) -> None:
    assert main(["deploy", *arguments.split()]) == code
    out, err = capsys.readouterr()
    assert told in err
    assert (out, err.count("\n")) == ("", 1)


def test_what_was_measured_here_is_told_with_what_it_rests_on(
    deploy: Callable[..., dict[str, Any]], volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (volume / "boots").mkdir()
    for seconds in (41.0, 55.4):
        ledger = Ledger("flux-dev", "NVIDIA L4", "fp8", outcome="ready", total_s=seconds)
        (volume / "boots" / f"2026-01-01T00-00-00-host-{seconds}.json").write_text(json.dumps(asdict(ledger)))
    figures = Figures(24, 2.0, p95_s=2.2, images_per_s=0.5, peak_gb=20.0, cold_start_s=55.0)
    best, row = Candidate("fp8", True), dict.fromkeys(("reason", "priority", "picture", "price", "command"), "")
    outcomes = (Outcome(best, "measured", figures),)
    about = {"revision": "", "limits": {}, "versions": {}, "when": "2026-11-21T12:00:00+00:00"}
    keep(Receipt(model="flux-dev", device="NVIDIA L4", winner=best, outcomes=outcomes, **row, **about), volume)
    found = deploy("runpod", "flux-dev", "--gpu", "L4", "--precision", "fp8")
    assert found["price"].startswith("0.00038 dollars a picture of 2.00 s, as optimize measured here; L4 at 0.68")
    assert found["cold_start"].startswith("55 s, the longest of 2 on this GPU that the volume here has on record")
    monkeypatch.setenv("KINDLING_GPU_PRICE", "3.6")
    assert deploy("docker", "flux-dev", "--gpu", "L4", "--precision", "int8")["price"].startswith(
        "0.00100 dollars a second"
    )


def test_modal_is_installed_as_it_is_tested(deploy: Callable[..., dict[str, Any]]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = {*extras["modal"], *(ROOT / "requirements.txt").read_text().splitlines()}
    _, install, *_ = deploy("modal", "sdxl")["commands"]
    assert install.startswith("pip install modal==")
    assert {*install.split()[2:]} <= pinned


def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", "cloudrun", "flux-dev", "--gpu", "L4", "--precision", "fp8"]) == 0
    out = capsys.readouterr().out
    for part in (
        "flux-dev on cloudrun",
        "note        The L4 does not hold flux-dev whole",
        "COMMANDS",
        "FILE cloudrun.yml",
    ):
        assert part in out


@pytest.mark.parametrize("kind", ["fifo", "folder", "dangling"])
def test_what_is_no_file_is_not_written_over_nor_waited_for(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "deploy.sh"
    {"fifo": os.mkfifo, "folder": Path.mkdir, "dangling": lambda path: path.symlink_to(tmp_path / "away")}[kind](script)
    assert main(["deploy", "modal", "spark", "--write", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert not (tmp_path / "away").exists()


def test_a_folder_that_is_not_spelt_in_unicode_is_written_to(tmp_path: Path) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    assert main(["deploy", "kubernetes", "spark", "--write", folder]) == 0
    assert os.fsencode(folder) in Path(folder, "deploy.sh").read_bytes()
