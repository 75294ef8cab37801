"""core/scheduler.py: one budget of tokens a step, decodes first, prompts in chunks. No model: tokens are counted."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from common.errors import FieldError
from part06_chunked_prefill.config import EngineConfig
from part06_chunked_prefill.core.block_manager import BlockManager
from part06_chunked_prefill.core.engine import token_budget
from part06_chunked_prefill.core.request import Request, RequestStatus
from part06_chunked_prefill.core.scheduler import Scheduler, SchedulerOutput
from tests.part06.scripted import scripted_engine, watch
from tests.scripted import END, ids, params_for

LOOK_SIZE = 'Look at core/scheduler.py::Scheduler._chunk_size; README "Decodes first".'
LOOK_RUNNING = 'Look at core/scheduler.py::Scheduler._schedule_running; README "Decodes first".'
LOOK_WAITING = 'Look at core/scheduler.py::Scheduler._schedule_waiting; README "Decodes first".'
LOOK_ADMIT = 'Look at core/scheduler.py::Scheduler._admit; README "Decodes first".'
LOOK_ADD = 'Look at core/scheduler.py::SchedulerOutput.add; README "A chunk is not an answer".'
LOOK_SAMPLED = 'Look at core/scheduler.py::SchedulerOutput.sampled_requests; README "A chunk is not an answer".'
LOOK_LENGTH = 'Look at core/scheduler.py::Scheduler._schedule_running; README of part 5, "What the future may assume".'
LOOK_PREEMPT = 'Look at core/scheduler.py::Scheduler.preempt; README of part 5, "What the future may assume".'
LOOK_LATE = 'Look at core/scheduler.py::Scheduler.finish, abort and _release; README of part 5, "A token too late".'
LOOK_BUDGET = 'Look at core/engine.py::token_budget; README "Decodes first".'
WORD = 9  # any token but END
Step = dict[str, tuple[int, int]]  # request → tokens computed before, tokens in this step


def make_scheduler(
    budget: int = 4_096, num_usable: int = 1_000, block_size: int = 16, max_num_seqs: int | None = None, **flags: Any
) -> Scheduler:
    """num_usable: blocks to hand out, without the null block."""
    max_num_seqs = min(8, budget) if max_num_seqs is None else max_num_seqs
    scheduler = Scheduler(BlockManager(num_usable + 1, block_size), max_num_seqs, budget, **{"watermark": 0.0, **flags})
    watch(scheduler)
    return scheduler


def make_request(name: str, num_prompt_tokens: int, max_tokens: int = 100, num_output_tokens: int = 0) -> Request:
    request = Request(name, [7] * num_prompt_tokens, params_for(max_tokens), num_prompt_tokens + max_tokens)
    request.output_token_ids += [WORD] * num_output_tokens
    return request


def add(scheduler: Scheduler, lengths: Sequence[int], max_tokens: int = 100, first: int = 0) -> list[Request]:
    """Queue requests "0", "1", … with prompts of these lengths."""
    requests = [make_request(str(number), length, max_tokens) for number, length in enumerate(lengths, first)]
    for request in requests:
        scheduler.add_request(request)
    return requests


def land(scheduler: Scheduler, output: SchedulerOutput, token_ids: Sequence[int] | None = None) -> None:
    """What the engine does when a step's tokens are there."""
    requests = [request for request, n in zip(output.requests, output.num_sampled_tokens, strict=True) if n]
    for request, token_id in zip(requests, token_ids or [WORD] * len(requests), strict=True):
        request.num_output_placeholders -= 1
        if request.status.is_finished:
            continue
        request.output_token_ids.append(token_id)
        if token_id == END or request.num_tokens >= request.max_num_tokens:
            request.finish("stop" if token_id == END else "length", None)
            scheduler.finish(request)


def take_step(scheduler: Scheduler) -> SchedulerOutput:
    """One that nobody is ahead of."""
    output = scheduler.schedule()
    land(scheduler, output)
    return output


def check_output(output: SchedulerOutput, expected: Step, sampled: str, case: str, look: str) -> None:
    """expected: who is scheduled, in order; sampled: for whom a token comes of it."""
    counts = zip(output.num_computed_tokens, output.num_scheduled_tokens, strict=True)
    got = list(zip(ids(output.requests), counts, strict=True))
    assert got == list(expected.items()), (
        f"{case}: expected request → (num_computed_tokens, num_scheduled_tokens) {list(expected.items())}, got {got} "
        f"(preempted: {ids(output.preempted) or 'nobody'}). {look}"
    )
    num_sampled = dict(zip(ids(output.requests), output.num_sampled_tokens, strict=True))
    wanted = {name: int(name in sampled) for name in expected}
    assert num_sampled == wanted, f"{case}: expected num_sampled_tokens {wanted}, got {num_sampled}. {LOOK_ADD}"
    assert "".join(ids(output.sampled_requests)) == sampled, (
        f"{case}: expected sampled_requests {sampled!r}, got {ids(output.sampled_requests)}. {LOOK_SAMPLED}"
    )
    total = sum(now for _, now in expected.values())
    assert output.total_num_scheduled_tokens == total, (
        f"{case}: {output.total_num_scheduled_tokens} tokens, not {total}"
    )


def check_queues(scheduler: Scheduler, running: str, waiting: str, case: str, look: str) -> None:
    got = ("".join(ids(scheduler.running)), "".join(ids(list(scheduler.waiting))))
    assert got == (running, waiting), f"{case}: expected (running, waiting) {(running, waiting)}, got {got}. {look}"


def check_blocks(scheduler: Scheduler, expected: dict[str, int], case: str, look: str) -> None:
    """expected: who holds how many blocks."""
    blocks = scheduler.blocks
    got = {request_id: len(table) for request_id, table in blocks.block_tables.items() if table}
    assert got == expected, f"{case}: expected request → blocks {expected}, got {got}. {look}"
    owned = [*blocks.free_blocks, *(block for table in blocks.block_tables.values() for block in table)]
    assert sorted(owned) == list(range(1, blocks.num_blocks)), (
        f"{case}: every block is free or has one owner, got {sorted(owned)}: one was freed twice, or lost. {look}"
    )


def check_counts(request: Request, expected: tuple[int, int, int], case: str, look: str) -> None:
    """expected: num_computed_tokens, num_output_placeholders, num_missing_tokens."""
    got = (request.num_computed_tokens, request.num_output_placeholders, request.num_missing_tokens)
    assert got == expected, (
        f"{case}, request {request.request_id}: expected (num_computed_tokens, num_output_placeholders, "
        f"num_missing_tokens) {expected}, got {got}. {look}"
    )


# Three prompts of 800 tokens

THREE: dict[str, tuple[dict[str, Any], list[tuple[Step, str]]]] = {
    "a threshold of 400": (
        dict(long_prefill_token_threshold=400),
        [
            ({"0": (0, 400), "1": (0, 400), "2": (0, 224)}, ""),
            ({"0": (400, 400), "1": (400, 400), "2": (224, 224)}, "01"),
            ({"0": (800, 1), "1": (800, 1), "2": (448, 352)}, "012"),
            ({"0": (801, 1), "1": (801, 1), "2": (800, 1)}, "012"),
        ],
    ),
    "no threshold": (
        {},
        [
            ({"0": (0, 800), "1": (0, 224)}, "0"),
            ({"0": (800, 1), "1": (224, 576), "2": (0, 447)}, "01"),
            ({"0": (801, 1), "1": (800, 1), "2": (447, 353)}, "012"),
            ({"0": (802, 1), "1": (801, 1), "2": (800, 1)}, "012"),
        ],
    ),
    "not chunked": (
        dict(enable_chunked_prefill=False, long_prefill_token_threshold=400),
        [
            ({"0": (0, 800)}, "0"),
            ({"0": (800, 1), "1": (0, 800)}, "01"),
            ({"0": (801, 1), "1": (800, 1), "2": (0, 800)}, "012"),
        ],
    ),
}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", THREE)
def test_three_prompts_of_800_with_a_budget_of_1024(name: str, depth: int) -> None:
    """depth: steps in flight; what a step holds depends on numbers that are known before it has run."""
    flags, steps = THREE[name]
    scheduler, in_flight = make_scheduler(1_024, **flags), list[SchedulerOutput]()
    add(scheduler, [800, 800, 800])
    for number, (expected, sampled) in enumerate(steps, 1):
        in_flight.append(scheduler.schedule())
        check_output(in_flight[-1], expected, sampled, f"3 × 800, budget 1024, {name}, step {number}", LOOK_SIZE)
        if len(in_flight) == depth:
            land(scheduler, in_flight.pop(0))


@pytest.mark.parametrize(
    ("is_chunked", "expected", "then"),
    [
        (True, {"0": (0, 800), "1": (0, 224)}, {"0": (800, 1), "1": (224, 576), "2": (0, 10)}),
        (False, {"0": (0, 800)}, {"0": (800, 1), "1": (0, 800), "2": (0, 10)}),
    ],
)
def test_small_prompts_do_not_jump_the_queue(is_chunked: bool, expected: Step, then: Step) -> None:
    scheduler = make_scheduler(1_024, max_num_seqs=3, enable_chunked_prefill=is_chunked)
    add(scheduler, [800, 800, 10, 10])
    case = f"prompts of 800, 800, 10, 10, budget 1024, max_num_seqs 3, chunked: {is_chunked}"
    check_output(take_step(scheduler), expected, "0", case, LOOK_WAITING)
    check_queues(scheduler, "".join(expected), "0123"[len(expected) :], case, LOOK_WAITING)
    check_output(take_step(scheduler), then, "012", f"{case}, second step", LOOK_WAITING)
    check_queues(scheduler, "012", "3", f"{case}, second step", LOOK_WAITING)


# How large a chunk


@pytest.mark.parametrize(
    ("flags", "num_scheduled", "length", "expected"),
    [
        (dict(budget=100), 0, 30, 30),
        (dict(budget=100), 0, 100, 100),
        (dict(budget=100), 0, 101, 100),
        (dict(budget=100), 60, 101, 40),
        (dict(budget=100), 99, 5, 1),
        (dict(budget=100), 100, 5, 0),
        (dict(budget=100, long_prefill_token_threshold=20), 0, 101, 20),
        (dict(budget=100, long_prefill_token_threshold=20), 0, 20, 20),
        (dict(budget=100, long_prefill_token_threshold=20), 0, 7, 7),
        (dict(budget=100, long_prefill_token_threshold=20), 90, 101, 10),
        (dict(budget=100, long_prefill_token_threshold=20), 100, 101, 0),
        (dict(budget=100, long_prefill_token_threshold=200), 0, 150, 100),
        (dict(budget=100, enable_chunked_prefill=False), 0, 100, 100),
        (dict(budget=100, enable_chunked_prefill=False), 0, 101, 0),
        (dict(budget=100, enable_chunked_prefill=False), 60, 40, 40),
        (dict(budget=100, enable_chunked_prefill=False), 60, 41, 0),
        (dict(budget=100, enable_chunked_prefill=False, long_prefill_token_threshold=20), 0, 50, 50),
    ],
    ids=str,
)
def test_the_size_of_a_chunk(flags: dict[str, Any], num_scheduled: int, length: int, expected: int) -> None:
    scheduler, request = make_scheduler(**flags), make_request("0", length)
    before = [make_request("x", 1), make_request("y", 1)] if num_scheduled else []
    counts = [1, num_scheduled - 1] if num_scheduled else []
    output = SchedulerOutput(before, [0] * len(before), counts, [0] * len(before), [], [])
    got = scheduler._chunk_size(request, output)
    assert got == expected, (
        f"{flags}, {num_scheduled} tokens are in the step already, the request lacks {length}: expected {expected}, "
        f"got {got}. {LOOK_SIZE}"
    )


def test_the_size_of_a_later_chunk_is_of_what_is_still_missing() -> None:
    scheduler, request = make_scheduler(64), make_request("0", 100)
    request.num_computed_tokens = 60
    got = scheduler._chunk_size(request, SchedulerOutput([], [], [], [], [], []))
    assert got == 40, f"60 of 100 tokens are computed, budget 64: expected 40, got {got}. {LOOK_SIZE}"


def test_the_budget_is_used_up_exactly() -> None:
    """Four prompts of 10, 25 tokens a step: not one token less as long as anybody lacks one."""
    scheduler = make_scheduler(25)
    add(scheduler, [10, 10, 10, 10])
    steps: list[tuple[Step, str]] = [
        ({"0": (0, 10), "1": (0, 10), "2": (0, 5)}, "01"),
        ({"0": (10, 1), "1": (10, 1), "2": (5, 5), "3": (0, 10)}, "0123"),
    ]
    for number, (expected, sampled) in enumerate(steps):
        check_output(take_step(scheduler), expected, sampled, f"4 × 10, budget 25, step {number}", LOOK_SIZE)
    scheduler = make_scheduler(10)
    add(scheduler, [10, 10])
    check_output(take_step(scheduler), {"0": (0, 10)}, "0", "the first takes it all", LOOK_WAITING)
    check_queues(scheduler, "0", "1", "the budget is used up: nobody is let in for nothing", LOOK_WAITING)
    check_output(take_step(scheduler), {"0": (10, 1), "1": (0, 9)}, "0", "budget 10, a decode", LOOK_SIZE)
    check_output(take_step(scheduler), {"0": (11, 1), "1": (9, 1)}, "01", "one token is missing", LOOK_RUNNING)


# Decodes first


@pytest.mark.parametrize("budget", [4, 5, 9, 64])
def test_decodes_are_served_whoever_stands_before_them(budget: int) -> None:
    """A prompt of 1,000 came first. Three that came later and decode get their token in every step."""
    scheduler = make_scheduler(budget, max_num_seqs=4)
    [long] = add(scheduler, [1_000], max_tokens=5)
    output = scheduler.schedule()
    land(scheduler, output)
    others = add(scheduler, [1, 1, 1], first=1)
    for request in others:  # as if they had come in steps of their own
        scheduler.waiting.remove(request)
        assert scheduler._admit(request), "the pool is large"
        request.status, request.num_computed_tokens = RequestStatus.RUNNING, 1
        request.output_token_ids.append(WORD)
        scheduler.running.append(request)
    del scheduler.schedule  # not watched: these requests have a past that nobody scheduled
    for number in range(3):
        done = long.num_computed_tokens
        expected = {**{str(n): (1 + number, 1) for n in (1, 2, 3)}, "0": (done, budget - 3)}
        case = f"a prompt of 1,000 stands before three decodes, budget {budget}, step {number}"
        check_output(take_step(scheduler), expected, "123", case, LOOK_RUNNING)
    check_queues(scheduler, "0123", "", "in the order in which they came", LOOK_RUNNING)


def test_a_budget_of_one_token_a_request_leaves_a_prompt_one() -> None:
    """The smallest budget there is: the prompt crawls, the decodes do not wait."""
    scheduler = make_scheduler(3, max_num_seqs=3)
    add(scheduler, [1, 1, 4])
    expected: list[tuple[Step, str]] = [
        ({"0": (0, 1), "1": (0, 1), "2": (0, 1)}, "01"),
        ({"0": (1, 1), "1": (1, 1), "2": (1, 1)}, "01"),
        ({"0": (2, 1), "1": (2, 1), "2": (2, 1)}, "01"),
        ({"0": (3, 1), "1": (3, 1), "2": (3, 1)}, "012"),
        ({"0": (4, 1), "1": (4, 1), "2": (4, 1)}, "012"),
    ]
    for number, (step, sampled) in enumerate(expected):
        check_output(take_step(scheduler), step, sampled, f"budget 3, step {number}", LOOK_RUNNING)


def test_chunks_take_turns_in_the_order_in_which_they_came() -> None:
    """The earliest takes what it may; the others stand still until there is something left."""
    scheduler = make_scheduler(10, long_prefill_token_threshold=4)
    add(scheduler, [9, 9, 9, 2])
    steps: list[tuple[Step, str]] = [
        ({"0": (0, 4), "1": (0, 4), "2": (0, 2)}, ""),
        ({"0": (4, 4), "1": (4, 4), "2": (2, 2)}, ""),
        ({"0": (8, 1), "1": (8, 1), "2": (4, 4), "3": (0, 2)}, "013"),
        ({"0": (9, 1), "1": (9, 1), "2": (8, 1), "3": (2, 1)}, "0123"),
    ]
    for number, (step, sampled) in enumerate(steps):
        case = f"prompts of 9, 9, 9, 2, budget 10, threshold 4, step {number}"
        check_output(take_step(scheduler), step, sampled, case, LOOK_RUNNING)


def test_who_is_being_computed_goes_before_who_waits() -> None:
    scheduler = make_scheduler(8)
    add(scheduler, [20, 3])
    names = [ids(take_step(scheduler).requests) for _ in range(3)]
    assert names == [["0"], ["0"], ["0", "1"]], (
        f"a prompt of 20 and one of 3, budget 8: expected ['0'], ['0'], ['0', '1'], got {names}. {LOOK_RUNNING}"
    )


def test_a_chunk_without_budget_waits_for_the_next_step() -> None:
    """Not scheduled with 0 tokens, and it keeps its place and its blocks."""
    scheduler = make_scheduler(4, max_num_seqs=3, long_prefill_token_threshold=2)
    add(scheduler, [20, 20, 20])
    check_output(scheduler.schedule(), {"0": (0, 2), "1": (0, 2)}, "", "the budget is used up", LOOK_SIZE)
    scheduler.long_prefill_token_threshold = 0
    check_output(scheduler.schedule(), {"0": (2, 4)}, "", "the first takes it all", LOOK_RUNNING)
    check_queues(scheduler, "01", "2", "1 has got nothing, and stays", LOOK_RUNNING)
    check_blocks(scheduler, {"0": 2, "1": 2}, "1 has got nothing, and stays", LOOK_RUNNING)


# What a chunk is counted as


def test_a_chunk_brings_no_token() -> None:
    scheduler = make_scheduler(4)
    [request] = add(scheduler, [10])
    expected = [((0, 4), (4, 0, 6)), ((4, 4), (8, 0, 2)), ((8, 2), (10, 1, 1)), ((10, 1), (11, 2, 1))]
    for number, (step, counts) in enumerate(expected):  # none of them has landed
        case = f"prompt of 10, budget 4, step {number}"
        check_output(scheduler.schedule(), {"0": step}, "0" * (number > 1), case, LOOK_ADD)
        check_counts(request, counts, case, LOOK_ADD)


def test_add_notes_all_of_it() -> None:
    """Complete or not, with a token in flight or not."""
    cases = {  # tokens, placeholders, computed, now → num_sampled_tokens
        "a whole prompt": ((9, 0, 0, 9), 1),
        "a first chunk": ((9, 0, 0, 8), 0),
        "a middle chunk": ((9, 0, 3, 5), 0),
        "a chunk of one token": ((9, 0, 3, 1), 0),
        "the last chunk": ((9, 0, 3, 6), 1),
        "the last token": ((9, 0, 8, 1), 1),
        "a decode": ((12, 0, 11, 1), 1),
        "a decode whose input is in flight": ((12, 2, 13, 1), 1),
    }
    output = SchedulerOutput([], [], [], [], [], [])
    for name, ((num_tokens, num_placeholders, num_computed, now), num_sampled) in cases.items():
        request = make_request(name, min(9, num_tokens), num_output_tokens=max(0, num_tokens - 9))
        request.num_output_placeholders, request.num_computed_tokens = num_placeholders, num_computed
        output.add(request, now)
        got = (output.requests[-1].request_id, output.num_computed_tokens[-1], output.num_scheduled_tokens[-1])
        assert got == (name, num_computed, now), (
            f"{name}: expected (request, num_computed_tokens, num_scheduled_tokens) {(name, num_computed, now)}, got "
            f"{got}. {LOOK_ADD}"
        )
        assert output.num_sampled_tokens[-1] == num_sampled and type(output.num_sampled_tokens[-1]) is int, (
            f"{name}, {now} of {num_tokens + num_placeholders} tokens after {num_computed}: expected "
            f"num_sampled_tokens {num_sampled}, got {output.num_sampled_tokens[-1]!r}. {LOOK_ADD}"
        )
        counts = (request.num_computed_tokens, request.num_output_placeholders)
        expected = (num_computed + now, num_placeholders + num_sampled)
        assert counts == expected, (
            f"{name}: expected (num_computed_tokens, num_output_placeholders) {expected}, got {counts}. {LOOK_ADD}"
        )
    sampled = [name for name, (_, num_sampled) in cases.items() if num_sampled]
    assert ids(output.sampled_requests) == sampled, (
        f"expected {sampled}, got {ids(output.sampled_requests)}. {LOOK_ADD}"
    )


def test_an_end_by_length_is_foreseen_behind_chunks() -> None:
    """One token is asked for: it comes of the last chunk, and no step is taken for it afterwards."""
    scheduler = make_scheduler(4)
    add(scheduler, [10], max_tokens=1)
    outputs = [scheduler.schedule() for _ in range(4)]
    check_output(outputs[2], {"0": (8, 2)}, "0", "the last chunk", LOOK_ADD)
    check_output(outputs[3], {}, "", "the only token of the only request is in flight", LOOK_LENGTH)
    for output in outputs:
        land(scheduler, output)
    assert not scheduler.has_unfinished_requests, f"its token has come. {LOOK_LATE}"


# Blocks


def test_a_prompt_gets_all_its_blocks_with_its_first_chunk() -> None:
    scheduler = make_scheduler(4, block_size=4, num_usable=9)
    add(scheduler, [20, 20, 1])
    check_output(scheduler.schedule(), {"0": (0, 4)}, "", "first chunk", LOOK_SIZE)
    check_blocks(scheduler, {"0": 5}, "a prompt of 20 tokens, block_size=4, after its first chunk", LOOK_ADMIT)
    for _ in range(4):
        scheduler.schedule()
        check_blocks(scheduler, {"0": 5}, "4 blocks are free, the next prompt needs 5", LOOK_ADMIT)
        check_queues(scheduler, "0", "12", "4 blocks are free, the next prompt needs 5", LOOK_ADMIT)


def test_a_prompt_that_does_not_fit_holds_up_those_behind_it() -> None:
    """Its first chunk would fit. If it were let in with that, it would find the pool full half-way."""
    scheduler = make_scheduler(32, block_size=4, num_usable=10)
    add(scheduler, [20, 24, 4])
    check_output(take_step(scheduler), {"0": (0, 20)}, "0", "10 blocks: 5 and 6 do not fit", LOOK_ADMIT)
    check_queues(scheduler, "0", "12", "10 blocks: 5 and 6 do not fit, and 1 must not jump the queue", LOOK_WAITING)


def test_the_watermark_counts_the_whole_prompt() -> None:
    scheduler = make_scheduler(12, block_size=4, num_usable=99, watermark=0.1, long_prefill_token_threshold=4)
    add(scheduler, [200, 160, 4])
    scheduler.schedule()
    check_queues(scheduler, "0", "12", "99 blocks, 10 must stay free: 50 + 40 leave 9", LOOK_ADMIT)
    scheduler = make_scheduler(1_000, block_size=4, num_usable=99, watermark=0.1)
    add(scheduler, [200, 156, 4])
    scheduler.schedule()
    check_queues(scheduler, "01", "2", "99 blocks, 10 must stay free: 50 + 39 leave 10", LOOK_ADMIT)


def test_a_chunk_preempts_nobody_and_needs_no_block() -> None:
    """The pool is full to the last block: chunks go on until the prompt is done."""
    scheduler = make_scheduler(4, block_size=4, num_usable=8, max_num_seqs=2)
    add(scheduler, [16, 16])
    outputs = [scheduler.schedule() for _ in range(8)]
    assert scheduler.num_preemptions == 0 or outputs[7].preempted, f"a chunk preempted somebody. {LOOK_RUNNING}"
    for number in range(4):
        check_output(outputs[number], {"0": (4 * number, 4)}, "0" * (number == 3), f"step {number}", LOOK_RUNNING)
        assert not outputs[number].preempted, f"step {number}: a chunk preempted somebody. {LOOK_RUNNING}"


# Preemption in the middle of a prompt


def preempted_half_way() -> tuple[Scheduler, list[Request], list[SchedulerOutput]]:
    """0 decodes and fills its block; 1 has computed 3 of 8 tokens and holds the last two blocks. Then 0 needs one."""
    scheduler = make_scheduler(4, block_size=4, num_usable=3, max_num_seqs=2)
    requests = add(scheduler, [3, 8])
    outputs = [scheduler.schedule() for _ in range(3)]
    check_output(outputs[0], {"0": (0, 3), "1": (0, 1)}, "0", "0 whole, 1's first token", LOOK_SIZE)
    check_output(outputs[1], {"0": (3, 1), "1": (1, 3)}, "0", "0 decodes, a chunk of 1", LOOK_SIZE)
    return scheduler, requests, outputs


def test_preempted_half_way() -> None:
    scheduler, [first, second], outputs = preempted_half_way()
    check_output(outputs[2], {"0": (4, 1)}, "0", "0 needs a block, and takes it from 1's prompt", LOOK_RUNNING)
    assert ids(outputs[2].preempted) == ["1"], f"expected 1 to leave, got {ids(outputs[2].preempted)}. {LOOK_RUNNING}"
    check_queues(scheduler, "0", "1", "1 was preempted half-way", LOOK_PREEMPT)
    check_blocks(scheduler, {"0": 2}, "1 was preempted half-way", LOOK_PREEMPT)
    check_counts(second, (0, 0, 8), "preempted half-way: all has to be computed again", LOOK_PREEMPT)
    assert second.status is RequestStatus.WAITING and outputs[2].left == ["1"], f"{second}, {outputs[2].left}"
    for output in outputs:
        land(scheduler, output)
    assert (len(first.output_token_ids), second.output_token_ids) == (3, []), f"a chunk brings no token. {LOOK_ADD}"
    scheduler.abort(["0"])
    check_output(scheduler.schedule(), {"1": (0, 4)}, "", "it begins anew, at its first token", LOOK_PREEMPT)
    check_output(scheduler.schedule(), {"1": (4, 4)}, "1", "and comes to its end", LOOK_PREEMPT)


def test_who_has_just_computed_its_prompt_may_have_to_leave() -> None:
    """Two decodes need a block each, and take those of the prompt that was completed a step before."""
    scheduler = make_scheduler(4, block_size=4, num_usable=4, max_num_seqs=3)
    requests = add(scheduler, [2, 2, 8])
    scheduler.schedule()
    for request in requests[:2]:
        assert request.num_computed_tokens == 2, "both are whole"
    scheduler.max_num_batched_tokens = 6
    check_output(scheduler.schedule(), {"0": (2, 1), "1": (2, 1), "2": (0, 4)}, "01", "2 joins", LOOK_SIZE)
    check_output(scheduler.schedule(), {"0": (3, 1), "1": (3, 1), "2": (4, 4)}, "012", "2 goes on", LOOK_SIZE)
    output = scheduler.schedule()
    assert ids(output.preempted) == ["2"], f"0 and 1 need a block each: got {ids(output.preempted)}. {LOOK_RUNNING}"
    check_output(output, {"0": (4, 1), "1": (4, 1)}, "01", "2 had to leave", LOOK_RUNNING)


def test_a_prompt_that_had_to_leave_is_not_computed() -> None:
    """It is half-way when a decode takes its blocks: there is budget for its chunk, and it gets none."""
    scheduler = make_scheduler(8, block_size=4, num_usable=5, max_num_seqs=3)
    requests = add(scheduler, [4, 4, 12], max_tokens=50)
    check_output(scheduler.schedule(), {"0": (0, 4), "1": (0, 4)}, "01", "two whole prompts", LOOK_SIZE)
    scheduler.long_prefill_token_threshold = 2
    output = scheduler.schedule()  # 0 and 1 take a block each; one is left, 2 needs three
    check_output(output, {"0": (4, 1), "1": (4, 1)}, "01", "2 does not fit", LOOK_ADMIT)
    scheduler.abort(["1"])
    check_output(scheduler.schedule(), {"0": (5, 1), "2": (0, 2)}, "0", "2 joins", LOOK_SIZE)
    for start in (6, 7):
        check_output(scheduler.schedule(), {"0": (start, 1), "2": (2 * start - 10, 2)}, "0", "2 goes on", LOOK_SIZE)
    output = scheduler.schedule()
    assert ids(output.preempted) == ["2"], f"0 needs a block: expected 2 to leave, got {ids(output.preempted)}."
    check_output(output, {"0": (8, 1)}, "0", "2 had to leave, half-way", LOOK_RUNNING)
    check_counts(requests[2], (0, 0, 12), "preempted half-way", LOOK_PREEMPT)


def test_a_decode_behind_a_prompt_preempts_itself_and_not_the_prompt() -> None:
    """The latest leaves, and that is the decode; the prompt before it goes on in the same step."""
    scheduler = make_scheduler(6, block_size=4, num_usable=6, max_num_seqs=2, long_prefill_token_threshold=2)
    add(scheduler, [20, 3])
    check_output(scheduler.schedule(), {"0": (0, 2), "1": (0, 2)}, "", "both have begun", LOOK_SIZE)
    check_output(
        scheduler.schedule(), {"1": (2, 1), "0": (2, 2)}, "1", "1 lacks one token: it comes first", LOOK_RUNNING
    )
    check_output(scheduler.schedule(), {"1": (3, 1), "0": (4, 2)}, "1", "1 decodes", LOOK_RUNNING)
    output = scheduler.schedule()
    assert ids(output.preempted) == ["1"], f"expected 1 to leave, got {ids(output.preempted)}. {LOOK_RUNNING}"
    check_output(output, {"0": (6, 2)}, "", "1 had to leave, and 0 takes its chunk all the same", LOOK_RUNNING)


def test_a_preempted_answer_comes_back_in_chunks() -> None:
    """Prompt and answer so far are computed again, and a token is sampled at the last of them only."""
    scheduler = make_scheduler(4, block_size=4)
    [request] = add(scheduler, [6])
    for _ in range(4):
        take_step(scheduler)
    assert len(request.output_token_ids) == 3, "two chunks, then two decodes"
    scheduler.preempt(request)
    scheduler.running.clear()
    del scheduler.schedule  # it was preempted behind the watcher's back
    check_output(take_step(scheduler), {"0": (0, 4)}, "", "9 tokens are known, first chunk", LOOK_ADD)
    check_output(take_step(scheduler), {"0": (4, 4)}, "", "9 tokens are known, second chunk", LOOK_ADD)
    check_output(take_step(scheduler), {"0": (8, 1)}, "0", "9 tokens are known, the last", LOOK_ADD)
    assert len(request.output_token_ids) == 4, f"got {request.output_token_ids}. {LOOK_ADD}"


def test_who_was_preempted_waits_for_the_token_in_flight() -> None:
    """The step in which it was preempted may fail at its launch. Then a step in flight still owes it a token."""
    scheduler = make_scheduler(8, block_size=4, num_usable=4, max_num_seqs=2)
    [_, second] = add(scheduler, [4, 4])
    in_flight = scheduler.schedule()
    scheduler.schedule()
    output = scheduler.schedule()
    del scheduler.schedule
    scheduler.preempt(second)
    scheduler.abort(["0"])  # its step has failed
    check_counts(second, (0, 3, 7), "preempted with tokens in flight", LOOK_PREEMPT)
    check_output(scheduler.schedule(), {}, "", "its next token is not known yet, and comes first", LOOK_WAITING)
    for each in (in_flight, output):
        land(scheduler, each)
    second.num_output_placeholders = 0
    check_output(scheduler.schedule(), {"1": (0, 6)}, "1", "4 tokens of prompt, 2 have come", LOOK_WAITING)


# Abort


@pytest.mark.parametrize("is_in_flight", [True, False])
def test_an_abort_half_way_frees_everything(is_in_flight: bool) -> None:
    scheduler = make_scheduler(4, block_size=4, num_usable=8, max_num_seqs=2)
    requests = add(scheduler, [2, 20, 5])
    outputs = [scheduler.schedule(), scheduler.schedule()]
    if not is_in_flight:
        for output in outputs:
            land(scheduler, output)
    check_output(outputs[1], {"0": (2, 1), "1": (2, 3)}, "0", "a decode and a chunk", LOOK_SIZE)
    [found] = scheduler.abort(["1"])
    case = f"aborted half-way, in flight: {is_in_flight}"
    assert found is requests[1] and found.status is RequestStatus.FINISHED_ABORTED, f"{case}: {found}. {LOOK_LATE}"
    check_blocks(scheduler, {"0": 1}, case, LOOK_LATE)
    check_queues(scheduler, "0", "2", case, LOOK_LATE)
    output = scheduler.schedule()
    check_output(output, {"0": (3, 1), "2": (0, 3)}, "0", f"{case}: the next one takes its place", LOOK_LATE)
    assert output.left == ["1"], f"{case}: what the runner keeps for 1 can go; expected ['1'], got {output.left}."
    for each in (*outputs, output):
        if each is output or is_in_flight:
            land(scheduler, each)
    assert not found.output_token_ids and not found.num_output_placeholders, f"{case}: got {found}. {LOOK_LATE}"


def test_a_request_ends_while_others_are_half_way() -> None:
    scheduler = make_scheduler(4, block_size=4)
    add(scheduler, [2, 10])
    first, second = scheduler.schedule(), scheduler.schedule()
    land(scheduler, first, [END])
    land(scheduler, second)  # a token too late for 0
    check_queues(scheduler, "1", "", "0 has ended", LOOK_LATE)
    check_blocks(scheduler, {"1": 3}, "0 has ended", LOOK_LATE)
    check_output(scheduler.schedule(), {"1": (5, 4)}, "", "1 has all of the budget now", LOOK_SIZE)


# The flags


@pytest.mark.parametrize(
    ("flags", "field", "words"),
    [
        (dict(max_num_seqs=8, max_num_batched_tokens=7), "max_num_batched_tokens", ["at least 8", "7", "max_num_seqs"]),
        (
            dict(enable_chunked_prefill=False, max_num_seqs=8, max_num_batched_tokens=99),
            "max_num_batched_tokens",
            ["at least 100", "99", "max_model_len"],
        ),
        (
            dict(enable_chunked_prefill=False, max_num_seqs=200, max_num_batched_tokens=150),
            "max_num_batched_tokens",
            ["at least 200", "150", "max_num_seqs"],
        ),
        (dict(max_num_batched_tokens=0), "max_num_batched_tokens", ["at least 1", "0"]),
        (dict(long_prefill_token_threshold=-1), "long_prefill_token_threshold", ["0 or more", "-1"]),
    ],
    ids=str,
)
def test_flags_that_make_no_sense_are_refused(flags: dict[str, Any], field: str, words: list[str]) -> None:
    with pytest.raises(FieldError) as caught:
        scripted_engine(100, **flags)
    assert caught.value.field == field, f"{flags}: expected the error to blame {field}, got {caught.value.field}."
    for word in words:
        assert word in str(caught.value), (
            f"{flags}: the message must name value and limit, {word!r}: {str(caught.value)!r}. {LOOK_BUDGET}"
        )


@pytest.mark.parametrize(
    ("flags", "max_model_len", "expected"),
    [
        (dict(), 100, 512),
        (dict(), 3_000, 512),
        (dict(max_num_seqs=600), 100, 600),
        (dict(enable_chunked_prefill=False), 100, 512),
        (dict(enable_chunked_prefill=False), 3_000, 3_000),
        (dict(max_num_batched_tokens=64), 3_000, 64),
        (dict(max_num_seqs=8, max_num_batched_tokens=8), 100, 8),
        (dict(enable_chunked_prefill=False, max_num_batched_tokens=100), 100, 100),
    ],
    ids=str,
)
def test_the_budget(flags: dict[str, Any], max_model_len: int, expected: int) -> None:
    got = token_budget(EngineConfig(**{"device": "cpu", **flags}), max_model_len)
    assert got == expected, (
        f"{flags} on a CPU, a context of {max_model_len}: expected a budget of {expected}, got {got}. {LOOK_BUDGET}"
    )
    engine = scripted_engine(max_model_len, **flags)
    scheduler = engine.scheduler
    made = (scheduler.max_num_batched_tokens, scheduler.enable_chunked_prefill, scheduler.long_prefill_token_threshold)
    wanted = (expected, flags.get("enable_chunked_prefill", True), flags.get("long_prefill_token_threshold", 0))
    assert made == wanted, (
        f"{flags}: the scheduler got {made}, expected {wanted}. Look at core/engine.py::LLMEngine.__init__."
    )


def test_the_threshold_reaches_the_scheduler() -> None:
    scheduler = scripted_engine(100, long_prefill_token_threshold=9).scheduler
    got = scheduler.long_prefill_token_threshold
    assert got == 9, f"expected 9, got {got}. Look at core/engine.py::LLMEngine.__init__."


def test_a_scheduler_without_room_for_all_is_no_scheduler() -> None:
    with pytest.raises(AssertionError):
        make_scheduler(3, max_num_seqs=4)


def test_positions_are_computed_in_order_whatever_the_budget() -> None:
    """A prompt of 50 in chunks: the edges meet, and the whole prompt is covered."""
    for budget in (1, 2, 3, 7, 16, 49, 50, 51):
        scheduler, edges = make_scheduler(budget, max_num_seqs=1), [0]
        [request] = add(scheduler, [50])
        while not request.output_token_ids:
            output = take_step(scheduler)
            edges.append(output.num_computed_tokens[0] + output.num_scheduled_tokens[0])
        sizes = [end - start for start, end in pairwise(edges)]
        expected = [budget] * (50 // budget) + [50 % budget] * bool(50 % budget)
        assert sizes == expected and edges[-1] == 50, (
            f"a prompt of 50, budget {budget}: expected chunks of {expected}, got {sizes}. {LOOK_SIZE}"
        )
