"""How much of what breaks the code do its tests notice? Change one thing at a time, run the tests, and count.

Of each module a sample of `--n` changes is tried (mutation/changes.py), the same for the same seed; its tests run in a
fork of a process that has torch already, on a copy of the checkout, each under a limit. mutation/modules.toml names the
tests of each module, mutation/equivalent.toml the changes that no test could notice, and why. `--save` puts the row of
each sample into results/mutation.json as soon as it is there, and leaves those of other modules and seeds: all can be
tried in parts.
mutmut forks as cheaply, but changes no table, field, property or context manager, leaves no statement out, and wraps
each function, which compiling sees; cosmic-ray imports torch anew for each change.

`--changes` makes instead the changes that changes/*.toml list, and says of each whether the tests it names fail.
"""

import argparse
import json
import sys
import tomllib
from collections.abc import Collection
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import report
from mutation.changes import Change, changes, pick
from mutation.trial import BAD, GOOD, HUNG, Ran, Trial, trials

ROOT = Path(__file__).parent.parent
MODULES, EQUIVALENT = "benchmarks/mutation/modules.toml", "benchmarks/mutation/equivalent.toml"
CHANGES, RESULTS = "benchmarks/changes", "benchmarks/results"
UNCHANGED_S, LISTED_S = 900.0, 120.0  # limits: of a module's tests as they are; of those of a listed change
SLACK = 2  # times as long a changed module's may take, and `slack_s` of the table longer


class Unsound(Exception):
    """Tests fail before anything is changed."""


@dataclass(frozen=True, slots=True)
class Survivor:
    """A change that no test noticed; `reason` says why none could."""

    path: str
    line: int
    kind: str
    before: str
    after: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.path}:{self.line} ({self.kind}) {self.before}  ->  {self.after}"


def main() -> int:
    """Try samples, or what is listed, and tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help="such as handler/engine/queue.py (default: all of modules.toml)")
    parser.add_argument("--n", type=int, default=10, help="changes of each module (default: 10)")
    parser.add_argument("--seed", type=int, default=1, help="which sample (default: 1)")
    parser.add_argument("--changes", action="store_true", help="try the listed changes, not a sample")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="whose modules, tests and tables (default: this)")
    parser.add_argument("--save", action="store_true", help="put their rows into benchmarks/results/mutation.json")
    options = parser.parse_args()
    table = tomllib.loads((options.checkout / MODULES).read_text())
    if not options.changes and (unknown := set(options.modules) - table["tests"].keys()):
        parser.error(f"{MODULES} names no tests of {', '.join(sorted(unknown))}")
    with trials(options.checkout, table["heavy"]) as trial:
        try:
            return listed(trial, options) if options.changes else sampled(trial, options, table)
        except Unsound as error:
            sys.exit(str(error))


def sampled(trial: Trial, options: argparse.Namespace, table: dict[str, Any]) -> int:
    """Try `--n` changes of each module."""
    rows, unsound = list[dict[str, Any]](), list[str]()
    with report.measuring("mutation", save=False) as figures:
        figures["modules"] = rows
        for path in options.modules or table["tests"]:
            try:
                rows.append(module(trial, path, table, options.n, options.seed))
            except Unsound as error:  # hours may lie behind us
                print(error, flush=True)
                unsound.append(path)
                continue
            if options.save:
                save(options.checkout / RESULTS, rows[-1], table["tests"])
        figures["noticed_percent"] = percent(rows)
        if unsound:
            sys.exit(f"Tests that fail over unchanged code prove nothing: those of {', '.join(unsound)}.")
    return 0


def save(folder: Path, row: dict[str, Any], modules: Collection[str]) -> None:
    """Put a sample's row in the place of its last one, and leave those of other modules and seeds."""
    file = folder / "mutation.json"
    rows = json.loads(file.read_text())["modules"] if file.exists() else []
    samples = {(each["module"], each["seed"]): each for each in (*rows, row)}
    rows = [samples[path, seed] for path in modules for seed in sorted(seed for each, seed in samples if each == path)]
    report.write("mutation", report.facts("mutation", {"noticed_percent": percent(rows), "modules": rows}), folder)


def module(trial: Trial, path: str, table: dict[str, Any], n: int, seed: int) -> dict[str, Any]:
    """Its row."""
    source, tests = (trial.root / path).read_bytes(), table["tests"][path]
    sample, total = pick(path, source, n, seed), sum(1 for _ in changes(source))
    plain = as_it_is(trial, tests)
    print(f"{path}: {len(sample)} of {total} changes; unchanged {plain.seconds:.1f} s", flush=True)
    reasons, codes, survivors = equivalents(trial.root), [], list[Survivor]()
    for change in sample:
        with trial.changed(path, change.made(source)):
            ran = trial.run(tests, SLACK * plain.seconds + table["slack_s"], "-x")
        one = survivor(path, change, source, reasons)
        codes.append(ran.code)
        survivors += [one] if ran.code == GOOD else []
        told = noticed(ran) if ran.code != GOOD else "equivalent" if one.reason else "SURVIVED"
        print(f"  {told:10} {ran.seconds:5.1f} s  {one}  {' '.join(ran.failed[:1])}", flush=True)
    row = {
        "module": path,
        "date": datetime.now(UTC).date().isoformat(),
        "seed": seed,
        "n": n,
        "unchanged_s": round(plain.seconds, 1),
        "possible": total,
        "tried": len(sample),
        "noticed": len(sample) - len(survivors),
        "hung": codes.count(HUNG),
        "equivalent": sum(bool(each.reason) for each in survivors),
        "survivors": [asdict(each) for each in survivors],
    }
    print(f"  {percent([row])} % noticed", flush=True)
    return row | {"noticed_percent": percent([row])}


def survivor(path: str, change: Change, source: bytes, reasons: dict[tuple[str, ...], str]) -> Survivor:
    """What a change is called if it survives."""
    before, after = change.told(source)
    return Survivor(path, change.line, change.kind, before, after, reasons.get((path, before, after), ""))


def equivalents(root: Path) -> dict[tuple[str, ...], str]:
    """Why a change, by its file and its lines before and after, makes no difference that a test could see."""
    entries = tomllib.loads((root / EQUIVALENT).read_text())["equivalent"]
    return {(each["path"], each["before"], each["after"]): each["reason"] for each in entries}


def percent(rows: list[dict[str, Any]]) -> float:
    """How many of all that make a difference were noticed."""
    tried, noticed, equal = (sum(row[name] for row in rows) for name in ("tried", "noticed", "equivalent"))
    return round(100 * noticed / max(1, tried - equal), 1)


def as_it_is(trial: Trial, tests: list[str]) -> Ran:
    """The tests over unchanged code, which must be good."""
    ran = trial.run(tests, UNCHANGED_S, "-x")
    if ran.code != GOOD:
        raise Unsound(f"{ran.said[-4000:]}\n{' '.join(tests)}: unchanged, they end with {ran.code}.")
    return ran


def noticed(ran: Ran) -> str:
    """How."""
    return {BAD: "noticed", HUNG: "hung"}.get(ran.code, f"exit {ran.code}")


def listed(trial: Trial, options: argparse.Namespace) -> int:
    """Make each listed change; 1 if any goes unnoticed."""
    entries = [each for file in sorted((trial.root / CHANGES).glob("*.toml")) for each in
               tomllib.loads(file.read_text())["change"]]  # fmt: skip
    entries = [each for each in entries if not options.modules or each["path"] in options.modules]
    here = [each for each in entries if "gone" not in each]
    if here:  # without a name pytest runs all there are
        as_it_is(trial, sorted({test for each in here for test in each["tests"]}))
    unnoticed = sum(not tried(trial, each) for each in here)
    print(f"{len(entries)} changes: {len(here) - unnoticed} noticed, {unnoticed} not; {len(entries) - len(here)} "
          "have no place any more")  # fmt: skip
    return int(unnoticed > 0)


def tried(trial: Trial, change: dict[str, Any]) -> bool:
    """Whether each test that a listed change names fails with it."""
    text = (trial.root / change["path"]).read_text()
    assert text.count(change["before"]) == 1, f"{change['path']} does not have once: {change['before']}"
    with trial.changed(change["path"], text.replace(change["before"], change["after"]).encode()):
        ran = trial.run(change["tests"], LISTED_S)
    names = {name.partition("[")[0] for name in ran.failed} | set(ran.failed)
    passed = [test for test in change["tests"] if not {test, test.partition("::")[0]} & names]
    good = ran.code == HUNG or not passed
    told = noticed(ran) if good else "UNNOTICED"
    print(f"{told:10} {ran.seconds:5.1f} s  {change['path']}: {change['what']}  {' '.join(passed)}", flush=True)
    return good


if __name__ == "__main__":
    sys.exit(main())
