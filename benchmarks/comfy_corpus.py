"""How many ComfyUI workflows of some folders would be drawn: `python benchmarks/comfy_corpus.py DIR...`.

A DIR has API-format files, and beside it or in it `index.json`, which says each one's kind and family. Every file is
read as on a worker that serves what it asks for: the row of the table that its model's name means, or, where that is
somebody's own file, a row of its family with that file over it, with every LoRA and image that it names. What is
counted is so what the nodes allow; nothing is drawn.
"""

import argparse
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from PIL import Image

from handler import MODELS
from handler.api.dialects.comfy.files import stem, table
from handler.api.dialects.comfy.graph import read
from handler.api.dialects.comfy.plan import Served
from handler.core.errors import GraphRefused

RESULT = Path(__file__).parent / "results" / "comfy_corpus.json"
MODEL_INPUTS = ("ckpt_name", "unet_name", "model_name", "base_ckpt_name")
FAMILIES = {"SD1.5": "sd1.5", "SDXL": "sdxl", "FLUX.1": "flux-dev", "Anima": "sdxl", "FLUX.2": "flux2-klein"}
ENCODERS = tuple(f"clip_name{n}" for n in ("", 1, 2, 3, 4))
COUNTED = ("text to image", "image to image")


def main(folders: list[Path]) -> int:
    """Print a line for each file and write the counts."""
    known = [one for folder in folders for one in files(folder)]
    found = [(about, *judged(graph(path), about["family"])) for path, about in known]
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
            yield path, known.get(path.name, {"file": path.name, "what": "deployments", "family": ""})


def graph(path: Path) -> Mapping[str, Any]:
    """The nodes, which some files wrap."""
    found = json.loads(path.read_text())
    return found.get("prompt", found) if isinstance(found.get("prompt"), dict) else found


def judged(nodes: Mapping[str, Any], family: str) -> tuple[str, str]:
    """Whether it runs, and what is said of it."""
    served = worker(nodes, family)
    try:
        plan = read(nodes, served, picture)
    except GraphRefused as refused:
        return "refused", reasons(refused.answer) or refused.message
    wrong = reasons({"node_errors": plan.node_errors})
    return ("in part" if wrong else "runs"), wrong or f"{served.spec.id}; {' '.join(plan.notes)}"


def reasons(answer: Mapping[str, Any]) -> str:
    """Each node's first error."""
    said = [
        one["errors"][0]["message" if one["errors"][0]["type"] == "missing_node_type" else "details"]
        for one in answer["node_errors"].values()
    ]
    return " | ".join(dict.fromkeys(said))


def worker(nodes: Mapping[str, Any], family: str) -> Served:
    """One that serves what the graph asks for, with every file that it names."""
    names = [str(value) for value in inputs(nodes, MODEL_INPUTS)]
    rows = table()["models"]
    row = next((rows[stem(name)] for name in names if stem(name) in rows), "")
    own = [name for name in names if stem(name) not in rows and not instead(name)]
    base = next((row for start, row in FAMILIES.items() if family.startswith(start)), "sd1.5")
    loras = tuple(str(value) for value in inputs(nodes, ("lora_name", "lora_name_1")))
    encoders = [name for name in map(str, inputs(nodes, ENCODERS)) if stem(name) not in table()["text_encoders"]]
    weights = (*(() if row or not own else (own[0],)), *encoders)
    return Served(
        MODELS[row or base],
        {"loras": loras, "text_encoders": tuple(encoders)},
        weights,
        next(map(str, inputs(nodes, ("vae_name",))), ""),
    )


def instead(name: str) -> bool:
    """Whether it is known that no row has what this file is of."""
    return any(fnmatchcase(stem(name), pattern) for pattern in table()["instead"])


def inputs(nodes: Mapping[str, Any], names: tuple[str, ...]) -> Iterator[Any]:
    """Values of these inputs, wherever they are."""
    for node in nodes.values():
        given = node.get("inputs") if isinstance(node, dict) else None
        yield from (given[name] for name in names if name in (given or {}) and isinstance(given[name], str))


def picture(name: str, subfolder: str, folder: str) -> bytes:
    """Any image: a grey one with a hole."""
    buffer = io.BytesIO()
    image = Image.new("RGBA", (1024, 768), (128, 128, 128, 255))
    image.paste((0, 0, 0, 0), (200, 200, 500, 500))
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", metavar="DIR", type=Path, nargs="+", help="API-format files")
    sys.exit(main(parser.parse_args().folders))
