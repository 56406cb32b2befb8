"""People's files that do not go with a row, or are none: one readable line each, before anything large is read."""

import contextlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import originals
import pytest
import torch
from safetensors.torch import load_file

import tiny
from handler.catalog.models import MODELS
from handler.catalog.originals import FLUX
from handler.catalog.spec import ModelSpec
from handler.core.errors import KindlingError, SettingsError, WeightsCorrupt, WeightsMissing
from handler.volume import hashes, single
from handler.volume.gguf import layout
from handler.volume.given import FOLDERS, ROOTS, given, located
from handler.volume.overlay import overlay
from handler.volume.single import examine
from handler.volume.sources import EMBEDDED, model_source

SPARK = MODELS["spark"]
BYTES = torch.zeros(4, 4, dtype=torch.int8)
WEIGHTS = EMBEDDED / "spark/transformer/diffusion_pytorch_model.safetensors"


def over(name: str, volume: Path, spec: ModelSpec = SPARK) -> Any:
    return overlay([name], spec, model_source(spec, volume), volume)


def refused(name: str, volume: Path, spec: ModelSpec = SPARK, kind: type[KindlingError] = SettingsError) -> str:
    """The one line that refuses a file."""
    with pytest.raises(kind) as caught:
        over(name, volume, spec)
    assert "\n" not in caught.value.message
    return caught.value.message


def zeros(*names: str) -> dict[str, Any]:
    return {name: torch.zeros(4, 4) for name in names}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (["lora_unet_x.lora_down.weight"], "is a LoRA; spark is FLUX.1 [schnell]. A LoRA is no model: it changes one."),
        (["control_model.input_hint_block.0.weight"], "is a ControlNet; spark is FLUX.1 [schnell]. No ControlNet"),
        (["head.modulation"], "is Wan; spark is FLUX.1 [schnell]. It draws videos, and no row does."),
        (["a"], "is nothing known; spark is FLUX.1 [schnell]."),
        (
            ["double_blocks.0.img_attn.norm.key_norm.scale", "guidance_in.in_layer.weight"],
            "is FLUX.1 [dev]; spark is FLUX.1 [schnell]. It goes with flux-dev.",
        ),
        (
            ["model.diffusion_model.input_blocks.1.0.in_layers.0.weight", "model.diffusion_model.label_emb.0.0.weight"],
            "is SDXL; spark is FLUX.1 [schnell]. It goes with sdxl or sdxl-turbo or sdxl-lightning.",
        ),
    ],
)  # fmt: skip
def test_another_architecture_is_refused_with_both_names(tensors: list[str], says: str, tmp_path: Path) -> None:
    originals.write(zeros(*tensors), tmp_path / "mine.safetensors")
    assert says in refused("mine.safetensors", tmp_path)


def test_a_file_that_would_change_nothing_is_refused(tmp_path: Path) -> None:
    for name in ("one.safetensors", "two.safetensors"):
        originals.write(originals.backwards(load_file(WEIGHTS), FLUX), tmp_path / name)
    with pytest.raises(SettingsError, match=r"one\.safetensors would change nothing: others have all that it has"):
        overlay(["one.safetensors", "two.safetensors"], SPARK, model_source(SPARK, tmp_path), tmp_path)


def test_what_a_file_says_that_it_predicts_is_heard(tmp_path: Path) -> None:
    said = {"modelspec.prediction_type": "v"}
    originals.write(zeros("input_blocks.1.0.in_layers.0.weight"), tmp_path / "mine.safetensors", **said)
    assert "is Stable Diffusion 1.5 with v-prediction; spark is" in refused("mine.safetensors", tmp_path)


def test_the_same_in_another_size_is_refused_by_the_first_tensor(tmp_path: Path) -> None:
    weights = originals.backwards(load_file(WEIGHTS), FLUX)
    weights["img_in.weight"] = torch.zeros(128, 44)
    del weights["img_in.bias"]
    originals.write(weights | zeros("more"), tmp_path / "mine.safetensors")
    told = refused("mine.safetensors", tmp_path)
    assert "is FLUX.1 [schnell], as spark is, but does not fit it (transformer: it lacks x_embedder.bias" in told
    assert "it has besides more" in told
    assert "it has in another shape x_embedder.weight" in told


ROWS = ("sdxl", "flux-dev", "sd3.5-large", "chroma", "flux2-klein", "z-image-turbo", "qwen-image")


@pytest.mark.parametrize("name", ROWS)
def test_no_row_takes_anothers(name: str, tmp_path: Path) -> None:
    """Told by the true pipelines, all against all."""
    spec = MODELS[name]
    tiny.write(spec, tmp_path)
    for other in ROWS:
        if other != name:
            path = tmp_path / f"{other}.safetensors"
            pipeline = tiny.build(MODELS[other])
            originals.write(originals.original(getattr(pipeline, "unet", None) or pipeline.transformer), path)
            assert f"{other}.safetensors is " in refused(path.name, tmp_path, spec)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is no whole safetensors file"),
        (b"PK\x03\x04rest", "It is a pickle, which could run anything, and is never opened."),
        (b"\x80\x02}q\x00.", "It is a pickle"),
        (b"\x80\x05\x95\x00.", "It is a pickle"),
        (b"<!DOCTYPE html><html>", "It is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "It is a pointer of Git LFS"),
        (struct.pack("<Q", 1 << 40) + b"{}", "its header cannot have 1099511627776 bytes"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "its head cannot be true"),
        (b"GGUF" + struct.pack("<IQQ", 3, 5, 0), "its head ends too early"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 40), "its head has a name of"),
        (b"GGUF" + struct.pack("<I", 1), "it is no GGUF file of version 2 or 3"),
    ],
)
@pytest.mark.parametrize("name", ["mine.safetensors", "mine.ckpt"])
def test_what_is_no_file_of_weights_is_named(data: bytes, says: str, name: str, tmp_path: Path) -> None:
    """Whatever it is called."""
    (tmp_path / name).write_bytes(data)
    assert says in refused(name, tmp_path, kind=WeightsCorrupt)


@pytest.mark.parametrize("length", [0x0280, 0x0480, 0x023C])
def test_a_whole_file_whose_length_begins_as_a_pickle_or_a_page_does_is_read(length: int, tmp_path: Path) -> None:
    head = json.dumps({"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode().ljust(length)
    (path := tmp_path / "mine.safetensors").write_bytes(struct.pack("<Q", length) + head + b"!")
    assert list(examine(path).slots) == ["x"]


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    path = originals.write(originals.backwards(load_file(WEIGHTS), FLUX), tmp_path / "mine.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    told = refused("mine.safetensors", tmp_path, kind=WeightsCorrupt)
    assert re.search(
        r"mine\.safetensors is no whole safetensors file: its tensors end at byte \d+, the file at \d+", told
    )
    assert told.endswith("Download it again.")


@pytest.mark.parametrize("name", ["../mine.safetensors", "checkpoints/../../mine.safetensors", "", "a\0b", "/a\0b"])
def test_a_name_outside_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path.parent / "mine.safetensors").write_bytes(b"")
    assert "leads out of its folder" in refused(name, tmp_path)


def test_files_are_found_where_comfyui_has_them(tmp_path: Path) -> None:
    for root in ROOTS:
        for folder in FOLDERS:
            path = tmp_path / root / folder / f"{root}-{folder}".replace("/", "-")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            assert located(path.name, tmp_path) == path
            assert located(f"{folder}/{path.name}".lstrip("/"), tmp_path) == path
            assert located(str(path), tmp_path) == path
    with pytest.raises(WeightsMissing, match=r"there is no mine\.safetensors in .*, nor below its checkpoints"):
        located("mine.safetensors", tmp_path)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"a.weight": BYTES.to(torch.uint8), "a.weight_scale": torch.ones(4, 1)}, "keeps a.weight as uint8"),
        ({"a.weight": BYTES, "a.weight_scale": torch.ones(3)}, "scale of a.weight has a shape"),
        (
            {"a.weight": BYTES, "a.weight_scale": torch.ones(4),
             "a.comfy_quant": torch.tensor(list(json.dumps({"format": "nvfp4"}).encode()), dtype=torch.uint8)},
            "keeps a.weight as nvfp4",
        ),
        (
            {"a.weight": BYTES, "a.weight_scale": torch.ones(4),
             "a.comfy_quant": torch.tensor(list(b'{"convrot": true}'), dtype=torch.uint8)},
            "rotated by groups of 256, which cannot be",
        ),
        (
            {"a.weight": BYTES, "a.weight_scale": torch.ones(4),
             "a.comfy_quant": torch.tensor(list(b"{{{"), dtype=torch.uint8)},
            "what it says of its layers is no JSON",
        ),
        ({"a.weight": BYTES}, "keeps a.weight as int8 without a scale"),
        ({"a.weight": BYTES.to(torch.int64)}, "keeps a.weight as int64 without a scale"),
        ({"a.weight": BYTES.to(torch.bool)}, "keeps a.weight as bool without a scale"),
        ({"a\n\x1b[31m": BYTES}, r"a tensor whose name makes no sense: 'a\n\x1b[31m'"),
        ({f"decoder.up.{'9' * 5000}.x": BYTES}, "a tensor whose name makes no sense: 'decoder.up.999"),
    ],
)  # fmt: skip
def test_a_format_that_is_not_read_is_named(tensors: dict[str, Any], says: str, tmp_path: Path) -> None:
    originals.write(tensors, tmp_path / "mine.safetensors")
    assert says in refused("mine.safetensors", tmp_path, kind=WeightsCorrupt)


def gguf(*tensors: tuple[str, tuple[int, ...], int, int], facts: bytes = b"", count: int = 0) -> bytes:
    """The head of a GGUF file: name, sides, type and place of each tensor."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), count) + facts
    for name, sides, kind, start in tensors:
        head += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(sides))
        head += struct.pack(f"<{len(sides)}Q", *sides) + struct.pack("<IQ", kind, start)
    return head


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ([("a", (32,), 8, 0), ("a", (32,), 8, 64)], "a tensor twice"),
        ([("a", (32, 1 << 50), 8, 0)], "its tensor a ends at byte"),
        ([("a", (1 << 40, 1 << 40), 8, 0)], "a tensor whose shape makes no sense"),
        ([("a", (1 << 63,), 8, 0)], "a tensor whose shape makes no sense"),
        ([("a", (33,), 8, 0)], "33 weights in blocks of 32"),
        ([("a", (32,), 99, 0)], "weights of ggml's type 99; F32, F16"),
        ([("a", (1, 1, 1, 1, 1), 0, 0)], "5 dimensions"),
        ([("a", (32,), 8, 1 << 62)], "its tensor a ends at byte"),
    ],
)
def test_a_gguf_file_that_cannot_be_is_refused(tensors: Any, says: str) -> None:
    head = gguf(*tensors)
    with pytest.raises(ValueError, match=says):
        layout(memoryview(head), len(head) + 128)


def test_a_gguf_files_head_says_where_its_tensors_are() -> None:
    text = struct.pack("<Q", 4) + b"name" + struct.pack("<IQ", 8, 3) + b"abc"
    words = struct.pack("<Q", 5) + b"words" + struct.pack("<IIQ", 9, 8, 2) + 2 * (struct.pack("<Q", 1) + b"x")
    aligned = struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 64)
    head = gguf(("a", (64, 3), 8, 0), ("b", (4,), 1, 256), facts=text + words + aligned, count=3)
    base = -(-len(head) // 64) * 64
    slots = layout(memoryview(head), base + 264)
    assert [(s.shape, s.dtype, s.packed, s.start - base, s.stop - base) for s in slots.values()] == [
        ((3, 64), "float32", "Q8_0", 0, 204),
        ((4,), "float16", "", 256, 264),
    ]
    for end in range(len(head)):  # torn anywhere
        with pytest.raises(ValueError, match=r"its head|its tensor|it is no GGUF"):
            layout(memoryview(head)[:end], end)


def test_a_manifest_of_something_else_is_nobodys_business(tmp_path: Path) -> None:
    path = originals.write(zeros("a"), tmp_path / "mine.safetensors")
    (tmp_path / "manifest.json").write_text('{"name": "an app"}')
    assert examine(path).entry is None


def test_a_hash_is_found_once_for_a_file_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = originals.write(zeros("a"), tmp_path / "mine.safetensors")
    first = hashes.sha256(examine(path), tmp_path)
    (tmp_path / "hashes.json").write_text((tmp_path / "hashes.json").read_text().replace(first, "remembered"))
    assert hashes.sha256(examine(path), tmp_path) == "remembered"
    originals.write(zeros("a", "b"), path)
    other = hashes.sha256(examine(path), tmp_path)
    assert len({first, other, "remembered"}) == 3
    assert hashes.Hashing([given(path.name, tmp_path)], tmp_path).wait() == f"mine.safetensors@sha256:{other}"
    assert hashes.names(f"mine.safetensors@sha256:{other}, b@sha256:{first}") == ("mine.safetensors", "b")
    assert hashes.names("") == ()


def test_a_file_that_is_replaced_behind_its_header_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = (originals.write(zeros(name), tmp_path / f"{name}.safetensors") for name in "ab")
    read = single.layout.read_head

    def replacing(path: Path) -> Any:
        head = read(path)
        other.replace(path)
        return head

    monkeypatch.setattr(single.layout, "read_head", replacing)
    with pytest.raises(WeightsCorrupt, match="was replaced, or written to, while it was read"):
        hashes.sha256(examine(path), tmp_path)


def test_a_volume_that_nobody_may_write_or_understand_remembers_nothing(tmp_path: Path) -> None:
    path = originals.write(zeros("a"), tmp_path / "mine.safetensors")
    (tmp_path / "hashes.json").write_text("[]")
    nowhere = tmp_path / "nowhere"
    assert hashes.sha256(examine(path), nowhere) == hashes.sha256(examine(path), tmp_path)
    assert not nowhere.exists()
    stale = given(str(path), tmp_path)
    originals.write(zeros("a", "b"), path)
    with pytest.raises(WeightsCorrupt, match="was replaced, or written to, while it was read"):
        hashes.Hashing([stale], nowhere).wait()


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_whatever_is_wrong_with_a_head_is_one_error(kind: str, tmp_path: Path) -> None:
    """Each byte of it turned over, one after another."""
    note = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    kept = torch.zeros(4, 4).to(torch.float8_e4m3fn)
    weights = {"a.weight": kept, "a.weight_scale": torch.ones(()), "a.comfy_quant": note}
    path = originals.write(weights, tmp_path / "mine", _quantization_metadata='{"layers": {"b": {"format": "x"}}}')
    if kind == "gguf":
        fact = struct.pack("<Q", 1) + b"x" + struct.pack("<IB", 7, 1)
        head = gguf(("a", (64, 3), 8, 0), ("b", (4,), 1, 256), facts=fact, count=1)
        path.write_bytes(head + bytes(-len(head) % 32 + 264))
    whole = path.read_bytes()
    assert examine(path).slots
    for at in range(min(len(whole), 512)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with contextlib.suppress(WeightsCorrupt):
            examine(path)


def test_of_two_that_bring_the_same_one_is_refused(tmp_path: Path) -> None:
    weights = originals.backwards(load_file(WEIGHTS), FLUX)
    for name in ("first", "second"):
        originals.write(weights, tmp_path / f"{name}.safetensors")
    with pytest.raises(SettingsError, match=r"first\.safetensors would change nothing: others have all that it has"):
        overlay(["first.safetensors", "second.safetensors"], SPARK, model_source(SPARK, tmp_path), tmp_path)


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    weights = originals.backwards(load_file(WEIGHTS), FLUX)
    weights["img_in.weight"] = weights["img_in.weight"].to(torch.int32)
    originals.write(weights, tmp_path / "mine.safetensors")
    told = refused("mine.safetensors", tmp_path, kind=WeightsCorrupt)
    assert "keeps img_in.weight as int32 without a scale, and no model has such weights" in told


def test_a_manifest_that_is_none_of_ours_is_nobodys_business(tmp_path: Path) -> None:
    path = originals.write(zeros("a"), tmp_path / "mine.safetensors")
    (tmp_path / "manifest.json").write_text("[]")
    assert examine(path).entry is None


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64])
def test_matrices_that_are_no_floats_are_refused_before_anything_is_read(dtype: Any, tmp_path: Path) -> None:
    weights = originals.backwards(load_file(WEIGHTS), FLUX)
    originals.write({name: tensor.to(dtype) for name, tensor in weights.items()}, tmp_path / "mine.safetensors")
    told = refused("mine.safetensors", tmp_path, kind=WeightsCorrupt)
    assert f"as {str(dtype).removeprefix('torch.')} without a scale" in told
