"""Fetch a model from the Hugging Face hub to the volume: what its pipeline needs, each file checked.

Whole files stay when a fetch is interrupted. The manifest comes last, so a worker never starts on half a model.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handler.catalog import ModelSpec, find
from handler.errors import FetchFailed, VolumeFailed, WeightsCorrupt
from handler.settings import Settings
from handler.volume import INDEX, Entry, Source, checked, fetched_folder, model_source, summarize, write_manifest

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

ROOT = re.compile(rf"{re.escape(INDEX)}|licen[cs]e[^/]*", re.IGNORECASE)
WEIGHTS = re.compile(r"(model|diffusion_pytorch_model)(-\d{5}-of-\d{5})?\.safetensors")  # no variant such as .fp16
TEXT = re.compile(r"(?!.*\.index\.)[^/]+\.(json|txt|model)|(model|diffusion_pytorch_model)\.safetensors\.index\.json")
ANY_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".gguf")
# The client makes each request up to 6 times, waits as Retry-After says, and goes on where a connection was cut, but
# gives up on 5xx and on resets while a file comes: then the file is tried again, 1, 2, 4, 8 s apart or as told.
TRIES, LONGEST_WAIT_S = 5, 300
COPIES = 2  # of a file whose bytes are wrong, before giving up
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Fetched:
    """A model that is on the volume now. `downloaded`: by this call."""

    model: str
    folder: Path
    files: tuple[str, ...]
    bytes: int
    seconds: float
    downloaded: bool


def run(options: argparse.Namespace) -> int:
    """Fetch and report; the exit code."""
    settings = Settings.from_env(model=options.model)
    spec = find(settings.model)
    if not spec.license.commercial:
        print(f"kindling: {spec.id} is under the {spec.license.name}. {spec.license.obligation}", file=sys.stderr)
    fetched = fetch(spec, settings.volume, quiet=options.json)
    if options.json:
        print(json.dumps(asdict(fetched), default=str))
    elif spec.embedded:
        print(f"{spec.id} ships with Kindling: there is nothing to fetch.")
    else:
        how = f"{fetched.seconds:.0f} s" if fetched.downloaded else "already complete"
        print(f"{spec.id}: {len(fetched.files)} files, {fetched.bytes / 1e9:.1f} GB in {fetched.folder}, {how}")
    return 0


def fetch(spec: ModelSpec, volume: Path, *, quiet: bool = False, wait: Callable[[float], None] = time.sleep) -> Fetched:
    """Make `spec` complete on `volume`, or raise FetchFailed or VolumeFailed. `quiet`: no bars even on a terminal."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    start, folder = time.monotonic(), fetched_folder(spec, volume)
    source, downloaded = _complete(spec, volume), False
    if source is None:
        with explained(spec, folder), _alone(folder), disable_progress_bars() if quiet else contextlib.nullcontext():
            source = _complete(spec, volume)  # another process may have been faster
            if downloaded := source is None:
                source = _download(spec, folder, wait)
    files = source.manifest.files if source.manifest else {}
    size = sum(entry.size for entry in files.values())
    return Fetched(spec.id, source.folder, tuple(files), size, round(time.monotonic() - start, 3), downloaded)


def _complete(spec: ModelSpec, volume: Path) -> Source | None:
    if spec.embedded:
        return model_source(spec, volume)
    with contextlib.suppress(WeightsCorrupt):  # then each file is compared with the hub's
        return checked(fetched_folder(spec, volume), remedy="")
    return None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time fill `folder`; the lock goes when its process does."""
    folder.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("Another process is fetching to %s; waiting for it.", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            log.warning("%s cannot be locked; let no other process fetch to it.", folder)
        yield


def _download(spec: ModelSpec, folder: Path, wait: Callable[[float], None]) -> Source:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    hub = HfApi()
    tree = hub.list_repo_tree(spec.repository, revision=spec.revision, recursive=True)
    files = {file.path: file for file in tree if isinstance(file, RepoFile)}
    if INDEX not in files:
        raise FetchFailed(f"{spec.repository} has no {INDEX} at {spec.revision}: it is not a diffusers pipeline.")

    def obtain(name: str) -> Entry:
        download = partial(hub.hf_hub_download, spec.repository, name, revision=spec.revision, local_dir=folder)
        return _obtain(files[name], folder / name, lambda: _persist(download, wait))

    shutil.rmtree(folder / ".cache", ignore_errors=True)  # of a fetch that was killed: the client never takes it up
    obtain(INDEX)
    chosen = choose(files, json.loads((folder / INDEX).read_bytes()))
    _check_space(spec, folder, [files[name] for name in chosen])
    entries = {name: obtain(name) for name in chosen}
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    facts = {"model": spec.id, "repository": spec.repository, "revision": spec.revision}
    return Source(folder, write_manifest(folder, facts, entries))


def choose(paths: Collection[str], index: Mapping[str, Any]) -> list[str]:
    """Which of a repository's files a pipeline with this model_index.json needs, and its licence.

    FetchFailed names a component whose weights are not safetensors under the names that its library looks for.
    """
    chosen = [path for path in paths if ROOT.fullmatch(path)]
    for part, value in index.items():
        if part.startswith("_") or not part.isidentifier() or not isinstance(value, list) or None in value:
            continue
        names = [path.removeprefix(f"{part}/") for path in paths if path.startswith(f"{part}/")]
        if not names:
            raise FetchFailed(f"{INDEX} names the component '{part}', but the repository has no such folder.")
        weights = [name for name in names if WEIGHTS.fullmatch(name)]
        if not weights and (others := [name for name in names if name.endswith(ANY_WEIGHTS)]):
            raise FetchFailed(f"Component '{part}' has no plain safetensors weights, only {', '.join(others)}.")
        chosen += [f"{part}/{name}" for name in names if name in weights or TEXT.fullmatch(name)]
    return sorted(chosen)


def _check_space(spec: ModelSpec, folder: Path, files: Collection["RepoFile"]) -> None:
    missing, free = sum(f.size for f in files if not _sized(folder / f.path, f)), shutil.disk_usage(folder).free
    if missing > free:
        raise FetchFailed(f"{spec.id} needs {missing / 1e9:.1f} GB more, {folder} has {free / 1e9:.1f} GB free.")


def _obtain(file: "RepoFile", path: Path, download: Callable[[], object]) -> Entry:
    """The checksums of `file` once it is at `path` with the hub's bytes; what is wrong there goes."""
    copies = 0
    while (entry := _verified(path, file)) is None:
        path.unlink(missing_ok=True)
        if copies == COPIES:
            raise FetchFailed(f"{file.path} came with wrong bytes {COPIES} times and was removed.")
        download()
        copies += 1
    return entry


def _verified(path: Path, file: "RepoFile") -> Entry | None:
    if not _sized(path, file):
        return None
    entry = summarize(path)
    if file.lfs:
        return entry if entry.sha256 == file.lfs.sha256 else None
    data = path.read_bytes()  # small: all that the hub knows is git's name for it
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return entry if blob == file.blob_id else None


def _sized(path: Path, file: "RepoFile") -> bool:
    return path.is_file() and path.stat().st_size == file.size


def _persist(download: Callable[[], object], wait: Callable[[float], None]) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    for attempt in range(TRIES):
        try:
            download()
            return
        except Exception as error:
            cause = (isinstance(error, LocalEntryNotFoundError) and error.__cause__) or error  # "not here" hides why
            if (pause := _pause(cause, attempt)) is None or attempt + 1 == TRIES:
                raise cause from None
            wait(pause)


def _pause(error: BaseException, attempt: int) -> float | None:
    """Seconds until another try, beyond those the client has made; None if it would not help."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    match error:
        case HfHubHTTPError(response=response):
            asked = response.headers.get("Retry-After", "")
            pause = min(int(asked), LONGEST_WAIT_S) if asked.isdigit() else 2**attempt
            return float(pause) if response.status_code >= 500 else None
        case httpx2.TransportError() | RuntimeError() | OSError(errno=None):  # of hf_xet; of the client's own checks
            return 2.0**attempt
    return None


@contextlib.contextmanager
def explained(spec: ModelSpec, folder: Path) -> Iterator[None]:
    """Turn errors of the hub's client and of the disk into ones that say what to do."""
    import httpx2
    from huggingface_hub import constants, errors

    page, stays = f"https://huggingface.co/{spec.repository}", "Files that have come stay for the next fetch."
    try:
        yield
        return
    except errors.GatedRepoError:
        text = f"{spec.id} is gated: accept its licence at {page}, then set HF_TOKEN to a token of that account."
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        text = f"The hub shows no {spec.repository} at {spec.revision}. If it is private, set HF_TOKEN."
    except errors.OfflineModeIsEnabled:
        text = f"{spec.id} is not complete on the volume, and HF_HUB_OFFLINE is set; unset it to fetch."
    except errors.HfHubHTTPError as error:
        code, phrase = error.response.status_code, error.response.reason_phrase
        what = f"set HF_TOKEN to one that may read {page}" if code in (401, 403) else "try again later"
        text = f"The hub answers {code} {phrase}; {what}. {stays}"
    except httpx2.HTTPError as error:
        text = f"Cannot reach the hub at {constants.ENDPOINT} ({error}). Check the network. {stays}"
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's; those of the client have none
            raise VolumeFailed(f"Cannot write {folder}: {os.strerror(error.errno)}. {stays}") from error
        text = f"{spec.id} could not be fetched: {' '.join(str(error).split())}. {stays}"
    raise FetchFailed(text)
