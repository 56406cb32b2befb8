"""Every operation on the volume, with every call that it makes to the file system failing in every way.

Whatever a disk says, it is told: in an error of ours that names the path, in what the operation gives back, or in the
log. Only what comes out as if nothing had happened needs no word. Never a traceback; and "not there" only where that
is what the disk said.
"""

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import golden
import pytest
from disks import Call, failing
from golden import CODE, H200, NOON, SCHNELL, SPARK, VAE

from handler import Settings
from handler.cli import bake
from handler.cli.models import state
from handler.cli.optimize.attempt import likeness
from handler.cli.optimize.journal import Journal, close
from handler.core.birth import Birth
from handler.core.errors import KindlingError, WeightsMissing
from handler.engine.spend import Meter
from handler.model.compiling import artifacts
from handler.model.compiling.failures import Failures
from handler.model.hardware import Hardware
from handler.volume import autoencoder, receipts, sources
from handler.volume.download import fetch
from handler.volume.publishing import publishing, retire, whole
from handler.volume.reader import Reader
from handler.volume.receipts import Candidate, Outcome
from handler.volume.room import require
from handler.worker.boots import BootLog, last_boots
from handler.worker.chips import dollars_of
from handler.worker.clock import Ledger
from handler.worker.decision import decide
from handler.worker.durations import Durations
from handler.worker.footprint import weigh
from handler.worker.outlook import outlook

ERRNOS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.ENOENT)  # the first of those that write
CHANGING = ("open", "write", "fsync", "mkdir", "rename", "unlink", "utime")
GPU = Hardware("cuda", H200, "bf16", "a test", memory_gb=141.0, capability=(9, 0))
PLACE = f"receipts/{SPARK.id}/nvidia-h200"
SWEEP = {"revision": SPARK.revision}
ONE = Outcome(Candidate("bf16", True), "skipped", reason="a test")
KEY = artifacts.key(CODE)


def silent(call: Call) -> bool:
    return False


@dataclass(frozen=True)
class Operation:
    """What is done with a volume, and what it gives; `quiet` names the calls whose failing nobody need be told."""

    run: Callable[[Path], Any]
    quiet: Callable[[Call], bool] = silent

    @property
    def name(self) -> str:
        return self.run.__name__


def settings(at: Path) -> Settings:
    return Settings(volume=at, gpu_price=2.5, platform="other", model=SPARK.id, device="cpu")


def write_boots(at: Path) -> Any:
    log = BootLog(at, Birth(0.0, "2025-11-21T12-01-00-third-0000000000000000"))
    log(Ledger(model="spark"))
    alive = log.flush()
    log(Ledger(outcome="stopped"))  # waits until it is written
    return alive


def read_boots(at: Path) -> Any:
    return last_boots(at, 9)


def learn_from_boots(at: Path) -> Any:
    return Durations.on(at)


def meter(at: Path) -> Any:
    birth = Birth(0.0, "2025-11-21T12-01-00-third-0000000000000000", clock=lambda: 60.0)
    found = Meter(settings(at), lambda: H200, birth, lambda: NOON)
    found.tick()
    return at, found.state()


def follow_a_receipt(at: Path) -> Any:
    return receipts.current(at, SPARK.id, H200), receipts.current(at, SPARK.id, None)


def list_receipts(at: Path) -> Any:
    return [receipts.listed(place) for place in receipts.places(at / "receipts" / SPARK.id)]


def use_a_receipt(at: Path) -> Any:
    return receipts.use(at / PLACE, 1), receipts.current_number(at / PLACE)


def roll_back(at: Path) -> Any:
    return receipts.rollback(at / PLACE), receipts.current_number(at / PLACE)


def keep_a_receipt(at: Path) -> Any:
    found = receipts.read(at / PLACE, 1)
    return receipts.keep(found, at).number


def price_of_a_picture(at: Path) -> Any:
    return dollars_of(at, SPARK.id, H200)


def decide_by_receipt(at: Path) -> Any:
    return decide(settings(at), SPARK, GPU)


def seek_weights(at: Path) -> Any:
    mine = settings(at).model_copy(update={"model": SCHNELL.id, "precision": "bf16"})
    return outlook(mine, SCHNELL, GPU).weights


def find_a_model(at: Path) -> Any:
    return sources.model_source(SCHNELL, at)


def miss_a_model(at: Path) -> Any:
    with suppress(WeightsMissing):
        sources.model_source(replace(SCHNELL, revision="another"), at)
    with suppress(WeightsMissing):
        sources.model_source(replace(SCHNELL, id="flux-dev"), at)


def find_baked_weights(at: Path) -> Any:
    return sources.served_source(SCHNELL, at, "bf16")


def find_compiled_code(at: Path) -> Any:
    return artifacts.find(CODE, sources.baked_sources(SPARK, at))


def read_weights(at: Path) -> Any:
    source = sources.model_source(SCHNELL, at)
    with Reader(source, threads=1) as reader:
        for component in ("", "transformer"):
            for file in reader.files(component):
                for start, _ in file.chunks:
                    reader.wait(file, start)
        return weigh(SCHNELL, GPU, source)


def find_an_autoencoder(at: Path) -> Any:
    return autoencoder.vae_source(VAE, at)


def fetch_what_is_there(at: Path) -> Any:
    with mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):  # where it takes that for missing
        return fetch(SCHNELL, at, quiet=True)


def publish(at: Path) -> Any:
    with publishing(at / "baked" / "spark" / "new", CODE) as part, (part / "blocks.pt2").open("wb") as file:
        file.write(b"new")
    return whole(at / "baked" / "spark" / "new", CODE)


def publish_over_a_torn_one(at: Path) -> Any:
    target = at / "baked" / "spark" / "0badc0de"
    with publishing(target, CODE) as part, (part / "blocks.pt2").open("wb") as file:
        file.write(b"new")
    return whole(target, CODE)


def verify(at: Path) -> Any:
    return whole(at / "baked" / "spark" / KEY, CODE)


def remove(at: Path) -> Any:
    for source in sources.baked_sources(SPARK, at):
        retire(source)
    return os.access(at / "baked" / "spark" / KEY, os.F_OK)


def look_for_room(at: Path) -> Any:
    require(at / "baked" / "spark" / "not yet", 1, "weights")


def failed_before(at: Path) -> Any:
    return FAILURES(at).lost, FAILURES(at)._before(FAILURES(at)._records("failed"))


def leave_a_failure(at: Path) -> Any:
    FAILURES(at).note(RuntimeError("no"), "another reason")
    FAILURES(at).forget()


def examine_models(at: Path) -> Any:
    return state(SPARK, settings(at), GPU), state(SCHNELL, settings(at), GPU)


def go_on_with_a_sweep(at: Path) -> Any:
    journal = Journal(at / "sweeps" / SPARK.id / "nvidia-h200", SWEEP)
    return journal.known(Candidate("bf16", False)), journal.known(ONE.candidate)


def begin_another_sweep(at: Path) -> Any:
    journal = Journal(at / "sweeps" / SPARK.id / "nvidia-h200", {"revision": "another"})
    journal.begin(ONE.candidate)
    journal.keep(ONE)
    return journal.known(Candidate("bf16", False)), journal.known(ONE.candidate)


def end_a_sweep(at: Path) -> Any:
    close(at / "sweeps" / SPARK.id / "nvidia-h200")


def compare_pictures(at: Path) -> Any:
    return likeness(at / "ours", at / "theirs")


def check_baked_weights(at: Path) -> Any:
    bake.discard_damaged(SCHNELL, at, "bf16")
    return bake._placed(at / "baked" / SCHNELL.id)


def FAILURES(at: Path) -> Failures:
    return Failures("auto", SPARK, GPU, at)


def best_effort(call: Call) -> bool:
    """What no start may depend on, as its module says: records of starts, word of what failed, what is cleared away."""
    return True


def clearing(call: Call) -> bool:
    """Of what is not whole, and is passed over by all who read."""
    return "*" in call.path and call.name in ("stat", "list", "open", "unlink")


OPERATIONS = (
    Operation(write_boots, best_effort),
    Operation(read_boots, lambda call: call.name == "stat"),  # its date: it counts as the oldest
    Operation(learn_from_boots, lambda call: call.name == "stat"),
    Operation(meter, clearing),
    Operation(follow_a_receipt),
    Operation(list_receipts),
    Operation(use_a_receipt, clearing),
    Operation(roll_back, clearing),
    Operation(keep_a_receipt, clearing),
    Operation(price_of_a_picture),
    Operation(decide_by_receipt),
    Operation(seek_weights),
    Operation(find_a_model),
    Operation(miss_a_model),
    Operation(find_baked_weights),
    Operation(find_compiled_code),
    Operation(read_weights),
    Operation(find_an_autoencoder),
    Operation(fetch_what_is_there),
    Operation(publish, clearing),
    Operation(publish_over_a_torn_one, clearing),
    Operation(verify),
    Operation(remove, clearing),
    Operation(look_for_room),
    Operation(failed_before),
    Operation(leave_a_failure, best_effort),
    Operation(examine_models),
    Operation(go_on_with_a_sweep),
    Operation(begin_another_sweep, clearing),
    Operation(end_a_sweep, best_effort),
    Operation(compare_pictures),
    Operation(check_baked_weights),
)


@contextmanager
def heard() -> Iterator[list[str]]:
    """The lines logged inside."""
    lines: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    ear, root = Ear(), logging.getLogger()
    root.addHandler(ear)
    try:
        yield lines
    finally:
        root.removeHandler(ear)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden volume, with what only this machine can have: how compiling failed on it; and a sweep's pictures."""
    from PIL import Image

    at = golden.copy(tmp_path_factory.mktemp("original") / "volume")
    FAILURES(at)._leave("a GPU was lost", "lost")
    FAILURES(at)._leave("no compiler", "failed")
    for name in ("ours", "theirs"):
        (at / name).mkdir()
        Image.new("RGB", (16, 16), (name == "ours" and "red") or "blue").save(at / name / "0.png")
    return at


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_whatever_a_disk_says_is_told(operation: Operation, original: Path, tmp_path: Path) -> None:
    at, told = tmp_path / "volume", []

    def renew(folders: Iterable[str]) -> None:
        for folder in folders:
            shutil.rmtree(at / folder, ignore_errors=True)
            shutil.copytree(original / folder, at / folder, copy_function=os.link)  # nothing there is written to

    def outcome(number: int = 0, chosen: Callable[[Call], bool] = silent) -> tuple[Any, str, list[Call]]:
        with heard() as lines, failing(at, number, chosen) as calls:
            try:
                value: Any = operation.run(at)
                said = f"{value!r} {lines}"
            except KindlingError as error:
                value, said = error, f"{error.message} {lines}"
        return value, said, calls

    at.mkdir()
    renew(path.name for path in original.iterdir())
    healthy, _, calls = outcome()
    assert not isinstance(healthy, Exception), healthy
    assert calls
    for call in dict.fromkeys(calls):
        for number in ERRNOS if call.name in CHANGING else ERRNOS[1:]:
            if any(made.name in CHANGING[1:] for made in calls):
                renew({made.path.partition("/")[0] for made in calls})
            value, said, calls = outcome(number, call.__eq__)
            quiet = number == errno.ENOENT or operation.quiet(call) or repr(value) == repr(healthy)
            if not quiet and not (os.strerror(number) in said and str(at) in said):
                told.append(f"{call}, {errno.errorcode[number]}: {said}")
    assert not told, "\n".join(told)
