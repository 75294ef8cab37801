"""Part 10: what the router remembers of the prompts that it has sent, and how it chooses a replica."""

from __future__ import annotations

from .geometry import Rect
from .metrics import BODY, BOLD, SMALL
from .svg import MARGIN, WIDTH, Drawing

RIGHT = WIDTH - MARGIN
CELL_WIDTH, CELL_HEIGHT, STEP = 92.0, 32.0, 128.0
FIRST = 168.0


def prefix_index() -> Drawing:
    """Chunks of prompts as a tree, and the way of one new prompt through the cache-aware policy."""
    drawing = Drawing(
        "Cache-aware routing",
        "The router's index is a tree of prompt chunks. The chunks A1, A2, A3 of system prompt A and two questions "
        "after it were sent to replica 1, the chunks B1 and B2 of system prompt B and a question to replica 2. A new "
        "prompt with the chunks A1, A2, A3 and a new question matches three of four chunks at replica 1. If the load "
        "is out of balance, the replica with the fewest pending requests gets it; else, since more than half matches, "
        "replica 1; else again the replica with the fewest pending requests.",
    )
    top = drawing.heading("A node stands for a chunk and all text before it, and lists the replicas that got it.")
    rows = [top + 8, top + 74, top + 140]
    drawing.text(MARGIN, rows[0] + 14, "Index", BOLD)
    drawing.text(MARGIN, rows[0] + 32, "64 characters a node", SMALL, "muted")
    a3 = _chain(drawing, rows[0], ("A1", "A2", "A3", "question"), "blue", "replica 1")[2]
    fork = _cell(drawing, 3, rows[1], "question", "blue", "replica 1")
    drawing.arrow([(a3.right - 10, a3.bottom), (a3.right - 10, fork.cy), fork.left_center])
    _chain(drawing, rows[2], ("B1", "B2", "question"), "green", "replica 2")
    request = rows[2] + 88
    drawing.text(MARGIN, request + 14, "New prompt", BOLD)
    for column, label in enumerate(("A1", "A2", "A3", "new")):
        is_new = label == "new"
        _cell(drawing, column, request, label, "grey" if is_new else "blue", "" if is_new else "replica 1", not is_new)
    drawing.text(FIRST + 4 * STEP, request + 16, "3 of 4 chunks at replica 1", BODY)
    _decide(drawing, request + 74)
    return drawing


def _cell(drawing: Drawing, column: int, y: float, label: str, hue: str, note: str, strong: bool = False) -> Rect:
    rect = Rect(FIRST + column * STEP, y, CELL_WIDTH, CELL_HEIGHT)
    drawing.cells(rect.x, rect.y, [label], (rect.width, rect.height), hue, strong=strong, font=BODY, dashed=not note)
    if note:
        drawing.text(rect.cx, rect.bottom + 13, note, SMALL, "muted", "middle")
    return rect


def _chain(drawing: Drawing, y: float, labels: tuple[str, ...], hue: str, note: str) -> list[Rect]:
    cells = [_cell(drawing, column, y, label, hue, note) for column, label in enumerate(labels)]
    for before, after in zip(cells, cells[1:], strict=False):
        drawing.arrow([before.right_center, after.left_center])
    return cells


def _decide(drawing: Drawing, y: float) -> None:
    drawing.text(MARGIN, y + 24, "Choice", BOLD)
    balance = Rect(FIRST, y, 240, 48)
    match = Rect(FIRST + 290, y, 180, 48)
    holder = Rect(RIGHT - 130, y, 130, 48)
    fewest = Rect(FIRST, y + 94, match.right - FIRST, 36)
    drawing.box(balance, "Load out of balance?", ["most − fewest > 32, and > 1.1 ×"], "purple")
    drawing.box(match, "More than half?", ["of the prompt matches"], "purple")
    drawing.box(holder, "replica 1", ["has the prefix"], "orange", strong=True)
    drawing.box(fewest, "the replica with the fewest pending requests; ties: at random", [], "grey")
    drawing.arrow([balance.right_center, match.left_center], "no", "above")
    drawing.arrow([match.right_center, holder.left_center], "yes", "above")
    drawing.arrow([balance.bottom_center, (balance.cx, fewest.y)], "yes", "right")
    drawing.arrow([match.bottom_center, (match.cx, fewest.y)], "no", "right")
    drawing.text(
        MARGIN, fewest.bottom + 28, "Whichever is chosen: the index lists the prompt's chunks for it.", ink="muted"
    )
