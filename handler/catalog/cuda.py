"""The builds of torch: a row for each CUDA, with what installs it, and the drivers and GPUs that it runs on.

CUDA and compute capabilities are those of torch's RELEASE.md for 2.13; drivers, of docs.nvidia.com/deploy/
cuda-compatibility. An image is built for one of them: `CUDA` names it, to Docker and to the scripts in `platform/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from handler.catalog.gpus import Gpu, Rental
from handler.core.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Build:
    """One build, PyPI's where `index` is empty. Compiling wants headers of `toolkit`, in wheels that `extras` name.

    It runs on drivers from `driver` on, and on GPUs from the compute capability `first` to any with `last`'s major.
    """

    name: str
    toolkit: str
    extras: str
    driver: int
    hosts: str  # the CUDA that such a driver says it has, as RunPod counts them
    first: tuple[int, int]
    last: tuple[int, int]
    index: str = ""

    @property
    def cuda(self) -> str:
        """As torch has it: 13.0."""
        return self.toolkit.rpartition(".")[0]

    @property
    def needs(self) -> str:
        """For people: what a host has to have."""
        return f"a driver of {self.driver} or newer"

    def requirements(self, torch: str) -> list[str]:
        """The lines of a requirements file that install this build of version `torch`, and the headers."""
        headers = f'cuda-toolkit[{self.extras}]=={self.toolkit}; platform_system == "Linux"'
        local = f"+{self.name}" if self.index else ""
        return [*([f"--extra-index-url {self.index}"] if self.index else []), headers, f"torch=={torch}{local}"]

    def refusal(self, gpu: Gpu, rental: Rental) -> str:
        """Why this build does not run on such a GPU; empty if it does."""
        if not self.first <= gpu.capability or gpu.capability[0] > self.last[0]:
            return f"torch for CUDA {self.cuda} ({self.name}) has no code for the {gpu.id}."
        if rental.driver < self.driver:
            return (
                f"torch for CUDA {self.cuda} ({self.name}) needs {self.needs}; hosts with the {gpu.id} have "
                f"one of {rental.driver:g}."
            )
        return ""


BUILDS: Mapping[str, Build] = {  # the one that an image has unless told otherwise first
    row.name: row
    for row in (
        Build("cu130", "13.0.3", "cccl,crt", 580, "13.0", (7, 5), (12, 0)),
        Build("cu126", "12.6.3", "cccl,nvcc", 525, "12.0", (5, 0), (9, 0), "https://download.pytorch.org/whl/cu126"),
    )
}


def cuda_build(name: str = "") -> Build:
    """The build that `CUDA` names, the first if it is empty; SettingsError if it names none."""
    if name and name not in BUILDS:
        raise SettingsError(
            f"CUDA={name[:40]} names no build of torch: unset it, or use {' or '.join(BUILDS)}.", "CUDA"
        )
    return BUILDS[name] if name else next(iter(BUILDS.values()))


def header_wheels(cuda: str) -> str:
    """What pip installs for CUDA's headers beside a torch for `cuda`, of which only the major version counts."""
    alike = [row for row in BUILDS.values() if row.cuda.partition(".")[0] == cuda.partition(".")[0]]
    return f"cuda-toolkit[{(alike or [cuda_build()])[0].extras}]=={cuda}.*"
