"""The board as a teacher sees it, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from common.serve import running_app
from tests.chromium import Browser, Page, needs_chromium
from workshop.board import Board, create_app
from workshop.progress import ExerciseProgress, LearnerProgress, PartProgress, Status

pytestmark = needs_chromium


def learner(number: int, name: str, *statuses: Status, part: int = 4) -> LearnerProgress:
    exercises = [ExerciseProgress(f"exercise{index}", status, index) for index, status in enumerate(statuses)]
    return LearnerProgress(f"{number:032x}", name, [PartProgress(part, exercises)])


@pytest.fixture
def board() -> Board:
    return Board("KXQTRM")


@pytest.fixture
def page(browser: Browser, board: Board) -> Iterator[Page]:
    with running_app(create_app(board, "http://192.0.2.1:8080")) as url:
        yield browser.open(url)


def test_learners_appear_as_they_report(page: Page, board: Board) -> None:
    page.until("document.querySelector('#join').textContent", "the command to join")
    assert page.text("#join") == '.venv/bin/workshop join http://192.0.2.1:8080 KXQTRM "YOUR NAME"'
    assert "Nobody has joined yet" in page.text("body")
    board.add(learner(1, "Ada", "solved", "fails"))
    page.until("document.querySelector('tbody tr')", "a learner")
    assert page.text("tbody th") == "Ada" and page.text("thead") == "learner\tpart 4", page.text("table")
    assert page.text("tbody td").splitlines()[0].replace(" ", "").startswith("✓✗"), page.text("tbody td")
    board.add(learner(1, "Ada", "solved", "solved"))
    page.until("!document.querySelector('.fails')", "the next report to take the place of the last")
    board.add(learner(2, "Grace", "started", part=1))
    page.until("document.querySelectorAll('tbody tr').length === 2", "another learner")
    assert page.text("thead") == "learner\tpart 1\tpart 4", page.text("thead")


def test_where_learners_are_stuck(page: Page, board: Board) -> None:
    """Exercises that fail, or for which a learner who has begun needed a hint: the second one of these has one."""
    board.add(learner(1, "Ada", "started", "fails"))
    board.add(learner(2, "Grace", "fails", "started"))
    page.until("!document.querySelector('#stuck').hidden", "what several learners are stuck at")
    assert page.text("#stuck ul") == "exercise1 (part 4): 2 learners, 2 hints", page.text("#stuck")


def test_a_name_is_only_text(page: Page, board: Board) -> None:
    name = "<img src=x onerror=alert(1)>"
    board.add(learner(1, name, "open"))
    page.until("document.querySelector('tbody tr')", "a learner")
    assert page.text("tbody th") == name and not page.js("document.querySelectorAll('img').length")


def test_the_number_solved_is_there_for_screen_readers(page: Page, board: Board) -> None:
    board.add(learner(1, "Ada", "solved", "open", "filled in"))
    page.until("document.querySelector('tbody tr')", "a learner")
    assert page.js("document.querySelector('tbody .unseen').textContent") == "1 of 3 solved"
    assert page.js("document.querySelector('.mark').title") == "exercise0: solved, 0 hints"


def test_it_says_that_the_board_has_ended(page: Page) -> None:
    page.until("document.querySelector('#join').textContent", "the command to join")
    page.js("window.fetch = () => Promise.reject(new Error('gone'))")
    page.until("!document.querySelector('#lost').hidden", "a line that says so")


def test_it_fits_a_phone(page: Page, board: Board) -> None:
    board.add(learner(1, "A name of forty characters, or nearly so", *(["solved"] * 12)))
    page.send("Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=1, mobile=True)
    page.until("document.querySelector('tbody tr')", "a learner")
    assert page.js("document.documentElement.scrollWidth") <= 360, "only the table scrolls sideways"
