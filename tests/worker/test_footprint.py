"""What weights take in memory: reckoned from files' headers, and held to what processes really hold, at the peak."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import originals
import pytest
import torch
from conftest import PATIENT, ROOT, unwarmed
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from torch import nn

import tiny
from handler import GPUS, MODELS, ModelSpec, Settings, Worker, outlook
from handler.catalog.originals import FLUX
from handler.cli.bake import publish_weights
from handler.core.errors import StartError
from handler.core.host import AHEAD, read_ahead
from handler.model.adapters.applied import CACHED
from handler.model.families import build
from handler.model.hardware import Hardware
from handler.volume.hubcache import HUB_CACHE
from handler.volume.layout import Slot
from handler.volume.listing import LORA
from handler.volume.manifest import Source, write_manifest
from handler.volume.publishing import publishing
from handler.volume.reader import Reader
from handler.volume.revisions import settled
from handler.volume.sources import model_source, served_source, weight_facts, weights_folder
from handler.worker.decision import decide
from handler.worker.footprint import PROCESS, Footprint, Part, Weights, _part, weigh
from handler.worker.memory import memory_plan

SCHNELL, DEV = MODELS["flux-schnell"], MODELS["flux-dev"]
OWN = [spec for spec in MODELS.values() if not spec.base and spec.id not in ("sdxl-turbo", "flux-dev")]
ROOM = 16 << 20  # bytes read ahead, where the peak is measured
NOISE = 48 << 20  # of a process: small allocations, threads' stacks, what the libraries keep
LOAD = """
import importlib, json, sys
from pathlib import Path
import torch
from handler import MODELS
from handler.volume.overlay import overlay
from handler.volume.reader import Reader
from handler.model import families
from handler.core import host
from handler.worker.footprint import weigh
from handler.model.hardware import Hardware
from handler.volume.sources import served_source

def status(name):
    rows = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows[name].split()[0]) << 10

host.AHEAD = int(sys.argv[3])
families.quiet()
device = Hardware("cpu", "CPU", sys.argv[2], "")
spec, family = MODELS["flux-schnell"], importlib.import_module("handler.model.families.flux")
importlib.import_module("handler.model.loading.quant").SCHEMES["int8"].parts(torch.ones(64, 64))
source = served_source(spec, Path(sys.argv[1]), sys.argv[2])
over = overlay(sys.argv[4:], spec, source, Path(sys.argv[1]))
weights = weigh(spec, device, source, over)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
with Reader(source, over=over) as reader:
    pipeline = families.build(family, reader, device)
found = weights.footprint()
print(json.dumps({
    "folder": source.folder.name, "stored": weights.stored, "held": found.device, "peak": found.device_peak,
    "measured": status("VmHWM") - before, "stays": status("VmRSS") - before,
}))
"""


def big(volume: Path, dtype: torch.dtype) -> Path:
    """flux-schnell with a transformer of 0.1 billion parameters, in files of `dtype`."""
    folder = tiny.write(SCHNELL, volume)
    config = FluxTransformer2DModel.load_config(folder / "transformer")
    wide = {"num_attention_heads": 8, "attention_head_dim": 128, "axes_dims_rope": (32, 48, 48)}
    larger = FluxTransformer2DModel.from_config({**config, **wide, "num_layers": 1, "num_single_layers": 3})
    larger.to(dtype).save_pretrained(folder / "transformer", max_shard_size="64MB")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
    write_manifest(folder, {"model": SCHNELL.id})
    return volume


def measured(volume: Path, precision: str, *names: str, room: int = ROOM) -> dict[str, Any]:
    """What a process of its own holds while it loads and afterwards, beside what was reckoned."""
    command = [sys.executable, "-c", LOAD, str(volume), precision, str(room), *names]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}  # what is let go of is gone: glibc would keep up to 64 MB
    out = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    found: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume with files in bf16, and with those baked in int8."""
    return big(tmp_path_factory.mktemp("half"), torch.bfloat16)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_plan_is_held_to_the_measured_peak(precision: str, half: Path) -> None:
    """Cast, and rounded one by one: neither the files nor wider weights are there beside what is served."""
    found = measured(half, precision)
    assert found["stays"] == pytest.approx(found["held"], abs=NOISE)
    assert found["measured"] == pytest.approx(found["peak"], abs=NOISE + ROOM)


@pytest.mark.parametrize("kind", ["float32", "float8_e4m3fn"])
def test_a_single_file_is_held_to_the_measured_peak_too(kind: str, half: Path) -> None:
    """By the model's first names, its matrices in other pieces: as it is, and made floats; at most 1.3 of it."""
    folder = model_source(SCHNELL, half).folder / "transformer"
    weights = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    made = {name: tensor.to(getattr(torch, kind)) for name, tensor in originals.backwards(weights, FLUX).items()}
    originals.write(made, half / f"{kind}.safetensors")
    found = measured(half, "fp32", f"{kind}.safetensors")
    assert found["stays"] == pytest.approx(found["held"], abs=NOISE)
    assert found["measured"] == pytest.approx(found["peak"], abs=NOISE + ROOM)
    assert found["measured"] <= 1.3 * found["held"]


def held(pipeline: Any) -> int:
    """Bytes of all its tensors, those that are tied once."""
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    found = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers()) if not tensor.is_meta]
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in found}.values())


# Scales of blocks lie in tiles, which tiny matrices do not fill.
@pytest.mark.parametrize(("precision", "near"), [("fp32", 0.04), ("bf16", 0.04), ("int8", 0.04), ("nvfp4", 0.07)])
@pytest.mark.parametrize("spec", OWN, ids=lambda spec: spec.id)
def test_what_files_say_is_what_is_held(spec: ModelSpec, precision: str, near: float, tmp_path: Path) -> None:
    """Which layers are rounded is told by names alone, nearly."""
    if not spec.embedded:
        tiny.write(spec, tmp_path)
    source, hardware = model_source(settled(spec, tmp_path), tmp_path), Hardware("cpu", "CPU", precision, "")
    with Reader(source) as reader:
        pipeline = build(importlib.import_module(spec.family), reader, hardware)
    weights = weigh(spec, hardware, source)
    assert weights.held == pytest.approx(held(pipeline), rel=near)
    assert weights.changed == (weights.held != weights.stored)


def on_gpu(precision: str, memory_gb: float = 80) -> Hardware:
    return Hardware("cuda", "a GPU", precision, "", memory_gb)


def test_baked_weights_are_rounded_already(tmp_path: Path) -> None:
    """The plan is the same before and after: what is held is what the baked files have."""
    tiny.write(SCHNELL, tmp_path)
    settings = PATIENT.model_copy(
        update={"model": SCHNELL.id, "volume": tmp_path, "precision": "int8", "compile": "off"}
    )
    cpu = Hardware("cpu", "CPU", "int8", "")
    before = weigh(SCHNELL, cpu, served_source(SCHNELL, tmp_path, "int8"))
    with unwarmed():
        assert publish_weights(Worker.boot(settings), tmp_path)
    source = served_source(SCHNELL, tmp_path, "int8")
    after = weigh(SCHNELL, cpu, source)
    assert source.precision == "int8"
    assert after.held == after.stored == pytest.approx(before.held, rel=0.02)
    assert not after.changed
    assert before.changed
    plans = [memory_plan(SCHNELL, cpu, found) for found in (model_source(SCHNELL, tmp_path), source)]
    assert plans[0].mode == plans[1].mode
    assert plans[0].needs_gb == pytest.approx(plans[1].needs_gb, rel=0.01)


def test_files_that_no_pipeline_reads_count_nothing(tmp_path: Path) -> None:
    """A snapshot's root has single-file checkpoints, and its folders other variants and formats."""
    whole = tiny.write(SCHNELL, tmp_path / "fetched")
    snapshot = tmp_path / HUB_CACHE / "models--black-forest-labs--FLUX.1-schnell" / "snapshots" / SCHNELL.revision
    snapshot.parent.mkdir(parents=True)
    whole.rename(snapshot)
    hardware = on_gpu("fp32")
    before = weigh(SCHNELL, hardware, source := model_source(SCHNELL, tmp_path))
    weights = snapshot / "transformer" / "diffusion_pytorch_model.safetensors"
    others = ("flux1-schnell.safetensors", "ae.safetensors", "transformer/diffusion_pytorch_model.fp16.safetensors")
    for name in (*others, "text_encoder/flax_model.msgpack", "vae/model.onnx", "transformer_onnx/model.safetensors"):
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / name).write_bytes(weights.read_bytes())
    assert weigh(SCHNELL, hardware, source) == before
    assert not before.changed  # so `bake` copies nothing


def test_bake_leaves_alone_what_is_served_as_it_is(tmp_path: Path) -> None:
    folder = tiny.write(SCHNELL, tmp_path)
    (folder / "flux1-schnell.safetensors").write_bytes(bytes(1 << 20))
    with unwarmed():
        worker = Worker.boot(PATIENT.model_copy(update={"model": SCHNELL.id, "volume": tmp_path, "compile": "off"}))
    assert publish_weights(worker, tmp_path) is None


def test_a_damaged_header_is_named(tmp_path: Path) -> None:
    folder = tiny.write(SCHNELL, tmp_path)
    [path] = (folder / "vae").glob("*.safetensors")
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(StartError, match=f"{path} is no whole safetensors file"):
        weigh(SCHNELL, on_gpu("bf16"), model_source(SCHNELL, tmp_path))


def test_what_is_read_ahead_and_what_waits_count_on_the_host() -> None:
    weights = weigh(DEV, on_gpu("fp8"))
    resident, encoders, blocks = (weights.footprint(mode, 64e9) for mode in ("resident", "encoders", "blocks"))
    assert resident.host == PROCESS
    assert resident.host_peak == PROCESS + AHEAD
    assert encoders.host == pytest.approx(PROCESS + 1.3 * DEV.streams.encoders)
    assert encoders.host_peak == encoders.host + AHEAD
    assert blocks.host_peak > blocks.host > encoders.host
    assert blocks.device < encoders.device < resident.device
    assert weights.footprint("resident", 8e9).host_peak - PROCESS == read_ahead(8_000_000_000) == 2_000_000_000


def test_what_a_host_has_left_is_what_loras_may_keep() -> None:
    card = Hardware("cuda", "NVIDIA L40S", "bf16", "", 48)
    plans = {mode: memory_plan(SCHNELL, card, host_gb=64, offload=mode) for mode in ("off", "encoders")}
    left = 64 - (PROCESS + CACHED) / 1e9
    waiting = weigh(SCHNELL, card).footprint("encoders").host - PROCESS
    assert plans["off"].spare_gb == pytest.approx(left)
    assert plans["encoders"].spare_gb == pytest.approx(left - waiting / 1e9)
    assert memory_plan(SCHNELL, card, host_gb=4).spare_gb == 0
    on_cpu = memory_plan(SCHNELL, Hardware("cpu", "CPU", "fp32", "", 100))
    assert on_cpu.spare_gb == pytest.approx(100 - on_cpu.needs_gb - CACHED / 1e9)


def test_a_cpus_memory_is_the_hosts() -> None:
    weights = weigh(DEV, Hardware("cpu", "CPU", "int8", ""))
    found = weights.footprint("resident", 64e9)
    assert (found.host, found.host_peak) == (0, 0)
    assert found.device < found.device_peak < weights.stored  # not three copies, nor all that is read


def test_what_is_read_ahead_leaves_a_cpu_what_loading_takes_and_what_stays() -> None:
    seen = outlook(Settings(model=DEV.id), DEV, Hardware("cpu", "CPU", "int8", "", 64))
    assert seen.loading > weigh(DEV, seen.hardware).footprint("resident", 64e9).device_peak


def test_a_component_is_reckoned_tensor_by_tensor(tmp_path: Path) -> None:
    """Rounding one matrix takes as much as the largest needs; what is not rounded is as wide as the rest computes."""
    names = ("blocks.0.to_q.weight", "blocks.1.to_k.weight", "blocks.1.to_k.bias", "proj_in.weight")
    shapes = ((64, 32), (128, 64), (128,), (4096, 64))
    sizes = [math.prod(shape) for shape in shapes]
    found = [(n, Slot("bfloat16", shape, 8, 8 + 2 * size)) for n, shape, size in zip(names, shapes, sizes, strict=True)]
    source = Source(tmp_path, None)
    part = _part("transformer", found, source, Hardware("cpu", "CPU", "int8", ""))
    assert (part.name, part.parameters, part.stored) == ("transformer", sum(sizes), 2 * sum(sizes))
    assert part.held == sizes[0] + 4 * 64 + sizes[1] + 4 * 128 + 4 * (sizes[2] + sizes[3])
    assert part.rounding == 16 * sizes[1]
    for plain in (
        _part("vae", found, source, Hardware("cpu", "CPU", "int8", "")),
        _part("transformer", found, source, Hardware("cpu", "CPU", "fp32", "")),
    ):
        assert (plain.held, plain.rounding) == (4 * sum(sizes), 0)


PARTS = (
    Part("text_encoder", 1000, stored=2000, held=1200, rounding=300),
    Part("transformer", 4000, stored=8000, held=4000, rounding=700),
    Part(f"transformer/{LORA}", 100, stored=200, held=0),
    Part("vae", 10, stored=20, held=20),
)


def test_the_sums_of_a_footprint() -> None:
    """By hand: what is held; at the peak what was read and is not changed yet, a LoRA, one matrix being rounded."""
    held, stored, lora = 5220, 10220, 200
    cpu, gpu = (Weights(DEV, Hardware(device, device, "int8", ""), PARTS) for device in ("cpu", "cuda"))
    assert (cpu.held, cpu.stored, cpu.changed) == (held, stored, True)
    assert cpu.footprint() == Footprint(held, stored + lora + 700)
    assert gpu.footprint() == Footprint(held, held + 700, PROCESS, PROCESS + stored + lora)
    device = held - 1200 + gpu.comes("encoders")
    waits = PROCESS + 1200
    # Of 8220 bytes that do not wait all were read; of what waits 40 % less is held than was read.
    assert gpu.footprint("encoders") == Footprint(device, device + 700, waits, waits + 8220 + lora + 300)
    device, waits = 20 + gpu.comes("blocks"), PROCESS + 5200
    assert gpu.footprint("blocks") == Footprint(
        device, device, waits, waits + int(stored * (1 - 52 / 102)) + lora + 700
    )
    assert Weights(DEV, cpu.hardware, ()).footprint() == Footprint(0, 0)


def test_each_component_is_weighed_by_its_files() -> None:
    source = model_source(MODELS["spark"], Path("unused"))
    parts = weigh(MODELS["spark"], Hardware("cpu", "CPU", "fp32", ""), source).parts
    assert {part.name for part in parts if part.stored} == {"text_encoder", "text_encoder_2", "transformer", "vae"}
    for part in parts:
        found = [
            each for file in (source.folder / part.name).glob("*.safetensors") for each in load_file(file).values()
        ]
        assert part.parameters == sum(tensor.numel() for tensor in found)
        assert (part.stored, part.held) == (sum(tensor.nbytes for tensor in found), 4 * part.parameters)


def test_weights_are_changed_if_any_are() -> None:
    cpu = Hardware("cpu", "CPU", "int8", "")
    told = [Weights(DEV, cpu, parts).changed for parts in (PARTS[:1], PARTS[::3], PARTS[3:], ())]
    assert told == [True, True, False, False]


def test_without_files_the_catalogue_says_what_there_is() -> None:
    spec, bf16 = MODELS["sdxl"], Hardware("cuda", "a GPU", "bf16", "")
    parts = {part.name: part.parameters for part in weigh(spec, bf16).parts}
    assert list(parts) == ["text_encoder", "transformer", "vae"]
    assert parts["text_encoder"] == spec.streams.encoders
    assert sum(parts.values()) == spec.parameters + spec.other_parameters
    assert parts["vae"] == min(127_000_000, spec.parameters + spec.other_parameters - spec.streams.encoders)
    for precision, width in (("bf16", 2), ("int8", 1.3)):
        for part in weigh(spec, replace(bf16, precision=precision)).parts:
            assert (part.stored, part.held) == (2 * part.parameters, int(part.parameters * width))


@pytest.mark.parametrize(
    ("mode", "kinds"),
    [("resident", set()), ("encoders", {"text_encoder"}), ("blocks", {"text_encoder", "transformer"})],
)
def test_what_waits_in_host_memory_where_that_is_another(mode: str, kinds: set[str]) -> None:
    gpu, cpu = (weigh(DEV, Hardware(device, device, "bf16", "")) for device in ("cuda", "cpu"))
    assert {re.split(r"[/_]\d|/", part.name)[0] for part in gpu.waiting(mode)} == kinds
    assert (cpu.waiting(mode), cpu.comes(mode)) == ((), 0)
    assert (gpu.comes(mode) > 0) == bool(kinds)


def test_explicit_rounding_is_planned_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Baked or not, by a setting or a receipt: no host is asked for more than it has."""
    gpu = replace(on_gpu("fp8", 20), capability=(9, 0))
    monkeypatch.setattr("handler.worker.sharing.host_memory", lambda: 16_000_000_000)
    decided = decide(Settings(volume=tmp_path, precision="fp8"), DEV, gpu).hardware
    assert memory_plan(DEV, decided, host_gb=16).mode == "encoders"
    assert not memory_plan(DEV, decided, host_gb=9).fits
    with publishing(weights_folder(DEV, tmp_path, "fp8"), weight_facts(DEV, "fp8")) as folder:
        (folder / "model_index.json").write_text("{}")
    assert served_source(DEV, tmp_path, "fp8").folder == weights_folder(DEV, tmp_path, "fp8")


def test_platforms_rent_by_the_same_reckoning() -> None:
    plan = outlook(Settings(precision="bf16"), SCHNELL, GPUS["H100"], 64).memory
    assert plan.needs_gb == pytest.approx(2 * 16.97 + 3)
    assert plan.host_gb == pytest.approx((PROCESS + AHEAD) / 1e9)
