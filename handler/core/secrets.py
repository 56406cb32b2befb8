"""Which variables of an environment are secrets, by their names: processes that we start do without them."""

import re
from collections.abc import Mapping

NAME = re.compile(r"(.*_)?(KEYS?|TOKENS?|SECRETS?|PASSWORD|PASSWD|CREDENTIALS?|HEADERS)(_.*)?", re.IGNORECASE)
NEEDED = "KINDLING_VOLUME_KEY"  # by whatever of ours reads the volume
UNRESOLVED = re.compile(r"\{\{ *RUNPOD_SECRET_[^{}]+\}\}")


def secret_names(environ: Mapping[str, str]) -> list[str]:
    """Those of `environ` that no other program needs to know."""
    return [name for name in environ if NAME.fullmatch(name)]


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` for a worker of ours that serves nobody."""
    secret = {*secret_names(environ)} - {NEEDED}
    return {name: value for name, value in environ.items() if name not in secret}


def unresolved(environ: Mapping[str, str]) -> dict[str, str]:
    """On a machine of RunPod's, a sentence on each variable whose secret the console does not have.

    RunPod leaves its own words there, and as a key everybody would know them.
    """
    left = {name: value for name, value in environ.items() if UNRESOLVED.fullmatch(value)}
    told = {name: f"RunPod has no secret for {name}={value}: make it in the console." for name, value in left.items()}
    return told if environ.get("RUNPOD_POD_ID") else {}
