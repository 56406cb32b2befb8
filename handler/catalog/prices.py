"""What a GPU second costs where this worker runs, and so what a picture costs.

List prices are in the table of GPUs, with the day they were read; KINDLING_GPU_PRICE replaces them.
"""

from dataclasses import dataclass, replace
from typing import Self

from handler.catalog.gpus import HOUR, TARIFFS, gpu_named
from handler.core.errors import SettingsError
from handler.core.settings import Settings

OVERRIDE = "KINDLING_GPU_PRICE"


@dataclass(frozen=True, slots=True)
class Price:
    """Dollars for a second of this worker, or None where nobody said, and why."""

    dollars_per_s: float | None
    reason: str

    def times(self, gpus: int) -> Self:
        """Of a worker that has so many."""
        if self.dollars_per_s is None or gpus == 1:
            return self
        return replace(self, dollars_per_s=gpus * self.dollars_per_s, reason=f"{gpus} GPUs, each: {self.reason}")


def price_of(gpu_name: str, platform: str, override: float | None = None) -> Price:
    """The price of the device that torch calls `gpu_name`; `override` is dollars an hour and wins."""
    if override is not None:
        return Price(override / HOUR, f"{OVERRIDE}={override:g} dollars an hour")
    if gpu_name == "CPU":
        return Price(None, f"a CPU has no list price; set {OVERRIDE} to count it")
    if platform not in TARIFFS:
        return Price(None, f"no list price outside {', '.join(TARIFFS)}; set {OVERRIDE} to dollars an hour")
    gpu, tariff = gpu_named(gpu_name), TARIFFS[platform]
    rental = gpu.rentals.get(platform) if gpu else None
    if gpu and rental and rental.dollars_per_s is not None:
        rate = f"{rental.dollars_per_s * HOUR:.2f}"
        return Price(rental.dollars_per_s, f"{gpu.id} at {rate} dollars an hour ({tariff.source}, {tariff.date})")
    return Price(None, f"{platform} publishes no price of {gpu_name}; set {OVERRIDE} to dollars an hour")


def per_image(seconds: float, price: Price) -> float | None:
    """Dollars for `seconds` of work, None without a price."""
    return None if price.dollars_per_s is None else seconds * price.dollars_per_s


def unheld(settings: Settings, gpu_name: str, platform: str = "") -> str:
    """Why a cap that shall refuse could not be held on this device, here or on `platform`; "" where it can."""
    price = price_of(gpu_name, platform or settings.platform, settings.gpu_price)
    if settings.monthly_cap is None or settings.cap_action != "refuse" or price.dollars_per_s is not None:
        return ""
    return f"KINDLING_CAP_ACTION=refuse could not be held: {price.reason}."


def require_held(settings: Settings, gpu_name: str, platform: str = "") -> None:
    """SettingsError where a cap that shall refuse could not be held on this device, here or on `platform`."""
    if why := unheld(settings, gpu_name, platform):
        raise SettingsError(why, "KINDLING_CAP_ACTION")
