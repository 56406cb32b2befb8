"""Which of a folder's files its pipeline reads: the small ones, and the weights that model_index.json leads to."""

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from handler.core.errors import WeightsCorrupt, WeightsMissing
from handler.core.untrusted import Malformed, load
from handler.volume.manifest import Source
from handler.volume.room import reading

INDEX = "model_index.json"  # diffusers' list of a pipeline's components
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}  # what each library calls its weights
VARIANTS = ("", ".fp16")  # of weights in a hub cache, the second where only these were downloaded
LORA = "lora"  # the name, in a component's folder, of a LoRA to fuse with its weights
CONFIG_SUFFIXES = {".json", ".txt", ".model", ".jinja"}
# Components of diffusers' pipelines that no picture here needs: what blackens some, and what adapters see with.
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


def index_of(source: Source) -> Mapping[str, Any]:
    """Its model_index.json, or what stands for one, without what is UNUSED; WeightsMissing or WeightsCorrupt."""
    if source.index:
        return {name: value for name, value in source.index.items() if name not in UNUSED}
    index = json_of(source, INDEX)
    if (odd := next((name for name in index if not name.isidentifier()), None)) is not None:
        told = f"{source.folder / INDEX} names a component {odd[:80]!a}. {source.remedy}"
        raise WeightsCorrupt(told, about=str(source.folder / INDEX))
    return {name: value for name, value in index.items() if name not in UNUSED}


def weight_files(source: Source, index: Mapping[str, Any] | None = None) -> dict[str, list[str]]:
    """The weight files that a pipeline reads, by component; before those that a LoRA changes, the LoRA's."""
    found: dict[str, list[str]] = {}
    for component, value in (index_of(source) if index is None else index).items():
        with reading(path := source.folder / component / f"{LORA}.safetensors"):
            if path.exists():
                found[f"{component}/{LORA}"] = [f"{component}/{LORA}.safetensors"]
        found[component] = _weights(source, component, value)
    return found


def config_files(source: Source) -> list[str]:
    """A flipped bit in a configuration is as bad as one in a weight, so these are read and checked too."""
    files = source.manifest.files if source.manifest else {}
    return [name for name, entry in files.items() if entry.size and Path(name).suffix in CONFIG_SUFFIXES]


def _weights(source: Source, component: str, value: Any) -> list[str]:
    """The safetensors files of one entry of model_index.json, in order; none if it has no weights."""
    match value:
        case [("diffusers" | "transformers") as library, _]:
            stem = f"{component}/{STEMS[library]}"
        case _:
            return []
    for variant in VARIANTS if source.kind == "hub cache" else VARIANTS[:1]:
        whole, index = f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json"
        with reading(source.folder / component):
            if (source.folder / index).exists():
                return _shards(source, component, index)
            if (source.folder / whole).exists():
                return [whole]
    return []


def _shards(source: Source, component: str, index: str) -> list[str]:
    listed = json_of(source, index).get("weight_map")
    names: set[Any] = set(listed.values()) if isinstance(listed, dict) else {None}
    if not all(isinstance(name, str) and name and name == os.path.basename(name) for name in names):
        told = f"{source.folder / index} does not list files beside it. {source.remedy}"
        raise WeightsCorrupt(told, about=str(source.folder / index))
    return [f"{component}/{name}" for name in sorted(names)]


def json_of(source: Source, name: str) -> dict[str, Any]:
    """The JSON object in one of its files; raises what says that it is missing, damaged or cannot be read."""
    with reading(path := source.folder / name):
        try:
            return load(path)
        except FileNotFoundError:
            raise WeightsMissing(f"{path} is missing. {source.again}", about=str(path)) from None
        except Malformed:
            raise WeightsCorrupt(f"{path} is no JSON object. {source.remedy}", about=str(path)) from None


OURS = {"Flux2TinyAutoEncoder": "handler.model.families.flux2_tiny"}  # whose repository would have us run its own code


def named(library: object, word: object) -> Any:
    """What diffusers or transformers, or this package in their place, call so; None for anything else."""
    module = OURS.get(str(word), library)
    return getattr(importlib.import_module(module), str(word), None) if module in (*STEMS, *OURS.values()) else None
