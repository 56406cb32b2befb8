"""ComfyUI's own pictures of Stable Diffusion 1.5's architecture, drawn here: how far each is off, of 255.

FOLDER has them: an `index.json` that says of each picture how ComfyUI drew it, and the pictures. The weights are random
and in one file, which ComfyUI was given too; it has no vocabulary of CLIP's, so prompts come as the tokens that
`index.json` has of them, each with its weight, and are encoded here as ComfyUI does. All else is a worker's.

    python benchmarks/comfy_pictures.py FOLDER --volume VOLUME --weights FILE --save

VOLUME holds `checkpoints/FILE` and the row `sd1.5` (any weights: `benchmarks/random_models.py` makes some).
"""

import argparse
import asyncio
import importlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from handler import MODELS, Engine, Recipe, Settings
from report import measuring

WINDOW, END = 77, 49407  # of CLIP: how many tokens it takes at once, and the one that fills them up
Told = list[list[list[float]]]  # chunks of tokens, each with its weight


class Encoder:
    """What the family's `encode` is replaced by: tokens instead of words."""

    def __init__(self, tokens: Mapping[str, Told]) -> None:
        self.tokens, self.skip = tokens, 0

    def __call__(self, pipeline: Any, recipe: Recipe, _: int) -> dict[str, Any]:
        """Embeddings (1, a multiple of 77, width), as long as each other."""
        sides = [self._embedded(pipeline, text or "") for text in (recipe.prompt, recipe.negative_prompt)]
        longest = max(side.shape[1] for side in sides)
        context, negative = (side.repeat(1, longest // side.shape[1], 1) for side in sides)
        scale = recipe.sampling.cfg if recipe.sampling else recipe.guidance
        return {"prompt_embeds": context, "negative_prompt_embeds": negative, "guidance_scale": scale}

    def _embedded(self, pipeline: Any, text: str) -> Any:
        return torch.cat(
            [self._chunk(pipeline.text_encoder, chunk) for chunk in self.tokens.get(text, self.tokens[""])], 1
        )

    def _chunk(self, clip: Any, chunk: list[list[float]]) -> Any:
        numbers = [int(token) for token, _ in chunk] + [END] * (WINDOW - len(chunk))
        weights = torch.tensor([weight for _, weight in chunk] + [1.0] * (WINDOW - len(chunk)))[None, :, None]
        found, empty = (self._states(clip, row) for row in (numbers, numbers[:1] + [END] * (WINDOW - 1)))
        return torch.where(weights == 1, found, empty + (found - empty) * weights)

    def _states(self, clip: Any, numbers: list[int]) -> Any:
        states = clip(torch.tensor([numbers]), output_hidden_states=True).hidden_states[-1 - self.skip]
        return getattr(clip, "text_model", clip).final_layer_norm(states)


def pixels(path: Path | io.BytesIO) -> Any:
    """A picture as RGB."""
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def asked(folder: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked for the pictures of one graph, some of `init.png` and `mask.png`."""
    graph = (folder / told["graph"]).read_text()
    images = {"images": [(folder / "init.png").read_bytes()]} if '"LoadImage"' in graph else {}
    masks = {"mask": _mask(pixels(folder / "mask.png")[..., 0])} if '"LoadImageMask"' in graph else {}
    return {
        **{name: told[name] for name in ("seed", "width", "height")},
        "prompt": told["positive"],
        "negative_prompt": told["negative"],
        "n": len(told["files"]),
        "sampling": {name: told[name] for name in ("steps", "cfg", "denoise", "sampler", "scheduler")},
        **images,
        **masks,
    }


def _mask(white: Any) -> bytes:
    """A mask as requests have it, transparent where ComfyUI's is white."""
    file = io.BytesIO()
    Image.fromarray(np.dstack([white * 0] * 3 + [255 - white])).save(file, "PNG")
    return file.getvalue()


async def draw(options: argparse.Namespace, index: Mapping[str, Any], figures: dict[str, Any]) -> None:
    """Each graph's pictures, and how far they are off."""
    encoder = Encoder(index["tokens"])
    family: Any = importlib.import_module(MODELS["sd1.5"].family)
    family.encode = encoder
    own: dict[str, Any] = {"model": "sd1.5", "volume": options.volume, "weights": (options.weights,)}
    patient = {"cold_start_budget_s": 3600, "deadline_s": 3600, "hang_s": 3600}
    settings = Settings(**own, **patient, device="cpu", precision="fp32", compile="off")
    async with Engine(settings) as engine:
        for told in index["pictures"]:
            encoder.skip = 1 if "CLIPSetLastLayer" in (options.folder / told["graph"]).read_text() else 0
            pictures = await engine.generate(**asked(options.folder, told))
            for name, picture in zip(told["files"], pictures, strict=True):
                off = np.abs(pixels(io.BytesIO(picture.data)).astype(int) - pixels(options.folder / name))
                figures[name] = {"max": int(off.max()), "mean": round(float(off.mean()), 5)}
                print(f"{name:<42} {off.max():3} {off.mean():8.5f}  {int((off > 0).sum())} of {off.size}", flush=True)


def main() -> None:
    """Draw, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--volume", type=Path, required=True)
    parser.add_argument("--weights", required=True, help="the file below checkpoints/")
    parser.add_argument("--save", action="store_true", help="write results/comfy_pictures.json")
    options = parser.parse_args()
    index = json.loads((options.folder / "index.json").read_text())
    with measuring("comfy_pictures", options.save) as figures:
        figures |= {"comfyui": index["comfyui"], "pictures": {}}
        asyncio.run(draw(options, index, figures["pictures"]))


if __name__ == "__main__":
    main()
