"""Modules: a class, the folder of its config and tensors that are there already -> a model over exactly these tensors.

Models are made without memory of their own. Each function returns the model, in eval mode, and which keys do not fit,
by kind of fault; a model with faults is not to be used.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Made = tuple[Any, Mapping[str, Any]]


def from_diffusers(kind: Any, folder: Path, found: dict[str, Any], dtype: Any, device: str) -> Made:
    """What ModelMixin.from_pretrained makes."""
    model = _empty(kind, folder, dtype)
    model._fix_state_dict_keys_on_load(found)
    _cast(found, kind, dtype, device)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    misfits = [name for name in shapes.keys() & found.keys() if shapes[name] != found[name].shape]
    faults = {"missing": shapes.keys() - found.keys(), "unexpected": found.keys() - shapes.keys(), "misshapen": misfits}
    if not any(faults.values()):
        model.load_state_dict(found, assign=True)
    return model.eval(), faults


def from_transformers(kind: Any, folder: Path, found: dict[str, Any], dtype: Any, device: str) -> Made:
    """The library's own loading, which renames and ties; it takes tensors of the right device and dtype as they are."""
    from handler.model.loading.weightless import Weightless

    with Weightless():
        model, report = kind.from_pretrained(
            None,
            config=kind.config_class.from_pretrained(folder, local_files_only=True),
            state_dict=found,
            dtype=dtype,
            device_map=None if device == "cpu" else {"": device},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    misfits = [key[0] for key in report["mismatched_keys"]]
    return model, {"missing": report["missing_keys"], "unexpected": report["unexpected_keys"], "misshapen": misfits}


def from_baked(kind: Any, folder: Path, found: dict[str, Any], dtype: Any, device: str, precision: str) -> Made:
    """A model of either library whose layers `quant.save` wrote rounded."""
    from handler.model.loading.quant import quantise

    model = _empty(kind, folder, dtype)
    quantise(model, precision, device)
    _cast(found, kind, dtype, device)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    misfits = [name for name in shapes.keys() & found.keys() if shapes[name] != found[name].shape]
    if misfits:
        return model, {"misshapen": misfits}
    unexpected = model.load_state_dict(found, strict=False, assign=True).unexpected_keys
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    return model.eval(), {"missing": missing, "unexpected": unexpected}


def _empty(kind: Any, folder: Path, dtype: Any) -> Any:
    """The model without memory, but for buffers that no file has, which are computed here."""
    from accelerate import init_empty_weights

    from handler.model.loading.weightless import Weightless

    with Weightless(), init_empty_weights(), _default_dtype(dtype):
        if hasattr(kind, "load_config"):
            return kind.from_config(kind.load_config(folder, local_files_only=True))
        return kind._from_config(kind.config_class.from_pretrained(folder, local_files_only=True), dtype=dtype)


def _cast(found: dict[str, Any], kind: Any, dtype: Any, device: str) -> None:
    """Bring what is neither rounded nor a scale to `dtype`, but for what `kind` keeps in fp32."""
    import torch

    kept = {"scale", "whole", *(kind._keep_in_fp32_modules or () if hasattr(kind, "load_config") else ())}
    for name, tensor in found.items():
        if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16):
            found[name] = tensor.to(device, torch.float32 if kept & set(name.split(".")) else dtype)


@contextlib.contextmanager
def _default_dtype(dtype: Any) -> Iterator[None]:
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
