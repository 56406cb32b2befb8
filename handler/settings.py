"""Settings: the only reader of the environment. One field is one `KINDLING_*` variable."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from handler.errors import SettingsError
from handler.stepcache import Choice

PREFIX = "KINDLING_"
# RunPod's network volume; platform/modal_app.py's; the folder that platform/fal_app.py's fetch makes on fal's disk, not
# /data itself, which many a machine has for other ends; the Dockerfile's.
MOUNTS = (Path("/runpod-volume"), Path("/kindling"), Path("/data/kindling"), Path("/volume"))

# What each platform sets in every worker of its own; the prices of that platform apply.
Platform = Literal["other", "runpod", "modal", "fal"]
PLATFORMS: dict[str, Platform] = {"RUNPOD_POD_ID": "runpod", "MODAL_TASK_ID": "modal", "FAL_RUNNER_STATE": "fal"}


def _default_volume() -> Path:
    for mount in MOUNTS:
        if mount.is_dir():
            return mount
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kindling"


def _default_platform() -> Platform:
    return next((platform for name, platform in PLATFORMS.items() if os.environ.get(name)), "other")


class Settings(BaseModel):
    """How one worker runs. `python -m handler doctor` lists these with their values and where each came from."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    model: str = Field("spark", min_length=1, description="model id, alias or mode (realtime, quality)")
    volume: Path = Field(default_factory=_default_volume, description="holds models/, baked/ and boots/")
    api_keys: tuple[str, ...] = Field((), repr=False, description="accepted bearer keys, comma-separated")
    allow_open: bool = Field(False, description="serve without keys on an address that others can reach")
    cold_start_budget_s: float = Field(240, gt=0, le=3600, description="seconds from process birth to ready")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8", "fp8-tensor", "int8", "int8-dynamic"] = Field(
        "auto", description="auto: the receipt's, else bf16 on a GPU, fp32 on a CPU; fp8 and int8 halve bf16's memory"
    )
    offload: Literal["auto", "off", "encoders", "blocks"] = Field(
        "auto", description="what waits in host memory: nothing, text encoders, all; auto: the first of these that fits"
    )
    compile: Literal["auto", "on", "off"] = Field("auto", description="auto: reuse artifacts, make them on a GPU")
    publish: bool = Field(True, description="leave compile artifacts on the volume for later workers")
    vae: str = Field("", description="another autoencoder: a folder, or owner/repository@revision on the hub")
    step_cache: Choice = Field("off", description="off, on, or values such as Fn=1,R=0.24: skip blocks of like steps")
    queue: int = Field(32, ge=1, le=10_000, description="requests that may wait; more get 429")
    max_body_mb: float = Field(8, gt=0, le=1024, description="largest request body in MB")
    metadata: bool = Field(True, description="write prompt and parameters into each PNG")
    platform: Platform = Field(default_factory=_default_platform, description="whose prices apply; detected")
    gpu_price: float | None = Field(None, ge=0, le=1000, description="dollars an hour, in place of the list price")
    monthly_cap: float | None = Field(None, gt=0, le=1e9, description="dollars a month, for all workers on this volume")
    cap_action: Literal["alert", "refuse"] = Field("alert", description="past the cap: warn, or draw no more")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe log line shown")

    @field_validator("api_keys", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(key.strip() for key in value.split(",") if key.strip()) if isinstance(value, str) else value

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
