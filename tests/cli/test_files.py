"""The list of people's own files, in `models` and `doctor`."""

import json
import os
from pathlib import Path

import originals
import pytest
import torch

from handler.__main__ import main
from handler.cli.files import FileState, files, lines
from handler.volume.hashes import sha256
from handler.volume.single import examine

FLUX = {
    "double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(4),
    "guidance_in.in_layer.weight": torch.zeros(4, 4),
}


def volume_of_files(volume: Path) -> Path:
    originals.write({n: t.bfloat16() for n, t in FLUX.items()}, volume / "ComfyUI/models/unet/flux.safetensors")
    originals.write({"x.lora_down.weight": torch.zeros(2, 2)}, volume / "loras/style.safetensors")
    (volume / "checkpoints").mkdir()
    (volume / "checkpoints/old.ckpt").write_bytes(b"PK\x03\x04")
    (volume / "checkpoints/notes.txt").write_bytes(b"")
    return volume


def test_a_name_that_is_no_text_is_listed_too(tmp_path: Path) -> None:
    os.close(os.open(os.fsencode(tmp_path) + b"/\xff.ckpt", os.O_CREAT))
    [file] = files(tmp_path)
    assert file.name == "\\udcff.ckpt"
    assert "\n".join(lines([file])).encode()


def test_files_are_listed_with_what_they_are_and_who_takes_them(tmp_path: Path) -> None:
    path = volume_of_files(tmp_path) / "ComfyUI/models/unet/flux.safetensors"
    known = sha256(examine(path), tmp_path)
    old = files(tmp_path)[1]
    assert files(tmp_path) == [
        FileState("ComfyUI/models/unet/flux.safetensors", "FLUX.1 [dev]", "bf16", ("flux-dev",), known),
        old,
        FileState("loras/style.safetensors", "a LoRA. A LoRA is no model: it changes one.", "fp32"),
    ]
    assert old.name == "checkpoints/old.ckpt"
    assert "It is a pickle" in old.what
    assert lines([]) == []
    assert lines(files(tmp_path))[1].split() == [
        "ComfyUI/models/unet/flux.safetensors", "bf16", "FLUX.1", "[dev];", "for", "flux-dev",
    ]  # fmt: skip


def test_a_file_that_was_replaced_has_no_hash_of_the_one_before(tmp_path: Path) -> None:
    path = originals.write(FLUX, tmp_path / "unet/flux.safetensors")
    sha256(examine(path), tmp_path)
    originals.write({name: tensor + 1 for name, tensor in FLUX.items()}, path)
    assert files(tmp_path)[0].sha256 == ""


@pytest.mark.parametrize("verb", ["models", "doctor"])
def test_both_verbs_list_them(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KINDLING_VOLUME", str(volume_of_files(tmp_path)))
    assert main([verb]) == 0
    assert "FLUX.1 [dev]; for flux-dev" in capsys.readouterr().out
    assert main([verb, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["files"]) == 3


def test_a_files_name_is_one_line_whatever_it_has(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / os.fsdecode(b"vae/\x1b[31mtwo\nlines\xff.safetensors")).write_bytes(b"<html>")
    [found] = files(tmp_path)
    assert found.name == "vae/[31mtwolines\\udcff.safetensors"
    assert found.what.isprintable()
