"""The learner's output: states, failures with the test's message first, and the next step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

from rich.console import Console
from rich.padding import Padding
from rich.syntax import Syntax
from rich.text import Text

from workshop.course import Exercise, Part
from workshop.results import Failure, Result, State
from workshop.workspace import fingerprints, is_started, relative
from workshop.wrong import WrongSolution

MAX_SHOWN = 3
NOT_STARTED = Text("not started", style="dim")


class Report:
    """Prints to a rich Console. verbose: show all failures, with tracebacks."""

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
            saved = State.load(part).saved
            prints = fingerprints(part) if part.copy.is_dir() else {}
            for exercise in part.exercises:
                state = NOT_STARTED
                if is_started(part, exercise):
                    state = Text("started", style="yellow")
                    if last := saved.get(exercise.name):
                        state = count(last.num_passed, last.num_tests, last.passes)
                        if last.fingerprint != prints[exercise.name]:
                            state += Text(", before your last change", style="dim")
                self.say(Text.assemble(f"{exercise.name:<{width(part.exercises)}}  ", state), indent=4)
            if not part.exercises:
                self.say("no exercises", "dim", 4)
            elif not part.copy.is_dir():
                self.say(f"to start: python -m workshop start {part.number}", "cyan", 4)

    def results(
        self, part: Part, exercises: list[Exercise], results: Mapping[str, Result], together: Result | None
    ) -> None:
        """Print one line per exercise, then the failures."""
        self.say(Text.assemble((f"part {part.number}", "bold"), f"  {relative(part, part.copy)}\n"))
        for exercise in exercises:
            result = results.get(exercise.name)
            state = count(result.num_passed, result.num_tests, result.passes) if result else NOT_STARTED
            self.say(Text.assemble(f"{exercise.name:<{width(exercises)}}  ", state), indent=2)
        if together is not None:
            state = count(together.num_passed, together.num_tests, together.passes)
            self.say(Text.assemble(f"{'all together':<{width(exercises)}}  ", state), indent=2)
        for exercise in exercises:
            result = results.get(exercise.name)
            if result is not None and not result.passes:
                where = f"{exercise.file}::{exercise.symbol}, lesson: {exercise.lesson}"
                self.say(Text.assemble("\n", (exercise.name, "bold red"), f"  {where}"))
                self.failures(result)
        if together is not None and not together.passes:
            self.say("\nEach body passes with the reference's other bodies, but all of yours together fail:", "red")
            self.failures(together)

    def failures(self, result: Result) -> None:
        """Print some of the failures, from as many test functions as possible."""
        by_function: dict[str, list[Failure]] = {}
        for failure in result.failures:
            by_function.setdefault(failure.test.rpartition("::")[2].partition("[")[0], []).append(failure)
        shown = [group[0] for group in by_function.values()][:MAX_SHOWN]
        for failure in result.failures if self.verbose else shown:
            self.failure(failure)
        if len(result.failures) > len(shown) and not self.verbose:
            names = ", ".join(by_function)
            self.say(f"{len(result.failures)} failures in {names}; --verbose shows all, with tracebacks", "dim", 2)

    def failure(self, failure: Failure) -> None:
        """The test's own explanation first; a traceback only if verbose."""
        self.say(failure.message, indent=2)
        self.say(f"{failure.test}" + (f"  at {failure.location}" if failure.location else ""), "dim", 4)
        if failure.output.strip():
            self.say("output:", "dim", 4)
            self.say(failure.output.rstrip(), indent=6)
        if self.verbose:
            self.say(failure.traceback, "dim", 4)

    def lookalikes(self, exercise: Exercise, found: list[WrongSolution]) -> None:
        for wrong in found:
            self.say(Text.assemble("\n", (f"{exercise.name} looks like: {wrong.name}", "bold yellow")))
            self.say(wrong.explanation, indent=2)

    def next_step(self, part: Part, exercises: list[Exercise], results: Mapping[str, Result]) -> None:
        """Print the next step: fix what fails, else write what is blank, else continue."""
        failing = [e for e in exercises if e.name in results and not results[e.name].passes]
        blank = [e for e in exercises if e.name not in results]
        number = part.number
        if failing or blank:
            exercise = (failing or blank)[0]
            verb = "fix" if failing and is_started(part, exercise) else "write"
            where = f"{relative(part, part.copy)}/{exercise.file}, between its markers"
            self.say(Text.assemble(("\nNext: ", "bold cyan"), f"{verb} {exercise.name} in {where}."))
            if verb == "write":
                self.say(exercise.task, indent=6)
            self.say(Text.assemble("stuck? ", (f"python -m workshop hint {number} {exercise.name}", "cyan")), indent=6)
        elif len(exercises) < len(part.exercises):
            self.say(Text.assemble(("\nNext: ", "bold cyan"), (f"python -m workshop check {number}", "cyan")))
        else:
            self.say(Text.assemble(("\nNext: ", "bold cyan"), (f"python -m workshop diff {number}", "cyan"),
                                   " compares your version with the reference; then run your version, ",
                                   (f"cd workspace && python -m {part.name}.demo", "cyan")))  # fmt: skip

    def diff(self, lines: list[str]) -> None:
        if not lines:
            self.say("no difference in what you have written so far")
        elif not self.console.is_terminal:
            self.say("\n".join(lines))
        else:
            self.console.print(
                Syntax("\n".join(lines), "diff", theme="ansi_dark", background_color="default", word_wrap=True)
            )


def count(num_passed: int, num_tests: int, passes: bool) -> Text:
    mark, style = ("passes", "green") if passes else ("fails", "red")
    return Text(f"{mark}: {num_passed} of {num_tests} tests pass" if num_tests else "cannot be run", style=style)


def width(exercises: Iterable[Exercise]) -> int:
    return max([len(exercise.name) for exercise in exercises] + [len("all together")])
