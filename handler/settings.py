"""Settings: the only reader of the environment. One field is one `KINDLING_*` variable."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from handler.errors import SettingsError
from handler.stepcache import Choice

PREFIX = "KINDLING_"
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s,*]+")
ENDPOINT = re.compile(r"https?://(?:[A-Za-z0-9.-]+|\[[0-9a-fA-F:.]+\])(?::[0-9]{1,5})?/?")
# RunPod's network volume; platform/modal_app.py's; the folder that platform/fal_app.py's fetch makes on fal's disk, not
# /data itself, which many a machine has for other ends; the Dockerfile's.
MOUNTS = (Path("/runpod-volume"), Path("/kindling"), Path("/data/kindling"), Path("/volume"))

# What each platform sets in every worker of its own; the prices of that platform apply.
Platform = Literal["other", "runpod", "modal", "fal"]
PLATFORMS: dict[str, Platform] = {"RUNPOD_POD_ID": "runpod", "MODAL_TASK_ID": "modal", "FAL_RUNNER_STATE": "fal"}


def _origin(value: str) -> str:
    if value != "*" and not ORIGIN.fullmatch(value):
        raise ValueError("should be * or origins such as https://a.example or http://localhost:3000, without a path")
    return value


Origin = Annotated[str, AfterValidator(_origin)]


def _endpoint(value: str) -> str:
    if value and not ENDPOINT.fullmatch(value):
        raise ValueError("should be http:// or https:// and a host, without a path; the bucket's name is a setting too")
    return value


Endpoint = Annotated[str, AfterValidator(_endpoint)]


def _default_volume() -> Path:
    for mount in MOUNTS:
        if mount.is_dir():
            return mount
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kindling"


def _default_platform() -> Platform:
    return next((platform for name, platform in PLATFORMS.items() if os.environ.get(name)), "other")


def _default_endpoint() -> str:
    return os.environ.get("BUCKET_ENDPOINT_URL", "")


def bucket_keys() -> tuple[str, str]:
    """The object store's access key and secret by RunPod's names for them; empty where they are not set.

    Never a field, for these are shown, and platforms carry KINDLING_* variables where others may read them.
    """
    return os.environ.get("BUCKET_ACCESS_KEY_ID", ""), os.environ.get("BUCKET_SECRET_ACCESS_KEY", "")


class Settings(BaseModel):
    """How one worker runs. `python -m handler doctor` lists these with their values and where each came from."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    model: str = Field("spark", min_length=1, description="model id, alias or mode (realtime, quality)")
    volume: Path = Field(default_factory=_default_volume, description="holds models/, baked/ and boots/")
    api_keys: tuple[str, ...] = Field((), repr=False, description="accepted bearer keys, comma-separated")
    cors_origins: tuple[Origin, ...] = Field((), description="whose pages may ask, such as https://a.example; * is all")
    allow_open: bool = Field(False, description="serve without keys on an address that others can reach")
    cold_start_budget_s: float = Field(240, gt=0, le=3600, description="seconds from process birth to ready")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    precision: Literal[
        "auto", "fp32", "bf16", "fp16", "fp8", "fp8-tensor", "int8", "int8-dynamic", "mxfp8", "nvfp4"
    ] = Field(
        "auto", description="auto: the receipt's, else what the model and the device are best in; 8 bits halve memory"
    )
    offload: Literal["auto", "off", "encoders", "blocks"] = Field(
        "auto", description="what waits in host memory: nothing, text encoders, all; auto: the first of these that fits"
    )
    attention: Literal["auto", "native", "cudnn", "flash", "flash3", "cudnn-fp8"] = Field(
        "auto",
        description="what computes it: torch (native), cuDNN, FlashAttention, cuDNN's FP8; auto: the fastest but FP8",
    )
    batch: Literal["auto"] | Annotated[int, Field(ge=1, le=8)] = Field(
        "auto", description="pictures of one shape drawn at once, at most; auto: as many as the receipt says pay"
    )
    compile: Literal["auto", "on", "off"] = Field("auto", description="auto: reuse artifacts, make them on a GPU")
    publish: bool = Field(True, description="leave compile artifacts on the volume for later workers")
    vae: str = Field("", description="another autoencoder: a folder, or owner/repository@revision on the hub")
    step_cache: Choice = Field("off", description="off, on, or values such as Fn=1,R=0.24: skip blocks of like steps")
    queue: int = Field(32, ge=1, le=10_000, description="requests that may wait; more get 429")
    queue_s: float = Field(300, gt=0, le=86_400, description="seconds of work that may wait; more gets 429")
    deadline_s: float = Field(600, gt=0, le=86_400, description="seconds a request may take; a longer one gets 504")
    hang_s: float = Field(120, gt=0, le=86_400, description="seconds without a step's end before a worker gives up")
    max_body_mb: float = Field(8, gt=0, le=1024, description="largest request body in MB")
    metadata: bool = Field(True, description="write prompt and parameters into each PNG")
    platform: Platform = Field(default_factory=_default_platform, description="whose prices apply; detected")
    gpu_price: float | None = Field(None, ge=0, le=1000, description="dollars an hour, in place of the list price")
    monthly_cap: float | None = Field(None, gt=0, le=1e9, description="dollars a month, for all workers on this volume")
    cap_action: Literal["alert", "refuse"] = Field("alert", description="past the cap: warn, or draw no more")
    store_bucket: str = Field("", pattern=r"^[A-Za-z0-9._-]*$", description="S3 bucket for pictures that travel by URL")
    store_endpoint: Endpoint = Field(
        default_factory=_default_endpoint, validate_default=True, description="of that bucket, where it is not AWS's"
    )
    store_region: str = Field("", pattern="^[A-Za-z0-9-]*$", description="of that bucket; else boto3's, else us-east-1")
    store_prefix: str = Field("kindling", pattern=r"^[A-Za-z0-9._/-]*$", description="what its keys begin with")
    store_expires_s: int = Field(86_400, ge=1, le=604_800, description="seconds for which a picture's URL works")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe log line shown")

    @field_validator("api_keys", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, model: str | None = None) -> Self:
        """Read every KINDLING_* variable; an empty one counts as unset, and `model`, if given, wins over its variable.

        Raises SettingsError naming a bad one.
        """
        environ = os.environ if environ is None else environ
        given = {k.removeprefix(PREFIX): v for k, v in environ.items() if k.startswith(PREFIX)}
        known = {name.upper() for name in cls.model_fields}
        for name in given.keys() - known:
            raise SettingsError(f"{PREFIX}{name} is not a setting; 'python -m handler doctor' lists them all", name)
        try:
            settings = cls.model_validate({name.lower(): value for name, value in given.items() if value})
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            name = f"{PREFIX}{str(first['loc'][0]).upper()}"
            raise SettingsError(f"{name}: {first['msg']}", name) from None
        return settings.model_copy(update={"model": model}) if model else settings
