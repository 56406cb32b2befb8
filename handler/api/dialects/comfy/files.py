"""What the names of files in a graph mean: which row of the catalogue, and whether this worker serves that."""

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from typing import Any, Never

from handler.api.dialects.comfy.checking import placeholder
from handler.api.dialects.comfy.node import At, Input, Refused
from handler.api.dialects.comfy.plan import Served
from handler.catalog.models import MODELS
from handler.catalog.spec import ModelSpec
from handler.core.quoting import QUOTED

SUFFIXES = re.compile(r"\.(safetensors|sft|gguf|ckpt|pth|pt|bin|onnx)$")
PRECISION = re.compile(
    r"[-_.](q\d(_[0-9k])?(_(xs|s|m|l|xl))?|iq\d_\w+|ud-\w+|bf16|f16|fp16|fp32|fp8|fp4|int8|int4|mxfp8|nvfp4|e4m3fn|e5m2"
    r"|fast|scaled|mixed|fp8mixed|convrot)$"
)
ITS_OWN = "{row}.safetensors"  # by which every row can be named
MODEL_FOLDERS = ("checkpoints", "diffusion_models")


@cache
def table() -> Mapping[str, Mapping[str, Any]]:
    """The data file beside this one."""
    return tomllib.loads(resources.files(__package__).joinpath("files.toml").read_text("utf-8"))


def stem(name: str) -> str:
    """`name` without folder, suffix and precision, in small letters."""
    bare = SUFFIXES.sub("", name.replace("\\", "/").rpartition("/")[2].lower())
    while (shorter := PRECISION.sub("", bare)) != bare:
        bare = shorter
    return bare


def listed(wanted: Input, served: Served) -> Sequence[str]:
    """The choices of an input: words, or the files of its folder that this worker can use."""
    if not wanted.folder:
        return wanted.type if isinstance(wanted.type, tuple) else ()
    own = [*_own(wanted.folder, served)]
    return [*own, *(name for name in served.files.get(wanted.folder, ()) if name not in own)]


def _own(folder: str, served: Served) -> list[str]:
    """Names under which the served model's own files are known."""
    family, plain = _family(served.spec), f"{served.spec.id}.safetensors"
    if folder in MODEL_FOLDERS:
        stems = [name for name, row in table()["models"].items() if row == served.spec.id]
        return list(dict.fromkeys([plain, *(f"{name}.safetensors" for name in stems)]))
    if folder in ("vae", "text_encoders"):
        return [f"{name}.safetensors" for name, families in table()[folder].items() if family in families]
    return []


def model(at: At, name: str, folder: str) -> ModelSpec:
    """The row that a checkpoint or a diffusion model means: the served one, or it is refused."""
    served, bare = at.served, stem(name)
    theirs = [one for one in served.weights if not _part(one, served)]
    if any(_same(name, one) for one in theirs):
        return served.spec
    row = _row(bare)
    if row and any(stem(one) == bare for one in theirs):
        at.note(f"'{name}' is drawn with this worker's own file of that model, {theirs[0]}.")
        return served.spec
    if row is None or (theirs and row is served.spec):
        _unknown(name, folder, served)
    if row is not served.spec:
        return row
    if bare in table()["near"]:
        at.note(f"'{name}': {table()['near'][bare]}.")
    return row


def _row(bare: str) -> ModelSpec | None:
    row = table()["models"].get(bare)
    return MODELS.get(row or bare)


def meant(name: str) -> ModelSpec | None:
    """The row of the catalogue that a model's file is known to be of, by its name alone."""
    return _row(stem(name))


def instead(name: str) -> str:
    """What to use instead of a model that is known and not offered; empty for any other."""
    return next((told for pattern, told in table()["instead"].items() if fnmatchcase(stem(name), pattern)), "")


def _unknown(name: str, folder: str, served: Served) -> Never:
    """A file that this worker does not serve: what would."""
    field = {"checkpoints": "ckpt_name", "diffusion_models": "unet_name"}[folder]
    _require_short(name, field)
    if told := placeholder(name) or ("" if name else f"no file is named; this worker draws with {serving(served)}."):
        raise Refused(told, field, "value_not_in_list")
    if sentence := instead(name):
        raise Refused(f"'{name}' is not served: {sentence}", field, "value_not_in_list")
    there = any(_same(name, one) for each in MODEL_FOLDERS for one in served.files.get(each, ()))
    put = "it is on the volume, but this" if there else "put it on the volume; this"
    file = name.replace("\\", "/")
    told = f"'{name}' is not served: {put} worker draws with {serving(served)}. Start one with KINDLING_WEIGHTS={file}"
    raise Refused(f"{told} and KINDLING_MODEL the model that it was made from.", field, "value_not_in_list")


def _require_short(name: str, field: str) -> None:
    """Refuse a name that is too long to be said again."""
    if len(name) > QUOTED:
        raise Refused(f"a file's name has at most {QUOTED} characters.", field, "value_not_in_list")


def must_serve(row: ModelSpec, served: Served) -> None:
    """Refuse to sample with another model than this worker's."""
    if row is not served.spec and row != served.spec:
        told = f"This worker serves {served.spec.id}, not {row.id}; start one with KINDLING_MODEL={row.id}."
        raise Refused(told, "model", "value_not_in_list")


def serving(served: Served) -> str:
    """What the worker serves, in words."""
    return f"{served.spec.id} from {', '.join(served.weights)}" if served.weights else served.spec.id


def part(at: At, name: str, folder: str, field: str) -> None:
    """Look at the name of a VAE or a text encoder; refuse one that is not the served model's own, nor the worker's."""
    served = at.served
    if any(_same(name, one) for one in (*served.weights, served.vae) if one):
        return
    if own_part(name, folder, served.spec):
        return
    _require_short(name, field)
    what = {"vae": "autoencoder", "text_encoders": "text encoder"}[folder]
    if told := placeholder(name):
        raise Refused(told, field, "value_not_in_list")
    own = _own(folder, served)
    name_it = f"name {' or '.join(own[:3])}" if own else f"take the {what} of the checkpoint"
    start = f"start a worker with KINDLING_WEIGHTS={name}"
    told = f"'{name}' is no {what} of {served.spec.id} as served here; {name_it}, or {start}."
    raise Refused(told, field, "value_not_in_list")


def own_part(name: str, folder: str, spec: ModelSpec) -> bool:
    """Whether a VAE or a text encoder is, by its name, the one that `spec` has."""
    return _family(spec) in table()[folder].get(stem(name), ())


def fits(row: ModelSpec, served: Served) -> bool:
    """Whether a part of `row` is also one of what is served: of the same family, as merges and distilled models are."""
    return _family(row) == _family(served.spec)


def lora(at: At, name: str) -> str:
    """The name that a request has for a LoRA's file; refused if the volume has none."""
    known = at.served.files.get("loras", ())
    if found := found_lora(name, known):
        return found
    last = {_bare(one).rpartition("/")[2]: one for one in known}
    near = difflib.get_close_matches(_bare(name).rpartition("/")[2], list(last)[:1000], 3)
    also = f"there is {', '.join(last[one] for one in near)}" if near else "put it into loras/ on the volume"
    told = placeholder(name) or f"There is no LoRA '{name:.120}' on this worker's volume; {also}."
    raise Refused(told, "lora_name", "value_not_in_list")


def found_lora(name: str, files: Sequence[str]) -> str:
    """The name that a request has for a LoRA's file, by its whole name or the last part; empty if it is not there."""
    known = {_bare(one): one for one in files}
    last = {one.rpartition("/")[2]: path for one, path in known.items()}
    bare = _bare(name)
    return (known.get(bare) or last.get(bare.rpartition("/")[2], "")).removesuffix(".safetensors")


def _bare(name: str) -> str:
    return name.replace("\\", "/").strip("/").lower().removesuffix(".safetensors")


def _same(name: str, other: str) -> bool:
    """Whether both name one file, wherever it lies; a pickle, which nobody opens, is its safetensors."""
    last = [one.replace("\\", "/").replace(":", "/").rpartition("/")[2].lower() for one in (name, other)]
    return SUFFIXES.sub("", last[0]) == SUFFIXES.sub("", last[1])


def _part(name: str, served: Served) -> bool:
    """Whether a file is a VAE or a text encoder, by its name or where it lies."""
    folders = ("vae", "text_encoders")
    if any(stem(name) in table()[folder] for folder in folders):
        return True
    return any(_same(name, one) for folder in folders for one in served.files.get(folder, ()))


def _family(spec: ModelSpec) -> str:
    return spec.family.rpartition(".")[2]
