"""core/scheduler.py: what can be decided about a step while the one before it runs. No model: tokens are counted."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from part05_async_scheduling.core.block_manager import BlockManager
from part05_async_scheduling.core.request import Request, RequestStatus
from part05_async_scheduling.core.scheduler import Scheduler, SchedulerOutput
from part05_async_scheduling.messages import NewRequest, StepInput
from tests.guards import guard
from tests.scripted import END, ids, params_for, shares

LOOK_ADD = 'Look at core/scheduler.py::Scheduler._add; README "Placeholders".'
LOOK_LENGTH = 'Look at core/scheduler.py::Scheduler._schedule_running; README "Placeholders".'
LOOK_RUNNING = 'Look at core/scheduler.py::Scheduler._schedule_running; README "Placeholders".'
LOOK_PREEMPT = 'Look at core/scheduler.py::Scheduler.preempt; README "Placeholders".'
LOOK_FINISH = 'Look at core/scheduler.py::Scheduler.finish; README "Placeholders".'
LOOK_SENT = 'Look at core/scheduler.py::Scheduler._start, _add, finish and _leave; README "The token buffer".'
LOOK_WAITING = 'Look at core/scheduler.py::Scheduler._schedule_waiting; README of part 4, "Which requests may join".'
WORD = 9  # any token but END


def make_scheduler(
    num_usable: int = 1_000, block_size: int = 16, max_num_seqs: int = 64, max_num_batched_tokens: int = 4_096
) -> Scheduler:
    """num_usable: blocks to hand out, without the null block."""
    scheduler = Scheduler(BlockManager(num_usable + 1, block_size), max_num_seqs, max_num_batched_tokens, watermark=0.0)
    guard(scheduler)
    return scheduler


def make_request(name: str, num_prompt_tokens: int, max_tokens: int = 100, max_num_tokens: int = 10_000) -> Request:
    most = min(num_prompt_tokens + max_tokens, max_num_tokens)
    return Request(name, [7] * num_prompt_tokens, params_for(max_tokens), most)


def add(scheduler: Scheduler, lengths: Sequence[int], max_tokens: int = 100) -> list[Request]:
    """Queue requests "0", "1", … with prompts of these lengths."""
    requests = [make_request(str(number), length, max_tokens) for number, length in enumerate(lengths)]
    for request in requests:
        scheduler.add_request(request)
    return requests


def land(scheduler: Scheduler, output: SchedulerOutput, token_ids: Sequence[int] | None = None) -> None:
    """What the engine does when a step's tokens have arrived."""
    for request, token_id in zip(output.requests, token_ids or [WORD] * len(output.requests), strict=True):
        request.num_output_placeholders -= 1
        if request.status.is_finished:
            continue
        request.output_token_ids.append(token_id)
        if token_id == END or request.num_tokens >= request.max_num_tokens:
            request.finish("stop" if token_id == END else "length", None)
            scheduler.finish(request)


def schedule(scheduler: Scheduler, case: str, look: str) -> SchedulerOutput:
    """A step, where a mistake may make schedule() raise."""
    try:
        return scheduler.schedule()
    except LookupError as error:
        pytest.fail(f"{case}: schedule() raised {error!r}. {look}")


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


def counts(request: Request) -> dict[str, int]:
    return {
        "num_tokens": request.num_tokens,
        "num_computed_tokens": request.num_computed_tokens,
        "num_output_placeholders": request.num_output_placeholders,
        "num_expected_tokens": request.num_expected_tokens,
    }


def check_counts(request: Request, expected: tuple[int, int, int], case: str, look: str) -> None:
    """expected: num_tokens, num_computed_tokens, num_output_placeholders."""
    num_tokens, num_computed, num_placeholders = expected
    want = dict(zip(counts(request), (*expected, num_tokens + num_placeholders), strict=True))
    assert counts(request) == want, (
        f"{case}: request {request.request_id}: expected {want}, got {counts(request)}. {look}"
    )


def check_output(output: SchedulerOutput, expected: dict[str, tuple[int, int]], case: str, look: str) -> None:
    """expected: which requests are scheduled, in order: (computed before, computed now)."""
    got = [
        (request.request_id, (share.num_computed_tokens, share.num_scheduled_tokens))
        for request, share in shares(output)
    ]
    assert got == list(expected.items()), (
        f"{case}: expected request → (num_computed_tokens, num_scheduled_tokens) {list(expected.items())}, got {got} "
        f"(preempted: {ids(output.preempted) or 'none'}). {look}"
    )
    total = sum(now for _, now in expected.values())
    assert output.total_num_scheduled_tokens == total, (
        f"{case}: {output.total_num_scheduled_tokens} tokens, not {total}"
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


# Tokens in flight


def test_a_scheduled_step_counts_as_computed() -> None:
    scheduler = make_scheduler()
    [request] = add(scheduler, [5])
    first = scheduler.schedule()
    check_output(first, {"0": (0, 5)}, "a prompt of 5, first step", LOOK_ADD)
    check_counts(request, (5, 5, 1), "a prompt of 5, after the first schedule()", LOOK_ADD)
    second = scheduler.schedule()
    check_output(second, {"0": (5, 1)}, "the first step is in flight, its token is the input of the second", LOOK_ADD)
    check_counts(request, (5, 6, 2), "two steps in flight", LOOK_ADD)
    land(scheduler, first)
    check_counts(request, (6, 6, 1), "the first step's token has arrived", LOOK_ADD)
    third = scheduler.schedule()
    check_output(third, {"0": (6, 1)}, "the second step is in flight, its token is the input of the third", LOOK_ADD)
    check_counts(request, (6, 7, 2), "two steps in flight", LOOK_ADD)
    land(scheduler, second)
    land(scheduler, third)
    check_counts(request, (8, 7, 0), "all tokens have arrived", LOOK_ADD)
    check_output(scheduler.schedule(), {"0": (7, 1)}, "nothing is in flight", LOOK_ADD)


def test_a_scheduled_step_is_not_changed_by_the_next() -> None:
    """Its numbers are needed again when its results arrive."""
    scheduler = make_scheduler()
    add(scheduler, [5, 3])
    first = scheduler.schedule()
    scheduler.add_request(make_request("2", 4))
    second = scheduler.schedule()
    check_output(first, {"0": (0, 5), "1": (0, 3)}, "the first step, after the second was scheduled", LOOK_ADD)
    check_output(second, {"0": (5, 1), "1": (3, 1), "2": (0, 4)}, "one joins while a step is in flight", LOOK_ADD)


def test_one_step_at_a_time() -> None:
    """The same rules, when each step has ended before the next is scheduled."""
    scheduler = make_scheduler()
    [request] = add(scheduler, [5], max_tokens=3)
    for number, expected in enumerate([(0, 5), (5, 1), (6, 1)]):
        check_output(take_step(scheduler), {"0": expected}, f"step {number} of three", LOOK_ADD)
    assert not scheduler.has_unfinished_requests, f"three tokens are out, and it has not ended. {LOOK_FINISH}"
    check_counts(request, (8, 7, 0), "three tokens are out", LOOK_ADD)


@pytest.mark.parametrize(("length", "expected"), [(3, [1, 1, 2, 2]), (4, [1, 2, 2, 2]), (5, [2, 2, 2, 2])])
def test_blocks_are_allocated_for_tokens_in_flight(length: int, expected: list[int]) -> None:
    """The next step stores the key of the token in flight. It may be the first one of a new block (block_size=4)."""
    scheduler = make_scheduler(block_size=4)
    add(scheduler, [length])
    in_flight = None
    for number, num_blocks in enumerate(expected):
        output = scheduler.schedule()
        case = f"prompt of {length}, block_size=4, step {number}, the one before it is in flight"
        check_blocks(scheduler, {"0": num_blocks}, case, LOOK_RUNNING)
        if in_flight is not None:
            land(scheduler, in_flight)
        in_flight = output


def test_with_all_last_tokens_in_flight_the_step_is_empty() -> None:
    scheduler = make_scheduler()
    add(scheduler, [5], max_tokens=1)
    first, second = scheduler.schedule(), scheduler.schedule()
    check_output(second, {}, "the only token of the only request is in flight", LOOK_LENGTH)
    assert scheduler.has_unfinished_requests, f"its token has not arrived yet. {LOOK_LENGTH}"
    land(scheduler, first)
    assert not scheduler.has_unfinished_requests, f"its token has arrived. {LOOK_FINISH}"


# Placeholders


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    ("length", "max_tokens", "max_num_tokens", "expected"),
    [(5, 1, 64, 1), (5, 2, 64, 2), (5, 3, 64, 3), (5, 9, 64, 9), (5, 9, 8, 3), (7, 9, 8, 1), (1, 100, 8, 7)],
)
def test_an_end_by_length_is_foreseen(
    length: int, max_tokens: int, max_num_tokens: int, expected: int, depth: int
) -> None:
    """By max_tokens, or by the end of the context. No position is wasted, however many steps are in flight."""
    scheduler, in_flight, num_scheduled = make_scheduler(), list[SchedulerOutput](), 0
    request = make_request("0", length, max_tokens, max_num_tokens)
    other = make_request("1", 4, max_tokens=20)
    for each in (request, other):
        scheduler.add_request(each)
    for step in range(60):
        if not scheduler.has_unfinished_requests:
            break
        output = scheduler.schedule()
        if output.requests:
            in_flight.append(output)
        num_scheduled += request in output.requests
        assert other in output.requests or step >= 20, (
            f"step {step}: request 0 waits for its last token, and request 1 is not scheduled either. {LOOK_LENGTH}"
        )
        if len(in_flight) == depth or not output.requests:
            land(scheduler, in_flight.pop(0))
    case = f"prompt of {length}, max_tokens={max_tokens}, a context of {max_num_tokens}, {depth} steps at a time"
    assert num_scheduled == expected, (
        f"{case}: expected to be in {expected} steps, one for each token, got {num_scheduled}. {LOOK_LENGTH}"
    )
    assert len(request.output_token_ids) == expected, f"{case}: got {request.output_token_ids}. {LOOK_LENGTH}"
    check_counts(request, (length + expected, length + expected - 1, 0), case, LOOK_LENGTH)
    check_blocks(scheduler, {}, f"{case}, all have ended", LOOK_FINISH)


def test_a_request_whose_last_token_is_in_flight_keeps_its_row_and_blocks() -> None:
    """It still runs: its blocks are being written."""
    scheduler = make_scheduler(max_num_seqs=2)
    scheduler.add_request(make_request("0", 20, max_tokens=1))
    scheduler.add_request(make_request("1", 20))
    scheduler.add_request(make_request("2", 20))
    first, second = scheduler.schedule(), scheduler.schedule()
    check_output(second, {"1": (20, 1)}, "0 has its only token in flight", LOOK_LENGTH)
    check_queues(scheduler, "01", "2", "0 has its only token in flight", LOOK_LENGTH)
    check_blocks(scheduler, {"0": 2, "1": 2}, "0 has its only token in flight", LOOK_LENGTH)
    land(scheduler, first)
    check_queues(scheduler, "1", "2", "0 has its only token", LOOK_FINISH)
    check_output(scheduler.schedule(), {"1": (21, 1), "2": (0, 20)}, "0 has ended", LOOK_FINISH)


def test_a_request_whose_last_token_is_in_flight_needs_no_block_and_can_be_preempted() -> None:
    """Blocks of 4, two of them; 0 is at the edge of its block, and 1 has its last token in flight."""
    scheduler = make_scheduler(num_usable=2, block_size=4)
    scheduler.add_request(make_request("0", 4))
    scheduler.add_request(make_request("1", 4, max_tokens=1))
    first, second = scheduler.schedule(), scheduler.schedule()
    check_preempted(second, ["1"], "0 wants a second block, and none is free")
    check_output(second, {"0": (4, 1)}, "1 was preempted with its last token in flight", LOOK_RUNNING)
    land(scheduler, first)
    check_queues(scheduler, "0", "", "1 has ended, by the token that was in flight", LOOK_FINISH)
    check_blocks(scheduler, {"0": 2}, "1 has ended while it waited", LOOK_FINISH)
    check_output(scheduler.schedule(), {"0": (5, 1)}, "1 has ended while it waited", LOOK_FINISH)


def test_an_end_of_sequence_costs_one_step_too_many() -> None:
    """The third of up to ten tokens ends it; by then the fourth step was launched with it."""
    scheduler = make_scheduler()
    [request, _] = add(scheduler, [5, 5], max_tokens=10)
    outputs = [scheduler.schedule()]
    for number in range(4):
        outputs.append(scheduler.schedule())
        is_end = number == 2
        tokens = [END if is_end and each is request else WORD for each in outputs[number].requests]
        land(scheduler, outputs[number], tokens)
    in_steps = [number for number, output in enumerate(outputs) if request in output.requests]
    assert in_steps == [0, 1, 2, 3], (
        f"its third token ends it: expected to be in steps [0, 1, 2, 3], one too many, got {in_steps}. {LOOK_FINISH}"
    )
    got = (request.output_token_ids, request.num_output_placeholders)
    expected = ([WORD, WORD, END], 0)
    assert got == expected, f"it has ended, (tokens, placeholders): expected {expected}, got {got}. {LOOK_ADD}"
    check_blocks(scheduler, {"1": 1}, "request 0 has ended", LOOK_FINISH)


# Preempted with a token in flight


def test_preempted_between_launch_and_result() -> None:
    """Two prompts of 8 fill four blocks of 4. At the ninth token both need one more, and the later is preempted."""
    scheduler = make_scheduler(num_usable=4, block_size=4)
    first, second = add(scheduler, [8, 8])
    before = scheduler.schedule()
    after = scheduler.schedule()
    check_preempted(after, ["1"], "0 wants a third block, and none is free")
    check_output(after, {"0": (8, 1)}, "1 is preempted", LOOK_RUNNING)
    check_counts(second, (8, 0, 1), "preempted, its first token is in flight", LOOK_PREEMPT)
    check_queues(scheduler, "0", "1", "1 is preempted", LOOK_PREEMPT)
    land(scheduler, before, [WORD, 5])
    check_counts(second, (9, 0, 0), "preempted, its token has arrived", LOOK_PREEMPT)
    assert second.output_token_ids == [5], f"expected its token, got {second.output_token_ids}. {LOOK_PREEMPT}"
    land(scheduler, after)
    scheduler.abort(["0"])
    check_output(scheduler.schedule(), {"1": (0, 9)}, "it comes back with the token that was in flight", LOOK_ADD)
    check_counts(second, (9, 9, 1), "it comes back", LOOK_ADD)


def test_a_preempted_request_waits_for_its_token() -> None:
    """Until then its tokens are not known. Later requests do not overtake it."""
    scheduler = make_scheduler(max_num_seqs=2)
    requests = add(scheduler, [8, 8, 8])
    before = scheduler.schedule()
    scheduler.preempt(requests[1])
    check_output(scheduler.schedule(), {"0": (8, 1)}, "1 was preempted, and its first token is in flight", LOOK_WAITING)
    check_queues(scheduler, "0", "12", "1 was preempted, and its first token is in flight", LOOK_WAITING)
    land(scheduler, before)
    check_output(
        scheduler.schedule(), {"0": (9, 1), "1": (0, 9)}, "1 was preempted, its token has arrived", LOOK_WAITING
    )


def test_the_latest_is_preempted_and_each_only_once() -> None:
    """Three at the edge of their blocks, none free: the first takes the third's block; the second preempts itself."""
    scheduler = make_scheduler(num_usable=3, block_size=4)
    add(scheduler, [4, 4, 4])
    first = scheduler.schedule()
    second = schedule(scheduler, "2 and 1 are preempted for 0's block", LOOK_RUNNING)
    check_output(second, {"0": (4, 1)}, "0 takes 2's block, 1 is preempted itself", LOOK_RUNNING)
    check_preempted(second, ["2", "1"], "0 takes 2's block, then 1 finds none")
    check_queues(scheduler, "0", "12", "the earlier one waits first", LOOK_PREEMPT)
    assert scheduler.num_preemptions == 2, f"expected 2 preemptions, got {scheduler.num_preemptions}. {LOOK_PREEMPT}"
    land(scheduler, first)
    for request in scheduler.waiting:
        check_counts(request, (5, 0, 0), "preempted, its token has arrived", LOOK_PREEMPT)


@pytest.mark.parametrize("is_end", [False, True], ids=["length", "end of sequence"])
def test_a_preempted_request_ends_by_the_token_in_flight(is_end: bool) -> None:
    """It must leave the waiting queue; otherwise it would be computed again."""
    scheduler = make_scheduler(num_usable=4, block_size=4)
    scheduler.add_request(make_request("0", 8, max_tokens=4))
    scheduler.add_request(make_request("1", 8, max_tokens=10 if is_end else 1))
    before = scheduler.schedule()
    scheduler.preempt(scheduler.running[1])
    check_queues(scheduler, "0", "1", "1 was preempted", LOOK_PREEMPT)
    land(scheduler, before, [WORD, END if is_end else WORD])
    check_queues(scheduler, "0", "", "1 has ended by the token that was in flight", LOOK_FINISH)
    check_blocks(scheduler, {"0": 2}, "1 has ended by the token that was in flight", LOOK_FINISH)
    check_output(scheduler.schedule(), {"0": (8, 1)}, "1 has ended", LOOK_FINISH)


# The end of a request


def test_row_and_blocks_are_free_while_a_step_still_writes_there() -> None:
    """The next owner's step comes after that one. One row; 0 ends by its first token and is in the second step."""
    scheduler = make_scheduler(num_usable=2, block_size=4, max_num_seqs=1)
    first, second = add(scheduler, [4, 8], max_tokens=5)
    one, two = scheduler.schedule(), scheduler.schedule()
    held = list(scheduler.blocks.block_tables["0"])
    land(scheduler, one, [END])
    check_queues(scheduler, "", "1", "0 has ended", LOOK_FINISH)
    check_blocks(scheduler, {}, "0 has ended, and is in a step in flight", LOOK_FINISH)
    three = scheduler.schedule()
    check_output(three, {"1": (0, 8)}, "a step of 0 is in flight, its blocks are 1's", LOOK_FINISH)
    assert set(held) <= set(scheduler.blocks.block_tables["1"]), f"1 has no other blocks to take. {LOOK_FINISH}"
    land(scheduler, two)
    check_blocks(scheduler, {"1": 2}, "the step of 0 has ended: nothing is freed a second time", LOOK_FINISH)
    got = (first.output_token_ids, second.output_token_ids)
    assert got == ([END], []), f"0 has ended, 1 has no token yet: expected {([END], [])}, got {got}. {LOOK_FINISH}"


@pytest.mark.parametrize(
    "state", ["waiting", "running", "in flight", "preempted", "preempted, in flight", "last token"]
)
def test_abort_wherever_it_is(state: str) -> None:
    scheduler = make_scheduler(max_num_seqs=3)
    requests = add(scheduler, [5, 20, 5, 5])
    requests[1].max_num_tokens = 21 if state == "last token" else 1_000
    name = "3" if state == "waiting" else "1"
    before = scheduler.schedule()
    if "in flight" not in state and state != "last token":
        land(scheduler, before)
    if state.startswith("preempted"):
        for request in (requests[2], requests[1]):
            scheduler.preempt(request)
    found = scheduler.abort(iter([name, "unknown"]))
    case, look = f"request {name} is aborted, {state}", "Look at core/scheduler.py::Scheduler.abort."
    assert found == [requests[int(name)]], f"{case}: expected it back, got {ids(found)}. {look}"
    assert found[0].status is RequestStatus.FINISHED_ABORTED, f"{case}: its status is {found[0].status}. {look}"
    rest = ids([*scheduler.running, *scheduler.waiting])
    assert "".join(rest) == "0123".replace(name, ""), f"{case}: {rest} are in the queues. {look}"
    rows = [request.row for request in scheduler.running]
    assert sorted([*rows, *scheduler.free_rows]) == [0, 1, 2], (
        f"{case}: rows {rows}, free {scheduler.free_rows}. {look}"
    )
    held = {request.request_id: -(-len(request.prompt_token_ids) // 16) for request in scheduler.running}
    check_blocks(scheduler, held, case, look)
    assert scheduler.abort([name]) == [], f"{case}, a second time: it is no longer there. {look}"
    num_known = len(found[0].output_token_ids)
    if "in flight" in state or state == "last token":
        land(scheduler, before)
    assert len(found[0].output_token_ids) == num_known, f"{case}: it got a token afterwards. {look}"
    output = take_step(scheduler)
    assert name not in ids(output.requests), f"{case}: it is in the next step. {look}"


# Rows, and what is sent to the worker


def rows_of(scheduler: Scheduler) -> dict[str, int | None]:
    return {request.request_id: request.row for request in scheduler.running}


def test_a_new_request_gets_a_row_and_is_described_once() -> None:
    """Its tokens and parameters go with the step in which it joins, and with no other."""
    scheduler = make_scheduler(max_num_seqs=2)
    first, second = add(scheduler, [3, 5])
    outputs = [scheduler.schedule() for _ in range(2)]
    rows = rows_of(scheduler)
    assert sorted(rows.values()) == [0, 1], f"two requests, two rows: got {rows}. {LOOK_SENT}"
    expected = [NewRequest(rows[r.request_id], [7] * n, n, r.params) for r, n in ((first, 3), (second, 5))]  # type: ignore[arg-type]
    got = outputs[0].step.new_requests
    assert got == expected, f"the first step: expected {expected}, got {got}. {LOOK_SENT}"
    assert outputs[1].step.new_requests == [], f"the second step: got {outputs[1].step.new_requests}. {LOOK_SENT}"
    for output in outputs:
        got_rows = [share.row for share in output.step.requests]
        assert got_rows == [first.row, second.row], f"each share has its request's row: got {output.step}. {LOOK_SENT}"


def test_block_ids_are_sent_once() -> None:
    """Each step has the ones that are new (block_size=4). A request that comes back sends all of them again."""
    scheduler = make_scheduler(num_usable=5, block_size=4)
    first, second = add(scheduler, [7, 8])
    outputs = run_ahead(scheduler, 4)
    sent = [output.step.requests[0].new_block_ids for output in outputs]
    table = scheduler.blocks.block_tables["0"]
    assert [len(each) for each in sent] == [2, 0, 1, 0], (
        f"7 tokens, then one a step: expected 2, 0, 1 and 0 new blocks, got {sent}. {LOOK_SENT}"
    )
    once = [block for blocks in sent for block in blocks]
    assert once == table, f"all blocks that were sent: expected the block table, {table}, got {once}. {LOOK_SENT}"
    check_preempted(outputs[2], ["1"], "0 wants a third block, and none is free")
    assert (second.row, second.num_sent_blocks) == (None, 0), (
        f"preempted: expected (row, num_sent_blocks) (None, 0), got {(second.row, second.num_sent_blocks)}. {LOOK_SENT}"
    )
    land(scheduler, outputs[-1])
    scheduler.abort(["0"])
    step = scheduler.schedule().step
    table, got = scheduler.blocks.block_tables["1"], step.requests[0].new_block_ids
    assert got == table, (
        f"back after a preemption, new_block_ids: expected its whole table, {table}, got {got}. {LOOK_SENT}"
    )
    new = step.new_requests[0]
    expected = ([7] * 8 + [WORD] * 2, 8)
    assert (new.token_ids, new.num_prompt_tokens) == expected, (
        f"back after a preemption, with its output, (tokens, prompt): expected {expected}, got "
        f"{(new.token_ids, new.num_prompt_tokens)}. {LOOK_SENT}"
    )


@pytest.mark.parametrize("how", ["end", "abort", "preemption"])
def test_a_free_row_is_given_out_again(how: str) -> None:
    """The step in which the next request joins says so; nothing else is said."""
    scheduler = make_scheduler(max_num_seqs=2)
    requests = add(scheduler, [4, 4, 4])
    first = scheduler.schedule()
    row = requests[1].row
    if how == "end":
        land(scheduler, first, [WORD, END])
    elif how == "abort":
        scheduler.abort(["1"])
    else:
        land(scheduler, first)
        scheduler.preempt(requests[1])
    heir = requests[1 if how == "preemption" else 2]  # a preempted request is the first to come back
    step = schedule(scheduler, f"request 1's row is free after its {how}", LOOK_SENT).step
    got = [new.row for new in step.new_requests]
    assert got == [row] == [heir.row], f"{how}: request {heir.request_id} takes 1's row {row}: got {step}. {LOOK_SENT}"


def test_a_step_is_plain_data_of_its_own() -> None:
    """What the scheduler does next does not change it: a worker may read it later."""
    scheduler = make_scheduler(block_size=4)
    [_, second] = add(scheduler, [5, 3])
    output = scheduler.schedule()
    before = msgspec.msgpack.encode(output.step)
    land(scheduler, output)
    scheduler.schedule()
    scheduler.preempt(second)
    scheduler.schedule()
    assert msgspec.msgpack.encode(output.step) == before, f"a later step changed {output.step}. {LOOK_SENT}"
    assert msgspec.msgpack.Decoder(StepInput).decode(before) == output.step, f"got {output.step}. {LOOK_SENT}"


def test_reset_removes_everything() -> None:
    """Requests that run, wait or are preempted, with tokens in flight; the running ones come first."""
    scheduler = make_scheduler(num_usable=20, block_size=4, max_num_seqs=3)
    requests = add(scheduler, [8, 8, 8, 8])
    scheduler.schedule()
    scheduler.preempt(requests[2])
    scheduler.schedule()
    look = "Look at core/scheduler.py::Scheduler.reset."
    got = ids(scheduler.reset())
    assert got == ["0", "1", "2", "3"], f"expected all four, got {got}. {look}"
    assert all(request.status is RequestStatus.FINISHED_ABORTED for request in requests), f"got {requests}. {look}"
    assert not scheduler.has_unfinished_requests, f"requests remain. {look}"
    check_blocks(scheduler, {}, "after a reset", look)
    assert sorted(scheduler.free_rows) == [0, 1, 2], f"free rows {scheduler.free_rows}, expected 3. {look}"


# Admission: as in part 4


@pytest.mark.parametrize(
    ("limits", "lengths", "expected"),
    [
        (dict(max_num_batched_tokens=1_024, max_num_seqs=3), [800, 800, 10, 10], "0"),
        (dict(max_num_batched_tokens=1_024), [800, 224, 1], "01"),
        (dict(max_num_batched_tokens=1_024), [800, 225, 1], "0"),
        (dict(max_num_seqs=2), [5, 5, 5], "01"),
        (dict(num_usable=10), [64, 64, 33, 16], "01"),
        (dict(num_usable=10), [160], "0"),
    ],
    ids=str,
)
def test_which_requests_join(limits: dict[str, int], lengths: list[int], expected: str) -> None:
    scheduler = make_scheduler(**limits)
    add(scheduler, lengths)
    case = f"{limits}, prompts of {lengths} tokens, first step"
    check_output(scheduler.schedule(), {name: (0, lengths[int(name)]) for name in expected}, case, LOOK_WAITING)


@pytest.mark.parametrize(("length", "joins"), [(9, False), (8, True)])
def test_tokens_in_flight_count_against_the_budget(length: int, joins: bool) -> None:
    """Budget 10: two decodes leave 8 tokens for new requests."""
    scheduler = make_scheduler(max_num_batched_tokens=10)
    add(scheduler, [5, 5, length, 1])
    scheduler.schedule()
    expected = {"0": (5, 1), "1": (5, 1)} | ({"2": (0, length)} if joins else {})
    check_output(scheduler.schedule(), expected, f"2 needs {length} of 8 tokens", LOOK_WAITING)


def test_no_request_joins_in_a_step_with_a_preemption() -> None:
    scheduler = make_scheduler(num_usable=6, block_size=4, max_num_seqs=3)
    add(scheduler, [8, 8, 8, 1])
    scheduler.schedule()
    output = scheduler.schedule()
    check_preempted(output, ["2"], "0 and 1 want a third block, and none is free")
    check_output(output, {"0": (8, 1), "1": (8, 1)}, "2 was preempted, and its blocks are not 3's", LOOK_WAITING)
