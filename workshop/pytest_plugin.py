"""A pytest plugin that writes events as JSON lines: tests collected, tests started, their outcomes and reasons."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

MAX_OUTPUT_CHARS = 2_000


class EventWriter:
    """Passed to pytest.main. copy: the learner's part, so that a failure can name the line in it."""

    def __init__(self, path: Path, copy: Path) -> None:
        self.file = path.open("w", encoding="utf-8")
        self.copy = copy

    def write(self, event: str, **fields: Any) -> None:
        self.file.write(json.dumps({"event": event, **fields}) + "\n")
        self.file.flush()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.write("collected", tests=[item.nodeid for item in session.items])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write("started", test=nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Generator[None, Any, Any]:
        report = yield
        if report.failed:
            assert call.excinfo is not None, "a failed test raised an exception"
            self.write_failure(item.nodeid, call.excinfo.value, str(report.longrepr), report.capstdout)
        elif report.when == "call" or report.skipped:
            self.write(report.outcome, test=item.nodeid)
        return report

    def pytest_exception_interact(self, node: pytest.Collector, call: pytest.CallInfo, report: Any) -> None:
        if isinstance(report, pytest.CollectReport) and call.excinfo is not None:  # the test's file cannot be imported
            self.write_failure(node.nodeid, call.excinfo.value, str(report.longrepr))

    def write_failure(self, test: str, error: BaseException, traceback: str, output: str = "") -> None:
        if isinstance(error, pytest.Collector.CollectError) and error.__cause__ is not None:
            error = error.__cause__
        self.write(
            "failed",
            test=test,
            message=explain(error),
            location=self.locate(error),
            traceback=traceback,
            output=output[-MAX_OUTPUT_CHARS:],
        )

    def locate(self, error: BaseException) -> str | None:
        """The deepest line of the learner's code in the traceback, or None."""
        if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_relative_to(self.copy):
            return f"{Path(error.filename).relative_to(self.copy).as_posix()}:{error.lineno}"
        found, frame = None, error.__traceback__
        while frame is not None:
            code = frame.tb_frame.f_code
            if Path(code.co_filename).is_relative_to(self.copy):
                file = Path(code.co_filename).relative_to(self.copy).as_posix()
                found = f"{file}:{frame.tb_lineno} in {code.co_name}"
            frame = frame.tb_next
        return found


def explain(error: BaseException) -> str:
    """The test's own message, or else the one from Python or pytest."""
    text = str(error).strip()
    if isinstance(error, AssertionError):
        message = text.partition("\nassert ")[0] or "assert"  # pytest appends the expression it evaluated
    elif isinstance(error, NotImplementedError | pytest.fail.Exception):
        message = text
    elif isinstance(error, SyntaxError):
        message = f"{type(error).__name__}: {error.msg}" + (f"\n{error.text.rstrip()}" if error.text else "")
    else:
        message = f"{type(error).__name__}: {text}"
    return "\n".join([message, *getattr(error, "__notes__", [])])
