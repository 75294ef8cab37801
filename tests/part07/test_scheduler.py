"""core/scheduler.py: hits are not computed, whatever happens to the requests that share them."""

from __future__ import annotations

from typing import Any

import pytest

from part07_prefix_caching.core.block_manager import BlockManager
from part07_prefix_caching.core.engine import LLMEngine
from part07_prefix_caching.core.request import Request
from part07_prefix_caching.core.scheduler import Scheduler, SchedulerOutput
from tests.part07.scripted import check_blocks, check_engine, run_dry, scripted_engine, take_step, watch
from tests.scripted import END, answer_alone, executor_of, ids, params_for, shares

LOOK_WAITING = 'Look at core/scheduler.py::Scheduler._schedule_waiting; README "A block\'s hash".'
LOOK_ADMIT = 'Look at core/scheduler.py::Scheduler._admit; README "Free, but still cached".'
LOOK_ADD = 'Look at core/scheduler.py::Scheduler._add; README "When a block is cached".'
LOOK_LEAVE = 'Look at core/scheduler.py::Scheduler._leave; README "When a block is cached".'
LOOK_FAIL = (
    'Look at core/engine.py::LLMEngine.fail and core/scheduler.py::Scheduler.reset; README "When a block is cached".'
)
LOOK_COUNT = 'Look at core/scheduler.py::Scheduler._start; README "What a client sees".'
BOTH = pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
CAT = ZeroDivisionError("the cat sat on it")
Step = dict[str, tuple[int, int]]  # request → tokens computed before, tokens in this step


def text(number: int, length: int) -> list[int]:
    """The first tokens of a text; no two texts have a block in common."""
    return [60 + 30 * number + position % 29 for position in range(length)]


def request_of(name: str, tokens: list[int], max_tokens: int = 50, **fields: Any) -> Request:
    return Request(name, tokens, params_for(max_tokens, **fields), len(tokens) + max_tokens)


def make_scheduler(num_usable: int = 100, block_size: int = 4, budget: int = 1_000, **flags: Any) -> Scheduler:
    scheduler = Scheduler(BlockManager(num_usable + 1, block_size), 8, budget, **{"watermark": 0.0, **flags})
    watch(scheduler)
    return scheduler


def step_of(output: SchedulerOutput) -> Step:
    return {
        request.request_id: (share.num_computed_tokens, share.num_scheduled_tokens) for request, share in shares(output)
    }


def check_step(output: SchedulerOutput, expected: Step, what: str, look: str = LOOK_WAITING) -> None:
    got = step_of(output)
    assert got == expected, f"{what}: expected request → (computed before, now) {expected}, got {got}. {look}"


def land(scheduler: Scheduler, output: SchedulerOutput, token_id: int = 9) -> None:
    """What the engine does when a step's tokens have arrived."""
    for request in output.sampled_requests:
        request.num_output_placeholders -= 1
        if not request.status.is_finished:
            request.output_token_ids.append(token_id)
            if request.num_tokens >= request.max_num_tokens:
                request.finish("length", None)
                scheduler.finish(request)


def check_answer(
    engine: LLMEngine, answers: dict[str, Any], name: str, prompt: list[int], count: int, look: str
) -> None:
    expected, got = answer_alone(prompt, count, ignore_eos=True), answers[name].token_ids
    assert got == expected, f"request {name}: expected what it gets alone, {expected}, got {got}. {look}"


def add(engine: LLMEngine, name: str, prompt: list[int], count: int = 4, **fields: Any) -> Request:
    engine.add_request(name, prompt, params_for(count, ignore_eos=True, **fields))
    return engine.scheduler.waiting[-1]


# Hits are not computed


@BOTH
@pytest.mark.parametrize("num_common", [0, 3, 4, 15, 16, 17])
def test_a_second_request_computes_the_rest(num_common: int, is_async: bool) -> None:
    engine = scripted_engine(async_scheduling=is_async, block_size=4)
    prompts = {"a": text(0, 17), "b": text(0, num_common) + text(1, 17 - num_common)}
    for name, prompt in prompts.items():
        add(engine, name, prompt)
        answers = run_dry(engine)
        check_answer(engine, answers, name, prompt, 4, LOOK_WAITING)
    num_hit = min(num_common, 16) // 4 * 4
    expected, got = 2 * (17 + 3) - num_hit, executor_of(engine).num_tokens_computed
    assert got == expected, (
        f"two prompts of 17 with {num_common} tokens in common, block_size=4, 4 tokens each: expected {expected} "
        f"positions to be computed, {num_hit} of them hits, got {got}. {LOOK_WAITING}"
    )
    told = answers["b"].num_cached_tokens
    assert told == num_hit, f"b's num_cached_tokens: expected {num_hit}, got {told}. {LOOK_COUNT}"
    counts = (engine.scheduler.num_queried_tokens, engine.scheduler.num_hit_tokens)
    assert counts == (34, num_hit), f"(queried, hit): expected {(34, num_hit)}, got {counts}. {LOOK_COUNT}"


def test_two_in_the_same_step() -> None:
    """The second hits what the first is about to write."""
    engine = scripted_engine(block_size=4)
    prompts = {"a": text(0, 9), "b": text(0, 11), "c": text(0, 9)}
    for name, prompt in prompts.items():
        add(engine, name, prompt)
    answers = run_dry(engine)
    got = [[(work.request_id, len(work.input_slots)) for work in step.work] for step in executor_of(engine).launched]
    assert got[0] == [("a", 9), ("b", 3), ("c", 1)], (
        f"9, 11 and 9 tokens in one step, block_size=4, the first 9 in common: expected tokens computed 9, 3 "
        "and 1, got "
        f"{got[0]}. {LOOK_ADD}"
    )
    for name, prompt in prompts.items():
        check_answer(engine, answers, name, prompt, 4, LOOK_ADD)
    told = {name: answers[name].num_cached_tokens for name in answers}
    assert told == {"a": 0, "b": 8, "c": 8}, f"num_cached_tokens: expected 0, 8 and 8, got {told}. {LOOK_COUNT}"


def test_hits_take_nothing_of_the_budget() -> None:
    """Without chunks, a prompt of 20 with a hit of 16 fits into a rest of 4."""
    scheduler = make_scheduler(budget=10 + 20, enable_chunked_prefill=False)
    scheduler.add_request(request_of("a", text(0, 20)))
    land(scheduler, scheduler.schedule())
    scheduler.add_request(request_of("b", text(1, 25)))
    scheduler.add_request(request_of("c", text(0, 20)))
    check_step(
        scheduler.schedule(), {"a": (20, 1), "b": (0, 25), "c": (16, 4)},
        "budget 30: 1 for a, 25 for b, and 4 for c, whose prompt of 20 has a hit of 16",
    )  # fmt: skip


def test_a_hit_does_not_jump_the_queue() -> None:
    scheduler = make_scheduler(num_usable=9)
    scheduler.add_request(request_of("a", text(0, 17)))
    land(scheduler, scheduler.schedule())
    scheduler.add_request(request_of("b", text(1, 30)))
    scheduler.add_request(request_of("c", text(0, 17)))
    check_step(scheduler.schedule(), {"a": (17, 1)}, "b needs 8 blocks, 4 are free, and c behind it needs one")
    assert ids(list(scheduler.waiting)) == ["b", "c"], f"got {ids(list(scheduler.waiting))}. {LOOK_WAITING}"


def test_admission_counts_free_blocks_that_are_found() -> None:
    """Nine blocks, four are a's. b hits three that are free, and needs one more: that leaves 0, the watermark is 2."""
    scheduler = make_scheduler(num_usable=9, watermark=0.2)
    scheduler.add_request(request_of("x", text(0, 12), max_tokens=1))
    land(scheduler, scheduler.schedule())
    scheduler.add_request(request_of("a", text(1, 16)))
    land(scheduler, scheduler.schedule())
    scheduler.add_request(request_of("b", text(0, 13)))
    before = (scheduler.blocks.num_free_blocks, scheduler.watermark_blocks)
    assert before == (5, 2), f"this test needs 5 free blocks and a watermark of 2, got {before}"
    output = scheduler.schedule()
    assert ids(output.requests) == ["a"], (
        f"5 free blocks, a takes one; b takes 4 of them (3 hits, 1 new): that is less than the watermark of 2. "
        f"Expected b to wait, got {ids(output.requests)}. {LOOK_ADMIT}"
    )


def test_admission_does_not_count_hits_that_are_in_use() -> None:
    scheduler = make_scheduler(num_usable=9, watermark=0.2)
    scheduler.add_request(request_of("a", text(0, 20)))
    land(scheduler, scheduler.schedule())
    for name in "bc":
        scheduler.add_request(request_of(name, text(0, 17)))
    output = scheduler.schedule()  # a takes its 6th
    assert ids(output.requests) == ["a", "b"], (
        f"3 free blocks after a's 6th, the watermark is 2; b hits 4 that are a's and takes 1: expected a and b, got "
        f"{ids(output.requests)}. {LOOK_ADMIT}"
    )


# × chunks


def test_a_hit_on_the_chunks_of_an_unfinished_prompt() -> None:
    """a is in the middle of its prompt. b hits what is computed, and what this step computes, but no later chunk."""
    scheduler = make_scheduler(budget=12, long_prefill_token_threshold=6)
    scheduler.add_request(request_of("a", text(0, 40)))
    check_step(scheduler.schedule(), {"a": (0, 6)}, "a's first chunk of 6")
    scheduler.add_request(request_of("b", text(0, 40)))
    check_step(
        scheduler.schedule(), {"a": (6, 6), "b": (12, 6)},
        "with this step a has 12 of its 40 tokens, three blocks of 4: b begins behind them",
    )  # fmt: skip
    tables = [scheduler.blocks.block_tables[name][:4] for name in "ab"]
    assert tables[0][:3] == tables[1][:3] and tables[0][3] != tables[1][3], f"expected 3 blocks in common: {tables}"
    check_step(scheduler.schedule(), {"a": (12, 6), "b": (18, 6)}, "from here on each computes its own")


@BOTH
def test_chunks_and_hits_change_no_answer(is_async: bool) -> None:
    engine = scripted_engine(
        async_scheduling=is_async,
        block_size=4,
        max_num_seqs=3,
        max_num_batched_tokens=7,
        long_prefill_token_threshold=3,
    )
    prompts = {str(number): text(0, 8 * number + 3) + text(1, 5) for number in range(6)}
    for name, prompt in prompts.items():
        add(engine, name, prompt, 6)
    answers = run_dry(engine)
    for name, prompt in prompts.items():
        check_answer(engine, answers, name, prompt, 6, LOOK_ADD)
    assert engine.scheduler.num_hit_tokens > 0, "this test needs hits"


@pytest.mark.parametrize("is_in_flight", [True, False])
def test_an_abort_in_the_middle_of_a_prompt(is_in_flight: bool) -> None:
    """a has computed 10 of 30 tokens: two blocks of 4 are full, and the third is not cached."""
    engine = scripted_engine(
        100, block_size=4, max_num_seqs=2, max_num_batched_tokens=10, async_scheduling=is_in_flight
    )
    add(engine, "a", text(0, 30))
    take_step(engine)
    assert len(engine.in_flight) == is_in_flight
    engine.abort_requests(["a"])
    check_engine(engine, "a was aborted")
    request = add(engine, "b", text(0, 30))
    answers = run_dry(engine)
    assert request.num_cached_tokens == 8, (
        f"a was aborted with 10 of its 30 tokens computed, block_size=4: expected b to hit 8, got "
        f"{request.num_cached_tokens}. {LOOK_LEAVE}"
    )
    check_answer(engine, answers, "b", text(0, 30), 4, LOOK_LEAVE)


# × preemption


@BOTH
def test_a_preempted_request_hits_its_own_blocks(is_async: bool) -> None:
    """Seven blocks of 4, two prompts of 11. b is preempted, and hits most of what it had when it comes back."""
    engine = scripted_engine(100, async_scheduling=is_async, block_size=4, num_kv_blocks=1 + 7)
    requests = [add(engine, name, text(number, 11), 8) for number, name in enumerate("ab")]
    found = dict[int, int]()
    schedule = engine.scheduler.schedule

    def noted() -> SchedulerOutput:
        before = requests[1].num_computed_tokens
        output = schedule()
        if requests[1] in output.requests and before == 0:
            found[len(found)] = step_of(output)["b"][0]
        return output

    engine.scheduler.schedule = noted  # type: ignore[method-assign]
    answers = run_dry(engine)
    assert engine.scheduler.num_preemptions >= 1, "this test needs a preemption"
    for number, name in enumerate("ab"):
        check_answer(engine, answers, name, text(number, 11), 8, LOOK_LEAVE)
    assert found[0] == 0 and any(found[number] >= 4 for number in found if number), (
        f"b was preempted and came back: expected a hit of at least a block of its own, its hits were "
        f"{list(found.values())}. {LOOK_WAITING}"
    )
    counts = (engine.scheduler.num_queried_tokens, engine.scheduler.num_hit_tokens, answers["b"].num_cached_tokens)
    assert counts == (22, 0, 0), (
        f"its own blocks do not count as hits: expected (queried, hit, num_cached_tokens) (22, 0, 0), got {counts}. "
        f"{LOOK_COUNT}"
    )
    assert requests[1].num_cached_tokens == 0, f"b: expected 0, got {requests[1].num_cached_tokens}. {LOOK_COUNT}"


def test_a_preempted_request_caches_its_blocks_again() -> None:
    """All of them were evicted meanwhile; what it computes again is cached again."""
    scheduler = make_scheduler()
    request = request_of("a", text(0, 9))
    scheduler.add_request(request)
    land(scheduler, scheduler.schedule())
    scheduler.preempt(request)
    scheduler.blocks.reset()
    land(scheduler, scheduler.schedule())
    found = len(scheduler.blocks.cached_blocks)
    assert found == 2, f"10 tokens, blocks of 4, computed twice: expected 2 cached blocks, got {found}. {LOOK_LEAVE}"


def test_num_cached_tokens_is_that_of_the_first_admission() -> None:
    """c is preempted in the middle of its prompt, before its first output."""
    scheduler = make_scheduler(num_usable=8, budget=8)
    for name in "xb":
        scheduler.add_request(request_of(name, text(0, 13), max_tokens=1))
    for _ in range(2):
        land(scheduler, scheduler.schedule())
    assert ids(scheduler.running) == ["b"] or not scheduler.running, "x has ended"
    again = request_of("c", text(0, 13) + text(1, 9))
    scheduler.add_request(again)
    output = scheduler.schedule()
    assert "c" in ids(output.requests), f"this test needs c to run, got {step_of(output)}"
    first = again.num_cached_tokens
    scheduler.preempt(again)
    hits = scheduler.num_hit_tokens
    land(scheduler, output)
    scheduler.schedule()
    assert again in scheduler.running and again.num_computed_tokens > 12, "this test needs c to run again"
    assert first == again.num_cached_tokens == 12 and scheduler.num_hit_tokens == hits, (
        f"c hits 12 tokens of others, and later its own as well: expected num_cached_tokens 12, got {first} and then "
        f"{again.num_cached_tokens}; counted {hits} and then {scheduler.num_hit_tokens}. {LOOK_COUNT}"
    )


# × one step ahead


@BOTH
def test_placeholders_have_no_hashes(is_async: bool) -> None:
    """Whatever is in flight, only known tokens are hashed; and at the end all that are known and computed."""
    engine = scripted_engine(100, async_scheduling=is_async, block_size=2)
    request = add(engine, "a", text(0, 5), 12)

    def check(number: int) -> None:
        num_hashed = len(request.block_hashes)
        assert num_hashed * 2 <= request.num_tokens, (
            f"step {number}: {request.num_tokens} tokens are known, block_size=2, and {num_hashed} blocks are hashed. "
            f"{LOOK_ADD}"
        )
        num_cached = request.num_cached_blocks
        assert num_cached * 2 <= request.num_computed_tokens, (
            f"step {number}: {request.num_computed_tokens} tokens are computed, {num_cached} blocks are cached. "
            f"{LOOK_ADD}"
        )

    run_dry(engine, check)
    whole = request.token_ids + [50]
    again = add(engine, "b", whole)
    take_step(engine)
    assert again.num_cached_tokens == 16, (
        f"a prompt of 5 and 12 tokens, of which the last was never computed, block_size=2: expected the next turn to "
        f"hit 16, got {again.num_cached_tokens}. {LOOK_LEAVE}"
    )


@BOTH
@pytest.mark.parametrize("ends_with_eos", [True, False])
def test_the_next_turn_hits_the_answer(ends_with_eos: bool, is_async: bool) -> None:
    """6 tokens and an answer of 7: 12 are computed, three blocks of 4, with or without a step too many in flight."""
    engine = scripted_engine(
        100, async_scheduling=is_async, block_size=4,
        script=lambda tokens: END if ends_with_eos and len(tokens) == 12 else 9,
    )  # fmt: skip
    engine.add_request("a", text(0, 6), params_for(20 if ends_with_eos else 7))
    answer = run_dry(engine)["a"].token_ids
    assert len(answer) == 7
    request = add(engine, "b", text(0, 6) + answer + [50, 51])
    take_step(engine)
    assert request.num_cached_tokens == 12, (
        f"expected the next turn to hit 12 tokens, got {request.num_cached_tokens}. {LOOK_LEAVE}"
    )


def test_an_abort_with_a_token_in_flight() -> None:
    """The token is not known, and the block that it would fill is not cached."""
    engine = scripted_engine(100, block_size=4)
    request = add(engine, "a", text(0, 7), 9)
    take_step(engine)
    take_step(engine)  # the first token is known, and its key and value are in flight
    assert (request.num_tokens, request.num_computed_tokens, request.num_output_placeholders) == (8, 8, 1)
    engine.abort_requests(["a"])
    check_engine(engine, "a was aborted")
    num_cached = len(engine.blocks.cached_blocks)
    assert num_cached == 1, (
        f"7 tokens and 1, the step that computes the last is in flight: expected 1 cached block of 4, got "
        f"{num_cached}. {LOOK_LEAVE}"
    )


# × failure


def fail(engine: LLMEngine, expected: list[str], what: str, num_steps: int = 1) -> None:
    """A step raises within num_steps steps; these requests end with the cause, and the engine is empty."""
    with pytest.raises(ZeroDivisionError) as caught:
        for _ in range(num_steps):
            LLMEngine.step(engine)
    outputs = engine.fail(caught.value)
    assert sorted(ids(outputs)) == expected and all(output.error for output in outputs), (
        f"{what}: expected an error for {expected}, got {outputs}. {LOOK_FAIL}"
    )
    blocks = engine.blocks
    assert not blocks.num_used_blocks and not blocks.cached_blocks, (
        f"{what}: expected an empty pool, {blocks.num_used_blocks} blocks are in use, {len(blocks.cached_blocks)} are "
        f"cached. {LOOK_FAIL}"
    )
    check_engine(engine, what)


def check_no_hit(engine: LLMEngine, name: str, prompt: list[int], what: str) -> None:
    request = add(engine, name, prompt)
    answers = run_dry(engine)
    assert request.num_cached_tokens == 0, (
        f"{what}: a later request of the same tokens hit {request.num_cached_tokens} that were never written. "
        f"{LOOK_FAIL}"
    )
    check_answer(engine, answers, name, prompt, 4, LOOK_FAIL)


def test_blocks_that_a_failed_step_never_wrote_are_not_found() -> None:
    """a's step fails. One is in flight behind it with b, which hits a's blocks, and c, which does not."""
    engine = scripted_engine(block_size=4)
    add(engine, "a", text(0, 9))
    executor_of(engine).result_error = CAT
    take_step(engine)
    b = add(engine, "b", text(0, 9) + [50] * 6)
    add(engine, "c", text(1, 9))
    fail(engine, ["a", "b", "c"], "a's step failed, b and c are in the next one")
    assert b.num_cached_tokens == 8, f"this test needs b to hit a's blocks, got {b.num_cached_tokens}"
    check_no_hit(engine, "d", text(0, 9) + [50] * 6, "a's step failed, and b's was computed on top of it")


@pytest.mark.parametrize("where", ["launch_error", "result_error"])
@BOTH
def test_two_that_share_blocks_in_a_step_that_fails(where: str, is_async: bool) -> None:
    engine = scripted_engine(block_size=4, async_scheduling=is_async)
    for name in "ab":
        add(engine, name, text(0, 9))
    setattr(executor_of(engine), where, CAT)
    fail(engine, ["a", "b"], "both were in the step", num_steps=2)
    check_no_hit(engine, "c", text(0, 9), "the step that was to write it failed")


def test_a_failed_step_resets_the_whole_prefix_cache() -> None:
    """What a wrote long ago is uncached, too: one mechanism, and no repair of a half-known state."""
    engine = scripted_engine(block_size=4, async_scheduling=False)
    add(engine, "a", text(0, 9))
    run_dry(engine)
    executor_of(engine).result_error = CAT
    b = add(engine, "b", text(0, 8) + text(1, 9))
    fail(engine, ["b"], "b's step failed")
    assert b.num_cached_tokens == 8, f"this test needs b to hit a's blocks, got {b.num_cached_tokens}"
    check_no_hit(engine, "c", text(0, 8) + text(1, 9), "b's step failed")


def test_a_chunk_that_fails_after_its_request_was_aborted() -> None:
    """a's blocks are cached and never written, and b has hit them."""
    engine = scripted_engine(100, block_size=4, max_num_seqs=2, max_num_batched_tokens=10)
    add(engine, "a", text(0, 30))
    executor_of(engine).result_error = CAT
    take_step(engine)
    engine.abort_requests(["a"])
    b = add(engine, "b", text(0, 30))
    fail(engine, ["b"], "a was aborted before its step failed, b is in the next one")
    assert b.num_cached_tokens == 8, f"this test needs b to hit a's blocks, got {b.num_cached_tokens}"
    check_no_hit(engine, "c", text(0, 30), "a's chunk was never written")


def test_a_step_whose_requests_were_aborted_may_fail() -> None:
    """No request ends with it, and its blocks are not found."""
    engine = scripted_engine(100, block_size=4, max_num_seqs=1, max_num_batched_tokens=10)
    add(engine, "a", text(0, 30))
    executor_of(engine).result_error = CAT
    take_step(engine)
    engine.abort_requests(["a"])
    fail(engine, [], "a was aborted before its step failed")
    check_no_hit(engine, "b", text(0, 30), "a's chunk was never written")


def test_a_request_that_has_ended_gets_no_error() -> None:
    """a ends by END with a step in flight, which fails: a has its answer."""
    engine = scripted_engine(100, block_size=4, script=lambda tokens: END if tokens[0] == 60 else 9)
    engine.add_request("a", text(0, 9), params_for(9))
    add(engine, "b", text(1, 9), 9)
    take_step(engine)
    executor_of(engine).result_error = CAT
    outputs = take_step(engine)
    assert [(output.request_id, output.finish_reason) for output in outputs] == [("a", "stop"), ("b", None)]
    fail(engine, ["b"], "a has ended, b was in the step")


def test_a_request_that_was_preempted_by_the_failed_step_ends_too() -> None:
    """Blocks of 4, four of them, prompts of 8. The step that preempts 1 fails at its launch, with 1's first token in
    flight. Its blocks were cached when it was preempted."""
    engine = scripted_engine(block_size=4, num_kv_blocks=1 + 4)
    for number, name in enumerate("01"):
        add(engine, name, text(number, 8), 5)
    take_step(engine)
    executor_of(engine).preemption_error = CAT
    fail(engine, ["0", "1"], "1 was preempted, 0 was in the step")
    assert engine.scheduler.num_preemptions == 1, "this test needs a preemption"
    check_no_hit(engine, "2", text(1, 8), "the pool was reset")


def test_a_reset_of_the_scheduler_ends_every_lease() -> None:
    """Shared blocks, a preempted request, and blocks that only the cache knows."""
    scheduler = make_scheduler()
    for name in "abc":
        scheduler.add_request(request_of(name, text(0, 13)))
    land(scheduler, scheduler.schedule())
    scheduler.finish(scheduler.running[0])
    scheduler.preempt(scheduler.running[-1])
    assert scheduler.blocks.cached_blocks, "this test needs cached blocks"
    got = sorted(ids(scheduler.reset()))
    assert got == ["b", "c"], f"expected b and c back, got {got}. {LOOK_FAIL}"
    blocks = scheduler.blocks
    assert not blocks.cached_blocks and not blocks.num_used_blocks and not blocks.block_tables, (
        f"after a reset: cached {len(blocks.cached_blocks)}, used {blocks.num_used_blocks}, tables "
        f"{blocks.block_tables}; expected an empty pool. {LOOK_FAIL}"
    )
    check_blocks(blocks, "after a reset")


# Without caching


def test_without_caching_everything_is_computed() -> None:
    engine = scripted_engine(block_size=4, enable_prefix_caching=False)
    for name in "abc":
        add(engine, name, text(0, 17))
        run_dry(engine)
    got = (executor_of(engine).num_tokens_computed, engine.scheduler.num_hit_tokens, len(engine.blocks.cached_blocks))
    assert got == (3 * 20, 0, 0), (
        f"caching is off: expected (positions, hits, cached blocks) (60, 0, 0), got {got}. {LOOK_WAITING}"
    )
