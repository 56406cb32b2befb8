"""How large the image's Python packages are, before and after what nothing loads is deleted: by the Dockerfile's steps.

They run in an environment of their own, which is deleted in the end; Debian's packages and Python itself are not in it.
It downloads 3 GB and installs 5.

    python benchmarks/image.py --save     writes benchmarks/results/image.json
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import report

ROOT = Path(__file__).parents[1]
LARGEST = 12


def steps() -> tuple[str, str, str]:
    """The Dockerfile's commands that install torch, that delete of it, and that install all else."""
    [first, rest] = re.findall(r"^RUN (pip install .*\.lock\"(?:.*\\\n)*.*)$", (ROOT / "Dockerfile").read_text(), re.M)
    install, _, delete = first.partition("&&")
    return install.replace("\\\n", ""), delete, rest


def sizes(folder: Path) -> Counter[str]:
    """Bytes of each package's files."""
    found: Counter[str] = Counter()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            parts = path.relative_to(folder).parts
            found["/".join(parts[: 1 + (parts[0] == "nvidia")])] += path.stat().st_size
    return found


def main() -> None:
    """Measure; print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuda", default="cu130", help="the build of torch (default: cu130)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/image.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, report.measuring("image", options.save) as figures:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        path = os.pathsep.join([f"{folder}/bin", os.environ["PATH"]])
        environ = {**os.environ, "PATH": path, "CUDA": options.cuda, "SDK": "runpod", "PIP_NO_CACHE_DIR": "1"}
        [packages] = Path(folder).glob("lib/python*/site-packages")
        figures |= {"cuda": options.cuda, "unit": "bytes"}
        for name, step in zip(("torch", "torch, less what nothing loads", "all packages"), steps(), strict=True):
            subprocess.run(["/bin/sh", "-ec", step], cwd=ROOT, env=environ, check=True, stdout=sys.stderr)
            found = sizes(packages)
            figures[name] = found.total()
        figures["largest"] = dict(found.most_common(LARGEST))


if __name__ == "__main__":
    main()
