"""The volume: models as fetched, what was baked from them, and how past boots went.

    models/<id>/<revision>/       a model's files, manifest.json written last
    vae/<repository>/<revision>/  other autoencoders, likewise (vae.py)
    baked/<id>/<fingerprint>/     weights as served and compile artifacts, manifest.json written last
    baked/<id>/<key>.failed.json  how compiling failed, for exactly that (failures.py); .lost.json: and lost the GPU
    receipts/<id>/<device>/       what optimize measured, and which of it workers follow (receipts.py)
    sweeps/<id>/<device>/         what an optimize that goes on has measured so far (optimize/journal.py)
    boots/                        ledgers of the last cold starts, the failed ones too (boots.py)
    spend/<YYYY-MM>/              what each worker has cost that month, where a price is known (spend.py)

A folder without its manifest is not there. A manifest has each file's size, its SHA-256 from when it was written,
and a CRC-32 for each chunk, which every later reader checks while reading. Serving never needs write access.
"""

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from handler.errors import StartError, WeightsCorrupt, WeightsMissing
from handler.precisions import PRECISIONS, ROUNDED_BY, SCHEME
from handler.room import inside, reading
from handler.spec import ModelSpec
from handler.untrusted import Malformed, Name, load, shaped

EMBEDDED = Path(__file__).parent / "weights"
MANIFEST = "manifest.json"
INDEX = "model_index.json"  # diffusers' list of a pipeline's components
CHUNK = 32 << 20  # bytes a checksum covers: what one thread reads at a time
log = logging.getLogger(__name__)
HUB_CACHE = Path("huggingface-cache/hub")  # where RunPod puts a cached model on its volume


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a manifest; `crc32` has one value for each `CHUNK` bytes."""

    size: int
    sha256: str
    crc32: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a folder holds. `facts` say what it was made for; file names are relative, with slashes."""

    facts: dict[str, str]
    files: dict[Name, Entry]


@dataclass(frozen=True, slots=True)
class Source:
    """A complete folder of model files. Without a manifest (a hub cache) only sizes and headers can be checked."""

    folder: Path
    manifest: Manifest | None
    index: Mapping[str, Any] | None = None  # in the place of model_index.json where there is none

    @property
    def precision(self) -> str:
        """What its weights were baked in; empty for those that were fetched."""
        return self.manifest.facts.get("precision", "") if self.manifest else ""


def summarize(path: Path) -> Entry:
    """Size and checksums of a file, in one pass over its bytes."""
    from isal import isal_zlib  # 25 GiB/s on one core against 4 of zlib: reading with a check must cost nothing

    whole, chunks, buffer = hashlib.sha256(), [], bytearray(max(1, min(CHUNK, path.stat().st_size)))
    with path.open("rb", buffering=0) as file:
        while count := _fill(file.fileno(), memoryview(buffer)):
            data = memoryview(buffer)[:count]
            whole.update(data)
            chunks.append(isal_zlib.crc32(data))
    return Entry(path.stat().st_size, whole.hexdigest(), tuple(chunks))


def _fill(descriptor: int, buffer: memoryview) -> int:
    """Read until `buffer` is full or the file ends; how many bytes."""
    count = 0
    while got := os.readv(descriptor, [buffer[count:]]) if count < len(buffer) else 0:
        count += got
    return count


def write_manifest(folder: Path, facts: Mapping[str, str], entries: Mapping[str, Entry] | None = None) -> Manifest:
    """Declare `folder` complete: a manifest of its files (`entries`, or all that are there), put in place at once."""
    if entries is None:
        found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        names = [name for name in found if name != MANIFEST and not f"/{name}".count("/.")]  # nothing hidden
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # SHA-256 takes a core a second for 0.5 to 2 GB
            entries = dict(zip(names, threads.map(lambda name: summarize(folder / name), names), strict=True))
    manifest = Manifest(dict(facts), dict(entries))
    write_atomically(folder / MANIFEST, json.dumps(asdict(manifest), indent=1).encode() + b"\n")
    return manifest


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that readers see the old one or the new one, never half of it."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of `folder`, None if there is none; WeightsCorrupt if it cannot be understood."""
    with reading(path := folder / MANIFEST):
        try:
            return shaped(Manifest, load(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Malformed:
            raise WeightsCorrupt(f"{path} is not a manifest. Remove that folder and fetch it again.") from None


def checked(folder: Path, remedy: str) -> Source | None:
    """`folder` if its manifest is there and every file has its size; WeightsCorrupt names the first that has not."""
    if (manifest := read_manifest(folder)) is None:
        return None
    for name, entry in manifest.files.items():
        with reading(path := folder / name):
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                raise WeightsCorrupt(f"{path} is missing, though its manifest lists it. {remedy}") from None
        if size != entry.size:
            raise WeightsCorrupt(f"{path} has {size} bytes, its manifest says {entry.size}. {remedy}")
    return Source(folder, manifest)


def fetched_folder(spec: ModelSpec, volume: Path) -> Path:
    """Where `fetch` puts a model."""
    return volume / "models" / spec.id / spec.revision


def model_source(spec: ModelSpec, volume: Path) -> Source:
    """The complete files of `spec`: shipped, fetched, or in a hub cache on the volume.

    Raises WeightsMissing, with the command that brings them, or WeightsCorrupt, naming the file.
    """
    remedy = f"Fetch it again with: python -m handler fetch {spec.id}"
    if spec.embedded:
        if source := checked(EMBEDDED / spec.id, "Is the installation complete?"):
            return source
        raise WeightsMissing(f"The embedded weights of {spec.id} are not in {EMBEDDED}. Is the installation complete?")
    folder = fetched_folder(spec, volume)
    if source := checked(folder, remedy) or _hub_cached(spec, volume):
        return source
    raise WeightsMissing(_missing(spec, volume, folder))


def _hub_cached(spec: ModelSpec, volume: Path) -> Source | None:
    snapshot = _snapshots(spec, volume) / spec.revision
    with reading(index := snapshot / INDEX):
        return Source(snapshot, None) if index.is_file() else None


def _snapshots(spec: ModelSpec, volume: Path) -> Path:
    return volume / HUB_CACHE / f"models--{spec.repository.replace('/', '--')}" / "snapshots"


def _missing(spec: ModelSpec, volume: Path, folder: Path) -> str:
    with reading(folder):
        begun = folder.is_dir()
    if begun:
        found = f"{folder} is incomplete: it has no {MANIFEST}"
    elif others := [path.name for path in inside(_snapshots(spec, volume))]:
        found = f"the hub cache on the volume has revision {', '.join(others)}, this version needs {spec.revision}"
    else:
        found = f"nothing in {folder}"
    gate = f" Accept its licence at https://huggingface.co/{spec.repository} first and set HF_TOKEN."
    return (
        f"{spec.id} is not on the volume: {found}.{gate if spec.license.gated else ''} "
        f"Fetch it with: python -m handler fetch {spec.id}"
    )


def weight_facts(spec: ModelSpec, precision: str) -> dict[str, str]:
    """What decides the bytes of weights as served."""
    facts = {"kind": "weights", "model": spec.id, "revision": spec.revision, "precision": precision}
    return facts | ({"rounded_by": ROUNDED_BY, "scheme": SCHEME} if PRECISIONS[precision].quantised else {})


def weights_folder(spec: ModelSpec, volume: Path, precision: str) -> Path:
    """Where `bake` puts weights as served; a folder of other facts, of an older version, is never in the way."""
    by = list(weight_facts(spec, precision).values())[4:]
    return volume / "baked" / spec.id / "-".join((precision, spec.revision[:8], *by)).replace(" ", "-")


def served_source(spec: ModelSpec, volume: Path, precision: str) -> Source:
    """The files to load from: weights baked in `precision` if whole ones are there, else what `model_source` finds."""
    wanted = weight_facts(spec, precision)
    for source in baked_sources(spec, volume):
        if source.manifest and source.manifest.facts == wanted:
            try:
                return checked(source.folder, "") or source
            except StartError as error:
                log.warning("baked weights are passed over: %s", error.message)
    return model_source(spec, volume)


def baked_sources(spec: ModelSpec, volume: Path) -> list[Source]:
    """Everything that was baked for `spec`, by its manifests. One that cannot be read is told, and as good as none."""
    found = []
    try:
        for folder in inside(volume / "baked" / spec.id):
            if not folder.name.startswith("."):
                found.append(_baked(folder))
    except StartError as error:
        log.warning("what is baked for %s is passed over: %s", spec.id, error.message)
    return [source for source in found if source]


def _baked(folder: Path) -> Source | None:
    try:
        return Source(folder, manifest) if (manifest := read_manifest(folder)) else None
    except StartError as error:
        log.warning("what is baked is passed over: %s", error.message)
        return None
