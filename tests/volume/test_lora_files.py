"""Which file a LoRA's name means: never one outside its folder, never a pickle, and each fault is one line."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from handler.core.errors import InvalidValue
from handler.core.loras import Wanted
from handler.volume import adapters, named
from handler.volume.adapters import FOLDERS, Adapter, chosen, names
from handler.volume.named import LISTED

GOOD = {"x.lora_down.weight": torch.ones(1, 2), "x.lora_up.weight": torch.ones(2, 1), "x.alpha": torch.tensor(1.0)}


def put(path: Path, tensors: dict[str, Any] = GOOD, **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata or None)
    return path


def refusal(name: str, volume: Path) -> str:
    with pytest.raises(InvalidValue) as caught:
        chosen([Wanted(name)], volume)
    assert caught.value.param == "loras"
    assert str(volume) not in caught.value.message
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_name_is_a_file_in_a_folder_of_loras(folder: str, tmp_path: Path) -> None:
    path = put(tmp_path / folder / "styles/ink.safetensors")
    wanted = hashlib.sha256(path.read_bytes()).hexdigest()
    for name in ("styles/ink", "styles/ink.safetensors"):
        [found] = chosen([Wanted(name, 0.5)], tmp_path)
        assert (found.name, found.weight, found.sha256, found.path) == ("styles/ink", 0.5, wanted, path)


def test_the_first_folder_is_first(tmp_path: Path) -> None:
    first, second, *_ = (put(tmp_path / folder / "ink.safetensors") for folder in FOLDERS)
    put(second.with_name("other.safetensors"))
    assert [one.path for one in chosen([Wanted("ink")], tmp_path)] == [first]
    assert names(tmp_path) == ["ink", "other"]


def test_what_is_written_anew_is_another(tmp_path: Path) -> None:
    path = put(tmp_path / "loras/ink.safetensors")
    [before] = chosen([Wanted("ink")], tmp_path)
    assert chosen([Wanted("ink")], tmp_path) == (before,)
    put(path, {**GOOD, "x.alpha": torch.tensor(2.0)})
    os.utime(path, ns=(1, 1))
    [after] = chosen([Wanted("ink")], tmp_path)
    assert after.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() != before.sha256


def test_what_is_as_large_and_as_old_is_another_too(tmp_path: Path) -> None:
    """As from an archive, which keeps dates or has one for all."""
    path = put(tmp_path / "loras/ink.safetensors")
    os.utime(path, ns=(1, 1))
    [before] = chosen([Wanted("ink")], tmp_path)
    then = path.stat().st_ctime_ns
    while path.stat().st_ctime_ns == then:  # clocks of file systems have ticks
        put(path, {**GOOD, "x.alpha": torch.tensor(2.0)})
        os.utime(path, ns=(1, 1))
    [after] = chosen([Wanted("ink")], tmp_path)
    assert after.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() != before.sha256


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "/etc/secret", "..", ".", "a//b", "./a", "a\\b", "a/"])
def test_a_name_never_leads_out(name: str, tmp_path: Path) -> None:
    put(tmp_path / "secret.safetensors")
    (tmp_path / "loras/a").mkdir(parents=True)
    assert "is no name of a file below loras/" in refusal(name, tmp_path)


def test_a_link_never_leads_out(tmp_path: Path) -> None:
    secret, inside = put(tmp_path / "elsewhere/secret.safetensors"), put(tmp_path / "loras/ink.safetensors")
    (tmp_path / "loras/out.safetensors").symlink_to(secret)
    (tmp_path / "loras/folder").symlink_to(secret.parent)
    (tmp_path / "loras/again.safetensors").symlink_to(inside)
    for name in ("out", "folder/secret"):
        assert refusal(name, tmp_path) == f"loras: '{name}' leads out of its folder."
    assert [one.path for one in chosen([Wanted("again")], tmp_path)] == [inside]
    assert names(tmp_path) == ["again", "ink"]


def test_links_that_lead_in_a_circle_are_not_there(tmp_path: Path) -> None:
    put(tmp_path / "loras/ink.safetensors")
    (tmp_path / "loras/round.safetensors").symlink_to("round.safetensors")
    (tmp_path / FOLDERS[1]).parent.mkdir(parents=True)
    (tmp_path / FOLDERS[1]).symlink_to("loras")
    assert "there is no 'round' on the volume" in refusal("round", tmp_path)
    assert names(tmp_path) == ["ink"]


def test_names_that_no_request_can_say_are_not_listed(tmp_path: Path) -> None:
    path = put(tmp_path / "loras/ink.safetensors")
    for name in (b"\xff", b"a\x1b[31m", b"a\nb"):
        Path(os.fsdecode(os.fsencode(path.parent) + b"/" + name + b".safetensors")).write_bytes(path.read_bytes())
    assert names(tmp_path) == ["ink"]


@pytest.mark.parametrize("name", ["x\x1b[31m.alpha", "x" * 400 + ".alpha", "x\x1b[31m"])
def test_what_a_file_says_of_itself_is_told_in_one_short_line(name: str, tmp_path: Path) -> None:
    put(tmp_path / "loras/x.safetensors", {**GOOD, name: torch.tensor(1.0)})
    told = refusal("x", tmp_path)
    assert re.search(
        "it is no (LoRA: it has |whole safetensors file: it has a tensor whose name makes no sense: ')x", told
    )
    assert told.isprintable()
    assert len(told) < 200


def test_a_folder_of_loras_may_be_elsewhere(tmp_path: Path) -> None:
    path = put(tmp_path / "elsewhere/ink.safetensors")
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume/loras").symlink_to(path.parent)
    assert names(tmp_path / "volume") == ["ink"]
    assert [one.path for one in chosen([Wanted("ink")], tmp_path / "volume")] == [path]


def test_a_pickle_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras/old.ckpt").write_bytes(b"cos\nsystem\n")
    for name in ("old", "old.ckpt"):
        assert "'old.ckpt' is a pickle, which could run anything" in refusal(name, tmp_path)
    (tmp_path / "loras/old.safetensors").write_bytes(b"cos\nsystem\n")
    assert "'old' cannot be used: it is no whole safetensors file" in refusal("old", tmp_path)


def test_who_asks_for_what_is_not_there_is_told_what_is_near(tmp_path: Path) -> None:
    assert "there is no 'ink', nor any other: put safetensors files below loras/" in refusal("ink", tmp_path)
    for name in ("styles/Inkwash", "pixel", "oil"):
        put(tmp_path / f"loras/{name}.safetensors")
    assert refusal("inkwsh", tmp_path).endswith("there is no 'inkwsh' on the volume. Did you mean styles/Inkwash?")
    assert refusal("qqqq", tmp_path).endswith("There is oil, pixel, styles/Inkwash.")
    assert "cannot be read: File name too long" in refusal("ä" * 200, tmp_path)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({**GOOD, "x.dora_scale": torch.ones(1)}, "a DoRA"),
        ({"diffusion_model.x.lokr_w1": torch.ones(1)}, "a LoKr"),
        ({"x.hada_w1_a": torch.ones(1)}, "a LoHa"),
        ({**GOOD, "x.lora_mid.weight": torch.ones(1)}, "a LoCon with a core"),
        ({**GOOD, "x.diff_b": torch.ones(1)}, "more than a LoRA"),
        ({"model.diffusion_model.out.weight": torch.ones(1)}, "no LoRA: it has model.diffusion_model.out.weight"),
        ({}, "empty"),
        ({**GOOD, "x.lora_up.weight": torch.ones(2, 1).to(torch.float8_e4m3fn)}, "kept in float8_e4m3fn"),
    ],
)
def test_what_is_no_lora_is_refused_by_its_header(tensors: dict[str, Any], told: str, tmp_path: Path) -> None:
    put(tmp_path / "loras/x.safetensors", tensors)
    assert f"loras: 'x' cannot be used: it is {told}" in refusal("x", tmp_path)
    assert names(tmp_path) == []
    assert told in adapters.adapters(tmp_path)[0].fault


def test_a_torn_and_a_huge_file_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "loras/x.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr(adapters, "hashed", None)
    assert "'x' cannot be used: it is no whole safetensors file: its tensors end at byte" in refusal("x", tmp_path)
    os.truncate(path, adapters.LARGEST + 1)  # a hole, which takes no room
    assert "'x' cannot be used: it is too large: it has 4.3 GB" in refusal("x", tmp_path)


def test_what_its_maker_says_is_listed(tmp_path: Path) -> None:
    tags = {"1_ink": {"cat": 3, "ink style": 9}, "2": {"cat": 1}}
    put(tmp_path / "loras/a.safetensors", ss_tag_frequency=json.dumps(tags), ss_base_model_version="sdxl_base_v1-0")
    put(
        tmp_path / "loras/b.safetensors",
        **{"modelspec.trigger_phrase": "a\nb", "modelspec.architecture": "flux-1-dev/lora"},
    )
    huge = f'{{"a": {{"b": 0.5}}, "c": {{"b": {2**1024 - 1}}}}}'
    for number, text in enumerate(("[1]", '{"a": 7}', "{", '{"a": {"b": "c"}}', huge)):
        put(tmp_path / f"loras/c{number}.safetensors", ss_tag_frequency=text)
    found = {one.name: one for one in adapters.adapters(tmp_path)}
    size = (tmp_path / "loras/a.safetensors").stat().st_size
    assert found["a"] == Adapter("a", size, "sdxl_base_v1-0", ("ink style", "cat"))
    assert (found["b"].made_for, found["b"].trigger_words) == ("flux-1-dev/lora", ("ab",))
    assert all(found[f"c{number}"].trigger_words == () for number in range(5))


def test_a_list_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "LISTED", 2)
    for name in ("a", "b/c", "d", ".hidden", ".folder/x"):
        put(tmp_path / f"loras/{name}.safetensors")
    os.mkfifo(tmp_path / "loras/pipe.safetensors")
    assert names(tmp_path) == ["a", "d"]
    assert LISTED > 100


def test_files_that_no_request_can_name_are_not_listed(tmp_path: Path) -> None:
    put(tmp_path / "loras/ink.safetensors")
    for name in (b"bad\xff", b"two\nlines", b"\x1b[31m", b"back\\slash", b"twice.safetensors", b"a" * 201):
        put(tmp_path / "loras/other.safetensors").rename(tmp_path / "loras" / os.fsdecode(name + b".safetensors"))
    assert names(tmp_path) == ["ink"]
    assert refusal("in", tmp_path) == "loras: there is no 'in' on the volume. Did you mean ink?"


def test_a_link_to_itself_is_no_file(tmp_path: Path) -> None:
    put(tmp_path / "loras/ink.safetensors")
    (tmp_path / "loras/loop.safetensors").symlink_to("loop.safetensors")
    (tmp_path / "loras/folder").symlink_to("folder")
    (tmp_path / "ComfyUI/models").mkdir(parents=True)
    (tmp_path / "ComfyUI/models/loras").symlink_to("loras")
    for name in ("loop", "folder/ink"):
        assert f"there is no '{name}'" in refusal(name, tmp_path)
    assert names(tmp_path) == ["ink"]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"<!DOCTYPE html>", "a web page"),
        (b"PK\x03\x04" + bytes(9), "a pickle"),
        (b"version https://git-lfs", "Git LFS"),
    ],
)
def test_what_has_only_a_loras_name_is_told_for_what_it_is(data: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras/ink.safetensors").write_bytes(data)
    assert "is no safetensors file. It is " in (told := refusal("ink", tmp_path))
    assert what in told


@pytest.mark.parametrize("name", ["\x1b[31m\nx.lora_down.weight", "x" * 501])
def test_names_of_tensors_that_nobody_should_be_told_are_refused(name: str, tmp_path: Path) -> None:
    put(tmp_path / "loras/ink.safetensors", {name: torch.ones(1, 2)})
    assert "a tensor whose name makes no sense" in refusal("ink", tmp_path)
