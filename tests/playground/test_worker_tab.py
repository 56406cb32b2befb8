"""What the page says of the worker: its model's licence, what it runs, how it started, and how it is; also of one that
starts or has failed."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect
from test_receipts import receipt

from browsing import Visit
from fakes import FakeFamily
from handler import Clock, Engine, Settings, Worker, create_app
from handler.catalog.licenses import FLUX_1_DEV
from handler.catalog.models import find
from handler.core.errors import StartError
from serving import Served, live, serving

CHIPS = ["steps: 4 steps", "guidance: gs 0", "scheduler: FlowMatch", "precision: FP32", "compile: eager"]

ASK = """count => {
    const headers = {'content-type': 'application/json'}
    for (let seed = 1; seed <= count; seed++)
        fetch('generate', {method: 'POST', body: JSON.stringify({prompt: 'x', seed}), headers})
}"""


def tab(page: Page) -> Page:
    page.get_by_role("link", name="Worker").click()
    expect(page.get_by_role("heading", name="The worker")).to_be_attached()
    return page


class Slow(FakeFamily):
    """Starts when it is told to, and how."""

    def __init__(self) -> None:
        super().__init__()
        self.go, self.error = threading.Event(), ""

    def boot(self, settings: Settings, clock: Clock) -> Worker:
        """In place of `Worker.boot`."""
        with clock.start(settings.model):
            with clock.phase("volume"):
                pass
            with clock.phase("weights"):
                assert self.go.wait(60)
                if self.error:
                    raise StartError(self.error)
            return super().boot(settings, clock)


@contextmanager
def served(family: FakeFamily, **settings: Any) -> Iterator[tuple[str, Engine]]:
    engine = Engine(Settings(**settings), Clock.anew(240), family.boot)
    with live(create_app(engine, public=False)) as url:
        yield f"{url}/", engine


def test_what_runs_has_a_measurement_behind_each_word_on_hover_and_focus(page: Page) -> None:
    tab(page)
    chips = page.locator(".chips button")
    expect(chips).to_have_text(CHIPS)
    tip = page.get_by_role("tooltip").first
    expect(tip).to_be_hidden()
    chips.first.hover()
    expect(tip).to_have_text("steps: not measured; measure it with: python -m handler optimize spark")
    page.mouse.move(0, 0)
    expect(tip).to_be_hidden()
    chips.first.focus()
    expect(tip).to_be_visible()
    expect(chips.first).to_have_accessible_description(tip.inner_text())
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    expect(page.locator("#worker .note")).to_contain_text("python -m handler optimize spark")


def tenths(seconds: float) -> str:
    """As JavaScript's toFixed(1) has it: of two that are as near, the larger one."""
    return str(Decimal(seconds).quantize(Decimal("0.1"), ROUND_HALF_UP))


def test_the_cold_start_is_a_bar_of_its_phases(page: Page, server: Served) -> None:
    [ledger] = [json.loads(line)["cold_start"] for line in server.lines if line.startswith('{"cold_start"')]
    card = tab(page).locator(".card", has=page.get_by_role("heading", name="How it started"))
    expect(card).to_contain_text(f"Ready after {tenths(ledger['total_s'])} s, of 240 s that a start may take.")
    expect(card.locator("dt")).to_have_count(1 + len(ledger["phases"]))
    expect(card.locator("dd").last).to_have_text(f"{tenths(ledger['phases'][-1]['seconds'])} s")
    bar = card.get_by_role("img", name=f"{tenths(ledger['total_s'])} s of the 240 s")
    widths = bar.locator("i").evaluate_all("parts => parts.map(part => part.getBoundingClientRect().width)")
    whole = bar.evaluate("bar => bar.clientWidth")
    for width, phase in zip(widths[1:], ledger["phases"], strict=True):
        assert width == pytest.approx(whole * phase["seconds"] / 240, abs=1)


def test_the_figures_are_those_of_right_now(visit: Visit, family: FakeFamily) -> None:
    family.gate = threading.Event()
    with served(family, queue=4, gpu_price=3.6, monthly_cap=500) as (url, engine):
        engine.wait_booted()
        page = tab(visit.open(url))
        figures = page.locator(".card", has=page.get_by_role("heading", name="Right now"))
        expect(figures).to_contain_text("ready to draw")
        expect(figures).to_contain_text("0 of at most 4")
        expect(figures).to_contain_text("of 500 dollars are spent this month")
        page.evaluate(ASK, 3)
        expect(figures).to_contain_text("2 of at most 4")
        family.gate.set()
        expect(figures).to_contain_text("0 of at most 4")


def test_the_page_is_there_before_the_model_and_shows_the_phases_move(visit: Visit) -> None:
    family = Slow()
    with served(family) as (url, _):
        page = visit.open(url)
        banner = page.locator("#banner")
        expect(banner).to_contain_text("The worker is starting: reading the model.")
        expect(page.locator("#live")).to_contain_text("The worker is starting")
        before = banner.get_by_role("progressbar").get_attribute("value")
        expect(banner.get_by_role("progressbar")).not_to_have_attribute("value", before or "")
        card = tab(page).locator(".card", has=page.get_by_role("heading", name="How it started"))
        expect(card.locator("dt").last).to_have_text("reading the model")
        expect(card.locator("dd").last).to_contain_text("so far")
        expect(page.locator("#worker")).to_contain_text("This worker is still starting.")
        family.go.set()
        expect(card).to_contain_text("Ready after")
        expect(banner).not_to_contain_text("starting")
        expect(page.locator("#live")).to_have_text("The worker is ready.")
        expect(page.locator("#worker .note")).to_contain_text("python -m handler optimize spark")


def test_a_real_start_moves_on_to_ready(visit: Visit) -> None:
    with serving(ready=False) as server:
        page = tab(visit.open(f"{server.url}/"))
        expect(page.locator("#worker")).to_contain_text("Ready after")


def test_a_start_that_fails_says_why(visit: Visit) -> None:
    family = Slow()
    family.error = "model.safetensors is damaged: <b>fetch</b> it again."
    with served(family) as (url, _):
        page = visit.open(url)
        expect(page.locator("#banner")).to_contain_text("The worker is starting")
        family.go.set()
        expect(page.locator("#banner")).to_contain_text(f"The worker has failed: {family.error}")
        expect(page.locator("#live")).to_contain_text(family.error)
        expect(tab(page).locator("#worker .error").first).to_have_text(family.error)


def test_a_worker_that_is_gone_is_told_and_one_that_comes_back_too(visit: Visit) -> None:
    with serving() as server:
        page = tab(visit.open(f"{server.url}/"))
        expect(page.locator("#worker")).to_contain_text("ready to draw")
        port = server.url.rpartition(":")[2]
    expect(page.locator("#banner")).to_contain_text("The worker does not answer.")
    expect(page.locator("#worker")).to_contain_text("these figures are old")
    with serving({}, "--port", port):
        expect(page.locator("#banner")).not_to_contain_text("does not answer")
        expect(page.locator("#worker")).to_contain_text("ready to draw")
    visit.expect("ERR_CONNECTION_REFUSED")


@pytest.mark.parametrize("model", ["flux-dev", "flux-schnell", "spark"])
def test_a_licence_that_forbids_business_is_hard_to_miss(visit: Visit, family: FakeFamily, model: str) -> None:
    terms = find(model).license
    with served(family, model=model) as (url, _):
        page = visit.open(url)
        shown = page.locator("#banner .terms")
        expect(shown).to_have_text(f"{model}: {terms.name}. {terms.obligation}")
        strict = shown.evaluate("shown => getComputedStyle(shown).borderLeftWidth") != "0px"
        assert strict == (terms == FLUX_1_DEV) == (not terms.commercial)
        expect(tab(page).locator("#worker")).to_contain_text(terms.obligation)
        expect(shown).to_be_visible()


def test_measurements_are_those_of_the_receipt(visit: Visit) -> None:
    class Measured(FakeFamily):
        def boot(self, settings: Settings, clock: Clock) -> Worker:
            worker = super().boot(settings, clock)
            worker.receipt = receipt("fp32")
            return worker

    with served(Measured()) as (url, engine):
        engine.wait_booted()
        told = httpx.get(f"{url}v1/receipt").json()
        page = tab(visit.open(url))
        page.locator(".chips button", has_text="fp32").or_(page.locator(".chips button", has_text="FP32")).focus()
        [measured] = [chip["measured"] for chip in told["chips"] if chip["label"] == "precision"]
        assert "GB at most" in measured
        expect(page.get_by_role("tooltip", name=measured)).to_be_visible()
        expect(page.locator("#worker .note")).to_have_count(0)
