"""Prices by torch's names of GPUs: the right row, the override, and no guess where nothing is published."""

import pytest

from handler.catalog.gpus import GPUS, HOUR, TARIFFS, gpu_named
from handler.catalog.prices import Price, per_image, price_of


@pytest.mark.parametrize(
    ("platform", "name", "chip"),
    [
        ("modal", "Tesla T4", "T4"),
        ("modal", "NVIDIA L4", "L4"),
        ("modal", "NVIDIA A10", "A10"),
        ("modal", "NVIDIA A10G", "A10G"),
        ("modal", "NVIDIA L40S", "L40S"),
        ("modal", "NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("modal", "NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("modal", "NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("modal", "NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("modal", "NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000"),
        ("modal", "NVIDIA H100 80GB HBM3", "H100"),
        ("runpod", "NVIDIA H100 NVL", "H100"),
        ("runpod", "NVIDIA L40", "L40"),
        ("runpod", "NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("runpod", "NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("runpod", "NVIDIA RTX A6000", "RTX A6000"),
        ("runpod", "NVIDIA H200", "H200"),
        ("runpod", "NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000"),
        ("fal", "NVIDIA H200", "H200"),
        ("fal", "NVIDIA B200", "B200"),
    ],
)
def test_torchs_name_finds_its_row(platform: str, name: str, chip: str) -> None:
    found = price_of(name, platform)
    assert found.dollars_per_s == GPUS[chip].rentals[platform].dollars_per_s
    assert found.reason.startswith(f"{chip} at ")
    assert TARIFFS[platform].date in found.reason


@pytest.mark.parametrize(
    ("platform", "name", "why"),
    [
        ("runpod", "CPU", "CPU"),
        ("other", "NVIDIA H200", "outside runpod, modal, fal"),
        ("modal", "NVIDIA GeForce RTX 5090", "no price of NVIDIA GeForce RTX 5090"),
        ("runpod", "NVIDIA A100-SXM4-40GB", "no price"),
        ("modal", "NVIDIA GH200 480GB", "no price"),
        ("runpod", "NVIDIA RTX 2000 Ada Generation", "no price"),
        ("fal", "NVIDIA H100 80GB HBM3", "no price"),
    ],
)
def test_no_published_price_is_no_price_and_says_what_to_set(platform: str, name: str, why: str) -> None:
    found = price_of(name, platform)
    assert found.dollars_per_s is None
    assert why in found.reason
    assert "KINDLING_GPU_PRICE" in found.reason


@pytest.mark.parametrize("name", ["CPU", "NVIDIA H200"])
def test_the_override_wins_everywhere_even_when_it_is_nothing(name: str) -> None:
    assert price_of(name, "runpod", 3.6) == Price(0.001, "KINDLING_GPU_PRICE=3.6 dollars an hour")
    assert price_of(name, "other", 0).dollars_per_s == 0


def test_rows_are_told_apart_and_plausible() -> None:
    for gpu in GPUS.values():
        assert gpu_named(gpu.name) == gpu
        for platform, rental in gpu.rentals.items():
            assert price_of(gpu.name, platform).dollars_per_s == rental.dollars_per_s
            assert rental.dollars_per_s is None or 0.3 < rental.dollars_per_s * HOUR < 10


@pytest.mark.parametrize("platform", TARIFFS)
def test_rows_stand_in_order_of_price(platform: str) -> None:
    rentals = [gpu.rentals[platform] for gpu in GPUS.values() if platform in gpu.rentals]
    prices = [rental.dollars_per_s for rental in rentals if rental.dollars_per_s is not None]
    assert len(prices) >= 3
    assert prices == sorted(prices)
    assert len(names := [name for rental in rentals for name in rental.names]) == len(set(names))


def test_every_name_that_a_platform_has_is_the_gpu_of_its_row() -> None:
    """RunPod's are the driver's; a worker on what was rented finds the price and the memory it was rented for."""
    for gpu in GPUS.values():
        for name in gpu.rentals["runpod"].names if "runpod" in gpu.rentals else ():
            assert gpu_named(name) == gpu


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA H200 MIG 1g.18gb+me",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA RTX A5000 Laptop GPU",
        "NVIDIA A40-8Q",
        "NVIDIA A10-12Q",
        "NVIDIA A100-20C",
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        "NVIDIA H100 NVL MIG 4g.47gb",
        "NVIDIA H100 MIG",
        "NVIDIA L40S-2B",
        "NVIDIA A100-1-5C",
    ],
)
def test_what_is_less_than_a_card_is_not_the_card(name: str) -> None:
    """Nor does it cost as much."""
    assert gpu_named(name) is None
    assert price_of(name, "runpod").dollars_per_s is None


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA A40-48Q", "A40"),
        ("NVIDIA A10-24Q", "A10"),
        ("GRID T4-16C", "T4"),
        ("NVIDIA A100-7-40C", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB MIG 7g.80gb", "A100 80GB"),
        ("NVIDIA H100 NVL MIG 7g.94gb", "H100"),
        ("NVIDIA H200 MIG 7g.141gb", "H200"),
    ],
)
def test_a_share_that_is_all_of_a_card_is_the_card(name: str, card: str) -> None:
    assert gpu_named(name) == GPUS[card]


def test_a_picture_costs_its_seconds() -> None:
    assert per_image(0.5, Price(0.002, "")) == 0.001
    assert per_image(0.5, Price(None, "")) is None
