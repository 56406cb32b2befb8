"""The GPUs: a row each, with what they can compute, how much they hold, and how platforms rent them.

Rows stand in order of price, the cheapest first, on every platform; where none is published the order is ours. Prices
are list prices of one GPU on platforms whose workers scale to zero, as each publishes them; processors, memory and
storage, which Modal bills beside the GPU, are left out. A GPU without a published price has none here: a guess would
make a spend cap hold too late.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

HOUR = 3600
# The end of a name of a share, with its GB: by MIG ("H100 80GB HBM3 MIG 1g.10gb") or by NVIDIA's vGPU ("A40-8Q", and
# "A100-1-5C" within a slice; docs.nvidia.com/vgpu). One with all of a card's memory is the card.
SHARE = re.compile(r"(?P<card>.+)( mig \d+g\.(?P<slice>\d+)gb.*|-(\d+-)?(?P<virtual>\d+)[abcq])")
# A word in the names of what is less than the card: laptops' chips ("GeForce RTX 4090 Laptop GPU", of 16 GB), and
# shares that say no more of themselves.
LESS = re.compile(r"mig|laptop|\d+[abcq]")
BF16 = (8, 0)  # the compute capability (Ampere) below which torch emulates bfloat16, by NVIDIA's "CUDA C++" guide


@dataclass(frozen=True, slots=True)
class Tariff:
    """Where and when a platform's prices were read."""

    source: str
    date: str


@dataclass(frozen=True, slots=True)
class Rental:
    """How a platform rents a GPU: its names for it (none where nobody can ask for it), dollars a second, host's GB.

    `pool` is RunPod's name for GPUs of one price. Host memory is infinite where it is asked for, or not published;
    so is the first number of the hosts' `driver`.
    """

    names: tuple[str, ...] = ()
    dollars_per_s: float | None = None
    host_gb: float = math.inf
    pool: str = ""
    driver: float = math.inf


@dataclass(frozen=True, slots=True)
class Gpu:
    """One model of GPU. The driver's name of it has all words of `id`: "NVIDIA A100-SXM4-80GB" is an "A100 80GB".

    Memory is in GB, no more than torch counts on the smallest of that name.
    """

    id: str
    capability: tuple[int, int]
    memory_gb: float
    rentals: Mapping[str, Rental] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As the driver has it, more or less."""
        return f"NVIDIA {self.id}"


TARIFFS = {
    "runpod": Tariff("docs.runpod.io/serverless/pricing, flex workers", "2026-08"),
    "modal": Tariff("modal.com/pricing, as copied by api-evangelist/modal-labs", "2026-07-01"),
    "fal": Tariff("fal.ai/pricing, list prices, as copied by api-evangelist/fal-ai", "2026-09-20"),
}


def _runpod(pool: str, price: float | None, *names: str) -> dict[str, Rental]:
    """Names and pools by docs.runpod.io/references/gpu-types; BLACKWELL_*, by its /flash/configuration/gpu-types."""
    return {"runpod": Rental(tuple(f"NVIDIA {name}" for name in names), price, pool=pool)}


def _modal(price: float, *names: str) -> dict[str, Rental]:
    """Names by modal.com/docs/guide/gpu; how much memory the host shall have is asked for.

    "H100" alone may be an H200 there, for which nothing was compiled or measured; "H100!" is none.
    """
    return {"modal": Rental(names, price)}


def _fal(host_gb: float, name: str, per_hour: float | None = None) -> dict[str, Rental]:
    """Names and memory by docs.fal.ai/documentation/deployment/machine-types, read in 2026-11."""
    return {"fal": Rental((name,), per_hour and per_hour / HOUR, host_gb)}


ADA_4000, ADA_6000 = "RTX 4000 Ada Generation", "RTX 6000 Ada Generation"
H100S = ("H100 PCIe", "H100 80GB HBM3", "H100 NVL")
PRO_6000S = tuple(f"RTX PRO 6000 Blackwell {name} Edition" for name in ("Server", "Workstation", "Max-Q Workstation"))
GPUS: Mapping[str, Gpu] = {
    row.id: row
    for row in (
        Gpu("T4", (7, 5), 15.5, _modal(0.000164, "T4")),
        Gpu("RTX A4000", (8, 6), 15.5, _runpod("AMPERE_16", 0.00016, "RTX A4000")),
        Gpu("RTX A4500", (8, 6), 19.5, _runpod("AMPERE_16", 0.00016, "RTX A4500")),
        Gpu("RTX 4000 Ada", (8, 9), 19.5, _runpod("AMPERE_16", 0.00016, ADA_4000)),
        Gpu("RTX 2000 Ada", (8, 9), 15.5, _runpod("AMPERE_16", None, "RTX 2000 Ada Generation")),
        Gpu("L4", (8, 9), 23.5, _runpod("AMPERE_24", 0.00019, "L4") | _modal(0.000222, "L4")),
        Gpu("RTX A5000", (8, 6), 23.5, _runpod("AMPERE_24", 0.00019, "RTX A5000")),
        Gpu("RTX 3090", (8, 6), 23.5, _runpod("AMPERE_24", 0.00019, "GeForce RTX 3090")),
        Gpu("A10", (8, 6), 23.5, _modal(0.000306, "A10")),
        Gpu("A10G", (8, 6), 23.5, _modal(0.000306)),  # what an A10 may be there
        Gpu("RTX 4090", (8, 9), 23.5, _runpod("ADA_24", 0.00031, "GeForce RTX 4090") | _fal(48, "GPU-RTX4090")),
        Gpu("RTX 5090", (12, 0), 31.5, _fal(60, "GPU-RTX5090")),
        Gpu("A40", (8, 6), 47.5, _runpod("AMPERE_48", 0.00034, "A40")),
        Gpu("RTX A6000", (8, 6), 47.5, _runpod("AMPERE_48", 0.00034, "RTX A6000")),
        Gpu("L40S", (8, 9), 47.5, _runpod("ADA_48_PRO", 0.00053, "L40S") | _modal(0.000542, "L40S")),
        Gpu("L40", (8, 9), 47.5, _runpod("ADA_48_PRO", 0.00053, "L40") | _fal(100, "GPU-L40")),
        Gpu("RTX 6000 Ada", (8, 9), 47.5, _runpod("ADA_48_PRO", 0.00053, ADA_6000)),
        Gpu("A100 40GB", (8, 0), 40, _modal(0.000583, "A100-40GB") | _fal(60, "GPU-A100")),
        Gpu(
            "A100 80GB",
            (8, 0),
            80,
            _runpod("AMPERE_80", 0.00076, "A100 80GB PCIe", "A100-SXM4-80GB") | _modal(0.000694, "A100-80GB"),
        ),
        Gpu(
            "RTX PRO 6000",
            (12, 0),
            96,
            _runpod("BLACKWELL_96", 0.00111, *PRO_6000S)
            | _modal(0.000842, "RTX-PRO-6000")
            | {"fal": Rental((), 2.99 / HOUR)},
        ),
        Gpu(
            "H100",
            (9, 0),
            80,
            _runpod("ADA_80_PRO", 0.00116, *H100S) | _modal(0.001097, "H100!") | _fal(112, "GPU-H100"),
        ),
        Gpu(
            "H200",
            (9, 0),
            141,
            _runpod("HOPPER_141", 0.00155, "H200") | _modal(0.001261, "H200") | _fal(112, "GPU-H200", 4.50),
        ),
        Gpu(
            "B200",
            (10, 0),
            180,
            _runpod("BLACKWELL_180", 0.00240, "B200") | _modal(0.001736, "B200") | _fal(210, "GPU-B200", 6.25),
        ),
    )
}


def gpu_named(name: str) -> Gpu | None:
    """The row of what the driver, or torch, calls `name`; None of a GPU that is not in the table, or a part of one."""
    card, memory_gb = _shared(name.lower())
    if any(map(LESS.fullmatch, words := _words(card))):
        return None
    found = next((row for row in GPUS.values() if _words(row.id) <= words), None)
    return found if found and found.memory_gb <= memory_gb else None


def _shared(name: str) -> tuple[str, float]:
    """The card of which `name` is a share, and the GB of that; a vGPU's name leaves out how many the card has."""
    if not (share := SHARE.fullmatch(name)):
        return name, math.inf
    if virtual := share["virtual"]:
        return f"{share['card']} {virtual}gb", float(virtual)
    return share["card"], float(share["slice"])


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", name.lower()))
