"""The brush: what is marked, by pointer and by keyboard, is drawn anew, and nothing else."""

import io
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from playwright.sync_api import Locator, Page, expect

from browsing import drop
from serving import Served

SIDE = 256


@pytest.fixture
def picture() -> Image.Image:
    made = Image.new("RGB", (SIDE, SIDE), (20, 40, 160))
    made.paste((200, 30, 30), (40, 40, 100, 100))
    return made


@pytest.fixture
def easel(page: Page, picture: Image.Image) -> Locator:
    """The canvas over a picture that was dropped."""
    expect(page.get_by_role("radio", name="Realtime")).to_be_attached()
    picture.save(file := io.BytesIO(), "PNG")
    drop(page.locator("body"), file.getvalue(), "square.png", "image/png")
    page.get_by_role("button", name="Mark where to change it").click()
    marks = page.get_by_role("img", name="The picture;")
    expect(marks).to_have_css("position", "absolute")  # until its style is there, it lies elsewhere
    return marks


def stroke(page: Page, easel: Locator, *points: tuple[float, float]) -> None:
    """Over these parts of the width and height."""
    easel.scroll_into_view_if_needed()
    box = easel.bounding_box()
    assert box
    (x, y), *rest = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in points]
    page.mouse.move(x, y)
    page.mouse.down()
    for x, y in rest:
        page.mouse.move(x, y, steps=5)
    page.mouse.up()


def share(easel: Locator) -> int:
    """Percent that are marked."""
    return int("".join(filter(str.isdigit, easel.get_attribute("aria-label") or "")))


def make(page: Page, folder: Path) -> Image.Image:
    page.fill("[name=prompt]", "a yellow star on a white background")
    page.get_by_role("button", name="Make", exact=True).click()
    page.get_by_role("link", name="Download").wait_for()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    download.value.save_as(folder / "made.png")
    return Image.open(folder / "made.png").convert("RGB")


def changed(before: Image.Image, after: Image.Image) -> tuple[int, int, int, int] | None:
    return ImageChops.difference(before, after).getbbox()


def test_only_what_is_marked_is_drawn_anew(page: Page, easel: Locator, picture: Image.Image, tmp_path: Path) -> None:
    stroke(page, easel, (0.7, 0.7), (0.9, 0.9))
    assert 0 < share(easel) < 10
    box = changed(picture, make(page, tmp_path))
    assert box
    margin = SIDE * 0.05 + 3  # half of the brush, and what is blended
    assert min(box[:2]) >= SIDE * 0.7 - margin
    assert max(box[2:]) <= SIDE * 0.9 + margin
    assert min(box[:2]) <= SIDE * 0.7
    assert max(box[2:]) >= SIDE * 0.85


def test_by_keyboard_alone(page: Page, easel: Locator, picture: Image.Image, tmp_path: Path) -> None:
    easel.focus()
    page.keyboard.press(" ")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.keyboard.press(" ")
    expect(page.get_by_text("Lifted.")).to_be_attached()
    first = share(easel)
    assert 0 < first < 15
    page.keyboard.press("]")
    page.keyboard.press(" ")
    page.keyboard.press(" ")
    assert share(easel) >= first
    page.keyboard.press("Control+z")
    assert share(easel) == first
    box = changed(picture, make(page, tmp_path))
    assert box
    assert box[0] > SIDE * 0.4
    assert box[1] > SIDE * 0.4
    assert box[3] < SIDE * 0.6


def test_what_is_done_is_taken_back(page: Page, easel: Locator) -> None:
    undo, erase = (page.get_by_role("button", name=name) for name in ("Undo", "Erase"))
    expect(undo).to_be_disabled()
    stroke(page, easel, (0.1, 0.5), (0.9, 0.5))
    line = share(easel)
    stroke(page, easel, (0.5, 0.1), (0.5, 0.9))
    cross = share(easel)
    assert cross > line
    undo.click()
    assert share(easel) == line
    erase.click()
    stroke(page, easel, (0.1, 0.5), (0.5, 0.5))
    assert 0 < share(easel) < line
    undo.click()
    page.get_by_role("button", name="Invert").click()
    assert abs(share(easel) - (100 - line)) <= 1
    undo.click()
    assert share(easel) == line
    page.get_by_role("button", name="Clear").click()
    assert share(easel) == 0
    expect(undo).to_be_disabled()


def test_the_brush_has_a_size(page: Page, easel: Locator) -> None:
    """And marks where it is put down, though it is not moved."""
    stroke(page, easel, (0.5, 0.5))
    small = share(easel)
    page.get_by_role("slider", name="Brush").fill("40")
    stroke(page, easel, (0.5, 0.5))
    assert share(easel) > 3 * small > 0


def test_nothing_marked_is_no_mask(
    page: Page, easel: Locator, picture: Image.Image, tmp_path: Path, server: Served
) -> None:
    box = changed(picture, make(page, tmp_path))
    assert box
    assert box[2] - box[0] > SIDE / 2
