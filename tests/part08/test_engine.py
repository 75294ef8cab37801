"""core/engine.py with draft tokens: several tokens from one step, and the same answers as without speculation."""

from __future__ import annotations

import contextlib
import functools
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from common.errors import FieldError
from common.outputs import CompletionOutput
from common.sampling_params import SamplingParams
from common.testing import FAMILIES, assert_same_greedy, reference_greedy
from common.trace import Phase, read_trace, step_phases
from part08_speculative_decoding.config import EngineConfig
from part08_speculative_decoding.core.engine import LLMEngine
from part08_speculative_decoding.core.request import Request, RequestStatus
from part08_speculative_decoding.core.speculation import Speculation
from part08_speculative_decoding.llm import LLM
from part08_speculative_decoding.messages import ScheduledRequest, StepInput, StepOutput, encode
from part08_speculative_decoding.worker.stream import Finish, Work
from tests.part08.scripted import run_dry, scripted_engine, take_step, watch
from tests.scripted import END, answer_alone, executor_of, params_for

LOOK_UNTIL_STOP = 'Look at core/engine.py::LLMEngine._append_until_stop; README "Several tokens from one step".'
LOOK_APPEND = 'Look at core/engine.py::LLMEngine._append; README "Several tokens from one step".'
LOOK_ROOM = 'Look at core/scheduler.py::Scheduler._choose_drafts and _num_next_drafts; README "Propose, then verify".'
LOOK_VERIFY = (
    "Look at worker/rejection_sampler.py::verify_drafts and worker/model_runner.py::ModelRunner.prepare; "
    'README "Verifying draft tokens".'
)
LOOK_SEEDED = 'Look at worker/sampler.py::draw; README "Verifying draft tokens".'
LOOK_CONFIG = 'Look at config.py::EngineConfig; README "How many draft tokens".'
LOOK_DRAFT = 'Look at config.py::check_draft_model and worker/draft_model.py; README "Two proposers".'
LOOK_TRACE = 'Look at core/step_tracer.py::StepTracer; README "Propose, then verify".'
LOOK_FAIL = 'Look at core/engine.py::LLMEngine.fail; README "Several tokens from one step".'
LOOK_RACE = "Look at worker/model_runner.py::ModelRunner: prepare() touches nothing that a step in flight still uses."
LOOK_BORDER = "Look at messages.py::StepInput and StepOutput: plain data."

MakeLLM = Callable[..., LLM]
MakeEngine = Callable[..., LLMEngine]
PromptOf = Callable[..., list[int]]
SmallModels = Callable[..., tuple[str, Any]]
SMALL_VOCAB = 24


# Several tokens from one step


class Noted(Speculation):
    """Notes what was verified."""

    def __init__(self) -> None:
        super().__init__(EngineConfig(device="cpu"))
        self.noted: list[tuple[int, int]] = []

    def verified(self, request: Request, num_draft_tokens: int, num_accepted: int) -> None:
        self.noted.append((num_draft_tokens, num_accepted))


def in_flight(
    num_drafts: int, status: RequestStatus = RequestStatus.RUNNING, **fields: Any
) -> tuple[LLMEngine, Request, ScheduledRequest]:
    """A request of 3 + 1 tokens, after a step with num_drafts draft tokens was scheduled for it."""
    engine = scripted_engine(num_kv_blocks=50, block_size=4)
    engine.speculation = engine.scheduler.speculation = Noted()
    params = SamplingParams(**{"temperature": 0, "max_tokens": 20, **fields})
    request = Request("0", [50, 51, 52], params, 3 + params.max_tokens)
    request.output_token_ids.append(60)
    request.status, request.num_output_placeholders = status, 1 + num_drafts
    share = ScheduledRequest(5, 3, 1 + num_drafts, True, [], [90] * num_drafts, 2)
    if status is RequestStatus.RUNNING:
        request.num_computed_tokens, request.num_pending_drafts = 4 + num_drafts, 2
        request.row = engine.scheduler.free_rows.pop()
        engine.scheduler.running.append(request)
        engine.blocks.admit("0", 4 + num_drafts, [])
    elif status is RequestStatus.PREEMPTED:
        engine.scheduler.waiting.append(request)
    return engine, request, share


def check_append(
    engine: LLMEngine, request: Request, share: ScheduledRequest, new: list[int], expected: dict[str, Any]
) -> None:
    output = StepOutput([[1], new], [None, None], [[], [31, 32]])
    returned = engine._append(request, share, output, 1)
    speculation = engine.speculation
    assert isinstance(speculation, Noted)
    got: dict[str, Any] = {
        "returned": returned and returned.token_ids,
        "output": request.output_token_ids[1:],
        "placeholders": request.num_output_placeholders,
        "computed": request.num_computed_tokens,
        "verified": speculation.noted,
        "drafts": (request.draft_token_ids, request.num_pending_drafts),
    }
    for name, want in expected.items():
        assert got[name] == want, (
            f"{len(share.draft_token_ids)} draft tokens were in flight, {request.status.name}, the step brought {new}; "
            f"{name}: expected {want}, got {got[name]}. {LOOK_APPEND}"
        )


@pytest.mark.parametrize("num_accepted", [0, 1, 2, 3])
def test_the_positions_of_rejected_draft_tokens_do_not_count_as_computed(num_accepted: int) -> None:
    engine, request, share = in_flight(3)
    new = [7, 8, 9, 10][: num_accepted + 1]
    expected = dict(
        returned=new, output=new, placeholders=0, computed=4 + num_accepted, verified=[(3, num_accepted)],
        drafts=([31, 32], 0),
    )  # fmt: skip
    check_append(engine, request, share, new, expected)
    assert request.num_new_tokens == 1, f"its newest token is not computed, got {request.num_new_tokens}. {LOOK_APPEND}"


def test_a_step_without_draft_tokens() -> None:
    engine, request, share = in_flight(0)
    check_append(
        engine, request, share, [7], dict(returned=[7], output=[7], placeholders=0, computed=4, verified=[(0, 0)])
    )


def test_draft_tokens_of_a_later_step_are_still_pending() -> None:
    """This step proposed nothing, so another one was launched before its result; that one proposes two."""
    engine, request, share = in_flight(0)
    share.num_next_drafts, request.num_output_placeholders = 0, 2
    output = StepOutput([[7]], [None], [[]])
    engine._append(request, share, output, 0)
    got = (request.draft_token_ids, request.num_pending_drafts, request.num_output_placeholders)
    assert got == ([], 2, 1), f"expected ([], 2 pending, 1 placeholder), got {got}. {LOOK_APPEND}"


def test_a_preempted_request_keeps_the_tokens_of_its_step() -> None:
    engine, request, share = in_flight(3, RequestStatus.PREEMPTED)
    expected = dict(
        returned=[7, 8], output=[7, 8], placeholders=0, computed=0, verified=[(3, 1)], drafts=(list[int](), 0)
    )
    check_append(engine, request, share, [7, 8], expected)


def test_a_request_that_has_ended_gets_nothing() -> None:
    engine, request, share = in_flight(2, RequestStatus.FINISHED_ABORTED)
    expected = dict(returned=None, output=list[int](), placeholders=0, verified=list[int]())
    check_append(engine, request, share, [7, 8, 9], expected)


ENDS: list[tuple[dict[str, Any], list[int], list[int], tuple[Any, Any]]] = [
    ({}, [7, END, 9, 9], [7, END], ("stop", None)),
    ({}, [END, 8, 9, 9], [END], ("stop", None)),
    ({}, [7, 8, 9, END], [7, 8, 9, END], ("stop", None)),
    ({"ignore_eos": True}, [7, END, 9, 9], [7, END, 9, 9], (None, None)),
    ({"stop_token_ids": [8]}, [7, 8, 9, 9], [7, 8], ("stop", 8)),
    ({"stop_token_ids": [9]}, [7, 8, 9, 9], [7, 8, 9], ("stop", 9)),
    ({"min_tokens": 4}, [7, END, END, 9], [7, END, END], ("stop", None)),
    ({"max_tokens": 3}, [7, 8, 9, 9], [7, 8], ("length", None)),
    ({"max_tokens": 3}, [7, END, 9, 9], [7, END], ("stop", None)),
    ({"max_tokens": 2}, [7, 8, 9, 9], [7], ("length", None)),
    ({"max_tokens": 5}, [7, 8, 9, 9], [7, 8, 9, 9], ("length", None)),
]


@pytest.mark.parametrize(("fields", "new", "expected", "reason"), ENDS, ids=str)
def test_a_request_may_end_among_the_tokens_of_a_step(
    fields: dict[str, Any], new: list[int], expected: list[int], reason: tuple[Any, Any]
) -> None:
    engine, request, _ = in_flight(3, **fields)
    request.num_output_placeholders = 0
    returned = engine._append_until_stop(request, new)
    got = {
        "returned": returned,
        "output": request.output_token_ids[1:],
        "reason": (request.finish_reason, request.stop_reason),
        "running": request in engine.scheduler.running,
        "blocks": engine.blocks.num_used_blocks,
    }
    has_ended = reason[0] is not None
    wanted = {
        "returned": expected, "output": expected, "reason": reason, "running": not has_ended,
        "blocks": 0 if has_ended else 2,
    }  # fmt: skip
    for name, want in wanted.items():
        assert got[name] == want, (
            f"{fields}, the step brought {new}; {name}: expected {want}, got {got[name]}. {LOOK_UNTIL_STOP}"
        )


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("method", ["ngram", "draft_model"])
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 6])
def test_no_token_too_many(max_tokens: int, method: str, is_async: bool) -> None:
    """All draft tokens are right, up to 4 a step: it still ends after max_tokens, and computes nothing in vain."""
    engine = scripted_engine(
        kinds=["right"], num_speculative_tokens=4, async_scheduling=is_async, speculative_method=method
    )
    engine.add_request("0", [100], params_for(max_tokens, ignore_eos=True))
    answers = run_dry(engine)
    expected = answer_alone([100], max_tokens, ignore_eos=True)
    assert answers["0"].token_ids == expected, f"expected {expected}, got {answers['0'].token_ids}. {LOOK_UNTIL_STOP}"
    num_computed = executor_of(engine).num_tokens_computed
    assert num_computed == max_tokens, (
        f"1 prompt token and {max_tokens} of output, the last of which is never computed: expected {max_tokens} "
        f"positions, got {num_computed}. {LOOK_ROOM}"
    )


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
@pytest.mark.parametrize("num_prompt", [10, 13, 14, 15])
def test_not_past_the_context(num_prompt: int, method: str) -> None:
    engine = scripted_engine(
        max_model_len=16, kinds=["right", "half"], num_speculative_tokens=6, speculative_method=method
    )
    engine.add_request("0", list(range(100, 100 + num_prompt)), params_for(100, ignore_eos=True))
    answers = run_dry(engine)
    got = (len(answers["0"].token_ids), answers["0"].finish_reason)
    assert got == (16 - num_prompt, "length"), (
        f"{num_prompt} of 16: expected {(16 - num_prompt, 'length')}, got {got}. {LOOK_ROOM}"
    )


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_a_pool_without_room_for_draft_tokens(method: str) -> None:
    """The pool holds exactly its tokens: no draft token takes a block that is not there, and none waits for one."""
    engine = scripted_engine(
        kinds=["right"], num_kv_blocks=4, block_size=4, num_speculative_tokens=4, speculative_method=method
    )
    engine.add_request("0", [100, 101], params_for(11, ignore_eos=True))
    answers = run_dry(engine)
    assert answers["0"].token_ids == answer_alone([100, 101], 11, ignore_eos=True), f"got {answers}. {LOOK_ROOM}"
    assert engine.scheduler.num_preemptions == 0, f"{engine.scheduler.num_preemptions} preemptions. {LOOK_ROOM}"


def test_steps_with_and_without_proposals_in_flight_together() -> None:
    """A step that proposes nothing, as there is no room, then one that proposes: its proposals are waited for."""
    engine = scripted_engine(
        kinds=["right"], num_kv_blocks=14, block_size=2, num_speculative_tokens=3, speculative_method="draft_model",
        max_num_seqs=4, enable_prefix_caching=False,
    )  # fmt: skip
    for number in range(4):
        engine.add_request(str(number), [100 + number] * 4, params_for(6 + 2 * number, ignore_eos=True))
    answers = run_dry(engine)
    shares = [[work.share for work in step.work] for step in executor_of(engine).launched]
    mixed = [any(s.num_next_drafts for s in step) and not all(s.num_next_drafts for s in step) for step in shares]
    assert any(mixed), "no step proposes for some requests only, so this proves nothing"
    for number in range(4):
        expected = answer_alone([100 + number] * 4, 6 + 2 * number, ignore_eos=True)
        got = answers[str(number)].token_ids
        assert got == expected, f"request {number}: expected {expected}, got {got}. {LOOK_APPEND}"
    stats = engine.speculation.stats
    assert stats.num_accepted_tokens == stats.num_draft_tokens > 0, (
        f"all proposals are right: expected all accepted, got {stats}. A proposal was verified at another position "
        f"than it was made for. {LOOK_APPEND}"
    )


# The same answers


ROOM: dict[str, dict[str, Any]] = {
    "room": dict(num_kv_blocks=400, speculative_max_num_seqs=64),
    "preempting": dict(num_kv_blocks=16, block_size=4, max_num_seqs=6),
    "small budget": dict(max_num_batched_tokens=9, max_num_seqs=5),
}
RUNS = [
    *(("ngram", True, "room"), ("draft_model", True, "room"), ("draft_model", True, "preempting")),
    *(("ngram", False, "preempting"), ("ngram", True, "small budget"), ("draft_model", False, "small budget")),
]


def mixed(prompt_of: PromptOf) -> tuple[list[list[int]], list[SamplingParams]]:
    """24 requests: stories, texts that repeat, lists; greedy ones, seeded ones, penalties, all kinds of ends."""
    rng = random.Random(5)
    prompts, params = [], []
    for number in range(24):
        prompt = prompt_of(rng.randint(3, 30), number)
        if number % 3 == 1:
            prompt = (prompt[:6] * 5)[:26]
        elif number % 6 == 2:
            prompt = [*prompt_of(16), *prompt[:4]]  # they share a beginning
        fields: dict[str, Any] = dict(temperature=0, max_tokens=rng.randint(1, 18), ignore_eos=number % 4 > 0)
        if number % 4 == 1:
            fields |= dict(temperature=rng.choice([0.5, 0.8, 1.2]), seed=number, top_k=rng.choice([0, 20]), top_p=0.95)
        if number % 5 == 3:
            fields |= dict(frequency_penalty=0.6, presence_penalty=0.3, repetition_penalty=1.2)
        if number % 7 == 4:
            fields |= dict(min_tokens=min(4, fields["max_tokens"]), logit_bias={2: 4.0})
        if number % 8 == 5:
            fields |= dict(logprobs=2)
        prompts.append(prompt)
        params.append(SamplingParams(**fields))
    return prompts, params


@pytest.fixture(scope="module")
def alone(llm: LLM, prompt_of: PromptOf) -> list[CompletionOutput]:
    """The mixed requests' answers without speculation."""
    return [result.outputs[0] for result in llm.generate(*mixed(prompt_of))]


def test_what_they_are_compared_with_is_transformers(
    llm: LLM, alone: list[CompletionOutput], prompt_of: PromptOf, reference: Any
) -> None:
    num_compared = 0
    for number, (prompt, params, answer) in enumerate(zip(*mixed(prompt_of), alone, strict=True)):
        if params == SamplingParams(temperature=0, max_tokens=params.max_tokens, ignore_eos=params.ignore_eos):
            eos = [] if params.ignore_eos else [2]
            expected = reference_greedy(reference, prompt, params.max_tokens, eos)
            assert_same_greedy(reference, prompt, answer.token_ids, expected, f"request {number}")
            num_compared += 1
    assert num_compared >= 8


@pytest.mark.parametrize(("method", "is_async", "room"), RUNS)
def test_the_same_answers_as_without_speculation(
    make_llm: MakeLLM, prompt_of: PromptOf, alone: list[CompletionOutput], reference: Any, method: str, is_async: bool,
    room: str,
) -> None:  # fmt: skip
    """Greedy and seeded: token for token, logprobs within 1e-4."""
    llm = make_llm(speculative_method=method, async_scheduling=is_async, num_speculative_tokens=4, **ROOM[room])
    prompts, params = mixed(prompt_of)
    answers = [result.outputs[0] for result in llm.generate(prompts, params)]
    for number, (prompt, each, expected, got) in enumerate(zip(prompts, params, alone, answers, strict=True)):
        where = f"{method}, {room}, request {number} ({each})"
        if each.temperature == 0 and each.repetition_penalty == 1 and not each.logit_bias:
            assert_same_greedy(reference, prompt, got.token_ids, expected.token_ids, where)
        else:
            assert got.token_ids == expected.token_ids, (
                f"{where}: without speculation {expected.token_ids}, with it {got.token_ids}. "
                f"{LOOK_SEEDED if each.seed is not None else LOOK_VERIFY}"
            )
        assert (got.finish_reason, got.stop_reason, got.text) == (
            expected.finish_reason, expected.stop_reason, expected.text
        ), f"{where}: expected {expected}, got {got}. {LOOK_APPEND}"  # fmt: skip
        assert len(got.logprobs or []) == len(expected.logprobs or []), f"{where}: got {got.logprobs}. {LOOK_APPEND}"
        for mine, other in zip(got.logprobs or [], expected.logprobs or [], strict=True):
            distances = [abs(mine[token].logprob - other[token].logprob) for token in mine if token in other]
            assert list(mine)[:1] == list(other)[:1] and max(distances) < 1e-4, (
                f"{where}: log-probabilities {other} without speculation, {mine} with it. {LOOK_APPEND}"
            )
    stats, scheduler = llm.engine.speculation.stats, llm.engine.scheduler
    assert stats.num_accepted_tokens >= 5, f"proves nothing: {stats}"
    assert room != "preempting" or scheduler.num_preemptions >= 3, f"only {scheduler.num_preemptions} preemptions"


@pytest.mark.parametrize("family", FAMILIES)
def test_small_models_of_all_families(small_models: SmallModels, family: str) -> None:
    """The draft model is of another family, so mostly wrong, or the target itself, so always right."""
    directory, reference = small_models(family, 3)
    other, _ = small_models(FAMILIES[FAMILIES.index(family) - 1], 4)
    rng = random.Random(1)
    prompts = [[rng.randrange(320) for _ in range(rng.randint(2, 40))] for _ in range(5)]
    expected = [reference_greedy(reference, prompt, 14) for prompt in prompts]
    for draft in (other, directory):
        engine = LLMEngine(
            EngineConfig(
                model=directory, speculative_model=draft, speculative_method="draft_model", device="cpu",
                num_kv_blocks=40, block_size=4, num_speculative_tokens=3,
            )
        )  # fmt: skip
        watch(engine.scheduler)
        for number, prompt in enumerate(prompts):
            engine.add_request(str(number), prompt, params_for(14, ignore_eos=True))
        answers = run_dry(engine)
        for number, prompt in enumerate(prompts):
            assert_same_greedy(
                reference, prompt, answers[str(number)].token_ids, expected[number], f"{family} {number}"
            )
        stats = engine.speculation.stats
        if draft == directory:
            assert stats.num_accepted_tokens >= 0.9 * stats.num_draft_tokens > 0, (
                f"the target is its own draft model: expected nearly all accepted, got {stats}. {LOOK_DRAFT}"
            )


# Ends among accepted draft tokens


@functools.cache
def repeating(llm: LLM) -> tuple[list[int], list[int]]:
    """A prompt, and an answer to it of which n-gram lookup finds long runs."""
    words = "apple river stone cloud"
    prompt = llm.tokenizer.encode(f"Repeat the words: {words} {words} apple river")
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    return prompt, llm.generate([prompt], params)[0].outputs[0].token_ids


def test_a_stop_string_among_accepted_draft_tokens(llm: LLM, make_llm: MakeLLM) -> None:
    prompt, whole = repeating(llm)
    speculating = make_llm(speculative_method="ngram", num_speculative_tokens=6, speculative_max_num_seqs=64)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=1)
    text = llm.generate([prompt], params)[0].outputs[0].text
    stops = list(dict.fromkeys(text[start : start + length] for start in range(1, 24, 2) for length in (3, 7)))
    all_params = [replace(params, stop=(stop,)) for stop in stops]
    answers = zip(
        llm.generate([prompt] * len(stops), all_params),
        speculating.generate([prompt] * len(stops), all_params),
        strict=True,
    )
    for stop, (without, with_drafts) in zip(stops, answers, strict=True):
        [expected], [got] = without.outputs, with_drafts.outputs
        assert (got.text, got.token_ids, got.finish_reason, got.stop_reason, len(got.logprobs or [])) == (
            expected.text, expected.token_ids, expected.finish_reason, expected.stop_reason,
            len(expected.logprobs or []),
        ), f"stop {stop!r}: expected {expected}, got {got}. Look at api/output_processor.py; {LOOK_APPEND}"  # fmt: skip
    num_checked = len(stops)
    stats = speculating.engine.speculation.stats
    assert num_checked >= 5 and stats.num_accepted_tokens > 20, f"{num_checked} checked, {stats} proves nothing"
    blocks = speculating.engine.blocks
    assert blocks.num_used_blocks == 0, f"{blocks.num_used_blocks} blocks are not free. {LOOK_APPEND}"


def test_stop_tokens_and_lengths_among_accepted_draft_tokens(llm: LLM, make_llm: MakeLLM) -> None:
    prompt, whole = repeating(llm)
    speculating = make_llm(speculative_method="ngram", num_speculative_tokens=5, speculative_max_num_seqs=64)
    cases: list[dict[str, Any]] = [dict(stop_token_ids=[token]) for token in dict.fromkeys(whole)]
    cases += [dict(max_tokens=number) for number in range(1, 9)]
    cases += [dict(stop_token_ids=[whole[0]], min_tokens=number) for number in range(1, 9, 2)]
    cases += [dict(logit_bias={2: 8.0}, ignore_eos=False, min_tokens=5)]
    all_params = [SamplingParams(**{"temperature": 0, "max_tokens": 20, "ignore_eos": True, **case}) for case in cases]
    expected, found = (each.generate([prompt] * len(cases), all_params) for each in (llm, speculating))
    for case, want, got in zip(cases, expected, found, strict=True):
        assert replace(got.outputs[0], num_cached_tokens=None) == replace(want.outputs[0], num_cached_tokens=None), (
            f"{case}: expected {want.outputs[0]}, got {got.outputs[0]}. {LOOK_APPEND}"
        )
    assert speculating.engine.speculation.stats.num_accepted_tokens > 50, "proves nothing"


# The same answers, whatever goes wrong


def test_a_broken_draft_model_changes_no_answer(
    make_llm: MakeLLM, prompt_of: PromptOf, alone: list[CompletionOutput], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second row of its logits is NaN: greedy and seeded answers are what they are without speculation."""
    llm = make_llm(speculative_method="draft_model", num_kv_blocks=400, speculative_max_num_seqs=64)
    drafter = llm.engine.executor.worker.drafter
    assert drafter is not None
    compute_logits = drafter.model.compute_logits

    def broken(hidden: Tensor) -> Tensor:
        logits = compute_logits(hidden)
        logits[::2] = torch.nan
        return logits

    monkeypatch.setattr(drafter.model, "compute_logits", broken)
    prompts, params = mixed(prompt_of)
    for number, (result, expected) in enumerate(zip(llm.generate(prompts, params), alone, strict=True)):
        got = result.outputs[0].token_ids
        assert got == expected.token_ids, f"request {number}: expected {expected.token_ids}, got {got}. {LOOK_VERIFY}"
    stats = llm.engine.speculation.stats
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens, f"proves nothing: {stats}"


@pytest.mark.parametrize("num_in_flight", [0, 1])
def test_a_draft_model_that_fails_once(small_models: SmallModels, num_in_flight: int) -> None:
    """Its step ends every request with the cause; the next request gets the right answer."""
    _, reference = small_models("llama", 3, SMALL_VOCAB)
    engine = small_engine(small_models, "draft_model", async_scheduling=True)
    drafter = engine.executor.worker.drafter
    assert drafter is not None
    forward, calls = drafter._forward, list[int]()

    def failing(*args: Any) -> Tensor:
        calls.append(len(calls))
        if len(calls) == 4:
            raise ValueError("the cat sat on it")
        return forward(*args)

    drafter._forward = failing  # type: ignore[method-assign, assignment]
    for number in range(3):
        engine.add_request(str(number), [5 + number] * 9, params_for(12, ignore_eos=True))
    ended = dict[str, str | None]()
    with pytest.raises(ValueError, match="the cat"):
        while True:
            for output in engine.step():
                ended |= {output.request_id: output.error} if output.finish_reason else {}
    errors = {output.request_id: output.error for output in engine.fail(ValueError("the cat sat on it"))}
    assert not ended and errors == dict.fromkeys("012", "ValueError: the cat sat on it"), (
        f"the draft model failed in the step of all three: expected an error for each, got {errors}. {LOOK_FAIL}"
    )
    engine.add_request("again", [5] * 9, params_for(12, ignore_eos=True))
    answers = run_dry(engine)
    expected = reference_greedy(reference, [5] * 9, 12)
    assert_same_greedy(reference, [5] * 9, answers["again"].token_ids, expected, "after the failed step")
    assert engine.num_failures == 0 and engine.blocks.num_used_blocks == 0, f"{engine.num_failures}. {LOOK_FAIL}"


# Whenever a step runs


@dataclass
class LateStream:
    """Runs a step when its result is asked for, so after the next one was prepared; or at once, when it is launched.

    A thread's timing lies between these two.
    """

    is_late: bool
    pending: deque[LateHandle] = field(default_factory=deque)

    def launch(self, work: Work, finish: Finish) -> LateHandle:
        handle = LateHandle(self, work, finish)
        self.pending.append(handle)
        if not self.is_late:
            self.run_all()
        return handle

    def run_all(self) -> None:
        while self.pending:
            handle = self.pending.popleft()
            handle.output = handle.finish(handle.work())

    def run(self, call: Callable[[], Any]) -> Any:
        self.run_all()
        return call()


@dataclass
class LateHandle:
    stream: LateStream
    work: Work
    finish: Finish
    output: StepOutput | None = None

    def result(self) -> StepOutput:
        self.stream.run_all()
        assert self.output is not None
        return self.output


def small_engine(small_models: SmallModels, method: str, **flags: Any) -> LLMEngine:
    target, _ = small_models("llama", 3, SMALL_VOCAB)
    config = {
        "model": target, "speculative_model": target, "speculative_method": method, "device": "cpu",
        "num_kv_blocks": 40, "block_size": 4, "num_speculative_tokens": 3, "max_num_seqs": 5, "prompt_lookup_min": 1,
        "max_num_batched_tokens": 24, **flags,
    }  # fmt: skip
    engine = LLMEngine(EngineConfig(**config))
    watch(engine.scheduler)
    return engine


def random_life(engine: LLMEngine, seed: int) -> dict[str, list[int]]:
    """Requests come and go; their answers. Which request comes when depends on the steps, what it gets does not."""
    rng, answers, aborted = random.Random(seed), dict[str, list[int]](), set[str]()
    texts = [[rng.randrange(SMALL_VOCAB) for _ in range(40)] for _ in range(3)]
    for number in range(60):
        if number < 45 and rng.random() < 0.7:
            prompt = rng.choice(texts)[: rng.randint(1, 40)]
            fields = rng.choice([{"temperature": 0.0}, {"temperature": 0.7, "seed": number}])
            params = SamplingParams(max_tokens=rng.randint(1, 16), ignore_eos=True, **fields)  # type: ignore[arg-type]
            engine.add_request(str(number), prompt, params)
        if number % 15 == 9:
            name = str(rng.randrange(number))
            engine.abort_requests([name])
            aborted.add(name)
        for output in take_step(engine):
            answers.setdefault(output.request_id, []).extend(output.token_ids)
    while engine.has_unfinished_requests:
        for output in take_step(engine):
            answers.setdefault(output.request_id, []).extend(output.token_ids)
    return {name: tokens for name, tokens in answers.items() if name not in aborted}


@pytest.mark.parametrize("is_late", [True, False], ids=["late", "at once"])
@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_answers_do_not_depend_on_when_a_step_runs(small_models: SmallModels, method: str, is_late: bool) -> None:
    """Steps run behind the preparation of the next one, or before it; rows and blocks change hands in between."""
    plain = random_life(small_engine(small_models, "none", async_scheduling=False, num_kv_blocks=400), seed=1)
    engine = small_engine(small_models, method, num_kv_blocks=15, num_speculative_tokens=2)
    engine.executor.worker.stream = LateStream(is_late)
    answers = random_life(engine, seed=1)
    assert answers == plain, (
        f"{method}: expected the answers of an engine without speculation, {plain}, got {answers}. {LOOK_RACE}"
    )
    stats, scheduler = engine.speculation.stats, engine.scheduler
    found = (stats.num_accepted_tokens, scheduler.num_preemptions, scheduler.num_hit_tokens)
    assert min(found) > 0, f"(accepted, preemptions, hits) {found}: proves nothing"


# The border


@contextlib.contextmanager
def over_the_border(engine: LLMEngine) -> Iterator[list[tuple[bytes, bytes]]]:
    """Every StepInput and StepOutput is encoded and decoded on its way; both, of each step."""
    worker, seen = engine.executor.worker, list[tuple[bytes, bytes]]()
    launch = worker.launch

    class Handle:
        def __init__(self, sent: bytes) -> None:
            self.sent, self.handle = sent, launch(msgspec.msgpack.decode(sent, type=StepInput))

        def result(self) -> StepOutput:
            answered = encode(self.handle.result())
            seen.append((self.sent, answered))
            return msgspec.msgpack.decode(answered, type=StepOutput)

    worker.launch = lambda step: Handle(encode(step))  # type: ignore[method-assign]
    yield seen
    worker.launch = launch  # type: ignore[method-assign]


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_all_that_crosses_is_plain_data(small_models: SmallModels, method: str) -> None:
    """A random life with every message encoded and decoded gives the same answers, and probabilities never cross."""
    plain = random_life(small_engine(small_models, method), seed=2)
    engine = small_engine(small_models, method)
    with over_the_border(engine) as seen:
        answers = random_life(engine, seed=2)
    assert answers == plain, f"expected {plain}, got {answers}. {LOOK_BORDER}"
    for _, answered in seen:
        drafts = msgspec.msgpack.decode(answered)[2]
        assert all(isinstance(token, int) for ids in drafts for token in ids) and len(answered) < 400, (
            f"draft tokens {drafts}, {len(answered)} bytes from the worker for at most 5 requests: expected ids only. "
            f"{LOOK_BORDER}"
        )


def test_a_step_of_random_draft_tokens_is_small(small_models: SmallModels) -> None:
    """32 requests with 4 random draft tokens each: ids cross, the drafter's probabilities stay in the worker."""
    engine = small_engine(
        small_models, "draft_model", max_num_seqs=32, speculative_max_num_seqs=32, num_kv_blocks=400,
        num_speculative_tokens=4, max_num_batched_tokens=256,
    )  # fmt: skip
    for number in range(32):
        engine.add_request(str(number), [number % SMALL_VOCAB] * 3, SamplingParams(max_tokens=40, ignore_eos=True))
    with over_the_border(engine) as seen:
        for _ in range(5):
            engine.step()
    sizes = [(len(sent), len(answered)) for sent, answered in seen[1:]]
    assert sizes and max(map(max, sizes)) < 4_096, (
        f"decodes of 32 requests: expected under 4,096 bytes to the worker and back, got {sizes}. {LOOK_BORDER}"
    )
    assert engine.speculation.stats.num_draft_tokens > 300, f"proves nothing: {engine.speculation.stats}"


# Flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"num_speculative_tokens": 0}, ["num_speculative_tokens", "at least 1", "got 0"]),
        ({"prompt_lookup_min": 0}, ["prompt_lookup_min", "at least 1", "got 0"]),
        ({"prompt_lookup_min": 3, "prompt_lookup_max": 2}, ["prompt_lookup_max", "prompt_lookup_min=3", "got 2"]),
        ({"speculative_max_num_seqs": -1}, ["speculative_max_num_seqs", "at least 0", "got -1"]),
    ],
)
def test_a_flag_out_of_range(flags: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(FieldError) as caught:
        EngineConfig(**flags)
    text = f"{caught.value.field}: {caught.value}"
    missing = [word for word in words if word not in text]
    assert not missing, f"{flags}: expected {words} in the error, got {text!r}. {LOOK_CONFIG}"


def test_a_draft_model_that_does_not_fit(make_engine: MakeEngine, small_models: SmallModels) -> None:
    directory, _ = small_models("llama", 3)
    with pytest.raises(FieldError) as caught:
        make_engine(speculative_method="draft_model", speculative_model=directory, max_model_len=64)
    text = str(caught.value)
    assert caught.value.field == "speculative_model" and "320" in text and "4096" in text, (
        f"a vocabulary of 320 for a target with 4096: expected both numbers in the error, got {text!r}. {LOOK_DRAFT}"
    )


def test_a_draft_model_with_a_shorter_context(small_models: SmallModels, tmp_path: Path) -> None:
    """It would have to compute positions that it has no rotary embedding for."""
    directory, model = small_models("llama", 3)
    short = model.config.to_dict() | {"max_position_embeddings": 32}
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").symlink_to(Path(directory) / "tokenizer.json")
    type(model.config)(**short).save_pretrained(tmp_path)
    config: dict[str, Any] = dict(
        model=directory,
        speculative_model=str(tmp_path),
        speculative_method="draft_model",
        device="cpu",
        num_kv_blocks=40,
    )
    with pytest.raises(FieldError) as caught:
        LLMEngine(EngineConfig(**config))
    text = str(caught.value)
    assert caught.value.field == "speculative_model" and "32" in text and "256" in text, (
        f"a context of 32 for a target with 256: expected both numbers in the error, got {text!r}. {LOOK_DRAFT}"
    )
    engine = LLMEngine(EngineConfig(**config, max_model_len=32))
    engine.add_request("0", [5] * 20, params_for(30, ignore_eos=True))
    answers = run_dry(engine)
    assert len(answers["0"].token_ids) == 12, f"with max_model_len=32: expected 12 tokens, got {answers}. {LOOK_DRAFT}"


def test_without_speculation_it_runs_ahead(make_engine: MakeEngine) -> None:
    """The second step is launched while the first one runs."""
    engine = make_engine(async_scheduling=True)
    engine.add_request("0", [5, 6, 7], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    engine.step()
    engine.step()
    got = (engine.num_steps, len(engine.in_flight))
    assert got == (2, 1), f"after two steps: expected (2 launched, 1 in flight), got {got}. {LOOK_CONFIG}"
    engine.abort_requests(["0"])
    engine.step()


def test_no_draft_tokens_with_too_many_requests(make_llm: MakeLLM, prompt_of: PromptOf) -> None:
    llm = make_llm(speculative_method="ngram", speculative_max_num_seqs=3, prompt_lookup_min=1, async_scheduling=False)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    llm.generate([prompt_of(12, number) for number in range(4)], params)
    stats = llm.engine.speculation.stats
    assert stats.num_drafts == 0, (
        f"4 run, speculative_max_num_seqs=3: expected no draft tokens, got {stats}. {LOOK_CONFIG}"
    )
    llm.generate([repeating(llm)[0]] * 3, params)
    assert stats.num_drafts > 0, f"3 run: expected draft tokens, got {stats}. {LOOK_CONFIG}"


# Trace


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
def test_the_trace_has_draft_tokens_and_how_many_were_accepted(
    make_llm: MakeLLM, llm: LLM, tmp_path: Path, is_async: bool
) -> None:
    prompt = llm.tokenizer.encode("Tell me a story about a cat.")
    speculating = make_llm(speculative_method="draft_model", trace=str(tmp_path / "trace"), async_scheduling=is_async)
    speculating.generate([prompt], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
    speculating.engine.tracer.close()
    steps, stats = read_trace(tmp_path / "trace").steps, speculating.engine.speculation.stats
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens, f"some accepted, some rejected: got {stats}"
    rows = [request for step in steps for request in step.requests]
    got = (sum(row.num_sampled for row in rows), sum(row.num_drafts for row in rows))
    assert got == (24, stats.num_draft_tokens), (
        f"(tokens, draft tokens) in the trace: expected {(24, stats.num_draft_tokens)}, got {got}. {LOOK_TRACE}"
    )
    num_accepted = sum(row.num_sampled - 1 for row in rows if row.num_drafts)
    assert num_accepted == stats.num_accepted_tokens > 0, (
        f"expected {stats.num_accepted_tokens}, got {num_accepted}. {LOOK_TRACE}"
    )
    assert all(row.num_scheduled == 1 + row.num_drafts for row in rows[1:]), f"got {rows}. {LOOK_TRACE}"
    phases = [phase for each in step_phases(steps) for phase in each.values()]
    assert phases == [Phase.PREFILL] + [Phase.DECODE] * (len(phases) - 1), f"got {phases}. {LOOK_TRACE}"
