"""A core in a thread of this process, for AsyncLLM: real sockets, a scripted engine, and steps that need a permit."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import zmq

from part07_prefix_caching import async_engine, core_client, engine_core
from part07_prefix_caching.async_engine import AsyncLLM
from part07_prefix_caching.config import EngineConfig
from part07_prefix_caching.core_client import CoreClient
from part07_prefix_caching.engine import LLMEngine
from part07_prefix_caching.engine_core import EngineCore
from part07_prefix_caching.messages import Start, ToCore, decode_to_core
from tests.async_checks import DEADLINE_S
from tests.part07.scripted import ScriptedStep, answer_alone, runner_of, scripted_engine

RECEIVE, SEND = EngineCore.receive, CoreClient.send
NUM_TOKENS = 6  # of an answer, and of a prompt


class Words:
    """A tokenizer that writes every token as a word."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(f" w{token_id}" for token_id in token_ids)


class Killed(BaseException):
    """What ends the core's thread, as a signal would."""


class Gate:
    """Each step of the model waits for a permit. begun: who is in each step whose result was asked for.

    must_hear: the core takes no step before it has heard so many messages. num_sent: how many there were so far.
    """

    def __init__(self, **flags: Any) -> None:
        self.engine: LLMEngine = scripted_engine(max_model_len=200, **flags)
        self.permits = threading.Semaphore(0)
        self.is_open = self.is_killed = False
        self.begun: list[list[str]] = []
        self.start_error: Exception | None = None
        self.must_hear = self.num_heard = self.num_sent = 0
        runner = runner_of(self.engine)
        self._run, runner.run = runner.run, self.run  # type: ignore[method-assign]

    def make_engine(self, config: EngineConfig) -> LLMEngine:
        if self.start_error is not None:
            raise self.start_error
        return self.engine

    def receive(self, core: EngineCore) -> list[ToCore]:
        messages = RECEIVE(core)
        while self.num_heard + len(messages) < self.must_hear:
            messages.append(decode_to_core(core.requests.recv()))
        self.num_heard += len(messages)
        return messages

    def send(self, client: CoreClient, message: ToCore) -> None:
        self.num_sent += not isinstance(message, Start)
        SEND(client, message)

    def run(self, step: ScriptedStep) -> None:
        self.begun.append([work.request_id for work in step.work])
        if not self.is_open and not self.permits.acquire(timeout=3 * DEADLINE_S):
            raise TimeoutError("no permit for this step")
        if self.is_killed:
            raise Killed
        self._run(step)

    def allow(self, num_steps: int) -> None:
        self.permits.release(num_steps)

    def open(self) -> None:
        """As many steps as anybody wants, from now on."""
        self.is_open = True
        self.permits.release()

    @property
    def launched(self) -> list[list[str]]:
        return [[work.request_id for work in step.work] for step in runner_of(self.engine).launched]

    def answer(self, name: int, num_tokens: int = NUM_TOKENS) -> tuple[str, list[int]]:
        """Text and tokens that request `name` gets."""
        token_ids = answer_alone(prompt_of(name), num_tokens, ignore_eos=True)
        return Words().decode(token_ids, skip_special_tokens=True), token_ids


def prompt_of(name: int) -> list[int]:
    return [100 + name] * NUM_TOKENS


class CoreThread:
    """In place of a multiprocessing process: runs the core's own code over the sockets in the directory."""

    def __init__(self, gate: Gate, directory: str) -> None:
        self.gate, self.directory = gate, directory
        self.mode = Path(directory).stat().st_mode & 0o777
        self.pid: int | None = None
        self.exitcode: int | None = None
        self.how_it_ends = -15  # the exit code, once it is told to end
        self.context = zmq.Context()
        self.sentinel, self._end = os.pipe()
        self.thread = threading.Thread(target=self.serve, name="core", daemon=True)

    def start(self) -> None:
        self.pid = os.getpid()
        self.thread.start()

    def serve(self) -> None:
        requests, outputs = self.context.socket(zmq.PULL), self.context.socket(zmq.PUSH)
        requests.bind(f"ipc://{self.directory}/requests")
        outputs.connect(f"ipc://{self.directory}/outputs")
        self.exitcode = 0
        try:
            start = decode_to_core(requests.recv())
            if self.gate.is_killed:  # it never says a word
                return
            engine_core._serve(start.config, requests, outputs)  # type: ignore[union-attr]
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
def gated_engine(gate: Gate, **flags: Any) -> Iterator[AsyncLLM]:
    """An AsyncLLM whose core is a thread with the gate's engine. The caller shuts it down."""
    config = EngineConfig(device="cpu", **flags)
    threads: list[CoreThread] = []

    def process(target: Any, args: tuple[str], **_: Any) -> CoreThread:
        assert target is engine_core.run_engine_core, f"expected run_engine_core in the other process, got {target}"
        threads.append(CoreThread(gate, *args))
        return threads[-1]

    spawn = SimpleNamespace(Process=process)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(core_client.multiprocessing, "get_context", lambda method: spawn))
        stack.enter_context(mock.patch.object(engine_core, "LLMEngine", gate.make_engine))
        stack.enter_context(mock.patch.object(EngineCore, "receive", lambda core: gate.receive(core)))
        stack.enter_context(mock.patch.object(CoreClient, "send", lambda client, message: gate.send(client, message)))
        stack.enter_context(mock.patch.object(async_engine, "load_tokenizer", lambda _: Words()))
        try:
            yield AsyncLLM(config)
        finally:
            for thread in threads:
                thread.join(DEADLINE_S)
                os.close(thread.sentinel)
