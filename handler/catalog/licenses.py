"""The models' licences: what using a model obliges you to."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class License:
    """`commercial`: a business may use it, as the obligation says. `gated`: the hub wants it accepted first."""

    id: str
    name: str
    commercial: bool
    obligation: str
    gated: bool = False


MIT = License(
    "mit", "MIT License", commercial=True, obligation="Keep the licence text; made by Kindling and shipped with it."
)
APACHE = License(
    "apache-2.0", "Apache License 2.0", commercial=True, obligation="Keep the licence text; commercial use is fine."
)
APACHE_GATED = replace(APACHE, gated=True)
FLUX_1_DEV = License(
    "flux-1-dev-non-commercial",
    "FLUX.1 [dev] Non-Commercial License 1.0.1",
    commercial=False,
    obligation="Non-commercial use only: running it in a business needs a licence from Black Forest Labs.",
    gated=True,
)
FLUX_2_DEV = License(
    "flux-non-commercial",
    "FLUX Non-Commercial License",
    commercial=False,
    obligation="Non-commercial use only: running it in a business needs a licence from Black Forest Labs.",
    gated=True,
)
STABILITY = License(
    "stabilityai-community",
    "Stability AI Community License",
    commercial=True,
    obligation="Free up to 1 million USD of yearly revenue; above that it needs Stability AI's enterprise licence.",
)
STABILITY_GATED = replace(STABILITY, gated=True)
OPENRAIL = License(
    "openrail++",
    "CreativeML Open RAIL++-M License",
    commercial=True,
    obligation="Commercial use is fine; pass its use restrictions (attachment A) on to your users.",
)
OPENRAIL_M = License(
    "creativeml-openrail-m",
    "CreativeML Open RAIL-M License",
    commercial=True,
    obligation="Commercial use is fine; pass its use restrictions (attachment A) and its text on to your users.",
)
