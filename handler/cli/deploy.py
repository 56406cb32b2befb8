"""Print, or write, the commands and files that deploy a model to a platform, with what to expect of it."""

import argparse
import json
import os
from pathlib import Path

from handler.api.deploying.choice import Choice, Prospect
from handler.api.deploying.deployment import SCRIPT, YOURS, Deployment, choice_of, deployment, expected, told
from handler.api.deploying.platforms import PLATFORMS
from handler.catalog.cuda import BUILDS
from handler.catalog.precisions import PRECISIONS
from handler.core.errors import SettingsError
from handler.core.settings import Settings
from handler.volume.room import writing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("platform", choices=PLATFORMS, metavar="PLATFORM", help=", ".join(PLATFORMS))
    parser.add_argument("model", metavar="MODEL", help="model id, alias or mode")
    parser.add_argument("--gpu", default="", help="the platform's name of a GPU, or ours (default: the cheapest)")
    parser.add_argument("--precision", choices=["auto", *PRECISIONS], help="how weights are kept (default: auto)")
    parser.add_argument("--cuda", choices=BUILDS, help="the image's build of torch (default: one that runs there)")
    parser.add_argument("--min", type=int, metavar="N", help="workers that always run, and are paid for")
    parser.add_argument("--max", type=int, metavar="N", help="workers at most")
    parser.add_argument("--region", default="", help="where to run, by the platform's name; several with commas")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write the files there, and the commands as a script")


def run(options: argparse.Namespace) -> int:
    """Print what deploys the choice; the exit code. SettingsError, or DoesNotFit, for what cannot work."""
    choice = choice_of(options.platform, options.model, vars(options))
    prospect = expected(choice, Settings.from_env())
    made = deployment(choice, options.write)
    if options.write:
        write(made, options.write)
    if options.json:
        print(json.dumps(told(choice, prospect, made)))
        return 0
    print("\n".join(lines(choice, prospect, made, options.write)))
    return 0


def write(made: Deployment, folder: Path) -> None:
    """Put the files and a script of the commands into `folder`; never over another file of that name."""
    files = {name: text.encode(errors="surrogateescape") for name, text in {**made.files, SCRIPT: made.script}.items()}
    with writing(folder):
        for name, text in files.items():
            path = folder / name
            if os.path.lexists(path) and not (path.is_file() and path.read_bytes() == text):
                other = f"{path} is there already, and is or says something else: name another folder."
                raise SettingsError(other, "write")
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_bytes(text)


def lines(choice: Choice, prospect: Prospect, made: Deployment, folder: Path | None) -> list[str]:
    """All of it for people."""
    facts = {"gpu": ", ".join(choice.names), "memory": prospect.memory, "cold start": prospect.cold_start}
    facts |= {"price": prospect.price, "licence": prospect.licence}
    facts |= {"note": prospect.note} if prospect.note else {}
    shown = [f"{choice.spec.id} on {choice.platform}", *(f"  {name:<11} {value}" for name, value in facts.items())]
    if folder:
        return [*shown, "", f"Written to {folder}: {', '.join([*made.files, SCRIPT])}. Read {SCRIPT}, then run it."]
    shown += ["", f"COMMANDS, in a checkout of Kindling; {YOURS}; docs/deploy/{choice.platform}.md explains them"]
    shown += made.commands
    for name, text in made.files.items():
        shown += ["", f"FILE {name}, which --write DIR writes", text.rstrip()]
    return shown
