"""The load generator: SGLang's keys, failures counted and not hidden, arrivals that repeat, a real server."""

import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType
from typing import Any, ClassVar

import pytest
from conftest import ROOT

from serving import Served

SCRIPT = ROOT / "benchmarks" / "serving.py"
KEYS = {  # of SGLang's bench_serving for pictures
    "duration", "completed_requests", "failed_requests", "throughput_qps", "latency_mean", "latency_median",
    "latency_p99", "latency_p50", "peak_memory_mb_max", "peak_memory_mb_mean", "peak_memory_mb_median",
}  # fmt: skip
PICTURE = {"data": [{"b64_json": "AA=="}], "peak_memory_mb": 100.0}
REFUSAL = {"error": {"message": "full", "code": "queue_full"}}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module; not called `serving`, as a file of the tests is."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("serving_bench", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


class Peer(BaseHTTPRequestHandler):
    """Answers the seed's place in `answers` with a status and a body; the others with a picture."""

    answers: ClassVar[dict[int, tuple[int, Any]]] = {
        1: (429, REFUSAL), 2: (500, "no JSON"), 3: (200, {"data": []}), 4: (502, []), 5: (429, REFUSAL),
        6: (200, []),
    }  # fmt: skip
    headers_seen: ClassVar[list[str | None]] = []

    def do_POST(self) -> None:
        self.headers_seen.append(self.headers["Authorization"])
        sent = json.loads(self.rfile.read(int(self.headers["content-length"])))
        status, body = self.answers.get(sent["seed"], (200, PICTURE))
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def peer() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Peer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def run(*arguments: str, **environ: str) -> dict[str, Any]:
    """The script's last line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environ}
    out = subprocess.run(
        [sys.executable, SCRIPT, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    found: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return found


def test_arrivals_are_poisson_and_repeat(bench: ModuleType) -> None:
    due = bench.arrivals(4000, 8.0, 3)
    assert due == bench.arrivals(4000, 8.0, 3) != bench.arrivals(4000, 8.0, 4)
    assert due == sorted(due)
    assert 4000 / due[-1] == pytest.approx(8.0, rel=0.1)
    assert bench.arrivals(4, math.inf, 0) is None


def test_prompts_are_varied_and_as_many_as_asked_for(bench: ModuleType) -> None:
    plain = bench.prompts("plain", 200)
    assert len(plain) == 200
    assert len(set(plain)) == 60
    assert all("background" in prompt for prompt in bench.prompts("spark", 5))


def test_quantiles_are_numpys(bench: ModuleType) -> None:
    assert bench.quantile([], 0.5) is None
    assert bench.quantile([1.0], 0.99) == 1.0
    assert bench.quantile([1.0, 2.0, 4.0], 0.5) == 2.0
    assert bench.quantile([0.0, 10.0], 0.99) == pytest.approx(9.9)


def test_failures_are_counted_by_kind_and_not_averaged_in(peer: str) -> None:
    key = {"MY_KEY": "k1"}
    found = run(
        "--base-url", peer, "--num-prompts", "10", "--max-concurrency", "3", "--api-key-from-env", "MY_KEY", **key
    )
    assert found.keys() >= KEYS
    assert (found["completed_requests"], found["failed_requests"]) == (4, 6)
    assert found["failures"] == {
        "429 queue_full": 2, "500 not JSON": 1, "200 without the pictures": 2, "502": 1,
    }  # fmt: skip
    assert found["throughput_qps"] == pytest.approx(4 / found["duration"], rel=0.01)
    assert found["peak_memory_mb_max"] == found["peak_memory_mb_median"] == 100
    assert Peer.headers_seen[-1] == "Bearer k1"
    assert "k1" not in json.dumps(found)


def test_nobody_there_is_a_failure_of_every_request() -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        found = run("--base-url", f"http://127.0.0.1:{deaf.getsockname()[1]}", "--num-prompts", "3")
    assert (found["completed_requests"], found["failures"]) == (0, {"ConnectError": 3})
    assert found["latency_mean"] is None
    assert found["peak_memory_mb_max"] is None


def test_with_a_rate_latency_counts_from_when_the_request_was_due(bench: ModuleType, peer: str) -> None:
    """One at a time, all due at once: each waits for those before it, and says so."""
    bodies = [{"prompt": "x", "seed": 100 + number} for number in range(20)]
    duration, outcomes = bench.Server(peer).load(bodies, 1, [0.0] * 20)
    latencies = [outcome.latency for outcome in outcomes]
    assert latencies == sorted(latencies)
    assert latencies[-1] <= duration
    duration, outcomes = bench.Server(peer).load(bodies, 1)
    assert sum(outcome.latency for outcome in outcomes) <= duration


def test_a_real_server(server: Served, tmp_path: Any) -> None:
    arguments = ["--base-url", server.url, "--pid", str(server.process.pid), "--num-prompts", "4", "--rounds", "1"]
    output = tmp_path / "figures.json"
    found = run(
        *arguments, "--size", "64x64", "--steps", "1", "--prompts", "spark", "--request-rate", "50",
        "--mode", "load", "engine", "overhead", "--output", str(output),
    )  # fmt: skip
    assert (found["completed_requests"], found["failures"]) == (4, {})
    assert found["peak_memory_mb_max"] > 100
    assert 0 < found["latency_p50"] <= found["latency_p99"]
    assert found["engine"]["ratio"] > 0
    assert found["overhead"]["median_ms"] > 0
    assert json.loads(output.read_text())["overhead"] == found["overhead"]


def test_growth_has_a_row_for_each_case(
    bench: ModuleType, server: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "GROWTH", {"n": ("{} pictures", [(2, {"n": 2, "width": 64, "height": 64})])})
    monkeypatch.setattr(sys, "argv", ["serving.py", "--rounds", "1"])
    (row,) = bench.growth(bench.Server(server.url), bench.arguments())
    assert (row["grows"], row["at"], row["name"]) == ("n", 2, "2 pictures")
    assert row["latency"] >= row["denoise"] > 0
    assert "2 pictures" in capsys.readouterr().out


def test_modes_that_compare_stop_at_a_failure(bench: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"1 of 2 requests failed: \{'429': 1\}"):
        bench.complete([bench.Outcome(1.0, "429"), bench.Outcome(1.0, answer={})])
