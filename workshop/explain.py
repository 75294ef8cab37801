"""What is written down about an exception in a test: the test's own sentence, or what was raised and where."""

from __future__ import annotations

import linecache
from collections.abc import Iterable
from pathlib import Path

import pytest

from workshop.bodies import MARKER, find_bodies
from workshop.course import WorkshopError

MAX_LINE_CHARS = 90


def leaf(error: BaseException) -> BaseException:
    """One error of an ExceptionGroup, an AssertionError if it has one. Any other error as it is."""
    while inner := getattr(error, "exceptions", None):
        error = next((each for each in inner if isinstance(each, AssertionError)), inner[0])
    return error


def explain(error: BaseException) -> str:
    """The test's own message, or else the one from Python or pytest."""
    text, kind = str(error).strip(), type(error).__name__
    if isinstance(error, SyntaxError):
        return f"{kind}: {error.msg}" + (f"\n{error.text.rstrip()}" if error.text else "")
    if isinstance(error, AssertionError):
        module, line = raised_by(error)
        return f"{kind}: {text}" if module.startswith("part") else text or line
    return text if isinstance(error, NotImplementedError | pytest.fail.Exception) else f"{kind}: {text}"


def raised_by(error: BaseException) -> tuple[str, str]:
    """The name of the module that raised it, and its line."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if frame is None:
        return "", ""
    line = linecache.getline(frame.tb_frame.f_code.co_filename, frame.tb_lineno)
    return frame.tb_frame.f_globals.get("__name__", ""), line.strip()


class Locator:
    """Names lines of the learner's copy. lent: the exercises whose bodies are the reference's."""

    def __init__(self, copy: Path, lent: Iterable[str]) -> None:
        self.copy = copy
        self.own: set[tuple[str, int]] = set()  # file and line number of what the learner wrote in the checked bodies
        for path in copy.rglob("*.py"):
            try:
                bodies = find_bodies(path.read_text(encoding="utf-8"), path.name)
            except (WorkshopError, UnicodeDecodeError):  # importing the file reports it
                continue
            for body in bodies.values():
                if body.name not in lent:
                    self.own |= {(str(path), body.first + 1 + n) for n in range(len(body.lines))}

    def locate(self, error: BaseException) -> tuple[str | None, str | None]:
        """See Failure: raised_at and called_from. An error that was caught and reported by a test counts, too."""
        if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_relative_to(self.copy):
            return self.line(error.filename, error.lineno or 0), None
        raised_at = called_from = None
        frame = error.__traceback__
        while frame is not None:
            file, number = frame.tb_frame.f_code.co_filename, frame.tb_lineno
            if Path(file).is_relative_to(self.copy):
                raised_at = self.line(file, number, frame.tb_frame.f_code.co_name)
                called_from = raised_at if (file, number) in self.own else called_from
            frame = frame.tb_next
        if raised_at is None and error.__context__ is not None:
            return self.locate(error.__context__)
        return raised_at, called_from

    def line(self, file: str, number: int, function: str | None = None) -> str:
        where = f"{Path(file).relative_to(self.copy).as_posix()}:{number}" + (f" in {function}" if function else "")
        text = linecache.getline(file, number).strip()
        return where if not function or not text or MARKER.fullmatch(text) else f"{where}: {text[:MAX_LINE_CHARS]}"
