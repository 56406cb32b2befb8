"""Renting: which of a platform's GPUs run a model as it is set, by what a worker there would do. For `platform/`."""

from collections.abc import Collection
from dataclasses import dataclass

from handler.catalog.cuda import BUILDS, Build
from handler.catalog.elsewhere import PLATFORMS, rentals_on
from handler.catalog.gpus import BF16, Gpu, Rental
from handler.catalog.prices import require_held
from handler.catalog.spec import ModelSpec
from handler.core.errors import KindlingError, SettingsError
from handler.core.settings import Settings
from handler.worker.memory import TRIED, Placement
from handler.worker.outlook import Outlook, outlook
from handler.worker.sharing import degree, processes, require_splittable

SLOW: dict[Placement, str] = {
    "encoders": "Its text encoders wait in host memory, and come for each prompt.",
    "blocks": "Its weights stream from host memory in every step, and nothing is compiled: expect slow pictures.",
}


@dataclass(frozen=True, slots=True)
class Offer:
    """A GPU to rent, how, and what a worker on it will do."""

    gpu: Gpu
    rental: Rental
    outlook: Outlook

    @property
    def warning(self) -> str:
        """What is slow about it: weights that come from host memory for each picture. Empty where none do."""
        plan, model = self.outlook.memory, self.outlook.spec.id
        return "" if plan.mode == "resident" else f"The {self.gpu.id} does not hold {model} whole. {SLOW[plan.mode]}"


def choose_gpus(
    settings: Settings, spec: ModelSpec, platform: str, asked: Collection[str] = (), build: Build | None = None
) -> tuple[Offer, ...]:
    """What to rent of `platform`, the cheapest first: GPUs that hold the model whole, else those that hold most of it.

    Those `asked` for, by the platform's names, are taken as they are. A StartError says why one of them cannot run the
    model, or why none can; a SettingsError, what the model cannot have, that no cap on spending would hold, or that
    the image's `build` of torch does not run there. Without one, any that does will do.
    """
    if platform not in PLATFORMS:
        raise SettingsError(f"{platform!r} is not known here as a platform. Known: {', '.join(PLATFORMS)}.", "platform")
    if processes(settings) > 1:
        told = f"workers on {platform} are rented with one GPU here. Leave it out, or serve on a machine with several."
        raise SettingsError(f"{degree(settings)}: {told}", degree(settings))
    require_splittable(spec, settings)
    spec.served_caching(settings.step_cache)
    rentals = rentals_on(platform)
    names = [name for _, rental in rentals for name in rental.names]
    for unknown in (name for name in asked if name not in names):
        raise SettingsError(f"{unknown!r} is not known here as a GPU of {platform}. Known: {', '.join(names)}.", "gpu")
    wanted, offers, refused = set(asked or names), list[Offer](), list[KindlingError]()
    for gpu, rental in rentals:
        if wanted & set(rental.names):
            try:
                require_held(settings, gpu.name, platform)
                require_build(gpu, rental, build)
                offers.append(Offer(gpu, rental, _promised(settings, spec, gpu, rental)))
            except KindlingError as error:
                refused.append(error)
    if refused and (asked or not offers):  # of all that are refused, the dearest can do most
        raise refused[-1]
    best = min(TRIED["auto"].index(one.outlook.memory.mode) for one in offers)
    return tuple(one for one in offers if asked or one.outlook.memory.mode == TRIED["auto"][best])


def require_build(gpu: Gpu, rental: Rental, build: Build | None) -> None:
    """A SettingsError says why `build`, or without one why none, runs on a GPU."""
    refused = [row.refusal(gpu, rental) for row in ([build] if build else BUILDS.values())]
    if all(refused):
        raise SettingsError(f"{refused[0][:1].upper()}{refused[0][1:]}", "CUDA")


def _promised(settings: Settings, spec: ModelSpec, gpu: Gpu, rental: Rental) -> Outlook:
    """What a worker on `gpu` will do; the StartError that says why it could not."""
    seen = outlook(settings, spec, gpu, rental.host_gb)
    if seen.hardware.dtype == "bfloat16" and gpu.capability < BF16:
        raise SettingsError(f"{gpu.name} only emulates bfloat16. Use fp16, or another GPU.", "KINDLING_PRECISION")
    _kernel, _plan = seen.attention, seen.require()  # raise what would end its start
    return seen
