"""Part 14: where the codes of a layer come from and which product reads them, and attention over keys and values that
are codes."""

from __future__ import annotations

from collections.abc import Sequence

from .geometry import Rect
from .metrics import BODY, BOLD, HEAD, SMALL, SMALL_BOLD
from .svg import CELL_RADIUS, MARGIN, WIDTH, Drawing

RIGHT = WIDTH - MARGIN
SOURCE_WIDTH, PRODUCT_WIDTH = 240.0, 240.0
KERNEL_ROWS, INT8PACK_ROWS, TILE_ROWS = 8, 16, 256  # what products.py chooses by
# Each source: its title, what reads it, its hue.
SOURCES = (
    ("Floating-point checkpoint", ("`--quantization int8`, `int4`, …", "`QuantizeOnLoad` rounds to nearest"), "green"),
    ("compressed-tensors", ("`PackedLayout`: 4 or 8 bits, in words", "`PlainLayout`: int8 or FP8"), "orange"),
    ("GPTQ", ("`GPTQLayout`: 4 or 8 bits, in words,", "version 1: zero points minus 1"), "orange"),
    ("AWQ", ("`AWQLayout`: 4 bits, in words,", "in the order 0 2 4 6 1 3 5 7"), "orange"),
)  # fmt: skip
# Each tensor of a matrix: its name, what it is, its hue, and whether only some matrices have it.
TENSORS = (
    ("codes", ("int8: [rows, bytes of a row]", "4 bits: two codes in a byte"), "orange", False),
    ("scale", ("float32: [rows, num_groups]", "one per group, or one per row"), "blue", False),
    ("zero", ("int8: [rows, num_groups]", "if code 0 doesn't mean 0"), "blue", True),
    ("order", ("int64: [columns]", "if groups have scattered columns"), "grey", True),
)
# Each product: when it is used, and what it does.
PRODUCTS = (
    ("W8A8", ("the tokens become int8, too:", "a product of integers")),
    ("GPU", ("Triton kernel: decodes tiles in registers", "(NF4: decodes the whole matrix)")),
    (
        "CPU, int8 weights, bfloat16 inputs",
        ("with a scale per row,", f"up to {INT8PACK_ROWS} tokens: torch's own kernel"),
    ),
    (f"CPU, up to {KERNEL_ROWS} tokens", ("Numba kernel: decodes each row of the", "matrix once, for all tokens")),
    ("CPU, more tokens", (f"decodes {TILE_ROWS} rows of the matrix at a", "time, then torch's matrix product")),
)


def quantized_linear() -> Drawing:
    """From checkpoint to product: four kinds of checkpoints, one form in memory, five products."""
    drawing = Drawing(
        "A quantized linear layer",
        "Three columns. In the checkpoint: floating-point numbers, which are rounded when they are loaded, or codes in "
        "the layouts of compressed-tensors, GPTQ or AWQ, which are unpacked. In memory, there is one form for all: "
        "codes and scales, for some also zero points and an order of the columns. The product is the first that fits: "
        "for W8A8, the tokens become int8 and integers are multiplied; on a GPU, a Triton kernel decodes tiles in "
        "registers; on a CPU, torch has a kernel for int8 weights and bfloat16 inputs, up to 16 tokens; a Numba "
        "kernel decodes each row of the matrix once, for up to 8 tokens; and for more tokens, 256 rows of the matrix "
        "are decoded at a time, and torch multiplies.",
    )
    top = drawing.heading(
        "All checkpoints become the same tensors. Format, device and number of tokens decide which product is used."
    )
    middle = Rect((WIDTH - 232) / 2, top + 28, 232, 376)
    products = RIGHT - PRODUCT_WIDTH
    for x, label in (
        (MARGIN, "1. In the checkpoint"),
        (middle.x, "2. In memory"),
        (products, "3. The first that fits"),
    ):
        drawing.text(x, top + 8, label, HEAD)
    for (title, lines, hue), area in zip(
        SOURCES, _spread(middle, [len(lines) for _, lines, _ in SOURCES]), strict=True
    ):
        source = Rect(MARGIN, area.y, SOURCE_WIDTH, area.height)
        drawing.box(source, title, lines, hue)
        drawing.arrow([source.right_center, (middle.x, source.cy)])
    _tensors(drawing, middle)
    for (title, lines), area in zip(PRODUCTS, _spread(middle, [len(lines) for _, lines in PRODUCTS]), strict=True):
        product = Rect(products, area.y, PRODUCT_WIDTH, area.height)
        drawing.box(product, title, lines, "green")
        drawing.arrow([(middle.right, product.cy), product.left_center])
    end = drawing.legend(MARGIN, middle.bottom + 26, [("grey dashed", "only some matrices have it")])
    note = "Our `quantize` command writes the layouts of compressed-tensors and GPTQ."
    drawing.text(end + 28, middle.bottom + 26, note, SMALL, "muted")
    return drawing


def _spread(area: Rect, num_lines: Sequence[int]) -> list[Rect]:
    """Boxes with a title and some lines each, one below the other from the top of the area to its bottom."""
    heights = [26 + 17.0 * number for number in num_lines]
    gap, y, rects = (area.height - sum(heights)) / (len(heights) - 1), area.y, list[Rect]()
    for height in heights:
        rects.append(Rect(area.x, y, area.width, height))
        y += height + gap
    return rects


def _tensors(drawing: Drawing, area: Rect) -> None:
    drawing.panel(area)
    drawing.text(area.cx, area.y + 20, "`QuantizedWeight`", BOLD, anchor="middle")
    y = area.y + 42
    for name, lines, hue, is_optional in TENSORS:
        rect = Rect(area.x + 12, y, area.width - 24, 66)
        drawing.box(rect, f"`{name}`", lines, hue, dashed=is_optional)
        y += 82


NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 6, 4, 32  # of tiny
LANE_WIDTHS = (120.0, 120.0, 196.0, 120.0, 104.0)
BYTES_SCALE = 0.1  # pixels per byte


def kv_bytes(bytes_per_number: int) -> int:
    """Of a token in all layers."""
    return NUM_LAYERS * 2 * NUM_KV_HEADS * HEAD_DIM * bytes_per_number


def kv_codes() -> Drawing:
    """How a layer writes codes to the KV pool, and reads them without their scales."""
    drawing = Drawing(
        "Keys and values as int8 codes",
        "A layer divides the keys and values of a new token by their scales, rounds them, and writes the codes to the "
        "KV pool. The query is multiplied by the scale of the keys before the attention kernel, and the kernel's "
        "output with the scale of the values. The kernel itself reads codes only. There is a scale for the keys and "
        "one for the values of each layer and KV head. A token of tiny takes 6,144 bytes in float32 and 1,536 bytes "
        "in int8.",
    )
    top = drawing.heading(
        "The kernel reads codes and needs no scales: the query and the output are multiplied by them instead."
    )
    gap = (RIGHT - MARGIN - sum(LANE_WIDTHS)) / (len(LANE_WIDTHS) - 1)
    lefts = [MARGIN + sum(LANE_WIDTHS[:index]) + index * gap for index in range(len(LANE_WIDTHS))]
    upper = [Rect(x, top + 8, width, 92) for x, width in zip(lefts, LANE_WIDTHS, strict=True)]
    lower = [Rect(x, top + 146, width, 92) for x, width in zip(lefts, LANE_WIDTHS, strict=True)]
    drawing.box(upper[0], "Key and value", ["of a new token", "[4, 32] each"], "green")
    drawing.box(upper[1], "÷ scale", ["rounded", "to −127 … 127"], "blue")
    pool = _pool(drawing, upper[2])
    for start, end in ((upper[0], upper[1]), (upper[1], pool)):
        drawing.arrow([start.right_center, end.left_center])
    drawing.box(lower[0], "Query", ["[8, 32]"], "green")
    drawing.box(lower[1], "× scale", ["of the keys"], "blue", strong=True)
    lines = ["scores: query · codes of keys", "weights: softmax of the scores", "output: weights · codes of values"]
    drawing.box(lower[2], "Attention kernel", lines, "green")
    drawing.box(lower[3], "× scale", ["of the values"], "blue", strong=True)
    drawing.box(lower[4], "Output", ["[8, 32]"], "green")
    for start, end in zip(lower, lower[1:], strict=False):
        drawing.arrow([start.right_center, end.left_center])
    drawing.arrow([pool.bottom_center, lower[2].top_center], "codes", "right")
    _scales(drawing, Rect(lefts[3], upper[3].y, RIGHT - lefts[3], 92))
    bottom = _reason(drawing, lower[0].bottom + 34)
    _bytes(drawing, bottom + 36)
    return drawing


def _pool(drawing: Drawing, rect: Rect) -> Rect:
    drawing.shape(rect, "orange")
    drawing.text(rect.cx, rect.y + 18, "KV pool", BOLD, anchor="middle")
    drawing.text(rect.cx, rect.y + 36, "int8 codes", SMALL, anchor="middle")
    drawing.cells(
        rect.x + 12, rect.y + 52, ["12", "−7", "103", "…"], ((rect.width - 24) / 4, 26), "orange", strong=True
    )
    return rect


def _scales(drawing: Drawing, area: Rect) -> None:
    """Those of a layer, per KV head."""
    drawing.text(area.x, area.y + 8, "Scales of a layer, one per KV head", SMALL_BOLD)
    width = (area.width - 54) / NUM_KV_HEADS
    for row, (label, letter) in enumerate((("keys", "k"), ("values", "v"))):
        y = area.y + 28 + row * 34
        drawing.text(area.x, y + 13, label, SMALL)
        drawing.cells(area.x + 54, y, [f"{letter}{head}" for head in range(NUM_KV_HEADS)], (width, 26), "blue")


def _reason(drawing: Drawing, y: float) -> float:
    """Returns the lower edge of the text."""
    drawing.text(MARGIN, y, "Why this gives the same", HEAD)
    rows = (
        ("scores", "`query · (scale · codes) = (query · scale) · codes`"),
        ("output", "`Σ weights · (scale · codes) = scale · Σ weights · codes`"),
    )
    for index, (label, formula) in enumerate(rows):
        drawing.text(MARGIN, y + 26 + 22 * index, label, BODY)
        drawing.text(MARGIN + 64, y + 26 + 22 * index, formula, BODY)
    note = "All keys of a KV head have the same scale, and so do all its values. Two query heads share a KV head."
    return drawing.text(MARGIN, y + 70, note, SMALL, "muted").bottom


def _bytes(drawing: Drawing, y: float) -> None:
    drawing.text(MARGIN, y, "KV of a token of `tiny`", HEAD)
    bars = []
    for index, (dtype, size, hue) in enumerate((("float32", 4, "green"), ("int8", 1, "orange"))):
        bar = Rect(MARGIN + 64, y + 18 + 36 * index, kv_bytes(size) * BYTES_SCALE, 28)
        bars.append(drawing.shape(bar, hue, CELL_RADIUS))
        drawing.text(MARGIN, bar.cy, dtype, BODY)
        drawing.text(bar.right + 10, bar.cy, f"{kv_bytes(size):,} bytes", BOLD)
    factors = f"{NUM_LAYERS} layers × 2 × {NUM_KV_HEADS} heads × {HEAD_DIM} numbers"
    drawing.text(bars[0].cx, bars[0].cy, f"{factors} × 4 bytes", SMALL, anchor="middle")
    note = f"× 1 byte, and {NUM_LAYERS * 2 * NUM_KV_HEADS} scales for the whole pool"
    drawing.text(bars[1].right + 100, bars[1].cy, note, SMALL, "muted")
