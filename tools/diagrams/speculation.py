"""Part 8: draft tokens are proposed, verified in one forward pass, and accepted or rejected."""

from __future__ import annotations

from .geometry import Rect
from .metrics import BODY, BOLD, SMALL
from .svg import MARGIN, WIDTH, Drawing

RIGHT = WIDTH - MARGIN
KNOWN = "fixed"
DRAFTS = ("-size", "blocks", "of", "memory")
SAMPLED = ("-size", "blocks", "scattered", "not used", "not used")  # by the target, in the row of each input token
NUM_ACCEPTED = 2
COLUMN, FIRST_COLUMN, CELL_WIDTH = 128.0, 176.0, 112.0


def draft_verify() -> Drawing:
    """Four draft tokens, of which two are accepted: three tokens from one step."""
    drawing = Drawing(
        "Draft, verify, accept",
        "A proposer proposes four draft tokens after the known token fixed: -size, blocks, of, memory. One forward "
        "pass of the target model computes all five tokens and samples a token from each of the five rows of "
        "logits: -size, blocks, scattered, and two that are not used. The first two draft tokens are what the rows "
        "before them sampled and are accepted. The draft token of is not: it is rejected and replaced by "
        "scattered, and memory is dropped. The step yields three tokens: -size, blocks, scattered.",
    )
    top = drawing.heading(
        "A draft token is accepted if it is the token that the target model samples in the row before it."
    )
    y = [top + offset for offset in (6, 112, 202, 296, 382)]
    _labels(drawing, y)
    _cell(drawing, 0, y[0], KNOWN, "blue", note="newest known token")
    for index, token in enumerate(DRAFTS, start=1):
        _cell(drawing, index, y[0], token, "grey", note=f"draft token {index}", dashed=True)
    target = Rect(FIRST_COLUMN, y[1], 4 * COLUMN + CELL_WIDTH, 40)
    drawing.box(target, "one forward pass of the target model: 5 tokens", hue="green")
    for index, token in enumerate(SAMPLED):
        drawing.arrow([(_middle(index), y[0] + 56), (_middle(index), y[1])])
        drawing.arrow([(_middle(index), target.bottom), (_middle(index), y[2])], f"row {index}", "right")
        is_used = index <= NUM_ACCEPTED
        _cell(drawing, index, y[2], token, "orange" if is_used else "grey", strong=is_used, dashed=not is_used)
    _verdicts(drawing, y[2] + 34, y[3])
    _result(drawing, y[4])
    return drawing


def _middle(column: int) -> float:
    return FIRST_COLUMN + column * COLUMN + CELL_WIDTH / 2


def _labels(drawing: Drawing, y: list[float]) -> None:
    for at, title, line in (
        (y[0], "Propose", "by the proposer"),
        (y[1], "Verify", "all at once"),
        (y[2], "Sampled", "one per row of logits"),
        (y[3], "Compare", "with the row before"),
        (y[4], "Result", "3 tokens in one step"),
    ):
        drawing.text(MARGIN, at + 10, title, BOLD)
        drawing.text(MARGIN, at + 28, line, SMALL, "muted")


def _cell(
    drawing: Drawing,
    column: int,
    y: float,
    token: str,
    hue: str,
    *,
    note: str = "",
    strong: bool = False,
    dashed: bool = False,
) -> None:
    rect = Rect(FIRST_COLUMN + column * COLUMN, y, CELL_WIDTH, 34)
    drawing.cells(rect.x, rect.y, [token], (rect.width, rect.height), hue, strong=strong, font=BODY, dashed=dashed)
    if note:
        drawing.text(rect.cx, rect.bottom + 13, note, SMALL, "muted", "middle")


def _verdicts(drawing: Drawing, sampled_bottom: float, y: float) -> None:
    """Each draft token beside what the row before it sampled."""
    verdicts = ("accepted", "accepted", "rejected", "dropped")
    for index, (token, verdict) in enumerate(zip(DRAFTS, verdicts, strict=True), start=1):
        drawing.arrow([(_middle(index - 1), sampled_bottom), (_middle(index - 1), sampled_bottom + 24),
                       (_middle(index) - 26, sampled_bottom + 24), (_middle(index) - 26, y)])  # fmt: skip
        is_accepted = index <= NUM_ACCEPTED
        hue = "green" if is_accepted else "grey"
        _cell(drawing, index, y, token, hue, note=verdict, strong=is_accepted, dashed=not is_accepted)
        if verdict != "dropped":
            drawing.mark(_middle(index) + 38, y + 17, is_accepted)


def _result(drawing: Drawing, y: float) -> None:
    for index, token in enumerate(SAMPLED[: NUM_ACCEPTED + 1], start=1):
        is_extra = index > NUM_ACCEPTED
        note = "the target's own token" if is_extra else ""
        _cell(drawing, index, y, token, "orange" if is_extra else "green", note=note, strong=True)
    x = FIRST_COLUMN + 4 * COLUMN
    drawing.text(x, y + 10, "2 accepted + 1 extra", BOLD)
    drawing.text(x, y + 28, "1 to 5 in each step", SMALL, "muted")
    drawing.text(MARGIN, y + 80, "The rejected positions don't count as computed: "
                 "the next step overwrites their keys and values.", ink="muted")  # fmt: skip
