"""Two deployment guides of others, whose ComfyUI is Kindling here: their Python and their shell, as they are written.

The texts are not ours to keep: DEPLOYMENT_GUIDES names a folder that has them, or there is nothing to test. The model
is a fake that paints the seed. Of fal's guide the folder /app is another, and fal's SDK is stood in for; of Convox's
the command `convox` is, and the workflow, which lies in a repository of theirs.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

GUIDES = os.environ.get("DEPLOYMENT_GUIDES", "")
pytestmark = pytest.mark.skipif(not GUIDES, reason="DEPLOYMENT_GUIDES names no folder with the guides")
ROOT = Path(__file__).parents[2]
MAIN = f"""
import argparse, os, socket, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "doubles")!r}]
import uvicorn
from fakes import Editor
from handler import Engine, Settings, create_app

parser = argparse.ArgumentParser()
parser.add_argument("--listen")
parser.add_argument("--port", type=int)
options = parser.parse_args()
app = create_app(Engine(Settings.from_env(), boot=Editor().boot), public=False)
secured = {{"ssl_" + name: os.environ.get("SSL_" + name.upper()) for name in ("certfile", "keyfile")}}
with socket.create_server((options.listen, options.port)) as listener:
    print(listener.getsockname()[1], flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="critical", **secured)).run([listener])
"""


class App:
    """fal's."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Whatever it is told of machines."""


class Picture(str):
    """fal's image: here, where it lies."""

    __slots__ = ()

    @classmethod
    def from_path(cls, path: str, request: Any) -> "Picture":
        return cls(path)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        return handler(str)


def stand_in(folder: Path) -> dict[str, ModuleType]:
    """What fal's guide uses of its SDK."""
    weights = folder / "weights"
    weights.touch()
    names: dict[str, dict[str, Any]] = {
        "fal": {"App": App, "endpoint": lambda _: lambda function: function},
        "fal.container": {"ContainerImage": SimpleNamespace(from_dockerfile_str=lambda text: text)},
        "fal.toolkit": {
            "File": SimpleNamespace(from_path=lambda *_, **__: SimpleNamespace(url="https://a.example/workflow.json")),
            "Image": Picture,
            "download_model_weights": lambda _: weights,
        },
    }
    made = {name: ModuleType(name) for name in names}
    for name, contents in names.items():
        vars(made[name]).update(contents)
    return made


def program(folder: Path, name: str, script: str) -> None:
    """A command of this name, in `folder`."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ComfyUI in it, which is Kindling, and with commands that come first."""
    for name in ("bin", "volume", "ComfyUI/models/checkpoints"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "volume" / "comfy").symlink_to(tmp_path / "ComfyUI")
    (tmp_path / "ComfyUI" / "main.py").write_text(MAIN)
    program(tmp_path / "bin", "python", f'exec {sys.executable} "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("KINDLING_VOLUME", str(tmp_path / "volume"))
    return tmp_path


def test_fals_python_as_it_is_written(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(GUIDES) / "fal-comfyui-sdxl-turbo.txt").read_text()
    [workflow, *_] = re.findall(r"```json [^\n]*\n(.*?)```", text, re.S)
    source = next(found for found in re.findall(r"```python [^\n]*\n(.*?)```", text, re.S) if "class ComfyUI" in found)
    for name in ("workflow.json", "sdxl_turbo_workflow.json"):
        (machine / name).write_text(workflow)
    monkeypatch.setenv("KINDLING_MODEL", "sdxl-turbo")
    for name, module in stand_in(machine).items():
        monkeypatch.setitem(sys.modules, name, module)
    guide = ModuleType("guide")
    guide.__file__ = str(machine / "comfyui_sdxl_turbo.py")
    monkeypatch.setitem(sys.modules, "guide", guide)
    exec(compile(source.replace("/app/", f"{machine}/"), guide.__file__, "exec"), vars(guide))
    app = guide.ComfyUISDXLTurbo()
    try:
        app.setup()
        answer = app.generate_image(guide.ImageRequest(prompt="a galaxy in a bottle", seed=7), None)
    finally:
        app.process.terminate()
        app.process.communicate()
    assert answer.seed == 7
    with Image.open(answer.image) as picture:
        assert (picture.size, picture.getpixel((0, 0))) == ((512, 512), (8, 8, 8))


@contextmanager
def secured(machine: Path, model: str) -> Iterator[int]:
    """The port of a worker behind TLS, as a platform's balancer has it."""
    key, certificate = machine / "key.pem", machine / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*made, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    environ = {**os.environ, "SSL_CERTFILE": str(certificate), "SSL_KEYFILE": str(key), "KINDLING_MODEL": model}
    command = [sys.executable, "main.py", "--listen", "127.0.0.1", "--port", "0"]
    options: dict[str, Any] = {"cwd": machine / "ComfyUI", "env": environ, "text": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, **options) as process:
        assert process.stdout
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()


def workflow() -> dict[str, Any]:
    """As Convox's guide says of theirs: FLUX Schnell in FP8, two text encoders, 4 Euler steps, cfg 1; 6 is the text."""
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "1": ("UNETLoader", {"unet_name": "flux1-schnell-fp8.safetensors", "weight_dtype": "fp8_e4m3fn"}),
        "2": ("DualCLIPLoader", {"clip_name1": "t5xxl_fp8_e4m3fn.safetensors", "clip_name2": "clip_l.safetensors"}),
        "3": ("VAELoader", {"vae_name": "ae.safetensors"}),
        "5": ("EmptySD3LatentImage", {"width": 1024, "height": 1024, "batch_size": 1}),
        "6": ("CLIPTextEncode", {"text": "a lighthouse", "clip": ["2", 0]}),
        "7": ("CLIPTextEncode", {"text": "", "clip": ["2", 0]}),
        "8": ("KSampler", {"model": ["1", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}),
        "9": ("VAEDecode", {"samples": ["8", 0], "vae": ["3", 0]}),
        "10": ("SaveImage", {"images": ["9", 0], "filename_prefix": "flux"}),
    }
    steps = {"seed": 7, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    nodes["2"][1].update(type="flux")
    nodes["8"][1].update(steps)
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def test_convoxs_shell_as_it_is_written(machine: Path) -> None:
    text = (Path(GUIDES) / "convox-flux-schnell-comfyui.txt").read_text()
    queued = re.search(r"^ENDPOINT=\$\(.*?\.status'", text, re.S | re.M)
    custom = re.search(r"^jq '\.\[\"6\"\].*?\| jq \.", text, re.S | re.M)
    assert queued
    assert custom
    (machine / "workflow-api.json").write_text(json.dumps(workflow()))
    with secured(machine, "flux-schnell") as port:
        program(machine / "bin", "convox", f"echo SERVICE DOMAIN PORTS; echo api 127.0.0.1:{port} 443:8188")
        program(machine / "bin", "sleep", "exec /bin/sleep 5")  # a fake is fast
        environ = {**os.environ, "CURL_CA_BUNDLE": str(machine / "certificate.pem")}
        shell = f"{queued[0]}\necho ---\n{custom[0]}"
        done = subprocess.run(["bash", "-euc", shell], cwd=machine, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    status, accepted = done.stdout.split("---")
    assert json.loads(status.partition("\n")[2])["status_str"] == "success"
    assert json.loads(accepted)["node_errors"] == {}
