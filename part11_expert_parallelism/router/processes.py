"""Replicas that the router starts itself, on this machine: each a server in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from common.serve import end_with_parent

PART = __name__.partition(".")[0]
START_TIMEOUT_S = 600.0
END_TIMEOUT_S = 75.0  # longer than a server takes to finish its open requests
SHORT_END_TIMEOUT_S = 10.0  # for one that has none


class StartedReplica(Protocol):
    """A replica that the router has started. url: where it serves."""

    url: str

    async def wait(self) -> str:
        """Wait until it has ended. Returns how, for a log line."""

    async def stop(self, timeout_s: float = END_TIMEOUT_S) -> None:
        """End it, after its open requests, but within timeout_s."""


Start = Callable[[Sequence[str]], Awaitable[StartedReplica]]  # with these flags; raises OSError if it doesn't serve


def processes_with_gpus(num_gpus: int) -> Start:
    """Starts replicas as processes that each have num_gpus GPUs for themselves (0: all see all GPUs). An OSError says
    when all GPUs are in use."""
    in_use = set[int]()  # numbers of replicas: each has its GPUs

    async def start(flags: Sequence[str]) -> StartedReplica:
        number = next(number for number in itertools.count() if number not in in_use)
        env = gpus_of(number, num_gpus)
        in_use.add(number)
        try:
            replica = await ReplicaProcess.start(flags, env=env)
        except BaseException:
            in_use.remove(number)
            raise
        replica.ended.add_done_callback(lambda _: in_use.discard(number))
        return replica

    return start


def gpus_of(number: int, num_gpus: int) -> dict[str, str]:
    """The environment variable that shows a replica its GPUs, of those that this process may use. Raises OSError if
    they don't suffice."""
    if num_gpus == 0:
        return {}
    mine = range(number * num_gpus, (number + 1) * num_gpus)
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(gpu) for gpu in mine]
    if allowed is not None:
        names = [name for name in allowed.split(",") if name][mine.start : mine.stop]
    if len(names) < num_gpus:
        raise OSError(f"no {num_gpus} GPUs are left for a replica: CUDA_VISIBLE_DEVICES is {allowed}")
    return {"CUDA_VISIBLE_DEVICES": ",".join(names)}


class ReplicaProcess:
    """`python -m part11_expert_parallelism --port 0 flags…`. It ends with this process, also on SIGKILL (Linux)."""

    def __init__(self, process: Process) -> None:
        self.process, self.url, self.last_error = process, "", ""
        self.forwarding = asyncio.create_task(self._forward_errors())
        self.ended = asyncio.create_task(process.wait())

    @classmethod
    async def start(
        cls, flags: Sequence[str], host: str = "127.0.0.1", env: Mapping[str, str] | None = None
    ) -> ReplicaProcess:
        """Returns when it serves. env: in addition to this process's. Raises OSError, with its last line, if it does
        not."""
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", PART, "--host", host, "--port", "0", *flags,
                stdout=PIPE, stderr=PIPE, start_new_session=True, preexec_fn=end_with_parent(),
                env={**os.environ, **(env or {})},
            )  # fmt: skip
        except ValueError as error:  # a NUL in a flag
            raise OSError(f"a replica did not start: {error}") from error
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
            raise OSError(f"a replica did not start: {self.last_error or await self.wait()}")
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

    async def stop(self, timeout_s: float = END_TIMEOUT_S) -> None:
        """With SIGTERM, so that it finishes its open requests; after timeout_s with SIGKILL."""
        self._send(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.process.wait(), timeout_s)
        except asyncio.TimeoutError:
            self._send(signal.SIGKILL)
            await self.process.wait()
        self.forwarding.cancel()

    def _send(self, number: signal.Signals) -> None:
        """Not with Process.send_signal(): that takes the status of a process that has just ended from asyncio."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)
