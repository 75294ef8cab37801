"""core/scheduler.py: what is found is not computed, with everything that can happen to those who share it."""

from __future__ import annotations

from typing import Any

import pytest

from part07_prefix_caching.core.block_manager import BlockManager
from part07_prefix_caching.core.engine import LLMEngine, StepFailedError
from part07_prefix_caching.core.request import Request
from part07_prefix_caching.core.scheduler import Scheduler, SchedulerOutput
from tests.part07.scripted import check_engine, run_dry, scripted_engine, take_step, watch
from tests.scripted import END, answer_alone, ids, params_for, runner_of

LOOK_WAITING = 'Look at core/scheduler.py::Scheduler._schedule_waiting; README "A block\'s name".'
LOOK_ADMIT = 'Look at core/scheduler.py::Scheduler._admit; README "Free, and still there".'
LOOK_ADD = 'Look at core/scheduler.py::Scheduler._add; README "When a name is given".'
LOOK_RELEASE = 'Look at core/scheduler.py::Scheduler._release; README "When a name is given".'
LOOK_FAIL = 'Look at core/scheduler.py::Scheduler.fail_step and core/engine.py::LLMEngine._blaming; README "When a name is given".'  # noqa: E501
LOOK_COUNT = 'Look at core/scheduler.py::Scheduler._schedule_waiting; README "What a client sees".'
BOTH = pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
CAT = ZeroDivisionError("the cat sat on it")
Step = dict[str, tuple[int, int, int]]  # request → tokens computed before, tokens in this step, tokens found


def text(number: int, length: int) -> list[int]:
    """The first tokens of text number so-and-so; no two texts have a block in common."""
    return [60 + 30 * number + position % 29 for position in range(length)]


def request_of(name: str, tokens: list[int], max_tokens: int = 50, **fields: Any) -> Request:
    return Request(name, tokens, params_for(max_tokens, **fields), len(tokens) + max_tokens)


def make_scheduler(num_usable: int = 100, block_size: int = 4, budget: int = 1_000, **flags: Any) -> Scheduler:
    scheduler = Scheduler(BlockManager(num_usable + 1, block_size), 8, budget, **{"watermark": 0.0, **flags})
    watch(scheduler)
    return scheduler


def step_of(output: SchedulerOutput) -> Step:
    counts = (output.num_computed_tokens, output.num_scheduled_tokens, output.num_cached_tokens)
    return dict(zip(ids(output.requests), zip(*counts, strict=True), strict=True))


def check_step(output: SchedulerOutput, expected: Step, what: str, look: str = LOOK_WAITING) -> None:
    got = step_of(output)
    assert got == expected, f"{what}: expected request → (computed before, now, found) {expected}, got {got}. {look}"


def land(scheduler: Scheduler, output: SchedulerOutput, token_id: int = 9) -> None:
    """What the engine does when a step's tokens are there."""
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


# What is found is not computed


@BOTH
@pytest.mark.parametrize("num_common", [0, 3, 4, 15, 16, 17])
def test_a_second_request_computes_what_is_left(num_common: int, is_async: bool) -> None:
    engine = scripted_engine(async_scheduling=is_async, block_size=4)
    prompts = {"a": text(0, 17), "b": text(0, num_common) + text(1, 17 - num_common)}
    for name, prompt in prompts.items():
        add(engine, name, prompt)
        answers = run_dry(engine)
        check_answer(engine, answers, name, prompt, 4, LOOK_WAITING)
    num_hit = min(num_common, 16) // 4 * 4
    expected, got = 2 * (17 + 3) - num_hit, runner_of(engine).num_tokens_computed
    assert got == expected, (
        f"two prompts of 17 with {num_common} tokens in common, block_size=4, 4 tokens each: expected {expected} "
        f"positions to be computed, {num_hit} found, got {got}. {LOOK_WAITING}"
    )
    assert answers["b"].num_cached_tokens == num_hit, f"b was told {answers['b'].num_cached_tokens}. {LOOK_COUNT}"
    counts = (engine.scheduler.num_queried_tokens, engine.scheduler.num_hit_tokens)
    assert counts == (34, num_hit), f"(queried, hit): expected {(34, num_hit)}, got {counts}. {LOOK_COUNT}"


def test_two_in_the_same_step() -> None:
    """The second finds what the first is about to write."""
    engine = scripted_engine(block_size=4)
    prompts = {"a": text(0, 9), "b": text(0, 11), "c": text(0, 9)}
    for name, prompt in prompts.items():
        add(engine, name, prompt)
    answers = run_dry(engine)
    got = [[(work.request_id, len(work.input_slots)) for work in step.work] for step in runner_of(engine).launched]
    assert got[0] == [("a", 9), ("b", 3), ("c", 1)], (
        f"9, 11 and 9 tokens in one step, block_size=4, the first 9 in common: expected tokens computed 9, 3 "
        "and 1, got "
        f"{got[0]}. {LOOK_ADD}"
    )
    for name, prompt in prompts.items():
        check_answer(engine, answers, name, prompt, 4, LOOK_ADD)
    told = {name: answers[name].num_cached_tokens for name in answers}
    assert told == {"a": 0, "b": 8, "c": 8}, f"num_cached_tokens: {told}. {LOOK_COUNT}"


def test_what_is_found_leaves_the_budget_alone() -> None:
    """Without chunks, a prompt of 20 of which 16 are there fits into what is left of the budget."""
    scheduler = make_scheduler(budget=10 + 20, enable_chunked_prefill=False)
    scheduler.add_request(request_of("a", text(0, 20)))
    land(scheduler, scheduler.schedule())
    scheduler.add_request(request_of("b", text(1, 25)))
    scheduler.add_request(request_of("c", text(0, 20)))
    check_step(
        scheduler.schedule(), {"a": (20, 1, 0), "b": (0, 25, 0), "c": (16, 4, 16)},
        "budget 30: 1 for a, 25 for b, and 4 are left for c, whose prompt of 20 has 16 that are there",
    )  # fmt: skip


def test_nobody_is_let_past_for_what_it_finds() -> None:
    scheduler = make_scheduler(num_usable=9)
    scheduler.add_request(request_of("a", text(0, 17)))
    land(scheduler, scheduler.schedule())
    scheduler.add_request(request_of("b", text(1, 30)))
    scheduler.add_request(request_of("c", text(0, 17)))
    check_step(scheduler.schedule(), {"a": (17, 1, 0)}, "b needs 8 blocks, 4 are free, and c behind it needs one")
    assert ids(list(scheduler.waiting)) == ["b", "c"], f"got {ids(list(scheduler.waiting))}. {LOOK_WAITING}"


def test_admission_counts_free_blocks_that_are_found() -> None:
    """Nine blocks, four are a's. b finds three, which nobody owns, and needs one more: that leaves 1, the mark is 2."""
    scheduler = make_scheduler(num_usable=9, watermark=0.2)
    scheduler.add_request(request_of("x", text(0, 12), max_tokens=1))
    land(scheduler, scheduler.schedule())
    scheduler.add_request(request_of("a", text(1, 16)))
    land(scheduler, scheduler.schedule())
    scheduler.add_request(request_of("b", text(0, 13)))
    before = (scheduler.blocks.num_free_blocks, scheduler.watermark_blocks)
    assert before == (5, 2), f"this test needs 5 free blocks and a mark of 2, got {before}"
    output = scheduler.schedule()
    assert ids(output.requests) == ["a"], (
        f"5 free blocks, a takes one; b takes 4 of them (3 that it finds, 1 new): that leaves less than the mark of 2. "
        f"Expected b to wait, got {ids(output.requests)}. {LOOK_ADMIT}"
    )


def test_admission_does_not_count_blocks_that_others_own() -> None:
    scheduler = make_scheduler(num_usable=9, watermark=0.2)
    scheduler.add_request(request_of("a", text(0, 20)))
    land(scheduler, scheduler.schedule())
    for name in "bc":
        scheduler.add_request(request_of(name, text(0, 17)))
    output = scheduler.schedule()  # a takes its 6th
    assert ids(output.requests) == ["a", "b"], (
        f"3 free blocks, the mark is 1 (or 2); b finds 4 that are a's and takes 1: expected a and b, got "
        f"{ids(output.requests)}. {LOOK_ADMIT}"
    )


# × chunks


def test_a_hit_on_the_chunks_that_another_one_has_computed_so_far() -> None:
    """a is in the middle of its prompt. b finds what is computed, and what this very step computes, not what "
    "is to come."""
    scheduler = make_scheduler(budget=12, long_prefill_token_threshold=6)
    scheduler.add_request(request_of("a", text(0, 40)))
    check_step(scheduler.schedule(), {"a": (0, 6, 0)}, "a's first chunk of 6")
    scheduler.add_request(request_of("b", text(0, 40)))
    check_step(
        scheduler.schedule(), {"a": (6, 6, 0), "b": (12, 6, 12)},
        "a has 12 of its 40 tokens with this step, three blocks of 4: b begins behind them",
    )  # fmt: skip
    tables = [scheduler.blocks.block_tables[name][:4] for name in "ab"]
    assert tables[0][:3] == tables[1][:3] and tables[0][3] != tables[1][3], f"expected 3 blocks in common: {tables}"
    check_step(scheduler.schedule(), {"a": (12, 6, 0), "b": (18, 6, 0)}, "from here on each computes its own")


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
    """a has computed 10 of 30 tokens: two blocks of 4 are full, the third is half written and nobody's."""
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
        f"a was aborted with 10 of its 30 tokens computed, block_size=4: expected b to find 8, got "
        f"{request.num_cached_tokens}. {LOOK_RELEASE}"
    )
    check_answer(engine, answers, "b", text(0, 30), 4, LOOK_RELEASE)


# × preemption


@BOTH
def test_a_preempted_request_finds_its_own_blocks(is_async: bool) -> None:
    """Seven blocks of 4, two prompts of 11. 1 has to leave, and comes back to most of what it had."""
    engine = scripted_engine(100, async_scheduling=is_async, block_size=4, num_kv_blocks=1 + 7)
    requests = [add(engine, name, text(number, 11), 8) for number, name in enumerate("ab")]
    found = dict[int, int]()
    schedule = engine.scheduler.schedule

    def noted() -> SchedulerOutput:
        before = requests[1].num_computed_tokens
        output = schedule()
        if requests[1] in output.requests and before == 0:
            found[len(found)] = step_of(output)["b"][2]
        return output

    engine.scheduler.schedule = noted  # type: ignore[method-assign]
    answers = run_dry(engine)
    assert engine.scheduler.num_preemptions >= 1, "this test needs a preemption"
    for number, name in enumerate("ab"):
        check_answer(engine, answers, name, text(number, 11), 8, LOOK_RELEASE)
    assert found[0] == 0 and any(found[number] >= 4 for number in found if number), (
        f"b was preempted and came back: expected it to find at least a block of its own, the times it began it found "
        f"{list(found.values())}. {LOOK_WAITING}"
    )
    counts = (engine.scheduler.num_queried_tokens, engine.scheduler.num_hit_tokens, answers["b"].num_cached_tokens)
    assert counts == (22, 0, 0), (
        f"what it finds of its own is no hit: expected (queried, hit, told) (22, 0, 0), got {counts}. {LOOK_COUNT}"
    )
    assert requests[1].num_cached_tokens == 0, f"got {requests[1].num_cached_tokens}. {LOOK_COUNT}"


def test_a_preempted_request_names_its_blocks_again() -> None:
    """All that it had written was needed for others meanwhile; what it computes again can be found again."""
    scheduler = make_scheduler()
    request = request_of("a", text(0, 9))
    scheduler.add_request(request)
    land(scheduler, scheduler.schedule())
    scheduler.preempt(request)
    assert scheduler.blocks.reset(), "nobody holds a block"
    land(scheduler, scheduler.schedule())
    found = len(scheduler.blocks.cached_blocks)
    assert found == 2, (
        f"10 tokens, blocks of 4, computed twice: expected 2 blocks with names, got {found}. {LOOK_RELEASE}"
    )


def test_a_preempted_one_is_told_what_it_found_the_first_time() -> None:
    """It had to leave in the middle of its prompt, before it could be told."""
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
        f"c found 12 tokens of others, then its own as well: expected 12 to be told, got {first} and then "
        f"{again.num_cached_tokens}; counted {hits} and then {scheduler.num_hit_tokens}. {LOOK_COUNT}"
    )


# × one step ahead


@BOTH
def test_placeholders_have_no_names(is_async: bool) -> None:
    """Whatever is in flight, only tokens that are known are hashed, and all that is known and computed by the end."""
    engine = scripted_engine(100, async_scheduling=is_async, block_size=2)
    request = add(engine, "a", text(0, 5), 12)

    def check(number: int) -> None:
        num_named = len(request.block_hashes)
        assert num_named * 2 <= request.num_tokens, (
            f"step {number}: {request.num_tokens} tokens are known, block_size=2, and {num_named} blocks have names. "
            f"{LOOK_ADD}"
        )
        num_found = request.num_registered_blocks
        assert num_found * 2 <= request.num_computed_tokens, (
            f"step {number}: {request.num_computed_tokens} tokens are computed, {num_found} blocks can be "
            f"found. {LOOK_ADD}"
        )

    run_dry(engine, check)
    whole = request.token_ids + [50]
    again = add(engine, "b", whole)
    take_step(engine)
    assert again.num_cached_tokens == 16, (
        f"a prompt of 5 and 12 tokens, of which the last was never computed, block_size=2: expected a next turn "
        "to find "
        f"16, got {again.num_cached_tokens}. {LOOK_RELEASE}"
    )


@BOTH
@pytest.mark.parametrize("ends_with_eos", [True, False])
def test_a_next_turn_finds_the_answer(ends_with_eos: bool, is_async: bool) -> None:
    """6 tokens and an answer of 7: 12 are computed, three blocks of 4, whether or not a step too many was in flight."""
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
        f"expected the next turn to find 12 tokens, got {request.num_cached_tokens}. {LOOK_RELEASE}"
    )


def test_an_abort_with_a_token_in_flight() -> None:
    """The token is not known, and the block that it would fill is not found by anybody."""
    engine = scripted_engine(100, block_size=4)
    request = add(engine, "a", text(0, 7), 9)
    take_step(engine)
    take_step(engine)  # the first token is known, and its key and value are in flight
    assert (request.num_tokens, request.num_computed_tokens, request.num_output_placeholders) == (8, 8, 1)
    engine.abort_requests(["a"])
    check_engine(engine, "a was aborted")
    num_named = len(engine.blocks.cached_blocks)
    assert num_named == 1, (
        f"7 tokens and 1, the step that computes the last is in flight: expected 1 block of 4 to be findable, got "
        f"{num_named}. {LOOK_RELEASE}"
    )


# × failure


def fail(engine: LLMEngine, num_steps: int = 1) -> list[str]:
    """Step until a step fails; who is blamed."""
    with pytest.raises(StepFailedError) as caught:
        for _ in range(num_steps):
            LLMEngine.step(engine)
    assert caught.value.__cause__ is CAT, f"got {caught.value.__cause__!r}. {LOOK_FAIL}"
    check_engine(engine, "a step has failed")
    return sorted(caught.value.request_ids)


def check_blamed(got: list[str], expected: list[str], what: str) -> None:
    assert got == expected, f"{what}: expected {expected} to end, got {got}. {LOOK_FAIL}"


def check_nothing_found(engine: LLMEngine, name: str, prompt: list[int], what: str) -> None:
    request = add(engine, name, prompt)
    answers = run_dry(engine)
    assert request.num_cached_tokens == 0, (
        f"{what}: a later request of the same tokens found {request.num_cached_tokens} that were never written. "
        f"{LOOK_FAIL}"
    )
    check_answer(engine, answers, name, prompt, 4, LOOK_FAIL)


def test_who_has_found_what_a_failed_step_was_to_write_ends_with_it() -> None:
    """a's step fails. Behind it one is in flight with b, which has found a's blocks, and c, which has not."""
    engine = scripted_engine(block_size=4)
    add(engine, "a", text(0, 9))
    runner_of(engine).result_error = CAT
    take_step(engine)
    add(engine, "b", text(0, 9) + [50] * 6)
    add(engine, "c", text(1, 9))
    check_blamed(fail(engine), ["a", "b"], "a's step failed, b has found a's blocks")
    assert ids(engine.scheduler.running) == ["c"], f"c goes on, got {ids(engine.scheduler.running)}. {LOOK_FAIL}"
    answers = run_dry(engine)
    assert list(answers) == ["c"], f"expected an answer for c only, got {list(answers)}. {LOOK_FAIL}"
    check_answer(engine, answers, "c", text(1, 9), 4, LOOK_FAIL)
    check_nothing_found(engine, "d", text(0, 9) + [50] * 6, "a's step failed, and b's built on it")


def test_who_has_found_what_a_sharer_was_to_write_ends_too() -> None:
    """a's step fails. b has found a's blocks, and c, in the same step as b, has found those and b's."""
    engine = scripted_engine(block_size=4)
    add(engine, "a", text(0, 9))
    runner_of(engine).result_error = CAT
    take_step(engine)
    for name in "bc":
        add(engine, name, text(0, 8) + text(1, 9))
    check_blamed(fail(engine), ["a", "b", "c"], "c has found b's blocks, and b a's")
    assert not engine.blocks.num_used_blocks, f"all have ended, and hold {engine.blocks.block_tables}. {LOOK_FAIL}"
    check_nothing_found(engine, "d", text(0, 8) + text(1, 9), "all of it was to be written on what never was")


def test_what_a_sharer_was_to_write_in_the_same_step_is_not_found() -> None:
    """a's first token fails. The step behind completes its block; c finds it there, and fills one of its own on it."""
    engine = scripted_engine(100, block_size=4, max_num_seqs=3, max_num_batched_tokens=10)
    add(engine, "x", text(2, 9))
    add(engine, "a", text(0, 5))
    runner_of(engine).result_error = CAT
    take_step(engine)
    add(engine, "c", text(0, 4) + [50] * 5)
    check_blamed(fail(engine), ["a", "c", "x"], "c has found the block that a was completing")
    check_nothing_found(engine, "d", text(0, 4) + [50] * 6, "c's block was to be written on what never was")


@pytest.mark.parametrize("where", ["launch_error", "result_error"])
@BOTH
def test_two_that_share_in_a_step_that_fails(where: str, is_async: bool) -> None:
    engine = scripted_engine(block_size=4, async_scheduling=is_async)
    for name in "ab":
        add(engine, name, text(0, 9))
    setattr(runner_of(engine), where, CAT)
    check_blamed(fail(engine, 2), ["a", "b"], "both were in the step")
    assert not engine.blocks.cached_blocks, f"names are left of {engine.blocks.cached_blocks.values()}. {LOOK_FAIL}"
    check_nothing_found(engine, "c", text(0, 9), "the step that was to write it failed")


def test_names_from_before_a_failure_stay() -> None:
    engine = scripted_engine(block_size=4, async_scheduling=False)
    add(engine, "a", text(0, 9))
    run_dry(engine)
    runner_of(engine).result_error = CAT
    add(engine, "b", text(0, 8) + text(1, 9))
    check_blamed(fail(engine), ["b"], "b's step failed")
    request = add(engine, "c", text(0, 8) + text(1, 9))
    run_dry(engine)
    assert request.num_cached_tokens == 8, (
        f"a wrote 8 tokens long ago, b's step failed: expected c to find 8, got {request.num_cached_tokens}. "
        f"{LOOK_FAIL}"
    )


def test_a_chunk_that_fails_when_its_request_was_aborted() -> None:
    """Nobody waits for a any more. But its names are a lie, and b has believed them."""
    engine = scripted_engine(100, block_size=4, max_num_seqs=2, max_num_batched_tokens=10)
    add(engine, "a", text(0, 30))
    runner_of(engine).result_error = CAT
    take_step(engine)
    engine.abort_requests(["a"])
    add(engine, "b", text(0, 30))
    check_blamed(fail(engine), ["b"], "a was aborted before its step failed, b has found a's blocks")
    check_nothing_found(engine, "c", text(0, 30), "a's chunk was never written")


def test_a_step_that_nobody_waits_for_may_fail() -> None:
    """A chunk was in flight when its request was aborted: nobody is left to be told."""
    engine = scripted_engine(100, block_size=4, max_num_seqs=1, max_num_batched_tokens=10)
    add(engine, "a", text(0, 30))
    runner_of(engine).result_error = CAT
    take_step(engine)
    engine.abort_requests(["a"])
    try:
        assert LLMEngine.step(engine) == [], f"it was aborted. {LOOK_FAIL}"
    except StepFailedError as failure:
        pytest.fail(f"a was aborted before its step failed; blamed: {failure.request_ids}. {LOOK_FAIL}")
    assert not engine.has_unfinished_requests, f"nothing is left. {LOOK_FAIL}"
    check_nothing_found(engine, "b", text(0, 30), "a's chunk was never written")


def test_who_had_ended_is_not_ended_again() -> None:
    """a ended by END with a step in flight, which fails: a has its answer."""
    engine = scripted_engine(100, block_size=4, script=lambda tokens: END if tokens[0] == 60 else 9)
    engine.add_request("a", text(0, 9), params_for(9))
    add(engine, "b", text(1, 9), 9)
    take_step(engine)
    runner_of(engine).result_error = CAT
    [*outputs] = take_step(engine)
    assert [(output.request_id, output.finish_reason) for output in outputs] == [("a", "stop"), ("b", None)]
    check_blamed(fail(engine), ["b"], "a has ended, b was in the step")


def test_a_failed_launch_leaves_what_is_in_flight_alone() -> None:
    """b found a's blocks in the step that writes them, which is in flight; the next one, without b, fails at "
    "its launch."""
    engine = scripted_engine(100, block_size=4, max_num_seqs=3, max_num_batched_tokens=3)
    add(engine, "a", text(0, 5), 30)
    add(engine, "c", text(1, 1), 30)
    add(engine, "b", text(0, 20))
    while engine.scheduler.waiting:
        take_step(engine)
    [a, c, b] = engine.scheduler.running
    take_step(engine)
    assert b.num_cached_tokens == 4 and b.num_missing_tokens > 1, f"this test needs b to be half-way, got {b}"
    engine.scheduler.max_num_batched_tokens = 2  # a and c are served, and nothing is left for b
    runner_of(engine).launch_error = CAT
    check_blamed(fail(engine), ["a", "c"], "b was not in the step that failed, and what it has found is written")
    engine.scheduler.max_num_batched_tokens = 3
    answers = run_dry(engine)
    check_answer(engine, answers, "b", text(0, 20), 4, LOOK_FAIL)


def test_a_failed_launch_takes_no_name_from_the_step_before() -> None:
    """b found a's blocks in the step that writes them, which is in flight when a launch without b fails."""
    engine = scripted_engine(100, block_size=4, max_num_seqs=2, max_num_batched_tokens=12)
    a = add(engine, "a", text(0, 9), 30)
    b = add(engine, "b", text(0, 30))
    take_step(engine)
    assert (a.num_cached_tokens, b.num_cached_tokens, b.num_missing_tokens) == (0, 8, 19), f"got {a}, {b}"
    engine.scheduler.max_num_batched_tokens = 1
    runner_of(engine).launch_error = CAT
    check_blamed(
        fail(engine), ["a"], "a's decode failed at its launch; b's blocks are being written by the step before"
    )
    engine.scheduler.max_num_batched_tokens = 12
    answers = run_dry(engine)
    check_answer(engine, answers, "b", text(0, 30), 4, LOOK_FAIL)


def test_preempted_by_a_step_that_fails_at_its_launch() -> None:
    """Blocks of 4, four of them, prompts of 8. The step that preempts 1 fails; a step in flight still owes 1 a "
    "token."""
    engine = scripted_engine(block_size=4, num_kv_blocks=1 + 4)
    for number, name in enumerate("01"):
        add(engine, name, text(number, 8), 5)
    take_step(engine)
    runner_of(engine).preemption_error = CAT
    check_blamed(fail(engine), ["0"], "1 was preempted, 0 was in the step")
    answers = run_dry(engine)
    check_answer(engine, answers, "1", text(1, 8), 5, LOOK_WAITING)


# Off


def test_without_caching_everything_is_computed() -> None:
    engine = scripted_engine(block_size=4, enable_prefix_caching=False)
    for name in "abc":
        add(engine, name, text(0, 17))
        run_dry(engine)
    got = (runner_of(engine).num_tokens_computed, engine.scheduler.num_hit_tokens, len(engine.blocks.cached_blocks))
    assert got == (3 * 20, 0, 0), (
        f"caching is off: expected (positions, hits, names) (60, 0, 0), got {got}. {LOOK_WAITING}"
    )
