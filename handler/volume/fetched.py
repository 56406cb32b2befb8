"""What a fetch says when it is done."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Fetched:
    """What was asked for and is on the volume now. `downloaded`: by this call."""

    model: str
    revision: str
    folder: Path
    files: tuple[str, ...]
    bytes: int
    seconds: float
    downloaded: bool

    def __str__(self) -> str:
        how = f"{self.seconds:.0f} s" if self.downloaded else "already complete"
        return f"{self.model}: {len(self.files)} files, {self.bytes / 1e9:.1f} GB in {self.folder}, {how}"
