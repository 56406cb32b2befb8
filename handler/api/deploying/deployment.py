"""What deploys a choice: commands and files, and what to expect of it."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from handler.api.deploying.choice import Choice, Prospect, chosen, prospect
from handler.api.deploying.platforms import PLATFORMS
from handler.core.errors import SettingsError
from handler.core.settings import Settings

OPTIONS = ("gpu", "precision", "cuda", "min", "max", "region")
YOURS = "capitals and dots stand for what is yours"
SCRIPT = "deploy.sh"
PLACE = re.compile(r"[\w*][\w*./-]{0,63}", re.ASCII)  # none that a command line takes for an option


@dataclass(frozen=True, slots=True)
class Deployment:
    """The commands, in order, and the files, by name, that they want."""

    commands: tuple[str, ...]
    files: Mapping[str, str]

    @property
    def script(self) -> str:
        """The commands as a shell script."""
        return "\n".join(["#!/bin/sh", f"# Read this first: {YOURS}.", "set -eu", *self.commands, ""])


def choice_of(name: str, model: str, options: Mapping[str, Any]) -> Choice:
    """What the `options` ask for of the platform `name`, checked; None and "" are as left out.

    SettingsError, or DoesNotFit, for what cannot work, ModelNotFound for an unknown model.
    """
    platform = PLATFORMS[name]
    given = {option: value for option in OPTIONS if (value := options.get(option)) not in (None, "")}
    for option in (one for one in OPTIONS if one in given and one in platform.lacks):
        raise SettingsError(f"--{option} means nothing for {name}: {platform.lacks[option]}.", option)
    least, most = given.get("min"), given.get("max")
    for option in (one for one in ("min", "max") if (given.get(one) or 0) > platform.most):
        raise SettingsError(f"--{option} should be {platform.most} or less for {name}, not {given[option]}.", option)
    if least is not None and least < platform.least:
        raise SettingsError(f"--min should be {platform.least} or more for {name}, not {least}.", "min")
    if most is not None and most < max(1, least or 0):
        raise SettingsError(f"--max should be {max(1, least or 0)} or more, not {most}.", "max")
    precision, cuda = given.get("precision", "auto"), given.get("cuda", "")
    found = chosen(name, model, given.get("gpu", ""), precision, platform.cheapest, cuda)
    regions = tuple(word.strip() for word in given.get("region", "").split(",") if word.strip())
    if len(regions) > 1 and platform.one_region:
        raise SettingsError(f"--region should name one place for {name}, not {len(regions)}.", "region")
    for region in (one for one in regions if not PLACE.fullmatch(one)):
        raise SettingsError(f"--region should be a place's name, such as us-east-1, not {region[:40]!r}.", "region")
    return replace(found, least=least, most=most, regions=regions)


def expected(choice: Choice, here: Settings) -> Prospect:
    """What `choice` will be like, by what the volume `here` knows of the like."""
    platform = PLATFORMS[choice.platform]
    note = platform.note.format(gpu=choice.first.gpu.id, driver=choice.build.needs)
    return prospect(choice, here, platform.budget_s, note)


def deployment(choice: Choice, folder: Path | None = None) -> Deployment:
    """What deploys `choice`, whose files shall be in `folder`, else in the current one."""
    platform = PLATFORMS[choice.platform]
    path = shlex.quote(str((folder or Path()) / platform.file))
    files = {platform.file: platform.made(choice, _again(choice))} if platform.made else {}
    return Deployment(tuple(platform.commands(choice, path)), files)


def told(choice: Choice, prospect: Prospect, made: Deployment) -> dict[str, Any]:
    """All of it as a JSON object."""
    head = {"platform": choice.platform, "model": choice.spec.id, "gpus": list(choice.names)}
    rest = {"commands": list(made.commands), "files": dict(made.files), "script": made.script}
    return asdict(prospect) | head | rest


def _again(choice: Choice) -> str:
    """The command that makes this once more."""
    options: dict[str, object] = {
        "gpu": choice.first.rental.names[0] if choice.asked else "",
        "precision": choice.precision if choice.precision != "auto" else "",
        "cuda": choice.cuda,
        "min": choice.least,
        "max": choice.most,
        "region": ",".join(choice.regions),
    }
    words = [w for name, value in options.items() if value not in (None, "") for w in (f"--{name}", str(value))]
    return shlex.join(["python", "-m", "handler", "deploy", choice.platform, choice.spec.id, *words])
