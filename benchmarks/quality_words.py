"""What spark makes of OpenAI's words for quality: how many pictures are right.

python benchmarks/quality_words.py [--pictures 60]
"""

import argparse
import json
import platform
from typing import Any

from PIL import Image

from handler import ImageRequest, Settings, Worker
from report import RESULTS
from spark.checker import JUDGED, check
from spark.scenes import held_out

RESULT = RESULTS / "quality_words.json"
WORDS = ("low", "medium", "auto", "high", "xhigh", "max")  # standard is auto, and hd is high


def measured(worker: Worker, word: Any, scenes: list[Any]) -> dict[str, float]:
    """Steps, and percent of the pictures that are right in all that is judged."""
    right = 0
    for seed, (prompt, scene) in enumerate(scenes):
        recipe = worker.spec.recipe(ImageRequest(prompt=prompt, seed=seed, quality=word))
        pixels, _ = worker.generate(recipe)
        verdict = check(Image.fromarray(pixels.rgb), scene)
        right += all(getattr(verdict, name) for name in JUDGED)
    return {"steps": recipe.steps, "right_percent": round(100 * right / len(scenes), 1)}


def main() -> None:
    """Measure each word, print it, and keep all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=60)
    scenes = held_out(parser.parse_args().pictures, "validation", "many", "everyday")
    with Worker.boot(Settings(cold_start_budget_s=3600)) as worker:
        found = {word: measured(worker, word, scenes) for word in WORDS}
        about = {"model": worker.spec.id, "device": worker.hardware.reason, "machine": platform.machine()}
    RESULT.write_text(json.dumps({**about, "pictures": len(scenes), "words": found}, indent=1) + "\n")
    for word, row in found.items():
        print(f"{word:<9} {row['steps']:>2} steps  {row['right_percent']:>5} % right")


if __name__ == "__main__":
    main()
