"""GPUs on platforms whose prices are not kept here: a row each, with what they are called there and the host's memory.

Their prices are the cloud's, or nobody's but yours.
"""

from collections.abc import Mapping

from handler.catalog.gpus import GPUS, TARIFFS, Gpu, Rental

ANY = {row.id: Rental((row.id,)) for row in GPUS.values()}  # a machine or a cluster of one's own
ELSEWHERE: Mapping[str, Mapping[str, Rental]] = {
    # cloud.google.com/run/docs/configuring/services/gpu, read in 2026-11: an L4 wants at least 4 CPUs and 16 GiB, an
    # RTX PRO 6000 20 and 80 GiB. Memory is what platform/cloudrun.yml asks for, beside 8 or 20 CPUs.
    "cloudrun": {
        "L4": Rental(("nvidia-l4",), None, 34.3, driver=535),
        "RTX PRO 6000": Rental(("nvidia-rtx-pro-6000",), None, 85.8, driver=580),
    },
    # Nodes of AWS with one GPU: g5.xlarge and g6.xlarge, of 16 GB by pkg/billing/prices.go of convox/convox, 2026-06,
    # and g6e.2xlarge; of their memory what a service can have.
    "convox": {
        "L4": Rental(("L4",), None, 14.3),
        "A10G": Rental(("A10G",), None, 14.3),
        "L40S": Rental(("L40S",), None, 40.9),
    },
    # By catalogs/v8/common/accelerators.csv of skypilot-org/skypilot-catalog and sky/catalog of skypilot 0.14.1, both
    # read in 2026-11; how much memory the host shall have is asked for.
    "sky": {
        name: Rental((name.replace("A100 40GB", "A100").replace(" ", "-"),))
        for name in ("T4", "L4", "A10", "A10G", "L40S", "A100 40GB", "A100 80GB", "H100", "H200", "B200")
    },
    "kubernetes": ANY,
    "docker": ANY,
}
PLATFORMS = (*TARIFFS, *ELSEWHERE)


def rentals_on(platform: str) -> list[tuple[Gpu, Rental]]:
    """The GPUs of a platform, the cheapest first as far as that is known; KeyError if nobody knows the platform."""
    if platform in TARIFFS:
        return [(row, row.rentals[platform]) for row in GPUS.values() if platform in row.rentals]
    known = ELSEWHERE[platform]
    return [(row, known[row.id]) for row in GPUS.values() if row.id in known]
