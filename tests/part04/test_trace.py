"""--trace: one line a step, and its numbers are the engine's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import FieldError
from common.sampling_params import SamplingParams
from common.trace import Phase, RequestTrace, Trace, read_trace, step_phases
from part04_continuous_batching.api.async_engine import AsyncLLM
from part04_continuous_batching.config import EngineConfig
from part04_continuous_batching.core.engine import LLMEngine
from part04_continuous_batching.core.request import Request
from part04_continuous_batching.core.step_tracer import PART
from part04_continuous_batching.messages import StepInput, StepOutput
from tests.engine_checks import without_contents

LOOK = 'Look at core/step_tracer.py::StepTracer; README "See it first".'
MakeEngine = Callable[..., LLMEngine]
PromptOf = Callable[..., list[int]]


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


def close(engine: LLMEngine, path: Path) -> Trace:
    engine.tracer.close()
    trace = read_trace(path)
    assert trace.note is None, f"the trace is not complete: {trace.note}. {LOOK}"
    return trace


def watch_steps(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch, on_step: Callable[[int], Any]) -> list[dict]:
    """Step until nothing is left. Returns what each line of the trace should say, as the engine itself counts."""
    expected: list[dict] = []
    scheduled: list[RequestTrace] = []
    execute, preempt, preempted = engine.executor.execute, engine.scheduler.preempt, list[str]()
    runner, tables = engine.executor.worker.runner, engine.blocks.block_tables

    def note_requests(step: StepInput) -> StepOutput:
        for request in engine.scheduler.running:  # all of them are in the step, in this order
            num_new, held = request.num_tokens - request.num_computed_tokens, len(tables[request.request_id])
            scheduled.append(
                RequestTrace(
                    id=request.request_id,
                    num_computed=request.num_computed_tokens,
                    num_scheduled=num_new,
                    num_blocks=held,
                )
            )
        return execute(step)

    def note_victim(request: Request) -> None:
        preempted.append(request.request_id)
        preempt(request)

    monkeypatch.setattr(engine.executor, "execute", note_requests)
    monkeypatch.setattr(engine.scheduler, "preempt", note_victim)
    while engine.has_unfinished_requests:
        aborted = list(on_step(len(expected)) or [])
        scheduled.clear()
        preempted.clear()
        num_computed = runner.num_tokens_computed
        outputs = engine.step()
        expected.append(
            {
                "step": engine.num_steps,
                "num_running": len(outputs),
                "num_waiting": len(engine.scheduler.waiting),
                "requests": list(scheduled),
                "num_blocks_total": engine.blocks.num_blocks - 1,
                "num_blocks_free": engine.blocks.num_free_blocks,
                "preempted": list(preempted),
                "aborted": aborted,
                "finished": [output.request_id for output in outputs if output.finish_reason],
                "tokens": runner.num_tokens_computed - num_computed,
            }
        )
    return expected


def test_each_line_says_what_the_engine_counts(
    make_engine: MakeEngine, prompt_of: PromptOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With preemptions, and aborts of a running, a waiting, a preempted and an unknown request."""
    path = tmp_path / "trace.jsonl"
    engine = make_engine(trace=str(path), block_size=4, num_kv_blocks=1 + 8, max_num_seqs=4)
    lengths, counts = [5, 9, 1, 12, 7, 3, 4], [14, 11, 24, 3, 16, 1, 5]
    for number, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        engine.add_request(str(number), prompt_of(length, number), greedy(count))
    was_preempted: list[str] = []

    def on_step(step: int) -> list[str]:
        victims = {2: ["0", "6"], 9: ["unknown"]}.get(step, [])
        waiting = [request.request_id for request in engine.scheduler.waiting if request.output_token_ids]
        if waiting and not was_preempted and step > 3:
            was_preempted.extend(waiting[:1])
            victims = [*victims, *waiting[:1]]
        engine.abort_requests(victims)
        return [victim for victim in victims if victim != "unknown"]

    expected = watch_steps(engine, monkeypatch, on_step)
    trace = close(engine, path)
    assert was_preempted and engine.scheduler.num_preemptions > 1, "this test needs preemptions, one of them aborted"
    assert (trace.header["part"], trace.header["model"]) == (PART, "tiny"), f"header {trace.header}. {LOOK}"
    assert len(trace.steps) == len(expected) == engine.num_steps, (
        f"one line a step: expected {engine.num_steps}, got {len(trace.steps)}. {LOOK}"
    )
    for step, want in zip(trace.steps, expected, strict=True):
        for name, value in want.items():
            num_tokens = sum(request.num_scheduled for request in step.requests)
            got = num_tokens if name == "tokens" else getattr(without_contents(step), name)
            if name == "aborted":
                got, value = sorted(got), sorted(value)
            assert got == value, f"step {step.step}, {name}: the engine says {value}, the trace {got}. {LOOK}"
    times = [(step.schedule_s, step.execute_s, step.update_s) for step in trace.steps]
    assert all(seconds >= 0 for step in times for seconds in step), (
        f"a part of a step took less than 0 s: {times}. {LOOK}"
    )
    starts = [step.start_s for step in trace.steps]
    ends = [0.0, *(step.end_s for step in trace.steps)]
    assert all(end <= start for end, start in zip(ends, starts, strict=False)), (
        f"steps overlap: {starts}, {ends}. {LOOK}"
    )


def test_a_reader_sees_prefills_decodes_and_resumptions(
    make_engine: MakeEngine, prompt_of: PromptOf, tmp_path: Path
) -> None:
    path = tmp_path / "trace.jsonl"
    engine = make_engine(trace=str(path), block_size=4, num_kv_blocks=1 + 3)
    for name in "01":
        engine.add_request(name, prompt_of(4, int(name)), greedy(4))
    while engine.has_unfinished_requests:
        engine.step()
    got = list(step_phases(close(engine, path).steps))
    prefill, decode = Phase.PREFILL, Phase.DECODE
    alone = [{"0": decode}] * 3 + [{"1": prefill}] + [{"1": decode}] * 2
    expected = [{"0": prefill, "1": prefill}, *alone]
    assert got == expected, f"1 is preempted in the second step: expected {expected}, got {got}. {LOOK}"


def test_a_failed_step_leaves_the_trace_readable(
    make_engine: MakeEngine, prompt_of: PromptOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace.jsonl"
    engine = make_engine(trace=str(path), max_num_seqs=1)
    for name in "01":
        engine.add_request(name, prompt_of(4), greedy(3))
    engine.step()
    with monkeypatch.context() as patch, pytest.raises(TypeError) as caught:
        patch.setattr(engine.executor, "execute", None)
        engine.step()
    engine.fail(caught.value)
    engine.add_request("2", prompt_of(4), greedy(2))
    while engine.has_unfinished_requests:
        engine.step()
    steps = close(engine, path).steps
    got = [(step.step, [r.id for r in step.requests], step.aborted, step.finished) for step in steps]
    expected = [(1, ["0"], [], []), (2, ["2"], ["0", "1"], []), (3, ["2"], [], ["2"])]
    assert got == expected, f"(step, requests, aborted, finished): expected {expected}, got {got}. {LOOK}"


def test_without_a_path_nothing_is_kept(make_engine: MakeEngine, prompt_of: PromptOf) -> None:
    """Not even the ids of aborted requests: a server may abort millions."""
    engine = make_engine()
    for number in range(20):
        engine.add_request(str(number), prompt_of(4), greedy(1))
        engine.abort_requests([str(number)])
        engine.add_request("stays", prompt_of(4), greedy(1))
        engine.step()
    assert not engine.tracer.aborted, f"no trace is written, and it keeps {engine.tracer.aborted}. {LOOK}"
    engine.tracer.close()


def test_a_file_that_cannot_be_written_is_refused(make_engine: MakeEngine, tmp_path: Path) -> None:
    with pytest.raises(FieldError) as caught:
        make_engine(trace=str(tmp_path / "no" / "such" / "folder"))
    assert caught.value.field == "trace" and "folder" in str(caught.value), f"got {caught.value}. {LOOK}"


def test_the_trace_is_complete_when_the_server_ends(
    make_config: Callable[..., EngineConfig], prompt_of: PromptOf, tmp_path: Path
) -> None:
    path = tmp_path / "trace.jsonl"
    engine = AsyncLLM(make_config(trace=str(path)))

    async def ask() -> int:
        engine.start()
        streams = [engine.generate(prompt_of(5, number), greedy(4)) for number in range(3)]
        num_tokens = 0
        for stream in streams:
            async for output in stream:
                num_tokens += len(output.token_ids)
        return num_tokens

    num_tokens = asyncio.run(ask())
    engine.shutdown()
    trace = read_trace(path)
    finished = sorted(request_id for step in trace.steps for request_id in step.finished)
    assert (trace.note, finished) == (None, ["0", "1", "2"]), f"{trace.note}; finished: {finished}. {LOOK}"
    num_sampled = sum(request.num_sampled for step in trace.steps for request in step.requests)
    assert num_sampled == num_tokens == 12, f"12 tokens were read, the trace has {num_sampled}. {LOOK}"
