"""What `auto` means without a receipt: on each of the cards people rent, and told without torch before it is needed."""

import ctypes
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PATIENT, unwarmed

import tiny
from fakes import raises
from handler import GPUS, Clock, Settings, Worker
from handler.catalog.models import DEV, MODELS, QWEN_IMAGE, SCHNELL, SPARK
from handler.catalog.precisions import PRECISIONS, choose
from handler.catalog.spec import ModelSpec
from handler.catalog.stable_diffusion import SDXL
from handler.cli.models import lines, state
from handler.core.errors import DeviceMissing, SettingsError
from handler.model.hardware import Hardware, detect, expected, looked_at, rented, wake
from handler.worker.decision import automatic, decide
from handler.worker.memory import memory_plan
from handler.worker.outlook import outlook


def test_workers_that_share_a_cpu_share_its_memory() -> None:
    alone, shared = (memory_plan(SDXL, replace(CPU, memory_gb=24), host_gb=share) for share in (24, 12))
    assert (alone.fits, shared.fits) == (True, False)
    assert "of 12.0 GB on the CPU" in shared.reason
    assert memory_plan(SDXL, replace(CPU, memory_gb=48), host_gb=24).spare_gb == alone.spare_gb


GPULESS = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
CPU = Hardware("cpu", "CPU", "fp32", "a CPU: fp32 is exact and no slower", 32)
SEED = {"L4": "fp8", "A10G": "int8", "L40S": "fp8", "A100 40GB": "bf16", "H100": "fp8", "H200": "fp8", "B200": "fp8"}


def card(name: str) -> Hardware:
    return replace(rented(Settings(), GPUS[name]), reason="a GPU")


def expect(settings: Settings, spec: ModelSpec) -> str:
    """The precision that is told without torch."""
    return outlook(settings, spec, expected(settings)).hardware.precision


def auto(spec: ModelSpec, name: str) -> str:
    return automatic(spec, card(name), 64)[0]


@pytest.mark.parametrize("name", SEED)
def test_flux_on_the_cards_of_the_seed(name: str) -> None:
    assert (auto(SCHNELL, name), auto(DEV, name)) == (SEED[name],) * 2


def test_models_that_nobody_publishes_in_fp8_stay_in_16_bits_where_they_fit() -> None:
    assert {auto(SDXL, name) for name in GPUS} == {"bf16"}
    small = replace(card("L4"), memory_gb=7)
    assert automatic(SDXL, small, 64)[0] == "int8"


def test_all_published_models_say_where() -> None:
    named = {spec.family.rpartition(".")[2] for spec in MODELS.values() if spec.fp8_source}
    assert named == {"flux", "flux2", "flux2_klein", "sd3", "qwen_image", "z_image", "chroma"}
    assert not SPARK.fp8_source


def test_spark_and_cpus_stay_as_they_are() -> None:
    assert {auto(SPARK, name) for name in GPUS} == {"bf16"}
    assert automatic(DEV, CPU, 64) == (CPU.precision, CPU.reason)
    assert automatic(DEV, replace(card("H100"), capability=None), 64) == ("bf16", "a GPU")


def test_the_reason_is_told() -> None:
    assert automatic(DEV, card("L4"), 64)[1] == (
        "NVIDIA L4 computes in FP8, and flux-dev is published in it (vllm-project/vllm-omni#2795: LPIPS 0.12)"
    )
    reason = automatic(DEV, card("A10G"), 64)[1]
    assert reason.startswith("bf16 would have to stream the denoiser: all but the VAE waits in host memory (")
    assert "of 23.5 GB on the NVIDIA A10G" in reason


def test_how_much_may_wait_in_host_memory_counts() -> None:
    less = replace(card("A100 40GB"), memory_gb=32)
    assert automatic(DEV, less, 64)[0] == "bf16"  # its text encoders wait
    assert automatic(DEV, less, 64, offload="off")[0] == "int8"
    assert automatic(DEV, less, 13)[0] == "int8"  # a host too small for text encoders in 16 bits


def test_rounding_wants_no_more_of_the_host_than_reading() -> None:
    """Weights that are not baked are rounded one by one, as they come."""
    assert automatic(DEV, card("H100"), 16)[0] == "fp8"
    assert automatic(DEV, card("A10G"), 16)[0] == "int8"
    assert automatic(DEV, replace(card("A10G"), memory_gb=30), 7)[0] == "int8"


def test_a_host_too_small_to_read_on_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handler.worker.sharing.host_memory", lambda: 3_500_000_000)
    assert decide(Settings(volume=tmp_path), DEV, card("H100")).hardware.precision == "fp8"  # none fits: as ever
    assert not memory_plan(DEV, replace(card("H100"), precision="fp8"), host_gb=3.5).fits


def test_settings_and_a_cards_limits_come_first(tmp_path: Path) -> None:
    settings = Settings(volume=tmp_path, precision="bf16")
    found = decide(settings, DEV, replace(card("H100"), reason="KINDLING_PRECISION=bf16"))
    assert (found.hardware.precision, found.hardware.reason) == ("bf16", "KINDLING_PRECISION=bf16")
    for name in GPUS:
        for spec in MODELS.values():
            assert GPUS[name].capability >= PRECISIONS[auto(spec, name)].capability


TAKES = {  # bytes a parameter: over a model, of a rounded layer; the grid; what encoders have; what a GPU must be
    "fp32": (4, 1, 16, "", (0, 0)),
    "bf16": (2, 1, 16, "", (0, 0)),
    "fp16": (2, 1, 16, "", (0, 0)),
    "fp8": (1.3, 1, 16, "", (8, 9)),
    "fp8-tensor": (1.3, 1, 16, "", (8, 9)),
    "int8": (1.3, 1, 16, "", (0, 0)),
    "int8-dynamic": (1.3, 1, 16, "", (8, 0)),
    "mxfp8": (1.3, 1.03125, 32, "fp8", (10, 0)),
    "nvfp4": (1.0, 0.5625, 32, "fp8", (10, 0)),
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_a_precision_takes_and_what_it_needs(precision: str) -> None:
    row, least = PRECISIONS[precision], TAKES[precision][-1]
    assert (row.width, row.rounded, row.grid, row.encoders, row.capability) == TAKES[precision]
    assert row.quantised == (precision not in ("fp32", "bf16", "fp16"))
    assert row.emulated == (least == (10, 0))
    chosen = (precision, f"KINDLING_PRECISION={precision}")
    for device, capability in (("cpu", None), ("cpu", (1, 0)), ("cuda", None), ("cuda", least), ("cuda", (12, 1))):
        assert choose(precision, device, "a card", capability) == chosen
    if least > (0, 0):
        told = (
            rf"^KINDLING_PRECISION={precision}: .* {least[0]}\.{least[1]} .*; a card has {least[0] - 1}\.9\. Use auto"
        )
        with pytest.raises(SettingsError, match=told) as caught:
            choose(precision, "cuda", "a card", (least[0] - 1, 9))
        assert caught.value.param == "KINDLING_PRECISION"


def test_auto_is_exact_on_a_cpu_and_half_as_large_on_a_gpu() -> None:
    assert choose("auto", "cpu") == ("fp32", "a CPU: fp32 is exact and no slower")
    assert choose("auto", "cuda", "a card", (7, 5)) == ("bf16", "a GPU: bf16 halves the bytes and keeps fp32's range")


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A machine whose kernel tells of one GPU, and whose driver's library does not."""
    monkeypatch.setattr("handler.model.hardware.GPU_DRIVER", tmp_path)
    monkeypatch.setattr("handler.model.hardware.GPU_FOLDER", tmp_path / "gpus")
    monkeypatch.setattr("handler.model.hardware._from_nvml", lambda: None)
    monkeypatch.setattr("handler.worker.sharing.host_memory", lambda: 64_000_000_000)
    place = tmp_path / "gpus" / "0000:01:00.0"
    place.mkdir(parents=True)
    return lambda name: place.joinpath("information").write_text(f"Model: \t\t {name}\nIRQ:   \t 17\n") and None


@pytest.mark.parametrize(
    ("name", "card", "precision"),
    [
        ("NVIDIA L4", "L4", "fp8"),
        ("NVIDIA A10G", "A10G", "int8"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB", "bf16"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB", "bf16"),
        ("NVIDIA H100 80GB HBM3", "H100", "fp8"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", "fp8"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000", "fp8"),
    ],
)
def test_what_is_read_ahead_is_what_will_be_chosen(
    gpu: Callable[[str], None], tmp_path: Path, name: str, card: str, precision: str
) -> None:
    gpu(name)
    settings = Settings(volume=tmp_path)
    found = expected(settings)
    assert (found.device, found.name, found.capability, found.memory_gb) == (
        "cuda",
        name,
        GPUS[card].capability,
        GPUS[card].memory_gb,
    )
    assert expect(settings, DEV) == precision
    assert expect(settings, SPARK) == "bf16"
    assert expect(Settings(volume=tmp_path, device="cpu"), DEV) == "fp32"


def test_a_card_that_nobody_knows_is_as_before(gpu: Callable[[str], None], tmp_path: Path) -> None:
    gpu("NVIDIA Future 9000")
    assert expect(Settings(volume=tmp_path), DEV) == "bf16"
    assert (
        expect(Settings(volume=tmp_path, precision="nvfp4"), DEV) == "nvfp4"
    )  # `detect` will refuse it, with the name


def test_the_drivers_library_is_asked_first(
    gpu: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pynvml

    gpu("NVIDIA A10G")
    monkeypatch.undo()
    monkeypatch.setattr("handler.worker.sharing.host_memory", lambda: 64_000_000_000)
    monkeypatch.setattr("handler.model.hardware.GPU_DRIVER", tmp_path)
    answers: dict[str, Callable[..., Any]] = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetCudaComputeCapability": lambda handle: (9, 0),
        "nvmlDeviceGetName": lambda handle: "NVIDIA H200",
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=150_754_820_096, used=600_000_000),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    found = expected(Settings())
    assert (found.name, found.capability, round(found.memory_gb)) == ("NVIDIA H200", (9, 0), 151)
    assert expect(Settings(volume=tmp_path), DEV) == "fp8"
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda handle: ("NVIDIA H200", "NVIDIA L4")[handle])
    monkeypatch.setattr("handler.model.hardware.GPU_FOLDER", tmp_path / "none")
    assert expected(Settings()).name == ""  # which of two it will be, only torch knows


def test_a_sandbox_that_hides_proc_still_has_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handler.model.hardware.GPU_DRIVER", tmp_path / "none")
    monkeypatch.setattr("handler.model.hardware._from_nvml", lambda: None)
    assert expected(Settings()).device == "cpu"
    monkeypatch.setattr("handler.model.hardware.GPU_DEVICE", tmp_path)
    assert expected(Settings()).device == "cuda"


def test_a_wrong_guess_is_corrected(
    gpu: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu("NVIDIA L4")
    guess = expected(Settings(volume=tmp_path))
    tiny.write(SCHNELL, tmp_path)
    assert expect(Settings(volume=tmp_path), SCHNELL) == "fp8"
    monkeypatch.setattr("handler.worker.worker.expected", lambda settings: guess)  # but it is to be a CPU
    update = {"model": SCHNELL.id, "volume": tmp_path, "compile": "off", "device": "cpu"}
    with unwarmed():
        worker = Worker.boot(PATIENT.model_copy(update=update))
    assert (worker.hardware.precision, worker.ledger.device) == ("fp32", "CPU")


@GPULESS
@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("", "", "is an NVIDIA driver, but torch sees no GPU: Torch not compiled with CUDA enabled. Install a build"),
        ("NVIDIA_VISIBLE_DEVICES", "all", "NVIDIA_VISIBLE_DEVICES=all, but torch sees no GPU"),
        ("RUNPOD_GPU_COUNT", "1", "RUNPOD_GPU_COUNT=1, but torch sees no GPU"),
        ("IMAGE_CUDA", "cu130", "This image is for GPUs, but torch sees no GPU"),
    ],
)
def test_a_gpu_that_torch_does_not_see_fails_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
) -> None:
    """Else a machine is rented for its GPU, and takes minutes for each picture."""
    if variable:
        monkeypatch.setenv(variable, value)
    else:
        monkeypatch.setattr("handler.model.hardware.GPU_DRIVER", tmp_path)
    rented = Settings(model=SCHNELL.id)
    with pytest.raises(DeviceMissing) as refused:
        detect(rented)
    assert says in refused.value.message
    assert "KINDLING_DEVICE=cpu draws without one" in refused.value.message
    assert detect(Settings(model=SCHNELL.id, device="cpu")).device == "cpu"
    looked = looked_at(rented)  # doctor, models and fetch go on
    assert (looked.device, looked.reason) == ("cpu", refused.value.message)
    for hidden in ("-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert detect(rented).device == "cpu"


@GPULESS
@pytest.mark.parametrize("promise", [True, False])
def test_a_laptops_driver_alone_keeps_nobody_from_the_embedded_model(
    promise: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("handler.model.hardware.GPU_DRIVER", tmp_path)
    if promise:
        monkeypatch.setenv("RUNPOD_GPU_COUNT", "1")
        with pytest.raises(DeviceMissing, match="RUNPOD_GPU_COUNT=1"):
            detect(Settings())
        return
    assert detect(Settings()).device == "cpu"
    assert "torch sees no GPU: Torch not compiled" in caplog.text
    assert "spark is drawn on the CPU" in caplog.text


@GPULESS
def test_the_image_on_a_laptop_draws_the_embedded_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("IMAGE_CUDA", "cu126")
    assert detect(Settings()).device == "cpu"
    assert "This image is for GPUs, but torch sees no GPU" in caplog.text


@GPULESS
@pytest.mark.parametrize(("name", "value"), [("NVIDIA_VISIBLE_DEVICES", "void"), ("RUNPOD_GPU_COUNT", "0")])
def test_who_says_that_there_is_none_gets_a_cpu(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert detect(Settings()).device == "cpu"


def test_what_others_hold_of_a_gpu_is_not_planned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(major=8, minor=9, total_memory=48e9)
    fakes: dict[str, Any] = {
        "is_available": lambda: True, "get_device_properties": lambda _: found,
        "get_device_name": lambda: "NVIDIA L40S",
        "memory_reserved": lambda: 3e9, "memory_allocated": lambda: 1e9, "device_memory_used": lambda: 2.9e9,
    }  # fmt: skip
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    alone = detect(Settings(precision="bf16"))
    assert (alone.memory_gb, alone.others_gb) == (48.0, 0.0)
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda: 33e9)  # 2 GB of it torch keeps, and 1 is everybody's
    shared = detect(Settings(precision="bf16"))
    assert (shared.memory_gb, shared.others_gb) == (18.0, 30.0)
    assert [memory_plan(DEV, each, host_gb=64).mode for each in (alone, shared)] == ["resident", "blocks"]
    told = "of 18.0 GB on the NVIDIA L40S, of which others hold 30.0 GB more"
    assert told in memory_plan(DEV, shared, host_gb=64).reason
    monkeypatch.setattr(torch.cuda, "device_memory_used", raises(RuntimeError("no NVML")))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (15e9, 48e9))
    assert detect(Settings(precision="bf16")) == shared
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda: 60e9)  # of the whole GPU, which has other slices
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB MIG 4g.40gb")
    assert detect(Settings(precision="bf16")).memory_gb == shared.memory_gb


def test_models_shows_what_each_would_be_served_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handler.worker.sharing.host_memory", lambda: 64_000_000_000)
    settings, here = Settings(volume=tmp_path), card("L40S")
    found = {spec.id: state(spec, settings, here) for spec in (DEV, SDXL, QWEN_IMAGE)}
    assert {name: one.precision for name, one in found.items()} == {DEV.id: "fp8", SDXL.id: "bf16", "qwen-image": "fp8"}
    assert "fits in fp8" in lines(DEV, found[DEV.id])[0]


FAKE_DRIVER = """
#include <stdlib.h>
int calls[8], count;
char *loading;
static int call(int which) { calls[count++] = which; return which == FAILS; }
int cuInit(unsigned flags) { loading = getenv("CUDA_MODULE_LOADING"); return call(1 + flags); }
int cuDeviceGet(int *device, int ordinal) { *device = 70 + ordinal; return call(2); }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = calls; return call(device); }
"""


def awake(folder: Path, monkeypatch: pytest.MonkeyPatch, fails: int = 0) -> ctypes.CDLL:
    """The driver's library, once a context was made with it; its call `fails`."""
    (folder / "driver.c").write_text(FAKE_DRIVER)
    library = str(folder / "libcuda.so")
    subprocess.run(["gcc", "-shared", "-fPIC", f"-DFAILS={fails}", "-o", library, folder / "driver.c"], check=True)
    monkeypatch.setattr("handler.model.hardware.DRIVER_LIBRARY", library)
    monkeypatch.setattr("handler.model.hardware.GPU_DRIVER", folder)
    thread = wake(Settings())
    assert thread
    thread.join()
    return ctypes.CDLL(library)


@pytest.mark.parametrize(("fails", "called"), [(0, [1, 2, 70]), (1, [1]), (2, [1, 2]), (70, [1, 2, 70])])
def test_the_gpus_context_is_made_beside_the_imports(
    fails: int, called: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a library with the driver's names, which notes what it is asked for; what fails is torch's to tell."""
    loaded = awake(tmp_path, monkeypatch, fails)
    assert [*(ctypes.c_int * 8).in_dll(loaded, "calls")][: ctypes.c_int.in_dll(loaded, "count").value] == called


@pytest.mark.parametrize(("said", "loading"), [("", b"LAZY"), ("EAGER", b"EAGER")])
def test_the_driver_loads_kernels_as_torch_would_have_it(
    said: str, loading: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_MODULE_LOADING", said)
    if not said:
        monkeypatch.delenv("CUDA_MODULE_LOADING")
    assert ctypes.c_char_p.in_dll(awake(tmp_path, monkeypatch), "loading").value == loading


@GPULESS
def test_no_context_is_made_where_no_gpu_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wake(Settings()) is None
    monkeypatch.setattr("handler.model.hardware.GPU_DRIVER", tmp_path)
    assert wake(Settings(device="cpu")) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert wake(Settings()) is None


@GPULESS
def test_a_driver_without_its_library_stops_no_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handler.model.hardware.GPU_DRIVER", tmp_path)
    monkeypatch.setattr("handler.model.hardware.DRIVER_LIBRARY", "libnobodys.so")
    started: list[str] = []

    class Seen(threading.Thread):
        def start(self) -> None:
            started.append(self.name)
            super().start()

    monkeypatch.setattr("handler.model.hardware.threading.Thread", Seen)
    with unwarmed(), Worker.boot(Settings(), Clock.anew(240)) as worker:
        assert worker.hardware.device == "cpu"
    assert "context" in started
