"""The learner's output: states, known mistakes, failures with one fact on a line, and the next step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

from rich.console import Console
from rich.padding import Padding
from rich.syntax import Syntax
from rich.text import Text

from workshop import COMMAND
from workshop.course import Exercise, Part
from workshop.facts import clip, split_facts, without_pointers
from workshop.progress import PartProgress, Status, status_of
from workshop.results import Failure, Result, Saved, State
from workshop.workspace import body_of, fingerprints, relative
from workshop.wrong import WrongSolution

MAX_SHOWN = 3
NOT_STARTED = Text("not started", style="dim")
STATES: dict[Status, tuple[str, str]] = {  # a text and its style
    "open": ("not started", "dim"), "started": ("started", "yellow"), "fails": ("fails", "red"),
    "solved": ("solved", "green"), "filled in": ("filled in by catch-up", "magenta"),
}  # fmt: skip
MARKS: dict[Status, str] = {"open": "–", "started": "…", "fails": "✗", "solved": "✓", "filled in": "↷"}
OUTSIDE = "your function had returned by then: what it returned or changed does not fit"


class Report:
    """Prints to a rich Console. verbose: show all failures, whole and with tracebacks."""

    def __init__(self, console: Console | None = None, *, verbose: bool = False) -> None:
        self.console = console or Console(highlight=False)
        self.verbose = verbose

    def say(self, text: str | Text = "", style: str | None = None, indent: int = 0) -> None:
        """Print text as it is: square brackets are not markup."""
        whole = text if isinstance(text, Text) else Text(text, style=style or "")
        if self.console.is_terminal:  # wrap, and keep the indent
            self.console.print(Padding(whole, (0, 0, 0, indent), expand=False))
        else:
            for line in whole.split("\n", allow_blank=True):
                self.console.print(Text(" " * indent).append_text(line) if line else "", soft_wrap=True)

    def error(self, error: Exception) -> None:
        self.say(f"workshop: {error}", "red")

    def clear(self) -> None:
        if self.console.is_terminal:
            self.console.clear()

    def working(self, what: str) -> AbstractContextManager:
        """Show a spinner on a terminal during slow work."""
        return self.console.status(what)

    def watching(self) -> None:
        self.say("\nWatching for the next save; Ctrl-C stops.", "dim")

    def parts(self, parts: Iterable[Part]) -> None:
        """Print the output of `list`."""
        for part in parts:
            self.say(Text.assemble((f"part {part.number}", "bold"), f"  {part.name}"))
            saved = State.load(part)
            prints = fingerprints(part) if part.copy.is_dir() else {}
            for exercise in part.exercises:
                state = progress(part, exercise, saved.of(exercise), prints.get(exercise.name, ""))
                about = (
                    f"{exercise.name:<{width(part.exercises)}}  {exercise.difficulty:<6} {exercise.minutes:>4} min  "
                )
                self.say(Text.assemble(about, state), indent=4)
            if not part.exercises:
                self.say("no exercises", "dim", 4)
            elif not part.copy.is_dir():
                self.say(f"to start: {COMMAND} start {part.number}", "cyan", 4)

    def progress(self, parts: list[PartProgress]) -> None:
        """Print the output of `progress`: a line per part that is started, and the sum."""
        for part in parts:
            marks = [Text(f"{each.name} {MARKS[each.status]}", STATES[each.status][1]) for each in part.exercises]
            count = f"  {part.num_solved} of {len(part.exercises)} solved"
            self.say(Text.assemble((f"part {part.number:<3}", "bold"), Text("  ").join(marks), (count, "dim")))
        exercises = [each for part in parts for each in part.exercises]
        if not exercises:
            self.say(f"No part is started yet: {COMMAND} start 1")
            return
        self.say("   ".join(f"{mark} {status}" for status, mark in MARKS.items()), "dim")
        counts = {status: sum(each.status == status for each in exercises) for status in STATES}
        told = [f"{counts['solved']} of {len(exercises)} exercises solved"]
        told += [f"{counts['filled in']} filled in by catch-up"] if counts["filled in"] else []
        num_hints = sum(each.num_hints for each in exercises)
        told += [f"{num_hints} hint{'' if num_hints == 1 else 's'}"] if num_hints else []
        self.say(f"\n{', '.join(told)}; {COMMAND} list shows all parts.")

    def results(
        self,
        part: Part,
        exercises: list[Exercise],
        results: Mapping[str, Result],
        mistakes: Mapping[str, list[WrongSolution]],
    ) -> None:
        """Print one line per exercise, then for each that fails: the known mistakes it looks like, its failures, and
        where to look."""
        self.say(Text.assemble((f"part {part.number}", "bold"), f"  {relative(part, part.copy)}\n"))
        for exercise in exercises:
            result = results.get(exercise.name)
            state = count(result) if result else NOT_STARTED
            self.say(Text.assemble(f"{exercise.name:<{width(exercises)}}  ", state), indent=2)
        for exercise in exercises:
            result = results.get(exercise.name)
            if result is not None and not result.passes:
                self.say(Text.assemble("\n", (exercise.name, "bold red")))
                self.lookalikes(mistakes.get(exercise.name, []))
                self.failures(result, exercise)
                line = body_of(part, exercise).first  # of its first marker, from 1
                where = f"{relative(part, part.copy)}/{exercise.file}:{line}, {exercise.symbol}"
                self.say(Text.assemble(("\nLook at  ", "bold"), where), indent=2)
                self.say(Text.assemble(("Lesson   ", "bold"), exercise.lesson), indent=2)

    def lookalikes(self, found: list[WrongSolution]) -> None:
        for wrong in found:
            self.say(Text.assemble("\n", (f"This looks like a known mistake: {wrong.name}.", "bold yellow")), indent=2)
            self.say(wrong.explanation, indent=4)

    def failures(self, result: Result, exercise: Exercise | None) -> None:
        """Print some of the failures. exercise: the only possible cause, so that what a test says about where to look
        is left out."""
        shown = list(result.failures) if self.verbose else choose(result.failures)
        for failure in shown:
            self.failure(failure, without_pointers(failure.message) if exercise else failure.message)
        if len(result.failures) > len(shown):
            self.say(f"\n{len(result.failures)} tests fail; --verbose shows all, with tracebacks", "dim", 2)

    def failure(self, failure: Failure, message: str) -> None:
        """The facts of the test's own message; a traceback only if verbose."""
        self.say()
        for label, text in split_facts(message):
            shown = text if self.verbose else clip(text)
            self.say(Text.assemble((f"{label:<10}", "bold"), shown) if label else shown, indent=4 if label else 2)
        if failure.raised_at:
            self.say(f"at {failure.raised_at}", indent=4)
            if failure.called_from is None and "::" in failure.test:
                self.say(OUTSIDE, indent=4)
            elif failure.called_from not in (None, failure.raised_at):
                self.say(f"called from {failure.called_from}", indent=4)
        self.say(f"test      {failure.test}", "dim", 4)
        if failure.output.strip():
            self.say("output:", "dim", 4)
            self.say(failure.output.rstrip(), indent=6)
        if self.verbose:
            self.say(failure.traceback, "dim", 4)

    def resting(self, part: Part, names: list[str], last_s: float | None) -> None:
        """Say that the rest of the part's tests runs now, and for how long. last_s: how long it took the last time."""
        with_what = "your version" if len(names) == len(part.exercises) else f"your {', '.join(names)}"
        duration = "can take several minutes" if last_s is None else f"takes about {minutes(last_s)}, as last time"
        self.say(f"\nNow all other tests of part {part.number} run with {with_what}; Ctrl-C stops them.", "dim")
        self.say(f"This {duration}. What you have written has already passed its own tests.", "dim")

    def rest(self, part: Part, result: Result) -> None:
        """Print the outcome of the rest of the part's tests."""
        self.say(Text.assemble(f"all of part {part.number}  ", count(result)))
        if not result.passes:
            self.say("Each exercise passes its own tests, but together, or with the rest of the part:", "red")
            self.failures(result, None)

    def next_step(self, part: Part, exercises: list[Exercise], results: Mapping[str, Result]) -> None:
        """Print the next step: fix what fails, else write what is blank, else continue."""
        failing = [e for e in exercises if e.name in results and not results[e.name].passes]
        blank = [e for e in exercises if e.name not in results]
        number = part.number
        if failing or blank:
            exercise, verb = (failing or blank)[0], "fix" if failing else "write"
            where = f"{relative(part, part.copy)}/{exercise.file}, between its markers"
            self.say(Text.assemble(("\nNext: ", "bold cyan"), f"{verb} {exercise.name} in {where}."))
            if verb == "write":
                self.say(exercise.task, indent=6)
            self.say(Text.assemble("stuck? ", (f"{COMMAND} hint {number} {exercise.name}", "cyan")), indent=6)
        elif len(exercises) < len(part.exercises):
            self.say(Text.assemble(("\nNext: ", "bold cyan"), (f"{COMMAND} check {number}", "cyan")))
        else:
            self.say(Text.assemble(("\nNext: ", "bold cyan"), (f"{COMMAND} diff {number}", "cyan"),
                                   " compares your version with the reference; then run your version, ",
                                   (f"cd workspace && ../.venv/bin/python -m {part.name}.demo", "cyan")))  # fmt: skip

    def diff(self, lines: list[str]) -> None:
        if not lines:
            self.say("no difference in what you have written so far")
        elif not self.console.is_terminal:
            self.say("\n".join(lines))
        else:
            self.console.print(
                Syntax("\n".join(lines), "diff", theme="ansi_dark", background_color="default", word_wrap=True)
            )


def choose(failures: Iterable[Failure]) -> list[Failure]:
    """A few failures that say different things, from different test functions; first those that say what they expected
    and what they got."""
    functions, different = set[str](), dict[tuple[str, str | None], Failure]()
    for failure in failures:
        function = failure.test.rpartition("::")[2].partition("[")[0]
        if function not in functions:
            different.setdefault((failure.message, failure.raised_at), failure)
        functions.add(function)
    return sorted(different.values(), key=lambda failure: len(split_facts(failure.message)) == 1)[:MAX_SHOWN]


def progress(part: Part, exercise: Exercise, saved: Saved, fingerprint: str) -> Text:
    """How far the learner is with an exercise. fingerprint: of the current code."""
    status = status_of(part, exercise, saved)
    state = Text(*STATES[status])
    is_old = status in ("fails", "solved") and saved.fingerprint != fingerprint
    return state + Text(", before your last change", style="dim") if is_old else state


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def count(result: Result) -> Text:
    mark, style = ("passes", "green") if result.passes else ("fails", "red")
    of = f"{result.num_passed} of {result.num_tests} tests pass"
    return Text(f"{mark}: {of}" if result.num_tests else "cannot be run", style=style)


def width(exercises: Iterable[Exercise]) -> int:
    return max(len(exercise.name) for exercise in exercises)
