"""The other branch of each pair, bounds from both sides, numbers by their value: what one happy path leaves open."""

import errno
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import golden
import pytest
import torch
from conftest import PATIENT
from disks import failing
from golden import CODE, H200, HERE, NOON, SCHNELL, SPARK
from torch import nn

import tiny
from handler import MODELS, ImageRequest, Settings
from handler.catalog.prices import price_of
from handler.core import birth
from handler.core.birth import Birth, process_age
from handler.core.errors import (
    InvalidValue,
    OutOfRange,
    SettingsError,
    SpendCapReached,
    VolumeFailed,
    WeightsCorrupt,
    WeightsMissing,
)
from handler.core.processor import processor
from handler.core.stepcache import BOUNDS, StepCache
from handler.core.untrusted import DEEPEST, Malformed, load, parse
from handler.engine import bills
from handler.engine.bills import DEAREST
from handler.engine.publisher import Publisher
from handler.engine.spend import Meter
from handler.model import offload, stepcache
from handler.model.compiling import artifacts
from handler.model.hardware import Hardware
from handler.model.loading import quant
from handler.model.stepcache import caching
from handler.volume import receipts
from handler.volume.listing import INDEX
from handler.volume.manifest import Entry, Manifest, Source, summarize, write_manifest
from handler.volume.publishing import publishing
from handler.volume.reader import Reader
from handler.volume.sources import baked_sources, fetched_folder, model_source
from handler.worker import boots
from handler.worker.durations import Durations
from handler.worker.footprint import weigh

GPU = Hardware("cuda", H200, "bf16", "a test", memory_gb=141.0, capability=(9, 0))
CPU = Hardware("cpu", "CPU", "fp32", "a test", memory_gb=16.0, processor=processor().name)


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    return golden.copy(tmp_path / "volume")


# a CPU, or a GPU


def test_what_a_fingerprint_says_of_a_gpu_and_of_a_cpu() -> None:
    here, there = artifacts.fingerprint(SPARK, CPU), artifacts.fingerprint(SPARK, GPU)
    fields = ("device", "threads", "decoder")
    assert tuple(here[name] for name in fields) == (processor().name, str(torch.get_num_threads()), artifacts.EAGER)
    assert tuple(there[name] for name in fields) == (H200, "any", "")
    assert artifacts.differing(there, artifacts.fingerprint(SPARK, replace(GPU, name="NVIDIA L4"))) == ["device"]


@pytest.mark.parametrize(("has", "says"), [("13.0", "13.0"), (None, "none")])
def test_the_cuda_that_torch_was_built_with_is_in_the_key(
    has: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", has)
    assert artifacts.fingerprint(SPARK, GPU)["cuda"] == says


def test_a_field_that_only_one_side_has_differs_unless_any_will_do() -> None:
    """Packages of older versions, and of newer ones."""
    assert artifacts.differing({"torch": "2", "matmul": "high"}, {"torch": "2"}) == ["matmul"]
    assert artifacts.differing({"torch": "2"}, {"torch": "2", "matmul": "high"}) == ["matmul"]
    assert artifacts.differing({"torch": "2", "attention": ""}, {"torch": "2", "attention": "cudnn"}) == []


def packed(folder: Path, facts: dict[str, str], *files: str) -> Source:
    return Source(folder, Manifest(facts, {name: Entry(0, "", ()) for name in files}))


def test_of_several_packages_the_nearest_is_told(tmp_path: Path) -> None:
    """What is no package, as weights are, and what has no manifest is looked at by nobody."""
    wanted = {"model": "spark", "torch": "2", "device": "CPU"}
    near, far = wanted | {"torch": "1"}, {"model": "spark", "torch": "1", "device": "GPU", "more": "x"}
    others = [packed(tmp_path, wanted, "weights"), Source(tmp_path, None)]
    sources = [packed(tmp_path / name, facts, artifacts.PACKAGE) for name, facts in (("far", far), ("near", near))]
    found = artifacts.find(wanted, [*others, *sources])
    assert (found.outcome, found.source) == ("STALE", sources[1])
    assert found.reason == "compiled for another worker: torch is 2, was 1"
    found = artifacts.find(wanted, [*sources, exact := packed(tmp_path / "exact", wanted, artifacts.PACKAGE)])
    assert (found.outcome, found.reason, found.source) == ("HIT", "exact was compiled for exactly this", exact)
    found = artifacts.find(wanted, others)
    assert (found.outcome, found.reason, found.source) == ("MISS", "nothing is compiled for spark yet", None)


def test_a_package_is_loaded_only_if_it_is_what_was_published(tmp_path: Path) -> None:
    """Damaged code would end the process."""
    (copy := tmp_path / artifacts.PACKAGE).write_bytes(b"code")
    source = Source(tmp_path, Manifest({}, {artifacts.PACKAGE: summarize(copy)}))
    artifacts._verify(copy, source)
    copy.write_bytes(b"code!")
    with pytest.raises(WeightsCorrupt, match=r"blocks\.pt2 is not what its manifest says"):
        artifacts._verify(copy, source)


def test_only_a_package_that_fits_chooses_the_kernel(tmp_path: Path) -> None:
    kernels = ("cudnn", "flash", "native")
    for kernel, others in (("cudnn", {"torch": "another"}), ("native", {})):
        facts = artifacts.fingerprint(SPARK, replace(GPU, attention=kernel)) | {"blocks": "b"} | others
        with publishing(tmp_path / "baked" / SPARK.id / artifacts.key(facts), facts) as part:
            (part / artifacts.PACKAGE).write_bytes(b"never looked at")
    assert artifacts.packaged(SPARK, GPU, tmp_path, kernels) == "native"  # cudnn's is of another torch
    assert artifacts.packaged(SPARK, GPU, tmp_path, kernels[:2]) == ""


# a price of one's own, or the list's


@pytest.mark.parametrize(
    ("gpu", "platform", "own", "dollars"),
    [
        (H200, "runpod", None, 0.00155 * 3600),
        ("NVIDIA L4", "modal", None, 0.000222 * 3600),
        (H200, "runpod", 2.0, 2.0),
        ("", "runpod", 2.0, 2.0),
        ("", "runpod", None, None),
        (H200, "other", None, None),
        ("CPU", "runpod", None, None),
    ],
)
def test_an_hour_costs_the_price_that_is_known(
    gpu: str, platform: Any, own: float | None, dollars: float | None, tmp_path: Path
) -> None:
    settings = Settings(volume=tmp_path, gpu_price=own, platform=platform, monthly_cap=1.0, cap_action="refuse")
    meter = Meter(settings, lambda: gpu, Birth(0.0, clock=lambda: 3600.0), lambda: NOON)
    assert meter.state()["dollars_this_process"] == (None if dollars is None else pytest.approx(dollars))
    if dollars is not None and dollars >= 1.0:
        with pytest.raises(SpendCapReached):
            meter.require_budget()
    else:
        meter.require_budget()
    if not gpu and own is None:
        assert meter.price.reason == "the GPU is not known yet"


def test_others_dollars_where_the_volume_fails(volume: Path) -> None:
    """All of it: this process and what was known before, to the cent. One file: that one alone, and what it said."""
    settings = Settings(volume=volume, gpu_price=2.5, platform="other")
    meter = Meter(settings, lambda: H200, Birth(0.0, "third", clock=lambda: 3600.0), lambda: NOON)

    def month(number: int, name: str, path: str) -> tuple[float, str]:
        with failing(volume, number, lambda call: call.name == name and call.path.endswith(path)):
            meter.tick()
        return meter.state()["dollars_this_month"], meter.state()["counted"]

    assert month(errno.EIO, "list", "2025-11") == (
        2.5,
        "this process alone: the volume cannot be read (Input/output error)",
    )
    assert month(errno.ENOENT, "stat", f"{HERE}.json") == (5.0, "all workers here")  # it has just gone
    dollars, counted = month(errno.EACCES, "stat", f"{HERE}.json")
    assert (dollars, counted) == (
        5.0,
        f"all workers here but what 1 of them cost by now: {HERE}.json cannot be read (Permission denied)",
    )
    assert month(0, "none", "") == (7.5, "all workers here")
    assert month(errno.EACCES, "stat", f"{HERE}.json")[0] == 7.5
    assert month(errno.EIO, "list", "2025-11") == (  # nobody has become cheaper
        7.5,
        "this process and what others had cost before: the volume cannot be read (Input/output error)",
    )


@pytest.mark.parametrize(("dollars", "counts"), [(0, True), (DEAREST, True), (-0.01, False), (DEAREST + 1, False)])
def test_what_a_worker_can_have_cost(dollars: float, counts: bool, tmp_path: Path) -> None:
    meter = Meter(Settings(volume=tmp_path, gpu_price=1), lambda: H200, Birth(0.0, clock=lambda: 0.0), lambda: NOON)
    (tmp_path / "spend" / "2025-11").mkdir(parents=True)
    (tmp_path / "spend" / "2025-11" / "other.json").write_text(json.dumps({"dollars": dollars}))
    meter.tick()
    assert meter.state()["dollars_this_month"] == (dollars if counts else 0)


# one mode of memory, or another


def waits(spec: Any, mode: str, source: Any = None) -> list[str]:
    return [part.name for part in weigh(spec, GPU, source).waiting(mode)]


def test_what_waits_in_each_mode(tmp_path: Path) -> None:
    assert [waits(SCHNELL, mode) for mode in ("resident", "encoders", "blocks")] == [
        [],
        ["text_encoder"],
        ["text_encoder", "transformer"],
    ]
    tiny.write(MODELS["sdxl"], tmp_path)
    source, encoders = model_source(MODELS["sdxl"], tmp_path), ["text_encoder", "text_encoder_2"]
    assert [sorted(waits(MODELS["sdxl"], mode, source)) for mode in ("resident", "encoders", "blocks")] == [
        [],
        encoders,
        [*encoders, "unet"],
    ]


@pytest.mark.parametrize("model", ["sdxl", "flux-schnell"])
def test_what_streams_in_each_mode(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handler.worker.worker.Worker._warm", lambda *_: None)
    tiny.write(MODELS[model], tmp_path)
    for mode in ("off", "encoders", "blocks"):
        settings = {"model": model, "volume": tmp_path, "compile": "off", "offload": mode}
        worker = tiny_worker(settings)
        parts = worker._pipeline.components
        found = {name for name, part in parts.items() if isinstance(part, nn.Module) and part in offload.streamed}
        denoiser = {"off": set(), "encoders": set(), "blocks": {worker._family.DENOISER}}[mode]
        assert found == denoiser | (set() if mode == "off" else {"text_encoder", "text_encoder_2"}), mode


def tiny_worker(update: dict[str, Any]) -> Any:
    from handler import Worker

    return Worker.boot(PATIENT.model_copy(update=update))


@pytest.mark.parametrize(
    ("model", "mode", "precision", "gigabytes"),
    [  # two of the larger, of as many bytes a parameter as it has, but no less than two
        ("flux-schnell", "resident", "bf16", 0.0),
        ("flux-schnell", "encoders", "bf16", 2 * 0.193 * 2),
        ("flux-schnell", "blocks", "bf16", 2 * 0.340 * 2),  # the block is larger than the encoders' layer
        ("flux2-klein", "encoders", "bf16", 2 * 0.389 * 2),
        ("flux2-klein", "blocks", "bf16", 2 * 0.389 * 2),  # and here it is not
        ("flux-schnell", "blocks", "fp8", 2 * 0.340 * 2),
        ("flux-schnell", "blocks", "fp32", 2 * 0.340 * 4),
    ],
)
def test_room_for_what_comes_and_goes(model: str, mode: str, precision: str, gigabytes: float) -> None:
    assert weigh(MODELS[model], replace(GPU, precision=precision)).comes(mode) == pytest.approx(gigabytes * 1e9)


# the catalogue's numbers: memory plans hang on them


BILLIONS = {  # of the denoiser (sdxl: and its own), of all else, of the text encoders, their layer, a block
    "spark": (0.0033, 0.00155, 0, 0, 0),
    "flux-schnell": (12, 4.97, 4.886, 0.193, 0.340),
    "flux-dev": (12, 4.97, 4.886, 0.193, 0.340),
    "sd3.5-large": (8, 5.66, 5.58, 0.193, 0.213),
    "sd1.5": (0.86, 0.207, 0.123, 0.038, 0.032),
    "sdxl": (2.57, 0.9, 0.818, 0.063, 0.035),
    "sdxl-turbo": (2.57, 0.9, 0.818, 0.063, 0.035),
    "sdxl-lightning": (2.57, 0.9, 0.818, 0.063, 0.035),
    "flux2-dev": (32, 24.1, 24.016, 0.671, 0.981),
    "flux2-klein": (4, 4.1, 4.016, 0.389, 0.245),
    "z-image-turbo": (6.2, 4.1, 4.016, 0.389, 0.181),
    "qwen-image": (20.4, 8.4, 8.273, 0.545, 0.340),
    "qwen-image-lightning": (20.4, 8.4, 8.273, 0.545, 0.340),
    "chroma": (8.9, 4.85, 4.766, 0.193, 0.226),
}


@pytest.mark.parametrize("model", MODELS)
def test_how_many_parameters(model: str) -> None:
    spec = MODELS[model]
    counts = (spec.parameters, spec.other_parameters, spec.streams.encoders, spec.streams.layer, spec.streams.block)
    assert counts == pytest.approx(tuple(1e9 * count for count in BILLIONS[model]))
    assert spec.work_gb == (1.1 if model == "spark" else 3.0)


# layers that are rounded, and those that are not


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.low = nn.Linear(24, 64), nn.Linear(64, 24)
        self.half, self.whole = nn.Linear(48, 64), nn.Linear(64, 64)
        self.norm1, self.img_mod = nn.Module(), nn.Sequential(nn.SiLU(), nn.Linear(64, 64))
        self.norm1.linear = nn.Linear(64, 64)


class Blocks(nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.block, self.outside = Block(), nn.Linear(64, 64)


@pytest.mark.parametrize(
    ("precision", "rounded"),
    [
        *((name, ["half", "whole"]) for name in ("fp8", "fp8-tensor", "int8", "int8-dynamic")),
        ("mxfp8", ["whole"]),
        ("nvfp4", ["whole"]),
    ],
)
def test_only_layers_on_the_kernels_grid_are_rounded(precision: str, rounded: list[str]) -> None:
    assert [layer.name for layer in quant.layers(Blocks(), precision)] == rounded


def test_a_pipeline_is_saved_past_a_component_that_it_has_not(tmp_path: Path) -> None:
    model = tiny.build(MODELS["flux-schnell"]).transformer
    quant.quantise(model, "int8", "cpu")
    parts = {"image_encoder": None, "transformer": model, "feature_extractor": None}
    (tmp_path / "transformer").mkdir()
    quant.save(SimpleNamespace(components=parts, save_config=lambda folder: None), tmp_path)
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["transformer"]


@pytest.mark.parametrize(
    ("model", "cache", "seer"),
    [
        ("flux-schnell", StepCache(order=0), None),
        ("flux-schnell", StepCache(order=1), (1, True)),
        ("sd3.5-large", StepCache(order=2), (2, False)),  # its last block gives nothing for the prompt
        ("sd3.5-large", StepCache(Bn=1, order=2), (2, True)),  # unless that is always computed
    ],
)
def test_what_the_step_caches_library_is_told(
    model: str, cache: StepCache, seer: tuple[int, bool] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(stepcache.library(), "enable_cache", lambda adapter, **values: told.append(values))
    with caching(tiny.build(MODELS[model]), cache, guided=True):
        [values] = told
    config, calibrator = values["cache_config"], values["calibrator_config"]
    assert (config.Fn_compute_blocks, config.Bn_compute_blocks) == (cache.Fn, cache.Bn)
    assert (config.max_warmup_steps, config.max_continuous_cached_steps) == (cache.W, cache.MC)
    assert config.residual_diff_threshold == cache.R
    found = calibrator and (calibrator.taylorseer_order, calibrator.enable_encoder_calibrator)
    assert found == seer


PATTERNS = {  # of each list of blocks that is cached as one, how many those are, and whether each guide has its own
    "flux-dev": ({"transformer_blocks": "Pattern_1"}, ["single_transformer_blocks"], [4], False),
    "sd3.5-large": ({"transformer_blocks": "Pattern_1"}, [], [2], False),
    "flux2-dev": ({"transformer_blocks": "Pattern_1", "single_transformer_blocks": "Pattern_3"}, [], [2, 2], False),
    "qwen-image": ({"transformer_blocks": "Pattern_1"}, [], [2], True),
    "chroma": ({"transformer_blocks": "Pattern_1", "single_transformer_blocks": "Pattern_3"}, [], [2, 2], True),
}


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("model", [spec.id for spec in MODELS.values() if spec.step_cache])
def test_which_blocks_are_cached_as_one(model: str, guided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    library = stepcache.library()
    monkeypatch.setattr(library, "enable_cache", lambda adapter, **values: told.append((adapter, values)))
    with caching(tiny.build(MODELS[model]), StepCache(), guided):
        [(adapter, values)] = told
    lists, joined, counts, two = PATTERNS[model]
    assert adapter.blocks_name == list(lists)
    assert adapter.forward_pattern == [getattr(library, pattern) for pattern in lists.values()]
    assert (adapter.dummy_blocks_names, [len(blocks) for blocks in adapter.blocks]) == (joined, counts)
    assert not adapter.check_forward_pattern
    assert values["cache_config"].enable_separate_cfg == (two and guided)


@pytest.mark.parametrize(("said", "level"), [(None, "error"), ("debug", "debug")])
def test_the_step_caches_library_logs_errors_unless_told(
    said: str | None, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CACHE_DIT_LOG_LEVEL", raising=False)
    if said:
        monkeypatch.setenv("CACHE_DIT_LOG_LEVEL", said)
    assert stepcache.library().__name__ == "cache_dit"
    assert os.environ["CACHE_DIT_LOG_LEVEL"] == level


# what is there, and what only others say is


def test_a_file_that_vanishes_after_the_index_was_read(volume: Path) -> None:
    source = model_source(SCHNELL, volume)
    (source.folder / "transformer" / "config.json").unlink()
    with pytest.raises(
        WeightsMissing, match=r"transformer/config\.json is missing\. Fetch it again with: python -m handler fetch"
    ):
        Reader(source)


def test_a_weight_file_that_the_manifest_does_not_list(volume: Path) -> None:
    source = model_source(SCHNELL, volume)
    assert source.manifest
    files = {name: entry for name, entry in source.manifest.files.items() if not name.endswith(".safetensors")}
    with pytest.raises(WeightsCorrupt, match=r"model\.safetensors has 37748818 bytes, its manifest says otherwise"):
        Reader(replace(source, manifest=replace(source.manifest, files=files)))


@pytest.mark.parametrize("bad", ["../b/weights.safetensors", "", "/etc/passwd", "a/b.safetensors", 5, None])
def test_an_index_with_one_good_name_and_one_that_leads_elsewhere(bad: object, volume: Path) -> None:
    folder = fetched_folder(SCHNELL, volume) / "transformer"
    good = "diffusion_pytorch_model.safetensors"
    for listed in ({"x": good, "y": bad}, {"x": bad, "y": good}):
        (folder / f"{good}.index.json").write_text(json.dumps({"weight_map": listed}))
        with pytest.raises(WeightsCorrupt, match="does not list files beside it"):
            Reader(model_source(SCHNELL, volume))


def test_no_way_back_without_a_current_receipt(volume: Path) -> None:
    place = receipts.folder(volume, SPARK.id, H200)
    (place / receipts.CURRENT).unlink()
    with pytest.raises(InvalidValue, match=r"Cannot go back in .*: there is no current receipt\."):
        receipts.rollback(place)
    receipts.use(place, 1)
    with pytest.raises(InvalidValue, match=r"no whole receipt is before 1\."):
        receipts.rollback(place)


def test_nothing_hidden_is_listed_as_whole(tmp_path: Path) -> None:
    for name in (INDEX, "manifest.json", ".part", "vae/config.json", "vae/.part", ".cache/a/b", "vae/a.b"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert list(write_manifest(tmp_path, {}).files) == [INDEX, "vae/a.b", "vae/config.json"]


def test_a_folder_that_cannot_be_read_hides_no_other(volume: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = volume / "baked" / SPARK.id / "000"
    write = {"kind": "test"}
    with publishing(other, write) as part:
        (part / "a").write_text("a")
    key = artifacts.key(CODE)
    with failing(volume, errno.EIO, lambda call: call.path.startswith(f"baked/spark/{key}/")):
        assert [source.folder for source in baked_sources(SPARK, volume)] == [other]
    assert f"{key}/manifest.json: Input/output error." in caplog.text


def test_a_record_of_a_start_that_cannot_be_read_hides_no_other(volume: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("stat", "open"):
        with failing(volume, errno.EIO, lambda call, name=name: call.name == name and HERE in call.path):
            found = [boot["boot"] for boot in boots.last_boots(volume, 9)]
        assert set(found) - {HERE} == {golden.ELSEWHERE}
    assert f"{HERE}.json: Input/output error." in caplog.text
    with failing(volume, errno.EACCES, lambda call: call.path == "boots"):
        with pytest.raises(VolumeFailed, match=r"Cannot read .*/boots: Permission denied\."):
            boots.last_boots(volume, 9)
        assert Durations.on(volume) == Durations()  # no start fails for it


def test_publishing_that_fails_is_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def publish() -> Path:
        raise VolumeFailed("Cannot write /volume/baked: No space left on device.")

    words = "a word of a prompt"

    def stumble() -> Path:
        raise KeyError(words)

    def leave() -> Path:
        raise SystemExit(3)

    with caplog.at_level(logging.INFO):
        for what in (publish, stumble, leave, lambda: Path("/volume/baked/spark/key")):
            publisher = Publisher()
            publisher.begin(what)
            publisher.join(30)
    assert words not in caplog.text
    assert [(record.levelname, record.getMessage().split("\n")[0]) for record in caplog.records] == [
        ("WARNING", "compile artifacts are not published: Cannot write /volume/baked: No space left on device."),
        ("WARNING", "compile artifacts are not published: KeyError"),
        ("WARNING", "compile artifacts are not published: SystemExit"),
        ("INFO", "published compile artifacts in /volume/baked/spark/key"),
    ]


def test_a_mount_that_fails_is_the_volume_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody quietly takes another: who uses it says how it fails."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("handler.core.settings.MOUNTS", (tmp_path / "first", tmp_path))
    assert Settings.from_env({}).volume == tmp_path
    for number in (errno.EIO, errno.ESTALE, errno.EACCES):
        with failing(tmp_path, number, lambda call: call.path == "first"):
            assert Settings.from_env({}).volume == tmp_path / "first"


# where /proc is, and where it is not; names


@pytest.mark.parametrize("lacks", ["self/stat", "uptime"])
def test_how_old_a_process_is_without_proc(lacks: str) -> None:
    before = time.process_time()
    with failing(Path("/proc"), errno.ENOENT, lambda call: call.path == lacks):
        found = process_age()
    assert before <= found <= time.process_time()


def test_a_workers_name_begins_with_the_time_and_has_its_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "somehost")
    before = datetime.now(UTC).replace(microsecond=0)
    found = re.fullmatch(r"(\d{4}-\d{2}-\d{2}T\d{2}-\d{2}-\d{2})-somehost-([0-9a-f]{16})", Birth.anew().identity)
    assert found
    told = datetime.strptime(found[1], "%Y-%m-%dT%H-%M-%S").replace(tzinfo=UTC)
    assert before <= told <= datetime.now(UTC)
    assert len({birth._identity() for _ in range(9)}) == 9


# bounds, from both sides


LEAST = 1e-9
REQUEST = {  # the least and the most that is accepted, and by how much less or more is not
    "width": (64, 2048, 1),
    "height": (64, 2048, 1),
    "num_inference_steps": (1, 50, 1),
    "guidance_scale": (0.0, 20.0, 0.001),
    "seed": (0, 2**64 - 1, 2),  # -1 is none
    "partial_images": (0, 3, 1),
    "output_compression": (0, 100, 1),
    "strength": (LEAST, 1.0, LEAST),
}
TEXTS = {"prompt": (0, 32_000), "negative_prompt": (0, 32_000), "model": (0, 200)}
SETTINGS = {
    "cold_start_budget_s": (LEAST, 3600, LEAST),
    "batch": (1, 8, 1),
    "queue": (1, 10_000, 1),
    "queue_s": (LEAST, 86_400, LEAST),
    "deadline_s": (LEAST, 86_400, LEAST),
    "hang_s": (LEAST, 86_400, LEAST),
    "max_n": (1, 10, 1),
    "max_edit_mb": (LEAST, 1024, LEAST),
    "max_body_mb": (LEAST, 1024, LEAST),
    "gpu_price": (0, 1000, 0.001),
    "monthly_cap": (LEAST, 1e9, LEAST),
    "store_expires_s": (1, 604_800, 1),
}
CACHE = {"Fn": (1, 64), "Bn": (0, 64), "W": (1, 50), "R": (0, 1), "MC": (1, 50), "order": (0, 2)}


def held(accepts: Callable[[Any], bool], low: Any, high: Any, by: Any) -> None:
    past = high * (1 + 1e-6) if isinstance(by, float) else high + by
    assert [accepts(value) for value in (low, high)] == [True, True]
    assert [accepts(value) for value in (low - by, past)] == [False, False]


@pytest.mark.parametrize("name", REQUEST)
def test_a_requests_bounds(name: str) -> None:
    others: dict[str, Any] = {"prompt": "x", "output_format": "jpeg", "width": 512, "height": 512}
    others |= {"images": ["iVBORw0KGgo="]} if name == "strength" else {}

    def accepts(value: Any) -> bool:
        try:
            return getattr(ImageRequest.parse(others | {name: value}), name) == value
        except OutOfRange as error:
            return error.param != name

    held(accepts, *REQUEST[name])


@pytest.mark.parametrize("name", TEXTS)
def test_how_long_a_requests_words_may_be(name: str) -> None:
    least, most = TEXTS[name]
    for length in (least, most):
        assert len(getattr(ImageRequest.parse({"prompt": "x", name: "a" * length}), name)) == length
    for length in (least - 1, most + 1):
        if length >= 0:
            with pytest.raises((OutOfRange, InvalidValue)):
                ImageRequest.parse({"prompt": "x", name: "a" * length})


@pytest.mark.parametrize("name", SETTINGS)
def test_a_settings_bounds(name: str) -> None:
    def accepts(value: Any) -> bool:
        try:
            return getattr(Settings(**{name: value}), name) == value
        except SettingsError:
            return False

    held(accepts, *SETTINGS[name])


@pytest.mark.parametrize("name", CACHE)
def test_a_step_caches_bounds(name: str) -> None:
    def accepts(value: Any) -> bool:
        try:
            return getattr(ImageRequest.parse({"prompt": "x", "step_cache": {name: value}}).step_cache, name) == value
        except OutOfRange:
            return False

    held(accepts, *CACHE[name], 1)
    assert set(CACHE) == set(BOUNDS)


def test_how_deep_and_how_long_what_others_wrote_may_be(tmp_path: Path) -> None:
    assert DEEPEST == 64
    parse("[" * 63 + "1" + "]" * 63)
    with pytest.raises(Malformed, match="nested too deeply"):
        parse("[" * 64 + "1" + "]" * 64)
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert load(tmp_path / "a.json", 8) == {"a": 1}
    with pytest.raises(Malformed, match="longer than 7 bytes"):
        load(tmp_path / "a.json", 7)
    assert parse(str(2**1024 - 1)) == 2**1024 - 1
    with pytest.raises(Malformed, match="too large"):
        parse(str(2**1024))


@pytest.mark.parametrize(("longer", "left"), [(0, 1), (1, 0)])
def test_records_have_a_length_from_which_on_they_are_none(longer: int, left: int, tmp_path: Path) -> None:
    assert (boots.LONGEST, bills.LONGEST) == (1 << 20, 32 << 20)
    (tmp_path / "boots").mkdir()
    text = '{"model": "spark", "reason": ""}'
    padded = text[:-2] + "x" * (boots.LONGEST + longer - len(text)) + text[-2:]
    (tmp_path / "boots" / "a.json").write_text(padded)
    assert len(boots.last_boots(tmp_path, 9)) == left


def test_prices_of_chips_whose_names_are_alike() -> None:
    """An L4 is no L40, nor an L40 an L40S, and an A100 with 40 GB is not one with 80."""
    names = ("NVIDIA L4", "NVIDIA L40", "NVIDIA L40S", "NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe")
    assert [price_of(name, "runpod").dollars_per_s for name in names] == [0.00019, 0.00053, 0.00053, 0.00076, 0.00076]
    assert price_of("NVIDIA A100-SXM4-40GB", "modal").dollars_per_s == 0.000583
    assert price_of("NVIDIA A100-SXM4-40GB", "runpod").dollars_per_s is None
