"""Replicas that the router starts itself, on this machine: each a server in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

PART = __name__.partition(".")[0]
START_TIMEOUT_S = 600.0
END_TIMEOUT_S = 75.0  # longer than a server takes to finish its open requests


class StartedReplica(Protocol):
    """A replica that the router has started. url: where it serves."""

    url: str

    async def wait(self) -> str:
        """Wait until it has ended. Returns how, for a log line."""

    async def stop(self) -> None:
        """End it, after its open requests."""


Start = Callable[[Sequence[str]], Awaitable[StartedReplica]]  # with these flags; raises OSError if it doesn't serve


class ReplicaProcess:
    """`python -m part10_data_parallelism --port 0 flags…`. It ends with this process, also on SIGKILL (Linux)."""

    def __init__(self, process: Process) -> None:
        self.process, self.url, self.last_error = process, "", "no error message"
        self.forwarding = asyncio.create_task(self._forward_errors())

    @classmethod
    async def start(cls, flags: Sequence[str], host: str = "127.0.0.1") -> ReplicaProcess:
        """Returns when it serves. Raises OSError, with its last line, if it does not."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", PART, "--host", host, "--port", "0", *flags,
            stdout=PIPE, stderr=PIPE, start_new_session=True, preexec_fn=_end_with_parent,
        )  # fmt: skip
        replica = cls(process)
        try:
            await asyncio.wait_for(replica._wait_until_it_serves(), START_TIMEOUT_S)
        except BaseException as error:
            replica._send(signal.SIGKILL)
            replica.forwarding.cancel()
            if isinstance(error, asyncio.TimeoutError):
                raise OSError(f"a replica did not start within {START_TIMEOUT_S:g} s") from None
            raise
        return replica

    async def _wait_until_it_serves(self) -> None:
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        if (match := re.search(rb"http://\S+:\d+", line)) is None:
            if not line:
                await self.forwarding  # to the last line
            raise OSError(f"a replica did not start: {self.last_error}")
        self.url = match[0].decode()

    async def _forward_errors(self) -> None:
        """What it says on standard error, with its address once it has one."""
        assert self.process.stderr is not None
        rest = b""
        while chunk := await self.process.stderr.read(65_536):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._note(line)
        self._note(rest)

    def _note(self, line: bytes) -> None:
        if text := line.decode(errors="replace").strip():
            self.last_error = text
            if self.url:
                print(f"[{self.url}] {text}", file=sys.stderr, flush=True)

    async def wait(self) -> str:
        status = await self.process.wait()
        return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"

    async def stop(self) -> None:
        """With SIGTERM, so that it finishes its open requests; in the end with SIGKILL."""
        self._send(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.process.wait(), END_TIMEOUT_S)
        except asyncio.TimeoutError:
            self._send(signal.SIGKILL)
            await self.process.wait()
        self.forwarding.cancel()

    def _send(self, number: signal.Signals) -> None:
        """Not with Process.send_signal(): that takes the status of a process that has just ended from asyncio."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)


def _end_with_parent() -> None:
    """In the child, before exec: ask Linux for SIGTERM when the parent dies."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
