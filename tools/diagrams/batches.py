"""Parts 4 and 6: the batch's rows over time, the flat batch, and chunks within a token budget."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from .geometry import Rect
from .metrics import BODY, BOLD, CODE, HEAD, SMALL
from .svg import CELL_RADIUS, MARGIN, WIDTH, Drawing

RIGHT = WIDTH - MARGIN
LENGTHS = (2, 2, 2, 20, 2, 2, 2, 20)  # of the answers in part 4's demo
NUM_ROWS = 4
HUES = ("blue", "green", "purple", "orange")


def fill_rows(is_static: bool) -> list[list[int | None]]:
    """Which request is in which row in each step. Static batches wait for their longest answer."""
    waiting, left = deque(range(len(LENGTHS))), list(LENGTHS)
    rows: list[int | None] = [None] * NUM_ROWS
    history = []
    while waiting or any(request is not None for request in rows):
        if not is_static or all(request is None for request in rows):
            for index, request in enumerate(rows):
                if request is None and waiting:
                    rows[index] = waiting.popleft()
        history.append(list(rows))
        for index, request in enumerate(rows):
            if request is not None:
                left[request] -= 1
                rows[index] = request if left[request] else None
    return history


def slots() -> Drawing:
    """Part 4's demo on one time axis."""
    drawing = Drawing(
        "Static and continuous batches",
        "Four rows and eight requests whose answers have 2, 2, 2, 20, 2, 2, 2 and 20 tokens. Static batches take "
        "40 steps: three rows are idle for 18 of each 20 steps, until the longest answer ends. Continuous batches "
        "take 24 steps: requests 4, 5 and 6 join as soon as 0, 1 and 2 have ended, and request 7 follows.",
    )
    top = drawing.heading("Eight requests with answers of 2, 2, 2, 20, 2, 2, 2, 20 tokens. The axis counts steps.")
    _row_chart(drawing, top + 12, "Static: wait for the longest answer", fill_rows(is_static=True))
    _row_chart(drawing, top + 214, "Continuous: rebuild the batch before every step", fill_rows(is_static=False))
    drawing.legend(RIGHT - 150, top + 340, [("hatch", "an idle row in a step")])
    return drawing


def _row_chart(drawing: Drawing, y: float, title: str, history: list[list[int | None]]) -> None:
    left, step, height = 84.0, 18.6, 28
    num_steps = len(history)
    busy = sum(request is not None for rows in history for request in rows)
    drawing.text(MARGIN, y, title, HEAD)
    drawing.text(
        RIGHT,
        y,
        f"{num_steps} steps, {100 * busy / (num_steps * NUM_ROWS):.0f}% of the rows busy",
        BODY,
        anchor="end",
    )
    for row in range(NUM_ROWS):
        row_y = y + 22 + row * (height + 4)
        drawing.text(MARGIN, row_y + height / 2, f"row {row}", BODY, "muted")
        for start, end, request in _runs([rows[row] for rows in history]):
            rect = Rect(left + start * step, row_y, (end - start) * step - 2, height)
            if request is None:
                drawing.shape(rect, "hatch", CELL_RADIUS)
                continue
            drawing.shape(rect, f"{HUES[request % 4]}{'-strong' if request < 4 else ''}", CELL_RADIUS)
            label = str(request) if end - start < 5 else f"request {request}: {end - start} tokens"
            drawing.text(rect.cx, rect.cy, label, BOLD, anchor="middle")
    axis = y + 22 + NUM_ROWS * (height + 4) + 4
    for tick in range(0, num_steps + 1, 4):
        x = left + tick * step
        drawing.line([(x, axis), (x, axis + 5)])
        if tick % 8 == 0:
            drawing.text(x, axis + 15, str(tick), SMALL, "muted", "middle")


def _runs(column: list[int | None]) -> list[tuple[int, int, int | None]]:
    """(start, end, request) for each stretch of steps with the same request."""
    starts = [step for step in range(len(column)) if step == 0 or column[step] != column[step - 1]]
    return [(start, end, column[start]) for start, end in zip(starts, [*starts[1:], len(column)], strict=True)]


@dataclass(frozen=True, slots=True)
class Token:
    """One column of the flat batch."""

    text: str
    token_id: int
    position: int
    slot: int


# Three decodes and one prompt, with blocks of 4. The ids are those of the tokenizer of `tiny`.
DECODES = (Token("cache", 1077, 5, 21), Token("the", 265, 9, 29), Token("keys", 2020, 2, 14))
PROMPT = (
    Token("What", 398, 0, 24), Token("is", 312, 1, 25), Token("a", 261, 2, 26), Token("KV", 735, 3, 27),
    Token("cache", 1077, 4, 32),
)  # fmt: skip
DECODE_TABLES = ([2, 5, 0], [1, 4, 7], [3, 0, 0])
COLUMN, FIRST_COLUMN = 82.0, 172.0


def flat_batch() -> Drawing:
    """Part 4: the tokens of four requests laid end to end, one column each."""
    drawing = Drawing(
        "One flat batch",
        "Eight columns, one per token: requests A, B and C decode one token each, request D brings a prompt of "
        "five. Rows: token, input_ids, positions, slot_mapping; query_start_loc is 0, 1, 2, 3, 8. Linear layers "
        "treat all eight tokens alike. In attention the three decodes read their context through block_tables, and "
        "the prompt attends to itself. logits_indices is 0, 1, 2, 7: a token is sampled after the last token of "
        "each request.",
    )
    top = drawing.heading(
        "Three decodes and a prompt of 5 tokens, laid end to end. A column is a token; blocks hold 4 tokens."
    )
    tokens = (*DECODES, *PROMPT)
    y = top + 4
    for name, start, end in (("A", 0, 1), ("B", 1, 2), ("C", 2, 3), ("D: a new prompt", 3, 8)):
        rect = Rect(_column(start) + 2, y, (end - start) * COLUMN - 4, 28)
        drawing.shape(rect, f"{'blue' if start == 3 else 'orange'}-strong", CELL_RADIUS)
        drawing.text(rect.cx, rect.cy, name, BOLD, anchor="middle")
    _row(drawing, y + 36, "token", [f"{token.text}" for token in tokens], is_code=False)
    _row(drawing, y + 66, "`input_ids`", [str(token.token_id) for token in tokens])
    _row(drawing, y + 96, "`positions`", [str(token.position) for token in tokens])
    _row(drawing, y + 126, "`slot_mapping`", [str(token.slot) for token in tokens])
    _starts(drawing, y + 166)
    _layers(drawing, y + 200)
    _sampling(drawing, y + 398)
    return drawing


def _column(index: int) -> float:
    return FIRST_COLUMN + index * COLUMN


def _row(drawing: Drawing, y: float, label: str, values: list[str], is_code: bool = True) -> None:
    drawing.text(MARGIN, y + 13, label, BODY)
    for index, value in enumerate(values):
        hue = "orange" if index < len(DECODES) else "blue"
        drawing.cells(_column(index) + 2, y, [value], (COLUMN - 4, 26), hue, font=CODE if is_code else SMALL)


def _starts(drawing: Drawing, y: float) -> None:
    """query_start_loc: the borders between the requests."""
    drawing.text(MARGIN, y + 8, "`query_start_loc`", BODY)
    for index in (0, 1, 2, 3, 8):
        x = _column(index)
        drawing.line([(x, y - 10), (x, y - 2)])
        drawing.text(x, y + 8, str(index), CODE, anchor="middle")


def _layers(drawing: Drawing, y: float) -> None:
    wide = Rect(_column(0) + 2, y, 8 * COLUMN - 4, 36)
    drawing.text(MARGIN, wide.cy, "Linear layers", BOLD)
    drawing.box(wide, "", ["one matrix for all 8 tokens: every token is treated alike"], "green")
    top = wide.bottom + 14
    drawing.text(MARGIN, top + 20, "Attention", BOLD)
    decodes = drawing.shape(Rect(_column(0) + 2, top, 3 * COLUMN - 4, 128), "green")
    drawing.text(decodes.cx, top + 18, "3 decodes read the KV cache", BOLD, anchor="middle")
    drawing.text(MARGIN, top + 54, "`block_tables`", BODY)
    drawing.text(MARGIN, top + 104, "`context_lens`", BODY)
    for index, table in enumerate(DECODE_TABLES):
        cells = drawing.cells(
            _column(index) + 11, top + 40, [str(block) for block in table], (20, 28), "grey", font=CODE
        )
        assert len(cells) == 3, "as wide as the longest table"
        drawing.text(_column(index) + COLUMN / 2, top + 104, str(DECODES[index].position + 1), CODE, anchor="middle")
    drawing.text(decodes.cx, top + 80, "0: padding, never read", SMALL, "muted", "middle")
    prompt = drawing.shape(Rect(_column(3) + 2, top, 5 * COLUMN - 4, 128), "green")
    drawing.text(prompt.x + 20, top + 18, "1 prompt attends to itself", BOLD)
    drawing.paragraph(
        prompt.x + 20,
        top + 46,
        "Its keys and values were just computed. Each token sees itself and the tokens before it.",
        200,
        SMALL,
    )
    for row in range(5):
        for column in range(5):
            rect = Rect(prompt.right - 130 + column * 22, top + 9 + row * 22, 22, 22)
            drawing.shape(rect, "blue-strong" if column <= row else "grey", CELL_RADIUS)


def _sampling(drawing: Drawing, y: float) -> None:
    drawing.text(MARGIN, y + 8, "`logits_indices`", BODY)
    drawing.text(MARGIN, y + 54, "Sampler", BOLD)
    for index, name in ((0, "A"), (1, "B"), (2, "C"), (7, "D")):
        x = _column(index) + COLUMN / 2
        drawing.text(x, y + 8, str(index), CODE, anchor="middle")
        drawing.arrow([(x, y + 18), (x, y + 36)])
        drawing.box(Rect(_column(index) + 2, y + 36, COLUMN - 4, 36), "", [f"token of {name}"], "orange", strong=True)
    left, right = _column(3) + 14, _column(7) - 14
    note = "Only the last token of each request needs logits, so four tokens are sampled."
    drawing.paragraph((left + right) / 2, y + 36, note, right - left, SMALL, "muted", "middle")


CHUNK_STEPS = (  # P and Q: (first position, number of tokens)
    ("ABCD", (("P", 0, 12),), "P gets what is left: 12 tokens"),
    ("ABCD", (("P", 12, 12),), "the next 12 of P"),
    ("ABCD", (("P", 24, 6), ("Q", 0, 6)), "P is complete: first token"),
    ("ABCDP", (("Q", 6, 11),), "P decodes, Q continues"),
    ("ABCDP", (("Q", 17, 3),), "Q is complete: first token"),
    ("ABCDPQ", (), "six decodes, 10 tokens spare"),
)
BUDGET = 16


def chunks() -> Drawing:
    """Part 6: what six steps with a budget of 16 tokens compute for four decodes and two prompts."""
    drawing = Drawing(
        "Chunks within a token budget",
        "Six steps with a budget of 16 tokens. Requests A to D decode: one token each, first of all. Prompt P has "
        "30 tokens and gets chunks of 12, 12 and 6; prompt Q has 20 tokens and gets chunks of 6, 11 and 3. A "
        "prompt's first token is sampled in the step that computes its last chunk, and from then on it decodes "
        "with the others.",
    )
    top = drawing.heading(
        "`max_num_batched_tokens` is 16. A to D decode; prompts P (30 tokens) and Q (20 tokens) arrive."
    )
    left, cell, height, pitch = 92.0, 34.0, 34, 48
    for row, (decodes, prompts, note) in enumerate(CHUNK_STEPS):
        y = top + 34 + row * pitch
        drawing.text(MARGIN, y + height / 2, f"step {row + 1}", BODY)
        drawing.cells(left, y, list(decodes), (cell, height), "orange", strong=True, font=BOLD)
        x = left + len(decodes) * cell
        for name, first, num_tokens in prompts:
            hue = "blue" if name == "P" else "green"
            rect = drawing.shape(Rect(x, y, num_tokens * cell, height), f"{hue}-strong", CELL_RADIUS)
            drawing.text(rect.cx, rect.cy, f"{name} {first}–{first + num_tokens - 1}", BOLD, anchor="middle")
            x = rect.right
        num_spare = BUDGET - round((x - left) / cell)
        drawing.cells(x, y, [""] * num_spare, (cell, height), "grey", dashed=True)
        drawing.text(left + BUDGET * cell + 16, y + height / 2, note, SMALL, "muted")
    bottom = top + 34 + len(CHUNK_STEPS) * pitch
    drawing.line([(left + BUDGET * cell, top + 24), (left + BUDGET * cell, bottom - 6)], "purple")
    drawing.text(left + BUDGET * cell, top + 10, "budget", BOLD, "purple-ink", "middle")
    drawing.text(left, top + 14, "1. decodes", SMALL, "orange-ink")
    drawing.text(left + 4 * cell + 8, top + 14, "2. chunks of prompts, in what is left", SMALL, "blue-ink")
    drawing.legend(left, bottom + 14, [
        ("orange-strong", "a decode: 1 token"), ("blue-strong", "chunk of P, by position"),
        ("green-strong", "chunk of Q"), ("grey dashed", "not used"),
    ])  # fmt: skip
    return drawing
