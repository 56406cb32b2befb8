"""The Ray application: on a real Ray of this machine's, with two small models and one that cannot start.

Ray is not in the virtual environment of the other tests. These run in one over that, which `make test` makes, and are
skipped elsewhere.
"""

import base64
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

import tiny
from handler import GPUS, MODELS
from handler.core.errors import SettingsError

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: run again in .venv/ray"),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
    pytest.mark.timeout(900),
]
ROOT = Path(__file__).parents[2]
KEY, TOKEN = "k" * 32, "7" * 64
HEAD = {"authorization": f"Bearer {KEY}"}
URL = "http://127.0.0.1:8000"
APP = "kindling"
SOON_S = 240.0  # for what Ray does in its own time
RED = {"prompt": "a red circle on a blue background", "size": "64x64", "seed": 7}
QUICK = {"max_replicas": 1, "look_back_period_s": 1, "metrics_interval_s": 0.3}
STAYS = QUICK | {"downscale_delay_s": 600}
LONG = {"prompt": "a red circle", "model": "sd1.5", "width": 1024, "height": 1024, "num_inference_steps": 50, "n": 4}
MODELS_HERE: list[dict[str, Any]] = [
    {"model": "spark", "autoscaling": STAYS},
    {"model": "sd1.5", "settings": {"KINDLING_QUEUE": "2", "KINDLING_BATCH": "1"}, "autoscaling": STAYS},
    {"model": "sdxl", "autoscaling": STAYS},  # which is not on the volume
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray of one node, whose environment has the settings."""
    volume = tmp_path_factory.mktemp("volume")
    tiny.write(MODELS["sd1.5"], volume)
    with pytest.MonkeyPatch.context() as patch:
        settings = {"KINDLING_VOLUME": str(volume), "KINDLING_API_KEYS": KEY, "KINDLING_COLD_START_BUDGET_S": "3600"}
        rays = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
        for name, value in {**settings, **rays, "PYTHONPATH": str(ROOT)}.items():
            patch.setenv(name, value)
        import ray  # which reads some of them at once
        from ray import serve

        ray.init(num_cpus=8, object_store_memory=100_000_000, include_dashboard=False, log_to_driver=False)
        yield
        serve.shutdown()
        ray.shutdown()


def deploy(models: list[dict[str, Any]]) -> None:
    import ray_app
    from ray import serve

    serve.run(ray_app.app(ray_app.Arguments(models=models)), name=APP)


@pytest.fixture(scope="module")
def served(cluster: None) -> Iterator[httpx.Client]:
    deploy(MODELS_HERE)
    with httpx.Client(base_url=URL, headers=HEAD, timeout=SOON_S) as client:
        yield client


def replicas(model: str) -> int:
    from ray import serve

    return serve.status().applications[APP].deployments[model].replica_states.get("RUNNING", 0)


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + SOON_S
    while not true():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.1)


def status(served: httpx.Client) -> tuple[int, int]:
    """How many requests replicas have, and how many wait for one."""
    told = served.get("/v1/status").json()
    return told["drawing"], told["waiting"]


def kill(model: str) -> None:
    """End the replica of a model as a node that is lost does."""
    import ray

    [name] = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True) if f"#{model}#" in each["name"]]
    ray.kill(ray.get_actor(name, namespace="serve"))


def picture(answer: httpx.Response) -> tuple[int, int]:
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))).size


def events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    return (json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line.startswith("data: "))


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("H100", "H100"),
        ("A100", "A100 40GB"),
        ("A100-80G", "A100 80GB"),
        ("A100 80GB", "A100 80GB"),
        ("RTX-PRO-6000", "RTX PRO 6000"),
    ],
)
def test_gpus_are_known_by_rays_names_and_by_ours(cluster: None, name: str, gpu: str) -> None:
    import ray_app

    assert ray_app._gpu(name) is GPUS[gpu]
    assert ray_app._gpu("") is None
    with pytest.raises(SettingsError, match="'V100' is not known"):
        ray_app._gpu("V100")


@pytest.mark.parametrize(
    ("shares", "fields", "gpus"),
    [(True, {}, 0.35), (False, {}, 1), (False, {"gpus": 0.5}, 0.5), (True, {"gpus": 0}, 0)],
)
def test_a_model_takes_a_part_of_a_gpu_where_others_may_have_the_rest(
    cluster: None, shares: bool, fields: dict[str, Any], gpus: float
) -> None:
    import ray_app

    deployment, _ = ray_app._model(ray_app.Chosen(model="flux-schnell", **fields), GPUS["H100"], shares)
    assert deployment.ray_actor_options["num_gpus"] == gpus


def test_as_many_replicas_as_cores_find_room_while_a_front_is_replaced() -> None:
    import ray_app

    assert all(cores * ray_app.CPUS + 2 * ray_app.FRONTS_CPUS <= cores for cores in (1, 2, 8))


@pytest.mark.parametrize(
    ("asked", "status", "code"),
    [
        ({"model": "nope"}, 404, "model_not_found"),
        ({"model": "sd1.5", "size": "9999x64"}, 422, "out_of_range"),
        ({"sampler": "x"}, 400, "unknown_parameter"),
    ],
)
def test_what_cannot_be_drawn_wakes_no_replica(
    served: httpx.Client, asked: dict[str, Any], status: int, code: str
) -> None:
    answer = served.post("/v1/images/generations", json=RED | asked)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert [replicas(model) for model in ("spark", "sd1.5", "sdxl")] == [0, 0, 0]


def test_nobody_without_a_key_is_answered(served: httpx.Client) -> None:
    assert httpx.post(f"{URL}/v1/images/generations", json=RED).status_code == 401
    assert httpx.get(f"{URL}/health").status_code == 200
    assert [replicas(model) for model in ("spark", "sd1.5")] == [0, 0]


def test_all_models_are_listed(served: httpx.Client) -> None:
    names = [each["id"] for each in served.get("/v1/models").json()["data"]]
    assert {"spark", "sd1.5", "sdxl"} < {*names}
    assert served.get("/v1/models/sd1.5").json()["model"] == "sd1.5"
    assert replicas("sd1.5") == 0


def test_the_model_that_is_asked_for_draws(served: httpx.Client) -> None:
    for model in ("sd1.5", "spark"):
        answer = served.post("/generate", json={"prompt": "a cat", "width": 64, "height": 64, "model": model})
        assert answer.json()["images"][0]["parameters"]["model"] == model
    assert served.post("/generate", json={"prompt": "x"}).json()["images"][0]["parameters"]["model"] == "spark"
    form = {"prompt": "a cat", "model": "spark", "size": "64x64"}
    file = {"image": base64.b64decode(served.post("/v1/images/generations", json=RED).json()["data"][0]["b64_json"])}
    assert picture(served.post("/v1/images/edits", data=form, files=file)) == (64, 64)
    assert (replicas("spark"), replicas("sd1.5"), replicas("sdxl")) == (1, 1, 0)


def test_a_stream_tells_its_steps_and_shows_what_comes(served: httpx.Client) -> None:
    asked = RED | {"stream": True, "partial_images": 2, "progress": True}
    with served.stream("POST", "/v1/images/generations", json=asked) as answer:
        kinds = [event["type"].rpartition(".")[2] for event in events(answer)]
    assert kinds[-1] == "completed"
    assert {"progress", "partial_image"} < {*kinds}


def test_a_model_that_cannot_start_says_why(served: httpx.Client) -> None:
    answer = served.post("/v1/images/generations", json=RED | {"model": "sdxl"})
    assert answer.status_code == 503
    assert "python -m handler fetch sdxl" in answer.json()["error"]["message"]
    assert int(answer.headers["retry-after"]) > 0


def test_a_key_brings_the_same_picture_though_its_replica_is_gone(served: httpx.Client) -> None:
    asked = {"json": {"prompt": "a cat", "size": "64x64"}, "headers": {"idempotency-key": "once"}}
    first = served.post("/v1/images/generations", **asked)
    kill("spark")
    again = served.post("/v1/images/generations", **asked)
    assert again.content == first.content
    assert again.headers["idempotent-replayed"] == "true"


def test_what_a_killed_replica_was_drawing_is_drawn_by_another(served: httpx.Client) -> None:
    asked = LONG | {"n": 1, "width": 256, "height": 256, "stream": True, "progress": True}
    with served.stream("POST", "/generate", json=asked) as answer:
        told = events(answer)
        assert next(told)["type"].endswith("progress")
        kill("sd1.5")
        last = list(told)[-1]
    assert last["type"].endswith("completed"), last


def test_what_nobody_waits_for_is_drawn_no_further(served: httpx.Client) -> None:
    """Behind four pictures that would take very long another one is drawn at once."""
    with served.stream("POST", "/generate", json=LONG | {"stream": True, "progress": True}) as answer:
        next(events(answer))
    small = {"prompt": "x", "model": "sd1.5", "width": 64, "height": 64, "num_inference_steps": 2}
    assert served.post("/generate", json=small).status_code == 200


def test_what_is_too_much_is_refused_with_a_time_to_come_again(served: httpx.Client) -> None:
    """One is drawn, three wait at the replica and two at the front."""
    leave = threading.Event()

    def wait() -> None:
        with served.stream("POST", "/generate", json=LONG | {"stream": True, "progress": True}) as answer:
            assert answer.status_code == 200
            leave.wait()

    with ThreadPoolExecutor(6) as others:
        try:
            for there in ((1, 0), (2, 0), (3, 0), (4, 0), (4, 1), (4, 2)):
                others.submit(wait)
                until(lambda there=there: status(served) == there)
            answer = served.post("/generate", json=LONG)
        finally:
            leave.set()
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "queue_full"
    assert int(answer.headers["retry-after"]) > 0


def test_an_update_loses_no_request(served: httpx.Client) -> None:
    going, answers = threading.Event(), list[httpx.Response]()

    def ask() -> None:
        with httpx.Client(base_url=URL, headers=HEAD, timeout=SOON_S) as client:
            while not going.is_set():
                answers.append(client.post("/v1/images/generations", json=RED | {"n": 2}))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        until(lambda: answers)
        deploy([MODELS_HERE[0] | {"settings": {"KINDLING_MAX_N": "1"}}, MODELS_HERE[1]])
        until(lambda: answers[-1].status_code == 422)  # the new setting holds
    finally:
        going.set()
        asking.join()
    assert {each.status_code for each in answers} == {200, 422}


def test_the_guides_commands_serve(served: httpx.Client) -> None:
    """`serve run` with the guide's words, on this Ray; `ray start` and `ray stop` know theirs."""
    import ray

    guide = (ROOT / "docs/ray.md").read_text()
    [run] = re.findall(r"^serve run .*$", guide, re.M)
    [begin] = re.findall(r"^ray start .*$", guide, re.M)
    [token] = re.findall(r"^ray get-auth-token .*(?= >)", guide, re.M)
    programs = Path(sys.executable).parent
    for command in (begin, token, "ray stop"):
        program, verb, *options = command.split()
        known = subprocess.run([programs / program, verb, "--help"], capture_output=True, text=True, check=True).stdout
        assert all(option.partition("=")[0] in known for option in options), command
    program, *words = run.split()
    where = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    subprocess.run([programs / program, *words, "--non-blocking"], cwd=ROOT, env=where, check=True, timeout=SOON_S)
    assert picture(served.post("/v1/images/generations", json=RED)) == (64, 64)
    assert served.get("/v1/models").json()["data"][0]["id"] == "spark"


def test_a_replica_leaves_when_nobody_asks_and_another_comes(served: httpx.Client) -> None:
    deploy([{"model": "spark", "autoscaling": QUICK | {"downscale_delay_s": 0.5}}])
    assert picture(served.post("/v1/images/generations", json=RED)) == (64, 64)
    until(lambda: replicas("spark") == 0)
    assert picture(served.post("/v1/images/generations", json=RED)) == (64, 64)
