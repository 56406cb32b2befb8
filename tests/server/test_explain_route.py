"""`POST /explain`: a graph judged on the worker that serves."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from graphs import plain, png, with_image

from comfy_graphs import graph
from fakes import FakeFamily
from handler import Engine, Settings, create_app
from handler.volume import receipts
from handler.volume.receipts import Candidate, Figures, Outcome, Receipt

Story = Callable[[httpx.AsyncClient, Any], Awaitable[None]]


@pytest.fixture
def tell(family: FakeFamily, tmp_path: Path) -> Callable[..., None]:
    """Runs a story with a client of an app, whose worker is a fake one of spark."""

    def run(story: Story, **settings: Any) -> None:
        with family.engine(**{"volume": tmp_path, **settings}) as engine:
            app = create_app(engine, public=False)

            async def main() -> None:
                async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://kindling") as client:
                    await story(client, engine)

            asyncio.run(main())

    return run


async def explained(client: httpx.AsyncClient, body: Any, path: str = "/explain") -> Any:
    answer = await client.post(path, content=json.dumps(body) if isinstance(body, dict) else body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_what_is_ready_is_what_a_prompt_would_be_accepted_for(tell: Callable[..., None]) -> None:
    async def story(client: httpx.AsyncClient, engine: Any) -> None:
        bad = plain(steps=5000)
        for made, ready in ((graph(), True), (bad, False), (plain("sdxl.safetensors"), False), (with_image(), False)):
            report = await explained(client, made, "/api/explain")
            assert report["ready"] is ready
            assert (await client.post("/prompt", json={"prompt": made})).status_code == (200 if ready else 400)
        assert report["missing"] == ["send the image cat.png with POST /upload/image"]
        await client.post("/upload/image", files={"image": ("cat.png", png())})
        assert (await explained(client, with_image()))["ready"]

    tell(story)


def test_another_models_graph_is_judged_on_that_model(tell: Callable[..., None]) -> None:
    async def story(client: httpx.AsyncClient, engine: Any) -> None:
        report = await explained(client, plain("sd_xl_base_1.0.safetensors", cfg=5.0))
        assert (report["verdict"], report["model"]["id"]) == ("runs", "sdxl")
        assert report["missing"][0] == "start a worker with KINDLING_MODEL=sdxl, not KINDLING_MODEL=spark"
        assert report["curl"][0].startswith("curl -s http://kindling/prompt")

    tell(story)


def test_commands_ask_where_callers_find_it(tell: Callable[..., None]) -> None:
    async def story(client: httpx.AsyncClient, engine: Any) -> None:
        report = await explained(client, graph())
        assert report["curl"][0].startswith("curl -s https://images.example/prompt")

    tell(story, public_url="https://images.example")


def test_keys_are_asked_for_and_named_in_commands(tell: Callable[..., None]) -> None:
    async def story(client: httpx.AsyncClient, engine: Any) -> None:
        assert (await client.post("/explain", json=graph())).status_code == 401
        answer = await client.post("/explain", json=graph(), headers={"authorization": "Bearer canary-key"})
        assert '-H "Authorization: Bearer $KEY"' in answer.json()["curl"][0]
        assert "canary-key" not in answer.text

    tell(story, api_keys=("canary-key",))


def test_the_time_is_by_the_workers_own_receipt(tell: Callable[..., None], tmp_path: Path) -> None:
    async def story(client: httpx.AsyncClient, engine: Any) -> None:
        hardware = engine.worker.hardware
        winner = Candidate(hardware.precision, False)
        outcomes = (Outcome(winner, "measured", Figures(8, 3.0, 3.0, 1.0, 1.0, 5.0)),)
        made = Receipt(
            "spark", "embedded", hardware.identity, winner, outcomes, "", "latency", {}, "it", "", {}, "", ""
        )
        engine.worker.receipt = receipts.keep(made, tmp_path)
        report = await explained(client, plain(steps=2))
        assert (report["time"]["pictures_s"], report["time"]["start_s"]) == (1.5, 5.0)

    tell(story)


@pytest.mark.parametrize("body", [b"", b"[", b"[" * 100_000, b"5", b"{}", b'{"1": 5}', b"\x89PNG\r\n\x1a\n", b"RIFF"])
def test_what_is_no_graph_is_told_as_comfyui_does(tell: Callable[..., None], body: bytes) -> None:
    async def story(client: httpx.AsyncClient, engine: Any) -> None:
        answer = await client.post("/explain", content=body, headers={"content-type": "application/octet-stream"})
        assert (answer.status_code, answer.json()["node_errors"]) == (400, {})
        assert answer.json()["error"]["message"].isprintable()

    tell(story)


def test_limits_are_those_of_other_bodies(tell: Callable[..., None]) -> None:
    async def story(client: httpx.AsyncClient, engine: Any) -> None:
        assert (await client.post("/explain", content=b"x" * 2_000_000)).status_code == 413
        assert (await client.post("/explain", content=b"{}", headers={"content-type": "text/html"})).status_code == 415
        assert (await client.get("/explain")).status_code == 405

    tell(story, max_edit_mb=1, max_body_mb=1)


def test_it_explains_while_no_worker_is_there_yet(tmp_path: Path) -> None:
    async def main() -> None:
        app = create_app(Engine(Settings(volume=tmp_path)), public=False)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://kindling") as client:
            assert (await explained(client, graph()))["ready"]

    asyncio.run(main())
