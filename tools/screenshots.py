"""Take the pictures in results/screenshots: python -m tools.screenshots, after make docs slides. Needs Chromium.

The chat page of a running server, the engine viewer with two traces, the book, a workshop's board and its slides, each
in light and dark.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from common.serve import running_app, server_process
from tests.chromium import Browser, Page, running_chromium
from workshop.board import Board, create_app
from workshop.course import read_parts
from workshop.progress import ExerciseProgress, LearnerProgress, PartProgress, Status

ROOT = Path(__file__).parent.parent
PICTURES, TRACES = ROOT / "results" / "screenshots", ROOT / "results" / "traces"
SITE, SLIDES = ROOT / "build" / "site", ROOT / "build" / "slides.html"
SCHEMES = ("light", "dark")
NUM_STEP = 46
NUM_SLIDE = 10
PART = 4  # of the room
ROOM: list[list[tuple[Status, int]]] = [  # what each seat of a room has reported of PART, with hints that were shown
    [("solved", 0), ("solved", 0), ("solved", 1), ("started", 0), ("open", 0), ("open", 0)],
    [("solved", 1), ("fails", 2), ("open", 0), ("open", 0), ("open", 0), ("open", 0)],
    [("solved", 0), ("fails", 1), ("open", 0), ("open", 0), ("open", 0), ("open", 0)],
    [("filled in", 3), ("solved", 0), ("solved", 0), ("fails", 0), ("open", 0), ("open", 0)],
]


def show_chat(browser: Browser, url: str, scheme: str) -> Page:
    page = browser.open(url)
    page.show_as(scheme, 1000, 620)
    page.until("document.querySelector('#model').textContent !== ''", "the model's name")
    page.click("#question")
    page.type("What is a KV cache?")
    page.press("Enter")
    page.until("document.querySelector('.answer .stats') && !document.querySelector('[aria-busy]')", "an answer")
    return page


def show_viewer(browser: Browser, scheme: str) -> Page:
    page = browser.open((ROOT / "common" / "pages" / "engine.html").as_uri())
    page.show_as(scheme, 1280, 900)
    for place, (selector, name) in enumerate(
        (("#first-file", "part07_without_prefix_caching"), ("#second-file", "part07_prefix_caching"))
    ):
        page.choose(selector, TRACES / f"{name}.jsonl")
        page.until(f"viewer.views[{place}] !== undefined", f"{name} to be shown")
    page.js(f"show({NUM_STEP})")
    page.js("viewer.views.forEach(view => view.select(view.step.requests[0].id))")
    return page


def show_book(browser: Browser, scheme: str, name: str) -> Page:
    page = browser.open((SITE / "404.html").as_uri())
    page.show_as(scheme, 1280, 900)  # before the page is loaded: the theme looks at it once
    page.go((SITE / name).as_uri())
    return page


def board_of(room: list[list[tuple[Status, int]]]) -> Board:
    board = Board("KXQTRM")
    part = next(each for each in read_parts(ROOT) if each.number == PART)
    for number, reports in enumerate(room, 1):
        exercises = [ExerciseProgress(each.name, *report) for each, report in zip(part.exercises, reports, strict=True)]
        board.add(LearnerProgress(f"{number:032x}", f"Seat {number}", [PartProgress(PART, exercises)]))
    return board


def show_board(browser: Browser, url: str, scheme: str) -> Page:
    page = browser.open(url)
    page.show_as(scheme, 1000, 520)
    page.until(f"document.querySelectorAll('tbody tr').length === {len(ROOM)}", "the learners")
    return page


def show_slides(browser: Browser, scheme: str) -> Page:
    page = browser.open(SLIDES.as_uri())
    page.show_as(scheme, 1280, 720)
    for _ in range(NUM_SLIDE):
        page.press("ArrowRight")
    return page


def main() -> None:
    if not (SITE / "index.html").is_file() or not SLIDES.is_file():
        sys.exit("python -m tools.screenshots: error: no book, or no slides, in build: run make docs slides")
    PICTURES.mkdir(exist_ok=True)
    newest = sorted(path.name for path in ROOT.glob("part[0-9][0-9]_*"))[-1]
    with (
        tempfile.TemporaryDirectory() as profile,
        running_chromium(Path(profile)) as browser,
        server_process(newest, "--no-log-stats") as url,
        running_app(create_app(board_of(ROOM), "http://192.0.2.1:8080")) as board_url,
    ):
        for scheme in SCHEMES:
            pages = {
                "chat": show_chat(browser, url, scheme), "viewer": show_viewer(browser, scheme),
                "book": show_book(browser, scheme, "part04_continuous_batching/index.html"),
                "step_diff": show_book(browser, scheme, "part07_prefix_caching/step.html"),
                "board": show_board(browser, board_url, scheme), "slides": show_slides(browser, scheme),
            }  # fmt: skip
            for name, page in pages.items():
                page.screenshot(PICTURES / f"{name}_{scheme}.png")
                print(f"{PICTURES / f'{name}_{scheme}.png'}", flush=True)


if __name__ == "__main__":
    main()
