"""Draw tests/model/comfy's pictures with ComfyUI's own sampling and spark's weights: what new weights of spark want.

ComfyUI is no package: it is read from a folder with its code, in an environment that has what it imports beside
requirements.txt; torchvision is not needed:

    pip install --no-deps torchsde trampoline einops sentencepiece alembic Mako SQLAlchemy av kornia kornia_rs
    python benchmarks/comfy_references.py COMFYUI               how far what is kept is from what it draws now
    python benchmarks/comfy_references.py COMFYUI --save        keep what it draws

spark's own pipeline reads the prompt, encodes what a picture begins with and decodes what was sampled: so they test the
sampling alone. A picture's file says how it is drawn: SAMPLER-SCHEDULE-STEPS-dDENOISE.
"""

import argparse
import importlib
import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

ROOT = Path(__file__).parent.parent
KEPT, SPARK = ROOT / "tests" / "model" / "comfy", ROOT / "handler" / "weights" / "spark"
CROP = slice(64, 192)  # what is kept, along each side
PROMPT, SIDE, SEED, SHIFT, TOKENS = "three yellow stars on a purple background", 256, 7, 100.0, 32


def main() -> None:
    """Print each picture's largest and mean difference from the one that is kept, of 255."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path, help="the folder of its code")
    parser.add_argument("--save", action="store_true", help="keep what it draws")
    options = parser.parse_args()
    if not (options.comfyui / "comfy" / "options.py").exists():
        parser.error(f"{options.comfyui} has no comfy/options.py: name the folder of ComfyUI's code")
    pipeline = FluxPipeline.from_pretrained(SPARK)
    comfy = Comfy(options.comfyui, pipeline)
    for path in sorted(KEPT.glob("*-d*.png")):
        drawn, kept = comfy.draw(path.stem), np.array(Image.open(path).convert("RGB")).astype(int)
        off = abs(drawn - kept)
        print(f"{path.stem:30} {off.max():3} {off.mean():.4f}")
        if options.save:
            Image.fromarray(drawn.astype(np.uint8)).save(path, optimize=True)


class Comfy:
    """ComfyUI in this process, on the CPU, with spark's transformer."""

    @torch.inference_mode()
    def __init__(self, folder: Path, pipeline: FluxPipeline) -> None:
        sys.path.insert(0, str(folder))
        sys.argv[1:] = ["--cpu"]
        for name in ("torchvision", "torchvision.transforms", "torchaudio", "spandrel"):  # imported, and not used here
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
        importlib.import_module("comfy.options").enable_args_parsing()
        self.sample = importlib.import_module("comfy.sample")
        self._noise_in_steps()
        self.pipeline, vae = pipeline, pipeline.vae.config
        patcher = importlib.import_module("comfy.model_patcher").ModelPatcher
        model = patcher(self._model(vae), torch.device("cpu"), torch.device("cpu"))
        shifted = importlib.import_module("comfy_extras.nodes_model_advanced").ModelSamplingAuraFlow
        [self.model] = shifted().patch_aura(model, SHIFT)
        embeds, pooled, _ = pipeline.encode_prompt(PROMPT, PROMPT, max_sequence_length=TOKENS)
        self.told = [[embeds, {"pooled_output": pooled}]]
        side = SIDE // pipeline.vae_scale_factor
        self.empty = torch.zeros(1, vae.latent_channels, side, side)
        first = pipeline.image_processor.preprocess(Image.open(KEPT / "init_red_circle_seed3.png").convert("RGB"))
        self.first = pipeline.vae.encode(first).latent_dist.mode()

    def _noise_in_steps(self) -> None:
        """On a CPU, today's ComfyUI draws it from the seed after the picture's; 0.3.64 drew the picture's once more."""
        sampling = importlib.import_module("comfy.k_diffusion.sampling")
        given, nothing = sampling.default_noise_sampler, torch.zeros(1, 4)
        if torch.equal(given(nothing, seed=SEED)(0, 0), self.sample.prepare_noise(nothing, SEED)):
            sampling.default_noise_sampler = lambda x, seed: given(x, seed=seed + 1)

    def _model(self, vae: Any) -> Any:
        """As ComfyUI loads FLUX.1 schnell, of spark's sizes; its own detection knows those of the published models."""
        rows = importlib.import_module("comfy.supported_models")
        detection = importlib.import_module("comfy.model_detection")
        latents = importlib.import_module("comfy.latent_formats").Flux()
        latents.latent_channels = vae.latent_channels
        latents.scale_factor, latents.shift_factor = vae.scaling_factor, vae.shift_factor
        transformer, had = self.pipeline.transformer, self.pipeline.transformer.config
        channels = had.in_channels // 4
        sizes = {"in_channels": channels, "out_channels": channels, "vec_in_dim": had.pooled_projection_dim}
        sizes |= {"context_in_dim": had.joint_attention_dim, "hidden_size": transformer.inner_dim, "mlp_ratio": 4.0}
        sizes |= {"num_heads": had.num_attention_heads, "axes_dim": list(had.axes_dims_rope), "theta": 10000}
        sizes |= {"depth": had.num_layers, "depth_single_blocks": had.num_single_layers, "patch_size": 2}
        row = rows.FluxSchnell({"image_model": "flux", "qkv_bias": True, "guidance_embed": False, **sizes})
        row.latent_format = latents
        row.set_inference_dtype(torch.float32, None)
        model = row.get_model({})
        weights = detection.convert_diffusers_mmdit(dict(transformer.state_dict()), "")
        model.diffusion_model.load_state_dict(weights)
        return model.eval()

    @torch.inference_mode()
    def draw(self, how: str) -> Any:
        """The middle of the picture, height x width x 3, of 0 to 255."""
        sampler, schedule, steps, denoise = how.split("-")
        latent = self.first if float(denoise[1:]) < 1 else self.empty
        noise = self.sample.prepare_noise(latent, SEED)
        settings = {"denoise": float(denoise[1:]), "seed": SEED, "disable_pbar": True}
        named = (int(steps), 1.0, sampler, schedule)
        found = self.sample.sample(self.model, noise, *named, self.told, self.told, latent, **settings)
        decoded = self.pipeline.vae.decode(found, return_dict=False)[0]
        rgb = self.pipeline.image_processor.postprocess(decoded, "np")[0]
        return (255 * rgb[CROP, CROP]).astype(int)  # as SaveImage rounds


if __name__ == "__main__":
    main()
