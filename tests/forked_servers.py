"""Servers of parts 3 and later that are forked by a process that has imported everything: see server_host.py.

The fixture `host` is in tests/conftest.py. One test per part starts it as a user does, in contract/test_process.py.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.process_checks import TIMEOUT_S, ServerClient, environment, refuses
from workshop.failures.servers import children_of, command_line

DEADLINE_S = 60  # for what takes a second at most
LOOK_START = 'Look at __main__.py and, from part 5 on, api/core_client.py::CoreClient; README "Two processes".'
LOOK_ROUTER = "Look at router/__main__.py."
READY = (
    r"serving \S+ on http://127\.0\.0\.1:(?P<port>\d+) \((?:cpu|cuda), context of [\d,]+ tokens, "
    r"[\d,]+ KV blocks of \d+ tokens"
    r"(?:, engine core in process (?P<core>\d+)(?:, \d+)*(?:; kernels: [^)\n]+)?)?\)\n"
)
GREEDY = {"temperature": 0, "ignore_eos": True}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def sockets_in(temporary: Path) -> list[str]:
    """The engine's files there, and the fork server's; torch has a folder of its own."""
    folders = (folder for pattern in ("llm-*", "pymp-*") for folder in temporary.glob(pattern))
    return [str(path) for folder in folders for path in (folder, *folder.glob("*"))]


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"expected {what.rstrip('.')}. Nothing happened for {DEADLINE_S} s."
        time.sleep(0.005)


@dataclass
class ForkedServer(ServerClient):
    """A server that the host has forked. core: the process of its engine core, from part 5 on."""

    host: Host
    part: str
    pid: int
    stdout: Path
    stderr: Path
    temporary: Path
    url: str = ""
    core: int = 0

    def wait_until_ready(self) -> None:
        until(lambda: self.has_said_all() or not is_alive(self.pid), f"{self.part} to start. {LOOK_START}")
        said = self.stdout.read_text()
        match = re.fullmatch(READY, said)
        assert match, f"{self.part}: expected {READY!r}, got {said!r}, {self.stderr.read_text()!r}. {LOOK_START}"
        self.url, self.core = f"http://127.0.0.1:{match['port']}", int(match["core"] or 0)

    def wait_until_routing(self) -> None:
        """Of a router."""
        until(lambda: "\n" in self.stdout.read_text() or not is_alive(self.pid), f"{self.part} to start. {LOOK_ROUTER}")
        said = self.stdout.read_text()
        match = re.match(r"routing on (\S+) ", said)
        assert match, f"{self.part}: expected 'routing on' and a URL, got {said!r}, {self.stderr.read_text()!r}"
        self.url = match[1]

    def has_said_all(self) -> bool:
        said = self.stdout.read_text()
        return "serving" in said and said.endswith("\n")

    def wait_until_loading(self) -> None:
        """Of a slow one."""
        until(lambda: self.stdout.read_text().endswith("\n"), f"the core to begin to load. {LOOK_START}")
        said = self.stdout.read_text()
        match = re.fullmatch(r"loading (\d+)\n", said)
        assert match, f"{self.part}: expected 'loading' and a process id, got {said!r}. {LOOK_START}"
        self.core = int(match[1])

    def ranks(self) -> list[int]:
        """The processes of the core's ranks, which it or its fork server has forked, oldest first."""
        started = children_of(self.core)
        return [rank for each in started if "forkserver" in command_line(each) for rank in children_of(each)] or started

    def wait(self) -> int | None:
        """Its exit status."""
        return self.host.ask(wait=self.pid, timeout=DEADLINE_S)["status"]

    def check_end(self, status: int, errors: str, look: str) -> None:
        """The exit status, what stderr says (a pattern), and that all processes are gone with all their files."""
        got, said = self.wait(), self.stderr.read_text()
        assert got == status, f"{self.part}: expected exit status {status}, got {got}; stderr: {said!r}. {look}"
        assert re.fullmatch(errors, said), f"{self.part}: expected {errors!r} on stderr, got {said!r}. {look}"
        if self.core:
            until(lambda: not is_alive(self.core), f"the core of {self.part}, process {self.core}, to end. {look}")
        until(lambda: not self.host.ask(alive=True)["alive"], f"all processes of {self.part} to end. {look}")
        found = sockets_in(self.temporary)
        assert not found, f"{self.part} left behind: {found}. {look}"
        if self.url:
            until(lambda: refuses(self.port), f"the port of {self.part} to be closed. {look}")


class ForkedProcess:
    """Like subprocess.Popen, of a process that the host has forked."""

    def __init__(self, host: Host, pid: int) -> None:
        self.host, self.pid, self.returncode = host, pid, None

    def poll(self) -> int | None:
        return self._ask(0)

    def wait(self, timeout: float = DEADLINE_S) -> int:
        status = self._ask(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ask(self, timeout_s: float) -> int | None:
        if self.returncode is None:
            self.returncode = self.host.ask(wait=self.pid, timeout=timeout_s)["status"]
        return self.returncode


class Host:
    """Forks servers; see server_host.py."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.num_servers = directory, 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.server_host"], env=environment(*map(Path, filter(None, sys.path))),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def ask(self, **order: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the host of the servers has died"
        return json.loads(line)

    def start(self, part: str, *flags: str, **changes: Any) -> ForkedServer:
        """An engine and its server. changes: see fork()."""
        return self._start(part, ["--device", "cpu", "--no-log-stats", *flags], **changes)

    def route(self, module: str, *flags: str) -> ForkedServer:
        """A router that serves; its engines may still start."""
        router = self._start(module, flags)
        router.wait_until_routing()
        return router

    def _start(self, module: str, flags: Sequence[str], **changes: Any) -> ForkedServer:
        directory = self.directory / str(self.num_servers)
        self.num_servers += 1
        (directory / "tmp").mkdir(parents=True)
        paths = {"stdout": directory / "stdout", "stderr": directory / "stderr", "temporary": directory / "tmp"}
        for name in ("stdout", "stderr"):
            paths[name].touch()
        return ForkedServer(self, module, self.fork(module, ["--port", "0", *flags], **paths, **changes), **paths)

    def fork(
        self, module: str, argv: Sequence[str], stdout: Path, stderr: Path, temporary: Path,
        env: Mapping[str, str] | None = None, slow: float = 0, step_s: float = 0, grace_s: float | None = None,
        counts_threads: bool = False, sigterm_after: str = "", forks_ranks: bool = False,
    ) -> int:  # fmt: skip
        """`python -m module argv…`: its process.

        env: variables besides the host's. slow: seconds that the core takes to load; step_s: that each step takes, so
        that a stream stays open; grace_s: for how long it serves after the engine's death; counts_threads: it loads the
        model itself, and prints how many threads that has started instead of serving; sigterm_after: SIGTERM comes as
        soon as it has made the core's "directory" or "process"; forks_ranks: the core forks its ranks, and no fork
        server has to import everything again.
        """
        return self.ask(
            part=module.partition(".")[0], module=module, argv=[*argv], stdout=str(stdout), stderr=str(stderr),
            temporary=str(temporary), env=dict(env or {}), slow=slow, step_s=step_s, grace_s=grace_s,
            counts_threads=counts_threads, sigterm_after=sigterm_after, forks_ranks=forks_ranks, timeout=TIMEOUT_S,
        )["pid"]  # fmt: skip

    def serve(self, part: str, *flags: str, **changes: Any) -> ForkedServer:
        """One that is ready."""
        server = self.start(part, *flags, **changes)
        server.wait_until_ready()
        return server

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(TIMEOUT_S)
        self.process.stdout.close()


@contextlib.contextmanager
def in_the_background(*works: Callable[[], Any], look: str) -> Iterator[list[Any]]:
    """What each of them returns, once the block has ended."""
    results: list[Any] = [None] * len(works)

    def run(number: int) -> None:
        try:
            results[number] = works[number]()
        except httpx.HTTPError as error:
            results[number] = error

    threads = [threading.Thread(target=functools.partial(run, number), daemon=True) for number in range(len(works))]
    for thread in threads:
        thread.start()
    yield results
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), f"a client still waits for its answer. {look}"
