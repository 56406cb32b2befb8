"""Compile artifacts: what one worker compiled, every later worker with the same fingerprint restores.

A package (see `package.py`) travels as one file, baked/<id>/<key>/ on the volume. The key is a digest of all that
compiled code depends on; a worker that finds no package with its fingerprint says in which field the nearest differs.
"""

import ast
import contextlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from handler.catalog.spec import ModelSpec
from handler.core.errors import DeviceLost, KindlingError, WeightsCorrupt
from handler.core.processor import processor
from handler.core.recipe import MOST
from handler.core.scratch import Scratch
from handler.model import upstream
from handler.model.compiling.package import bind_blocks, digest, kind_of, kinds_in, kinds_of, unbind_blocks
from handler.model.faults import meaning
from handler.model.hardware import Hardware
from handler.volume.manifest import Source, summarize
from handler.volume.publishing import publishing
from handler.volume.room import reading
from handler.volume.sealing import sealed
from handler.volume.sources import baked_sources

PACKAGE = "blocks.pt2"
EAGER = "eager"  # what a fingerprint says of a decoder that is not compiled
CODE = (  # what decides what is in a package, and what is expected of one
    *("model/attention", "model/compiling/package", "model/loading/blockwise", "model/fp8_attention"),
    *("model/compiling/fusing", "model/compiling/joining", "catalog/attention", "model/compiling/modulation"),
    *("catalog/precisions", "model/loading/quant", "model/families/autoencoders"),
)
# Code that has only moved, tells people more or cleans up, since packages were made with the digest on the right.
SAME = {"73ed81ce37df3b5b": "91aa3cfd63a9eb9a"}
ELSEWHERE = ("_dir", "_path", "_logpath", "cxx")  # how settings end that say where something is
CacheStatus = Literal["HIT", "MISS", "STALE", "ERROR"]


@dataclass(frozen=True, slots=True)
class Found:
    """What a worker's look for artifacts concluded, and why; with what binding them raised, if that is why."""

    outcome: CacheStatus
    reason: str
    source: Source | None = None
    error: Exception | None = None


def fingerprint(spec: ModelSpec, hardware: Hardware, decoder: str = "") -> dict[str, str]:
    """All that compiled code depends on; a package serves only where every field is equal.

    The kernel of attention is empty where it is not chosen yet: any package's will do then. So is `decoder`, what is
    compiled of the VAE (see `decoder_of`), where no model is loaded.
    """
    import torch

    cpu = processor()
    on_gpu = hardware.device != "cpu"
    return {
        "kind": "code",
        "model": spec.id,
        "revision": spec.revision,
        "device": hardware.name if on_gpu else cpu.name,
        "instructions": cpu.instructions,  # with a GPU too: the code that launches its kernels is the CPU's
        "threads": "any" if on_gpu else str(torch.get_num_threads()),
        "precision": hardware.precision,
        "attention": hardware.attention,
        "decoder": decoder or ("" if on_gpu else EAGER),
        "shapes": f"1 to {MOST} pictures of any size, {spec.text_tokens} text tokens",
        "cuda": torch.version.cuda or "none",
        **{name: version_of(name) for name in ("torch", "triton", "diffusers", "flash_attn_3")},
        "code": _code(),
        "inductor": _inductor(),
        "matmul": torch.get_float32_matmul_precision(),
        **({"shared": hardware.shared} if hardware.shared else {}),
    }


def version_of(package: str) -> str:
    """The version of an installed package, or none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


@cache
def _code() -> str:
    """A digest of the code that makes what is compiled, wherever it lies."""
    made = digest([code_of(Path(__file__).parents[2] / f"{name}.py") for name in CODE])
    return SAME.get(made, made)


def code_of(path: Path) -> list[str]:
    """What a module does: its lines that are not empty, and of what it imports the names, not where they are."""
    text = path.read_text()
    said, names = dict(enumerate(text.splitlines(), start=1)), list[str]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names += [ast.unparse(alias) for alias in node.names]
            for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                said.pop(number, None)
    return [*sorted(names), *(line for line in said.values() if line.strip())]


def _inductor() -> str:
    """A digest of Inductor's settings, as torch has them for its own caches of compiled code."""
    settings = {name: repr(value) for name, value in upstream.inductor().save_config_portable().items()}
    return digest({name: value for name, value in settings.items() if not name.endswith(ELSEWHERE)})


def key(facts: Mapping[str, str]) -> str:
    """The name of the folder for artifacts with this fingerprint."""
    return digest(dict(facts))


def name_of(transformer: Any, spec: ModelSpec, hardware: Hardware, decoder: Any = None) -> str:
    """The name of the package that fits a loaded model."""
    blocks = digest(kinds_of(transformer, decoder))
    return key({**fingerprint(spec, hardware, decoder_of(decoder)), "blocks": blocks})


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


def look(
    spec: ModelSpec, hardware: Hardware, volume: Path, decoder: str = "", blocks: str = "", *, volume_key: str = ""
) -> Found:
    """What the volume has compiled for `spec` and this machine, where a model is loaded for these `blocks` of it.

    With a `volume_key` what has no seal of it is as good as none.
    """
    packages = [source for source in baked_sources(spec, volume) if _is_package(source)]
    ours = [source for source in packages if not volume_key or sealed(source, volume_key)]
    found = find({**fingerprint(spec, hardware, decoder), "blocks": blocks}, ours)
    if found.outcome == "HIT" or len(ours) == len(packages):
        return found
    others = len(packages) - len(ours)
    return replace(found, reason=f"{found.reason}; {others} published without this KINDLING_VOLUME_KEY: never run")


def decoder_of(decoder: Any) -> str:
    """What a fingerprint says of the VAE's decoder that shall run compiled; None for one that stays eager."""
    return EAGER if decoder is None else kind_of(decoder)


def packaged(spec: ModelSpec, hardware: Hardware, volume: Path, kernels: Iterable[str], *, volume_key: str = "") -> str:
    """The first of these kernels of attention with a package that fits otherwise; empty without one. Never raises."""
    with contextlib.suppress(Exception):
        for kernel in kernels:
            if look(spec, replace(hardware, attention=kernel), volume, volume_key=volume_key).outcome == "HIT":
                return kernel
    return ""


def restore(
    transformer: Any,
    spec: ModelSpec,
    hardware: Hardware,
    volume: Path,
    decoder: Any = None,
    *,
    volume_key: str = "",
    share: Callable[[Path], object] = lambda _: None,
) -> Found:
    """Bind the package that `look` finds, on a HIT. After anything else the transformer is as it was.

    `decoder` is the VAE's if it shall run compiled too. `share` is told of a file that was found whole and bound, for
    others on this machine, and may raise. Raises nothing but DeviceLost.
    """
    found = Found("MISS", "")
    try:
        blocks = digest(kinds_of(transformer, decoder))
        found = look(spec, hardware, volume, decoder_of(decoder), blocks, volume_key=volume_key)
        if found.outcome == "HIT" and found.source:
            with Scratch() as folder:  # the volume may be slow, or vanish
                _verify(published := found.source.folder / PACKAGE, found.source, read=False)
                copy = Path(shutil.copyfile(published, folder.path / PACKAGE))
                _verify(copy, found.source)
                bind_blocks(transformer, copy, decoder)
                _shared(share, copy, transformer, decoder)
    except Exception as error:
        if isinstance(meant := meaning(error, spec.size), DeviceLost):
            raise meant from error
        reason = error.message if isinstance(error, KindlingError) else f"{type(error).__name__}: {error}"
        return Found("ERROR", reason, found.source, error)
    return found


def _shared(share: Callable[[Path], object], package: Path, transformer: Any, decoder: Any) -> None:
    try:
        share(package)
    except BaseException:
        unbind_blocks(transformer, decoder)
        raise


def publish(
    package: Path, spec: ModelSpec, hardware: Hardware, volume: Path, decoder: Any = None, *, volume_key: str = ""
) -> Path:
    """Leave a package for later workers, sealed, unless such a one is there whole. VolumeFailed if that cannot be."""
    facts = {**fingerprint(spec, hardware, decoder_of(decoder)), "blocks": digest(kinds_in(package))}
    target = volume / "baked" / spec.id / key(facts)
    with publishing(target, facts, volume_key) as part:
        shutil.copyfile(package, part / PACKAGE)
    return target


def examined(found: Found) -> Found:
    """The same; but ERROR, as a start would find, where what was published is not what is there now."""
    try:
        if found.outcome == "HIT" and found.source:
            with reading(path := found.source.folder / PACKAGE):
                _verify(path, found.source)
    except KindlingError as error:
        return Found("ERROR", error.message, found.source, error)
    return found


def _verify(copy: Path, source: Source, read: bool = True) -> None:
    """WeightsCorrupt unless `copy` is what was published: loading damaged code would end the process.

    Unless it is `read` only its size is looked at.
    """
    size, entry = -1, source.manifest.files.get(PACKAGE) if source.manifest else None
    with contextlib.suppress(FileNotFoundError):
        size = copy.stat().st_size
    if entry and (size != entry.size or (read and summarize(copy) != entry)):  # a pipe may have no end
        raise WeightsCorrupt(f"{source.folder / PACKAGE} is not what its manifest says. {source.remedy}")
