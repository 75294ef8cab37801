"""The API process's side of the engine core: start its process, exchange messages, notice when it ends, stop it."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import multiprocessing
import signal
import tempfile
from collections.abc import Callable
from multiprocessing.process import BaseProcess

import zmq

from common.errors import FieldError

from ..config import EngineConfig
from ..core.engine_core import run_engine_core
from ..messages import CoreGroup, FromCore, Ready, Start, StartFailed, ToCore, decode_from_core, encode

SHUTDOWN_TIMEOUT_S = 10  # for the running step; then the process is killed
POLL_MS = 100  # how often to check that a core is alive while it loads


class CoreClient:
    """Starts an engine core and waits until it is ready. Raises FieldError or OSError if the core cannot start.

    The sockets are files in a directory that only this user can enter. It is removed as soon as both ends are
    connected, so nothing is left behind whichever process is killed.
    """

    def __init__(self, config: EngineConfig, waits: bool = True, cores: CoreGroup | None = None) -> None:
        """waits: until it is ready. Otherwise the caller does, with wait_until_ready()."""
        self._context = zmq.Context()
        self._context.linger = 0  # however this process ends, it does not wait for a message that nobody takes
        self._requests, self._outputs = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        self._directory = tempfile.TemporaryDirectory(prefix="llm-engine-", ignore_cleanup_errors=True)  # mode 0700
        directory = self._directory.name
        self.process: BaseProcess = multiprocessing.get_context("spawn").Process(
            target=run_engine_core, args=(directory, *([cores.directory] if cores else [])), name="engine-core"
        )
        try:
            if (length := len(f"{directory}/requests")) > zmq.IPC_PATH_MAX_LEN:
                limit = f"a socket's path has at most {zmq.IPC_PATH_MAX_LEN} characters"
                raise OSError(f"{directory}/requests has {length} characters, and {limit}: set a shorter TMPDIR")
            self._requests.setsockopt(zmq.SNDHWM, 0)  # a send on the event loop must never wait
            self._requests.connect(f"ipc://{directory}/requests")  # a socket that connects may send at once
            self._outputs.bind(f"ipc://{directory}/outputs")
            self.process.start()
            atexit.register(self.shutdown)  # a daemon would be ended by multiprocessing, but can't start ranks
            self.send(Start(config, cores))
            if waits:
                self.wait_until_ready()
        except BaseException:
            self.shutdown()
            raise

    def wait_until_ready(self) -> None:
        """Raises FieldError or OSError if the core cannot start."""
        while not self.is_ready():
            pass

    def is_ready(self) -> bool:
        """Wait for the core up to POLL_MS. Raises FieldError or OSError if it cannot start."""
        if not self._outputs.poll(POLL_MS):
            if not self.process.is_alive() and not self._outputs.poll(0):
                raise OSError(f"the engine core did not start ({self.describe_exit()})")
            return False
        answer = decode_from_core(self._outputs.recv())
        if isinstance(answer, StartFailed):
            if answer.field is None:
                raise OSError(answer.message)
            raise FieldError(answer.field, answer.message.removeprefix(f"{answer.field}: "))
        assert isinstance(answer, Ready), f"expected Ready, got {answer}"
        self.ready = answer
        self._directory.cleanup()  # both ends are connected
        return True

    @property
    def processes(self) -> list[BaseProcess]:
        return [self.process]

    def send(self, message: ToCore) -> None:
        """Queue a message. Never waits."""
        self._requests.send(encode(message), zmq.NOBLOCK)

    def watch(
        self, loop: asyncio.AbstractEventLoop, on_outputs: Callable[[], None], on_death: Callable[[], None]
    ) -> None:
        """Let the loop call on_outputs when messages may have arrived, and on_death when the process has ended."""
        loop.add_reader(self._outputs, on_outputs)
        loop.add_reader(self.process.sentinel, on_death)
        loop.call_soon(on_outputs)  # the notification is edge-triggered, and messages may be waiting already

    def unwatch(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.remove_reader(self._outputs)
        loop.remove_reader(self.process.sentinel)

    def receive(self) -> list[FromCore]:
        """All messages that have arrived. It must empty the socket, or the loop is not notified of the next message."""
        messages = []
        with contextlib.suppress(zmq.Again):
            while True:
                messages.append(decode_from_core(self._outputs.recv(zmq.NOBLOCK)))
        return messages

    def wait_for_messages(self) -> None:
        """Wait up to POLL_MS for the last messages of a process that has ended: they may still be on their way."""
        self._outputs.poll(POLL_MS)

    def describe_exit(self) -> str:
        """How the process ended."""
        self.process.join(SHUTDOWN_TIMEOUT_S)
        status = self.process.exitcode
        if status is not None and status < 0:
            return f"killed by {signal.Signals(-status).name}"
        return f"exit status {status}"

    def shutdown(self) -> None:
        """Stop the process with SIGTERM, and with SIGKILL after SHUTDOWN_TIMEOUT_S. A second call does nothing."""
        if self.process.pid is not None:
            self.process.terminate()
            self.process.join(SHUTDOWN_TIMEOUT_S)
            if self.process.is_alive():
                self.process.kill()
                self.process.join()
        self._context.destroy()
        self._directory.cleanup()
        atexit.unregister(self.shutdown)  # now: a second signal may have ended the first call
