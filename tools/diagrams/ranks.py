"""Part 9: a layer on two ranks, and the bubbles of a pipeline."""

from __future__ import annotations

from .geometry import Rect
from .metrics import BODY, BOLD, HEAD, SMALL
from .svg import MARGIN, WIDTH, Drawing
from .theme import HUES

RIGHT = WIDTH - MARGIN
CELL_RADIUS = 4
LABEL_WIDTH, COLUMN_GAP = 148.0, 36.0
COLUMN_WIDTH = (RIGHT - MARGIN - LABEL_WIDTH - COLUMN_GAP) / 2
LEFTS = (MARGIN + LABEL_WIDTH, MARGIN + LABEL_WIDTH + COLUMN_WIDTH + COLUMN_GAP)
# Each row: what it is, its shape on a rank, its box on each rank, its hue.
ATTENTION = (
    ("column-parallel", "→ [n, 128 + 64 + 64]", ("query heads 0–3, KV heads 0–1", "query heads 4–7, KV heads 2–3"),
     "qkv_proj"),
    ("independent heads", "→ [n, 128]", ("own heads, own KV cache", "own heads, own KV cache"), "attention"),
    ("row-parallel", "→ [n, 256], a part", ("columns 0–127", "columns 128–255"), "o_proj"),
)  # fmt: skip
MLP = (
    ("column-parallel", "→ [n, 384 + 384]", ("rows 0–383 of each", "rows 384–767 of each"), "gate_up_proj"),
    ("element by element", "→ [n, 384]", ("own elements", "own elements"), "silu · up"),
    ("row-parallel", "→ [n, 256], a part", ("columns 0–383", "columns 384–767"), "down_proj"),
)
STEP_WIDTH, LANE = 90.0, 34.0
STEP_HUES = {"A + B": "blue-strong", "A": "green-strong", "B": "purple-strong"}


def tensor_parallel() -> Drawing:
    """One layer of tiny on two ranks: two pairs of layers, and an all-reduce after each."""
    drawing = Drawing(
        "A layer on two ranks",
        "Both ranks begin with the same hidden states, [n, 256]. In attention, qkv_proj is column-parallel: rank 0 "
        "computes query heads 0 to 3 and KV heads 0 and 1, rank 1 the others. Each computes the attention of its "
        "heads. o_proj is row-parallel: each rank multiplies its 128 inputs and gets a part of the sum, [n, 256]. An "
        "all-reduce adds the parts, so both ranks have the same hidden states again. The MLP does the same with "
        "gate_up_proj, silu and down_proj, followed by the second all-reduce.",
    )
    y = drawing.heading(
        "`tiny`, n tokens: each rank has half of every matrix. Two all-reduces add the partial results."
    )
    for left, name in zip(LEFTS, ("rank 0", "rank 1"), strict=True):
        drawing.text(left + COLUMN_WIDTH / 2, y + 6, name, HEAD, anchor="middle")
    y = _same(drawing, y + 26, "hidden states", "[n, 256] after the norm, the same on both ranks", arrows=False)
    for rows in (ATTENTION, MLP):
        for kind, shape, parts, name in rows:
            y = _row(drawing, y, kind, shape, parts, name)
        y = _all_reduce(drawing, y)
    return drawing


def _arrows(drawing: Drawing, y: float, length: float) -> None:
    for left in LEFTS:
        drawing.arrow([(left + COLUMN_WIDTH / 2, y), (left + COLUMN_WIDTH / 2, y + length)])


def _same(drawing: Drawing, y: float, label: str, text: str, arrows: bool = True) -> float:
    drawing.text(MARGIN, y + 17, label, BOLD)
    for left in LEFTS:
        drawing.box(Rect(left, y, COLUMN_WIDTH, 34), "", [text], "blue")
    return y + 34


def _row(drawing: Drawing, y: float, kind: str, shape: str, parts: tuple[str, str], name: str) -> float:
    _arrows(drawing, y, 18)
    y += 18
    drawing.text(MARGIN, y + 13, kind, BOLD)
    drawing.text(MARGIN, y + 31, shape, SMALL, "muted")
    for left, part in zip(LEFTS, parts, strict=True):
        drawing.box(Rect(left, y, COLUMN_WIDTH, 44), f"`{name}`", [part], "green")
    return y + 44


def _all_reduce(drawing: Drawing, y: float) -> float:
    _arrows(drawing, y, 18)
    y += 18
    drawing.text(MARGIN, y + 13, "all-reduce", BOLD)
    drawing.text(MARGIN, y + 31, "n · 1,024 bytes", SMALL, "muted")
    width = LEFTS[1] + COLUMN_WIDTH - LEFTS[0]
    drawing.box(
        Rect(LEFTS[0], y, width, 44),
        "add both parts",
        ["then residual connection and norm: [n, 256], the same on both ranks"],
        "orange",
        strong=True,
    )
    return y + 44


def pipeline() -> Drawing:
    """Two stages: one step at a time, and two steps in flight."""
    drawing = Drawing(
        "Two pipeline stages",
        "Two time axes with a lane per stage. One step at a time: stage 0 computes step 1, then stage 1 computes step "
        "1 while stage 0 is idle, and so on; half of the time each stage is idle. Two steps in flight: while stage 1 "
        "computes step 1 with requests A, stage 0 computes step 2 with requests B, and so on. Both stages are busy, "
        "except at the beginning.",
    )
    y = drawing.heading(
        "A and B are two halves of the requests. In small batches, a step with A alone takes as long as one with both: "
        "it reads the same weights. Idle time is dashed: the pipeline's bubbles."
    )
    y = _stages(
        drawing,
        y + 8,
        "One step at a time",
        [
            ["1: A + B", "", "2: A + B", "", "3: A + B", "", "4: A + B", ""],
            ["", "1: A + B", "", "2: A + B", "", "3: A + B", "", "4: A + B"],
        ],
    )
    _stages(
        drawing,
        y + 22,
        "Two steps in flight",
        [[f"{n}: {'BA'[n % 2]}" for n in range(1, 9)], ["", *(f"{n}: {'BA'[n % 2]}" for n in range(1, 8))]],
    )
    return drawing


def _stages(drawing: Drawing, y: float, title: str, lanes: list[list[str]]) -> float:
    drawing.text(MARGIN, y + 6, title, HEAD)
    drawing.text(RIGHT - 4, y + 6, "time →", SMALL, "muted", "end")
    y += 22
    for number, steps in enumerate(lanes):
        drawing.text(MARGIN, y + LANE / 2, f"stage {number}", BODY)
        for index, step in enumerate(steps):
            rect = Rect(MARGIN + 90 + index * STEP_WIDTH, y, STEP_WIDTH - 4, LANE - 4)
            hue = "grey" if not step else STEP_HUES[step.partition(": ")[2]]
            assert hue.split("-")[0] in HUES
            drawing.shape(rect, hue if step else "ghost", CELL_RADIUS, dashed=not step)
            if step:
                drawing.text(rect.cx, rect.cy, f"step {step}", SMALL, anchor="middle")
        y += LANE
    return y
