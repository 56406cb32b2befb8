"""Which file an embedding's name means: in its folders alone, safetensors alone, and each fault is one line."""

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from handler.core.errors import InvalidValue
from handler.volume import embeddings
from handler.volume.embeddings import KEPT, MOST, chosen, names


def put(path: Path, **tensors: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors or {"emb_params": torch.ones(2, 8)}, path)
    return path


def refusal(name: str, volume: Path) -> str:
    with pytest.raises(InvalidValue) as caught:
        chosen([name], volume)
    assert caught.value.param == "prompt"
    assert str(volume) not in caught.value.message
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("folder", KEPT.folders)
def test_a_name_is_a_file_in_a_folder_of_embeddings(folder: str, tmp_path: Path) -> None:
    path = put(tmp_path / folder / "styles/ink.safetensors")
    for name in ("styles/ink", "styles/ink.safetensors"):
        [found] = chosen([name], tmp_path)
        assert (found.name, found.path) == (name, path)
        assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert names(tmp_path) == ["styles/ink"]


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "/etc/secret", "..", "a//b", "a\\b", "a\0b"])
def test_a_name_never_leads_out(name: str, tmp_path: Path) -> None:
    put(tmp_path / "secret.safetensors")
    (tmp_path / "embeddings/a").mkdir(parents=True)
    assert "is no name of a file below embeddings/" in refusal(name, tmp_path)


def test_a_link_does_not_either(tmp_path: Path) -> None:
    secret = put(tmp_path / "secret.safetensors")
    (tmp_path / "embeddings").mkdir()
    os.symlink(secret, tmp_path / "embeddings/ink.safetensors")
    assert "leads out of its folder" in refusal("ink", tmp_path)
    assert names(tmp_path) == []


def test_one_that_is_not_there_is_told_with_what_there_is(tmp_path: Path) -> None:
    told = "there is no 'ink', nor any other: put safetensors files below embeddings/ on the volume"
    assert told in refusal("ink", tmp_path)
    put(tmp_path / "embeddings/inks.safetensors")
    put(tmp_path / "loras/ink.safetensors")
    assert "Did you mean inks?" in refusal("ink", tmp_path)
    (tmp_path / "embeddings/old.pt").write_bytes(b"x")
    assert "'old.pt' is a pickle" in refusal("old", tmp_path)


@pytest.mark.parametrize(
    ("tensor", "told"),
    [
        (torch.ones(2, 2, 2), "no embedding, which has a list of vectors: x is [2, 2, 2]"),
        (torch.ones(MOST + 1, 1), "no embedding"),
        (torch.ones(0, 8), "no embedding"),
        (torch.tensor(1.0), "no embedding"),
        (torch.ones(2, 8, dtype=torch.int8), "kept in int8, and should be in 16 or 32 bits: x"),
    ],
)
def test_what_is_none_is_refused(tensor: torch.Tensor, told: str, tmp_path: Path) -> None:
    put(tmp_path / "embeddings/ink.safetensors", x=tensor)
    assert f"embedding 'ink' cannot be used: it is {told}" in refusal("ink", tmp_path)


def test_a_torn_and_a_huge_file_are_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "embeddings/ink.safetensors")
    os.truncate(path, path.stat().st_size - 1)
    assert "no whole safetensors file" in refusal("ink", tmp_path)
    os.truncate(path, embeddings.LARGEST + 1)  # a hole, which takes no room
    assert "too large: it has 67 MB" in refusal("ink", tmp_path)
    put(tmp_path / "embeddings/none.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert "it is empty" in refusal("none", tmp_path)


def test_a_vector_alone_is_one(tmp_path: Path) -> None:
    put(tmp_path / "embeddings/ink.safetensors", x=torch.ones(2048))
    assert len(chosen(["ink"], tmp_path)) == 1
