"""`fetch`, with the hub's real client against a hub on loopback."""

import errno
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import unwarmed
from huggingface_hub.utils import _http, close_session
from safetensors.torch import save

from handler import MODELS, Settings, Worker
from handler.__main__ import main
from handler.catalog.parts import Graft
from handler.core.errors import FetchFailed, SettingsError, VolumeFailed, WeightsCorrupt, WeightsMissing
from handler.core.loras import pin
from handler.core.request import ImageRequest
from handler.volume import vouched
from handler.volume.autoencoder import fetched_vae
from handler.volume.download import fetch, fetch_lora, fetch_vae, fetch_weights
from handler.volume.fetched import Fetched
from handler.volume.files import Item
from handler.volume.given import given, located
from handler.volume.hashes import content, sha256
from handler.volume.hub import Repository, explained
from handler.volume.incoming import alone, begin, incoming
from handler.volume.manifest import checked, summarize
from handler.volume.single import examine
from handler.volume.sources import EMBEDDED, fetched_folder, model_source
from hub_plane import DEADLINE_S, TREE, Hub, Trouble
from hub_plane import Repository as Shelf

ROOT = Path(__file__).parents[2]
SCHNELL, DEV = MODELS["flux-schnell"], MODELS["flux-dev"]
INDEX: dict[str, Any] = json.loads((EMBEDDED / "spark" / "model_index.json").read_bytes())  # FLUX's, as on the hub
NEEDED = """
LICENSE.md model_index.json scheduler/scheduler_config.json
text_encoder/config.json text_encoder/model.safetensors
text_encoder_2/config.json text_encoder_2/model-00001-of-00002.safetensors
text_encoder_2/model-00002-of-00002.safetensors text_encoder_2/model.safetensors.index.json
tokenizer/merges.txt tokenizer/special_tokens_map.json tokenizer/tokenizer_config.json tokenizer/vocab.json
tokenizer_2/special_tokens_map.json tokenizer_2/spiece.model tokenizer_2/tokenizer.json
tokenizer_2/tokenizer_config.json
transformer/config.json transformer/diffusion_pytorch_model-00001-of-00003.safetensors
transformer/diffusion_pytorch_model-00002-of-00003.safetensors
transformer/diffusion_pytorch_model-00003-of-00003.safetensors
transformer/diffusion_pytorch_model.safetensors.index.json vae/config.json vae/diffusion_pytorch_model.safetensors
""".split()  # noqa: SIM905
LEFT = [".gitattributes", "README.md", "ae.safetensors", "flux1-schnell.safetensors", "schnell_grid.jpeg"]
WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
CONFIG = "vae/config.json"
LIGHTNING, SDXL = MODELS["sdxl-lightning"], MODELS["sdxl"]
UNET = "unet/diffusion_pytorch_model.safetensors"
SHARDS = "text_encoder_2/model.safetensors.index.json"
SDXL_PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae")
# SDXL's files by the names they get here. Its second encoder is in shards here, and its VAE has no variant.
SDXL_FILES = {
    "text_encoder/model.safetensors": "text_encoder/model.fp16.safetensors",
    "text_encoder_2/model-00001-of-00002.safetensors": "text_encoder_2/model.fp16-00001-of-00002.safetensors",
    "text_encoder_2/model-00002-of-00002.safetensors": "text_encoder_2/model.fp16-00002-of-00002.safetensors",
    SHARDS: "text_encoder_2/model.safetensors.index.fp16.json",
    UNET: "unet/diffusion_pytorch_model.fp16.safetensors",
    "vae/diffusion_pytorch_model.safetensors": "vae/diffusion_pytorch_model.safetensors",
} | {
    name: name
    for name in (
        *("LICENSE.md", "model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"),
        *("tokenizer_2/merges.txt", *(f"{part}/config.json" for part in SDXL_PARTS if "tokenizer" not in part)),
    )
}
SDXL_LEFT = """
README.md sd_xl_base_1.0.safetensors text_encoder/model.safetensors text_encoder/model.onnx
text_encoder_2/model.safetensors unet/diffusion_pytorch_model.safetensors vae_1_0/config.json
vae/diffusion_pytorch_model.fp16.bin
""".split()  # noqa: SIM905
VAE_REVISION = "207b116dae70ace3637169f1ddd2434b91b3a8cd"
VAE = f"madebyollin/sdxl-vae-fp16-fix@{VAE_REVISION}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with a small FLUX.1-schnell, to which this process's client is pointed; `hub.waits` are its waits."""
    with Hub() as hub:
        schnell = hub.open(SCHNELL.repository, SCHNELL.revision)
        for name in [*NEEDED, *LEFT]:
            schnell.add(name, json.dumps(INDEX).encode() if name == "model_index.json" else name.encode() * 9)
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield hub
        close_session()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client would have waited."""
    seconds: list[float] = []
    for module in (_http, sys.modules["huggingface_hub.file_download"]):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=seconds.append))
    return seconds


def open_sdxl(hub: Hub) -> Shelf:
    """Let `hub` have a small SDXL with fp16 variants, too."""
    sdxl = hub.open(SDXL.repository, SDXL.revision)
    for name in [*SDXL_FILES.values(), *SDXL_LEFT]:
        sdxl.add(name, name.encode() * 9)
    sdxl.add("model_index.json", json.dumps({part: ["a library", "Class"] for part in SDXL_PARTS}).encode())
    shards = {f"{n}.weight": f"model.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)}
    sdxl.add(SDXL_FILES[SHARDS], json.dumps({"metadata": {"total_size": 2}, "weight_map": shards}).encode())
    return sdxl


def open_lightning(hub: Hub) -> Shelf:
    """Let `hub` have the files grafted onto SDXL, too."""
    lightning = hub.open(LIGHTNING.repository, LIGHTNING.revision)
    for name in ("sdxl_lightning_4step_unet.safetensors", "sdxl_lightning_8step_unet.safetensors", "README.md"):
        lightning.add(name, name.encode() * 9)
    return lightning


def open_vae(hub: Hub, kind: str = "AutoencoderKL") -> Shelf:
    """Let `hub` have an autoencoder, too."""
    vae = hub.open(*VAE.split("@"))
    for name in ("README.md", "sdxl.vae.safetensors", "diffusion_pytorch_model.bin", CONFIG, WEIGHTS):
        vae.add(name.removeprefix("vae/"), name.encode() * 9)
    vae.add("config.json", json.dumps({"_class_name": kind}).encode())
    return vae


def asked(hub: Hub, since: int = 0) -> list[tuple[str, str]]:
    """What has been downloaded: repository and file."""
    return sorted((one.repository, one.path) for one in hub.downloads()[since:])


def stored(folder: Path) -> dict[str, bytes]:
    """All files of `folder` and what is in them."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def never(seconds: float) -> None:
    raise AssertionError(f"waited {seconds} s")


@contextmanager
def started(
    hub: Hub,
    volume: Path,
    *arguments: str,
    stderr: int = subprocess.PIPE,
    handler: tuple[str, str] = ("-m", "handler"),
) -> Iterator[subprocess.Popen[str]]:
    """A real `python -m handler fetch flux-schnell`, ended afterwards if it has not."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE", "KINDLING_"))}
    told = {"HF_ENDPOINT": hub.url, "HF_HOME": str(volume / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    with subprocess.Popen(
        [sys.executable, *handler, "fetch", "flux-schnell", *arguments],
        cwd=ROOT,
        env={**kept, **told, "KINDLING_VOLUME": str(volume)},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def held(volume: Path, besides: str = "/") -> set[str]:
    """All files of the fetched folder, besides those whose names begin so."""
    folder = fetched_folder(SCHNELL, volume)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not name.startswith(besides)}


def assert_complete(hub: Hub, volume: Path) -> None:
    assert held(volume) == {*NEEDED, "manifest.json"}
    source = model_source(SCHNELL, volume)
    assert source.manifest
    assert source.manifest.facts == {
        "model": "flux-schnell",
        "repository": SCHNELL.repository,
        "revision": SCHNELL.revision,
    }
    assert set(source.manifest.files) == set(NEEDED)
    for name, entry in source.manifest.files.items():
        assert (source.folder / name).read_bytes() == hub.first.files[name].data
        assert entry.sha256 == hub.first.files[name].sha256


def test_the_command_brings_exactly_what_is_needed(hub: Hub, tmp_path: Path) -> None:
    with started(hub, tmp_path, "--json") as process:
        out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, err) == (0, "")
    said = json.loads(out)
    assert said["folder"] == str(fetched_folder(SCHNELL, tmp_path))
    assert said["files"] == sorted(NEEDED)
    assert said["bytes"] == sum(len(hub.first.files[name].data) for name in NEEDED)
    assert said["seconds"] > 0
    assert said["downloaded"]
    assert_complete(hub, tmp_path)
    assert sorted(asked.path for asked in hub.downloads()) == sorted(NEEDED)


def test_a_terminal_sees_progress(hub: Hub, tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with started(hub, tmp_path, stderr=theirs) as process:
        os.close(theirs)
        out, _ = process.communicate(timeout=DEADLINE_S)
    seen = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "flux-schnell: 24 files, 0.0 GB in" in out
    assert "100%" in seen


def test_a_repository_has_the_files_of_all_its_folders(hub: Hub) -> None:
    found = Repository(SCHNELL.repository, SCHNELL.revision).files()
    assert set(found) == {*NEEDED, *LEFT}
    assert found[WEIGHTS].size == len(hub.first.files[WEIGHTS].data)


def test_what_is_complete_needs_no_network(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fetch(SCHNELL, tmp_path, wait=never)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    again = fetch(SCHNELL, tmp_path, wait=never)
    assert (again.files, again.bytes, again.folder) == (first.files, first.bytes, first.folder)
    assert (first.downloaded, again.downloaded) == (True, False)


def test_nothing_to_fetch_for_an_embedded_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "spark"]) == 0
    assert "nothing to fetch" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_it_wants_no_gpu(
    device: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a container without one, on a machine that has one; nor is that machine's memory what will count."""
    monkeypatch.setattr("handler.model.hardware.GPU_DRIVER", tmp_path)
    monkeypatch.setattr("handler.model.hardware.host_memory", lambda: 1e9)
    monkeypatch.setenv("KINDLING_VOLUME", str(tmp_path))
    monkeypatch.setenv("KINDLING_DEVICE", device)
    assert main(["fetch", SCHNELL.id]) == 0
    assert "does not fit" not in capsys.readouterr().err


def test_a_licence_with_obligations_is_shown(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.first.name, hub.first.revision = DEV.repository, DEV.revision
    monkeypatch.setenv("KINDLING_VOLUME", str(tmp_path))
    assert main(["fetch", "quality"]) == 0
    said = capsys.readouterr()
    assert DEV.license.obligation in said.err
    assert "flux-dev: 24 files" in said.out
    assert main(["fetch", "flux-dev"]) == 0
    assert "already complete" in capsys.readouterr().out


def test_it_waits_as_long_as_the_hub_asks(hub: Hub, tmp_path: Path, waits: list[float]) -> None:
    hub.trouble("GET", TREE, Trouble(429, {"Retry-After": "30"}), Trouble(503))
    hub.trouble("GET", CONFIG, Trouble(429, {"Retry-After": "7"}))
    hub.trouble("GET", WEIGHTS, Trouble(503, {"Retry-After": "9"}), Trouble(500), Trouble(502, {"Retry-After": "9999"}))
    ours: list[float] = []
    fetch(SCHNELL, tmp_path, wait=ours.append)
    assert_complete(hub, tmp_path)
    assert waits == [31, 2, 8]
    assert ours == [9, 2, 300]


@pytest.mark.parametrize("asked", ["Sat, 28 Nov 2026 12:00:00 GMT", "-3", "\N{SUPERSCRIPT TWO}", "9" * 5000])
def test_what_the_hub_asks_for_in_no_number_is_a_try_like_others(hub: Hub, tmp_path: Path, asked: str) -> None:
    hub.trouble("GET", WEIGHTS, Trouble(503, {"Retry-After": asked}))
    ours: list[float] = []
    fetch(SCHNELL, tmp_path, wait=ours.append)
    assert ours == [1]


def test_a_cut_download_goes_on_where_it_was(hub: Hub, tmp_path: Path, waits: list[float]) -> None:
    hub.first.add(WEIGHTS, os.urandom(12_000_000))
    hub.trouble("GET", WEIGHTS, Trouble(cut=11_000_000))
    fetch(SCHNELL, tmp_path, wait=never)
    assert_complete(hub, tmp_path)
    first, second = hub.downloads(WEIGHTS)
    assert (first.first_byte, waits) == (0, [1])
    assert second.first_byte >= 10_000_000


def test_a_reset_connection_is_tried_again(hub: Hub, tmp_path: Path) -> None:
    hub.trouble("GET", WEIGHTS, Trouble(cut=5, reset=True))
    ours: list[float] = []
    fetch(SCHNELL, tmp_path, wait=ours.append)
    assert_complete(hub, tmp_path)
    assert ours == [1]


def test_it_gives_up_in_the_end_and_goes_on_later(hub: Hub, tmp_path: Path) -> None:
    hub.trouble("GET", WEIGHTS, *[Trouble(500)] * 5)
    ours: list[float] = []
    with pytest.raises(FetchFailed, match="500 Internal Server Error; try again later"):
        fetch(SCHNELL, tmp_path, wait=ours.append)
    assert ours == [1, 2, 4, 8]
    assert held(tmp_path, ".coming") == {*NEEDED} - {WEIGHTS}
    before = len(hub.downloads())
    fetch(SCHNELL, tmp_path, wait=never)
    assert [asked.path for asked in hub.downloads()[before:]] == [WEIGHTS]
    assert_complete(hub, tmp_path)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "model_index.json"])
def test_wrong_bytes_are_fetched_once_more(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.trouble("GET", name, Trouble(body=bytes(len(hub.first.files[name].data))))
    fetch(SCHNELL, tmp_path, wait=never)
    assert_complete(hub, tmp_path)
    assert len(hub.downloads(name)) == 2


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_bytes_that_stay_wrong_are_an_error(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.trouble("GET", name, *[Trouble(body=bytes(len(hub.first.files[name].data)))] * 2)
    with pytest.raises(FetchFailed, match=f"{name} came with wrong bytes"):
        fetch(SCHNELL, tmp_path, wait=never)
    assert not held(tmp_path) & {name, "manifest.json"}


def test_a_damaged_folder_is_repaired(hub: Hub, tmp_path: Path) -> None:
    folder = fetch(SCHNELL, tmp_path, wait=never).folder
    (folder / WEIGHTS).unlink()
    (folder / CONFIG).write_bytes(b"short")
    before = len(hub.downloads())
    assert fetch(SCHNELL, tmp_path, wait=never).downloaded
    assert {asked.path for asked in hub.downloads()[before:]} == {WEIGHTS, CONFIG}
    assert_complete(hub, tmp_path)


@pytest.mark.parametrize("token", ["", "stranger"])
def test_a_gated_model_tells_where_its_licence_is(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    hub.first.members = {"member"}
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(
        FetchFailed, match=f"accept its licence at https://huggingface.co/{SCHNELL.repository}.*HF_TOKEN"
    ):
        fetch(SCHNELL, tmp_path, wait=never)


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_a_member_gets_a_gated_model(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    hub.first.members = {"member"}
    monkeypatch.setenv(variable, "member")
    fetch(SCHNELL, tmp_path, wait=never)
    assert_complete(hub, tmp_path)
    assert {asked.token for asked in hub.asked} == {"member"}


def test_no_token_goes_over_http_to_another_machine(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "member")
    constants, near = huggingface_hub.constants, hub.url.replace("127.0.0.1", "0.0.0.0")
    monkeypatch.setattr(constants, "ENDPOINT", near)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", near + "/{repo_id}/resolve/{revision}/{filename}")
    fetch(SCHNELL, tmp_path, wait=never)
    assert {asked.token for asked in hub.asked} == {""}
    assert f"HF_TOKEN is not sent to {near}" in caplog.text


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_a_commits_bytes_are_those_that_came_first(hub: Hub, tmp_path: Path, file: str) -> None:
    """Whatever another hub, or this one another day, has under the same name."""
    fetch(SCHNELL, tmp_path, wait=never)
    [told] = (tmp_path / "fetched/sums").glob(f"*/*/{file}.json")
    shutil.rmtree(tmp_path / "models")
    first = hub.first.files[file]
    hub.first.add(file, first.data[::-1])
    with pytest.raises(FetchFailed, match=f"{file} of .* is not what was fetched first") as refused:
        fetch(SCHNELL, tmp_path, wait=never)
    assert str(told) in str(refused.value)
    hub.first.files[file] = first
    fetch(SCHNELL, tmp_path, wait=never)
    assert_complete(hub, tmp_path)


def test_a_link_in_the_place_of_a_lock_leads_nowhere(hub: Hub, tmp_path: Path) -> None:
    """Whoever may write the volume could have emptied any file of whoever fetches."""
    precious, folder = tmp_path / "precious", fetched_folder(SCHNELL, tmp_path)
    precious.write_text("all of it")
    folder.parent.mkdir(parents=True)
    lock = folder.with_name(f".{folder.name}.lock")
    lock.symlink_to(precious)
    with pytest.raises(VolumeFailed, match=f"{lock} is a link, .* Remove it."):
        fetch(SCHNELL, tmp_path, wait=never)
    assert precious.read_text() == "all of it"
    lock.unlink()
    lock.write_text("of another version")
    fetch(SCHNELL, tmp_path, wait=never)
    assert lock.read_text() == "of another version"


def test_sums_that_are_damaged_are_named(hub: Hub, tmp_path: Path) -> None:
    fetch(SCHNELL, tmp_path, wait=never)
    [told] = (tmp_path / "fetched/sums").rglob("model_index.json.json")
    shutil.rmtree(tmp_path / "models")
    for text in ("{", "[]", "{}"):
        told.write_text(text)
        with pytest.raises(FetchFailed, match=f"{told} is damaged; remove it"):
            fetch(SCHNELL, tmp_path, wait=never)


def test_two_that_write_down_what_came_at_once_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As two models that share a repository: the one writes after the other has read, and before it writes."""
    write = vouched.write_atomically
    files = [SimpleNamespace(lfs=None, blob_id=str(number)) for number in range(2)]
    items = [Item(name, Repository("a/b", "c" * 40), name) for name in ("x/one.json", "two.json")]

    def between(path: Path, data: bytes) -> None:
        monkeypatch.setattr(vouched, "write_atomically", write)
        vouched.remember(tmp_path, items[1], files[1])  # type: ignore[arg-type]
        write(path, data)

    monkeypatch.setattr(vouched, "write_atomically", between)
    vouched.remember(tmp_path, items[0], files[0])  # type: ignore[arg-type]
    for item, other in zip(items, files[::-1], strict=True):
        with pytest.raises(FetchFailed, match="is not what was fetched first"):
            vouched.require(tmp_path, item, other)  # type: ignore[arg-type]


def _elsewhere(hub: Hub) -> None:
    hub.first.name = "someone/else"


def _later(hub: Hub) -> None:
    hub.first.revision = "0" * 40


def _bare(hub: Hub) -> None:
    del hub.first.files["model_index.json"]


def _huge(hub: Hub) -> None:
    hub.first.add(WEIGHTS, b"x", size=10**16)


def _junk(hub: Hub) -> None:
    hub.first.add("model_index.json", b"<html>")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_elsewhere, f"shows no {SCHNELL.repository}"),
        (_later, f"at {SCHNELL.revision}"),
        (_bare, "has no model_index.json"),
        (_huge, "needs 10000000.0 GB more, .* GB free"),
        (_junk, r"model_index\.json of .* is no JSON object"),
    ],
)
def test_what_the_hub_has_may_be_wrong(hub: Hub, tmp_path: Path, change: Callable[[Hub], None], text: str) -> None:
    change(hub)
    with pytest.raises(FetchFailed, match=text):
        fetch(SCHNELL, tmp_path, wait=never)
    assert not held(tmp_path, ".coming") - {"model_index.json"}


def test_a_refused_token_is_named(hub: Hub, tmp_path: Path) -> None:
    hub.trouble("GET", TREE, Trouble(401))
    with pytest.raises(FetchFailed, match="401 Unauthorized; set HF_TOKEN"):
        fetch(SCHNELL, tmp_path, wait=never)


def test_without_a_network(hub: Hub, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(FetchFailed, match="Cannot reach the hub at http://127"):
        fetch(SCHNELL, tmp_path, wait=never)
    assert waits == [1, 2, 4, 8, 8]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FetchFailed, match="HF_HUB_OFFLINE"):
        fetch(SCHNELL, tmp_path, wait=never)


def test_a_volume_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("in the way")
    with pytest.raises(VolumeFailed, match=f"Cannot write {tmp_path}.*"):
        fetch(SCHNELL, tmp_path, wait=never)
    assert hub.asked == []


def test_a_write_that_fails_on_the_way(hub: Hub, tmp_path: Path) -> None:
    hub.first.add(WEIGHTS, bytes(1_000_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        with pytest.raises(VolumeFailed, match=r"File too large.*stay for the next fetch"):
            fetch(SCHNELL, tmp_path, wait=never)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    fetch(SCHNELL, tmp_path, wait=never)
    assert_complete(hub, tmp_path)


def test_a_full_volume_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(VolumeFailed, match="No space left on device"),
        explained("flux-schnell", Repository(SCHNELL.repository, SCHNELL.revision), tmp_path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_two_at_once_end_with_one_good_copy(hub: Hub, tmp_path: Path) -> None:
    hub.hold("model_index.json")
    with started(hub, tmp_path, "--json") as first:
        hub.wait_for("model_index.json")
        with started(hub, tmp_path, "--json") as second:
            assert second.stderr
            assert "waiting for it" in second.stderr.readline()
            hub.release()
            said = [json.loads(process.communicate(timeout=DEADLINE_S)[0]) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0]
    assert [one["downloaded"] for one in said] == [True, False]
    assert sorted(asked.path for asked in hub.downloads()) == sorted(NEEDED)
    assert_complete(hub, tmp_path)


BY_HAND = """
import fcntl, os, runpy
from handler.volume import incoming

def flock(file, how):
    {}

fcntl.flock, incoming.OWN = flock, ()  # for this machine's own file systems do lock
runpy.run_module("handler", run_name="__main__", alter_sys=True)
"""
UNLOCKED = {
    "refused": BY_HAND.format("raise OSError(38, os.strerror(38))"),
    "locks nothing": BY_HAND.format("pass"),
}


@pytest.mark.parametrize("flock", ["refused", "locks nothing"])
def test_two_at_once_where_nothing_can_be_locked(flock: str, hub: Hub, tmp_path: Path) -> None:
    """As on NFS, Lustre and object stores' mounts: both bring all, both succeed, and what is there is whole."""
    hub.hold(WEIGHTS)
    with started(hub, tmp_path, "--json", handler=("-c", UNLOCKED[flock])) as first:
        hub.wait_for(WEIGHTS)  # the first has begun, and has something that is not whole yet
        with started(hub, tmp_path, "--json", handler=("-c", UNLOCKED[flock])) as second:
            hub.wait_for(WEIGHTS, 2)
            hub.release()
            outs = [process.communicate(timeout=DEADLINE_S) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], outs
    assert all(("cannot be locked" in err) == (flock == "refused") for _, err in outs)
    assert all(json.loads(out)["downloaded"] for out, _ in outs)
    assert_complete(hub, tmp_path)
    assert not list(fetched_folder(SCHNELL, tmp_path).glob(".coming-*"))


def test_what_came_to_a_fetch_that_was_killed_goes_and_what_comes_to_others_stays(hub: Hub, tmp_path: Path) -> None:
    hub.hold(WEIGHTS)
    folder = fetched_folder(SCHNELL, tmp_path)
    with started(hub, tmp_path) as process:
        hub.wait_for(WEIGHTS)
        [theirs] = folder.glob(".coming-*")
        begin(folder)
        assert theirs.exists()  # it lives
        process.kill()
        process.communicate(timeout=DEADLINE_S)
    hub.release()
    other = folder / f".coming-{'0' * 16}-{process.pid}.01234567"  # of another machine
    other.mkdir()
    begin(folder)
    assert sorted(folder.glob(".coming-*")) == sorted([other, incoming(folder)])


def test_where_a_lock_tells_that_nobody_else_fetches_all_that_came_to_others_goes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As to a container that was killed, of which another container sees no process."""
    folder = tmp_path / "model"
    with alone(folder):
        pass
    device = os.stat(folder).st_dev
    monkeypatch.setattr("handler.volume.incoming.MOUNTS", mounts := tmp_path / "mountinfo")
    for type_of, stays in (("nfs4", True), ("overlay", True), ("", True), ("ext4", False)):
        numbers = f"{os.major(device)}:{os.minor(device)}"
        mounts.write_text(f"9 1 0:9 / /x rw - xfs a rw\n27 1 {numbers} / / rw shared:1 - {type_of} /dev/vda rw\n")
        (other := folder / f".coming-{'0' * 16}-1.01234567").mkdir(exist_ok=True)
        with alone(folder) as only:
            begin(folder, only)
            assert other.exists() == stays
            with alone(tmp_path / "another") as too:
                assert too == (not stays)


def test_a_killed_fetch_leaves_no_model_and_the_next_completes_it(hub: Hub, tmp_path: Path) -> None:
    hub.hold(WEIGHTS)
    with started(hub, tmp_path) as process:
        hub.wait_for(WEIGHTS)
        process.kill()
        process.communicate(timeout=DEADLINE_S)
    hub.release()
    assert any(name.endswith(".incomplete") for name in held(tmp_path))
    assert checked(fetched_folder(SCHNELL, tmp_path)) is None
    with pytest.raises(WeightsMissing, match="python -m handler fetch flux-schnell"):
        model_source(SCHNELL, tmp_path)
    before = len(hub.downloads())
    fetch(SCHNELL, tmp_path, wait=never)
    assert [asked.path for asked in hub.downloads()[before:]] == [WEIGHTS]
    assert_complete(hub, tmp_path)


def test_a_worker_boots_on_what_was_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.first.files.clear()
    hub.first.add_folder(EMBEDDED / "spark")
    fetched = fetch(SCHNELL, tmp_path, wait=never)
    assert isinstance(fetched, Fetched)
    with unwarmed():
        worker = Worker.boot(Settings(model="flux-schnell", volume=tmp_path, cold_start_budget_s=3600))
    recipe = SCHNELL.recipe(ImageRequest(prompt="a red circle", width=64, height=64, seed=1))
    pixels, _ = worker.generate(recipe)
    assert pixels.rgb.shape == (64, 64, 3)


def test_a_variant_is_stored_under_plain_names(hub: Hub, tmp_path: Path) -> None:
    sdxl = open_sdxl(hub)
    fetched = fetch(SDXL, tmp_path, wait=never)
    assert asked(hub) == sorted((SDXL.repository, file) for file in SDXL_FILES.values())
    files = stored(fetched.folder)
    assert set(files) == {*SDXL_FILES, "manifest.json"}
    assert set(fetched.files) == set(SDXL_FILES)
    for path, file in SDXL_FILES.items():
        assert path == SHARDS or files[path] == sdxl.files[file].data
    assert json.loads(files[SHARDS]) == {
        "metadata": {"total_size": 2},
        "weight_map": {f"{n}.weight": f"model-0000{n}-of-00002.safetensors" for n in (1, 2)},
    }
    source = model_source(SDXL, tmp_path)
    assert source.manifest
    for path, entry in source.manifest.files.items():
        assert entry == summarize(fetched.folder / path)
    assert not fetch(SDXL, tmp_path, wait=never).downloaded


def test_an_index_of_other_shards_is_named(hub: Hub, tmp_path: Path) -> None:
    sdxl = open_sdxl(hub)
    del sdxl.files["text_encoder_2/model.fp16-00002-of-00002.safetensors"]
    with pytest.raises(FetchFailed, match=r"index\.fp16\.json .*model\.fp16-00002-of-00002\.safetensors"):
        fetch(SDXL, tmp_path, wait=never)
    assert not (fetched_folder(SDXL, tmp_path) / "manifest.json").exists()


def test_a_graft_comes_in_place_of_the_weights_of_the_base(hub: Hub, tmp_path: Path) -> None:
    sdxl, lightning = open_sdxl(hub), open_lightning(hub)
    graft = LIGHTNING.grafts[0]
    fetched = fetch(LIGHTNING, tmp_path, wait=never)
    from_base = {path: file for path, file in SDXL_FILES.items() if path != UNET}
    expected = [(SDXL.repository, file) for file in from_base.values()] + [(LIGHTNING.repository, graft.file)]
    assert asked(hub) == sorted(expected)
    assert fetched.folder == fetched_folder(LIGHTNING, tmp_path)
    files = stored(fetched.folder)
    assert set(files) == {*SDXL_FILES, "manifest.json"}
    assert files[UNET] == lightning.files[graft.file].data
    assert files["vae/config.json"] == sdxl.files["vae/config.json"].data
    source = model_source(LIGHTNING, tmp_path)
    assert source.manifest
    assert source.manifest.facts == {
        "model": "sdxl-lightning",
        "repository": LIGHTNING.repository,
        "revision": LIGHTNING.revision,
        "base": SDXL.repository,
        "base_revision": SDXL.revision,
    }
    assert not fetch(LIGHTNING, tmp_path, wait=never).downloaded


@pytest.mark.parametrize("lora", ["lora/diffusion_pytorch_model.safetensors", "transformer/lora.safetensors"])
def test_a_lora_comes_beside_all_of_the_base(hub: Hub, tmp_path: Path, lora: str) -> None:
    spec = replace(MODELS["qwen-image-lightning"], base=SCHNELL, grafts=(Graft("8steps.safetensors", lora),))
    own = hub.open(spec.repository, spec.revision)
    own.add("8steps.safetensors", b"a LoRA")
    own.add("4steps.safetensors", b"another")
    fetched = fetch(spec, tmp_path, wait=never)
    expected = [*((SCHNELL.repository, name) for name in NEEDED), (spec.repository, "8steps.safetensors")]
    assert asked(hub) == sorted(expected)
    files = stored(fetched.folder)
    assert set(files) == {*NEEDED, lora, "manifest.json"}
    assert files[lora] == b"a LoRA"
    assert all(files[name] == hub.first.files[name].data for name in NEEDED)


def test_a_missing_graft_is_named_before_all_else_comes(hub: Hub, tmp_path: Path) -> None:
    open_sdxl(hub)
    del open_lightning(hub).files[LIGHTNING.grafts[0].file]
    with pytest.raises(FetchFailed, match=f"{LIGHTNING.repository} has no {LIGHTNING.grafts[0].file} at"):
        fetch(LIGHTNING, tmp_path, wait=never)
    assert asked(hub) == [(SDXL.repository, "model_index.json")]
    names = set(stored(fetched_folder(LIGHTNING, tmp_path)))
    assert {name for name in names if not name.startswith(".coming")} == {"model_index.json"}


def test_a_fetch_from_two_repositories_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    open_sdxl(hub)
    open_lightning(hub)
    graft = LIGHTNING.grafts[0].file
    hub.trouble("GET", graft, *[Trouble(500)] * 5)
    with pytest.raises(FetchFailed, match="500 Internal Server Error; try again later"):
        fetch(LIGHTNING, tmp_path, wait=[].append)
    before = len(hub.downloads())
    fetched = fetch(LIGHTNING, tmp_path, wait=never)
    last = "vae/diffusion_pytorch_model.safetensors"
    expected = [(SDXL.repository, CONFIG), (SDXL.repository, last), (LIGHTNING.repository, graft)]
    assert asked(hub, before) == sorted(expected)
    assert set(stored(fetched.folder)) == {*SDXL_FILES, "manifest.json"}


def test_another_base_is_fetched_anew(hub: Hub, tmp_path: Path) -> None:
    sdxl = open_sdxl(hub)
    open_lightning(hub)
    fetch(LIGHTNING, tmp_path, wait=never)
    sdxl.revision = "0" * 40
    sdxl.add("unet/config.json", b"a newer one")
    before = len(hub.downloads())
    fetched = fetch(replace(LIGHTNING, base=replace(SDXL, revision=sdxl.revision)), tmp_path, wait=never)
    assert asked(hub, before) == [(SDXL.repository, SDXL_FILES[SHARDS]), (SDXL.repository, "unet/config.json")]
    assert stored(fetched.folder)["unet/config.json"] == b"a newer one"


def _gate_base(hub: Hub) -> str:
    hub.repositories[1].members = set()
    return f"sdxl-lightning is gated: accept its licence at https://huggingface.co/{SDXL.repository},"


def _gate_own(hub: Hub) -> str:
    hub.repositories[2].members = set()
    return f"sdxl-lightning is gated: accept its licence at https://huggingface.co/{LIGHTNING.repository},"


def _no_base(hub: Hub) -> str:
    del hub.repositories[1]
    return f"The hub shows no {SDXL.repository} at {SDXL.revision}"


def _no_own(hub: Hub) -> str:
    del hub.repositories[2]
    return f"The hub shows no {LIGHTNING.repository} at {LIGHTNING.revision}"


def _huge_own(hub: Hub) -> str:
    hub.repositories[2].add(LIGHTNING.grafts[0].file, b"x", size=10**16)
    return "sdxl-lightning needs 10000000.0 GB more"


@pytest.mark.parametrize("change", [_gate_base, _gate_own, _no_base, _no_own, _huge_own])
def test_of_two_repositories_the_error_names_the_right_one(
    hub: Hub, tmp_path: Path, change: Callable[[Hub], str]
) -> None:
    open_sdxl(hub)
    open_lightning(hub)
    with pytest.raises(FetchFailed, match=change(hub)):
        fetch(LIGHTNING, tmp_path, wait=never)
    assert not (fetched_folder(LIGHTNING, tmp_path) / "manifest.json").exists()


def test_a_vae_is_fetched(hub: Hub, tmp_path: Path) -> None:
    vae = open_vae(hub)
    fetched = fetch_vae(VAE, tmp_path, wait=never)
    assert asked(hub) == [(vae.name, "config.json"), (vae.name, "diffusion_pytorch_model.safetensors")]
    assert fetched.folder == fetched_vae(VAE, tmp_path)
    assert fetched.folder == tmp_path / "vae" / "madebyollin--sdxl-vae-fp16-fix" / VAE_REVISION
    files = stored(fetched.folder)
    assert set(files) == {CONFIG, WEIGHTS, "manifest.json"}
    assert files[WEIGHTS] == vae.files["diffusion_pytorch_model.safetensors"].data
    source = checked(fetched.folder)
    assert source
    assert source.manifest
    assert source.manifest.facts == {"kind": "vae", "repository": vae.name, "revision": VAE_REVISION}
    assert not fetch_vae(VAE, tmp_path, wait=never).downloaded


FILE = f"someone/merges@{VAE_REVISION}:checkpoints/merge-v2.safetensors"


def test_a_file_is_fetched_to_a_folder_of_its_own(hub: Hub, tmp_path: Path) -> None:
    """And is what KINDLING_WEIGHTS means by its name; its hash is the manifest's."""
    merges = hub.open(*FILE.partition(":")[0].split("@"))
    for name in ("checkpoints/merge-v2.safetensors", "checkpoints/other.safetensors", "README.md"):
        merges.add(name, save({"a": torch.zeros(2, 2)}) if name.endswith("v2.safetensors") else b"other")
    with pytest.raises(WeightsMissing, match="is not on the volume"):
        located(FILE, tmp_path)
    fetched = fetch_weights(FILE, tmp_path, "", wait=never)
    assert asked(hub) == [(merges.name, "checkpoints/merge-v2.safetensors")]
    path = located(FILE, tmp_path)
    assert path == fetched.folder / "merge-v2.safetensors"
    assert set(stored(fetched.folder)) == {"merge-v2.safetensors", "manifest.json"}
    assert sha256(examine(path), tmp_path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not (tmp_path / "hashes.json").exists()
    assert given(FILE, tmp_path).name == FILE  # pictures tell it, and `--from` finds it by that
    assert not fetch_weights(FILE, tmp_path, "", wait=never).downloaded
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(WeightsCorrupt, match=r"is no whole safetensors file: its tensors end at byte \d+, the file at"):
        examine(path)


REPOSITORY = f"someone/merged@{VAE_REVISION}"


def test_a_whole_repository_is_fetched_and_is_what_its_name_means(hub: Hub, tmp_path: Path) -> None:
    """What a pipeline reads, in the row's variant where it has that; its hash is of the manifest's. No pickle comes."""
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],  # whose folder is not there
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    }
    merged, weights = hub.open(*REPOSITORY.split("@")), save({"a": torch.zeros(2, 2)})
    for name, data in {
        "model_index.json": json.dumps(index).encode(),
        "unet/config.json": b"{}",
        "unet/diffusion_pytorch_model.fp16.safetensors": weights,
        "unet/diffusion_pytorch_model.safetensors": save({"a": torch.ones(2, 2)}),
        "vae/config.json": b"{}",
        "vae/diffusion_pytorch_model.safetensors": weights,
        "vae/diffusion_pytorch_model.bin": b"pickle",
        "scheduler/scheduler_config.json": b"{}",
        "safety_checker/model.safetensors": weights,
        "merged.ckpt": b"pickle",
        "pipeline.py": b"import os",
    }.items():
        merged.add(name, data)
    with pytest.raises(WeightsMissing, match="is not on the volume"):
        given(REPOSITORY, tmp_path)
    fetched = fetch_weights(REPOSITORY, tmp_path, "fp16", wait=never)
    assert fetched.folder == tmp_path / "weights/someone--merged" / VAE_REVISION
    files = stored(fetched.folder)
    assert sorted(files.keys() - {"manifest.json"}) == [
        "model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    assert files["unet/diffusion_pytorch_model.safetensors"] == weights
    found = given(REPOSITORY, tmp_path)
    assert (found.name, found.path) == (REPOSITORY, fetched.folder)
    lines = [f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(found.files)]
    assert content(found, tmp_path, find=False) == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert not fetch_weights(REPOSITORY, tmp_path, "fp16", wait=never).downloaded
    (fetched.folder / "vae/config.json").write_bytes(b"{ }")
    with pytest.raises(WeightsCorrupt, match=f"Remove it. Fetch it again with: KINDLING_WEIGHTS={REPOSITORY} python"):
        given(REPOSITORY, tmp_path)


def test_a_repository_in_no_layout_of_diffusers_is_named(hub: Hub, tmp_path: Path) -> None:
    hub.open(*REPOSITORY.split("@")).add("merged.safetensors", b"x")
    with pytest.raises(FetchFailed, match=r"has no model_index\.json at .*: it is not in diffusers' format"):
        fetch_weights(REPOSITORY, tmp_path, "", wait=never)


@pytest.mark.parametrize(
    "name", [FILE.replace(VAE_REVISION, "main"), FILE.partition(":")[0][:-1], FILE.replace("checkpoints", "..")]
)
def test_a_file_that_is_not_pinned_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"KINDLING_WEIGHTS: .* pin a revision"):
        fetch_weights(name, tmp_path, "", wait=never)


def test_a_file_that_is_not_there_is_named(hub: Hub, tmp_path: Path) -> None:
    hub.open(*FILE.partition(":")[0].split("@")).add("README.md", b"other")
    with pytest.raises(
        FetchFailed, match=rf"someone/merges has no checkpoints/merge-v2\.safetensors at {VAE_REVISION}\.$"
    ):
        fetch_weights(FILE, tmp_path, "", wait=never)


def test_a_vae_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    vae = open_vae(hub)
    hub.trouble("GET", "diffusion_pytorch_model.safetensors", *[Trouble(500)] * 5)
    with pytest.raises(FetchFailed, match="try again later"):
        fetch_vae(VAE, tmp_path, wait=[].append)
    before = len(hub.downloads())
    fetched = fetch_vae(VAE, tmp_path, wait=never)
    assert asked(hub, before) == [(vae.name, "diffusion_pytorch_model.safetensors")]
    assert set(stored(fetched.folder)) == {CONFIG, WEIGHTS, "manifest.json"}


@pytest.mark.parametrize(
    "name",
    ["someone/vae", "someone/vae@main", "someone/vae@207b116", "vae@" + VAE_REVISION, "some/v/ae@" + VAE_REVISION],
)
def test_a_vae_needs_its_revision(hub: Hub, tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match=f"KINDLING_VAE: '{name}' .*pin a revision"):
        fetch_vae(name, tmp_path, wait=never)
    assert (hub.asked, list(tmp_path.iterdir())) == ([], [])


@pytest.mark.parametrize(
    ("missing", "text", "came"),
    [
        ("config.json", f"{VAE[:-41]} has no config.json at {VAE_REVISION}", []),
        ("diffusion_pytorch_model.safetensors", r"has no diffusion_pytorch_model\.safetensors", ["config.json"]),
    ],
)
def test_what_a_vae_lacks_is_named(hub: Hub, tmp_path: Path, missing: str, text: str, came: list[str]) -> None:
    vae = open_vae(hub)
    del vae.files[missing]
    with pytest.raises(FetchFailed, match=text):
        fetch_vae(VAE, tmp_path, wait=never)
    assert asked(hub) == [(vae.name, name) for name in came]
    assert not (fetched_vae(VAE, tmp_path) / "manifest.json").exists()


def test_another_kind_of_model_is_no_vae(hub: Hub, tmp_path: Path) -> None:
    vae = open_vae(hub, "UNet2DConditionModel")
    with pytest.raises(FetchFailed, match=r"no autoencoder of diffusers.*UNet2DConditionModel"):
        fetch_vae(VAE, tmp_path, wait=never)
    assert asked(hub) == [(vae.name, "config.json")]


def test_the_command_brings_the_vae_that_is_set(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    open_vae(hub)
    monkeypatch.setenv("KINDLING_VOLUME", str(tmp_path))
    monkeypatch.setenv("KINDLING_VAE", VAE)
    assert main(["fetch", "flux-schnell", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["model"], said["vae"]["model"]) == ("flux-schnell", VAE)
    assert said["vae"]["files"] == [CONFIG, WEIGHTS]
    assert main(["fetch", "spark"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{VAE}: 2 files, 0.0 GB in {fetched_vae(VAE, tmp_path)}")
    assert "nothing to fetch" in second
    monkeypatch.setenv("KINDLING_VAE", str(tmp_path))
    hub.open(*FILE.partition(":")[0].split("@")).add("checkpoints/merge-v2.safetensors", b"a merge")
    monkeypatch.setenv("KINDLING_WEIGHTS", f"checkpoints/mine.safetensors, {FILE}")
    assert main(["fetch", "flux-schnell", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["vae"], [each["model"] for each in said["weights"]]) == (None, [FILE])


LORA = f"someone/loras@{VAE_REVISION}:styles/ink_v2.safetensors"


def test_the_command_brings_the_loras_that_are_set(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To a folder of theirs: a file that somebody put into loras/ is never touched, and goes before."""
    shelf = hub.open("someone/loras", VAE_REVISION)
    shelf.add("styles/ink_v2.safetensors", b"ink" * 9)
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras/own.safetensors").write_bytes(b"own")
    monkeypatch.setenv("KINDLING_VOLUME", str(tmp_path))
    monkeypatch.setenv("KINDLING_LORAS", f"ink={LORA}, own={LORA}")
    assert main(["fetch", "spark", "--json"]) == 0
    assert [one["files"] for one in json.loads(capsys.readouterr().out)["loras"]] == [
        ["ink.safetensors"], ["own.safetensors"],
    ]  # fmt: skip
    assert stored(tmp_path / "fetched/loras") == dict.fromkeys(("ink.safetensors", "own.safetensors"), b"ink" * 9)
    assert (tmp_path / "loras/own.safetensors").read_bytes() == b"own"
    before = len(hub.downloads())
    assert main(["fetch", "spark"]) == 0
    assert "LoRA ink: 1 files" in (told := capsys.readouterr().out)
    assert told.count("already complete") == 2
    assert len(hub.downloads()) == before
    with monkeypatch.context() as patch:  # what is whole wants no hub
        patch.setattr(Repository, "files", lambda self: pytest.fail("the hub is asked"))
        assert main(["fetch", "spark"]) == 0
    assert not list((tmp_path / "fetched/loras").glob(".coming-*"))
    (tmp_path / "fetched/loras/ink.safetensors").write_bytes(b"bad" * 9)
    (left := tmp_path / f"fetched/loras/.coming-{'0' * 16}-1.01234567").mkdir()
    os.utime(left, (0, 0))
    capsys.readouterr()
    assert main(["fetch", "spark"]) == 0
    assert stored(tmp_path / "fetched/loras")["ink.safetensors"] == b"ink" * 9
    assert capsys.readouterr().out.count("already complete") == 1
    assert not left.exists()


def test_a_lora_that_the_hub_lacks_is_named(hub: Hub, tmp_path: Path) -> None:
    hub.open("someone/loras", VAE_REVISION)
    with pytest.raises(FetchFailed, match=r"someone/loras has no styles/ink_v2\.safetensors at"):
        fetch_lora(pin(f"ink={LORA}"), tmp_path, wait=never)


@pytest.mark.parametrize(
    "text",
    [LORA, f"a/b={LORA}", f"..={LORA}", f"a={LORA.replace('@', '@x')}", "a=b/c@main:x.safetensors",
     f"a=b/c@{VAE_REVISION}:x.ckpt"],
)  # fmt: skip
def test_a_lora_needs_a_name_and_its_revision(text: str) -> None:
    with pytest.raises(SettingsError, match=r"KINDLING_LORAS: should be name=owner/repository@revision:file"):
        Settings.from_env({"KINDLING_LORAS": text})
