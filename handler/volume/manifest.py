"""The volume: models as fetched, what was baked from them, and how past boots went.

    models/<id>/<revision>/       a model's files, manifest.json written last
    vae/<repository>/<revision>/  other autoencoders, likewise (autoencoder.py)
    weights/<repository>/<revision>/  people's repositories that were fetched, and files of them in folders (given.py)
    loras/, fetched/loras/        LoRAs that requests name: anyone's, and those that were fetched (adapters.py)
    embeddings/                   vectors that prompts name (embeddings.py)
    baked/<id>/<fingerprint>/     weights as served and compile artifacts, manifest.json written last
    baked/<id>/<folder>/damaged.json  what a start found wrong with those weights (damaged.py)
    baked/<id>/<key>.failed.json  how compiling failed, for exactly that (failures.py); .lost.json: and lost the GPU
    receipts/<id>/<device>/       what optimize measured, and which of it workers follow (receipts.py)
    sweeps/<id>/<device>/         what an optimize that goes on has measured so far (optimize/journal.py)
    boots/                        ledgers of the last cold starts, the failed ones too (boots.py)
    spend/<YYYY-MM>/              what each worker has cost that month, where a price is known (spend.py)

A folder without its manifest is not there. A manifest has each file's size, its SHA-256 from when it was written,
and a CRC-32 for each chunk, which every later reader checks while reading. Serving never needs write access.
"""

import errno
import hashlib
import json
import logging
import os
import secrets
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from handler.core.errors import WeightsCorrupt
from handler.core.untrusted import Malformed, Name, load, shaped
from handler.volume.room import reading

MANIFEST = "manifest.json"
Kind = Literal["embedded", "fetched", "hub cache", "baked", "autoencoder", "repository", "folder"]
AGAIN: dict[Kind, str] = {  # how files of each kind are brought, with what their source is called
    "embedded": "Is the installation complete? The model comes with it.",
    "fetched": "Fetch it again with: python -m handler fetch {name}",
    "hub cache": "The platform's cache has it so; bring a copy of your own with: python -m handler fetch {name}",
    "baked": "Bake it again with: {setting}python -m handler bake {name}",
    "autoencoder": "Fetch it again with: KINDLING_VAE={name} python -m handler fetch",
    "repository": "Fetch it again with: KINDLING_WEIGHTS={name} python -m handler fetch",
    "folder": "Put a whole copy in its place.",
}
NO_NAMES = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.ENAMETOOLONG)  # beside a file, or in its place
CHUNK = 32 << 20  # bytes a checksum covers: what one thread reads at a time
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a manifest; `crc32` has one value for each `CHUNK` bytes."""

    size: int
    sha256: str
    crc32: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.crc32) != -(-self.size // CHUNK):
            raise ValueError(f"{self.size} bytes have another number of checksums")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a folder holds. `facts` say what it was made for; file names are relative, with slashes."""

    facts: dict[str, str]
    files: dict[Name, Entry]


@dataclass(frozen=True, slots=True)
class Source:
    """A complete folder of model files. Without a manifest (a hub cache) only sizes and headers can be checked.

    `kind` is how its files came: embedded in the package, fetched, in a hub cache of the platform's, baked, fetched as
    another autoencoder or a repository of people's, or, in any other folder, by somebody who knows. `name` is what
    commands call it. `instead` is why better files, that were baked, are passed over.
    """

    folder: Path
    manifest: Manifest | None
    index: Mapping[str, Any] | None = None  # in the place of model_index.json where there is none
    kind: Kind = "folder"
    name: str = ""
    instead: str = ""

    @property
    def told(self) -> str:
        """Which it is, and, where that is not as it should be, why."""
        return f"{self.folder}" + (f", for the baked weights are damaged: {self.instead}" if self.instead else "")

    @property
    def precision(self) -> str:
        """What its weights were baked in; empty for those that were fetched."""
        return self.manifest.facts.get("precision", "") if self.manifest else ""

    @property
    def again(self) -> str:
        """How a file of it that is missing is brought again."""
        setting = f"KINDLING_PRECISION={self.precision} " if self.precision else ""
        others = bool(self.manifest and self.manifest.facts.get("contents"))
        return AGAIN[self.kind].format(name=self.name, setting=setting) + ", with the same KINDLING_WEIGHTS" * others

    @property
    def remedy(self) -> str:
        """How a damaged file of it is brought again: `fetch` leaves alone what has the size that it should have."""
        return f"Remove it. {self.again}" if self.kind in ("fetched", "autoencoder", "repository") else self.again

    def complete(self) -> "Source":
        """Itself if every file that its manifest lists has its size; WeightsCorrupt names the first that has not."""
        for name, entry in self.manifest.files.items() if self.manifest else ():
            with reading(path := self.folder / name):
                try:
                    size = path.stat().st_size
                except FileNotFoundError:
                    told = f"{path} is missing, though its manifest lists it. {self.again}"
                    raise WeightsCorrupt(told, about=str(path)) from None
            if size != entry.size:
                told = f"{path} has {size} bytes, its manifest says {entry.size}. {self.remedy}"
                raise WeightsCorrupt(told, about=str(path))
        return self


def summarize(path: Path) -> Entry:
    """Size and checksums of a file, in one pass over its bytes."""
    from isal import isal_zlib  # 25 GiB/s on one core against 4 of zlib: reading with a check must cost nothing

    whole, chunks, buffer = hashlib.sha256(), [], bytearray(max(1, min(CHUNK, path.stat().st_size)))
    with path.open("rb") as file:
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
            with suppress(OSError):  # there is none yet, or the file system has no modes
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))  # before anybody may read too much
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_picture(path: Path, data: bytes) -> None:
    """The same for people's own files, whose modes stay; what has to stay itself, or cannot be replaced, is written to.

    That is a pipe, a device, a file of another user or of several names, and what takes no new name beside it.
    """
    try:
        if _replaceable(path):
            write_atomically(Path(os.path.realpath(path)), data)
        else:
            path.write_bytes(data)
    except OSError as error:
        if error.errno not in NO_NAMES:
            raise
        path.write_bytes(data)


def _replaceable(path: Path) -> bool:
    try:
        facts = path.stat()
    except FileNotFoundError:
        return True
    return stat.S_ISREG(facts.st_mode) and facts.st_nlink == 1 and facts.st_uid == os.geteuid()


def read_manifest(folder: Path, kind: Kind = "folder", name: str = "") -> Manifest | None:
    """The manifest of `folder`, None if there is none; WeightsCorrupt, with the remedy, if it cannot be understood."""
    with reading(path := folder / MANIFEST):
        try:
            return shaped(Manifest, load(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Malformed:
            told = Source(folder, None, None, kind, name).remedy
            raise WeightsCorrupt(f"{path} is not a manifest. {told}", about=str(path)) from None


def source_in(folder: Path, kind: Kind = "folder", name: str = "") -> Source | None:
    """What is in `folder` if its manifest is there; WeightsCorrupt as `read_manifest`."""
    manifest = read_manifest(folder, kind, name)
    return Source(folder, manifest, None, kind, name) if manifest else None


def checked(folder: Path, kind: Kind = "folder", name: str = "") -> Source | None:
    """What is in `folder` if its manifest is there and every file has its size; WeightsCorrupt if one has not."""
    source = source_in(folder, kind, name)
    return source.complete() if source else None
