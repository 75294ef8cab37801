"""What is wrong with a drawing, by the script's own measure: text that sticks out, overlaps or is crossed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from .geometry import Rect
from .metrics import MIN_FONT_SIZE
from .svg import WIDTH, Drawing

PAGE_MARGIN = 8
LINE_CLEARANCE = 1.5  # how close an arrow may come to the inside of a text


def problems(drawing: Drawing) -> list[str]:
    """One sentence each, empty for a good drawing."""
    found = [f"it is {drawing.width} wide: expected at most {WIDTH}"] if drawing.width > WIDTH else []
    return [*found, *_bad_texts(drawing), *_overlapping_texts(drawing), *_crossed_texts(drawing), *_bad_boxes(drawing)]


def _bad_texts(drawing: Drawing) -> Iterator[str]:
    page = drawing.page.inset(PAGE_MARGIN)
    for placed in drawing.texts:
        if placed.font.size < MIN_FONT_SIZE:
            yield f"{placed.text!r} has font size {placed.font.size}: expected at least {MIN_FONT_SIZE}"
        if not page.contains(placed.rect):
            yield f"{placed.text!r} is outside of the page, or closer than {PAGE_MARGIN} to its edge"
        for box in [] if placed.on_badge else drawing.boxes:
            if box.overlaps(placed.rect) and not box.inset(1).contains(placed.rect):
                yield f"{placed.text!r} sticks out of the box at {box.x:g}, {box.y:g} ({_excess(box, placed.rect)})"


def _excess(box: Rect, text: Rect) -> str:
    return f"box {box.width:g} × {box.height:g}, text {text.width:.0f} × {text.height:.0f}"


def _overlapping_texts(drawing: Drawing) -> Iterator[str]:
    for one, other in combinations(drawing.texts, 2):
        if one.rect.overlaps(other.rect):
            yield f"{one.text!r} and {other.text!r} overlap"


def _crossed_texts(drawing: Drawing) -> Iterator[str]:
    for placed in drawing.texts:
        if any(placed.rect.inset(LINE_CLEARANCE).is_crossed_by(segment) for segment in drawing.segments):
            yield f"a line crosses {placed.text!r}"


def _bad_boxes(drawing: Drawing) -> Iterator[str]:
    page = drawing.page.inset(PAGE_MARGIN)
    for box in drawing.boxes:
        if not page.contains(box):
            yield f"the box at {box.x:g}, {box.y:g} is outside of the page"
    for one, other in combinations(drawing.boxes, 2):
        if one.overlaps(other) and not one.contains(other) and not other.contains(one):
            yield f"the boxes at {one.x:g}, {one.y:g} and {other.x:g}, {other.y:g} overlap"
