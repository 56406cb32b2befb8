"""The Hugging Face hub: what a repository has, one file of it at a time, and what its client's errors mean."""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from handler.core.errors import FetchFailed, VolumeFailed
from handler.core.loopback import is_loopback
from handler.volume.room import refused

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

# The client makes each request up to 6 times, waits as Retry-After says, and goes on where a connection was cut, but
# gives up on 5xx and on resets while a file comes: then the file is tried again, 1, 2, 4, 8 s apart or as told.
TRIES, LONGEST_WAIT_S = 5, 300
COMMIT = re.compile("[0-9a-f]{40}")
SECONDS = re.compile("[0-9]{1,9}")  # a date, which it may be too, is not waited for
Wait = Callable[[float], None]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository of the hub at one commit, or at the branch that `commit` is asked of."""

    name: str
    revision: str

    def files(self) -> dict[str, "RepoFile"]:
        """All its files, with their sizes and checksums."""
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        tree = HfApi(token=_token()).list_repo_tree(self.name, revision=self.revision, recursive=True)
        return {file.path: file for file in tree if isinstance(file, RepoFile)}

    def commit(self) -> str:
        """Which commit its revision is now: 40 digits."""
        from huggingface_hub import HfApi

        found = HfApi(token=_token()).model_info(self.name, revision=self.revision).sha or ""
        if not COMMIT.fullmatch(found):
            raise ValueError(f"the hub says that {self.revision} is {found:.80}, which is no commit")
        return found

    def download(self, file: str, folder: Path, wait: Wait) -> Path:
        """Bring `file` to where it is under its own name in `folder`, trying again where that may help."""
        from huggingface_hub import hf_hub_download

        bring = partial(hf_hub_download, self.name, file, revision=self.revision, local_dir=folder, token=_token())
        _persist(bring, wait)
        return folder / file


def _token() -> bool | None:
    """False where the client's token would be readable on its way: to a hub over http that is not on this machine."""
    from huggingface_hub import constants, get_token

    hub = urlsplit(constants.ENDPOINT)
    if hub.scheme == "https" or is_loopback(hub.hostname or ""):
        return None
    if get_token():
        log.warning("HF_TOKEN is not sent to %s, for anybody could read it on its way; use https.", constants.ENDPOINT)
    return False


def _persist(download: Callable[[], object], wait: Wait) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    for attempt in range(TRIES):
        try:
            download()
            return
        except Exception as error:
            cause = (isinstance(error, LocalEntryNotFoundError) and error.__cause__) or error  # "not here" hides why
            if (pause := _pause(cause, attempt)) is None or attempt + 1 == TRIES:
                raise cause from None
            wait(pause)


def _pause(error: BaseException, attempt: int) -> float | None:
    """Seconds until another try, beyond those the client has made; None if it would not help."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    match error:
        case HfHubHTTPError(response=response):
            asked = response.headers.get("Retry-After", "")
            pause = min(int(asked), LONGEST_WAIT_S) if SECONDS.fullmatch(asked) else 2**attempt
            return float(pause) if response.status_code >= 500 else None
        case _ if _disks(error):
            return None
        case httpx2.TransportError() | RuntimeError() | OSError(errno=None):  # of hf_xet; of the client's own checks
            return 2.0**attempt
    return None


def _disks(error: BaseException) -> bool:
    """Whether an error is the disk's; an OSError of the client has no number."""
    return error.errno is not None if isinstance(error, OSError) else bool(refused(error))


@contextlib.contextmanager
def explained(what: str, repository: Repository, folder: Path) -> Iterator[None]:
    """Turn errors of the hub's client and of the disk, while `what` is fetched, into ones that say what to do."""
    import httpx2
    from huggingface_hub import constants, errors

    page, stays = f"https://huggingface.co/{repository.name}", "Files that have come stay for the next fetch."
    try:
        yield
        return
    except errors.GatedRepoError:
        text = f"{what} is gated: accept its licence at {page}, then set HF_TOKEN to a token of that account."
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        text = f"The hub shows no {repository.name} at {repository.revision}. If it is private, set HF_TOKEN."
    except errors.OfflineModeIsEnabled:
        text = f"{what} is not complete on the volume, and HF_HUB_OFFLINE is set; unset it to fetch."
    except errors.HfHubHTTPError as error:
        code, phrase = error.response.status_code, error.response.reason_phrase
        does = f"set HF_TOKEN to one that may read {page}" if code in (401, 403) else "try again later"
        text = f"The hub answers {code} {phrase}; {does}. {stays}"
    except httpx2.HTTPError as error:
        text = f"Cannot reach the hub at {constants.ENDPOINT} ({error}). Check the network. {stays}"
    except (OSError, RuntimeError, ValueError) as error:
        if _disks(error):
            raise VolumeFailed(f"Cannot write {folder}: {refused(error)}. {stays}") from error
        text = f"{what} could not be fetched: {' '.join(str(error).split())}. {stays}"
    raise FetchFailed(text)
