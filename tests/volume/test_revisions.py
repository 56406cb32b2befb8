"""At which commit a model is whose row names none: the hub's main, asked once, and from then on the volume's."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from test_fetch import hub as hub
from test_fetch import never, stored

from handler import MODELS
from handler.__main__ import main
from handler.core.errors import FetchFailed, WeightsMissing
from handler.volume.download import fetch
from handler.volume.hubcache import HUB_CACHE
from handler.volume.listing import INDEX
from handler.volume.manifest import MANIFEST, read_manifest
from handler.volume.revisions import settled
from handler.volume.sources import fetched_folder, model_source
from hub_plane import MAIN, Hub, Trouble
from hub_plane import Repository as Shelf

SD15, SCHNELL = MODELS["sd1.5"], MODELS["flux-schnell"]
ONE, TWO = "1" * 40, "0" * 40  # the later one is the first by name
PARTS = {
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
UNET = "unet/diffusion_pytorch_model.fp16.safetensors"
WEIGHTS = {
    "text_encoder/model.safetensors": "text_encoder/model.fp16.safetensors",
    "unet/diffusion_pytorch_model.safetensors": UNET,
    "vae/diffusion_pytorch_model.safetensors": "vae/diffusion_pytorch_model.fp16.safetensors",
}
SMALL = """
scheduler/scheduler_config.json text_encoder/config.json tokenizer/merges.txt tokenizer/special_tokens_map.json
tokenizer/tokenizer_config.json tokenizer/vocab.json unet/config.json vae/config.json
""".split()  # noqa: SIM905
LEFT = """
README.md v1-5-pruned-emaonly.safetensors v1-5-pruned.ckpt v1-inference.yaml feature_extractor/preprocessor_config.json
safety_checker/config.json safety_checker/model.fp16.safetensors safety_checker/model.safetensors
safety_checker/pytorch_model.bin text_encoder/model.safetensors unet/diffusion_pytorch_model.non_ema.safetensors
unet/diffusion_pytorch_model.safetensors unet/diffusion_pytorch_model.fp16.bin vae/diffusion_pytorch_model.safetensors
""".split()  # noqa: SIM905


def open_sd15(hub: Hub, commit: str) -> Shelf:
    """SD1.5's files as the hub lists them; what is in them tells the commit."""
    shelf = hub.open(SD15.repository, commit)
    for name in [*WEIGHTS.values(), *SMALL, *LEFT]:
        shelf.add(name, f"{name} at {commit}".encode())
    shelf.add(INDEX, json.dumps({"_class_name": "StableDiffusionPipeline", **PARTS}).encode())
    return shelf


def questions(hub: Hub) -> int:
    """How often the hub was asked what main is."""
    return sum(asked.path == MAIN for asked in hub.asked)


def test_main_is_looked_up_once_recorded_and_told(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shelf = open_sd15(hub, ONE)
    monkeypatch.setenv("KINDLING_VOLUME", str(tmp_path))
    assert main(["fetch", "sd1.5"]) == 0
    folder = tmp_path / "models" / "sd1.5" / ONE
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"sd1.5 is at {ONE}: what main was when this volume first asked, and for it stays."
    assert re.fullmatch(rf"sd1\.5: 12 files, 0\.0 GB in {re.escape(str(folder))}, \d+ s", second)
    found = stored(folder)
    assert set(found) == {*WEIGHTS, *SMALL, INDEX, MANIFEST}  # no safety checker, and nothing of it
    for path, file in WEIGHTS.items():
        assert found[path] == shelf.files[file].data
    manifest = read_manifest(folder)
    assert manifest
    assert manifest.facts == {"model": "sd1.5", "repository": SD15.repository, "revision": ONE}
    assert settled(SD15, tmp_path) == replace(SD15, revision=ONE)
    assert questions(hub) == 1

    open_sd15(hub, TWO)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = len(hub.asked)
    assert main(["fetch", "sd1.5", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["revision"], said["downloaded"]) == (ONE, False)
    assert len(hub.asked) == before
    assert model_source(settled(SD15, tmp_path), tmp_path).folder == folder


def test_a_fetch_goes_on_where_it_began_though_main_has_moved(hub: Hub, tmp_path: Path) -> None:
    """Files of two commits are never mixed, not even under one name."""
    open_sd15(hub, ONE)
    hub.trouble("GET", UNET, Trouble(403))
    with pytest.raises(FetchFailed, match="403"):
        fetch(SD15, tmp_path, wait=never)
    assert settled(SD15, tmp_path).revision == ""
    with pytest.raises(WeightsMissing, match=r"sd1\.5 is incomplete: .* python -m handler fetch sd1\.5"):
        model_source(SD15, tmp_path)
    open_sd15(hub, TWO)
    fetched = fetch(SD15, tmp_path, wait=never)
    assert (fetched.revision, questions(hub)) == (ONE, 1)
    found = stored(fetched.folder)
    assert all(found[path].endswith(ONE.encode()) for path in [*WEIGHTS, *SMALL])
    assert [path.name for path in fetched.folder.parent.iterdir() if path.is_dir()] == [ONE]


def test_a_volume_of_its_own_gets_what_main_is_then(hub: Hub, tmp_path: Path) -> None:
    open_sd15(hub, ONE)
    open_sd15(hub, TWO)
    assert fetch(SD15, tmp_path, wait=never).revision == TWO


def test_what_a_damaged_volume_lacks_comes_at_its_commit(hub: Hub, tmp_path: Path) -> None:
    open_sd15(hub, ONE)
    folder = fetch(SD15, tmp_path, wait=never).folder
    (folder / "unet/config.json").write_text("cut")
    open_sd15(hub, TWO)
    again = fetch(SD15, tmp_path, wait=never)
    assert (again.folder, again.downloaded, questions(hub)) == (folder, True, 1)
    assert (folder / "unet/config.json").read_text().endswith(ONE)


@pytest.mark.parametrize(
    ("commit", "told"), [("../../../escaped", r"the hub says that main is \.\./"), ("1" * 39, "which is no commit")]
)
def test_only_a_commit_names_a_folder(commit: str, told: str, hub: Hub, tmp_path: Path) -> None:
    open_sd15(hub, ONE)
    hub.trouble("GET", MAIN, Trouble(body=commit.encode()))
    with pytest.raises(FetchFailed, match=told):
        fetch(SD15, tmp_path, wait=never)
    assert [path.name for path in tmp_path.rglob("*") if path.is_dir()] == ["models", "sd1.5"]


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        ("offline", "HF_HUB_OFFLINE is set; unset it to fetch"),
        ("unknown", "The hub shows no stable-diffusion-v1-5/stable-diffusion-v1-5 at main"),
    ],
)
def test_without_a_hub_there_is_nothing_to_go_by(
    trouble: str, told: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", trouble == "offline")
    with pytest.raises(FetchFailed, match=told):
        fetch(SD15, tmp_path, wait=never)
    assert settled(SD15, tmp_path).revision == ""


def cached(volume: Path, *commits: str, main: str = "") -> Path:
    """A hub cache as RunPod puts it there; its folder of snapshots."""
    folder = volume / HUB_CACHE / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    for commit in commits:
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / INDEX).write_text("{}")
    if main:
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(main)
    return folder / "snapshots"


@pytest.mark.parametrize(
    ("commits", "named", "used"),
    [((ONE,), "", ONE), ((ONE,), TWO, ONE), ((ONE, TWO), ONE, ONE), ((ONE, TWO), f"{TWO}\n", TWO)],
)
def test_a_hub_cache_says_it_by_its_snapshots(commits: Any, named: str, used: str, tmp_path: Path) -> None:
    snapshots = cached(tmp_path, *commits, main=named)
    found = settled(SD15, tmp_path)
    assert found.revision == used
    assert model_source(found, tmp_path).folder == snapshots / used


@pytest.mark.parametrize("named", ["", "2" * 40, "../../x"])
def test_a_hub_cache_that_leaves_it_open_is_not_guessed_at(named: str, tmp_path: Path) -> None:
    cached(tmp_path, ONE, TWO, main=named)
    found = settled(SD15, tmp_path)
    assert found.revision == ""
    with pytest.raises(WeightsMissing, match=f"there are {TWO}, {ONE}, and no refs/main says which"):
        model_source(found, tmp_path)


def test_what_was_fetched_goes_before_a_hub_cache_and_a_fetch_takes_the_caches_commit(hub: Hub, tmp_path: Path) -> None:
    open_sd15(hub, ONE)
    open_sd15(hub, TWO)
    cached(tmp_path, ONE)
    fetched = fetch(SD15, tmp_path, wait=never)
    assert (fetched.revision, questions(hub)) == (ONE, 0)
    assert model_source(settled(SD15, tmp_path), tmp_path).folder == fetched.folder


def test_a_row_that_names_its_commit_asks_nobody(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "models" / SCHNELL.id / ONE).mkdir(parents=True)
    assert settled(SCHNELL, tmp_path) is SCHNELL
    assert fetch(SCHNELL, tmp_path, wait=never).folder == fetched_folder(SCHNELL, tmp_path)
    assert questions(hub) == 0
