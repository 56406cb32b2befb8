"""What single files of Stable Diffusion call the tensors of U-Nets and VAEs.

Their blocks are numbered through where diffusers' begin anew wherever the picture is halved or doubled.
"""

from collections.abc import Callable

from handler.catalog.naming import Shapes, To, looked_up, rules

RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
UNET = rules(
    ends={
        "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.#.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
    }
)  # fmt: skip


SIDES = (  # name, diffusers' name, first numbered block, what ends one of diffusers'
    ("input_blocks", "down_blocks", 1, ("0.op",)),
    ("output_blocks", "up_blocks", 0, ("1.conv", "2.conv")),
)


def unet(shapes: Shapes) -> Callable[[str], To | None]:
    """Stable Diffusion's: blocks are numbered through, and end where the picture is halved or doubled."""
    places = _places(shapes)

    def told(name: str) -> To | None:
        side, _, rest = name.partition(".")
        number, _, inner = rest.partition(".")
        place, _, part = inner.partition(".")
        if side == "middle_block":
            kinds = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
            return _resampled(f"mid_block.{kinds[number]}", inner) if number in kinds else None
        if (side, number) not in places:
            return looked_up(name, UNET)
        block, layer = places[side, number]
        if part.startswith(("op.", "conv.")):
            kind = "downsamplers" if part.startswith("op.") else "upsamplers"
            return To((f"{block}.{kind}.0.conv.{part.partition('.')[2]}",))
        return _resampled(f"{block}.{'attentions' if place == '1' else 'resnets'}.{layer}", part)

    return told


def _resampled(where: str, inner: str) -> To:
    stem, _, leaf = inner.rpartition(".")
    return To((f"{where}.{RESNET.get(stem, stem)}.{leaf}",))


def _places(shapes: Shapes) -> dict[tuple[str, str], tuple[str, int]]:
    """For each numbered block: diffusers' block, and which layer of it."""
    found: dict[tuple[str, str], tuple[str, int]] = {}
    for side, new, begins, ends in SIDES:
        block = layer = 0
        for number in range(begins, 1 + _last(side, shapes)):
            found[side, str(number)] = f"{new}.{block}", layer
            ended = any(f"{side}.{number}.{end}.weight" in shapes for end in ends)
            block, layer = (block + 1, 0) if ended else (block, layer + 1)
    return found


def _last(side: str, shapes: Shapes) -> int:
    """The highest number that a name of these has right after `side`; -1 if none does."""
    words = [name.removeprefix(f"{side}.").split(".")[0] for name in shapes if name.startswith(f"{side}.")]
    return max((int(word) for word in words if word.isdecimal() and len(word) < 4), default=-1)


VAE_INNER = {
    "norm_out": "conv_norm_out",
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1": "mid_block.attentions.0",
}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
MOVED = ("encoder.quant_conv.", "decoder.post_quant_conv.")  # where FLUX.2 has them


def vae(shapes: Shapes) -> Callable[[str], To | None]:
    """AutoencoderKL, whose decoder is numbered from its end."""
    last = _last("decoder.up", shapes)

    def told(name: str) -> To | None:
        side, _, rest = name.partition(".")
        if name.startswith(MOVED):
            return To((rest,))
        if side not in ("encoder", "decoder"):
            return To((name,))
        group, _, inner = rest.partition(".")
        if group in ("down", "up"):
            return _stage(side, group, inner, last)
        for old, new in VAE_INNER.items():
            if rest.startswith(f"{old}."):
                part, _, leaf = rest.removeprefix(f"{old}.").rpartition(".")
                flat = part in ("q", "k", "v", "proj_out")
                part = ATTENTION.get(part, part).replace("nin_shortcut", "conv_shortcut")
                return To((".".join(word for word in (side, new, part, leaf) if word),), flat=flat)
        return To((name,))

    return told


def _stage(side: str, group: str, inner: str, last: int) -> To | None:
    """Of the numbered blocks of one side."""
    number, _, rest = inner.partition(".")
    if not number.isdecimal():
        return None
    block = f"{side}.{group}_blocks.{number if group == 'down' else last - int(number)}"
    kind, _, part = rest.partition(".")
    if kind == "block":
        return To((f"{block}.resnets.{part.replace('nin_shortcut', 'conv_shortcut')}",))
    return To((f"{block}.{kind}rs.0.{part}",)) if kind in ("downsample", "upsample") else None
