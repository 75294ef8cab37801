"""A core in a thread of this process, for AsyncLLM: real sockets, a scripted engine, and steps that need a permit."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import zmq

from tests.async_checks import DEADLINE_S, shut_down_at_the_end
from tests.scripted import Part, answer_alone, executor_of

NUM_TOKENS = 6  # of an answer, and of a prompt


class Words:
    """A tokenizer that writes every token as a word."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(f" w{token_id}" for token_id in token_ids)


class Killed(BaseException):
    """What ends the core's thread, as a signal would."""


class Permits:
    """Each step of an engine waits for a permit. begun: the requests in each step that has asked for one."""

    def __init__(self) -> None:
        self.permits = threading.Semaphore(0)
        self.is_open = self.is_killed = False
        self.begun: list[list[Any]] = []

    def begin(self, names: list[Any]) -> None:
        self.begun.append(names)
        if not self.is_open and not self.permits.acquire(timeout=3 * DEADLINE_S):
            raise TimeoutError("no permit for this step; did it run on the event loop's thread?")
        if self.is_killed:
            raise Killed

    def allow(self, num_steps: int) -> None:
        self.permits.release(num_steps)

    def open(self) -> None:
        """From now on no step waits."""
        self.is_open = True
        self.permits.release()


class CoreGate(Permits):
    """Permits of an engine in CoreThread: a step asks for one when its result is asked for.

    must_hear: the core takes no step before it has received so many messages. num_sent: how many were sent so far.
    """

    def __init__(self, part: Part, engine: Any) -> None:
        super().__init__()
        self.part, self.engine = part, engine
        self.start_error: Exception | None = None
        self.must_hear = self.num_heard = self.num_sent = 0
        self._receive, self._send = part.engine_core.EngineCore.receive, part.core_client.CoreClient.send

    def make_engine(self, config: Any, *_: Any) -> Any:
        if self.start_error is not None:
            raise self.start_error
        return self.engine

    def receive(self, core: Any) -> list[Any]:
        messages = self._receive(core)
        while self.num_heard + len(messages) < self.must_hear:
            messages.append(self.part.messages.decode_to_core(core.requests.recv()))
        self.num_heard += len(messages)
        return messages

    def send(self, client: Any, message: Any) -> None:
        self.num_sent += not isinstance(message, self.part.messages.Start)
        self._send(client, message)


class Gate(CoreGate):
    """The engine is a scripted one."""

    def __init__(self, part: Part, engine: Any) -> None:
        super().__init__(part, engine)
        executor = executor_of(engine)
        self._run, executor.run = executor.run, self.run

    def run(self, step: Any) -> None:
        self.begin([work.request_id for work in step.work])
        self._run(step)

    @property
    def launched(self) -> list[list[str]]:
        return [[work.request_id for work in step.work] for step in executor_of(self.engine).launched]

    def answer(self, name: int, num_tokens: int = NUM_TOKENS) -> tuple[str, list[int]]:
        """Text and tokens that request `name` gets."""
        token_ids = answer_alone(prompt_of(name), num_tokens, ignore_eos=True)
        return Words().decode(token_ids, skip_special_tokens=True), token_ids


def prompt_of(name: int) -> list[int]:
    return [100 + name] * NUM_TOKENS


class CoreThread:
    """In place of a multiprocessing process: a thread that runs the core over the sockets in the directory."""

    def __init__(self, gate: CoreGate, directory: str) -> None:
        self.gate, self.directory = gate, directory
        self.mode = Path(directory).stat().st_mode & 0o777
        self.pid: int | None = None
        self.exitcode: int | None = None
        self.how_it_ends = -15  # the exit code after terminate()
        self.context = zmq.Context()
        self.requests = self.context.socket(zmq.PULL)
        self.requests.bind(f"ipc://{directory}/requests")  # now: the client connects at once, or tries again in 100 ms
        self.sentinel, self._end = os.pipe()
        self.thread = threading.Thread(target=self.serve, name="core", daemon=True)

    def start(self) -> None:
        self.pid = os.getpid()
        self.thread.start()

    def serve(self) -> None:
        requests, outputs = self.requests, self.context.socket(zmq.PUSH)
        outputs.connect(f"ipc://{self.directory}/outputs")
        self.exitcode = 0
        try:
            start = self.gate.part.messages.decode_to_core(requests.recv())
            if self.gate.is_killed:  # it never answers
                return
            self.gate.part.engine_core._serve(start.config, requests, outputs)
        except (Killed, zmq.ContextTerminated):
            self.exitcode = self.how_it_ends
        except Exception:
            self.exitcode = 1
        finally:
            for socket in (requests, outputs):
                socket.close(linger=1_000)
            os.close(self._end)

    def is_alive(self) -> bool:
        return self.thread.is_alive()

    def join(self, timeout: float | None = None) -> None:
        self.thread.join(timeout)

    def terminate(self) -> None:
        self.gate.is_killed = True
        self.gate.open()
        self.context.term()

    def kill(self) -> None:
        self.how_it_ends = -9
        self.terminate()


@contextlib.contextmanager
def gated_engine(gate: CoreGate, config: Any = None, **flags: Any) -> Iterator[Any]:
    """The part's AsyncLLM, whose core is a thread with the gate's engine. The caller shuts it down.

    flags: EngineConfig's, unless there is a config.
    """
    part, threads = gate.part, list[CoreThread]()
    engine_core, core_client = part.engine_core, part.core_client

    def process(target: Any, args: tuple[str], **_: Any) -> CoreThread:
        assert target is engine_core.run_engine_core, f"expected run_engine_core in the other process, got {target}"
        threads.append(CoreThread(gate, *args))
        return threads[-1]

    spawn = SimpleNamespace(Process=process)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(core_client.multiprocessing, "get_context", lambda method: spawn))
        stack.enter_context(mock.patch.object(engine_core, "LLMEngine", gate.make_engine))
        stack.enter_context(mock.patch.object(engine_core.EngineCore, "receive", lambda core: gate.receive(core)))
        stack.enter_context(mock.patch.object(core_client.CoreClient, "send", lambda *args: gate.send(*args)))
        stack.enter_context(mock.patch.object(part.async_engine, "load_tokenizer", lambda _: Words()))
        try:
            yield part.async_engine.AsyncLLM(config or part.config.EngineConfig(device="cpu", **flags))
        finally:
            for thread in threads:
                thread.join(DEADLINE_S)
                os.close(thread.sentinel)


class engine_that_has_ended:
    """is_alive as long as its core's process is."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    @property
    def is_alive(self) -> bool:
        return self.engine.core.process.is_alive()

    def shutdown(self) -> None:
        self.engine.shutdown()


def on_an_event_loop(
    make_gate: Callable[..., Gate], look: str, max_queued_requests: int = 64, **flags: Any
) -> Callable[[Callable[[Gate, Any], Awaitable[None]]], Callable[[], None]]:
    """The decorated coroutine is a test; it gets a Gate and a running AsyncLLM over it, which always end."""

    def decorate(test: Callable[[Gate, Any], Awaitable[None]]) -> Callable[[], None]:
        @functools.wraps(test)
        def run() -> None:
            gate = make_gate(**flags)
            with gated_engine(gate, max_queued_requests=max_queued_requests, **flags) as engine:

                async def start_and_test() -> None:
                    engine.start()
                    await test(gate, engine)
                    await asyncio.to_thread(engine.shutdown)

                with shut_down_at_the_end(engine_that_has_ended(engine), gate.open, look):
                    asyncio.run(asyncio.wait_for(start_and_test(), 3 * DEADLINE_S))

        del run.__wrapped__  # type: ignore[attr-defined]  # pytest would take the coroutine's arguments for fixtures
        return run

    return decorate
