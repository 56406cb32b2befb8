"""How many ComfyUI workflows of some folders would be drawn: `python benchmarks/comfy_corpus.py DIR...`.

A DIR has files as `comfy explain` takes them, and beside it or in it `index.json`, which says each one's kind. Every
file is judged as `explain` does it: on the worker that it asks for, with every file that it names. What is counted is
so what the nodes allow; nothing is drawn.
"""

import argparse
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from handler import MODELS, Settings
from handler.api.comfy.explaining import explain
from handler.api.comfy.foretelling import Machine
from handler.api.comfy.grounds import Ground
from handler.api.dialects.comfy.opening import opened
from handler.catalog.gpus import GPUS

RESULT = Path(__file__).parent / "results" / "comfy_corpus.json"
COUNTED = ("text to image", "image to image")


def main(folders: list[Path]) -> int:
    """Print a line for each file and write the counts."""
    known = [one for folder in folders for one in files(folder)]
    found = [(about, *judged(path)) for path, about in known]
    for about, verdict, why in sorted(found, key=lambda one: (one[0]["what"], one[0]["file"])):
        print(f"{verdict:8} {about['what']:24.24} {about['file']:20} {why}")
    counts = Counter((about["what"], verdict) for about, verdict, _ in found)
    kinds = {
        kind: {verdict: counts[kind, verdict] for verdict in ("runs", "in part", "refused")}
        for kind in sorted({about["what"] for about, _, _ in found})
    }
    plain = sum(sum(kinds.get(kind, {}).values()) for kind in COUNTED)
    drawn = sum(kinds.get(kind, {}).get(verdict, 0) for kind in COUNTED for verdict in ("runs", "in part"))
    report = {"files": len(found), "kinds": kinds, "text_and_image_to_image": {"all": plain, "drawn": drawn}}
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0


def files(folder: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Each workflow with what the index says of it."""
    index = next((path for path in (folder / "index.json", folder.parent / "index.json") if path.is_file()), None)
    known = {one["file"]: one for one in json.loads(index.read_text())} if index else {}
    for path in sorted(folder.glob("*.json")):
        if path.name != "index.json":
            yield path, known.get(path.name, {"file": path.name, "what": "deployments"})


def judged(path: Path) -> tuple[str, str]:
    """Whether it runs, and what is said of it: the report on an empty volume, with an image for each that is named."""
    report = explain(opened(path.read_bytes()), GROUND)
    faults = dict.fromkeys(f"{node.kind}: {fault}" for node in report.nodes for fault in node.faults)
    said = [*(() if faults else report.why), *faults] or [note for node in report.nodes for note in node.notes]
    return report.verdict.removeprefix("runs "), " | ".join([report.model.id, *said])


def picture(name: str, subfolder: str, folder: str) -> bytes:
    """Any image: a grey one with a hole."""
    buffer = io.BytesIO()
    image = Image.new("RGBA", (1024, 768), (128, 128, 128, 255))
    image.paste((0, 0, 0, 0), (200, 200, 500, 500))
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


NOWHERE = Path("/nonexistent")  # a volume without files
GROUND = Ground(Settings(volume=NOWHERE), MODELS["spark"], Machine(GPUS["H200"]), picture, fixed=False)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", metavar="DIR", type=Path, nargs="+", help="files of ComfyUI's")
    sys.exit(main(parser.parse_args().folders))
