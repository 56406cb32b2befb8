"""Where a model's files come from: shipped, fetched, in a hub cache, or baked as served."""

import logging
from hashlib import sha256
from pathlib import Path

from handler.catalog.precisions import PRECISIONS, ROUNDED_BY, SCHEME
from handler.catalog.spec import ModelSpec
from handler.core.errors import StartError, WeightsMissing
from handler.volume.manifest import MANIFEST, Source, checked, read_manifest
from handler.volume.room import inside, reading

log = logging.getLogger(__name__)


EMBEDDED = Path(__file__).parents[1] / "weights"
INDEX = "model_index.json"  # diffusers' list of a pipeline's components
HUB_CACHE = Path("huggingface-cache/hub")  # where RunPod puts a cached model on its volume


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


def served_source(spec: ModelSpec, volume: Path, precision: str, contents: str = "") -> Source:
    """The files to load from: weights baked in `precision` if whole ones are there, else what `model_source` finds."""
    wanted = weight_facts(spec, precision, contents)
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
