"""What single files are, told by their headers: the true architectures, without memory, by each way of naming them."""

from collections.abc import Callable
from typing import Any

import diffusers
import originals
import pytest
import torch
import transformers
from accelerate import init_empty_weights
from diffusers.loaders import single_file_utils as converters

import tiny
from handler.catalog.architectures import described, parts, rows
from handler.catalog.naming import Naming, pieces
from handler.catalog.originals import chroma, flux, flux2, open_clip, sd3, z_image
from handler.catalog.stable import unet, vae

SDXL_UNET = {
    "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2, 10), "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
REFINER = SDXL_UNET | {
    "cross_attention_dim": 1280, "attention_head_dim": (6, 12, 24, 24), "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 4, "projection_class_embeddings_input_dim": 2560,
}  # fmt: skip
SD_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
}  # fmt: skip
FLUX = {"guidance_embeds": True}
SD15_UNET = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD2_UNET = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Stable Diffusion 1.5": ("UNet2DConditionModel", SD15_UNET),
    "Stable Diffusion 2": ("UNet2DConditionModel", SD2_UNET),
    "SDXL": ("UNet2DConditionModel", SDXL_UNET),
    "the SDXL refiner": ("UNet2DConditionModel", REFINER),
    "FLUX.1 [dev]": ("FluxTransformer2DModel", FLUX),
    "FLUX.1 [schnell]": ("FluxTransformer2DModel", {}),
    "FLUX.1 Fill": ("FluxTransformer2DModel", FLUX | {"in_channels": 384, "out_channels": 64}),
    "FLUX.1 Canny or Depth": ("FluxTransformer2DModel", FLUX | {"in_channels": 128, "out_channels": 64}),
    "Chroma": ("ChromaTransformer2DModel", {}),
    "FLUX.2 [dev]": ("Flux2Transformer2DModel", {}),
    "FLUX.2 [klein]": ("Flux2Transformer2DModel", {
        "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
        "guidance_embeds": False,
    }),
    "the FLUX.2 [klein] of 9 B": ("Flux2Transformer2DModel", {
        "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288,
        "guidance_embeds": False,
    }),
    "Stable Diffusion 3.5 large": ("SD3Transformer2DModel", {
        "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm",
    }),
    "Z-Image": ("ZImageTransformer2DModel", {}),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}),
    "the VAE of Stable Diffusion or SDXL": ("AutoencoderKL", SD_VAE),
    "the VAE of FLUX.1, SD3 or Z-Image": ("AutoencoderKL", SD_VAE | {
        "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False,
    }),
    "the VAE of FLUX.2": ("AutoencoderKLFlux2", {}),
}  # fmt: skip


def bare(kind: str, options: dict[str, Any]) -> Any:
    """The model without memory."""
    with init_empty_weights():
        return getattr(diffusers, kind)(**options)


@pytest.mark.parametrize("name", MODELS)
def test_a_true_architecture_is_told_by_either_naming(name: str) -> None:
    """Also where it is a part of more."""
    model = bare(*MODELS[name])
    for prefix, weights in (("", model.state_dict()), ("model.diffusion_model.", originals.original(model))):
        found = parts({prefix + key: tuple(tensor.shape) for key, tensor in weights.items()})
        assert (described(found), found[0].prefix) == (name, prefix)


ROWS_ALONE = ("FluxTransformer2DModel", "ChromaTransformer2DModel")


def small(kind: str, **options: Any) -> Any:
    """Weights that all differ; one column of each matrix of those whose converter looks at rows alone."""
    state, first = {}, 0
    for name, tensor in bare(kind, options).state_dict().items():
        shape = (len(tensor), 1) if tensor.ndim == 2 and kind in ROWS_ALONE else tuple(tensor.shape)
        count = torch.Size(shape).numel()
        state[name] = torch.arange(first, first + count, dtype=torch.float64).view(shape)
        first += count
    return state


FULL = {"num_layers": 2, "num_single_layers": 2}  # blocks; as wide as the true ones
TRUE: dict[str, tuple[Naming, Callable[..., Any], dict[str, Any]]] = {
    "FluxTransformer2DModel": (flux, converters.convert_flux_transformer_checkpoint_to_diffusers, FULL | FLUX),
    "ChromaTransformer2DModel": (
        chroma, converters.convert_chroma_transformer_checkpoint_to_diffusers, FULL | {"approximator_layers": 2},
    ),
    "Flux2Transformer2DModel": (
        flux2, converters.convert_flux2_transformer_checkpoint_to_diffusers,
        FULL | {"num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 8,
                "axes_dims_rope": (4, 4, 4, 4)},
    ),
    "SD3Transformer2DModel": (
        sd3, converters.convert_sd3_transformer_checkpoint_to_diffusers,
        {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16,
         "joint_attention_dim": 8, "pooled_projection_dim": 8, "qk_norm": "rms_norm", "dual_attention_layers": (0,)},
    ),
    "ZImageTransformer2DModel": (
        z_image, converters.convert_z_image_transformer_checkpoint_to_diffusers,
        {"dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 8,
         "axes_dims": [4, 6, 6]},
    ),
    "UNet2DConditionModel": (
        unet, converters.convert_ldm_unet_checkpoint,
        SDXL_UNET | {"block_out_channels": (32, 64, 64), "attention_head_dim": (2, 2, 2), "cross_attention_dim": 8,
                     "projection_class_embeddings_input_dim": 16},
    ),
    "UNet2DConditionModel, as SD1.5 has it": (
        unet, converters.convert_ldm_unet_checkpoint,
        SD15_UNET | {"block_out_channels": (32, 32, 64, 64), "attention_head_dim": 2, "cross_attention_dim": 8},
    ),
    "AutoencoderKL": (vae, converters.convert_ldm_vae_checkpoint, SD_VAE | {"block_out_channels": (32, 32, 32, 32)}),
}  # fmt: skip


def made(naming: Naming, weights: dict[str, Any]) -> dict[str, Any]:
    """What the pieces of these weights are."""
    found, strange = pieces(naming, {name: tuple(tensor.shape) for name, tensor in weights.items()})
    assert strange == []
    state = {}
    for piece in found:
        tensor = weights[piece.source]
        rows = tensor[piece.first : piece.last] if tensor.ndim else tensor
        rows = {"swap": originals.swap, "transpose": torch.t, "": lambda same: same}[piece.turn](rows)
        state[piece.name] = rows.reshape(piece.shape)
    return state


@pytest.mark.parametrize("kind", TRUE)
def test_a_naming_is_what_diffusers_converter_makes(kind: str) -> None:
    """Every tensor, row by row: U-Nets and VAEs from names made by arithmetic, the others from the table, backwards."""
    naming, convert, options = TRUE[kind]
    kind = kind.partition(",")[0]
    model = bare(kind, options)
    state = small(kind, **options)
    model.state_dict = lambda: state
    old = originals.original(model)
    config = {"config": model.config} if kind in ("UNet2DConditionModel", "AutoencoderKL") else {}
    prefix = "model.diffusion_model." if kind == "UNet2DConditionModel" else ""
    expected = convert({prefix + name: tensor for name, tensor in old.items()}, **config)
    found = made(naming, old)
    assert found.keys() == expected.keys() == state.keys()
    assert [name for name in state if not torch.equal(found[name], expected[name])] == []
    assert [name for name in state if not torch.equal(found[name], state[name])] == []


def test_open_clip_is_what_diffusers_converter_makes() -> None:
    """Which gives names as transformers had them then."""
    model = tiny.clip(transformers.CLIPTextModelWithProjection, 16)
    old = originals.open_clip(model)
    expected = converters.convert_open_clip_checkpoint(model, {f"x.{name}": t for name, t in old.items()}, prefix="x.")
    found = made(open_clip, old)
    assert found.keys() == {originals.bare(name) for name in expected}
    assert [name for name in expected if not torch.equal(found[originals.bare(name)], expected[name])] == []


OTHERS = {
    "a LoRA": ["lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight"],
    "a ControlNet": ["control_model.input_hint_block.0.weight", "control_model.time_embed.0.weight"],
    "an embedding of a prompt": ["emb_params"],
    "Wan": ["head.modulation", "blocks.0.self_attn.q.weight"],
    "LTX-Video": ["model.diffusion_model.patchify_proj.weight"],
    "nothing known": ["a", "b.weight"],
    "T5": ["enc.blk.0.attn_q.weight", "token_embd.weight"],
    "SDXL with v-prediction": ["v_pred", "model.diffusion_model.input_blocks.1.0.in_layers.0.weight",
                               "model.diffusion_model.label_emb.0.0.weight"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "tensors"), OTHERS.items(), ids=OTHERS)
def test_what_no_row_takes_is_known_too(name: str, tensors: list[str]) -> None:
    assert described(parts(dict.fromkeys(tensors, (4, 4)))) == name


def test_a_file_may_say_what_it_predicts() -> None:
    unet = {"input_blocks.1.0.in_layers.0.weight": (4, 4)}
    assert rows(parts(unet, "epsilon")) == ["sd1.5"]
    for said in ("v", "v_prediction"):
        assert described(parts(unet, said)) == "Stable Diffusion 1.5 with v-prediction"
        assert rows(parts(unet, said)) == []
    flux = {"double_blocks.0.img_attn.norm.key_norm.weight": (4,), "guidance_in.in_layer.weight": (4, 4)}
    assert rows(parts(flux, "v")) == ["flux-dev"]


def test_rows_are_those_of_what_denoises() -> None:
    unet, vae = "model.diffusion_model.", "first_stage_model.decoder.up.0.block.0.norm1.weight"
    sdxl = [f"{unet}input_blocks.1.0.in_layers.0.weight", f"{unet}label_emb.0.0.weight", vae]
    flux = ["double_blocks.0.img_attn.norm.key_norm.scale", "guidance_in.in_layer.weight"]
    assert rows(parts(dict.fromkeys(sdxl, (4,)))) == ["sdxl", "sdxl-turbo", "sdxl-lightning"]
    assert rows(parts(dict.fromkeys(flux, (4,)))) == ["flux-dev"]
    assert rows(parts({"a": (1,)})) == []
