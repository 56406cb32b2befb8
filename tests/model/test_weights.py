"""Reading and loading weights: equal to diffusers' own loading, no second copy, and every fault is told by name."""

import errno
import json
import mmap
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from handler import MODELS
from handler.core.errors import KindlingError, VolumeFailed, WeightsCorrupt, WeightsMissing
from handler.core.host import Headroom
from handler.model.families import build, flux
from handler.model.hardware import Hardware
from handler.model.loading import weights
from handler.model.loading.filling import fill, layouts
from handler.model.loading.weights import ALIGNMENT, KERNELS, _class, _sent, aligned, free, load_components, tensors
from handler.model.tensor_parallel import WHOLE
from handler.volume.layout import layout
from handler.volume.manifest import Source, read_manifest, write_manifest
from handler.volume.reader import CONFIGS, Reader, ReadFile
from handler.volume.sources import EMBEDDED, model_source

SPARK = EMBEDDED / "spark"
FP32 = Hardware("cpu", "CPU", "fp32", "")
CHUNK = 4096  # in these tests
PART = "diffusion_pytorch_model.safetensors"


def source(folder: Path) -> Source:
    return Source(folder, read_manifest(folder), kind="fetched", name="flux-dev")


@pytest.fixture
def spark(tmp_path: Path) -> Path:
    """A copy of spark, to be spoilt, with a manifest as `fetch` writes it."""
    folder = tmp_path / "model"
    shutil.copytree(SPARK, folder)
    write_manifest(folder, {"model": "flux-dev"})
    return folder


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three components of 10,000 bytes and more, in chunks of 4096."""
    for module in ("volume.manifest", "volume.reader", "model.loading.weights"):
        monkeypatch.setattr(f"handler.{module}.CHUNK", CHUNK)
    for number, name in enumerate("abc"):
        (tmp_path / name).mkdir()
        save_file({f"{name}{i}": torch.full((1250,), number + i / 2) for i in range(2)}, tmp_path / name / PART)
    index = {"_class_name": "P", **{name: ["diffusers", "AutoencoderKL"] for name in "abc"}}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    write_manifest(tmp_path, {"model": "flux-dev"})
    return tmp_path


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("reader-"):
            thread.join(30)
            assert not thread.is_alive()


def everything(reader: Reader) -> dict[str, Any]:
    return {name: tensors(reader, name) for name in reader.index if name != "_class_name"}


def states(pipeline: Any) -> dict[str, torch.Tensor]:
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    assert not any(module.training for module in modules.values())
    return {
        f"{name}.{key}": tensor
        for name, module in modules.items()
        for key, tensor in [*module.named_parameters(), *module.named_buffers()]
    }


def picture(pipeline: Any) -> Any:
    return pipeline(
        "a red circle", height=64, width=64, num_inference_steps=2, guidance_scale=0.0, max_sequence_length=32,
        generator=torch.Generator().manual_seed(0), output_type="np",
    ).images  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_equals_from_pretrained_bit_by_bit(precision: str) -> None:
    hardware = Hardware("cpu", "CPU", precision, "")
    with Reader(model_source(MODELS["spark"], Path("unused"))) as reader:
        ours = build(flux, reader, hardware)
    theirs = FluxPipeline.from_pretrained(SPARK, dtype=getattr(torch, hardware.dtype), local_files_only=True)
    mine, other = states(ours), states(theirs)
    assert list(mine) == list(other)
    for name, tensor in other.items():
        assert mine[name].dtype == tensor.dtype
        assert torch.equal(mine[name], tensor), name
        assert not mine[name].requires_grad
    theirs.vae.to(memory_format=torch.channels_last)  # sums in another order, so other last bits
    assert (picture(ours) == picture(theirs)).all()


def test_weights_of_the_right_dtype_are_never_copied() -> None:
    with Reader(source(SPARK)) as reader:
        files = {name: found[0] for name in reader.index if (found := reader._files.get(name))}
        models = load_components(reader, FP32)
    for name in ("text_encoder", "text_encoder_2"):
        read = torch.frombuffer(files[name].memory, dtype=torch.uint8).data_ptr()
        assert {p.untyped_storage().data_ptr() for p in models[name].parameters()} == {read}


def test_a_component_in_several_files(spark: Path) -> None:
    model = FluxTransformer2DModel.from_pretrained(spark / "transformer", dtype=torch.float32)
    shutil.rmtree(spark / "transformer")
    model.save_pretrained(spark / "transformer", max_shard_size="2MB")
    assert len(list((spark / "transformer").glob("*.safetensors"))) > 2
    write_manifest(spark, {"model": "flux-dev"})
    with Reader(source(spark)) as reader:
        loaded = load_components(reader, FP32)["transformer"].state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_a_hub_cache_of_links_and_without_a_manifest(spark: Path, tmp_path: Path) -> None:
    shutil.copytree(spark, tmp_path / "snapshot", copy_function=lambda a, b: Path(b).symlink_to(a))
    with Reader(Source(tmp_path / "snapshot", None)) as reader:
        assert picture(build(flux, reader, FP32)).shape == (1, 64, 64, 3)


def test_reading_needs_no_torch() -> None:
    code = """if True:
        import sys
        from pathlib import Path
        from handler.catalog.models import MODELS
        from handler.volume.reader import Reader
        from handler.volume.sources import model_source
        with Reader(model_source(MODELS["spark"], Path("unused"))) as reader:
            file = reader.take("transformer")[0]
            reader.wait(file, 0)
            print(file.memory[8:10], sorted({"torch", "numpy", "diffusers", "transformers"} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "b'{\"' []"


# faults of files


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[CHUNK + 7] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


FAULTS: dict[str, tuple[Callable[[Path], Any], type[KindlingError], str]] = {
    "missing": (Path.unlink, WeightsMissing, "no weights in safetensors files"),
    "truncated": (cut, WeightsCorrupt, "its manifest says otherwise"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"x"), WeightsCorrupt, "its manifest says otherwise"),
    "empty": (lambda path: path.write_bytes(b""), WeightsCorrupt, "is empty"),
    "one bit": (flip, WeightsCorrupt, "is damaged between bytes 4096 and 8192"),
    "a FIFO": (fifo, WeightsCorrupt, "no file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), WeightsCorrupt, "no file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_is_told_by_name_with_the_remedy(small: Path, fault: str) -> None:
    spoil, kind, message = FAULTS[fault]
    spoil(small / "b" / PART)
    with pytest.raises(kind, match=message) as caught, Reader(source(small)) as reader:
        everything(reader)
    assert str(small / "b") in caught.value.message
    assert "python -m handler fetch flux-dev" in caught.value.message


def test_damage_in_a_part_of_a_file_is_told_by_the_files_own_bytes(small: Path) -> None:
    path = small / "b" / PART
    file = ReadFile(path, (), (0, 0, 1), "", mmap.mmap(-1, CHUNK), base=CHUNK, size=path.stat().st_size)
    with pytest.raises(WeightsCorrupt, match=r"is damaged between bytes 4096 and 8192"):
        file.read(0, CHUNK)


def test_without_a_manifest_a_torn_file_is_still_told(small: Path) -> None:
    cut(small / "b" / PART)
    reason = r"b/diff.* no whole safetensors file: its tensors end at byte"
    with pytest.raises(WeightsCorrupt, match=reason), Reader(Source(small, None)) as reader:
        everything(reader)


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [(fifo, WeightsCorrupt), (cut, WeightsCorrupt), (Path.unlink, VolumeFailed)],
    ids=["becomes a FIFO", "becomes shorter", "vanishes"],
)
def test_a_file_that_changes_while_it_is_read(small: Path, spoil: Callable[[Path], Any], kind: type) -> None:
    with Reader(source(small)) as reader:
        file = reader.take("b")[0]
        spoil(file.path)
        with pytest.raises(kind, match="b/diffusion"):
            file.read(0, CHUNK)


def test_a_file_that_vanishes_before_its_header_is_read(small: Path) -> None:
    with Reader(source(small)) as reader:
        (small / "b" / PART).unlink()
        with pytest.raises(VolumeFailed, match=r"Cannot read .*b/diffusion"):
            layouts(reader.files("b"))


def rename(path: Path, data: bytes) -> None:
    (path.parent / "new").write_bytes(data)
    (path.parent / "new").replace(path)


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # two writes may fall into one tick of the clock


@pytest.mark.parametrize("change", [rename, write])
@pytest.mark.parametrize("cached", [True, False])
def test_no_file_without_a_manifest_is_read_from_two(
    small: Path, change: Callable[[Path, bytes], None], cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By as many other bytes, between one chunk and the next."""
    monkeypatch.setattr("handler.volume.reader.cached", lambda *_: cached)
    with Reader(Source(small, None)) as reader:
        file = reader.take("b")[0]
        file.read(0, CHUNK)
        change(file.path, file.path.read_bytes()[:CHUNK] + bytes(len(file.memory) - CHUNK))
        with pytest.raises(WeightsCorrupt, match="was replaced, or written to, while it was read"):
            file.read(CHUNK, 2 * CHUNK)


def test_no_file_is_written_to_while_a_chunk_is_read(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv
    with Reader(Source(small, None)) as reader:
        file = reader.take("b")[0]
        monkeypatch.setattr(os, "preadv", lambda *given: (os.utime(file.path, (1, 1)), whole(*given))[1])
        with pytest.raises(WeightsCorrupt, match="was replaced, or written to"):
            file.read(CHUNK, 2 * CHUNK)


def test_a_file_that_ends_early(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(WeightsCorrupt, match="ends at byte"), Reader(source(small)) as reader:
        everything(reader)


def test_an_io_error_of_the_volume(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(VolumeFailed, match=r"Cannot read .*: Input/output error"), Reader(source(small)) as reader:
        everything(reader)


def test_short_reads_are_continued(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, *at: whole(fd, [buffers[0][:1000]], *at))
    with Reader(source(small)) as reader:
        assert everything(reader)["c"]["c1"].eq(2.5).all()


@pytest.mark.parametrize("refused", [False, True], ids=["direct", "no O_DIRECT here"])
def test_past_the_page_cache(small: Path, monkeypatch: pytest.MonkeyPatch, refused: bool) -> None:
    opened, whole = [], os.open

    def watched(path: Path, flags: int, *more: Any) -> int:
        opened.append(bool(flags & os.O_DIRECT))
        if flags & os.O_DIRECT and refused:
            raise OSError(errno.EINVAL, "Invalid argument")
        return whole(path, flags, *more)

    monkeypatch.setattr("handler.volume.reader.cached", lambda *_: False)
    monkeypatch.setattr(os, "open", watched)
    with Reader(source(small)) as reader:
        assert everything(reader)["c"]["c1"].eq(2.5).all()
    assert True in opened


@pytest.mark.parametrize(
    ("error", "direct"),
    [
        (BlockingIOError(errno.EAGAIN, "not in the page cache"), True),
        (OSError(errno.EOPNOTSUPP, "who knows"), False),
        (None, False),
    ],
)
def test_what_the_page_cache_has_is_read_from_there_and_where_nobody_can_tell_all_is(
    small: Path, monkeypatch: pytest.MonkeyPatch, error: OSError | None, direct: bool
) -> None:
    opened, read, whole = [], os.preadv, os.open

    def asked(descriptor: int, buffers: list[Any], start: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT and error:
            raise error
        return read(descriptor, buffers, start)

    monkeypatch.setattr(os, "preadv", asked)
    monkeypatch.setattr(
        os, "open", lambda path, flags: (opened.append(bool(flags & os.O_DIRECT)), whole(path, flags))[1]
    )
    with Reader(source(small)) as reader:
        assert everything(reader)["a"]["a1"].eq(0.5).all()
    assert any(opened) == direct


def test_a_flipped_bit_in_a_configuration(spark: Path) -> None:
    path = spark / "vae" / "config.json"
    path.write_text(path.read_text().replace("0.", "1.", 1))
    with pytest.raises(WeightsCorrupt, match=r"vae/config\.json is damaged"), Reader(source(spark)) as reader:
        load_components(reader, FP32)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '"x"'])
def test_an_index_that_is_none(small: Path, text: str) -> None:
    (small / "model_index.json").write_text(text)
    with pytest.raises(WeightsCorrupt, match=r"model_index\.json is no JSON object"):
        Reader(source(small))
    (small / "model_index.json").unlink()
    with pytest.raises(WeightsMissing, match=r"model_index\.json is missing"):
        Reader(source(small))


def test_an_index_whose_names_no_file_system_takes(small: Path) -> None:
    with pytest.raises(VolumeFailed, match=r"Cannot read .*: File name too long"):
        Reader(Source(small, None, {"x" * 300: ["diffusers", "AutoencoderKL"]}))


@pytest.mark.parametrize("weight_map", [{"x": "../b/" + PART}, {"x": ""}, ["x"], {"x": 1}, None])
def test_an_index_of_shards_names_files_beside_it_only(small: Path, weight_map: object) -> None:
    (small / "b" / f"{PART}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightsCorrupt, match="does not list files beside it"):
        Reader(source(small))


# faults of the format


def encoded(header: object, data: bytes = b"\0" * 8, length: int | None = None) -> memoryview:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return memoryview(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded({"a": entry()}, length=1 << 60), "cannot have"),
        (memoryview(b"\0" * 5), "cannot have"),
        (encoded(b"\xff\xfe"), "makes no sense"),
        (encoded([1]), "makes no sense"),
        (encoded({"a": entry("F4")}), "makes no sense"),
        (encoded({"a": entry(shape=(3,))}), "makes no sense"),
        (encoded({"a": entry(shape=(-2,))}), "makes no sense"),
        (encoded({"a": entry(shape=(True, 2))}), "makes no sense"),
        (encoded({"a": entry(shape=(2.0,))}), "makes no sense"),
        (encoded({"a": entry(offsets=(8, 0))}), "makes no sense"),
        (encoded({"a": entry(offsets=(0,))}), "makes no sense"),
        (encoded({"a": entry(), "b": entry()}), "gap or an overlap before b"),
        (encoded({"a": entry(offsets=(4, 12))}, b"\0" * 12), "gap or an overlap before a"),
        (encoded({"a": entry()}, b"\0" * 7), "its tensors end at byte"),
        (encoded({"a": entry()}, b"\0" * 9), "its tensors end at byte"),
    ],
)
def test_a_header_that_cannot_be(data: memoryview, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        layout(data, len(data))


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(shape=(2**62,) * 200_000)},  # whose product has 12 million digits
        {"a": entry(shape=(2**62,) * 200_000 + (0,), offsets=(0, 0))},
        {"a": entry(shape=(2**32, 2**31), offsets=(0, 2**63 - 1))},
        {"a": entry(shape=(1,) * 9, offsets=(0, 4))},
        {f"{i}": entry(shape=(0,), offsets=(0, 0)) for i in range(100_001)},
    ],
    ids=("wide", "empty", "large", "deep", "many"),
)
def test_a_header_that_would_hold_the_interpreter_is_refused_before_it_is_reckoned(
    header: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    multiplied: list[Sequence[int]] = []
    monkeypatch.setattr("math.prod", lambda shape: multiplied.append(shape) or 2**63)
    data = encoded(header, b"")
    with pytest.raises(ValueError, match="makes no sense"):
        layout(data, len(data))
    assert not [shape for shape in multiplied if len(shape) > 8]


def test_odd_but_valid_files(small: Path) -> None:
    """A header of odd length, a scalar, an empty tensor, metadata, every dtype: as safetensors reads them."""
    path = small / "a" / PART
    header = {"__metadata__": {"k": "v"}, "s": entry("BF16", [], [0, 2]), "e": entry("F32", [0, 3], [2, 2])}
    text = json.dumps(header | {"f": entry("F32", [1, 2], [2, 10])}).encode()
    path.write_bytes(bytes(encoded(text + b" " * (1 - len(text) % 2), b"\x80\x3f" + struct.pack("<ff", 1.5, -2))))
    with Reader(Source(small, None)) as reader:
        found = tensors(reader, "a")
    assert found["f"].tolist() == [[1.5, -2.0]]
    assert (found["s"].item(), found["e"].shape) == (1.0, (0, 3))
    kinds = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"]
    kinds += ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"]
    save_file({kind: torch.arange(4).to(getattr(torch, kind)) for kind in kinds}, path)
    with Reader(Source(small, None)) as reader:
        found = tensors(reader, "a")
    for kind, tensor in load_file(path).items():
        assert found[kind].dtype == tensor.dtype
        assert found[kind].view(torch.uint8).equal(tensor.view(torch.uint8))


# faults of the content


def rekey(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    (path,) = folder.glob("*.safetensors")
    found = load_file(path)
    change(found)
    save_file(found, path, {"format": "pt"})
    write_manifest(folder.parent, {"model": "flux-dev"})


KEYS = {"vae": "decoder.conv_in.bias", "text_encoder": "encoder.layers.0.layer_norm1.bias"}


@pytest.mark.parametrize("component", KEYS)
@pytest.mark.parametrize("fault", ["missing", "unexpected", "misshapen"])
def test_every_key_must_be_there_and_wanted(spark: Path, component: str, fault: str) -> None:
    key = {"unexpected": "foreign.bias"}.get(fault, KEYS[component])
    change: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
        "missing": lambda found: found.pop(key),
        "unexpected": lambda found: found.update({key: torch.zeros(3)}),
        "misshapen": lambda found: found.update({key: torch.zeros(3)}),
    }
    rekey(spark / component, change[fault])
    reason = f"{component} do not fit .*: {fault} .*{key}"
    with pytest.raises(WeightsCorrupt, match=reason), Reader(source(spark)) as reader:
        load_components(reader, FP32)


@pytest.mark.parametrize(
    ("library", "word", "made"),
    [
        ("diffusers", "AutoencoderKL", diffusers.AutoencoderKL),
        ("diffusers", "FlowMatchEulerDiscreteScheduler", diffusers.FlowMatchEulerDiscreteScheduler),
        ("transformers", "CLIPTextModel", transformers.CLIPTextModel),
        ("transformers", "CLIPTokenizer", transformers.CLIPTokenizer),
        ("transformers", "AutoTokenizer", transformers.AutoTokenizer),
        ("transformers", "CLIPImageProcessor", transformers.CLIPImageProcessor),
        ("transformers", "Qwen2VLProcessor", transformers.Qwen2VLProcessor),
        ("transformers", "PixtralProcessor", transformers.AutoTokenizer),  # of which FLUX.2 needs no more
    ],
)
def test_which_classes_are_made(small: Path, library: str, word: str, made: type) -> None:
    with Reader(source(small)) as reader:
        assert _class(reader, library, word) is made


@pytest.mark.parametrize(
    "value", [["os", "system"], ["diffusers", "FluxPipeline"], ["diffusers", "load_image"], ["x", "y"]]
)
def test_only_the_two_libraries_models_are_made(spark: Path, value: list[Any]) -> None:
    index = spark / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"vae": value}))
    with pytest.raises(WeightsCorrupt, match=f"asks for {value[0]}.{value[1]}"), Reader(Source(spark, None)) as reader:
        load_components(reader, FP32)


@pytest.mark.parametrize(
    "value", [[], ["diffusers"], [1, 2], ["diffusers", None], ["a", "b", "c"], {"a": 1}, "x", None]
)
def test_an_index_that_says_nothing_of_a_component_is_named(spark: Path, value: Any) -> None:
    index = spark / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"vae": value}))
    told = r"model_index\.json does not say what vae is made as"
    with pytest.raises(WeightsCorrupt, match=told), Reader(Source(spark, None)) as reader:
        load_components(reader, FP32)


def test_a_component_whose_folder_cannot_be_looked_at_is_named(spark: Path) -> None:
    index = spark / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"x" * 300: "value"}))
    with (
        pytest.raises(VolumeFailed, match=r"Cannot read .*: File name too long"),
        Reader(Source(spark, None)) as reader,
    ):
        load_components(reader, FP32)


def test_two_files_with_the_same_key(small: Path) -> None:
    save_file({"a0": torch.zeros(4)}, small / "a" / "other.safetensors")
    index = {"weight_map": {"a0": PART, "a1": "other.safetensors"}}
    (small / "a" / f"{PART}.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsCorrupt, match="has a0, as another file"), Reader(Source(small, None)) as reader:
        tensors(reader, "a")


@pytest.mark.parametrize("change", ["chunk", "t", "view"])
def test_what_a_library_cuts_or_turns_is_never_taken_for_the_tensor_itself(change: str, tmp_path: Path) -> None:
    """It may be a view of it that begins where it does."""
    (tmp_path / "a").mkdir()
    save_file({"w": (whole := torch.arange(16.0).view(4, 4).bfloat16())}, tmp_path / "a" / PART)
    changed = {"chunk": lambda w: w.chunk(2), "t": lambda w: [w.t()], "view": lambda w: [w.view(2, 8)]}[change]

    def make(found: dict[str, torch.Tensor]) -> tuple[Any, dict[str, Any]]:
        return torch.nn.ParameterList(torch.nn.Parameter(part, False) for part in changed(found["w"])), {}

    with Reader(Source(tmp_path, None, {"a": ["diffusers", "AutoencoderKL"]})) as reader:
        files = layouts(reader.take("a"))
        model, _ = fill(reader, files, make, torch.float32, "cpu", "", {}, WHOLE)
    for part, wanted in zip(model, changed(whole), strict=True):
        assert torch.equal(part.float(), wanted.float())


# reading ahead


def stalled(reader: Reader) -> int:
    """Wait until the readers have done all they may; how many bytes wait."""
    with reader._turn:
        chunks = [(file, *chunk) for found in reader._files.values() for file in found for chunk in file.chunks]

        def still() -> bool:
            landed = sum(stop - start for file, start, stop in chunks if start in file.landed)
            return reader._ahead.waiting == landed and not (reader._jobs and reader._fits(*reader._jobs[0]))

        assert reader._turn.wait_for(still, timeout=60)
        return reader._ahead.waiting


def test_what_waits_is_bounded(small: Path) -> None:
    """By the room there is, whatever a file has, and but for the chunk that is waited for."""
    size = (small / "a" / PART).stat().st_size
    with Reader(Source(small, None), room=0) as reader:
        assert stalled(reader) == 0
        assert len(everything(reader)) == 3
        assert reader._ahead.waiting == 0
    with Reader(Source(small, None), room=size - 1) as reader:
        before = stalled(reader)
        assert 0 < before < size
        file = reader.take("a")[0]
        start, stop = file.chunks[-1]
        reader.wait(file, start)
        assert reader._ahead.waiting == before + stop - start
    with Reader(Source(small, None), room=2 * size) as reader:
        assert size < stalled(reader) <= 2 * size
    with Reader(Source(small, None)) as reader:
        assert stalled(reader) == 3 * size


def test_what_was_taken_leaves_room_for_what_is_next(small: Path) -> None:
    """At once, though nobody waits for anything yet."""
    with Reader(Source(small, None), room=2 * CHUNK) as reader:
        (file,) = reader.files("a")
        assert stalled(reader) == 2 * CHUNK
        assert file.landed == {0, CHUNK}
        reader.taken(CHUNK)
        with reader._turn:
            assert reader._turn.wait_for(lambda: len(file.landed) == 3, timeout=20)


@pytest.fixture
def leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Leave so many bytes of this container's memory free."""
    monkeypatch.setattr("handler.core.host.CGROUP_LIMIT", tmp_path / "memory.max")
    monkeypatch.setattr("handler.core.host.STRIDE", 50_000)
    (tmp_path / "memory.max").write_text("100000")
    (tmp_path / "memory.stat").write_text("anon 60000\ninactive_file 20000\n")

    def left(size: int) -> None:
        (tmp_path / "memory.current").write_text(f"{120_000 - size}")

    return left


def test_what_waits_may_fill_what_is_free_but_for_what_loading_takes(small: Path, leave: Callable[[int], None]) -> None:
    """It is looked at again as weights are taken, which may stay in host memory."""
    with Reader(Source(small, None), room=0) as reader:
        leave(10_000 + 2 * CHUNK)
        assert stalled(reader) == 0
        reader.fill(10_000)
        assert CHUNK < stalled(reader) <= 2 * CHUNK
        leave(10_000)
        with reader._turn:
            reader.taken(CHUNK)
            assert not reader._fits(*reader._jobs[0])
            leave(90_000)
            reader.taken(0)
            assert reader._turn.wait_for(lambda: not reader._jobs, timeout=60)


def test_what_is_free_is_looked_at_again_before_much_more_comes(leave: Callable[[int], None]) -> None:
    """Others may take it meanwhile."""
    headroom = Headroom(0)
    headroom.fill(0)
    leave(90_000)
    assert not headroom.fits(60_000)
    assert headroom.fits(50_000)
    headroom.more(50_000)
    leave(0)
    assert not headroom.fits(1)


def test_any_order_comes_to_an_end(small: Path) -> None:
    with Reader(source(small), room=0) as reader:
        for name in ("c", "a", "b", CONFIGS):
            for file in reader.take(name):
                for start, _ in file.chunks:
                    reader.wait(file, start)
        assert not reader.take("c")


def test_what_is_asked_for_is_next_and_then_the_rest_of_its_file(small: Path) -> None:
    with Reader(Source(small, None), threads=0) as reader:
        (first,), (second,), (third,) = (reader.files(name) for name in "abc")
        reader._stop(RuntimeError("nobody reads here"))
        reader._jobs.extend((file, *chunk) for file in (first, second, third) for chunk in file.chunks)
        with pytest.raises(RuntimeError, match="nobody reads"):
            reader.wait(second, CHUNK)
        order = [(file, start) for file, start, _ in reader._jobs]
    starts = [start for start, _ in second.chunks]
    assert starts[:3] == [0, CHUNK, 2 * CHUNK]
    rest = [(second, start) for start in starts if start != CHUNK]
    others = [(file, start) for file in (first, third) for start in starts]
    assert order == [(second, CHUNK), *rest, *others]


def test_what_is_not_wanted_is_not_read(small: Path) -> None:
    with Reader(source(small), without=("b",)) as reader:
        assert (set(reader.index), reader.files("b"), len(reader.files("a"))) == ({"_class_name", "a", "c"}, [], 1)
        assert set(everything(reader)) == {"a", "c"}


def test_memory_need_not_come_in_huge_pages(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmap.MADV_HUGEPAGE", 1 << 20)  # no kernel knows it
    with Reader(source(small)) as reader:
        assert len(everything(reader)) == 3


def test_leaving_does_not_wait_for_a_read_that_hangs(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging, whole = threading.Event(), os.preadv

    def hang(descriptor: int, buffers: list[Any], *how: int) -> int:
        assert hanging.wait(60)
        return whole(descriptor, buffers, *how)

    monkeypatch.setattr(os, "preadv", hang)
    with Reader(source(small), threads=2) as reader:
        file = reader.take("a")[0]
    assert [t.daemon for t in threading.enumerate() if t.name.startswith("reader-")] == [True, True]
    with pytest.raises(RuntimeError, match="closed"):
        reader.wait(file, 0)
    hanging.set()


def test_on_its_way_to_a_gpu_each_chunk_leaves_host_memory(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of events with a stand-in for CUDA; no machine of ours has shown it on a GPU yet."""
    told: list[str] = []

    class Stream:
        def wait_stream(self, other: object) -> None:
            told.append("after what was queued")

        def synchronize(self) -> None:
            told.append("all done")

    class Event:
        def synchronize(self) -> None:
            told.append("buffer free")

        def record(self, stream: Stream) -> None:
            told.append("sent")

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **more: empty(*shape, **more))
    for name, value in {"Stream": Stream, "Event": Event, "current_stream": Stream, "stream": nullcontext}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    with Reader(Source(small, None)) as reader:
        file = reader.take("a")[0]
        expected = (small / "a" / PART).read_bytes()
        memory = _sent(reader, file, "cpu", first=100)
        assert memory.numpy().tobytes() == expected
        assert memory.storage_offset() == 156
        assert not any(file.memory[:])
        assert stalled(reader) == 2 * len(expected)
    assert told == ["after what was queued", *["buffer free", "sent"] * 3, "all done"]


@pytest.mark.parametrize("layers", [5, 6, 8])
def test_nearly_all_of_a_file_is_aligned_on_a_gpu(layers: int, tmp_path: Path) -> None:
    """nvfp4's single scales, 4 bytes each, come first in a file: what is not aligned would be there twice."""
    parts = {
        "rounded": torch.zeros(64, 64, dtype=torch.int8),
        "scale": torch.zeros(1, 1),
        "bias": torch.zeros(64).bfloat16(),
    }
    save_file({f"{i}.{name}": part.clone() for i in range(layers) for name, part in parts.items()}, tmp_path / PART)
    data = (tmp_path / PART).read_bytes()
    slots = layout(memoryview(data), len(data))
    first = aligned(slots)
    assert (KERNELS, ALIGNMENT) == (16, 256)
    copied = [name for name, slot in slots.items() if (slot.start - first) % 16]
    assert not [name for name in copied if name.endswith("rounded")]


def test_which_components_are_rounded(spark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text encoders and denoisers, but no autoencoder, whose layers do not repeat."""
    told: dict[str, str] = {}

    def noted(reader: Reader, files: dict[Any, Any], *rest: Any) -> Any:
        told[next(iter(files)).path.parent.name] = rest[3]
        return fill(reader, files, *rest)

    monkeypatch.setattr(weights, "fill", noted)
    with Reader(source(spark)) as reader:
        load_components(reader, replace(FP32, precision="int8"))
    rounded = {name: told.get(name, "") for name in ("text_encoder", "transformer", "vae")}
    assert rounded == {"text_encoder": "int8", "transformer": "int8", "vae": ""}
    told.clear()
    with Reader(source(spark)) as reader:
        load_components(reader, FP32)
    assert told == {"transformer": "", "vae": ""}  # whose files have 16 bits; the others serve as they were read


class Pair(torch.Tensor):
    """Made of two, as a rounded weight is; nothing is computed with it."""

    one: torch.Tensor
    other: torch.Tensor

    def __new__(cls, one: torch.Tensor, other: torch.Tensor) -> "Pair":
        """It has no memory of its own."""
        made: Pair = torch.Tensor._make_wrapper_subclass(cls, one.shape)  # type: ignore[attr-defined]
        made.one, made.other = one, other
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["one", "other"], None

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> None:
        raise NotImplementedError


def test_all_weights_are_freed_whoever_still_knows_them() -> None:
    own, read = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    buffer, within = torch.zeros(4), [torch.zeros(2), torch.zeros(2)]
    own.register_buffer("table", buffer)
    own.register_buffer("pair", Pair(*within), persistent=False)
    read.weight.data = torch.frombuffer(bytearray(36), dtype=torch.float32).view(3, 3)
    known = [own.weight, own.bias, buffer, *within]
    free(SimpleNamespace(components={"a": own, "b": None, "c": "a setting", "d": read}))
    assert [tensor.untyped_storage().nbytes() for tensor in known] == [0] * 5
    assert read.weight.numel() == 0
    free(None)


@pytest.mark.parametrize(
    ("file", "said", "named"),
    [
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["planted.T", None]}}, "auto_map"),
        ("tokenizer_2/config.json", {"auto_map": {"AutoConfig": "planted.C"}}, "auto_map"),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "planted.M"}}, "auto_map"),
        ("text_encoder/config.json", {"attn_implementation": "someone/kernel"}, "attn_implementation 'someone/kernel'"),
        ("text_encoder/config.json", {"_attn_implementation": "flash_attention_2"}, "'flash_attention_2'"),
        ("text_encoder_2/config.json", {"attn_implementation": {"text": "a/b:c"}}, "attn_implementation 'a/b:c'"),
        ("text_encoder_2/config.json", {"text_config": {"_attn_implementation": "a/b"}}, "_attn_implementation 'a/b'"),
        ("scheduler/scheduler_config.json", {"auto_map": {"Scheduler": "planted.S"}}, "auto_map"),
    ],
)  # fmt: skip
def test_what_would_run_code_of_others_is_refused_by_name(
    spark: Path, file: str, said: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = json.loads((spark / file).read_text()) if (spark / file).exists() else {}
    (spark / file).write_text(json.dumps(before | said))
    ran = spark / "ran"
    for component in ("tokenizer", "tokenizer_2", "text_encoder", "scheduler"):
        (spark / component / "planted.py").write_text(f"open({str(ran)!r}, 'w')\nclass T: ...\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    refused = pytest.raises(WeightsCorrupt, match=f"{file} has .*{named}.*is refused")
    with refused, Reader(Source(spark, None)) as reader:
        load_components(reader, FP32)
    assert not ran.exists()


@pytest.mark.parametrize("one", [None, "eager", "sdpa"])
def test_the_librarys_own_attention_may_be_named(spark: Path, one: str | None) -> None:
    config = spark / "text_encoder/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attn_implementation": one}))
    with Reader(Source(spark, None)) as reader:
        assert load_components(reader, FP32)["text_encoder"]


def test_a_tokenizer_in_the_place_of_another_never_runs_its_own_code(
    spark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of transformers' classes asks about `auto_map` is theirs to change: the answer is no, never a person's."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        transformers.CLIPTokenizer, "from_pretrained", classmethod(lambda _, *__, **given: asked.append(given))
    )
    with Reader(Source(spark, None)) as reader:
        load_components(reader, FP32)
    assert asked[0]["trust_remote_code"] is False
