"""Kindling on fal: `fal deploy platform/fal_app.py::Kindling`; `fal run platform/fal_app.py::fetch` fills fal's disk.

Every KINDLING_* variable set while deploying holds in the runners, but for the keys (who may ask is fal's business)
and the volume (fal's own disk); CUDA=cu126 builds the image for older drivers. Deploy with the Python of the
Dockerfile: fal sends these objects pickled. This file knows how fal rents GPUs; what a request means, it does not know.
"""

import asyncio
import gc
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import fal
from fal.auth import fetch_auth_credentials
from fal.container import ContainerImage
from fal.exceptions import AppException, FieldException
from fal.exceptions.auth import UnauthenticatedException
from fal.toolkit import Image
from fal.toolkit.image.image import ImageSize, ImageSizeInput
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, model_validator
from starlette.types import Receive, Scope, Send

import handler
from handler import Engine, ImageRequest, Settings, choose_gpus, create_app, cuda_build, dedicated, errors

ROOT = Path(handler.__file__).parents[1]
DISK = "/data/kindling"
STAYS = ("KINDLING_API_KEYS", "KINDLING_ADMIN_KEYS", "KINDLING_VOLUME")
CHOSEN = {name: value for name, value in Settings.named(os.environ).items() if name not in STAYS}
UPLOADED = "v3.fal.media,v3b.fal.media"  # where fal's clients and its playground put the images that they send
ENVIRONMENT = {"KINDLING_MODEL": "flux-schnell", "KINDLING_FETCH_HOSTS": UPLOADED, **CHOSEN}
SETTINGS = Settings.from_env(ENVIRONMENT)  # a misspelt setting stops the deployment, not its first runner
SPEC = Engine(SETTINGS).spec  # so does a misspelt model
BUILD = cuda_build(os.environ.get("CUDA", ""))
OFFERS = choose_gpus(SETTINGS, SPEC, "fal", build=BUILD)  # the cheapest first
for warning in filter(None, (offer.warning for offer in OFFERS)):
    print(warning, file=sys.stderr)
MACHINES = [name for offer in OFFERS for name in offer.rental.names]
BUDGET_S, REQUEST_S = int(SETTINGS.cold_start_budget_s), max(600, math.ceil(SETTINGS.deadline_s))
ARGUMENTS = {"SDK": "fal", "CUDA": BUILD.name}
IMAGE = ContainerImage.from_dockerfile(str(ROOT / "Dockerfile"), context_dir=ROOT, build_args=ARGUMENTS)


class Lora(BaseModel):
    """A LoRA on fal's disk."""

    path: str = Field(description="Its name.")
    scale: float = 1.0


class Asked(BaseModel):
    """What fal's models take, by their names; and all that /generate takes, by its own."""

    model_config = ConfigDict(extra="allow")

    prompt: str
    negative_prompt: str | None = None
    image_size: ImageSizeInput | None = Field(None, description="None is the model's own, or the first image's.")
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    num_images: int = Field(1, ge=1, le=SETTINGS.max_n)
    seed: int | None = Field(None, description="None draws one at random; the answer names it.")
    loras: list[Lora] = []
    image_url: str | None = Field(None, description="An image to start from: a data URL, or of a host that is allowed.")
    image_urls: list[str] | None = None
    mask_url: str | None = None
    strength: float | None = Field(None, description="How much of the image is drawn anew, above 0 and at most 1.")
    enable_safety_checker: bool | None = Field(None, description="Changes nothing: pictures are not looked through.")
    output_format: Literal["png", "jpeg", "webp"] = "png"
    sync_mode: bool = Field(False, description="Answer with data URLs, and keep nothing on fal's CDN.")


class Answer(BaseModel):
    """fal's own."""

    images: list[Image]
    timings: dict[str, float]
    seed: int
    has_nsfw_concepts: list[bool]
    prompt: str
    notes: list[str] = Field(default_factory=list, description="What was sent and changes nothing.")


class Input(ImageRequest):
    """What `ImageRequest` takes, one picture at a time."""

    n: Literal[1] = 1
    response_format: Literal["b64_json"] = "b64_json"  # the picture goes to fal's CDN
    sync_mode: bool = Field(False, description="Answer with a data URL, and keep nothing on fal's CDN.")

    @model_validator(mode="wrap")
    @classmethod
    def _in_our_words(cls, fields: Any, check: ModelWrapValidatorHandler["Input"]) -> "Input":
        if isinstance(fields, dict):
            try:
                ImageRequest.parse({name: value for name, value in fields.items() if name != "sync_mode"})
            except errors.KindlingError as error:
                raise fal_error(error.status, error.body()["error"]) from None
        return check(fields)


class Output(BaseModel):
    """The picture and the seed that draws it again."""

    image: Image
    seed: int
    notes: list[str] = Field(default_factory=list, description="What was sent and changes nothing.")


class Kindling(fal.App):
    """One runner: one engine, asked over HTTP."""

    app_name = "kindling"
    app_auth = "private"
    image = IMAGE
    machine_type = MACHINES[:3]
    data_mounts = ["/data"]  # noqa: RUF012
    secrets: list[str] = []  # noqa: RUF012  # drawing needs none of the account's
    keep_alive = 300
    min_concurrency = 0
    max_concurrency = 4
    max_multiplexing = 4  # one is drawn while three wait; fal starts another runner rather than fill the engine
    request_timeout = REQUEST_S
    startup_timeout = BUDGET_S + 60  # the core keeps the budget and says where it went; this is for what it cannot see
    termination_grace_period_seconds = 60

    def setup(self) -> None:
        """Load the model; an exception is how fal learns that this runner cannot serve."""
        dedicated()
        settings = Settings.from_env({"KINDLING_DEVICE": "cuda", **ENVIRONMENT})  # never the CPU of a rented GPU
        self.engine = Engine(settings)
        self.served = create_app(self.engine, public=False)  # who may ask is fal's business
        self.api = self.served.api
        self.kept = repository()
        self.engine.start()
        self.engine.wait_booted()
        gc.freeze()  # what a worker has now it keeps: no collection looks through it while somebody waits

    def teardown(self) -> None:
        """Finish the picture that is being drawn."""
        self.engine.stop()

    def _add_extra_routes(self, app: FastAPI) -> None:
        """Behind fal's own, every other route and websocket that a worker has anywhere."""
        super()._add_extra_routes(app)

        async def others(scope: Scope, receive: Receive, send: Send) -> None:
            await self.served(scope, receive, send)

        app.mount("", others)

    @fal.endpoint("/")
    async def draw(self, wanted: Asked) -> Answer:
        """Draw, as fal's own models do."""
        # What was not sent must not stand beside the same by another name.
        asked = wanted.model_dump(exclude_none=True, exclude_unset=True)
        inside = {"sync_mode": True, "response_format": "b64_json"}  # fal's CDN gives the address
        content = await self.answered(f"/fal/{self.engine.spec.id}", {**asked, **inside})
        files = [
            self.file(each["url"].data, each["content_type"], each["width"], each["height"], wanted.sync_mode)
            for each in content["images"]
        ]
        return Answer(**{**content, "images": await asyncio.gather(*files)})

    @fal.endpoint("/generate")
    async def generate(self, wanted: Input) -> Output:
        """Draw one picture."""
        asked, notes = self.honoured(wanted.model_dump(exclude={"sync_mode"}, exclude_none=True))
        content = await self.answered("/generate", asked)
        [picture] = content["images"]
        size, media = picture["parameters"]["size"], f"image/{picture['format']}"
        image = await self.file(picture["b64_json"].data, media, *size, wanted.sync_mode)
        return Output(image=image, seed=picture["seed"], notes=notes)

    async def answered(self, route: str, asked: dict[str, Any]) -> dict[str, Any]:
        """The answer of one of our routes; its errors as fal's."""
        reply = await self.api.call(route, asked)
        if "error" in reply.content:
            raise fal_error(reply.status, reply.content["error"])
        return dict(reply.content)

    async def file(self, data: bytes, media: str, width: int, height: int, inside: bool) -> Image:
        """A picture on fal's CDN; or as a data URL, where `inside` asks for that, or nobody may upload."""
        kept, form = "in_memory" if inside else self.kept, media.removeprefix("image/")
        size = ImageSize(width=width, height=height)
        return await asyncio.to_thread(Image.from_bytes, data, form, size, repository=kept)

    def honoured(self, asked: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """What can be drawn of `asked`, and what is left out: fal's clients send negative prompts to every model."""
        try:
            self.engine.spec.validate(ImageRequest.parse(asked), self.engine.settings.step_cache)
        except errors.KindlingError as error:
            if error.param == "negative_prompt":
                kept = {name: value for name, value in asked.items() if name != "negative_prompt"}
                return kept, [f"negative_prompt changes nothing: {error.message}"]
        return asked, []  # what else is wrong is told when it is drawn

    @fal.endpoint("/alive", health_check=fal.HealthCheck(call_regularly=True, failure_threshold=1))
    def alive(self) -> dict[str, str]:
        """A lost GPU stays lost: fal replaces a runner that fails this."""
        if self.engine.state == "failed":
            raise AppException("This runner lost its GPU.", 503)
        return {"status": self.engine.state}


def repository() -> Literal["fal_v3", "in_memory"]:
    """Where pictures go: to fal's CDN, or, without an account, as `fal run --local` may be, nowhere."""
    try:
        fetch_auth_credentials()
    except UnauthenticatedException:
        return "in_memory"
    return "fal_v3"


def fal_error(status: int, error: dict[str, Any]) -> Exception:
    """Kindling's error as one of fal's, at the field if it names one."""
    if error["param"]:
        return FieldException(error["param"], error["message"], status, error["code"])
    return AppException(error["message"], status)


@fal.function("container", image=IMAGE, machine_type="L", request_timeout=3600)
def fetch() -> None:
    """Bring the model to fal's disk. HF_TOKEN, for models that want it, is one of the account's secrets."""
    environment = {**os.environ, **ENVIRONMENT, "KINDLING_VOLUME": DISK}
    subprocess.run([sys.executable, "-m", "handler", "fetch"], env=environment, check=True)
