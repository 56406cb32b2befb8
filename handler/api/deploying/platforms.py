"""The platforms: a row each, with what can be chosen there, and the commands and files that deploy a choice."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from handler.api.deploying import commands, manifests
from handler.api.deploying.choice import Choice


@dataclass(frozen=True, slots=True)
class Platform:
    """`commands` are those of a choice, whose file, if there is one, is at the path that they are given.

    `lacks` has the options that mean nothing there, and why. Of GPUs that are not asked for the `cheapest` so many are
    rented; `least` workers always run, and `most` at once. `note` is what one has to see to there, of the {gpu} and its
    {driver}.
    """

    commands: Callable[[Choice, str], list[str]]
    lacks: Mapping[str, str] = field(default_factory=dict)
    cheapest: int = 1
    file: str = ""
    made: Callable[[Choice, str], str] | None = None
    least: int = 0
    most: int = 999_999_999
    one_region: bool = False
    budget_s: float = 240
    note: str = ""


ONE = "it is one worker on one machine"
PLATFORMS: Mapping[str, Platform] = {
    "modal": Platform(commands.modal, cheapest=3, most=9999),
    "runpod": Platform(commands.runpod, cheapest=3, one_region=True, most=1000),
    "fal": Platform(
        commands.fal,
        {
            "gpu": "platform/fal_app.py rents the cheapest machines that hold the model",
            "region": "fal chooses where its runners are",
        },
        cheapest=3,
    ),
    "kubernetes": Platform(
        commands.kubernetes,
        {"region": "the cluster is where it is"},
        file="kubernetes.yml",
        made=manifests.kubernetes,
        note="The nodes need {driver}. The file takes any node with a GPU: where some have others than the {gpu}, "
        "add a nodeSelector for your cluster's label: nvidia.com/gpu.product or cloud.google.com/gke-accelerator.",
    ),
    "cloudrun": Platform(
        commands.cloudrun,
        file="cloudrun.yml",
        made=manifests.cloudrun,
        one_region=True,
        budget_s=220,
        note="The project needs quota for the {gpu} in this region.",
    ),
    "convox": Platform(
        commands.convox,
        {"region": "the rack is where it is"},
        file="convox.yml",
        made=manifests.convox,
        least=1,
        note="The rack needs nodes with the {gpu}: g6.xlarge has an L4, g5.xlarge an A10G, g6e.2xlarge an L40S.",
    ),
    "sky": Platform(
        commands.sky,
        {"cuda": "the machines install the packages for CUDA 13"},
        cheapest=4,
        file="sky.yml",
        made=manifests.sky,
        one_region=True,
        note="SkyServe's controller, a small machine, stays on and is paid for.",
    ),
    "docker": Platform(
        commands.docker,
        {"min": ONE, "max": ONE, "region": "the machine is where it is"},
        note="The machine needs {driver} and NVIDIA's container toolkit.",
    ),
}
