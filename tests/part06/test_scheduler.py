"""core/scheduler.py: one token budget per step, decodes first, prompts in chunks. No model: tokens are counted."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from common.errors import FieldError
from part06_chunked_prefill.config import EngineConfig, token_budget
from part06_chunked_prefill.core.block_manager import BlockManager
from part06_chunked_prefill.core.request import Request, RequestStatus
from part06_chunked_prefill.core.scheduler import Scheduler, SchedulerOutput
from part06_chunked_prefill.messages import ScheduledRequest, StepInput
from tests.guards import guard
from tests.part06.scripted import scripted_engine, watch
from tests.scripted import END, ids, params_for, shares

LOOK_SIZE = 'Look at core/scheduler.py::Scheduler._chunk_size; README "Decodes first".'
LOOK_RUNNING = 'Look at core/scheduler.py::Scheduler._schedule_running, _grow_or_preempt; README "Decodes first".'
LOOK_WAITING = 'Look at core/scheduler.py::Scheduler._schedule_waiting; README "Decodes first".'
LOOK_ADMIT = 'Look at core/scheduler.py::Scheduler._admit; README "Decodes first".'
LOOK_ADD = 'Look at core/scheduler.py::Scheduler._add; README "Chunks that sample no token".'
LOOK_SAMPLED = 'Look at core/scheduler.py::SchedulerOutput.sampled_requests; README "Chunks that sample no token".'
LOOK_LENGTH = 'Look at core/scheduler.py::Scheduler._schedule_running; README of part 5, "Placeholders".'
LOOK_PREEMPT = 'Look at core/scheduler.py::Scheduler.preempt; README of part 5, "Placeholders".'
LOOK_LATE = 'Look at core/scheduler.py::Scheduler.finish, abort and _leave; README of part 5, "Placeholders".'
LOOK_BUDGET = 'Look at config.py::token_budget; README "Decodes first".'
WORD = 9  # any token but END
Step = dict[str, tuple[int, int]]  # request → tokens computed before, tokens in this step


def make_scheduler(
    budget: int = 4_096, num_usable: int = 1_000, block_size: int = 16, max_num_seqs: int | None = None, **flags: Any
) -> Scheduler:
    """num_usable: blocks to hand out, without the null block."""
    max_num_seqs = min(8, budget) if max_num_seqs is None else max_num_seqs
    scheduler = Scheduler(BlockManager(num_usable + 1, block_size), max_num_seqs, budget, **{"watermark": 0.0, **flags})
    watch(scheduler)
    guard(scheduler)
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
    """What the engine does when a step's tokens have arrived."""
    requests = [request for request, share in shares(output) if share.is_sampled]
    for request, token_id in zip(requests, token_ids or [WORD] * len(requests), strict=True):
        request.num_output_placeholders -= 1
        if request.status.is_finished:
            continue
        request.output_token_ids.append(token_id)
        if token_id == END or request.num_tokens >= request.max_num_tokens:
            request.finish("stop" if token_id == END else "length", None)
            scheduler.finish(request)


def take_step(scheduler: Scheduler) -> SchedulerOutput:
    """With no other in flight."""
    output = scheduler.schedule()
    land(scheduler, output)
    return output


def run_ahead(scheduler: Scheduler, num_steps: int) -> list[SchedulerOutput]:
    """Steps as the engine takes them: each is scheduled while the one before it is in flight. The last one still is."""
    outputs = [scheduler.schedule()]
    for _ in range(num_steps - 1):
        outputs.append(scheduler.schedule())
        land(scheduler, outputs[-2])
    return outputs


def check_output(output: SchedulerOutput, expected: Step, sampled: str, case: str, look: str) -> None:
    """expected: which requests are scheduled, in order; sampled: those that get a token."""
    got = [
        (request.request_id, (share.num_computed_tokens, share.num_scheduled_tokens))
        for request, share in shares(output)
    ]
    assert got == list(expected.items()), (
        f"{case}: expected request → (num_computed_tokens, num_scheduled_tokens) {list(expected.items())}, got {got} "
        f"(preempted: {ids(output.preempted) or 'none'}). {look}"
    )
    is_sampled = {request.request_id: share.is_sampled for request, share in shares(output)}
    wanted = {name: name in sampled for name in expected}
    assert is_sampled == wanted, f"{case}: expected is_sampled {wanted}, got {is_sampled}. {LOOK_ADD}"
    assert "".join(ids(output.sampled_requests)) == sampled, (
        f"{case}: expected sampled_requests {sampled!r}, got {ids(output.sampled_requests)}. {LOOK_SAMPLED}"
    )
    total = sum(now for _, now in expected.values())
    assert output.total_num_scheduled_tokens == total, (
        f"{case}: expected {total} tokens in all, got {output.total_num_scheduled_tokens}"
    )


def check_preempted(output: SchedulerOutput, expected: list[str], case: str) -> None:
    got = ids(output.preempted)
    assert got == expected, f"{case}: expected output.preempted {expected}, got {got}. {LOOK_RUNNING}"


def check_queues(scheduler: Scheduler, running: str, waiting: str, case: str, look: str) -> None:
    got = ("".join(ids(scheduler.running)), "".join(ids(list(scheduler.waiting))))
    assert got == (running, waiting), f"{case}: expected (running, waiting) {(running, waiting)}, got {got}. {look}"


def check_blocks(scheduler: Scheduler, expected: dict[str, int], case: str, look: str) -> None:
    """expected: how many blocks each request holds."""
    blocks = scheduler.blocks
    got = {request_id: len(table) for request_id, table in blocks.block_tables.items() if table}
    assert got == expected, f"{case}: expected request → blocks {expected}, got {got}. {look}"
    owned = [*blocks.free_blocks, *(block for table in blocks.block_tables.values() for block in table)]
    assert sorted(owned) == list(range(1, blocks.num_blocks)), (
        f"{case}: every block is free or has one owner, got {sorted(owned)}: one was freed twice, or lost. {look}"
    )


def check_counts(request: Request, expected: tuple[int, int, int], case: str, look: str) -> None:
    """expected: num_computed_tokens, num_output_placeholders, num_new_tokens."""
    got = (request.num_computed_tokens, request.num_output_placeholders, request.num_new_tokens)
    assert got == expected, (
        f"{case}, request {request.request_id}: expected (num_computed_tokens, num_output_placeholders, "
        f"num_new_tokens) {expected}, got {got}. {look}"
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
    """depth: steps in flight. What a step holds depends on numbers that are known before it has run."""
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
    ("flags", "num_scheduled", "num_new", "expected"),
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
def test_the_size_of_a_chunk(flags: dict[str, Any], num_scheduled: int, num_new: int, expected: int) -> None:
    scheduler, output = make_scheduler(**flags), SchedulerOutput(StepInput([], []), [], [])
    for row, count in enumerate([1, num_scheduled - 1] if num_scheduled else []):
        output.requests.append(make_request(str(row), 1))
        output.step.requests.append(ScheduledRequest(row, 0, count, False, []))
    got = scheduler._chunk_size(num_new, output)
    assert got == expected, (
        f"{flags}, {num_scheduled} tokens are in the step already, the request has {num_new} new ones: expected "
        f"{expected}, got {got}. {LOOK_SIZE}"
    )


def test_the_budget_is_used_up_exactly() -> None:
    """Four prompts of 10, 25 tokens per step: not one token less while a request has new tokens."""
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
    check_output(take_step(scheduler), {"0": (0, 10)}, "0", "the first takes the whole budget", LOOK_WAITING)
    check_queues(scheduler, "0", "1", "the budget is used up: no request is admitted for 0 tokens", LOOK_WAITING)
    check_output(take_step(scheduler), {"0": (10, 1), "1": (0, 9)}, "0", "budget 10, a decode", LOOK_SIZE)
    check_output(take_step(scheduler), {"0": (11, 1), "1": (9, 1)}, "01", "1 has one new token left", LOOK_RUNNING)


# Decodes first


@pytest.mark.parametrize("budget", [4, 5, 9, 64])
def test_decodes_come_before_an_earlier_prompt(budget: int) -> None:
    """A prompt of 1,000 arrived first. Three short requests behind it get their token in every step."""
    scheduler = make_scheduler(budget, max_num_seqs=4, long_prefill_token_threshold=budget - 3)
    add(scheduler, [1_000, 1, 1, 1])
    chunk = budget - 3
    first: Step = {"0": (0, chunk), "1": (0, 1), "2": (0, 1), "3": (0, 1)}
    check_output(take_step(scheduler), first, "123", f"all begin, budget {budget}, threshold {chunk}", LOOK_WAITING)
    for number in range(1, 4):
        expected = {**{name: (number, 1) for name in "123"}, "0": (number * chunk, chunk)}
        case = f"a prompt of 1,000 is ahead of three decodes, budget {budget}, step {number}"
        check_output(take_step(scheduler), expected, "123", case, LOOK_RUNNING)
    check_queues(scheduler, "0123", "", "in the order of arrival", LOOK_RUNNING)


def test_with_one_token_per_request_a_prompt_gets_one() -> None:
    """The smallest budget: the prompt takes a step for each token, and the decodes do not wait."""
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


def test_chunks_are_scheduled_in_the_order_of_arrival() -> None:
    """The earliest prompt takes as much as it may; the others get what is left of the budget."""
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


def test_running_prompts_come_before_waiting_ones() -> None:
    scheduler = make_scheduler(8)
    add(scheduler, [20, 3])
    names = [ids(take_step(scheduler).requests) for _ in range(3)]
    assert names == [["0"], ["0"], ["0", "1"]], (
        f"a prompt of 20 and one of 3, budget 8: expected ['0'], ['0'], ['0', '1'], got {names}. {LOOK_RUNNING}"
    )


# What a chunk counts as


def test_a_chunk_brings_no_token() -> None:
    scheduler = make_scheduler(4)
    [request] = add(scheduler, [10])
    expected = [((0, 4), (4, 0, 6)), ((4, 4), (8, 0, 2)), ((8, 2), (10, 1, 1)), ((10, 1), (11, 2, 1))]
    for number, (step, counts) in enumerate(expected):  # none of their results has arrived
        case = f"prompt of 10, budget 4, step {number}"
        check_output(scheduler.schedule(), {"0": step}, "0" * (number > 1), case, LOOK_ADD)
        check_counts(request, counts, case, LOOK_ADD)


def test_add_schedules_and_counts() -> None:
    """Whole prompts, chunks and decodes, with a token in flight or not."""
    cases = {  # known tokens, placeholders, computed, now, blocks that the worker knows → is_sampled
        "a whole prompt": ((9, 0, 0, 9, 0), True),
        "a first chunk": ((9, 0, 0, 8, 0), False),
        "a middle chunk": ((9, 0, 3, 5, 3), False),
        "a chunk of one token": ((9, 0, 3, 1, 3), False),
        "the last chunk": ((9, 0, 3, 6, 3), True),
        "the last token": ((9, 0, 8, 1, 3), True),
        "a decode": ((12, 0, 11, 1, 3), True),
        "a decode that begins a block": ((13, 0, 12, 1, 3), True),
        "a decode whose input is in flight": ((12, 1, 12, 1, 3), True),
    }
    scheduler, output = make_scheduler(block_size=4, max_num_seqs=9), SchedulerOutput(StepInput([], []), [], [])
    for row, (name, (numbers, is_sampled)) in enumerate(cases.items()):
        num_tokens, num_placeholders, num_computed, now, num_sent = numbers
        request = make_request(name, min(9, num_tokens), num_output_tokens=max(0, num_tokens - 9))
        scheduler.blocks.admit(name, num_tokens + num_placeholders)
        table, request.row, request.num_sent_blocks = scheduler.blocks.block_tables[name], row, num_sent
        request.num_output_placeholders, request.num_computed_tokens = num_placeholders, num_computed
        request.status = RequestStatus.RUNNING
        scheduler.running.append(request)
        scheduler._add(request, now, output)
        got = (output.requests[-1].request_id, output.step.requests[-1])
        expected = (name, ScheduledRequest(row, num_computed, now, is_sampled, table[num_sent:]))
        assert got == expected, (
            f"{name}, {now} of {num_tokens + num_placeholders} tokens after {num_computed}, the worker knows "
            f"{num_sent} of its blocks {table}: expected {expected}, got {got}. {LOOK_ADD}"
        )
        counts = (request.num_computed_tokens, request.num_output_placeholders, request.num_sent_blocks)
        wanted = (num_computed + now, num_placeholders + is_sampled, len(table))
        assert counts == wanted, (
            f"{name}: expected (num_computed_tokens, num_output_placeholders, num_sent_blocks) {wanted}, got {counts}. "
            f"{LOOK_ADD}"
        )
    sampled = [name for name, (_, is_sampled) in cases.items() if is_sampled]
    got_names = ids(output.sampled_requests)
    assert got_names == sampled, f"expected sampled_requests {sampled}, got {got_names}. {LOOK_SAMPLED}"


def test_an_end_by_length_is_foreseen_behind_chunks() -> None:
    """max_tokens=1: the last chunk brings the token, and the request is in no later step."""
    scheduler = make_scheduler(4)
    add(scheduler, [10], max_tokens=1)
    outputs = run_ahead(scheduler, 4)
    check_output(outputs[2], {"0": (8, 2)}, "0", "the last chunk", LOOK_ADD)
    check_output(outputs[3], {}, "", "the only token of the only request is in flight", LOOK_LENGTH)
    assert not scheduler.has_unfinished_requests, f"its token has arrived. {LOOK_LATE}"


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


def test_requests_wait_behind_a_prompt_that_does_not_fit() -> None:
    """Its first chunk would fit. If it were admitted with that, it would find the pool full half-way."""
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


def test_a_chunk_needs_no_block_and_preempts_no_request() -> None:
    """The pool is full to the last block: chunks go on until the prompts are done."""
    scheduler = make_scheduler(4, block_size=4, num_usable=8, max_num_seqs=2, long_prefill_token_threshold=2)
    add(scheduler, [16, 16])
    for number in range(8):
        output, case = take_step(scheduler), f"two prompts of 16 in 8 blocks of 4, step {number}"
        assert not output.preempted, f"{case}: a chunk preempted {ids(output.preempted)}. {LOOK_RUNNING}"
        expected = {name: (2 * number, 2) for name in "01"}
        check_output(output, expected, "01" * (number == 7), case, LOOK_RUNNING)


def test_all_blocks_are_sent_with_the_first_chunk() -> None:
    """Later chunks send none; a request that comes back after a preemption sends its new ones."""
    scheduler = make_scheduler(4, block_size=4, num_usable=4, max_num_seqs=2)
    _, request = add(scheduler, [2, 9])
    outputs = [take_step(scheduler)]
    table = list(scheduler.blocks.block_tables["1"])
    outputs += [take_step(scheduler) for _ in range(2)]
    got = [output.step.requests[-1].new_block_ids for output in outputs]
    assert got == [table, [], []], (
        f"a prompt of 9 in three chunks, block table {table}: expected new_block_ids {[table, [], []]}, got {got}. "
        f"{LOOK_ADD}"
    )
    new = [len(output.step.new_requests) for output in outputs]
    assert new == [2, 0, 0], f"two requests, three steps: expected new_requests [2, 0, 0], got {new}. {LOOK_ADD}"
    tokens = outputs[0].step.new_requests[1].token_ids
    assert tokens == request.token_ids, f"the first chunk sends the whole prompt, got {tokens}. {LOOK_ADD}"
    check_output(take_step(scheduler), {"0": (4, 1)}, "0", "0 needs a block: 1 is preempted", LOOK_RUNNING)
    scheduler.abort(["0"])
    again, table = scheduler.schedule().step, scheduler.blocks.block_tables["1"]
    assert again.requests[0].new_block_ids == table and len(again.new_requests) == 1, (
        f"it comes back with the block table {table}: expected to send all of it, and its tokens, got {again}. "
        f"{LOOK_ADD}"
    )


# Preemption in the middle of a prompt


def preempted_half_way() -> tuple[Scheduler, list[Request], list[SchedulerOutput]]:
    """0 decodes and fills its block; 1 has computed 4 of 8 tokens and holds the last two blocks. Then 0 needs one."""
    scheduler = make_scheduler(4, block_size=4, num_usable=3, max_num_seqs=2)
    requests = add(scheduler, [3, 8])
    outputs = run_ahead(scheduler, 3)
    check_output(outputs[0], {"0": (0, 3), "1": (0, 1)}, "0", "0 whole, 1's first token", LOOK_SIZE)
    check_output(outputs[1], {"0": (3, 1), "1": (1, 3)}, "0", "0 decodes, a chunk of 1", LOOK_SIZE)
    return scheduler, requests, outputs


def test_preempted_half_way() -> None:
    scheduler, [first, second], outputs = preempted_half_way()
    check_output(outputs[2], {"0": (4, 1)}, "0", "0 needs a block, and gets one of 1's", LOOK_RUNNING)
    check_preempted(outputs[2], ["1"], "0 needs a block, and none is free")
    check_queues(scheduler, "0", "1", "1 was preempted half-way", LOOK_PREEMPT)
    check_blocks(scheduler, {"0": 2}, "1 was preempted half-way", LOOK_PREEMPT)
    check_counts(second, (0, 0, 8), "preempted half-way: all has to be computed again", LOOK_PREEMPT)
    got = (second.status, second.row, second.num_sent_blocks)
    expected = (RequestStatus.PREEMPTED, None, 0)
    assert got == expected, f"preempted: expected (status, row, num_sent_blocks) {expected}, got {got}. {LOOK_PREEMPT}"
    land(scheduler, outputs[2])
    assert (len(first.output_token_ids), second.output_token_ids) == (3, []), f"a chunk brings no token. {LOOK_ADD}"
    scheduler.abort(["0"])
    check_output(scheduler.schedule(), {"1": (0, 4)}, "", "it starts again at its first token", LOOK_PREEMPT)
    check_output(scheduler.schedule(), {"1": (4, 4)}, "1", "and computes the rest", LOOK_PREEMPT)


def test_a_request_can_be_preempted_right_after_its_prompt() -> None:
    """Two decodes need a block each, and get those of the prompt that was completed one step before."""
    scheduler = make_scheduler(6, block_size=4, num_usable=4, max_num_seqs=3)
    add(scheduler, [2, 2])
    check_output(take_step(scheduler), {"0": (0, 2), "1": (0, 2)}, "01", "both are whole", LOOK_SIZE)
    add(scheduler, [8], first=2)
    check_output(take_step(scheduler), {"0": (2, 1), "1": (2, 1), "2": (0, 4)}, "01", "2 joins", LOOK_SIZE)
    check_output(take_step(scheduler), {"0": (3, 1), "1": (3, 1), "2": (4, 4)}, "012", "2 goes on", LOOK_SIZE)
    output = take_step(scheduler)
    check_preempted(output, ["2"], "0 and 1 need a block each, and none is free")
    check_output(output, {"0": (4, 1), "1": (4, 1)}, "01", "2 is preempted", LOOK_RUNNING)


def test_a_preempted_prompt_gets_no_chunk() -> None:
    """It is half-way when a decode gets its blocks: there is budget for its chunk, and it gets none."""
    scheduler = make_scheduler(8, block_size=4, num_usable=5, max_num_seqs=3, long_prefill_token_threshold=2)
    add(scheduler, [4, 4])
    for start in (0, 2):
        expected: Step = {"0": (start, 2), "1": (start, 2)}
        check_output(take_step(scheduler), expected, "01" * (start == 2), "two prompts of 4", LOOK_SIZE)
    [third] = add(scheduler, [12], first=2)
    output = take_step(scheduler)  # 0 and 1 get a block each; one is free, 2 needs three
    check_output(output, {"0": (4, 1), "1": (4, 1)}, "01", "2 does not fit", LOOK_ADMIT)
    scheduler.abort(["1"])
    for number in range(3):
        expected = {"0": (5 + number, 1), "2": (2 * number, 2)}
        check_output(take_step(scheduler), expected, "0", f"a decode and chunk {number} of 2", LOOK_SIZE)
    output = take_step(scheduler)
    check_preempted(output, ["2"], "0 needs a block, and none is free")
    check_output(output, {"0": (8, 1)}, "0", "2 is preempted half-way", LOOK_RUNNING)
    check_counts(third, (0, 0, 12), "preempted half-way", LOOK_PREEMPT)


def test_a_decode_behind_a_prompt_preempts_itself_and_not_the_prompt() -> None:
    """The latest request is preempted, and that is the decode; the prompt before it goes on in the same step."""
    scheduler = make_scheduler(6, block_size=4, num_usable=6, max_num_seqs=2, long_prefill_token_threshold=2)
    add(scheduler, [20, 3])
    check_output(take_step(scheduler), {"0": (0, 2), "1": (0, 2)}, "", "both have begun", LOOK_SIZE)
    check_output(
        take_step(scheduler), {"1": (2, 1), "0": (2, 2)}, "1", "1 has one new token: it comes first", LOOK_RUNNING
    )
    check_output(take_step(scheduler), {"1": (3, 1), "0": (4, 2)}, "1", "1 decodes", LOOK_RUNNING)
    output = take_step(scheduler)
    check_preempted(output, ["1"], "1 needs a block, none is free, and it is the latest")
    check_output(output, {"0": (6, 2)}, "", "1 is preempted, and 0 gets its chunk", LOOK_RUNNING)


def test_a_preempted_request_comes_back_in_chunks() -> None:
    """Prompt and answer so far are computed again, and only the last chunk samples a token."""
    scheduler = make_scheduler(4, block_size=4, num_usable=3, max_num_seqs=2)
    _, request = add(scheduler, [1, 6])
    for _ in range(4):
        take_step(scheduler)
    assert len(request.output_token_ids) == 3, (
        f"two chunks, then two decodes: got {request.output_token_ids}. {LOOK_ADD}"
    )
    check_output(take_step(scheduler), {"0": (4, 1)}, "0", "0 needs a block: 1 is preempted", LOOK_RUNNING)
    scheduler.abort(["0"])
    check_output(take_step(scheduler), {"1": (0, 4)}, "", "9 tokens are known, first chunk", LOOK_ADD)
    check_output(take_step(scheduler), {"1": (4, 4)}, "", "9 tokens are known, second chunk", LOOK_ADD)
    check_output(take_step(scheduler), {"1": (8, 1)}, "1", "9 tokens are known, the last", LOOK_ADD)
    got = len(request.output_token_ids)
    assert got == 4, f"three tokens, and one more after the preemption: expected 4, got {got}. {LOOK_ADD}"


def test_a_request_preempted_with_its_last_chunk_in_flight() -> None:
    """That chunk's token still arrives. Then all chunks are computed again, and one token more."""
    scheduler = make_scheduler(4, block_size=4, num_usable=3, max_num_seqs=2)
    _, second = add(scheduler, [2, 6], max_tokens=50)
    third = run_ahead(scheduler, 3)[-1]
    check_output(third, {"0": (3, 1), "1": (5, 1)}, "01", "1's last chunk", LOOK_SIZE)
    check_output(scheduler.schedule(), {"0": (4, 1)}, "0", "0 needs a block: 1 is preempted", LOOK_RUNNING)
    check_counts(second, (0, 1, 7), "preempted, its first token is in flight", LOOK_PREEMPT)
    land(scheduler, third)
    check_counts(second, (0, 0, 7), "preempted, its first token has arrived", LOOK_PREEMPT)
    scheduler.abort(["0"])
    check_output(scheduler.schedule(), {"1": (0, 4)}, "", "1 starts again, with 7 tokens", LOOK_WAITING)
    check_output(scheduler.schedule(), {"1": (4, 3)}, "1", "its last chunk", LOOK_WAITING)


# Abort


@pytest.mark.parametrize("is_in_flight", [True, False])
def test_an_abort_half_way_frees_everything(is_in_flight: bool) -> None:
    scheduler = make_scheduler(4, block_size=4, num_usable=8, max_num_seqs=2)
    requests = add(scheduler, [2, 20, 5])
    outputs = run_ahead(scheduler, 2)
    if not is_in_flight:
        land(scheduler, outputs[1])
    check_output(outputs[1], {"0": (2, 1), "1": (2, 3)}, "0", "a decode and a chunk", LOOK_SIZE)
    [found] = scheduler.abort(["1"])
    case = f"aborted half-way, in flight: {is_in_flight}"
    assert found is requests[1] and found.status is RequestStatus.FINISHED_ABORTED, f"{case}: {found}. {LOOK_LATE}"
    check_blocks(scheduler, {"0": 1}, case, LOOK_LATE)
    check_queues(scheduler, "0", "2", case, LOOK_LATE)
    output = scheduler.schedule()
    check_output(output, {"0": (3, 1), "2": (0, 3)}, "0", f"{case}: the next one is admitted", LOOK_LATE)
    rows = {request.row for request in scheduler.running}
    assert rows == {0, 1}, f"{case}: expected 2 to get the row that 1 had, got rows {rows}. {LOOK_LATE}"
    for each in [outputs[1]] * is_in_flight + [output]:
        land(scheduler, each)
    assert not found.output_token_ids and not found.num_output_placeholders, (
        f"{case}: expected no token and no placeholder, got {found}. {LOOK_LATE}"
    )


def test_a_request_ends_while_others_are_half_way() -> None:
    scheduler = make_scheduler(4, block_size=4)
    add(scheduler, [2, 10])
    first, second = scheduler.schedule(), scheduler.schedule()
    land(scheduler, first, [END])
    land(scheduler, second)  # a token too late for 0
    check_queues(scheduler, "1", "", "0 has ended", LOOK_LATE)
    check_blocks(scheduler, {"1": 3}, "0 has ended", LOOK_LATE)
    check_output(scheduler.schedule(), {"1": (5, 4)}, "", "1 has the whole budget now", LOOK_SIZE)


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
        (dict(long_prefill_token_threshold=-1), "long_prefill_token_threshold", ["at least 0", "-1"]),
    ],
    ids=str,
)
def test_flags_out_of_range_are_refused(flags: dict[str, Any], field: str, words: list[str]) -> None:
    with pytest.raises(FieldError) as caught:
        scripted_engine(100, **flags)
    assert caught.value.field == field, (
        f"{flags}: expected the error to name {field}, got {caught.value.field}. {LOOK_BUDGET}"
    )
    for word in words:
        assert word in str(caught.value), (
            f"{flags}: expected the message to say {word!r}, got {str(caught.value)!r}. {LOOK_BUDGET}"
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


def test_a_budget_below_max_num_seqs_is_refused() -> None:
    with pytest.raises(AssertionError, match="room for one token of each request"):
        make_scheduler(3, max_num_seqs=4)


def test_positions_are_computed_in_order_whatever_the_budget() -> None:
    """A prompt of 50 in chunks: each begins where the one before ended, and together they are the whole prompt."""
    for budget in (1, 2, 3, 7, 16, 49, 50, 51):
        scheduler, ends = make_scheduler(budget, max_num_seqs=1), [0]
        [request] = add(scheduler, [50])
        while not request.output_token_ids:
            output = take_step(scheduler)
            [share] = output.step.requests
            ends.append(share.num_computed_tokens + share.num_scheduled_tokens)
        sizes = [end - start for start, end in pairwise(ends)]
        expected = [budget] * (50 // budget) + [50 % budget] * bool(50 % budget)
        assert sizes == expected and ends[-1] == 50, (
            f"a prompt of 50, budget {budget}: expected chunks of {expected}, got {sizes}. {LOOK_SIZE}"
        )
