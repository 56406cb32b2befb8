"""The builds of torch: what each is for, what installs it, and whom it refuses."""

from dataclasses import replace
from pathlib import Path

import pytest

from handler import GPUS, MODELS, Settings, choose_gpus, cuda_build
from handler.api.deploying.asking import FIELDS
from handler.catalog.cuda import BUILDS, header_wheels
from handler.catalog.elsewhere import rentals_on
from handler.core.errors import SettingsError
from handler.server.openapi.deployments import PARAMETERS

ROOT = Path(__file__).parents[2]
TORCH = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch=="))
LOCKS = ROOT / "platform" / "locks"
CU126 = cuda_build("cu126")
L4 = {gpu.id: rental for gpu, rental in rentals_on("cloudrun")}["L4"]


def test_what_is_built_unless_told_otherwise_is_what_requirements_say() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert cuda_build().requirements(TORCH.removeprefix("torch==")) == [
        line for line in lines if line.startswith(("cuda-toolkit", "torch=="))
    ]
    assert cuda_build() is cuda_build("cu130")


def test_each_build_is_of_its_own_cuda() -> None:
    assert {name: row.cuda for name, row in BUILDS.items()} == {"cu130": "13.0", "cu126": "12.6"}
    assert all(name == f"cu{row.cuda.replace('.', '')}" for name, row in BUILDS.items())


def test_another_build_is_installed_from_torchs_index() -> None:
    """`make lock` writes this: by index and version, for no hash of that index is known here."""
    lines = CU126.requirements(TORCH.removeprefix("torch=="))
    assert (LOCKS / "torch-cu126.lock").read_text().splitlines() == lines
    assert lines[0] == "--extra-index-url https://download.pytorch.org/whl/cu126"
    assert lines[-1] == f"{TORCH}+cu126"


@pytest.mark.parametrize(
    ("gpu", "build", "told"),
    [
        ("T4", "cu130", ""),
        ("H200", "cu126", ""),
        ("RTX 4090", "cu126", ""),
        ("B200", "cu130", ""),
        ("B200", "cu126", "torch for CUDA 12.6 (cu126) has no code for the B200."),
        ("RTX 5090", "cu126", "torch for CUDA 12.6 (cu126) has no code for the RTX 5090."),
    ],
)
def test_which_gpus_a_build_has_code_for(gpu: str, build: str, told: str) -> None:
    rental = next(iter(GPUS[gpu].rentals.values()))
    assert cuda_build(build).refusal(GPUS[gpu], rental) == told


def test_a_gpu_older_than_all_code_is_refused() -> None:
    volta = replace(GPUS["T4"], id="V100", capability=(7, 0))
    rental = next(iter(GPUS["T4"].rentals.values()))
    assert cuda_build("cu130").refusal(volta, rental) == "torch for CUDA 13.0 (cu130) has no code for the V100."
    assert CU126.refusal(volta, rental) == ""


def test_a_host_whose_driver_is_older_is_refused() -> None:
    told = cuda_build().refusal(GPUS["L4"], L4)
    assert told == "torch for CUDA 13.0 (cu130) needs a driver of 580 or newer; hosts with the L4 have one of 535."
    assert CU126.refusal(GPUS["L4"], L4) == ""


@pytest.mark.parametrize("platform", ["modal", "runpod", "fal", "kubernetes", "sky"])
def test_nothing_is_rented_that_the_build_does_not_run_on(platform: str) -> None:
    blackwell = {row.id for row in GPUS.values() if row.capability >= (10, 0)}
    every = {offer.gpu.id for offer in choose_gpus(Settings(), MODELS["spark"], platform)}
    older = {offer.gpu.id for offer in choose_gpus(Settings(), MODELS["spark"], platform, build=CU126)}
    assert every & blackwell
    assert older == every - blackwell


def test_one_that_is_asked_for_is_refused_with_the_reason() -> None:
    with pytest.raises(SettingsError, match=r"^Torch for CUDA 12\.6 \(cu126\) has no code for the B200\.$"):
        choose_gpus(Settings(), MODELS["spark"], "modal", ["B200"], CU126)
    [offer] = choose_gpus(Settings(), MODELS["spark"], "cloudrun", ["nvidia-l4"])  # that some build runs on
    assert offer.gpu.id == "L4"


def test_a_build_can_be_asked_for_over_http() -> None:
    assert PARAMETERS.keys() == {"platform", *FIELDS}
    assert PARAMETERS["cuda"]["schema"]["enum"] == [*BUILDS]


def test_what_is_written_of_drivers_is_the_tables() -> None:
    manifest, dockerfile = ((ROOT / name).read_text() for name in ("platform/kubernetes.yml", "Dockerfile"))
    default, other = (row.needs for row in (cuda_build(), CU126))
    assert default in manifest
    assert other.removeprefix("a driver of ") in manifest
    assert f"needs {default}\n" in dockerfile
    assert f"CUDA={CU126.name} .   # needs {other.replace('a driver', 'one')}, and no Blackwell GPU" in dockerfile


def test_a_build_that_is_none_is_refused() -> None:
    """Some machines have a folder in that variable."""
    with pytest.raises(
        SettingsError, match=r"^CUDA=/usr/local/cuda names no build of torch: unset it, or use cu130 or"
    ):
        cuda_build("/usr/local/cuda")


@pytest.mark.parametrize(
    ("cuda", "wheels"),
    [
        ("13.0", "cuda-toolkit[cccl,crt]==13.0.*"),
        ("13.2", "cuda-toolkit[cccl,crt]==13.2.*"),
        ("12.6", "cuda-toolkit[cccl,nvcc]==12.6.*"),
    ],
)
def test_the_wheels_with_the_headers(cuda: str, wheels: str) -> None:
    assert header_wheels(cuda) == wheels
