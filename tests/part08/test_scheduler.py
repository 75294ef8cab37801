"""core/scheduler.py with guesses: whose, how many, at whose cost, and who has to wait for what they bring."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import pytest

from common.sampling_params import SamplingParams
from part08_speculative_decoding.core.block_manager import BlockManager
from part08_speculative_decoding.core.engine import LLMEngine
from part08_speculative_decoding.core.request import Request, RequestStatus
from part08_speculative_decoding.core.scheduler import Scheduler, SchedulerOutput
from part08_speculative_decoding.core.speculation import PROBE_INTERVAL, Speculation
from tests.part08.scripted import BY_PROMPT, proposer_of, run_dry, scripted_engine, take_step, watch
from tests.scripted import answer_alone, ids, next_token, params_for, runner_of

LESSON = 'README "Guess, then check"'
LOOK_RUNNING = f"Look at core/scheduler.py::Scheduler._schedule_running; {LESSON}."
LOOK_ADD = f"Look at core/scheduler.py::SchedulerOutput.add; {LESSON}."
LOOK_APPEND = 'Look at core/engine.py::LLMEngine._append; README "What the step brought".'
LOOK_PREEMPT = f"Look at core/scheduler.py::Scheduler.preempt; {LESSON}."
LOOK_GUESSES = f"Look at core/scheduler.py::Scheduler.allocate_guesses; {LESSON}."
LOOK_PROBE = 'Look at core/speculation.py::Speculation.num_tokens; README "How many guesses".'
LOOK_NAME = 'Look at core/scheduler.py::Scheduler._add, _release; README "A cache that keeps step".'


class Always(Speculation):
    """As many guesses as there may be, whoever asks: what is tested here is what becomes of them."""

    def num_tokens(self, request: Request, num_running: int) -> int:
        return self.num_speculative_tokens


def scheduler_of(
    num_blocks: int = 100, block_size: int = 4, max_num_seqs: int = 8, budget: int = 64, **options: Any
) -> Scheduler:
    blocks = BlockManager(num_blocks, block_size)
    scheduler = Scheduler(blocks, max_num_seqs, budget, speculation=Always(8, 8), watermark=0, **options)
    watch(scheduler)
    return scheduler


def running(
    scheduler: Scheduler, name: str, num_prompt: int, drafts: Sequence[int] = (), max_tokens: int = 50
) -> Request:
    """A request after its prefill, with one token of output and guesses."""
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
    request.num_output_placeholders = 0
    request.draft_token_ids = []
    request.output_token_ids += token_ids


def given(output: SchedulerOutput) -> dict[str, tuple[int, int]]:
    """Request → (tokens scheduled, tokens it may get)."""
    return dict(
        zip(ids(output.requests), zip(output.num_scheduled_tokens, output.num_sampled_tokens, strict=True), strict=True)
    )


def check(output: SchedulerOutput, expected: dict[str, tuple[int, int]], why: str) -> None:
    got = given(output)
    assert got == expected, f"{why}: expected (tokens, samples) {expected}, got {got}. {LOOK_RUNNING}"


# One request


@pytest.mark.parametrize("num_drafts", [0, 1, 5])
def test_its_own_token_and_its_guesses(num_drafts: int) -> None:
    scheduler = scheduler_of()
    request = running(scheduler, "0", 6, range(num_drafts))
    output = scheduler.schedule()
    check(output, {"0": (1 + num_drafts, 1 + num_drafts)}, f"{num_drafts} guesses")
    got = (request.num_computed_tokens, request.num_output_placeholders, request.draft_token_ids)
    expected = (7 + num_drafts, 1 + num_drafts, list(range(num_drafts)))
    assert got == expected, f"(computed, placeholders, guesses): expected {expected}, got {got}. {LOOK_ADD}"
    assert output.num_computed_tokens == [6], (
        f"computed before: expected [6], got {output.num_computed_tokens}. {LOOK_ADD}"
    )


@pytest.mark.parametrize(("max_tokens", "expected"), [(2, 0), (3, 1), (4, 2), (5, 3), (6, 4), (7, 4)])
def test_never_past_the_last_token(max_tokens: int, expected: int) -> None:
    """One token is out, the step brings one even if no guess stands: the others may be guessed."""
    scheduler = scheduler_of()
    request = running(scheduler, "0", 6, [1, 2, 3, 4], max_tokens)
    check(scheduler.schedule(), {"0": (1 + expected, 1 + expected)}, f"max_tokens {max_tokens}, one is out, 4 guesses")
    assert request.draft_token_ids == [1, 2, 3, 4][:expected], f"kept {request.draft_token_ids}. {LOOK_ADD}"


@pytest.mark.parametrize(("num_accepted", "num_computed"), [(0, 7), (1, 8), (3, 10)])
def test_after_a_rejection_it_computes_from_the_first_wrong_one_on(num_accepted: int, num_computed: int) -> None:
    scheduler = scheduler_of()
    request = running(scheduler, "0", 6, [1, 2, 3])
    scheduler.schedule()
    bring(request, [1, 2, 3, 4][:num_accepted] + [77])
    assert request.num_computed_tokens == num_computed, f"got {request.num_computed_tokens}. {LOOK_APPEND}"
    output = scheduler.schedule()
    check(output, {"0": (1, 1)}, f"{num_accepted} of 3 stood, no new guesses")
    assert output.num_computed_tokens == [num_computed], f"got {output.num_computed_tokens}. {LOOK_APPEND}"


# Who waits, who runs ahead


def test_whose_guesses_are_in_flight_is_not_scheduled_again() -> None:
    scheduler = scheduler_of()
    running(scheduler, "0", 6, [1, 2, 3])
    scheduler.schedule()
    check(scheduler.schedule(), {}, "3 guesses in flight: nobody knows how many tokens they bring")


def test_nor_when_so_many_run_that_nobody_guesses_any_more() -> None:
    """It guessed alone; then others joined, and with more than speculative_max_num_seqs running nobody may guess."""
    scheduler = scheduler_of()
    scheduler.speculation = Speculation(4, 1)
    running(scheduler, "0", 6, [1, 2, 3])
    for number in range(1, 3):
        scheduler.add_request(Request(str(number), [5, 6], SamplingParams(), 50))
    check(scheduler.schedule(), {"0": (4, 4), "1": (2, 1), "2": (2, 1)}, "two join the step with the guesses")
    check(scheduler.schedule(), {"1": (1, 1), "2": (1, 1)}, "three run, guesses of 0 are in flight; 1 and 2 run ahead")


def test_who_could_guess_waits_for_its_token_and_who_could_not_runs_ahead() -> None:
    scheduler = scheduler_of()
    scheduler.speculation = Speculation(4, 8)
    one, two = running(scheduler, "0", 6), running(scheduler, "1", 6)
    bring(one, [91] * one.num_output_placeholders)  # it took part in the other's prefill
    two.acceptance = 0.1
    check(scheduler.schedule(), {"0": (1, 1), "1": (1, 1)}, "both lack one")
    check(
        scheduler.schedule(), {"1": (1, 1)}, "0 will guess when its token has come, 1 guesses too badly and runs ahead"
    )


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
def test_a_bad_guesser_is_tried_again(is_async: bool) -> None:
    """Also if it runs ahead of its tokens: it is held back once, so that all is known when its turn comes."""
    engine = scripted_engine(
        max_model_len=200, kinds=["wrong"], num_speculative_tokens=3, async_scheduling=is_async, max_num_seqs=2
    )
    engine.add_request("0", [100], params_for(4 * PROBE_INTERVAL, ignore_eos=True))
    run_dry(engine)
    asked = proposer_of(engine).asked
    probes = [count for _, count in asked if count == 1]
    num_early = sum(count > 1 for _, count in asked)
    assert num_early <= 12 and len(probes) >= 3, (
        f"{4 * PROBE_INTERVAL} tokens, all guesses wrong: expected some at first, then one every {PROBE_INTERVAL} "
        f"tokens; "
        f"the proposer was asked for {[count for _, count in asked]}. {LOOK_PROBE}"
    )
    if is_async:
        num_ahead = sum(log.startswith("launch") for log in runner_of(engine).log)
        assert num_ahead <= 4 * PROBE_INTERVAL, f"{num_ahead} steps. {LOOK_PROBE}"


# At whose cost


def test_the_budget_is_everybody_s_own_token_first() -> None:
    scheduler = scheduler_of(max_num_seqs=4, budget=8)
    for number in range(4):
        running(scheduler, str(number), 1, [1, 2, 3])
        for request in scheduler.running[:-1]:  # they took part in the last one's prefill
            if request.num_output_placeholders:
                bring(request, [1] * request.num_output_placeholders)
    for request in scheduler.running:
        request.draft_token_ids = [1, 2, 3]
    expected = {"0": (4, 4), "1": (2, 2), "2": (1, 1), "3": (1, 1)}
    check(scheduler.schedule(), expected, "a budget of 8, four with 3 guesses each: 4 tokens are theirs, 4 are left")


def test_a_chunk_gets_what_guesses_leave() -> None:
    scheduler = scheduler_of(max_num_seqs=2, budget=6)
    request = running(scheduler, "0", 1, [1, 2])
    scheduler.add_request(Request("1", list(range(10, 30)), SamplingParams(), 50))
    check(scheduler.schedule(), {"0": (3, 3), "1": (3, 0)}, "a budget of 6, 2 guesses, a prompt of 20")
    bring(request, [1, 2, 3])
    request.draft_token_ids = [1, 2, 3, 4, 5, 6]
    check(scheduler.schedule(), {"0": (5, 5), "1": (1, 0)}, "6 guesses: the chunk's one token is taken before them")


def test_nobody_leaves_for_a_guess() -> None:
    """Blocks of 4, 4 of them: 0 has 7 tokens and would need a third block for its guesses, 1 holds the others."""
    scheduler = scheduler_of(num_blocks=5, block_size=4)
    first = running(scheduler, "0", 6)
    running(scheduler, "1", 6)
    bring(first, [91] * first.num_output_placeholders)  # it took part in the other's prefill
    first.draft_token_ids = [1, 2, 3]
    output = scheduler.schedule()
    assert not output.preempted, f"{ids(output.preempted)} had to leave for a guess. {LOOK_RUNNING}"
    check(output, {"0": (1, 1), "1": (1, 1)}, "no block for guesses: they are dropped, the tokens are not")
    assert first.draft_token_ids == [], f"guesses that are not in the step: {first.draft_token_ids}. {LOOK_ADD}"


@pytest.mark.parametrize(("num_free", "num_given"), [(1, 1), (2, 4)])
def test_a_guess_leaves_a_block_for_who_comes_after(num_free: int, num_given: int) -> None:
    """Blocks of 4: 0 has 8 tokens and would guess into a third block, 1 has 9 and needs a third one for its own."""
    scheduler = scheduler_of(num_blocks=1 + 4 + num_free, block_size=4)
    first = running(scheduler, "0", 6)
    running(scheduler, "1", 8)
    bring(first, [91] * first.num_output_placeholders)  # it took part in the other's prefill
    first.draft_token_ids = [1, 2, 3]
    output = scheduler.schedule()
    assert not output.preempted, f"{num_free} free: {ids(output.preempted)} had to leave for a guess. {LOOK_GUESSES}"
    check(output, {"0": (num_given, num_given), "1": (1, 1)}, f"{num_free} free, a guess and 1's own token need one")


def test_blocks_for_guesses_as_well() -> None:
    scheduler = scheduler_of(block_size=4)
    running(scheduler, "0", 6, [1, 2, 3])
    scheduler.schedule()
    table = scheduler.blocks.block_tables["0"]
    assert len(table) == 3, f"7 tokens and 3 guesses, blocks of 4: expected 3 blocks, got {table}. {LOOK_RUNNING}"


# Preempted with guesses


def test_guesses_that_were_judged_are_gone() -> None:
    """0 guesses alone; then 1 comes, and with two running nobody may: what 0 guessed before must not be tried again."""
    engine = scripted_engine(
        kinds=["right"], num_speculative_tokens=3, speculative_max_num_seqs=1, async_scheduling=False
    )
    engine.add_request("0", [100, 101], params_for(20, ignore_eos=True))
    take_step(engine)
    request = engine.scheduler.running[0]
    assert request.draft_token_ids, f"0 runs alone and was to guess. {LOOK_RUNNING}"
    engine.add_request("1", [120, 121], params_for(20, ignore_eos=True))
    take_step(engine)
    got = [each.draft_token_ids for each in engine.scheduler.running]
    assert got == [[], []], f"expected no guesses, got {got}. Look at core/engine.py::LLMEngine._propose; {LESSON}."


def test_a_preempted_request_has_no_guesses() -> None:
    scheduler = scheduler_of()
    request = running(scheduler, "0", 6, [1, 2, 3])
    scheduler.preempt(request)
    got = (request.draft_token_ids, request.draft_probs, request.status)
    assert got == ([], None, RequestStatus.WAITING), f"expected ([], None, WAITING), got {got}. {LOOK_PREEMPT}"


def test_preempted_while_its_guesses_are_checked() -> None:
    """What the step in flight brings it is its own; it computes everything again, and no more than that."""
    scheduler = scheduler_of(num_blocks=7, block_size=2)
    scheduler.speculation = Speculation(4, 8)
    early = running(scheduler, "0", 2)
    late = running(scheduler, "1", 3)
    early.acceptance = 0.0  # it runs ahead
    bring(early, [92] * early.num_output_placeholders)
    late.draft_token_ids = [1, 2]
    check(scheduler.schedule(), {"0": (1, 1), "1": (3, 3)}, "the later one guesses")
    output = scheduler.schedule()
    while not output.preempted:
        bring(early, [93] * early.num_output_placeholders)
        output = scheduler.schedule()
    assert ids(output.preempted) == ["1"] and late.num_output_placeholders == 3, (
        f"expected 1 to leave with 3 tokens in flight, got {ids(output.preempted)}, {late.num_output_placeholders}. "
        f"{LOOK_PREEMPT}"
    )
    scheduler.finish(early)
    check(scheduler.schedule(), {}, "its step is in flight: it does not come back before what that brings")


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
def test_preempted_again_and_again(is_async: bool) -> None:
    """The first four guess badly and run ahead, those behind them guess well, in a pool too small for all."""
    engine = scripted_engine(
        max_model_len=128, kinds=[BY_PROMPT, "right", "wrong"], num_speculative_tokens=3, num_kv_blocks=30,
        block_size=2, max_num_seqs=6, async_scheduling=is_async, enable_prefix_caching=False,
    )  # fmt: skip
    seen = list[str]()
    preempt = engine.scheduler.preempt

    def note(request: Request) -> None:
        if request.num_output_placeholders > 1:
            seen.append(request.request_id)
        preempt(request)

    engine.scheduler.preempt = note  # type: ignore[method-assign]
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
    assert seen or not is_async, "nobody was preempted with guesses in flight, so this proves nothing"


# Guesses and prefix caching


def test_a_block_with_guesses_in_it_has_no_name() -> None:
    scheduler = scheduler_of(block_size=4)
    request = running(scheduler, "0", 6, [1, 2, 3, 4])  # 7 tokens and 4 guesses: guesses would fill two blocks
    output = scheduler.schedule()
    found = len(scheduler.blocks.cached_blocks)
    assert found == 1 and not output.registered, (
        f"7 known tokens, 4 guesses, blocks of 4: expected one block with a name, got {found}; guesses may fall. "
        f"{LOOK_NAME}"
    )
    bring(request, [1, 77])
    scheduler.schedule()
    found = len(scheduler.blocks.cached_blocks)
    assert found == 2, f"9 known tokens of which 8 are computed: expected 2 blocks with names, got {found}. {LOOK_NAME}"
    assert request.block_hashes == scheduler.blocks.hash_blocks(request)[:2], f"names of guesses. {LOOK_NAME}"


def test_what_was_guessed_is_found_by_the_next_only_if_it_stood() -> None:
    """The first answer's guesses are half right; the second prompt is the first's text, and hits what is written."""
    for kind in ("right", "half", "wrong"):
        engine = scripted_engine(kinds=[kind], num_speculative_tokens=4, block_size=2, async_scheduling=False)
        engine.add_request("0", [100, 101], params_for(20, ignore_eos=True))
        texts = list[list[int]]()

        def join(number: int, engine: LLMEngine = engine, texts: list[list[int]] = texts) -> None:
            if number == 3:
                texts.append([*engine.scheduler.running[0].token_ids, 99])
                engine.add_request("1", texts[0], params_for(8, ignore_eos=True))

        answers = run_dry(engine, join)
        expected, got = answer_alone(texts[0], 8, ignore_eos=True), answers["1"].token_ids
        assert got == expected, f"{kind} guesses: expected {expected}, got {got}. {LOOK_NAME}"
        assert answers["1"].num_cached_tokens, f"{kind} guesses: expected a hit, got none. {LOOK_NAME}"


def test_several_tokens_a_step() -> None:
    """All guesses right: 4 guesses and the token after them make five tokens a step."""
    engine = scripted_engine(kinds=["right"], num_speculative_tokens=4, async_scheduling=False)
    engine.add_request("0", [100], params_for(26, ignore_eos=True))
    answers = run_dry(engine)
    got = (answers["0"].token_ids, engine.num_steps)
    expected = (answer_alone([100], 26, ignore_eos=True), 1 + 5)
    assert got == expected, f"(tokens, steps): expected {expected}, got {got}. {LOOK_RUNNING}"


def test_without_guesses_it_is_part_7s_schedule() -> None:
    logs = []
    for kinds in ([], ["none"]):
        engine: LLMEngine = scripted_engine(kinds=kinds, max_num_seqs=3, async_scheduling=False)
        for number in range(5):
            engine.add_request(str(number), [100 + number] * (3 + number), params_for(6))
        run_dry(engine)
        logs.append([[(w.request_id, len(w.input_slots)) for w in step.work] for step in runner_of(engine).launched])
    assert logs[0] == logs[1], f"no guesses are made: expected the same steps, got {logs[1]}. {LOOK_RUNNING}"
    assert next_token([100]) == next_token([100])
