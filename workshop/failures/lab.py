"""One run of a scenario: its processes, what it asks the learner, what it waits for, what it checks."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType

from rich.text import Text

from workshop.course import WorkshopError
from workshop.failures.checks import CheckFailed, first_difference, until
from workshop.failures.clients import Clients
from workshop.failures.scenario import Scenario
from workshop.failures.servers import Server
from workshop.report import Report

NEVER_S = 1e9  # the learner may take a break


class Lab:
    """A scenario calls start(), predict(), break_it() and the checks, in this order.

    is_auto: break_it() does it, instead of the learner. prediction: a letter, asked for if it is None and is_auto is
    false. folder: for files, removed in the end.
    """

    def __init__(self, scenario: Scenario, report: Report, is_auto: bool, prediction: str | None = None) -> None:
        self.scenario, self.report, self.is_auto, self.prediction = scenario, report, is_auto, prediction
        self.servers: list[Server] = []
        self.clients: list[Clients] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Lab:
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="lab-")))
        self._stack.callback(self._end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End all processes, however the run has ended, and remove all files."""
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must leave nothing behind
        try:
            with self.report.working("Ending all processes …"):
                self._stack.close()
        finally:
            signal.signal(signal.SIGINT, previous)

    def _end(self) -> None:
        for clients in self.clients:
            clients.leave()
        for server in self.servers:
            server.process.terminate()  # all at the same time
        for server in self.servers:
            server.end()

    # Processes

    def start(self, module: str, *flags: str, **env: str) -> Server:
        """Start a server, which is ready after wait_until_ready(). env: in addition to this process's."""
        server = Server.start(module, flags, self.folder, len(self.servers), env)
        self.servers.append(server)
        self.say(f"$ {server.name}", "cyan")
        return server

    def wait_until_ready(self) -> None:
        """Of all servers: they load at the same time."""
        with self.report.working("The servers are starting …"):
            for server in self.servers:
                if not server.url:
                    server.wait_until_ready()
                    core = f", its engine core is process {server.core}" if server.core else ""
                    self.say(f"process {server.pid} serves on {server.url}{core}", "dim")

    def stream(self, server: Server, prompts: Sequence[str], max_tokens: int) -> Clients:
        """Clients that stream answers until they are stopped, and in any case until the end of the run."""
        clients = Clients(server.url, prompts, max_tokens)
        self.clients.append(clients)
        return clients

    def at_the_end(self, undo: Callable[[], object]) -> None:
        """Call this before any process is ended, however the run ends."""
        self._stack.callback(undo)

    # What the learner reads and does

    def say(self, text: str = "", style: str | None = None) -> None:
        self.report.say(text, style, indent=2)

    def title(self, text: str) -> None:
        self.report.say()
        self.report.say(text, "bold")

    def table(self, rows: Iterable[tuple[str, object, object]]) -> None:
        """Evidence: name, before, after."""
        given = [("", "before", "after"), *((name, str(before), str(after)) for name, before, after in rows)]
        widths = [max(len(row[column]) for row in given) for column in range(3)]
        for number, (name, before, after) in enumerate(given):
            line = f"{name:<{widths[0]}}  {before:>{widths[1]}}  {after:>{widths[2]}}"
            self.say(line, None if number else "dim")

    def predict(self) -> None:
        """Ask the question, and keep the letter that the learner answers with. Raises WorkshopError without input."""
        self.title("Predict")
        self.say(self.scenario.question)
        for letter, choice in self.scenario.choices.items():
            self.say(f"  {letter}  {choice.text}")
        letters = ", ".join(self.scenario.choices)
        while self.prediction is None and not self.is_auto:
            try:
                given = self.report.console.input(Text(f"  Your prediction ({letters}): ")).strip().lower()
            except EOFError:
                raise WorkshopError("no input for the prediction: use --predict LETTER, or --auto") from None
            if given in self.scenario.choices:
                self.prediction = given
            else:
                self.say(f"expected one of {letters}, got {given!r}", "red")
        if self.prediction is not None:
            self.say(f"Your prediction: {self.prediction}", "bold")

    def break_it(
        self, how: str, command: str, happened: Callable[[], object], what: str,
        do: Callable[[], object] | None = None,
    ) -> None:  # fmt: skip
        """Tell the learner how to break it, and wait until it has happened.

        command: for another terminal; empty if `how` says it all. what: has happened then. do: breaks it with --auto
        (None: the command does).
        """
        self.title("Break it")
        self.say(f"{how} In another terminal:" if command and not self.is_auto else how)
        if command:
            self.say(f"$ {command}", "cyan")
        if self.is_auto:
            (do or (lambda: run_in_shell(command)))()
            until(happened, what)
        else:
            with self.report.working("Waiting for you; Ctrl-C ends this exercise and all its processes …"):
                until(happened, what, NEVER_S)
        self.say(f"Seen: {what}.", "yellow")

    # Checks

    def check(self, what: str, expected: object, found: object) -> None:
        """Raises CheckFailed if they differ."""
        if expected != found:
            raise CheckFailed(what, expected, found)
        self.say(f"✓ {what}: {'none' if found == [] else found}", "green")

    def check_that(self, what: str, is_true: bool, expected: str, found: object) -> None:
        """Raises CheckFailed if it isn't. expected: in words."""
        if not is_true:
            raise CheckFailed(what, expected, found)
        self.say(f"✓ {what}: {found}", "green")

    def check_answers(self, what: str, expected: Sequence[list[int]], found: Sequence[list[int]]) -> None:
        """Greedy answers, token for token. Raises CheckFailed naming the first token that differs."""
        for number, (right, got) in enumerate(zip(expected, found, strict=True)):
            if (difference := first_difference(right, got)) is not None:
                raise CheckFailed(f"{what}, answer {number}", *difference)
        num_tokens = sum(map(len, found))
        self.say(f"✓ {what}: {len(found)} of {len(expected)} equal, token for token ({num_tokens} tokens)", "green")

    def wait_until_free(self, *servers: Server) -> None:
        """Until no request runs or waits, and all KV blocks are free. Raises CheckFailed if that does not come."""
        for server in servers:

            def is_free(server: Server = server) -> bool:
                found = server.counters()
                names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
                return not any(found[name] for name in names)

            until(is_free, f"all KV blocks of {server.url} to be free, and no request to be left")
        num_blocks = sum(server.num_blocks for server in servers)
        self.say(f"✓ KV blocks that are free again: {num_blocks} of {num_blocks}", "green")


def run_in_shell(command: str) -> None:
    """Raises CheckFailed if the command fails."""
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    if done.returncode != 0:
        raise CheckFailed(f"the command {command}", "exit status 0", f"{done.returncode}: {done.stderr.strip()}")
