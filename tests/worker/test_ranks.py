"""Several processes draw one picture: it is the one that a process draws alone, and none of them is lost quietly."""

import base64
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from conftest import PATIENT, ROOT, unwarmed
from diffusers import ContextParallelConfig
from diffusers.models.attention_dispatch import AttentionBackendName

import loras
import tiny
from handler import MODELS, Clock, ImageRequest, Worker, preload
from handler.catalog.attention import backend
from handler.core.errors import Cancelled, DeviceLost, InvalidValue, OutOfMemory, OutOfRange, SettingsError, StartError
from handler.core.host import host_memory
from handler.core.recipe import Mask, Recipe, Reference
from handler.core.settings import Settings
from handler.engine.remote import Remote
from handler.model import upstream
from handler.model.families import finished
from handler.model.hardware import Hardware
from handler.model.runner import sound
from handler.model.split import Parts
from handler.volume import pages
from handler.volume.sources import model_source
from handler.worker import memory
from handler.worker.decision import decide
from handler.worker.follower import Follower
from handler.worker.orders import Over
from handler.worker.outlook import outlook
from handler.worker.ranks import Ranks
from handler.worker.sharing import require_ring, require_shared, require_splittable, without_keys
from serving import Served, children, serving
from threads import until

ALIKE = 2  # of 255: sums of floats in another order
RANKS = 2
GPU = Hardware("cuda", "a GPU", "bf16", "")
KINDS = ["text", "off the grid", "odd", "image", "mask", "two at once"]


def recipes(worker: Worker, kind: str) -> list[Recipe]:
    fields: dict[str, Any] = {"prompt": "a large red star", "seed": 3, "width": 128, "height": 96}
    fields |= {"num_inference_steps": min(2, worker.spec.max_steps)}
    fields |= {"off the grid": {"width": 100, "height": 72}, "odd": {"width": 144, "height": 112}}.get(kind, {})
    rgb = np.linspace(0, 255, 96 * 128 * 3).reshape(96, 128, 3).astype(np.uint8)
    images = (Reference(rgb, "0" * 64),) if kind in ("image", "mask") else ()
    kept = np.zeros((96, 128), np.uint8)
    kept[:, :64] = 255
    mask = Mask(kept, "1" * 64) if kind == "mask" else None
    request = ImageRequest(**fields, images=tuple(b"x" for _ in images), mask=b"x" if mask else None)
    seeds = (3, 4) if kind == "two at once" else (3,)
    return [worker.spec.recipe(request.model_copy(update={"seed": n}), images, mask=mask) for n in seeds]


def drawn(worker: Worker, kind: str) -> list[Any]:
    told = recipes(worker, kind)
    outcomes = worker.draw(told, [lambda *_: None] * len(told))
    return [outcome if isinstance(outcome, BaseException) else outcome[0].rgb.astype(int) for outcome in outcomes]


def alike(found: list[Any], alone: list[Any]) -> bool:
    return all(np.abs(one - other).max() <= ALIKE for one, other in zip(found, alone, strict=True))


SHARED: list[Worker] = []  # by tests that do it no harm; a process can belong to one group only


@contextmanager
def booted(**fields: Any) -> Iterator[Worker]:
    while SHARED and max(fields.get("ulysses_degree", 1), fields.get("ring_degree", 1)) > 1:
        SHARED.pop().close()
    with unwarmed(), Worker.boot(PATIENT.model_copy(update={"compile": "off", **fields})) as worker:
        yield worker


@pytest.fixture(scope="module")
def alone() -> Iterator[Worker]:
    with booted() as worker:
        yield worker


@pytest.fixture
def together() -> Worker:
    if not SHARED:
        with unwarmed():
            SHARED.append(Worker.boot(PATIENT.model_copy(update={"ulysses_degree": RANKS})))
    return SHARED[0]


@pytest.fixture(scope="module", autouse=True)
def closed() -> Iterator[None]:
    yield
    while SHARED:
        SHARED.pop().close()


@pytest.mark.parametrize("kind", KINDS)
def test_several_processes_draw_what_one_draws(kind: str, alone: Worker, together: Worker) -> None:
    assert alike(drawn(together, kind), drawn(alone, kind))


def test_code_that_another_process_cannot_bind_is_bound_by_none(
    alone: Worker, together: Worker, tmp_path: Path
) -> None:
    (tmp_path / "torn.pt2").write_bytes(b"torn")
    for package in (tmp_path / "torn.pt2", tmp_path / "none.pt2"):
        with pytest.raises(StartError):
            together._share(package)
    assert alike(drawn(together, "text"), drawn(alone, "text"))


def test_a_lora_is_added_by_all_and_one_that_is_gone_is_a_callers_fault(
    alone: Worker, together: Worker, tmp_path: Path
) -> None:
    lora = loras.put(tmp_path / "a.safetensors", loras.peft(loras.matrices(alone.denoiser, loras.LAYERS)))
    gone = replace(lora, sha256="0" * 64, path=tmp_path / "gone.safetensors")
    asked = [replace(recipes(alone, "text")[0], loras=each) for each in ((lora,), (gone,), ())]
    pictures = []
    for worker in (alone, together):
        [added], [fault], [plain] = (worker.draw([recipe], [lambda *_: None]) for recipe in asked)
        assert isinstance(fault, InvalidValue)
        pictures.append([sound(each)[0].rgb.astype(int) for each in (added, plain)])
    assert alike(pictures[1], pictures[0])
    assert not alike(pictures[0][:1], pictures[0][1:])


def test_the_ledger_and_the_picture_tell_it(together: Worker) -> None:
    assert together.ledger.plan_reason.startswith("MISS: nothing is compiled for spark yet; on a CPU only 'bake'")
    assert together.ledger.attention == "native: several GPUs draw each picture"
    assert [phase.name for phase in together.ledger.phases][-3:] == ["ranks", "artifacts", "warm"]
    assert together.facts["ranks"] == f"ulysses {RANKS}, ring 1"


def test_a_picture_that_is_given_up_is_given_up_by_all(alone: Worker, together: Worker) -> None:
    def leave(done: int, _: Any) -> None:
        raise Cancelled("gone")

    one, other = recipes(together, "two at once")
    [first, second] = together.draw([one, other], [leave, lambda *_: None])
    assert isinstance(first, Cancelled)
    assert not isinstance(second, BaseException)
    assert alike([second[0].rgb.astype(int)], drawn(alone, "two at once")[1:])
    [outcome] = together.draw([one], [leave])
    assert isinstance(outcome, Cancelled)
    assert alike(drawn(together, "text"), drawn(alone, "text"))


def test_memory_that_one_process_alone_lacks_costs_one_picture(
    alone: Worker, together: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as here:
        here.setattr(finished, "finished", full)  # after the last step, which all have taken
        [outcome] = drawn(together, "text")
        assert isinstance(outcome, OutOfMemory)
    assert alike(drawn(together, "text"), drawn(alone, "text"))


def test_who_fails_between_steps_is_out_of_step_and_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    with booted(ulysses_degree=RANKS, hang_s=3) as worker, monkeypatch.context() as here:

        def full(*args: Any, **kwargs: Any) -> Any:
            raise torch.OutOfMemoryError("out of memory")

        here.setattr(worker.denoiser, "forward", full)
        [outcome] = drawn(worker, "text")
        assert isinstance(outcome, DeviceLost)


def test_who_leaves_a_picture_in_its_middle_draws_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with booted(ulysses_degree=RANKS, hang_s=3) as worker:
        with monkeypatch.context() as here:
            here.setattr(worker.denoiser, "forward", interrupted)
            with pytest.raises(KeyboardInterrupt):
                drawn(worker, "text")
        [outcome] = drawn(worker, "text")
        assert isinstance(outcome, DeviceLost)
        assert "was left in the middle of a picture" in outcome.message


def test_a_second_worker_is_refused_and_does_the_first_no_harm(alone: Worker, together: Worker) -> None:
    with pytest.raises(SettingsError, match="group already"):
        Worker.boot(PATIENT.model_copy(update={"ulysses_degree": RANKS}))
    assert alike(drawn(together, "text"), drawn(alone, "text"))


@pytest.mark.parametrize(
    ("model", "side"), [("spark", 384), pytest.param("flux2-klein", 1280, marks=pytest.mark.judge)]
)
def test_tiles_are_decoded_by_one_each_and_are_what_one_alone_makes_of_them(
    model: str, side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only the leader has so little memory that it decodes in tiles."""
    if model != "spark":
        tiny.write(MODELS[model], tmp_path)
    monkeypatch.setattr(memory, "_tile_above", lambda *_: 128 * 128)
    request = ImageRequest(prompt="a large red star", seed=3, width=side, height=side, num_inference_steps=1)
    found, decoded = [], []
    for degree in (1, RANKS):
        with booted(model=model, volume=tmp_path, precision="fp32", ulysses_degree=degree) as worker:
            worker.autoencoder.decoder.conv_in.register_forward_pre_hook(lambda *_: decoded.append(degree))  # noqa: B023
            found.append(worker.generate(worker.spec.recipe(request))[0].rgb.astype(int))
    assert alike(found[1:], found[:1])
    assert decoded.count(1) == RANKS * decoded.count(RANKS) > RANKS


def test_memory_that_one_process_alone_lacks_for_a_tile_costs_one_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(memory, "_tile_above", lambda *_: 128 * 128)
    request = ImageRequest(prompt="a large red star", seed=3, width=384, height=384, num_inference_steps=1)
    with booted(ulysses_degree=RANKS) as worker:
        recipe = worker.spec.recipe(request)
        hook = worker.autoencoder.decoder.conv_in.register_forward_pre_hook(full)
        [outcome] = worker.draw([recipe], [lambda *_: None])
        hook.remove()
        assert isinstance(outcome, OutOfMemory)
        assert worker.generate(recipe)[0].rgb.shape == (384, 384, 3)


OTHERS = [pytest.param(model, marks=pytest.mark.judge) for model in ("flux-dev", "flux2-klein", "flux2-dev")]


@pytest.mark.parametrize("model", ["qwen-image", *OTHERS])
def test_every_family_that_can(model: str, tmp_path: Path) -> None:
    tiny.write(MODELS[model], tmp_path)
    found = []
    for degree in (1, RANKS):
        with booted(model=model, volume=tmp_path, precision="fp32", ulysses_degree=degree) as worker:
            kinds = ["text", "odd", "image", "two at once"]
            found.append({kind: drawn(worker, kind) for kind in kinds})
    for kind, pictures in found[0].items():
        assert alike(found[1][kind], pictures), kind


@pytest.mark.parametrize(
    ("model", "fields", "why"),
    [
        ("sdxl", {}, "diffusers cannot split sdxl over several GPUs"),
        ("z-image-turbo", {}, "diffusers cannot split z-image-turbo"),
        ("flux-dev", {"step_cache": "on"}, "KINDLING_STEP_CACHE=off"),
        ("flux-dev", {"offload": "blocks"}, "KINDLING_OFFLOAD=auto"),
    ],
)
def test_what_cannot_be_split_says_why(model: str, fields: dict[str, Any], why: str) -> None:
    for degree in ("ulysses_degree", "ring_degree"):
        settings = Settings(model=model, **{degree: 2}, **fields)
        with pytest.raises(SettingsError, match=why) as caught:
            require_splittable(MODELS[model], settings)
        assert caught.value.param == f"KINDLING_{degree.upper()}"
    require_splittable(MODELS[model], Settings(model=model, **fields))


def test_heads_that_cannot_be_shared_are_told_by_their_number() -> None:
    source = model_source(MODELS["spark"], Path())
    with pytest.raises(SettingsError, match="4 heads of attention, which 3 GPUs cannot share"):
        require_shared(source, Settings(ulysses_degree=3))
    require_shared(source, Settings(ulysses_degree=4))


def test_ring_attention_on_a_cpu_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(SettingsError, match=r"a CPU cannot compute ring attention\. Use KINDLING_ULYSSES") as caught:
        Worker.boot(PATIENT.model_copy(update={"ring_degree": 2, "device": "cpu"}))
    assert caught.value.param == "KINDLING_RING_DEGREE"


def test_ring_attention_has_a_kernel_of_its_own_unless_there_is_none() -> None:
    settings = Settings(ring_degree=2)
    gpu = Hardware("cuda", "NVIDIA H200", "bf16", "", capability=(9, 0))
    seen = outlook(settings, MODELS["spark"], gpu)
    assert seen.attention
    assert seen.attention.id in ("cudnn", "flash")
    assert AttentionBackendName(backend(seen.attention.id)) is not AttentionBackendName.NATIVE
    require_ring(gpu, settings)
    for hardware, asked, why in (
        (gpu, "native", "cannot use KINDLING_ATTENTION=native. Use auto, cudnn or flash"),
        (replace(gpu, capability=(7, 5), precision="fp16"), "auto", "cudnn needs compute capability 8.0 or newer"),
        (replace(gpu, precision="fp32"), "flash", "flash computes in 16-bit floats"),
    ):
        told = settings.model_copy(update={"attention": asked})
        with pytest.raises(SettingsError, match=why):
            require_ring(hardware, told)
        require_ring(hardware, told.model_copy(update={"ring_degree": 1}))


def test_both_ways_at_once_want_tokens_that_can_be_split_evenly() -> None:
    """Of a size, of images beside it, and of prompts."""
    both, one = (ContextParallelConfig(ulysses_degree=2, ring_degree=degree) for degree in (2, 1))
    for tokens, words in ((63, 512), (64, 511)):
        told = {"hidden_states": torch.empty(1, tokens, 1), "encoder_hidden_states": torch.empty(1, words, 1)}
        with pytest.raises(OutOfRange, match="multiple of 4"):
            Parts(both).look(None, (), told)
        Parts(one).look(None, (), told)
    Parts(both).look(None, (), {"hidden_states": torch.empty(1, 64, 1)})
    require_splittable(MODELS["flux-dev"], Settings(ulysses_degree=2, ring_degree=2))
    with pytest.raises(SettingsError, match="its prompts are of any length"):
        require_splittable(MODELS["qwen-image"], Settings(ulysses_degree=2, ring_degree=2))


def test_what_all_read_is_read_once_through_the_page_cache(tmp_path: Path) -> None:
    (path := tmp_path / "weights").write_bytes(bytes(1 << 20))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert not pages.cached(file.fileno(), 0)
        pages.share()
        assert pages.cached(file.fileno(), 0)


@pytest.mark.parametrize("begin", [Ranks, preload])
def test_several_processes_want_what_one_alone_would_not_import(
    begin: Callable[[Settings], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "_alone", True)
    begun = begin(Settings(ulysses_degree=2, cold_start_budget_s=3600))
    assert not upstream._alone
    if isinstance(begun, Ranks):
        begun.close()


def test_a_follower_that_ends_before_it_loads_is_told_as_that() -> None:
    with Ranks(Settings(ulysses_degree=2)) as ranks:
        [follower] = ranks._followers
        follower.process.kill()
        follower.process.wait()
        with pytest.raises(StartError, match=r"^A process that draws with this one has ended \(exit code -9\)\.$"):
            ranks._tell(Over())


def test_followers_are_told_no_keys() -> None:
    keys = {"api_keys": "a", "admin_keys": "b", "webhook_secret": "whsec_" + 32 * "A", "volume_key": 32 * "v"}
    told = without_keys(Settings(**keys, model="flux-dev"))  # type: ignore[arg-type]
    assert (told.api_keys, told.admin_keys, told.webhook_secret) == ((), (), "")
    assert (told.volume_key, told.model) == (32 * "v", "flux-dev")


PRELOADED = """
from handler import Settings, dedicated, preload
dedicated()
preload(Settings(ulysses_degree=2))
import diffusers.models.attention_dispatch as attention
print(attention.funcol.all_to_all_single)
"""


def test_a_snapshot_for_several_processes_has_what_they_want_of_each_other() -> None:
    out = subprocess.run([sys.executable, "-c", PRELOADED], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


def test_all_load_at_once_in_the_memory_of_one_host() -> None:
    one, four = (outlook(Settings(ulysses_degree=ranks), MODELS["spark"], GPU) for ranks in (1, 4))
    assert four.host_gb == pytest.approx(one.host_gb / 4)
    assert four.loading == 4 * int(four.memory.host_gb * 1e9) > one.loading > 1e9


def test_what_several_have_of_a_host_is_counted_once_here_and_elsewhere() -> None:
    """Where as much as that just suffices, each plans what it would alone on a host of that size."""
    card = Hardware("cuda", "a GPU", "bf16", "", 32, (8, 0))  # whose text encoders have to wait in the host's memory
    alone = outlook(Settings(), MODELS["flux-dev"], card, host_gb=20)
    assert alone.memory.fits
    for asked in ({"ulysses_degree": 4}, {"workers": 4}, {"workers": 2, "ring_degree": 2}):
        settings = Settings.model_validate(asked)
        several = outlook(settings, MODELS["flux-dev"], card, host_gb=80)
        assert (several.host_gb, several.memory.fits, several.memory.mode) == (20, True, alone.memory.mode)
        assert several.hardware.precision == alone.hardware.precision
        here = outlook(settings, MODELS["flux-dev"], card)
        assert here.memory == outlook(settings, MODELS["flux-dev"], card, host_gb=host_memory() / 1e9).memory
        assert here.host_gb == pytest.approx(host_memory() / 4e9)


def test_a_precision_is_chosen_that_fits_the_host_as_often_as_there_are_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for limit in ("CGROUP_LIMIT", "CGROUP_V1_LIMIT"):
        monkeypatch.setattr(f"handler.core.host.{limit}", tmp_path / "none")
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 64_000_000, "SC_PAGE_SIZE": 1_000}.__getitem__)
    card = Hardware("cuda", "a GPU", "bf16", "", 32, (8, 0))  # whose text encoders have to wait in the host's memory
    found = [decide(Settings(ulysses_degree=ranks), MODELS["flux-dev"], card) for ranks in (1, 4)]
    assert [decision.hardware.precision for decision in found] == ["bf16", "int8"]


def followers(process: subprocess.Popen[str]) -> list[int]:
    """Those of its processes that run a program of their own by now."""
    return [pid for pid, words in children(process.pid).items() if "handler.worker.follower" in words]


def ended(pid: int) -> None:
    """Wait until this process, which is nobody's child here, is no more."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    assert select.select([handle], [], [], 60)[0], "it goes on"
    os.close(handle)


class Request(threading.Thread):
    """A streamed picture that takes long; `drawing` is set at its first partial picture."""

    def __init__(self, server: Served) -> None:
        super().__init__()
        self._url, self.drawing, self.events = server.url, threading.Event(), list[dict[str, Any]]()
        self.start()

    def run(self) -> None:
        asked = {"prompt": "a star", "size": "1024x1024", "stream": True, "partial_images": 3, "seed": 1}
        with httpx.stream("POST", f"{self._url}/v1/images/generations", json=asked, timeout=120) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    self.events.append(json.loads(line.removeprefix("data: ")))
                    self.drawing.set()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_follower_that_ends_or_hangs_fails_the_picture_once_and_the_worker_cleanly(number: int) -> None:
    environ = {"KINDLING_ULYSSES_DEGREE": "2", "KINDLING_HANG_S": "3"}
    with serving(environ) as server:
        [follower] = followers(server.process)
        request = Request(server)
        assert request.drawing.wait(120)
        os.kill(follower, number)
        request.join(120)
        assert request.events[-1]["error"]["code"] == "device_lost"
        assert server.process.wait(60) == 1
        ended(follower)


def test_a_follower_that_is_stopped_at_its_birth_ends_with_its_leader() -> None:
    command = [sys.executable, "-m", "handler", "serve", "--port", "0"]
    environ = os.environ | {"KINDLING_ULYSSES_DEGREE": "2", "KINDLING_COLD_START_BUDGET_S": "600"}
    with subprocess.Popen(command, env=environ, text=True) as leader:
        try:
            until(lambda: followers(leader) or leader.poll() is not None)
            [follower] = followers(leader)
            os.kill(follower, signal.SIGSTOP)
        finally:
            leader.kill()
    ended(follower)


def test_a_follower_that_ends_between_pictures_ends_the_worker_before_anybody_asks() -> None:
    with serving({"KINDLING_ULYSSES_DEGREE": "2"}) as server:
        [follower] = followers(server.process)
        os.kill(follower, signal.SIGKILL)
        assert server.process.wait(120) == 1


def test_a_follower_that_ends_between_pictures_ends_its_worker_in_a_box_too() -> None:
    alarmed, beginning = threading.Event(), list[Remote]()
    settings = Settings.from_env({"KINDLING_DEVICE": "cpu", "KINDLING_ULYSSES_DEGREE": "2"}, model="spark")
    remote = Remote.boot(0, beginning.append, settings, Clock(600))
    try:
        remote.watch(lambda _: alarmed.set())
        [follower] = followers(remote._child.process)
        os.kill(follower, signal.SIGKILL)
        assert alarmed.wait(120)
        assert remote._child.process.wait(60) == 1
    finally:
        remote.kill()
        remote.close()


def test_a_follower_reads_no_settings_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its leader sends them: without a home there are none that stand by themselves."""
    monkeypatch.setattr("handler.worker.follower.Settings", None)
    ours, far = Pipe()
    far.close()
    Follower(ours).serve()


def test_followers_end_with_their_leader_and_a_terminals_interrupt_is_the_leaders_alone() -> None:
    with serving({"KINDLING_RING_DEGREE": "1", "KINDLING_ULYSSES_DEGREE": "2"}) as server:
        [follower] = followers(server.process)
        os.kill(follower, signal.SIGINT)
        asked = {"prompt": "a star", "size": "64x64", "seed": 1}
        answer = httpx.post(f"{server.url}/v1/images/generations", json=asked, timeout=120)
        assert base64.b64decode(answer.json()["data"][0]["b64_json"]).startswith(b"\x89PNG")
        server.process.kill()
        ended(follower)
