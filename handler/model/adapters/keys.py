"""Which weights a LoRA changes: the names that diffusers, kohya and ai-toolkit give them, read for one pipeline.

Trainers name layers after diffusers' modules, with dots or, as kohya does, with underscores; or after the model's first
publication, and then `published.py` or diffusers' own converters say which layers those are. What none of them reads is
refused by its name.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from handler.model.adapters.published import renamed
from handler.model.adapters.scales import EMPTY, Scales, noted
from handler.model.loading.lora import Misfit

Key = tuple[str, str]  # a component of the pipeline, and the path of a layer in it
Parts = dict[str, Any]  # of a layer: down, up and, if there is one, alpha
KEY = re.compile(r"(.+?)[._]lora(?:_linear_layer|[0-9])?[._](down|up|A|B)(?:\.default)?(?:\.weight)?")
ROLES = {"down": "down", "A": "down", "up": "up", "B": "up"}
OURS = {"down": "lora_A.weight", "up": "lora_B.weight", "alpha": "alpha"}
ALPHA = ".alpha"
WRAPPED = ("base_model_model_", "lora_", "model_diffusion_model_", "diffusion_model_")  # what may come before a name
ENCODERS = {  # how trainers begin the names of a text encoder's layers
    "text_encoder": ("text_encoder_", "te_", "te1_", "text_encoders_clip_l_transformer_"),
    "text_encoder_2": ("text_encoder_2_", "te2_", "text_encoders_clip_g_transformer_"),
}
ENCODING = ("text_encoder", "te_", "te1_", "te2_", "te3_")
DENOISERS = ("transformer_", "unet_", "")
OLD = {"_to_q": "_q_proj", "_to_k": "_k_proj", "_to_v": "_v_proj", "_to_out": "_out_proj"}  # diffusers' of old, in CLIP


@dataclass(frozen=True, slots=True)
class Delta:
    """What a LoRA adds to one weight: scale * up @ down, of up (out, rank) and down (rank, in)."""

    down: Any
    up: Any
    scale: float

    @property
    def nbytes(self) -> int:
        """Of both matrices."""
        return int(self.down.nbytes + self.up.nbytes)


def layers(pipeline: Any) -> dict[str, dict[str, str]]:
    """Of each component that a LoRA may change its layers: flat names, as `_flat` makes them, and paths."""
    parts = {name: part for name, part in pipeline.components.items() if _changed(name) and hasattr(part, "modules")}
    return {name: _paths(part) for name, part in parts.items()}


def _paths(part: Any) -> dict[str, str]:
    """Layers that share one weight, as a text encoder's head its embeddings, are the first of them."""
    weights = {path: getattr(module, "weight", None) for path, module in part.named_modules()}
    first: dict[int, str] = {}
    return {_flat(path): first.setdefault(id(w), path) for path, w in weights.items() if w is not None}


def _changed(component: str) -> bool:
    return component in ("transformer", "unet") or component.startswith("text_encoder")


def read(pipeline: Any, tensors: Mapping[str, Any], said: Mapping[str, Any] = EMPTY) -> dict[Key, Delta]:
    """What a LoRA adds to the weights of `pipeline`, whose file has said so of itself.

    Misfit names the first key that goes with none of them.
    """
    known, scales = layers(pipeline), noted(said)
    return {key: _delta(key, parts, scales) for key, parts in _named(pipeline, tensors, known).items()}


def _named(pipeline: Any, tensors: Mapping[str, Any], known: Mapping[str, Mapping[str, str]]) -> dict[Key, Parts]:
    """The matrices of each layer, put together."""
    strange = [name for name in tensors if not _layer(_split(name)[0], known)]
    if not strange:
        return _paired(tensors, known)
    for name in strange:
        if _split(name)[0].removeprefix("lora_").startswith(ENCODING):
            raise _misfit(name)  # a converter would leave it out
    if published := renamed(getattr(pipeline, "transformer", None), _layers({n: tensors[n] for n in strange})):
        whole = {f"{path}.{OURS[role]}": part for path, parts in published.items() for role, part in parts.items()}
        return _paired(whole | {name: tensor for name, tensor in tensors.items() if name not in strange}, known)
    try:
        converted = _converted(pipeline, dict(tensors))
    except Exception:  # whatever stumbles over names it does not know
        raise _misfit(strange[0]) from None
    return _paired(converted, known)


def _layers(tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What there is of each layer, by its name as it is written."""
    found: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        layer, role = _parted(name)
        found.setdefault(layer, {})[role] = tensor
    return found


def _converted(pipeline: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """By diffusers' converter for this kind of pipeline: names as its modules have them, and alphas."""
    convert: Callable[..., Any] = type(pipeline).lora_state_dict
    options: dict[str, Any] = {"unet_config": pipeline.unet.config} if hasattr(pipeline, "unet") else {}
    if "return_alphas" in convert.__code__.co_varnames:  # FLUX.1's, which keeps them to itself otherwise
        options["return_alphas"] = True
    found = convert(tensors, **options)
    return {key: each for one in (found if isinstance(found, tuple) else (found,)) for key, each in (one or {}).items()}


def _paired(tensors: Mapping[str, Any], known: Mapping[str, Mapping[str, str]]) -> dict[Key, Parts]:
    found: dict[Key, Parts] = {}
    for name, tensor in tensors.items():
        layer, role = _split(name)
        if (key := _layer(layer, known)) is None:
            raise _misfit(name)
        if role in found.setdefault(key, {}):
            raise Misfit(f"{name} is there under another name too")
        found[key][role] = tensor
    return found


def _misfit(name: str) -> Misfit:
    return Misfit(f"{name} fits no weight of the model")


def _delta(key: Key, parts: Parts, scales: Scales) -> Delta:
    layer = ".".join(key)
    if not {"down", "up"} <= parts.keys():
        raise Misfit(f"{layer} has half of a LoRA")
    down, up = parts["down"], parts["up"]
    if min(down.ndim, up.ndim) < 2 or not (down.numel() and up.numel()):
        raise Misfit(f"{layer} has another shape")
    alpha: Any = parts.get("alpha")  # a tensor, or of diffusers' converters a number
    if hasattr(alpha, "numel") and alpha.numel() != 1:
        raise Misfit(f"{layer} has more than one alpha")
    scale = scales.of(key, len(down)) if alpha is None else float(alpha) / len(down)
    if not (math.isfinite(scale) and down.isfinite().all() and up.isfinite().all()):
        raise Misfit(f"{layer} has values that are infinite or none")
    return Delta(down, up, scale)


def _split(name: str) -> tuple[str, str]:
    """The layer that a key is of, flat, and what it is of it: down, up or alpha."""
    layer, role = _parted(name)
    return _flat(layer.replace(".processor", "")), role


def _parted(name: str) -> tuple[str, str]:
    """The layer that a key is of, as it is written, and what it is of it."""
    alpha = name.endswith(ALPHA)
    whole = name.removesuffix(ALPHA) if alpha else name
    found = KEY.fullmatch(whole)
    if not (alpha or found):
        raise Misfit(f"{name} is no part of a LoRA")
    return found[1] if found else whole, "alpha" if alpha or not found else ROLES[found[2]]


def _flat(path: str) -> str:
    return path.replace(".", "_")


def _layer(flat: str, known: Mapping[str, Mapping[str, str]]) -> Key | None:
    """The layer of that flat name, as one of the trainers may have written it."""
    for prefix in WRAPPED:
        flat = flat.removeprefix(prefix)
    for component, name in _meant(flat):
        for spelled in _spelled(component, name):
            if path := known.get(component, {}).get(spelled):
                return component, path
    return None


def _meant(flat: str) -> Iterator[tuple[str, str]]:
    """Components that the name may mean, and what it is there."""
    for encoder, prefixes in sorted(ENCODERS.items(), reverse=True):  # the second first: its names are longer
        for prefix in prefixes:
            if flat.startswith(prefix):
                yield encoder, flat.removeprefix(prefix)
    for prefix in DENOISERS:
        if flat.startswith(prefix):
            yield from ((denoiser, flat.removeprefix(prefix)) for denoiser in ("transformer", "unet"))


def _spelled(component: str, name: str) -> Iterator[str]:
    """`name` as versions of the libraries spell it."""
    yield name
    if component in ("transformer", "unet"):
        yield f"{name}_0"  # to_out is a list
        return
    name = next((name.removesuffix(old) + new for old, new in OLD.items() if name.endswith(old)), name)
    yield from (name, name.removeprefix("text_model_"), f"text_model_{name}")
