"""Kindling on Modal: `modal deploy platform/modal_app.py`; `modal run platform/modal_app.py::fetch` fills the volume.

Every KINDLING_* variable set while deploying holds in the containers, but for the volume, which is Modal's. More are
Modal's own business: MODAL_SECRET names a secret with KINDLING_API_KEYS in it, or others that the containers shall
have; MODAL_PROXY_AUTH=1 lets in only who has a proxy token of Modal's, as it does unasked where there are neither keys
nor a secret; MODAL_SNAPSHOT=cpu restores containers with torch and diffusers imported, MODAL_SNAPSHOT=weights with the
weights in host memory too, and MODAL_SNAPSHOT=gpu, an alpha of Modal's, with the model loaded. MODAL_GPU=L40S,A100-80GB
rents these, MODAL_MIN containers always run (0), MODAL_MAX at most (4), MODAL_REGION=eu,us-east says where, and
CUDA=cu126 installs the build of torch for older drivers.
This file knows how Modal rents GPUs; what a request means, it does not know.
"""

import asyncio
import gc
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import modal

import handler
from handler import Clock, Engine, Settings, Worker, choose_gpus, create_app, cuda_build, dedicated, errors, preload

if TYPE_CHECKING:  # whoever deploys needs modal and pydantic, no more
    from starlette.types import ASGIApp, Receive, Scope, Send

VOLUME = "/kindling"
CHOICES = ("MODAL_SECRET", "MODAL_PROXY_AUTH", "MODAL_SNAPSHOT", "MODAL_GPU", "MODAL_MIN", "MODAL_MAX", "CUDA")
# Whose memory containers are restored from, with ever more in it. Off unless asked for: a cold start without snapshots
# keeps the budget or says why not, second by second.
SNAPSHOTS = ("", "cpu", "weights", "gpu")
CHOSEN = {**Settings.named(os.environ), **{name: os.environ[name] for name in CHOICES if name in os.environ}}
ENVIRONMENT: dict[str, Any] = {"KINDLING_MODEL": "flux-schnell", **CHOSEN, "KINDLING_VOLUME": VOLUME}
SETTINGS = Settings.from_env(ENVIRONMENT)  # a misspelt setting stops the deployment, not its first container
SPEC = Engine(SETTINGS).spec  # so does a misspelt model
EXACT = {"H100": "H100!"}  # without the mark it may be an H200 there
GPUS = [EXACT.get(name := word.strip(), name) for word in ENVIRONMENT.get("MODAL_GPU", "").split(",") if word.strip()]
# Not carried along: in a container this is Modal's own word for where it runs.
REGIONS = [word.strip() for word in os.environ.get("MODAL_REGION", "").split(",") if word.strip()]
BUILD = cuda_build(ENVIRONMENT.get("CUDA", ""))  # a container reckons with the GPUs that it was deployed for
OFFERS = choose_gpus(SETTINGS, SPEC, "modal", GPUS, BUILD)[: len(GPUS) or 3]
for warning in filter(None, (offer.warning for offer in OFFERS if modal.is_local())):
    print(warning, file=sys.stderr)
FITTING = GPUS or [name for offer in OFFERS for name in offer.rental.names]
FIRST = next(offer.gpu for offer in OFFERS if FITTING[0] in offer.rental.names)  # that Modal tries to rent
PLANS = [offer.outlook.memory for offer in OFFERS]
SNAPSHOT = ENVIRONMENT.get("MODAL_SNAPSHOT", "")
if SNAPSHOT not in SNAPSHOTS:
    raise errors.StartError(
        f"MODAL_SNAPSHOT={SNAPSHOT} means nothing; it may be cpu, weights or gpu.", "MODAL_SNAPSHOT"
    )
# Weights pass through host memory on their way to the GPU, a part at a time, or wait there; a snapshot holds them all.
HELD_GB = 2 * (SPEC.parameters + SPEC.other_parameters) / 1e9 if SNAPSHOT == "weights" else 0
HOST_MB = int((max(plan.host_gb for plan in PLANS) + HELD_GB) * 1_000)
# Where weights come back from the GPU to be written, there is room for them too.
WHOLE_MB = int(max(plan.host_gb + plan.needs_gb for plan in PLANS) * 1_000)
STAGED = SNAPSHOT in ("cpu", "weights")
BUDGET_S, REQUEST_S = int(SETTINGS.cold_start_budget_s), max(600, math.ceil(SETTINGS.deadline_s))
NAMED = ENVIRONMENT.get("MODAL_SECRET")
SETTLED = SETTINGS.api_keys or SETTINGS.allow_open
ENVIRONMENT.setdefault("MODAL_PROXY_AUTH", "" if SETTLED or NAMED else "1")  # a container hears it, and decides nothing
PROXIED = Settings.flag(ENVIRONMENT, "MODAL_PROXY_AUTH")
if ENVIRONMENT["MODAL_PROXY_AUTH"] and not (SETTLED or NAMED or PROXIED):
    raise errors.StartError(
        "Nothing would guard this: set KINDLING_API_KEYS or MODAL_PROXY_AUTH=1.", "MODAL_PROXY_AUTH"
    )
# Where only the secret can guard, Modal refuses to deploy one without keys: every container would fail with it.
REQUIRED = [] if SETTLED or PROXIED else ["KINDLING_API_KEYS"]
SCALE = [ENVIRONMENT.get("MODAL_MIN") or "0", ENVIRONMENT.get("MODAL_MAX") or "4"]
if not all(re.fullmatch("[0-9]{1,4}", count) for count in SCALE) or not int(SCALE[0]) <= int(SCALE[1]) > 0:
    raise errors.StartError(
        "MODAL_MIN and MODAL_MAX should be counts of containers, the first no more than the second: not "
        f"{SCALE[0][:20]!r} and {SCALE[1][:20]!r}.",
        "MODAL_MIN",
    )
SHIPPED = modal.FilePatternMatcher("**/*.py", "**/*.toml", "**/*.yml", "server/playground/assets/*", "weights/**")
ROOT = Path(handler.__file__).parents[1]
LOCKS = Path(__file__).parent / "locks"
TORCH, OTHERS = (str(LOCKS / f"{name}.lock") for name in (f"torch-{BUILD.name}", "requirements"))
UV = "0.13.9"

app = modal.App("kindling")
volume = modal.Volume.from_name("kindling", create_if_missing=True)
image = (
    modal.Image.debian_slim(python_version="3.11")  # with the compiler that Inductor calls
    .uv_pip_install(requirements=[TORCH], extra_options="--index-strategy unsafe-best-match", uv_version=UV)
    .uv_pip_install(requirements=[OTHERS], extra_options="--no-deps --require-hashes", uv_version=UV)
    .add_local_python_source("handler", copy=True, ignore=~SHIPPED)
    # Else each container would, for itself: compile, and look through transformers' models.
    .run_commands("python -m compileall -q /root/handler", "cd /root && python -c 'import handler.model.families'")
)
# Always one secret, for Modal wants a container to define as many objects as were deployed. `env` becomes another.
secret = modal.Secret.from_name(NAMED, required_keys=REQUIRED) if NAMED else modal.Secret.from_dict({})
token = modal.Secret.from_dict({"HF_TOKEN": os.environ.get("HF_TOKEN")})
HOME: dict[str, Any] = {"image": image, "volumes": {VOLUME: volume}, "env": ENVIRONMENT, "secrets": [secret]}


@app.cls(
    **HOME,
    gpu=FITTING,  # the cheapest that runs the model best, then whatever is free
    cpu=4,
    memory=HOST_MB,
    min_containers=int(SCALE[0]),
    max_containers=int(SCALE[1]),
    region=REGIONS or None,
    scaledown_window=BUDGET_S,  # to stay idle for as long as a cold start takes costs at most twice the optimum
    # The core keeps the budget of each stage and says where it went; this is for what it cannot see.
    startup_timeout=(1 + STAGED) * BUDGET_S + 60,
    timeout=REQUEST_S,
    enable_memory_snapshot=SNAPSHOT != "",
    experimental_options={"enable_gpu_snapshot": True} if SNAPSHOT == "gpu" else {},
)
@modal.concurrent(max_inputs=16, target_inputs=4)  # fewer than KINDLING_QUEUE: Modal starts another rather than a 429
class Kindling:
    """One container: one engine, asked over HTTP or by method."""

    preloaded = None

    if STAGED:

        @modal.enter(snap=True)
        def prepare(self) -> None:
            """What needs no GPU, for there is none until the container is restored."""
            dedicated()
            self.preloaded = preload(Settings.from_env(), FIRST if SNAPSHOT == "weights" else None)

    @modal.enter(snap=SNAPSHOT == "gpu")
    def start(self) -> None:
        """Load the model; an exception is how Modal learns that this container cannot serve."""
        dedicated()
        settings = Settings.from_env(on_gpu())
        # What was restored was born long ago: its cold start begins here.
        clock = Clock.anew(settings.cold_start_budget_s) if self.preloaded else None
        self.engine = Engine(settings, clock, partial(Worker.boot, preloaded=self.preloaded))
        self.app = create_app(self.engine, public=not PROXIED)
        self.engine.start()
        self.engine.wait_booted()
        gc.freeze()  # what a worker has now it keeps: no collection looks through it while somebody waits
        if SNAPSHOT == "gpu":
            self.engine.meter.stop()

    if SNAPSHOT == "gpu":

        @modal.enter()
        def restored(self) -> None:
            """Each container that is made of the snapshot is a worker of its own."""
            self.engine.meter.renew()

    @modal.exit()
    def stop(self) -> None:
        """Modal commits the volume after this, and every few seconds before: what was published stays."""
        self.engine.stop()

    @modal.asgi_app(requires_proxy_auth=PROXIED)
    def web(self) -> "ASGIApp":
        """The HTTP API. `start` and `stop` own the engine, so the app's own lifespan is not run."""

        async def serve(scope: "Scope", receive: "Receive", send: "Send") -> None:
            if scope["type"] in ("http", "websocket"):
                await self.app(scope, receive, send)
                await self._leave_if_broken()

        return serve

    @modal.method()
    async def generate(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Answer one native payload: {"images": ...}, or {"error": ...} as HTTP would say it."""
        reply = await self.app.api.call("/generate", payload)
        await self._leave_if_broken()
        return await asyncio.to_thread(lambda: reply.body)

    async def _leave_if_broken(self) -> None:
        """A lost GPU stays lost: let Modal replace this container instead of feeding it."""
        if self.engine.state == "failed" and not modal.is_local():
            await modal.experimental.stop_fetching_inputs.aio()


@app.function(**HOME | {"secrets": [secret, token]}, cpu=4, memory=8_192, timeout=4 * 3600)
def fetch(model: str = SETTINGS.model) -> None:
    """Bring a model to the volume."""
    _run("fetch", model)


@app.function(**HOME, gpu=FITTING, cpu=4, memory=WHOLE_MB, timeout=4 * 3600)
def bake(model: str = SETTINGS.model) -> None:
    """Compile a model for the GPU that will serve it."""
    _run("bake", model, environment=on_gpu())


@app.function(**HOME, gpu=FITTING[:1], cpu=4, memory=WHOLE_MB, timeout=8 * 3600)
def optimize(model: str = SETTINGS.model, priority: str = "latency") -> None:
    """Measure how a model runs best on the cheapest GPU that holds it; workers there follow the receipt."""
    _run("optimize", model, "--priority", priority, environment=on_gpu())


@app.function(**HOME)
def doctor() -> None:
    """Tell what is on the volume and how the last cold starts went."""
    _run("doctor")


def on_gpu() -> dict[str, str]:
    """This container's environment, where nothing runs on the CPU of a rented GPU unless it is told to."""
    return {**os.environ, "KINDLING_DEVICE": os.environ.get("KINDLING_DEVICE") or "cuda"}


def _run(*verb: str, environment: dict[str, str] | None = None) -> None:
    """One verb of the command line, in a process of its own: it leaves no file open when the volume is committed."""
    subprocess.run([sys.executable, "-m", "handler", *verb], cwd=ROOT, env=environment, check=True)  # noqa: S603
    volume.commit()
