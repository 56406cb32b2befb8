"""What single files of transformers and text encoders call their tensors: a table for each way.

Tests hold each to diffusers' own converter, which copies, and takes FLUX.1 and Chroma in their true width alone.
"""

import re
from collections.abc import Callable
from dataclasses import replace

from handler.catalog.naming import Rule, Shapes, To, by, looked_up, rules, within

QKV = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
EMBEDDED = {"in_layer": "linear_1", "out_layer": "linear_2"}
SWAPPED = To(("norm_out.linear",), turn="swap")
ENDS = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
DOUBLE = {  # of FLUX.1 and Chroma
    f"double_blocks.#.{mine}_{part}": f"transformer_blocks.#.{name}"
    for mine, parts in {
        "img": {
            "attn.norm.query_norm": "attn.norm_q", "attn.norm.key_norm": "attn.norm_k", "attn.proj": "attn.to_out.0",
            "mlp.0": "ff.net.0.proj", "mlp.2": "ff.net.2",
        },
        "txt": {
            "attn.norm.query_norm": "attn.norm_added_q", "attn.norm.key_norm": "attn.norm_added_k",
            "attn.proj": "attn.to_add_out", "mlp.0": "ff_context.net.0.proj", "mlp.2": "ff_context.net.2",
        },
    }.items()
    for part, name in parts.items()
}  # fmt: skip
JOINT = {
    f"double_blocks.#.{mine}_attn.qkv": tuple(f"transformer_blocks.#.attn.{name}" for name in names)
    for mine, names in {"img": QKV, "txt": ADDED}.items()
}
SINGLE: dict[str, Rule] = {  # queries, keys, values and the first half of an MLP that is four times as wide
    "single_blocks.#.linear1": To(
        tuple(f"single_transformer_blocks.#.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
        (1, 1, 1, 4),
    ),
    "single_blocks.#.linear2": "single_transformer_blocks.#.proj_out",
    "single_blocks.#.norm.query_norm": "single_transformer_blocks.#.attn.norm_q",
    "single_blocks.#.norm.key_norm": "single_transformer_blocks.#.attn.norm_k",
}
MODULATED: dict[str, Rule] = {
    "double_blocks.#.img_mod.lin": "transformer_blocks.#.norm1.linear",
    "double_blocks.#.txt_mod.lin": "transformer_blocks.#.norm1_context.linear",
    "single_blocks.#.modulation.lin": "single_transformer_blocks.#.norm.linear",
    "final_layer.adaLN_modulation.1": SWAPPED,
}
FLUX = rules(
    time=within("time_in.", "time_text_embed.timestep_embedder.", EMBEDDED),
    text=within("vector_in.", "time_text_embed.text_embedder.", EMBEDDED),
    guidance=within("guidance_in.", "time_text_embed.guidance_embedder.", EMBEDDED),
    ends=ENDS, double=DOUBLE, joint=JOINT, single=SINGLE, modulated=MODULATED,
)  # fmt: skip
GUIDED = "distilled_guidance_layer."
CHROMA = rules(
    ends=ENDS, double=DOUBLE, joint=JOINT, single=SINGLE,
    guidance=within(GUIDED, GUIDED, {"in_proj": "in_proj", "out_proj": "out_proj", "norms.#": "norms.#"}),
    layers=within(f"{GUIDED}layers.#.", f"{GUIDED}layers.#.", EMBEDDED),
)  # fmt: skip
FLUX2 = rules(
    time=within("time_in.", "time_guidance_embed.timestep_embedder.", EMBEDDED),
    guidance=within("guidance_in.", "time_guidance_embed.guidance_embedder.", EMBEDDED),
    ends=ENDS, joint=JOINT,
    double={a: b.replace("net.0.proj", "linear_in").replace("net.2", "linear_out") for a, b in DOUBLE.items()},
    single=within("single_blocks.#.", "single_transformer_blocks.#.attn.", {
        "linear1": "to_qkv_mlp_proj", "linear2": "to_out", "norm.query_norm": "norm_q", "norm.key_norm": "norm_k",
    }),
    modulated={
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        "final_layer.adaLN_modulation.1": SWAPPED,
    },
)  # fmt: skip
SD3 = rules(
    start={
        "pos_embed": "pos_embed.pos_embed", "x_embedder.proj": "pos_embed.proj", "context_embedder": "context_embedder",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    },
    joint={
        f"joint_blocks.#.{mine}.{attn}.qkv": tuple(f"transformer_blocks.#.{attn}.{name}" for name in names)
        for mine, attn, names in (
            ("x_block", "attn", QKV), ("context_block", "attn", ADDED), ("x_block", "attn2", QKV),
        )
    },
    image=within("joint_blocks.#.x_block.", "transformer_blocks.#.", {
        "attn.ln_q": "attn.norm_q", "attn.ln_k": "attn.norm_k", "attn.proj": "attn.to_out.0",
        "attn2.ln_q": "attn2.norm_q", "attn2.ln_k": "attn2.norm_k", "attn2.proj": "attn2.to_out.0",
        "adaLN_modulation.1": "norm1.linear", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2",
    }),
    text=within("joint_blocks.#.context_block.", "transformer_blocks.#.", {
        "attn.ln_q": "attn.norm_added_q", "attn.ln_k": "attn.norm_added_k", "attn.proj": "attn.to_add_out",
        "adaLN_modulation.1": "norm1_context.linear", "mlp.fc1": "ff_context.net.0.proj", "mlp.fc2": "ff_context.net.2",
    }),
    end={"final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": SWAPPED},
)  # fmt: skip


def sd3(shapes: Shapes) -> Callable[[str], To | None]:
    """Stable Diffusion 3's, whose last block's modulation of text is in another order."""
    last = max((int(name.split(".")[1]) for name in shapes if re.match(r"joint_blocks\.\d{1,3}\.", name)), default=-1)
    swapped = f"joint_blocks.{last}.context_block.adaLN_modulation.1."

    def told(name: str) -> To | None:
        to = looked_up(name, SD3)
        return replace(to, turn="swap") if to and name.startswith(swapped) else to

    return told


CLIP = rules(
    ends={
        "positional_embedding": "embeddings.position_embedding.weight", "token_embedding": "embeddings.token_embedding",
        "ln_final": "final_layer_norm", "text_projection": To(("text_projection.weight",), turn="transpose"),
        "logit_scale": To(()),
    },
    layers=within("transformer.resblocks.#.", "encoder.layers.#.", {
        "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }),
    attention={
        f"transformer.resblocks.#.attn.in_proj_{leaf}": tuple(
            f"encoder.layers.#.self_attn.{name}_proj.{leaf}" for name in "qkv"
        )
        for leaf in ("weight", "bias")
    },
)  # fmt: skip
T5_BLOCK = {
    **{f"attn_{name}": f"0.SelfAttention.{name}" for name in "qkvo"},
    "attn_rel_b": "0.SelfAttention.relative_attention_bias", "attn_norm": "0.layer_norm", "ffn_norm": "1.layer_norm",
    "ffn_gate": "1.DenseReluDense.wi_0", "ffn_up": "1.DenseReluDense.wi_1", "ffn_down": "1.DenseReluDense.wo",
}  # fmt: skip
T5 = rules(  # as llama.cpp has it
    ends={"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"},
    block=within("enc.blk.#.", "encoder.block.#.layer.", T5_BLOCK),
)
Z_IMAGE_ATTENTION = {"out": "to_out.0", "q_norm": "norm_q", "k_norm": "norm_k"}


def z_image(shapes: Shapes) -> Callable[[str], To | None]:
    def told(name: str) -> To | None:
        stem, _, leaf = name.rpartition(".")
        head, attention, part = stem.rpartition("attention.")
        if part == "qkv" and attention:
            return To(tuple(f"{head}attention.{each}.{leaf}" for each in QKV))
        if attention:
            return To((f"{head}attention.{Z_IMAGE_ATTENTION.get(part, part)}.{leaf}",))
        first, _, rest = name.partition(".")
        return To((f"all_{first}.2-1.{rest}",) if first in ("final_layer", "x_embedder") else (name,))

    return told


def same(shapes: Shapes) -> Callable[[str], To | None]:
    """Diffusers' or transformers' own."""
    return lambda name: To((name,))


flux, chroma, flux2, open_clip, llama_t5 = map(by, (FLUX, CHROMA, FLUX2, CLIP, T5))
