"""The Modal adapter without Modal: its definition as the SDK reads it, and its methods run here, offline."""

import asyncio
import base64
import importlib.util
import io
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import modal
import pytest
import torch
from modal._partial_function import _find_callables_for_obj, _PartialFunctionFlags
from modal._runtime.asgi import LifespanManager
from PIL import Image

from handler import GPUS, MODELS, Engine
from handler.core.birth import process_age
from handler.core.errors import DeviceLost, SettingsError, StartError

ROOT = Path(__file__).parents[2]
SMALL = {"prompt": "a red circle", "num_inference_steps": 4}
KEYS = {"KINDLING_API_KEYS": "secret"}
SIGNED = {"authorization": "Bearer secret"}
pytestmark = pytest.mark.filterwarnings("ignore:The Kindling.* function is executing locally:UserWarning")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., ModuleType]:
    return lambda **environ: load_app(monkeypatch, tmp_path, environ)


def load_app(patch: pytest.MonkeyPatch, volume: Path, environ: dict[str, str]) -> ModuleType:
    """platform/modal_app.py as deployed from `environ`; from then on this process's own is the container's."""
    for name, value in environ.items():
        patch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("modal_app", ROOT / "platform" / "modal_app.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    here = {"KINDLING_DEVICE": "cpu", **module.ENVIRONMENT, "KINDLING_VOLUME": str(volume)}
    for name, value in here.items():
        patch.setenv(name, value)
    return module


def entered(module: ModuleType) -> Any:
    """One container's object after its enter hooks, which the SDK runs here for methods that are not async alone."""
    container = module.Kindling()
    container.web.local()
    return container


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One container's object with the embedded model, shared by the tests that draw."""
    with pytest.MonkeyPatch.context() as patch:
        volume = tmp_path_factory.mktemp("volume")
        container = entered(load_app(patch, volume, {"KINDLING_MODEL": "spark", **KEYS}))
    yield container
    leave(container)


def lose_the_gpu(*_: object, **__: object) -> None:
    raise DeviceLost("The GPU failed.")


def without_model(module: ModuleType, patch: pytest.MonkeyPatch) -> Any:
    """One container's object whose worker boots at once and loses its GPU at the first picture."""
    worker = SimpleNamespace(draw_some=lose_the_gpu, gains={}, unpublished=False, watch=lambda alarm: None)
    boot = lambda settings, clock: worker  # noqa: E731
    patch.setattr(module, "Engine", lambda settings, clock, _: Engine(settings, clock, boot))
    return entered(module)


def leave(container: Any) -> None:
    """Run the exit hooks as Modal's container does; its SDK offers no public way."""
    instance = container._cached_user_cls_instance()
    for hook in _find_callables_for_obj(instance, _PartialFunctionFlags.EXIT).values():
        hook()


def size_of(b64: str) -> tuple[int, int]:
    picture = Image.open(io.BytesIO(base64.b64decode(b64)))
    picture.load()
    return picture.size


def ask(web: Any, method: str, path: str, **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(web), base_url="http://modal") as client:
            return await client.request(method, path, timeout=60, **options)

    return asyncio.run(send())


def test_what_is_deployed(load: Callable[..., ModuleType]) -> None:
    module = load()
    info = module.Kindling().generate.info()
    assert module.app.name == "kindling"
    assert info.gpus == [("L40S", 1), ("A100-40GB", 1), ("A100-80GB", 1)]
    assert info.startup_timeout == 240 + 60
    assert info.volumes["/kindling"].name == "kindling"
    assert sorted(info.method_names) == ["generate", "web"]
    assert module.ENVIRONMENT.items() >= {"KINDLING_MODEL": "flux-schnell", "KINDLING_VOLUME": "/kindling"}.items()


def test_a_container_reckons_with_the_gpus_that_were_deployed(
    load: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which the first is the one whose weights a snapshot holds."""
    deployed = load(CUDA="cu126", KINDLING_MODEL="flux2-dev", MODAL_SNAPSHOT="weights", **KEYS)
    monkeypatch.delenv("CUDA")
    carried = {name: deployed.ENVIRONMENT[name] for name in deployed.ENVIRONMENT if name != "KINDLING_VOLUME"}
    monkeypatch.setattr(modal, "is_local", lambda: False)
    container = load(**carried)
    assert container.FIRST == deployed.FIRST == GPUS["H100"]
    assert container.FITTING == deployed.FITTING == ["H100!", "H200"]


@pytest.mark.parametrize("model", MODELS)
def test_every_model_gets_gpus_that_hold_it(load: Callable[..., ModuleType], model: str) -> None:
    module = load(KINDLING_MODEL=model)
    assert 1 <= len(module.FITTING) <= 3
    assert {(plan.fits, plan.mode) for plan in module.PLANS} == {(True, "resident")}


def test_a_large_model_gets_large_gpus(load: Callable[..., ModuleType]) -> None:
    exact, rounded = load(KINDLING_MODEL="flux2-dev", KINDLING_PRECISION="bf16"), {"KINDLING_PRECISION": "fp8"}
    assert exact.Kindling().generate.info().gpus == [("H200", 1), ("B200", 1)]
    gpus = load(KINDLING_MODEL="flux2-dev", **rounded).Kindling().generate.info().gpus
    assert gpus == [("RTX-PRO-6000", 1), ("H100!", 1), ("H200", 1)]


def test_gpus_that_are_asked_for_are_rented_as_they_are(load: Callable[..., ModuleType]) -> None:
    """To serve and to bake, in the order that was asked for; host memory is that of the hungriest."""
    assert load(MODAL_GPU="H100").GPUS == ["H100!"]  # or it may be an H200
    module = load(MODAL_GPU="A100-80GB, L4", KINDLING_PRECISION="int8")
    assert module.Kindling().generate.info().gpus == module.bake.info().gpus == [("A100-80GB", 1), ("L4", 1)]
    assert "encoders" in {plan.mode for plan in module.PLANS}
    assert module.optimize.info().gpus == [("A100-80GB", 1)]


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"MODAL_GPU": "L5"}, "'L5' is not known here as a GPU of modal. Known: T4, L4"),
        ({"MODAL_GPU": "T4"}, "emulates bfloat16"),
        ({"MODAL_MIN": "5"}, "not '5' and '4'"),
        ({"MODAL_MAX": "0"}, "not '0' and '0'"),
        ({"MODAL_MAX": "many"}, "not '0' and 'many'"),
    ],
)
def test_a_choice_that_cannot_hold_stops_the_deployment(
    load: Callable[..., ModuleType], environ: dict[str, str], told: str
) -> None:
    with pytest.raises((SettingsError, StartError), match=re.escape(told)):
        load(**environ)


def test_what_waits_on_the_host_has_room_there(load: Callable[..., ModuleType]) -> None:
    whole, waits = (load(KINDLING_MODEL="flux-dev", KINDLING_OFFLOAD=said) for said in ("off", "encoders"))
    assert waits.FITTING[0] == "L4"
    assert waits.HOST_MB > whole.HOST_MB + 1000 * 1.3 * 4.8


def test_what_no_gpu_computes_stops_the_deployment(load: Callable[..., ModuleType]) -> None:
    with pytest.raises(SettingsError, match="KINDLING_ATTENTION=flash3: needs compute capability 9"):
        load(KINDLING_ATTENTION="flash3", KINDLING_PRECISION="nvfp4")


def test_modal_never_meets_a_full_lane(load: Callable[..., ModuleType]) -> None:
    module = load()
    assert module.Kindling().generate.info().concurrency_info.max_inputs <= module.SETTINGS.queue


def test_the_deployers_settings_hold_in_the_container(load: Callable[..., ModuleType]) -> None:
    module = load(KINDLING_MODEL="spark", KINDLING_VOLUME="/home/me", KINDLING_COLD_START_BUDGET_S="100")
    assert (module.SETTINGS.model, str(module.SETTINGS.volume)) == ("spark", "/kindling")
    assert module.Kindling().generate.info().startup_timeout == 160


def test_kubernetes_words_on_a_service_are_not_carried(load: Callable[..., ModuleType]) -> None:
    assert "KINDLING_PORT" not in load(KINDLING_PORT="tcp://10.0.0.1:80").ENVIRONMENT


@pytest.mark.parametrize(("deadline", "given"), [("30", 600), ("900.5", 901)])
def test_modal_waits_as_long_as_a_request_may_take(load: Callable[..., ModuleType], deadline: str, given: int) -> None:
    assert given == load(KINDLING_DEADLINE_S=deadline).REQUEST_S


def test_a_misspelt_setting_stops_the_deployment(load: Callable[..., ModuleType]) -> None:
    with pytest.raises(SettingsError, match="KINDLING_MODLE"):
        load(KINDLING_MODLE="spark")


def test_a_misspelt_model_stops_the_deployment(load: Callable[..., ModuleType]) -> None:
    with pytest.raises(SettingsError, match="flux-snell"):
        load(KINDLING_MODEL="flux-snell")


def test_deploying_needs_no_torch_and_no_web_server() -> None:
    heavy = "{'torch', 'diffusers', 'starlette', 'uvicorn', 'huggingface_hub', 'numpy'}"
    code = f"import runpy, sys; runpy.run_path('platform/modal_app.py'); print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_image_holds_the_code_and_the_weights_and_nothing_else(load: Callable[..., ModuleType]) -> None:
    package, ships = ROOT / "handler", load().SHIPPED
    files = [path.relative_to(package) for path in package.rglob("*") if path.is_file()]
    shipped = {path for path in files if ships(path)}
    others = {path for path in files if path.parts[0] == "weights" or "assets" in path.parts}
    assert shipped == others | {path for path in files if path.suffix in (".py", ".toml", ".yml")}
    assert {Path("weights/spark/model_index.json"), Path("server/playground/assets/index.html")} <= shipped


def test_generate(spark: Any) -> None:
    answer = asyncio.run(spark.generate.local(SMALL))
    assert answer["model"] == "spark"
    assert size_of(answer["images"][0]["b64_json"]) == (256, 256)


def test_what_is_drawn_by_method_is_counted_as_any_other(spark: Any) -> None:
    def drawn() -> float:
        told = ask(spark.web.local(), "GET", "/metrics", headers=SIGNED).text
        lines = [line for line in told.splitlines() if line.startswith("kindling_images_total")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    before = drawn()
    asyncio.run(spark.generate.local(SMALL))
    assert drawn() == before + 1


def test_generate_says_what_is_wrong(spark: Any) -> None:
    answer = asyncio.run(spark.generate.local({"prompt": "x", "frames": 7}))
    assert answer["error"]["code"] == "unknown_parameter"


def test_web_draws(spark: Any) -> None:
    answer = ask(spark.web.local(), "POST", "/v1/images/generations", json={"prompt": "a circle"}, headers=SIGNED)
    assert answer.status_code == 200
    assert size_of(answer.json()["data"][0]["b64_json"]) == (256, 256)


def test_web_needs_a_key(spark: Any) -> None:
    web = spark.web.local()
    assert ask(web, "GET", "/v1/models").status_code == 401
    assert ask(web, "GET", "/v1/models", headers=SIGNED).json()["data"][0]["id"] == "spark"
    assert ask(web, "GET", "/ping").status_code == 200


@pytest.mark.parametrize(
    ("environ", "guarded"),
    [
        ({}, True),
        (KEYS, False),
        ({"MODAL_SECRET": "kindling"}, False),
        ({"KINDLING_ALLOW_OPEN": "true"}, False),
        ({**KEYS, "MODAL_PROXY_AUTH": "1"}, True),
        ({**KEYS, "MODAL_PROXY_AUTH": "true"}, True),
        ({"KINDLING_ALLOW_OPEN": "true", "MODAL_PROXY_AUTH": "yes"}, True),
        ({**KEYS, "MODAL_PROXY_AUTH": "off"}, False),
        ({"MODAL_PROXY_AUTH": ""}, False),
    ],
)
def test_modal_guards_what_has_no_keys(load: Callable[..., ModuleType], environ: dict[str, str], guarded: bool) -> None:
    assert load(**environ).PROXIED is guarded


def test_a_guard_that_is_asked_for_in_other_words_stops_the_deployment(load: Callable[..., ModuleType]) -> None:
    with pytest.raises(SettingsError, match="MODAL_PROXY_AUTH: should be true or false"):
        load(**KEYS, MODAL_PROXY_AUTH="enabled")


def test_what_nobody_would_guard_is_not_deployed(load: Callable[..., ModuleType]) -> None:
    with pytest.raises(StartError, match="Nothing would guard this: set KINDLING_API_KEYS"):
        load(MODAL_PROXY_AUTH="0")


@pytest.mark.parametrize(
    ("environ", "required"),
    [
        ({}, ["KINDLING_API_KEYS"]),
        (KEYS, []),
        ({"MODAL_PROXY_AUTH": "1"}, []),
        ({"MODAL_PROXY_AUTH": "0"}, ["KINDLING_API_KEYS"]),
        ({"KINDLING_ALLOW_OPEN": "1"}, []),
    ],
)
def test_only_a_secret_that_guards_must_have_keys(
    load: Callable[..., ModuleType], environ: dict[str, str], required: list[str]
) -> None:
    assert required == load(MODAL_SECRET="mine", **environ).REQUIRED


@pytest.mark.parametrize("environ", [{"MODAL_SECRET": "one-without-keys"}, {"MODAL_PROXY_AUTH": ""}])
def test_nothing_is_loaded_that_nobody_guards(load: Callable[..., ModuleType], environ: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match="KINDLING_API_KEYS"):
        entered(load(KINDLING_MODEL="spark", **environ))


def test_a_container_hears_who_guards_it_and_does_not_decide_again(
    load: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(**KEYS)
    monkeypatch.delenv("KINDLING_API_KEYS")
    assert load().PROXIED is False


def test_a_failed_boot_is_raised(load: Callable[..., ModuleType]) -> None:
    with pytest.raises(StartError, match="flux-schnell is not on the volume"):
        entered(load(**KEYS))


def test_a_gpu_that_cannot_be_seen_is_no_reason_to_draw_on_the_cpu(
    load: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load(KINDLING_MODEL="spark", **KEYS)
    monkeypatch.setenv("KINDLING_DEVICE", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StartError, match="torch sees no GPU"):
        entered(module)


def test_gpus_that_do_not_hold_the_model_are_rented_with_a_warning(
    load: Callable[..., ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    load(KINDLING_MODEL="flux-dev", KINDLING_OFFLOAD="blocks", KINDLING_PRECISION="bf16")
    assert "does not hold flux-dev whole. Its weights stream from host memory" in capsys.readouterr().err
    load(KINDLING_MODEL="flux-dev", KINDLING_OFFLOAD="auto")
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("verb", ["bake", "optimize"])
def test_nor_to_measure_or_compile_for_it(
    verb: str, load: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    module = load(KINDLING_MODEL="spark", **KEYS)
    monkeypatch.setenv("KINDLING_DEVICE", "")
    with pytest.warns(UserWarning, match="executing locally"), pytest.raises(subprocess.CalledProcessError):
        getattr(module, verb).local("spark")
    assert "torch sees no GPU" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("", [], ["start"]),
        ("cpu", ["prepare"], ["start"]),
        ("weights", ["prepare"], ["start"]),
        ("gpu", ["start"], ["restored"]),
    ],
)
def test_only_what_a_snapshot_can_hold_runs_before_it(
    load: Callable[..., ModuleType], kind: str, before: list[str], after: list[str]
) -> None:
    user_class = load(MODAL_SNAPSHOT=kind).Kindling._get_user_cls()
    for flag, names in {"ENTER_PRE_SNAPSHOT": before, "ENTER_POST_SNAPSHOT": after}.items():
        assert list(_find_callables_for_obj(user_class(), _PartialFunctionFlags[flag])) == names


def test_a_snapshot_of_anything_else_is_refused(load: Callable[..., ModuleType]) -> None:
    with pytest.raises(StartError, match="may be cpu, weights or gpu"):
        load(MODAL_SNAPSHOT="1")


def test_a_snapshot_with_weights_has_room_for_all_of_them_and_time_for_both_stages(
    load: Callable[..., ModuleType],
) -> None:
    plain, held = (load(MODAL_SNAPSHOT=kind) for kind in ("", "weights"))
    weights_mb = 2 * (plain.SPEC.parameters + plain.SPEC.other_parameters) / 1e6
    assert abs(held.HOST_MB - plain.HOST_MB - weights_mb) <= 1
    assert [one.Kindling().generate.info().startup_timeout for one in (plain, held)] == [240 + 60, 2 * 240 + 60]


def test_a_snapshot_has_the_weights_for_the_gpu_that_is_tried_first(load: Callable[..., ModuleType]) -> None:
    """Which need not be the cheapest, nor compute in the same precision."""
    asked = ("A100-80GB,L40S", "L40S,A100-80GB", "")
    assert [load(MODAL_GPU=each).FIRST.id for each in asked] == ["A100 80GB", "L40S", load().OFFERS[0].gpu.id]


def test_an_old_snapshot_has_its_whole_budget(load: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """This process was born before, as a restored one was."""
    born = time.monotonic()
    engine = without_model(load(MODAL_SNAPSHOT="cpu", **KEYS, KINDLING_GPU_PRICE="3.6"), monkeypatch).engine
    dollars = engine.meter.state()["dollars_this_process"]
    assert 1000 * dollars <= time.monotonic() - born < process_age()  # at a tenth of a cent a second
    assert engine.clock.elapsed <= time.monotonic() - born


def test_containers_of_a_gpu_snapshot_are_workers_of_their_own(
    load: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    random.seed(7)
    foreseen = random.Random(7).random()
    engine = without_model(load(MODAL_SNAPSHOT="gpu", **KEYS, KINDLING_GPU_PRICE="3.6"), monkeypatch).engine
    assert engine.meter.birth.identity != engine.clock.birth.identity
    assert engine.meter.state()["dollars_this_process"] < 0.001 * process_age()
    assert random.random() != foreseen  # ids of traces


def test_what_is_done_before_a_snapshot_asks_nothing_about_gpus(tmp_path: Path) -> None:
    """CUDA would remember for ever that there was none; so would cache-dit, and NVML would stay open."""
    code = """
import importlib, pynvml, sys, torch
from handler import GPUS, MODELS, Settings, preload
for name in ("is_available", "device_count", "_lazy_init", "get_device_properties"):
    setattr(torch.cuda, name, lambda *_: print("asked"))
pynvml.nvmlInit = lambda: print("opened")
for family in sorted({spec.family for spec in MODELS.values()}):
    importlib.import_module(family)
preload(Settings(model="spark", volume=sys.argv[1]), GPUS["L4"])
print("preloaded", "cache_dit" in sys.modules)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "preloaded False\n"


def test_the_lane_outlives_the_apps_lifespan_and_ends_with_the_container(
    load: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    container = without_model(load(**KEYS), monkeypatch)

    async def lifespan() -> None:
        manager = LifespanManager(container.web.local(), {})
        task = asyncio.create_task(manager.background_task())
        await manager.lifespan_startup()
        await manager.lifespan_shutdown()
        await task

    asyncio.run(lifespan())
    assert container.engine.state == "ready"
    leave(container)
    assert container.engine.state == "stopped"


def test_a_container_that_loses_its_gpu_takes_no_more(
    load: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[str] = []

    async def stop_fetching() -> None:
        left.append("left")

    container = without_model(load(**KEYS), monkeypatch)
    monkeypatch.setattr(modal, "is_local", lambda: False)
    monkeypatch.setattr(modal.experimental, "stop_fetching_inputs", SimpleNamespace(aio=stop_fetching))
    answer = asyncio.run(container.generate.local(SMALL))
    assert answer["error"]["code"] == "device_lost"
    assert left == ["left"]
    ask(container.web.local(), "GET", "/ping")
    assert left == ["left", "left"]
    leave(container)


def test_websockets_pass(spark: Any) -> None:
    """To the app, which closes one that has no key."""
    heard: list[Any] = []

    async def send(message: Any) -> None:
        heard.append(message)

    scope = {"type": "websocket", "path": "/ws", "headers": [], "query_string": b"", "subprotocols": []}
    asyncio.run(spark.web.local()(scope, None, send))
    assert heard == [{"type": "websocket.close", "code": 1008}]
