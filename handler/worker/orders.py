"""What the leader of those who draw a picture together tells its followers, and what they answer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from handler.core.errors import DeviceMissing, SettingsError, StartError
from handler.core.recipe import Recipe
from handler.core.settings import Settings


@dataclass(frozen=True, slots=True)
class Load:
    """To a follower: load, as `rank`, the model as `settings` say, `without` sources that were found damaged."""

    rank: int
    settings: Settings
    without: Mapping[Path, str]


@dataclass(frozen=True, slots=True)
class Join:
    """To a follower: become `rank` of the group that meets in `store`, and compute attention by `kernel`."""

    rank: int
    store: Path
    kernel: str


@dataclass(frozen=True, slots=True)
class Bind:
    """To a follower: run what is compiled in the file `package`, or nothing."""

    package: Path | None


@dataclass(frozen=True, slots=True)
class Draw:
    """To a follower: draw alike pictures. After each step of each comes a `Step`, and at the end `Over`."""

    recipes: tuple[Recipe, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """To a follower: whether this picture goes on after this step."""

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


FAULTS: dict[str, type[StartError]] = {kind.__name__: kind for kind in (SettingsError, DeviceMissing)}


def require_done(answers: Iterable[Done | Failed]) -> None:
    """A StartError, of its own kind where that matters, if one could not do it."""
    for answer in answers:
        if isinstance(answer, Failed):
            raise FAULTS.get(answer.kind, StartError)(answer.message)
