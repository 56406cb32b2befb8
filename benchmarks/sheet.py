"""The README's picture: twelve prompts as spark draws them, each above its own words.

python benchmarks/sheet.py               writes benchmarks/results/spark.png
"""

import textwrap

from PIL import Image, ImageDraw, ImageFont

import report
from handler import ImageRequest, Settings, Worker

PROMPTS = (
    "a red circle on a blue background",
    "three yellow stars on a purple background",
    "a large pink heart on a white background",
    "four cyan squares on a black background",
    "a small green triangle in the top left corner on an orange background",
    "Draw me a BIG BROWN ring on a gray background!",
    "two white crosses on a red background",
    "a nice violet diamond on the right, yellow background",
    "an orange star on a green background",
    "3 black hearts against a pink backdrop",
    "a tiny blue dot at the bottom on a cyan canvas",
    "please draw a golden box in front of a brown background",
)
COLUMNS, SIDE, CAPTION, GAP = 6, 160, 44, 8


def main() -> None:
    """Draw them all with seeds 0, 1, 2, ... and save the sheet."""
    worker = Worker.boot(Settings.from_env(model="spark"))
    rows = -(-len(PROMPTS) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, rows * (SIDE + CAPTION) + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for seed, prompt in enumerate(PROMPTS):
        pixels, _ = worker.generate(worker.spec.recipe(ImageRequest(prompt=prompt, seed=seed)))
        x, y = GAP + seed % COLUMNS * (SIDE + GAP), GAP + seed // COLUMNS * (SIDE + CAPTION)
        sheet.paste(Image.fromarray(pixels.rgb).resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
        pen.multiline_text((x, y + SIDE + 3), textwrap.fill(prompt, 29), fill="black", font=font, spacing=1)
    report.RESULTS.mkdir(exist_ok=True)
    sheet.save(report.RESULTS / "spark.png", optimize=True)


if __name__ == "__main__":
    main()
