"""Fetch a model, and the VAE, LoRAs and weights that are set, from the hub to the volume: each file is checked.

Whole files stay when a fetch is interrupted. The manifest comes last, so a worker never starts on half a model.
"""

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handler.catalog.sizes import largest_below
from handler.catalog.spec import ModelSpec
from handler.core.errors import FetchFailed, WeightsCorrupt
from handler.core.loras import Pin
from handler.core.untrusted import Malformed, load
from handler.volume.adapters import FETCHED
from handler.volume.autoencoder import fetched_vae
from handler.volume.fetched import Fetched
from handler.volume.files import VAE, VAE_CONFIG, Item, Listings, home, model_items, repository_items, vae_items
from handler.volume.given import pinned
from handler.volume.hub import Repository, Wait, explained
from handler.volume.incoming import alone, begin, incoming
from handler.volume.listing import INDEX
from handler.volume.manifest import Entry, Source, checked, summarize, write_atomically, write_manifest
from handler.volume.named import SUFFIX
from handler.volume.revisions import MAIN, begun, settled
from handler.volume.room import discard
from handler.volume.sources import fetched_folder, model_source
from handler.volume.vouched import came, remember, require, sized, verified

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

COPIES = 2  # of a file whose bytes are wrong, before giving up
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Order:
    """What shall be complete in `folder`: the items that `choose` names once it has read `head`, if that is JSON."""

    name: str
    volume: Path
    folder: Path
    facts: dict[str, str]
    repositories: tuple[Repository, ...]
    head: Item
    choose: Callable[[Listings, Any], list[Item]]


def fetch(spec: ModelSpec, volume: Path, *, quiet: bool = False, wait: Wait = time.sleep) -> Fetched:
    """Make `spec` complete on `volume`, or raise FetchFailed or VolumeFailed. `quiet`: no bars even on a terminal."""
    if spec.embedded:
        return _fetched(spec.id, model_source(spec, volume))
    return _fill(_model_order(_at_commit(spec, volume), volume), quiet, wait)


def fetch_vae(name: str, volume: Path, *, quiet: bool = False, wait: Wait = time.sleep) -> Fetched:
    """Make the autoencoder `owner/repository@revision` complete on `volume`; raises as `fetch`, or SettingsError."""
    return _fill(_vae_order(name, volume), quiet, wait)


def fetch_lora(wanted: Pin, volume: Path, *, quiet: bool = False, wait: Wait = time.sleep) -> Fetched:
    """Make the LoRA `wanted` a whole file on `volume`, under its name here; raises as `fetch`."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    start, repository = time.monotonic(), Repository(wanted.repository, wanted.revision)
    item = Item(f"{wanted.name}{SUFFIX}", repository, wanted.file)
    order = Order(f"LoRA {wanted.name}", volume, volume / FETCHED, {}, (repository,), item, lambda *_: [item])
    path, bars = order.folder / item.path, disable_progress_bars() if quiet else contextlib.nullcontext()
    with explained(order.name, repository, order.folder), alone(order.folder) as only, bars:
        entry, downloaded = came(volume, item, path), False
        if entry is None:
            begin(order.folder, only)
            entry, downloaded = _alone(order, item, wait)
            discard(incoming(order.folder))
    seconds = round(time.monotonic() - start, 3)
    files = (item.path,)
    return Fetched(order.name, wanted.revision, order.folder, files, entry.size, seconds, downloaded)


def _alone(order: Order, item: Item, wait: Wait) -> tuple[Entry, bool]:
    """The checksums of the one file that `order` is of, and whether it had to come."""
    repository, path = item.repository, order.folder / item.path
    if (file := repository.files().get(item.file)) is None:
        raise FetchFailed(f"{repository.name} has no {item.file} at {repository.revision}.")
    there = path.stat() if sized(path, file) else None
    _check_space(order, {item.path: file})
    entry = _bring(order, item, file, wait)
    return entry, there is None or not os.path.samestat(there, path.stat())


def _at_commit(spec: ModelSpec, volume: Path) -> ModelSpec:
    """`spec` at its commit: of a row that names none, the volume's; if that has none, what the hub's main is now.

    The folder that is made for it tells the next fetch, and every other process, that it is settled.
    """
    if (known := settled(spec, volume)).revision:
        return known
    main, folder = Repository(spec.repository, MAIN), fetched_folder(spec, volume)
    with explained(spec.id, main, folder), alone(folder):
        if not (known := begun(spec, volume)).revision:
            known = replace(spec, revision=main.commit())
            fetched_folder(known, volume).mkdir(exist_ok=True)
        return known


def _model_order(spec: ModelSpec, volume: Path) -> Order:
    own, base = Repository(spec.repository, spec.revision), home(spec)
    facts = {"model": spec.id, "repository": own.name, "revision": own.revision}
    if spec.base:
        facts |= {"base": base.name, "base_revision": base.revision}
    listed = (base, own) if spec.grafts else (base,)
    head = Item(INDEX, base, INDEX)
    return Order(spec.id, volume, fetched_folder(spec, volume), facts, listed, head, partial(model_items, spec))


def fetch_weights(name: str, volume: Path, variant: str, *, quiet: bool = False, wait: Wait = time.sleep) -> Fetched:
    """Make the file `owner/repository@revision:path` complete on `volume`, or, without a path, what a pipeline reads of
    that repository, in `variant` where it has that; raises as `fetch`, or SettingsError.
    """
    wanted = pinned(name, volume)
    repository = Repository(wanted.repository, wanted.revision)
    facts = {"kind": "repository", "repository": repository.name, "revision": repository.revision}
    choose = partial(repository_items, repository, variant)
    order = Order(name, volume, wanted.path, facts, (repository,), Item(INDEX, repository, INDEX), choose)
    if wanted.file:
        facts |= {"kind": "file", "file": wanted.file}
        head = Item(wanted.path.name, repository, wanted.file)
        order = replace(order, folder=wanted.path.parent, head=head, choose=lambda *_: [head])
    return _fill(order, quiet, wait)


def _vae_order(name: str, volume: Path) -> Order:
    folder, repository = fetched_vae(name, volume), Repository(*name.split("@"))
    facts = {"kind": "vae", "repository": repository.name, "revision": repository.revision}
    head = Item(f"{VAE}/{VAE_CONFIG}", repository, VAE_CONFIG)
    return Order(name, volume, folder, facts, (repository,), head, partial(vae_items, repository))


def _fill(order: Order, quiet: bool, wait: Wait) -> Fetched:
    from huggingface_hub.utils.tqdm import disable_progress_bars

    start = time.monotonic()
    if source := _complete(order):
        return _fetched(order.name, source)
    bars = disable_progress_bars() if quiet else contextlib.nullcontext()
    with explained(order.name, order.head.repository, order.folder), alone(order.folder) as only, bars:
        if source := _complete(order):  # another process was faster
            return _fetched(order.name, source)
        begin(order.folder, only)
        return _fetched(order.name, _download(order, wait), time.monotonic() - start)


def _fetched(name: str, source: Source, seconds: float | None = None) -> Fetched:
    assert source.manifest, "what is fetched, or ships, has one"
    files, revision = source.manifest.files, source.manifest.facts["revision"]
    size, took = sum(entry.size for entry in files.values()), round(seconds or 0.0, 3)
    return Fetched(name, revision, source.folder, tuple(files), size, took, downloaded=seconds is not None)


def _complete(order: Order) -> Source | None:
    """What is there, if it was made from the same; otherwise each file is compared with the hub's."""
    with contextlib.suppress(WeightsCorrupt):
        source = checked(order.folder)
        return source if source and source.manifest and source.manifest.facts == order.facts else None
    return None


def _download(order: Order, wait: Wait) -> Source:
    listings = {}
    for repository in order.repositories:
        with explained(order.name, repository, order.folder):
            listings[repository] = repository.files()
    if order.head.file not in listings[order.head.repository]:
        of = order.head.repository
        why = "" if order.facts.get("kind") == "file" else ": it is not in diffusers' format"
        raise FetchFailed(f"{of.name} has no {order.head.file} at {of.revision}{why}.")

    def bring(item: Item) -> Entry:
        return _bring(order, item, listings[item.repository][item.file], wait)

    if told := order.head.file.endswith(".json"):
        bring(order.head)
    items = order.choose(listings, _object(order, order.head) if told else None)
    _check_space(order, {item.path: listings[item.repository][item.file] for item in items})
    entries = {item.path: bring(item) for item in items}
    for item in items:
        if item.names[0] != item.names[1] and item.path.endswith(".index.json"):
            entries[item.path] = _rename_shards(order, item, items)
    discard(incoming(order.folder))
    return Source(order.folder, write_manifest(order.folder, order.facts, entries))


def _object(order: Order, item: Item) -> dict[str, Any]:
    """The JSON object in a file that has come."""
    try:
        return load(order.folder / item.path)
    except Malformed as error:
        raise FetchFailed(f"{item.file} of {item.repository.name} is no JSON object: {error}.") from None


def _check_space(order: Order, files: Mapping[str, "RepoFile"]) -> None:
    folder, free = order.folder, shutil.disk_usage(order.folder).free
    missing = sum(file.size for path, file in files.items() if not sized(folder / path, file))
    if missing > free:
        told = f"{order.name} needs {missing / 1e9:.1f} GB more, {folder} has {free / 1e9:.1f} GB free."
        raise FetchFailed(f"{told} {largest_below(free / 1e9)}")


def _rename_shards(order: Order, item: Item, items: list[Item]) -> Entry:
    """Let an index name its shards as they are stored. Last of all: until then it can be compared with the hub's."""
    names = dict(other.names for other in items if Path(other.path).parent == Path(item.path).parent)
    path = order.folder / item.path
    index = _object(order, item)
    try:
        index["weight_map"] = {tensor: names[shard] for tensor, shard in index["weight_map"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise FetchFailed(f"{item.file} of {item.repository.name} does not list its shards: {error}.") from None
    write_atomically(path, json.dumps(index, indent=2).encode())
    return summarize(path)


def _bring(order: Order, item: Item, file: "RepoFile", wait: Wait) -> Entry:
    """The checksums of `item` once it is there with the hub's bytes; what is wrong there goes."""
    path, copies = order.folder / item.path, 0
    require(order.volume, item, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    while (entry := verified(path, file)) is None:
        if copies == COPIES:
            path.unlink(missing_ok=True)
            raise FetchFailed(f"{item.file} came with wrong bytes {COPIES} times and was removed.")
        with explained(order.name, item.repository, order.folder):
            item.repository.download(item.file, incoming(order.folder), wait).replace(path)
        copies += 1
    remember(order.volume, item, file)
    return entry
