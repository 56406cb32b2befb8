"""What a GPU second costs where this worker runs, and so what a picture costs.

List prices of one GPU on the platforms whose workers scale to zero, as each platform publishes them, with the day they
were read; KINDLING_GPU_PRICE replaces them. Processors, memory and storage, which Modal bills beside the GPU, are left
out. A GPU without a published price has none here: a guess would make a spend cap hold too late.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

HOUR = 3600
OVERRIDE = "KINDLING_GPU_PRICE"


@dataclass(frozen=True, slots=True)
class Tariff:
    """One platform's prices: where and when they were read, and dollars a second for each chip."""

    source: str
    date: str
    rates: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Price:
    """Dollars for a second of this worker, or None where nobody said, and why."""

    dollars_per_s: float | None
    reason: str


# A chip is named by words that torch's name of the device must all have: "A100 80GB" is "NVIDIA A100-SXM4-80GB" as well
# as "NVIDIA A100 80GB PCIe".
TARIFFS = {
    "runpod": Tariff(
        "docs.runpod.io/serverless/pricing, flex workers",
        "2026-08",
        {
            "RTX 4090": 0.00031,
            "L4": 0.00019,
            "A5000": 0.00019,
            "RTX 3090": 0.00019,
            "A40": 0.00034,
            "A6000": 0.00034,
            "L40S": 0.00053,
            "L40": 0.00053,
            "RTX 6000 Ada": 0.00053,
            "A100 80GB": 0.00076,
            "H100": 0.00116,
            "H200": 0.00155,
            "B200": 0.00240,
        },
    ),
    "modal": Tariff(
        "modal.com/pricing, as copied by api-evangelist/modal-labs",
        "2026-07-01",
        {
            "T4": 0.000164,
            "L4": 0.000222,
            "A10": 0.000306,
            "A10G": 0.000306,
            "L40S": 0.000542,
            "A100 40GB": 0.000583,
            "A100 80GB": 0.000694,
            "RTX PRO 6000": 0.000842,
            "H100": 0.001097,
            "H200": 0.001261,
            "B200": 0.001736,
        },
    ),
    "fal": Tariff(
        "fal.ai/pricing, list prices, as copied by api-evangelist/fal-ai",
        "2026-09-20",
        {"RTX PRO 6000": 2.99 / HOUR, "H200": 4.50 / HOUR, "B200": 6.25 / HOUR},
    ),
}


def price_of(gpu_name: str, platform: str, override: float | None = None) -> Price:
    """The price of the device that torch calls `gpu_name`; `override` is dollars an hour and wins."""
    if override is not None:
        return Price(override / HOUR, f"{OVERRIDE}={override:g} dollars an hour")
    if gpu_name == "CPU":
        return Price(None, f"a CPU has no list price; set {OVERRIDE} to count it")
    if platform not in TARIFFS:
        return Price(None, f"no list price outside {', '.join(TARIFFS)}; set {OVERRIDE} to dollars an hour")
    tariff, words = TARIFFS[platform], _words(gpu_name)
    for chip, rate in tariff.rates.items():
        if _words(chip) <= words:
            return Price(rate, f"{chip} at {rate * HOUR:.2f} dollars an hour ({tariff.source}, {tariff.date})")
    return Price(None, f"{platform} publishes no price of {gpu_name}; set {OVERRIDE} to dollars an hour")


def per_image(seconds: float, price: Price) -> float | None:
    """Dollars for `seconds` of work, None without a price."""
    return None if price.dollars_per_s is None else seconds * price.dollars_per_s


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", name.lower()))
