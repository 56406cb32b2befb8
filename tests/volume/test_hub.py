"""What errors of the hub's client and of the disk mean: who tries again and when, and what a reader is told."""

import errno
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import errors

from handler.core.errors import FetchFailed, VolumeFailed
from handler.volume.hub import LONGEST_WAIT_S, TRIES, Repository, _persist, explained

HUB = Repository("someone/model", "0" * 40)


def answer(status: int, kind: type[errors.HfHubHTTPError] = errors.HfHubHTTPError, after: str = "") -> Exception:
    headers = {"Retry-After": after} if after else {}
    return kind("no", response=httpx2.Response(status, headers=headers, request=httpx2.Request("GET", "http://hub")))


def absent(cause: Exception | None) -> Exception:
    error = errors.LocalEntryNotFoundError("not here")
    error.__cause__ = cause
    return error


def tried(*failures: Exception) -> tuple[list[float], BaseException | None]:
    """How long was waited for a download that fails so, one time after the other, and what came of it."""
    waits, left = list[float](), list(failures)

    def download() -> None:
        if left:
            raise left.pop(0)

    try:
        _persist(download, waits.append)
    except Exception as error:
        return waits, error
    return waits, None


@pytest.mark.parametrize(
    "error",
    [
        *(answer(status) for status in (500, 502, 503)), httpx2.ReadTimeout("slow"), httpx2.ConnectError("reset"),
        RuntimeError("of hf_xet"), OSError("consistency check failed"), absent(answer(500)), absent(None),
    ],
    ids=repr,
)  # fmt: skip
def test_what_may_pass_is_tried_five_times_ever_longer_apart(error: Exception) -> None:
    assert TRIES == 5
    assert tried() == ([], None)
    for failures in range(TRIES):
        assert tried(*[error] * failures) == ([1.0, 2.0, 4.0, 8.0][:failures], None)
    waits, raised = tried(*[error] * TRIES)
    assert (waits, raised) == ([1.0, 2.0, 4.0, 8.0], error.__cause__ or error)


@pytest.mark.parametrize(
    "error",
    [
        *(answer(status) for status in (401, 404, 429, 499)), OSError(errno.ENOSPC, "full"), ValueError("no"),
        RuntimeError("cannot write (os error 28)"), absent(answer(404)), absent(OSError(errno.EIO, "broken")),
    ],
    ids=repr,
)  # fmt: skip
def test_what_stays_is_tried_once(error: Exception) -> None:
    waits, raised = tried(error)
    assert (waits, raised) == ([], error.__cause__ or error)
    assert raised.__suppress_context__


@pytest.mark.parametrize(
    ("asked", "waited"),
    [("7", 7.0), ("0", 0.0), ("300", 300.0), ("301", 300.0), ("7000000000", 1.0), ("Wed, 21 Oct", 1.0), ("-3", 1.0)],
)
def test_a_server_is_waited_for_as_it_asks(asked: str, waited: float) -> None:
    assert LONGEST_WAIT_S == 300
    assert tried(answer(503, after=asked)) == ([waited], None)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (answer(403, errors.GatedRepoError), "a model is gated: .*https://huggingface.co/someone/model, .*HF_TOKEN"),
        (answer(404, errors.RepositoryNotFoundError), "no someone/model at 0{40}. If it is private, set HF_TOKEN"),
        (answer(404, errors.RevisionNotFoundError), "no someone/model at 0{40}"),
        (errors.OfflineModeIsEnabled("off"), "a model is not complete on the volume, and HF_HUB_OFFLINE is set"),
        (answer(401), "401 Unauthorized; set HF_TOKEN to one that may read https://huggingface.co/someone/model"),
        (answer(403), "403 Forbidden; set HF_TOKEN"),
        (answer(404), "404 Not Found; try again later. Files that have come stay"),
        (answer(500), "500 Internal Server Error; try again later. Files that have come stay"),
        (httpx2.ConnectError("no route"), r"Cannot reach the hub at https?://\S+ \(no route\).*Files that have come"),
        *(
            (kind("a\n  b"), "^a model could not be fetched: a b. Files that have come stay")
            for kind in (OSError, RuntimeError, ValueError)
        ),
    ],
    ids=repr,
)
def test_what_the_hub_said_is_explained(error: Exception, told: str) -> None:
    with pytest.raises(FetchFailed, match=told), explained("a model", HUB, Path("/volume")):
        raise error


@pytest.mark.parametrize(
    "make", [lambda: OSError(errno.ENOSPC, "No space left"), lambda: RuntimeError("(os error 28)")]
)
def test_what_the_disk_said_is_the_volumes(make: Callable[[], Exception]) -> None:
    with (
        pytest.raises(VolumeFailed, match=r"Cannot write /volume: No space left.* Files that have come stay") as caught,
        explained("a model", HUB, Path("/volume")),
    ):
        raise (error := make())
    assert caught.value.__cause__ is error


def test_what_is_nobodys_stays_itself() -> None:
    with explained("a model", HUB, Path("/volume")):
        pass
    with pytest.raises(KeyError), explained("a model", HUB, Path("/volume")):
        raise KeyError
