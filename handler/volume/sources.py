"""Where a model's files come from: shipped, fetched, in a hub cache, or baked as served."""

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType

from handler.catalog.precisions import PRECISIONS, ROUNDED_BY, SCHEME
from handler.catalog.spec import ModelSpec
from handler.core.errors import StartError, WeightsCorrupt, WeightsMissing
from handler.volume import hubcache
from handler.volume.damaged import mark, marked
from handler.volume.manifest import AGAIN, CHUNK, MANIFEST, Source, checked, source_in, summarize
from handler.volume.room import inside, reading

log = logging.getLogger(__name__)

NONE: Mapping[Path, str] = MappingProxyType({})
EMBEDDED = Path(__file__).parents[1] / "weights"


def fetched_folder(spec: ModelSpec, volume: Path) -> Path:
    """Where `fetch` puts a model; where the revision is open, the folder of all of them."""
    return volume / "models" / spec.id / spec.revision


def model_source(spec: ModelSpec, volume: Path) -> Source:
    """The complete files of `spec`, which `revisions.settled` has seen: shipped, fetched, or in a hub cache there.

    Raises WeightsMissing, with the command that brings them, or WeightsCorrupt, naming the file.
    """
    if spec.embedded:
        if source := checked(EMBEDDED / spec.id, "embedded", spec.id):
            return source
        raise WeightsMissing(f"The embedded weights of {spec.id} are not in {EMBEDDED}. {AGAIN['embedded']}")
    folder = fetched_folder(spec, volume)
    if source := checked(folder, "fetched", spec.id):
        return source
    source, why = hubcache.found(spec, volume)
    if source is None:
        raise WeightsMissing(_missing(spec, volume, folder, why))
    return source


def _missing(spec: ModelSpec, volume: Path, folder: Path, why: str) -> str:
    with reading(folder):
        begun = folder.is_dir()
    if why and not begun:
        return f"{spec.id} is on the volume, but cannot be served: {why}"
    found = f"{folder} is incomplete: it has no {MANIFEST}" if begun else f"nothing in {folder}"
    if others := ", ".join(map(str, [] if begun else hubcache.folders(volume))):
        found += f", and whose what is in {others} is, nobody noted"
    gate = f" Accept its licence at https://huggingface.co/{spec.repository} first and set HF_TOKEN."
    return (
        f"{spec.id} is not on the volume: {found}.{gate if spec.license.gated else ''} "
        f"Fetch it with: python -m handler fetch {spec.id}"
    )


def weight_facts(spec: ModelSpec, precision: str, contents: str = "") -> dict[str, str]:
    """What decides the bytes of weights as served; `contents` are the hashes of people's files over them, if any."""
    facts = {"kind": "weights", "model": spec.id, "revision": spec.revision, "precision": precision}
    facts |= {"contents": contents} if contents else {}
    return facts | ({"rounded_by": ROUNDED_BY, "scheme": SCHEME} if PRECISIONS[precision].quantised else {})


def weights_folder(spec: ModelSpec, volume: Path, precision: str, contents: str = "") -> Path:
    """Where `bake` puts weights as served; a folder of other facts, of an older version, is never in the way."""
    by = list(weight_facts(spec, precision).values())[4:]
    over = [sha256(contents.encode()).hexdigest()[:16]] if contents else []
    return volume / "baked" / spec.id / "-".join((precision, spec.revision[:8], *over, *by)).replace(" ", "-")


def served_source(
    spec: ModelSpec, volume: Path, precision: str, contents: str = "", without: Mapping[Path, str] = NONE
) -> Source:
    """The files to load from: weights baked in `precision` if whole ones are there, else what `model_source` finds.

    `without` are folders that were found damaged, and what is wrong with each.
    """
    baked, why = baked_source(spec, volume, precision, contents, without)
    return baked or replace(model_source(spec, volume), instead=why)


def baked_source(
    spec: ModelSpec, volume: Path, precision: str, contents: str = "", without: Mapping[Path, str] = NONE
) -> tuple[Source | None, str]:
    """Whole weights that were baked in `precision`, with files of these hashes over them; or why there are none."""
    wanted, why = weight_facts(spec, precision, contents), ""
    for source in baked_sources(spec, volume):
        if source.manifest and source.manifest.facts == wanted:
            try:
                if not (why := without.get(source.folder) or marked(source.folder)):
                    return source.complete(), ""
            except StartError as error:
                why = error.message
            log.warning("baked weights are passed over: %s", why)
    return None, why


def spoilt(error: StartError, spec: ModelSpec, volume: Path) -> dict[Path, str]:
    """The baked weights that `error` is about, with what is wrong, if the model can be loaded without them.

    All later starts are told, but of what may be read another time: a volume that failed, or a file that is whole when
    it is read once more. Raises `error` if it is about something else.
    """
    about, known = Path(error.about), {source.folder: source for source in baked_sources(spec, volume)}
    base = volume / "baked" / spec.id
    folder = next((each for each in known if about.is_relative_to(each)), None) or _gone(about, base)
    if folder:
        with suppress(StartError):
            model_source(spec, volume)
            log.error("%s is loaded without its baked weights: %s", spec.id, error.message)
            wrong = folder in known and isinstance(error, WeightsCorrupt | WeightsMissing)
            if wrong and not _whole(known[folder], about):
                mark(folder, error.message)
            return {folder: error.message}
    raise error


def _gone(about: Path, base: Path) -> Path | None:
    """The folder below `base` that `about` was in, if that was removed meanwhile."""
    if not about.is_relative_to(base) or about == base:
        return None
    folder = base / about.relative_to(base).parts[0]
    return folder if not os.path.lexists(folder) else None


def _whole(source: Source, file: Path) -> bool:
    """Whether `file`, read once more, is what the manifest says; of larger ones a reader has read each chunk twice."""
    files = source.manifest.files if source.manifest else {}
    entry = files.get(file.relative_to(source.folder).as_posix())
    with suppress(OSError):
        return entry is not None and entry.size <= CHUNK and summarize(file) == entry
    return False


def baked_sources(spec: ModelSpec, volume: Path) -> list[Source]:
    """Everything that was baked for `spec`, by its manifests. One that cannot be read is told, and as good as none."""
    sources = []
    try:
        for folder in inside(volume / "baked" / spec.id):
            if not folder.name.startswith("."):
                sources.append(_baked(folder, spec))
    except StartError as error:
        log.warning("what is baked for %s is passed over: %s", spec.id, error.message)
    return [source for source in sources if source]


def _baked(folder: Path, spec: ModelSpec) -> Source | None:
    try:
        return source_in(folder, "baked", spec.id)
    except StartError as error:
        log.warning("what is baked is passed over: %s", error.message)
        return None
