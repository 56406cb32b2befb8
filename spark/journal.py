"""The training log: one JSON object a line, appended, also printed."""

import json
import time
from pathlib import Path
from typing import Any


class Journal:
    """Appends dated facts to a file that later runs continue."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.start = time.monotonic()

    def write(self, **facts: Any) -> None:
        """Append `facts` with the seconds since this run began."""
        line = json.dumps({"t": round(time.monotonic() - self.start, 1), **facts})
        with self.path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)
