"""`fetch`, with the hub's real client against a hub on loopback."""

import errno
import json
import os
import resource
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import _http, close_session

from handler import MODELS, Settings, Worker
from handler.__main__ import main
from handler.errors import FetchFailed, VolumeFailed, WeightsMissing
from handler.fetch import Fetched, choose, explained, fetch
from handler.request import ImageRequest
from handler.volume import EMBEDDED, checked, fetched_folder, model_source
from hub_plane import DEADLINE_S, TREE, Hub, Trouble

ROOT = Path(__file__).parent.parent
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
LEFT = [".gitattributes", "README.md", "ae.safetensors"]
IN_SCHNELL = [*NEEDED, *LEFT, "flux1-schnell.safetensors", "schnell_grid.jpeg"]
IN_DEV = [*NEEDED, *LEFT, "flux1-dev.safetensors", "dev_grid.jpg"]
WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
CONFIG = "vae/config.json"
SCHEDULER = "scheduler/scheduler_config.json"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with a small FLUX.1-schnell, to which this process's client is pointed; `hub.waits` are its waits."""
    with Hub(SCHNELL.repository, SCHNELL.revision) as hub:
        for name in IN_SCHNELL:
            hub.add(name, json.dumps(INDEX).encode() if name == "model_index.json" else name.encode() * 9)
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


def never(seconds: float) -> None:
    raise AssertionError(f"waited {seconds} s")


@contextmanager
def started(hub: Hub, volume: Path, *arguments: str, stderr: int = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    """A real `python -m handler fetch flux-schnell`, ended afterwards if it has not."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE", "KINDLING_"))}
    told = {"HF_ENDPOINT": hub.url, "HF_HOME": str(volume / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "handler", "fetch", "flux-schnell", *arguments],
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
        assert (source.folder / name).read_bytes() == hub.files[name].data
        assert entry.sha256 == hub.files[name].sha256


@pytest.mark.parametrize("files", [IN_SCHNELL, IN_DEV])
def test_what_flux_needs(files: list[str]) -> None:
    assert choose(files, INDEX) == sorted(NEEDED)


def test_only_components_and_plain_safetensors_come() -> None:
    index = {"_class_name": "X", "flag": True, "gone": [None, None], "unet": ["diffusers", "U"], "../up": ["a", "b"]}
    plain = ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    left = """
        unet/diffusion_pytorch_model.fp16.safetensors unet/diffusion_pytorch_model.bin unet/model.onnx unet/run.py
        unet/diffusion_pytorch_model.safetensors.index.fp16.json unet/pytorch_model.bin.index.json unet/old/config.json
        unet/flax_model.msgpack gone/config.json other/config.json x.ckpt ../up/config.json config.json
    """.split()  # noqa: SIM905
    assert choose([*plain, *left], index) == plain


@pytest.mark.parametrize("only", ["diffusion_pytorch_model.bin", "model.fp16.safetensors", "model.ckpt"])
def test_a_component_without_plain_safetensors_is_named(only: str) -> None:
    with pytest.raises(FetchFailed, match=f"'vae'.*{only}"):
        choose(["vae/config.json", f"vae/{only}"], {"vae": ["diffusers", "V"]})


def test_a_component_without_files_is_named() -> None:
    with pytest.raises(FetchFailed, match="'vae'"):
        choose(["unet/config.json"], {"vae": ["diffusers", "V"]})


def test_the_command_brings_exactly_what_is_needed(hub: Hub, tmp_path: Path) -> None:
    with started(hub, tmp_path, "--json") as process:
        out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, err) == (0, "")
    said = json.loads(out)
    assert said["folder"] == str(fetched_folder(SCHNELL, tmp_path))
    assert said["files"] == sorted(NEEDED)
    assert said["bytes"] == sum(len(hub.files[name].data) for name in NEEDED)
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


def test_what_is_complete_needs_no_network(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fetch(SCHNELL, tmp_path, wait=never)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    again = fetch(SCHNELL, tmp_path, wait=never)
    assert (again.files, again.bytes, again.folder) == (first.files, first.bytes, first.folder)
    assert (first.downloaded, again.downloaded) == (True, False)


def test_nothing_to_fetch_for_an_embedded_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "spark"]) == 0
    assert "nothing to fetch" in capsys.readouterr().out


def test_a_licence_with_obligations_is_shown(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repository, hub.revision = DEV.repository, DEV.revision
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


def test_a_cut_download_goes_on_where_it_was(hub: Hub, tmp_path: Path, waits: list[float]) -> None:
    hub.add(WEIGHTS, os.urandom(12_000_000))
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
    assert held(tmp_path, ".cache/") == {*NEEDED} - {WEIGHTS}
    before = len(hub.downloads())
    fetch(SCHNELL, tmp_path, wait=never)
    assert [asked.path for asked in hub.downloads()[before:]] == [WEIGHTS]
    assert_complete(hub, tmp_path)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "model_index.json"])
def test_wrong_bytes_are_fetched_once_more(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.trouble("GET", name, Trouble(body=bytes(len(hub.files[name].data))))
    fetch(SCHNELL, tmp_path, wait=never)
    assert_complete(hub, tmp_path)
    assert len(hub.downloads(name)) == 2


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_bytes_that_stay_wrong_are_an_error(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.trouble("GET", name, *[Trouble(body=bytes(len(hub.files[name].data)))] * 2)
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
    hub.members = {"member"}
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(
        FetchFailed, match=f"accept its licence at https://huggingface.co/{SCHNELL.repository}.*HF_TOKEN"
    ):
        fetch(SCHNELL, tmp_path, wait=never)


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_a_member_gets_a_gated_model(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    hub.members = {"member"}
    monkeypatch.setenv(variable, "member")
    fetch(SCHNELL, tmp_path, wait=never)
    assert_complete(hub, tmp_path)
    assert {asked.token for asked in hub.asked} == {"member"}


def _elsewhere(hub: Hub) -> None:
    hub.repository = "someone/else"


def _later(hub: Hub) -> None:
    hub.revision = "0" * 40


def _bare(hub: Hub) -> None:
    del hub.files["model_index.json"]


def _huge(hub: Hub) -> None:
    hub.add(WEIGHTS, b"x", size=10**16)


def _junk(hub: Hub) -> None:
    hub.add("model_index.json", b"<html>")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_elsewhere, f"shows no {SCHNELL.repository}"),
        (_later, f"at {SCHNELL.revision}"),
        (_bare, "has no model_index.json"),
        (_huge, "needs 10000000.0 GB more, .* GB free"),
        (_junk, "could not be fetched"),
    ],
)
def test_what_the_hub_has_may_be_wrong(hub: Hub, tmp_path: Path, change: Callable[[Hub], None], text: str) -> None:
    change(hub)
    with pytest.raises(FetchFailed, match=text):
        fetch(SCHNELL, tmp_path, wait=never)
    assert not held(tmp_path, ".cache/") - {"model_index.json"}


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
    hub.add(WEIGHTS, bytes(1_000_000))
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
    with pytest.raises(VolumeFailed, match="No space left on device"), explained(SCHNELL, tmp_path):
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


def test_a_killed_fetch_leaves_no_model_and_the_next_completes_it(hub: Hub, tmp_path: Path) -> None:
    hub.hold(WEIGHTS)
    with started(hub, tmp_path) as process:
        hub.wait_for(WEIGHTS)
        process.kill()
        process.communicate(timeout=DEADLINE_S)
    hub.release()
    assert any(name.endswith(".incomplete") for name in held(tmp_path))
    assert checked(fetched_folder(SCHNELL, tmp_path), "") is None
    with pytest.raises(WeightsMissing, match="python -m handler fetch flux-schnell"):
        model_source(SCHNELL, tmp_path)
    before = len(hub.downloads())
    fetch(SCHNELL, tmp_path, wait=never)
    assert [asked.path for asked in hub.downloads()[before:]] == [WEIGHTS]
    assert_complete(hub, tmp_path)


def test_a_worker_boots_on_what_was_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.files.clear()
    hub.add_folder(EMBEDDED / "spark")
    fetched = fetch(SCHNELL, tmp_path, wait=never)
    assert isinstance(fetched, Fetched)
    worker = Worker.boot(Settings(model="flux-schnell", volume=tmp_path, cold_start_budget_s=3600))
    recipe = SCHNELL.recipe(ImageRequest(prompt="a red circle", width=64, height=64, seed=1))
    pixels, _ = worker.generate(recipe)
    assert pixels.rgb.shape == (64, 64, 3)
