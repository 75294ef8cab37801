"""Part 15: a step that is padded to the size of a CUDA graph."""

from __future__ import annotations

from dataclasses import dataclass

from .geometry import Rect
from .metrics import BODY, BOLD, CODE, HEAD, SMALL, SMALL_BOLD
from .svg import CELL_RADIUS, MARGIN, WIDTH, Drawing

RIGHT = WIDTH - MARGIN
BUCKETS = (1, 2, 4, 8, 16)
BLOCK_SIZE, MAX_BLOCKS, NUM_LAYERS = 4, 3, 6


@dataclass(frozen=True, slots=True)
class Row:
    """One token of the step, with what attention needs to know about its sequence."""

    name: str
    input_id: int
    position: int
    slot: int
    block_table: tuple[int, ...]
    context_len: int


# The tokens are "cache", "the", "keys", "is" and "KV", with their ids in `tiny`. Blocks have 4 tokens.
DECODES = (
    Row("A", 1077, 5, 21, (2, 5, 0), 6),
    Row("B", 265, 9, 29, (1, 4, 7), 10),
    Row("C", 2020, 2, 14, (3, 0, 0), 3),
    Row("D", 312, 3, 27, (6, 0, 0), 4),
    Row("E", 735, 4, 36, (8, 9, 0), 5),
)
PADDING = Row("padding", 0, 0, 0, (0, 0, 0), 1)
SIZE = min(size for size in BUCKETS if size >= len(DECODES))
ROWS = (*DECODES, *[PADDING] * (SIZE - len(DECODES)))
COLUMNS = (  # (name, left edge, width)
    ("`input_ids`", 88.0, 68.0), ("`positions`", 162.0, 68.0), ("`slots`", 236.0, 44.0),
    ("`block_tables`", 286.0, 93.0), ("`context_lens`", 385.0, 92.0),
)  # fmt: skip
ROW_HEIGHT, ROW_PITCH = 26.0, 30.0
# The kernels of a layer, in order: those of all layers are one graph.
LAYER = ("norm", "GEMM", "rotary", "attention", "GEMM", "norm", "GEMM", "activation", "GEMM")
KERNEL_HUES = {"GEMM": "grey-strong", "attention": "green-strong"}  # all others: orange


def padded_step() -> Drawing:
    """Five decodes become eight rows, and one call computes them."""
    rows = "; ".join(
        f"{row.name}: token {row.input_id}, position {row.position}, slot {row.slot}, blocks "
        f"{', '.join(str(block) for block in row.block_table)}, context length {row.context_len}"
        for row in (*DECODES, PADDING)
    )
    drawing = Drawing(
        "Five decodes in a graph of size 8",
        f"There are graphs of the sizes 1, 2, 4, 8 and 16. A step of five decodes takes size 8. The static buffers "
        f"have eight rows, of which three are padding. {rows}. query_start_loc counts from 0 to 8. One call replays "
        "the kernels of all layers. Of the eight rows of the result, the first five are used.",
    )
    top = drawing.heading(
        "A graph replays kernels with fixed sizes and addresses: a step is copied into static buffers, and padded."
    )
    bottom = _buckets(drawing, top + 4)
    y = bottom + 54
    _table(drawing, y)
    panel = _graph(drawing, Rect(506, y - 34, 208, SIZE * ROW_PITCH + 34))
    left = COLUMNS[-1][1] + COLUMNS[-1][2]
    drawing.arrow([(left + 4, panel.cy), (panel.x, panel.cy)])
    _result(drawing, panel, y)
    end = y + SIZE * ROW_PITCH + 50
    drawing.legend(MARGIN, end, [
        ("orange", "a decode"), ("grey dashed", "padding, in the null block"), ("blue-strong", "rows that are used"),
    ])  # fmt: skip
    drawing.paragraph(
        MARGIN, end + 28,
        "A padded row writes to slot 0, which is in block 0, the null block that belongs to no request, and attends to "
        "one token there. Its result is dropped.",
        RIGHT - MARGIN, SMALL, "muted",
    )  # fmt: skip
    return drawing


def _buckets(drawing: Drawing, y: float) -> float:
    """Returns their lower edge."""
    drawing.text(MARGIN, y + 15, "Sizes for which there is a graph", HEAD)
    size = 52.0, 30.0
    for index, bucket in enumerate(BUCKETS):
        is_chosen = bucket == SIZE
        x = 286 + index * (size[0] + 8)
        drawing.cells(x, y, [str(bucket)], size, "orange" if is_chosen else "grey", strong=is_chosen, font=BOLD)
    x = 286 + len(BUCKETS) * (size[0] + 8) + 6
    drawing.text(x, y + 15, f"{SIZE} is the smallest with room for {len(DECODES)}.", BODY)
    return y + size[1]


def _table(drawing: Drawing, y: float) -> None:
    """The static buffers, a row for each token. y: of the first row."""
    drawing.text(MARGIN, y - 32, "The step in the buffers", BOLD)
    for name, left, width in COLUMNS:
        drawing.text(left + width / 2, y - 11, name, SMALL, anchor="middle")
    for index, row in enumerate(ROWS):
        top = y + index * ROW_PITCH
        is_padding = row is PADDING
        hue = "grey" if is_padding else "orange"
        drawing.text(MARGIN, top + ROW_HEIGHT / 2, row.name, SMALL if is_padding else BOLD, "muted" * is_padding)
        values = ((row.input_id,), (row.position,), (row.slot,), row.block_table, (row.context_len,))
        for (_, left, width), numbers in zip(COLUMNS, values, strict=True):
            texts, size = [str(number) for number in numbers], (width / len(numbers), ROW_HEIGHT)
            drawing.cells(left, top, texts, size, hue, font=CODE, dashed=is_padding)
    below = y + SIZE * ROW_PITCH + 12
    drawing.text(MARGIN, below, "`query_start_loc`: " + " ".join(str(number) for number in range(SIZE + 1)), SMALL)
    drawing.text(COLUMNS[3][1], below, f"blocks of {BLOCK_SIZE}; 0: the null block", SMALL, "muted")


def _graph(drawing: Drawing, rect: Rect) -> Rect:
    """A panel with a small cell for every kernel."""
    drawing.panel(rect, f"CUDA graph of size {SIZE}")
    left, pitch, cell = rect.x + 62, 15.0, 13.0
    top = rect.y + 42
    for layer in range(NUM_LAYERS):
        y = top + layer * 24
        drawing.text(rect.x + 14, y + cell / 2, f"layer {layer}", SMALL, "muted")
        for index, kernel in enumerate(LAYER):
            style = KERNEL_HUES.get(kernel, "orange-strong")
            drawing.shape(Rect(left + index * pitch, y, cell, cell), style, 2)
    y = top + NUM_LAYERS * 24 + 8
    drawing.text(rect.x + 14, y, "One call replays all kernels.", SMALL_BOLD)
    items = (("grey-strong", "GEMM"), ("green-strong", "attention"), ("orange-strong", "fused small operation"))
    drawing.legend(rect.x + 14, y + 26, items[:2])
    drawing.legend(rect.x + 14, y + 48, items[2:])
    return rect


def _result(drawing: Drawing, panel: Rect, y: float) -> None:
    """The rows of the result, beside those of the table."""
    left, width = panel.right + 34, RIGHT - panel.right - 34
    drawing.text(left, y - 32, "Result", BOLD)
    drawing.text(left, y - 11, f"{SIZE} hidden states", SMALL)
    for index, row in enumerate(ROWS):
        is_padding = row is PADDING
        rect = Rect(left, y + index * ROW_PITCH, width, ROW_HEIGHT)
        drawing.shape(rect, "grey" if is_padding else "blue-strong", CELL_RADIUS, dashed=is_padding)
        drawing.text(rect.cx, rect.cy, "dropped" if is_padding else f"of {row.name}", SMALL, "", "middle")
    drawing.arrow([(panel.right, panel.cy), (left - 4, panel.cy)])
