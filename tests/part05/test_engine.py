"""LLMEngine and LLM one step ahead of the results: the same answers, and counters that say what it costs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint import MODELS_DIR
from common.errors import FieldError
from common.outputs import CompletionOutput, Logprob, RequestOutput
from common.sampling_params import SamplingParams
from common.testing import assert_same_greedy, reference_greedy, small_model
from part05_async_scheduling.config import EngineConfig
from part05_async_scheduling.core.engine import LLMEngine
from part05_async_scheduling.core.request import RequestStatus
from part05_async_scheduling.llm import LLM
from part05_async_scheduling.messages import EngineCoreOutput
from tests.part05.scripted import check_engine, merge, run_dry, scripted_engine, take_step
from tests.scripted import END, answer_alone, executor_of, ids, params_for
from tests.shipped_model import check_ranks

LOOK_STEP = 'Look at core/engine.py::LLMEngine.step; README "One step ahead".'
LOOK_APPEND = 'Look at core/engine.py::LLMEngine._append; README "Late tokens".'
LOOK_ORACLE = 'Look at worker/model_runner.py::ModelRunner.prepare and run; README "The token buffer".'
LOOK_SAMPLING = (
    "Look at worker/model_runner.py::ModelRunner.prepare and worker/sampler.py::apply_penalties; "
    'README "The token buffer".'
)
LOOK_LENGTH = 'Look at core/scheduler.py::Scheduler._schedule_running; README "Placeholders".'
LOOK_FAIL = (
    'Look at core/engine.py::LLMEngine.fail and core/scheduler.py::Scheduler.reset; README "When a process dies".'
)
LOOK_STOP = 'Look at core/engine.py::LLMEngine._append and core/request.py::check_stop; README "Late tokens".'
LOOK_CHECK = (
    "Look at core/validation.py::check_request and config.py::resolve_config; "
    'README of part 4, "Which requests may join".'
)
LOOK_LLM = 'Look at llm.py::LLM.generate; README "Late tokens".'
BOTH = pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])

MakeLLM = Callable[..., LLM]
MakeEngine = Callable[..., LLMEngine]
PromptOf = Callable[..., list[int]]


def greedy(num_tokens: int, **fields: Any) -> SamplingParams:
    """Exactly num_tokens greedy tokens."""
    return SamplingParams(**{"temperature": 0, "max_tokens": num_tokens, "ignore_eos": True, **fields})


def add_all(engine: LLMEngine, requests: dict[str, tuple[list[int], SamplingParams]]) -> None:
    for name, (prompt, params) in requests.items():
        engine.add_request(name, prompt, params)


def count_frees(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which requests' blocks were given back, each time that there were any."""
    freed, free = list[str](), engine.blocks.free

    def note(request_id: str) -> None:
        freed.extend([request_id] * bool(engine.blocks.block_tables.get(request_id)))
        free(request_id)

    monkeypatch.setattr(engine.blocks, "free", note)
    return freed


def ends_at(number: int) -> Callable[..., int]:
    """A script: prompts are of 5 tokens, and the answer's token of this number is END."""
    return lambda tokens: END if len(tokens) - 5 + 1 == number else 50 + len(tokens)


# One step ahead


def test_the_next_step_is_launched_before_the_last_result_is_read() -> None:
    engine = scripted_engine()
    engine.add_request("0", [5] * 5, params_for(4, ignore_eos=True))
    brought = [[output.token_ids for output in take_step(engine)] for _ in range(5)]
    log = executor_of(engine).log
    expected = "launch 1, launch 2, result 1, launch 3, result 2, launch 4, result 3, result 4".split(", ")
    assert log == expected, f"an answer of four tokens: expected {expected}, got {log}. {LOOK_STEP}"
    tokens = [[[token_id]] for token_id in answer_alone([5] * 5, 4, ignore_eos=True)]
    assert brought == [[], *tokens], f"what each step() brought: expected {[[], *tokens]}, got {brought}. {LOOK_STEP}"
    assert engine.num_steps == 4, f"an answer of four tokens: expected 4 steps, got {engine.num_steps}. {LOOK_STEP}"
    assert not engine.has_unfinished_requests, f"four tokens have arrived, and the engine is not done. {LOOK_STEP}"


def test_without_async_scheduling_each_result_is_read_at_once() -> None:
    engine = scripted_engine(async_scheduling=False)
    engine.add_request("0", [5] * 5, params_for(3, ignore_eos=True))
    brought = [[output.token_ids for output in take_step(engine)] for _ in range(3)]
    log, expected = executor_of(engine).log, [f"{what} {n}" for n in (1, 2, 3) for what in ("launch", "result")]
    assert log == expected, f"async_scheduling=False, three tokens: expected {expected}, got {log}. {LOOK_STEP}"
    tokens = [[[token]] for token in answer_alone([5] * 5, 3, ignore_eos=True)]
    assert brought == tokens, f"what each step() returned: expected {tokens}, got {brought}. {LOOK_STEP}"


@BOTH
def test_an_idle_engine_takes_no_steps(is_async: bool) -> None:
    engine = scripted_engine(async_scheduling=is_async)
    idle = [take_step(engine) for _ in range(3)]
    assert idle == [[], [], []], f"three steps without requests: expected {[[], [], []]}, got {idle}. {LOOK_STEP}"
    engine.add_request("0", [5] * 5, params_for(2, ignore_eos=True))
    run_dry(engine)
    idle = [take_step(engine) for _ in range(3)]
    assert idle == [[], [], []], f"three steps after all have ended: expected {[[], [], []]}, got {idle}. {LOOK_STEP}"
    got = (engine.num_steps, len(executor_of(engine).pending))
    assert got == (2, 0), (
        f"an answer of two tokens, (steps launched, steps in flight): expected (2, 0), got {got}. {LOOK_STEP}"
    )


def test_the_last_result_is_read_when_there_is_nothing_to_launch() -> None:
    engine = scripted_engine()
    engine.add_request("0", [5] * 5, params_for(1, ignore_eos=True))
    first = take_step(engine)
    assert first == [] and engine.has_unfinished_requests, (
        f"the first step is in flight: expected no outputs, and an unfinished request, got {first} and "
        f"{engine.has_unfinished_requests}. {LOOK_STEP}"
    )
    outputs = take_step(engine)
    reasons = [output.finish_reason for output in outputs]
    assert reasons == ["length"] and not engine.has_unfinished_requests, (
        f"there is nothing to launch, and a step is in flight: expected its token, the last, got {outputs}. {LOOK_STEP}"
    )


def test_a_new_request_joins_the_next_step_that_is_launched() -> None:
    engine = scripted_engine(max_num_seqs=2)
    comes = {0: ("a", 5), 2: ("b", 2), 3: ("c", 3)}

    def arrive(step: int) -> bool:
        if step in comes:
            name, count = comes[step]
            engine.add_request(name, [6] * 5, params_for(count, ignore_eos=True))
        return step < 3

    run_dry(engine, arrive)
    got = [[work.request_id for work in step.work] for step in executor_of(engine).launched]
    expected = [["a"], ["a"], ["a", "b"], ["a", "b"], ["a"], ["c"], ["c"], ["c"]]
    assert got == expected, (
        "two rows; a (5 tokens) is added at step 0, b (2) at step 2, c (3) at step 3, b's row is free once its last "
        f"token has arrived: expected {expected}, got {got}. {LOOK_STEP}"
    )


@BOTH
def test_positions_computed(is_async: bool) -> None:
    """An end by length is foreseen: no position and no step is wasted."""
    engine, lengths, counts = scripted_engine(async_scheduling=is_async), [10, 1, 33, 7, 2], [20, 1, 5, 9, 3]
    for number, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        engine.add_request(str(number), [60 + number] * length, params_for(count, ignore_eos=True))
    run_dry(engine)
    expected = (sum(length + count - 1 for length, count in zip(lengths, counts, strict=True)), max(counts))
    got = (executor_of(engine).num_tokens_computed, engine.num_steps)
    assert got == expected, f"(positions, steps): expected {expected}, got {got}. {LOOK_LENGTH}"


@pytest.mark.parametrize("max_model_len", [7, 8, 20])
def test_the_end_of_the_context_is_foreseen(max_model_len: int) -> None:
    engine = scripted_engine(max_model_len)
    engine.add_request("0", [5] * 6, params_for(10, ignore_eos=True))
    answer, expected = run_dry(engine)["0"], min(10, max_model_len - 6)
    got = (len(answer.token_ids), answer.finish_reason, executor_of(engine).num_samples("0"))
    assert got == (expected, "length", expected), (
        f"a prompt of 6 in a context of {max_model_len}: expected (tokens, reason, times sampled) "
        f"{(expected, 'length', expected)}, got {got}. {LOOK_LENGTH}"
    )


# Late tokens


@pytest.mark.parametrize(("is_async", "num_samples"), [(True, 4), (False, 3)], ids=["async", "sync"])
def test_an_end_of_sequence_at_the_third_of_ten_tokens(
    is_async: bool, num_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = scripted_engine(async_scheduling=is_async, script=ends_at(3))
    freed = count_frees(engine, monkeypatch)
    engine.add_request("0", [5] * 5, params_for(10))
    answer = run_dry(engine)["0"]
    got_answer = (answer.token_ids, answer.finish_reason)
    assert got_answer == ([55, 56, END], "stop"), (
        f"the third token is END: expected the tokens and the reason {([55, 56, END], 'stop')}, got {got_answer}. "
        f"{LOOK_APPEND}"
    )
    got = (executor_of(engine).num_samples("0"), engine.num_steps)
    assert got == (num_samples, num_samples), (
        f"(tokens sampled, steps): expected {num_samples} of each, 3 tokens and {num_samples - 3} too late, got {got}. "
        f"{LOOK_APPEND}"
    )
    assert freed == ["0"], f"whose blocks were freed, each time: expected ['0'], got {freed}. {LOOK_APPEND}"


def test_a_token_too_late_is_dropped() -> None:
    engine = scripted_engine(script=ends_at(2))
    engine.add_request("0", [5] * 5, params_for(10))
    take_step(engine)
    [request] = engine.scheduler.running
    outputs = [take_step(engine) for _ in range(3)]
    assert [len(each) for each in outputs] == [1, 1, 0], (
        f"two tokens, then one that came too late: expected 1, 1 and 0 outputs, got {outputs}. {LOOK_APPEND}"
    )
    state = (request.output_token_ids, request.num_output_placeholders, request.status)
    expected = ([55, END], 0, RequestStatus.FINISHED_STOPPED)
    assert state == expected, (
        f"(output_token_ids, num_output_placeholders, status): expected {expected}, got {state}. {LOOK_APPEND}"
    )


@BOTH
def test_blocks_and_row_of_an_ended_request_are_reused_at_once(is_async: bool) -> None:
    """One row, just enough blocks: the next request writes where the previous one's step in flight still writes."""
    engine = scripted_engine(async_scheduling=is_async, max_num_seqs=1, block_size=2, num_kv_blocks=1 + 6)
    prompts = {str(number): [70 + number] * (3 + number % 4) for number in range(12)}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, params_for(6))
    answers = run_dry(engine)
    for name, prompt in prompts.items():
        expected, got = answer_alone(prompt, 6), answers[name].token_ids
        assert got == expected, f"request {name}, in reused blocks: expected {expected}, got {got}. {LOOK_APPEND}"
    num_ends = sum(answer.finish_reason == "stop" for answer in answers.values())
    assert num_ends > 2, "this test needs unforeseen ends"


@pytest.mark.parametrize("when", ["before its first step", "in flight", "between", "last token in flight", "ended"])
def test_an_abort_at_every_point(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets no more outputs, its blocks are freed once, and the other request is not affected."""
    engine = scripted_engine()
    freed, names = count_frees(engine, monkeypatch), {"0": [5] * 5, "1": [6] * 5}
    for name, prompt in names.items():
        engine.add_request(name, prompt, params_for(4, ignore_eos=True))
    num_steps = {"before its first step": 0, "in flight": 1, "between": 2, "last token in flight": 4, "ended": 5}[when]
    answers: dict[str, EngineCoreOutput] = {}
    for _ in range(num_steps):
        for output in take_step(engine):
            merge(answers, output, when)
    engine.abort_requests(["0"])
    check_engine(engine, f"aborted {when}")
    before = len(answers["0"].token_ids) if "0" in answers else 0
    for name, answer in run_dry(engine).items():
        assert name != "0", f"aborted {when}: request 0 got {answer}. {LOOK_APPEND}"
        merged = [*(answers[name].token_ids if name in answers else []), *answer.token_ids]
        expected = answer_alone(names[name], 4, ignore_eos=True)
        assert merged == expected, (
            f"request 0 aborted {when}, request 1: expected {expected}, got {merged}. {LOOK_APPEND}"
        )
    num_tokens = max(0, num_steps - 1)
    assert before == num_tokens, f"{when}, {num_steps} steps: expected {num_tokens} tokens, got {before}. {LOOK_STEP}"
    assert freed == (["1"] if num_steps == 0 else sorted(freed)) and len(freed) == 2 - (num_steps == 0), (
        f"aborted {when}: blocks were freed of {freed}, expected each once. {LOOK_APPEND}"
    )


def test_preempted_between_launch_and_result() -> None:
    """Blocks of 4, four of them, two prompts of 8: at the ninth token the later is preempted; its token arrives."""
    engine = scripted_engine(block_size=4, num_kv_blocks=1 + 4)
    for name in "01":
        engine.add_request(name, [80 + int(name)] * 8, params_for(5, ignore_eos=True))
    take_step(engine)
    second = engine.scheduler.running[1]
    outputs = {output.request_id: output for output in take_step(engine)}
    queues = (engine.scheduler.num_preemptions, ids(list(engine.scheduler.waiting)))
    assert queues == (1, ["1"]), (
        f"both want a third block, and none is free, (preemptions, waiting): expected {(1, ['1'])}, got {queues}. "
        f"{LOOK_STEP}"
    )
    expected = answer_alone([81] * 8, 5, ignore_eos=True)
    assert "1" in outputs and outputs["1"].token_ids == expected[:1], (
        f"preempted, and the step in flight brought it its first token {expected[:1]}: got {outputs}. {LOOK_APPEND}"
    )
    state = (second.output_token_ids, second.num_output_placeholders, second.num_computed_tokens)
    assert state == (expected[:1], 0, 0), (
        f"(tokens, placeholders, computed): expected {(expected[:1], 0, 0)}, got {state}. {LOOK_APPEND}"
    )
    answers = {"1": outputs["1"]}
    for each in run_dry(engine).values():
        if each.request_id == "1":
            merge_all(answers, each)
    assert answers["1"].token_ids == expected, (
        f"preempted with a token in flight: expected {expected}, none lost and none twice, got "
        f"{answers['1'].token_ids}. {LOOK_APPEND}"
    )
    num_samples = executor_of(engine).num_samples("1")
    assert num_samples == 5, f"5 tokens: expected 5 steps that sample one, got {num_samples}. {LOOK_APPEND}"


def merge_all(answers: dict[str, EngineCoreOutput], rest: EngineCoreOutput) -> None:
    before = answers[rest.request_id]
    answers[rest.request_id] = EngineCoreOutput(
        rest.request_id, [*before.token_ids, *rest.token_ids], rest.finish_reason, rest.stop_reason
    )


@pytest.mark.parametrize("is_end", [False, True], ids=["length", "end of sequence"])
def test_a_preempted_request_ends_by_the_token_in_flight(is_end: bool) -> None:
    engine = scripted_engine(
        block_size=4, num_kv_blocks=1 + 2, script=lambda tokens: END if 91 in tokens and is_end else 55
    )
    engine.add_request("0", [90] * 4, params_for(4))
    engine.add_request("1", [91] * 4, params_for(4 if is_end else 1))
    take_step(engine)
    outputs = {output.request_id: output for output in take_step(engine)}
    got = engine.scheduler.num_preemptions
    assert got == 1, f"0 needs the block that 1 holds: expected 1 preemption, got {got}. {LOOK_STEP}"
    reason, got = "stop" if is_end else "length", outputs["1"].finish_reason if "1" in outputs else "no output"
    assert got == reason, (
        f"1 was preempted with its last token in flight: expected {reason!r}, got {got!r}. {LOOK_APPEND}"
    )
    assert not engine.scheduler.waiting, (
        "1 was preempted and has ended by the token in flight: it waits no more. "
        'Look at core/scheduler.py::Scheduler.finish; README "Placeholders".'
    )
    run_dry(engine)
    assert executor_of(engine).num_samples("1") == 1, (
        f"request 1 has one token: expected 1 step that samples it, got {executor_of(engine).num_samples('1')}. "
        f"{LOOK_APPEND}"
    )


@BOTH
def test_how_answers_end(is_async: bool) -> None:
    """min_tokens, ignore_eos, stop tokens and the end of the context, each for its own request."""
    engine = scripted_engine(16, async_scheduling=is_async, script=lambda tokens: END)
    cases: dict[str, tuple[dict[str, Any], tuple[int, str, int | None]]] = {  # fields → tokens, finish and stop reason
        "EOS": ({}, (1, "stop", None)),
        "EOS at max_tokens": ({"max_tokens": 1}, (1, "stop", None)),
        "min_tokens": ({"min_tokens": 4}, (4, "stop", None)),
        "min_tokens and max_tokens": ({"min_tokens": 4, "max_tokens": 4}, (4, "stop", None)),
        "ignored": ({"ignore_eos": True, "max_tokens": 7}, (7, "length", None)),
        "ignored to the end": ({"ignore_eos": True, "max_tokens": 900}, (11, "length", None)),
        "stop token": ({"ignore_eos": True, "stop_token_ids": [END], "min_tokens": 6}, (6, "stop", END)),
        "another stop token": ({"ignore_eos": True, "stop_token_ids": [7], "max_tokens": 3}, (3, "length", None)),
    }
    for name, (fields, _) in cases.items():
        engine.add_request(name, [5] * 5, SamplingParams(**{"temperature": 0, "max_tokens": 16, **fields}))
    got = run_dry(engine)
    for name, (fields, expected) in cases.items():
        answer = got[name]
        actual = (len(answer.token_ids), answer.finish_reason, answer.stop_reason)
        assert actual == expected, (
            f"{name}: the script always says END, {fields}, prompt of 5 in a context of 16: (tokens, finish_reason, "
            f"stop_reason) expected {expected}, got {actual}. {LOOK_STOP}"
        )


# A step that fails


def fail_steps(engine: LLMEngine, num_steps: int = 2) -> Exception:
    """Step until a step raises, num_steps times at most."""
    with pytest.raises((ZeroDivisionError, KeyError)) as caught:
        for _ in range(num_steps):
            LLMEngine.step(engine)
    return caught.value


def check_failed(engine: LLMEngine, error: Exception, expected: list[str], where: str) -> None:
    """fail() ends these requests with the cause, in this order, and no others. Nothing of them remains."""
    outputs = engine.fail(error)
    assert ids(outputs) == expected, f"{where}: expected an error for {expected}, got {outputs}. {LOOK_FAIL}"
    cause = f"{type(error).__name__}: {error}"
    for output in outputs:
        got = (output.error, output.token_ids, output.finish_reason)
        assert got == (cause, [], None), f"{where}: expected the cause {cause!r}, got {output}. {LOOK_FAIL}"
    scheduler = engine.scheduler
    remaining = [*scheduler.running, *scheduler.waiting, *engine.in_flight]
    assert not remaining and not engine.has_unfinished_requests, f"{where}: {remaining} remain. {LOOK_FAIL}"
    assert engine.blocks.num_used_blocks == 0, f"{where}: {engine.blocks.num_used_blocks} blocks are held. {LOOK_FAIL}"
    assert sorted(scheduler.free_rows) == list(range(scheduler.max_num_seqs)), (
        f"{where}: only rows {sorted(scheduler.free_rows)} are free. {LOOK_FAIL}"
    )
    assert not executor_of(engine).pending, f"{where}: a step that was launched has not run. {LOOK_FAIL}"
    check_engine(engine, where)


def check_usable(engine: LLMEngine, where: str) -> None:
    """A new request gets its answer, and the failures are not counted any more."""
    engine.add_request("next", [7] * 6, params_for(5, ignore_eos=True))
    got, expected = run_dry(engine)["next"].token_ids, answer_alone([7] * 6, 5, ignore_eos=True)
    assert got == expected, f"{where}, the next request: expected {expected}, got {got}. {LOOK_FAIL}"
    assert engine.num_failures == 0, f"{where}, then good steps: num_failures is {engine.num_failures}. {LOOK_FAIL}"


@BOTH
@pytest.mark.parametrize("where", ["launch_error", "result_error", "_append", "launch"])
def test_a_failed_step_ends_all_requests(where: str, is_async: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two run, two wait."""
    engine = scripted_engine(max_num_seqs=2, async_scheduling=is_async)
    executor = executor_of(engine)
    for number in range(4):
        engine.add_request(str(number), [90 + number] * 5, params_for(6, ignore_eos=True))
    for _ in range(3):
        take_step(engine)
    with monkeypatch.context() as patch:
        if where == "_append":
            patch.setattr(engine, "_append", lambda *_: 1 / 0)
        elif where == "launch":
            patch.setattr(executor, "launch", lambda *_: {}["the cat sat on it"])
        else:
            setattr(executor, where, ZeroDivisionError("the cat sat on it"))
        error = fail_steps(engine)
    assert engine.num_failures == 0, f"{where}: fail() was not called, num_failures {engine.num_failures}. {LOOK_FAIL}"
    check_failed(engine, error, ["0", "1", "2", "3"], where)
    assert engine.num_failures == 1, f"{where}: expected num_failures 1, got {engine.num_failures}. {LOOK_FAIL}"
    check_usable(engine, where)


@BOTH
def test_a_request_that_ended_in_the_failed_step_ends_with_the_cause(
    is_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last token was appended before the step raised, and never returned."""
    engine, append = scripted_engine(async_scheduling=is_async), LLMEngine._append
    for name in "01":
        engine.add_request(name, [5] * 5, params_for(1))
    engine.add_request("aborted", [5] * 5, params_for(1))
    engine.abort_requests(["aborted"])

    def fail_for_1(request: Any, *rest: Any) -> Any:
        if request.request_id == "1":
            raise ZeroDivisionError("the cat sat on it")
        return append(engine, request, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_append", fail_for_1)
        error = fail_steps(engine)
    assert ids(engine.scheduler.running) == ["1"], "0 is to have ended"
    check_failed(engine, error, ["0", "1"], "0 has ended in the failed step")
    check_usable(engine, "0 has ended in the failed step")


def test_failed_steps_in_a_row_are_counted() -> None:
    """Two mean the end of the process. A good step between them starts the count anew."""
    engine = scripted_engine()
    for number, expected in enumerate((1, 2, 3)):
        executor_of(engine).launch_error = ZeroDivisionError("the cat sat on it")
        engine.add_request(str(number), [5] * 5, params_for(3))
        check_failed(engine, fail_steps(engine), [str(number)], f"failed step {number}")
        assert engine.num_failures == expected, f"expected num_failures {expected}, got {engine.num_failures}."
    check_usable(engine, "three failed steps")


@pytest.mark.parametrize("later_fails", [False, True])
def test_steps_in_flight_are_waited_for_and_dropped(later_fails: bool) -> None:
    """The next step was launched already. It holds one more request; if it fails too, that is no second failure."""
    engine = scripted_engine(max_num_seqs=2, block_size=2, num_kv_blocks=1 + 10)
    executor = executor_of(engine)
    engine.add_request("0", [5] * 5, params_for(6, ignore_eos=True))
    executor.result_error = ZeroDivisionError("the cat sat on it")
    LLMEngine.step(engine)
    engine.add_request("1", [6] * 5, params_for(3, ignore_eos=True))
    executor.result_error = KeyError("another") if later_fails else None
    error = fail_steps(engine, 1)
    assert executor.log == ["launch 1", "launch 2", "result 1"], f"1 joins the step that was launched: {executor.log}"
    assert isinstance(error, ZeroDivisionError), f"got {error!r}"
    check_failed(engine, error, ["0", "1"], "a step in flight")
    assert executor.log[3:] == ["result 2"], (
        f"the step in flight still uses rows and blocks: expected its result to be waited for, got {executor.log}. "
        f"{LOOK_FAIL}"
    )
    assert engine.num_failures == 1, f"one step was to be read: num_failures is {engine.num_failures}. {LOOK_FAIL}"
    check_usable(engine, "a step in flight was dropped")  # its row and its blocks are 0's


def test_a_preempted_request_whose_token_is_in_flight_ends_once() -> None:
    engine = scripted_engine(block_size=4, num_kv_blocks=1 + 4)
    for name in "01":
        engine.add_request(name, [80 + int(name)] * 8, params_for(5, ignore_eos=True))
    executor_of(engine).result_error = ZeroDivisionError("the cat sat on it")
    LLMEngine.step(engine)
    error = fail_steps(engine, 1)
    assert [request.status for request in engine.scheduler.waiting] == [RequestStatus.PREEMPTED], "1 is to wait"
    check_failed(engine, error, ["0", "1"], "1 is preempted, the step with its first token fails")
    check_usable(engine, "a preempted request has failed")


def test_a_step_whose_requests_have_all_ended_may_fail() -> None:
    """There is no request to end with the cause."""
    engine = scripted_engine(script=ends_at(1))
    engine.add_request("0", [5] * 5, params_for(6))
    LLMEngine.step(engine)
    executor_of(engine).result_error = ZeroDivisionError("the cat sat on it")
    outputs = LLMEngine.step(engine)
    assert [output.finish_reason for output in outputs] == ["stop"], f"got {outputs}. {LOOK_STEP}"
    check_failed(engine, fail_steps(engine, 1), [], "all have ended")
    executor_of(engine).script = lambda tokens: 1
    engine.add_request("next", [5] * 5, params_for(2))
    assert run_dry(engine)["next"].token_ids == [1, 1], f"the next request. {LOOK_FAIL}"


# The oracle

LENGTHS = [17, 1, 2, 33, 15, 16, 60, 1, 31, 5] * 3 + [40, 8]
MAX_TOKENS = [9, 7, 3, 8, 1, 9, 5, 6, 7, 2, 4] * 3
ARRIVALS = [0, 0, 1, 2, 2, 3, 7, 8, 8, 25] * 3 + [26, 31]  # at which step each comes


@pytest.fixture(scope="module")
def expected_tokens(reference: Any, prompt_of: PromptOf) -> list[list[int]]:
    """What transformers answers to each of the prompts of LENGTHS alone."""
    cases = enumerate(zip(LENGTHS, MAX_TOKENS, strict=False))
    return [reference_greedy(reference, prompt_of(length, number), count) for number, (length, count) in cases]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "is_small"),
    [
        (dict(block_size=16), False),
        (dict(block_size=4, max_num_seqs=3), False),
        (dict(block_size=16, num_kv_blocks=1 + 5), True),
        (dict(block_size=1, num_kv_blocks=1 + 70), True),
        (dict(block_size=4, max_num_seqs=3, async_scheduling=False), False),
        (dict(block_size=16, num_kv_blocks=1 + 5, async_scheduling=False), True),
    ],
    ids=str,
)
def test_greedy_equals_transformers_for_32_mixed_requests(
    make_engine: MakeEngine,
    reference: Any,
    prompt_of: PromptOf,
    expected_tokens: list[list[int]],
    flags: dict[str, Any],
    is_small: bool,
) -> None:
    engine = make_engine(**flags)

    def arrive(step: int) -> bool:
        for number in (number for number, at in enumerate(ARRIVALS) if at == step):
            engine.add_request(str(number), prompt_of(LENGTHS[number], number), greedy(MAX_TOKENS[number]))
        return step < max(ARRIVALS)

    got = run_dry(engine, arrive)
    assert len(got) == 32, f"32 requests, {len(got)} answers"
    for number, expected in enumerate(expected_tokens):
        where = f"{flags}, request {number} (prompt of {LENGTHS[number]}). {LOOK_ORACLE} Difference"
        prompt = prompt_of(LENGTHS[number], number)
        assert_same_greedy(reference, prompt, got[str(number)].token_ids, expected, where)
    num_preemptions = engine.scheduler.num_preemptions
    assert (num_preemptions > 0) is is_small, f"{flags}: {num_preemptions} preemptions."


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_small_random_models(family: str, is_async: bool, tmp_path: Path) -> None:
    """Random logits are far apart, so that a wrong token, position or slot shows at once."""
    model = small_model(family, seed=3)
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").symlink_to(MODELS_DIR / "tiny" / "tokenizer.json")
    flags = {"block_size": 4, "num_kv_blocks": 1 + 11, "max_num_seqs": 4}
    engine = LLMEngine(EngineConfig(model=str(tmp_path), device="cpu", async_scheduling=is_async, **flags))
    rng = random.Random(0)
    cases = [([rng.randrange(320) for _ in range(rng.randint(1, 20))], rng.randint(1, 12)) for _ in range(8)]

    def arrive(step: int) -> bool:
        if step < len(cases):
            engine.add_request(str(step), cases[step][0], greedy(cases[step][1]))
        return step < len(cases)

    got = run_dry(engine, arrive)
    for number, (prompt, count) in enumerate(cases):
        where = f"{family}, async={is_async}, request {number}. {LOOK_ORACLE} Difference"
        expected = reference_greedy(model, prompt, count)
        assert_same_greedy(model, prompt, got[str(number)].token_ids, expected, where)
    assert engine.scheduler.num_preemptions > 0, "this test needs preemptions"


# Sampling parameters × a token in flight × preemption

TEN_WORDS = {100 + number: 40.0 for number in range(10)}  # answers of so few words repeat themselves
PLAIN: list[dict[str, Any]] = [  # greedy, so that they can be computed by the definition
    dict(logprobs=3),
    dict(repetition_penalty=1.5),
    dict(presence_penalty=1.5, frequency_penalty=1.0),
    dict(frequency_penalty=2.0, logprobs=2),
    dict(frequency_penalty=2.0, logit_bias={**TEN_WORDS, 100: 0.0, 7: 42.0}, logprobs=0),
    dict(ignore_eos=False, min_tokens=5, logit_bias={**TEN_WORDS, 2: 60.0}),
    dict(stop_token_ids=[2], min_tokens=7, logit_bias={**TEN_WORDS, 2: 60.0}),
]
DRAWN: list[dict[str, Any]] = [
    dict(temperature=1.0, seed=3),
    dict(temperature=0.7, seed=4, top_k=5, top_p=0.9, repetition_penalty=1.2),
    dict(temperature=1.0, seed=3, logprobs=1),
    dict(temperature=1.0, seed=5, ignore_eos=False, min_tokens=10, logit_bias={**TEN_WORDS, 2: 40.0}),
]
MIXED = PLAIN + DRAWN
EOS = 2
NUM_TOKENS = 12


def mixed(number: int) -> SamplingParams:
    return greedy(NUM_TOKENS, **{"logit_bias": TEN_WORDS, **MIXED[number]})


def mixed_prompt(prompt_of: PromptOf, number: int) -> list[int]:
    """It ends in words of the bias, so that a repetition penalty has a prompt to look at."""
    return [*prompt_of(5 + number % 3, number % 3), 101, 104]


@torch.inference_mode()
def by_definition(model: Any, prompt: list[int], params: SamplingParams) -> tuple[list[int], list[dict[int, Logprob]]]:
    """Greedy, with bias, penalties and min_tokens, over transformers' logits: one whole forward pass a token."""
    tokens, logprobs = list(prompt), list[dict[int, Logprob]]()
    while len(tokens) - len(prompt) < params.max_tokens:
        logits = model(torch.tensor([tokens])).logits[0, -1].float()
        raw, output = logits.log_softmax(dim=-1), tokens[len(prompt) :]
        for token_id, bias in params.logit_bias:
            logits[token_id] += bias
        for token_id in set(tokens):
            penalty = params.repetition_penalty
            logits[token_id] = logits[token_id] / penalty if logits[token_id] > 0 else logits[token_id] * penalty
        for token_id in set(output):
            logits[token_id] -= params.frequency_penalty * output.count(token_id) + params.presence_penalty
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
        if len(output) < params.min_tokens:
            logits[list(stops)] = -torch.inf
        token_id = int(logits.argmax())
        tokens.append(token_id)
        ranked = raw.argsort(descending=True).tolist()
        top = [token_id, *ranked[: params.logprobs or 0]]
        logprobs.append({each: Logprob(float(raw[each]), ranked.index(each) + 1) for each in top})
        if token_id in stops:
            break
    return tokens[len(prompt) :], logprobs


@pytest.fixture(scope="module")
def mixed_alone(llm: LLM, prompt_of: PromptOf) -> list[CompletionOutput]:
    """Each request of MIXED by itself, in a roomy pool, a step at a time."""
    prompts = [mixed_prompt(prompt_of, number) for number in range(len(MIXED))]
    return [llm.generate([prompt], mixed(number))[0].outputs[0] for number, prompt in enumerate(prompts)]


def check_logprobs(got: list[dict[int, Logprob]] | None, expected: list[dict[int, Logprob]], where: str) -> None:
    for entry, wanted in zip(got or [], expected, strict=True):
        assert list(entry) == list(wanted), f"{where}: logprobs of {list(entry)}, expected {list(wanted)}."
        for token_id, logprob in entry.items():
            assert abs(logprob.logprob - wanted[token_id].logprob) < 1e-3, f"{where}: {entry}, expected {wanted}."


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(PLAIN)))
def test_one_alone_is_what_the_definition_says(
    mixed_alone: list[CompletionOutput], reference: Any, prompt_of: PromptOf, number: int
) -> None:
    answer, where = mixed_alone[number], f"{MIXED[number]}, alone, a step at a time"
    expected, logprobs = by_definition(reference, mixed_prompt(prompt_of, number), mixed(number))
    assert answer.token_ids == expected, (
        f"{where}: expected {expected} (transformers' logits, changed by the definition), got {answer.token_ids}. "
        f"{LOOK_SAMPLING}"
    )
    if "logprobs" in MIXED[number]:
        where += ". Look at worker/sampler.py::top_logprobs and LogprobsTensors.of"
        check_logprobs(answer.logprobs, logprobs, where)
        check_ranks(reference, mixed_prompt(prompt_of, number), answer, where)
    else:
        assert answer.logprobs is None, f"{where}: no logprobs were asked for, got {answer.logprobs}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "order"),
    [
        (dict(), "shuffled, one by one"),
        (dict(max_num_seqs=3), "at once"),
        (dict(block_size=4, num_kv_blocks=1 + 11), "at once"),
        (dict(block_size=4, num_kv_blocks=1 + 11), "shuffled, one by one"),
        (dict(async_scheduling=False), "at once"),
        (dict(async_scheduling=False, block_size=4, num_kv_blocks=1 + 11), "shuffled, one by one"),
    ],
    ids=str,
)
def test_batch_preemption_and_the_token_in_flight_change_no_answer(
    make_llm: MakeLLM, mixed_alone: list[CompletionOutput], reference: Any, prompt_of: PromptOf,
    flags: dict[str, Any], order: str,
) -> None:  # fmt: skip
    """Penalties and min_tokens count the token in flight; a seeded draw depends on seed and position alone."""
    engine = make_llm(**flags).engine
    numbers = list(range(len(MIXED)))
    if order.startswith("shuffled"):
        random.Random(0).shuffle(numbers)

    def arrive(step: int) -> bool:
        come, numbers[:] = (numbers[:], []) if order == "at once" else (numbers[:1], numbers[1:])
        for number in come:
            engine.add_request(str(number), mixed_prompt(prompt_of, number), mixed(number))
        return bool(numbers)

    got = run_dry(engine, arrive)
    for number, expected in enumerate(mixed_alone):
        answer, where = got[str(number)], f"{MIXED[number]} among others with {flags}, {order}"
        assert answer.token_ids == expected.token_ids, (
            f"{where}: expected what it gets alone, {expected.token_ids}, got {answer.token_ids}. {LOOK_SAMPLING}"
        )
        reasons = (answer.finish_reason, answer.stop_reason)
        assert reasons == (expected.finish_reason, expected.stop_reason), f"{where}: {reasons}. {LOOK_STOP}"
        check_logprobs(answer.logprobs, expected.logprobs or [], f"{where}. {LOOK_SAMPLING}")
        check_ranks(reference, mixed_prompt(prompt_of, number), answer, f"{where}. {LOOK_SAMPLING}")
    num_preemptions = engine.scheduler.num_preemptions
    assert (num_preemptions > 2) is ("num_kv_blocks" in flags), f"{flags}, {order}: {num_preemptions} preemptions."


def test_the_mixed_requests_differ(mixed_alone: list[CompletionOutput]) -> None:
    """Else the tests above would prove nothing."""
    for one, other in itertools.combinations(range(len(MIXED)), 2):
        if one % 3 == other % 3 and MIXED[one].get("seed", 0) != MIXED[other].get("seed", 1):
            assert mixed_alone[one].token_ids != mixed_alone[other].token_ids, (
                f"{MIXED[one]} answers as {MIXED[other]}: {mixed_alone[one].token_ids}"
            )


# Stop strings: found in the text, one step late


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [dict(), dict(async_scheduling=False), dict(block_size=4, num_kv_blocks=1 + 14)], ids=str
)
def test_stop_strings(make_llm: MakeLLM, llm: LLM, prompt_of: PromptOf, flags: dict[str, Any]) -> None:
    """The answer ends where its stop string begins. The step in flight brings another token, which must be dropped."""
    small, prompts = make_llm(**flags), [prompt_of(6 + number, number) for number in range(8)]
    whole = [result.outputs[0] for result in llm.generate(prompts, greedy(24))]
    stops = [each.text[8 + 4 * n :][:6] if n % 4 else f"{each.text[-4:]}¤" for n, each in enumerate(whole)]
    got = small.generate(prompts, [greedy(24, stop=[stop]) for stop in stops])
    for number, (full, stop) in enumerate(zip(whole, stops, strict=True)):
        output, is_found = got[number].outputs[0], stop in full.text
        expected = (full.text[: full.text.find(stop)], "stop", stop) if is_found else (full.text, "length", None)
        actual = (output.text, output.finish_reason, output.stop_reason)
        assert actual == expected, f"request {number}, stop={stop!r}, {flags}: {expected}, got {actual}. {LOOK_LLM}"
        decode = small.tokenizer.decode
        count = next((n for n in range(25) if stop in decode(full.token_ids[:n])), 24)
        assert output.token_ids == full.token_ids[:count], (
            f"request {number}, stop={stop!r}, {flags}: expected the {count} tokens up to the one that completes it, "
            f"got {len(output.token_ids)}. {LOOK_LLM}"
        )
    engine = small.engine
    assert not engine.has_unfinished_requests and not engine.blocks.num_used_blocks, f"something remains. {LOOK_LLM}"
    assert (engine.scheduler.num_preemptions > 2) is ("num_kv_blocks" in flags), "preemptions"


@pytest.mark.slow
def test_nothing_is_computed_after_a_stop_string(make_llm: MakeLLM, llm: LLM, prompt_of: PromptOf) -> None:
    """The engine learns of it when the request is aborted; by then one more step was launched, and no other."""
    prompt, num_tokens = prompt_of(6), 24
    first = llm.generate([prompt], greedy(1))[0].outputs[0].text
    small = make_llm()
    small.generate([prompt], greedy(num_tokens, stop=[first]))
    assert small.engine.num_steps == 2, (
        f"the first of {num_tokens} tokens completes {first!r}: expected 2 steps, one of them wasted, got "
        f"{small.engine.num_steps}. {LOOK_LLM}"
    )


# What can never be served


def refuse(engine: LLMEngine, prompt: list[int], params: SamplingParams, field: str, *words: str) -> None:
    with pytest.raises(FieldError) as caught:
        engine.add_request("x", prompt, params)
    message = str(caught.value)
    assert caught.value.field == field, f"expected the error to name {field}, got {caught.value.field}. {LOOK_CHECK}"
    for word in words:
        assert word in message, f"the message must name value and limit, {word!r}: {message!r}. {LOOK_CHECK}"
    assert not engine.has_unfinished_requests, f"a refused request was queued. {LOOK_CHECK}"


@BOTH
@pytest.mark.parametrize(("length", "num_tokens"), [(40, 9), (1, 48), (48, 1)])
@pytest.mark.parametrize("block_size", [1, 16])
def test_the_largest_request_that_fits(block_size: int, length: int, num_tokens: int, is_async: bool) -> None:
    """48 slots hold prompt and answer of 49 tokens together: the last token is never stored. Others wait."""
    engine = scripted_engine(block_size=block_size, num_kv_blocks=1 + 48 // block_size, async_scheduling=is_async)
    params = params_for(num_tokens, ignore_eos=True)
    refuse(engine, [9] * length, params_for(num_tokens + 1), "prompt", f"{length} tokens", "48 tokens")
    refuse(engine, [9] * (length + 1), params, "prompt", f"{length + 1} tokens", "48 tokens")
    add_all(engine, {"before": ([5] * 3, params_for(4)), "largest": ([9] * length, params), "after": ([6], params)})
    got, expected = run_dry(engine)["largest"].token_ids, answer_alone([9] * length, num_tokens, ignore_eos=True)
    assert got == expected, f"a prompt of {length} in 48 slots: expected {expected}, got {got}. {LOOK_CHECK}"


@pytest.mark.parametrize(
    ("prompt", "fields", "field", "words"),
    [
        ([5, 6], {"n": 2}, "n", ["2"]),
        ([5, 6], {"stop_token_ids": [256]}, "stop_token_ids", ["256"]),
        ([5, 6], {"logit_bias": {256: 1.0}}, "logit_bias", ["256"]),
        ([], {}, "prompt", ["empty"]),
        ([5, 256], {}, "prompt", ["255"]),
        ([5, -1], {}, "prompt", ["255"]),
        ([5] * 64, {}, "prompt", ["64"]),
        ([5] * 900, {}, "prompt", ["900", "64"]),
    ],
    ids=["n", "stop token", "bias", "empty", "no such token", "negative", "context", "beyond the context"],
)
def test_bad_requests_are_refused(prompt: list[int], fields: dict[str, Any], field: str, words: list[str]) -> None:
    refuse(scripted_engine(64), prompt, greedy(3, **fields), field, *words)


def test_limits() -> None:
    """What another process needs to refuse a request without asking the core."""
    limits = scripted_engine(64, block_size=4, num_kv_blocks=1 + 7).limits
    got = (limits.max_model_len, limits.vocab_size, limits.num_kv_tokens)
    assert got == (64, 256, 28), f"(max_model_len, vocab_size, num_kv_tokens): expected (64, 256, 28), got {got}."


def test_a_step_must_have_room_for_the_longest_prompt() -> None:
    with pytest.raises(FieldError) as caught:
        scripted_engine(100, max_num_batched_tokens=99)
    assert caught.value.field == "max_num_batched_tokens", f"got {caught.value.field}. {LOOK_CHECK}"
    for word in ("max_model_len=100", "99"):
        assert word in str(caught.value), f"the message must name value and limit, {word!r}: {caught.value}."
    for flags, expected in ((dict(max_num_batched_tokens=100), 100), (dict(), 2_048)):
        got = scripted_engine(100, **flags).scheduler.max_num_batched_tokens
        assert got == expected, f"{flags}: expected a budget of {expected}, got {got}. {LOOK_CHECK}"
    assert scripted_engine(3_000).scheduler.max_num_batched_tokens == 3_000, f"the context is longer. {LOOK_CHECK}"


# LLM.generate


def test_generate_answers_in_order(make_llm: MakeLLM, prompt_of: PromptOf) -> None:
    """The engine ends the shortest answer first, generate keeps the order of the prompts."""
    small = make_llm(max_num_seqs=2)
    prompts, counts = [prompt_of(5 + number, number) for number in range(4)], (9, 2, 5, 1)
    results = small.generate(prompts, [greedy(count) for count in counts])
    got = [(result.prompt_token_ids, len(result.outputs[0].token_ids)) for result in results]
    expected = list(zip(prompts, counts, strict=True))
    assert got == expected, f"(prompt, tokens): expected {expected}, got {got}. {LOOK_LLM}"
    for result in results:
        text = small.tokenizer.decode(result.outputs[0].token_ids, skip_special_tokens=True)
        assert result.outputs[0].text == text, f"the tokens say {text!r}, got {result.outputs[0].text!r}. {LOOK_LLM}"
    assert small.generate([], greedy(5)) == [], f"no prompts, no answers. {LOOK_LLM}"


@pytest.mark.parametrize(
    ("prompts", "params"),
    [
        ([[100], [101]], [greedy(3)]),
        ([[100]], [greedy(3), greedy(3)]),
        ([[100], [101]], [greedy(3), greedy(3, n=2)]),
        ([[100], []], greedy(3)),
        ([[100], [101] * 5_000], greedy(3)),
    ],
    ids=["too few params", "too many params", "n", "empty prompt", "too long"],
)
def test_generate_refuses_before_it_queues(
    llm: LLM, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]
) -> None:
    before = llm.engine.num_steps
    with pytest.raises(FieldError):
        llm.generate(prompts, params)
    assert llm.engine.num_steps == before, f"bad input is refused before anything is computed. {LOOK_LLM}"
    assert not llm.engine.has_unfinished_requests, f"bad input was refused, and requests are queued. {LOOK_LLM}"
    assert not llm.processor._detokenizers, f"bad input was refused, and something of it is kept. {LOOK_LLM}"


@pytest.mark.slow
@BOTH
def test_generate_leaves_nothing_when_a_step_fails(
    make_llm: MakeLLM, prompt_of: PromptOf, monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    """The model fails in all steps in flight, and the next call must not."""
    llm = make_llm(max_num_seqs=2, async_scheduling=is_async)
    monkeypatch.delattr(llm.engine, "step")  # the one that the fixture has put there would end the test
    expected = llm.generate([prompt_of(5)], greedy(6))
    compute, num_calls = llm.engine.executor.worker.model.compute_logits, itertools.count()

    def fail(hidden: torch.Tensor) -> torch.Tensor:
        if next(num_calls) in ((2, 3) if is_async else (2,)):
            raise ZeroDivisionError("the cat sat on it")
        return compute(hidden)

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.executor.worker.model, "compute_logits", fail)
        with pytest.raises(ZeroDivisionError, match="the cat sat on it"):
            llm.generate([prompt_of(3, number) for number in range(3)], greedy(6))
        check_nothing_remains(llm, expected, [prompt_of(5)])


@BOTH
def test_generate_leaves_nothing_after_ctrl_c(
    make_llm: MakeLLM, prompt_of: PromptOf, monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    llm = make_llm(max_num_seqs=2, async_scheduling=is_async)
    expected = llm.generate([prompt_of(5)], greedy(6))
    process, num_calls = llm.processor.process, itertools.count()

    def interrupt(outputs: list[EngineCoreOutput]) -> Any:
        if next(num_calls) == 2:
            raise KeyboardInterrupt
        return process(outputs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(llm.processor, "process", interrupt)
        llm.generate([prompt_of(3, number) for number in range(3)], greedy(6))
    check_nothing_remains(llm, expected, [prompt_of(5)])


def check_nothing_remains(llm: LLM, expected: list[RequestOutput], prompts: list[list[int]]) -> None:
    """A call has failed; expected is what a call gave before it."""
    remaining = [*llm.engine.scheduler.running, *llm.engine.scheduler.waiting]
    assert not remaining and not llm.processor._detokenizers, f"a call failed, and {remaining} remain. {LOOK_LLM}"
    try:
        got = llm.generate(prompts, greedy(6))
    except ZeroDivisionError as stale:
        pytest.fail(f"a call fails for a step in flight of the call before: {stale!r}. {LOOK_FAIL}")
    answers, expected_answers = ([result.outputs for result in results] for results in (got, expected))
    assert answers == expected_answers, f"after a failed call: expected {expected}, got {got}. {LOOK_LLM}"
    blocks = llm.engine.blocks
    assert blocks.num_used_blocks == 0 and not llm.engine.has_unfinished_requests, f"something remains. {LOOK_LLM}"


def test_the_length_limit_of_a_request() -> None:
    engine = scripted_engine(20)
    engine.add_request("0", [5] * 5, params_for(3, seed=7))
    engine.add_request("1", [5] * 5, params_for(30))
    first, second = engine.scheduler.waiting
    assert (first.max_num_tokens, second.max_num_tokens) == (8, 20), (
        f"prompts of 5, max_tokens of 3 and 30, a context of 20: expected max_num_tokens 8 and 20, got "
        f"{first.max_num_tokens} and {second.max_num_tokens}. Look at core/engine.py::LLMEngine.add_request."
    )
