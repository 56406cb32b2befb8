"""Models of full size with random weights, on a volume as `fetch` would leave them: speed does not depend on values.

Sizes are those in the configuration files of the models' repositories. What CLIP and T5 read comes from spark's
tokenizers, what language models read from a tokenizer of plain bytes: they only decide which rows of the embeddings
are looked up, and how many, where a model does not fill its text up to a fixed length (Z-Image).

    python benchmarks/random_models.py flux-schnell /tmp/volume
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

from handler import MODELS
from handler.volume.manifest import write_manifest
from handler.volume.sources import fetched_folder

SPARK = Path(__file__).parent.parent / "handler" / "weights" / "spark"
SHARD = "5GB"  # of a weight file: that much passes through host memory at a time
Part = tuple[Any, Mapping[str, Any]]  # what makes a component, and from what
CHAT = (
    "{% for message in messages %}{{ message.role }}: "
    "{{ message.content if message.content is string else message.content | map(attribute='text') | join }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def clip_tokenizer() -> Any:
    """spark's."""
    return transformers.CLIPTokenizer.from_pretrained(SPARK / "tokenizer", local_files_only=True)


def t5_tokenizer() -> Any:
    """spark's."""
    return transformers.T5Tokenizer.from_pretrained(SPARK / "tokenizer_2", local_files_only=True)


def byte_tokenizer(padding_side: str) -> transformers.Qwen2Tokenizer:
    """One token a byte."""
    return transformers.Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(sorted(ByteLevel.alphabet()))},
        merges=[],
        chat_template=CHAT,
        padding_side=padding_side,
        model_max_length=4096,
    )


CLIP_WORDS: Part = (clip_tokenizer, {})
T5_WORDS: Part = (t5_tokenizer, {})
CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "vocab_size": 49408, "eos_token_id": 1026,  # spark's
}  # fmt: skip
CLIP_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280, "num_hidden_layers": 32,
    "num_attention_heads": 20, "vocab_size": 49408, "hidden_act": "gelu", "eos_token_id": 1026,
}  # fmt: skip
BIG_CLIP: Part = (transformers.CLIPTextModelWithProjection, CLIP_G)
T5: Part = (
    transformers.T5EncoderModel,
    {
        "d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64, "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu", "use_cache": False,
    },
)  # fmt: skip
QWEN3: Part = (
    transformers.Qwen3Model,
    {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
)  # fmt: skip
MISTRAL: Part = (
    transformers.Mistral3ForConditionalGeneration,
    {
        "text_config": {
            "model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072,
            "sliding_window": None, "max_position_embeddings": 131072,
        },
        "vision_config": {
            "model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 1540, "patch_size": 14,
        },
        "tie_word_embeddings": False,
    },
)  # fmt: skip
QWEN25_VL: Part = (
    transformers.Qwen2_5_VLForConditionalGeneration,
    {
        "text_config": {
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584},
        "tie_word_embeddings": False,
    },
)  # fmt: skip
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024,
}  # fmt: skip
VAE_16 = VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
FLUX_VAE: Part = (diffusers.AutoencoderKL, VAE_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159})
UNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20), "use_linear_projection": True, "cross_attention_dim": 2048,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816, "sample_size": 64,
}  # fmt: skip
SMALL_UNET = {  # of SD1.5; its kinds of blocks are the class's defaults
    "block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8, "cross_attention_dim": 768,
    "sample_size": 64,
}  # fmt: skip
MMDIT = {
    "num_layers": 38, "num_attention_heads": 38, "attention_head_dim": 64, "joint_attention_dim": 4096,
    "caption_projection_dim": 2432, "pooled_projection_dim": 2048, "pos_embed_max_size": 192, "qk_norm": "rms_norm",
    "sample_size": 128,
}  # fmt: skip
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
FLOW = diffusers.FlowMatchEulerDiscreteScheduler
CONFIGS: dict[str, tuple[Any, dict[str, Part]]] = {  # model -> its pipeline, and what that consists of
    "flux-schnell": (
        diffusers.FluxPipeline,
        {
            "scheduler": (FLOW, {"shift": 1.0}),
            "vae": FLUX_VAE,
            "text_encoder": (transformers.CLIPTextModel, CLIP_L),
            "tokenizer": CLIP_WORDS,
            "text_encoder_2": T5,
            "tokenizer_2": T5_WORDS,
            "transformer": (diffusers.FluxTransformer2DModel, {"guidance_embeds": False}),
        },
    ),
    "flux-dev": (
        diffusers.FluxPipeline,
        {
            "scheduler": (FLOW, {"shift": 3.0, "use_dynamic_shifting": True}),
            "vae": FLUX_VAE,
            "text_encoder": (transformers.CLIPTextModel, CLIP_L),
            "tokenizer": CLIP_WORDS,
            "text_encoder_2": T5,
            "tokenizer_2": T5_WORDS,
            "transformer": (diffusers.FluxTransformer2DModel, {"guidance_embeds": True}),
        },
    ),
    "sd1.5": (
        partial(
            diffusers.StableDiffusionPipeline,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ),
        {
            "scheduler": (diffusers.PNDMScheduler, BETAS | {"set_alpha_to_one": False, "skip_prk_steps": True}),
            "vae": (diffusers.AutoencoderKL, VAE | {"latent_channels": 4, "sample_size": 512}),
            "text_encoder": (transformers.CLIPTextModel, CLIP_L),
            "tokenizer": CLIP_WORDS,
            "unet": (diffusers.UNet2DConditionModel, SMALL_UNET),
        },
    ),
    "sdxl-turbo": (
        diffusers.StableDiffusionXLPipeline,
        {
            "scheduler": (diffusers.EulerAncestralDiscreteScheduler, BETAS | {"timestep_spacing": "trailing"}),
            "vae": (diffusers.AutoencoderKL, VAE | {"latent_channels": 4, "scaling_factor": 0.13025}),
            "text_encoder": (transformers.CLIPTextModel, CLIP_L),
            "tokenizer": CLIP_WORDS,
            "text_encoder_2": BIG_CLIP,
            "tokenizer_2": CLIP_WORDS,
            "unet": (diffusers.UNet2DConditionModel, UNET),
        },
    ),
    "sd3.5-large": (
        diffusers.StableDiffusion3Pipeline,
        {
            "scheduler": (FLOW, {"shift": 3.0}),
            "vae": (diffusers.AutoencoderKL, VAE_16 | {"scaling_factor": 1.5305, "shift_factor": 0.0609}),
            "text_encoder": (transformers.CLIPTextModelWithProjection, CLIP_L),
            "tokenizer": CLIP_WORDS,
            "text_encoder_2": BIG_CLIP,
            "tokenizer_2": CLIP_WORDS,
            "text_encoder_3": T5,
            "tokenizer_3": T5_WORDS,
            "transformer": (diffusers.SD3Transformer2DModel, MMDIT),
        },
    ),
    "flux2-dev": (  # whose transformer and VAE are their classes' defaults, as Z-Image's transformer is
        diffusers.Flux2Pipeline,
        {
            "scheduler": (FLOW, {"shift": 3.0, "use_dynamic_shifting": True}),
            "vae": (diffusers.AutoencoderKLFlux2, {}),
            "text_encoder": MISTRAL,
            "tokenizer": (byte_tokenizer, {"padding_side": "left"}),
            "transformer": (diffusers.Flux2Transformer2DModel, {}),
        },
    ),
    "z-image-turbo": (
        diffusers.ZImagePipeline,
        {
            "scheduler": (FLOW, {"shift": 3.0}),
            "vae": FLUX_VAE,
            "text_encoder": QWEN3,
            "tokenizer": (byte_tokenizer, {"padding_side": "right"}),
            "transformer": (diffusers.ZImageTransformer2DModel, {}),
        },
    ),
    "flux2-klein": (
        partial(diffusers.Flux2KleinPipeline, is_distilled=True),
        {
            "scheduler": (FLOW, {"shift": 3.0, "use_dynamic_shifting": True}),
            "vae": (diffusers.AutoencoderKLFlux2, {}),
            "text_encoder": (transformers.Qwen3ForCausalLM, QWEN3[1]),
            "tokenizer": (byte_tokenizer, {"padding_side": "right"}),
            "transformer": (
                diffusers.Flux2Transformer2DModel,
                {
                    "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
                    "guidance_embeds": False,
                },
            ),
        },
    ),
    "qwen-image": (  # whose transformer and VAE are their classes' defaults, as Chroma's transformer is
        diffusers.QwenImagePipeline,
        {
            "scheduler": (FLOW, {"use_dynamic_shifting": True, "max_image_seq_len": 8192, "max_shift": 0.9}),
            "vae": (diffusers.AutoencoderKLQwenImage, {}),
            "text_encoder": QWEN25_VL,
            "tokenizer": (byte_tokenizer, {"padding_side": "right"}),
            "transformer": (diffusers.QwenImageTransformer2DModel, {}),
        },
    ),
    "chroma": (
        diffusers.ChromaPipeline,
        {
            "scheduler": (FLOW, {}),
            "vae": FLUX_VAE,
            "text_encoder": T5,
            "tokenizer": T5_WORDS,
            "transformer": (diffusers.ChromaTransformer2DModel, {}),
        },
    ),
}  # fmt: skip


def write(model: str, volume: Path) -> Path:
    """Put `model` on `volume`, unless it is there already; its folder. Never more than a component is in memory."""
    spec = MODELS[model] if MODELS[model].revision else replace(MODELS[model], revision="0" * 40)
    folder = fetched_folder(spec, volume)
    if (folder / "manifest.json").exists():
        return folder
    diffusers.utils.logging.set_verbosity_error()  # it advises against casting what has no memory yet
    transformers.utils.logging.disable_progress_bar()
    kind, parts = CONFIGS[model]
    pipeline = kind(**{name: made(part) for name, part in parts.items()})
    for name in parts:
        component = getattr(pipeline, name)
        if isinstance(component, torch.nn.Module):
            randomise(component)
            component.save_pretrained(folder / name, max_shard_size=SHARD)
            component.to("meta")
            torch.cuda.empty_cache()  # others will want the GPU while this process lives
        else:
            component.save_pretrained(folder / name)
    pipeline.save_config(folder)
    write_manifest(folder, {"model": model, "revision": spec.revision, "weights": "random"})
    return folder


def made(part: Part) -> Any:
    """The component; if it has weights, in bf16 and without memory for them."""
    kind, config = part
    if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
        return kind(**config)
    with torch.device("meta"):
        module = kind(kind.config_class(**config)) if hasattr(kind, "config_class") else kind(**config)
    return module.to(torch.bfloat16).eval()


@torch.no_grad()
def randomise(module: Any) -> None:
    """Give `module` memory and weights: matrices random, as large as their rows are long; norms one, biases zero."""
    module.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    for name, weight in (*module.named_parameters(), *module.named_buffers()):
        if weight.ndim > 1 and weight.is_floating_point():
            weight.normal_(0, weight[0].numel() ** -0.5)
        else:
            weight.fill_(0 if name.endswith(("bias", "mean", "tracked")) else 1)


if __name__ == "__main__":
    print(write(sys.argv[1], Path(sys.argv[2])))
