"""Part 11: the way of four tokens over two ranks, to their experts and back."""

from __future__ import annotations

from .geometry import Rect
from .metrics import BODY, BOLD, SMALL
from .svg import MARGIN, WIDTH, Drawing

CELL, GAP = (46.0, 30.0), 8.0
OWN, SENT, EXPERTS, SUMS = MARGIN + 4, 250.0, 480.0, WIDTH - MARGIN - 100.0  # where the columns begin
ROWS = {0: (("t0", "0, 1"), ("t1", "0, 2"), ("t2", "3, 1")), 1: (("t3", "2, 3"),)}
ARRIVED = {0: ("t0", "t1", "t2"), 1: ("t1", "t2", "t3")}
BY_EXPERT = {0: (("t0", "t1"), ("t0", "t2")), 1: (("t1", "t3"), ("t2", "t3"))}
HUES = {"t0": "blue", "t1": "blue", "t2": "blue", "t3": "green"}


def expert_dispatch() -> Drawing:
    """Gate, dispatch, experts, combine."""
    drawing = Drawing(
        "Expert parallelism",
        "Rank 0 has experts 0 and 1 and the tokens t0, t1 and t2, whose gate chose experts 0 and 1, 0 and 2, 3 and 1. "
        "Rank 1 has experts 2 and 3 and the token t3, with experts 2 and 3. Rank 0 keeps t0, t1 and t2 for its own "
        "experts and sends t1 and t2 to rank 1, each once. On rank 0, expert 0 computes t0 and t1, expert 1 t0 and "
        "t2. On rank 1, expert 2 computes t1 and t3, expert 3 t2 and t3. The weighted sums of each rank travel back, "
        "and the token's own rank adds them.",
    )
    top = drawing.heading(
        "Four tokens, two experts for each. A token is sent to a rank once, however many experts it needs there."
    )
    for x, label, line in (
        (OWN, "The gate chooses", "each token's experts"),
        (SENT, "Dispatch", "all-to-all: counts, then rows"),
        (EXPERTS, "Experts compute", "one product for each"),
        (SUMS, "Combine", "weighted sums"),
    ):
        drawing.text(x, top + 16, label, BOLD)
        drawing.text(x, top + 34, line, SMALL, "muted")
    sent: dict[int, Rect] = {}
    own: dict[int, Rect] = {}
    for rank in (0, 1):
        y = top + 58 + rank * 178
        drawing.panel(Rect(MARGIN - 10, y, WIDTH - 2 * MARGIN + 20, 156), "", "grey", dashed=True)
        drawing.text(340, y + 24, f"Rank {rank}", BOLD)
        first = y + (16 if rank == 0 else 60)
        for number, (token, experts) in enumerate(ROWS[rank]):
            edge = first + number * 44
            drawing.cells(OWN, edge, [token], CELL, HUES[token], strong=True, font=BODY)
            drawing.text(OWN + 56, edge + 20, f"experts {experts}")
        own[rank] = Rect(OWN, first, 130, 30 + 44 * (len(ROWS[rank]) - 1))
        for number, token in enumerate(ARRIVED[rank]):
            is_own = any(token == each for each, _ in ROWS[rank])
            drawing.cells(
                SENT + number * (CELL[0] + GAP),
                y + 60,
                [token],
                CELL,
                HUES[token],
                strong=is_own,
                font=BODY,
                dashed=not is_own,
            )
        sent[rank] = Rect(SENT, y + 60, 3 * CELL[0] + 2 * GAP, CELL[1])
        for number, tokens in enumerate(BY_EXPERT[rank]):
            edge = y + 26 + number * 62
            drawing.box(Rect(EXPERTS, edge, 88, 44), f"expert {2 * rank + number}", [], "orange", strong=True)
            drawing.text(EXPERTS + 98, edge + 27, ", ".join(tokens))
            drawing.arrow([(sent[rank].right, sent[rank].cy), (EXPERTS, edge + 22)])
        sums = ["t0: E0 + E1", "t1: E0 + E2", "t2: E1 + E3"] if rank == 0 else ["t3: E2 + E3"]
        for number, text in enumerate(sums):
            drawing.text(SUMS, y + (50 if rank == 0 else 80) + number * 30, text)
        drawing.arrow([(EXPERTS + 150, y + 76), (SUMS - 14, y + 76)])
    for rank in (0, 1):
        drawing.arrow([(own[rank].right + 30, own[rank].cy), sent[rank].left_center])
    drawing.arrow([(own[0].right + 30, own[0].bottom), (sent[1].x + 20, sent[1].y)], "t1, t2", "right")
    drawing.arrow([(EXPERTS + 150, sent[1].y), (SUMS - 14, sent[0].bottom + 30)])
    drawing.text(EXPERTS + 178, sent[1].y - 12, "sums of t1, t2", SMALL, "muted")
    return drawing
