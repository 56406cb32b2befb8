"""Which model a single file is of, told from its tensors' names and shapes alone: a row for each, special ones first.

What sizes decide is asked of one side of one tensor, and only where names say nothing: then the table also knows models
of the same make in other sizes. Whether a file fits a row to the last tensor is for `volume/overlay.py` to say.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from handler.catalog.models import MODELS
from handler.catalog.naming import Naming, Shapes
from handler.catalog.originals import chroma, flux, flux2, llama_t5, open_clip, same, sd3, z_image
from handler.catalog.stable import unet, vae

Kind = Literal["denoiser", "vae", "encoder", "other"]
PREFIXES = (  # of the parts of a checkpoint
    "model.diffusion_model.", "first_stage_model.", "conditioner.embedders.0.transformer.",
    "conditioner.embedders.0.model.", "conditioner.embedders.1.model.", "cond_stage_model.transformer.",
    "cond_stage_model.model.", "text_encoders.", "model_ema.", "control_model.", "diffusion_model.", "vae.",
)  # fmt: skip
ENCODER = re.compile(r"text_encoders\.\w+\.transformer\.")  # each by a name of its own
TAIL = re.compile(r"^((text_model|model|language_model|transformer)\.)+")  # what releases of transformers add or leave
NORM = re.compile(r"(?<=\.key_norm\.)weight$")  # of FLUX: later files do not call it scale
UNNEEDED = ("model_ema.",)


@dataclass(frozen=True, slots=True)
class Sign:
    """What tells it: tensors that are there and that are not, sides of (tensor, axis) as long, tensors of a rank."""

    has: tuple[str, ...]
    naming: Naming = same
    lacks: tuple[str, ...] = ()
    sides: Mapping[tuple[str, int], int] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)

    def fits(self, shapes: Shapes) -> bool:
        """Whether tensors of these shapes have it."""
        return (
            all(name in shapes for name in self.has)
            and not any(name in shapes for name in self.lacks)
            and all(shapes.get(name, ())[axis : axis + 1] == (size,) for (name, axis), size in self.sides.items())
            and all(len(shapes.get(name, ())) == rank for name, rank in self.ranks.items())
        )


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model, or a part of one: its name for people, what it is in a pipeline, which rows of the catalogue take it."""

    name: str
    kind: Kind
    signs: tuple[Sign, ...]
    rows: tuple[str, ...] = ()
    clue: str = ""  # what to do with it instead


@dataclass(frozen=True, slots=True)
class Part:
    """The tensors of a file whose names begin with `prefix`, which is left out: what they are, by which naming."""

    prefix: str
    shapes: Shapes
    architecture: Architecture | None = None
    naming: Naming = same


def _of(name: str, kind: Kind, *signs: Sign, rows: str = "", clue: str = "") -> Architecture:
    return Architecture(name, kind, signs, tuple(rows.split()), clue)


SDXL = "sdxl sdxl-turbo sdxl-lightning"
LDM = "input_blocks.1.0.in_layers.0.weight"
IN = "input_blocks.0.0.weight"
UNET = "down_blocks.0.resnets.0.norm1.weight"
FLUX = "double_blocks.0.img_attn.norm.key_norm.scale"
FLUX_ = "single_transformer_blocks.0.attn.to_q.weight"
FLUX2 = "single_stream_modulation.lin.weight"
FLUX2_ = "single_stream_modulation.linear.weight"
SD3 = "joint_blocks.0.x_block.attn.qkv.weight"
SD3_ = "transformer_blocks.0.attn.add_q_proj.weight"
KLEIN_9B = "the FLUX.2 [klein] of 9 B"
CONTROL = "No ControlNet is loaded yet."
VIDEO = "It draws videos, and no row does."
NO_ROW = "No row of the catalogue is of that kind."
OTHER_VAE = "Bring it in diffusers' layout, with KINDLING_VAE."
LORA = "A LoRA is no model: it changes one."
DENOISERS = (
    _of("SDXL inpainting", "denoiser", Sign((LDM, "label_emb.0.0.weight"), sides={(IN, 1): 9}), clue=NO_ROW),
    _of("an inpainting Stable Diffusion", "denoiser", Sign((LDM,), sides={(IN, 1): 9}),
        clue=NO_ROW),
    _of("InstructPix2Pix", "denoiser", Sign((LDM,), sides={(IN, 1): 8}), clue=NO_ROW),
    _of("Stable Video Diffusion", "denoiser", Sign((LDM, "input_blocks.1.0.time_stack.in_layers.0.weight")),
        clue=VIDEO),
    _of("the SDXL refiner", "denoiser",
        Sign((LDM, "input_blocks.4.1.transformer_blocks.3.norm1.weight", "label_emb.0.0.weight")),
        Sign((UNET, "down_blocks.1.attentions.0.transformer_blocks.3.norm1.weight", "add_embedding.linear_1.weight")),
        clue=NO_ROW),
    _of("SDXL", "denoiser", Sign((LDM, "label_emb.0.0.weight"), unet), Sign((UNET, "add_embedding.linear_1.weight")),
        rows=SDXL),
    _of("Stable Diffusion 2", "denoiser", Sign((LDM,), unet, ranks={"input_blocks.1.1.proj_in.weight": 2}),
        Sign((UNET,), ranks={"down_blocks.0.attentions.0.proj_in.weight": 2}), clue=NO_ROW),
    _of("Stable Diffusion 1.5", "denoiser", Sign((LDM,), unet),
        Sign((UNET, "conv_in.weight", "time_embedding.linear_1.weight")), rows="sd1.5"),
    _of("Chroma Radiance", "denoiser", Sign(("nerf_image_embedder.embedder.0.weight",)), clue=NO_ROW),
    _of("Chroma", "denoiser", Sign(("distilled_guidance_layer.in_proj.weight", FLUX), chroma),
        Sign(("distilled_guidance_layer.in_proj.weight", FLUX_)), rows="chroma"),
    _of("FLUX.1 Fill", "denoiser", Sign((FLUX,), sides={("img_in.weight", 1): 384}),
        Sign((FLUX_,), sides={("x_embedder.weight", 1): 384}), clue=NO_ROW),
    _of("FLUX.1 Canny or Depth", "denoiser", Sign((FLUX,), sides={("img_in.weight", 1): 128}, lacks=(FLUX2,)),
        Sign((FLUX_,), sides={("x_embedder.weight", 1): 128}), clue=NO_ROW),
    _of("FLUX.2 [dev]", "denoiser", Sign((FLUX2, "guidance_in.in_layer.weight"), flux2),
        Sign((FLUX2_, "time_guidance_embed.guidance_embedder.linear_1.weight")), rows="flux2-dev"),
    _of(KLEIN_9B, "denoiser", Sign((FLUX2, "double_blocks.7.img_attn.proj.weight"), flux2),
        Sign((FLUX2_, "transformer_blocks.7.attn.to_q.weight")), clue=NO_ROW),
    _of("FLUX.2 [klein]", "denoiser", Sign((FLUX2,), flux2), Sign((FLUX2_,)), rows="flux2-klein"),
    _of("HunyuanVideo", "denoiser", Sign(("txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias",)),
        clue=VIDEO),
    _of("FLUX.1 [dev]", "denoiser", Sign((FLUX, "guidance_in.in_layer.weight"), flux),
        Sign((FLUX_, "time_text_embed.guidance_embedder.linear_1.weight")), rows="flux-dev"),
    _of("FLUX.1 [schnell]", "denoiser", Sign((FLUX, "vector_in.in_layer.weight"), flux),
        Sign((FLUX_, "time_text_embed.text_embedder.linear_1.weight")), rows="flux-schnell spark"),
    _of("Stable Diffusion 3.5 large", "denoiser", Sign((SD3, "joint_blocks.37.x_block.attn.qkv.weight"), sd3),
        Sign((SD3_, "transformer_blocks.37.attn.to_q.weight", "pos_embed.proj.weight")), rows="sd3.5-large"),
    _of("Stable Diffusion 3", "denoiser", Sign((SD3,), sd3), Sign((SD3_, "pos_embed.proj.weight")), clue=NO_ROW),
    _of("Qwen-Image 2.1", "denoiser", Sign(("txt_in.text_norm.weight",)), clue=NO_ROW),
    _of("Qwen-Image", "denoiser", Sign((SD3_, "txt_norm.weight", "img_in.weight")),
        rows="qwen-image qwen-image-lightning"),
    _of("Z-Image", "denoiser", Sign(("layers.0.adaLN_modulation.0.weight", "cap_embedder.0.weight"), z_image),
        rows="z-image-turbo"),
    _of("Lumina 2", "denoiser", Sign(("layers.0.adaLN_modulation.1.weight", "cap_embedder.0.weight")), clue=NO_ROW),
    _of("Wan", "denoiser", Sign(("head.modulation",)), clue=VIDEO),
    _of("LTX-Video", "denoiser", Sign(("patchify_proj.weight",)), clue=VIDEO),
    _of("Mochi", "denoiser", Sign(("blocks.0.attn.qkv_x.weight",)), clue=VIDEO),
    _of("HiDream", "denoiser", Sign(("double_stream_blocks.0.block.adaLN_modulation.1.bias",)), clue=NO_ROW),
    _of("AuraFlow", "denoiser", Sign(("double_layers.0.attn.w1q.weight",)), clue=NO_ROW),
    _of("Krea 2", "denoiser", Sign(("txtfusion.projector.weight",)), clue=NO_ROW),
    _of("FLUX.3", "denoiser", Sign(("early_stream_modulations.image.lin.weight",)), clue=NO_ROW),
    _of("Stable Cascade", "denoiser", Sign(("clip_txt_mapper.weight",)), clue=NO_ROW),
)  # fmt: skip
OTHERS = (
    _of("a ControlNet", "other", Sign(("input_hint_block.0.weight",)),
        Sign(("controlnet_cond_embedding.conv_in.weight",)),
        Sign(("controlnet_x_embedder.weight",)), Sign(("control_all_x_embedder.2-1.weight",)), clue=CONTROL),
    _of("an embedding of a prompt", "other", Sign(("emb_params",)), Sign(("clip_l", "clip_g")),
        clue="Put it into embeddings/ on the volume and name it in a prompt: embedding:NAME."),
    _of("a picture enlarger", "other", Sign(("body.0.rdb1.conv1.weight",)), Sign(("conv_first.weight",)),
        Sign(("model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight")), clue=NO_ROW),
    _of("a CLIP that sees", "other", Sign(("vision_model.embeddings.class_embedding",)), clue=NO_ROW),
)  # fmt: skip
UMT5 = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
T5 = "encoder.block.0.layer.0.SelfAttention.q.weight"
FLUX_LIKE = "flux-dev flux-schnell chroma z-image-turbo sd3.5-large spark"
PARTS = (
    _of("the VAE of FLUX.2", "vae", Sign(("decoder.up.0.block.0.norm1.weight", "bn.running_mean"), vae),
        Sign(("decoder.up_blocks.0.resnets.0.norm1.weight", "bn.running_mean")), rows="flux2-dev flux2-klein"),
    _of("the VAE of FLUX.1, SD3 or Z-Image", "vae",
        Sign(("decoder.up.0.block.0.norm1.weight",), vae, lacks=("post_quant_conv.weight",)),
        Sign(("decoder.up_blocks.0.resnets.0.norm1.weight",), lacks=("post_quant_conv.weight",)), rows=FLUX_LIKE),
    _of("the VAE of Stable Diffusion or SDXL", "vae", Sign(("decoder.up.0.block.0.norm1.weight",), vae),
        Sign(("decoder.up_blocks.0.resnets.0.norm1.weight",)), rows=f"sd1.5 {SDXL}"),
    _of("the VAE of Wan or Qwen-Image", "vae", Sign(("decoder.middle.0.residual.0.gamma",)),
        clue=OTHER_VAE),
    _of("a tiny VAE", "vae", Sign(("decoder.layers.1.weight",)), Sign(("decoder.1.weight", "decoder.3.conv.0.weight")),
        Sign(("taesd_decoder.1.weight",)), clue=OTHER_VAE),
    _of("OpenCLIP", "encoder",
        Sign(("transformer.resblocks.0.attn.in_proj_weight", "token_embedding.weight"), open_clip),
        rows=f"{SDXL} sd3.5-large"),
    _of("CLIP", "encoder", Sign(("encoder.layers.0.layer_norm1.weight",)),
        rows=f"sd1.5 {SDXL} flux-dev flux-schnell sd3.5-large spark"),
    _of("UMT5", "encoder", Sign((T5, UMT5)), clue=NO_ROW),
    _of("T5", "encoder", Sign((T5,)), Sign(("enc.blk.0.attn_q.weight", "token_embd.weight"), llama_t5),
        rows="flux-dev flux-schnell chroma sd3.5-large spark"),
    _of("Qwen3", "encoder", Sign(("layers.0.self_attn.q_norm.weight",)), rows="z-image-turbo flux2-klein"),
    _of("Qwen2.5-VL", "encoder", Sign(("layers.0.self_attn.q_proj.bias",)),
        rows="qwen-image qwen-image-lightning"),
    _of("Mistral", "encoder", Sign(("layers.0.self_attn.q_proj.weight",)), rows="flux2-dev"),
    _of("a language model as llama.cpp has it", "encoder", Sign(("blk.0.attn_q.weight", "token_embd.weight")),
        clue="Bring the safetensors file of it."),
)  # fmt: skip
A_LORA = Architecture("a LoRA", "other", (), clue=LORA)
LORA_MARKS = (
    ".lora_down.",
    ".lora_up.",
    ".lora_A.",
    ".lora_B.",
    ".lora.down.",
    ".hada_w1",
    ".lokr_w",
    ".oft_",
    ".diff_b",
)
TABLE = (*OTHERS, *DENOISERS, *PARTS)


def parts(shapes: Shapes, predicts: str = "") -> list[Part]:
    """What a file with tensors of these names and shapes is made of; of a checkpoint several.

    `predicts` is what the file says of that: epsilon, v, v_prediction.
    """
    if any(mark in name for name in shapes for mark in LORA_MARKS):
        return [Part("", shapes, A_LORA)]
    by_prefix: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        encoder = ENCODER.match(name)
        prefix = encoder[0] if encoder else next((each for each in PREFIXES if name.startswith(each)), "")
        by_prefix.setdefault(prefix, {})[name.removeprefix(prefix)] = shape
    found = [_part(prefix, names) for prefix, names in by_prefix.items() if prefix not in UNNEEDED]
    if "v_pred" in shapes or "edm_mean" in shapes or predicts.startswith("v"):
        found = [_predicting_v(part) for part in found]
    return [part for part in found if part.prefix or len(found) == 1 or part.architecture]


def _predicting_v(part: Part) -> Part:
    """It is of no row if it is a Stable Diffusion that would predict epsilon."""
    mine = part.architecture
    if mine is None or mine.kind != "denoiser" or not {"sd1.5", "sdxl"}.intersection(mine.rows):
        return part
    return replace(part, architecture=_of(f"{mine.name} with v-prediction", "denoiser", clue=NO_ROW))


def _part(prefix: str, shapes: Shapes) -> Part:
    bare = {TAIL.sub("", name): shape for name, shape in shapes.items()}
    first = {NORM.sub("scale", name): shape for name, shape in shapes.items()}
    for architecture in TABLE:
        for sign in architecture.signs:
            if sign.fits(first) or (architecture.kind == "encoder" and sign.fits(bare)):
                return Part(prefix, shapes, architecture, sign.naming)
    return Part(prefix, shapes)


def described(found: Iterable[Part]) -> str:
    """What a file is, for people: "SDXL with its VAE and text encoders", or "nothing known"."""
    known = [part.architecture for part in found if part.architecture]
    first = next((each for each in known if each.kind == "denoiser"), known[0] if known else None)
    if first is None:
        return "nothing known"
    kinds = {each.kind for each in known if each is not first}
    more = [words for kind, words in (("vae", "VAE"), ("encoder", "text encoders")) if kind in kinds]
    return f"{first.name} with its {' and '.join(more)}" if more and first.kind == "denoiser" else first.name


def rows(found: Iterable[Part]) -> list[str]:
    """The rows of the catalogue that take a file of these parts: those of what denoises, else of what there is."""
    known = [part.architecture for part in found if part.architecture]
    main = [each for each in known if each.kind == "denoiser"] or known
    return [row for row in MODELS if main and all(row in each.rows for each in main)]
