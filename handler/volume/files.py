"""What a model or an autoencoder needs of the hub's repositories, told from their listings."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from handler.catalog.spec import ModelSpec
from handler.core.errors import FetchFailed
from handler.volume.hub import Repository
from handler.volume.listing import INDEX, UNUSED, named

ROOT = re.compile(rf"{re.escape(INDEX)}|licen[cs]e[^/]*", re.IGNORECASE)
WEIGHTS = re.compile(r"(model|diffusion_pytorch_model)((-\d{5}-of-\d{5})?\.safetensors|\.safetensors\.index\.json)")
TEXT = re.compile(r"(?!.*\.index\.)[^/]+\.(json|txt|model|jinja)")
ANY_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".gguf")
VAE = "vae"  # the folder, as in a pipeline
VAE_CONFIG, VAE_WEIGHTS = "config.json", "diffusion_pytorch_model"
Listings = Mapping[Repository, Collection[str]]


@dataclass(frozen=True, slots=True)
class Item:
    """One file to bring: `file` of `repository` becomes `path` on the volume."""

    path: str
    repository: Repository
    file: str

    @property
    def names(self) -> tuple[str, str]:
        """Without folders: on the hub, and on the volume."""
        return PurePosixPath(self.file).name, PurePosixPath(self.path).name


def home(spec: ModelSpec) -> Repository:
    """The repository with the pipeline of `spec`: its base's, or its own."""
    source = spec.base or spec
    return Repository(source.repository, source.revision)


def model_items(spec: ModelSpec, listings: Listings, index: Mapping[str, Any]) -> list[Item]:
    """Every file of a model whose pipeline has this model_index.json. FetchFailed names what is not there."""
    own = Repository(spec.repository, spec.revision)
    grafted = {str(PurePosixPath(graft.path).parent) for graft in spec.grafts if _is_weights(graft.path)}
    chosen = choose_files(listings[home(spec)], index, spec.variant, grafted)
    items = {path: Item(path, home(spec), file) for path, file in chosen.items()}
    for graft in spec.grafts:
        if graft.file not in listings[own]:
            raise FetchFailed(f"{own.name} has no {graft.file} at {own.revision}, which {spec.id} needs.")
        items[graft.path] = Item(graft.path, own, graft.file)
    return [items[path] for path in sorted(items)]


def vae_items(repository: Repository, listings: Listings, config: object) -> list[Item]:
    """The files of an autoencoder that has this config.json. FetchFailed says why it is none that can be loaded."""
    from diffusers.models.autoencoders.vae import AutoencoderMixin

    word = config.get("_class_name") if isinstance(config, dict) else None
    kind = named("diffusers", word)
    if not (isinstance(kind, type) and issubclass(kind, AutoencoderMixin)):
        raise FetchFailed(f"{repository.name} is no autoencoder of diffusers: its {VAE_CONFIG} has _class_name {word}.")
    weights = _weights([name for name in listings[repository] if name.startswith(VAE_WEIGHTS)])
    if not weights:
        raise FetchFailed(f"{repository.name} has no {VAE_WEIGHTS}.safetensors at {repository.revision}.")
    return [Item(f"{VAE}/{name}", repository, name) for name in sorted([VAE_CONFIG, *weights])]


def repository_items(repository: Repository, variant: str, listings: Listings, index: Mapping[str, Any]) -> list[Item]:
    """The files of a person's repository with this model_index.json, which need not have all that that names."""
    paths = listings[repository]
    there = {part: value for part, value in index.items() if any(path.startswith(f"{part}/") for path in paths)}
    chosen = choose_files(paths, there, variant)
    return [Item(path, repository, chosen[path]) for path in sorted(chosen)]


def choose_files(
    paths: Collection[str], index: Mapping[str, Any], variant: str = "", grafted: Collection[str] = ()
) -> dict[str, str]:
    """Which of a repository's files a pipeline with this model_index.json needs, and its licence, by path stored.

    Weights come in `variant` where a component has it, and not at all for components in `grafted`; what is UNUSED does
    not come. FetchFailed names a component whose weights are not safetensors under the names its library looks for.
    """
    chosen = {path: path for path in paths if ROOT.fullmatch(path)}
    for part, value in index.items():
        used = part.isidentifier() and not part.startswith("_") and part not in UNUSED
        if not used or not isinstance(value, list) or None in value:
            continue
        names = [path.removeprefix(f"{part}/") for path in paths if path.startswith(f"{part}/")]
        if not names:
            raise FetchFailed(f"{INDEX} names the component '{part}', but the repository has no such folder.")
        weights = {} if part in grafted else _weights(names, variant) or _weights(names)
        others = [name for name in names if name.endswith(ANY_WEIGHTS)]
        if others and not weights and part not in grafted:
            raise FetchFailed(f"Component '{part}' has no plain safetensors weights, only {', '.join(others)}.")
        texts = {name: name for name in names if TEXT.fullmatch(name)}
        chosen |= {f"{part}/{stored}": f"{part}/{name}" for stored, name in (texts | weights).items()}
    return chosen


def _weights(names: Collection[str], variant: str = "") -> dict[str, str]:
    """The weights among the files of a folder, by their plain names; none where there is but an index."""
    mark = f".{variant}" if variant else ""
    plain = {name.replace(mark, "", 1): name for name in names if mark in name}
    found = {stored: name for stored, name in plain.items() if WEIGHTS.fullmatch(stored)}
    return found if any(stored.endswith(".safetensors") for stored in found) else {}


def _is_weights(path: str) -> bool:
    return WEIGHTS.fullmatch(PurePosixPath(path).name) is not None
