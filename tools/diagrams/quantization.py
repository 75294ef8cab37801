"""Part 14: numbers become codes of four bits, and GPTQ lets later columns make up for an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .geometry import Rect
from .metrics import BODY, BOLD, CODE, HEAD, SMALL, SMALL_BOLD
from .svg import CELL_RADIUS, MARGIN, WIDTH, Drawing

RIGHT = WIDTH - MARGIN
GROUP_SIZE, NUM_GROUPS = 128, 2
SCALE_BYTES = 4
MIN_CODE = -8


@dataclass(frozen=True, slots=True)
class Group:
    """A small group of numbers, its scale and how that comes about, and its codes."""

    numbers: tuple[float, ...]
    scale: float
    reason: str
    codes: tuple[int, ...]

    @property
    def stored(self) -> list[int]:
        """The codes as they are in a half of a byte."""
        return [code - MIN_CODE for code in self.codes]

    @property
    def bytes(self) -> list[tuple[int, int]]:
        """Upper and lower half of each byte."""
        half = len(self.codes) // 2
        return [(self.stored[half + i], self.stored[i]) for i in range(half)]


EXAMPLE = (
    Group((0.7, -0.35, 0.1, 0.0), 0.1, "0.7 / 7", (7, -4, 1, 0)),
    Group((0.19, -0.4, 0.06, 0.31), 0.05, "−0.4 / −8", (4, -8, 1, 6)),
)
CELL_WIDTH, CELL_HEIGHT = 76.0, 28.0
EXAMPLE_LEFT, EXAMPLE_GAP = 204.0, 24.0


def written(value: float) -> str:
    """With a minus sign that is as wide as a plus sign."""
    return f"{round(value, 3) + 0.0:g}".replace("-", "−")


def int4_groups() -> Drawing:
    """A row of 256 numbers in memory, and two small groups with all their numbers."""
    drawing = Drawing(
        "4-bit codes, with a scale for each group",
        "Above: a row of a matrix with 256 columns, in two groups of 128. Each group has a scale and 64 bytes. Byte i "
        "of a group has code i in its lower half and code i + 64 in its upper half. Below, an example with two groups "
        "of four. The numbers 0.7, -0.35, 0.1 and 0 have the scale 0.1; divided by it, they are 7, -3.5, 1 and 0, and "
        "rounded 7, -4, 1 and 0. Plus 8, that is 15, 4, 9 and 8. Byte 0 has 15 in its lower half and 9 in its upper "
        "half: 0x9F. Byte 1 has 4 and 8: 0x84. A code stands for code times scale: 0.7, -0.4, 0.1 and 0. The second "
        "group, 0.19, -0.4, 0.06 and 0.31, has the scale 0.05, the codes 4, -8, 1 and 6, and the bytes 0x9C and 0xE0.",
    )
    top = drawing.heading(
        "A number becomes `code = round(number / scale)`, from −8 to 7, and stands for `code · scale`."
    )
    drawing.text(MARGIN, top + 8, "A row of a matrix with 256 columns", HEAD)
    bottom = _whole_row(drawing, top + 30)
    drawing.text(MARGIN, bottom + 34, "All numbers of two smaller groups, of 4 columns each", HEAD)
    bottom = _example(drawing, bottom + 58)
    drawing.legend(
        MARGIN, bottom + 26,
        [("green", "numbers"), ("blue", "scales"), ("orange", "codes of a group's first half"),
         ("orange-strong", "codes of its second half")],
    )  # fmt: skip
    return drawing


def _whole_row(drawing: Drawing, y: float) -> float:
    """Returns its lower edge."""
    left, gap, half = 112.0, 24.0, GROUP_SIZE // 2
    width = (RIGHT - left - gap) / NUM_GROUPS
    memory = y + 84
    drawing.text(MARGIN, y + 41, "Numbers", BOLD)
    drawing.text(MARGIN, memory + 24, "In memory", BOLD)
    for group in range(NUM_GROUPS):
        x, first = left + group * (width + gap), group * GROUP_SIZE
        drawing.text(x + width / 2, y + 10, f"group {group}", SMALL_BOLD, anchor="middle")
        spans = [f"columns {start} to {start + half - 1}" for start in (first, first + half)]
        drawing.cells(x, y + 26, spans, (width / 2, 30), "green")
        drawing.arrow([(x + width / 2, y + 60), (x + width / 2, memory - 4)])
        scale = drawing.box(Rect(x, memory, 66, 48), "", ["scale", f"{SCALE_BYTES} bytes"], "blue")
        byte = scale.right + 10
        nibble = (x + width - byte - 36) / 6
        for number, index in enumerate((0, 1, half - 1)):
            start = byte + number * (2 * nibble + 6) + (24 if index == half - 1 else 0)
            drawing.cells(start, memory, [f"q{index + half}"], (nibble, 28), "orange", strong=True)
            drawing.cells(start + nibble, memory, [f"q{index}"], (nibble, 28), "orange")
            drawing.text(start + nibble, memory + 39, f"byte {index}", SMALL, "muted", "middle")
        drawing.text(byte + 4 * nibble + 21, memory + 14, "…", BODY, anchor="middle")
    group_bytes = half + SCALE_BYTES
    drawing.text(
        left, memory + 68,
        "q0 is the code of a group's first column. Codes and scales are in tensors of their own.", SMALL, "muted",
    )  # fmt: skip
    drawing.text(
        left, memory + 86,
        f"{half} + {SCALE_BYTES} bytes for {GROUP_SIZE} numbers: {8 * group_bytes / GROUP_SIZE:g} bits per number, "
        "instead of 16 in bfloat16.", SMALL, "muted",
    )  # fmt: skip
    return memory + 92


def _example(drawing: Drawing, y: float) -> float:
    """Returns its lower edge."""
    rows = (
        ("Numbers", "", y), ("Scale", "the smallest that fits", y + 42), ("Numbers / scale", "", y + 84),
        ("Codes", "rounded, ties to even", y + 126), ("Stored", "codes + 8", y + 168),
        ("Bytes", "upper half, lower half", y + 238), ("Decoded", "codes · scale", y + 302),
    )  # fmt: skip
    for label, note, at in rows:
        drawing.text(MARGIN, at + (6 if note else 14), label, BOLD)
        if note:
            drawing.text(MARGIN, at + 23, note, SMALL, "muted")
    for index, group in enumerate(EXAMPLE):
        left = EXAMPLE_LEFT + index * (4 * CELL_WIDTH + EXAMPLE_GAP)
        _example_group(drawing, group, left, [at for _, _, at in rows])
    return rows[-1][2] + CELL_HEIGHT


def _example_group(drawing: Drawing, group: Group, left: float, rows: Sequence[float]) -> None:
    numbers, scale, scaled, codes, stored, in_bytes, decoded = rows
    size = CELL_WIDTH, CELL_HEIGHT
    drawing.cells(left, numbers, [written(number) for number in group.numbers], size, "green")
    drawing.cells(left, scale, [f"{group.reason} = {written(group.scale)}"], (4 * CELL_WIDTH, CELL_HEIGHT), "blue")
    drawing.cells(left, scaled, [written(number / group.scale) for number in group.numbers], size, "grey")
    for y, values in ((codes, group.codes), (stored, group.stored)):
        texts = [written(value) for value in values]
        drawing.cells(left, y, texts[:2], size, "orange")
        drawing.cells(left + 2 * CELL_WIDTH, y, texts[2:], size, "orange", strong=True)
    for index, (upper, lower) in enumerate(group.bytes):
        x = left + 2 * index * CELL_WIDTH
        nibble = CELL_WIDTH - 4, CELL_HEIGHT
        drawing.cells(x + 4, in_bytes, [f"{upper:X}"], nibble, "orange", strong=True, font=CODE)
        drawing.cells(x + CELL_WIDTH, in_bytes, [f"{lower:X}"], nibble, "orange", font=CODE)
        drawing.text(x + CELL_WIDTH, in_bytes + 42, f"byte {index}: `0x{upper:X}{lower:X}`", SMALL, anchor="middle")
        for column, target in ((index, x + 1.5 * CELL_WIDTH), (index + 2, x + 0.5 * CELL_WIDTH)):
            start = left + (column + 0.5) * CELL_WIDTH
            drawing.arrow([(start, stored + CELL_HEIGHT), (target, in_bytes)], hue="orange" if column > 1 else "")
    drawing.cells(left, decoded, [written(code * group.scale) for code in group.codes], size, "green")


NUM_COLUMNS, CURRENT = 8, 3
COLUMN_WIDTH, NUM_ROWS, ROW_HEIGHT = 70.0, 3, 22.0


def gptq_step() -> Drawing:
    """One step of GPTQ, and the smallest example in which it beats rounding to nearest."""
    drawing = Drawing(
        "One step of GPTQ",
        "Above: a matrix of eight columns. Columns 0 to 2 are codes already and stay as they are. Column 3 is rounded. "
        "Its error moves columns 4 to 7, which are still numbers, each by a share that row 3 of U gives, where U "
        "transposed times U is the inverse of H, the second moment of the inputs. Below: two columns whose inputs are "
        "always equal, with the weights 0.4 and 0.4 and the scale 1. Rounding to nearest gives 0 and 0: for the inputs "
        "1 and 1, the output is 0 instead of 0.8. GPTQ rounds the first to 0 and adds 0.4 to the second: 0.8 becomes "
        "1, and the output is 1 instead of 0.8.",
    )
    top = drawing.heading(
        "Columns are rounded one after the other, the one with the largest inputs first. Later ones make up for errors."
    )
    bottom = _columns(drawing, top + 4)
    drawing.text(MARGIN, bottom + 36, "An example with two columns", HEAD)
    note = (
        "Both input features always have the same value. Weights: 0.4 and 0.4, scale 1, so codes are the nearest "
        "integers. Inputs 1 and 1: the output should be 0.4 + 0.4 = 0.8."
    )
    bottom = drawing.paragraph(MARGIN, bottom + 60, note, RIGHT - MARGIN, BODY, "muted").bottom
    width = (RIGHT - MARGIN - 24) / 2
    _nearest(drawing, Rect(MARGIN, bottom + 16, width, 176))
    _compensated(drawing, Rect(RIGHT - width, bottom + 16, width, 176))
    return drawing


def _columns(drawing: Drawing, y: float) -> float:
    """Returns the lower edge of the matrix and of what is written below it."""
    left, right = (WIDTH - NUM_COLUMNS * COLUMN_WIDTH) / 2, (WIDTH + NUM_COLUMNS * COLUMN_WIDTH) / 2
    middles = [left + (column + 0.5) * COLUMN_WIDTH for column in range(NUM_COLUMNS)]
    for label, columns in (
        ("codes, which stay", middles[:CURRENT]), ("rounded", middles[CURRENT : CURRENT + 1]),
        ("still numbers: they move", middles[CURRENT + 1 :]),
    ):  # fmt: skip
        drawing.text((columns[0] + columns[-1]) / 2, y + 8, label, SMALL_BOLD, anchor="middle")
    matrix = y + 42
    under, lane = matrix + NUM_ROWS * ROW_HEIGHT, matrix + NUM_ROWS * ROW_HEIGHT + 30
    drawing.text(left - 8, matrix - 10, "order of rounding", SMALL, "muted", "end")
    for column, x in enumerate(middles):
        drawing.text(x, matrix - 10, str(column), SMALL, "muted", "middle")
        for row in range(NUM_ROWS):
            rect = Rect(x - COLUMN_WIDTH / 2 + 3, matrix + row * ROW_HEIGHT, COLUMN_WIDTH - 6, ROW_HEIGHT)
            style = "orange-strong" if column == CURRENT else "green" if column > CURRENT else "orange"
            drawing.shape(rect, style, CELL_RADIUS)
        if column > CURRENT:
            drawing.arrow([(x, lane), (x, under + 2)], hue="orange")
    drawing.line([(middles[CURRENT], under + 2), (middles[CURRENT], lane), (middles[-1], lane)], "orange")
    drawing.text(middles[CURRENT] - 10, lane - 8, "error: number − what its code stands for", SMALL, anchor="end")
    share = f"each by its share, from row {CURRENT} of `U`: `Uᵀ · U = H⁻¹`"
    drawing.text(right, lane + 18, share, SMALL, anchor="end")
    note = "`H`: the mean of `x · xᵀ` over the inputs `x` that a calibration text gives this layer"
    drawing.text(right, lane + 36, note, SMALL, "muted", "end")
    return lane + 44


def _method(drawing: Drawing, area: Rect, title: str, output: str, x: float) -> tuple[float, float]:
    """The panel of a method, and its result at x. Returns the heights of the weights and of the codes."""
    drawing.panel(area, title)
    weights, codes, outputs = area.y + 40, area.y + 94, area.y + 154
    for middle, label in ((weights + 14, "weights"), (codes + 14, "codes"), (outputs, "output")):
        drawing.text(area.x + 14, middle, label, BODY)
    drawing.text(x, outputs, output, BOLD)
    return weights, codes


def _cell(drawing: Drawing, x: float, y: float, label: str, hue: str, strong: bool = False) -> Rect:
    return drawing.cells(x, y, [label], (60, 28), hue, strong=strong, font=BODY)[0]


def _nearest(drawing: Drawing, area: Rect) -> None:
    left = area.x + 124
    weights, codes = _method(drawing, area, "Round to nearest", "0 + 0 = 0 instead of 0.8: error 0.8", left)
    for x in (left, left + 120):
        weight, code = _cell(drawing, x, weights, "0.4", "green"), _cell(drawing, x, codes, "0", "orange")
        drawing.arrow([weight.bottom_center, code.top_center])


def _compensated(drawing: Drawing, area: Rect) -> None:
    left = area.x + 88
    weights, codes = _method(drawing, area, "GPTQ", "0 + 1 = 1 instead of 0.8: error 0.2", left)
    first, first_code = _cell(drawing, left, weights, "0.4", "green"), _cell(drawing, left, codes, "0", "orange")
    second = _cell(drawing, left + 100, weights, "0.4", "green")
    moved = _cell(drawing, left + 232, weights, "0.8", "green", strong=True)
    moved_code = _cell(drawing, moved.x, codes, "1", "orange")
    for start, end in ((first, first_code), (moved, moved_code)):
        drawing.arrow([start.bottom_center, end.top_center])
    drawing.arrow([second.right_center, moved.left_center])
    middle = (second.right + moved.x) / 2
    drawing.line([first_code.right_center, (middle, first_code.cy), (middle, second.cy + 1)], "orange")
    drawing.dot(middle, second.cy)
    drawing.text((first_code.right + middle) / 2, first_code.cy - 11, "error 0.4", SMALL, anchor="middle")
    drawing.text(middle, second.cy - 11, "+ 0.4", SMALL, anchor="middle")
