"""docs/clients.md: its table is what was tried, by real clients beside these tests and by requests within them."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE, RESULTS = ROOT / "docs/clients.md", ROOT / "benchmarks/results/clients.json"
HEAD = "| client | version | how it was tried | what |\n|---|---|---|---|\n"
SUITE = "as `make test` installs it"
REAL, RECORDED = "the real client, in the tests", "its recorded request, in the tests"


@dataclass(frozen=True)
class Tried:
    """A client that tests of ours try; `test` names the one that shows it best."""

    name: str
    version: str
    how: str
    what: str
    test: str


IN_TESTS = (
    Tried("OpenAI, Python", SUITE, REAL, "draws, streams, lists models, edits, is refused, retries, gives up",
          "tests/server/test_stream.py::test_"),
    Tried("OpenAI, Python, with a timeout", SUITE, REAL, "hears why before it hangs up",
          "tests/server/test_clients.py::test_openais_client_hears_why_before_it_hangs_up"),
    Tried("SGLang's `bench_serving`", "0.5.23", RECORDED, "waits, finds the model, draws, reads the peak of memory",
          "tests/server/test_clients.py::test_sglangs_benchmark_finds_a_server_its_model_and_the_memory"),
    Tried("RunPod's SDK", SUITE, REAL, "jobs, progress, cancelling, answers that are too large",
          "tests/platform/test_runpod_worker.py::test_"),
    Tried("clients with a fixed model name (Dify, n8n, LibreChat, LlamaIndex)", "", RECORDED, "`KINDLING_MODEL_NAMES`",
          "tests/server/test_clients.py::test_a_fixed_name_is_listed_and_echoed"),
    Tried("browsers' and n8n's forms", "", RECORDED, "empty fields and files, several images, long base64",
          "tests/server/test_clients.py::test_a_browsers_form_has_what_was_left_out"),
    Tried("ComfyUI's example clients", "0.3.64", RECORDED, "`/prompt`, the websocket, `/history`, `/view`",
          "tests/server/test_comfy_clients.py::test_a_client_that_listens_and_then_asks_for_the_files"),
    Tried("schemathesis", SUITE, REAL, "finds no answer that differs from `/openapi.json`",
          "tests/server/test_openapi.py::test_schemathesis_finds_nothing"),
)  # fmt: skip


def table() -> str:
    """As it should stand in the page."""
    apart = [
        (row["name"], row["version"], f"the real client, on {row['on']}", row["what"])
        for row in json.loads(RESULTS.read_text())
    ]
    within = [(each.name, each.version, each.how, each.what) for each in IN_TESTS]
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in sorted(apart + within, key=lambda row: row[0].lower()))


def test_the_page_has_what_was_tried() -> None:
    assert table() in PAGE.read_text(), f"the table should be:\n{table()}"


def test_all_that_was_tried_works() -> None:
    assert [row["name"] for row in json.loads(RESULTS.read_text()) if not row["works"]] == []


@pytest.mark.parametrize("tried", IN_TESTS, ids=lambda tried: tried.name)
def test_there_is_a_test_of_each(tried: Tried) -> None:
    path, _, name = tried.test.partition("::")
    assert f"def {name}" in (ROOT / path).read_text()
