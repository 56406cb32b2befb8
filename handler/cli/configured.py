"""Every setting as `doctor` lists it: its value, where that came from, what it means, and what is wrong with it."""

import os
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from handler.core.settings import PREFIX, Settings

# Without the other these have no effect.
NEEDS = {
    "store_endpoint": "store_bucket",
    "store_region": "store_bucket",
    "store_prefix": "store_bucket",
    "store_expires_s": "store_bucket",
    "cap_action": "monthly_cap",
    "webhook_secret": "webhook_hosts",
}


def described(settings: Settings, faults: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """A row for each setting and each fault of `Settings.examined`; keys are only counted, no wrong value is shown."""
    values = settings.model_dump(mode="json") | {
        "api_keys": f"{len(settings.api_keys)} set",
        "admin_keys": f"{len(settings.admin_keys)} set",
        "volume_key": "set" if settings.volume_key else "",
        "webhook_secret": "set" if settings.webhook_secret else "",
    }
    given = Settings.given(os.environ)
    rows = {}
    for name, field in Settings.model_fields.items():
        source = given[name].source if name in given else "default"
        row = {"value": values[name], "source": "environment" if source.startswith(PREFIX) else source}
        row["meaning"] = f"{field.description}{_range(field)}{_useless(name, settings) if name in given else ''}"
        rows[PREFIX + name.upper()] = row | _wrong(faults[source]) if source in faults else row
    unknown = {name: _wrong(why) for name, why in faults.items() if name.startswith(PREFIX) and name not in rows}
    return rows | unknown


def listed(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The rows for people."""
    return [
        f"  {name:<32} {_said(row['value']):<24} {row['source']:<12} {row['meaning']}" for name, row in rows.items()
    ]


def page() -> str:
    """Every setting as a table in Markdown, for docs/settings.md: variable, default, words, what it means."""
    rows = [
        f"| `{PREFIX}{name.upper()}` | {_default(field)} | {_words(field)} | {field.description}{_range(field)} |"
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join(["| variable | default | words | |", "|---|---|---|---|", *rows])


def _default(field: FieldInfo) -> str:
    if field.default_factory:
        return "detected, or none"
    value = str(field.default).lower() if isinstance(field.default, bool) else field.default
    said = f"{value:g}" if isinstance(value, float) else _said(list(value) if isinstance(value, tuple) else value)
    return "none" if said == "-" else f"`{said}`"


def _words(field: FieldInfo) -> str:
    """The words that a field may have, where there are some."""
    kinds = [field.annotation, *get_args(field.annotation)]
    return ", ".join(f"`{word}`" for kind in kinds if get_origin(kind) is Literal for word in get_args(kind))


def _said(value: object) -> str:
    """A value as its variable has it; a dash for none."""
    value = ",".join(value) if isinstance(value, list) else value
    return "-" if value in (None, "") else str(value)


def _wrong(why: str) -> dict[str, Any]:
    return {"value": None, "source": "environment", "meaning": f"WRONG: {why}"}


def _range(field: FieldInfo) -> str:
    """The numbers that a field may have."""
    bounds = {name: getattr(m, name) for m in field.metadata for name in ("gt", "ge", "le") if hasattr(m, name)}
    if "le" not in bounds:
        return ""
    least = f"above {bounds['gt']}" if "gt" in bounds else bounds["ge"]
    return f" ({least} to {bounds['le']:.12g})"


def _useless(name: str, settings: Settings) -> str:
    needed = NEEDS.get(name)
    return f"; NO EFFECT without {PREFIX}{needed.upper()}" if needed and not getattr(settings, needed) else ""
