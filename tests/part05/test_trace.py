"""--trace: one line a step, also with two in flight, and its numbers are the engine's."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from common.errors import FieldError
from common.trace import Phase, RequestTrace, Trace, read_trace, step_phases
from part05_async_scheduling.core.engine import LLMEngine
from part05_async_scheduling.core.request import Request
from part05_async_scheduling.core.scheduler import SchedulerOutput
from part05_async_scheduling.core.step_tracer import PART
from part05_async_scheduling.messages import StepInput, StepOutput
from tests.engine_checks import without_contents
from tests.part05.scripted import run_dry, scripted_engine, take_step
from tests.scripted import END, ScriptedStep, executor_of, params_for, shares

LOOK = 'Look at core/step_tracer.py::StepTracer; README "Check it".'


def close(engine: LLMEngine, path: Path) -> Trace:
    engine.tracer.close()
    trace = read_trace(path)
    assert trace.note is None, f"the trace is not complete: {trace.note}. {LOOK}"
    return trace


def watch(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch, aborts: dict[int, list[str]]) -> list[dict[str, Any]]:
    """Step until all requests have ended. What each line should say, as counted here at each launch and at the end of
    each step."""
    expected: list[dict[str, Any]] = []
    preempt, preempted = engine.scheduler.preempt, list[str]()
    schedule, launch, update = engine.scheduler.schedule, engine.executor.launch, engine._update
    scheduled: list[SchedulerOutput] = []
    aborted: list[str] = []

    def note_victim(request: Request) -> None:
        preempted.append(request.request_id)
        preempt(request)

    def note_schedule() -> SchedulerOutput:
        scheduled.append(schedule())
        return scheduled[-1]

    def note_launch(step: StepInput) -> Any:
        requests = [
            RequestTrace(
                id=request.request_id,
                num_computed=share.num_computed_tokens,
                num_scheduled=share.num_scheduled_tokens,
                num_blocks=len(engine.blocks.block_tables[request.request_id]),
            )
            for request, share in shares(scheduled[-1])
        ]
        line = {"step": len(expected) + 1, "requests": requests, "num_running": len(requests)}
        expected.append({**line, "num_waiting": len(engine.scheduler.waiting), "preempted": list(preempted)})
        preempted.clear()
        return launch(step)

    def note_update(step: Any) -> Any:
        ended = {request.request_id for request in step.scheduled.requests if request.status.is_finished}
        outputs = update(step)
        line = next(line for line in expected if "finished" not in line)
        line["finished"] = [output.request_id for output in outputs if output.finish_reason]
        line["discarded"] = [each.id for each in line["requests"] if each.id in ended]
        line["num_blocks_free"] = engine.blocks.num_free_blocks
        line["aborted"] = list(aborted)
        aborted.clear()
        return outputs

    monkeypatch.setattr(engine.scheduler, "preempt", note_victim)
    monkeypatch.setattr(engine.scheduler, "schedule", note_schedule)
    monkeypatch.setattr(engine.executor, "launch", note_launch)
    monkeypatch.setattr(engine, "_update", note_update)
    for number in range(500):
        if not engine.has_unfinished_requests:
            break
        names = aborts.get(number, [])
        aborted.extend(name for name in names if name != "unknown")
        engine.abort_requests(names)
        take_step(engine)
    return expected


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
def test_each_line_says_what_the_engine_counts(is_async: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With preemptions, aborts of requests that run, wait and are in flight, and unforeseen ends."""
    path = tmp_path / "trace.jsonl"
    flags = {"block_size": 4, "num_kv_blocks": 1 + 8, "max_num_seqs": 4, "async_scheduling": is_async}
    engine = scripted_engine(trace=str(path), **flags)
    lengths, counts = [5, 9, 1, 12, 7, 3, 4, 6], [14, 11, 20, 3, 16, 1, 5, 20]
    for number, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        engine.add_request(str(number), [100 + number] * length, params_for(count))
    expected = watch(engine, monkeypatch, {2: ["0", "6"], 9: ["unknown"]})
    trace = close(engine, path)
    assert engine.scheduler.num_preemptions > 1, "this test needs preemptions"
    assert (trace.header["part"], trace.header["model"]) == (PART, "tiny"), f"header {trace.header}. {LOOK}"
    assert len(trace.steps) == len(expected) == engine.num_steps, (
        f"one line a step: expected {engine.num_steps}, got {len(trace.steps)}. {LOOK}"
    )
    for step, want in zip(trace.steps, expected, strict=True):
        for name, value in {**want, "num_blocks_total": 8}.items():
            got = getattr(without_contents(step), name)
            if name == "aborted":
                got, value = sorted(got), sorted(value)
            assert got == value, f"step {step.step}, {name}: expected {value}, the trace has {got}. {LOOK}"
    discarded = sum(len(step.discarded) for step in trace.steps)
    assert (discarded > 0) is is_async, f"unforeseen ends cost discarded tokens: got {discarded}. {LOOK}"
    times = [(step.schedule_s, step.execute_s, step.update_s, step.forward_s or 0.0) for step in trace.steps]
    assert all(seconds >= 0 for step in times for seconds in step), f"a part of a step took less than 0 s: {times}."


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
def test_a_step_begins_before_the_last_one_has_ended(is_async: bool, tmp_path: Path) -> None:
    """All times are read in the order of the calls, so this tests an order, not a speed."""
    path = tmp_path / "trace.jsonl"
    engine = scripted_engine(trace=str(path), async_scheduling=is_async)
    engine.add_request("0", [5] * 5, params_for(6, ignore_eos=True))
    run_dry(engine)
    steps = close(engine, path).steps
    for step, following in zip(steps, steps[1:], strict=False):
        executed_s = step.start_s + step.schedule_s + step.execute_s
        launched_s = following.start_s + following.schedule_s
        assert (launched_s <= executed_s) is is_async, (
            f"async_scheduling={is_async}: step {following.step} was launched at {launched_s:.6f}, the results of step "
            f"{step.step} arrived at {executed_s:.6f}. {LOOK}"
        )
        if not is_async:
            assert step.end_s <= following.start_s, f"steps {step.step} and {following.step} overlap. {LOOK}"


def test_when_the_device_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the trace's own time: seconds since it began."""
    path = tmp_path / "trace.jsonl"
    engine = scripted_engine(trace=str(path))
    began_s = time.perf_counter() - engine.tracer._writer.elapsed_s()  # type: ignore[union-attr]
    result = ScriptedStep.result

    def at_known_times(self: ScriptedStep) -> StepOutput:
        start_s, output = began_s + 10 * self.number, result(self)
        output.start_s, output.end_s = start_s, start_s + 0.25
        return output

    monkeypatch.setattr(ScriptedStep, "result", at_known_times)
    engine.add_request("0", [5] * 5, params_for(3, ignore_eos=True))
    run_dry(engine)
    got = [(step.forward_start_s, step.forward_s) for step in close(engine, path).steps]
    expected = [(pytest.approx(10.0 * number, abs=0.01), pytest.approx(0.25)) for number in (1, 2, 3)]
    assert got == expected, f"(forward_start_s, forward_s): expected {expected}, got {got}. {LOOK}"


def test_a_reader_sees_prefills_decodes_and_resumptions(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    engine = scripted_engine(trace=str(path), block_size=4, num_kv_blocks=1 + 3)
    for name in "01":
        engine.add_request(name, [80 + int(name)] * 4, params_for(4, ignore_eos=True))
    run_dry(engine)
    got = list(step_phases(close(engine, path).steps))
    prefill, decode = Phase.PREFILL, Phase.DECODE
    expected = [{"0": prefill, "1": prefill}] + [{"0": decode}] * 3 + [{"1": prefill}] + [{"1": decode}] * 2
    assert got == expected, f"1 is preempted in the second step: expected {expected}, got {got}. {LOOK}"


def test_a_token_too_late_is_discarded(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    engine = scripted_engine(trace=str(path), script=lambda tokens: END if len(tokens) == 6 else 50)
    engine.add_request("0", [5] * 5, params_for(9))
    engine.add_request("1", [5] * 2, params_for(2))
    run_dry(engine)
    got = [(step.step, step.finished, step.discarded) for step in close(engine, path).steps]
    expected = [(1, [], []), (2, ["0", "1"], []), (3, [], ["0"])]
    assert got == expected, f"(step, finished, discarded): expected {expected}, got {got}. {LOOK}"


@pytest.mark.parametrize("where", ["launch_error", "result_error"])
def test_a_failed_step_leaves_the_trace_readable(tmp_path: Path, where: str) -> None:
    """The requests that it ended are in the next line, as aborted."""
    path = tmp_path / "trace.jsonl"
    engine = scripted_engine(trace=str(path), max_num_seqs=1, async_scheduling=False)
    for name in "01":
        engine.add_request(name, [5] * 4, params_for(3, ignore_eos=True))
    take_step(engine)
    setattr(executor_of(engine), where, ValueError("the cat sat on it"))
    with pytest.raises(ValueError, match="the cat sat on it") as caught:
        LLMEngine.step(engine)
    engine.fail(caught.value)
    engine.add_request("2", [5] * 4, params_for(3, ignore_eos=True))
    run_dry(engine)
    steps = close(engine, path).steps
    got = [([r.id for r in step.requests], step.aborted, step.finished) for step in steps]
    expected = [(["0"], [], []), (["2"], ["0", "1"], []), (["2"], [], []), (["2"], [], ["2"])]
    assert got == expected, f"(requests, aborted, finished): expected {expected}, got {got}. {LOOK}"


def test_without_a_path_nothing_is_kept() -> None:
    """Not even the ids of aborted requests, of which a server may have millions."""
    engine = scripted_engine()
    for number in range(20):
        engine.add_request(str(number), [5] * 4, params_for(1))
        engine.abort_requests([str(number)])
        engine.add_request("stays", [5] * 4, params_for(1))
        run_dry(engine)
    assert not engine.tracer.aborted, f"no trace is written, and it keeps {engine.tracer.aborted}. {LOOK}"
    engine.tracer.close()


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FieldError) as caught:
        scripted_engine(trace=str(tmp_path / "no" / "such" / "folder"))
    assert caught.value.field == "trace" and "folder" in str(caught.value), f"got {caught.value}. {LOOK}"
