"""One part's AsyncLLM over a small model, whose steps wait for a permit: what the tests of serving share.

From part 5 on its core is a thread instead of a process, behind real sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from unittest import mock

from common.outputs import CompletionOutput, join_outputs
from common.sampling_params import SamplingParams
from common.serving import GenerationError
from tests.async_checks import DEADLINE_S, read_error, shut_down_at_the_end, until, within_deadline
from tests.contract.engines import SmallEngine, SmallModels, number_of
from tests.gated import CoreGate, Permits, Words, engine_that_has_ended, gated_engine
from tests.scripted import Part

NUM_TOKENS = 6  # of an answer, and of a prompt
FIRST = 99  # the name of a request that keeps the engine busy while others arrive
LOOK_RUN = "Look at api/async_engine.py::AsyncLLM and, from part 5 on, core/engine_core.py::EngineCore."
LOOK_ABORT = "Look at api/async_engine.py::AsyncLLM.abort and what it leads to."
LOOK_FAIL = "Look at api/async_engine.py::AsyncLLM and, from part 5 on, core/engine_core.py::EngineCore.step."
LOOK_SHUTDOWN = "Look at api/async_engine.py::AsyncLLM.shutdown."
LOOK_STATS = "Look at api/async_engine.py::AsyncLLM.stats."


def prompt_of(name: int) -> list[int]:
    """A prompt whose first token is no other's."""
    return [100 + name, *((31 * name + 7 * number) % 100 for number in range(1, NUM_TOKENS))]


class Handle:
    """In place of a launched step's handle, from part 5 on."""

    def __init__(self, server: GatedServer, names: list[int], handle: Any) -> None:
        self.server, self.names, self.handle = server, names, handle

    def result(self) -> Any:
        self.server.begin(self.names)
        return self.handle.result()


class GatedServer:
    """An AsyncLLM of one part. A request's name is a number; each has a prompt of its own.

    launched: the names in each step; gate.begun: the same when the engine waits for the step. Before part 5 that is at
    once. launch_errors and errors: raised by the next launches, and by the next steps that get a permit. threads: those
    in which the engine was used.
    """

    def __init__(self, part: str, models: SmallModels, **flags: Any) -> None:
        self.part, self.models = part, models
        self.inner = SmallEngine(part, models, **flags)
        self.has_core = number_of(part) >= 5
        self.gate = CoreGate(Part(part), self.inner.core) if self.has_core else Permits()
        self.launched: list[list[int]] = []
        self.launch_errors: list[Exception] = []
        self.errors: list[Exception] = []
        self.threads = set[threading.Thread]()
        self._names: dict[int, int] = {}  # of the requests in the rows
        executor = self.inner.core.executor
        if self.has_core:
            self._launch, executor.launch = executor.launch, self.launch
        else:
            self._execute, executor.execute = executor.execute, self.execute
        self.llm: Any = None  # running() comes first

    def note(self, step: Any) -> list[int]:
        """The names of a step's requests."""
        self.threads.add(threading.current_thread())
        for new in step.new_requests:
            self._names[new.row] = new.token_ids[0] - 100
        self.launched.append([self._names[request.row] for request in step.requests])
        if self.launch_errors:
            raise self.launch_errors.pop(0)
        return self.launched[-1]

    def begin(self, names: list[int]) -> None:
        self.gate.begin(names)
        if self.errors:
            raise self.errors.pop(0)

    def execute(self, step: Any) -> Any:
        self.begin(self.note(step))
        return self._execute(step)

    def launch(self, step: Any) -> Handle:
        names = self.note(step)
        return Handle(self, names, self._launch(step))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """With an AsyncLLM that is not started yet; the caller shuts it down."""
        if self.has_core:
            assert isinstance(self.gate, CoreGate)
            with gated_engine(self.gate, config=self.inner.config) as self.llm:
                yield
            return
        module = self.inner.module("api.async_engine")
        with (
            mock.patch.object(module, "LLMEngine", lambda _: self.inner.core),
            mock.patch.object(module, "load_tokenizer", lambda _: Words()),
        ):
            self.llm = module.AsyncLLM(self.inner.config)
        yield

    def answer(self, name: int, num_tokens: int = NUM_TOKENS) -> tuple[str, list[int]]:
        """Text and tokens that a request gets."""
        token_ids = greedy(self.models, name)[:num_tokens]
        assert len(token_ids) == num_tokens, f"{num_tokens} tokens are more than is computed for these tests"
        return Words().decode(token_ids, skip_special_tokens=True), token_ids

    def generate(self, name: int, max_tokens: int = NUM_TOKENS, **fields: Any) -> Any:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **fields)
        return self.llm.generate(prompt_of(name), params)

    async def generate_together(self, max_tokens: dict[int, int]) -> list[Any]:
        """Requests, name → max_tokens, that arrive while a step runs, so that the next one, the second, finds them all.

        It has begun when this returns.
        """
        first = self.generate(FIRST, max_tokens=1)
        await self.until_begun(1)
        streams = [self.generate(*each) for each in max_tokens.items()]
        self.wait_for_messages()
        self.gate.allow(1)
        await self.read(first, "the request before them")
        await self.until_begun(2)
        return streams

    def wait_for_messages(self) -> None:
        """The engine takes no further step before it has received all that was sent so far."""
        if isinstance(self.gate, CoreGate):
            self.gate.must_hear = self.gate.num_sent

    async def until_begun(self, number: int) -> None:
        """The engine has begun its step of this number, from 1."""
        begun = self.gate.begun
        await until(lambda: len(begun) >= number, f"{self.part} to begin step {number}, not {begun}. {LOOK_RUN}")

    async def read_pieces(self, stream: Any, what: str) -> list[CompletionOutput]:
        """All outputs of a request that ends by itself."""

        async def read() -> list[CompletionOutput]:
            return [output async for output in stream]

        return await within_deadline(read(), f"{self.part}: {what} to end. {LOOK_RUN}")

    async def read(self, stream: Any, what: str) -> tuple[str, list[int]]:
        joined = join_outputs(await self.read_pieces(stream, what))
        return joined.text, joined.token_ids

    async def read_error(self, stream: Any, what: str) -> tuple[list[int], str]:
        """The tokens and the error of a request that fails."""
        outputs, error = await read_error(stream, GenerationError, f"{self.part}: {what}", LOOK_FAIL)
        return [token_id for output in outputs for token_id in output.token_ids], error

    async def until_idle(self) -> None:
        """No request runs or waits, nothing is held, and the gauges say so."""
        core, llm = self.inner.core, self.llm
        await until(lambda: not core.has_unfinished_requests, f"{self.part} to become idle. {LOOK_ABORT}")
        await until(lambda: not llm._streams, f"{self.part}: no open streams, got {list(llm._streams)}. {LOOK_RUN}")
        await until(
            lambda: not llm.processor._detokenizers,
            f"{self.part}: no detokenizers, got {list(llm.processor._detokenizers)}. {LOOK_ABORT}",
        )
        self.inner.check_empty(LOOK_ABORT)
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        await until(
            lambda: not any(llm.stats().get(name) for name in names), f"{self.part}: gauges of an idle engine, {names}"
        )

    async def check_next(self, name: int = 50) -> None:
        """It is alive, and its next request gets its own answer."""
        got = await self.read(self.generate(name), "the next request")
        assert got == self.answer(name), f"{self.part}, the next request: expected {self.answer(name)}, got {got}."
        assert self.llm.is_alive and self.llm.cause_of_death is None, f"{self.part}: {self.llm.cause_of_death}"


@functools.cache
def greedy(models: SmallModels, name: int, num_tokens: int = 24) -> list[int]:
    """What transformers answers."""
    return models.greedy(prompt_of(name), num_tokens)


def on_an_event_loop(**flags: Any) -> Callable[[Callable[[GatedServer], Awaitable[None]]], Callable[..., None]]:
    """The decorated coroutine is a test of every part; it gets a GatedServer that has started, and which always ends.

    flags: EngineConfig's.
    """

    def decorate(test: Callable[[GatedServer], Awaitable[None]]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(part: str, small_models: SmallModels) -> None:
            run_on_an_event_loop(GatedServer(part, small_models, **flags), test)

        del run.__wrapped__  # type: ignore[attr-defined]  # pytest would take the coroutine's arguments for fixtures
        return run

    return decorate


def run_on_an_event_loop(server: GatedServer, test: Callable[[GatedServer], Awaitable[None]]) -> None:
    async def start_and_test() -> None:
        server.llm.start()
        await test(server)
        server.gate.open()
        await asyncio.to_thread(server.llm.shutdown)

    with server.running():
        llm = engine_that_has_ended(server.llm) if server.has_core else server.llm
        with shut_down_at_the_end(llm, server.gate.open, f"{server.part}. {LOOK_SHUTDOWN}"):
            asyncio.run(asyncio.wait_for(start_and_test(), 3 * DEADLINE_S))
