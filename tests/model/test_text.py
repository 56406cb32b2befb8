"""Prompts read as ComfyUI reads them: compared with transformers by hand, and with diffusers where both agree."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tiny
from handler import MODELS, ImageRequest, Worker
from handler.core.errors import InvalidValue, OutOfRange, Unsupported
from handler.core.reading import Reading, Sizes, Words
from handler.core.recipe import Recipe
from handler.core.sampling import Sampling
from handler.model import families
from handler.model.text import prompts
from handler.model.text.chunks import MOST, MOST_TOKENS, Vocabulary
from handler.model.text.encoders import CLIP_G, clip
from handler.model.text.pieces import DEEPEST, Piece, pieces, plain
from handler.volume.embeddings import chosen

LONG = ", ".join(["a red circle on a blue background"] * 12)
UNGUIDED = ("flux2-dev", "flux2-klein")
ONE_OF_EACH = {spec.family: spec for spec in MODELS.values() if not spec.embedded}.values()


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("", []),
        ("a red circle", [("a red circle", 1.0)]),
        ("(red:1.4) circle [small]", [("red", 1.4), (" circle [small]", 1.0)]),
        ("((a (red:1.3)))", [("a ", 1.1 * 1.1), ("red", 1.3)]),
        ("(a)(b:0.5)", [("a", 1.1), ("b", 0.5)]),
        ("(a:b:1.2)", [("a:b", 1.2)]),
        ("(a: -1 )", [("a", -1.0)]),
        ("(a:high)", [("a:high", 1.1)]),
        ("(a:nan) (a:inf)", [("a:nan", 1.1), (" ", 1.0), ("a:inf", 1.1)]),
        ("(:1.2)", [(":1.2", 1.1)]),
        (r"a \(b\) (c\):2)", [("a (b) ", 1.0), ("c)", 2.0)]),
        ("(a", [("(a", 1.0)]),
        ("(a(b)", [("a", 1.1), ("(b", 1.1)]),
        ("a) (b:2)", [("a) (b:2)", 1.0)]),
        ("()", []),
    ],
)
def test_weights(prompt: str, wanted: list[tuple[str, float]]) -> None:
    assert [(piece.text, piece.weight) for piece in pieces(prompt)] == wanted


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("embedding:ink", [Piece("ink", embedding=True)]),
        ("a embedding:ink, b", [Piece("a"), Piece("ink", embedding=True), Piece(", b")]),
        ("(embedding:styles/ink:1.2) b", [Piece("styles/ink", 1.2, embedding=True), Piece(" b")]),
        ("a\nembedding:ink  b  c", [Piece("a"), Piece("ink", embedding=True), Piece("b c")]),
        ("a,embedding:ink", [Piece("a,embedding:ink")]),
        ("Embedding:ink", [Piece("Embedding:ink")]),
    ],
)
def test_embeddings_are_named(prompt: str, wanted: list[Piece]) -> None:
    assert pieces(prompt) == wanted


@pytest.mark.parametrize(
    "prompt",
    ["(" * (DEEPEST + 1) + "a" + ")" * (DEEPEST + 1), "(" * 16_000 + ")" * 16_000, "a embedding:", "embedding:,"],
)
def test_what_cannot_be_read_is_refused(prompt: str) -> None:
    with pytest.raises(InvalidValue, match="prompt: "):
        pieces(prompt)


def test_as_deep_as_may_be() -> None:
    assert pieces("(" * DEEPEST + "a" + ")" * DEEPEST)[0].weight == pytest.approx(1.1**DEEPEST)


def test_a_language_model_is_told_brackets() -> None:
    assert plain(r"(a:1.2) \(b\) [c]") == "(a:1.2) (b) [c]"


@cache
def words() -> Vocabulary:
    return Vocabulary(tiny.clip_tokenizer(), pad=0, window=77)


def numbers(prompt: str) -> list[list[int]]:
    return [[token for token, _ in chunk] for chunk in words().chunks(pieces(prompt), {})]


def test_chunks_are_whole() -> None:
    [short] = numbers("a red circle")
    tokens = tiny.clip_tokenizer()("a red circle")["input_ids"]
    assert short == tokens + [0] * (77 - len(tokens))
    found = numbers(LONG)
    assert len(found) > 1
    assert {len(chunk) for chunk in found} == {77}
    assert {chunk[0] for chunk in found} == {1025}
    assert [chunk.index(1026) for chunk in found[:-1]] == [76] * (len(found) - 1)
    inside = [token for chunk in found for token in chunk[1 : chunk.index(1026)]]
    assert inside == tiny.clip_tokenizer()(LONG, verbose=False)["input_ids"][1:-1]


def test_a_short_piece_is_not_divided() -> None:
    """Where it does not fit, the chunk ends before it; one of eight tokens and more is divided there."""
    count = len(words().tokenizer("circle", add_special_tokens=False)["input_ids"])
    room = 75 // count * count
    before = " ".join(["circle"] * (room // count))
    assert room <= 75 < room + 2 * count < room + 8
    short, long = (numbers(f"{before}(circle{' circle' * more}:1.2)") for more in (1, 9))
    assert (short[0].index(1026), long[0].index(1026)) == (room + 1, 76)
    assert short[0][room + 2 :] == [0] * (75 - room)


def test_as_many_chunks_as_may_be() -> None:
    one = numbers("circle")[0].index(1026) - 1
    assert len(numbers(" ".join(["circle"] * (75 * MOST // one)))) == MOST
    with pytest.raises(OutOfRange, match=f"it may have {MOST}, not"):
        numbers("a " * 16_000)
    with pytest.raises(OutOfRange, match=f"it may have {MOST_TOKENS} tokens"):
        Vocabulary(tiny.t5_tokenizer(), 0, least=256).chunks(pieces("a " * 16_000), {})


@cache
def pipeline(model: str) -> Any:
    return tiny.build(MODELS[model])


def recipe(model: str, prompt: str = "a red circle", cfg: float = 7.0, reading: Any = None, **fields: Any) -> Recipe:
    """With the values of a `Reading`; none for diffusers' reading."""
    asked = MODELS[model].recipe(ImageRequest(prompt="x", width=64, height=64))
    read = None if reading is None else Reading(**reading)
    return replace(asked, prompt=prompt, sampling=Sampling(cfg=cfg), reading=read, **fields)


def told(model: str, *args: Any, tokens: int | None = None, **fields: Any) -> dict[str, Any]:
    spec, family = MODELS[model], importlib.import_module(MODELS[model].family)
    with torch.inference_mode():
        found: dict[str, Any] = family.encode(
            pipeline(model), recipe(model, *args, **fields), tokens or spec.text_tokens
        )
    return found


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


@pytest.mark.parametrize("model", ["sd1.5", "sdxl", "flux-dev"])
@pytest.mark.parametrize("negative", ["", "blurry"])
def test_a_short_plain_prompt_is_what_diffusers_reads(model: str, negative: str) -> None:
    """To the bit; FLUX where diffusers is told ComfyUI's 256 tokens."""
    plainly = told(model, negative_prompt=negative, tokens=256)
    read = told(model, negative_prompt=negative, tokens=256, reading={})
    assert plainly.keys() == read.keys()
    assert [name for name in read if not same(read[name], plainly[name])] == []


def test_spark_reads_as_ever(spark: Worker) -> None:
    """Its T5 has as many tokens as it was trained with, so its pictures are the same."""
    asked = spark.spec.recipe(ImageRequest(prompt="three yellow stars on a purple background", seed=7))
    read = replace(asked, reading=Reading())
    assert (spark.generate(read)[0].rgb == spark.generate(asked)[0].rgb).all()
    assert spark.generate(replace(read, prompt=LONG))[0].rgb.any()


def hidden(model: str, prompt: str, place: str = "", **options: Any) -> Any:
    """What transformers gives for one chunk."""
    parts = pipeline(model)
    tokenizer = getattr(parts, f"tokenizer{place}")
    ids = tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        return getattr(parts, f"text_encoder{place}")(ids, output_hidden_states=True, **options)


def test_weights_go_on_from_the_empty_prompt() -> None:
    words, empty = (hidden("sd1.5", prompt).last_hidden_state for prompt in ("red circle", ""))
    count = len(tiny.clip_tokenizer()("red", add_special_tokens=False)["input_ids"])
    wanted = words.clone()
    wanted[:, 1 : 1 + count] = empty[:, 1 : 1 + count] + 1.5 * (words - empty)[:, 1 : 1 + count]
    torch.testing.assert_close(told("sd1.5", "(red:1.5) circle", reading={})["prompt_embeds"], wanted)
    torch.testing.assert_close(told("sd1.5", "(red:1.0) circle", reading={})["prompt_embeds"], words)


def test_chunks_are_read_one_by_one_and_the_first_is_pooled() -> None:
    chunks = numbers(LONG)
    read = told("sdxl", LONG, reading={})
    model = pipeline("sdxl").text_encoder_2
    with torch.inference_mode():
        each = [model(torch.tensor([_padded(chunk)]), output_hidden_states=True) for chunk in chunks]
    assert read["prompt_embeds"].shape == (1, 77 * len(chunks), tiny.CLIP_L + tiny.CLIP_G)
    wanted = torch.cat([one.hidden_states[-2] for one in each], dim=1)
    torch.testing.assert_close(read["prompt_embeds"][..., tiny.CLIP_L :], wanted)
    torch.testing.assert_close(read["pooled_prompt_embeds"], each[0].text_embeds)


def _padded(chunk: list[int]) -> list[int]:
    """The tiny tokenizers both fill with the end."""
    end = chunk.index(1026)
    return chunk[:end] + [1026] * (77 - end)


def test_clip_skip_has_a_norm_in_stable_diffusion_1() -> None:
    encoder, found = pipeline("sd1.5").text_encoder, hidden("sd1.5", "a red circle")
    norm = getattr(encoder, "text_model", encoder).final_layer_norm
    with torch.inference_mode():
        wanted = {-1: found.last_hidden_state, -2: norm(found.hidden_states[-2]), -24: found.last_hidden_state}
    for skip, states in wanted.items():
        torch.testing.assert_close(told("sd1.5", reading={"clip_skip": skip})["prompt_embeds"], states)
    torch.testing.assert_close(told("sd1.5", reading={})["prompt_embeds"], wanted[-1])


def test_clip_skip_has_none_in_xl() -> None:
    left, right = (hidden("sdxl", "a red circle", place) for place in ("", "_2"))
    for skip in (None, -1, -2):
        wanted = torch.cat([one.hidden_states[skip or -2] for one in (left, right)], dim=-1)
        torch.testing.assert_close(told("sdxl", reading={"clip_skip": skip})["prompt_embeds"], wanted)
    wanted = torch.cat([left.last_hidden_state, right.last_hidden_state], dim=-1)
    torch.testing.assert_close(told("sdxl", reading={"clip_skip": -3})["prompt_embeds"], wanted)


def test_the_negative_prompt() -> None:
    """An empty one is encoded, as is none; zeros are zeros, the pooled output too; without guidance there is none."""
    empty = told("sdxl", "", reading={})
    unsaid, zeros, none = (
        told("sdxl", reading=reading, cfg=cfg, negative_prompt=None)
        for reading, cfg in (({}, 7.0), ({"zeros": True}, 7.0), ({}, 1.0))
    )
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        assert torch.equal(unsaid[f"negative_{name}"], empty[name])
        assert torch.equal(zeros[f"negative_{name}"], torch.zeros_like(zeros[name]))
        assert none[f"negative_{name}"] is None
    assert (unsaid["guidance_scale"], none["guidance_scale"]) == (7.0, 1.0)


def test_sides_of_different_length_are_repeated() -> None:
    found = told("sd1.5", LONG, negative_prompt="blurry", reading={})
    chunks, alone = len(numbers(LONG)), told("sd1.5", "blurry", reading={})["prompt_embeds"]
    assert torch.equal(found["negative_prompt_embeds"], alone.repeat(1, chunks, 1))
    one, other = prompts.repeated(torch.rand(1, 154, 2), torch.rand(1, 231, 2))
    assert other is not None
    assert one.shape[1] == other.shape[1] == 462
    with pytest.raises(OutOfRange, match="too long together"):
        prompts.repeated(torch.rand(1, 77 * 63, 2), torch.rand(1, 77 * 64, 2))


def test_encoders_may_have_prompts_of_their_own() -> None:
    """The one with fewer chunks has empty ones more."""
    both = told("sdxl", reading={"prompts": Words(l="blue", g=LONG)})
    left, empty, right = (told("sdxl", prompt, reading={})["prompt_embeds"] for prompt in ("blue", "", LONG))
    assert torch.allclose(both["prompt_embeds"][:, :77, : tiny.CLIP_L], left[..., : tiny.CLIP_L])
    assert torch.allclose(both["prompt_embeds"][:, 77:154, : tiny.CLIP_L], empty[..., : tiny.CLIP_L], atol=1e-6)
    assert torch.allclose(both["prompt_embeds"][..., tiny.CLIP_L :], right[..., tiny.CLIP_L :])


def test_xl_is_told_sizes() -> None:
    assert not [name for name in told("sdxl", reading={}) if "size" in name]
    sizes = Sizes(width=1, height=2, crop_w=3, crop_h=4, target_width=5, target_height=6)
    found = told("sdxl", reading={"sizes": sizes})
    assert (found["original_size"], found["crops_coords_top_left"], found["target_size"]) == ((2, 1), (4, 3), (6, 5))
    assert found["negative_original_size"] == found["negative_target_size"] == (64, 64)
    assert found["negative_crops_coords_top_left"] == (0, 0)


def test_exclamation_marks_are_words_to_clip_g_too() -> None:
    """Its own tokenizer fills with them, and so takes each for one of those."""
    tokenizer = tiny.clip_tokenizer()
    [mark] = tokenizer("!", add_special_tokens=False)["input_ids"]
    parts = pipeline("sdxl")
    tokenizer_2 = tiny.clip_tokenizer()
    tokenizer_2.pad_token = "!"
    both = replace_parts(parts, tokenizer_2=tokenizer_2)
    encoder = clip(both, "_2", CLIP_G)
    [chunk] = encoder.vocabulary.chunks(pieces("hey!"), {})
    assert chunk[1:-1][: chunk.index((1026, 1.0)) - 1][-1][0] == mark
    assert chunk[-1][0] == tokenizer_2.pad_token_id != mark


def replace_parts(parts: Any, **others: Any) -> Any:
    found = type("Parts", (), {})()
    vars(found).update({**parts.components, "_execution_device": torch.device("cpu")} | others)
    return found


def test_flux_has_256_tokens_of_t5_and_more_where_there_are_more() -> None:
    assert told("flux-dev", reading={})["prompt_embeds"].shape[1] == 256
    assert told("flux-dev", reading={}, tokens=32)["prompt_embeds"].shape[1] == 32
    long = told("flux-dev", " ".join([LONG] * 6), negative_prompt="blurry", reading={})
    tokens = len(tiny.t5_tokenizer()(" ".join([LONG] * 6))["input_ids"])
    assert long["prompt_embeds"].shape[1] == long["negative_prompt_embeds"].shape[1] == tokens > 512
    assert torch.equal(long["pooled_prompt_embeds"], told("flux-dev", LONG, reading={})["pooled_prompt_embeds"])


def test_flux_words_have_weights_and_a_second_guidance() -> None:
    plainly, heavy = (told("flux-dev", text, reading={}) for text in ("a red circle", "a (red:1.5) circle"))
    assert not torch.allclose(plainly["prompt_embeds"], heavy["prompt_embeds"])
    assert (heavy["true_cfg_scale"], heavy["guidance_scale"]) == (7.0, MODELS["flux-dev"].guidance)
    assert told("flux-dev", reading={}, cfg=1.0)["negative_prompt_embeds"] is None


@pytest.mark.parametrize("model", UNGUIDED)
def test_guidance_that_a_pipeline_lacks_is_refused(model: str) -> None:
    with pytest.raises(Unsupported, match=f"{model} is distilled, and its pipeline has no classifier-free guidance"):
        told(model, cfg=1.5)


def test_language_models_read_plain_text() -> None:
    """Brackets too; an empty negative prompt is empty, not the space that is the model's own way."""
    bare, read = (told("qwen-image", text, reading=read) for text, read in (("(a:2)", None), (r"\(a:2\)", {})))
    assert torch.equal(bare["prompt_embeds"], read["prompt_embeds"])
    assert bare["negative_prompt_embeds"].shape != read["negative_prompt_embeds"].shape
    with pytest.raises(Unsupported, match="leave clip_skip out"):
        told("qwen-image", reading={"clip_skip": -2})


def test_prompts_of_z_image_that_would_need_a_mask_are_drawn_apart() -> None:
    """Its transformer fills each up to 32 tokens; of other lengths it needs a mask."""
    few, more, many = (told("z-image-turbo", " ".join(["hat"] * words)) for words in (1, 5, 60))
    lengths = [len(one) for each in (few, more, many) for one in each["prompt_embeds"]]
    assert lengths[0] < lengths[1] <= 32 < lengths[2]
    assert families.fitting({0: few, 1: more, 2: many}) == [0, 1]
    assert families.fitting({2: many, 1: more}) == [2]


def test_z_image_is_told_by_how_much_to_go_beyond() -> None:
    assert told("z-image-turbo", cfg=3.0)["guidance_scale"] == 2.0
    assert told("z-image-turbo", cfg=1.0)["guidance_scale"] == 0.0


def test_chroma_has_the_words_alone() -> None:
    """What fills the shorter side counts for nothing."""
    found = told("chroma", LONG, negative_prompt="red", reading={})
    counts = [len(tiny.t5_tokenizer()(text)["input_ids"]) for text in (LONG, "red")]
    assert found["prompt_embeds"].shape[1] == found["negative_prompt_embeds"].shape[1] == max(counts)
    masks = found["prompt_attention_mask"], found["negative_prompt_attention_mask"]
    assert [int((mask > 0).sum()) for mask in masks] == counts
    alone = told("chroma", "red", negative_prompt="", reading={})
    filled, bare = (
        _velocity(side[f"{name}_embeds"], side[f"{name}_attention_mask"])
        for side, name in ((found, "negative_prompt"), (alone, "prompt"))
    )
    assert torch.allclose(filled, bare, atol=1e-5)
    square = masks[1].half()[:, None] * masks[1].half()[:, :, None]  # as diffusers makes a mask of it
    assert square.isfinite().all()


@torch.inference_mode()
def _velocity(context: Tensor, mask: Tensor) -> Tensor:
    """What Chroma's transformer answers to these words."""
    chroma = pipeline("chroma")
    latents = torch.randn(1, 16, chroma.transformer.config.in_channels, generator=torch.Generator().manual_seed(0))
    velocity: Tensor = chroma.transformer(
        hidden_states=latents,
        encoder_hidden_states=context,
        timestep=torch.tensor([0.5]),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(context.shape[1], 3),
        attention_mask=chroma._prepare_attention_mask(1, 16, latents.dtype, mask),
        return_dict=False,
    )[0]
    return velocity


@pytest.mark.parametrize(("cfg", "negative"), [(7.0, "blurry"), (1.0, None)])
def test_with_sampling_the_negative_prompt_hangs_on_its_own_guidance(cfg: float, negative: str | None) -> None:
    """FLUX.1 [dev] can have one then; a graph always says one, so where it does nothing it is no error."""
    asked = ImageRequest.parse({"prompt": "x", "negative_prompt": "blurry", "sampling": {"cfg": cfg}})
    assert MODELS["flux-dev"].recipe(asked).negative_prompt == negative


@pytest.fixture
def embedding(tmp_path: Path) -> Callable[..., Any]:
    def put(name: str, **tensors: Tensor) -> Any:
        path = tmp_path / f"embeddings/{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path)
        return chosen([name], tmp_path)

    return put


def vectors_of(model: str, word: str, place: str = "") -> Tensor:
    """What the vocabulary has for a word."""
    numbers = tiny.clip_tokenizer()(word, add_special_tokens=False)["input_ids"]
    weight: Tensor = getattr(pipeline(model), f"text_encoder{place}").get_input_embeddings().weight
    return weight[numbers].detach()


def test_an_embedding_takes_the_place_of_words(embedding: Callable[..., Any]) -> None:
    found = embedding("ink", emb_params=vectors_of("sd1.5", "red"))
    for named, said in (("a embedding:ink circle", "a red circle"), ("a (embedding:ink:1.3)", "a (red:1.3)")):
        read = told("sd1.5", named, reading={}, embeddings=found)["prompt_embeds"]
        torch.testing.assert_close(read, told("sd1.5", said, reading={})["prompt_embeds"])
    torch.testing.assert_close(told("sd1.5", reading={}), told("sd1.5", reading={}))  # nothing is left behind


def test_xl_has_vectors_for_each_encoder(embedding: Callable[..., Any]) -> None:
    found = embedding("ink", clip_l=vectors_of("sdxl", "red"), clip_g=vectors_of("sdxl", "red", "_2"))
    read, said = (told("sdxl", text, reading={}, embeddings=found) for text in ("a embedding:ink", "a red"))
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        torch.testing.assert_close(read[name], said[name])


def test_t5_has_vectors_too(embedding: Callable[..., Any]) -> None:
    numbers = tiny.t5_tokenizer()("red", add_special_tokens=False)["input_ids"]
    found = embedding("ink", t5xxl=pipeline("chroma").text_encoder.shared.weight[numbers].detach())
    read, said = (told("chroma", text, reading={}, embeddings=found) for text in ("embedding:ink", "red"))
    torch.testing.assert_close(read["prompt_embeds"], said["prompt_embeds"])


def test_an_encoder_that_an_embedding_does_not_fit_goes_without(embedding: Callable[..., Any]) -> None:
    """One of Stable Diffusion 1.5 in XL: CLIP-L has it, CLIP-G has nothing there."""
    found = embedding("ink", emb_params=vectors_of("sdxl", "red"))
    read = told("sdxl", "a embedding:ink", reading={}, embeddings=found)["prompt_embeds"]
    left, right = (told("sdxl", text, reading={})["prompt_embeds"] for text in ("a red", "a"))
    torch.testing.assert_close(read[..., : tiny.CLIP_L], left[..., : tiny.CLIP_L])
    torch.testing.assert_close(read[..., tiny.CLIP_L :], right[..., tiny.CLIP_L :])


def test_one_that_fits_nothing_is_refused(embedding: Callable[..., Any]) -> None:
    found = embedding("ink", emb_params=torch.rand(2, 7))
    with pytest.raises(InvalidValue, match="'ink' is for another model: its vectors have 7"):
        told("sd1.5", "embedding:ink", reading={}, embeddings=found)
    found[0].path.write_bytes(b"another")
    with pytest.raises(InvalidValue, match="changed while it waited"):
        told("sd1.5", "embedding:ink", reading={}, embeddings=found)
    with pytest.raises(InvalidValue, match="there is no embedding 'ink' here"):
        told("sd1.5", "embedding:ink", reading={})


@pytest.mark.parametrize("spec", ONE_OF_EACH, ids=lambda spec: spec.id)
@pytest.mark.parametrize("reading", [None, {}, {"zeros": True}], ids=["diffusers", "read", "zeros"])
def test_every_pipeline_takes_it(spec: Any, reading: Any) -> None:
    """With guidance where it has some, and a prompt that is longer than the negative one; two at once too."""
    parts = pipeline(spec.id)
    cfg = 1.0 if spec.id in UNGUIDED else 3.0
    asked = [told(spec.id, LONG, cfg, reading, negative_prompt="blurry")] * 2
    latents = [
        parts(
            **families.joined(asked[:count]),
            width=64,
            height=64,
            num_inference_steps=2,
            output_type="latent",
            generator=torch.Generator().manual_seed(1),
        ).images
        for count in (1, 2)
    ]
    assert torch.isfinite(latents[0]).all()
    assert families.fitting(dict(enumerate(asked))) == [0, 1]
    assert len(latents[1]) == 2 * len(latents[0])
