"""Check the learner's exercises with their own tests, then the whole part; once, or after every save."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from workshop.course import Exercise, Part, WorkshopError
from workshop.report import Report
from workshop.results import Result, State, last_rest_s, record_rest_s
from workshop.runner import Runner
from workshop.saves import Saves
from workshop.workspace import fingerprints, is_started, require_copy
from workshop.wrong import WrongSolution, find_lookalikes

Cancelled = Callable[[], bool]


@dataclass(slots=True)
class Checker:
    """Checks the named exercises of one part, or all if none is named; what is still blank is not run.

    num_checks counts how often an exercise was checked. rest: the outcome of the rest of the part's tests.
    """

    part: Part
    names: list[str]
    runner: Runner
    report: Report
    num_checks: int = 0
    results: dict[str, Result] = field(default_factory=dict)
    rest: Result | None = None
    checked: dict[str, str] = field(default_factory=dict)  # exercise -> the fingerprint it was last checked with

    def check(self, cancelled: Cancelled = lambda: False) -> bool:
        """Check what has changed since the last call, and report. Returns whether all requested exercises, and the rest
        of the part's tests, pass."""
        require_copy(self.part)
        exercises = self.part.select(self.names)
        started = [exercise for exercise in exercises if is_started(self.part, exercise)]
        self.forget(exercise for exercise in exercises if exercise not in started)
        mistakes = self.update(started, cancelled)
        if mistakes is None:
            return False
        self.report.results(self.part, exercises, self.results, mistakes)
        self.report.next_step(self.part, exercises, self.results)
        if not started or any(not result.passes for result in self.results.values()):
            return False
        self.rest = self.rest or self.run_rest(started, cancelled)
        if self.rest is None:
            return False
        self.report.rest(self.part, self.rest)
        return self.rest.passes and started == exercises

    def forget(self, exercises: Iterable[Exercise]) -> None:
        """What is blank has no result."""
        for exercise in exercises:
            self.results.pop(exercise.name, None)
            self.checked.pop(exercise.name, None)

    def recall(self, started: list[Exercise], prints: dict[str, str]) -> None:
        """Take over what an earlier command has found to pass, if nothing has changed since."""
        state = State.load(self.part)
        for exercise in started:
            saved = state.of(exercise)
            if saved.passes and saved.fingerprint == prints[exercise.name] and exercise.name not in self.checked:
                self.checked[exercise.name] = saved.fingerprint
                self.results[exercise.name] = Result(saved.num_tests, saved.num_passed)

    def update(self, started: list[Exercise], cancelled: Cancelled) -> dict[str, list[WrongSolution]] | None:
        """Run what has changed. Returns the known mistakes of each exercise that fails; None if cancelled."""
        prints = fingerprints(self.part)
        self.recall(started, prints)
        todo = [exercise for exercise in started if self.checked.get(exercise.name) != prints[exercise.name]]
        self.rest = None if todo else self.rest
        together = self.run_together(todo, cancelled)
        for number, exercise in enumerate(todo, 1):
            result = together.of(exercise) if together is not None else None
            if result is None:
                with self.report.working(f"{exercise.name}: its own tests ({number} of {len(todo)})"):
                    result = self.runner.run_exercise(exercise, cancelled=cancelled)
            self.num_checks += 1
            if result is None:
                return None
            self.results[exercise.name], self.checked[exercise.name] = result, prints[exercise.name]
            State.load(self.part).record(exercise, result, prints[exercise.name])
        mistakes = {}
        for exercise in started:
            if not self.results[exercise.name].passes:
                with self.report.working(f"{exercise.name}: is it a known mistake?"):
                    found = find_lookalikes(self.part, exercise, self.results[exercise.name], self.runner, cancelled)
                if found is None:
                    return None
                mistakes[exercise.name] = found
        return mistakes

    def run_together(self, exercises: list[Exercise], cancelled: Cancelled) -> Result | None:
        """Run the tests of several exercises at once, so that the model is loaded once. None if they don't all pass:
        then each is run alone, which shows whose fault it is."""
        if len(exercises) < 2:
            return None
        with self.report.working(f"{len(exercises)} exercises: their own tests"):
            result = self.runner.run_together(exercises, cancelled)
        return result if result is not None and result.passes else None

    def run_rest(self, started: list[Exercise], cancelled: Cancelled) -> Result | None:
        """Run all tests of the part on the learner's copy as it is, with only what is not asked for from the
        reference."""
        names = [exercise.name for exercise in started]
        self.report.resting(self.part, names, last_rest_s(self.part))
        started_s = time.monotonic()
        with self.report.working(f"all tests of part {self.part.number}"):
            result = self.runner.run_rest(names, cancelled)
        if result is not None:
            record_rest_s(self.part, time.monotonic() - started_s)
        return result


def watch(checker: Checker, saves: Saves, checked: Callable[[], None] = lambda: None) -> None:
    """Check now and after every save, until Ctrl-C. A save during a check cancels it and starts a new one. checked:
    called after each check."""
    while True:
        saves.forget()
        checker.report.clear()
        try:
            checker.check(cancelled=saves.any)
        except WorkshopError as error:
            checker.report.error(error)
        checked()
        checker.report.watching()
        saves.wait()
