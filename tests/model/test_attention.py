"""Kernels of attention: what each needs, which wins, what later workers follow, and that the model really uses it."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PATIENT
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName
from PIL import Image

import tiny
from fakes import raises
from handler import MODELS, Clock, ImageRequest, Settings, Worker, outlook
from handler.api import codec
from handler.catalog import attention as kernels
from handler.catalog.attention import KERNELS, KernelChoice, choose, refusal, refusals
from handler.cli import again
from handler.core.birth import Birth
from handler.core.errors import BudgetExceeded, DeviceLost, NumericalError, OutOfMemory, SettingsError
from handler.model import attention
from handler.model.attention import MARGIN, NEEDED_S, Timing, decide
from handler.model.compiling import artifacts
from handler.model.hardware import Hardware, detect
from handler.volume.publishing import publishing
from handler.volume.sources import EMBEDDED
from handler.worker import kernel
from handler.worker.chips import chips
from spark.checker import check
from spark.scenes import held_out

TURING, AMPERE, HOPPER, BLACKWELL = (7, 5), (8, 0), (9, 0), (10, 0)
SPARK, SCHNELL = MODELS["spark"], MODELS["flux-schnell"]
H200 = Hardware("cuda", "NVIDIA H200", "bf16", "a test", 141, HOPPER, attention="")
NATIVE, FASTER = KernelChoice("native", "a test"), KernelChoice("cudnn", "a test")


@pytest.fixture(autouse=True)
def lacking(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make this a machine with a new cuDNN and FlashAttention 3, or without what a test names, with the reason."""

    def set_up(**reasons: str) -> None:
        for name, row in KERNELS.items():
            changed = dataclasses.replace(row, lacking=lambda name=name: reasons.get(name, ""))
            monkeypatch.setitem(kernels.KERNELS, name, changed)

    set_up()
    return set_up


@pytest.fixture
def transformer() -> Any:
    return FluxTransformer2DModel.from_pretrained(EMBEDDED / "spark" / "transformer")


@pytest.fixture(scope="module")
def booted() -> Worker:
    return Worker.boot(PATIENT)


@pytest.fixture
def worker(booted: Worker) -> Iterator[Worker]:
    """One with a model of its own: these tests change how it computes, and diffusers notes that for all models."""
    yield booted
    attention.use(booted._pipeline.transformer, NATIVE)


def draw(worker: Worker) -> Any:
    steps = worker.spec.min_steps
    request = ImageRequest(prompt="a red ring", width=128, height=64, num_inference_steps=steps, seed=1)
    return worker.generate(worker.spec.recipe(request))[0].rgb


def backends(model: Any) -> set[Any]:
    """What the processors of the model were told to use."""
    processors = (getattr(module, "processor", None) for module in model.modules())
    return {processor._attention_backend for processor in processors if hasattr(processor, "_attention_backend")}


def test_diffusers_knows_every_name_and_none_fetches() -> None:
    names = [AttentionBackendName(kernels.backend(name)).value for name in KERNELS]
    assert not [name for name in names if name.endswith("hub")]
    assert next(iter(KERNELS)) == "native"
    for row in KERNELS.values():
        assert all(hasattr(torch.nn.attention.SDPBackend, name) for name in row.order)


@pytest.mark.parametrize(
    ("kernel", "capability", "dtype", "says"),
    [
        ("native", None, "float32", ""),
        ("cudnn", None, "float32", "a CPU has only native"),
        ("cudnn", AMPERE, "bfloat16", ""),
        ("flash", TURING, "float16", "needs compute capability 8.0 or newer, this GPU has 7.5"),
        ("flash3", HOPPER, "float16", ""),
        ("flash3", BLACKWELL, "bfloat16", "needs compute capability 9.0 (Hopper), this GPU has 10.0"),
        ("cudnn", HOPPER, "float32", "computes in 16-bit floats, and this precision in 32-bit ones"),
    ],
)
def test_what_a_kernel_needs(kernel: str, capability: Any, dtype: str, says: str) -> None:
    assert refusal(KERNELS[kernel], capability, dtype) == says


def test_what_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels._no_flash3() == "the package flash_attn_3 is not installed"
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    assert kernels._old_cudnn() == "needs cuDNN 91501 or newer, torch has 91002"

    def broken(name: str) -> None:
        raise OSError("undefined symbol")

    monkeypatch.setattr("importlib.import_module", broken)
    assert kernels._no_flash3() == "the package flash_attn_3 does not work here: undefined symbol"


def test_a_choice_that_needs_no_measuring(lacking: Callable[..., None]) -> None:
    assert choose("auto", None, "float32") == KernelChoice("native", "a CPU has one")
    assert choose("auto", HOPPER, "bfloat16") is None
    for name in ("flash3", "cudnn-fp8"):
        assert choose(name, HOPPER, "bfloat16") == KernelChoice(name, f"KINDLING_ATTENTION={name}")
    found = choose("auto", TURING, "float16")
    assert found
    assert found.id == "native"
    assert found.reason.startswith("cuDNN needs compute capability 8.0 or newer, this GPU has 7.5; FlashAttention 2 ")
    lacking(flash3="the package flash_attn_3 is not installed")
    with pytest.raises(SettingsError, match=r"flash3: the package flash_attn_3 is not installed. Use auto, or native"):
        choose("flash3", HOPPER, "bfloat16")
    with pytest.raises(SettingsError, match="KINDLING_ATTENTION=cudnn: a CPU has only native"):
        detect(Settings(attention="cudnn", device="cpu"))


def timings(native: float | None, cudnn: float | None, flash3: float | None) -> list[Timing]:
    why = {None: "cannot do it"}
    rows = {"native": native, "cudnn": cudnn, "flash": None, "flash3": flash3}
    return [Timing(name, ms, why.get(ms, "")) for name, ms in rows.items()]


@pytest.mark.parametrize(
    ("native", "cudnn", "flash3", "wins"),
    [
        (1.0, 0.5, None, "cudnn"),
        (1.0, 0.5, 0.4, "flash3"),
        (1.0, 0.5, 0.5 * (1 - MARGIN) + 0.001, "cudnn"),  # two alike: the earlier, on every worker
        (1.0, 1 - MARGIN + 0.001, None, "native"),
        (1.0, 1 - MARGIN - 0.001, None, "cudnn"),
        (1.0, None, None, "native"),
        (1.0, 2.0, 3.0, "native"),
    ],
)
def test_the_fastest_wins_by_a_margin(native: float, cudnn: float | None, flash3: float | None, wins: str) -> None:
    assert decide(timings(native, cudnn, flash3), 4608).id == wins


def test_the_reason_has_the_figures() -> None:
    assert decide(timings(0.55, 0.41, None), 4608).reason == (
        "cuDNN 0.41 ms for 4608 tokens, against SDPA 0.55 ms; "
        "FlashAttention 2 cannot do it; FlashAttention 3 cannot do it"
    )
    assert decide([Timing("native", 0.55)], 256).reason == "SDPA 0.55 ms for 256 tokens"


def test_when_measuring_would_not_pay(transformer: Any) -> None:
    assert attention.unmeasured(transformer, False, NEEDED_S) == ""
    assert "host memory" in attention.unmeasured(transformer, True, NEEDED_S)
    assert attention.unmeasured(transformer, False, 3) == "measuring may take 30 s, and 3 s are left"
    assert attention.unmeasured(torch.nn.Linear(1, 1), False, NEEDED_S) == "diffusers has no other for Linear"


@pytest.mark.parametrize("model", ["sdxl-turbo", "sd3.5-large"])
def test_a_model_without_a_choice_says_so(model: str) -> None:
    pipeline = tiny.build(MODELS[model])
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    attention.use(denoiser, NATIVE)
    with pytest.raises(SettingsError, match=rf"a test: diffusers has only native for {type(denoiser).__name__}. Use a"):
        attention.use(denoiser, FASTER)


@pytest.mark.parametrize("model", ["flux-schnell", "flux2-klein", "z-image-turbo", "qwen-image", "chroma"])
def test_what_a_model_asks_is_seen(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every family that has a choice: the shapes, and masks, which not every kernel can do."""
    small = dataclasses.replace(MODELS[model], size=(64, 64))
    monkeypatch.setattr("handler.worker.worker.find", lambda name: small)
    tiny.write(small, tmp_path)
    worker = Worker.boot(PATIENT.model_copy(update={"model": model, "volume": tmp_path}))
    denoiser = worker._pipeline.transformer
    assert backends(denoiser) == {AttentionBackendName.NATIVE}
    assert worker.ledger.attention == "native: a CPU has one"
    calls = attention.calls_of(lambda: draw(worker))
    assert max(map(attention._tokens, calls)) >= 8 * 4
    assert all(call["query"].is_inference() for call in calls)
    assert any(call["attn_mask"] is not None for call in calls) == (model == "chroma")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OutOfMemory("It does not fit."), "native: measuring failed: It does not fit."),
        (NumericalError("NaN."), "native: measuring failed: NaN."),
        (KeyError("x"), "native: measuring failed: 'x'"),
        (RuntimeError("CUDA error: unspecified launch failure"), DeviceLost),
        (BudgetExceeded("too late"), BudgetExceeded),
    ],
)
def test_where_measuring_fails_native_draws(error: Exception, told: Any, transformer: Any, tmp_path: Path) -> None:
    """Unless the GPU is lost, or the time."""
    clock = Clock(3600, publish=lambda ledger: None)
    settings = PATIENT.model_copy(update={"volume": tmp_path})
    settle = partial(kernel.settle, outlook(settings, SPARK, H200), transformer, clock, raises(error))
    if isinstance(told, str):
        assert settle().attention == "native"
        assert clock.ledger.attention == told
    else:
        with pytest.raises(told):
            settle()


def test_a_kernel_that_loses_the_gpu_is_no_reason_to_try_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = raises(RuntimeError("CUDA error: misaligned address"))
    monkeypatch.setattr(attention, "_attended", lambda kernel, _: torch.ones(1) if kernel == "native" else lost())
    with pytest.raises(DeviceLost):
        attention._unlike("cudnn", [{}])


def test_the_model_uses_what_was_chosen(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native changes no pixel; another kernel is really called."""
    model, before = worker._pipeline.transformer, draw(worker)
    attention.use(model, NATIVE)
    assert (draw(worker) == before).all()
    attention.use(model, KernelChoice("cudnn-fp8", "a test"))
    apart = abs(draw(worker).astype(int) - before).mean()
    assert 0 < apart < 4
    monkeypatch.setitem(attention.KERNELS, "cudnn", dataclasses.replace(KERNELS["cudnn"], backend="_flash_3"))
    attention.use(model, NATIVE)
    monkeypatch.setattr(model, "set_attention_backend", lambda name: said.append(name))
    said: list[str] = []
    attention.use(model, FASTER)
    assert said == ["_flash_3"]


def test_eight_bits_still_draw_what_was_asked(worker: Worker) -> None:
    """Prompts that spark never trained on, in all that its checker looks at."""
    attention.use(worker._pipeline.transformer, KernelChoice("cudnn-fp8", "a test"))
    for seed, (prompt, scene) in enumerate(held_out(5, "test", "one", "plain")):
        pixels, _ = worker.generate(worker.spec.recipe(ImageRequest(prompt=prompt, seed=seed, num_inference_steps=4)))
        assert check(Image.fromarray(pixels.rgb), scene).right


@pytest.fixture
def kernels_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that agrees with native, one that fails on a CPU, one that is wrong."""
    for name, backend in {"cudnn": "_native_math", "flash": "_flash_3", "flash3": "native"}.items():
        monkeypatch.setitem(attention.KERNELS, name, dataclasses.replace(KERNELS[name], backend=backend))
    right = attention._attended
    monkeypatch.setattr(attention, "_attended", lambda name, call: right(name, call) * (0.9 if name == "flash3" else 1))


def test_kernels_are_measured_and_compared(worker: Worker, kernels_of_a_cpu: None) -> None:
    calls = attention.calls_of(lambda: draw(worker))
    native, cudnn, flash, flash3, fp8 = attention.measure(calls, {"native": ""})
    assert (native.why, cudnn.why) == ("", "")
    assert native.ms
    assert cudnn.ms
    assert flash.ms is flash3.ms is None
    assert "cannot do it: " in flash.why
    assert flash3.why == "differs from native by 0.100 of its norm"
    assert fp8.why.startswith("differs from native by 0.0")  # even if it were not refused
    refused = attention.measure(calls, {"cudnn": "too old"})
    assert (refused[1].ms, refused[1].why) == (None, "too old")


def settled(worker: Worker, volume: Path, **settings: Any) -> tuple[Hardware, Clock]:
    """What a worker with spark and an H200 settles on."""
    clock = Clock(1000, birth=Birth.anew())
    given = Settings(volume=volume, **settings)
    model = worker._pipeline.transformer
    return kernel.settle(outlook(given, SPARK, H200), model, clock, lambda: draw(worker)), clock


def test_the_fastest_is_settled_on(
    worker: Worker, kernels_of_a_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = {"native": 2.0, "cudnn": 1.0}
    monkeypatch.setattr(attention, "_milliseconds", lambda name, call: fake[name])
    found, clock = settled(worker, tmp_path)
    assert found.attention == "cudnn"
    assert clock.ledger.attention.startswith("cudnn: cuDNN 1.00 ms for 40 tokens, against SDPA 2.00 ms; FlashAttention")
    assert [phase.name for phase in clock.ledger.phases] == ["attention"]
    assert backends(worker._pipeline.transformer) == {AttentionBackendName._NATIVE_MATH}
    found, clock = settled(worker, tmp_path, attention="native")
    assert (found.attention, clock.ledger.attention) == ("native", "native: KINDLING_ATTENTION=native")
    assert not clock.ledger.phases
    assert backends(worker._pipeline.transformer) == {AttentionBackendName.NATIVE}


def publish(volume: Path, hardware: Hardware) -> None:
    facts = artifacts.fingerprint(SPARK, hardware)
    with publishing(volume / "baked" / "spark" / artifacts.key(facts), facts) as folder:
        (folder / artifacts.PACKAGE).write_bytes(b"never looked at")


def test_what_is_compiled_is_followed(
    worker: Worker,
    kernels_of_a_cpu: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lacking: Callable[..., None],
) -> None:
    """However a later worker would have measured: its fingerprint is the same."""
    monkeypatch.setattr(attention, "_milliseconds", lambda name, call: 1.0)
    publish(tmp_path, dataclasses.replace(H200, attention="cudnn"))
    assert artifacts.look(SPARK, H200, tmp_path).outcome == "HIT"  # doctor, which measures nothing
    found, clock = settled(worker, tmp_path)
    assert clock.ledger.attention == "cudnn: as what is compiled on the volume"
    assert artifacts.look(SPARK, found, tmp_path).outcome == "HIT"
    lacking(cudnn="needs a newer cuDNN")
    found, _ = settled(worker, tmp_path)
    assert found.attention == "native"
    assert artifacts.look(SPARK, found, tmp_path).reason.endswith("worker: attention is native, was cudnn")


def test_fewer_bits_are_never_taken_unasked(
    worker: Worker, kernels_of_a_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither because it is fastest nor because someone who asked for it left a package, beside native's or alone."""
    timed: list[str] = []
    monkeypatch.setattr(attention, "_milliseconds", lambda name, call: timed.append(name) or 1.0)
    publish(tmp_path, dataclasses.replace(H200, attention="cudnn-fp8"))
    found, clock = settled(worker, tmp_path)
    assert found.attention == "native"
    assert "cuDNN FP8 rounds to 8 bits, so only when it is asked for" in clock.ledger.attention
    assert timed
    assert "cudnn-fp8" not in timed
    publish(tmp_path, dataclasses.replace(H200, attention="native"))
    found, clock = settled(worker, tmp_path)
    assert clock.ledger.attention == "native: as what is compiled on the volume"
    found, clock = settled(worker, tmp_path, attention="cudnn-fp8")
    assert clock.ledger.attention == "cudnn-fp8: KINDLING_ATTENTION=cudnn-fp8"
    assert backends(worker._pipeline.transformer) == {AttentionBackendName("kindling_fp8")}
    assert artifacts.look(SPARK, found, tmp_path).outcome == "HIT"


def test_the_kernel_is_in_the_fingerprint(tmp_path: Path) -> None:
    facts = artifacts.fingerprint(SPARK, H200)
    assert (facts["attention"], facts["flash_attn_3"]) == ("", "none")  # installing it means measuring again
    publish(tmp_path, dataclasses.replace(H200, attention="flash3"))
    chosen = dataclasses.replace(H200, attention="flash")
    assert artifacts.look(SPARK, chosen, tmp_path).reason == (
        "compiled for another worker: attention is flash, was flash3"
    )
    assert artifacts.packaged(SPARK, chosen, tmp_path, ["native", "flash"]) == ""
    assert artifacts.packaged(SPARK, chosen, tmp_path, KERNELS) == "flash3"


def test_torch_prefers_it_in_compiled_code() -> None:
    """Exported blocks hold a plain call; which kernel it becomes is decided by what is enabled while compiling."""
    flags = torch.backends.cuda
    before = torch._C._get_sdp_priority_order()
    with attention.compiling("cudnn"):
        assert torch._C._get_sdp_priority_order()[0] == torch.nn.attention.SDPBackend.CUDNN_ATTENTION.value
    with attention.compiling("flash"):
        assert not flags.cudnn_sdp_enabled()
        assert torch._C._get_sdp_priority_order()[0] == torch.nn.attention.SDPBackend.FLASH_ATTENTION.value
    for name in ("native", "flash3"):
        with attention.compiling(name):
            assert flags.cudnn_sdp_enabled()
            assert torch._C._get_sdp_priority_order() == before


def test_a_picture_is_made_again_with_its_kernel(worker: Worker, tmp_path: Path) -> None:
    source = tmp_path / "a.png"
    for made, wanted in {"native": "native", "cudnn": "auto"}.items():  # here, on a CPU
        parameters = codec.parameters_of(SPARK.recipe(ImageRequest(prompt="a ring", seed=1)), worker.facts, "1")
        source.write_bytes(codec.encode(draw(worker), "png", 95, parameters | {"attention": made}))
        said = again.read(source, [], None)
        assert said.settings(Settings()).attention == wanted
        assert again.differing(said.found, parameters) == ["attention was cudnn and is native"] * (made == "cudnn")


def test_it_is_shown(worker: Worker) -> None:
    assert worker.facts["attention"] == "native"
    facts = {"precision": "bf16", "plan": "EAGER"}
    assert [chip["label"] for chip in chips(SCHNELL, None, facts | {"attention": "native"})][-1] == "compile"
    [*_, last] = chips(SCHNELL, None, facts | {"attention": "flash3"})
    assert (last["label"], last["value"]) == ("attention", "FlashAttention 3")
    aside = "rounds to 8 bits, so only when it is asked for"
    assert refusals(HOPPER, "bfloat16") == dict.fromkeys(KERNELS, "") | {"cudnn-fp8": aside}
    assert last["value"] in [row.name for row in KERNELS.values()]
