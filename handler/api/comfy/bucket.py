"""Files in the object store, such as those of ComfyUI's routes below `PREFIX/comfy/`, where workers share no volume."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from handler.api.comfy.shelf import Entry, Shelf, disk_of
from handler.api.store import Store, reason
from handler.core.settings import Settings

MISSING = ("404", "NoSuchKey")
TAKEN = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")


class Bucket:
    """A shelf in a bucket. What is `anew` is so where the store knows If-None-Match, as S3 does and R2."""

    shared = True
    look_s = 2.0  # a listing costs money

    def __init__(self, store: Store, folder: str = "comfy") -> None:
        self._store = store
        self._top = f"{store.prefix}/{folder}/".lstrip("/")

    def get(self, name: str) -> bytes:
        """See `Shelf`."""
        with _failing(name):
            found: bytes = self._store.client().get_object(**self._place(name))["Body"].read()
            return found

    def has(self, name: str) -> bool:
        """See `Shelf`."""
        try:
            with _failing(name):
                self._store.client().head_object(**self._place(name))
        except FileNotFoundError:
            return False
        return True

    def put(self, name: str, data: bytes, anew: bool = False) -> None:
        """See `Shelf`."""
        only = {"IfNoneMatch": "*"} if anew else {}
        with _failing(name):
            self._store.client().put_object(**self._place(name), Body=data, **only)

    def remove(self, name: str) -> None:
        """See `Shelf`."""
        with _failing(name):
            self._store.client().delete_object(**self._place(name))

    def entries(self, folder: str, deep: bool = False) -> list[Entry]:
        """See `Shelf`."""
        asked = {
            "Bucket": self._store.bucket,
            "Prefix": f"{self._top}{folder}/",
            **({} if deep else {"Delimiter": "/"}),
        }
        with _failing(folder):
            pages = self._store.client().get_paginator("list_objects_v2").paginate(**asked)
            found = [each for page in pages for each in page.get("Contents", ())]
        top = self._top
        return sorted(
            Entry(each["LastModified"].timestamp(), each["Key"].removeprefix(top), each["Size"]) for each in found
        )

    def now(self) -> float:
        """See `Shelf`. No store takes a request by a clock that is far from its own."""
        return time.time()

    def sweep(self, folder: str, since: float) -> None:
        """See `Shelf`: of an upload that breaks off nothing stays."""

    def _place(self, name: str) -> dict[str, Any]:
        return {"Bucket": self._store.bucket, "Key": f"{self._top}{name}"}


@contextmanager
def _failing(name: str) -> Iterator[None]:
    """The store's errors as a file system's."""
    try:
        yield
    except Exception as error:
        answer = getattr(error, "response", None)
        code = answer.get("Error", {}).get("Code") if isinstance(answer, dict) else None
        if code in MISSING:
            raise FileNotFoundError(name) from None
        if code in TAKEN:
            raise FileExistsError(name) from None
        raise OSError(None, f"the object store failed: {reason(error)}") from None


def shared(settings: Settings, folder: str = "comfy") -> Shelf | None:
    """Where other workers see a folder's files: on the volume, if it can be written; but on Modal, where a container
    does not see at once what another has written, and where there is no such volume, in the object store, if there is
    one."""
    disk, store = disk_of(settings.volume, folder), Store.of(settings)
    if store and (disk is None or settings.platform == "modal"):
        return Bucket(store, folder)
    return disk
