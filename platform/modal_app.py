"""Kindling on Modal: `KINDLING_MODEL=flux-schnell KINDLING_API_KEYS=... modal deploy platform/modal_app.py`.

Every KINDLING_* variable set while deploying holds in the containers. The weights wait on the volume "kindling",
at models/<id>/<revision>/. This file knows how Modal rents GPUs; what a request means, it does not know.
"""

import os
from pathlib import Path
from typing import Any

import modal
from starlette.types import ASGIApp, Receive, Scope, Send

from handler import Api, Lane, Settings, create_app

VOLUME = "/kindling"
CHOSEN = {name: value for name, value in os.environ.items() if name.startswith("KINDLING_")}
ENVIRONMENT: dict[str, Any] = {"KINDLING_MODEL": "flux-schnell", **CHOSEN, "KINDLING_VOLUME": VOLUME}
SETTINGS = Settings.from_env(ENVIRONMENT)  # a misspelt setting stops the deployment, not its first container
BUDGET_S = int(SETTINGS.cold_start_budget_s)
SHIPPED = modal.FilePatternMatcher("**/*.py", "weights/**")

app = modal.App("kindling")
image = (
    modal.Image.debian_slim(python_version="3.11")
    .pip_install_from_requirements(str(Path(__file__).parents[1] / "requirements.txt"))
    .add_local_python_source("handler", ignore=~SHIPPED)
)


@app.cls(
    image=image,
    gpu=["L40S", "A100-80GB", "H100"],  # the cheapest that holds FLUX.1 whole (34 GB), then whatever is free
    cpu=4,
    memory=40_960,  # the weights pass through it on their way to the GPU
    volumes={VOLUME: modal.Volume.from_name("kindling", create_if_missing=True)},
    env=ENVIRONMENT,
    min_containers=0,
    max_containers=4,
    scaledown_window=BUDGET_S,  # to stay idle for as long as a cold start takes costs at most twice the optimum
    startup_timeout=BUDGET_S + 60,  # the core keeps the budget and says where it went; this is for what it cannot see
    timeout=600,
)
@modal.concurrent(max_inputs=16, target_inputs=4)  # fewer than KINDLING_QUEUE: Modal starts another rather than a 429
class Kindling:
    """One container: one lane, asked over HTTP or by method."""

    @modal.enter()
    def start(self) -> None:
        """Load the model; an exception is how Modal learns that this container cannot serve."""
        self.lane = Lane(SETTINGS)
        self.app = create_app(self.lane, public=True)
        self.lane.start()
        self.lane.wait_booted()

    @modal.exit()
    def stop(self) -> None:
        self.lane.stop()

    @modal.asgi_app()
    def web(self) -> ASGIApp:
        """The HTTP API. `start` and `stop` own the lane, so the app's own lifespan is not run."""

        async def serve(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                await self.app(scope, receive, send)
                await self._leave_if_broken()

        return serve

    @modal.method()
    async def generate(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Answer one native payload: {"images": ...}, or {"error": ...} as HTTP would say it."""
        reply = await Api(self.lane).call("/generate", payload)
        await self._leave_if_broken()
        return reply.body

    async def _leave_if_broken(self) -> None:
        """A lost GPU stays lost: let Modal replace this container instead of feeding it."""
        if self.lane.state == "failed" and not modal.is_local():
            await modal.experimental.stop_fetching_inputs.aio()
