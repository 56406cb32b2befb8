"""The manifests of `platform/`, with other values: what ships is the one source of what is generated."""

import re
from collections.abc import Mapping
from pathlib import Path

from handler.api.deploying.choice import Choice

HERE = Path(__file__).parent  # with links to them: a package and Modal have no platform/
HEAD = re.compile(r"\A(#.*\n)+")
GIB = 1.073741824


def changed(name: str, edits: Mapping[str, str], command: str) -> str:
    """The manifest `name`, where each pattern, found at least once, gives way. Its head, of what ships, is left out."""
    text = (HERE / name).read_text()
    for pattern, replacement in edits.items():
        text, count = re.subn(pattern, replacement.replace("\\", r"\\"), text, flags=re.M)
        assert count, f"{name} has no {pattern}"
    return HEAD.sub(f"# Made by `{command}`; docs/deploy/{Path(name).stem}.md says more.\n", text)


def _plain(choice: Choice) -> list[tuple[str, str]]:
    """The settings that Kubernetes, Cloud Run and SkyPilot are told in plain text."""
    precision = [("KINDLING_PRECISION", choice.precision)] * (choice.precision != "auto")
    return [("KINDLING_MODEL", choice.spec.id), *precision]


def _environment(choice: Choice) -> dict[str, str]:
    lines = "".join(f"            - {{name: {name}, value: {value}}}\n" for name, value in _plain(choice))
    return {r"^ +- \{name: KINDLING_MODEL, value: .*\n": lines}


def kubernetes(choice: Choice, command: str) -> str:
    """For the whole application: the volume, the job that fetches, the workers and their scaling."""
    memory = (round(choice.host_gb / GIB / 4 + 0.49) + 1) * 4  # the plan's, and at least 4 to spare
    edits = {
        r"kindling-fetch-[\w.-]+": f"kindling-fetch-{choice.spec.id}",
        **_environment(choice),
        r"storage: .*": f"storage: {choice.volume_gb}Gi",
        r'requests: \{cpu: "4", memory: .*': f'requests: {{cpu: "4", memory: {memory}Gi}}',
        r"limits: \{nvidia.com/gpu: 1, memory: .*": f"limits: {{nvidia.com/gpu: 1, memory: {memory}Gi}}",
        r"minReplicaCount: \d+": f"minReplicaCount: {choice.least or 0}",
        r"maxReplicaCount: \d+": f"maxReplicaCount: {most(choice, 4)}",
    }
    return changed("kubernetes.yml", edits, command)


def cloudrun(choice: Choice, command: str) -> str:
    """For one service."""
    [name] = choice.first.rental.names
    cpus, memory = {"nvidia-l4": 8, "nvidia-rtx-pro-6000": 20}[name], round(choice.first.rental.host_gb / GIB)
    edits = {
        **_environment(choice),
        r"accelerator: .*": f"accelerator: {name}",
        r"limits: \{cpu: .*": f'limits: {{cpu: "{cpus}", memory: {memory}Gi, nvidia.com/gpu: "1"}}',
        r'minScale: "\d+"': f'minScale: "{choice.least or 0}"',
        r'maxScale: "\d+"': f'maxScale: "{most(choice, 4)}"',
    }
    return changed("cloudrun.yml", edits, command)


def convox(choice: Choice, command: str) -> str:
    """For one service on nodes that have the GPU."""
    memory = round(choice.first.rental.host_gb / 1.024) * 1024  # MB
    edits = {
        r"KINDLING_MODEL=.*": f"KINDLING_MODEL={choice.spec.id}",
        r"KINDLING_PRECISION=.*": f"KINDLING_PRECISION={choice.precision}",
        r"count: 1-2": f"count: {choice.least or 1}-{most(choice, 2)}",
        r"memory: \d+": f"memory: {memory}",
    }
    return changed("convox.yml", edits, command)


def sky(choice: Choice, command: str) -> str:
    """For SkyServe."""
    wanted = ", ".join(f"{name}:1" for name in choice.names)
    where = [region if "/" in region else f"*/{region}" for region in choice.regions]
    place = f"infra: '{where[0]}'\n  " if where else ""
    edits = {
        r"accelerators: .*": f"{place}accelerators: {{{wanted}}}",
        r"memory: .*": f"memory: {round(choice.host_gb + 4.49)}+",
        r"disk_size: .*": f"disk_size: {choice.volume_gb + 100}",
        r"^  KINDLING_MODEL: .*\n": "".join(f"  {name}: {value}\n" for name, value in _plain(choice)),
        r"min_replicas: .*": f"min_replicas: {1 if choice.least is None else choice.least}",
        r"max_replicas: .*": f"max_replicas: {most(choice, 4)}",
    }
    return changed("sky.yml", edits, command)


def most(choice: Choice, usual: int) -> int:
    """Workers at most: as asked, else as many as the manifest has, if that is not less than the least."""
    return max(usual, choice.least or 0) if choice.most is None else choice.most
