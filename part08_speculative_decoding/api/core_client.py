"""The API process's end of the engine core: start its process, talk to it, notice its death, end it."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import shutil
import signal
import tempfile
from collections.abc import Callable
from multiprocessing.process import BaseProcess

import zmq

from common.errors import FieldError

from ..config import EngineConfig
from ..core.engine_core import run_engine_core
from ..messages import EngineCoreOutputs, PrefixCacheReset, Ready, Start, StartFailed, ToCore, decode_from_core, encode

SHUTDOWN_TIMEOUT_S = 10  # for the step that runs; then it is killed
POLL_MS = 100  # how often to look whether a core that loads is still alive


class CoreClient:
    """Starts an engine core and waits until it is ready. Raises FieldError or OSError, as the core did.

    The sockets are files in a directory that only this user can enter. It goes as soon as both ends are connected, so
    nothing is left behind, whoever is killed and when.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._context = zmq.Context()
        self._requests, self._outputs = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        directory = tempfile.mkdtemp(prefix="llm-engine-")  # mode 0700
        self.process: BaseProcess = multiprocessing.get_context("spawn").Process(
            target=run_engine_core, args=(directory,), name="engine-core", daemon=True
        )
        try:
            self._requests.setsockopt(zmq.SNDHWM, 0)  # a send on the event loop must never wait
            self._requests.connect(f"ipc://{directory}/requests")  # who connects may send at once
            self._outputs.bind(f"ipc://{directory}/outputs")
            self.process.start()
            self.send(Start(config))
            self.ready = self._wait_until_ready()
        except BaseException:
            self.shutdown()
            raise
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def send(self, message: ToCore) -> None:
        """Does not wait."""
        self._requests.send(encode(message), zmq.NOBLOCK)

    def watch(
        self, loop: asyncio.AbstractEventLoop, on_outputs: Callable[[], None], on_death: Callable[[], None]
    ) -> None:
        """Have the loop call on_outputs when receive() may find something, and on_death when the process has ended."""
        loop.add_reader(self._outputs, on_outputs)
        loop.add_reader(self.process.sentinel, on_death)
        loop.call_soon(on_outputs)  # ZeroMQ tells of what is new, not of what is there

    def unwatch(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.remove_reader(self._outputs)
        loop.remove_reader(self.process.sentinel)

    def receive(self) -> list[EngineCoreOutputs | PrefixCacheReset]:
        """All that has come. It must be called until nothing is left, or the loop is not told of the next."""
        messages: list[EngineCoreOutputs | PrefixCacheReset] = []
        with contextlib.suppress(zmq.Again):
            while True:
                message = decode_from_core(self._outputs.recv(zmq.NOBLOCK))
                assert isinstance(message, EngineCoreOutputs | PrefixCacheReset), f"expected outputs, got {message}"
                messages.append(message)
        return messages

    def describe_exit(self) -> str:
        """How the process ended."""
        self.process.join(SHUTDOWN_TIMEOUT_S)
        status = self.process.exitcode
        if status is not None and status < 0:
            return f"killed by {signal.Signals(-status).name}"
        return f"exit status {status}"

    def shutdown(self) -> None:
        """End the process: politely, then by force. A second call does nothing."""
        if self.process.pid is not None:
            self.process.terminate()
            self.process.join(SHUTDOWN_TIMEOUT_S)
            if self.process.is_alive():
                self.process.kill()
                self.process.join()
        self._context.destroy(linger=0)

    def _wait_until_ready(self) -> Ready:
        while not self._outputs.poll(POLL_MS):
            if not self.process.is_alive() and not self._outputs.poll(0):
                raise OSError(f"the engine core did not start ({self.describe_exit()})")
        answer = decode_from_core(self._outputs.recv())
        if isinstance(answer, StartFailed):
            if answer.field is None:
                raise OSError(answer.message)
            raise FieldError(answer.field, answer.message.removeprefix(f"{answer.field}: "))
        assert isinstance(answer, Ready), f"expected Ready, got {answer}"
        return answer
