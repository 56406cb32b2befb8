"""The fal adapter: its definition and its methods, offline, and the real `fal run --local` where fal is installed.

fal wants an older fastapi than runpod does and an older pathspec than mypy does, so that it cannot be in the virtual
environment of the other tests. There, a few names stand in for its SDK. In an environment over that one, which
`make test` makes, the same tests meet the SDK itself.
"""

import asyncio
import base64
import binascii
import importlib.util
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from pydantic import BaseModel
from websockets.sync.client import connect

from comfy_graphs import graph
from fakes import Editor
from handler import MODELS, Api, Engine, ImageRequest, Settings, Worker, choose_gpus
from handler.api import pieces
from handler.core.errors import SettingsError, StartError

ROOT = Path(__file__).parents[2]
APP = ROOT / "platform" / "fal_app.py"
INSTALLED = importlib.util.find_spec("fal") is not None
RECIPE = {"prompt": "a red circle on a blue background", "seed": 7, "num_inference_steps": 4}
BAD = [
    ({}, 400, "prompt"),
    ({**RECIPE, "sampler": "y"}, 400, "sampler"),
    ({**RECIPE, "num_inference_steps": 9}, 422, "num_inference_steps"),
    ({**RECIPE, "width": 9999, "height": 64}, 422, "width"),
    ({**RECIPE, "n": 2}, 422, "n"),
    ({**RECIPE, "model": "flux-dev"}, 404, "model"),
]
UPLOADS = {"KINDLING_FETCH_HOSTS": "v3.fal.media,v3b.fal.media"}
# fal listens on every address and has no option for another.
ON_LOOPBACK = """
import sys, uvicorn
from fal.cli.main import main

class Loopback(uvicorn.Config):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **{**options, "host": "127.0.0.1"})

uvicorn.Config = Loopback
sys.exit(main(sys.argv[1:]))
"""


@dataclass
class AppException(Exception):
    message: str
    status_code: int


@dataclass
class FieldException(Exception):
    field: str
    message: str
    status_code: int
    type: str


def unauthenticated() -> None:
    raise LookupError


class Size(BaseModel):
    width: int
    height: int


class Picture(BaseModel):
    url: str

    @classmethod
    def from_bytes(cls, data: bytes, kind: str, size: Size, *, repository: str) -> "Picture":
        assert repository == "in_memory"
        return cls(url=f"data:image/{kind};base64,{base64.b64encode(data).decode()}")


def stand_in() -> dict[str, ModuleType]:
    """The names of fal's SDK that the adapter uses, by module."""
    unchanged = lambda *_, **__: lambda function: function  # noqa: E731
    dockerfile = lambda path, **options: SimpleNamespace(**options)  # noqa: E731
    modules = {
        "fal": {"App": type("App", (), {}), "endpoint": unchanged, "function": unchanged, "__version__": "0"},
        "fal.container": {"ContainerImage": SimpleNamespace(from_dockerfile=dockerfile)},
        "fal.auth": {"fetch_auth_credentials": unauthenticated},
        "fal.exceptions": {"AppException": AppException, "FieldException": FieldException},
        "fal.exceptions.auth": {"UnauthenticatedException": LookupError},
        "fal.toolkit": {"Image": Picture},
        "fal.toolkit.image": {},
        "fal.toolkit.image.image": {"ImageSize": Size, "ImageSizeInput": Size | str},
    }
    modules["fal"]["HealthCheck"] = SimpleNamespace
    made = {name: ModuleType(name) for name in modules}
    for name, contents in modules.items():
        vars(made[name]).update(contents)
    return made


def load_app(patch: pytest.MonkeyPatch, environ: dict[str, str]) -> ModuleType:
    """platform/fal_app.py as deployed from `environ` alone."""
    for name in [name for name in os.environ if name.startswith("KINDLING_")]:  # the runner's, while that is there
        patch.delenv(name)
    for name, value in {**environ, "IS_ISOLATE_AGENT": "1"}.items():  # fal's own leave to make the object
        patch.setenv(name, value)
    for name, module in {} if INSTALLED else stand_in().items():
        patch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("fal_app", APP)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    return lambda **environ: load_app(monkeypatch, environ)


@pytest.fixture(scope="module")
def app() -> Iterator[Any]:
    """One runner's object with the embedded model, shared by the tests that draw."""
    with pytest.MonkeyPatch.context() as patch:
        runner = load_app(patch, {"KINDLING_MODEL": "spark", "KINDLING_DEVICE": "cpu"}).Kindling()
        runner.setup()
        yield runner
        runner.teardown()


def drawn_by(worker: Worker) -> Any:
    """The pixels of RECIPE as the core draws them."""
    return worker.generate(worker.spec.recipe(ImageRequest.parse(RECIPE)))[0].rgb


def pixels(url: str) -> Any:
    """The pixels of a data URL."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))))


def generate(app: Any, **fields: Any) -> Any:
    wanted = app.generate.__annotations__["wanted"]
    return asyncio.run(app.generate(wanted.model_validate({**fields, "sync_mode": True})))


def test_what_is_deployed(load: Callable[..., ModuleType]) -> None:
    module = load()
    runner = module.Kindling
    assert (runner.app_name, runner.app_auth, runner.keep_alive) == ("kindling", "private", 300)
    assert (runner.min_concurrency, runner.startup_timeout) == (0, 240 + 60)
    assert module.ENVIRONMENT == {"KINDLING_MODEL": "flux-schnell", **UPLOADS}
    assert module.IMAGE.build_args == {"SDK": "fal", "CUDA": "cu130"}
    assert module.IMAGE.context_dir == ROOT


@pytest.mark.parametrize("model", MODELS)
def test_every_model_gets_machines_that_hold_it(load: Callable[..., ModuleType], model: str) -> None:
    machines = load(KINDLING_MODEL=model).Kindling.machine_type
    assert 1 <= len(machines) <= 3
    offers = choose_gpus(Settings(), MODELS[model], "fal", machines)
    assert {(offer.outlook.memory.fits, offer.outlook.memory.mode) for offer in offers} == {(True, "resident")}


def test_the_precision_decides_which_machines(load: Callable[..., ModuleType]) -> None:
    large = {"KINDLING_MODEL": "flux2-dev"}
    assert load(**large, KINDLING_PRECISION="fp8").Kindling.machine_type == ["GPU-H100", "GPU-H200", "GPU-B200"]
    assert load(**large, KINDLING_PRECISION="nvfp4").Kindling.machine_type == ["GPU-B200"]


def test_a_misspelt_model_stops_the_deployment(load: Callable[..., ModuleType]) -> None:
    with pytest.raises(SettingsError, match="flux-snell"):
        load(KINDLING_MODEL="flux-snell")


def test_fal_never_meets_a_full_lane(load: Callable[..., ModuleType]) -> None:
    module = load()
    assert module.Kindling.max_multiplexing <= module.SETTINGS.queue


def test_the_deployers_settings_hold_but_keys_and_volume_stay(load: Callable[..., ModuleType]) -> None:
    given = {"KINDLING_API_KEYS": "canary", "KINDLING_VOLUME": "/home/me", "KINDLING_COLD_START_BUDGET_S": "100"}
    module = load(KINDLING_MODEL="spark", **given)
    assert module.ENVIRONMENT == {"KINDLING_MODEL": "spark", "KINDLING_COLD_START_BUDGET_S": "100", **UPLOADS}
    assert module.Kindling.startup_timeout == 160


def test_a_misspelt_setting_stops_the_deployment(load: Callable[..., ModuleType]) -> None:
    with pytest.raises(SettingsError, match="KINDLING_MODLE"):
        load(KINDLING_MODLE="spark")


def test_a_gpu_that_cannot_be_seen_is_no_reason_to_draw_on_the_cpu(
    load: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KINDLING_DEVICE", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(StartError, match="torch sees no GPU"):
        load(KINDLING_MODEL="spark").Kindling().setup()


def test_machines_that_do_not_hold_the_model_are_rented_with_a_warning(
    load: Callable[..., ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    load(KINDLING_MODEL="flux-dev", KINDLING_OFFLOAD="encoders")
    assert "does not hold flux-dev whole. Its text encoders wait in host memory" in capsys.readouterr().err


def test_a_failed_boot_is_raised(load: Callable[..., ModuleType]) -> None:
    with pytest.raises(StartError, match="flux-schnell is not on the volume"):
        load().Kindling().setup()


def test_draws_what_the_core_draws(app: Any, spark: Worker) -> None:
    answer = generate(app, **RECIPE)
    assert answer.seed == 7
    assert np.array_equal(pixels(answer.image.url), drawn_by(spark))


def test_brings_the_bytes_that_the_command_line_writes(app: Any, tmp_path: Path) -> None:
    """One leg of test_transports.py, which cannot run where fal's SDK is."""
    steps, seed = str(RECIPE["num_inference_steps"]), str(RECIPE["seed"])
    options = ["--steps", steps, "--seed", seed, "-o", str(tmp_path / "out.png")]
    command = [sys.executable, "-m", "handler", "generate", str(RECIPE["prompt"]), *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KINDLING_")}
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    encoded = generate(app, **RECIPE).image.url.removeprefix("data:image/png;base64,")
    assert base64.b64decode(encoded) == (tmp_path / "out.png").read_bytes()


def test_the_answer_names_a_seed_that_was_left_out(app: Any) -> None:
    first = generate(app, prompt="a red circle")
    assert generate(app, prompt="a red circle", seed=first.seed).image.url == first.image.url


FAL = {  # as fal's playground sends it
    "prompt": RECIPE["prompt"],
    "image_size": {"width": 128, "height": 64},
    "num_inference_steps": 4,
    "num_images": 2,
    "seed": 7,
    "loras": [],
    "enable_safety_checker": True,
    "output_format": "jpeg",
}


def draw(app: Any, **fields: Any) -> Any:
    return asyncio.run(app.draw(app.draw.__annotations__["wanted"].model_validate(fields)))


def test_fals_own_names_and_answer(app: Any) -> None:
    """Without an account the pictures are data URLs, whether or not that is asked for."""
    answer = draw(app, **FAL)
    assert [image.url.partition(",")[0] for image in answer.images] == ["data:image/jpeg;base64"] * 2
    assert Image.open(io.BytesIO(base64.b64decode(answer.images[1].url.partition(",")[2]))).size == (128, 64)
    assert (answer.seed, answer.prompt, answer.has_nsfw_concepts) == (7, RECIPE["prompt"], [False, False])
    assert answer.timings["inference"] > 0
    assert answer.notes == ["enable_safety_checker changes nothing: pictures are not looked through here."]
    assert draw(app, **{**FAL, "sync_mode": True}).images[0].url == answer.images[0].url


@pytest.mark.parametrize(
    ("fields", "count", "kind"),
    [({"n": 2}, 2, "png"), ({"format": "jpeg"}, 1, "jpeg"), ({"response_format": "url"}, 1, "png")],
)
def test_its_root_takes_what_generate_takes_by_its_names(
    app: Any, fields: dict[str, Any], count: int, kind: str
) -> None:
    answer = draw(app, prompt="a circle", seed=1, **fields)
    assert [image.url.partition(",")[0] for image in answer.images] == [f"data:image/{kind};base64"] * count


def test_what_fal_calls_a_size_and_an_image(app: Any) -> None:
    first = draw(app, prompt="a circle", image_size="square", seed=1).images[0]
    assert pixels(first.url).shape == (512, 512, 3)
    edited = draw(app, prompt="a star", image_url=first.url, strength=0.5, seed=1, width=64, height=64).images[0]
    assert pixels(edited.url).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"loras": [{"path": "https://files.example/ink.safetensors"}]}, "loras"),
        ({"image_url": "https://files.example/cat.png"}, "image_url"),
        ({"num_inference_steps": 99}, "num_inference_steps"),
        ({"enable_prompt_expansion": True}, "enable_prompt_expansion"),
        ({"frames": 9}, "frames"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_fal_has_and_this_has_not_is_refused(app: Any, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Exception, match=param) as caught:
        draw(app, prompt="x", **fields)
    assert caught.value.field == param  # type: ignore[attr-defined]


def test_pictures_go_to_fals_cdn_where_there_is_an_account(
    load: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load()
    assert module.repository() == "in_memory"
    if INSTALLED:
        monkeypatch.setenv("FAL_KEY", "id:secret")
    else:
        monkeypatch.setattr(module, "fetch_auth_credentials", lambda: None)
    assert module.repository() == "fal_v3"


SEED = {  # the least that a client of fal's tutorial on SDXL Turbo sends, with what that fills in
    "prompt": "beautiful landscape",
    "negative_prompt": "text, watermark, blurry, low quality",
    "width": 512,
    "height": 512,
    "num_inference_steps": 1,
    "seed": 7,
}


def test_a_negative_prompt_that_cannot_be_honoured_is_left_out_and_said_so(app: Any) -> None:
    answer = generate(app, **RECIPE, negative_prompt="blurry")
    assert answer.image.url == generate(app, **RECIPE).image.url
    assert answer.notes == [
        "negative_prompt changes nothing: spark cannot honour a negative prompt; leave it out.",
    ]
    assert generate(app, **RECIPE).notes == []


def test_the_body_of_fals_tutorial_is_drawn_by_sdxl_turbo(load: Callable[..., ModuleType]) -> None:
    module = load(KINDLING_MODEL="sdxl-turbo", KINDLING_DEVICE="cpu")
    runner = module.Kindling()
    runner.engine = Engine(Settings(model="sdxl-turbo"), boot=Editor().boot)
    runner.api = Api(runner.engine)
    runner.engine.start()
    runner.engine.wait_booted()
    try:
        answer = generate(runner, **SEED)
    finally:
        runner.engine.stop()
    assert (answer.seed, pixels(answer.image.url).shape) == (7, (512, 512, 3))
    assert [note.split(":")[0] for note in answer.notes] == ["negative_prompt changes nothing"]


@pytest.mark.parametrize(("fields", "status", "param"), [bad for bad in BAD if bad[2] != "n"])
def test_says_what_is_wrong(app: Any, fields: dict[str, Any], status: int, param: str) -> None:
    with pytest.raises(Exception, match=param) as caught:
        generate(app, **fields)
    error: Any = caught.value
    assert (type(error).__name__, error.field, error.status_code) == ("FieldException", param, status)


def test_the_loop_makes_no_text_of_pictures(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would keep all others waiting."""
    encode, threads = binascii.b2a_base64, list[threading.Thread]()

    def noted(data: Any, **options: Any) -> bytes:
        threads.append(threading.current_thread())
        return encode(data, **options)

    monkeypatch.setattr(pieces, "binascii", SimpleNamespace(b2a_base64=noted))
    generate(app, prompt="a circle", width=64, height=64)
    assert threading.main_thread() not in threads


def test_a_runner_that_lost_its_gpu_is_not_alive(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert app.alive() == {"status": "ready"}
    monkeypatch.setattr(app.engine, "state", "failed")
    with pytest.raises(Exception, match="lost its GPU") as caught:
        app.alive()
    assert caught.value.status_code == 503  # type: ignore[attr-defined]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """`fal run --local`: what a developer runs before deploying."""
    home = tmp_path_factory.mktemp("home")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KINDLING_", "FAL_"))}
    port, metrics = free_port(), free_port()
    options = ["--local", "--exposed-port", str(port), "--exposed-metrics-port", str(metrics)]
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", ON_LOOPBACK, "run", *options, f"{APP}::Kindling"],
        cwd=ROOT,
        env={**kept, "HOME": str(home), "KINDLING_MODEL": "spark", "KINDLING_DEVICE": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    try:
        told = []
        for line in process.stdout:
            told.append(line)
            if re.search(rf"running on http://127.0.0.1:{port}\b", line):
                break
        else:
            raise AssertionError("".join(told))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
        process.terminate()
        assert "Application shutdown complete." in process.communicate(timeout=60)[0]
    finally:
        process.kill()
        process.wait()


needs_fal = pytest.mark.skipif(not INSTALLED, reason="fal's SDK excludes runpod's: run again in .venv/fal")


@needs_fal
@pytest.mark.parametrize("guide", ["README.md", "docs/deploy/fal.md"])
def test_the_guides_commands_are_fals(guide: str) -> None:
    text = (ROOT / guide).read_text()
    shown = re.findall(r"\bfal ((?:apps|auth|deploy|files|keys|run|runners|secrets)\b[^`#\n]*)", text)
    assert shown
    command = [sys.executable, "-c", "import sys; from fal.cli.main import main; sys.exit(main(sys.argv[1:]))"]
    for arguments in shown:
        asked = [*command, *arguments.split(), "--help"]
        done = subprocess.run(asked, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_fal
def test_the_guides_image_of_a_registry_is_fals() -> None:
    [program] = re.findall(r"```py\n(.*?)```", (ROOT / "docs/deploy/fal.md").read_text(), re.S)
    found: dict[str, Any] = {}
    exec(program, found)
    assert found["IMAGE"].to_dict()["registries"] == {"REGISTRY": {"username": "you", "password": "$REGISTRY_TOKEN"}}


@needs_fal
def test_what_is_uploaded_is_what_the_image_copies_but_no_secrets(load: Callable[..., ModuleType]) -> None:
    sent = load().IMAGE.to_dict()
    assert sent["docker_files_list"] == [
        "platform/locks/torch-$CUDA.lock",  # which fal finds nowhere and skips: it comes with the folder
        *("platform/locks", "pyproject.toml", "requirements.txt", "handler", "platform"),
    ]
    ignored = [re.compile(pattern) for pattern in sent["docker_ignore"]]
    listed = subprocess.run(["git", "ls-files", *sent["docker_files_list"]], cwd=ROOT, capture_output=True, check=True)
    kept = listed.stdout.decode().split()
    for names, wanted in ((kept, False), (["handler/.env", "handler/__pycache__/api.pyc", "spark/train.py"], True)):
        assert {any(pattern.search(name) for pattern in ignored) for name in names} == {wanted}


@needs_fal
def test_local_run_draws_what_the_core_draws(local: httpx.Client, spark: Worker) -> None:
    answer = local.post("/generate", json={**RECIPE, "negative_prompt": "blurry", "sync_mode": True})
    assert answer.status_code == 200, answer.text
    assert (answer.json()["seed"], len(answer.json()["notes"])) == (7, 1)
    assert (answer.json()["image"]["width"], answer.json()["image"]["content_type"]) == (256, "image/png")
    assert np.array_equal(pixels(answer.json()["image"]["url"]), drawn_by(spark))


@needs_fal
def test_local_run_answers_without_an_account(local: httpx.Client) -> None:
    """Though it was not asked for data URLs."""
    drawn = local.post("/generate", json=RECIPE).json()
    assert drawn["image"]["url"].startswith("data:image/png;base64,")
    answer = local.post("/", json=FAL)
    assert answer.status_code == 200, answer.text
    assert answer.json().keys() == {"images", "timings", "seed", "has_nsfw_concepts", "prompt", "notes"}
    first = answer.json()["images"][0]
    assert first["url"].startswith("data:image/jpeg;base64,")
    assert (first["width"], first["height"], first["content_type"]) == (128, 64, "image/jpeg")


@needs_fal
@pytest.mark.parametrize("field", ["image_size", "loras", "num_images"])
def test_local_run_says_which_of_fals_fields_is_wrong(local: httpx.Client, field: str) -> None:
    refused = local.post("/", json={"prompt": "x", field: "huge"})
    assert refused.status_code in (400, 422)
    assert {detail["loc"][1] for detail in refused.json()["detail"]} == {field}


@needs_fal
def test_local_run_describes_fals_fields_for_its_playground(local: httpx.Client) -> None:
    told = local.get("/openapi.json").json()
    body = told["paths"]["/"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fields = told["components"]["schemas"][body["$ref"].rpartition("/")[2]]["properties"]
    assert {"image_size", "num_images", "loras", "image_url", "sync_mode", "enable_safety_checker"} <= fields.keys()


@needs_fal
def test_local_run_edits(local: httpx.Client) -> None:
    picture = base64.b64decode(local.post("/generate", json=RECIPE).json()["image"]["url"].partition(",")[2])
    form = {"prompt": "a white ring", "seed": "7"}
    answer = local.post("/v1/images/edits", files={"image": ("a.png", picture, "image/png")}, data=form)
    assert (answer.status_code, answer.json()["size"]) == (200, "256x256")


@needs_fal
@pytest.mark.parametrize(("fields", "status", "param"), BAD)
def test_local_run_says_what_is_wrong(local: httpx.Client, fields: dict[str, Any], status: int, param: str) -> None:
    refused = local.post("/generate", json=fields)
    [detail] = refused.json()["detail"]
    assert (refused.status_code, detail["loc"]) == (status, ["body", param])
    assert detail["msg"]


@needs_fal
def test_local_run_speaks_openai(local: httpx.Client) -> None:
    answer = local.post("/v1/images/generations", json={"prompt": "a circle", "size": "64x64"})
    assert (answer.status_code, answer.json()["size"]) == (200, "64x64")
    refused = local.post("/v1/images/generations", json={"prompt": "a circle", "size": "64"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "size")
    asked = {"prompt": "a circle", "size": "64x64"}
    bare = local.post("/v1/images/generations", json=asked, headers={"accept": "image/png"})
    assert (bare.headers["content-type"], bool(bare.headers["x-request-id"])) == ("image/png", True)
    streamed = local.post("/v1/images/generations", json=asked | {"stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")


@needs_fal
def test_local_run_has_every_other_route(local: httpx.Client) -> None:
    """ComfyUI's websocket among them."""
    assert local.get("/v1/models").json()["data"][0]["id"] == "spark"
    address = str(local.base_url.join("/ws?clientId=here")).replace("http", "ws", 1)
    with connect(address) as listening:
        assert json.loads(listening.recv())["type"] == "status"
        posted = local.post("/prompt", json={"prompt": graph(), "client_id": "here"}).json()
        told = (json.loads(message)["type"] for message in listening if isinstance(message, str))
        assert "execution_success" in told
    [entry] = local.get(f"/history/{posted['prompt_id']}").json().values()
    assert entry["status"]["status_str"] == "success"


@needs_fal
def test_local_run_is_alive(local: httpx.Client) -> None:
    assert local.post("/alive").json() == {"status": "ready"}
