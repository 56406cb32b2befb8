"""The unmodified `modal deploy` against Modal's control plane on loopback, and what it deployed in Modal's runtime."""

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modal
import numpy as np
import pytest
from modal_proto import api_pb2 as pb
from PIL import Image

from handler import ImageRequest, Worker
from handler.worker.boots import last_boots
from modal_plane import ROOT, Ended, Input, Plane, http

SERVING = "Kindling.*"
ASKED = {"prompt": "a red circle on a blue background", "seed": 7, "num_inference_steps": 4}
KEY = "a-key-that-nobody-else-has"


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    """A plane with spark deployed on it, behind one key."""
    with Plane(tmp_path_factory.mktemp("modal")) as plane:
        deployed(plane, KINDLING_MODEL="spark", KINDLING_API_KEYS=KEY, HF_TOKEN="hf_unused")
        yield plane


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Plane]:
    """A plane with nothing on it yet."""
    with Plane(tmp_path) as plane:
        yield plane


@pytest.fixture(scope="module")
def ended(plane: Plane) -> Ended:
    """A whole life of one container that was asked by method and over HTTP."""
    body = json.dumps({"prompt": ASKED["prompt"], "seed": 7, "num_inference_steps": 4}).encode()
    return plane.contain(
        SERVING,
        [
            Input(ASKED, "generate"),
            Input(ASKED, "generate"),
            http("POST", "/v1/images/generations", body, authorization=f"Bearer {KEY}"),
            http("GET", "/v1/models"),
        ],
        KINDLING_VOLUME=volume(plane),
    )


def deployed(plane: Plane, **environment: str) -> None:
    done = plane.deploy(**environment)
    assert done.returncode == 0, done.stdout


def volume(plane: Plane) -> str:
    """Where the plane mounts the volume."""
    folder = plane.folder / "volume"
    folder.mkdir(exist_ok=True)
    return str(folder)


def sent(plane: Plane) -> list[str]:
    """The files that layers of the image are made with, in order."""
    layers = [plane.objects[layer].image for layer in plane.objects if layer.startswith("im-")]
    return [file.data.decode() for layer in layers for file in layer.context_files]


def locked(name: str) -> str:
    return (ROOT / "platform" / "locks" / f"{name}.lock").read_text()


def pixels(b64: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))))


def test_the_plane_speaks_this_version() -> None:
    assert modal.__version__ == "1.6.4"


def test_gpus_in_order_of_preference(plane: Plane) -> None:
    assert plane.gpus(SERVING) == plane.gpus("bake") == ["L4", "A10", "L40S"]
    assert plane.gpus("optimize") == ["L4"]
    assert plane.gpus("fetch") == plane.gpus("doctor") == [""]


def test_it_scales_to_zero_and_has_time_to_start(plane: Plane) -> None:
    serving = plane.function(SERVING)
    scaling = serving.autoscaler_settings
    assert (scaling.min_containers, scaling.max_containers, scaling.scaledown_window) == (0, 4, 240)
    assert (serving.startup_timeout_secs, serving.timeout_secs) == (300, 600)
    assert (serving.max_concurrent_inputs, serving.target_concurrent_inputs) == (16, 4)


def test_scale_gpu_and_region_are_chosen_while_deploying(fresh: Plane) -> None:
    """`bake` runs on the GPU that will serve."""
    deployed(fresh, MODAL_GPU="A100-80GB", MODAL_MIN="1", MODAL_MAX="2", MODAL_REGION="eu,us-east")
    scaling, placement = fresh.function(SERVING).autoscaler_settings, fresh.function(SERVING).scheduler_placement
    assert (scaling.min_containers, scaling.max_containers) == (1, 2)
    assert list(placement.regions) == ["eu", "us-east"]
    assert fresh.gpus(SERVING) == fresh.gpus("bake") == ["A100-80GB"]
    given = fresh.environment(fresh.function(SERVING))
    assert {name for name in given if name.startswith("MODAL_")} == {
        *("MODAL_GPU", "MODAL_MIN", "MODAL_MAX", "MODAL_PROXY_AUTH")
    }


def test_every_function_has_the_volume(plane: Plane) -> None:
    mounts = [plane.function(name).volume_mounts[0] for name in (SERVING, "fetch", "bake", "optimize", "doctor")]
    assert {mount.mount_path for mount in mounts} == {"/kindling"}
    assert {plane.objects[mount.volume_id].deployment_name for mount in mounts} == {"kindling"}
    assert all(mount.allow_background_commits and not mount.read_only for mount in mounts)


def test_no_snapshot_unless_asked_for(plane: Plane, fresh: Plane) -> None:
    assert not plane.function(SERVING).checkpointing_enabled
    assert not plane.function(SERVING).experimental_options
    deployed(fresh, MODAL_SNAPSHOT="cpu")
    assert fresh.function(SERVING).checkpointing_enabled
    assert not fresh.function(SERVING).experimental_options
    deployed(fresh, MODAL_SNAPSHOT="gpu")
    assert fresh.function(SERVING).checkpointing_enabled
    assert fresh.function(SERVING).experimental_options == {"enable_gpu_snapshot": "True"}


@pytest.mark.parametrize(
    ("kind", "boots", "preloaded"),
    [("cpu", 0, ["import"]), ("weights", 0, ["volume", "import", "weights"]), ("gpu", 1, [])],
)
def test_a_container_goes_on_from_its_snapshot(
    fresh: Plane, monkeypatch: pytest.MonkeyPatch, kind: str, boots: int, preloaded: list[str]
) -> None:
    """Without GPU memory, the worker is born after it; with it, nothing is left to load."""
    seen, take = [], fresh.ContainerCheckpoint

    def look(request: Any) -> Any:
        seen.append(len(last_boots(Path(volume(fresh)), 9)))
        return take(request)

    monkeypatch.setattr(fresh, "ContainerCheckpoint", look)
    deployed(fresh, KINDLING_MODEL="spark", KINDLING_API_KEYS=KEY, MODAL_SNAPSHOT=kind)
    ended = fresh.contain(SERVING, [Input(ASKED, "generate")], KINDLING_VOLUME=volume(fresh))
    assert (seen, ended.failures) == ([boots], []), ended.log
    assert ended.values[0]["images"]
    [boot] = last_boots(Path(volume(fresh)), 9)
    assert [phase["name"] for phase in boot["preloaded"]] == preloaded
    assert boot["weights"].endswith(", preloaded") is (kind == "weights")


def test_a_snapshot_that_cannot_be_made_says_why_and_none_is_taken(fresh: Plane) -> None:
    deployed(fresh, KINDLING_MODEL="flux-schnell", KINDLING_API_KEYS=KEY, MODAL_SNAPSHOT="weights")
    ended = fresh.contain(SERVING, [Input(ASKED, "generate")], KINDLING_VOLUME=volume(fresh))
    assert [failure for failure in ended.failures if "flux-schnell is not on the volume" in failure]
    assert not fresh.calls["ContainerCheckpoint"]
    [boot] = last_boots(Path(volume(fresh)), 9)
    assert boot["outcome"] == "failed"


def test_keys_travel_as_secrets_alone(plane: Plane) -> None:
    given = plane.environment(plane.function(SERVING))
    assert given == {
        "KINDLING_API_KEYS": KEY,
        "KINDLING_MODEL": "spark",
        "KINDLING_VOLUME": "/kindling",
        "MODAL_PROXY_AUTH": "",
    }
    assert plane.environment(plane.function("fetch")) == given | {"HF_TOKEN": "hf_unused"}
    public = [call for name, calls in plane.calls.items() if name != "SecretGetOrCreate" for call in calls]
    assert public
    assert not any(secret in call.SerializeToString() for call in public for secret in (KEY.encode(), b"hf_unused"))


def test_a_named_secret_is_used_and_modal_guards_what_has_no_keys(plane: Plane, fresh: Plane) -> None:
    deployed(fresh, MODAL_SECRET="mine")
    secrets = [fresh.objects[secret].deployment_name for secret in fresh.function(SERVING).secret_ids]
    assert secrets == ["mine", ""]
    asked = [call.required_keys for call in fresh.calls["SecretGetOrCreate"] if call.deployment_name == "mine"]
    assert asked == [["KINDLING_API_KEYS"]]  # one that has none guards nothing: Modal refuses to deploy with it
    assert not plane.function(SERVING).method_definitions["web"].webhook_config.requires_proxy_auth
    deployed(fresh)
    assert fresh.function(SERVING).method_definitions["web"].webhook_config.requires_proxy_auth


def test_the_image_is_pinned(plane: Plane) -> None:
    commands = plane.image(plane.function(SERVING))
    assert commands[0].startswith("FROM python:3.11.")
    assert "RUN apt-get install -y gcc gfortran build-essential" in commands  # Inductor's compiler comes with it
    assert re.fullmatch(
        r"RUN /\.uv/uv pip install .* --no-deps --require-hashes --requirements /\.uv/0/requirements\.lock",
        commands[-6],
    )
    assert commands[-5:-1] == ["FROM base", "COPY . /", "FROM base", "RUN python -m compileall -q /root/handler"]
    assert commands[-1] == "RUN cd /root && python -c 'import handler.model.families'"
    assert sent(plane) == [locked("torch-cu130"), locked("requirements")]


def test_another_build_of_torch_is_installed(fresh: Plane) -> None:
    """The GPUs are those that it has code for."""
    deployed(fresh, CUDA="cu126", KINDLING_MODEL="flux2-dev")
    assert sent(fresh) == [locked("torch-cu126"), locked("requirements")]
    assert fresh.gpus(SERVING) == ["H100!", "H200"]


def test_handlers_sources_and_weights_are_shipped_and_nothing_else(plane: Plane) -> None:
    package = ROOT / "handler"
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    wanted = {
        f"/root/{path.relative_to(ROOT)}"
        for path in files
        if path.suffix in (".py", ".toml", ".yml") or {"weights", "assets"} & set(path.parts)
    }
    assert set(plane.mounted(plane.function(SERVING))) == {"/root/modal_app.py"} | wanted
    assert "/root/handler/weights/spark/model_index.json" in wanted


def test_a_misspelt_setting_stops_the_deployment(fresh: Plane) -> None:
    done = fresh.deploy(KINDLING_MODLE="spark")
    assert done.returncode == 1
    assert "KINDLING_MODLE is not a setting" in done.stdout
    assert not fresh.calls["AppPublish"]


def test_a_container_draws_what_any_worker_draws(ended: Ended, spark: Worker) -> None:
    drawn, _ = spark.generate(spark.spec.recipe(ImageRequest(**ASKED)))
    first, second, (status, over_http), _ = ended.values
    assert status == 200
    for answer in (first["images"][0], second["images"][0], json.loads(over_http)["data"][0]):
        assert np.array_equal(pixels(answer["b64_json"]), drawn.rgb)


def test_a_container_asks_for_a_key(ended: Ended) -> None:
    assert ended.values[-1][0] == 401


def test_a_container_leaves_in_good_order(ended: Ended, plane: Plane) -> None:
    assert (ended.code, ended.failures, ended.commits) == (0, [], 1)
    assert '"outcome": "ready"' in ended.log
    assert list(Path(volume(plane), "boots").iterdir())


def test_a_failed_start_is_reported_with_its_reason(fresh: Plane) -> None:
    deployed(fresh, KINDLING_MODEL="flux-schnell", KINDLING_API_KEYS=KEY)
    ended = fresh.contain(SERVING, [Input(ASKED, "generate")], KINDLING_VOLUME=volume(fresh))
    assert [failure for failure in ended.failures if "flux-schnell is not on the volume" in failure]
    assert (ended.values, ended.commits) == ([], 1)  # the boot record is kept, for `doctor` to tell
    assert '"outcome": "failed"' in ended.log
    told = fresh.contain("doctor", [Input()], KINDLING_VOLUME=volume(fresh))
    assert "flux-schnell is not on the volume" in told.log


def test_fetch_runs_without_a_gpu_and_commits(plane: Plane) -> None:
    ended = plane.contain("fetch", [Input("spark")], KINDLING_VOLUME=volume(plane))
    assert "spark ships with Kindling" in ended.log
    assert (ended.values, ended.failures) == ([None], [])
    assert ended.commits == 2  # its own, before it answers, and the container's last


def test_a_fetch_that_fails_says_why(plane: Plane) -> None:
    ended = plane.contain("fetch", [Input("flux-snell")], KINDLING_VOLUME=volume(plane))
    assert "kindling: There is no model 'flux-snell'" in ended.log
    assert "CalledProcessError" in ended.values[0]


@pytest.mark.parametrize(
    ("command", "said", "cxx"),
    [
        (["fetch"], "spark ships with Kindling", ""),
        (["doctor"], "KINDLING_COLD_START_BUDGET_S", ""),
        (["bake", "--model", "spark"], "there is no C++ compiler", "none"),
        pytest.param(["bake", "--model", "spark"], "compile artifacts: /", "", marks=pytest.mark.judge),
    ],
)
def test_modal_run(fresh: Plane, command: list[str], said: str, cxx: str) -> None:
    """What a bake compiles is cli/test_bake.py's."""
    contained = {"KINDLING_VOLUME": volume(fresh)} | ({"CXX": cxx} if cxx else {})
    done = fresh.run(*command, contained=contained, KINDLING_MODEL="spark")
    assert done.returncode == 0, done.stdout
    assert said in done.stdout
    [created], [published] = fresh.calls["AppCreate"], fresh.calls["AppPublish"]
    assert created.app_state == published.app_state == pb.APP_STATE_EPHEMERAL
    assert {SERVING, command[0]} <= set(published.function_ids)
    assert fresh.gpus(command[0]) == (["L4", "A10", "L40S"] if command[0] == "bake" else [""])
    assert fresh.function(command[0]).volume_mounts[0].mount_path == "/kindling"
    [left] = fresh.calls["AppClientDisconnect"]
    assert left.reason == pb.APP_DISCONNECT_REASON_ENTRYPOINT_COMPLETED


def test_modal_run_fails_with_the_function(fresh: Plane) -> None:
    done = fresh.run("fetch", "--model", "flux-snell", contained={"KINDLING_VOLUME": volume(fresh)})
    assert done.returncode == 1
    assert "kindling: There is no model 'flux-snell'" in done.stdout
