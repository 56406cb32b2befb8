"""A RunPod volume is found, created and filled, on pods that are processes, and gone in the end, whatever happens."""

import json
import os
import re
import signal
import site
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import runpod_deploy

import runpod_api
import runpod_fill
import runpod_lease
import runpod_pod
from runpod_plane import DEADLINE_S, clean_environment
from runpod_rest import KEY, Rest, problem

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "platform" / "runpod_deploy.py")
IMAGE = "registry/kindling:1"
SPARK = ["spark", "--image", IMAGE, "--volume", "weights"]
FLUX = ["flux-schnell", "--image", IMAGE]
TOKEN = "{{ RUNPOD_SECRET_hub }}"
FOREVER = "#!/bin/sh\necho hello\nexec sleep 1000\n"
SYSTEM_PYTHON = Path("/usr/bin/python3.11")
ROOTS = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOTS, reason="only root owns what others may not write to")
# Root's pods run commands as another user, who may not use a Python in root's home.
pytestmark = [
    pytest.mark.skipif(ROOTS and not SYSTEM_PYTHON.exists(), reason="there is no Python that all may use"),
    pytest.mark.usefixtures("interruptible"),
]


@pytest.fixture
def rest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Rest]:
    """The API that the script speaks to, with a key that it accepts."""
    if ROOTS:
        for folder in (tmp_path, *tmp_path.parents):
            folder.chmod(folder.stat().st_mode | stat.S_IXOTH | stat.S_IROTH)
    with Rest(tmp_path) as rest:
        rest.variables = {"PYTHONPATH": os.pathsep.join([str(ROOT), *site.getsitepackages()]), "KINDLING_DEVICE": "cpu"}
        rest.python = str(SYSTEM_PYTHON) if ROOTS else rest.python
        monkeypatch.setattr("runpod_api.API", f"{rest.base}/v2")
        monkeypatch.setenv("RUNPOD_API_KEY", KEY)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield rest


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a deployment says that ends with the exit code."""

    def run(code: int, *arguments: str) -> str:
        assert runpod_deploy.main(arguments) == code
        return capsys.readouterr().err

    return run


def posted(rest: Rest) -> list[str]:
    """The collections to which something was added, in that order."""
    return [path.removeprefix("/v2/") for method, path in rest.seen if method == "POST"]


def pod_of(rest: Rest, *arguments: str, **env: str) -> Any:
    """A pod whose program is told this, and what its volume holds."""
    body = {
        "name": "kindling-fill-vol1-x",
        "image": IMAGE,
        "args": f"python -u platform/runpod_pod.py {' '.join(arguments)}",
        "env": {"KINDLING_VOLUME": "/runpod-volume", "KINDLING_MODEL": "spark", **env},
        "gpu": {"id": "NVIDIA A40"},
        "mounts": {"network": [{"volumeId": "vol1", "path": "/runpod-volume"}]},
        "dataCenterIds": ["EU-RO-1"],
    }
    status, row = rest.create("pods", body)
    assert status == 201
    return rest.pods[row["id"]]


def states(pod: Any) -> list[dict[str, Any]]:
    """What a pod said for who follows it."""
    said = [line for line in pod.lines if line.startswith(runpod_pod.SAYS)]
    return [json.loads(line.removeprefix(runpod_pod.SAYS)) for line in said]


@pytest.mark.parametrize("name", ["vol1", "weights"])
def test_a_volume_is_found_by_its_id_and_by_its_name(rest: Rest, told: Callable[..., str], name: str) -> None:
    said = told(0, *FLUX, "--volume", name)
    assert "weights (vol1) in EU-RO-1: 100 GB cost about $7.00 a month" in said
    assert rest.rows["endpoints"][0]["networkVolumes"] == ["vol1"]
    assert posted(rest) == ["templates", "serverless"]


def test_a_volume_has_room_for_what_is_baked(rest: Rest, told: Callable[..., str]) -> None:
    qwen = ["qwen-image", *FLUX[1:], "--volume", "new"]
    assert "such as --size 116 --data-center EU-RO-1" in told(1, *qwen, "--fill")
    place = ["--size", "60", "--data-center", "EU-RO-1"]
    says = "--size 60 does not hold qwen-image, whose files take 58 GB, and with what is baked 96."
    assert says in told(1, *qwen, *place, "--fill")
    assert not rest.rows["networkVolumes"][1:]
    rest.rows["networkVolumes"][0]["size"] = 60
    old = ["qwen-image", *FLUX[1:], "--volume", "vol1"]
    assert "vol1 has 60 GB, and what is fetched and baked takes 96: make it larger" in told(1, *old, "--fill")
    told(0, *qwen, *place, "--fill", "fetch", "--dry-run")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["new"],
            "To create it, add --size and one --data-center, such as --size 54 --data-center EU-RO-1: 54 GB cost",
        ),
        (["new", "--size", "60"], "To create it, add --size and one --data-center"),
        (
            ["new", "--size", "20", "--data-center", "EU-RO-1"],
            "--size 20 does not hold flux-schnell, whose files take 34",
        ),
        (["twice"], "2 network volumes named twice: say which by id, of a, b"),
        (["vol1", "--data-center", "US-KS-2"], "is in EU-RO-1, where workers and pods must be"),
        (["", "--size", "60"], "name it with --volume"),
        (["", "--fill"], "name it with --volume"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_volume_that_is_not_meant_is_refused(
    rest: Rest, told: Callable[..., str], options: list[str], says: str
) -> None:
    rest.rows["networkVolumes"] += [rest.volume(identity, "twice", "EU-RO-1", 10) for identity in "ab"]
    assert says in told(1, *FLUX, "--volume", *options)
    assert posted(rest) == []


def test_a_volume_is_created_and_its_price_is_said(rest: Rest, told: Callable[..., str]) -> None:
    said = told(0, *FLUX, "--volume", "new", "--size", "1200", "--data-center", "US-KS-2")
    assert "1200 GB cost about $80.00 a month, filled or not, until the volume is deleted" in said
    made = rest.rows["networkVolumes"][-1]
    assert (made["name"], made["size"], made["dataCenter"]) == ("new", 1200, "US-KS-2")
    assert rest.rows["endpoints"][0]["networkVolumes"] == [made["id"]]
    assert posted(rest) == ["network-volumes", "templates", "serverless"]


def test_nothing_is_bought_where_the_endpoint_cannot_be(rest: Rest, told: Callable[..., str]) -> None:
    rest.rows["endpoints"].append({"id": "old", "name": "kindling-flux-schnell", "type": "LOAD_BALANCER"})
    assert "RunPod cannot make" in told(1, *FLUX, "--volume", "new", "--size", "60", "--data-center", "US-KS-2")
    assert posted(rest) == []


def test_a_dry_run_shows_what_is_bought(
    rest: Rest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("KINDLING_API_KEYS", "{{ RUNPOD_SECRET_keys }}")
    order = ["--volume", "new", "--size", "60", "--data-center", "EU-RO-1", "--fill", "optimize"]
    assert runpod_deploy.main([*FLUX, *order, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert "60 GB cost about $4.20 a month" in err
    volume, pod, *_ = (request["json"] for request in json.loads(out))
    assert volume == {"name": "new", "size": 60, "dataCenter": "EU-RO-1"}
    assert pod["args"] == "python -u platform/runpod_pod.py 360 300 fetch optimize bake"
    assert pod["env"]["HF_TOKEN"] == TOKEN
    assert "KINDLING_API_KEYS" not in pod["env"]
    assert rest.seen == []


@pytest.mark.parametrize(("token", "says"), [("", "accepted its licence"), ("hf_canary", "keep it as a secret")])
def test_a_token_is_a_secret(
    rest: Rest, told: Callable[..., str], monkeypatch: pytest.MonkeyPatch, token: str, says: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    said = told(1, *FLUX, "--volume", "vol1", "--fill")
    assert says in said
    assert "HF_TOKEN='{{ RUNPOD_SECRET_name }}'" in said
    assert "canary" not in said
    assert rest.seen == []


def test_a_pod_fills_the_volume_and_is_gone_before_the_endpoint_is_there(
    rest: Rest, told: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    rest.secrets["hub"] = "hf_canary"
    said = told(0, *SPARK, "--fill", "fetch")
    assert re.search(r"rented: kindling-fill-vol1-\w{8} \(pod0\), NVIDIA RTX A4000, \$0\.40 an hour", said)
    assert "by itself after 60 minutes: $0.57 at most" in said
    assert "pod: fetch\npod | spark ships with Kindling: there is nothing to fetch." in said
    assert "canary" not in said
    assert posted(rest) == ["pods", "templates", "serverless"]
    assert rest.seen.index(("DELETE", "/v2/pods/pod0")) < rest.seen.index(("POST", "/v2/templates"))
    assert (rest.pods, rest.rows["pods"]) == ({}, [])
    assert not list((rest.folder / "vol1").glob(".filling*"))


def test_the_pod_gets_a_gpu_that_the_endpoint_has(rest: Rest, told: Callable[..., str]) -> None:
    told(0, *SPARK, "--gpu", "NVIDIA L40S", "--gpu", "NVIDIA L40")
    rest.full.add("NVIDIA L40S")
    assert "NVIDIA L40, " in told(0, *SPARK, "--fill", "fetch")


def test_no_gpu_is_free(rest: Rest, told: Callable[..., str]) -> None:
    rest.full |= {"NVIDIA L4", "NVIDIA L40S"}
    said = told(1, *SPARK, "--fill", "--gpu", "NVIDIA L4", "--gpu", "NVIDIA L40S")
    assert "No pod could be rented in EU-RO-1, of NVIDIA L4, NVIDIA L40S" in said
    assert "no longer any instances available" in said
    assert posted(rest) == ["pods", "pods"]


def test_a_volume_is_filled_by_one_pod_at_a_time(rest: Rest, told: Callable[..., str]) -> None:
    rest.rows["pods"].append({"id": "other", "name": "kindling-fill-vol1-0", "status": "RUNNING"})
    assert "kindling-fill-vol1-0 (other) is filling the volume already" in told(1, *SPARK, "--fill")
    assert posted(rest) == []


def test_a_step_that_fails_says_why_and_leaves_no_pod(rest: Rest, told: Callable[..., str]) -> None:
    rest.variables["KINDLING_DEVICE"] = "cuda"
    rest.variables["CUDA_VISIBLE_DEVICES"] = ""
    said = told(1, *SPARK, "--fill", "bake")
    assert "torch sees no GPU" in said
    assert "The volume vol1 is not filled: bake failed with exit code" in said
    assert "No endpoint was changed" in said
    assert (posted(rest), rest.pods) == (["pods"], {})


def test_a_stream_that_is_cut_is_taken_up_where_it_was(
    rest: Rest, told: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runpod_fill, "PAUSE_S", 0)
    rest.burst = 1
    said = told(0, *SPARK, "--fill", "fetch")
    assert re.findall("^pod.*", said, re.M) == [
        "pod: fetch",
        "pod | spark ships with Kindling: there is nothing to fetch.",
    ]


def test_a_log_that_may_not_be_read_is_no_pod_that_does_nothing(
    rest: Rest, told: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it refuses only of a stream that is taken up again, it is asked from the start."""
    monkeypatch.setattr(runpod_fill, "PAUSE_S", 0)

    def refuses(after: int) -> bool:
        if after:
            rest.burst = 10**9
        return after > 0

    rest.burst, rest.refuses_log = 1, refuses
    said = told(0, *SPARK, "--fill", "fetch")
    assert "pod: fetch" in said
    rest.refuses_log = lambda after: True
    said = told(1, *SPARK, "--fill", "fetch")
    assert "RunPod answered 403 for a log" in said
    assert rest.pods == {}


def test_a_pod_that_ends_without_a_word(rest: Rest, tmp_path: Path) -> None:
    with started(rest, tmp_path) as process:
        rest.delete("pod0")
        assert "The pod ended (TERMINATED) before it said" in process.communicate(timeout=DEADLINE_S)[1]
        assert process.returncode == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGHUP, 130)])
def test_who_stops_it_leaves_no_pod(rest: Rest, tmp_path: Path, number: int, code: int) -> None:
    with started(rest, tmp_path) as process:
        process.send_signal(number)
        said = process.communicate(timeout=DEADLINE_S)[1]
    assert re.search(r"deleted: kindling-fill-vol1-\w+ \(pod0\)\nrunpod_deploy: stopped", said)
    assert (process.returncode, rest.pods) == (code, {})


class started:
    """The script as a process of its own, once its pod, which never ends, has said something."""

    def __init__(self, rest: Rest, folder: Path) -> None:
        rest.python = program(folder, FOREVER)
        environment = clean_environment(folder, RUNPOD_API_KEY=KEY, RUNPOD_API_BASE_URL=rest.base)
        command = [sys.executable, "-u", SCRIPT, *SPARK, "--fill"]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> "subprocess.Popen[str]":
        self.until("pod | hello")
        return self.process

    def until(self, words: str) -> None:
        assert self.process.stderr
        assert any(words in line for line in self.process.stderr)

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stderr
        self.process.stderr.close()


def program(folder: Path, text: str) -> str:
    """What a pod runs in the place of Python."""
    script = folder / "program"
    script.write_text(text)
    script.chmod(0o755)
    return str(script)


def test_a_second_signal_breaks_off_nothing_that_the_first_has_begun(rest: Rest) -> None:
    """Several come at once where a terminal is closed, and from systemd."""
    tidied = list[bool]()

    def stopped_twice() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGTERM)
            tidied.append(True)

    with (
        runpod_api.connected(KEY) as client,
        pytest.raises(KeyboardInterrupt),
        runpod_lease.ended_at_last(client, runpod_lease.Lease("x")),
    ):
        stopped_twice()
    assert tidied
    assert rest.seen == [("GET", "/v2/pods")]


def test_a_pod_that_comes_after_who_asked_for_it_has_left_is_deleted(
    rest: Rest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, looked, answer, create = threading.Event(), threading.Event(), rest.answer, rest.create

    def late(collection: str, body: dict[str, Any]) -> tuple[int, Any]:
        asked.set()
        assert looked.wait(DEADLINE_S)
        return create(collection, body)

    def answered(method: str, path: str, *rest_: Any) -> tuple[int, Any]:
        found = answer(method, path, *rest_)
        if asked.is_set() and (method, path) == ("GET", "/v2/pods"):
            looked.set()
        return found

    monkeypatch.setattr(rest, "create", late)
    monkeypatch.setattr(rest, "answer", answered)
    script = started(rest, tmp_path)
    try:
        assert asked.wait(DEADLINE_S)
        script.process.send_signal(signal.SIGINT)
        said = script.process.communicate(timeout=DEADLINE_S)[1]
    finally:
        script.__exit__()
    assert "whether RunPod has rented kindling-fill-vol1-" in said
    assert "deleted: kindling-fill-vol1-" in said
    assert (script.process.returncode, rest.pods) == (130, {})


def test_who_stops_it_at_the_end_is_heard(rest: Rest, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no endpoint is changed."""
    answer = rest.answer

    def stopping(*request: Any) -> tuple[int, Any]:
        os.kill(os.getpid(), signal.SIGINT)
        return answer(*request)

    monkeypatch.setattr(rest, "answer", stopping)
    with (
        runpod_api.connected(KEY) as client,
        pytest.raises(KeyboardInterrupt),
        runpod_lease.ended_at_last(client, runpod_lease.Lease("x")),
    ):
        pass
    assert rest.seen == [("GET", "/v2/pods")]


def test_what_nohup_ignores_stops_nothing(rest: Rest) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with (
            runpod_api.connected(KEY) as client,
            runpod_lease.ended_at_last(client, runpod_lease.Lease("x")),
        ):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_image_that_runs_something_else_is_not_paid_for_long(
    rest: Rest, told: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older one, whose container ends and is started again, and says so for ever."""
    monkeypatch.setattr(runpod_fill, "START_S", 0.0)
    rest.python = program(tmp_path, "#!/bin/sh\nwhile echo no such file; do sleep 0.01; done\n")
    said = told(1, *SPARK, "--fill")
    assert f"Can RunPod pull {IMAGE}, and is that the image of this version?" in said
    assert (posted(rest), rest.pods) == (["pods"], {})


def test_what_is_cut_off_is_no_event() -> None:
    whole = ["id: 1", 'data: {"source": "container", "line": "a"}', "", ": still here", "id: 2"]
    assert list(runpod_api.read([*whole, 'data: {"source": "conta'], "")) == [
        {"source": "container", "line": "a", "id": "1"}
    ]
    assert list(runpod_api.read(whole, "1")) == []


def test_signs_of_life_are_no_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a stream with nothing but them would keep from looking at the clock, and at the pod."""
    monkeypatch.setattr(runpod_api, "QUIET_S", 0.0)
    assert list(runpod_api.read(repeat(": still here"), "")) == []


def test_a_line_of_the_pods_that_is_broken_off_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    line = runpod_pod.SAYS + '{"state": "do'
    assert runpod_fill.told({"source": "container", "line": line}) == {}
    assert capsys.readouterr().err == f"pod | {line}\n"


def test_an_answer_that_is_no_json_is_a_refusal(rest: Rest, told: Callable[..., str]) -> None:
    rest.refusal = (200, "<html>back soon</html>")
    assert "answered GET with 200 and no JSON" in told(1, *SPARK)


def test_pods_that_are_gone_write_to_no_volume(rest: Rest, told: Callable[..., str]) -> None:
    rest.rows["pods"].append({"id": "other", "name": "kindling-fill-vol1-0", "status": "TERMINATED"})
    told(0, *SPARK, "--fill", "fetch")


def test_what_a_volume_costs_is_said_before_it_is_bought(
    rest: Rest, told: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest, "create", lambda *_: problem(500, "who knows"))
    said = told(1, *FLUX, "--volume", "new", "--size", "1200", "--data-center", "US-KS-2")
    assert "creating new in US-KS-2: 1200 GB cost about $80.00 a month" in said


def test_a_key_that_is_none_is_not_shown(rest: Rest, told: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("canary\r", "canary\xe9"):
        monkeypatch.setenv("RUNPOD_API_KEY", key)
        said = told(1, *SPARK)
        assert "RUNPOD_API_KEY has something in it that no key has" in said
        assert "canary" not in said


def test_the_secret_of_webhooks_is_one(
    rest: Rest, told: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KINDLING_WEBHOOK_SECRET", "whsec_" + "Y2FuYXJ5" * 4)
    assert "KINDLING_WEBHOOK_SECRET would stand readable" in told(1, *SPARK)
    monkeypatch.setenv("KINDLING_WEBHOOK_SECRET", "{{ RUNPOD_SECRET_hooks }}")
    assert runpod_deploy.main([*SPARK, "--fill", "--dry-run"]) == 0
    pod, template, _ = (request["json"] for request in json.loads(capsys.readouterr().out))
    assert template["env"]["KINDLING_WEBHOOK_SECRET"] == "{{ RUNPOD_SECRET_hooks }}"
    assert "KINDLING_WEBHOOK_SECRET" not in pod["env"]
    monkeypatch.setenv("KINDLING_VOLUME_KEY", "k" * 32)
    assert "KINDLING_VOLUME_KEY would stand readable" in told(1, *SPARK)
    monkeypatch.setenv("KINDLING_VOLUME_KEY", "{{ RUNPOD_SECRET_volume }}")
    assert runpod_deploy.main([*SPARK, "--fill", "--dry-run"]) == 0
    pod, template, _ = (request["json"] for request in json.loads(capsys.readouterr().out))
    assert template["env"]["KINDLING_VOLUME_KEY"] == pod["env"]["KINDLING_VOLUME_KEY"] == "{{ RUNPOD_SECRET_volume }}"


def test_an_answer_that_is_no_http_does_not_end_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its container would be started again, and would fill the volume again."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RUNPOD_API_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("RUNPOD_POD_ID", "x")

        def answer() -> None:
            for _ in range(2):
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(b"what\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        runpod_pod.terminate()
        thread.join()


def test_a_pod_that_cannot_be_deleted_is_named(
    rest: Rest, told: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runpod_lease, "AGAIN_S", (0, 0))
    monkeypatch.setattr(rest, "delete", lambda _: None)
    said = told(0, *SPARK, "--fill", "fetch")
    assert re.search(r"The pod kindling-fill-vol1-\w+ could not be deleted \(it is still there\)", said)
    monkeypatch.undo()


def test_a_pod_that_nobody_deletes_deletes_itself(rest: Rest) -> None:
    pod = pod_of(rest, "5", "0", "fetch")
    pod.wait()
    assert states(pod) == [{"state": "step", "step": "fetch"}, {"state": "done"}]
    assert pod.restarts == 0
    assert rest.seen == [("POST", "/graphql")]


def test_a_pod_that_runs_out_of_time_deletes_itself(rest: Rest) -> None:
    pod = pod_of(rest, "0", "0", "fetch")
    pod.wait()
    [said] = states(pod)
    assert (said["state"], "was not done in the time that the pod has" in said["why"]) == ("failed", True)


def test_a_container_that_was_started_again_does_not_begin_again(rest: Rest) -> None:
    (rest.folder / "vol1").mkdir()
    (rest.folder / "vol1" / ".filling-pod0").touch()
    pod = pod_of(rest, "5", "0", "fetch")
    pod.wait()
    [said] = states(pod)
    assert "started a second time" in said["why"]


def test_a_secret_that_is_none_is_named(rest: Rest) -> None:
    pod = pod_of(rest, "5", "0", "fetch", HF_TOKEN=TOKEN)
    pod.wait()
    [said] = states(pod)
    assert f"RunPod has no secret for HF_TOKEN={TOKEN}" in said["why"]
    pod = pod_of(rest, "5", "0", "fetch", KINDLING_VOLUME_KEY=TOKEN)
    pod.wait()
    [said] = states(pod)
    assert f"RunPod has no secret for KINDLING_VOLUME_KEY={TOKEN}" in said["why"]


def test_steps_but_fetch_see_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*runpod_pod.SECRETS, "RUNPOD_POD_ID"):
        monkeypatch.setenv(name, "canary")
    filling = runpod_pod.Filling(tmp_path, 1)
    look = (sys.executable, "-c", "import os, sys; sys.exit(sum(name in os.environ for name in sys.argv[1:]))")
    assert filling.run(*look, *runpod_pod.SECRETS, as_worker=False) == 0
    assert filling.run(*look, *runpod_pod.SECRETS, as_worker=False, secrets=True) == 1
    assert filling.run(*look, "RUNPOD_API_KEY", as_worker=False, secrets=True) == 0


def test_it_ends_itself_as_runpods_sdk_would_end_it(rest: Rest, monkeypatch: pytest.MonkeyPatch) -> None:
    from runpod.api.mutations.pods import generate_pod_terminate_mutation

    queries = list[str]()
    monkeypatch.setattr(rest, "graphql", lambda query, _: (200, queries.append(query)))
    monkeypatch.setenv("RUNPOD_API_BASE_URL", rest.base)
    monkeypatch.setenv("RUNPOD_POD_ID", "x")
    runpod_pod.terminate()
    assert queries == [" ".join(generate_pod_terminate_mutation("x").split())]
    assert rest.seen == [("DELETE", "/v2/pods/x")]  # should the other have failed


@needs_root
def test_what_root_has_written_becomes_the_workers(rest: Rest) -> None:
    volume = rest.folder / "vol1"
    volume.mkdir(mode=0o755)
    (volume / "models").mkdir(mode=0o755)
    (volume / "models" / "old").write_text("root's")
    pod = pod_of(rest, "5", "0", "fetch")
    pod.wait()
    assert states(pod)[-1] == {"state": "done"}
    assert {path.stat().st_uid for path in (volume, *volume.rglob("*"))} == {runpod_pod.WORKER}


@needs_root
def test_a_volume_of_roots_is_opened_by_a_pod_of_roots(rest: Rest, told: Callable[..., str]) -> None:
    """The workers' image runs as its own user, who may not do that."""
    volume = rest.folder / "vol1"
    volume.mkdir(mode=0o755)
    rest.users[IMAGE] = runpod_pod.WORKER
    said = told(0, *SPARK, "--fill", "fetch")
    assert "The volume is root's: a second pod gives it to the workers' user." in said
    assert [body["image"] for body in rest.bodies if body and "mounts" in body] == [IMAGE, runpod_fill.STOCK, IMAGE]
    assert (volume.stat().st_uid, rest.pods) == (runpod_pod.WORKER, {})
    assert posted(rest) == ["pods", "pods", "pods", "templates", "serverless"]
