"""AsyncLLM: streams, abort, failure and shutdown, with a worker that takes a step only when it is told to."""

from __future__ import annotations

import asyncio
import functools
import random
import threading
import zlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from common.errors import FieldError
from common.outputs import CompletionOutput, join_outputs
from common.sampling_params import SamplingParams
from common.serving import GenerationError, QueueFullError
from part04_continuous_batching.api.async_engine import AsyncLLM, RequestStream
from part04_continuous_batching.config import EngineConfig
from part04_continuous_batching.core.engine import LLMEngine
from part04_continuous_batching.messages import StepInput, StepOutput
from tests.async_checks import DEADLINE_S, read_error, shut_down_at_the_end, until, within_deadline
from tests.part04.scripted import ScriptedWorker

LOOK_QUEUE = 'Look at api/async_engine.py::AsyncLLM.generate; README "Between two threads".'
LOOK_ABORT = 'Look at api/async_engine.py::AsyncLLM.abort and _take_inbox; README "Between two threads".'
LOOK_STREAM = 'Look at api/async_engine.py::RequestStream; README "Between two threads".'
LOOK_RUN = 'Look at api/async_engine.py::AsyncLLM._run and _deliver; README "Between two threads".'
LOOK_FAIL = (
    "Look at api/async_engine.py::AsyncLLM._step and _deliver, and core/engine.py::LLMEngine.fail; "
    'README "Between two threads".'
)
LOOK_SHUTDOWN = 'Look at api/async_engine.py::AsyncLLM.shutdown; README "Between two threads".'
NUM_TOKENS = 6  # of an answer, and of a prompt
MakeConfig = Callable[..., EngineConfig]


def next_token(token_ids: Sequence[int]) -> int:
    """The scripted model: an ordinary word that depends on all tokens so far."""
    return 1_000 + zlib.crc32(str(list(token_ids)).encode()) % 1_000


class Gate:
    """In the worker's place: each step waits for a permit, and the tokens follow the script."""

    def __init__(self, engine: AsyncLLM) -> None:
        self.scheduler, self.tokenizer = engine.engine.scheduler, engine.tokenizer
        self.worker = ScriptedWorker(engine.block_size, next_token)
        self.permits = threading.Semaphore(0)
        self.is_open = False
        self.begun: list[list[str]] = []  # the requests of each step
        self.threads: set[str] = set()
        self.errors: list[Exception] = []  # raised by the next steps
        engine.engine.executor.execute = self.execute  # type: ignore[method-assign]

    def execute(self, step: StepInput) -> StepOutput:
        self.threads.add(threading.current_thread().name)
        by_row = {request.row: request.request_id for request in self.scheduler.running}
        self.begun.append([by_row[request.row] for request in step.requests])
        if not self.is_open and not self.permits.acquire(timeout=DEADLINE_S):
            raise TimeoutError("no permit for this step; did this run on the event loop's thread?")
        if self.errors:
            raise self.errors.pop(0)
        return self.worker.execute(step)

    def allow(self, num_steps: int) -> None:
        self.permits.release(num_steps)

    def open(self) -> None:
        """From now on no step waits."""
        self.is_open = True
        self.permits.release()

    def answer(self, name: int, num_tokens: int = NUM_TOKENS) -> tuple[str, list[int]]:
        """Text and tokens that request `name` gets."""
        prompt, output = prompt_of(name), list[int]()
        while len(output) < num_tokens:
            output.append(next_token(prompt + output))
        return self.tokenizer.decode(output, skip_special_tokens=True), output


def prompt_of(name: int) -> list[int]:
    return [100 + name] * NUM_TOKENS


def on_an_event_loop(**flags: Any) -> Callable:
    """The decorated coroutine is a test; it gets a Gate and a running AsyncLLM behind it, which always end."""

    def decorate(test: Callable[[Gate, AsyncLLM], Awaitable[None]]) -> Callable[[MakeConfig], None]:
        @functools.wraps(test)
        def run(make_config: MakeConfig) -> None:
            engine = AsyncLLM(make_config(**flags))
            gate = Gate(engine)

            async def start_and_test() -> None:
                engine.start()
                await test(gate, engine)

            with shut_down_at_the_end(engine, gate.open, LOOK_SHUTDOWN):
                asyncio.run(asyncio.wait_for(start_and_test(), 3 * DEADLINE_S))

        del run.__wrapped__  # pytest would take the coroutine's arguments for fixtures
        return run

    return decorate


def generate(engine: AsyncLLM, name: int, max_tokens: int = NUM_TOKENS, **fields: Any) -> RequestStream:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **fields)
    return engine.generate(prompt_of(name), params)


async def read_pieces(stream: RequestStream, what: str) -> list[CompletionOutput]:
    """All outputs of a request that ends by itself."""

    async def read() -> list[CompletionOutput]:
        return [output async for output in stream]

    return await within_deadline(read(), f"{what} to end. {LOOK_RUN}")


async def read(stream: RequestStream, what: str) -> tuple[str, list[int]]:
    joined = join_outputs(await read_pieces(stream, what))
    return joined.text, joined.token_ids


async def tokens_and_error(stream: RequestStream, what: str) -> tuple[list[int], str]:
    """The tokens and the error of a request that fails."""
    outputs, error = await read_error(stream, GenerationError, what, LOOK_FAIL)
    return [token_id for output in outputs for token_id in output.token_ids], error


async def until_idle(engine: AsyncLLM) -> None:
    """No request runs or waits, no block is held, and no stream is open that would never end."""
    inner = engine.engine
    await until(lambda: not inner.has_unfinished_requests, f"the engine to become idle. {LOOK_ABORT}")
    await until(lambda: not engine._streams, f"no open streams, got {list(engine._streams)}. {LOOK_RUN}")
    free, total = inner.blocks.num_free_blocks, inner.blocks.num_blocks - 1
    assert free == total, f"idle, and {free} of {total} blocks are free. {LOOK_ABORT}"


def running(engine: AsyncLLM) -> list[str]:
    return [request.request_id for request in engine.engine.scheduler.running]


# Streams


@on_an_event_loop()
async def test_each_output_comes_before_the_next_is_computed(gate: Gate, engine: AsyncLLM) -> None:
    (text, token_ids), got = gate.answer(7), ""
    outputs = generate(engine, 7).__aiter__()
    for number in range(NUM_TOKENS):
        gate.allow(1)
        output = await within_deadline(outputs.__anext__(), f"output {number} once its step is done. {LOOK_RUN}")
        got += output.text
        assert output.token_ids == [token_ids[number]], f"output {number}: {output}, script {token_ids}. {LOOK_RUN}"
    assert got == text, f"expected the text {text!r}, got {got!r}. {LOOK_RUN}"
    with pytest.raises(StopAsyncIteration):
        await within_deadline(outputs.__anext__(), "the stream to end after the output with a finish_reason")


@on_an_event_loop(max_num_seqs=3)
async def test_each_reader_gets_its_own_answer(gate: Gate, engine: AsyncLLM) -> None:
    names = [5, 3, 9, 1, 4]
    streams = [generate(engine, name, max_tokens=2 + name) for name in names]
    gate.open()
    got = await asyncio.gather(*(read(stream, "every request") for stream in streams))
    expected = [gate.answer(name, 2 + name) for name in names]
    assert got == expected, f"requests {names}: expected {expected}, got {got}. {LOOK_RUN}"
    await until_idle(engine)
    assert gate.threads == {"engine"}, f"the model ran in the threads {gate.threads}. {LOOK_RUN}"


@on_an_event_loop(max_num_seqs=4)
async def test_a_request_that_arrives_during_a_step_joins_the_next(gate: Gate, engine: AsyncLLM) -> None:
    first = generate(engine, 1)
    await until(lambda: gate.begun, f"the first step to begin. {LOOK_RUN}")
    second = generate(engine, 2)
    gate.allow(1)
    await until(lambda: len(gate.begun) == 2, f"the second step to begin. {LOOK_RUN}")
    expected = [[first.request_id], [first.request_id, second.request_id]]
    assert gate.begun == expected, f"the requests of each step: expected {expected}, got {gate.begun}. {LOOK_QUEUE}"
    gate.open()
    assert await read(second, "the second request") == gate.answer(2)


@on_an_event_loop()
async def test_an_idle_engine_takes_no_steps(gate: Gate, engine: AsyncLLM) -> None:
    gate.open()
    for name in range(3):
        await read(generate(engine, name), "every request")
    await until_idle(engine)
    engine.abort(generate(engine, 4))
    await until_idle(engine)
    await asyncio.sleep(0.02)
    assert [] not in gate.begun, f"a step without a request: {gate.begun}. {LOOK_RUN}"
    assert len(gate.begun) <= 3 * NUM_TOKENS + 1, f"an idle engine has taken steps: {gate.begun}. {LOOK_RUN}"


@on_an_event_loop()
async def test_a_slow_reader_finds_one_output(gate: Gate, engine: AsyncLLM) -> None:
    """What arrived since it last looked, joined: tokens, text, logprobs, and how it ended."""
    text, token_ids = gate.answer(3, 12)
    stream = generate(engine, 3, max_tokens=12, logprobs=1)
    gate.allow(2)
    outputs = stream.__aiter__()
    pieces = [await within_deadline(outputs.__anext__(), f"the first output. {LOOK_STREAM}")]
    gate.allow(10)
    await until(lambda: not engine._streams, f"the request to end. {LOOK_RUN}")
    await asyncio.sleep(0)  # what the engine's thread has handed over arrives
    await until(lambda: stream._output is not None and stream._output.finish_reason, "the last output to arrive")
    pieces += await within_deadline(drain(outputs), f"the stream to end. {LOOK_STREAM}")
    assert len(pieces) == 2, (
        f"the reader looked after at most 2 of 12 steps, and after the end: expected 2 outputs, got {len(pieces)}: "
        f"{pieces}. {LOOK_STREAM}"
    )
    joined = join_outputs(pieces)
    assert (joined.text, joined.token_ids) == (text, token_ids), (
        f"expected {(text, token_ids)}, got {(joined.text, joined.token_ids)}. {LOOK_STREAM}"
    )
    sampled = [next(iter(entry)) for entry in joined.logprobs or []]
    assert sampled == token_ids, f"one logprobs entry a token: expected {token_ids}, got {sampled}. {LOOK_STREAM}"
    reasons = [piece.finish_reason for piece in pieces]
    assert reasons == [None, "length"], f"expected [None, 'length'], got {reasons}. {LOOK_STREAM}"


async def drain(outputs: Any) -> list[CompletionOutput]:
    return [output async for output in outputs]


@on_an_event_loop(block_size=4, num_kv_blocks=1 + 9)
async def test_a_preempted_request_streams_no_token_twice(gate: Gate, engine: AsyncLLM) -> None:
    names = range(4)
    streams = [generate(engine, name, max_tokens=24) for name in names]
    gate.open()
    got = await asyncio.gather(*(read(stream, "every request") for stream in streams))
    assert engine.engine.scheduler.num_preemptions > 1, "this test needs preemptions"
    for name, answer in zip(names, got, strict=True):
        expected = gate.answer(name, 24)
        assert answer == expected, f"request {name}: expected {expected}, got {answer}. {LOOK_STREAM}"
    await until_idle(engine)


# The queue


@pytest.mark.parametrize("max_queued_requests", [0, 2])
def test_the_queue_is_bounded(make_config: MakeConfig, max_queued_requests: int) -> None:
    @on_an_event_loop(max_queued_requests=max_queued_requests, max_num_seqs=2)
    async def check(gate: Gate, engine: AsyncLLM) -> None:
        limit = f"max_num_seqs=2, max_queued_requests={max_queued_requests}"
        streams = [generate(engine, name) for name in range(2 + max_queued_requests)]
        with pytest.raises(QueueFullError) as at_once:
            generate(engine, 50)
        await until(lambda: gate.begun, f"a step. {LOOK_RUN}")
        with pytest.raises(QueueFullError) as while_running:
            generate(engine, 51)
        for caught in (at_once, while_running):
            assert "max_queued_requests" in str(caught.value), f"{limit}: the error names the limit: {caught.value}."
        engine.abort(streams.pop())
        try:
            streams.append(generate(engine, 60))
        except QueueFullError:
            pytest.fail(f"{limit}: a request was aborted, and still counts. {LOOK_ABORT}")
        with pytest.raises(QueueFullError):
            generate(engine, 52)
        gate.open()
        names = [stream.prompt_token_ids[0] - 100 for stream in streams]
        got = await asyncio.gather(*(read(stream, "every accepted request") for stream in streams))
        assert got == [gate.answer(name) for name in names], f"{limit}: got {got}. {LOOK_QUEUE}"
        await until_idle(engine)
        assert await read(generate(engine, 70), "a request when there is room again") == gate.answer(70)

    check(make_config)


@on_an_event_loop(max_num_seqs=1, max_queued_requests=0)
async def test_a_reader_with_the_whole_answer_may_ask_again_at_once(gate: Gate, engine: AsyncLLM) -> None:
    """The request has ended when its reader gets the last output, not some time later."""
    gate.open()
    for name in range(4):
        try:
            stream = generate(engine, name)
        except QueueFullError:
            pytest.fail(f"request {name - 1} has given its last output and still counts as unfinished. {LOOK_RUN}")
        assert await read(stream, "every request") == gate.answer(name)


@on_an_event_loop(num_kv_blocks=1 + 2)
async def test_what_can_never_be_served_is_refused_at_once(gate: Gate, engine: AsyncLLM) -> None:
    for max_tokens, fields in ((100, {}), (3, {"stop_token_ids": [9_999]})):
        with pytest.raises(FieldError):
            generate(engine, 1, max_tokens=max_tokens, **fields)
    assert not engine._streams and not engine._inbox, f"a refused request is queued. {LOOK_QUEUE}"
    gate.open()
    assert await read(generate(engine, 2), "the next request") == gate.answer(2)


# Abort


@pytest.mark.parametrize("state", ["in the inbox", "waiting", "running", "preempted", "ended"])
def test_abort_wherever_it_is(make_config: MakeConfig, state: str) -> None:
    """It is request 1. Four blocks of 4 let two prompts of 6 in; when both have nine tokens, it is preempted."""
    flags: dict[str, Any] = {"block_size": 4, "num_kv_blocks": 1 + (4 if state == "preempted" else 100)}
    if state == "waiting":
        flags["max_num_seqs"] = 1

    @on_an_event_loop(**flags)
    async def check(gate: Gate, engine: AsyncLLM) -> None:
        first = generate(engine, 0, max_tokens=10)
        if state == "in the inbox":
            await until(lambda: gate.begun, f"the first step to begin. {LOOK_RUN}")
        stream = generate(engine, 1, max_tokens=2 if state == "ended" else 10)
        last = generate(engine, 2, max_tokens=10)
        name = stream.request_id
        if state in ("waiting", "running"):
            gate.allow(2)
            await until(lambda: len(gate.begun) == 3, f"the third step to begin. {LOOK_RUN}")
        elif state == "preempted":
            gate.allow(4)
            await until(lambda: len(gate.begun) == 5, f"the fifth step to begin. {LOOK_RUN}")
            assert name in gate.begun[0] and name not in gate.begun[-1], f"1 must have been preempted: {gate.begun}"
        elif state == "ended":
            gate.allow(2)
            assert await read(stream, "the request") == gate.answer(1, 2)
        assert (name in running(engine)) is (state == "running"), f"{state}: {running(engine)} run"
        engine.abort(stream)
        engine.abort(stream)
        num_begun = len(gate.begun)
        gate.open()
        for number, other in ((0, first), (2, last)):
            got, expected = await read(other, f"request {number}, which was not aborted"), gate.answer(number, 10)
            assert got == expected, f"1 was aborted, {state}: request {number} expects {expected}, got {got}."
        await until_idle(engine)
        later = [step for step in gate.begun[num_begun:] if name in step]
        assert not later, (
            f"aborted, {state}: it leaves before the next step, and was in {len(later)} more. {LOOK_ABORT}"
        )
        again = generate(engine, 3)
        engine.abort(stream)
        assert await read(again, "a later request") == gate.answer(3), f"an old abort hit a new request. {LOOK_ABORT}"

    check(make_config)


@on_an_event_loop(block_size=4, num_kv_blocks=1 + 16, max_num_seqs=5, max_queued_requests=100)
async def test_many_requests_and_aborts(gate: Gate, engine: AsyncLLM) -> None:
    """Whenever an abort arrives: what was read is right, and nothing remains."""
    rng, gate.is_open = random.Random(0), True

    async def use(name: int) -> None:
        await asyncio.sleep(rng.random() / 20)
        num_tokens, give_up_after = rng.randint(1, 16), rng.choice([0, 1, 5, 99, 99])
        stream, got = generate(engine, name, max_tokens=num_tokens), list[int]()
        if give_up_after:
            async for output in stream:
                got += output.token_ids
                if len(got) >= give_up_after:
                    break
        engine.abort(stream)
        _, expected = gate.answer(name, num_tokens)
        assert got == expected[: len(got)], f"request {name}: expected {expected}, got {got}. {LOOK_RUN}"
        assert give_up_after < 99 or got == expected, f"request {name} was not aborted: {expected}, got {got}."

    await asyncio.gather(*map(use, range(100)))
    await until_idle(engine)
    assert await read(generate(engine, 200), "a request afterwards") == gate.answer(200)


# Failure


FAIL_AT = ["executor.execute", "scheduler.schedule", "_append"]


@pytest.mark.parametrize("where", FAIL_AT)
def test_a_failed_step_fails_all_requests_in_the_engine(make_config: MakeConfig, where: str) -> None:
    """Running and waiting ones, and one that would have ended in this very step. One in the inbox is not in yet."""

    @on_an_event_loop(max_num_seqs=2)
    async def check(gate: Gate, engine: AsyncLLM) -> None:
        streams = [generate(engine, name, max_tokens=3 if name == 0 else 9) for name in range(4)]
        gate.allow(2)
        await until(lambda: len(gate.begun) == 3, f"the third step to begin. {LOOK_RUN}")
        if where == "executor.execute":  # which has begun
            gate.errors.append(ZeroDivisionError("the cat sat on it"))
        else:
            fail_in(engine.engine, where, call=2 if where == "_append" else 1)
        late = generate(engine, 4)
        is_next_step = where == "scheduler.schedule"  # the fourth: by then request 4 is in the engine, 0 has ended
        gate.open()
        for name in range(4):
            if is_next_step and name == 0:
                assert await read(streams[0], "request 0") == gate.answer(0, 3)
                continue
            token_ids, message = await tokens_and_error(streams[name], f"request {name}, which was in the engine")
            num_tokens = 0 if name > 1 else 3 if is_next_step else 2
            expected = gate.answer(name, 9)[1][:num_tokens]
            assert token_ids == expected, f"{where}, request {name}: before, {expected}; got {token_ids}. {LOOK_FAIL}"
            assert message == "ZeroDivisionError: the cat sat on it", (
                f"expected the cause, got {message!r}. {LOOK_FAIL}"
            )
        if is_next_step:
            await tokens_and_error(late, "request 4, which was in the engine")
        else:
            assert await read(late, "the request in the inbox") == gate.answer(4), f"{where}. {LOOK_FAIL}"
        await until_idle(engine)
        assert await read(generate(engine, 5), "the next request") == gate.answer(5), f"{where}. {LOOK_FAIL}"
        assert engine.is_alive, f"one failed step ended the engine's thread. {LOOK_FAIL}"

    check(make_config)


def fail_in(engine: LLMEngine, where: str, call: int) -> None:
    """The next call (or the one after, for call=2) of this method fails, and none after it."""
    owner, _, name = where.rpartition(".")
    target = getattr(engine, owner) if owner else engine
    real, calls = getattr(target, name), iter(range(1, 1_000_000))

    def fail(*args: Any) -> Any:
        if next(calls) == call:
            raise ZeroDivisionError("the cat sat on it")
        return real(*args)

    setattr(target, name, fail)


@on_an_event_loop(block_size=4, num_kv_blocks=1 + 4)
async def test_a_failed_step_fails_a_preempted_request_too(gate: Gate, engine: AsyncLLM) -> None:
    first, second = generate(engine, 0, max_tokens=10), generate(engine, 1, max_tokens=10)
    gate.allow(4)
    await until(lambda: len(gate.begun) == 5, f"the fifth step to begin. {LOOK_RUN}")
    assert gate.begun[-1] == [first.request_id], f"request 1 must have been preempted: {gate.begun}"
    gate.errors.append(ValueError("the dog ate it"))
    gate.open()
    for name, stream, num_tokens in ((0, first, 4), (1, second, 3)):
        token_ids, message = await tokens_and_error(stream, f"request {name}, which was in the engine")
        assert "the dog ate it" in message, f"request {name}: got {message!r}. {LOOK_FAIL}"
        expected = gate.answer(name, num_tokens)[1]
        assert token_ids == expected, f"request {name}: expected {expected} before, got {token_ids}. {LOOK_FAIL}"
    await until_idle(engine)
    assert await read(generate(engine, 2, max_tokens=10), "the next request") == gate.answer(2, 10)


@on_an_event_loop(max_num_seqs=1)
async def test_two_failed_steps_in_a_row_end_the_engine(gate: Gate, engine: AsyncLLM) -> None:
    """All streams get the cause, also those that arrive in between, and so does every request afterwards."""
    streams = [generate(engine, name) for name in range(3)]
    await until(lambda: gate.begun, f"the first step to begin. {LOOK_RUN}")
    gate.errors += [ZeroDivisionError("the cat sat on it"), ValueError("the dog ate it")]
    late = [generate(engine, name) for name in (3, 4)]
    gate.open()
    for name, stream in enumerate(streams):
        token_ids, message = await tokens_and_error(stream, f"request {name}, which was in the engine")
        assert (token_ids, message) == ([], "ZeroDivisionError: the cat sat on it"), f"got {message!r}. {LOOK_FAIL}"
    for stream in late:
        _, message = await tokens_and_error(stream, "a request of the second step")
        assert "the dog ate it" in message, f"expected the second step's cause, got {message!r}. {LOOK_FAIL}"
    await until(lambda: not engine._thread.is_alive(), f"the engine's thread to end. {LOOK_FAIL}")
    expected = "two steps in a row failed, the second with ValueError: the dog ate it"
    assert engine.cause_of_death == expected and not engine.is_alive, f"got {engine.cause_of_death!r}. {LOOK_FAIL}"
    with pytest.raises(GenerationError, match="the dog ate it"):
        generate(engine, 5)
    assert len(gate.begun) == 2, f"a dead engine takes no steps: {gate.begun}. {LOOK_FAIL}"


@on_an_event_loop(max_num_seqs=1)
async def test_a_good_step_between_two_failed_ones_keeps_the_engine_alive(gate: Gate, engine: AsyncLLM) -> None:
    gate.is_open = True
    for name in range(3):
        gate.errors.append(ValueError("the dog ate it"))
        await tokens_and_error(generate(engine, name), f"request {name}, whose first step fails")
        assert await read(generate(engine, name), "the next request") == gate.answer(name), f"{LOOK_FAIL}"
    assert engine.is_alive, f"three failed steps, none after another: {engine.cause_of_death}. {LOOK_FAIL}"


@on_an_event_loop()
async def test_a_reader_whose_event_loop_is_closed(gate: Gate, engine: AsyncLLM) -> None:
    """Its outputs are dropped; the engine's thread goes on."""

    async def ask() -> None:
        generate(engine, 1)

    def ask_on_a_loop_of_its_own() -> None:
        asyncio.run(ask())

    await asyncio.to_thread(ask_on_a_loop_of_its_own)
    gate.open()
    assert await read(generate(engine, 2), "the next request, on a loop that is open") == gate.answer(2)
    await until_idle(engine)
    assert engine.is_alive, f"a closed event loop ended the engine's thread. {LOOK_RUN}"


# Gauges and shutdown


@on_an_event_loop(max_num_seqs=2, num_kv_blocks=1 + 10)
async def test_stats(gate: Gate, engine: AsyncLLM) -> None:
    idle = {"num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage_perc": 0, "num_preemptions": 0}
    assert engine.stats() == idle, f"idle: got {engine.stats()}. Look at api/async_engine.py::AsyncLLM.stats."
    for name in range(5):
        generate(engine, name)
    await until(lambda: gate.begun, f"a step. {LOOK_RUN}")
    expected = {**idle, "num_requests_running": 2, "num_requests_waiting": 3, "kv_cache_usage_perc": 0.2}
    assert engine.stats() == expected, (
        f"two of five run, a block of ten each: expected {expected}, got {engine.stats()}. "
        "Look at api/async_engine.py::AsyncLLM.stats."
    )


@on_an_event_loop(max_num_seqs=2)
async def test_shutdown_ends_running_and_waiting_requests(gate: Gate, engine: AsyncLLM) -> None:
    streams = [generate(engine, name, max_tokens=1_000) for name in range(4)]
    gate.allow(1)
    await until(lambda: len(gate.begun) == 2, f"the second step to begin. {LOOK_RUN}")
    streams.append(generate(engine, 4))  # in the inbox
    readers = [asyncio.ensure_future(tokens_and_error(stream, "every request at shutdown")) for stream in streams]
    end = asyncio.ensure_future(asyncio.to_thread(engine.shutdown))
    await until(lambda: engine._stopping, f"shutdown to begin. {LOOK_SHUTDOWN}")
    gate.open()  # the model finishes the step that it is at
    await within_deadline(end, f"shutdown to return. {LOOK_SHUTDOWN}")
    for name, (token_ids, message) in enumerate(await asyncio.gather(*readers)):
        assert "shutting down" in message, f"request {name}: expected the reason, got {message!r}. {LOOK_SHUTDOWN}"
        expected = gate.answer(name, 2)[1] if name < 2 else []
        assert token_ids == expected, f"request {name}: expected {expected} before, got {token_ids}. {LOOK_SHUTDOWN}"
    assert not engine.is_alive, f"the engine's thread is still alive. {LOOK_SHUTDOWN}"
    assert len(gate.begun) == 2, f"shutdown takes no more steps: {len(gate.begun) - 2} more. {LOOK_SHUTDOWN}"
    blocks = engine.engine.blocks
    assert blocks.num_used_blocks == 0 and not engine.engine.has_unfinished_requests, (
        f"requests or blocks remain after shutdown. {LOOK_SHUTDOWN}"
    )


@on_an_event_loop()
async def test_shutdown_when_idle(gate: Gate, engine: AsyncLLM) -> None:
    assert engine.is_alive, f"a started engine's thread runs. {LOOK_RUN}"
    await within_deadline(asyncio.to_thread(engine.shutdown), f"shutdown to return. {LOOK_SHUTDOWN}")
    assert not engine.is_alive, f"the engine's thread is still alive. {LOOK_SHUTDOWN}"
