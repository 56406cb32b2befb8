"""The container and the files that deploy it, held against the code: ports, paths, budgets, pins; and its command."""

import asyncio
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml
from packaging.specifiers import SpecifierSet
from pathspec import GitIgnoreSpec

from handler import GPUS, MODELS, Engine, Settings, create_app, cuda_build, outlook
from handler.__main__ import main
from handler.catalog.cuda import BUILDS
from handler.core.settings import MOUNTS
from handler.core.version import __version__
from handler.model.hardware import IMAGE, promised
from handler.server.shutdown import DRAIN_S
from handler.worker.clock import GRACE_S
from handler.worker.ending import SAYING_S
from serving import Served

ROOT = Path(__file__).parents[2]
BUDGET_S = Settings().cold_start_budget_s
CLOUD_RUN_STARTS_S = 240
NEWEST = kubernetes_validate.latest_version()


def instructions(text: str) -> list[tuple[str, str]]:
    """A Dockerfile's instructions, each as its name and the rest of its line."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in whole if line.strip()]


DOCKERFILE = instructions((ROOT / "Dockerfile").read_text())
ENV = dict(pair.split("=", 1) for name, rest in DOCKERFILE if name == "ENV" for pair in rest.split())
PORT = int(ENV["PORT"])
# Docker's patterns start at the root, as git's do after a slash.
IGNORED = GitIgnoreSpec.from_lines(f"/{line.lstrip('/')}" for line in (ROOT / ".dockerignore").read_text().split())


def documents(name: str) -> dict[str, Any]:
    """The documents of one of platform/'s YAML files, by kind."""
    return {found["kind"]: found for found in yaml.safe_load_all((ROOT / "platform" / name).read_text())}


KUBERNETES = documents("kubernetes.yml")
PODS = {
    "kubernetes": KUBERNETES["Deployment"]["spec"]["template"]["spec"],
    "cloudrun": documents("cloudrun.yml")["Service"]["spec"]["template"]["spec"],
}
JOB = KUBERNETES["Job"]["spec"]["template"]["spec"]
LOCKS = ROOT / "platform" / "locks"
SKY = yaml.safe_load((ROOT / "platform" / "sky.yml").read_text())
CONVOX = yaml.safe_load((ROOT / "platform" / "convox.yml").read_text())["services"]["web"]


def environment(pod: dict[str, Any]) -> dict[str, str]:
    """What a pod's container is told in plain text."""
    return {each["name"]: each["value"] for each in pod["containers"][0]["env"] if "value" in each}


def statuses(path: str) -> list[int]:
    """How the app answers a probe, which has no key, while starting, when ready and when broken."""
    engine = Engine(Settings(api_keys=("secret",)))
    transport = httpx.ASGITransport(create_app(engine, public=True))

    async def ask() -> int:
        async with httpx.AsyncClient(transport=transport, base_url="http://container") as client:
            return (await client.get(path)).status_code

    answers = []
    for engine.state in ("starting", "ready", "failed"):
        answers.append(asyncio.run(ask()))
    return answers


def readiness_paths() -> Iterator[str]:
    for pod in PODS.values():
        [container] = pod["containers"]
        for name in {"startupProbe", "readinessProbe"} & container.keys():
            yield container[name]["httpGet"]["path"]
    yield CONVOX["health"]["path"]
    yield SKY["service"]["readiness_probe"]["path"]


def liveness_paths() -> Iterator[str]:
    for pod in PODS.values():
        yield pod["containers"][0]["livenessProbe"]["httpGet"]["path"]
    yield CONVOX["liveness"]["path"]


@pytest.mark.parametrize("path", sorted(set(readiness_paths())))
def test_ready_is_a_worker_whose_model_is_loaded(path: str) -> None:
    """Probes carry no key. A start that fails was never ready, so that an update keeps the old workers."""
    assert statuses(path) == [503, 200, 503]


@pytest.mark.parametrize("path", sorted(set(liveness_paths())))
def test_a_starting_worker_is_alive(path: str) -> None:
    assert statuses(path)[:2] == [200, 200]


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS)
def test_probes_and_services_know_the_port(pod: dict[str, Any]) -> None:
    [container] = pod["containers"]
    port, *others = container["ports"]
    assert port["containerPort"] == PORT
    probed = {PORT: PORT} | {each["name"]: each["containerPort"] for each in others or [port]}
    asked = {probed[probe["httpGet"]["port"]] for name, probe in container.items() if name.endswith("Probe")}
    health = {int(each["value"]) for each in container["env"] if each["name"] == "PORT_HEALTH"}
    assert asked == (health or {PORT})


def test_the_port_is_the_same_everywhere() -> None:
    assert CONVOX["port"] == PORT
    assert ("EXPOSE", str(PORT)) in DOCKERFILE
    service = KUBERNETES["Service"]["spec"]["ports"][0]
    target = KUBERNETES["InterceptorRoute"]["spec"]["target"]
    assert service["targetPort"] == PODS["kubernetes"]["containers"][0]["ports"][0]["name"]
    assert target == {"service": KUBERNETES["Service"]["metadata"]["name"], "port": service["port"]}


def test_the_image_says_that_it_is_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    [name] = [name for name, value in ENV.items() if value == "$CUDA"]
    monkeypatch.setattr("handler.model.hardware.sees_gpu", lambda: False)
    assert promised() == ""
    monkeypatch.setenv(name, "cu130")
    assert promised() == IMAGE


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS)
def test_the_worker_ends_a_slow_start_before_the_platform_does(pod: dict[str, Any]) -> None:
    probe = pod["containers"][0]["startupProbe"]
    settings = Settings.from_env(environment(pod))
    assert probe["periodSeconds"] * probe["failureThreshold"] > settings.cold_start_budget_s + GRACE_S + SAYING_S


def test_each_platforms_own_limits() -> None:
    probe = PODS["cloudrun"]["containers"][0]["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] <= CLOUD_RUN_STARTS_S
    assert CONVOX["liveness"]["grace"] > BUDGET_S
    readiness = KUBERNETES["InterceptorRoute"]["spec"]["timeouts"]["readiness"]
    assert int(readiness.removesuffix("s")) > BUDGET_S


def test_scales_to_zero() -> None:
    assert KUBERNETES["ScaledObject"]["spec"]["minReplicaCount"] == 0
    assert "replicas" not in KUBERNETES["Deployment"]["spec"]
    annotations = documents("cloudrun.yml")["Service"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["autoscaling.knative.dev/minScale"] == "0"


def test_a_stopping_worker_has_time_to_drain() -> None:
    pod = PODS["kubernetes"]
    leaving = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > leaving + DRAIN_S
    command, convoxs = CONVOX["lifecycle"]["preStop"].split()
    assert (command, CONVOX["termination"]["grace"] > int(convoxs) + DRAIN_S) == ("sleep", True)


def test_names_refer_to_each_other() -> None:
    name = KUBERNETES["Deployment"]["metadata"]["name"]
    scaled = KUBERNETES["ScaledObject"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == name
    assert scaled["triggers"][0]["metadata"]["interceptorRoute"] == KUBERNETES["InterceptorRoute"]["metadata"]["name"]
    labels = KUBERNETES["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert KUBERNETES["Service"]["spec"]["selector"] == labels
    assert KUBERNETES["Deployment"]["spec"]["selector"]["matchLabels"] == labels


@pytest.mark.parametrize("pod", [*PODS.values(), JOB], ids=[*PODS, "job"])
def test_pods_run_this_version_on_the_volume(pod: dict[str, Any]) -> None:
    [container] = pod["containers"]
    assert container["image"] == f"kindling:{__version__}"
    mounts = [(mount["name"], Path(mount["mountPath"])) for mount in container["volumeMounts"]]
    assert dict(mounts[::-1])["volume"] in MOUNTS  # the first; the others are in it
    assert {name for name, _ in mounts} == {volume["name"] for volume in pod["volumes"]}


def test_workers_write_nothing_but_what_they_leave_for_each_other() -> None:
    """Not models, LoRAs, receipts, nor anything else that says what is drawn."""
    [container] = PODS["kubernetes"]["containers"]
    whole, *others = (mount for mount in container["volumeMounts"] if mount["name"] == "volume")
    assert (whole["mountPath"], whole["readOnly"]) == ("/volume", True)
    written = {mount["subPath"] for mount in others}
    assert all(mount["mountPath"] == f"/volume/{mount['subPath']}" for mount in others)
    assert written == {"baked", "boots", "comfy", "kept", "spend"}
    [key] = [each for each in container["env"] if each["name"] == "KINDLING_VOLUME_KEY"]
    assert key["valueFrom"]["secretKeyRef"]["optional"] is True


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS)
def test_pods_rent_one_gpu_and_hide_the_keys(pod: dict[str, Any]) -> None:
    [container] = pod["containers"]
    assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == "1"
    [keys] = [each for each in container["env"] if each["name"] == "KINDLING_API_KEYS"]
    assert set(keys["valueFrom"]) == {"secretKeyRef"}
    assert environment(pod)["KINDLING_MODEL"] in MODELS
    assert environment(pod)["KINDLING_DEVICE"] == "cuda"


def test_convox() -> None:
    given = dict(each.partition("=")[::2] for each in CONVOX["environment"])
    said = {"KINDLING_DEVICE": "cuda", "KINDLING_MODEL": "flux-schnell", "KINDLING_PRECISION": "int8"}
    secret = dict.fromkeys(("KINDLING_API_KEYS", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"), "")
    assert given == said | secret  # "": `convox env set` gives them
    assert (CONVOX["scale"]["gpu"], CONVOX["scale"]["count"]) == (1, "1-2")
    assert Path(CONVOX["volumeOptions"][0]["awsEfs"]["mountPath"]) in MOUNTS


def test_the_fetched_model_is_the_one_that_is_served() -> None:
    served = environment(PODS["kubernetes"])
    served = {name: value for name, value in served.items() if name not in ("KINDLING_DEVICE", "PORT_HEALTH")}
    assert environment(JOB) == served


def test_cloud_runs_model_fits_its_gpu() -> None:
    pod = PODS["cloudrun"]
    assert pod["nodeSelector"]["run.googleapis.com/accelerator"] == "nvidia-l4"
    host_gb = int(pod["containers"][0]["resources"]["limits"]["memory"].removesuffix("Gi")) * 1.074
    assert (
        outlook(Settings(), MODELS[environment(pod)["KINDLING_MODEL"]], GPUS["L4"], host_gb).memory.mode == "resident"
    )


@pytest.mark.parametrize(("gpu", "precision"), [("A10G", "int8"), ("L4", "int8"), ("L4", "fp8")])
def test_convoxs_model_fits_the_nodes_that_its_head_names(gpu: str, precision: Any) -> None:
    settings = Settings(precision=precision)
    plan = outlook(settings, MODELS["flux-schnell"], GPUS[gpu], CONVOX["scale"]["memory"] / 1000).memory
    assert (plan.fits, plan.mode) == (True, "encoders")


def test_an_update_needs_no_further_gpu() -> None:
    strategy = KUBERNETES["Deployment"]["spec"]["strategy"]["rollingUpdate"]
    assert strategy == {"maxSurge": 0, "maxUnavailable": 1}
    # In percent: Kubernetes may take away what is not in the minimum, rounded down, or else one.
    assert CONVOX["deployment"] == {"minimum": 50, "maximum": 100}
    started = KUBERNETES["Deployment"]["spec"]["progressDeadlineSeconds"]
    assert started > BUDGET_S


def test_convox_gives_few_rights() -> None:
    assert CONVOX["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": PODS["kubernetes"]["securityContext"]["runAsUser"],
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": "RuntimeDefault",
    }


@pytest.mark.parametrize("pod", [PODS["kubernetes"], JOB], ids=["deployment", "job"])
def test_pods_have_few_rights(pod: dict[str, Any]) -> None:
    [container] = pod["containers"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    home = next(each["value"] for each in container["env"] if each["name"] == "HOME")
    [scratch] = [volume["name"] for volume in pod["volumes"] if "emptyDir" in volume]
    assert {"name": scratch, "mountPath": home} in container["volumeMounts"]


def test_pods_hear_only_the_interceptor() -> None:
    policy = KUBERNETES["NetworkPolicy"]["spec"]
    assert policy["podSelector"] == {"matchLabels": {"app": "kindling"}}
    [rule] = policy["ingress"]
    scaler = KUBERNETES["ScaledObject"]["spec"]["triggers"][0]["metadata"]["scalerAddress"]
    [source] = rule["from"]
    assert source["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] in scaler
    assert rule["ports"] == [{"port": PODS["kubernetes"]["containers"][0]["ports"][0]["name"]}]


def test_another_model_is_another_job() -> None:
    """A job cannot be changed: its name has the model, so that one word is changed everywhere."""
    assert KUBERNETES["Job"]["metadata"]["name"] == f"kindling-fetch-{environment(JOB)['KINDLING_MODEL']}"


def test_cloud_run_leaves_the_authorization_to_kindling() -> None:
    """Google's own check would take the one header that OpenAI's clients send their key in."""
    service = documents("cloudrun.yml")["Service"]
    assert service["metadata"]["annotations"]["run.googleapis.com/invoker-iam-disabled"] == "true"
    assert "KINDLING_API_KEYS" in {each["name"] for each in PODS["cloudrun"]["containers"][0]["env"]}
    assert PODS["cloudrun"]["serviceAccountName"].startswith("kindling@")


def test_sky() -> None:
    assert SKY["resources"]["ports"] == PORT
    assert SKY["secrets"]["KINDLING_API_KEYS"] is None  # which has to be given
    assert SKY["service"]["load_balancer"]["stream_timeout_seconds"] == Settings().deadline_s  # else it asks again
    names = {name.partition(":")[0].replace("-", " ") for name in SKY["resources"]["accelerators"]}
    for name in {"A100 40GB" if name == "A100" else name for name in names}:
        assert outlook(Settings(), MODELS[SKY["envs"]["KINDLING_MODEL"]], GPUS[name], 40).memory.mode == "resident"


def test_sky_installs_what_was_tested_for_a_python_that_does() -> None:
    """Machines' own Python may be too old, and a list without hashes other packages than the tests saw."""
    [python] = re.findall(r"venv .*--python (\S+)", SKY["setup"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert python in SpecifierSet(project["requires-python"])
    [locks] = re.findall(r"--require-hashes -r (\S+) -r (\S+)", SKY["setup"])
    assert [ROOT / lock for lock in locks] == [LOCKS / "torch-cu130.lock", LOCKS / "requirements.lock"]


def test_what_is_copied_is_in_the_repository() -> None:
    copied = [rest.replace("$CUDA", build) for name, rest in DOCKERFILE if name == "COPY" for build in BUILDS]
    sources = [source for rest in copied for source in shlex.split(rest)[:-1]]
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    assert {package.rstrip("*") for package in found["include"]} <= set(sources)
    assert "spark" not in sources
    for source in sources:
        tracked = subprocess.run(["git", "ls-files", source], cwd=ROOT, capture_output=True, text=True, check=True)
        assert tracked.stdout, source
        assert not IGNORED.match_file(source)
        assert not list(IGNORED.match_files(tracked.stdout.split()))


@pytest.mark.parametrize(
    "name",
    [
        ".env",
        ".git/config",
        ".mypy_cache/3.11/a.json",
        ".venv/bin/python",
        "handler/__pycache__/api.pyc",
        "kindling.egg-info/PKG-INFO",
        "platform/.env.local",
        "spark/train.py",
        "tests/conftest.py",
    ],
)
def test_what_stays_out_of_the_image(name: str) -> None:
    assert IGNORED.match_file(name)


def test_what_is_ignored_is_said_as_every_builder_understands_it() -> None:
    """fal reads each line as a regular expression of its own, so that nothing can be taken back."""
    assert not re.search(r"^!", (ROOT / ".dockerignore").read_text(), re.M)


def test_the_scripts_of_the_command_exist() -> None:
    command = json.loads(next(rest for name, rest in DOCKERFILE if name == "CMD"))[-1]
    [script] = re.findall(r"\S+\.py", command)
    assert (ROOT / script).exists()


def test_everything_is_pinned() -> None:
    requirements = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = re.compile(r"[\w.-]+(\[[\w,]+\])?==[\w.]+(; platform_system == \"Linux\")?")
    assert all(pinned.fullmatch(line) for line in requirements)
    [base] = [rest for name, rest in DOCKERFILE if name == "FROM"]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+@sha256:[0-9a-f]{64}", base)


def locked(name: str) -> dict[str, tuple[str, int]]:
    """The version of each package in a lock, and how many hashes it may have."""
    found = re.findall(r"^([\w.-]+)==(\S+)(.*?)(?=^\S|\Z)", (LOCKS / f"{name}.lock").read_text(), re.M | re.S)
    return {package: (version, more.count("--hash=sha256:")) for package, version, more in found}


def asked(lines: list[str]) -> dict[str, str]:
    """The versions that requirements name, by the names that a lock has."""
    plain = [line.partition(";")[0].strip() for line in lines if not line.startswith("#")]
    pairs = (line.partition("==")[::2] for line in plain)
    return {re.sub(r"\[.*", "", name).replace("_", "-").lower(): version for name, version in pairs}


@pytest.mark.parametrize("name", ["requirements", "runpod", "fal", "ray"])
def test_locks_are_in_step_with_what_is_asked_for(name: str) -> None:
    """`make lock` writes them."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = asked([*(ROOT / "requirements.txt").read_text().splitlines(), *extras.get(name, [])])
    torch, others = locked("torch-cu130"), locked(name)
    found = torch | others
    assert {name: torch[name] for name in torch.keys() & others.keys()}.items() <= others.items()
    assert not [each for each in others if re.match("torch$|triton|nvidia-cu(?!dnn-frontend)|cuda-", each)]
    assert all(hashes for _, hashes in found.values())
    assert {package: found[package][0].removesuffix(".0") for package in wanted} == {
        package: version.removesuffix(".0") for package, version in wanted.items()
    }
    arguments = dict(rest.split("=") for step, rest in DOCKERFILE if step == "ARG")
    assert arguments == {"CUDA": cuda_build().name, "SDK": "runpod"}
    assert (LOCKS / f"{arguments['SDK']}.lock").is_file()


def test_the_bill_of_materials_is_of_the_image() -> None:
    bill = json.loads((LOCKS / "sbom.json").read_text())["components"]
    installed = locked("torch-cu130") | locked("runpod")
    assert {(one["name"], one["version"]) for one in bill} == {(name, one[0]) for name, one in installed.items()}


def test_layers_that_seldom_change_come_first() -> None:
    steps = [rest for name, rest in DOCKERFILE if name in ("COPY", "RUN")]
    [torch] = [i for i, rest in enumerate(steps) if rest.startswith("pip install -r ")]
    [others] = [i for i, rest in enumerate(steps) if rest.startswith("pip install --no-deps --require-hashes")]
    code = [i for i, rest in enumerate(steps) if rest.startswith(("handler", "platform platform", "pyproject"))]
    assert torch < others < min(code)
    assert steps[torch - 1] == '"platform/locks/torch-$CUDA.lock" platform/locks/'  # no other lock changes that layer


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Files as the wheels have them, of CUDA 13 and of CUDA 12, and whether they stay."""
    for name in [*STAYS, *GOES]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    return tmp_path


STAYS = (
    "nvidia/cu13/lib/libcusolver.so.12",
    "nvidia/cu13/lib/libcupti.so.13",
    "nvidia/cu13/lib/libcudart_static.a",
    "nvidia/cu13/lib/libnvrtc.so.13",
    "nvidia/cu13/lib/libnvrtc-builtins.so.13.0",
    "nvidia/cu13/include/crt/host_defines.h",
    "nvidia/cuda_cupti/lib/libcupti.so.12",
    "nvidia/nccl/lib/libnccl.so.2",
    "nvidia/nvshmem/lib/libnvshmem_host.so.3",
    "torch/bin/torch_shm_manager",
    "torch/lib/libtorch_cuda.so",
    "triton/_C/libtriton.so",
    "triton/backends/nvidia/bin/ptxas",
    "triton/backends/nvidia/bin/ptxas-blackwell",
    "triton/backends/nvidia/lib/libdevice.10.bc",
    "triton/profiler/proton.py",
)
GOES = (
    "nvidia/cu13/lib/libcusolverMg.so.12",
    "nvidia/cusolver/lib/libcusolverMg.so.11",
    "nvidia/cu13/lib/libnvrtc.alt.so.13",
    "nvidia/cu13/lib/libnvrtc-builtins.alt.so.13.0",
    "nvidia/cu13/lib/libnvblas.so.13",
    "nvidia/nvshmem/lib/libnvshmem_device.bc",
    "nvidia/nvshmem/lib/libnvshmem_device.a",
    "torch/bin/protoc-3.13.0.0",
    "triton/_C/libproton.so",
    "triton/backends/nvidia/lib/cupti/libcupti_static.a",
    "triton/FileCheck",
    "triton/instrumentation/libGPUInstrumentationTestLib.so",
    "triton/plugins/libMLIRDialectPlugin.so",
)


def test_what_nothing_loads_is_left_out(packages: Path) -> None:
    """By the step as it is written, but for what it strips of debuggers' symbols."""
    step = next(rest for name, rest in DOCKERFILE if name == "RUN" and " -delete " in rest)
    [command] = [part for part in step.split("&&") if " -delete" in part]
    subprocess.run(["sh", "-ec", command], cwd=packages, check=True)
    left = {str(path.relative_to(packages)) for path in packages.rglob("*") if path.is_file()}
    assert left == set(STAYS)
    assert "strip --strip-unneeded triton/_C/libtriton.so nvidia/nccl/lib/libnccl.so.2" in step


def test_what_starts_run_is_compiled_and_what_they_touch_is_listed() -> None:
    """After all that is imported has been installed, by somebody who may write there."""
    *_, copied, step, user = [rest for name, rest in DOCKERFILE if name in ("COPY", "RUN", "USER")]
    assert (copied, user) == ("platform platform", "1000")
    installs, compiles, looks, lists = (part.strip() for part in step.split("&&"))
    assert (installs, compiles) == ("pip install --no-deps .", "python -m compileall -q handler platform")
    assert looks == 'python -c "import handler.model.families"'  # which leaves what transformers has
    assert lists == 'python -c "from handler.worker import touched; touched.record()"'  # which test_touched.py runs


def test_it_runs_as_somebody_with_few_rights() -> None:
    users = [rest for name, rest in DOCKERFILE if name == "USER"]
    assert users == [str(PODS["kubernetes"]["securityContext"]["runAsUser"])]
    made = next(rest for name, rest in DOCKERFILE if name == "RUN" and "useradd" in rest)
    assert f"--uid {users[0]} kindling" in made


def test_the_command_serves_and_drains(tmp_path: Path) -> None:
    """CMD as written, in a process of its own: PORT decides the port, HEALTHCHECK agrees, SIGTERM ends it with 0."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KINDLING_")}
    binaries = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = {**clean, **ENV, "PATH": binaries, "KINDLING_VOLUME": str(tmp_path), "KINDLING_API_KEYS": "secret"}
    command = json.loads(next(rest for name, rest in DOCKERFILE if name == "CMD"))
    check = json.loads(next(rest for name, rest in DOCKERFILE if name == "HEALTHCHECK").partition("CMD ")[2])
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**given, "PORT": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            served = Served(process)
            url = httpx.URL(served.url).copy_with(host="127.0.0.1")
            subprocess.run(check, env={**given, "PORT": str(url.port)}, cwd=ROOT, check=True, timeout=60)
            served.wait_for("is ready on")
            assert httpx.get(url.join("/ping")).status_code == 200
            assert httpx.get(url.join("/v1/models")).status_code == 401
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_a_worker_of_the_queue_is_not_called_unhealthy() -> None:
    check = json.loads(next(rest for name, rest in DOCKERFILE if name == "HEALTHCHECK").partition("CMD ")[2])
    for environ, code in (({"PORT": "9"}, 1), ({"PORT": "9", "RUNPOD_WEBHOOK_GET_JOB": "https://example.invalid"}, 0)):
        done = subprocess.run([sys.executable, *check[1:]], env=environ, capture_output=True, check=False)
        assert done.returncode == code, done.stderr


def test_the_first_process_passes_signals_on() -> None:
    """The kernel gives a container's first process no signal that it does not listen for, and Python begins late to."""
    assert ("ENTRYPOINT", '["tini", "--"]') in DOCKERFILE
    assert any(name == "RUN" and re.search(r"apt-get install .*\btini\b", rest) for name, rest in DOCKERFILE)


@pytest.mark.parametrize("made", ["", "kubernetes flux2-dev --gpu H200 --precision bf16 --min 1 --max 9"])
def test_kubernetes_knows_every_field(made: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By Kubernetes' own schemas, in which no field may be more; KEDA's are in no package."""
    folder = tmp_path if made else ROOT / "platform"
    assert not made or main(["deploy", *made.split(), "--write", str(tmp_path)]) == 0
    known = set()
    for document in yaml.safe_load_all((folder / "kubernetes.yml").read_text()):
        if "keda.sh" not in document["apiVersion"]:
            known.add(document["kind"])
            kubernetes_validate.validate(document, NEWEST, strict=True)
    assert known == {"PersistentVolumeClaim", "Job", "Deployment", "NetworkPolicy", "Service"}
    document["kind"], document["apiVersion"] = "Service", "v1"  # which none of these is
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, NEWEST, strict=True)


def test_pods_hear_nothing_of_services() -> None:
    """The Service is called kindling: what Kubernetes would tell its pods of it looks like settings."""
    assert KUBERNETES["Service"]["metadata"]["name"] == "kindling"
    assert [pod["enableServiceLinks"] for pod in (JOB, PODS["kubernetes"])] == [False, False]
