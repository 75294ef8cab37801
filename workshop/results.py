"""The results of an exercise's tests, and what is saved between commands."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import asdict, dataclass, field
from pathlib import Path

from workshop.course import Exercise, Part

TIMED_OUT_FRAME = re.compile(r'File "(.+)", line (\d+) in (\w+)')


@dataclass(frozen=True, slots=True)
class Failure:
    """One test that failed.

    message: the test's own; kind: the exception's name. raised_at: the innermost line of the learner's copy that the
    exception passed through; called_from: the innermost one that the learner wrote. None if there is no such line.
    """

    test: str
    message: str
    kind: str = ""
    raised_at: str | None = None
    called_from: str | None = None
    traceback: str = ""
    output: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of one exercise's tests. num_tests: tests to run, 0 if none could run. passed: the ids of those that
    have passed."""

    num_tests: int
    num_passed: int
    failures: tuple[Failure, ...] = ()
    passed: frozenset[str] = frozenset()

    @property
    def passes(self) -> bool:
        return not self.failures and self.num_passed > 0

    def of(self, exercise: Exercise) -> Result:
        """The part of a run without failures that belongs to one exercise."""
        own = frozenset(test for test in self.passed if any(is_in(test, place) for place in exercise.tests))
        return Result(len(own), len(own), (), own)


def is_in(test: str, place: str) -> bool:
    """Whether a test is the named one, one of its cases, or in the named file."""
    return test == place or test.startswith((f"{place}::", f"{place}["))


def read_result(events: Path, log: Path, copy: Path, status: int, limit_s: float) -> Result:
    """Build a Result from the plugin's events; a crash or timeout of pytest becomes a Failure too."""
    tests: set[str] = set()
    passed: set[str] = set()
    failures: dict[str, Failure] = {}
    reasons: dict[str, None] = {}  # of skipped tests
    current: str | None = "(import)"
    for line in events.read_text(encoding="utf-8").splitlines() if events.exists() else []:
        fields = json.loads(line)
        event = fields.pop("event")
        current = None
        if event == "collected":
            tests = set(fields["tests"])
        elif event == "started":
            current = fields["test"]
        elif event == "failed":
            failures.setdefault(fields["test"], Failure(**fields))
        elif event == "skipped":
            tests.discard(fields["test"])
            reasons[fields["reason"]] = None
        else:
            passed.add(fields["test"])
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    if current is not None and "(most recent call first)" in text:
        failures[current] = timed_out(current, text, copy, limit_s)
    elif reasons and not (current or failures or passed):
        failures["(pytest)"] = Failure("(pytest)", f"every test was skipped: {'; '.join(reasons)}", traceback=text)
    elif current is not None or not (failures or passed):
        test = current or "(pytest)"
        failures[test] = Failure(test, f"pytest ended early, {ending(status, text)}", traceback=text)
    passed -= failures.keys()
    tests |= {test for test in failures if "::" in test}
    return Result(len(tests | passed), len(passed), tuple(failures.values()), frozenset(passed))


def timed_out(test: str, text: str, copy: Path, limit_s: float) -> Failure:
    """The failure of a test that did not end, with the line that faulthandler wrote to the log."""
    line = None
    for file, number, function in TIMED_OUT_FRAME.findall(text):
        if Path(file).is_relative_to(copy):
            line = f"{Path(file).relative_to(copy).as_posix()}:{number} in {function}"
            break
    message = f"still running after {limit_s:g} s of processor time, so it was stopped. Is there an endless loop?"
    if "Timeout (" in text:
        message = "still waiting after minutes, so it was stopped. What does it wait for?"
    return Failure(test, message, "Timeout", line, line, traceback=text)


def ending(status: int, text: str) -> str:
    """What an exit status says, or else the last line of the output. A crash of compiled code shows as a signal."""
    if status >= 0:
        return f"with status {status}: {last_line(text)}"
    name = signal.Signals(-status).name
    is_bad_address = name in ("SIGSEGV", "SIGBUS")
    return f"by the signal {name}: {'is an index outside of its array?' if is_bad_address else last_line(text)}"


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


@dataclass(slots=True)
class Saved:
    """What is known of an exercise.

    fingerprint: of the code that was checked last, empty if none was; num_hints: hints shown; caught_up: the digest of
    the body that `catch-up` filled in.
    """

    fingerprint: str = ""
    num_tests: int = 0
    num_passed: int = 0
    passes: bool = False
    num_hints: int = 0
    caught_up: str = ""


@dataclass(slots=True)
class State:
    """The contents of workspace/.cache/partNN….json: exercise -> Saved."""

    path: Path
    saved: dict[str, Saved] = field(default_factory=dict)

    @classmethod
    def load(cls, part: Part) -> State:
        """An unreadable file counts as missing: a check rewrites it."""
        path = part.workspace / ".cache" / f"{part.name}.json"
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            return cls(path, {name: Saved(**fields) for name, fields in entries.items()})
        except (OSError, ValueError, TypeError, AttributeError):
            return cls(path)

    def of(self, exercise: Exercise) -> Saved:
        return self.saved.setdefault(exercise.name, Saved())

    def record(self, exercise: Exercise, result: Result, fingerprint: str) -> None:
        saved = self.of(exercise)
        saved.fingerprint, saved.passes = fingerprint, result.passes
        saved.num_tests, saved.num_passed = result.num_tests, result.num_passed
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({name: asdict(saved) for name, saved in self.saved.items()}), encoding="utf-8")


def last_rest_s(part: Part) -> float | None:
    """How long the rest of the part's tests took the last time they ended, in seconds. None if that isn't known."""
    try:
        return float(rest_path(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def record_rest_s(part: Part, seconds: float) -> None:
    path = rest_path(part)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{seconds:.1f}", encoding="utf-8")


def rest_path(part: Part) -> Path:
    return part.workspace / ".cache" / f"{part.name}-rest-seconds.txt"
