"""AsyncLLM: order, queue, abort, failure and shutdown, with a model that computes a token only when permitted."""

from __future__ import annotations

import asyncio
import functools
import random
import threading
from collections.abc import Awaitable, Callable, Iterator

import pytest

from common.outputs import CompletionOutput
from common.sampling_params import SamplingParams
from part02_streaming.async_engine import AsyncLLM, GenerationError, QueueFullError, RequestStream
from tests.async_checks import DEADLINE_S, read_error, shut_down_at_the_end, until, within_deadline

LOOK_QUEUE = 'Look at async_engine.py::AsyncLLM.generate; README "Off the event loop".'
LOOK_ABORT = 'Look at async_engine.py::AsyncLLM.abort; README "When the client goes away".'
LOOK_RUN = 'Look at async_engine.py::AsyncLLM._run; README "Off the event loop".'
LOOK_SHUTDOWN = 'Look at async_engine.py::AsyncLLM.shutdown; README "Off the event loop".'
NUM_TOKENS = 4  # of an answer


class FakeLLM:
    """A request's first prompt token is its name. Each token of an answer costs a permit."""

    def __init__(self) -> None:
        self.permits = threading.Semaphore(0)
        self.is_open = False
        self.fails_at: dict[int, int] = {}  # name → how many tokens it yields before it raises
        self.started: list[int] = []
        self.closed: list[int] = []
        self.threads: set[threading.Thread] = set()
        self.num_tokens = 0
        self.before_end: threading.Semaphore | None = None  # acquired between the last output and the end

    def stream(self, prompt_token_ids: list[int], params: SamplingParams) -> Iterator[CompletionOutput]:
        name = prompt_token_ids[0]
        self.threads.add(threading.current_thread())
        self.started.append(name)
        try:
            for number in range(params.max_tokens):
                if self.fails_at.get(name) == number:
                    raise ValueError(f"the cat sat on {name}")
                if not self.is_open and not self.permits.acquire(timeout=DEADLINE_S):
                    raise TimeoutError("no permit for this token; did this run on the event loop's thread?")
                self.num_tokens += 1
                is_last = number == params.max_tokens - 1
                yield CompletionOutput(0, f"{name}.{number} ", [number], "length" if is_last else None, None)
            if self.before_end is not None:
                self.before_end.acquire(timeout=DEADLINE_S)
        finally:
            self.closed.append(name)

    def allow(self, num_tokens: int) -> None:
        self.permits.release(num_tokens)

    def open(self) -> None:
        """Allow any number of tokens from now on."""
        self.is_open = True
        self.permits.release()
        if self.before_end is not None:
            self.before_end.release(1000)


def on_an_event_loop(max_queued_requests: int = 64) -> Callable:
    """The decorated coroutine is a test; it gets a FakeLLM and an AsyncLLM over it, which always end."""

    def decorate(test: Callable[[FakeLLM, AsyncLLM], Awaitable[None]]) -> Callable[[], None]:
        @functools.wraps(test)
        def run() -> None:
            llm = FakeLLM()
            engine = AsyncLLM(llm, max_queued_requests)  # type: ignore[arg-type]
            with shut_down_at_the_end(engine, llm.open, LOOK_SHUTDOWN):
                asyncio.run(asyncio.wait_for(test(llm, engine), 2 * DEADLINE_S))

        del run.__wrapped__  # pytest would take the arguments for fixtures
        return run

    return decorate


def generate(engine: AsyncLLM, name: int, max_tokens: int = NUM_TOKENS) -> RequestStream:
    return engine.generate([name], SamplingParams(max_tokens=max_tokens))


async def read_all(request: RequestStream) -> list[str]:
    return [output.text async for output in request]


async def read(request: RequestStream, what: str) -> list[str]:
    """All texts of a request that ends by itself."""
    return await within_deadline(read_all(request), f"{what} to end. {LOOK_RUN}")


async def texts_and_error(request: RequestStream, what: str) -> tuple[list[str], str]:
    """The texts and the error of a request that fails."""
    outputs, error = await read_error(request, GenerationError, what, LOOK_RUN)
    return [output.text for output in outputs], error


def answer(name: int, num_tokens: int = NUM_TOKENS) -> list[str]:
    return [f"{name}.{number} " for number in range(num_tokens)]


async def until_idle(engine: AsyncLLM) -> None:
    await until(lambda: engine.running is None and not engine.waiting, f"the engine to become idle. {LOOK_RUN}")


# Order


@on_an_event_loop()
async def test_each_output_comes_before_the_next_is_computed(llm: FakeLLM, engine: AsyncLLM) -> None:
    outputs = generate(engine, 7).__aiter__()
    for number in range(NUM_TOKENS):
        llm.allow(1)
        output = await within_deadline(outputs.__anext__(), f"output {number} once its token is there. {LOOK_RUN}")
        assert output.text == f"7.{number} ", f"expected output {number}, got {output!r}. {LOOK_RUN}"
    with pytest.raises(StopAsyncIteration):
        await within_deadline(outputs.__anext__(), "the stream to end after the output with a finish_reason")


@on_an_event_loop()
async def test_first_come_first_served(llm: FakeLLM, engine: AsyncLLM) -> None:
    names = [5, 3, 9, 1, 4]
    requests = [generate(engine, name) for name in names]
    llm.open()
    got = await asyncio.gather(*(read(request, "every request") for request in reversed(requests)))
    assert llm.started == names, f"expected the requests in their order {names}, got {llm.started}. {LOOK_QUEUE}"
    expected = [answer(name) for name in reversed(names)]
    assert got == expected, f"each reader gets its own request's outputs: expected {expected}, got {got}. {LOOK_RUN}"
    await until_idle(engine)
    assert engine.num_aborted == 0, f"no request was aborted, but num_aborted is {engine.num_aborted}. {LOOK_ABORT}"


@on_an_event_loop()
async def test_one_runs_and_the_others_wait(llm: FakeLLM, engine: AsyncLLM) -> None:
    first, second, third = (generate(engine, name) for name in (1, 2, 3))
    await until(lambda: llm.started, f"the first request to start. {LOOK_RUN}")
    for _ in range(NUM_TOKENS - 1):
        assert engine.running is first, f"expected the first request to run, got {engine.running}. {LOOK_RUN}"
        assert list(engine.waiting) == [second, third], f"expected the other two to wait. {LOOK_QUEUE}"
        assert llm.started == [1], f"one request at a time: expected only 1 to have started, got {llm.started}."
        before = llm.num_tokens
        llm.allow(1)
        await until(lambda before=before: llm.num_tokens > before, f"a token. {LOOK_RUN}")
    llm.allow(1)
    await until(lambda: llm.started == [1, 2], f"the second request to start when the first ends. {LOOK_RUN}")
    assert (engine.running, list(engine.waiting)) == (second, [third]), f"expected 2 to run, 3 to wait. {LOOK_QUEUE}"


@on_an_event_loop()
async def test_the_event_loop_stays_free_while_the_model_computes(llm: FakeLLM, engine: AsyncLLM) -> None:
    reader = asyncio.ensure_future(read_all(generate(engine, 1)))
    await until(lambda: llm.started, f"the request to start. {LOOK_RUN}")
    for _ in range(100):  # other coroutines get their turns while the model is at its first token
        await asyncio.sleep(0)
    assert llm.num_tokens == 0 and not reader.done(), "the model had no permit: no token can be there"
    llm.open()
    got = await within_deadline(reader, f"the answer. {LOOK_RUN}")
    assert got == answer(1), f"expected {answer(1)}, got {got}. {LOOK_RUN}"
    assert threading.current_thread() not in llm.threads, f"the model ran on the event loop's thread. {LOOK_RUN}"


@on_an_event_loop()
async def test_one_thread_serves_all_requests(llm: FakeLLM, engine: AsyncLLM) -> None:
    num_threads = threading.active_count()
    requests = [generate(engine, name) for name in range(20)]
    llm.open()
    for request in requests:
        await read(request, "every request")
    assert len(llm.threads) == 1, f"expected one thread to run the model, got {len(llm.threads)}. {LOOK_RUN}"
    assert threading.active_count() == num_threads, f"20 requests started threads. {LOOK_RUN}"


# The queue


@pytest.mark.parametrize("max_queued_requests", [0, 1, 3])
def test_the_queue_is_bounded(max_queued_requests: int) -> None:
    @on_an_event_loop(max_queued_requests)
    async def check(llm: FakeLLM, engine: AsyncLLM) -> None:
        limit = f"max_queued_requests={max_queued_requests}"
        # At once: whether the thread has taken the first up already makes no difference.
        requests = [generate(engine, name) for name in range(1 + max_queued_requests)]
        with pytest.raises(QueueFullError) as at_once:
            generate(engine, 100)
        await until(lambda: engine.running, f"a request to run. {LOOK_RUN}")
        with pytest.raises(QueueFullError) as while_running:
            generate(engine, 101)
        for caught in (at_once, while_running):
            assert "max_queued_requests" in str(caught.value), f"{limit}: the error must name the limit: {caught}."
        assert len(engine.waiting) == max_queued_requests, f"{limit}: {len(engine.waiting)} wait. {LOOK_QUEUE}"
        if max_queued_requests:
            engine.abort(requests.pop())
            try:
                requests.append(generate(engine, 50))
            except QueueFullError:
                pytest.fail(f"{limit}: a waiting request was aborted, but its place is not free. {LOOK_ABORT}")
            with pytest.raises(QueueFullError):
                generate(engine, 102)
        names = [request.prompt_token_ids[0] for request in requests]
        llm.open()
        got = [await read(request, "every accepted request") for request in requests]
        assert got == [answer(name) for name in names], f"{limit}: got {got}. {LOOK_QUEUE}"
        assert llm.started == names, f"{limit}: expected {names} to run, got {llm.started}. {LOOK_QUEUE}"

    check()


def test_a_refused_request_leaves_no_trace() -> None:
    @on_an_event_loop(max_queued_requests=1)
    async def check(llm: FakeLLM, engine: AsyncLLM) -> None:
        first, second = generate(engine, 1), generate(engine, 2)
        for name in range(10, 20):
            with pytest.raises(QueueFullError):
                generate(engine, name)
        llm.open()
        assert [await read(request, "both") for request in (first, second)] == [answer(1), answer(2)]
        await until_idle(engine)
        assert (llm.started, engine.num_aborted) == ([1, 2], 0), (
            f"got {llm.started}, {engine.num_aborted}. {LOOK_QUEUE}"
        )

    check()


@on_an_event_loop(max_queued_requests=0)
async def test_a_new_request_right_after_the_last_output_is_accepted(llm: FakeLLM, engine: AsyncLLM) -> None:
    """The request has ended when its reader gets the last output, not some time later."""
    llm.open()
    llm.before_end = threading.Semaphore(0)  # the model waits after its last output
    for name in range(3):
        try:
            request = generate(engine, name)
        except QueueFullError:
            pytest.fail(f"request {name - 1} has given its last output and still counts as running. {LOOK_RUN}")
        assert await read(request, "every request") == answer(name)
        engine.abort(request)
        assert engine.num_aborted == 0, f"a request with its last output out was counted as aborted. {LOOK_ABORT}"
        llm.before_end.release()


# Abort


@on_an_event_loop()
async def test_abort_while_waiting(llm: FakeLLM, engine: AsyncLLM) -> None:
    requests = [generate(engine, name) for name in range(4)]
    await until(lambda: engine.running, f"the first request to run. {LOOK_RUN}")
    engine.abort(requests[2])
    assert requests[2] not in engine.waiting, f"an aborted request still waits. {LOOK_ABORT}"
    assert engine.num_aborted == 1, f"num_aborted: expected 1, got {engine.num_aborted}. {LOOK_ABORT}"
    llm.open()
    for name in (0, 1, 3):
        assert await read(requests[name], "a request that was not aborted") == answer(name)
    await until_idle(engine)
    assert llm.started == [0, 1, 3], (
        f"request 2 was aborted: expected 0, 1 and 3 to run, got {llm.started}. {LOOK_ABORT}"
    )
    assert llm.num_tokens == 3 * NUM_TOKENS, f"expected {3 * NUM_TOKENS} tokens, got {llm.num_tokens}. {LOOK_ABORT}"


@on_an_event_loop()
async def test_abort_while_running(llm: FakeLLM, engine: AsyncLLM) -> None:
    first, second = generate(engine, 1, max_tokens=1000), generate(engine, 2)
    llm.allow(2)
    outputs = first.__aiter__()
    for _ in range(2):
        await within_deadline(outputs.__anext__(), f"an output. {LOOK_RUN}")
    before = llm.num_tokens
    engine.abort(first)
    assert engine.num_aborted == 1, f"num_aborted: expected 1, got {engine.num_aborted}. {LOOK_ABORT}"
    assert list(engine.waiting) == [second], f"the other request must not be touched. {LOOK_ABORT}"
    llm.open()
    assert await read(second, "the request after the aborted one") == answer(2)
    await until_idle(engine)
    num_late = llm.num_tokens - before - NUM_TOKENS
    assert num_late <= 2, f"an aborted request stops within two tokens: it computed {num_late} more. {LOOK_ABORT}"
    assert llm.closed == [1, 2], f"the aborted stream must be closed before the next begins: {llm.closed}. {LOOK_ABORT}"
    assert engine.num_aborted == 1, f"num_aborted: expected 1, got {engine.num_aborted}. {LOOK_ABORT}"


@on_an_event_loop()
async def test_abort_after_the_end(llm: FakeLLM, engine: AsyncLLM) -> None:
    llm.open()
    llm.fails_at = {2: 1}
    first, failing = generate(engine, 1), generate(engine, 2)
    assert await read(first, "the first request") == answer(1)
    await texts_and_error(failing, "the failing request")
    for request in (first, failing):
        engine.abort(request)
    assert engine.num_aborted == 0, f"both had ended: expected num_aborted 0, got {engine.num_aborted}. {LOOK_ABORT}"
    again = generate(engine, 3)
    engine.abort(first)
    assert await read(again, "the next request") == answer(3), f"an old abort affected a new request. {LOOK_ABORT}"
    assert engine.num_aborted == 0, f"both had ended: expected num_aborted 0, got {engine.num_aborted}. {LOOK_ABORT}"


@on_an_event_loop()
async def test_abort_twice_counts_once(llm: FakeLLM, engine: AsyncLLM) -> None:
    running, waiting, last = (generate(engine, name) for name in (1, 2, 3))
    await until(lambda: engine.running is running, f"the first request to run. {LOOK_RUN}")
    for expected, request in ((1, waiting), (2, running)):
        engine.abort(request)
        engine.abort(request)
        got = engine.num_aborted
        assert got == expected, f"aborted twice, counted once: expected {expected}, got {got}. {LOOK_ABORT}"
    llm.open()
    assert await read(last, "the last request") == answer(3)
    assert llm.started == [1, 3], f"expected 1 and 3 to have started, got {llm.started}. {LOOK_ABORT}"


@on_an_event_loop()
async def test_many_requests_and_aborts(llm: FakeLLM, engine: AsyncLLM) -> None:
    """Whenever an abort arrives, each request either ends or counts as aborted, and nothing is left."""
    rng, llm.is_open = random.Random(0), True
    num_completed = 0

    async def use(name: int) -> None:
        nonlocal num_completed
        await asyncio.sleep(rng.random() / 50)
        request, expected = generate(engine, name, max_tokens=20), answer(name, 20)
        give_up_after = rng.choice([0, 1, 5, 20, 20])
        got: list[str] = []
        if give_up_after:
            async for output in request:
                got.append(output.text)
                if len(got) == give_up_after:
                    break
        engine.abort(request)
        assert got == expected[: len(got)], f"request {name}: expected {expected[: len(got)]}, got {got}. {LOOK_RUN}"
        assert request not in engine.waiting, f"request {name} was aborted and waits. {LOOK_ABORT}"
        num_completed += not request.aborted
        assert request.aborted or give_up_after, f"request {name} was aborted while it waited or ran. {LOOK_ABORT}"

    engine.max_queued_requests = 200
    await asyncio.gather(*map(use, range(200)))
    await until_idle(engine)
    total = engine.num_aborted + num_completed
    assert total == 200, f"{engine.num_aborted} aborted + {num_completed} completed = {total}, not 200. {LOOK_ABORT}"
    assert sorted(llm.closed) == sorted(llm.started), f"a stream was not closed. {LOOK_ABORT}"
    assert await read(generate(engine, 999), "a request afterwards") == answer(999)


# Failure


@pytest.mark.parametrize("num_before", [0, 2])
def test_a_failing_request_ends_with_the_cause_and_the_next_succeeds(num_before: int) -> None:
    @on_an_event_loop()
    async def check(llm: FakeLLM, engine: AsyncLLM) -> None:
        llm.fails_at = {1: num_before, 3: num_before}
        requests = [generate(engine, name) for name in (1, 2, 3, 4)]
        llm.open()
        for request, name in zip(requests, (1, 2, 3, 4), strict=True):
            if name in llm.fails_at:
                texts, message = await texts_and_error(request, f"request {name}, which fails")
                assert texts == answer(name)[:num_before], (
                    f"expected {num_before} outputs first, got {texts}. {LOOK_RUN}"
                )
                for word in ("ValueError", f"the cat sat on {name}"):
                    assert word in message, f"the error names the cause: expected {word!r} in {message!r}. {LOOK_RUN}"
            else:
                assert await read(request, "the request after a failed one") == answer(name)
        await until_idle(engine)
        assert engine.is_alive, f"a request's error ended the engine's thread. {LOOK_RUN}"
        assert engine.num_aborted == 0, f"a failed request is not an aborted one: {engine.num_aborted}. {LOOK_ABORT}"

    check()


@on_an_event_loop()
async def test_a_reader_whose_event_loop_is_closed(llm: FakeLLM, engine: AsyncLLM) -> None:
    """Its outputs are dropped; the engine's thread continues."""

    async def ask() -> RequestStream:
        return generate(engine, 1)

    def ask_on_a_loop_of_its_own() -> None:
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(ask())
        finally:
            loop.close()

    await asyncio.to_thread(ask_on_a_loop_of_its_own)
    llm.open()
    assert await read(generate(engine, 2), "the next request, on a loop that is open") == answer(2)
    assert engine.is_alive, f"a closed event loop ended the engine's thread. {LOOK_RUN}"


# Shutdown


@on_an_event_loop()
async def test_shutdown_ends_running_and_waiting_requests(llm: FakeLLM, engine: AsyncLLM) -> None:
    requests = [generate(engine, name, max_tokens=1000) for name in range(4)]
    llm.allow(1)
    await until(lambda: llm.num_tokens == 1, f"the first request's token. {LOOK_RUN}")
    readers = [asyncio.ensure_future(texts_and_error(request, "every request at shutdown")) for request in requests]
    end = asyncio.ensure_future(asyncio.to_thread(engine.shutdown))
    await until(lambda: not engine.waiting, f"shutdown to empty the queue. {LOOK_SHUTDOWN}")
    llm.open()  # the model finishes the token that it is at
    await within_deadline(end, f"shutdown to return. {LOOK_SHUTDOWN}")
    for name, (texts, message) in enumerate(await asyncio.gather(*readers)):
        assert "shutting down" in message, f"request {name}: expected the reason, got {message!r}. {LOOK_SHUTDOWN}"
        assert texts == answer(name, 1)[: len(texts)], f"request {name} gave {texts}. {LOOK_SHUTDOWN}"
    assert not engine.is_alive, f"the engine's thread is still alive. {LOOK_SHUTDOWN}"
    assert llm.started == [0], f"no request starts at shutdown: expected [0], got {llm.started}. {LOOK_SHUTDOWN}"
    assert llm.num_tokens <= 3, f"shutdown waits for {llm.num_tokens - 1} tokens, expected at most 2. {LOOK_SHUTDOWN}"
    assert (engine.running, list(engine.waiting)) == (None, []), f"requests are left. {LOOK_SHUTDOWN}"
    assert engine.num_aborted == 4, f"expected all 4 to count as aborted, got {engine.num_aborted}. {LOOK_SHUTDOWN}"


@on_an_event_loop()
async def test_shutdown_when_idle_and_twice(llm: FakeLLM, engine: AsyncLLM) -> None:
    assert engine.is_alive, f"a new engine's thread runs. {LOOK_RUN}"
    for _ in range(2):
        await within_deadline(asyncio.to_thread(engine.shutdown), f"shutdown to return. {LOOK_SHUTDOWN}")
        assert not engine.is_alive, f"the engine's thread is still alive. {LOOK_SHUTDOWN}"
