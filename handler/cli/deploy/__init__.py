"""Print, or write, the commands and files that deploy a model to a platform, with what to expect of it."""

import argparse
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from handler.catalog.cuda import BUILDS
from handler.catalog.precisions import PRECISIONS
from handler.cli.deploy.choice import Choice, Prospect, chosen, prospect
from handler.cli.deploy.platforms import PLATFORMS, Platform
from handler.core.errors import SettingsError
from handler.core.settings import Settings
from handler.volume.room import writing

OPTIONS = ("gpu", "precision", "cuda", "min", "max", "region")
SCRIPT = "deploy.sh"
YOURS = "capitals and dots stand for what is yours"


@dataclass(frozen=True, slots=True)
class Deployment:
    """The commands, in order, and the files, by name, that they want."""

    commands: tuple[str, ...]
    files: Mapping[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("platform", choices=PLATFORMS, metavar="PLATFORM", help=", ".join(PLATFORMS))
    parser.add_argument("model", metavar="MODEL", help="model id, alias or mode")
    parser.add_argument("--gpu", default="", help="the platform's name of a GPU, or ours (default: the cheapest)")
    parser.add_argument("--precision", choices=["auto", *PRECISIONS], help="how weights are kept (default: auto)")
    parser.add_argument(
        "--cuda", choices=BUILDS, help="the image's build of torch (default: the first that runs there)"
    )
    parser.add_argument("--min", type=int, metavar="N", help="workers that always run, and are paid for")
    parser.add_argument("--max", type=int, metavar="N", help="workers at most")
    parser.add_argument("--region", default="", help="where to run, by the platform's name; several with commas")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write the files there, and the commands as a script")


def run(options: argparse.Namespace) -> int:
    """Print what deploys the choice; the exit code. SettingsError, or DoesNotFit, for what cannot work."""
    platform = PLATFORMS[options.platform]
    choice = choice_of(options, platform)
    note = platform.note.format(gpu=choice.first.gpu.id, driver=choice.build.needs)
    told = prospect(choice, Settings.from_env(), platform.budget_s, note)
    made = deployment(choice, platform, options.write)
    if options.write:
        write(made, options.write)
    if options.json:
        body = asdict(told) | {"platform": choice.platform, "model": choice.spec.id, "gpus": choice.names}
        print(json.dumps(body | {"commands": made.commands, "files": dict(made.files)}))
        return 0
    print("\n".join(lines(choice, told, made, options.write)))
    return 0


def choice_of(options: argparse.Namespace, platform: Platform) -> Choice:
    """What the options ask for, checked."""
    given = {name: value for name in OPTIONS if (value := vars(options)[name]) not in (None, "")}
    for name in given.keys() & platform.lacks.keys():
        raise SettingsError(f"--{name} means nothing for {options.platform}: {platform.lacks[name]}.", name)
    least, most = given.get("min"), given.get("max")
    if least is not None and least < platform.least:
        raise SettingsError(f"--min should be {platform.least} or more for {options.platform}, not {least}.", "min")
    if most is not None and most < max(1, least or 0):
        raise SettingsError(f"--max should be {max(1, least or 0)} or more, not {most}.", "max")
    found = chosen(
        options.platform, options.model, options.gpu, options.precision or "auto", platform.cheapest, options.cuda or ""
    )
    regions = tuple(word.strip() for word in options.region.split(",") if word.strip())
    if len(regions) > 1 and platform.one_region:
        raise SettingsError(f"--region should name one place for {options.platform}, not {len(regions)}.", "region")
    return replace(found, least=least, most=most, regions=regions)


def deployment(choice: Choice, platform: Platform, folder: Path | None = None) -> Deployment:
    """What deploys `choice`, whose files shall be in `folder`, else in the current one."""
    path = shlex.quote(str((folder or Path()) / platform.file))
    files = {platform.file: platform.made(choice, _again(choice))} if platform.made else {}
    return Deployment(tuple(platform.commands(choice, path)), files)


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


def write(made: Deployment, folder: Path) -> None:
    """Put the files and a script of the commands into `folder`; never over another file of that name."""
    head = ["#!/bin/sh", f"# Read this first: {YOURS}.", "set -eu"]
    files = {**made.files, SCRIPT: "\n".join([*head, *made.commands, ""])}
    for name, text in files.items():
        if (folder / name).exists() and (folder / name).read_text() != text:
            told = f"{folder / name} is there already, and says something else: name another folder."
            raise SettingsError(told, "write")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)


def lines(choice: Choice, told: Prospect, made: Deployment, folder: Path | None) -> list[str]:
    """All of it for people."""
    facts = {"gpu": ", ".join(choice.names), "memory": told.memory, "cold start": told.cold_start, "price": told.price}
    facts |= {"licence": told.licence} | ({"note": told.note} if told.note else {})
    shown = [f"{choice.spec.id} on {choice.platform}", *(f"  {name:<11} {value}" for name, value in facts.items())]
    if folder:
        return [*shown, "", f"Written to {folder}: {', '.join([*made.files, SCRIPT])}. Read {SCRIPT}, then run it."]
    shown += ["", f"COMMANDS, in a checkout of Kindling; {YOURS}", *made.commands]
    for name, text in made.files.items():
        shown += ["", f"FILE {name}, which --write DIR writes", text.rstrip()]
    return shown
