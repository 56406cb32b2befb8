"""Settings: the only reader of the environment. One field is one `KINDLING_*` variable."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from handler.core import fields
from handler.core.errors import SettingsError
from handler.core.fields import Endpoint, Folder, Host, ModelName, Name, Origin, PublicUrl, VolumeKey, WebhookSecret
from handler.core.loras import Pinned
from handler.core.request import MAX_IMAGES, LongPrompts
from handler.core.secrets import unresolved
from handler.core.stepcache import StepCacheSetting

PREFIX = "KINDLING_"
# What Kubernetes tells every container of a Service named `kindling` or `kindling-...`, and Docker one that is linked:
# kubernetes.io/docs/concepts/services-networking/service/#environment-variables
# docs.docker.com/engine/network/links/#environment-variables
LINK = re.compile(
    PREFIX + r"(?:\w+_)?(?:SERVICE_HOST=|SERVICE_PORT(?:_\w+)?=|PORT=\w+://|PORT_\d+_(?:TCP|UDP|SCTP)(?:_\w+)?="
    r"|NAME=/[^/]+/|ENV_[^=]+=)"
)
# RunPod's network volume; platform/modal_app.py's; the folder that platform/fal_app.py's fetch makes on fal's disk, not
# /data itself, which many a machine has for other ends; the Dockerfile's.
MOUNTS = (Path("/runpod-volume"), Path("/kindling"), Path("/data/kindling"), Path("/volume"))

# What each platform sets in every worker of its own; the prices of that platform apply.
Platform = Literal["other", "runpod", "modal", "fal"]
PLATFORMS: dict[str, Platform] = {"RUNPOD_POD_ID": "runpod", "MODAL_TASK_ID": "modal", "FAL_RUNNER_STATE": "fal"}
ENDPOINT_TOO = "BUCKET_ENDPOINT_URL"  # RunPod's name for the object store's endpoint


@dataclass(frozen=True, slots=True)
class Given:
    """What the environment says of a setting, and where: the variable's name, or "detected"."""

    value: Any
    source: str


def _there(mount: Path) -> bool:
    """Also where it fails: whoever uses that volume says how, and nobody quietly takes another."""
    try:
        return mount.is_dir()
    except OSError:
        return True


def _detected(environ: Mapping[str, str]) -> dict[str, Given]:
    """What nobody set and is known nevertheless, by field."""
    found = {}
    if cache := environ.get("XDG_CACHE_HOME"):
        found["volume"] = Given(Path(cache) / "kindling", "XDG_CACHE_HOME")
    if mount := next(filter(_there, MOUNTS), None):
        found["volume"] = Given(mount, "detected")
    if platform := next((platform for name, platform in PLATFORMS.items() if environ.get(name)), None):
        found["platform"] = Given(platform, "detected")
    if endpoint := environ.get(ENDPOINT_TOO):
        found["store_endpoint"] = Given(endpoint, ENDPOINT_TOO)
    return found


def _default(name: str, otherwise: Any) -> Any:
    return found.value if (found := _detected(os.environ).get(name)) else otherwise


def bucket_keys() -> tuple[str, str]:
    """The object store's access key and secret by RunPod's names for them; empty where they are not set.

    Never a field, for these are shown, and platforms carry KINDLING_* variables where others may read them.
    """
    return os.environ.get("BUCKET_ACCESS_KEY_ID", ""), os.environ.get("BUCKET_SECRET_ACCESS_KEY", "")


class Settings(BaseModel):
    """How one worker runs. `python -m handler doctor` lists these with their values and where each came from.

    A SettingsError names a field that is unknown, or whose value is wrong.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)

    model: str = Field("spark", min_length=1, description="model id, alias or mode (realtime, quality)")
    model_names: tuple[ModelName, ...] = Field(
        (), description="more names that requests may call the model by, such as gpt-image-1,default"
    )
    volume: Folder = Field(
        default_factory=lambda: _default("volume", None) or fields.home() / ".cache" / "kindling",
        description="holds models/, baked/, boots/, comfy/ and kept/",
    )
    volume_key: VolumeKey = Field("", repr=False, description="seals compiled code on the volume: no other is run")
    api_keys: tuple[str, ...] = Field((), repr=False, description="accepted bearer keys, comma-separated")
    admin_keys: tuple[str, ...] = Field((), repr=False, description="keys that metrics, status and receipt want then")
    hosts: tuple[Host, ...] = Field((), description="names that a server without keys answers to; else any if open")
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
    ulysses_degree: int = Field(1, ge=1, le=8, description="GPUs that draw one picture, exchanging attention heads")
    ring_degree: int = Field(1, ge=1, le=8, description="the same by passing keys around; both multiply")
    tp_size: int = Field(1, ge=1, le=8, description="of these GPUs, how many share one text encoder")
    workers: fields.Workers = Field(1, description="workers of serve, each on a GPU of its own; auto: for all GPUs")
    batch: Literal["auto"] | Annotated[int, Field(ge=1, le=8)] = Field(
        "auto",
        description="pictures of one shape drawn at once, at most; auto: as many as pay, by the receipt or as seen",
    )
    compile: Literal["auto", "on", "off"] = Field("auto", description="auto: reuse artifacts, make them on a GPU")
    publish: bool = Field(True, description="serving leaves compile artifacts for later workers")
    weights: tuple[Name, ...] = Field(
        (), description="files or folders over the model's own: on the volume, or owner/repository@revision[:path]"
    )
    vae: Name = Field("", description="another autoencoder: a folder, or owner/repository@revision on the hub")
    loras: tuple[Pinned, ...] = Field((), description="LoRAs to fetch, as name=owner/repository@revision:file")
    step_cache: StepCacheSetting = Field(
        "off", description="off, on, or values such as Fn=1,R=0.24: skip blocks of like steps"
    )
    workflows: Folder | None = Field(
        None, description="a folder of ComfyUI's files, each served as /workflows/NAME beside those on the volume"
    )
    queue: int = Field(32, ge=1, le=10_000, description="requests that may wait; more get 429")
    queue_s: float = Field(300, gt=0, le=86_400, description="seconds of work that may wait; more gets 429")
    deadline_s: float = Field(600, gt=0, le=86_400, description="seconds a request may take; a longer one gets 504")
    hang_s: float = Field(120, gt=0, le=86_400, description="seconds without a step's end before a worker gives up")
    max_body_mb: float = Field(8, gt=0, le=1024, description="largest request body in MB")
    max_edit_mb: float = Field(50, gt=0, le=1024, description="the same of edits, uploads, workflows' calls, if more")
    max_n: int = Field(4, ge=1, le=MAX_IMAGES, description="pictures that one request may ask for")
    long_prompts: LongPrompts = Field(
        "cut", description="of more tokens than the model reads: cut them, refuse, or read them in chunks (SDXL, SD1.5)"
    )
    metadata: bool = Field(True, description="write prompt and parameters into each PNG")
    comfy_ui: bool = Field(False, description="serve ComfyUI's editor at /comfy/, where its package is installed")
    platform: Platform = Field(
        default_factory=lambda: _default("platform", "other"), description="whose prices apply; detected"
    )
    gpu_price: float | None = Field(None, ge=0, le=1000, description="dollars an hour, in place of the list price")
    monthly_cap: float | None = Field(None, gt=0, le=1e9, description="dollars a month, for all workers on this volume")
    cap_action: Literal["alert", "refuse"] = Field("alert", description="past the cap: warn, or draw no more")
    store_bucket: str = Field("", pattern=r"^[A-Za-z0-9._-]*$", description="S3 bucket for pictures that travel by URL")
    store_endpoint: Endpoint = Field(
        default_factory=lambda: _default("store_endpoint", ""), description="of that bucket, where it is not AWS's"
    )
    store_region: str = Field("", pattern="^[A-Za-z0-9-]*$", description="of that bucket; else boto3's, else us-east-1")
    store_prefix: str = Field("kindling", pattern=r"^[A-Za-z0-9._/-]*$", description="what its keys begin with")
    store_expires_s: int = Field(86_400, ge=1, le=604_800, description="seconds for which a picture's URL works")
    fetch_hosts: tuple[Host, ...] = Field((), description="where images by URL may be fetched, such as images.example")
    webhook_hosts: tuple[Host, ...] = Field((), description="who may be told of jobs that have ended; comma-separated")
    webhook_secret: WebhookSecret = Field(
        "", repr=False, description="signs webhooks: whsec_ and 24 to 64 bytes in base64"
    )
    public_url: PublicUrl = Field("", description="where callers find this server, for URLs in answers")
    kept: int = Field(1000, ge=1, le=100_000, description="pictures by URL without a store, and jobs, kept at most")
    kept_mb: float = Field(256, gt=0, le=1e6, description="of each of these two, at most so many MB")
    kept_s: float = Field(3600, gt=0, le=2_592_000, description="seconds for which these can be had")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe log line shown")

    @field_validator(
        *("api_keys", "admin_keys", "hosts", "model_names", "cors_origins"),
        *("weights", "loras", "fetch_hosts", "webhook_hosts"),
        mode="before",
    )
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        parts = tuple(part.strip() for part in value.split(",") if part.strip())
        if value and not parts:  # who meant to lock the door shall not find it open
            raise ValueError("should be values, separated by commas; there is none")
        return parts

    @model_validator(mode="wrap")
    @classmethod
    def _in_our_words(cls, given: Any, check: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return check(given)
        except ValidationError as error:
            first, *_ = told = error.errors(include_input=False)
            name = str(next(iter(first["loc"]), cls.__name__))
            each = [fields.words(one["type"], one["msg"]) for one in told if one["loc"][:1] == first["loc"][:1]]
            unknown = first["type"] == "extra_forbidden"
            why = fields.not_known(name, {*cls.model_fields}) if unknown else f"{name}: {', or '.join(each)}."
            raise SettingsError(why, name) from None

    @property
    def ranks(self) -> int:
        """How many processes, each with a GPU, draw one picture."""
        return self.ulysses_degree * self.ring_degree

    @staticmethod
    def named(environ: Mapping[str, str]) -> dict[str, str]:
        """The variables of `environ` that mean to be settings: all KINDLING_* but empty ones and those of links."""
        return {k: v for k, v in environ.items() if v and k.startswith(PREFIX) and not LINK.match(f"{k}={v}")}

    @staticmethod
    def flag(environ: Mapping[str, str], name: str) -> bool:
        """Whether the variable `name` says yes, in the words that settings take; SettingsError if in no such word."""
        try:
            return TypeAdapter(bool).validate_python(environ.get(name) or False)
        except ValidationError:
            raise SettingsError(f"{name}: should be true or false.", name) from None

    @classmethod
    def given(cls, environ: Mapping[str, str]) -> dict[str, Given]:
        """What `environ` says of each setting, by field."""
        said = {k.removeprefix(PREFIX).lower(): Given(v, k) for k, v in cls.named(environ).items()}
        return _detected(environ) | {name: said[name] for name in cls.model_fields if name in said}

    @classmethod
    def examined(cls, environ: Mapping[str, str]) -> tuple[Self, dict[str, str]]:
        """The settings of `environ`, and a sentence on each variable that is wrong, which then counts as unset."""
        names = {PREFIX + name.upper() for name in cls.model_fields}
        faults = {name: fields.not_known(name, names) for name in cls.named(environ).keys() - names}
        given, wrong = cls.given(environ), dict[str, str]()
        while True:
            try:
                right = cls.model_validate({name: one.value for name, one in given.items() if name not in wrong})
                return right, faults | {given[name].source: why for name, why in wrong.items()} | unresolved(environ)
            except SettingsError as error:
                if (name := str(error.param)) not in given:
                    raise
                wrong[name] = given[name].source + error.message.removeprefix(name)

    @classmethod
    def from_env(
        cls, environ: Mapping[str, str] | None = None, model: str | None = None, weights: str | None = None
    ) -> Self:
        """Read every KINDLING_* variable; an empty one is unset; `model` and `weights`, if given, win over theirs.

        SettingsError names a bad one."""
        options = {f"{PREFIX}{name}": value for name, value in (("MODEL", model), ("WEIGHTS", weights)) if value}
        settings, faults = cls.examined({**(os.environ if environ is None else environ), **options})
        for name, why in sorted(faults.items()):
            raise SettingsError(why, name)
        return settings
