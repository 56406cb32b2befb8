"""With what factor a LoRA is added whose alphas are no tensors: as diffusers notes PEFT's configuration in the file.

diffusers writes it as JSON into the header, under `lora_adapter_metadata`, with the component before each name, and
reads it back (its loaders/lora_base.py). ComfyUI passes over it.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from handler.core.untrusted import Malformed, parse
from handler.model.loading.lora import Misfit

NOTED = "lora_adapter_metadata"
EMPTY: Mapping[str, Any] = MappingProxyType({})
PLAIN = re.compile(r"\^?[\w.]+")  # PEFT takes patterns; those that diffusers writes are paths


@dataclass(frozen=True, slots=True)
class Scales:
    """What a file's header notes, by component and name; nothing, if there is none."""

    said: Mapping[str, Any] = field(default_factory=dict)

    def of(self, key: tuple[str, str], rank: int) -> float:
        """The factor for a layer of that component and path; Misfit if what is noted is no number."""
        component, path = key
        alpha = self.said.get(f"{component}.lora_alpha", rank)
        for pattern, value in self._patterns(component).items():
            if not PLAIN.fullmatch(pattern):
                raise Misfit(f"its alpha_pattern has {pattern[:80]!a}, which is no layer's name")
            name = pattern.removeprefix("^")
            if path == name or (name == pattern and path.endswith(f".{name}")):
                alpha = value
                break
        if not isinstance(alpha, int | float) or isinstance(alpha, bool):
            raise Misfit(f"the alpha that is noted for {component}.{path} is no number")
        rooted = self.said.get(f"{component}.use_rslora") is True  # arXiv 2312.03732
        return float(alpha) / (math.sqrt(rank) if rooted else rank)

    def _patterns(self, component: str) -> Mapping[str, Any]:
        found = self.said.get(f"{component}.alpha_pattern") or {}
        if not isinstance(found, dict):
            raise Misfit(f"the alpha_pattern that is noted for {component} is no object")
        return found


def noted(header: Mapping[str, Any]) -> Scales:
    """What the file says of itself in its `header`. Misfit if that makes no sense."""
    if not (text := header.get(NOTED)):
        return Scales()
    try:
        found = parse(text if isinstance(text, str) else "")
    except Malformed:
        found = None
    if not isinstance(found, dict):
        raise Misfit(f"its {NOTED} is no JSON object")
    return Scales(found)
