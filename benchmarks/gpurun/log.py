"""What a run on a GPU has found: a JSON file that is whole after each case, and a table at the end."""

import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import report
from gpurun import ground
from gpurun.predicted import predictions
from gpurun.scale import Row

Record = dict[str, Any]
FIRST = ("ms", "picture_ms", "step_ms")  # what the table shows first


class Log:
    """One run's items. `code` is its exit code so far."""

    def __init__(self, name: str, save: bool) -> None:
        self.name, self.code = name, 0
        self._save, self._ran, self._begun = save, dict[str, Record](), dict[str, float]()
        self._facts = {"card": ground.card(), "driver": ground.driver(), "commit": ground.commit()}
        self._items, self._expected = self._earlier(), predictions(self._facts["card"])

    def _earlier(self) -> dict[str, Record]:
        """The items that an earlier run of this commit found on such a card."""
        try:
            found = json.loads((report.RESULTS / f"{self.name}.json").read_text()) if self._save else {}
        except OSError:
            return {}
        same = all(found.get(name) == self._facts[name] for name in ("card", "commit"))
        return dict(found["items"]) if same else {}

    def open(self, item: str) -> Record:
        """Begin an item; the record that `note` and `close` take."""
        print(f"{item} ...", flush=True)
        record: Record = {"outcome": "running", "seconds": 0.0, "cases": {}}
        self._items[item] = self._ran[item] = record
        self._begun[item] = time.monotonic()
        self._write()
        return record

    def note(self, record: Record, case: str, row: Row) -> None:
        """Keep what a case found, beside what was predicted; a row with an error makes the exit code 1."""
        expected = self._expected.get(case)
        record["cases"][case] = _rounded(row) | ({"predicted": expected} if expected else {})
        if "error" in row:
            self.code = self.code or 1
            print(row["error"], flush=True)
        else:
            print(f"  {line(case, record['cases'][case])}", flush=True)
        self._write()

    def close(self, record: Record, outcome: str) -> None:
        """End an item."""
        [item] = [name for name, each in self._ran.items() if each is record]
        record |= {"outcome": outcome, "seconds": round(time.monotonic() - self._begun[item], 1)}
        self._write()

    def finish(self) -> None:
        """Print the JSON line and then, last, what this run found: a line a case."""
        report.finish(self.name, {**self._facts, "items": _short(self._items)}, save=False)
        print(f"\n{self._facts['card']}, {self._facts['commit']}; ms, and the prediction in brackets")
        for item, record in self._ran.items():
            print(f"{item}: {record['outcome']} in {record['seconds']:.0f} s")
            for case, row in record["cases"].items():
                print(f"  {line(case, row)}")
        self._write()

    def _write(self) -> None:
        if not self._save:
            return
        path = report.write(self.name, report.facts(self.name, {**self._facts, "items": self._items}))
        if out := os.environ.get("OUT"):
            shutil.copy(path, Path(out))


def line(case: str, row: Row) -> str:
    """One line of the table: a case's figures, or how it failed."""
    if "error" in row:
        return f"{case:<48} FAILED: {row['error'].strip().splitlines()[-1][:160]}"
    expected = row.get("predicted", {})
    numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
    names = sorted(numbers, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    told = [f"{n} {numbers[n]:.4g}" + (f" ({expected[n]:g})" if n in expected else "") for n in names]
    return f"{case:<48} {', '.join(told)}"


def _rounded(row: Row) -> Row:
    return {name: _figure(value) if isinstance(value, float) else value for name, value in row.items()}


def _figure(value: float) -> float | str:
    """Rounded; what is no number in JSON, as text."""
    return round(value, 5) if math.isfinite(value) else str(value)


def _short(items: dict[str, Record]) -> dict[str, Any]:
    """Without tables and tracebacks: those are in the file."""
    return {
        item: {
            **record,
            "cases": {
                case: {name: value for name, value in row.items() if not isinstance(value, str | list)}
                for case, row in record["cases"].items()
            },
        }
        for item, record in items.items()
    }
