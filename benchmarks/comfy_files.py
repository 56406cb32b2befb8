"""How well ComfyUI's files are converted: `python benchmarks/comfy_files.py DIR... [--object-info FILE] [--pages DIR]`.

Below each DIR are workflows as JSON, and pictures. A picture that carries both formats is a test: what is made of its
UI format should be its API format, which is what was drawn. Beside that, `--pages` has, under a workflow's own name,
what ComfyUI's page makes of it today, with the classes of FILE; workflows that have other classes are passed over.
Where two graphs differ, every difference is given a reason, or the file is `different`. `sources.json` in a DIR says
where its files are from, and under which licence.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from handler.api.dialects.comfy.opening import opened
from handler.api.dialects.comfy.pictured import is_picture, texts
from handler.api.dialects.comfy.ui.conversion import converted
from handler.api.dialects.comfy.ui.orders import order
from handler.core.errors import GraphRefused
from handler.core.untrusted import parse

RESULT = Path(__file__).parent / "results" / "comfy_files.json"
OF_PAGE = ("upload", "choose file to upload", "video-preview", "image", "audioUI")  # buttons and players
Graph = Mapping[str, Any]


def main(folders: list[Path], classes: Mapping[str, Any], pages: Path | None) -> int:
    """Print what differs and write the counts."""
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    report = {
        "sources": [one for folder in folders for one in sources(folder)],
        "classes": len(classes),
        "opened": counted(opening(path, classes) for path in files if path.name != "sources.json"),
        "pictures_with_both": judged("picture", pairs(files), classes),
        "pictures_with_both_by_our_table_alone": judged("picture, by our table", pairs(files), {}),
    }
    if pages:
        report["as_the_page_does"] = judged("page", beside(files, pages, classes), classes)
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0


def sources(folder: Path) -> Iterator[Any]:
    """Where files are from."""
    for path in sorted(folder.rglob("sources.json")):
        yield from json.loads(path.read_text())


def opening(path: Path, classes: Mapping[str, Any]) -> str:
    """What a file is."""
    try:
        return opened(path.read_bytes(), classes).origin
    except GraphRefused as refused:
        return f"refused: {refused.message.partition(': ')[2][:60]}"


def counted(words: Iterator[str]) -> dict[str, int]:
    """Each with how often it came."""
    return dict(Counter(words).most_common())


def read(text: bytes) -> Any:
    """JSON as ComfyUI writes it."""
    return parse(text, constant=lambda name: None)


def pairs(files: list[Path]) -> Iterator[tuple[str, Any, Graph]]:
    """Pictures that carry both formats."""
    for path in files:
        found = texts(data) if is_picture(data := path.read_bytes()) else {}
        if len(found) == 2:
            yield path.name, read(found["workflow"]), read(found["prompt"])


def beside(files: list[Path], pages: Path, classes: Mapping[str, Any]) -> Iterator[tuple[str, Any, Graph]]:
    """Workflows that the page has converted too, and all whose classes it knew."""
    for path in files:
        if (page := pages / path.parent.name / path.name).is_file():
            found = json.loads(page.read_text())
            if all(one.get("class_type") in classes for one in found.values()):
                yield path.name, read(path.read_bytes()), found


def judged(kind: str, known: Iterator[tuple[str, Any, Graph]], classes: Mapping[str, Any]) -> dict[str, Any]:
    """How many are equal, and why the others are not."""
    reasons: Counter[str] = Counter()
    counts = {"all": 0, "equal": 0, "equal_but_for_reasons": 0}
    different = []
    for name, ui, expected in known:
        found = set(differences(converted(ui, classes).graph, expected, classes))
        unexplained = sorted(one for one in found if one.startswith("?"))
        counts["all"] += 1
        if unexplained:
            different.append({"file": name, "what": unexplained[:5]})
            print(kind, name, *unexplained[:9], sep="\n    ")
        else:
            counts["equal_but_for_reasons" if found else "equal"] += 1
            reasons.update(found)
    return {**counts, "reasons": dict(reasons.most_common()), "different": different}


def differences(ours: Graph, theirs: Graph, classes: Mapping[str, Any]) -> Iterator[str]:
    """A reason for each; one that has none begins with a question mark."""
    if ours.keys() != theirs.keys():
        if signed(ours, classes) == signed(theirs, classes):
            yield "nodes of group nodes, or that two subgraphs share, have other ids"
            return
        fresh = theirs.keys() - ours.keys()
        used = {value[0] for one in theirs.values() for value in one["inputs"].values() if isinstance(value, list)}
        if ours.keys() - theirs.keys() or not fresh:
            yield f"? nodes {sorted(theirs.keys() ^ ours.keys())[:6]}"
        elif all(":" in name for name in fresh):
            yield "the page sends nodes of a bypassed subgraph, which lead nowhere"
        elif all("verywhere" in str(theirs[name]["class_type"]) for name in fresh) and not fresh & used:
            yield "'everywhere' nodes were sent, which do nothing"
        else:
            yield f"? nodes {sorted(fresh)[:6]}"
    for name in ours.keys() & theirs.keys():
        kind, mine, other = ours[name]["class_type"], ours[name]["inputs"], theirs[name]["inputs"]
        for key in mine.keys() | other.keys():
            if mine.get(key) != other.get(key) or (key in mine) != (key in other):
                yield reason(kind, key, mine, other, classes)


def reason(kind: str, key: str, mine: Graph, other: Graph, classes: Mapping[str, Any]) -> str:
    """Of one input."""
    known = order(kind, classes)
    if key in OF_PAGE and key not in mine:
        return "buttons and players of the page are sent, which the server does not read"
    if key not in other and known and any(one.name == key and one.default == mine[key] for one in known.widgets):
        return "the class has inputs since, whose default is filled in"
    if key not in mine and not (known and any(one.name == key for one in known.widgets)):
        return "a class whose widgets are not known: its values are left out, with a note"
    return f"? {kind} {key}: {mine.get(key)!r:.60} for {other.get(key)!r:.60}"


def number(value: Any) -> str:
    """A value, where 1 and 1.0 are the same."""
    return repr(float(value) if isinstance(value, int | float) else value)


def signed(graph: Graph, classes: Mapping[str, Any]) -> Counter[str]:
    """Its nodes without ids: each as its class, what leads to it, and its values but for defaults."""
    known: dict[str, str] = {}

    def plain(kind: str, key: str, value: Any) -> bool:
        widgets = found.widgets if (found := order(kind, classes)) else ()
        return key in OF_PAGE or any(one.name == key and one.default == value for one in widgets)

    def sign(name: str, depth: int = 0) -> str:
        if name not in graph or depth > 200:
            return "?"
        if name not in known:
            said = [
                (key, sign(value[0], depth + 1), value[1]) if isinstance(value, list) else (key, number(value))
                for key, value in sorted(graph[name]["inputs"].items())
                if isinstance(value, list) or not plain(graph[name]["class_type"], key, value)
            ]
            known[name] = f"{graph[name]['class_type']} {hash(str(said))}"
        return known[name]

    return Counter(sign(name) for name in graph)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", metavar="DIR", type=Path, nargs="+", help="workflows and pictures")
    parser.add_argument("--object-info", type=Path, metavar="FILE", help="what a ComfyUI answers at /object_info")
    parser.add_argument("--pages", type=Path, metavar="DIR", help="what the page made of the workflows")
    options = parser.parse_args()
    info = json.loads(options.object_info.read_text()) if options.object_info else {}
    sys.exit(main(options.folders, info, options.pages))
