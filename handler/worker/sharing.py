"""What several GPUs cannot draw together, and why: models and settings at a start, and sizes of pictures."""

from handler.catalog.spec import ModelSpec
from handler.core.errors import KindlingError, OutOfRange, SettingsError
from handler.core.recipe import Recipe
from handler.core.settings import Settings
from handler.volume.listing import json_of
from handler.volume.manifest import Source


def require_splittable(spec: ModelSpec, settings: Settings) -> None:
    """SettingsError, which says why, unless several GPUs can draw `spec` together as `settings` ask."""
    for wrong, why in (
        (not spec.splits, f"diffusers cannot split {spec.id} over several GPUs"),
        (settings.step_cache != "off", "a step cache skips blocks of whole pictures; use KINDLING_STEP_CACHE=off"),
        (settings.offload == "blocks", "blocks that wait in host memory cannot be split; use KINDLING_OFFLOAD=auto"),
    ):
        if settings.ranks > 1 and wrong:
            raise SettingsError(f"{degree(settings)}: {why}.", degree(settings))


def require_shared(source: Source, settings: Settings) -> None:
    """SettingsError unless as many ranks as Ulysses attention has can share the heads of the model in `source`."""
    heads = json_of(source, "transformer/config.json").get("num_attention_heads", 0)
    if heads % settings.ulysses_degree:
        told = f"the model has {heads} heads of attention, which {settings.ulysses_degree} GPUs cannot share evenly"
        raise SettingsError(f"{degree(settings)}: {told}.", degree(settings))


def degree(settings: Settings) -> str:
    """The variable that asks for several GPUs."""
    return f"KINDLING_{'RING' if settings.ulysses_degree == 1 else 'ULYSSES'}_DEGREE"


def refusal(recipe: Recipe, settings: Settings) -> KindlingError | None:
    """Why the ranks cannot draw `recipe`: with both ways at once diffusers splits evenly only."""
    tokens = (recipe.size[0] // 16) * (recipe.size[1] // 16)
    if min(settings.ring_degree, settings.ulysses_degree) == 1 or tokens % settings.ranks == 0:
        return None
    told = f"width / 16 x height / 16 has to be a multiple of {settings.ranks} here"
    return OutOfRange(f"size: {told}, for {settings.ranks} GPUs draw each picture.", "size")
