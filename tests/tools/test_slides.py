"""The slides: of all parts, without a network, and usable by keyboard."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.chromium import Browser, needs_chromium
from tools import slides
from tools.slides import build, images_of, read_sections


@pytest.fixture(scope="module")
def page() -> str:
    return build()


def test_each_part_has_its_slides(page: str) -> None:
    labels = re.findall(r'<section class="slide[^"]*" aria-label="([^"]*)"', page)
    assert labels[0] == "Contents"
    for number in range(1, 16):
        own = [label for label in labels if label.startswith(f"Part {number}: ")]
        assert own[-1].endswith(": questions"), f"part {number}: {own}"
        assert len(own) == 2 + len([*images_of(number)]) >= 3, (
            f"part {number}: a message, a diagram and questions: {own}"
        )


def test_nothing_is_loaded(page: str) -> None:
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page), "a room may have no network"


def test_a_part_without_a_message_is_an_error() -> None:
    with pytest.raises(ValueError, match="part 3: expected"):
        read_sections("### Part 3: paged attention · 75 minutes\n\nno message\n")


def test_the_command_writes_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "slides.html"
    monkeypatch.setattr("sys.argv", ["slides", str(file)])
    slides.main()
    assert file.is_file() and str(file) in capsys.readouterr().out


@needs_chromium
def test_a_talk_by_keyboard(browser: Browser, page: str, tmp_path: Path) -> None:
    file = tmp_path / "slides.html"
    file.write_text(page, encoding="utf-8")
    tab = browser.open(file.as_uri())
    shown = "document.querySelector('.slide.shown').ariaLabel"
    assert tab.js(shown) == "Contents" and tab.js("document.querySelectorAll('.slide.shown').length") == 1
    tab.press("ArrowRight")
    assert tab.js(shown) == "The whole engine"
    tab.press("End")
    assert tab.js(shown).startswith("Part 15") and tab.js(shown).endswith("questions")
    hidden = "document.querySelectorAll('.slide.shown li p[hidden]').length"
    before = tab.js(hidden)
    tab.press("a")
    assert before > 0 and tab.js(hidden) == before - 1, "A shows one answer"
    tab.press("Home")
    tab.click("[data-part='4']")
    assert tab.js(shown) == "Part 4: continuous batching"
    place = tab.js("location.hash")
    tab.go(file.as_uri() + place)
    tab.until(f"{shown} === 'Part 4: continuous batching'", "a reload to stay at the slide")
