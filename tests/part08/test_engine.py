"""core/engine.py with guesses: what a step brought, and the same answers as without them, whatever else goes on."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import FieldError
from common.outputs import CompletionOutput
from common.sampling_params import SamplingParams
from common.testing import FAMILIES, assert_same_greedy, reference_greedy
from common.trace import Phase, read_trace, step_phases
from part08_speculative_decoding.config import EngineConfig
from part08_speculative_decoding.core.engine import LLM, LLMEngine, StepFailedError
from part08_speculative_decoding.core.request import Request, RequestStatus
from part08_speculative_decoding.core.speculation import Speculation
from tests.part08.scripted import proposer_of, run_dry, scripted_engine, take_step, watch
from tests.scripted import END, answer_alone, params_for, runner_of

LOOK_APPEND = 'Look at core/engine.py::LLMEngine._append; README "What the step brought".'
LOOK_ALL = 'Look at core/engine.py::LLMEngine._append_all; README "What the step brought".'
LOOK_PROPOSE = 'Look at core/engine.py::LLMEngine._propose; README "Guess, then check".'
LOOK_JUDGE = (
    'Look at worker/sampler.py::judge and worker/model_runner.py::ModelRunner._prepare; README "Judging a guess".'
)
LOOK_SEEDED = 'Look at core/engine.py::LLMEngine._append_all and worker/sampler.py::draw; README "Judging a guess".'
LOOK_CONFIG = 'Look at config.py::EngineConfig; README "How many guesses".'
LOOK_DRAFT = 'Look at core/engine.py::make_proposer and worker/draft_model.py; README "Two proposers".'
LOOK_TRACE = 'Look at core/step_tracer.py::StepTracer; README "Guess, then check".'

MakeLLM = Callable[..., LLM]
MakeEngine = Callable[..., LLMEngine]
PromptOf = Callable[..., list[int]]


# What a step brought


class Heard(Speculation):
    """Notes what it is told; makes two guesses, whatever it was told."""

    def __init__(self) -> None:
        super().__init__(2, 8)
        self.heard: list[tuple[str, int, int]] = []

    def num_tokens(self, request: Request, num_running: int) -> int:
        return 2

    def judged(self, request: Request, num_drafts: int, num_accepted: int) -> None:
        self.heard.append((request.request_id, num_drafts, num_accepted))


def in_flight(num_rows: int, status: RequestStatus = RequestStatus.RUNNING, **fields: Any) -> tuple[LLMEngine, Request]:
    """A request of 3 + 1 tokens, after a step with num_rows rows for it was scheduled."""
    engine = scripted_engine(num_kv_blocks=50, block_size=4)
    engine.speculation = engine.scheduler.speculation = Heard()
    params = SamplingParams(**{"temperature": 0, "max_tokens": 20, **fields})
    request = Request("0", [50, 51, 52], params, 3 + params.max_tokens)
    request.output_token_ids.append(60)
    request.status, request.num_output_placeholders = status, num_rows
    if status is RequestStatus.RUNNING:
        request.num_computed_tokens = 3 + num_rows
        engine.scheduler.running.append(request)
        engine.blocks.allocate("0", 3 + num_rows)
    elif status is RequestStatus.WAITING:
        engine.scheduler.waiting.append(request)
    return engine, request


def check_append(engine: LLMEngine, request: Request, new: list[int], num_rows: int, expected: dict[str, Any]) -> None:
    returned = engine._append(request, new, num_rows)
    speculation = engine.speculation
    assert isinstance(speculation, Heard)
    got: dict[str, Any] = {
        "returned": returned,
        "output": request.output_token_ids[1:],
        "placeholders": request.num_output_placeholders,
        "computed": request.num_computed_tokens,
        "judged": [counts for _, *counts in speculation.heard],
        "blocks": engine.blocks.num_used_blocks,
        "reason": (request.finish_reason, request.stop_reason),
    }
    for name, want in expected.items():
        assert got[name] == want, (
            f"{num_rows} rows were in flight, {request.status.name}, the step brought {new}; {name}: expected "
            f"{want}, got "
            f"{got[name]}. {LOOK_APPEND}"
        )


def test_all_guesses_stand() -> None:
    engine, request = in_flight(3)
    expected = dict(
        returned=[7, 8, 9], output=[7, 8, 9], placeholders=0, computed=6, judged=[[2, 2]], reason=(None, None)
    )
    check_append(engine, request, [7, 8, 9], 3, expected)


@pytest.mark.parametrize("num_stood", [0, 1, 2])
def test_what_was_computed_for_guesses_that_fell_is_taken_back(num_stood: int) -> None:
    engine, request = in_flight(4)
    new = [7, 8, 9][: num_stood + 1]
    expected = dict(returned=new, output=new, placeholders=0, computed=4 + num_stood, judged=[[3, num_stood]])
    check_append(engine, request, new, 4, expected)
    assert request.num_missing_tokens == 1, (
        f"it lacks its newest token, got {request.num_missing_tokens}. {LOOK_APPEND}"
    )


def test_a_step_without_guesses() -> None:
    engine, request = in_flight(1)
    check_append(engine, request, [7], 1, dict(returned=[7], output=[7], placeholders=0, computed=4, judged=[[0, 0]]))


def test_a_preempted_request_keeps_what_its_step_brought() -> None:
    engine, request = in_flight(4, RequestStatus.WAITING)
    expected = dict(returned=[7, 8], output=[7, 8], placeholders=0, computed=0, judged=[[3, 1]])
    check_append(engine, request, [7, 8], 4, expected)


def test_one_that_has_ended_gets_nothing() -> None:
    engine, request = in_flight(3, RequestStatus.FINISHED_ABORTED)
    check_append(engine, request, [7, 8, 9], 3, dict(returned=[], output=[], placeholders=0, judged=[]))


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
def test_it_may_end_among_them(
    fields: dict[str, Any], new: list[int], expected: list[int], reason: tuple[Any, Any]
) -> None:
    engine, request = in_flight(4, **fields)
    num_blocks = 0 if reason[0] else 2
    check_append(
        engine,
        request,
        new,
        4,
        dict(returned=expected, output=expected, placeholders=0, reason=reason, blocks=num_blocks),
    )
    is_there = request in engine.scheduler.running
    assert is_there is (reason[0] is None), f"ended with {reason}, running: {is_there}. {LOOK_APPEND}"


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 6])
def test_no_token_too_many(max_tokens: int, is_async: bool) -> None:
    """All guesses right, up to 4 a step: it ends after max_tokens all the same, and nothing is computed in vain."""
    engine = scripted_engine(kinds=["right"], num_speculative_tokens=4, async_scheduling=is_async)
    engine.add_request("0", [100], params_for(max_tokens, ignore_eos=True))
    answers = run_dry(engine)
    expected = answer_alone([100], max_tokens, ignore_eos=True)
    assert answers["0"].token_ids == expected, f"expected {expected}, got {answers['0'].token_ids}. {LOOK_APPEND}"
    num_computed = runner_of(engine).num_tokens_computed
    assert num_computed == max_tokens, (
        f"1 prompt token and {max_tokens} of output, the last of which is never computed: expected {max_tokens} "
        f"positions, "
        f"got {num_computed}. {LOOK_PROPOSE}"
    )


@pytest.mark.parametrize("num_prompt", [10, 13, 14, 15])
def test_nor_past_the_context(num_prompt: int) -> None:
    engine = scripted_engine(max_model_len=16, kinds=["right", "half"], num_speculative_tokens=6)
    engine.add_request("0", list(range(100, 100 + num_prompt)), params_for(100, ignore_eos=True))
    answers = run_dry(engine)
    got = (len(answers["0"].token_ids), answers["0"].finish_reason)
    assert got == (16 - num_prompt, "length"), (
        f"{num_prompt} of 16: expected {(16 - num_prompt, 'length')}, got {got}. {LOOK_PROPOSE}"
    )


def test_who_has_ended_is_not_guessed_for() -> None:
    engine = scripted_engine(kinds=["right"], num_speculative_tokens=3, async_scheduling=False)
    engine.add_request("0", [100], params_for(1))
    engine.add_request("1", [101], params_for(9, ignore_eos=True))
    take_step(engine)
    asked = [name for name, _ in proposer_of(engine).asked]
    assert asked == ["1"], f"0 has ended with the step: expected guesses for 1, got {asked}. {LOOK_PROPOSE}"
    while engine.has_unfinished_requests:
        take_step(engine)
    engine.add_request("2", [102], params_for(2))
    take_step(engine)
    left = list(proposer_of(engine).known)
    assert left in ([], ["2"]), f"who has left is released with the next launch, got {left}. {LOOK_PROPOSE}"


def test_guesses_that_fail_end_their_requests() -> None:
    engine = scripted_engine(kinds=["right"], async_scheduling=False)
    engine.add_request("0", [100], params_for(9, ignore_eos=True))
    proposer_of(engine).error = ValueError("the cat sat on it")
    with pytest.raises(StepFailedError) as caught:
        engine.step()
    assert caught.value.request_ids == ["0"], f"got {caught.value.request_ids}. {LOOK_PROPOSE}"
    engine.add_request("1", [101], params_for(9, ignore_eos=True))
    answers = run_dry(engine)
    assert answers["1"].token_ids == answer_alone([101], 9, ignore_eos=True), f"got {answers}. {LOOK_PROPOSE}"


def test_who_comes_with_no_room_for_guesses() -> None:
    """The pool holds its tokens exactly: no guess may take a block that is not there, and nobody waits for one."""
    engine = scripted_engine(kinds=["right"], num_kv_blocks=4, block_size=4, num_speculative_tokens=4)
    engine.add_request("0", [100, 101], params_for(11, ignore_eos=True))
    answers = run_dry(engine)
    assert answers["0"].token_ids == answer_alone([100, 101], 11, ignore_eos=True), f"got {answers}. {LOOK_PROPOSE}"
    assert engine.scheduler.num_preemptions == 0, f"{engine.scheduler.num_preemptions} preemptions. {LOOK_PROPOSE}"


# The same answers


ROOM: dict[str, dict[str, Any]] = {
    "room": dict(num_kv_blocks=400, speculative_max_num_seqs=64),
    "preempting": dict(num_kv_blocks=20, block_size=4, max_num_seqs=6),
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
def test_the_same_answers_as_without_guesses(
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
                f"{where}: without guesses {expected.token_ids}, with them {got.token_ids}. "
                f"{LOOK_SEEDED if each.seed is not None else LOOK_JUDGE}"
            )
        assert (got.finish_reason, got.stop_reason, got.text) == (
            expected.finish_reason, expected.stop_reason, expected.text
        ), f"{where}: expected {expected}, got {got}. {LOOK_APPEND}"  # fmt: skip
        assert len(got.logprobs or []) == len(expected.logprobs or []), f"{where}: got {got.logprobs}. {LOOK_ALL}"
        for mine, other in zip(got.logprobs or [], expected.logprobs or [], strict=True):
            distances = [abs(mine[token].logprob - other[token].logprob) for token in mine if token in other]
            assert list(mine)[:1] == list(other)[:1] and max(distances) < 1e-4, (
                f"{where}: log-probabilities {other} without guesses, {mine} with them. {LOOK_ALL}"
            )
    stats, scheduler = llm.engine.speculation.stats, llm.engine.scheduler
    assert stats.num_accepted_tokens >= 5, f"proves nothing: {stats}"
    assert room != "preempting" or scheduler.num_preemptions >= 3, f"only {scheduler.num_preemptions} preemptions"


@pytest.mark.parametrize("family", FAMILIES)
def test_small_models_of_all_families(small_models: Callable[..., tuple[str, Any]], family: str) -> None:
    """The draft is another family's, so it is mostly wrong, or the model itself, so it is always right."""
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
                f"the model guesses for itself: expected nearly all to stand, got {stats}. {LOOK_DRAFT}"
            )


# Ends among guesses that stood


@functools.cache
def repeating(llm: LLM) -> tuple[list[int], list[int]]:
    """A prompt, and an answer to it of which the n-gram proposer guesses long runs."""
    words = "apple river stone cloud"
    prompt = llm.tokenizer.encode(f"Repeat the words: {words} {words} apple river")
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    return prompt, llm.generate([prompt], params)[0].outputs[0].token_ids


def test_a_stop_string_inside_of_a_run(llm: LLM, make_llm: MakeLLM) -> None:
    prompt, whole = repeating(llm)
    guessing = make_llm(speculative_method="ngram", num_speculative_tokens=6, speculative_max_num_seqs=64)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=1)
    text = llm.generate([prompt], params)[0].outputs[0].text
    stops = list(dict.fromkeys(text[start : start + length] for start in range(1, 24, 2) for length in (3, 7)))
    all_params = [replace(params, stop=(stop,)) for stop in stops]
    answers = zip(
        llm.generate([prompt] * len(stops), all_params),
        guessing.generate([prompt] * len(stops), all_params),
        strict=True,
    )
    for stop, (without, with_guesses) in zip(stops, answers, strict=True):
        [expected], [got] = without.outputs, with_guesses.outputs
        assert (got.text, got.token_ids, got.finish_reason, got.stop_reason, len(got.logprobs or [])) == (
            expected.text, expected.token_ids, expected.finish_reason, expected.stop_reason,
            len(expected.logprobs or []),
        ), f"stop {stop!r}: expected {expected}, got {got}. Look at api/output_processor.py; {LOOK_APPEND}"  # fmt: skip
    num_checked = len(stops)
    stats = guessing.engine.speculation.stats
    assert num_checked >= 5 and stats.num_accepted_tokens > 20, f"{num_checked} checked, {stats} proves nothing"
    blocks = guessing.engine.blocks
    assert blocks.num_used_blocks == 0, f"{blocks.num_used_blocks} blocks are not free. {LOOK_APPEND}"


def test_stop_tokens_and_lengths_inside_of_a_run(llm: LLM, make_llm: MakeLLM) -> None:
    prompt, whole = repeating(llm)
    guessing = make_llm(speculative_method="ngram", num_speculative_tokens=5, speculative_max_num_seqs=64)
    cases = [dict(stop_token_ids=[token]) for token in dict.fromkeys(whole)]
    cases += [dict(max_tokens=number) for number in range(1, 9)]
    cases += [dict(stop_token_ids=[whole[0]], min_tokens=number) for number in range(1, 9, 2)]
    cases += [dict(logit_bias={2: 8.0}, ignore_eos=False, min_tokens=5)]
    all_params = [SamplingParams(**{"temperature": 0, "max_tokens": 20, "ignore_eos": True, **case}) for case in cases]
    expected, found = (each.generate([prompt] * len(cases), all_params) for each in (llm, guessing))
    for case, want, got in zip(cases, expected, found, strict=True):
        assert replace(got.outputs[0], num_cached_tokens=None) == replace(want.outputs[0], num_cached_tokens=None), (
            f"{case}: expected {want.outputs[0]}, got {got.outputs[0]}. {LOOK_APPEND}"
        )
    assert guessing.engine.speculation.stats.num_accepted_tokens > 50, "proves nothing"


# Flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"num_speculative_tokens": 0}, ["num_speculative_tokens", "at least 1", "got 0"]),
        ({"prompt_lookup_min": 0}, ["prompt_lookup_min", "at least 1", "got 0"]),
        ({"prompt_lookup_min": 3, "prompt_lookup_max": 2}, ["prompt_lookup_max", "prompt_lookup_min=3", "got 2"]),
        ({"speculative_max_num_seqs": -1}, ["speculative_max_num_seqs", "0 or more", "got -1"]),
    ],
)
def test_a_flag_out_of_range(flags: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(FieldError) as caught:
        EngineConfig(**flags)
    text = f"{caught.value.field}: {caught.value}"
    missing = [word for word in words if word not in text]
    assert not missing, f"{flags}: expected {words} in the error, got {text!r}. {LOOK_CONFIG}"


def test_a_draft_model_that_does_not_fit(make_engine: MakeEngine, small_models: Callable[..., tuple[str, Any]]) -> None:
    directory, _ = small_models("llama", 3)
    with pytest.raises(FieldError) as caught:
        make_engine(speculative_method="draft_model", speculative_model=directory, max_model_len=64)
    text = str(caught.value)
    assert caught.value.field == "speculative_model" and "320" in text and "4096" in text, (
        f"a vocabulary of 320 for a target with 4096: expected both numbers in the error, got {text!r}. {LOOK_DRAFT}"
    )


def test_a_draft_model_with_a_shorter_context(small_models: Callable[..., tuple[str, Any]], tmp_path: Path) -> None:
    """It would be asked for positions that it does not know."""
    directory, model = small_models("llama", 3)
    short = model.config.to_dict() | {"max_position_embeddings": 32}
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").symlink_to(Path(directory) / "tokenizer.json")
    type(model.config)(**short).save_pretrained(tmp_path)
    config = dict(
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


def test_without_a_proposer_it_runs_ahead(make_engine: MakeEngine) -> None:
    """Nobody waits for guesses that nobody makes: the second step is launched while the first runs."""
    engine = make_engine(async_scheduling=True)
    engine.add_request("0", [5, 6, 7], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    engine.step()
    engine.step()
    got = (engine.num_steps, len(engine.in_flight))
    assert got == (2, 1), f"after two steps: expected (2 launched, 1 in flight), got {got}. {LOOK_CONFIG}"
    engine.abort_requests(["0"])
    engine.step()


def test_many_running_and_nobody_guesses(make_llm: MakeLLM, prompt_of: PromptOf) -> None:
    llm = make_llm(speculative_method="ngram", speculative_max_num_seqs=3, prompt_lookup_min=1, async_scheduling=False)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    llm.generate([prompt_of(12, number) for number in range(4)], params)
    stats = llm.engine.speculation.stats
    assert stats.num_drafts == 0, f"4 run, speculative_max_num_seqs=3: expected no guesses, got {stats}. {LOOK_CONFIG}"
    llm.generate([repeating(llm)[0]] * 3, params)
    assert stats.num_drafts > 0, f"3 run: expected guesses, got {stats}. {LOOK_CONFIG}"


# Trace


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
def test_the_trace_has_guesses_and_what_they_brought(
    make_llm: MakeLLM, llm: LLM, tmp_path: Path, is_async: bool
) -> None:
    prompt = llm.tokenizer.encode("Tell me a story about a cat.")
    guessing = make_llm(speculative_method="draft_model", trace=str(tmp_path / "trace"), async_scheduling=is_async)
    guessing.generate([prompt], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
    guessing.engine.tracer.close()
    steps, stats = read_trace(tmp_path / "trace").steps, guessing.engine.speculation.stats
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens, f"some were to stand and some to fall: {stats}"
    rows = [request for step in steps for request in step.requests]
    got = (sum(row.num_sampled for row in rows), sum(row.num_drafts for row in rows))
    assert got == (24, stats.num_draft_tokens), (
        f"(tokens, guesses) in the trace: expected {(24, stats.num_draft_tokens)}, got {got}. {LOOK_TRACE}"
    )
    num_stood = sum(row.num_sampled - 1 for row in rows if row.num_drafts)
    assert num_stood == stats.num_accepted_tokens > 0, (
        f"expected {stats.num_accepted_tokens}, got {num_stood}. {LOOK_TRACE}"
    )
    assert all(row.num_scheduled == 1 + row.num_drafts for row in rows[1:]), f"got {rows}. {LOOK_TRACE}"
    phases = [phase for each in step_phases(steps) for phase in each.values()]
    assert phases == [Phase.PREFILL] + [Phase.DECODE] * (len(phases) - 1), f"got {phases}. {LOOK_TRACE}"
