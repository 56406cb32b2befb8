"""How much of a disk the models of the catalogue take."""

from handler.catalog.models import MODELS

NONE = "No model of the catalogue fits."


def largest_below(free_gb: float) -> str:
    """The largest model whose files, in 16 bits, take less than `free_gb` of disk; as a sentence."""
    sizes = {spec.id: 2 * (spec.parameters + spec.other_parameters) / 1e9 for spec in MODELS.values()}
    best = max((model for model in sizes if sizes[model] < free_gb), key=lambda model: sizes[model], default="")
    return f"The largest that fits there is {best} ({sizes[best]:.3g} GB)." if best else NONE
