"""Which of the files that a graph names are here, what serves each, and what has to be brought."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from handler.api.comfy.report import FileState, FileTold
from handler.api.dialects.comfy.files import MODEL_FOLDERS, fits, found_lora, instead, meant, own_part
from handler.api.dialects.comfy.meanings import shortened
from handler.api.dialects.comfy.nodes.loading import placed
from handler.api.dialects.comfy.plan import Load, Served
from handler.api.dialects.comfy.wanted import Named, Serving
from handler.catalog.architectures import rows
from handler.catalog.spec import ModelSpec
from handler.core.errors import KindlingError
from handler.core.request import ImageRequest
from handler.model.text.pieces import embedded
from handler.volume.given import located
from handler.volume.named import PICKLES, SUFFIX
from handler.volume.revisions import settled
from handler.volume.single import examine
from handler.volume.sources import model_source

WEIGHTS = (SUFFIX, ".sft", ".gguf")
LONGEST = 120  # characters of a name that is shown
Told = tuple[FileState, str]


@dataclass(frozen=True, slots=True)
class Holding:
    """A volume at `folder`, with the names of its files by ComfyUI's folders, and what reads images. For a thread.

    `serving` is the model that a server has loaded, whose files are not looked for.
    """

    folder: Path
    files: Mapping[str, tuple[str, ...]]
    load: Load
    serving: ModelSpec | None = None

    def look(self, name: str) -> tuple[str, tuple[str, ...]]:
        """What KINDLING_WEIGHTS calls a model's file, and the rows that take it; none where it is not here."""
        called = plain(name)
        for one in dict.fromkeys((called, PurePosixPath(called).name)):
            try:
                return one, tuple(rows(examine(located(one, self.folder)).parts))
            except (KindlingError, OSError):
                continue
        return called, ()

    def has(self, name: str) -> bool:
        """Whether what KINDLING_WEIGHTS names is here; of nothing but weights this is told."""
        try:
            path = located(name, self.folder)
            return path.suffix.lower() in WEIGHTS or path.is_dir()
        except (KindlingError, OSError):
            return False

    def fetched(self, spec: ModelSpec) -> bool:
        """Whether a row's files are here."""
        if self.serving and self.serving.id == spec.id:
            return True
        try:
            return bool(model_source(settled(spec, self.folder), self.folder))
        except (KindlingError, OSError):
            return False

    def shows(self, name: str) -> bool:
        """Whether an image is here."""
        try:
            return bool(self.load(*placed(name)))
        except (KindlingError, OSError):
            return False


def fetching(spec: ModelSpec) -> str:
    """What to do about a row whose files are not here."""
    return f"bring {spec.id} to the volume: python -m handler fetch {spec.id}"


def plain(name: str) -> str:
    """A name below a folder, whatever a graph has; of a pickle, that of the safetensors file which takes its place."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    path = PurePosixPath(*parts)
    return str(path.with_suffix(SUFFIX) if path.suffix.lower() in PICKLES else path)


def files_told(
    files: Sequence[Named], worker: Serving, holding: Holding, requests: Iterable[ImageRequest]
) -> tuple[FileTold, ...]:
    """Each file once, and the embeddings that prompts name."""
    nodes: dict[tuple[str, str], list[str]] = {}
    for one in files:
        nodes.setdefault((one.folder, one.name), []).append(one.node)
    told = [_file(name, folder, by, worker, holding) for (folder, name), by in nodes.items()]
    names = dict.fromkeys(name for request in requests for name in embedded(request, worker.spec))
    return (*told, *(_embedding(name, holding) for name in names))


def _file(name: str, folder: str, nodes: list[str], worker: Serving, holding: Holding) -> FileTold:
    tell = FOLDERS.get(folder, _part)
    state, by = tell(name, folder, worker, holding)
    return FileTold(shortened(name, LONGEST), folder, tuple(nodes), state, by)


def _model(name: str, folder: str, worker: Serving, holding: Holding) -> Told:
    row = meant(name)
    if said := instead(name):
        return "not offered", said
    if own := _own(name, folder, worker, holding):
        return own
    if row and row.id == worker.spec.id:
        if holding.fetched(row):
            return "the model's own", f"{row.id} is here"
        return "missing", fetching(row)
    if row and row.id != worker.spec.id:
        served = Served(worker.spec)
        if fits(row, served):
            return "the model's own", f"what it is used for comes with {worker.spec.id}, of the same family"
        return "not offered", f"it is another worker's, with KINDLING_MODEL={row.id}: each serves one model"
    return "not offered", "it is another worker's, whose KINDLING_WEIGHTS names it: each serves one model"


def _part(name: str, folder: str, worker: Serving, holding: Holding) -> Told:
    """A VAE or a text encoder."""
    if own_part(name, folder, worker.spec):
        return "the model's own", f"it comes with {worker.spec.id}"
    return _own(name, folder, worker, holding) or ("not offered", f"it is none of {worker.spec.id}'s")


def _own(name: str, folder: str, worker: Serving, holding: Holding) -> Told | None:
    """A person's own file, if the worker is to have it."""
    called = next((one for one in worker.weights if _last(one) == _last(plain(name))), None)
    if called is None:
        return None
    if holding.has(called):
        return "here", f"it is put over {worker.spec.id}"
    pickle = "" if _last(called) == _last(name) else f", the safetensors of {shortened(_last(name), LONGEST)}"
    return "missing", f"put {shortened(called, LONGEST)} into {folder}/ on the volume{pickle}"


def _lora(name: str, folder: str, worker: Serving, holding: Holding) -> Told:
    if found := found_lora(name, holding.files.get("loras", ())):
        return "here", f"it is {shortened(found, LONGEST)} in loras/"
    return "missing", f"put {shortened(plain(name), LONGEST)} into loras/ on the volume"


def _image(name: str, folder: str, worker: Serving, holding: Holding) -> Told:
    if holding.shows(name):
        return "here", "it is read as it is"
    shown = shortened(name, LONGEST)
    if holding.serving:
        return "missing", f"send the image {shown} with POST /upload/image"
    return "missing", f"lay the image {shown} beside the graph, or give it with --image NAME=PATH"


def _embedding(name: str, holding: Holding) -> FileTold:
    known = {one.rpartition(".")[0] or one for one in holding.files.get("embeddings", ())}
    shown, here = shortened(name, LONGEST), PurePosixPath(name).name.removesuffix(SUFFIX) in known
    served_by = "it is in embeddings/" if here else f"put the embedding {shown}{SUFFIX} into embeddings/ on the volume"
    return FileTold(shown, "embeddings", (), "here" if here else "missing", served_by)


def _last(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2].lower()


FOLDERS = {**dict.fromkeys(MODEL_FOLDERS, _model), "loras": _lora, "input": _image}
