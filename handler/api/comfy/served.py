"""What prompts may name at this worker: its model, and the files on its volume by ComfyUI's folders."""

import time
from pathlib import Path
from typing import Any

from handler.api.comfy.archive import Archive
from handler.api.dialects.comfy.plan import Served
from handler.catalog.spec import ModelSpec
from handler.core.errors import VolumeFailed
from handler.core.settings import Settings
from handler.volume import adapters
from handler.volume.given import ROOTS
from handler.volume.named import SUFFIX
from handler.volume.room import inside

PLACES = {  # folders of the volume, by ComfyUI's
    "checkpoints": ("checkpoints",),
    "diffusion_models": ("diffusion_models", "unet", "unets"),
    "vae": ("vae",),
    "text_encoders": ("text_encoders", "clip"),
    "embeddings": ("embeddings",),
}
SUFFIXES = (".safetensors", ".gguf")
LOOK_S = 5.0  # between two looks at the volume's folders of models
Files = dict[str, tuple[str, ...]]


class Catalogue:
    """Looks at the volume. For threads, of which two may look at once, to no harm."""

    def __init__(self, settings: Settings, spec: ModelSpec, archive: Archive) -> None:
        self._settings, self._spec, self._archive = settings, spec, archive
        self._models: Files = {}
        self._looked = 0.0

    def served(self) -> Served:
        """As it is now; of a volume that cannot be read, without its files."""
        if not self._looked or time.monotonic() - self._looked > LOOK_S:
            self._models, self._looked = files_on(self._settings.volume), time.monotonic()
        images = tuple(entry.name.removeprefix("input/") for entry in self._archive.shelf.entries("input", deep=True))
        settings = self._settings
        return Served(self._spec, {**self._models, "input": images}, settings.weights, settings.vae, settings.max_n)


def files_on(volume: Path) -> Files:
    """The names of a volume's files by ComfyUI's folders; none of one that cannot be read."""
    try:
        loras = tuple(f"{name}{SUFFIX}" for name in adapters.names(volume))
        return {folder: _names(volume, places) for folder, places in PLACES.items()} | {"loras": loras}
    except (OSError, VolumeFailed):
        return dict.fromkeys((*PLACES, "loras"), ())


def _names(volume: Path, places: tuple[str, ...]) -> tuple[str, ...]:
    paths = (path for root in ROOTS for place in places for path in inside(volume / root / place))
    return tuple(sorted({path.name for path in paths if path.suffix.lower() in SUFFIXES}))


def classes(served: Served) -> dict[str, Any]:
    """What `/object_info` says. For a thread."""
    from handler.api.dialects.comfy.described import object_info  # late: most workers never see a graph

    return object_info(served)


def choices(folder: str, served: Served) -> list[str]:
    """The files of a folder that such a worker can use."""
    from handler.api.dialects.comfy.described import names  # late, too

    return names(folder, served)
