"""Check the learner's exercises, each alone, then all together; once, or after every save."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from workshop.course import Exercise, Part, WorkshopError
from workshop.report import Report
from workshop.results import Result, State
from workshop.runner import Runner
from workshop.workspace import fingerprints, is_started, require_copy, sources
from workshop.wrong import find_lookalikes

WATCH_POLL_S = 0.2
Stamps = dict[str, tuple[int, int]]


@dataclass(slots=True)
class Checker:
    """Checks the named exercises of one part, or all started exercises if none is named.

    num_checks counts the runs of an exercise's tests.
    """

    part: Part
    names: list[str]
    runner: Runner
    report: Report
    num_checks: int = 0
    results: dict[str, Result] = field(default_factory=dict)
    together: Result | None = None
    checked: dict[str, str] = field(default_factory=dict)  # exercise -> the fingerprint it was last checked with

    def check(self, cancelled: Callable[[], bool] = lambda: False) -> bool:
        """Check what has changed since the last call, and report. Returns whether all requested exercises pass."""
        require_copy(self.part)
        exercises = self.part.select(self.names)
        prints = fingerprints(self.part)
        todo = [e for e in exercises if self.is_wanted(e) and self.checked.get(e.name) != prints[e.name]]
        for exercise in exercises:
            if not self.is_wanted(exercise):
                self.results.pop(exercise.name, None)
                self.checked.pop(exercise.name, None)
        for exercise in todo:
            result = self.run(exercise, cancelled)
            if result is None:
                return False
            self.results[exercise.name], self.checked[exercise.name] = result, prints[exercise.name]
            State.load(self.part).record(exercise, result, prints[exercise.name])
        passes = all(e.name in self.results and self.results[e.name].passes for e in exercises)
        if passes and not self.names and (todo or self.together is None):
            self.together = self.run_together(cancelled)
        self.report.results(self.part, exercises, self.results, self.together if passes else None)
        self.look_alike(exercises, cancelled)
        self.report.next_step(self.part, exercises, self.results)
        return passes and (self.together is None or self.together.passes)

    def is_wanted(self, exercise: Exercise) -> bool:
        return exercise.name in self.names or is_started(self.part, exercise)

    def run(self, exercise: Exercise, cancelled: Callable[[], bool]) -> Result | None:
        with self.report.working(f"checking {exercise.name}"):
            result = self.runner.run_exercise(exercise, cancelled=cancelled)
        self.num_checks += 1
        return result

    def run_together(self, cancelled: Callable[[], bool]) -> Result | None:
        """Run the tests on the learner's copy as it is, with nothing from the reference."""
        tests = dict.fromkeys(test for exercise in self.part.exercises for test in exercise.tests)
        with self.report.working("checking them together"):
            return self.runner.run(list(tests), [], cancelled=cancelled)

    def look_alike(self, exercises: list[Exercise], cancelled: Callable[[], bool]) -> None:
        """Say which known mistake the first failing exercise looks like."""
        for exercise in exercises:
            result = self.results.get(exercise.name)
            if result is not None and not result.passes and is_started(self.part, exercise):
                with self.report.working("comparing with known mistakes"):
                    found = find_lookalikes(self.part, exercise, result, self.runner, cancelled)
                self.report.lookalikes(exercise, found)
                return


def watch(checker: Checker, sleep: Callable[[float], None] = time.sleep) -> None:
    """Check now and after every save, until Ctrl-C. A save during a check cancels it and starts a new one."""
    while True:
        seen = stamps(checker.part)
        checker.report.clear()
        try:
            checker.check(cancelled=lambda seen=seen: stamps(checker.part) != seen)  # type: ignore[misc]
        except WorkshopError as error:
            checker.report.error(error)
        checker.report.watching()
        while stamps(checker.part) == seen:
            sleep(WATCH_POLL_S)


def stamps(part: Part) -> Stamps:
    """Modification time and size of each of the learner's files, without files that an editor just moved away."""
    found = {}
    for path in sources(part.copy):
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue
        found[str(path)] = (stat.st_mtime_ns, stat.st_size)
    return found
