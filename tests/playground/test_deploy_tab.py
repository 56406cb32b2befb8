"""The deploy tab: the command line's choices, commands and refusals, in a browser."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from browsing import Visit
from handler.__main__ import main
from handler.api.deploying.deployment import OPTIONS
from handler.api.deploying.platforms import PLATFORMS
from serving import Served


@pytest.fixture
def tab(visit: Visit, server: Served) -> Page:
    """The tab, with what it says of what is served."""
    page = visit.open(f"{server.url}/#deploy")
    expect(page.get_by_role("heading", name="spark on Modal")).to_be_visible()
    return page


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def run(*words: str) -> dict[str, Any]:
        assert main(["deploy", *words, "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


def test_its_commands_and_files_are_the_command_lines(
    tab: Page, printed: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    for platform in PLATFORMS:
        tab.select_option("#deploy-platform", platform)
        tab.select_option("#deploy-model", "flux-schnell")
        expect(tab.locator("#deploy h2")).to_contain_text("flux-schnell on ")
        found = printed(platform, "flux-schnell")
        expect(tab.get_by_label("Commands")).to_have_text("\n".join(found["commands"]))
        for name, text in found["files"].items():
            expect(tab.get_by_label(name)).to_have_text(text)
    tab.select_option("#deploy-platform", "kubernetes")
    tab.select_option("#deploy-gpu", "L40S")
    tab.select_option("#deploy-precision", "fp8")
    tab.fill("#deploy-min", "1")
    tab.fill("#deploy-max", "3")
    tab.keyboard.press("Tab")
    found = printed("kubernetes", "flux-schnell", "--gpu", "L40S", "--precision", "fp8", "--min", "1", "--max", "3")
    expect(tab.get_by_label("kubernetes.yml")).to_have_text(found["files"]["kubernetes.yml"])
    for fact in ("memory", "licence"):
        expect(tab.locator("#deploy dl")).to_contain_text(found[fact])
    for link, name, text in (
        (0, "deploy.sh", found["script"]),
        (1, "kubernetes.yml", found["files"]["kubernetes.yml"]),
    ):
        with tab.expect_download() as download:
            tab.locator("#deploy").get_by_role("link", name="Download").nth(link).click()
        assert download.value.suggested_filename == name
        download.value.save_as(tmp_path / name)
        assert (tmp_path / name).read_text() == text


def test_what_cannot_work_is_said_beside_its_field(tab: Page, visit: Visit) -> None:
    tab.select_option("#deploy-platform", "cloudrun")
    tab.select_option("#deploy-model", "flux2-dev")
    tab.select_option("#deploy-gpu", "L4")
    field = tab.locator(".field", has=tab.locator("#deploy-gpu"))
    expect(field.locator(".error")).to_contain_text("On cloudrun these would do")
    expect(tab.get_by_label("Commands")).to_have_count(0)
    expect(tab.locator("#deploy-gpu")).to_have_attribute("aria-invalid", "true")
    tab.select_option("#deploy-gpu", "")
    expect(tab.locator("#deploy .error")).to_have_count(0)
    expect(tab.get_by_label("Commands")).to_be_visible()
    visit.expect("422")


def test_what_means_nothing_there_says_why(tab: Page) -> None:
    for platform, row in PLATFORMS.items():
        tab.select_option("#deploy-platform", platform)
        for name in OPTIONS:
            control = tab.locator(f"#deploy-{name}")
            expect(control).to_be_enabled(enabled=name not in row.lacks)
            if name in row.lacks:
                hint = tab.locator(".field", has=control).locator(".hint")
                expect(hint).to_have_text(f"Not here: {row.lacks[name]}.")


def test_a_command_is_copied(visit: Visit, server: Served) -> None:
    visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = visit.open(f"{server.url}/#deploy")
    page.locator("#deploy").get_by_role("button", name="Copy").first.click()
    expect(page.locator("#live")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == page.get_by_label("Commands").text_content()
