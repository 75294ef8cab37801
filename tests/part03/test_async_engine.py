"""AsyncLLM: order, queue, abort, failure and shutdown, over a worker that computes a step only when it is told to."""

from __future__ import annotations

import asyncio
import functools
import random
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from common.errors import FieldError
from common.limits import EngineLimits
from common.sampling_params import SamplingParams
from common.serving import GenerationError, QueueFullError
from part03_paged_attention.api import async_engine
from part03_paged_attention.api.async_engine import AsyncLLM, RequestStream
from part03_paged_attention.config import EngineConfig
from part03_paged_attention.core import engine as engine_module
from part03_paged_attention.core.engine import LLMEngine
from part03_paged_attention.llm import LLM
from part03_paged_attention.messages import StepInput, StepOutput
from tests.async_checks import DEADLINE_S, read_error, shut_down_at_the_end, until, within_deadline

LOOK_QUEUE = 'Look at api/async_engine.py::AsyncLLM.generate; README of part 2, "Off the event loop".'
LOOK_ABORT = (
    'Look at api/async_engine.py::AsyncLLM.abort and _take_inbox; README of part 2, "When the client goes away".'
)
LOOK_RUN = 'Look at api/async_engine.py::AsyncLLM._run; README of part 2, "Off the event loop".'
LOOK_FAIL = "Look at api/async_engine.py::AsyncLLM._step and core/engine.py::LLMEngine.fail."
LOOK_SHUTDOWN = 'Look at api/async_engine.py::AsyncLLM.shutdown and _run; README of part 2, "Off the event loop".'
LOOK_STATS = "Look at api/async_engine.py::AsyncLLM.stats."
NUM_TOKENS = 4  # of an answer
MAX_NUM_SEQS = 2
NUM_BLOCKS = 101  # of 16 tokens
CHECKPOINT = SimpleNamespace(
    eos_token_ids=frozenset(), max_model_len=1_000, config=SimpleNamespace(vocab_size=1_000), directory=None
)


class Words:
    """A tokenizer for the tokens of GatedExecutor: token 3 of request 7 is "7.3 "."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(f"{token_id >> 20}.{token_id & 0xFFFFF} " for token_id in token_ids)


class GatedExecutor:
    """In the worker's place. A request's name is its prompt, one token. A step waits for a permit."""

    num_blocks = NUM_BLOCKS

    def __init__(self, config: EngineConfig) -> None:
        self.permits = threading.Semaphore(0)
        self.is_open = False
        self.names: dict[int, int] = {}  # of the requests in the rows
        self.fails_at: dict[int, int] = {}  # name → how many tokens it gets before its steps fail
        self.started: list[int] = []
        self.threads: set[threading.Thread] = set()
        self.num_begun = self.num_ended = 0

    def execute(self, step: StepInput) -> StepOutput:
        self.threads.add(threading.current_thread())
        self.num_begun += 1
        if not self.is_open and not self.permits.acquire(timeout=DEADLINE_S):
            raise TimeoutError("no permit for this step; did it run on the event loop's thread?")
        self.num_ended += 1
        for new in step.new_requests:
            self.names[new.row] = new.token_ids[0]
            self.started.append(new.token_ids[0])
        token_ids = [self.next_token(share.row, share.num_computed_tokens) for share in step.requests]
        return StepOutput(token_ids, [None] * len(token_ids))

    def next_token(self, row: int, num_output_tokens: int) -> int:
        name = self.names[row]
        if self.fails_at.get(name) == num_output_tokens:
            raise ValueError(f"the cat sat on {name}")
        return (name << 20) + num_output_tokens

    def allow(self, num_steps: int) -> None:
        self.permits.release(num_steps)

    def open(self) -> None:
        """As many steps as the engine takes, from now on."""
        self.is_open = True
        self.permits.release()


class WatchedEngine(LLMEngine):
    """Remembers which threads use it."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.threads: set[threading.Thread] = set()

    def add_request(self, *args: Any) -> None:
        self.threads.add(threading.current_thread())
        super().add_request(*args)

    def abort_requests(self, *args: Any) -> None:
        self.threads.add(threading.current_thread())
        super().abort_requests(*args)


@contextmanager
def gated(**flags: Any) -> Iterator[AsyncLLM]:
    """An AsyncLLM over a GatedExecutor, not started yet; flags are EngineConfig's."""
    with (
        mock.patch.object(async_engine, "LLMEngine", WatchedEngine),
        mock.patch.object(async_engine, "load_tokenizer", lambda _: Words()),
        mock.patch.object(async_engine, "resolve_checkpoint", lambda _: CHECKPOINT),
        mock.patch.object(engine_module, "resolve_checkpoint", lambda _: CHECKPOINT),
        mock.patch.object(engine_module, "Executor", GatedExecutor),
    ):
        yield AsyncLLM(EngineConfig(**{"device": "cpu", "max_num_seqs": MAX_NUM_SEQS, **flags}))


def on_an_event_loop(max_queued_requests: int = 64) -> Callable:
    """The decorated coroutine is a test; it gets a GatedExecutor and a running AsyncLLM over it, which always end."""

    def decorate(test: Callable[[GatedExecutor, AsyncLLM], Awaitable[None]]) -> Callable[[], None]:
        @functools.wraps(test)
        def run() -> None:
            with gated(max_queued_requests=max_queued_requests) as llm:
                gate = llm.engine.executor
                assert isinstance(gate, GatedExecutor)
                llm.start()
                with shut_down_at_the_end(llm, gate.open, LOOK_SHUTDOWN):
                    asyncio.run(asyncio.wait_for(test(gate, llm), 2 * DEADLINE_S))
                check_nothing_remains(llm)

        del run.__wrapped__  # type: ignore[attr-defined]  # pytest would take the arguments for fixtures
        return run

    return decorate


def check_nothing_remains(llm: AsyncLLM) -> None:
    engine = llm.engine
    assert not engine.has_unfinished_requests and engine.blocks.num_used_blocks == 0, (
        f"after shutdown: {len(engine.running)} requests run, {len(engine.waiting)} wait, "
        f"{engine.blocks.num_used_blocks} blocks are used. {LOOK_SHUTDOWN}"
    )
    assert not llm._streams, f"after shutdown: streams {sorted(llm._streams)} are open. {LOOK_SHUTDOWN}"
    assert not llm.processor._detokenizers, f"after shutdown: {sorted(llm.processor._detokenizers)}. {LOOK_SHUTDOWN}"


async def until_idle(llm: AsyncLLM) -> None:
    await until(lambda: not llm.engine.has_unfinished_requests, f"the engine to become idle. {LOOK_RUN}")


async def until_stepping(gate: GatedExecutor, number: int = 1) -> None:
    """The engine's thread is inside its step of this number, from 1, and waits for a permit."""
    await until(lambda: gate.num_begun == number, f"the engine to begin step {number}. {LOOK_RUN}")


def generate(llm: AsyncLLM, name: int, max_tokens: int = NUM_TOKENS) -> RequestStream:
    return llm.generate([name], SamplingParams(max_tokens=max_tokens))


async def read_all(stream: RequestStream) -> list[str]:
    return [output.text async for output in stream]


async def read(stream: RequestStream, what: str) -> list[str]:
    """All texts of a request that ends by itself."""
    return await within_deadline(read_all(stream), f"{what} to end. {LOOK_RUN}")


async def texts_and_error(stream: RequestStream, what: str) -> tuple[list[str], str]:
    """The texts and the error of a request that fails."""
    outputs, error = await read_error(stream, GenerationError, what, LOOK_FAIL)
    return [output.text for output in outputs], error


def answer(name: int, num_tokens: int = NUM_TOKENS) -> list[str]:
    return [f"{name}.{number} " for number in range(num_tokens)]


# Order


@on_an_event_loop()
async def test_each_output_comes_before_the_next_is_computed(gate: GatedExecutor, llm: AsyncLLM) -> None:
    outputs = generate(llm, 7).__aiter__()
    for number in range(NUM_TOKENS):
        gate.allow(1)
        output = await within_deadline(outputs.__anext__(), f"output {number} once its step is done. {LOOK_RUN}")
        assert output.text == f"7.{number} ", f"expected output {number}, got {output!r}. {LOOK_RUN}"
    with pytest.raises(StopAsyncIteration):
        await within_deadline(outputs.__anext__(), "the stream to end after the output with a finish_reason")


@on_an_event_loop()
async def test_requests_share_steps(gate: GatedExecutor, llm: AsyncLLM) -> None:
    """The first runs alone, since the others arrive during its first step; they form the second batch and the third."""
    streams = [generate(llm, 0)]
    await until_stepping(gate)
    streams += [generate(llm, name, max_tokens=name) for name in (1, 2, 3)]
    gate.open()
    for name, stream in enumerate(streams):
        expected = answer(name, name or NUM_TOKENS)
        assert await read(stream, "every request") == expected, f"request {name}: expected {expected}. {LOOK_RUN}"
    assert gate.num_ended == NUM_TOKENS + 2 + 3, f"expected 4 + 2 + 3 steps, got {gate.num_ended}. {LOOK_RUN}"
    assert gate.started == [0, 1, 2, 3], f"expected the order 0, 1, 2, 3, got {gate.started}. {LOOK_RUN}"


@on_an_event_loop()
async def test_the_event_loop_stays_free_while_the_model_computes(gate: GatedExecutor, llm: AsyncLLM) -> None:
    reader = asyncio.ensure_future(read_all(generate(llm, 1)))
    await until_stepping(gate)
    for _ in range(100):  # other coroutines get their turns while the model is at its first token
        await asyncio.sleep(0)
    other = generate(llm, 2)  # does not wait for the step either
    llm.abort(other)
    assert gate.num_ended == 0 and not reader.done(), "the model had no permit: no token can be there"
    gate.open()
    got = await within_deadline(reader, f"the answer. {LOOK_RUN}")
    assert got == answer(1), f"expected {answer(1)}, got {got}. {LOOK_RUN}"


@on_an_event_loop()
async def test_one_thread_touches_the_engine(gate: GatedExecutor, llm: AsyncLLM) -> None:
    num_threads = threading.active_count()
    streams = [generate(llm, name) for name in range(20)]
    llm.abort(streams.pop())
    gate.open()
    for stream in streams:
        await read(stream, "every request")
    await until_idle(llm)
    assert threading.active_count() == num_threads, f"20 requests started threads. {LOOK_RUN}"
    assert isinstance(llm.engine, WatchedEngine)
    used = gate.threads | llm.engine.threads
    assert len(used) == 1 and threading.current_thread() not in used, (
        f"steps, additions and aborts happen in one thread, and not the event loop's: got {used}. {LOOK_RUN}"
    )


# The queue


@pytest.mark.parametrize("max_queued_requests", [0, 1, 3])
def test_the_queue_is_bounded(max_queued_requests: int) -> None:
    @on_an_event_loop(max_queued_requests)
    async def check(gate: GatedExecutor, llm: AsyncLLM) -> None:
        limit = f"max_num_seqs={MAX_NUM_SEQS}, max_queued_requests={max_queued_requests}"
        streams = [generate(llm, name) for name in range(MAX_NUM_SEQS + max_queued_requests)]
        with pytest.raises(QueueFullError) as at_once:
            generate(llm, 100)
        await until_stepping(gate)
        with pytest.raises(QueueFullError) as while_running:
            generate(llm, 101)
        for caught in (at_once, while_running):
            for word in ("max_queued_requests", str(len(streams))):
                assert word in str(caught.value), (
                    f"{limit}: the error must name value and limit: {caught}. {LOOK_QUEUE}"
                )
        llm.abort(streams.pop())
        streams.append(generate(llm, 50))  # in place of the aborted one
        with pytest.raises(QueueFullError):
            generate(llm, 102)
        names = [stream.prompt_token_ids[0] for stream in streams]
        gate.open()
        got = [await read(stream, "every accepted request") for stream in streams]
        assert got == [answer(name) for name in names], f"{limit}: got {got}. {LOOK_QUEUE}"
        assert not set(gate.started) & {100, 101, 102}, f"{limit}: a refused request ran: {gate.started}. {LOOK_QUEUE}"

    check()


@on_an_event_loop(max_queued_requests=0)
async def test_a_client_with_the_whole_answer_can_ask_again_at_once(gate: GatedExecutor, llm: AsyncLLM) -> None:
    gate.open()
    for name in range(20):
        pair = [generate(llm, name), generate(llm, name + 100)]
        got = [await read(stream, "every request") for stream in pair]
        assert got == [answer(name), answer(name + 100)], f"got {got}. {LOOK_QUEUE}"
    await until_idle(llm)


@on_an_event_loop()
async def test_a_bad_request_is_refused_at_once(gate: GatedExecutor, llm: AsyncLLM) -> None:
    with pytest.raises(FieldError, match="^prompt: "):
        llm.generate([], SamplingParams())
    assert llm.stats()["num_requests_waiting"] == 0, f"a refused request counts as waiting. {LOOK_QUEUE}"


# Abort


@on_an_event_loop()
async def test_abort_in_the_inbox(gate: GatedExecutor, llm: AsyncLLM) -> None:
    """It arrived and was aborted during one step: the worker never sees it."""
    first = generate(llm, 1)
    await until_stepping(gate)
    gone, stays = generate(llm, 2), generate(llm, 3)
    llm.abort(gone)
    gate.open()
    for stream, name in ((first, 1), (stays, 3)):
        assert await read(stream, "a request that was not aborted") == answer(name)
    await until_idle(llm)
    assert gate.started == [1, 3], f"request 2 was aborted in the inbox, and {gate.started} ran. {LOOK_ABORT}"


@on_an_event_loop()
async def test_abort_while_waiting(gate: GatedExecutor, llm: AsyncLLM) -> None:
    first = generate(llm, 0)
    await until_stepping(gate)
    streams = [generate(llm, name) for name in (1, 2, 3)]
    gate.allow(1)
    await until(lambda: len(llm.engine.waiting) == 3, f"three requests to wait in the engine. {LOOK_RUN}")
    llm.abort(streams[1])
    gate.open()
    for name, stream in ((0, first), (1, streams[0]), (3, streams[2])):
        assert await read(stream, "a request that was not aborted") == answer(name)
    await until_idle(llm)
    assert gate.started == [0, 1, 3], f"request 2 was aborted while it waited: {gate.started} ran. {LOOK_ABORT}"


@on_an_event_loop()
async def test_abort_while_running(gate: GatedExecutor, llm: AsyncLLM) -> None:
    long = generate(llm, 1, max_tokens=1_000)
    await until_stepping(gate)
    outputs = long.__aiter__()
    gate.allow(2)
    for number in range(2):
        output = await within_deadline(outputs.__anext__(), f"an output. {LOOK_RUN}")
        assert output.text == f"1.{number} ", f"got {output}. {LOOK_RUN}"
    await until_stepping(gate, 3)
    llm.abort(long)
    other = generate(llm, 2)
    gate.open()
    assert await read(other, "the request after the aborted one") == answer(2)
    await until_idle(llm)
    assert gate.num_ended <= 3 + NUM_TOKENS, (
        f"an aborted request leaves before the next step: at most {3 + NUM_TOKENS} steps, got {gate.num_ended}. "
        f"{LOOK_ABORT}"
    )
    late = long._outputs.qsize()
    assert late == 0, f"an aborted request got {late} outputs after the abort. {LOOK_ABORT}"


@on_an_event_loop()
async def test_abort_of_one_request_of_a_batch(gate: GatedExecutor, llm: AsyncLLM) -> None:
    generate_first = generate(llm, 0, max_tokens=1)
    await until_stepping(gate)
    pair = [generate(llm, 1), generate(llm, 2)]
    gate.allow(2)
    await until(lambda: gate.started == [0, 1, 2] and gate.num_begun == 3, f"the second batch to run. {LOOK_RUN}")
    llm.abort(pair[0])
    gate.open()
    assert await read(pair[1], "the other one of the batch") == answer(2)
    assert await read(generate_first, "the first") == answer(0, 1)
    await until_idle(llm)


@on_an_event_loop()
async def test_abort_after_the_end_and_twice(gate: GatedExecutor, llm: AsyncLLM) -> None:
    gate.open()
    gate.fails_at = {2: 1}
    first = generate(llm, 1)
    assert await read(first, "the first request") == answer(1)
    failing = generate(llm, 2)
    await texts_and_error(failing, "the failing request")
    for stream in (first, first, failing):
        llm.abort(stream)
    again = generate(llm, 3)
    llm.abort(first)
    assert await read(again, "the next request") == answer(3), f"an old abort hit a new request. {LOOK_ABORT}"
    gone = generate(llm, 4, max_tokens=1_000_000)
    for _ in range(3):
        llm.abort(gone)
    await until_idle(llm)
    assert await read(generate(llm, 5), "a request afterwards") == answer(5)


# Failure


@pytest.mark.parametrize("num_before", [0, 2])
def test_a_failed_step_ends_all_requests_in_the_engine(num_before: int) -> None:
    """Those of the batch and those that wait for the next one. What arrived during the step is served."""

    @on_an_event_loop()
    async def check(gate: GatedExecutor, llm: AsyncLLM) -> None:
        gate.fails_at = {2: num_before}
        first = generate(llm, 0, max_tokens=1)
        await until_stepping(gate)
        streams = {name: generate(llm, name) for name in (1, 2, 3)}  # 1 and 2 are the next batch, 3 waits
        gate.allow(1 + num_before)
        await until_stepping(gate, 2 + num_before)
        late = generate(llm, 4)
        gate.open()
        assert await read(first, "the first request") == answer(0, 1)
        for name, stream in streams.items():
            texts, message = await texts_and_error(stream, f"request {name}, in the engine when a step fails")
            expected = answer(name, 0 if name == 3 else num_before)
            assert texts == expected, f"request {name}: expected {expected} first, got {texts}. {LOOK_FAIL}"
            assert message == "ValueError: the cat sat on 2", f"expected the cause, got {message!r}. {LOOK_FAIL}"
        assert await read(late, "a request that arrived during the failed step") == answer(4)
        await until_idle(llm)
        assert llm.is_alive and llm.cause_of_death is None, f"one failed step ends no engine. {LOOK_FAIL}"
        assert llm.stats()["num_requests_waiting"] == 0, f"a failed request counts as waiting. {LOOK_FAIL}"

    check()


@on_an_event_loop()
async def test_a_request_whose_last_step_failed_gets_the_error(gate: GatedExecutor, llm: AsyncLLM) -> None:
    """Its last output was lost with the step: without an error its reader would wait forever."""
    first = generate(llm, 0, max_tokens=1)
    await until_stepping(gate)
    ends, fails = generate(llm, 1, max_tokens=1), generate(llm, 2)
    gate.fails_at = {2: 0}
    gate.open()
    await read(first, "the first request")
    for stream, name in ((ends, 1), (fails, 2)):
        texts, message = await texts_and_error(stream, f"request {name}, whose step failed")
        assert (texts, message) == ([], "ValueError: the cat sat on 2"), f"request {name}: {texts}, {message!r}."
    assert await read(generate(llm, 3), "the request after them") == answer(3)


@on_an_event_loop()
async def test_a_request_that_is_aborted_in_a_failing_step(gate: GatedExecutor, llm: AsyncLLM) -> None:
    gate.fails_at = {1: 1}
    streams = [generate(llm, 1), generate(llm, 2)]
    gate.allow(1)
    await until_stepping(gate, 2)
    llm.abort(streams[0])
    gate.open()
    _, message = await texts_and_error(streams[1], "the other one of the batch")
    assert message == "ValueError: the cat sat on 1", f"got {message!r}. {LOOK_FAIL}"
    assert await read(generate(llm, 3), "the next request") == answer(3), f"an old abort came late. {LOOK_ABORT}"


@on_an_event_loop()
async def test_failed_steps_with_a_good_one_between_them(gate: GatedExecutor, llm: AsyncLLM) -> None:
    gate.fails_at = {1: 0, 3: 0}
    gate.open()
    for turn in range(4):
        _, message = await texts_and_error(generate(llm, 1), "a request that fails")
        assert message == "ValueError: the cat sat on 1", f"turn {turn}: got {message!r}. {LOOK_FAIL}"
        assert await read(generate(llm, 2), "a request that is served") == answer(2)
    assert llm.is_alive and llm.cause_of_death is None, f"no two failed steps in a row: {llm.cause_of_death}."


@on_an_event_loop()
async def test_two_failed_steps_in_a_row_end_the_engine(gate: GatedExecutor, llm: AsyncLLM) -> None:
    """What the second step leaves in the engine ends with its cause; what is in the inbox, with the engine's."""
    gate.fails_at = {1: 0, 2: 0}
    first = generate(llm, 1)
    await until_stepping(gate)
    second, third = generate(llm, 2), generate(llm, 3)
    gate.allow(1)
    assert (await texts_and_error(first, "the first request"))[1] == "ValueError: the cat sat on 1"
    assert llm.is_alive, f"one failed step ends no engine. {LOOK_FAIL}"
    await until_stepping(gate, 2)
    late = generate(llm, 4)
    gate.open()
    for name, stream in ((2, second), (3, third)):
        texts, message = await texts_and_error(stream, f"request {name}")
        assert (texts, message) == ([], "ValueError: the cat sat on 2"), f"{name}: {texts}, {message!r}. {LOOK_FAIL}"
    cause = "two steps in a row failed, the second with ValueError: the cat sat on 2"
    texts, message = await texts_and_error(late, "a request in the inbox of an engine that ends")
    assert (texts, message) == ([], cause), f"expected {cause!r}, got {texts}, {message!r}. {LOOK_FAIL}"
    assert llm.cause_of_death == cause, f"expected {cause!r}, got {llm.cause_of_death!r}. {LOOK_FAIL}"
    assert not llm.is_alive, f"an engine that has ended is not alive. {LOOK_FAIL}"
    with pytest.raises(GenerationError, match=cause):
        generate(llm, 5)
    llm.abort(late)  # the server may do so with any stream
    got = dict(llm.stats())
    assert (got["num_requests_running"], got["num_requests_waiting"], got["kv_cache_usage_perc"]) == (0, 0, 0), (
        f"expected empty gauges, got {got}. {LOOK_STATS}"
    )
    assert gate.started == [1, 2, 3], f"expected no step after the second failure, got {gate.started}. {LOOK_FAIL}"


@on_an_event_loop()
async def test_a_reader_whose_event_loop_is_closed(gate: GatedExecutor, llm: AsyncLLM) -> None:
    """Its outputs are dropped; the engine's thread goes on."""

    async def ask() -> RequestStream:
        return generate(llm, 1)

    def ask_on_a_loop_of_its_own() -> None:
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(ask())
        finally:
            loop.close()

    await asyncio.to_thread(ask_on_a_loop_of_its_own)
    gate.open()
    assert await read(generate(llm, 2), "the next request, on a loop that is open") == answer(2)
    assert llm.is_alive, f"a closed event loop ended the engine's thread. {LOOK_RUN}"


# Shutdown


@on_an_event_loop()
async def test_shutdown_ends_running_waiting_and_new_requests(gate: GatedExecutor, llm: AsyncLLM) -> None:
    streams = [generate(llm, 0, max_tokens=1_000)]
    await until_stepping(gate)
    streams += [generate(llm, name) for name in (1, 2)]
    gate.allow(1)
    await until_stepping(gate, 2)
    assert len(llm.engine.waiting) == 2, f"expected two requests to wait, got {llm.engine.waiting}. {LOOK_RUN}"
    streams.append(generate(llm, 3))  # in the inbox, since the engine is in its second step
    readers = [asyncio.ensure_future(texts_and_error(stream, "every request at shutdown")) for stream in streams]
    end = asyncio.ensure_future(asyncio.to_thread(llm.shutdown))
    await until(lambda: llm._stopping, f"shutdown to begin. {LOOK_SHUTDOWN}")
    gate.open()  # the engine finishes its step
    await within_deadline(end, f"shutdown to return. {LOOK_SHUTDOWN}")
    for name, (texts, message) in enumerate(await asyncio.gather(*readers)):
        assert "shutting down" in message, f"request {name}: expected the reason, got {message!r}. {LOOK_SHUTDOWN}"
        assert texts == answer(name, 2 if name == 0 else 0), f"request {name} gave {texts}. {LOOK_SHUTDOWN}"
    assert not llm.is_alive, f"the engine's thread is still alive. {LOOK_SHUTDOWN}"
    assert gate.started == [0], f"no request starts at shutdown: expected [0], got {gate.started}. {LOOK_SHUTDOWN}"


@on_an_event_loop()
async def test_shutdown_when_idle_and_twice(gate: GatedExecutor, llm: AsyncLLM) -> None:
    assert llm.is_alive, f"a started engine's thread runs. {LOOK_RUN}"
    for _ in range(2):
        await within_deadline(asyncio.to_thread(llm.shutdown), f"shutdown to return. {LOOK_SHUTDOWN}")
        assert not llm.is_alive, f"the engine's thread is still alive. {LOOK_SHUTDOWN}"


# Gauges


@on_an_event_loop()
async def test_stats(gate: GatedExecutor, llm: AsyncLLM) -> None:
    def check(running: int, waiting: int) -> None:
        expected = {
            "num_requests_running": running, "num_requests_waiting": waiting,
            "kv_cache_usage_perc": running / (NUM_BLOCKS - 1), "num_preemptions": 3,
        }  # fmt: skip
        got = dict(llm.stats())
        assert got == expected, f"expected {expected}, got {got}. {LOOK_STATS}"

    llm.engine.num_preemptions = 3
    check(0, 0)
    first = generate(llm, 0)
    await until_stepping(gate)
    check(1, 0)
    others = [generate(llm, name) for name in (1, 2, 3)]  # in the inbox: they wait too
    check(1, 3)
    llm.abort(others.pop())
    check(1, 2)
    gate.open()
    for stream in (first, *others):
        await read(stream, "every request")
    await until_idle(llm)
    check(0, 0)


# With the real engine


def test_many_requests_and_aborts(small_directory: Callable[[str], tuple[Path, Any]]) -> None:
    """Aborts at any time, and preemptions: the others get the right tokens, and nothing leaks."""
    flags = dict(model=str(small_directory("llama")[0]), device="cpu", block_size=4)
    rng = random.Random(0)
    prompts = [[rng.randrange(320) for _ in range(rng.randint(1, 20))] for _ in range(60)]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    expected = LLM(EngineConfig(**flags, num_kv_blocks=500)).generate(prompts, params)
    llm = AsyncLLM(EngineConfig(**flags, num_kv_blocks=1 + 16, max_num_seqs=6, max_queued_requests=200))
    engine, num_completed = llm.engine, 0

    async def use(number: int) -> None:
        nonlocal num_completed
        stream, give_up_after = llm.generate(prompts[number], params), rng.choice([0, 1, 5, 12, 12])
        got: list[int] = []
        if give_up_after:
            async for output in stream:
                got += output.token_ids
                if len(got) == give_up_after:
                    break
        llm.abort(stream)
        num_completed += len(got) == 12
        wanted = expected[number].outputs[0].token_ids[: len(got)]
        assert got == wanted, f"request {number}: expected {wanted}, got {got}. {LOOK_RUN}"

    async def use_all() -> None:
        await asyncio.gather(*map(use, range(60)))
        await until(lambda: not engine.has_unfinished_requests, f"the engine to become idle. {LOOK_ABORT}")

    llm.start()
    try:
        asyncio.run(asyncio.wait_for(use_all(), 3 * DEADLINE_S))
    finally:
        llm.shutdown()
    assert num_completed >= 10 and engine.num_preemptions > 0, "this test needs complete answers and preemptions"
    assert engine.blocks.num_used_blocks == 0, f"{engine.blocks.num_used_blocks} blocks are never freed. {LOOK_ABORT}"
    check_nothing_remains(llm)


def test_the_longest_request_that_fits() -> None:
    """Prompt and answer: the last token's key and value are never stored."""
    for max_model_len, expected in ((1_000, 1_000), (500, 500), (None, 1_000)):
        with gated(max_model_len=max_model_len) as llm:
            assert llm.max_request_len == expected, f"1,600 slots, context {max_model_len}: got {llm.max_request_len}."
    with mock.patch.object(GatedExecutor, "num_blocks", 11), gated() as llm:
        got = (llm.max_request_len, llm.max_model_len)
        assert got == (161, 1_000), (
            f"160 slots, 1,000 tokens of context: expected (161, 1000), got {got}. "
            "Look at api/async_engine.py::AsyncLLM.__init__."
        )
        expected_limits = EngineLimits(max_model_len=1_000, vocab_size=1_000, num_kv_tokens=160, max_prompt_len=8_192)
        assert llm.limits == expected_limits, f"expected {expected_limits}, got {llm.limits}."


def test_how_many_requests_may_be_unfinished() -> None:
    with gated(max_num_seqs=3, max_queued_requests=5) as llm:
        assert llm.max_num_unfinished == 8, f"3 that run and 5 that wait: expected 8, got {llm.max_num_unfinished}."
