"""The dashboard for Grafana, held against what a live server tells at /metrics."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving import serving

DASHBOARD = json.loads((Path(__file__).parents[2] / "platform" / "grafana.json").read_text())
PANELS = DASHBOARD["panels"]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
SCRAPED = {"job", "instance"}  # the labels that Prometheus adds
NAME = re.compile(r"\bkindling_\w+")
USED = re.compile(r"(\w+)=~?\"|\bby \(([^)]*)\)|\{\{(\w+)\}\}")


def asked() -> Iterator[str]:
    """Each expression with its legend, and the variables' queries."""
    for panel in PANELS:
        for target in panel.get("targets", ()):
            yield f"{target['expr']} {target['legendFormat']}"
    yield VARIABLES["job"]["query"]["query"]


def labels(text: str) -> set[str]:
    """Those that an expression selects, groups or shows by."""
    found = {label for groups in USED.findall(text.replace("!=", "=")) for label in ", ".join(groups).split(", ")}
    return found - {""}


@pytest.fixture(scope="module")
def told() -> dict[str, set[str]]:
    """The labels of each metric, by name, after one picture; none for what a machine without a GPU cannot tell."""
    asked = {"prompt": "a red circle", "num_inference_steps": 1}
    with serving({"KINDLING_GPU_PRICE": "1"}) as server:
        assert httpx.post(server.url + "/v1/images/generations", json=asked, timeout=120).status_code == 200
        text = httpx.get(server.url + "/metrics").text
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        found[family.name] = set()
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize("text", list(asked()))
def test_every_name_and_label_is_told(told: dict[str, set[str]], text: str) -> None:
    for ratio in text.split(" / "):
        [name] = NAME.findall(ratio)
        assert name in told
        assert labels(ratio) <= told[name] | SCRAPED


def test_labels_are_found() -> None:
    found = {"le", "stage", "job", "status", "kind"}
    assert labels('sum by (le, stage) (x{job=~"$job", status!="a"}) {{kind}}') == found


def test_it_loads() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    assert "id" not in DASHBOARD  # an import makes one
    assert DASHBOARD["title"] == "Kindling"
    assert {panel["type"] for panel in PANELS} == {"row", "timeseries", "stat"}  # each comes with Grafana
    for panel in PANELS:
        for part in (panel, *panel.get("targets", ())):
            assert part.get("datasource", panel.get("datasource")) == place(panel)
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) - {"__rate_interval", "__all"} == set(VARIABLES)
    assert VARIABLES["datasource"]["type"] == "datasource"


def place(panel: dict[str, Any]) -> dict[str, str] | None:
    """Where a panel's numbers come from: whichever Prometheus the reader chooses."""
    return None if panel["type"] == "row" else {"type": "prometheus", "uid": "${datasource}"}


def test_panels_have_places_of_their_own() -> None:
    taken = [cell for panel in PANELS for cell in cells(panel["gridPos"])]
    assert len(taken) == len(set(taken))
    assert {x for x, _ in taken} == set(range(24))


def cells(place: dict[str, int]) -> Iterator[tuple[int, int]]:
    for x in range(place["x"], place["x"] + place["w"]):
        for y in range(place["y"], place["y"] + place["h"]):
            yield x, y
