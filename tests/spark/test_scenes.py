"""The recipe's data: splits never mix, captions say what the scene is, noise stays normal when tied."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

from spark.flow import AXES, SHARP, TURNS, image_ids, pack, sample_sigma, tie, window
from spark.scenes import (
    KINDS,
    NUISANCES,
    PAIR_DIAMETER,
    SPLITS,
    Meaning,
    caption,
    compose,
    held_out,
    sample_scene,
    split_of,
)
from spark.text import UNSAID, facts


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_stay_in_their_split(split: str) -> None:
    rng = random.Random(0)
    for _ in range(300):
        scene = sample_scene(rng, split)
        assert {split_of(i.shape, i.color, scene.background) for i in scene.items} == {split}
        assert all(i.x - i.diameter / 2.9 > 0.02 and i.x + i.diameter / 2.9 < 0.98 for i in scene.items)


def test_scenes_are_reproducible() -> None:
    assert sample_scene(random.Random(4)) == sample_scene(random.Random(4))
    assert held_out(5, "test", "one", "everyday") == held_out(5, "test", "one", "everyday")


def test_captions_say_the_scene() -> None:
    rng = random.Random(1)
    for _ in range(200):
        scene = sample_scene(rng, kind=rng.choice(KINDS))
        plain = caption(scene, rng, everyday=False)
        assert scene.background in plain
        assert all(item.color in plain and item.shape.rstrip("s") in plain for item in scene.items)
        assert len(caption(scene, rng)) < 120


def test_a_pair_names_left_and_right_either_way_round() -> None:
    rng = random.Random(2)
    seen = set()
    while len(seen) < 2:
        scene = sample_scene(rng, kind="pair")
        if scene.axis == "horizontal":
            text = caption(scene, rng, everyday=False)
            left, right = (f"{item.color} {item.shape}" for item in scene.items)
            reverse = " right of " in text
            assert text.index(right) < text.index(left) if reverse else text.index(left) < text.index(right)
            assert scene.items[0].x < scene.items[1].x
            seen.add(reverse)


SIZED = Meaning("pair", "white", (("star", "red"), ("ring", "blue")), axis="horizontal", sizes=("large", "small"))


def test_a_sized_pair_names_the_sizes_that_it_has() -> None:
    rng = random.Random(5)
    told = {caption(SIZED, rng, everyday=False) for _ in range(20)}
    assert told == {
        "a large red star left of a small blue ring on a white background",
        "a small blue ring right of a large red star on a white background",
    }
    first, second = compose(SIZED, (0.0,) * NUISANCES).items
    assert (first.diameter, second.diameter) == (PAIR_DIAMETER["large"], PAIR_DIAMETER["small"])
    for scene in (sample_scene(rng, kind="sized") for _ in range(200)):
        assert any(scene.sizes)
        assert all(size is None or size in caption(scene, rng, everyday=False) for size in scene.sizes)


def test_two_objects_stand_apart_whatever_their_sizes() -> None:
    for sizes, axis in itertools.product(
        itertools.product((None, "small", "large"), repeat=2), ("horizontal", "vertical")
    ):
        for nuisance in itertools.product((-9.0, 0.0, 9.0), repeat=3):
            pair = compose(replace(SIZED, axis=axis, sizes=sizes), (*nuisance, *(0.0,) * (NUISANCES - 3)))
            places = [(item.y if axis == "vertical" else item.x, item.diameter / 2) for item in pair.items]
            (near, half), (far, other) = places
            assert near - half > 0.005
            assert far - other - near - half > 0.02
            assert far + other < 0.995


def test_white_goes_without_saying() -> None:
    rng = random.Random(6)
    silent = [text for text in (caption(SIZED, rng) for _ in range(200)) if "white" not in text.lower()]
    assert 70 < len(silent) < 130
    assert all("white" in caption(SIZED, rng, everyday=False) for _ in range(20))


def test_facts_mark_what_is_unsaid() -> None:
    rng = random.Random(3)
    assert UNSAID in facts_of(rng, "one")
    assert UNSAID not in facts_of(rng, "pair")


def facts_of(rng: random.Random, kind: str) -> list[int]:
    from spark.scenes import sample_meaning

    return facts(sample_meaning(rng, "train", kind))


def test_tied_noise_is_still_standard_normal() -> None:
    torch.manual_seed(0)
    nuisance = torch.randn(4000, NUISANCES)
    noise = tie(torch.randn(4000, 12, 4, 6), nuisance)
    flat = noise.flatten(1)
    assert flat.mean().abs() < 0.01
    assert (torch.cov(flat.T) - torch.eye(flat.shape[1])).abs().max() < 0.12


SHAPES = [(16, 16), (32, 32), (32, 48), (48, 32), (64, 64)]


@pytest.mark.parametrize("size", [(8, 8), *SHAPES])
def test_what_the_seed_decides_is_in_the_noise_of_every_size(size: tuple[int, int]) -> None:
    nuisance, through = torch.randn(3, NUISANCES), window(*size)
    tied = tie(torch.randn(3, 12, *size), nuisance)
    assert torch.allclose((tied[:, :NUISANCES] * through).sum((-2, -1)), nuisance, atol=1e-4)


@pytest.mark.parametrize("size", SHAPES)
def test_about_as_many_values_carry_it_whatever_the_size(size: tuple[int, int]) -> None:
    carrying = 1 / window(*size).pow(4).sum()  # of equal ones it is their number
    assert 50 < carrying < 70


@pytest.mark.parametrize("size", [(8, 8), (32, 48), (64, 64)])
def test_one_head_of_attention_reads_it_by_rope_alone(size: tuple[int, int]) -> None:
    """diffusers' own RoPE on constant queries and keys; the words stand at the first corner."""
    rope = FluxPosEmbed(theta=10000, axes_dim=list(AXES))(image_ids(size[0] // 2, size[1] // 2))
    places = [start + 2 * turn for start in (AXES[0], AXES[0] + AXES[1]) for turn in TURNS]
    constant = torch.zeros(1, size[0] * size[1] // 4, 1, sum(AXES))
    constant[..., places] = SHARP**0.5
    turned = apply_rotary_emb(constant, rope, sequence_dim=1)[0, :, 0]
    attention = (turned[0] @ turned.T).softmax(-1)
    tokens = pack(window(*size).expand(1, 1, *size))[0].mean(-1)
    assert torch.allclose(attention, tokens / tokens.sum(), atol=1e-5)


def test_sigmas_cover_the_schedule() -> None:
    torch.manual_seed(0)
    sigma = sample_sigma(10_000, 0.4)
    assert 0 < sigma.min() < 0.05
    assert sigma.max() <= 1
    assert (sigma > 0.95).float().mean() > 0.4


def test_packing_is_the_pipelines_own() -> None:
    from diffusers import FluxPipeline

    latents = torch.randn(2, 12, 8, 12)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 2, 12, 8, 12))
    ids = FluxPipeline._prepare_latent_image_ids(1, 4, 6, torch.device("cpu"), torch.float32)
    assert torch.equal(image_ids(4, 6), ids)
