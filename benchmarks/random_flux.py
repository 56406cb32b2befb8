"""A FLUX.1 of full size with random weights, on a volume as `fetch` would leave it: speed does not depend on values.

Sizes are those in black-forest-labs/FLUX.1-schnell's configuration files. The tokenizers are spark's: they only decide
which rows of the embeddings are looked up.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from handler import MODELS, fetched_folder, write_manifest

SPARK = Path(__file__).parent.parent / "handler" / "weights" / "spark"
TRANSFORMER: dict[str, Any] = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": False}
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CLIP: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768}
CLIP |= {"num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 49408}
T5: dict[str, Any] = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64}
T5 |= {"vocab_size": 32128, "feed_forward_proj": "gated-gelu", "use_cache": False}


def write(model: str, volume: Path) -> None:
    """Put `model` on `volume`, unless it is there already."""
    spec = MODELS[model]
    folder = fetched_folder(spec, volume)
    if (folder / "manifest.json").exists():
        return
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        transformer=randomised(lambda: FluxTransformer2DModel(**TRANSFORMER)),
        vae=randomised(lambda: AutoencoderKL(**VAE)),
        text_encoder=randomised(lambda: CLIPTextModel(CLIPTextConfig(**CLIP))),
        text_encoder_2=randomised(lambda: T5EncoderModel(T5Config(**T5))),
        tokenizer=CLIPTokenizer.from_pretrained(SPARK / "tokenizer"),
        tokenizer_2=T5Tokenizer.from_pretrained(SPARK / "tokenizer_2"),
    )
    pipeline.save_pretrained(folder)
    write_manifest(folder, {"model": model, "revision": spec.revision, "weights": "random"})


@torch.no_grad()
def randomised(build: Any) -> Any:
    """The module `build` makes, in bf16, never allocated in fp32: matrices random, norms one, biases zero."""
    with torch.device("meta"):
        module = build()
    module = module.to(torch.bfloat16).to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.02)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return module.cpu()
