"""Tiny models: for each family the real diffusers pipeline with random weights. Nothing is downloaded.

Sizes, scales, tokenizers and schedulers are the real ones in kind: VAEs make a latent of 8 by 8 pixels and shift and
scale it, CLIP's two encoders differ in width, Qwen-Image's template has as many tokens as the pipeline cuts off.
The weights are the same in every run and lively: prompt, seed and guidance all show in the picture.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

from handler.catalog.spec import ModelSpec
from handler.model.families.flux2_tiny import Flux2TinyAutoEncoder
from handler.volume.manifest import write_manifest
from handler.volume.sources import EMBEDDED, fetched_folder

COMMIT = "c0" * 20
LATENTS = 4  # channels; FLUX-like transformers see 2 by 2 of them at once
SD3_LATENTS = 16  # its inpainting takes no other number
FLUX2_LATENTS = 8  # as many as its tiny autoencoder has groups
CLIP_L, CLIP_G, T5, LLM = 16, 24, 48, 16  # how wide the text encoders are
HEADS = 2  # of a language model's attention, a pair of which shares keys, and of what it tells
ROPE = (4, 6, 6)  # of a head's 16 channels, how many tell the position along each axis
SD_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
WORDS = [  # of Qwen-Image's template; Ġ is how byte-level vocabularies write a space
    "system", "user", "assistant", "Describe", "Ġthe", "Ġimage", "Ġby", "Ġdetailing", "Ġcolor", "Ġshape", "Ġsize",
    "Ġtexture", "Ġquantity", "Ġtext", "Ġspatial", "Ġrelationships", "Ġof", "Ġobjects", "Ġand", "Ġbackground",
]  # fmt: skip
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content if message.content is string else message.content | map(attribute='text') | join }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write(spec: ModelSpec, volume: Path) -> Path:
    """Put a tiny model where `fetch` would put `spec`, at `COMMIT` if its row names none; the folder."""
    spec = spec if spec.revision else replace(spec, revision=COMMIT)
    folder = fetched_folder(spec, volume)
    build(spec).save_pretrained(folder)
    write_manifest(folder, {"model": spec.id})
    return folder


def build(spec: ModelSpec) -> Any:
    """The tiny pipeline for `spec`, ready to draw."""
    with torch.random.fork_rng(devices=[]):
        pipeline = BUILDERS[spec.family](spec)
    for model in pipeline.components.values():
        if isinstance(model, torch.nn.Module):
            enliven(model.eval())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def enliven(model: torch.nn.Module) -> None:
    """Draw the weights anew, as large as what they multiply is wide.

    The libraries start some at zero and some so small that a prompt changes nothing anyone could see.
    """
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        module = name.rpartition(".")[0].rpartition(".")[2]  # such as to_q, k_proj, norm_added_q
        gain = 2.0 if {"q", "k"} & set(module.split("_")) else 1.0  # attention that picks, not averages
        if weight.ndim > 1 and weight[0].numel() > 1:
            weight.normal_(0, gain * weight[0].numel() ** -0.5, generator=generator)
        elif name.endswith("bias"):
            weight.normal_(0, 0.1, generator=generator)
        else:
            weight.fill_(gain)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):  # FLUX.2's latents are normalised
            buffer.uniform_(0.5, 1.5, generator=generator)


def clip(kind: type, width: int) -> Any:
    """A CLIP text encoder for `clip_tokenizer`."""
    return kind(
        transformers.CLIPTextConfig(
            vocab_size=1027, bos_token_id=1025, eos_token_id=1026, pad_token_id=1026, hidden_size=width,
            projection_dim=width, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2,
        )
    )  # fmt: skip


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """spark's."""
    return transformers.CLIPTokenizer.from_pretrained(EMBEDDED / "spark/tokenizer", local_files_only=True)


def t5() -> transformers.T5EncoderModel:
    """A T5 encoder for `t5_tokenizer`."""
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=570, d_model=T5, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
        )
    )


def t5_tokenizer() -> transformers.T5Tokenizer:
    """spark's."""
    return transformers.T5Tokenizer.from_pretrained(EMBEDDED / "spark/tokenizer_2", local_files_only=True)


def llm_tokenizer(padding_side: str = "right") -> transformers.Qwen2Tokenizer:
    """Bytes, and `WORDS` put together letter by letter."""
    parts = dict.fromkeys((word[:end], word[end]) for word in WORDS for end in range(1, len(word)))
    vocabulary = [*sorted(ByteLevel.alphabet()), *("".join(part) for part in parts)]
    return transformers.Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(vocabulary)},
        merges=list(parts),
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHAT,
        padding_side=padding_side,
        model_max_length=4096,
    )


def qwen3(kind: type, layers: int) -> Any:
    """A Qwen3 for `llm_tokenizer`."""
    return kind(
        transformers.Qwen3Config(
            vocab_size=len(llm_tokenizer()), hidden_size=LLM, intermediate_size=32, num_hidden_layers=layers,
            num_attention_heads=HEADS, num_key_value_heads=HEADS // 2, head_dim=8, tie_word_embeddings=True,
        )
    )  # fmt: skip


def mistral3() -> transformers.Mistral3ForConditionalGeneration:
    """A Mistral 3 for `llm_tokenizer`; FLUX.2 takes what comes out of its layers 10, 20 and 30."""
    text = {
        "model_type": "mistral", "vocab_size": len(llm_tokenizer()), "hidden_size": LLM, "intermediate_size": 32,
        "num_hidden_layers": 30, "num_attention_heads": HEADS, "num_key_value_heads": HEADS // 2, "head_dim": 8,
        "sliding_window": None,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1, "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    return transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(text_config=text, vision_config=vision)
    )


def qwen2_vl() -> transformers.Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL for `llm_tokenizer`."""
    text = {
        "vocab_size": len(llm_tokenizer()), "hidden_size": LLM, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS // 2, "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": LLM}
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )


def vae(kind: type = diffusers.AutoencoderKL, latents: int = LATENTS, **differing: Any) -> Any:
    """A VAE that halves the sides three times."""
    return kind(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8), layers_per_block=1, latent_channels=latents, norm_num_groups=2,
        sample_size=1024, **differing,
    )  # fmt: skip


def flux_vae(scaling: float = 0.3611, shift: float = 0.1159, latents: int = LATENTS) -> diffusers.AutoencoderKL:
    """As FLUX.1, Chroma and Z-Image have it."""
    options = {"use_quant_conv": False, "use_post_quant_conv": False}
    return vae(latents=latents, scaling_factor=scaling, shift_factor=shift, **options)


def flux(spec: ModelSpec) -> diffusers.FluxPipeline:
    """FLUX.1."""
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4 * LATENTS, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=T5, pooled_projection_dim=CLIP_L, guidance_embeds=spec.takes_guidance, axes_dims_rope=ROPE,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0 if spec.takes_guidance else 1.0, use_dynamic_shifting=spec.takes_guidance
        ),
        vae=flux_vae(),
        text_encoder=clip(transformers.CLIPTextModel, CLIP_L),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )


def chroma(spec: ModelSpec) -> diffusers.ChromaPipeline:
    """Chroma."""
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=4 * LATENTS, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=T5, axes_dims_rope=ROPE, approximator_num_channels=16, approximator_hidden_dim=32,
        approximator_layers=1,
    )  # fmt: skip
    return diffusers.ChromaPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=flux_vae(),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        transformer=transformer,
    )


def sd3(spec: ModelSpec) -> diffusers.StableDiffusion3Pipeline:
    """Stable Diffusion 3.5 large, for pictures up to 2048 by 2048."""
    transformer = diffusers.SD3Transformer2DModel(
        in_channels=SD3_LATENTS, out_channels=SD3_LATENTS, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=T5, caption_projection_dim=16, pooled_projection_dim=CLIP_L + CLIP_G, sample_size=128,
        pos_embed_max_size=128, qk_norm="rms_norm",
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flux_vae(scaling=1.5305, shift=0.0609, latents=SD3_LATENTS),
        text_encoder=clip(transformers.CLIPTextModelWithProjection, CLIP_L),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(transformers.CLIPTextModelWithProjection, CLIP_G),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=t5_tokenizer(),
        transformer=transformer,
    )


def sd15(spec: ModelSpec) -> diffusers.StableDiffusionPipeline:
    """Stable Diffusion 1.5: as many heads at every depth, convolutions around its transformers."""
    unet = diffusers.UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), block_out_channels=(16, 16, 16),
        layers_per_block=1, norm_num_groups=4, attention_head_dim=2, cross_attention_dim=CLIP_L,
        sample_size=spec.size[0] // 8,
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        scheduler=diffusers.PNDMScheduler(**SD_BETAS, set_alpha_to_one=False, skip_prk_steps=True),
        vae=vae(scaling_factor=0.18215),
        text_encoder=clip(transformers.CLIPTextModel, CLIP_L),
        tokenizer=clip_tokenizer(),
        unet=unet,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(spec: ModelSpec) -> diffusers.StableDiffusionXLPipeline:
    """Stable Diffusion XL. The U-Net is told the pooled prompt and, in 8 channels each, the six numbers of a size."""
    scheduler = diffusers.EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading")
    if spec.size == (512, 512):  # Turbo
        scheduler = diffusers.EulerAncestralDiscreteScheduler(**SD_BETAS, timestep_spacing="trailing")
    unet = diffusers.UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(8, 16, 16),
        layers_per_block=1, norm_num_groups=4, transformer_layers_per_block=(1, 1, 2), attention_head_dim=(1, 2, 2),
        use_linear_projection=True, cross_attention_dim=CLIP_L + CLIP_G, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=CLIP_G + 6 * 8,
        sample_size=spec.size[0] // 8,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        scheduler=scheduler,
        vae=vae(scaling_factor=0.13025),
        text_encoder=clip(transformers.CLIPTextModel, CLIP_L),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(transformers.CLIPTextModelWithProjection, CLIP_G),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        force_zeros_for_empty_prompt=True,
    )


def flux2_parts(guidance_embeds: bool) -> dict[str, Any]:
    """What FLUX.2 [dev] and [klein] have in common. Their text is what three layers of a language model say."""
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": vae(diffusers.AutoencoderKLFlux2, FLUX2_LATENTS),
        "transformer": diffusers.Flux2Transformer2DModel(
            in_channels=4 * FLUX2_LATENTS, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=HEADS, joint_attention_dim=3 * LLM, axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guidance_embeds,
        ),
    }  # fmt: skip


def flux2(spec: ModelSpec) -> diffusers.Flux2Pipeline:
    """FLUX.2 [dev], with a plain tokenizer: the real one's processor needs torchvision."""
    return diffusers.Flux2Pipeline(
        text_encoder=mistral3(), tokenizer=llm_tokenizer(padding_side="left"), **flux2_parts(guidance_embeds=True)
    )


def flux2_klein(spec: ModelSpec) -> diffusers.Flux2KleinPipeline:
    """FLUX.2 [klein]; takes what comes out of the layers 9, 18 and 27."""
    return diffusers.Flux2KleinPipeline(
        text_encoder=qwen3(transformers.Qwen3ForCausalLM, layers=28),
        tokenizer=llm_tokenizer(),
        is_distilled=True,
        **flux2_parts(guidance_embeds=False),
    )


def z_image(spec: ModelSpec) -> diffusers.ZImagePipeline:
    """Z-Image."""
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flux_vae(),
        text_encoder=qwen3(transformers.Qwen3Model, layers=2),
        tokenizer=llm_tokenizer(),
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=LATENTS, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=LLM,
            axes_dims=list(ROPE),
        ),
    )  # fmt: skip


def qwen_image(spec: ModelSpec) -> diffusers.QwenImagePipeline:
    """Qwen-Image, whose VAE is one for videos."""
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02
        ),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=4, z_dim=LATENTS, num_res_blocks=1, latents_mean=[-0.8, 0.1, 1.6, -0.4],
            latents_std=[2.8, 1.5, 2.1, 1.1],
        ),
        text_encoder=qwen2_vl(),
        tokenizer=llm_tokenizer(),
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=4 * LATENTS, out_channels=LATENTS, num_layers=2, attention_head_dim=16,
            num_attention_heads=HEADS, joint_attention_dim=LLM, axes_dims_rope=ROPE,
        ),
    )  # fmt: skip


def autoencoder(kind: str, channels: int) -> Any:
    """A tiny autoencoder to put in the place of a model's own, for latents of so many channels."""
    if kind == "AutoencoderTiny":
        vae: Any = diffusers.AutoencoderTiny(latent_channels=channels, scaling_factor=1.0)
    else:
        vae = Flux2TinyAutoEncoder(latent_channels=4 * channels)
    with torch.random.fork_rng(devices=[]):
        enliven(vae.eval())
    return vae


BUILDERS: dict[str, Callable[[ModelSpec], Any]] = {
    "handler.model.families.flux": flux,
    "handler.model.families.chroma": chroma,
    "handler.model.families.sd3": sd3,
    "handler.model.families.sd15": sd15,
    "handler.model.families.sdxl": sdxl,
    "handler.model.families.flux2": flux2,
    "handler.model.families.flux2_klein": flux2_klein,
    "handler.model.families.z_image": z_image,
    "handler.model.families.qwen_image": qwen_image,
}
