"""What is written down about an exception in a test: the test's own sentence, or what was raised and where."""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from workshop.bodies import find_bodies, language_of
from workshop.course import WorkshopError
from workshop.kernel_sources import FOLDER
from workshop.workspace import sources

MAX_LINE_CHARS = 90
# Errors of part 15's CUDA C++: their text names the lines, and no frame of Python's traceback does.
COMPILE_ERROR, KERNEL_ERROR = "CompileError", "KernelError"
BLANK_KERNEL = re.compile(r"\bpart\d\d \w+: .*", re.DOTALL)
COMPILER_MESSAGE = re.compile(r"^\S.*[:)] (?:fatal )?error\b.*:.*(?:\n[ \t].*)*", re.MULTILINE)  # and what it quotes
SOURCE_LINE = re.compile(r"([\w./-]+\.cuh?)[:(](\d+)")  # as g++, clang++ and nvcc write it


def leaf(error: BaseException) -> BaseException:
    """One error of an ExceptionGroup, an AssertionError if it has one. Any other error as it is."""
    while inner := getattr(error, "exceptions", None):
        error = next((each for each in inner if isinstance(each, AssertionError)), inner[0])
    return error


def explain(error: BaseException) -> str:
    """The test's own message, or else the one from Python, pytest, a compiler or a kernel."""
    text, kind = str(error).strip(), type(error).__name__
    if isinstance(error, SyntaxError):
        return f"{kind}: {error.msg}" + (f"\n{error.text.rstrip()}" if error.text else "")
    if isinstance(error, AssertionError):
        module, line = raised_by(error)
        return f"{kind}: {text}" if module.startswith("part") else text or line
    if kind == KERNEL_ERROR and (blank := BLANK_KERNEL.search(text)):
        return blank[0]
    if kind == COMPILE_ERROR and (first := COMPILER_MESSAGE.search(text)):
        return f"{kind}: {first[0]}"
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
        for path in sources(copy):
            try:
                bodies = find_bodies(path.read_text(encoding="utf-8"), path.name)
            except (WorkshopError, UnicodeDecodeError):  # importing or compiling the file reports it
                continue
            for body in bodies.values():
                if body.name not in lent:
                    self.own |= {(str(path), body.first + 1 + n) for n in range(len(body.lines))}

    def locate(self, error: BaseException) -> tuple[str | None, str | None]:
        """See Failure: raised_at and called_from. An error that was caught and reported by a test counts, too."""
        if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_relative_to(self.copy):
            return self.line(error.filename, error.lineno or 0), None
        if type(error).__name__ in (COMPILE_ERROR, KERNEL_ERROR):
            return self.locate_in_kernels(str(error))
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

    def locate_in_kernels(self, text: str) -> tuple[str | None, str | None]:
        """The line of CUDA C++ that an error's text names, and the first one that the learner wrote."""
        first = COMPILER_MESSAGE.search(text)
        end = first.end() if first else len(text)
        lines, own = [], []
        for match in SOURCE_LINE.finditer(text):
            path, number = self.copy / FOLDER / match[1], int(match[2])
            if path.is_file() and path.is_relative_to(self.copy):
                lines += [self.line(str(path), number)] if match.start() < end else []
                own += [self.line(str(path), number)] if (str(path), number) in self.own else []
        return (lines[-1], own[0] if own else lines[-1]) if lines else (None, None)

    def line(self, file: str, number: int, function: str | None = None) -> str:
        where = f"{Path(file).relative_to(self.copy).as_posix()}:{number}" + (f" in {function}" if function else "")
        text = linecache.getline(file, number).strip()
        is_plain = not function or not text or language_of(file).marker.fullmatch(text)
        return where if is_plain else f"{where}: {text[:MAX_LINE_CHARS]}"
