"""Parts 3 and 7: block tables, and blocks that are found by a hash of their content."""

from __future__ import annotations

from .geometry import Rect
from .metrics import BODY, BOLD, SMALL
from .svg import CELL_RADIUS, MARGIN, WIDTH, Drawing

RIGHT = WIDTH - MARGIN
BLOCK_SIZE, NUM_BLOCKS = 4, 8
TABLES = {"A": [2, 5, 3], "B": [7, 6]}
NUM_TOKENS = {"A": 10, "B": 8}
HUES = {"A": "blue", "B": "orange"}
SLOT = (44.0, 32.0)
PITCH = 42  # from one block to the next

SHARED, OWN = (1, 2, 3), {"A": 4, "B": 5}  # blocks of part 7's demo
FREE_QUEUES: tuple[
    tuple[str, list[int], list[int], list[int]], ...
] = (  # (when, front, middle, back), the back still cached
    ("A and B run", [], [6, 7, 8, 9, 10], []),
    ("A has ended", [4], [6, 7, 8, 9, 10], []),
    ("B has ended", [5, 4], [6, 7, 8, 9, 10], [3, 2, 1]),
)


def block_table() -> Drawing:
    """Two requests' positions, their block tables, and the pool."""
    drawing = Drawing(
        "From logical to physical: the block table",
        "Left: the positions of two requests in blocks of four. Request A has ten tokens in three blocks, the last "
        "of which is half empty; request B has eight tokens in two full blocks. Middle: their block tables, [2, 5, "
        "3] and [7, 6]. Right: the pool of eight blocks. Block 0 is the null block, blocks 1 and 4 are free. "
        "Position 9 of request A is in block 3 at offset 1, which is slot 13.",
    )
    top = drawing.heading("Blocks of 4 tokens. A request's blocks may be anywhere in the pool.")
    logical_x, table_x, pool_x = 104, 372, 578
    drawing.text(logical_x, top + 8, "Logical blocks: tokens by position", BOLD)
    drawing.text(table_x + 28, top + 8, "Block tables", BOLD, anchor="middle")
    drawing.text(pool_x, top + 8, "Physical blocks: a pool of 32 slots", BOLD)
    pool = _pool(drawing, pool_x, top + 28)
    for name, y in (("A", top + 28 + PITCH), ("B", top + 28 + 5 * PITCH)):
        drawing.text(logical_x, y - 14, f"Request {name}: {NUM_TOKENS[name]} tokens", SMALL, f"{HUES[name]}-ink")
        for index, block_id in enumerate(TABLES[name]):
            row_y = y + index * PITCH
            cells = _block(drawing, logical_x, row_y, name, index)
            drawing.text(logical_x - 12, cells[0].cy, f"block {index}", SMALL, "muted", "end")
            entry = drawing.cells(table_x, row_y, [str(block_id)], (56, SLOT[1]), HUES[name], strong=True, font=BODY)[0]
            drawing.arrow([cells[-1].right_center, entry.left_center])
            drawing.curve(entry.right_center, (pool_x - 56, pool[block_id].cy), HUES[name])
    _outline(drawing, Rect(logical_x + SLOT[0], top + 28 + 3 * PITCH, *SLOT))
    _outline(drawing, Rect(pool_x + SLOT[0], pool[3].y, *SLOT))
    _worked_example(drawing, top + 28 + NUM_BLOCKS * PITCH + 18)
    return drawing


def _block(drawing: Drawing, x: float, y: float, name: str, index: int) -> list[Rect]:
    """The slots of a request's block number `index`; those past its last token are empty."""
    start = index * BLOCK_SIZE
    labels = [f"{name}{position}" for position in range(start, min(start + BLOCK_SIZE, NUM_TOKENS[name]))]
    cells = drawing.cells(x, y, labels, SLOT, HUES[name])
    num_empty = BLOCK_SIZE - len(labels)
    return cells + drawing.cells(x + len(labels) * SLOT[0], y, [""] * num_empty, SLOT, "grey", dashed=True)


def _pool(drawing: Drawing, x: float, y: float) -> list[Rect]:
    owners = {block_id: (name, index) for name, table in TABLES.items() for index, block_id in enumerate(table)}
    blocks = []
    for block_id in range(NUM_BLOCKS):
        rect = Rect(x, y + block_id * PITCH, BLOCK_SIZE * SLOT[0], SLOT[1])
        blocks.append(rect)
        drawing.text(x - 8, rect.cy, f"block {block_id}", SMALL, "muted", "end")
        note = ""
        if block_id in owners:
            name, index = owners[block_id]
            _block(drawing, x, rect.y, name, index)
            note = "2 slots empty" if (index + 1) * BLOCK_SIZE > NUM_TOKENS[name] else ""
        elif block_id == 0:
            drawing.shape(rect, "hatch", CELL_RADIUS)
            note = "null block"
        else:
            drawing.cells(x, rect.y, [""] * BLOCK_SIZE, SLOT, "grey", dashed=True)
            note = "free"
        drawing.text(rect.right + 8, rect.cy, note, SMALL, "muted")
    return blocks


def _outline(drawing: Drawing, rect: Rect) -> None:
    """A thick green edge around a cell."""
    drawing.shape(rect, "green-line mark", CELL_RADIUS, check=False)


def _worked_example(drawing: Drawing, y: float) -> None:
    panel = drawing.panel(Rect(MARGIN, y, RIGHT - MARGIN, 66), "Where is position 9 of request A?", "green")
    parts = ("`table[9 // 4]` = `table[2]` = block 3", "offset `9 % 4` = 1", "slot 3 · 4 + 1 = 13")
    x = panel.x + 14
    for part in parts:
        x = drawing.text(x, panel.y + 44, part).right
        if part is not parts[-1]:
            drawing.arrow([(x + 12, panel.y + 44), (x + 40, panel.y + 44)])
            x += 52


def hash_chain() -> Drawing:
    """Part 7: the demo's two requests, the chain of hashes, and the free queue as they end."""
    drawing = Drawing(
        "Blocks that are found by their content",
        "Top: a chain of hashes. The root holds hash_seed and cache_salt; each full block of 16 tokens is hashed "
        "together with the hash before it. Requests A and B begin with the same 48 tokens, so blocks 1, 2 and 3 "
        "are in both block tables and have ref_count 2. Blocks 4 and 5 are not full and have no hash. Bottom: the "
        "free queue. When A ends, block 4 goes to the front. When B ends, block 5 goes to the front, and the "
        "cached blocks 3, 2 and 1 to the back.",
    )
    top = drawing.heading("Request A has 55 tokens, request B 53. The first 48 are the same: three blocks of 16.")
    _chain(drawing, top + 26)
    _shared_tables(drawing, top + 202)
    _free_queue(drawing, top + 308)
    return drawing


def _chain(drawing: Drawing, y: float) -> None:
    root = drawing.box(Rect(MARGIN, y + 16, 100, 72), "root", ["`hash_seed`,", "`cache_salt`"], "grey")
    before = root
    for block_id in SHARED:
        rect = Rect(before.right + 40, y + 16, 122, 72)
        tokens = f"tokens {16 * block_id - 16}–{16 * block_id - 1}"
        drawing.box(rect, f"block {block_id}", [tokens, "`ref_count` 2"], "green", strong=True)
        drawing.arrow([before.right_center, rect.left_center], "hash")
        before = rect
    for name, block_id, tokens, at in (("A", OWN["A"], "48–54", y - 20), ("B", OWN["B"], "48–52", y + 70)):
        rect = Rect(before.right + 40, at, RIGHT - before.right - 40, 56)
        drawing.box(
            rect, f"block {block_id}, only in {name}", [f"tokens {tokens}, not full: no hash"], HUES[name], dashed=True
        )
        bend = before.right + 20
        drawing.arrow([before.right_center, (bend, before.cy), (bend, rect.cy), rect.left_center])
    drawing.text(
        root.x, y + 112, "`hash_block(parent, token_ids)` = SHA-256 of the hash before and 16 token ids", BODY, "muted"
    )


def _shared_tables(drawing: Drawing, y: float) -> None:
    drawing.text(MARGIN, y - 18, "Block tables", BOLD)
    notes = ("arrived first: all 55 tokens were computed", "48 tokens found in the cache, 5 computed")
    for row, ((name, own), note) in enumerate(zip(OWN.items(), notes, strict=True)):
        row_y = y + row * 40
        drawing.text(MARGIN, row_y + 15, f"Request {name}", BODY, f"{HUES[name]}-ink")
        drawing.cells(120, row_y, [str(block) for block in SHARED], (46, 30), "green", strong=True, font=BODY)
        drawing.cells(120 + 3 * 46, row_y, [str(own)], (46, 30), HUES[name], font=BODY, dashed=True)
        drawing.text(320, row_y + 15, note, BODY, "muted")


def _free_queue(drawing: Drawing, y: float) -> None:
    """The order of FreeBlockQueue in a pool of 11 blocks; a star marks blocks that can still be found."""
    drawing.text(MARGIN, y, "Free queue", BOLD)
    x, size = 200.0, (46.0, 30.0)
    for row, (label, front, middle, back) in enumerate(FREE_QUEUES):
        row_y = y + 24 + row * 44
        drawing.text(MARGIN, row_y + 15, label, BODY)
        start = x + (2 - len(front)) * size[0]
        for index, block in enumerate(front):
            hue = HUES["A" if block == OWN["A"] else "B"]
            drawing.cells(start + index * size[0], row_y, [str(block)], size, hue, dashed=True, font=BODY)
        drawing.cells(x + 2 * size[0], row_y, [str(block) for block in middle], size, "grey", font=BODY)
        drawing.cells(x + 7 * size[0], row_y, [f"{block}*" for block in back], size, "green", strong=True, font=BODY)
    low = y + 24 + 3 * 44 + 8
    drawing.text(x, low, "front: reused next", SMALL, "muted")
    drawing.text(x + 10 * size[0], low, "back: reused last", SMALL, "muted", "end")
    drawing.text(x + 10 * size[0] + 20, low - 46, "* still cached: a request", SMALL, "muted")
    drawing.text(x + 10 * size[0] + 20, low - 30, "may find it and lease it", SMALL, "muted")
    drawing.text(MARGIN, low + 30, "A block whose `ref_count` falls to 0 joins the queue: without a hash at the front, "
                 "with a hash at the back.", BODY, "muted")  # fmt: skip
