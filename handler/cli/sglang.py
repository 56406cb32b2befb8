"""SGLang's names for what `serve` does, so that its command lines start a worker: each as one of ours, or as a note."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from handler.catalog.models import find
from handler.core.errors import ModelNotFound, SettingsError
from handler.core.settings import Settings

ULYSSES, RING, WORKERS = "KINDLING_ULYSSES_DEGREE", "KINDLING_RING_DEGREE", "KINDLING_WORKERS"
GPUS = "--num-gpus"
PREFIX = "SGLANG_CACHE_DIT_"
CACHED = {
    "FN": "Fn",
    "BN": "Bn",
    "WARMUP": "W",
    "RDT": "R",
    "MC": "MC",
}  # SGLang's variables, and a step cache's values
SWITCH, TAYLOR, ORDER = "ENABLED", "TAYLORSEER", "TS_ORDER"
STEP_CACHE = "KINDLING_STEP_CACHE"


@dataclass(frozen=True, slots=True)
class Alias:
    """An option of SGLang's. `setting` is ours that it sets, to `value` if it is a switch; else `note` says why not."""

    option: str
    setting: str = ""
    value: str = ""
    note: str = ""
    gpus: bool = False  # it says how many GPUs draw one picture, by whatever way


ALIASES = (
    Alias("--model-path", "KINDLING_MODEL"),
    Alias("--vae-path", "KINDLING_VAE"),
    Alias("--dit-cpu-offload", "KINDLING_OFFLOAD", "blocks"),
    Alias("--text-encoder-cpu-offload", "KINDLING_OFFLOAD", "encoders"),
    Alias("--vae-cpu-offload", note="a VAE is not moved by itself; large pictures are decoded in tiles"),
    Alias("--pin-cpu-memory", note="how weights lie in host memory is no choice here"),
    Alias("--ulysses-degree", ULYSSES),
    Alias("--ring-degree", RING),
    Alias("--sp-degree", ULYSSES, gpus=True),
    Alias(GPUS, ULYSSES, gpus=True),
    Alias("--tp-size", "KINDLING_TP_SIZE"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The aliases, and a table of them below the help."""
    for alias in ALIASES:
        parser.add_argument(alias.option, nargs="?", const="true", help=argparse.SUPPRESS)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = table()


def table() -> str:
    """What each of SGLang's names is here."""
    rows = [(alias.option, _meaning(alias)) for alias in ALIASES]
    rows += [
        (f"{PREFIX}{SWITCH}=true", f"{STEP_CACHE}=on"),
        (f"{PREFIX}{ORDER}", f"order of {STEP_CACHE}, with {TAYLOR}"),
    ]
    rows += [(f"{PREFIX}{theirs}", f"{ours} of {STEP_CACHE}") for theirs, ours in CACHED.items()]
    return "\n".join(["SGLang's names are taken too:", *(f"  {theirs:<30} {ours}" for theirs, ours in rows)])


def _meaning(alias: Alias) -> str:
    if alias.gpus:
        return f"{alias.setting} times {RING}{f' times {WORKERS}' * (alias.option == GPUS)}"
    return f"{alias.setting}={alias.value or '...'}" if alias.setting else f"no effect: {alias.note}"


def translated(options: argparse.Namespace, environ: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """`environ` with what SGLang's options and variables say in it, and notes on those that change nothing.

    An option wins over a variable of ours, and that over one of SGLang's; of two options that set one thing the first.
    """
    found, notes = dict(environ), list[str]()
    found |= {WORKERS: workers} if (workers := getattr(options, "workers", None)) else {}
    given = {
        alias: value for alias in ALIASES if (value := vars(options)[alias.option[2:].replace("-", "_")]) is not None
    }
    for alias, value in reversed(given.items()):
        if alias.gpus and not (value.isdecimal() and int(value)):
            raise SettingsError(f"{alias.option} should be a whole number, 1 or more, not {value!r}.", alias.option)
        ring, workers = vars(options)["ring_degree"] or found.get(RING), found.get(WORKERS, "1")
        parts = {RING: ring or "1"} | ({WORKERS: workers} if alias.option == GPUS and workers != "auto" else {})
        switched = _shared(value, parts) if alias.gpus else alias.value or value
        if alias.value and value.lower() in ("false", "0"):
            continue
        if alias.setting:
            found[alias.setting] = switched
        elif value.lower() not in ("false", "0"):
            notes.append(f"{alias.option} has no effect: {alias.note}.")
    if idle := _idle(vars(options)["num_gpus"] or "", found):
        notes.append(idle)
    if not found.get(STEP_CACHE):
        _cache(found, notes)
    return found, notes


def _idle(gpus: str, found: Mapping[str, str]) -> str:
    """What to say of GPUs that other options leave without work; what is no number is for the setting to refuse."""
    try:
        wanted, drawing = int(gpus), prod(int(found.get(name) or 1) for name in (ULYSSES, RING, WORKERS))
    except ValueError:
        return ""
    return f"{GPUS} {wanted}: only {drawing} draw, {ULYSSES} times {RING} times {WORKERS}." if drawing < wanted else ""


def _shared(gpus: str, parts: Mapping[str, str]) -> str:
    """How many of so many GPUs are left for Ulysses attention; what is no number is for the setting to refuse."""
    for name, part in parts.items():
        try:
            whole, rest = divmod(int(gpus), int(part or 1))
        except (ValueError, ZeroDivisionError):
            return gpus
        if rest:
            raise SettingsError(f"{gpus} GPUs cannot be shared by {part}; {name} has to divide them.", name)
        gpus = str(whole)
    return gpus


def _cache(found: dict[str, str], notes: list[str]) -> None:
    """Set the step cache as SGLang's variables have it, where the model can have one."""
    said = {name.removeprefix(PREFIX): value for name, value in found.items() if name.startswith(PREFIX) and value}
    if not Settings.flag(found, PREFIX + SWITCH):
        return
    values = [f"{ours}={said[theirs]}" for theirs, ours in CACHED.items() if theirs in said]
    if Settings.flag(found, PREFIX + TAYLOR):
        values.append(f"order={said.get(ORDER, '1')}")
    try:
        cache = Settings(step_cache=",".join(values) or "on").step_cache
        find(found.get("KINDLING_MODEL") or "spark").served_caching(cache)
        found[STEP_CACHE] = str(cache)
    except SettingsError as error:
        notes.append(f"{PREFIX}{SWITCH} has no effect: {error.message}")
    except ModelNotFound:  # which the start tells
        pass
