"""The names that trainers give a LoRA's tensors, on models of every family: each changes the weights it means."""

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import originals
import pytest
import torch
from torch import nn

import tiny
from handler import MODELS
from handler.model.adapters.keys import read
from handler.model.loading.lora import Misfit

Matrices = dict[str, tuple[Any, Any]]
SPECS = [spec for spec in MODELS.values() if not spec.base and not spec.embedded and spec.id != "sdxl-turbo"]
SDXL = MODELS["sdxl"]
# Each of SDXL's blocks, in diffusers' words and in its first publication's, as kohya's trainer writes it.
SGM = {
    "down_blocks.0.resnets.0.conv1": "input_blocks_1_0_in_layers_2",
    "down_blocks.1.attentions.0.proj_in": "input_blocks_3_1_proj_in",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks_3_1_transformer_blocks_0_attn1_to_q",
    "down_blocks.1.resnets.0.time_emb_proj": "input_blocks_3_0_emb_layers_1",
    "mid_block.attentions.0.transformer_blocks.1.ff.net.2": "middle_block_1_transformer_blocks_1_ff_net_2",
    "up_blocks.0.attentions.1.transformer_blocks.1.attn2.to_out.0":
        "output_blocks_1_1_transformer_blocks_1_attn2_to_out_0",
    "up_blocks.1.resnets.0.conv_shortcut": "output_blocks_2_0_skip_connection",
}  # fmt: skip


ATTENTION = tuple(f"mid_block.attentions.0.transformer_blocks.0.attn{n}.to_q" for n in (1, 2))


def layers_of(model: nn.Module, *kinds: type) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kinds or (nn.Linear,))]


def some(model: nn.Module, layers: Iterable[str], rank: int = 2) -> Matrices:
    generator, found = torch.Generator().manual_seed(0), {}
    for layer in layers:
        out, *rest = model.get_submodule(layer).weight.shape
        kernel = (1,) * (len(rest) - 1)
        down = torch.randn(rank, *rest, generator=generator)
        found[layer] = down, torch.randn(out, rank, *kernel, generator=generator)
    return found


def written(found: Matrices, name: Callable[[str], str], down: str, up: str, alpha: float | None) -> dict[str, Any]:
    parts = {f"{name(layer)}{down}": one for layer, (one, _) in found.items()}
    parts |= {f"{name(layer)}{up}": other for layer, (_, other) in found.items()}
    return parts | ({} if alpha is None else {f"{name(layer)}.alpha": torch.tensor(alpha) for layer in found})


def require_read(pipeline: Any, tensors: dict[str, Any], wanted: dict[str, Matrices], scale: float) -> None:
    """That `tensors` are read as what is `wanted` for each component, times `scale`."""
    deltas = read(pipeline, tensors)
    assert deltas.keys() == {(part, layer) for part, found in wanted.items() for layer in found}
    for (part, layer), delta in deltas.items():
        down, up = wanted[part][layer]
        product = delta.up.flatten(1).float() @ delta.down.flatten(1).float() * delta.scale
        assert torch.allclose(product, scale * (up.flatten(1) @ down.flatten(1)), atol=1e-5), layer


@pytest.fixture(scope="module")
def sdxl() -> Any:
    return tiny.build(SDXL)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)
def test_diffusers_and_ai_toolkits_names_on_every_family(spec: Any) -> None:
    pipeline = tiny.build(spec)
    denoiser = "unet" if hasattr(pipeline, "unet") else "transformer"
    model = getattr(pipeline, denoiser)
    found = some(model, layers_of(model))
    dotted = (lambda layer: f"{denoiser}.{layer}", ".lora_A.weight", ".lora_B.weight")
    require_read(pipeline, written(found, *dotted, None), {denoiser: found}, 1.0)
    require_read(pipeline, written(found, *dotted, 1.0), {denoiser: found}, 0.5)
    named = (dotted[0], ".lora_A.default.weight", ".lora_B.default.weight")
    require_read(pipeline, written(found, *named, None), {denoiser: found}, 1.0)
    bare = (lambda layer: layer, ".lora_down.weight", ".lora_up.weight")
    require_read(pipeline, written(found, *bare, 4.0), {denoiser: found}, 2.0)
    wrapped = (lambda layer: f"base_model.model.{layer}", ".lora_A.weight", ".lora_B.weight")
    require_read(pipeline, written(found, *wrapped, None), {denoiser: found}, 1.0)


def alphas(**said: Any) -> dict[str, str]:
    """As diffusers writes them into a file's header."""
    return {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in said.items()})}


def scales(pipeline: Any, said: dict[str, str]) -> dict[str, float]:
    found = some(pipeline.unet, ATTENTION)
    tensors = written(found, lambda layer: f"unet.{layer}", ".lora_A.weight", ".lora_B.weight", None)
    return {layer: delta.scale for (_, layer), delta in read(pipeline, tensors, said).items()}


def test_an_alpha_that_diffusers_notes_counts(sdxl: Any) -> None:
    """As its own reader has it: PEFT's configuration, whose patterns are layers' names, or how they end."""
    one, other = ATTENTION
    assert scales(sdxl, {}) == scales(sdxl, {"format": "pt"}) == {one: 1.0, other: 1.0}
    assert scales(sdxl, alphas(r=2, lora_alpha=8)) == {one: 4.0, other: 4.0}
    assert scales(sdxl, alphas(r=2, lora_alpha=4, use_rslora=True)) == pytest.approx({one: 8**0.5, other: 8**0.5})
    for pattern in (other, f"^{other}", other.partition(".")[2]):
        assert scales(sdxl, alphas(lora_alpha=2, alpha_pattern={pattern: 1})) == {one: 1.0, other: 0.5}
    assert scales(sdxl, alphas(lora_alpha=2, alpha_pattern={f"^{other.partition('.')[2]}": 1}))[other] == 1.0
    assert scales(sdxl, {"lora_adapter_metadata": json.dumps({"text_encoder.lora_alpha": 8})})[one] == 1.0
    found = some(sdxl.unet, ATTENTION)
    own = written(found, lambda layer: f"unet.{layer}", ".lora_A.weight", ".lora_B.weight", 1.0)
    assert {delta.scale for delta in read(sdxl, own, alphas(lora_alpha=8)).values()} == {0.5}


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"lora_adapter_metadata": "[]"}, "lora_adapter_metadata is no JSON object"),
        ({"lora_adapter_metadata": "{"}, "lora_adapter_metadata is no JSON object"),
        (alphas(lora_alpha="8"), "alpha that is noted for unet.* is no number"),
        (alphas(lora_alpha=10**400), "lora_adapter_metadata is no JSON object"),
        (alphas(lora_alpha=True), "alpha that is noted for unet.* is no number"),
        (alphas(alpha_pattern=[1]), "alpha_pattern that is noted for unet is no object"),
        (alphas(alpha_pattern={"(a+)+": 1}), "which is no layer's name"),
    ],
)
def test_what_is_noted_and_makes_no_sense_is_refused(said: dict[str, str], told: str, sdxl: Any) -> None:
    with pytest.raises(Misfit, match=told):
        scales(sdxl, said)


def test_kohyas_names_for_a_u_net_and_two_encoders(sdxl: Any) -> None:
    unet = some(sdxl.unet, layers_of(sdxl.unet, nn.Linear, nn.Conv2d))
    one, two = (some(part, layers_of(part)) for part in (sdxl.text_encoder, sdxl.text_encoder_2))

    def flat(prefix: str) -> Callable[[str], str]:
        return lambda layer: f"{prefix}_{layer.replace('.', '_')}"

    def encoder(prefix: str) -> Callable[[str], str]:  # versions of transformers name CLIP's modules in two ways
        return lambda layer: flat(f"{prefix}_text_model" if layer.startswith("encoder.") else prefix)(layer)

    parts = [(unet, flat("lora_unet")), (one, encoder("lora_te1")), (two, encoder("lora_te2"))]
    tensors = {
        key: each
        for found, name in parts
        for key, each in written(found, name, ".lora_down.weight", ".lora_up.weight", 1.0).items()
    }
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in tensors
    require_read(sdxl, tensors, {"unet": unet, "text_encoder": one, "text_encoder_2": two}, 0.5)
    alone = written(one, encoder("lora_te"), ".lora_down.weight", ".lora_up.weight", 2.0)
    require_read(sdxl, alone, {"text_encoder": one}, 1.0)


def test_kohyas_names_after_sdxls_first_publication(sdxl: Any) -> None:
    found = some(sdxl.unet, SGM)
    tensors = written(found, lambda layer: f"lora_unet_{SGM[layer]}", ".lora_down.weight", ".lora_up.weight", 1.0)
    require_read(sdxl, tensors, {"unet": found}, 0.5)


def test_diffusers_names_of_old(sdxl: Any) -> None:
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    unet = some(sdxl.unet, [f"{layer}.to_q", f"{layer}.to_out.0"])
    encoder = some(sdxl.text_encoder, [name for name in layers_of(sdxl.text_encoder) if "layers.0.self_attn" in name])
    tensors = written(
        unet,
        lambda name: re.sub(r"(.*)\.(to_\w+).*", r"unet.\1.processor.\2_lora", name),
        ".down.weight",
        ".up.weight",
        None,
    )
    old = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    tensors |= written(
        encoder,
        lambda name: f"text_encoder.{name.rpartition('.')[0]}.{old[name.rpartition('.')[2]]}_lora",
        ".down.weight", ".up.weight", None,
    )  # fmt: skip
    require_read(sdxl, tensors, {"unet": unet, "text_encoder": encoder}, 1.0)


def test_flux_as_it_was_first_published() -> None:
    """kohya's names, with query, key and value in one; ComfyUI's begin otherwise."""
    pipeline = tiny.build(MODELS["flux-dev"])
    model = pipeline.transformer
    block, parts = "transformer_blocks.0.attn", ("to_q", "to_k", "to_v")
    width = model.get_submodule(f"{block}.to_q").weight.shape[0]
    down, up = torch.randn(4, width), torch.randn(3 * width, 4)
    pieces = {f"{block}.{part}": (down, piece) for part, piece in zip(parts, up.split(width), strict=True)}
    mlp = some(model, ["transformer_blocks.1.ff.net.0.proj", "single_transformer_blocks.1.proj_out"], rank=4)
    theirs = {"double_blocks.1.img_mlp.0": mlp["transformer_blocks.1.ff.net.0.proj"],
              "single_blocks.1.linear2": mlp["single_transformer_blocks.1.proj_out"],
              "double_blocks.0.img_attn.qkv": (down, up)}  # fmt: skip
    ends = (".lora_down.weight", ".lora_up.weight", 2.0)
    for name in (lambda layer: f"lora_unet_{layer.replace('.', '_')}", lambda layer: f"diffusion_model.{layer}"):
        require_read(pipeline, written(theirs, name, *ends), {"transformer": pieces | mlp}, 0.5)


TWIN = {"A": (2, 128), "B": (32, 2)}
PREFIXES = ("", "diffusion_model.", "model.diffusion_model.", "base_model.model.", "transformer.")


@pytest.mark.parametrize("model", ["flux-dev", "flux-schnell", "chroma", "flux2-dev", "flux2-klein"])
def test_every_layer_of_flux_by_its_first_name_with_dots(model: str) -> None:
    """As ComfyUI, ai-toolkit and fal write them, below their prefixes; what is read adds up to what was written."""
    pipeline = tiny.build(MODELS[model])
    weights = originals.original(pipeline.transformer)
    shapes = {name.removesuffix(".weight"): w.shape for name, w in weights.items() if w.ndim == 2}
    assert {"double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "final_layer.linear"} <= shapes.keys()
    found = {name: (torch.randn(2, into), torch.randn(out, 2)) for name, (out, into) in shapes.items()}
    wanted = {f"{name}.weight": 0.5 * up @ down for name, (down, up) in found.items()}
    table, last = originals.TABLES[type(pipeline.transformer).__name__], originals.last_context(weights)
    for i, prefix in enumerate(PREFIXES):
        ends = ((".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight"))[i % 2]
        deltas = read(pipeline, written(found, lambda name, prefix=prefix: prefix + name, *ends, 1.0))
        products = {f"{path}.weight": delta.up @ delta.down * delta.scale for (_, path), delta in deltas.items()}
        merged = originals.backwards(products, table, swapped=last)
        assert merged.keys() == wanted.keys()
        assert all(torch.allclose(merged[name], wanted[name], atol=1e-5) for name in wanted)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"double_blocks.99.img_mlp.0.lora_A.weight": (2, 4), "double_blocks.99.img_mlp.0.lora_B.weight": (4, 2)},
         "double_blocks.99.img_mlp.0 fits no weight of the model"),
        ({"double_blocks.0.img_attn.qkv.lora_A.weight": (2, 4)}, "double_blocks.0.img_attn.qkv has half of a LoRA"),
        ({"double_blocks.0.img_attn.qkv.lora_B.bias": (4,)}, "double_blocks.0.img_attn.qkv.lora_B.bias is no part of"),
        ({"single_blocks.0.norm.query_norm.scale": (4,)}, "single_blocks.0.norm.query_norm.scale is no part of a LoRA"),
        ({"double_blocks.0.img_attn.nothing.lora_A.weight": (2, 4)}, "double_blocks.0.img_attn.nothing"),
        ({f"transformer.double_blocks.0.img_mlp.2.lora_{way}.weight": shape for way, shape in TWIN.items()},
         "double_blocks.0.img_mlp.2 is there under another name too"),
    ],
)  # fmt: skip
def test_what_is_no_lora_of_flux_is_refused_by_its_name(change: dict[str, Any], says: str) -> None:
    pipeline = tiny.build(MODELS["flux-dev"])
    ends = (".lora_A.weight", ".lora_B.weight", None)
    good = written({"double_blocks.0.img_mlp.2": (torch.ones(2, 128), torch.ones(32, 2))}, str, *ends)
    with pytest.raises(Misfit, match=re.escape(says)):
        read(pipeline, good | {name: torch.ones(shape) for name, shape in change.items()})


@pytest.mark.parametrize(
    ("model", "layer", "published"),
    [
        ("qwen-image", "transformer_blocks.0.attn.to_q", "diffusion_model.transformer_blocks.0.attn.to_q"),
        ("qwen-image", "transformer_blocks.0.attn.to_out.0", "lora_unet_transformer_blocks_0_attn_to_out_0"),
        ("z-image-turbo", "layers.0.attention.to_q", "diffusion_model.layers.0.attention.to_q"),
        ("z-image-turbo", "layers.1.feed_forward.w1", "lora_unet_layers_1_feed_forward_w1"),
        ("chroma", "transformer_blocks.0.ff.net.2", "lora_unet_double_blocks_0_img_mlp_2"),
        ("flux2-klein", "transformer_blocks.0.attn.to_out.0", "diffusion_model.double_blocks.0.img_attn.proj"),
        ("flux2-dev", "single_transformer_blocks.1.attn.to_out", "lora_unet_single_blocks_1_linear2"),
    ],
)
def test_other_families_as_their_trainers_write_them(model: str, layer: str, published: str) -> None:
    pipeline = tiny.build(MODELS[model])
    found = some(pipeline.transformer, [layer])
    kohya = published.startswith("lora_unet")
    ends = (".lora_down.weight", ".lora_up.weight", 1.0) if kohya else (".lora_A.weight", ".lora_B.weight", None)
    require_read(pipeline, written(found, lambda _: published, *ends), {"transformer": found}, 0.5 if kohya else 1.0)


@pytest.mark.parametrize(
    "extra",
    ["lora_te3_encoder_block_0.lora_down.weight", "text_encoders.t5xxl.transformer.encoder.lora_A.weight",
     "lora_te1_text_model_encoder_layers_99_mlp_fc1.alpha", "double_blocks.0.img_attn.norm.query_norm.scale",
     "transformer.norm.diff_b"],
)  # fmt: skip
def test_what_a_converter_would_leave_out_is_refused(extra: str) -> None:
    pipeline = tiny.build(MODELS["flux-dev"])
    found = some(pipeline.transformer, ["transformer_blocks.1.ff.net.2"])
    tensors = written(
        found, lambda _: "lora_unet_double_blocks_1_img_mlp_2", ".lora_down.weight", ".lora_up.weight", 1.0
    )
    assert read(pipeline, tensors)
    with pytest.raises(Misfit, match=re.escape(extra)):
        read(pipeline, tensors | {extra: torch.ones(2, 2)})


def test_one_of_another_family_is_refused(sdxl: Any) -> None:
    flux = tiny.build(MODELS["flux-dev"])
    ends = (".lora_A.weight", ".lora_B.weight", None)
    theirs = written(some(flux.transformer, layers_of(flux.transformer)), lambda name: f"transformer.{name}", *ends)
    ours = written(some(sdxl.unet, layers_of(sdxl.unet)), lambda name: f"unet.{name}", *ends)
    for pipeline, tensors in ((sdxl, theirs), (flux, ours)):
        with pytest.raises(Misfit, match="fits no weight of the model"):
            read(pipeline, tensors)
