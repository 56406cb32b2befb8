"""Schedulers by name: for models that predict flow (velocity) and for those that predict epsilon (noise).

A name that is missing from a table is silently wrong there: it runs, and draws garbage. Which names a model can use is
in its catalogue row; tests/test_families.py proves each with a perfect predictor.
"""

from collections.abc import Mapping
from typing import Any

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)

Table = Mapping[str, tuple[Any, Mapping[str, Any]]]  # name -> diffusers' class, and how it must be configured

FLOW: Table = {
    "flow-match-euler": (FlowMatchEulerDiscreteScheduler, {}),
    "heun": (FlowMatchHeunDiscreteScheduler, {}),
    "dpm++": (DPMSolverMultistepScheduler, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
}
EPSILON: Table = {
    "dpm++": (DPMSolverMultistepScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-a": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "ddim": (DDIMScheduler, {"clip_sample": False}),  # it would clip latents as if they were pixels
}


def make(table: Table, name: str, loaded: Any, differing: Mapping[str, Any]) -> Any:
    """A fresh scheduler: configured as the `loaded` one that came with the weights, but for `differing`."""
    kind, needs = table[name]
    shift = {"flow_shift": loaded.config.get("shift", 1.0)} if table is FLOW else {}  # two names of one thing
    return kind.from_config(loaded.config, **shift, **needs, **differing)
