"""One request, the same bytes, whatever carries it; and what another carrier takes. fal's leg is in its own file."""

import ast
import asyncio
import base64
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import httpx
import pytest
from test_modal_app import KEYS, entered, leave, load_app

import forked
import handler
from runpod_plane import WORKER, Plane, clean_environment, started
from serving import ROOT, serving

WANTED = {"prompt": "a red circle on a blue background", "seed": 7, "num_inference_steps": 4}
PLATFORM = '''
"""Kindling behind a pipe: a JSON object a line in, a JSON object a line out."""

import asyncio
import json
import sys

from handler import Api, Engine, Settings

engine = Engine(Settings.from_env())
engine.start()
for line in sys.stdin:
    reply = asyncio.run(Api(engine).call("/generate", json.loads(line)))
    print(json.dumps(reply.body), flush=True)
engine.stop()
'''


def by_http(folder: Path) -> str:
    with serving() as server:
        answer = httpx.post(f"{server.url}/v1/images/generations", json=WANTED, timeout=120)
    return str(answer.json()["data"][0]["b64_json"])


def by_runpod(folder: Path) -> str:
    with Plane() as plane:
        plane.give("job", **WANTED)
        with started([str(WORKER)], clean_environment(folder, **plane.environment), folder / "log"):
            return str(plane.result("job")["output"]["images"][0]["b64_json"])


def by_modal(folder: Path) -> str:
    """In a fresh process, as a container is one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as container:
        return container.submit(in_a_container, folder).result()


def in_a_container(folder: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        container = entered(load_app(patch, folder, {"KINDLING_MODEL": "spark", **KEYS}))
    answer = asyncio.run(container.generate.local(WANTED))
    leave(container)
    return str(answer["images"][0]["b64_json"])


def by_another_platform(folder: Path) -> str:
    given = f"{json.dumps({'prompt': 'x', 'n': 99})}\n{json.dumps(WANTED)}\n"
    command, environment = [sys.executable, "-c", PLATFORM], clean_environment(folder)
    out = forked.run(command, cwd=ROOT, env=environment, input=given, capture_output=True, text=True, check=True)
    bad, good = map(json.loads, out.stdout.splitlines())
    assert bad["error"]["code"] == "out_of_range"
    return str(good["images"][0]["b64_json"])


@pytest.fixture(scope="module")
def by_command_line(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file that `generate` writes."""
    target = tmp_path_factory.mktemp("command") / "out.png"
    options = ["--seed", str(WANTED["seed"]), "--steps", str(WANTED["num_inference_steps"]), "-o", str(target)]
    command = [sys.executable, "-m", "handler", "generate", str(WANTED["prompt"]), *options]
    subprocess.run(command, cwd=ROOT, env=clean_environment(target.parent), check=True, capture_output=True)
    return target.read_bytes()


@pytest.mark.parametrize("carrier", [by_http, by_runpod, by_modal, by_another_platform])
def test_every_carrier_brings_the_same_bytes(
    by_command_line: bytes, carrier: Callable[[Path], str], tmp_path: Path
) -> None:
    assert base64.b64decode(carrier(tmp_path)) == by_command_line


def test_a_platform_takes_few_lines_and_public_names() -> None:
    assert PLATFORM.strip().count("\n") + 1 < 20
    [names] = [node.names for node in ast.walk(ast.parse(PLATFORM)) if isinstance(node, ast.ImportFrom)]
    assert {name.name for name in names} <= set(handler.__all__)
