"""Part 15: what the small operations of a decoder layer read and write, before and after they are fused."""

from __future__ import annotations

from dataclasses import dataclass

from .geometry import Rect
from .metrics import BODY, BOLD, HEAD, SMALL, SMALL_BOLD
from .svg import CELL_RADIUS, MARGIN, WIDTH, Drawing

RIGHT = WIDTH - MARGIN
ROW, GAP = 26.0, 4.0
COLUMN_WIDTH, NAME_WIDTH = 394.0, 164.0
SQUARE, PITCH = 10.0, 12.0
READS, WRITES = 34.0, 124.0  # where the squares begin, from the right edge of a box
BAR_SCALE = 6.0  # pixels per hidden state


@dataclass(frozen=True, slots=True)
class Operation:
    """reads, writes: activations, in hidden states, without weights and without the context of attention."""

    name: str
    launches: int
    reads: float
    writes: float


@dataclass(frozen=True, slots=True)
class Stage:
    """The operations that become one. before is empty for what stays as it is."""

    after: Operation
    before: tuple[Operation, ...] = ()

    @property
    def rows(self) -> tuple[Operation, ...]:
        return self.before or (self.after,)


# Sizes of `tiny`: queries are as large as a hidden state, keys and values half of it, the MLP's inner state 3 times.
ADD_NORM = Operation("`add_rms_norm`", 1, 2, 2)
ADD, NORM = Operation("add", 1, 2, 1), Operation("norm", 1, 1, 1)
STAGES = (
    Stage(ADD_NORM, (ADD, NORM)),
    Stage(Operation("GEMM: `qkv_proj`", 1, 1, 2)),
    Stage(
        Operation("`rotate_and_store`", 1, 2, 2),
        (
            Operation("rotate queries", 7, 5, 4), Operation("rotate keys", 7, 2.5, 2),
            Operation("stack keys and values", 1, 1, 1), Operation("store in the KV cache", 1, 1, 1),
        ),
    ),
    Stage(Operation("attention", 1, 1, 1)),
    Stage(Operation("GEMM: `o_proj`", 1, 1, 1)),
    Stage(ADD_NORM, (ADD, NORM)),
    Stage(Operation("GEMM: `gate_up_proj`", 1, 1, 6)),
    Stage(
        Operation("`silu_and_mul`", 1, 6, 3),
        (Operation("silu of the gates", 1, 3, 3), Operation("multiply", 1, 6, 3)),
    ),
    Stage(Operation("GEMM: `down_proj`", 1, 3, 1)),
)  # fmt: skip
BEFORE = tuple(operation for stage in STAGES for operation in stage.before)
AFTER = tuple(stage.after for stage in STAGES if stage.before)


def total(operations: tuple[Operation, ...]) -> Operation:
    return Operation(
        "total",
        sum(operation.launches for operation in operations),
        sum(operation.reads for operation in operations),
        sum(operation.writes for operation in operations),
    )


def fused_operations() -> Drawing:
    """The same layer twice: part 14's operations, and part 15's beside those that they replace."""
    before, after = total(BEFORE), total(AFTER)
    drawing = Drawing(
        "The small operations of a decoder layer, fused",
        f"Two columns of boxes, from top to bottom. Left, part 14: {_spoken(BEFORE)}; between them are four matrix "
        f"multiplications (GEMMs) and attention. Right, part 15: {_spoken(AFTER)}; the GEMMs and attention are the "
        f"same. The unit is one hidden state. In total, the small operations of part 14 are {before.launches} launches "
        f"that read {before.reads:g} and write {before.writes:g}; those of part 15 are {after.launches} launches that "
        f"read {after.reads:g} and write {after.writes:g}.",
    )
    top = drawing.heading(
        "Fewer passes over memory, and fewer launches: a fused operation keeps in registers what the others write to "
        "memory and read again. A square is one hidden state. Sizes are those of `tiny`."
    )
    right = RIGHT - COLUMN_WIDTH
    for x, title in ((MARGIN, "Part 14: one operation at a time"), (right, "Part 15: fused")):
        drawing.text(x, top + 8, title, HEAD)
        for offset, label in ((NAME_WIDTH + READS, "reads"), (NAME_WIDTH + WRITES, "writes")):
            drawing.text(x + offset, top + 34, label, SMALL_BOLD)
        drawing.text(x + COLUMN_WIDTH, top + 34, "launches", SMALL_BOLD, anchor="end")
    y = top + 48
    for stage in STAGES:
        height = len(stage.rows) * (ROW + GAP) - GAP
        for index, operation in enumerate(stage.rows):
            row = Rect(MARGIN, y + index * (ROW + GAP), NAME_WIDTH, ROW)
            _operation(drawing, row, operation, "green" if stage.before else "grey")
        style = "orange-strong" if stage.before else "grey"
        _operation(drawing, Rect(right, y, NAME_WIDTH, height), stage.after, style)
        y += height + GAP
    bottom = _totals(drawing, y + 22, right)
    end = drawing.legend(MARGIN, bottom + 28, [
        ("green", "small operation"), ("orange-strong", "fused"), ("grey", "unchanged, not in the sums"),
        ("blue-strong", "read"), ("purple-strong", "written"),
    ])  # fmt: skip
    assert end < RIGHT, "the legend fits"
    note = (
        "Launches are those on a GPU. Not counted: weights, the context that attention reads, and the table of cosines "
        "and sines. A GEMM is a matrix multiplication. Each “rotate” is 4 multiplications, a difference, a sum and a "
        "concatenation. Splitting queries, "
        "keys and values moves nothing: they are views of one tensor. The first add belongs to the layer before."
    )
    drawing.paragraph(MARGIN, bottom + 56, note, RIGHT - MARGIN, SMALL, "muted")
    return drawing


def _spoken(operations: tuple[Operation, ...]) -> str:
    return ", ".join(
        f"{operation.name.strip('`')} reads {operation.reads:g} and writes {operation.writes:g}"
        for operation in operations
    )


def _operation(drawing: Drawing, rect: Rect, operation: Operation, style: str) -> None:
    drawing.shape(rect, style)
    drawing.text(rect.x + 10, rect.cy, operation.name, BODY)
    is_counted = style != "grey"
    for offset, number, hue in ((READS, operation.reads, "blue"), (WRITES, operation.writes, "purple")):
        drawing.text(rect.right + offset - 6, rect.cy, f"{number:g}", SMALL, "" if is_counted else "muted", "end")
        _squares(drawing, rect.right + offset, rect.cy, number, f"{hue}-strong" if is_counted else "grey")
    drawing.text(rect.x + COLUMN_WIDTH, rect.cy, str(operation.launches), BOLD if is_counted else BODY, anchor="end")


def _squares(drawing: Drawing, x: float, y: float, number: float, style: str) -> None:
    """As many squares as hidden states; the last one may be a half."""
    for index in range(int(number)):
        drawing.shape(Rect(x + index * PITCH, y - SQUARE / 2, SQUARE, SQUARE), style, 2)
    if number % 1:
        drawing.shape(Rect(x + int(number) * PITCH, y - SQUARE / 2, SQUARE * (number % 1), SQUARE), style, 2)


def _totals(drawing: Drawing, y: float, right: float) -> float:
    """The sums over the small operations, as bars of one scale. Returns the lower edge."""
    for x, operations in ((MARGIN, BEFORE), (right, AFTER)):
        sums = total(operations)
        reads, writes = sums.reads, sums.writes
        states = f"{reads:g} + {writes:g} = {reads + writes:g} hidden states"
        drawing.text(x, y, f"Small operations: {sums.launches} launches, {states}", BOLD)
        left = drawing.shape(Rect(x, y + 16, reads * BAR_SCALE, 24), "blue-strong", CELL_RADIUS)
        drawing.shape(Rect(left.right, y + 16, writes * BAR_SCALE, 24), "purple-strong", CELL_RADIUS)
        drawing.text(left.cx, left.cy, f"{reads:g}", SMALL_BOLD, anchor="middle")
        drawing.text(left.right + writes * BAR_SCALE / 2, left.cy, f"{writes:g}", SMALL_BOLD, anchor="middle")
    return y + 40
