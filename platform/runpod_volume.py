"""RunPod's network volumes: which one is meant, what it costs, and a new one where that is asked for."""

import math
import sys
from dataclasses import dataclass
from typing import Any

import httpx2

from handler import ModelSpec
from runpod_api import RefusedError, ask

SIZES_GB = (10, 4096)  # of a volume, by RunPod's API
DOLLARS_GB = ((1000, 0.07), (SIZES_GB[1], 0.05))  # a month for each GB up to there: docs.runpod.io, August 2026
BYTES = 2  # of a weight, as published


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model shall lie: a volume's name or id, and, to create one, its size and data center."""

    name: str
    size_gb: int | None = None
    data_centers: tuple[str, ...] = ()

    @property
    def ordered(self) -> bool:
        """Whether it is described so that it can be created."""
        return self.size_gb is not None and len(self.data_centers) == 1

    @property
    def body(self) -> dict[str, Any]:
        """What RunPod is told to create."""
        return {"name": self.name, "size": self.size_gb, "dataCenter": self.data_centers[0]}


def price(size_gb: int) -> str:
    """What a volume costs, in words."""
    dollars, below = 0.0, 0
    for until, each in DOLLARS_GB:
        dollars += each * max(0, min(size_gb, until) - below)
        below = until
    return f"{size_gb} GB cost about ${dollars:.2f} a month, filled or not, until the volume is deleted"


def found(client: httpx2.Client, place: Place, spec: ModelSpec, baked: float = 0) -> dict[str, Any]:
    """The volume that has this id, else this name; empty if one may be created. RefusedError where none is meant.

    `baked` are the GB of rounded weights that are to be written to it, too.
    """
    rows = ask(client, "GET", "network-volumes")["networkVolumes"]
    same = [row for row in rows if row["id"] == place.name] or [row for row in rows if row["name"] == place.name]
    if len(same) > 1:
        ids = ", ".join(row["id"] for row in same)
        raise RefusedError(f"RunPod has {len(same)} network volumes named {place.name}: say which by id, of {ids}.")
    if not same:
        require_order(place, spec, baked)
        return {}
    [row] = same
    if baked and row["size"] < (least := _least(spec, baked)):
        told = f"{place.name} has {row['size']} GB, and what is fetched and baked takes {least}: make it larger"
        raise RefusedError(f"{told}, or leave out --fill.")
    if place.data_centers and row["dataCenter"] not in place.data_centers:
        raise RefusedError(
            f"The volume {place.name} is in {row['dataCenter']}, where workers and pods must be to mount it: leave out "
            "--data-center, or name that one."
        )
    return dict(row)


def require_order(place: Place, spec: ModelSpec, baked: float = 0) -> None:
    """Refuse to create a volume that is not wholly described, or cannot hold the model's files and what is baked."""
    least = _least(spec, baked)
    if not place.ordered:
        raise RefusedError(
            f"There is no network volume {place.name}. To create it, add --size and one --data-center, such as "
            f"--size {least + 20} --data-center EU-RO-1: {price(least + 20)}."
        )
    if (place.size_gb or 0) < least:
        more = f", and with what is baked {least}" if baked else ""
        told = f"--size {place.size_gb} does not hold {spec.id}, whose files take {_least(spec, 0)} GB{more}."
        raise RefusedError(told)


def _least(spec: ModelSpec, baked: float) -> int:
    """GB of a volume for the model's files and what is baked."""
    return max(SIZES_GB[0], math.ceil(BYTES * (spec.parameters + spec.other_parameters) / 1e9 + baked))


def created(client: httpx2.Client, place: Place) -> dict[str, Any]:
    """A new volume, whose price is said before it is bought: who then stops this has read it."""
    print(f"creating {place.name} in {place.data_centers[0]}: {price(place.size_gb or 0)}.", file=sys.stderr)
    row = dict(ask(client, "POST", "network-volumes", place.body))
    print(f"created in network-volumes: {row['name']} ({row['id']})", file=sys.stderr)
    return row
