"""AsyncLLM: order, queue, abort, failure and shutdown, with an engine that takes a step only when it is told to."""

from __future__ import annotations

import asyncio
import functools
import random
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import FieldError
from common.outputs import CompletionOutput
from common.sampling_params import SamplingParams
from common.serving import GenerationError, QueueFullError
from part03_paged_attention.api.async_engine import AsyncLLM, RequestStream
from part03_paged_attention.config import EngineConfig
from part03_paged_attention.core.engine import LLM, LLMEngine
from tests.async_checks import DEADLINE_S, read_error, shut_down_at_the_end, until, within_deadline

LOOK_QUEUE = 'Look at api/async_engine.py::AsyncLLM.generate; README of part 2, "Off the event loop".'
LOOK_ABORT = (
    'Look at api/async_engine.py::AsyncLLM.abort and _take_inbox; README of part 2, "When the client goes away".'
)
LOOK_RUN = 'Look at api/async_engine.py::AsyncLLM._run; README of part 2, "Off the event loop".'
LOOK_FAIL = 'Look at api/async_engine.py::AsyncLLM._run and _fail; README of part 2, "Off the event loop".'
LOOK_SHUTDOWN = 'Look at api/async_engine.py::AsyncLLM.shutdown; README of part 2, "Off the event loop".'
LOOK_STATS = "Look at api/async_engine.py::AsyncLLM.stats."
NUM_TOKENS = 4  # of an answer
MAX_NUM_SEQS = 2


@dataclass(eq=False)
class FakeRequest:
    request_id: str
    name: int
    max_tokens: int
    num_tokens: int = 0


class FakeEngine:
    """Static batches of scripted requests, told apart by their first prompt token. A step costs a permit."""

    model_name, tokenizer, max_model_len, vocab_size, num_kv_tokens = "fake", None, 100, 1_000, 50

    def __init__(self) -> None:
        self.max_num_seqs, self.num_preemptions = MAX_NUM_SEQS, 3
        self.waiting: deque[FakeRequest] = deque()
        self.running: list[FakeRequest] = []
        self.permits = threading.Semaphore(0)
        self.is_open = False
        self.fails_at: dict[int, int] = {}  # name → how many tokens it gets before a step fails at it
        self.cannot_start: set[int] = set()
        self.started: list[int] = []
        self.threads: set[threading.Thread] = set()
        self.num_begun = self.num_steps = 0

    @property
    def blocks(self) -> SimpleNamespace:
        return SimpleNamespace(num_blocks=11, num_used_blocks=len(self.running))

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def check_request(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        if not prompt_token_ids:
            raise FieldError("prompt", "expected at least one token, got an empty prompt")

    def add_request(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> None:
        self.threads.add(threading.current_thread())
        self.waiting.append(FakeRequest(request_id, prompt_token_ids[0], params.max_tokens))

    def abort_request(self, request_id: str) -> None:
        self.threads.add(threading.current_thread())
        for queue in (self.waiting, self.running):
            for request in [request for request in queue if request.request_id == request_id]:
                queue.remove(request)

    def step(self) -> list[tuple[str, CompletionOutput]]:
        self.threads.add(threading.current_thread())
        while self.waiting and len(self.running) < self.max_num_seqs and not self.num_in_batch:
            if self.waiting[0].name in self.cannot_start:
                raise ValueError(f"the dog sat on {self.waiting[0].name}")
            self.running.append(self.waiting.popleft())
            self.started.append(self.running[-1].name)
        if not self.running:
            return []
        self.num_begun += 1
        if not self.is_open and not self.permits.acquire(timeout=DEADLINE_S):
            raise TimeoutError("no permit for this step; did it run on the event loop's thread?")
        self.num_steps += 1
        return [self._advance(request) for request in list(self.running)]

    @property
    def num_in_batch(self) -> int:
        """How many of the running have tokens already: then the batch is closed."""
        return sum(request.num_tokens > 0 for request in self.running)

    def _advance(self, request: FakeRequest) -> tuple[str, CompletionOutput]:
        if self.fails_at.get(request.name) == request.num_tokens:
            raise ValueError(f"the cat sat on {request.name}")
        text = f"{request.name}.{request.num_tokens} "
        request.num_tokens += 1
        is_last = request.num_tokens == request.max_tokens
        if is_last:
            self.running.remove(request)
        return request.request_id, CompletionOutput(0, text, [1], "length" if is_last else None, None)

    def allow(self, num_steps: int) -> None:
        self.permits.release(num_steps)

    def open(self) -> None:
        """As many steps as anybody wants, from now on."""
        self.is_open = True
        self.permits.release()


def on_an_event_loop(max_queued_requests: int = 64) -> Callable:
    """The decorated coroutine is a test; it gets a FakeEngine and an AsyncLLM over it, which always end."""

    def decorate(test: Callable[[FakeEngine, AsyncLLM], Awaitable[None]]) -> Callable[[], None]:
        @functools.wraps(test)
        def run() -> None:
            fake = FakeEngine()
            llm = AsyncLLM(fake, max_queued_requests)  # type: ignore[arg-type]
            llm.start()
            with shut_down_at_the_end(llm, fake.open, LOOK_SHUTDOWN):
                asyncio.run(asyncio.wait_for(test(fake, llm), 2 * DEADLINE_S))

        del run.__wrapped__  # pytest would take the arguments for fixtures
        return run

    return decorate


async def until_idle(fake: FakeEngine) -> None:
    await until(lambda: not fake.has_unfinished_requests, f"the engine to become idle. {LOOK_RUN}")


async def until_stepping(fake: FakeEngine) -> None:
    """The engine's thread is inside a step and waits for a permit."""
    await until(lambda: fake.num_begun > fake.num_steps, f"the engine to begin a step. {LOOK_RUN}")


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
async def test_each_output_comes_before_the_next_is_computed(fake: FakeEngine, llm: AsyncLLM) -> None:
    outputs = generate(llm, 7).__aiter__()
    for number in range(NUM_TOKENS):
        fake.allow(1)
        output = await within_deadline(outputs.__anext__(), f"output {number} once its step is done. {LOOK_RUN}")
        assert output.text == f"7.{number} ", f"expected output {number}, got {output!r}. {LOOK_RUN}"
    with pytest.raises(StopAsyncIteration):
        await within_deadline(outputs.__anext__(), "the stream to end after the output with a finish_reason")


@on_an_event_loop()
async def test_requests_share_steps(fake: FakeEngine, llm: AsyncLLM) -> None:
    """The first runs alone, since the others come during its first step; they are the second batch and the third."""
    streams = [generate(llm, 0)]
    await until_stepping(fake)
    streams += [generate(llm, name, max_tokens=name) for name in (1, 2, 3)]
    fake.open()
    for name, stream in enumerate(streams):
        expected = answer(name, name or NUM_TOKENS)
        assert await read(stream, "every request") == expected, f"request {name}: expected {expected}. {LOOK_RUN}"
    assert fake.num_steps == NUM_TOKENS + 2 + 3, f"expected 4 + 2 + 3 steps, got {fake.num_steps}. {LOOK_RUN}"
    assert fake.started == [0, 1, 2, 3], f"expected the order 0, 1, 2, 3, got {fake.started}. {LOOK_RUN}"


@on_an_event_loop()
async def test_the_event_loop_stays_free_while_the_model_computes(fake: FakeEngine, llm: AsyncLLM) -> None:
    reader = asyncio.ensure_future(read_all(generate(llm, 1)))
    await until_stepping(fake)
    for _ in range(100):  # other coroutines get their turns while the model is at its first token
        await asyncio.sleep(0)
    other = generate(llm, 2)  # does not wait for the step either
    llm.abort(other)
    assert fake.num_steps == 0 and not reader.done(), "the model had no permit: no token can be there"
    fake.open()
    got = await within_deadline(reader, f"the answer. {LOOK_RUN}")
    assert got == answer(1), f"expected {answer(1)}, got {got}. {LOOK_RUN}"


@on_an_event_loop()
async def test_one_thread_touches_the_engine(fake: FakeEngine, llm: AsyncLLM) -> None:
    num_threads = threading.active_count()
    streams = [generate(llm, name) for name in range(20)]
    llm.abort(streams.pop())
    fake.open()
    for stream in streams:
        await read(stream, "every request")
    await until_idle(fake)
    assert threading.active_count() == num_threads, f"20 requests started threads. {LOOK_RUN}"
    assert len(fake.threads) == 1 and threading.current_thread() not in fake.threads, (
        f"steps, additions and aborts happen in one thread, and not the event loop's: got {fake.threads}. {LOOK_RUN}"
    )


# The queue


@pytest.mark.parametrize("max_queued_requests", [0, 1, 3])
def test_the_queue_is_bounded(max_queued_requests: int) -> None:
    @on_an_event_loop(max_queued_requests)
    async def check(fake: FakeEngine, llm: AsyncLLM) -> None:
        limit = f"max_num_seqs={MAX_NUM_SEQS}, max_queued_requests={max_queued_requests}"
        streams = [generate(llm, name) for name in range(MAX_NUM_SEQS + max_queued_requests)]
        with pytest.raises(QueueFullError) as at_once:
            generate(llm, 100)
        await until_stepping(fake)
        with pytest.raises(QueueFullError) as while_running:
            generate(llm, 101)
        for caught in (at_once, while_running):
            for word in ("max_queued_requests", str(len(streams))):
                assert word in str(caught.value), (
                    f"{limit}: the error must name value and limit: {caught}. {LOOK_QUEUE}"
                )
        llm.abort(streams.pop())
        streams.append(generate(llm, 50))  # the aborted one's place is free again
        with pytest.raises(QueueFullError):
            generate(llm, 102)
        names = [stream.prompt_token_ids[0] for stream in streams]
        fake.open()
        got = [await read(stream, "every accepted request") for stream in streams]
        assert got == [answer(name) for name in names], f"{limit}: got {got}. {LOOK_QUEUE}"
        assert not set(fake.started) & {100, 101, 102}, f"{limit}: a refused request ran: {fake.started}. {LOOK_QUEUE}"

    check()


@on_an_event_loop(max_queued_requests=0)
async def test_who_has_the_whole_answer_may_ask_again_at_once(fake: FakeEngine, llm: AsyncLLM) -> None:
    fake.open()
    for name in range(20):
        pair = [generate(llm, name), generate(llm, name + 100)]
        got = [await read(stream, "every request") for stream in pair]
        assert got == [answer(name), answer(name + 100)], f"got {got}. {LOOK_QUEUE}"
    await until_idle(fake)


@on_an_event_loop()
async def test_a_bad_request_is_refused_at_once(fake: FakeEngine, llm: AsyncLLM) -> None:
    with pytest.raises(FieldError, match="^prompt: "):
        llm.generate([], SamplingParams())
    assert llm.stats()["num_requests_waiting"] == 0, f"a refused request counts as waiting. {LOOK_QUEUE}"


# Abort


@on_an_event_loop()
async def test_abort_in_the_inbox(fake: FakeEngine, llm: AsyncLLM) -> None:
    """It came and went during one step: the model never sees it."""
    first = generate(llm, 1)
    await until_stepping(fake)
    gone, stays = generate(llm, 2), generate(llm, 3)
    llm.abort(gone)
    fake.open()
    for stream, name in ((first, 1), (stays, 3)):
        assert await read(stream, "a request that nobody aborted") == answer(name)
    await until_idle(fake)
    assert fake.started == [1, 3], f"request 2 was aborted in the inbox, and {fake.started} ran. {LOOK_ABORT}"


@on_an_event_loop()
async def test_abort_while_waiting(fake: FakeEngine, llm: AsyncLLM) -> None:
    first = generate(llm, 0)
    await until_stepping(fake)
    streams = [generate(llm, name) for name in (1, 2, 3)]
    fake.allow(1)
    await until(lambda: len(fake.waiting) == 3, f"three requests to wait in the engine. {LOOK_RUN}")
    llm.abort(streams[1])
    fake.open()
    for name, stream in ((0, first), (1, streams[0]), (3, streams[2])):
        assert await read(stream, "a request that nobody aborted") == answer(name)
    await until_idle(fake)
    assert fake.started == [0, 1, 3], f"request 2 was aborted while it waited: {fake.started} ran. {LOOK_ABORT}"


@on_an_event_loop()
async def test_abort_while_running(fake: FakeEngine, llm: AsyncLLM) -> None:
    long = generate(llm, 1, max_tokens=1_000)
    await until_stepping(fake)
    outputs = long.__aiter__()
    fake.allow(2)
    for number in range(2):
        output = await within_deadline(outputs.__anext__(), f"an output. {LOOK_RUN}")
        assert output.text == f"1.{number} ", f"got {output}. {LOOK_RUN}"
    await until(lambda: fake.num_begun == 3, "the third step")
    llm.abort(long)
    other = generate(llm, 2)
    fake.open()
    assert await read(other, "the request after the aborted one") == answer(2)
    await until_idle(fake)
    assert fake.num_steps <= 3 + NUM_TOKENS, (
        f"an aborted request leaves before the next step: at most {3 + NUM_TOKENS} steps, got {fake.num_steps}. "
        f"{LOOK_ABORT}"
    )
    late = long._outputs.qsize()
    assert late == 0, f"an aborted request got {late} late outputs; nobody reads them. {LOOK_ABORT}"


@on_an_event_loop()
async def test_abort_leaves_the_rest_of_the_batch(fake: FakeEngine, llm: AsyncLLM) -> None:
    generate_first = generate(llm, 0, max_tokens=1)
    await until_stepping(fake)
    pair = [generate(llm, 1), generate(llm, 2)]
    fake.allow(2)
    await until(lambda: fake.started == [0, 1, 2] and fake.num_begun == 3, f"the second batch to run. {LOOK_RUN}")
    llm.abort(pair[0])
    fake.open()
    assert await read(pair[1], "the other one of the batch") == answer(2)
    assert await read(generate_first, "the first") == answer(0, 1)
    await until_idle(fake)


@on_an_event_loop()
async def test_abort_after_the_end_and_twice(fake: FakeEngine, llm: AsyncLLM) -> None:
    fake.open()
    fake.fails_at = {2: 1}
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
    await until_idle(fake)
    assert await read(generate(llm, 5), "a request afterwards") == answer(5)


# Failure


@pytest.mark.parametrize("num_before", [0, 2])
def test_a_failing_step_fails_only_its_batch(num_before: int) -> None:
    @on_an_event_loop()
    async def check(fake: FakeEngine, llm: AsyncLLM) -> None:
        first = generate(llm, 0)
        await until_stepping(fake)
        streams = {name: generate(llm, name) for name in (1, 2, 3, 4, 5)}  # batches 1 and 2, 3 and 4, 5
        fake.fails_at = {2: num_before}
        fake.open()
        assert await read(first, "the first request") == answer(0)
        for name in (1, 2):
            texts, message = await texts_and_error(streams[name], f"request {name}, in the batch that fails")
            assert texts == answer(name, num_before), f"expected {num_before} outputs first, got {texts}. {LOOK_FAIL}"
            for word in ("ValueError", "the cat sat on 2"):
                assert word in message, f"the error names its cause: expected {word!r} in {message!r}. {LOOK_FAIL}"
        for name in (3, 4, 5):
            assert await read(streams[name], "a request that waited meanwhile") == answer(name)
        await until_idle(fake)
        assert llm.is_alive, f"a step's error ended the engine's thread. {LOOK_FAIL}"
        assert llm.stats()["num_requests_waiting"] == 0, f"a failed request counts as waiting. {LOOK_FAIL}"

    check()


@on_an_event_loop()
async def test_a_request_that_ended_in_a_failing_step_is_told_too(fake: FakeEngine, llm: AsyncLLM) -> None:
    """Its last output was lost with the step: without an error its reader would wait forever."""
    first = generate(llm, 0, max_tokens=1)
    await until_stepping(fake)
    ends, fails, waits = generate(llm, 1, max_tokens=1), generate(llm, 2), generate(llm, 3)
    fake.fails_at = {2: 0}
    fake.open()
    await read(first, "the first request")
    for stream, name in ((ends, 1), (fails, 2)):
        texts, message = await texts_and_error(stream, f"request {name}, whose step failed")
        assert (texts, "the cat sat on 2" in message) == ([], True), (
            f"request {name}: {texts}, {message!r}. {LOOK_FAIL}"
        )
    assert await read(waits, "the request after them") == answer(3)


@on_an_event_loop()
async def test_a_request_that_cannot_start_does_not_hold_up_the_others(fake: FakeEngine, llm: AsyncLLM) -> None:
    fake.cannot_start = {1}
    first = generate(llm, 0)
    await until_stepping(fake)
    bad, good = generate(llm, 1), generate(llm, 2)
    fake.open()
    assert await read(first, "the first request") == answer(0)
    texts, message = await texts_and_error(bad, "the request that cannot start")
    assert (texts, "the dog sat on 1" in message) == ([], True), f"expected the cause, got {message!r}. {LOOK_FAIL}"
    assert await read(good, "the request behind it") == answer(2)
    assert llm.is_alive, f"a step's error ended the engine's thread. {LOOK_FAIL}"


@on_an_event_loop()
async def test_a_reader_whose_event_loop_is_closed(fake: FakeEngine, llm: AsyncLLM) -> None:
    """Its outputs go nowhere; the engine's thread goes on."""

    async def ask() -> RequestStream:
        return generate(llm, 1)

    def ask_on_a_loop_of_its_own() -> None:
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(ask())
        finally:
            loop.close()

    await asyncio.to_thread(ask_on_a_loop_of_its_own)
    fake.open()
    assert await read(generate(llm, 2), "the next request, on a loop that is open") == answer(2)
    assert llm.is_alive, f"a closed event loop ended the engine's thread. {LOOK_RUN}"


# Shutdown


@on_an_event_loop()
async def test_shutdown_ends_what_runs_what_waits_and_what_just_came(fake: FakeEngine, llm: AsyncLLM) -> None:
    streams = [generate(llm, 0, max_tokens=1_000)]
    await until_stepping(fake)
    streams += [generate(llm, name) for name in (1, 2)]
    fake.allow(1)
    await until(lambda: len(fake.waiting) == 2 and fake.num_begun == 2, f"two requests to wait. {LOOK_RUN}")
    streams.append(generate(llm, 3))  # in the inbox, since the engine is in its second step
    readers = [asyncio.ensure_future(texts_and_error(stream, "every request at shutdown")) for stream in streams]
    end = asyncio.ensure_future(asyncio.to_thread(llm.shutdown))
    await until(lambda: llm._stopping, f"shutdown to begin. {LOOK_SHUTDOWN}")
    fake.open()  # the engine finishes the step that it is at
    await within_deadline(end, f"shutdown to return. {LOOK_SHUTDOWN}")
    for name, (texts, message) in enumerate(await asyncio.gather(*readers)):
        assert "shutting down" in message, f"request {name}: expected the reason, got {message!r}. {LOOK_SHUTDOWN}"
        assert texts == answer(name, 2 if name == 0 else 0), f"request {name} gave {texts}. {LOOK_SHUTDOWN}"
    assert not llm.is_alive, f"the engine's thread is still alive. {LOOK_SHUTDOWN}"
    assert fake.started == [0], f"no request starts at shutdown: expected [0], got {fake.started}. {LOOK_SHUTDOWN}"
    assert not fake.has_unfinished_requests, f"requests stay in the engine after shutdown. {LOOK_SHUTDOWN}"


@on_an_event_loop()
async def test_shutdown_when_idle_and_twice(fake: FakeEngine, llm: AsyncLLM) -> None:
    assert llm.is_alive, f"a started engine's thread runs. {LOOK_RUN}"
    for _ in range(2):
        await within_deadline(asyncio.to_thread(llm.shutdown), f"shutdown to return. {LOOK_SHUTDOWN}")
        assert not llm.is_alive, f"the engine's thread is still alive. {LOOK_SHUTDOWN}"


# Gauges


@on_an_event_loop()
async def test_stats(fake: FakeEngine, llm: AsyncLLM) -> None:
    def check(running: int, waiting: int) -> None:
        expected = {
            "num_requests_running": running, "num_requests_waiting": waiting, "kv_cache_usage_perc": running / 10,
            "num_preemptions": 3,
        }  # fmt: skip
        got = dict(llm.stats())
        assert got == expected, f"expected {expected}, got {got}. {LOOK_STATS}"

    check(0, 0)
    first = generate(llm, 0)
    await until_stepping(fake)
    check(1, 0)
    others = [generate(llm, name) for name in (1, 2, 3)]  # in the inbox: they wait too
    check(1, 3)
    llm.abort(others.pop())
    check(1, 2)
    fake.open()
    for stream in (first, *others):
        await read(stream, "every request")
    await until_idle(fake)
    check(0, 0)


# With the real engine


def test_many_requests_and_aborts(small_directory: Callable[[str], tuple[Path, Any]]) -> None:
    """Whenever an abort comes, and with preemptions: who stays gets the right tokens, and nothing leaks."""
    flags = dict(model=str(small_directory("llama")[0]), device="cpu", block_size=4)
    rng = random.Random(0)
    prompts = [[rng.randrange(320) for _ in range(rng.randint(1, 20))] for _ in range(60)]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    expected = LLM(EngineConfig(**flags, num_kv_blocks=500)).generate(prompts, params)
    engine = LLMEngine(EngineConfig(**flags, num_kv_blocks=1 + 16, max_num_seqs=6))
    llm, num_completed = AsyncLLM(engine, max_queued_requests=200), 0

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
    assert llm.stats()["num_requests_waiting"] == 0, f"streams stay behind: {llm.stats()}. {LOOK_ABORT}"


def test_what_a_request_can_reach() -> None:
    """Prompt and answer: the last token's key and value are never stored."""
    fake = FakeEngine()
    for num_kv_tokens, expected in ((50, 51), (99, 100), (1_000, 100)):
        fake.num_kv_tokens = num_kv_tokens
        got = AsyncLLM(fake, 0).max_request_len  # type: ignore[arg-type]
        assert got == expected, (
            f"{num_kv_tokens} tokens in the KV cache, 100 of context: expected {expected}, got {got}. "
            "Look at api/async_engine.py::AsyncLLM.__init__."
        )
