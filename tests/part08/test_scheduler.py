"""core/scheduler.py with draft tokens: whose, how many, at whose cost, and when a step may run ahead of its results."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import pytest

from common.sampling_params import SamplingParams
from part08_speculative_decoding.config import EngineConfig
from part08_speculative_decoding.core.block_manager import BlockManager
from part08_speculative_decoding.core.engine import LLMEngine
from part08_speculative_decoding.core.request import Request, RequestStatus
from part08_speculative_decoding.core.scheduler import Scheduler, SchedulerOutput
from part08_speculative_decoding.core.speculation import PROBE_INTERVAL, Speculation
from tests.part08.scripted import BY_PROMPT, LOOK_AHEAD, LOOK_DRAFTS, LOOK_NEXT, run_dry, scripted_engine, watch
from tests.scripted import answer_alone, executor_of, ids, params_for, shares

LESSON = 'README "Propose, then verify"'
LOOK_RUNNING = f"Look at core/scheduler.py::Scheduler._schedule_running; {LESSON}."
LOOK_ADD = f"Look at core/scheduler.py::Scheduler._add; {LESSON}."
LOOK_APPEND = 'Look at core/engine.py::LLMEngine._append; README "Several tokens from one step".'
LOOK_PREEMPT = f"Look at core/scheduler.py::Scheduler.preempt; {LESSON}."
LOOK_SLOTS = f"Look at core/scheduler.py::Scheduler._allocate_draft_slots; {LESSON}."
LOOK_PROBE = 'Look at core/speculation.py::Speculation.num_tokens; README "How many draft tokens".'
LOOK_NAME = 'Look at core/scheduler.py::Scheduler._add, _leave; README "The draft model\'s KV cache".'


def speculation_of(method: str = "none", num_tokens: int = 8, max_num_seqs: int = 8) -> Speculation:
    config = EngineConfig(
        device="cpu", speculative_method=method, num_speculative_tokens=num_tokens,  # type: ignore[arg-type]
        speculative_max_num_seqs=max_num_seqs,
    )  # fmt: skip
    return Speculation(config)


def scheduler_of(
    num_blocks: int = 100, block_size: int = 4, max_num_seqs: int = 8, budget: int = 64,
    speculation: Speculation | None = None, **options: Any,
) -> Scheduler:  # fmt: skip
    """Without a speculation of its own no draft tokens are proposed: those of the requests are the test's."""
    blocks = BlockManager(num_blocks, block_size)
    speculation = speculation or speculation_of()
    scheduler = Scheduler(blocks, max_num_seqs, budget, speculation=speculation, watermark=0, **options)
    watch(scheduler)
    return scheduler


def running(
    scheduler: Scheduler, name: str, num_prompt: int, drafts: Sequence[int] = (), max_tokens: int = 50
) -> Request:
    """A request after its prefill, with one token of output and draft tokens to verify."""
    prompt = [10 + 20 * int(name) + number for number in range(num_prompt)]
    request = Request(name, prompt, SamplingParams(max_tokens=max_tokens), num_prompt + max_tokens)
    scheduler.add_request(request)
    scheduler.schedule()
    bring(request, [90])
    request.draft_token_ids = list(drafts)
    return request


def bring(request: Request, token_ids: Sequence[int]) -> None:
    """What the engine does with a step's tokens."""
    request.num_computed_tokens -= request.num_output_placeholders - len(token_ids)
    request.num_output_placeholders = request.num_pending_drafts = 0
    request.draft_token_ids = []
    request.output_token_ids += token_ids


def given(output: SchedulerOutput) -> dict[str, tuple[int, list[int], bool]]:
    """Request → (tokens scheduled, draft tokens among them, whether it is sampled)."""
    return {
        request.request_id: (share.num_scheduled_tokens, share.draft_token_ids, share.is_sampled)
        for request, share in shares(output)
    }


def check(output: SchedulerOutput, expected: dict[str, tuple[int, list[int], bool]], why: str) -> None:
    got = given(output)
    assert got == expected, f"{why}: expected (tokens, draft tokens, is_sampled) {expected}, got {got}. {LOOK_RUNNING}"


# One request


@pytest.mark.parametrize("num_drafts", [0, 1, 5])
def test_its_newest_token_and_its_draft_tokens(num_drafts: int) -> None:
    scheduler, drafts = scheduler_of(), list(range(num_drafts))
    request = running(scheduler, "0", 6, drafts)
    output = scheduler.schedule()
    check(output, {"0": (1 + num_drafts, drafts, True)}, f"{num_drafts} draft tokens")
    got = (request.num_computed_tokens, request.num_output_placeholders, request.draft_token_ids)
    expected = (7 + num_drafts, 1 + num_drafts, list[int]())
    assert got == expected, f"(computed, placeholders, draft tokens): expected {expected}, got {got}. {LOOK_ADD}"
    start = output.step.requests[0].num_computed_tokens
    assert start == 6, f"computed before: expected 6, got {start}. {LOOK_ADD}"


@pytest.mark.parametrize(("max_tokens", "expected"), [(2, 0), (3, 1), (4, 2), (5, 3), (6, 4), (7, 4)])
def test_never_past_the_last_token(max_tokens: int, expected: int) -> None:
    """It has one token of output, and a step brings one more without any draft token: the others may be drafted."""
    scheduler = scheduler_of()
    running(scheduler, "0", 6, [1, 2, 3, 4], max_tokens)
    drafts = [1, 2, 3, 4][:expected]
    check(scheduler.schedule(), {"0": (1 + expected, drafts, True)}, f"max_tokens {max_tokens}, 1 of output, 4 drafts")


@pytest.mark.parametrize(("num_accepted", "num_computed"), [(0, 7), (1, 8), (3, 10)])
def test_after_a_rejection_it_computes_from_the_first_wrong_one_on(num_accepted: int, num_computed: int) -> None:
    scheduler = scheduler_of()
    request = running(scheduler, "0", 6, [1, 2, 3])
    scheduler.schedule()
    bring(request, [1, 2, 3, 4][:num_accepted] + [77])
    assert request.num_computed_tokens == num_computed, f"got {request.num_computed_tokens}. {LOOK_APPEND}"
    output = scheduler.schedule()
    check(output, {"0": (1, [], True)}, f"{num_accepted} of 3 accepted, no new draft tokens")
    start = output.step.requests[0].num_computed_tokens
    assert start == num_computed, f"expected positions from {num_computed} on, got {start}. {LOOK_APPEND}"


# When a step may run ahead


def check_can_run_ahead(scheduler: Scheduler, expected: bool, why: str) -> None:
    got = scheduler.can_run_ahead()
    assert got is expected, f"{why}: expected can_run_ahead() {expected}, got {got}. {LOOK_AHEAD}"


def test_not_while_draft_tokens_are_verified() -> None:
    scheduler = scheduler_of()
    request = running(scheduler, "0", 6, [1, 2, 3])
    scheduler.schedule()
    check_can_run_ahead(scheduler, False, "3 draft tokens are in flight: the next position is unknown")
    bring(request, [1, 2])
    check_can_run_ahead(scheduler, True, "the result is there")
    scheduler.schedule()
    check_can_run_ahead(scheduler, True, "one token without draft tokens is in flight")


def test_not_while_draft_tokens_are_proposed() -> None:
    scheduler = scheduler_of(speculation=speculation_of("draft_model", 4))
    request = running(scheduler, "0", 6)
    scheduler.schedule()
    assert request.num_pending_drafts == 4, f"expected 4 pending draft tokens, got {request}. {LOOK_NEXT}"
    check_can_run_ahead(scheduler, False, "the step in flight proposes draft tokens, which the next one verifies")
    bring(request, [91])
    request.acceptance = 0.1
    scheduler.schedule()
    check_can_run_ahead(scheduler, True, "acceptance 0.1: the step in flight proposes nothing")


def test_not_if_an_ngram_lookup_finds_something() -> None:
    scheduler = scheduler_of(speculation=speculation_of("ngram", 4))
    request = Request("0", [5, 6, 7, 8, 5, 6], SamplingParams(), 50)
    scheduler.add_request(request)
    scheduler.schedule()
    check_can_run_ahead(scheduler, False, "[5, 6] occurred before: once its token is there, it may go on like that")
    bring(request, [9])
    check(scheduler.schedule(), {"0": (1, [], True)}, "[6, 9] is new")
    check_can_run_ahead(scheduler, True, "a lookup in the known tokens finds nothing")
    bring(request, [5])
    check_can_run_ahead(scheduler, True, "[9, 5] is new")
    scheduler.schedule()
    bring(request, [6])
    check(scheduler.schedule(), {"0": (5, [7, 8, 5, 6], True)}, "[5, 6] occurred before")


def test_a_prompt_that_is_computed_in_chunks_is_not_looked_up() -> None:
    """Its end may have occurred before; but no step verifies anything before the last chunk."""
    scheduler = scheduler_of(budget=8, speculation=speculation_of("ngram", 4))
    request = Request("0", [5, 6, 7, 8] * 8, SamplingParams(), 50)
    scheduler.add_request(request)
    for number in range(3):
        check(scheduler.schedule(), {"0": (8, [], False)}, f"chunk {number} of a prompt of 32 tokens")
        check_can_run_ahead(scheduler, True, f"chunk {number} of a prompt of 32 tokens is in flight, no draft tokens")
    check(scheduler.schedule(), {"0": (8, [], True)}, "the last chunk")
    check_can_run_ahead(scheduler, False, "the prompt is computed, and its end occurred before")


def test_with_too_many_requests_no_one_is_looked_up() -> None:
    scheduler = scheduler_of(speculation=speculation_of("ngram", 4, max_num_seqs=1))
    for number in range(2):
        scheduler.add_request(Request(str(number), [5, 6, 7, 5, 6], SamplingParams(), 50))
    scheduler.schedule()
    check_can_run_ahead(scheduler, True, "two run, and speculative_max_num_seqs is 1")


def test_the_last_token_in_flight_needs_no_lookup() -> None:
    """The request is not in the next step, so the others need not wait for it."""
    scheduler = scheduler_of(speculation=speculation_of("ngram", 4))
    scheduler.add_request(Request("0", [5, 6, 7, 5, 6], SamplingParams(max_tokens=1), 6))
    scheduler.schedule()
    check_can_run_ahead(scheduler, True, "max_tokens 1, and the token is in flight")


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_a_request_with_low_acceptance_is_probed(method: str, is_async: bool) -> None:
    """All draft tokens are rejected: soon there are none, but for one now and then. In between, steps run ahead."""
    engine = scripted_engine(
        max_model_len=200, kinds=["wrong"], num_speculative_tokens=3, async_scheduling=is_async, max_num_seqs=2,
        speculative_method=method,
    )  # fmt: skip
    engine.add_request("0", [100], params_for(4 * PROBE_INTERVAL, ignore_eos=True))
    run_dry(engine)
    counts = [len(work.draft_token_ids) for step in executor_of(engine).launched for work in step.work]
    late = counts[PROBE_INTERVAL:]
    assert max(late) == 1 and 2 <= sum(late) <= 3 and sum(counts) <= 20, (
        f"{4 * PROBE_INTERVAL} tokens, all draft tokens rejected: expected some at first, then one every "
        f"{PROBE_INTERVAL} tokens; the steps verified {counts}. {LOOK_PROBE}"
    )
    log = executor_of(engine).log
    num_ahead = sum(log[at].startswith("launch") and log[at + 1].startswith("launch") for at in range(len(log) - 1))
    assert num_ahead == 0 or is_async, f"{num_ahead} launches before the result of the step before. {LOOK_AHEAD}"
    pairs = zip(log, log[1:], strict=False)
    num_waits = sum(a.startswith("result") and b.startswith("launch") for a, b in pairs)
    assert num_waits > 0, f"got {log}. {LOOK_AHEAD}"


# At whose cost


def test_the_budget_has_a_token_for_every_request_first() -> None:
    scheduler = scheduler_of(max_num_seqs=4, budget=8)
    for number in range(4):
        running(scheduler, str(number), 1)
        for request in scheduler.running[:-1]:  # they took part in the last one's prefill
            if request.num_output_placeholders:
                bring(request, [1] * request.num_output_placeholders)
    for request in scheduler.running:
        request.draft_token_ids = [1, 2, 3]
    expected = {"0": (4, [1, 2, 3], True), "1": (2, [1], True), "2": (1, [], True), "3": (1, [], True)}
    check(scheduler.schedule(), expected, "a budget of 8, four requests with 3 draft tokens each")


def test_a_chunk_gets_what_draft_tokens_leave() -> None:
    scheduler = scheduler_of(max_num_seqs=2, budget=6)
    request = running(scheduler, "0", 1, [1, 2])
    scheduler.add_request(Request("1", list(range(10, 30)), SamplingParams(), 50))
    check(scheduler.schedule(), {"0": (3, [1, 2], True), "1": (3, [], False)}, "a budget of 6, 2 draft tokens")
    bring(request, [1, 2, 3])
    request.draft_token_ids = [1, 2, 3, 4, 5, 6]
    expected = {"0": (5, [1, 2, 3, 4], True), "1": (1, [], False)}
    check(scheduler.schedule(), expected, "6 draft tokens: one token of the budget is the chunk's")


def test_a_draft_token_preempts_no_request() -> None:
    """Blocks of 4, 4 of them: 0 has 7 tokens and would need a third block for its draft tokens, 1 has the others."""
    scheduler = scheduler_of(num_blocks=5, block_size=4)
    first = running(scheduler, "0", 6)
    running(scheduler, "1", 6)
    bring(first, [91] * first.num_output_placeholders)  # it took part in the other's prefill
    first.draft_token_ids = [1, 2, 3]
    output = scheduler.schedule()
    assert not output.preempted, f"{ids(output.preempted)} were preempted for a draft token. {LOOK_SLOTS}"
    check(output, {"0": (1, [], True), "1": (1, [], True)}, "no block for draft tokens: they are dropped")
    assert first.draft_token_ids == [], f"dropped draft tokens are kept: {first.draft_token_ids}. {LOOK_DRAFTS}"


@pytest.mark.parametrize(("num_free", "num_given"), [(1, 0), (2, 3)])
def test_draft_tokens_leave_a_block_for_each_other_request(num_free: int, num_given: int) -> None:
    """Blocks of 4: 0 has 8 tokens and could use a third block for draft tokens, 1 has 9 and needs a third one."""
    scheduler = scheduler_of(num_blocks=1 + 4 + num_free, block_size=4)
    first = running(scheduler, "0", 6)
    running(scheduler, "1", 8)
    bring(first, [91] * first.num_output_placeholders)  # it took part in the other's prefill
    first.draft_token_ids = [1, 2, 3]
    output = scheduler.schedule()
    assert not output.preempted, f"{num_free} free: {ids(output.preempted)} were preempted. {LOOK_SLOTS}"
    expected = {"0": (1 + num_given, [1, 2, 3][:num_given], True), "1": (1, [], True)}
    check(output, expected, f"{num_free} free; a draft token and the token of request 1 need one each")


@pytest.mark.parametrize(("num_free", "num_given"), [(1, 0), (2, 3)])
def test_so_do_draft_tokens_that_are_yet_to_be_proposed(num_free: int, num_given: int) -> None:
    """The draft model needs the slots of its draft tokens when it proposes them, a step before they are verified."""
    speculation = speculation_of("draft_model", 3)
    scheduler = scheduler_of(num_blocks=1 + 4 + num_free, block_size=4)
    first = running(scheduler, "0", 6)
    running(scheduler, "1", 8)
    bring(first, [91] * first.num_output_placeholders)
    scheduler.speculation = speculation
    output = scheduler.schedule()
    assert not output.preempted, f"{num_free} free: {ids(output.preempted)} were preempted. {LOOK_SLOTS}"
    got = [share.num_next_drafts for share in output.step.requests]
    assert got[0] == num_given, (
        f"{num_free} free blocks of 4 tokens; 0 has 8 tokens and wants 3 draft tokens, 1 needs a block: expected "
        f"num_next_drafts {num_given}, got {got[0]}. {LOOK_NEXT}"
    )


def test_draft_tokens_get_blocks() -> None:
    scheduler = scheduler_of(block_size=4)
    running(scheduler, "0", 6, [1, 2, 3])
    output = scheduler.schedule()
    table, sent = scheduler.blocks.block_tables["0"], output.step.requests[0].new_block_ids
    assert len(table) == 3 and sent == table[2:], (
        f"7 tokens and 3 draft tokens, blocks of 4: expected 3 blocks of which the last is sent, got {table}, {sent}. "
        f"{LOOK_ADD}"
    )


@pytest.mark.parametrize(("max_tokens", "expected"), [(1, 0), (2, 0), (3, 1), (4, 2), (5, 3), (6, 4), (7, 4)])
def test_what_is_proposed_could_all_be_accepted(max_tokens: int, expected: int) -> None:
    """The prefill brings a token, the draft tokens follow, and at least one more token after them."""
    scheduler = scheduler_of(speculation=speculation_of("draft_model", 4))
    scheduler.add_request(Request("0", list(range(6)), SamplingParams(max_tokens=max_tokens), 6 + max_tokens))
    got = scheduler.schedule().step.requests[0].num_next_drafts
    assert got == expected, f"max_tokens {max_tokens}, up to 4: expected {expected} next drafts, got {got}. {LOOK_NEXT}"


def test_a_chunk_that_is_not_sampled_proposes_nothing() -> None:
    scheduler = scheduler_of(budget=8, speculation=speculation_of("draft_model", 4))
    scheduler.add_request(Request("0", list(range(20)), SamplingParams(), 50))
    got = [scheduler.schedule().step.requests[0].num_next_drafts for _ in range(3)]
    assert got == [0, 0, 4], f"a prompt of 20, a budget of 8: expected next drafts [0, 0, 4], got {got}. {LOOK_NEXT}"


def test_ngram_lookup_asks_the_worker_for_nothing() -> None:
    scheduler = scheduler_of(speculation=speculation_of("ngram", 4))
    scheduler.add_request(Request("0", [5, 6, 5, 6], SamplingParams(), 50))
    got = scheduler.schedule().step.requests[0].num_next_drafts
    assert got == 0, f"n-gram lookup is core's: expected num_next_drafts 0, got {got}. {LOOK_NEXT}"


# A copying request beside a long prompt


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
def test_a_speculating_request_is_in_every_step_beside_a_long_prefill(is_async: bool) -> None:
    """A budget of 64, a prompt of 1,500 tokens. Every step verifies draft tokens, and the rest is the chunk's."""
    period = [3, 1, 4, 1, 5, 9, 2, 6]

    def copy(token_ids: Sequence[int]) -> int:
        return period[(period.index(9) + len(token_ids)) % 8] if token_ids[0] == 99 else 7

    engine = scripted_engine(
        max_model_len=2_000, script=copy, max_num_batched_tokens=64, max_num_seqs=8, num_speculative_tokens=4,
        speculative_method="ngram", async_scheduling=is_async,
    )  # fmt: skip
    engine.add_request("copy", [99, *(copy([99] * number) for number in range(1, 40))], params_for(400))
    tokens = [output.token_ids for _ in range(4) for output in engine.step()]
    engine.add_request("long", [20 + number % 200 for number in range(1_500)], params_for(1))
    first, num_before = len(executor_of(engine).launched), sum(map(len, tokens))
    while engine.scheduler.waiting or any(r.num_new_tokens > 1 for r in engine.scheduler.running):
        tokens += [output.token_ids for output in engine.step() if output.request_id == "copy"]
    steps = executor_of(engine).launched[first:]
    absent = [step.number for step in steps if "copy" not in [work.request_id for work in step.work]]
    num_tokens = sum(map(len, tokens)) - num_before
    assert not absent and len(steps) <= 26, (
        f"{len(steps)} steps with a chunk: expected at most 26, all with the copying request; it is not in {absent}. "
        f"{LOOK_AHEAD}"
    )
    assert num_tokens >= 5 * (len(steps) - 1), (
        f"{len(steps)} steps, up to 4 draft tokens, all right: expected 5 tokens a step, got {num_tokens}. {LOOK_AHEAD}"
    )


# Preempted with draft tokens


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_verified_draft_tokens_are_not_used_again(method: str) -> None:
    """0 speculates alone; then 1 arrives, and with two running there are no draft tokens any more."""
    engine = scripted_engine(
        kinds=["right"], num_speculative_tokens=3, speculative_max_num_seqs=1, async_scheduling=False,
        speculative_method=method,
    )  # fmt: skip
    engine.add_request("0", [100, 101], params_for(20, ignore_eos=True))
    engine.step()
    engine.step()
    engine.add_request("1", [120, 121], params_for(20, ignore_eos=True))
    for _ in range(3):
        engine.step()
    counts = [[len(work.draft_token_ids) for work in step.work] for step in executor_of(engine).launched]
    late = [0, 0] if method == "ngram" else [3, 0]  # those were proposed before 1 was there
    expected = [[0], [3], [3, 0], late, [0, 0]]
    assert counts == expected, f"draft tokens in each step: expected {expected}, got {counts}. {LOOK_DRAFTS}"
    got = [(each.draft_token_ids, each.num_pending_drafts) for each in engine.scheduler.running]
    assert got == [([], 0), ([], 0)], f"expected no draft tokens, got {got}. {LOOK_DRAFTS}"


def test_a_preempted_request_has_no_draft_tokens() -> None:
    scheduler = scheduler_of()
    request = running(scheduler, "0", 6, [1, 2, 3])
    request.num_pending_drafts = 2
    scheduler.preempt(request)
    got = (request.draft_token_ids, request.num_pending_drafts, request.status)
    assert got == ([], 0, RequestStatus.PREEMPTED), f"expected ([], 0, PREEMPTED), got {got}. {LOOK_PREEMPT}"


def test_preempted_while_its_draft_tokens_are_verified() -> None:
    """It keeps the tokens of the step in flight, and is not scheduled before they are there."""
    scheduler = scheduler_of()
    request = running(scheduler, "0", 6, [1, 2])
    scheduler.schedule()
    scheduler.preempt(request)
    assert request.num_output_placeholders == 3, f"got {request.num_output_placeholders}. {LOOK_PREEMPT}"
    check(scheduler.schedule(), {}, "its step is in flight")
    request.num_output_placeholders = 0
    request.output_token_ids += [1, 5]
    check(scheduler.schedule(), {"0": (5, [], True)}, "9 tokens; the one full block of the 7 known ones was cached")


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_preempted_again_and_again(method: str, is_async: bool) -> None:
    """The first four have wrong draft tokens and run ahead, the others have right ones, in a pool too small for all."""
    engine = scripted_engine(
        max_model_len=128, kinds=[BY_PROMPT, "right", "wrong"], num_speculative_tokens=3, num_kv_blocks=30,
        block_size=2, max_num_seqs=6, async_scheduling=is_async, enable_prefix_caching=False,
        speculative_method=method,
    )  # fmt: skip
    good, bad = ([token for token in range(100, 200) if zlib.crc32(bytes([token]), 7) % 2 == odd] for odd in (0, 1))
    prompts = {str(number): [1, bad[number]] if number < 4 else [2, good[number]] for number in range(14)}
    lengths = {name: 40 if int(name) < 4 else 14 for name in prompts}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, params_for(lengths[name], ignore_eos=True))
    answers = run_dry(engine)
    for name, prompt in prompts.items():
        expected = answer_alone(prompt, lengths[name], ignore_eos=True)
        assert answers[name].token_ids == expected, (
            f"request {name}: expected what it gets alone, {expected}, got {answers[name].token_ids}. {LOOK_APPEND}"
        )
    assert engine.scheduler.num_preemptions >= 2, f"only {engine.scheduler.num_preemptions} preemptions"


# Draft tokens and prefix caching


def test_a_block_with_draft_tokens_is_not_cached() -> None:
    scheduler = scheduler_of(block_size=4)
    request = running(scheduler, "0", 6, [1, 2, 3, 4])  # 7 tokens and 4 draft tokens, which would fill two blocks
    scheduler.schedule()
    found = len(scheduler.blocks.cached_blocks)
    assert found == 1, (
        f"7 known tokens, 4 draft tokens, blocks of 4: expected one cached block, got {found}; draft tokens may be "
        f"rejected. {LOOK_NAME}"
    )
    bring(request, [1, 77])
    scheduler.schedule()
    found = len(scheduler.blocks.cached_blocks)
    assert found == 2, f"9 known tokens of which 8 are computed: expected 2 cached blocks, got {found}. {LOOK_NAME}"
    assert request.block_hashes == scheduler.blocks.hash_blocks(request)[:2], f"hashes of draft tokens. {LOOK_NAME}"


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
@pytest.mark.parametrize("kind", ["right", "half", "wrong"])
def test_only_accepted_draft_tokens_are_found_by_the_next_request(kind: str, method: str) -> None:
    """The second prompt is the first one's text so far, and finds what is written of it."""
    engine = scripted_engine(
        kinds=[kind], num_speculative_tokens=4, block_size=2, async_scheduling=False, speculative_method=method
    )
    engine.add_request("0", [100, 101], params_for(20, ignore_eos=True))
    texts = list[list[int]]()

    def join(number: int) -> None:
        if number == 3:
            texts.append([*engine.scheduler.running[0].token_ids, 99])
            engine.add_request("1", texts[0], params_for(8, ignore_eos=True))

    answers = run_dry(engine, join)
    expected, got = answer_alone(texts[0], 8, ignore_eos=True), answers["1"].token_ids
    assert got == expected, f"{kind} draft tokens: expected {expected}, got {got}. {LOOK_NAME}"
    assert answers["1"].num_cached_tokens, f"{kind} draft tokens: expected a hit, got none. {LOOK_NAME}"


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_several_tokens_a_step(method: str) -> None:
    """All draft tokens are right: 4 of them and one more token make five tokens a step."""
    engine = scripted_engine(
        kinds=["right"], num_speculative_tokens=4, async_scheduling=False, speculative_method=method
    )
    engine.add_request("0", [100], params_for(26, ignore_eos=True))
    answers = run_dry(engine)
    got = (answers["0"].token_ids, engine.num_steps)
    expected = (answer_alone([100], 26, ignore_eos=True), 1 + 5)
    assert got == expected, f"(tokens, steps): expected {expected}, got {got}. {LOOK_RUNNING}"


def test_without_draft_tokens_the_steps_are_part_7s() -> None:
    logs = []
    for kinds in ([], ["none"]):
        engine: LLMEngine = scripted_engine(kinds=kinds, max_num_seqs=3, async_scheduling=False)
        for number in range(5):
            engine.add_request(str(number), [100 + number] * (3 + number), params_for(6))
        run_dry(engine)
        logs.append([[(w.request_id, len(w.input_slots)) for w in step.work] for step in executor_of(engine).launched])
    assert logs[0] == logs[1], f"no draft tokens: expected the same steps, got {logs[1]}. {LOOK_RUNNING}"


def test_without_draft_tokens_two_steps_are_in_flight() -> None:
    """A proposer that finds nothing costs no overlap: each step is launched before the result of the one before."""
    engine = scripted_engine(kinds=["none"])
    engine.add_request("0", [100], params_for(9, ignore_eos=True))
    run_dry(engine)
    log = executor_of(engine).log
    expected = ["launch 1"] + [f"{what} {n + (what == 'launch')}" for n in range(1, 9) for what in ("launch", "result")]
    assert log == [*expected, "result 9"], f"expected {expected}, got {log}. {LOOK_AHEAD}"


def test_a_match_makes_the_engine_wait_for_the_step_in_flight() -> None:
    """No match, then matches, then none: launches and results are in the order that this allows."""
    engine = scripted_engine(script=lambda token_ids: len(token_ids) % 20, kinds=["right"], num_speculative_tokens=2)
    look_up = engine.speculation.look_up
    engine.speculation.look_up = lambda request, num_running: (  # type: ignore[method-assign]
        look_up(request, num_running) if 4 <= request.num_tokens < 10 else []
    )
    engine.add_request("0", [100], params_for(14, ignore_eos=True))
    answers = run_dry(engine)
    log, lengths = executor_of(engine).log, [len(step.work[0].draft_token_ids) for step in executor_of(engine).launched]
    first = next(number for number, length in enumerate(lengths, 1) if length)
    last = max(number for number, length in enumerate(lengths, 1) if length)
    for number in range(1, len(lengths)):
        waits = log.index(f"result {number}") < log.index(f"launch {number + 1}")
        expected = first - 1 <= number <= last
        assert waits is expected, (
            f"steps {first} to {last} verify draft tokens. Step {number + 1}: expected it to wait for the result of "
            f"step {number}: {expected}, got {waits}; {log}. {LOOK_AHEAD}"
        )
    assert answers["0"].token_ids == [number % 20 for number in range(1, 15)], f"got {answers}. {LOOK_APPEND}"
