"""core/scheduler.py: which requests are in the next step, without a model and with one that follows a script."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from common.sampling_params import SamplingParams
from part04_continuous_batching.core.block_manager import BlockManager
from part04_continuous_batching.core.request import Request, RequestStatus
from part04_continuous_batching.core.scheduler import Scheduler, SchedulerOutput
from part04_continuous_batching.messages import NULL_BLOCK
from tests.guards import guard
from tests.lives import run_lives
from tests.part04.scripted import END, ScriptedWorker, next_token

LOOK_RUNNING = 'Look at core/scheduler.py::Scheduler._schedule_running; README "Running requests come first".'
LOOK_PREEMPTING = 'Look at core/scheduler.py::Scheduler._grow_or_preempt; README "Running requests come first".'
LOOK_WAITING = 'Look at core/scheduler.py::Scheduler._schedule_waiting; README "Which requests may join".'
LOOK_ADMIT = 'Look at core/scheduler.py::Scheduler._admit; README "Which requests may join".'
LOOK_PREEMPT = 'Look at core/scheduler.py::Scheduler.preempt; README "Running requests come first".'
LOOK_STARTED = 'Look at core/scheduler.py::Scheduler._start and _add; README "Which requests may join".'
LOOK_FINISH = 'Look at core/scheduler.py::Scheduler.finish and _leave; README "The idea: a new batch for every step".'
LOOK_ABORT = 'Look at core/scheduler.py::Scheduler.abort; README "Aborts, failures and slow readers".'
LOOK_RESET = 'Look at core/scheduler.py::Scheduler.reset; README "Aborts, failures and slow readers".'
LOOK_LIFE = 'Look at core/scheduler.py::Scheduler; README "The idea: a new batch for every step".'


def make_scheduler(
    num_usable: int = 1_000,
    block_size: int = 16,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 4_096,
    watermark: float = 0.0,
) -> Scheduler:
    """num_usable: blocks to hand out, without the null block."""
    scheduler = Scheduler(BlockManager(num_usable + 1, block_size), max_num_seqs, max_num_batched_tokens, watermark)
    guard(scheduler)
    return scheduler


def make_request(name: str, num_prompt_tokens: int, max_tokens: int = 100) -> Request:
    """One that no model will see: tokens are counted, not read."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return Request(name, [7] * num_prompt_tokens, params, num_prompt_tokens + max_tokens)


def add(scheduler: Scheduler, lengths: Sequence[int]) -> list[Request]:
    """Queue requests "0", "1", … with prompts of these lengths."""
    requests = [make_request(str(number), length) for number, length in enumerate(lengths)]
    for request in requests:
        scheduler.add_request(request)
    return requests


def compute(output: SchedulerOutput) -> None:
    """What the engine does after the forward pass: all tokens have their keys and values, and there is one more."""
    for request in output.requests:
        request.num_computed_tokens = request.num_tokens
        request.output_token_ids.append(9)


def schedule(scheduler: Scheduler) -> SchedulerOutput:
    """Scheduler.schedule(); if it raises, the test fails and says where to look."""
    try:
        return scheduler.schedule()
    except (NotImplementedError, AssertionError):  # an exercise that is not done yet; a message of its own
        raise
    except Exception as error:
        state = f"running {ids(scheduler.running)!r}, waiting {ids(list(scheduler.waiting))!r}"
        pytest.fail(f"schedule() raised {error!r}, with {state}. {LOOK_PREEMPTING} {LOOK_RUNNING}")


def take_step(scheduler: Scheduler) -> SchedulerOutput:
    output = schedule(scheduler)
    compute(output)
    return output


def ids(requests: Sequence[Request]) -> str:
    return "".join(request.request_id for request in requests)


def check_output(output: SchedulerOutput, expected: dict[str, int], case: str, look: str) -> None:
    """expected: which requests are scheduled, in order, and how many tokens each computes."""
    shares = output.step.requests
    got = dict(zip(ids(output.requests), [share.num_scheduled_tokens for share in shares], strict=True))
    assert list(got.items()) == list(expected.items()), (
        f"{case}: expected request → tokens {expected}, got {got} (preempted: {ids(output.preempted) or 'none'}). "
        f"{look}"
    )
    total = output.total_num_scheduled_tokens
    assert total == sum(expected.values()), f"{case}: total_num_scheduled_tokens is {total}, the shares are {got}."
    rows = [request.row for request in output.requests]
    assert [share.row for share in shares] == rows and len(set(rows)) == len(rows), (
        f"{case}: expected the row of each request, {rows}, all different, got {shares}. {LOOK_STARTED}"
    )


def check_preempted(output: SchedulerOutput, expected: str, case: str) -> None:
    got = ids(output.preempted)
    assert got == expected, f"{case}: expected output.preempted {expected!r}, got {got!r}. {LOOK_PREEMPTING}"


def check_queues(scheduler: Scheduler, running: str, waiting: str, case: str, look: str) -> None:
    got = (ids(scheduler.running), ids(list(scheduler.waiting)))
    assert got == (running, waiting), f"{case}: expected (running, waiting) {(running, waiting)}, got {got}. {look}"
    for request in [*scheduler.running, *scheduler.waiting]:
        name, status = request.request_id, request.status.name
        right = ["RUNNING"] if request in scheduler.running else ["WAITING", "PREEMPTED"]
        assert status in right, f"{case}: expected request {name} to be {' or '.join(right)}, got {status}. {look}"


def check_rows(scheduler: Scheduler, case: str, look: str) -> None:
    """Every row is free or belongs to one running request."""
    free, taken = scheduler.free_rows, [request.row for request in scheduler.running]
    assert sorted([*free, *taken], key=str) == sorted(range(scheduler.max_num_seqs), key=str), (
        f"{case}: each of {scheduler.max_num_seqs} rows is free or taken once, got free {free}, taken {taken}. {look}"
    )


def check_blocks(scheduler: Scheduler, expected: dict[str, int], case: str, look: str) -> None:
    """expected: how many blocks each request holds."""
    blocks = scheduler.blocks
    got = {request_id: len(table) for request_id, table in blocks.block_tables.items() if table}
    assert got == expected, f"{case}: expected request → blocks {expected}, got {got}. {look}"
    assert blocks.num_free_blocks == blocks.num_blocks - 1 - sum(expected.values()), (
        f"{case}: {sum(expected.values())} of {blocks.num_blocks - 1} blocks are held, "
        f"and {blocks.num_free_blocks} are free. {look}"
    )


# Which requests may join


@pytest.mark.parametrize(
    ("limits", "lengths", "expected"),
    [
        (dict(max_num_batched_tokens=1_024, max_num_seqs=3), [800, 800, 10, 10], "0"),  # the 10s must not overtake
        (dict(max_num_batched_tokens=1_024, max_num_seqs=3), [800, 10, 10, 10], "012"),
        (dict(max_num_batched_tokens=1_024), [800, 224, 1], "01"),
        (dict(max_num_batched_tokens=1_024), [800, 225, 1], "0"),
        (dict(max_num_batched_tokens=1_024), [1_024, 1], "0"),
        (dict(max_num_seqs=2), [5, 5, 5], "01"),
        (dict(max_num_seqs=1), [5, 5, 5], "0"),
        (dict(), [5, 800, 1, 90], "0123"),
        (dict(num_usable=10), [64, 64, 64], "01"),
        (dict(num_usable=10), [64, 64, 33, 16], "01"),  # the last would fit, but comes after
        (dict(num_usable=10), [64, 64, 32, 1], "012"),
        (dict(num_usable=10), [160], "0"),
    ],
    ids=str,
)
def test_which_requests_join(limits: dict[str, int], lengths: list[int], expected: str) -> None:
    """From the head of the queue, until one does not fit; the requests behind it wait too."""
    scheduler = make_scheduler(**limits)
    add(scheduler, lengths)
    case = f"{limits}, prompts of {lengths} tokens, first step"
    output = schedule(scheduler)
    check_output(output, {name: lengths[int(name)] for name in expected}, case, LOOK_WAITING)
    waiting = "".join(map(str, range(len(lengths))))[len(expected) :]
    check_queues(scheduler, expected, waiting, case, LOOK_WAITING)
    check_blocks(scheduler, {name: -(-lengths[int(name)] // 16) for name in expected}, case, LOOK_ADMIT)


def test_a_large_prompt_at_the_head_gets_the_next_step() -> None:
    """Budget 1024, prompts of 800, 800, 10 and 10, three slots: one prompt, then a token and the second and a 10."""
    scheduler = make_scheduler(max_num_batched_tokens=1_024, max_num_seqs=3)
    requests = add(scheduler, [800, 800, 10, 10])
    steps = [{"0": 800}, {"0": 1, "1": 800, "2": 10}, {"0": 1, "1": 1, "2": 1}]
    for number, expected in enumerate(steps):
        check_output(take_step(scheduler), expected, f"prompts of 800, 800, 10, 10, step {number}", LOOK_WAITING)
    scheduler.finish(requests[1])
    expected = {"0": 1, "2": 1, "3": 10}
    check_output(take_step(scheduler), expected, "once 1 has ended there is a slot for 3", LOOK_WAITING)


@pytest.mark.parametrize(("length", "joins"), [(7, True), (8, False)])
def test_tokens_of_the_running_count(length: int, joins: bool) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=10)
    first = add(scheduler, [3, 3, 3])
    check_output(take_step(scheduler), {"0": 3, "1": 3, "2": 3}, "budget 10, prompts of 3, 3, 3", LOOK_WAITING)
    scheduler.add_request(make_request("3", length))
    expected = {"0": 1, "1": 1, "2": 1} | ({"3": length} if joins else {})
    case = f"budget 10, three running requests take a token each, a prompt of {length} waits"
    check_output(schedule(scheduler), expected, case, LOOK_WAITING)
    assert first[0].num_computed_tokens == 3, f"schedule() computes nothing. {LOOK_RUNNING}"


def test_a_step_without_requests() -> None:
    scheduler = make_scheduler()
    check_output(schedule(scheduler), {}, "no request waits, none runs", LOOK_LIFE)
    assert not scheduler.has_unfinished_requests, f"no request waits, none runs. {LOOK_LIFE}"
    [request] = add(scheduler, [5])
    assert scheduler.has_unfinished_requests, f"a request waits. {LOOK_LIFE}"
    take_step(scheduler)
    assert scheduler.has_unfinished_requests, f"a request runs. {LOOK_LIFE}"
    scheduler.finish(request)
    assert not scheduler.has_unfinished_requests, f"the only request has ended. {LOOK_LIFE}"


# The watermark


@pytest.mark.parametrize(("num_tokens", "joins"), [(3 * 16, True), (3 * 16 + 1, False), (5 * 16, False)])
def test_an_admission_leaves_the_watermark_free(num_tokens: int, joins: bool) -> None:
    """21 blocks with the null block, 10% of them: two must stay free. The first takes 15 of 20."""
    scheduler = make_scheduler(num_usable=20, watermark=0.1)
    assert scheduler.watermark_blocks == 2, f"10% of 21 blocks: expected 2, got {scheduler.watermark_blocks}."
    add(scheduler, [15 * 16, num_tokens])
    case = f"5 blocks are free, 2 have to stay so, a prompt of {num_tokens} tokens needs {-(-num_tokens // 16)}"
    check_output(schedule(scheduler), {"0": 240} | ({"1": num_tokens} if joins else {}), case, LOOK_ADMIT)
    held = {"0": 15} | ({"1": 3} if joins else {})
    check_blocks(scheduler, held, case + "; a refused request holds nothing", LOOK_ADMIT)


def test_the_watermark_does_not_apply_to_a_request_that_would_run_alone() -> None:
    """Else it would wait forever."""
    scheduler = make_scheduler(num_usable=20, watermark=0.5)
    requests = add(scheduler, [20 * 16, 16])
    case = "10 of 20 blocks have to stay free, a prompt needs all 20, and no request runs"
    check_output(take_step(scheduler), {"0": 320}, case, LOOK_ADMIT)
    scheduler.finish(requests[0])
    check_output(take_step(scheduler), {"1": 16}, "the first has ended, 20 blocks are free", LOOK_ADMIT)


def test_the_watermark_is_for_admission_alone() -> None:
    """A running request may take the last block."""
    scheduler = make_scheduler(num_usable=5, block_size=4, watermark=0.25)
    add(scheduler, [4, 8])
    for step, held in enumerate([{"0": 1, "1": 2}, {"0": 2, "1": 3}]):
        output = take_step(scheduler)
        case = f"one of 5 blocks has to stay free, step {step}"
        got = ids(output.requests)
        assert got == "01", f"{case}: expected requests '01' in the step, got {got!r}. {LOOK_RUNNING}"
        check_blocks(scheduler, held, case, LOOK_RUNNING)


def test_the_watermark_applies_to_a_preempted_request_that_comes_back() -> None:
    """Requests 0, 1 and 2 fill ten blocks of 4, and 2 is preempted. Then 1 ends: 2 would fit, without the watermark."""
    scheduler = make_scheduler(num_usable=10, block_size=4, watermark=0.4)  # 4 of 11 blocks
    first, second, _ = add(scheduler, [4, 8, 8])
    check_output(
        take_step(scheduler), {"0": 4, "1": 8, "2": 8}, "1 + 2 + 2 of 10 blocks, 4 have to stay free", LOOK_ADMIT
    )
    for step in range(1, 5):
        check_output(
            take_step(scheduler), {"0": 1, "1": 1, "2": 1}, f"2 + 3 + 3 of 10 blocks, step {step}", LOOK_RUNNING
        )
    case = "0, 1 and 2 want 3 + 4 + 4 of 10 blocks"
    check_output(take_step(scheduler), {"0": 1, "1": 1}, f"{case}: 2 is preempted", LOOK_RUNNING)
    scheduler.finish(second)
    case = "1 has ended, 7 blocks are free, 4 have to stay so, and 2 wants 4 blocks back"
    check_output(take_step(scheduler), {"0": 1}, case, LOOK_ADMIT)
    scheduler.finish(first)
    check_output(take_step(scheduler), {"2": 13}, "no other request runs: request 2 comes back", LOOK_ADMIT)


def test_one_percent_is_the_default() -> None:
    got = [Scheduler(BlockManager(size, 16), 64, 4_096).watermark_blocks for size in (50, 100, 250)]
    assert got == [0, 1, 2], f"1% of 50, 100 and 250 blocks: expected [0, 1, 2], got {got}. {LOOK_ADMIT}"


# Running requests come first


def test_the_running_come_first_in_their_order() -> None:
    scheduler = make_scheduler()
    add(scheduler, [5, 17, 3])
    take_step(scheduler)
    scheduler.add_request(make_request("3", 6))
    expected = {"0": 1, "1": 1, "2": 1, "3": 6}
    check_output(take_step(scheduler), expected, "three run, one waits", LOOK_RUNNING)
    check_output(take_step(scheduler), dict.fromkeys("0123", 1), "four run", LOOK_RUNNING)


def test_only_a_request_whose_last_block_is_full_gets_one() -> None:
    scheduler = make_scheduler(num_usable=8, block_size=4)
    add(scheduler, [3, 4, 2])
    for step, counts in enumerate([[1, 1, 1], [1, 2, 1], [2, 2, 1], [2, 2, 2]]):
        take_step(scheduler)
        held = {str(number): count for number, count in enumerate(counts)}
        check_blocks(scheduler, held, f"prompts of 3, 4 and 2 in blocks of 4, step {step}", LOOK_PREEMPTING)


def test_the_worker_is_told_of_each_block_once() -> None:
    """A new request with all its tokens; then only the blocks that are new. After a preemption it is new again."""
    scheduler = make_scheduler(num_usable=5, block_size=4)
    first, second = add(scheduler, [3, 5])
    for step, expected in enumerate([[1, 2], [0, 0], [1, 0], [0, 0], [0, 1]]):
        output = take_step(scheduler)
        got = [len(share.new_block_ids) for share in output.step.requests]
        assert got == expected, (
            f"prompts of 3 and 5 in blocks of 4, step {step}: new blocks {expected}, got {got}. {LOOK_STARTED}"
        )
        new = [(each.row, each.token_ids, each.num_prompt_tokens) for each in output.step.new_requests]
        assert new == ([(first.row, [7] * 3, 3), (second.row, [7] * 5, 5)] if step == 0 else []), (
            f"step {step}: both requests are new in step 0 and in no other, got {new}. {LOOK_STARTED}"
        )
    output = take_step(scheduler)  # 0 has 8 tokens, 1 has 10
    check_output(output, {"0": 1, "1": 1}, "2 + 3 of 5 blocks, step 5", LOOK_RUNNING)
    check_output(take_step(scheduler), {"0": 1}, "0 wants a third block: 1 is preempted", LOOK_RUNNING)
    scheduler.finish(first)
    output = take_step(scheduler)
    got_new = [(new.token_ids, new.num_prompt_tokens) for new in output.step.new_requests]
    expected_new = [([7] * 5 + [9] * 6, 5)]
    assert got_new == expected_new, (
        f"request 1 comes back with a prompt of 5 and 6 tokens of output, new_requests: expected (tokens, prompt) "
        f"{expected_new}, got {got_new}. {LOOK_STARTED}"
    )
    sent = output.step.requests[-1].new_block_ids
    assert sent == scheduler.blocks.block_tables["1"], (
        f"it comes back: all its blocks are new, got {sent}. {LOOK_STARTED}"
    )


def test_the_latest_is_preempted_first() -> None:
    """Three fill three blocks; in the next step all want a second one, and there is room for the first alone."""
    scheduler = make_scheduler(num_usable=3, block_size=4)
    add(scheduler, [4, 4, 4, 4])
    take_step(scheduler)
    output = schedule(scheduler)
    case = "requests 0, 1 and 2 want a second block, and none is free"
    check_output(output, {"0": 1}, case, LOOK_RUNNING)
    check_preempted(output, "21", f"{case}: 2 is preempted for 0, then 1 for itself")
    check_queues(scheduler, "0", "123", f"{case}: the preempted go to the head of the queue", LOOK_PREEMPT)
    check_blocks(scheduler, {"0": 2}, case, LOOK_PREEMPT)
    got = scheduler.num_preemptions
    assert got == 2, f"{case}: expected num_preemptions 2, got {got}. {LOOK_PREEMPT}"


def test_a_request_preempted_in_this_step_is_not_scheduled_in_it() -> None:
    """Request 2 is preempted for 0. It comes later in the loop, and holds no block table any more."""
    scheduler = make_scheduler(num_usable=3, block_size=4)
    add(scheduler, [4, 2, 4])
    take_step(scheduler)
    output = schedule(scheduler)
    case = "0 wants a second block, 1 does not, 2 has just been preempted for 0"
    check_output(output, {"0": 1, "1": 1}, case, LOOK_RUNNING)
    check_preempted(output, "2", case)
    check_queues(scheduler, "01", "2", case, LOOK_RUNNING)
    check_blocks(scheduler, {"0": 2, "1": 1}, case, LOOK_RUNNING)


def test_the_latest_is_preempted_even_if_it_is_the_one_that_asks() -> None:
    """Then the loop ends: no earlier request is preempted for a later one."""
    scheduler = make_scheduler(num_usable=3, block_size=4)
    add(scheduler, [2, 2, 4])
    take_step(scheduler)
    output = schedule(scheduler)
    case = "2 wants a second block, none is free, and it is the latest"
    check_output(output, {"0": 1, "1": 1}, case, LOOK_RUNNING)
    check_preempted(output, "2", case)
    check_queues(scheduler, "01", "2", case, LOOK_RUNNING)


def test_only_as_many_are_preempted_as_must_be() -> None:
    """Request 2 gives two blocks back: enough for 0 and for 1."""
    scheduler = make_scheduler(num_usable=4, block_size=4)
    add(scheduler, [4, 4, 7])
    take_step(scheduler)
    output = schedule(scheduler)
    case = "0 and 1 want a second block, 2 holds two"
    check_output(output, {"0": 1, "1": 1}, case, LOOK_RUNNING)
    check_preempted(output, "2", case)
    check_blocks(scheduler, {"0": 2, "1": 2}, case, LOOK_RUNNING)


def test_a_free_block_is_taken_before_a_request_is_preempted() -> None:
    scheduler = make_scheduler(num_usable=4, block_size=4)
    add(scheduler, [4, 4])
    take_step(scheduler)
    output = take_step(scheduler)
    check_output(output, {"0": 1, "1": 1}, "two blocks are free, two requests want one each", LOOK_RUNNING)
    check_preempted(output, "", "two blocks are free, two requests want one each")


def test_no_request_is_admitted_in_a_step_with_a_preemption() -> None:
    """A small request waits, and two blocks are free. But the preempted request is ahead of it, and needs four."""
    scheduler = make_scheduler(num_usable=4, block_size=4)
    first, _ = add(scheduler, [4, 12])
    take_step(scheduler)
    scheduler.add_request(make_request("2", 4))
    case = "1 is preempted for 0, then two blocks are free; 2 needs one, and 1 is ahead of it with four"
    check_output(take_step(scheduler), {"0": 1}, case, LOOK_WAITING)
    check_queues(scheduler, "0", "12", case, LOOK_PREEMPT)
    scheduler.finish(first)
    check_output(take_step(scheduler), {"1": 13}, "0 has ended: 1 takes all four blocks, and 2 waits", LOOK_WAITING)


# Preemption


def test_what_a_preempted_request_keeps() -> None:
    """Prompts of 4, 6 and 4 in six blocks of 4. In the fourth step 1 wants a third block, and 2 is preempted."""
    scheduler = make_scheduler(num_usable=6, block_size=4, max_num_seqs=3)
    third = add(scheduler, [4, 6, 4])[2]
    scheduler.add_request(make_request("3", 4))
    for _ in range(4):
        take_step(scheduler)
    case = "request 2, 4 + 3 tokens, is preempted"
    check_queues(scheduler, "01", "23", f"{case}: it goes to the head of the queue, before 3", LOOK_PREEMPT)
    assert third.num_computed_tokens == 0, (
        f"{case}: its keys and values are gone: expected num_computed_tokens 0, got {third.num_computed_tokens}. "
        f"{LOOK_PREEMPT}"
    )
    assert third.output_token_ids == [9] * 3, (
        f"{case}: the tokens are known, only their keys and values are gone: expected {[9] * 3}, got "
        f"{third.output_token_ids}. {LOOK_PREEMPT}"
    )
    check_blocks(scheduler, {"0": 2, "1": 3}, f"{case}: its blocks are free", LOOK_PREEMPT)
    check_rows(scheduler, f"{case}: its row is free", LOOK_PREEMPT)
    got = scheduler.num_preemptions
    assert got == 1, f"{case}: expected num_preemptions 1, got {got}. {LOOK_PREEMPT}"


def test_the_earliest_of_those_preempted_is_at_the_head() -> None:
    """2 is preempted for 0, then 1 for itself. 3 came later."""
    scheduler = make_scheduler(num_usable=3, block_size=4, max_num_seqs=3)
    add(scheduler, [4, 4, 4, 4])
    take_step(scheduler)
    take_step(scheduler)
    check_queues(scheduler, "0", "123", "2, then 1 were preempted, and 3 waits since the beginning", LOOK_PREEMPT)


def test_a_preempted_request_by_hand() -> None:
    """Two prompts of 80 tokens fill ten blocks of 16; at the 81st token the second is preempted."""
    scheduler = make_scheduler(num_usable=10)
    first, second = add(scheduler, [80, 80])
    check_output(take_step(scheduler), {"0": 80, "1": 80}, "two prompts of 80 in ten blocks", LOOK_WAITING)
    output = take_step(scheduler)
    check_output(output, {"0": 1}, "both want a sixth block, none is free", LOOK_RUNNING)
    check_preempted(output, "1", "both want a sixth block, none is free")
    for _ in range(20):
        check_output(take_step(scheduler), {"0": 1}, "1 needs six blocks, 0 leaves it four or fewer", LOOK_WAITING)
    scheduler.finish(first)
    check_output(take_step(scheduler), {"1": 81}, "1 comes back and computes its prompt and one token", LOOK_WAITING)
    check_blocks(scheduler, {"1": 6}, "81 tokens in blocks of 16", LOOK_ADMIT)
    check_output(take_step(scheduler), {"1": 1}, "and goes on", LOOK_RUNNING)
    assert len(second.output_token_ids) == 3, f"expected 3 tokens, got {second.output_token_ids}. {LOOK_PREEMPT}"
    got = scheduler.num_preemptions
    assert got == 1, f"1 was preempted once: expected num_preemptions 1, got {got}. {LOOK_PREEMPT}"


# The end of a request


def test_row_and_blocks_are_free_for_the_very_next_step() -> None:
    scheduler = make_scheduler(num_usable=4, block_size=4, max_num_seqs=2)
    first, *_ = add(scheduler, [4, 4, 8])
    check_output(take_step(scheduler), {"0": 4, "1": 4}, "two slots", LOOK_WAITING)
    scheduler.finish(first)
    check_queues(scheduler, "1", "2", "request 0 has ended", LOOK_FINISH)
    check_blocks(scheduler, {"1": 1}, "request 0 has ended", LOOK_FINISH)
    assert first.row is None, f"request 0 has ended and still has row {first.row}. {LOOK_FINISH}"
    check_output(take_step(scheduler), {"1": 1, "2": 8}, "the step after request 0 has ended", LOOK_FINISH)


@pytest.mark.parametrize(("state", "name"), [("waiting", "2"), ("running", "0"), ("running", "1"), ("preempted", "1")])
def test_abort_wherever_it_is(state: str, name: str) -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    requests = add(scheduler, [5, 20, 5, 5])
    take_step(scheduler)
    if state == "preempted":
        scheduler.preempt(scheduler.running[-1])
    found = scheduler.abort(iter([name]))
    case = f"request {name} is aborted, {state}"
    assert found == [requests[int(name)]], f"{case}: expected it back, got {ids(found)!r}. {LOOK_ABORT}"
    assert found[0].status is RequestStatus.FINISHED_ABORTED, f"{case}: its status is {found[0].status}. {LOOK_ABORT}"
    left = [*scheduler.running, *scheduler.waiting]
    assert ids(left) == "0123".replace(name, ""), f"{case}: {ids(left)} are left, in this order. {LOOK_ABORT}"
    held = {request.request_id: -(-len(request.prompt_token_ids) // 16) for request in scheduler.running}
    check_blocks(scheduler, held, case, LOOK_ABORT)
    assert scheduler.abort([name]) == [], f"{case}, a second time: it is no longer there. {LOOK_ABORT}"
    names = {request.request_id for request in take_step(scheduler).requests}
    assert len(names) == 2 and name not in names, f"{case}: in the next step are {names}. {LOOK_ABORT}"


def test_abort_of_several_of_ended_and_of_unknown_requests() -> None:
    scheduler = make_scheduler(max_num_seqs=3)
    first, *_ = add(scheduler, [5] * 6)
    take_step(scheduler)
    scheduler.finish(first)
    assert scheduler.abort([]) == [], f"no id was given. {LOOK_ABORT}"
    found = scheduler.abort(["0", "unknown", "1", "4", "5", "1"])
    got = "".join(sorted(ids(found)))
    assert got == "145", f"0 has ended, 1 runs, 4 and 5 wait: expected 145 back, got {got}. {LOOK_ABORT}"
    check_queues(scheduler, "2", "3", "0 has ended, 1, 4 and 5 were aborted", LOOK_ABORT)
    check_blocks(scheduler, {"2": 1}, "0 has ended, 1, 4 and 5 were aborted", LOOK_ABORT)


def test_reset_removes_all_requests_and_frees_all_blocks() -> None:
    """What the engine does after a failed step. Those that ran come first; one of the waiting was preempted."""
    scheduler = make_scheduler(max_num_seqs=2)
    requests = add(scheduler, [5, 20, 5, 5])
    take_step(scheduler)
    scheduler.preempt(requests[1])
    found = scheduler.reset()
    assert ids(found) == "0123", f"expected 0123 back, got {ids(found)}. {LOOK_RESET}"
    check_queues(scheduler, "", "", "after reset()", LOOK_RESET)
    check_blocks(scheduler, {}, "after reset()", LOOK_RESET)
    assert {request.status for request in found} == {RequestStatus.FINISHED_ABORTED}, f"got {found}. {LOOK_RESET}"
    add(scheduler, [4, 4, 4])
    check_output(take_step(scheduler), {"0": 4, "1": 4}, "after reset() both rows are free", LOOK_RESET)


# Random lives


def answer_alone(prompt: list[int], max_tokens: int) -> list[int]:
    output: list[int] = []
    while len(output) < max_tokens and END not in output:
        output.append(next_token(prompt + output))
    return output


class Life(RuleBasedStateMachine):
    """Arrivals, aborts and steps in any order. The scripted worker knows of a request only what it was sent."""

    num_steps = num_preemptions = num_aborted = 0  # of all lives together

    @initialize(
        num_usable=st.integers(4, 16),
        block_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 6),
        spare_tokens=st.integers(0, 20),
        watermark=st.sampled_from([0.0, 0.01, 0.1, 0.3]),
    )
    def start(self, num_usable: int, block_size: int, max_num_seqs: int, spare_tokens: int, watermark: float) -> None:
        self.capacity = num_usable * block_size
        self.budget = min(self.capacity, 24) + max_num_seqs + spare_tokens  # any request fits into a step
        self.scheduler = make_scheduler(num_usable, block_size, max_num_seqs, self.budget, watermark)
        self.worker = ScriptedWorker(block_size)
        self.arrivals: list[Request] = []
        self.first_scheduled: list[str] = []
        self.ended: dict[str, list[int]] = {}
        self.aborted: set[str] = set()

    @rule(length=st.integers(1, 16), max_tokens=st.integers(1, 16))
    def arrive(self, length: int, max_tokens: int) -> None:
        length = min(length, self.capacity)
        max_tokens = max(1, min(max_tokens, self.capacity + 1 - length))  # the last token is never stored
        number = len(self.arrivals)
        request = make_request(str(number), length, max_tokens)
        request.prompt_token_ids[:] = [(number * 31 + position * 7) % 256 for position in range(length)]
        self.arrivals.append(request)
        self.scheduler.add_request(request)

    @rule(length=st.integers(1, 16), max_tokens=st.integers(1, 16), count=st.integers(2, 5))
    def arrive_together(self, length: int, max_tokens: int, count: int) -> None:
        for _ in range(count):
            self.arrive(length, max_tokens)

    @precondition(lambda self: self.arrivals)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """Any request so far: waiting, running, preempted, ended, aborted."""
        request = data.draw(st.sampled_from(self.arrivals), "request")
        there = request in self.scheduler.running or request in self.scheduler.waiting
        found = self.scheduler.abort([request.request_id])
        assert found == [request] * there, f"abort({request.request_id}): got {ids(found)!r}. {LOOK_ABORT}"
        if there:
            self.aborted.add(request.request_id)
            Life.num_aborted += 1

    @rule(count=st.integers(1, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def step(self) -> None:
        """What the engine does in a step, with the scripted model."""
        waited = list(self.scheduler.waiting)
        output = schedule(self.scheduler)
        self.check_schedule(output, waited)
        sampled = self.worker.execute(output.step).token_ids
        for request, token in zip(output.requests, sampled, strict=True):
            request.num_computed_tokens = request.num_tokens
            request.output_token_ids.append(token)
            if token == END or len(request.output_token_ids) == request.params.max_tokens:
                request.finish("stop" if token == END else "length", None)
                assert request.request_id not in self.ended, f"{request.request_id} ends a second time. {LOOK_LIFE}"
                self.ended[request.request_id] = request.output_token_ids
                self.scheduler.finish(request)
        self.check_state()
        Life.num_steps += 1
        Life.num_preemptions += len(output.preempted)

    def check_schedule(self, output: SchedulerOutput, waited: list[Request]) -> None:
        scheduler, names = self.scheduler, [request.request_id for request in output.requests]
        num_scheduled_tokens = [share.num_scheduled_tokens for share in output.step.requests]
        total = sum(num_scheduled_tokens)
        assert total <= self.budget, f"{total} tokens are scheduled, the budget is {self.budget}. {LOOK_WAITING}"
        assert len(set(names)) == len(names), f"a request is scheduled twice: {names}. {LOOK_LIFE}"
        assert names == [request.request_id for request in scheduler.running], (
            f"all running requests are scheduled, in their order: scheduled {names}, running "
            f"{[request.request_id for request in scheduler.running]}. {LOOK_RUNNING}"
        )
        waiting = ids(list(scheduler.waiting))
        assert names or not waiting, (
            f"no request runs, {waiting} wait: expected the first one in the step, got none. {LOOK_WAITING}"
        )
        for request, num_scheduled in zip(output.requests, num_scheduled_tokens, strict=True):
            num_new = request.num_tokens - request.num_computed_tokens
            assert num_scheduled == num_new > 0, (
                f"request {request.request_id} has {num_new} new tokens, {num_scheduled} are scheduled. {LOOK_LIFE}"
            )
            held = len(scheduler.blocks.block_tables[request.request_id])
            expected = scheduler.blocks.num_blocks_for(request.num_tokens)
            assert held == expected, (
                f"request {request.request_id} holds {held} blocks for {request.num_tokens} tokens "
                f"(block_size={scheduler.blocks.block_size}), expected {expected}. {LOOK_RUNNING}"
            )
        admitted = [request for request in waited if request in output.requests]
        assert admitted == waited[: len(admitted)], f"{names}: a request has overtaken another. {LOOK_WAITING}"
        assert not (admitted and output.preempted), f"admitted in a step with a preemption: {names}. {LOOK_WAITING}"
        if admitted and len(output.requests) > 1:
            free, watermark = scheduler.blocks.num_free_blocks, scheduler.watermark_blocks
            assert free >= watermark, (
                f"after an admission: expected at least {watermark} free blocks (the watermark), got {free}. "
                f"{LOOK_ADMIT}"
            )
        self.first_scheduled += [name for name in names if name not in self.first_scheduled]

    def check_state(self) -> None:
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        used, free = blocks.num_used_blocks, blocks.num_free_blocks
        assert used + free == blocks.num_blocks - 1, (
            f"used {used} + free {free} blocks: expected {blocks.num_blocks - 1} together. {LOOK_LIFE}"
        )
        owned = [*blocks.free_blocks, *(block for table in blocks.block_tables.values() for block in table)]
        assert len(set(owned)) == len(owned), f"a block has two owners: {blocks.block_tables}. {LOOK_LIFE}"
        assert NULL_BLOCK not in owned, f"the null block has an owner: {blocks.block_tables}. {LOOK_LIFE}"
        running, waiting = ([int(r.request_id) for r in queue] for queue in (scheduler.running, scheduler.waiting))
        owners = {int(request_id) for request_id, table in blocks.block_tables.items() if table}
        assert owners <= set(running), f"{running} run, {sorted(owners)} hold blocks. {LOOK_PREEMPT}"
        assert len(running) <= scheduler.max_num_seqs, f"{running} run, {scheduler.max_num_seqs} may. {LOOK_WAITING}"
        assert not set(running) & set(waiting), (
            f"expected each request in one queue, got running {running}, waiting {waiting}. {LOOK_PREEMPT}"
        )
        rows = [*scheduler.free_rows, *(request.row for request in scheduler.running)]
        assert sorted(rows) == list(range(scheduler.max_num_seqs)), (  # type: ignore[type-var]
            f"each row is free or has one owner: free {scheduler.free_rows}, all {rows}. {LOOK_FINISH}"
        )
        assert running + waiting == sorted(running + waiting), (
            f"first come, first served: expected the running and then the waiting in the order of arrival, got "
            f"{running} and {waiting}. {LOOK_PREEMPT}"
        )
        gone = {int(name) for name in self.aborted | set(self.ended)}
        assert set(running + waiting) | gone == set(range(len(self.arrivals))), (
            f"{len(self.arrivals)} requests have arrived: expected each to run, to wait or to have ended, got running "
            f"{running}, waiting {waiting}, ended {sorted(gone)}. {LOOK_LIFE}"
        )

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "scheduler"):
            self.check_state()

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        limit = 1 + sum(request.params.max_tokens for request in self.arrivals) * 2
        for _ in range(limit):
            if not self.scheduler.has_unfinished_requests:
                break
            self.step()
        left = [request.request_id for request in [*self.scheduler.running, *self.scheduler.waiting]]
        assert not left, f"requests {left} have not ended after {limit} steps. {LOOK_LIFE}"
        assert self.first_scheduled == sorted(self.first_scheduled, key=int), (
            f"first come, first served: requests began in the order {self.first_scheduled}. {LOOK_WAITING}"
        )
        blocks = self.scheduler.blocks
        assert blocks.num_free_blocks == blocks.num_blocks - 1, (
            f"all have ended, {blocks.num_used_blocks} blocks are not free. {LOOK_FINISH}"
        )
        for request in self.arrivals:
            if request.request_id in self.aborted:
                assert request.request_id not in self.ended, f"{request.request_id} was aborted and ended. {LOOK_ABORT}"
                continue
            expected = answer_alone(request.prompt_token_ids, request.params.max_tokens)
            got = self.ended.get(request.request_id)
            assert got == expected, (
                f"request {request.request_id} among others: expected what it gets alone, {expected}, got {got}. "
                f"{LOOK_PREEMPT}"
            )


def test_random_lives() -> None:
    """Whatever arrives, in whatever order: each request gets the answer it gets alone, exactly once."""
    Life.num_steps = Life.num_preemptions = Life.num_aborted = 0
    run_lives(Life, max_examples=60, stateful_step_count=25, seed=0)
    counts = (Life.num_steps, Life.num_preemptions, Life.num_aborted)
    assert min(a / b for a, b in zip(counts, (2_000, 100, 50), strict=True)) >= 1, (
        f"(steps, preemptions, aborts) of all lives together are {counts}: too few to prove anything"
    )
