"""Run an ASGI app with uvicorn, on a socket that is bound first, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import ipaddress
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from common import startup
from common.cli import option
from common.errors import FieldError

DRAIN_TIMEOUT_S = 60  # how long SIGTERM waits for open requests; a second signal ends the wait
END_TIMEOUT_S = 5.0  # how long they then have to send their clients an error
DEATH_GRACE_S = 1.0  # how long the server still answers after its engine has died: open requests, and /health (503)


@dataclass(frozen=True, slots=True)
class ListenConfig:
    """Where a server listens, and to whom. Raises FieldError for a wrong port and a key that no client can send."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 picks a free one")
    api_key: str | None = option(None, "bearer token that clients must send (None: no check)")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise FieldError("port", f"expected 0 to 65535, got {self.port}")
        if self.api_key is not None and not re.fullmatch("[!-~]([ -~]*[!-~])?", self.api_key):
            raise FieldError("api_key", "expected ASCII characters without leading or trailing spaces, or none")


@dataclass(frozen=True, slots=True)
class ServerConfig(ListenConfig):
    """The flags that concern only an engine's server."""

    allowed_origins: str | None = option(
        None, "web pages that may use this server: origins, comma-separated, or * (None: those of this machine)"
    )
    root_path: str = option("", "the path prefix under which a proxy exposes this server")
    log_stats: bool = option(True, "log a line of statistics every 10 seconds while there is activity")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def show_url(host: str, port: int) -> str:
    """The URL of an address; an IPv6 address needs brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 picks a free one. Raises OSError naming the address.

    It is created with IPPROTO_TCP, because asyncio disables Nagle's algorithm only then. With Nagle's algorithm, a
    small event of a stream can wait 40 ms for the acknowledgment of the previous one.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
        except BaseException:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:  # UnicodeError: an invalid host name
        reason = error.strerror if isinstance(error, OSError) else error
        raise OSError(f"cannot listen on {host} port {port}: {reason}") from error
    return listener


class _Server(uvicorn.Server):
    """Calls three functions of app.state, if it has them.

    begin_drain is called when the server begins to shut down, right before it stops accepting requests. end_requests
    ends all open requests with an error; it blocks. log_stats is called ten times a second with time.monotonic(), if
    logs_stats is true.
    """

    def __init__(
        self,
        app: Any,
        on_started: Callable[[], None],
        cause_of_death: Callable[[], str | None] = lambda: None,
        logs_stats: bool = False,
    ) -> None:
        timeout_s = math.ceil(DRAIN_TIMEOUT_S + END_TIMEOUT_S)
        self.app = app
        log_config = (
            None if logging.getLogger().handlers else uvicorn.config.LOGGING_CONFIG
        )  # the program's own, if any
        config = uvicorn.Config(
            app,
            log_config=log_config,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=timeout_s,
            lifespan="on",
        )
        super().__init__(config)
        self.on_started, self.cause_of_death = on_started, cause_of_death
        self.log_stats = self._hook("log_stats") if logs_stats else None
        self.died_at: float | None = None
        self.is_hurried = False
        self.is_ending = False  # the engine is shut down, which is no death

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets open requests finish, the second ends them."""
        self.is_hurried |= self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        shut_down_app = self.lifespan.shutdown

        async def note_death_first() -> None:
            self._note_death()
            await shut_down_app()

        self.lifespan.shutdown = note_death_first  # type: ignore[method-assign]
        if (begin_drain := self._hook("begin_drain")) is not None:
            begin_drain()
        ending = asyncio.ensure_future(self._end_requests())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    def _note_death(self) -> None:
        if self.died_at is None and not self.is_ending and self.cause_of_death() is not None:
            self.died_at = time.monotonic()

    async def _end_requests(self) -> None:
        """Wait for DRAIN_TIMEOUT_S or a second signal, then end all open requests."""
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        while not self.is_hurried and time.monotonic() < deadline:
            self._log_stats()
            await asyncio.sleep(0.05)
        self._note_death()
        self.is_ending = True
        if (end_requests := self._hook("end_requests")) is not None:
            await asyncio.to_thread(end_requests)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_started()

    async def on_tick(self, counter: int) -> bool:
        self._log_stats()
        self._note_death()
        should_exit = await super().on_tick(counter)
        return should_exit or (self.died_at is not None and time.monotonic() > self.died_at + DEATH_GRACE_S)

    def _log_stats(self) -> None:
        if self.log_stats is not None:
            self.log_stats(time.monotonic())

    def _hook(self, name: str) -> Callable[..., None] | None:
        return getattr(getattr(self.app, "state", None), name, None)


def serve_app(
    app: Any, listener: socket.socket, message: str, cause_of_death: Callable[[], str | None] = lambda: None
) -> None:
    """Serve until SIGTERM or Ctrl-C; open requests are finished first. Prints message once requests are accepted.

    cause_of_death: returns why the engine died, None while it is alive. After a death the server prints the cause as
    its last line and exits with status 1.
    """

    def on_started() -> None:
        startup.end()
        print(message, flush=True)

    # uvicorn raises the signal again when it is done, which would turn a clean exit into a nonzero exit status.
    previous = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server = _Server(app, on_started, cause_of_death, logs_stats=True)
        server.run(sockets=[listener])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if server.died_at is not None:
        sys.exit(f"error: {cause_of_death()}")


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Run the block without OpenMP workers: for a thread that loads a model that another thread runs.

    OpenMP keeps a worker pool per calling thread. With more workers than cores, they sleep between operations instead
    of spinning, and a step of a small model takes twice as long.
    """
    import torch  # not at the top: a router needs none

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@contextlib.contextmanager
def running_app(app: Any) -> Iterator[str]:
    """Serve the app in a thread, on a free port of 127.0.0.1, for tests and benchmarks. Yields its base URL."""
    listener = listen("127.0.0.1", 0)
    port, started = listener.getsockname()[1], threading.Event()
    server = _Server(app, started.set)

    def run() -> None:
        with listener, contextlib.suppress(SystemExit):  # uvicorn raises it if the app does not start
            server.run(sockets=[listener])

    thread = threading.Thread(target=run, name="uvicorn")
    thread.start()
    try:
        while not started.wait(0.05):
            if not thread.is_alive():
                raise RuntimeError("the server exited before it was ready")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def server_process(
    part: str, *flags: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Iterator[str]:
    """Run `python -m part --port 0 flags…` in a separate process, for benchmarks. Yields its base URL.

    env, cwd: its environment and its working directory (None: this process's). The process ends with this one, also on
    SIGKILL (Linux). Raises RuntimeError, with the end of its output, if it fails.
    """
    command = [sys.executable, "-m", part, "--port", "0", *flags]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env, cwd=cwd, preexec_fn=end_with_parent()
        )  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            match = re.search(r"http://\S+:\d+", line)
            if match is None:
                process.wait()
                errors.seek(0)
                raise RuntimeError(f"{' '.join(command[1:])} did not start: {line}{errors.read()[-2000:]}")
            yield match[0]
        finally:
            process.terminate()
            try:
                process.wait(DRAIN_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def end_with_parent() -> Callable[[], None]:
    """What the child of this process calls before exec, as Popen's preexec_fn: it asks Linux for SIGTERM when its
    parent dies, and ends at once if it has died before that."""
    parent = os.getpid()

    def ask() -> None:
        if sys.platform == "linux":
            pr_set_pdeathsig = 1
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return ask
