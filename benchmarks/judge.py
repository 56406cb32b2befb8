"""The tests that take too long for every run: what each said, and its seconds.

python benchmarks/judge.py --save       write results/judge.json; `make judge` is this
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from report import measuring

ROOT = Path(__file__).parents[1]
WORSE = ("error", "failure", "skipped")


def main() -> None:
    """Run them; exit 1 unless all passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write results/judge.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, measuring("judge", options.save) as figures:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "--judge", "-n", "2", f"--junitxml={report}"]
        failed = subprocess.run(command, cwd=ROOT, check=False).returncode
        figures["tests"] = outcomes(report)
    if failed or any(not outcome.startswith("passed") for outcome in figures["tests"].values()):
        sys.exit(1)


def outcomes(report: Path) -> dict[str, str]:
    """How each ended, by pytest's report; without the files that are skipped as a whole, which have no class there."""
    cases = [case for case in ElementTree.parse(report).iter("testcase") if case.get("classname")]  # noqa: S314, ours
    return {f"{case.get('classname')}::{case.get('name')}": said(case) for case in cases}


def said(case: ElementTree.Element) -> str:
    """How one ended, and after how long."""
    outcome = next((child.tag for child in case if child.tag in WORSE), "passed")
    return f"{outcome} in {float(case.get('time', 0)):.0f} s"


if __name__ == "__main__":
    main()
