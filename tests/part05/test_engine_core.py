"""core/engine_core.py: the core's loop, with a scripted engine and sockets that are lists."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import pytest
import zmq

from common.sampling_params import SamplingParams
from part05_async_scheduling.core import engine_core
from part05_async_scheduling.core.engine import LLMEngine
from part05_async_scheduling.core.engine_core import EngineCore
from part05_async_scheduling.messages import (
    AbortRequests,
    AddRequest,
    EngineCoreDead,
    EngineCoreOutput,
    EngineCoreOutputs,
    FromCore,
    Ready,
    StartFailed,
    ToCore,
    decode_from_core,
    encode,
)
from tests.part05.scripted import check_engine, scripted_engine
from tests.scripted import answer_alone, executor_of, params_for

LOOK = 'Look at core/engine_core.py::EngineCore.run and receive; README "Two processes".'
LOOK_FAIL = 'Look at core/engine_core.py::EngineCore.step; README "When a process dies".'
LOOK_SERVE = 'Look at core/engine_core.py::_serve; README "When a process dies".'


class Idle(Exception):
    """The core waits for a message, and there are no more."""


class Requests:
    """The socket that the core reads: messages by the step before which they arrive."""

    def __init__(self, messages: dict[int, list[ToCore]], engine: LLMEngine) -> None:
        self.messages, self.engine = messages, engine
        self.queue: deque[bytes] = deque()
        self.waits = self.calls = 0

    def recv(self, flags: int = 0) -> bytes:
        self.calls += 1
        assert self.calls < 1_000, f"requests of a few tokens have not ended after {self.calls} rounds. {LOOK_FAIL}"
        for number in sorted(self.messages):
            if number <= self.engine.num_steps or (not flags and not self.queue):
                self.queue.extend(map(encode, self.messages.pop(number)))
        if self.queue:
            return self.queue.popleft()
        if flags & zmq.NOBLOCK:
            raise zmq.Again
        assert not self.engine.has_unfinished_requests, f"the core waits for a message, and has work to do. {LOOK}"
        self.waits += 1
        raise Idle


class Outputs:
    def __init__(self) -> None:
        self.messages: list[FromCore] = []

    def send(self, data: bytes) -> None:
        self.messages.append(decode_from_core(data))


def add(name: str, max_tokens: int = 3, **fields: Any) -> AddRequest:
    return AddRequest(name, [100 + int(name)] * 5, params_for(max_tokens, ignore_eos=True, **fields))


def run(messages: dict[int, list[ToCore]], **flags: Any) -> tuple[LLMEngine, list[EngineCoreOutputs]]:
    """Until the core is idle and has received all messages."""
    engine, outputs = scripted_engine(**flags), Outputs()
    core = EngineCore(engine, Requests(messages, engine), outputs)  # type: ignore[arg-type]
    with pytest.raises(Idle):
        core.run()
    check_engine(engine, "the core is idle")
    assert not engine.has_unfinished_requests
    return engine, outputs.messages  # type: ignore[return-value]


def tokens_of(messages: list[EngineCoreOutputs], name: str) -> list[int]:
    outputs = [output for message in messages for output in message.outputs if output.request_id == name]
    return [token_id for output in outputs for token_id in output.token_ids]


def errors_of(messages: list[EngineCoreOutputs]) -> dict[str, str]:
    outputs = [output for message in messages for output in message.outputs]
    return {output.request_id: output.error for output in outputs if output.error is not None}


def test_requests_go_in_and_tokens_come_out() -> None:
    engine, messages = run({0: [add("1"), add("2", 5)], 2: [add("3")], 40: [add("4")]})
    for name, count in (("1", 3), ("2", 5), ("3", 3), ("4", 3)):
        expected = answer_alone([100 + int(name)] * 5, count, ignore_eos=True)
        assert tokens_of(messages, name) == expected, f"request {name}: expected {expected}, got {messages}. {LOOK}"
    log = executor_of(engine).log
    assert log[:3] == ["launch 1", "launch 2", "result 1"], f"one step ahead, got {log}. {LOOK}"


def test_messages_are_received_before_the_next_step() -> None:
    """Two requests arrive together; a third, and an abort, while the first two are computed."""
    engine, _ = run({0: [add("1", 6), add("2", 6)], 2: [add("3", 2), AbortRequests(["2"])]})
    steps = [[work.request_id for work in step.work] for step in executor_of(engine).launched]
    assert steps[:3] == [["1", "2"], ["1", "2"], ["1", "3"]], (
        f"after two steps 3 arrives and 2 is aborted: expected the third step to have 1 and 3, got {steps}. {LOOK}"
    )


def test_each_step_sends_its_outputs_at_once_and_no_empty_messages() -> None:
    _, messages = run({0: [add("1", 4)]})
    counts = [len(message.outputs) for message in messages]
    assert counts == [1, 1, 1, 1], f"four tokens, a message for each: got {counts}. {LOOK}"


def test_gauges_are_sent_when_the_engine_becomes_idle() -> None:
    """Also after an abort, which has no outputs."""
    idle = {"num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage_perc": 0, "num_preemptions": 0}
    _, messages = run({0: [add("1", 9)], 3: [AbortRequests(["1"])]})
    assert messages[-1].stats == idle, f"idle: expected {idle}, got {messages[-1]}. {LOOK}"
    _, messages = run({0: [AbortRequests(["unknown"])]})
    assert [message.stats for message in messages] == [idle], f"got {messages}. {LOOK}"


def test_gauges() -> None:
    _, messages = run({0: [add(str(number), 3) for number in range(5)]}, max_num_seqs=2, num_kv_blocks=1 + 10)
    expected = {"num_requests_running": 2, "num_requests_waiting": 3, "kv_cache_usage_perc": 0.2, "num_preemptions": 0}
    assert messages[0].stats == expected, (
        f"two of five run, a block of ten each: expected {expected}, got {messages[0].stats}. "
        "Look at core/engine_core.py::EngineCore.stats."
    )


def test_a_request_that_is_refused_gets_an_error() -> None:
    _, messages = run({0: [add("1"), AddRequest("2", [], SamplingParams()), add("3")]})
    errors = errors_of(messages)
    assert list(errors) == ["2"] and "prompt: " in errors["2"], f"2 has no prompt: got {errors}. {LOOK}"
    assert len(tokens_of(messages, "1")) == len(tokens_of(messages, "3")) == 3, f"the others go on: {messages}. {LOOK}"


@pytest.mark.parametrize("where", ["launch_error", "result_error"])
def test_a_failed_step(where: str) -> None:
    """All requests in the engine get the cause, once. A later request is served."""
    engine = scripted_engine(max_num_seqs=2)
    outputs, messages = Outputs(), {0: [add(str(number), 4) for number in range(4)], 40: [add("5")]}
    setattr(executor_of(engine), where, ZeroDivisionError("the cat sat on it"))
    core = EngineCore(engine, Requests(messages, engine), outputs)  # type: ignore[arg-type]
    with pytest.raises(Idle):
        core.run()
    errors = [(o.request_id, o.error) for message in outputs.messages for o in message.outputs if o.error]  # type: ignore[union-attr]
    expected = [(name, "ZeroDivisionError: the cat sat on it") for name in "0123"]
    assert sorted(errors) == expected, f"{where}: expected errors {expected}, got {errors}. {LOOK_FAIL}"
    got = tokens_of(outputs.messages, "5")  # type: ignore[arg-type]
    assert got == answer_alone([105] * 5, 3, ignore_eos=True), f"{where}: the next request got {got}. {LOOK_FAIL}"
    assert engine.blocks.num_used_blocks == 0, f"{where}: blocks are held. {LOOK_FAIL}"


def test_two_failed_steps_in_a_row_end_the_core() -> None:
    """Its last message says why, and the error ends the process. What remains is in no state to go on."""
    engine, outputs = scripted_engine(), Outputs()
    engine.scheduler.schedule = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    messages: dict[int, list[ToCore]] = {0: [add("1"), add("2")], 40: [add("3")]}
    with pytest.raises(ZeroDivisionError):
        EngineCore(engine, Requests(messages, engine), outputs).run()  # type: ignore[arg-type]
    first, last = outputs.messages
    cause = "ZeroDivisionError: division by zero"
    assert isinstance(first, EngineCoreOutputs) and errors_of([first]) == {"1": cause, "2": cause}, (
        f"the first failed step: expected errors for 1 and 2, got {first}. {LOOK_FAIL}"
    )
    expected = EngineCoreDead(f"two steps in a row failed, the second with {cause}")
    assert last == expected, f"the second failed step: expected {expected}, got {last}. {LOOK_FAIL}"


def test_a_good_step_between_two_failures() -> None:
    """The core goes on."""
    engine, outputs = scripted_engine(async_scheduling=False), Outputs()
    failing, launch = {1, 4}, executor_of(engine).launch

    def launch_or_fail(step: Any) -> Any:
        if engine.num_steps in failing:
            raise ZeroDivisionError("the cat sat on it")
        return launch(step)

    engine.executor.launch = launch_or_fail  # type: ignore[method-assign]
    messages: dict[int, list[ToCore]] = {0: [add("1")], 1: [add("2", 2)], 3: [add("3")], 4: [add("4", 2)]}
    with pytest.raises(Idle):
        EngineCore(engine, Requests(messages, engine), outputs).run()  # type: ignore[arg-type]
    errors = errors_of(outputs.messages)  # type: ignore[arg-type]
    assert list(errors) == ["1", "3"], f"steps 1 and 4 fail: expected errors for 1 and 3, got {errors}. {LOOK_FAIL}"
    got = tokens_of(outputs.messages, "4")  # type: ignore[arg-type]
    assert got == answer_alone([104] * 5, 2, ignore_eos=True), f"the last request got {got}. {LOOK_FAIL}"


@pytest.mark.parametrize("error", [OSError("no such file"), None])
def test_a_core_that_cannot_start_sends_the_error(error: OSError | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process raises the same error."""
    outputs = Outputs()

    def fail(config: Any) -> LLMEngine:
        if error is None:
            return scripted_engine(100, max_num_batched_tokens=10)
        raise error

    monkeypatch.setattr(engine_core, "LLMEngine", fail)
    engine_core._serve(None, None, outputs)  # type: ignore[arg-type]
    [message] = outputs.messages
    assert isinstance(message, StartFailed), f"got {message}. {LOOK_SERVE}"
    expected = (None, "no such file") if error else ("max_num_batched_tokens", "max_num_batched_tokens: expected")
    assert message.field == expected[0] and message.message.startswith(expected[1]), f"got {message}. {LOOK_SERVE}"


def test_a_half_built_engine_is_gone_before_its_failure_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The API process answers with SIGTERM: during a destructor, the exit would be printed to stderr as an error."""

    class Half:
        pass

    alive: list[bool] = []

    def fail(config: Any) -> LLMEngine:
        half = Half()
        weakref.finalize(half, alive.clear)
        alive.append(True)
        raise OSError("no such file")

    def send(data: bytes) -> None:
        assert not alive, f"the failure is sent while the half-built engine still exists. {LOOK_SERVE}"

    outputs = Outputs()
    monkeypatch.setattr(outputs, "send", send)
    monkeypatch.setattr(engine_core, "LLMEngine", fail)
    engine_core._serve(None, None, outputs)  # type: ignore[arg-type]


def test_a_core_sends_ready_and_closes_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, outputs, closed = scripted_engine(num_kv_blocks=1 + 7, block_size=4), Outputs(), []
    monkeypatch.setattr(engine_core, "LLMEngine", lambda _: engine)
    monkeypatch.setattr(engine.tracer, "close", lambda: closed.append(1))
    with pytest.raises(Idle):
        engine_core._serve(None, Requests({}, engine), outputs)  # type: ignore[arg-type]
    [message] = outputs.messages
    stats = {"num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage_perc": 0, "num_preemptions": 0}
    expected = Ready(engine.limits, 8, stats)
    assert message == expected, f"expected {expected}, got {message}. {LOOK_SERVE}"
    assert closed, f"the trace is not complete when the core ends. {LOOK_SERVE}"


def test_outputs_name_their_fields() -> None:
    assert EngineCoreOutput("1", [2]) == EngineCoreOutput("1", [2], None, None, None, None)
