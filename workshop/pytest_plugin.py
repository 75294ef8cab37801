"""A pytest plugin that writes events as JSON lines: tests collected, tests started, their outcomes and reasons."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from workshop.explain import Locator, explain, leaf
from workshop.kernel_sources import with_own_paths

MAX_OUTPUT_CHARS = 2_000


class EventWriter:
    """Passed to pytest.main. on_start is called when a test starts."""

    def __init__(self, path: Path, locator: Locator, on_start: Callable[[], None]) -> None:
        self.file = path.open("w", encoding="utf-8")
        self.locator, self.on_start = locator, on_start

    def write(self, event: str, **fields: Any) -> None:
        self.file.write(json.dumps({"event": event, **fields}) + "\n")
        self.file.flush()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.write("collected", tests=[item.nodeid for item in session.items])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.on_start()
        self.write("started", test=nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Generator[None, Any, Any]:
        report = yield
        if report.failed:
            assert call.excinfo is not None, "a failed test raised an exception"
            self.write_failure(item.nodeid, call.excinfo.value, str(report.longrepr), report.capstdout)
        elif report.when == "call" or report.skipped:
            self.write(report.outcome, test=item.nodeid, reason=reason_of(report))
        return report

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:  # a whole file
            self.write("skipped", test=report.nodeid, reason=reason_of(report))

    def pytest_exception_interact(self, node: pytest.Collector, call: pytest.CallInfo, report: Any) -> None:
        if isinstance(report, pytest.CollectReport) and call.excinfo is not None:  # the test's file cannot be imported
            self.write_failure(node.nodeid, call.excinfo.value, str(report.longrepr))

    def write_failure(self, test: str, error: BaseException, traceback: str, output: str = "") -> None:
        if isinstance(error, pytest.Collector.CollectError) and error.__cause__ is not None:
            error = error.__cause__
        error = leaf(error)
        raised_at, called_from = self.locator.locate(error)
        self.write(
            "failed",
            test=test,
            message=with_own_paths(explain(error), self.locator.copy),
            kind=type(error).__name__,
            raised_at=raised_at,
            called_from=called_from,
            traceback=with_own_paths(traceback, self.locator.copy),
            output=output[-MAX_OUTPUT_CHARS:],
        )


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test or a file is skipped; empty if it is not."""
    return str(report.longrepr[2]).removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
