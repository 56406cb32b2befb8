"""Seals: by them a worker tells whether what it may run was published by somebody who has KINDLING_VOLUME_KEY too.

    baked/<id>/<key>/seal.json   HMAC-SHA256 over the manifest: what the package was made for, and each file's SHA-256

Compiled packages are machine code, so whoever can write to the volume could run anything in every worker. Weights are
data, and have no seal.
"""

import hashlib
import hmac
import json
from dataclasses import asdict
from pathlib import Path

from handler.core.untrusted import Malformed, load
from handler.volume.manifest import Manifest, Source, write_atomically
from handler.volume.room import reading

SEAL = "seal.json"
LONGEST = 4096  # bytes of a seal; a longer one is none


def seal(folder: Path, manifest: Manifest, key: str) -> None:
    """Declare what is in `folder`, which has this manifest, to come from somebody with `key`. OSError."""
    write_atomically(folder / SEAL, json.dumps({"hmac_sha256": _digest(manifest, key)}).encode() + b"\n")


def sealed(source: Source, key: str) -> bool:
    """Whether somebody with `key` has declared that; VolumeFailed where it cannot be read."""
    with reading(path := source.folder / SEAL):
        try:
            said = str(load(path, LONGEST).get("hmac_sha256"))
        except (FileNotFoundError, NotADirectoryError, Malformed):
            return False
    return bool(source.manifest) and hmac.compare_digest(said.encode(), _digest(source.manifest, key).encode())


def _digest(manifest: Manifest | None, key: str) -> str:
    assert manifest, "what has none cannot be sealed"
    said = b"kindling package\0" + json.dumps(asdict(manifest), sort_keys=True).encode()
    return hmac.new(key.encode(), said, hashlib.sha256).hexdigest()
