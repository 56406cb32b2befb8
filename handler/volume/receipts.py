"""Receipts: what `optimize` measured on a device and what won. Workers of that model and device follow the current one.

receipts/<id>/<device>/<number>.json   one run, never overwritten
receipts/<id>/<device>/current.json    the number that is followed, put in place at once
"""

import itertools
import json
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

from handler.catalog.precisions import PRECISIONS
from handler.core.errors import InvalidValue, KindlingError, VolumeFailed
from handler.core.untrusted import Malformed, load, shaped
from handler.volume.manifest import write_atomically
from handler.volume.room import inside, reading, writing

CURRENT = "current.json"
T = TypeVar("T")
log = logging.getLogger(__name__)
GAIN = re.compile("[1-9][0-9]{0,4}x[1-9][0-9]{0,4} [1-9][0-9]?")
Gains = Mapping[str, Mapping[str, float]]  # "256x256" -> "4" at once -> times the pictures a second of one by one


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run a model."""

    precision: str
    compiled: bool

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"there is no precision '{self.precision}'")

    @property
    def name(self) -> str:
        """As `optimize --candidates` takes it."""
        return f"{self.precision}+compile" if self.compiled else self.precision


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured of one candidate: seconds from prompt to PNG, the most memory ever held, likeness.

    `cold_start_s` leaves compiling out, for only a first worker compiles. `batches` has what drawing several at once
    gains. `psnr_db` and `ssim` compare with the baseline's pictures, `dollars` are for one picture of a busy worker;
    None where there is nothing to go by.
    """

    pictures: int
    p50_s: float
    p95_s: float
    images_per_s: float
    peak_gb: float
    cold_start_s: float
    compile_s: float = 0.0
    batches: Gains = field(default_factory=dict)
    psnr_db: float | None = None
    ssim: float | None = None
    dollars: float | None = None

    def __post_init__(self) -> None:
        if (self.psnr_db is None) != (self.ssim is None):
            raise ValueError("likeness is psnr_db and ssim")
        if not all(
            GAIN.fullmatch(f"{size} {count}") for size, counts in self.batches.items() for count in counts or "1"
        ):
            raise ValueError("batches are of a size, and of how many at once")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one candidate; `reason` says why it has no figures."""

    candidate: Candidate
    status: Literal["measured", "skipped", "failed"]
    figures: Figures | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Receipt:
    """One run of `optimize`. Its first outcome is the baseline's."""

    model: str
    revision: str
    device: str
    winner: Candidate
    outcomes: tuple[Outcome, ...]
    reason: str
    priority: str
    limits: Mapping[str, float]
    picture: str
    price: str
    versions: Mapping[str, str]
    command: str
    when: str
    step_cache: str = "off"
    number: int = 0
    format: Literal[1] = 1

    def __post_init__(self) -> None:
        if self.of(self.winner.precision, self.winner.compiled) is None:
            raise ValueError("nothing was measured of the winner")

    def of(self, precision: str, compiled: bool) -> Figures | None:
        """What was measured of this candidate."""
        return next((o.figures for o in self.outcomes if o.candidate == Candidate(precision, compiled)), None)

    @property
    def figures(self) -> Figures:
        """The winner's."""
        found = self.of(self.winner.precision, self.winner.compiled)
        assert found
        return found

    @property
    def told(self) -> str:
        """Why a worker is as it is."""
        return f"receipt {self.number}: {self.winner.name} won by {self.priority} on {self.device}, {self.when[:10]}"


@dataclass(frozen=True, slots=True)
class Current:
    """Which receipt is followed."""

    number: int


def folder(volume: Path, model: str, device: str | None) -> Path:
    """Where receipts of `model` on `device` are; of the only device there is, where its name is not known."""
    home = volume / "receipts" / model
    if device is None and len(found := places(home)) == 1:
        return found[0]
    return home / _slug(device or "unknown")


def places(home: Path) -> list[Path]:
    """A folder for each device; VolumeFailed if nobody can tell which there are."""
    with reading(home):
        return [path for path in inside(home) if path.is_dir()]


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def numbers(place: Path) -> list[int]:
    """Of the receipts in `place`, the oldest first; VolumeFailed if nobody can tell which there are."""
    return sorted(int(found[1]) for path in inside(place) if (found := re.fullmatch(r"([0-9]{1,9})\.json", path.name)))


def read(place: Path, number: int) -> Receipt:
    """One receipt; InvalidValue if there is no such, VolumeFailed if it cannot be read or belongs elsewhere."""
    path = place / f"{number}.json"
    if (found := _read(Receipt, path)) is None:
        if not (there := ", ".join(map(str, numbers(place)))):
            raise InvalidValue(f"There are no receipts in {place} yet: 'optimize' makes one.", "number")
        raise InvalidValue(f"There is no receipt {number} in {place}; there are: {there}.", "number")
    if (found.model, _slug(found.device)) != (place.parent.name, place.name):
        raise VolumeFailed(f"{path} measured {found.model} on {found.device}, so it does not hold here.")
    return replace(found, number=number)


def listed(place: Path) -> list[Receipt]:
    """All that can be read, the oldest first; what cannot is told."""
    found = []
    for number in numbers(place):
        try:
            found.append(read(place, number))
        except KindlingError as error:
            log.warning("a receipt is passed over: %s", error.message)
    return found


def current_number(place: Path) -> int | None:
    """Which receipt workers follow; None if nobody has said."""
    found = _read(Current, place / CURRENT)
    return found.number if found else None


def current(volume: Path, model: str, device: str | None) -> Receipt | None:
    """The receipt that workers follow, None if there is none; a KindlingError if it cannot be read."""
    place = folder(volume, model, device)
    number = current_number(place)
    return None if number is None else read(place, number)


def _read(kind: type[T], path: Path) -> T | None:
    """What a file says; None if it is not there, VolumeFailed if it cannot be read or understood."""
    with reading(path):
        try:
            return shaped(kind, load(path))
        except FileNotFoundError:
            return None
        except Malformed:
            told = f"{path} is not a receipt of this version. Run 'optimize' again, or use another."
            raise VolumeFailed(told) from None


def keep(receipt: Receipt, volume: Path) -> Receipt:
    """Write `receipt` under the next number and make it the current one; VolumeFailed if that cannot be."""
    place = folder(volume, receipt.model, receipt.device)
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(max(numbers(place), default=0) + 1):
            numbered = replace(receipt, number=number)
            with suppress(FileExistsError):
                _new(place / f"{number}.json", json.dumps(asdict(numbered), indent=1).encode() + b"\n")
                break
    use(place, numbered.number)
    return numbered


def _new(path: Path, data: bytes) -> None:
    """Write a file that is not there yet, or FileExistsError; of a full disk not half of one stays."""
    with path.open("xb") as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def use(place: Path, number: int) -> Receipt:
    """Make `number` the receipt that workers follow from their next start on."""
    chosen = read(place, number)
    with writing(place / CURRENT):
        write_atomically(place / CURRENT, json.dumps({"number": number}).encode() + b"\n")
    return chosen


def rollback(place: Path) -> Receipt:
    """Make the last whole one before the current receipt the current one; InvalidValue if there is none before.

    Where nobody can read which that is, it is the last one.
    """
    try:
        now = current_number(place)
    except VolumeFailed:
        now = max(numbers(place), default=0) + 1
    before = [receipt.number for receipt in listed(place) if now is not None and receipt.number < now]
    if not before:
        told = "there is no current receipt" if now is None else f"no whole receipt is before {now}"
        raise InvalidValue(f"Cannot go back in {place}: {told}.", "number")
    return use(place, before[-1])
