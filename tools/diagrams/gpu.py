"""Part 15: lanes of a warp that combine their numbers, and a context that several blocks share."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, inf, log

from .geometry import Rect
from .metrics import BODY, BOLD, HEAD, SMALL, SMALL_BOLD
from .svg import CELL_RADIUS, MARGIN, WIDTH, Drawing

RIGHT = WIDTH - MARGIN
WARP = 32
LANES: tuple[int, ...] = (3, 7, 9, 1, 5, 2, 8, 4)
LANE_LEFT, LANE_PITCH, LANE_WIDTH, LANE_HEIGHT = 196.0, 60.0, 44.0, 30.0


def shuffles(num_lanes: int) -> list[int]:
    """The bits in which the lanes of each step differ, as in common.cuh::warp_reduce."""
    return [1 << bit for bit in reversed(range(num_lanes.bit_length() - 1))]


def after_shuffle(numbers: tuple[int, ...], bit: int) -> tuple[int, ...]:
    """Each lane keeps the larger one of its own number and of the lane whose index differs in one bit."""
    return tuple(max(number, numbers[lane ^ bit]) for lane, number in enumerate(numbers))


def warp_reduction() -> Drawing:
    """Three shuffles over eight lanes; the largest number is orange, wherever it has arrived."""
    steps = [LANES]
    for bit in shuffles(len(LANES)):
        steps.append(after_shuffle(steps[-1], bit))
    drawing = Drawing(
        "The maximum of a warp, by shuffles",
        f"Eight lanes hold the numbers {_listed(steps[0])}. In the first step, each lane reads the number of the lane "
        f"whose index differs in bit value 4 and keeps the larger one: {_listed(steps[1])}. In the second step it "
        f"differs in 2: {_listed(steps[2])}. In the third step it differs in 1: {_listed(steps[3])}. All lanes have "
        "the maximum of all. A warp has 32 lanes and needs five steps, with lane xor 16, 8, 4, 2, 1.",
    )
    top = drawing.heading(
        "In each step, a lane reads a register of another lane and keeps the larger number. No memory, no barrier."
    )
    _lane_numbers(drawing, top + 10)
    y, pitch = top + 28, 96.0
    known = 1
    for step, numbers in enumerate(steps):
        row = y + step * pitch
        if step:
            bit = shuffles(len(LANES))[step - 1]
            _shuffle(drawing, row - pitch + LANE_HEIGHT, row, bit)
            drawing.text(MARGIN, row - 42, f"step {step}", BOLD)
            drawing.text(MARGIN, row - 24, f"lane xor {bit}", BODY)
            known *= 2
        drawing.text(MARGIN, row + 15, "the maximum so far" if step else "own number", SMALL, "muted")
        for lane, number in enumerate(numbers):
            is_largest = number == max(LANES)
            drawing.cells(
                _lane(lane) - LANE_WIDTH / 2, row, [str(number)], (LANE_WIDTH, LANE_HEIGHT),
                "orange" if is_largest else "green", strong=is_largest, font=BOLD if is_largest else BODY,
            )  # fmt: skip
        drawing.text(_lane(len(LANES)) - 18, row + 15, f"of {known}" if known < len(LANES) else f"of all {known}", BODY)
    bottom = y + (len(steps) - 1) * pitch + LANE_HEIGHT
    drawing.legend(LANE_LEFT, bottom + 28, [("orange-strong", f"where {max(LANES)}, the largest number, has arrived")])
    note = (
        "Grey: a lane's own number. Blue: what it reads. `warp_reduce` in `common.cuh` does this with "
        "`__shfl_xor_sync` for the 32 lanes of a warp: five steps, with lane xor "
        f"{', '.join(str(bit) for bit in shuffles(WARP))}."
    )
    drawing.paragraph(MARGIN, bottom + 60, note, RIGHT - MARGIN, SMALL, "muted")
    return drawing


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(str(number) for number in numbers[:-1]) + f" and {numbers[-1]}"


def _lane(lane: int) -> float:
    return LANE_LEFT + lane * LANE_PITCH + LANE_WIDTH / 2


def _lane_numbers(drawing: Drawing, y: float) -> None:
    drawing.text(MARGIN, y, "lane", SMALL_BOLD)
    for lane in range(len(LANES)):
        drawing.text(_lane(lane), y, str(lane), SMALL, "muted", "middle")
    drawing.text(_lane(len(LANES)) - 18, y, "maximum", SMALL_BOLD)


def _shuffle(drawing: Drawing, top: float, bottom: float, bit: int) -> None:
    """What each lane keeps, and what it reads from its partner."""
    for lane in range(len(LANES)):
        drawing.line([(_lane(lane), top), (_lane(lane), bottom)])
        drawing.arrow([(_lane(lane ^ bit), top), (_lane(lane), bottom)], hue="blue")


MIN_PART_LEN, NUM_PARTS = 128, 4  # as cuda/attention.py chooses
CONTEXT_LEN, MAX_CONTEXT_LEN = 200, 512  # MAX_CONTEXT_LEN: for which the block table has room
PART_LEFT, PART_GAP = 152.0, 16.0


@dataclass(frozen=True, slots=True)
class State:
    """What the block of a part leaves. output is None for an empty part: it is not written."""

    output: float | None
    sum: float  # of exp(score)

    @property
    def log_sum(self) -> float:
        return log(self.sum) if self.sum else -inf


STATES = (State(1.0, 1.0), State(3.0, 3.0), State(None, 0.0), State(None, 0.0))


def part_bounds() -> list[tuple[int, int]]:
    """The keys of each part, as in split_kv.cu."""
    part_len = max(MIN_PART_LEN, -(-CONTEXT_LEN // NUM_PARTS))
    starts = [min(part * part_len, CONTEXT_LEN) for part in range(NUM_PARTS)]
    return [(start, min(start + part_len, CONTEXT_LEN)) for start in starts]


def merged() -> State:
    total = sum(state.sum for state in STATES)
    return State(sum(state.sum / total * state.output for state in STATES if state.output is not None), total)


def weights() -> list[float]:
    return [exp(state.log_sum - merged().log_sum) for state in STATES]


def split_kv() -> Drawing:
    """A context of 200 keys in four parts, of which two are empty."""
    drawing = Drawing(
        "A context that several thread blocks share (split-KV)",
        "Four columns, one for each part of a context of 200 keys, with a thread block each. Part 0 has keys 0 to "
        "127, part 1 keys 128 to 199, parts 2 and 3 are empty. Part 0 leaves the output 1 and the log-sum-exp 0, part "
        "1 the output 3 and the log-sum-exp log 3; an empty part leaves minus infinity, and its output is not "
        "written. The merge weighs each part by exp(its log-sum-exp - log 4): 1/4, 3/4, 0 and 0. The output is 1/4 · "
        "1 + 3/4 · 3 = 2.5, the log-sum-exp log(1 + 3) = log 4 = 1.386.",
    )
    top = drawing.heading(
        "A thread block attends to one part. The number of parts is chosen before the context length is known: this "
        f"block table has room for {MAX_CONTEXT_LEN} keys, so {NUM_PARTS} parts of at least {MIN_PART_LEN}. The "
        f"context has only {CONTEXT_LEN}, so two parts are empty."
    )
    rows = {"keys": top + 10, "block": top + 72, "outputs": top + 146, "weight": top + 222, "merge": top + 298}
    _labels(drawing, rows)
    width = (RIGHT - PART_LEFT - PART_GAP * (NUM_PARTS - 1)) / NUM_PARTS
    for part, ((start, end), state, weight) in enumerate(zip(part_bounds(), STATES, weights(), strict=True)):
        x = PART_LEFT + part * (width + PART_GAP)
        keys = f"keys {start} to {end - 1}" if end > start else "no keys"
        drawing.cells(x, rows["keys"], [keys], (width, 32), "blue", strong=end > start, dashed=end == start)
        drawing.arrow([(x + width / 2, rows["keys"] + 32), (x + width / 2, rows["block"])])
        drawing.box(Rect(x, rows["block"], width, 44), f"Thread block {part}", ["attends to its keys"] if end > start
                    else ["has nothing to do"], "green" if end > start else "grey", dashed=end == start)  # fmt: skip
        drawing.arrow([(x + width / 2, rows["block"] + 44), (x + width / 2, rows["outputs"])])
        _workspace(drawing, Rect(x, rows["outputs"], width, 48), state)
        drawing.arrow([(x + width / 2, rows["outputs"] + 48), (x + width / 2, rows["weight"])])
        style = "orange" if weight else "grey"
        drawing.box(Rect(x, rows["weight"], width, 44), _fraction(weight), [_why(state)], style, dashed=not weight)
        drawing.arrow([(x + width / 2, rows["weight"] + 44), (x + width / 2, rows["merge"])])
    result = merged()
    merge = Rect(PART_LEFT, rows["merge"], RIGHT - PART_LEFT, 66)
    terms = " + ".join(
        f"{_fraction(weight)} · {state.output:g}"
        for weight, state in zip(weights(), STATES, strict=True)
        if state.output is not None
    )
    sums = " + ".join(f"{state.sum:g}" for state in STATES if state.sum)
    drawing.box(
        merge, f"Output {terms} = {result.output:g}",
        [f"log-sum-exp log({sums}) = log {result.sum:g} = {result.log_sum:.3f}",
         "the same as attention over all keys at once"],
        "orange", strong=True,
    )  # fmt: skip
    return drawing


def _labels(drawing: Drawing, rows: dict[str, float]) -> None:
    for row, label, note in (
        ("keys", "Context", ""), ("block", "First kernel", "attention per part"), ("outputs", "Workspace", "in memory"),
        ("weight", "Weights", ""), ("merge", "Second kernel", "merges the parts"),
    ):  # fmt: skip
        drawing.text(MARGIN, rows[row] + 16, label, HEAD)
        if note:
            drawing.text(MARGIN, rows[row] + 36, note, SMALL, "muted")


def _workspace(drawing: Drawing, rect: Rect, state: State) -> None:
    """Two numbers, one below the other: `outputs` and `log_sums`."""
    is_empty = state.output is None
    log_sum = "−∞" if is_empty else _log(state.sum)
    output = "" if is_empty else f"{state.output:g}"
    for index, (name, value) in enumerate((("output", output), ("log-sum-exp", log_sum))):
        cell = Rect(rect.x, rect.y + index * rect.height / 2, rect.width, rect.height / 2)
        is_written = not is_empty or name != "output"
        drawing.shape(cell, "orange" if is_written else "grey", CELL_RADIUS, dashed=not is_written)
        drawing.text(cell.x + 10, cell.cy, name, SMALL, "muted" if not is_written else "")
        drawing.text(
            cell.right - 10, cell.cy, value or "not written", SMALL_BOLD if value else SMALL, "" if value else "muted",
            "end",
        )  # fmt: skip


def _fraction(weight: float) -> str:
    return {0.25: "¼", 0.75: "¾", 0.0: "0"}[round(weight, 6)]


def _why(state: State) -> str:
    if state.output is None:
        return "output is not read"
    return f"exp({_log(state.sum)} − {_log(merged().sum)})"


def _log(number: float) -> str:
    return "0" if number == 1 else f"log {number:g}"
