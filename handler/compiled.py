"""Compile artifacts: what one worker compiled, every later worker with the same fingerprint restores.

A package (see `blocks.py`) travels as one file, baked/<id>/<key>/ on the volume. The key is a digest of all that
compiled code depends on; a worker that finds no package with its fingerprint says in which field the nearest differs.
"""

import contextlib
import platform
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from handler.batching import MOST
from handler.blocks import RECIPE, bind_blocks, digest, kind_of
from handler.errors import KindlingError, WeightsCorrupt
from handler.hardware import Hardware
from handler.publishing import publishing
from handler.spec import ModelSpec
from handler.volume import Source, baked_sources, summarize

PACKAGE = "blocks.pt2"
CPUINFO = Path("/proc/cpuinfo")
EAGER = "eager"  # what a fingerprint says of a decoder that is not compiled
INSTRUCTIONS = ("abm", "amx", "asimd", "avx", "bmi", "f16c", "fma", "gfni", "movbe", "popcnt", "sse", "sve")
Outcome = Literal["HIT", "MISS", "STALE", "ERROR"]


@dataclass(frozen=True, slots=True)
class Found:
    """What a worker's look for artifacts concluded, and why; with what binding them raised, if that is why."""

    outcome: Outcome
    reason: str
    source: Source | None = None
    error: Exception | None = None


def fingerprint(spec: ModelSpec, hardware: Hardware, decoder: str = "") -> dict[str, str]:
    """All that compiled code depends on; a package serves only where every field is equal.

    The kernel of attention is empty where it is not chosen yet: any package's will do then. So is `decoder`, what is
    compiled of the VAE (see `decoder_of`), where no model is loaded.
    """
    import torch

    processor, instructions = _processor()
    on_gpu = hardware.device != "cpu"
    return {
        "kind": "code",
        "model": spec.id,
        "revision": spec.revision,
        "device": hardware.name if on_gpu else processor,
        "instructions": instructions,  # with a GPU too: the code that launches its kernels is the CPU's
        "threads": "any" if on_gpu else str(torch.get_num_threads()),
        "precision": hardware.precision,
        "attention": hardware.attention,
        "decoder": decoder or ("" if on_gpu else EAGER),
        "shapes": f"1 to {MOST} pictures of any size, {spec.text_tokens} text tokens",
        "cuda": torch.version.cuda or "none",
        **{name: version_of(name) for name in ("torch", "triton", "diffusers", "flash_attn_3")},
        "recipe": RECIPE,
    }


def version_of(package: str) -> str:
    """The version of an installed package, or none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _processor() -> tuple[str, str]:
    """The CPU's model, and a digest of the instructions it has: code with one it lacks ends the process."""
    try:
        rows = [line.partition(":") for line in CPUINFO.read_text().splitlines()]
    except OSError:  # no Linux
        return platform.machine(), digest([])
    facts = {name.strip(): value.strip() for name, _, value in rows}
    flags = facts.get("flags", facts.get("Features", "")).split()
    return facts.get("model name", "CPU"), digest(sorted({flag for flag in flags if flag.startswith(INSTRUCTIONS)}))


def key(facts: Mapping[str, str]) -> str:
    """The name of the folder for artifacts with this fingerprint."""
    return digest(dict(facts))


def find(wanted: Mapping[str, str], sources: list[Source]) -> Found:
    """HIT if a package has exactly this fingerprint; else STALE, naming how the nearest differs, or MISS."""
    packages = [(source.manifest.facts, source) for source in sources if source.manifest and _is_package(source)]
    if not packages:
        return Found("MISS", f"nothing is compiled for {wanted['model']} yet")
    facts, nearest = min(packages, key=lambda package: len(differing(wanted, package[0])))
    if names := differing(wanted, facts):
        changes = (f"{name} is {wanted.get(name, 'none')}, was {facts.get(name, 'none')}" for name in names)
        return Found("STALE", f"compiled for another worker: {'; '.join(changes)}", nearest)
    return Found("HIT", f"{nearest.folder.name} was compiled for exactly this", nearest)


def _is_package(source: Source) -> bool:
    return source.manifest is not None and PACKAGE in source.manifest.files


def differing(wanted: Mapping[str, str], facts: Mapping[str, str]) -> list[str]:
    """The fields in which `facts` are not as wanted; an empty one is wanted in no particular way."""
    return [name for name in {**wanted, **facts} if wanted.get(name) not in ("", facts.get(name))]


def look(spec: ModelSpec, hardware: Hardware, volume: Path, decoder: str = "") -> Found:
    """What the volume has compiled for `spec` and this machine."""
    return find(fingerprint(spec, hardware, decoder), baked_sources(spec, volume))


def decoder_of(decoder: Any) -> str:
    """What a fingerprint says of the VAE's decoder that shall run compiled; None for one that stays eager.

    KINDLING_VAE may bring one whose weights are alike and whose layers are not: those are what `repr` says.
    """
    return EAGER if decoder is None else f"{kind_of(decoder)}-{digest(repr(decoder))}"


def packaged(spec: ModelSpec, hardware: Hardware, volume: Path, kernels: Iterable[str]) -> str:
    """The first of these kernels of attention with a package that fits otherwise; empty without one. Never raises."""
    with contextlib.suppress(Exception):
        sources = baked_sources(spec, volume)
        for kernel in kernels:
            if find(fingerprint(spec, replace(hardware, attention=kernel)), sources).outcome == "HIT":
                return kernel
    return ""


def restore(transformer: Any, spec: ModelSpec, hardware: Hardware, volume: Path, decoder: Any = None) -> Found:
    """Bind the package that `look` finds, on a HIT. Never raises: after anything else the transformer is as it was.

    `decoder` is the VAE's if it shall run compiled too.
    """
    found = Found("MISS", "")
    try:
        found = look(spec, hardware, volume, decoder_of(decoder))
        if found.outcome == "HIT" and found.source:
            with tempfile.TemporaryDirectory() as folder:  # the volume may be slow, or vanish
                copy = Path(shutil.copyfile(found.source.folder / PACKAGE, Path(folder) / PACKAGE))
                _verify(copy, found.source)
                bind_blocks(transformer, copy, decoder)
    except Exception as error:
        reason = error.message if isinstance(error, KindlingError) else f"{type(error).__name__}: {error}"
        return Found("ERROR", reason, found.source, error)
    return found


def publish(package: Path, spec: ModelSpec, hardware: Hardware, volume: Path, decoder: Any = None) -> Path:
    """Leave a package for later workers, unless a whole one is there. VolumeFailed if it cannot be left."""
    facts = fingerprint(spec, hardware, decoder_of(decoder))
    target = volume / "baked" / spec.id / key(facts)
    with publishing(target, facts) as part:
        shutil.copyfile(package, part / PACKAGE)
    return target


def _verify(copy: Path, source: Source) -> None:
    """WeightsCorrupt unless `copy` is what was published: loading damaged code would end the process."""
    if source.manifest and summarize(copy) != source.manifest.files.get(PACKAGE):
        raise WeightsCorrupt(f"{source.folder / PACKAGE} is not what its manifest says; compiling again replaces it.")
