"""What the leader of those who draw a picture together tells its followers, and what they answer; what a server tells
a worker in a process of its own, and hears of it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handler.core.errors import DeviceMissing, KindlingError, SettingsError, StartError
from handler.core.recipe import Recipe, Tokens
from handler.core.settings import Settings
from handler.model.hardware import Hardware
from handler.volume.receipts import Gains, Receipt


@dataclass(frozen=True, slots=True)
class Load:
    """To a follower: load, as `rank`, the model as `settings` say, `without` sources that were found damaged."""

    rank: int
    settings: Settings
    without: Mapping[Path, str]


@dataclass(frozen=True, slots=True)
class Join:
    """To a follower: become `rank` of the group that meets in `store`.

    Compute attention by `kernel`, and decode pictures of more pixels than `tile_above` in tiles; 0: none.
    """

    rank: int
    store: Path
    kernel: str
    tile_above: int


@dataclass(frozen=True, slots=True)
class Bind:
    """To a follower: run what is compiled in the file `package`, or nothing."""

    package: Path | None


@dataclass(frozen=True, slots=True)
class Draw:
    """Draw alike pictures. After each step of each comes a `Step`; to a follower at the end `Over`."""

    recipes: tuple[Recipe, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """Whether this picture goes on after this step."""

    goes_on: bool


@dataclass(frozen=True, slots=True)
class Over:
    """To a follower: the leader's run has ended."""


@dataclass(frozen=True, slots=True)
class InStep:
    """To a follower: say to all ranks, within `seconds`, that you are at this number."""

    number: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Done:
    """From a follower: what it was told is done; of pictures `faults` says why there are none, or nothing."""

    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """From a follower: why it could not do what it was told, by the name of an error's class and its message."""

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Look:
    """To a worker: send the preview of the picture whose step it has told."""


@dataclass(frozen=True, slots=True)
class Ready:
    """From a worker: it is, and what does not change from now on, as `Loaded` has it."""

    hardware: Hardware
    receipt: Receipt | None
    facts: dict[str, str]
    gains: Gains


@dataclass(frozen=True, slots=True)
class Stepped:
    """From a worker: so many steps of this picture of a run are done. It waits for `Step`, or for `Look` before."""

    picture: int
    done: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """From a worker: a picture, as `Pixels` has it but for its recipe, which the server knows."""

    rgb: Any
    revision: str
    batch: int
    tokens: Tokens
    stages: dict[str, float]


class Fault(Exception):
    """From a worker: a bug, which its process has logged. Equal bugs say the same."""


Outcome = Rendered | KindlingError | Fault | None


@dataclass(frozen=True, slots=True)
class Drew:
    """From a worker: a run has ended, with this for each picture; `peak_bytes` as `Loaded` has it."""

    outcomes: tuple[Outcome, ...]
    peak_bytes: int


FAULTS: dict[str, type[StartError]] = {kind.__name__: kind for kind in (SettingsError, DeviceMissing)}


def require_done(answers: Iterable[Done | Failed]) -> None:
    """A StartError, of its own kind where that matters, if one could not do it."""
    for answer in answers:
        if isinstance(answer, Failed):
            raise FAULTS.get(answer.kind, StartError)(answer.message)
