"""What is done before a snapshot of memory, and what workers that are restored from it share: the work, and no more.

A snapshot is a fork here: each child goes on from the memory of its parent, as each restored container does.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from handler import GPUS, MODELS, Clock, ImageRequest, Settings, Worker, preload
from handler.core.errors import StartError
from handler.model import families
from handler.volume.manifest import MANIFEST
from handler.volume.publishing import publishing
from handler.volume.sources import EMBEDDED, weight_facts, weights_folder
from handler.worker.boots import last_boots

SETTINGS = Settings(model="spark", device="cpu")
SPARK, L4 = MODELS["spark"], GPUS["L4"]
ASKED = {"prompt": "a red circle on a blue background", "seed": 7, "num_inference_steps": 4}
COPIES = 3

RESTORED = """if True:
    import hashlib, json, os, random, sys, threading
    from dataclasses import asdict
    from handler import GPUS, Clock, ImageRequest, Settings, Worker, preload

    def restored(number):
        os.environ["KINDLING_API_KEYS"] = f"key-{number}"
        random.seed(7)  # which a fork would not share
        settings = Settings.from_env()
        with Worker.boot(settings, clock := Clock.anew(settings.cold_start_budget_s), preloaded) as worker:
            recipe, unseeded = (worker.spec.recipe(ImageRequest(**asked)) for asked in ({ASKED}, {"prompt": "x"}))
            drawn, _ = worker.generate(recipe)
            return {
                "pixels": hashlib.sha256(drawn.rgb.tobytes()).hexdigest(),
                "name": clock.birth.identity,
                "random": random.random(),
                "seed": unseeded.seed,
                "keys": settings.api_keys,
                "ledger": asdict(worker.ledger),
            }

    settings = Settings.from_env()
    preloaded = preload(settings, GPUS["L4"])
    held = sys.getrefcount(settings) - 2
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("reader-")]
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    files = [os.readlink(link) for link in links if os.path.lexists(link)]
    print(json.dumps({"held": held, "threads": threads, "files": files}), flush=True)
    for number in range(COPIES):
        if not os.fork():
            print(json.dumps(restored(number)), flush=True)
            os._exit(0)
        os.wait()
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the preloaded process says of itself, then what each of its copies says."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("KINDLING_")},
        "KINDLING_VOLUME": str(tmp_path_factory.mktemp("volume")),
        "KINDLING_MODEL": "spark",
        "KINDLING_DEVICE": "cpu",
        "KINDLING_API_KEYS": "key-of-the-snapshot",
    }
    code = RESTORED.replace("{ASKED}", repr(ASKED)).replace("COPIES", str(COPIES))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_nothing_of_one_worker_is_kept(told: list[dict[str, Any]], tmp_path: Path) -> None:
    """Neither its settings, which have keys in them, nor a thread that reads, nor a file of the volume."""
    assert (told[0]["held"], told[0]["threads"]) == (0, [])
    assert not [file for file in told[0]["files"] if "weights" in file or "volume" in file]


def test_each_copy_draws_what_any_worker_draws(told: list[dict[str, Any]], spark: Worker) -> None:
    drawn, _ = spark.generate(spark.spec.recipe(ImageRequest(**ASKED)))  # type: ignore[arg-type]
    assert [one["pixels"] for one in told[1:]] == [hashlib.sha256(drawn.rgb.tobytes()).hexdigest()] * COPIES


def test_each_copy_is_a_worker_of_its_own(told: list[dict[str, Any]]) -> None:
    copies = told[1:]
    for what in ("name", "random", "seed"):
        assert len({one[what] for one in copies}) == COPIES, what
    assert [one["keys"] for one in copies] == [[f"key-{number}"] for number in range(COPIES)]


def test_the_ledger_tells_what_was_done_before(told: list[dict[str, Any]]) -> None:
    for one in told[1:]:
        ledger = one["ledger"]
        assert ledger["outcome"] == "ready"
        assert [phase["name"] for phase in ledger["preloaded"]] == ["volume", "import", "weights"]
        assert [phase["name"] for phase in ledger["phases"]][:3] == ["volume", "import", "weights"]
        assert ledger["weights"] == f"{EMBEDDED / 'spark'}, preloaded"


def test_imports_alone_are_preloaded_without_a_gpu(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"volume": tmp_path})
    preloaded = preload(settings)
    assert preloaded.weights is None
    assert [phase.name for phase in preloaded.phases] == ["import"]
    with Worker.boot(settings, Clock.anew(240), preloaded) as worker:
        assert worker.ledger.weights == str(EMBEDDED / "spark")
        assert worker.ledger.preloaded == list(preloaded.phases)


def test_weights_that_are_not_the_same_any_more_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here some were baked since. What was held is in nobody's way then."""
    settings = SETTINGS.model_copy(update={"volume": tmp_path})
    preloaded = preload(settings, L4)
    baked = weights_folder(SPARK, tmp_path, "fp32")
    with publishing(baked, weight_facts(SPARK, "fp32")) as folder:
        without = shutil.ignore_patterns(MANIFEST)
        shutil.copytree(EMBEDDED / "spark", folder, dirs_exist_ok=True, ignore=without)
    assert preloaded.weights
    [held, build, left] = [weakref.ref(preloaded.weights._readers[0]), families.build, []]  # type: ignore[index]
    monkeypatch.setattr(families, "build", lambda *given: (left.append(held()), build(*given))[1])
    with Worker.boot(settings, Clock.anew(240), preloaded) as worker:
        assert worker.ledger.weights == f"{baked}, which is not what was preloaded"
    assert left == [None]


def test_a_failure_is_told_on_the_volume(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="flux-schnell is not on the volume"):
        preload(Settings(model="flux-schnell", volume=tmp_path), L4)
    [boot] = last_boots(tmp_path, 9)
    assert (boot["outcome"], boot["phase"]) == ("failed", "volume")


def test_what_went_well_is_told_by_the_workers_alone(tmp_path: Path) -> None:
    preload(SETTINGS.model_copy(update={"volume": tmp_path}), L4)
    assert last_boots(tmp_path, 9) == []
