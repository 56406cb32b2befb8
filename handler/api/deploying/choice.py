"""A choice of platform, model, GPU, precision and scale: whether it can work, and what it will be like."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from handler.catalog.cuda import BUILDS, Build, cuda_build
from handler.catalog.elsewhere import rentals_on
from handler.catalog.models import find
from handler.catalog.prices import per_image, price_of
from handler.catalog.spec import ModelSpec
from handler.core.errors import DoesNotFit, KindlingError, SettingsError
from handler.core.settings import Settings
from handler.volume.receipts import current
from handler.worker.boots import records
from handler.worker.durations import LOOKED
from handler.worker.footprint import weigh
from handler.worker.renting import SLOW, Offer, choose_gpus

SPEED = 0.3  # GB/s: network volumes on RunPod give 0.2 to 0.4 (docs.runpod.io, 2026-08); an assumption elsewhere
OTHER_S = 12.0  # imports, binding and the first picture, as `doctor` assumes them
BAKED = 1.5  # room for what is baked from it and for other files, in times of a model's size; ours


@dataclass(frozen=True, slots=True)
class Choice:
    """What was asked for: `offers` are the GPUs that it comes to, the one that is rented first before the others.

    `cuda` names a build of torch for the image, if that was asked for.
    """

    platform: str
    spec: ModelSpec
    precision: str
    offers: tuple[Offer, ...]
    asked: bool
    cuda: str = ""
    least: int | None = None
    most: int | None = None
    regions: tuple[str, ...] = ()

    @property
    def first(self) -> Offer:
        return self.offers[0]

    @property
    def build(self) -> Build:
        """The build of torch asked for, else the first that runs on all GPUs."""
        fitting = (row for row in BUILDS.values() if not any(row.refusal(one.gpu, one.rental) for one in self.offers))
        return BUILDS[self.cuda] if self.cuda else next(fitting)

    @property
    def other_build(self) -> str:
        """Its name, where it is not the one that an image has unless told otherwise."""
        return self.build.name if self.build != cuda_build() else ""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the GPUs, as the platform has them."""
        return tuple(name for offer in self.offers for name in offer.rental.names)

    @property
    def stored_gb(self) -> float:
        """What the model's files weigh, as the catalogue counts them."""
        return weigh(self.spec, self.first.outlook.hardware).stored / 1e9

    @property
    def volume_gb(self) -> int:
        """Room that the volume should have, in steps of 50 GB."""
        return max(1, round(self.stored_gb * (1 + BAKED) / 50 + 0.49)) * 50

    @property
    def host_gb(self) -> float:
        """Host memory that the hungriest of the GPUs wants."""
        return max(offer.outlook.memory.host_gb for offer in self.offers)


def chosen(platform: str, model: str, gpu: str, precision: str, cheapest: int = 1, cuda: str = "") -> Choice:
    """The GPU asked for, else the `cheapest` (of RunPod's pools so many) that run the model best, on the build `cuda`.

    A KindlingError says why it cannot, or why none can, and which would do.
    """
    spec = find(model)
    settings = Settings.from_env({"KINDLING_PRECISION": precision})
    names, build = _named(platform, gpu) if gpu else (), cuda_build(cuda) if cuda else None
    try:
        offers = choose_gpus(settings, spec, platform, names, build)
    except KindlingError as error:
        raise type(error)(f"{error.message} {_instead(platform, spec, settings, build)}".strip(), error.param) from None
    if any(offer.outlook.memory.mode == "blocks" for offer in offers) and not gpu:
        raise DoesNotFit(f"No GPU of {platform} holds {spec.id} but for its text encoders. {SLOW['blocks']}")
    ranks = list(dict.fromkeys(map(_rank, offers)))
    kept = tuple(offer for offer in offers if gpu or _rank(offer) in ranks[:cheapest])
    return Choice(platform, spec, precision, kept, bool(gpu), cuda)


def _rank(offer: Offer) -> str:
    return offer.rental.pool or offer.gpu.id


def _named(platform: str, gpu: str) -> tuple[str, ...]:
    """The platform's names of a GPU that is called by one of them, or by the table's; SettingsError if it has none."""
    rentals = [(row, rental.names) for row, rental in rentals_on(platform) if rental.names]
    for row, names in rentals:
        if gpu in names:
            return (gpu,)
        if gpu.lower() in (row.id.lower(), row.name.lower()):
            return names
    known = ", ".join(row.id for row, _ in rentals)
    raise SettingsError(f"{platform} has no {gpu[:40]!r}, as far as is known here. It has: {known}.", "gpu")


def _instead(platform: str, spec: ModelSpec, settings: Settings, build: Build | None) -> str:
    """Which GPUs would do; in another precision, if none does in this one."""
    for precision in dict.fromkeys((settings.precision, "auto", "int8", "fp8")):
        try:
            offers = choose_gpus(settings.model_copy(update={"precision": precision}), spec, platform, (), build)
        except KindlingError:
            continue
        gpus = ", ".join(offer.gpu.id for offer in offers)
        with_it = f" with --precision {precision}" * (precision != settings.precision)
        return f"On {platform} these would do{with_it}: {gpus}."
    return f"No GPU of {platform} would do."


@dataclass(frozen=True, slots=True)
class Prospect:
    """What a choice will be like, each in a sentence that says what it rests on."""

    memory: str
    cold_start: str
    price: str
    licence: str
    note: str


def prospect(choice: Choice, here: Settings, budget_s: float, note: str) -> Prospect:
    """The volume `here` may know what was measured of the same model on the same GPU. `note` is the platform's."""
    offer, licence = choice.first, choice.spec.license
    return Prospect(
        memory=f"{offer.outlook.memory.reason.replace(', of inf GB', '')}, in {offer.outlook.hardware.precision}.",
        cold_start=_cold_start(choice, here.volume, budget_s),
        price=_price(choice, here),
        licence=f"{licence.name}: {licence.obligation}",
        note=f"{offer.warning} {note}".strip(),
    )


def _cold_start(choice: Choice, volume: Path, budget_s: float) -> str:
    hardware = choice.first.outlook.hardware
    alike = (choice.spec.id, hardware.name, hardware.precision, "ready")
    try:
        kept = (record.ledger for record in records(volume))
        starts = [one.total_s for one in kept if (one.model, one.device, one.precision, one.outcome) == alike]
    except KindlingError:
        starts = []
    if starts := list(islice(starts, LOOKED)):
        return f"{max(starts):.0f} s, the longest of {len(starts)} on this GPU that the volume here has on record."
    weights = weigh(choice.spec, hardware)
    told = f"{_reckoned(weights.stored)} (assumptions)"
    told += f"; {_reckoned(weights.held)} once they are baked" if weights.changed else ""
    best = min(weights.stored, weights.held) / 1e9 / SPEED + OTHER_S
    late = f"More than the budget of {budget_s:g} s: it needs a faster volume, or a smaller precision, baked."
    return f"not measured here: {told}. {late if best > budget_s else f'The budget is {budget_s:g} s.'}"


def _reckoned(size: int) -> str:
    """A start that finds compiled code and reads `size` bytes."""
    return f"about {size / 1e9 / SPEED + OTHER_S:.0f} s with {size / 1e9:.1f} GB of weights read at {SPEED:g} GB/s"


def _price(choice: Choice, here: Settings) -> str:
    """Of a picture by a receipt of the volume here, if there is one of this model on this GPU in this precision."""
    hardware = choice.first.outlook.hardware
    price = price_of(hardware.name, choice.platform, here.gpu_price)
    if price.dollars_per_s is None:
        return f"not known: {price.reason}."
    try:
        receipt = current(here.volume, choice.spec.id, hardware.identity)
    except KindlingError:
        receipt = None
    if receipt and receipt.winner.precision == hardware.precision:
        seconds = receipt.figures.p50_s
        dollars = per_image(seconds, price)
        return f"{dollars:.5f} dollars a picture of {seconds:.2f} s, as optimize measured here; {price.reason}."
    return f"{price.dollars_per_s:.5f} dollars a second; how long a picture takes is not measured here; {price.reason}."
