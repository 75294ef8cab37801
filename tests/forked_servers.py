"""Servers of parts 3 and later that are forked by a process that has imported everything: see server_host.py.

The fixture `host` is in tests/conftest.py. One test per part starts it as a user does, in contract/test_process.py.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.process_checks import TIMEOUT_S, ServerClient, environment, refuses

DEADLINE_S = 60  # for what takes a second at most
LOOK_START = 'Look at __main__.py and, from part 5 on, api/core_client.py::CoreClient; README "Two processes".'
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
    """The engine's files there; torch has a folder of its own."""
    return [str(path) for folder in temporary.glob("llm-engine-*") for path in (folder, *folder.iterdir())]


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

    def start(
        self, part: str, *flags: str, slow: float = 0, step_s: float = 0, grace_s: float | None = None,
        counts_threads: bool = False, sigterm_after: str = "", forks_ranks: bool = False,
    ) -> ForkedServer:  # fmt: skip
        """slow: seconds that the core takes to load; step_s: that each step takes, so that a stream stays open;
        grace_s: for how long it serves after the engine's death; counts_threads: it loads the model itself, and prints
        how many threads that has started instead of serving; sigterm_after: SIGTERM comes as soon as it has made the
        core's "directory" or "process"; forks_ranks: the core forks its ranks, and no fork server has to import
        everything again."""
        directory = self.directory / str(self.num_servers)
        self.num_servers += 1
        (directory / "tmp").mkdir(parents=True)
        paths = {"stdout": directory / "stdout", "stderr": directory / "stderr", "temporary": directory / "tmp"}
        for name in ("stdout", "stderr"):
            paths[name].touch()
        pid = self.ask(
            part=part, argv=["--port", "0", "--device", "cpu", "--no-log-stats", *flags], slow=slow,
            step_s=step_s, grace_s=grace_s, counts_threads=counts_threads, sigterm_after=sigterm_after,
            forks_ranks=forks_ranks, timeout=TIMEOUT_S, **{name: str(path) for name, path in paths.items()},
        )["pid"]  # fmt: skip
        return ForkedServer(self, part, pid, **paths)

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
