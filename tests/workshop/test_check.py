"""check and watch on a made-up part: each exercise alone, the test's own message, and errors in a learner's file."""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from workshop import runner as runner_module
from workshop import workspace
from workshop.check import Checker, watch
from workshop.course import Exercise, Part, WorkshopError
from workshop.report import Report
from workshop.results import Result, State
from workshop.runner import Runner
from workshop.saves import Saves

Solve = Callable[..., None]
GOOD_TOTAL = "for value in values:\n    result = add(result, value)"
DEADLINE_S = 30


class SavesOnDemand(Saves):
    """wait() makes the next save itself; after the last one the learner presses Ctrl-C."""

    def __init__(self, *saves: Callable[[], None]) -> None:
        self.saves, self.is_saved = list(saves), False

    def any(self) -> bool:
        return self.is_saved

    def forget(self) -> None:
        self.is_saved = False

    def wait(self) -> None:
        if not self.is_saved:
            if not self.saves:
                raise KeyboardInterrupt
            self.saves.pop(0)()


@pytest.fixture(autouse=True)
def started(part: Part) -> None:
    workspace.start(part)


def run(runner: Runner, name: str) -> Result:
    (exercise,) = runner.part.select([name])
    result = runner.run_exercise(exercise)
    assert result is not None, "nothing cancelled this run"
    return result


def make_checker(part: Part, runner: Runner, *names: str) -> tuple[Checker, Console]:
    console = Console(record=True, force_terminal=False, file=io.StringIO())
    return Checker(part, list(names), runner, Report(console)), console


def line_of(part: Part, text: str) -> int:
    """Where a text is in the learner's file, from 1."""
    lines = (part.copy / "engine.py").read_text().split("\n")
    return 1 + next(index for index, line in enumerate(lines) if text in line)


def test_each_exercise_is_checked_with_the_reference_around_it(runner: Runner, solve: Solve) -> None:
    solve(total=GOOD_TOTAL)
    total = run(runner, "total")
    assert total.passes, f"total is right and add is still blank, so the reference lends add: got {total.failures}"
    assert total.num_tests == 2, f"only the tests that exercises.md names: expected 2, got {total.num_tests}"
    add = run(runner, "add")
    messages = {failure.message for failure in add.failures}
    assert messages == {"part01 add: Add two numbers."}, f"a blank says which exercise it is: got {messages}"
    solve(add="return a - b")
    assert run(runner, "total").passes, "a mistake in add must not fail total"


def test_a_failure_has_the_tests_own_message(runner: Runner, solve: Solve) -> None:
    solve(add="return a - b")
    add = run(runner, "add")
    failure = add.failures[0]
    assert failure.message == "2 and 1 make 3, got 1. See engine.py::add", f"the message and nothing else: {failure}"
    assert (failure.kind, failure.raised_at) == ("AssertionError", None) and "def test_add" in failure.traceback
    assert (add.num_tests, add.num_passed) == (4, 1), f"2 - 0 is right by chance, and the slow test waits: got {add}"
    assert add.failures[-1].message == "assert add(1, 1) == 2", f"no message of its own: {add.failures[-1]}"


def test_an_error_is_located(runner: Runner, part: Part, solve: Solve) -> None:
    solve(add="print('here')\nreturn a + b[0]")
    failure = run(runner, "add").failures[0]
    here = f"engine.py:{line_of(part, 'b[0]')} in add: return a + b[0]"
    assert failure.message.startswith("TypeError: 'int' object") and failure.output == "here\n", f"got {failure}"
    assert (failure.raised_at, failure.called_from) == (here, here), "lines count as in the learner's file"
    solve(total="for value in values:\n    result = add(result, str(value))")
    failure = run(runner, "total").failures[0]
    assert failure.raised_at == f"engine.py:{line_of(part, '# exercise: add')} in add", f"a lent body: got {failure}"
    expected = f"engine.py:{line_of(part, 'str(value)')} in total: result = add(result, str(value))"
    assert failure.called_from == expected, f"and from where the learner called it: got {failure}"


def test_an_error_after_the_body_has_returned(runner: Runner, part: Part, solve: Solve) -> None:
    path = part.copy / "engine.py"
    path.write_text(path.read_text().replace("    return result\n", "    return int(result)\n"))
    solve(total="result = 'six'")
    checker, console = make_checker(part, runner, "total")
    checker.check()
    text = console.export_text()
    where = f"at engine.py:{line_of(part, 'int(result)')} in total: return int(result)"
    assert f"{where}\n    your function had returned by then" in text, f"got {text}"


def test_an_error_of_several_is_one_of_them(runner: Runner, part: Part, solve: Solve) -> None:
    solve(add="try:\n    raise ValueError('one')\nexcept ValueError as e:\n    error = e")
    path = part.root / "tests" / "part01" / "test_add.py"
    text = "from part01_made_up.engine import add\n\n\nclass Group(Exception):\n    exceptions = ()\n\n\n"
    text += "def test_add():\n    error = Group()\n    error.exceptions = (ValueError('one'), AssertionError('two'))\n"
    path.write_text(f"{text}    raise error\n")
    assert [failure.message for failure in run(runner, "add").failures] == ["two"]


@pytest.mark.parametrize(
    ("body", "message", "line"),
    [
        ("return a +", "SyntaxError: invalid syntax", "return a +"),
        ("if a:\nreturn b", "IndentationError: expected an indented block", "return b"),
        ("break  # no loop", "SyntaxError: 'break' outside loop", "break  # no loop"),
    ],
)
def test_code_that_does_not_compile(
    runner: Runner, part: Part, solve: Solve, body: str, message: str, line: str
) -> None:
    solve(add=body)
    failure = run(runner, "add").failures[0]
    assert failure.message.startswith(message) and line in failure.message, f"got {failure}"
    expected = f"engine.py:{line_of(part, line)}"
    assert failure.raised_at == expected, f"expected {expected}, got {failure}"


def test_a_file_that_cannot_be_imported(runner: Runner, part: Part, solve: Solve) -> None:
    solve(add="return a + b")
    path = part.copy / "engine.py"
    path.write_text(path.read_text() + "\nnothing_of_that_name\n")
    (part.root / "tests" / "part01" / "conftest.py").write_text("import part01_made_up.engine\n")
    checker, console = make_checker(part, runner)
    checker.check()
    text = console.export_text()
    assert "add    cannot be run" in text, f"got {text}"
    assert "NameError: name 'nothing_of_that_name' is not defined" in text, f"got {text}"
    where = f"at engine.py:{line_of(part, 'nothing_of_that_name')} in <module>"
    assert where in text and "had returned" not in text, f"got {text}"


def test_an_endless_loop_is_stopped_and_located(part: Part, solve: Solve) -> None:
    solve(add="while True:\n    pass")
    with Runner(part, limit_s=4) as runner:
        failure = run(runner, "add").failures[-1]
        assert failure.message.startswith("still running after 4 s"), f"got {failure}"
        assert failure.test.endswith("test_add[1]"), f"the test that ran: got {failure.test}"
        assert failure.raised_at is not None and failure.raised_at.endswith(" in add"), f"got {failure}"
        solve(add="return a + b")
        assert run(runner, "add").passes, "the next run must not be affected"
        assert runner.num_starts == 1, f"the warm process must survive its child: started {runner.num_starts} times"


def test_waiting_forever_is_stopped_and_located(part: Part, solve: Solve) -> None:
    solve(add="import threading\nthreading.Event().wait()")
    with Runner(part, limit_s=1) as runner:
        failure = run(runner, "add").failures[-1]
        assert failure.message.startswith("still waiting"), f"got {failure}"
        assert failure.raised_at is not None and failure.raised_at.endswith(" in add"), f"got {failure}"


def test_a_run_can_be_cancelled(runner: Runner, part: Part, solve: Solve) -> None:
    solve(add="while True:\n    pass")
    assert runner.run_exercise(part.exercises[0], cancelled=lambda: True) is None, "a cancelled run has no result"
    solve(add="return a + b")
    assert run(runner, "add").passes


def test_a_test_process_that_dies_is_a_failure(runner: Runner, solve: Solve) -> None:
    solve(add="import os\nos._exit(0)")
    failure = run(runner, "add").failures[0]
    assert "ended early" in failure.message and failure.test.endswith("test_add[1]"), f"got {failure}"


def test_the_reference_never_replaces_a_missing_file(runner: Runner, part: Part, solve: Solve) -> None:
    solve(add="return a + b")
    (part.copy / "numbers.py").unlink()
    failure = run(runner, "add").failures[0]
    assert "numbers" in failure.message, (
        f"part01_made_up/numbers.py is on sys.path, but is not the learner's: {failure}"
    )


def test_two_saves_in_one_second_are_two_versions(runner: Runner, part: Part, solve: Solve) -> None:
    stamp = (1_700_000_000, 1_700_000_000)
    for body, expected in (("return a - b", False), ("return a + b", True)):
        solve(add=body)
        os.utime(part.copy / "engine.py", stamp)  # the same size and time: a bytecode cache would not notice
        assert run(runner, "add").passes is expected, f"the run must see the newest text, {body!r}"
    assert not (part.copy / "__pycache__").exists(), "no bytecode is written next to the learner's files"


def test_what_a_run_imports_is_preloaded_for_the_next(runner: Runner, solve: Solve) -> None:
    for body in (
        "assert 'wave' not in sys.modules, 'not imported yet'",
        "import wave",
        "assert 'wave' in sys.modules, 'gone'",
    ):
        solve(add=f"import sys\n{body}\nreturn a + b")
        result = run(runner, "add")
        assert result.passes, f"{body}: got {result.failures}. See warm.py::main"


def test_without_fork_each_run_gets_a_process_started_beforehand(
    part: Part, solve: Solve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKSHOP_NO_FORK", "1")
    monkeypatch.setattr(runner_module, "CAN_FORK", False)
    with Runner(part, limit_s=60) as runner:
        assert not run(runner, "add").passes, "add is blank"
        assert runner.num_starts == 2, f"the next process starts as one ends: started {runner.num_starts}"
        solve(add="return a + b")
        assert run(runner, "add").passes
        solve(add="while True:\n    pass")
        assert runner.run_exercise(part.exercises[0], cancelled=lambda: True) is None
        assert runner.num_starts == 4, f"one for each run, and one waiting: started {runner.num_starts}"


def test_check_names_the_known_mistake_first(runner: Runner, part: Part, solve: Solve) -> None:
    solve(add="c = a - b\nreturn c")
    checker, console = make_checker(part, runner)
    assert not checker.check(), "add fails"
    text = console.export_text()
    known = text.index("add\n\n  This looks like a known mistake: it subtracts.\n    The sign is wrong.\n")
    assert "gives back the first" not in text, f"the other mistake fails other tests: {text}"
    message = text.index("2 and 1 make 3, got 1\n    test      tests/part01/test_add.py::test_add[1]\n")
    assert known < message < text.index("Look at  workspace/part01_made_up/engine.py:8, add\n  Lesson   Adding"), text
    assert "See engine.py" not in text, f"where to look is said once: {text}"
    assert "Traceback" not in text and "def test_add" not in text, f"no traceback without --verbose: {text}"
    assert "total  not started" in text and "fix add" in text, f"got {text}"
    cached = list((part.workspace / ".cache" / "wrong").iterdir())
    assert len(cached) == 2, f"both mistakes were run once and are kept: {cached}"


@pytest.mark.parametrize("body", ["return 5", "return a - c"])
def test_an_unknown_mistake_looks_like_none(runner: Runner, part: Part, solve: Solve, body: str) -> None:
    """It fails other tests, or all of them with another error."""
    solve(add=body)
    checker, console = make_checker(part, runner)
    checker.check()
    assert "known mistake" not in console.export_text(), console.export_text()


def test_every_failing_exercise_is_compared_with_known_mistakes(runner: Runner, part: Part, solve: Solve) -> None:
    solve(add="return a - b", total="for value in values:\n    result = 1 * value")
    checker, console = make_checker(part, runner)
    checker.check()
    text = console.export_text()
    assert "known mistake: it subtracts" in text and "known mistake: it takes the last" in text, f"got {text}"


def test_check_shows_the_next_step(runner: Runner, part: Part, solve: Solve) -> None:
    checker, console = make_checker(part, runner)
    assert not checker.check() and checker.num_checks == 0, "what is blank need not be run"
    assert "write add in workspace/part01_made_up/engine.py" in console.export_text()
    solve(add="return a + b")
    assert not checker.check() and checker.num_checks == 1
    text = console.export_text()
    assert "add    passes: 4 of 4 tests pass" in text and "write total" in text, f"got {text}"
    assert "Now all other tests of part 1 run with your add;" in text, f"the rest, with total lent: {text}"
    assert "This can take several minutes" in text, f"how long the rest takes isn't known yet: {text}"
    assert "all of part 1  passes: 8 of 8 tests pass" in text, f"the slow test and test_rest.py, too: {text}"
    solve(total=GOOD_TOTAL)
    assert checker.check() and checker.num_checks == 2, "add has not changed, so only total runs"
    text = console.export_text()
    assert "run with your version;" in text and "workshop diff 1" in text, f"got {text}"
    assert "seconds, as last time" in text, f"the rest has run before: {text}"
    saved = State.load(part).saved
    assert {name: entry.passes for name, entry in saved.items()} == {"add": True, "total": True}


def test_the_verdict_is_printed_before_the_rest_runs(runner: Runner, part: Part, solve: Solve) -> None:
    """And it is flushed: a learner who reads the output through a pipe sees it at once."""
    solve(add="return a + b", total=GOOD_TOTAL)
    with tempfile.TemporaryFile("w+") as output:
        checker = Checker(part, [], runner, Report(Console(file=output, highlight=False)))
        seen = list[str]()

        def run_rest(names: list[str], cancelled: Callable[[], bool]) -> Result:
            seen.append(os.pread(output.fileno(), 10_000, 0).decode())
            return Result(1, 1)

        runner.run_rest = run_rest  # type: ignore[method-assign]
        try:
            assert checker.check(), "both pass"
        finally:
            del runner.run_rest
    assert "add    passes: 4 of 4 tests pass" in seen[0], f"when the rest starts, the file has only: {seen[0]}"
    assert "Now all other tests of part 1 run" in seen[0], f"got {seen[0]}"


def test_what_has_passed_and_not_changed_is_not_run_again(runner: Runner, part: Part, solve: Solve) -> None:
    """By another command, too; what fails is, since its failure is to be shown."""

    def num_checks() -> int:
        checker, _ = make_checker(part, runner)
        checker.check()
        return checker.num_checks

    solve(add="return a + b", total="return 5")
    assert num_checks() == 2
    assert num_checks() == 1, "only total, which fails"
    solve(total=GOOD_TOTAL)
    assert [num_checks(), num_checks()] == [1, 0]
    test = next(iter(sorted(part.tests.glob("test_*.py"))))
    test.write_text(test.read_text() + "\n\ndef test_more() -> None: ...\n")
    assert num_checks() == 2, "the tests have changed"


def test_exercises_that_pass_are_run_together(
    runner: Runner, part: Part, solve: Solve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the model is loaded once. If one fails, each is run alone: only then is it known which."""
    alone, run_alone = list[str](), runner.run_exercise

    def run_exercise(exercise: Exercise, **options: Any) -> Result | None:
        alone.append(exercise.name)
        return run_alone(exercise, **options)

    monkeypatch.setattr(runner, "run_exercise", run_exercise)
    solve(add="return a + b", total="return 5")
    checker, _ = make_checker(part, runner)
    assert not checker.check() and alone[:2] == ["add", "total"], f"total fails, each is run alone: {alone}"
    alone.clear()
    solve(add="return b + a", total=GOOD_TOTAL)
    checker, console = make_checker(part, runner)
    assert checker.check() and not alone, f"both pass together, so none is run alone: {alone}"
    text = console.export_text()
    assert "add    passes: 4 of 4 tests pass" in text, f"each has its own tests: {text}"
    assert State.load(part).saved["add"].num_tests == 4, "and they are recorded"


def test_a_named_exercise_that_is_blank_is_not_run(runner: Runner, part: Part) -> None:
    checker, console = make_checker(part, runner, "total")
    assert not checker.check() and checker.num_checks == 0
    text = console.export_text()
    assert "total  not started" in text and "write total" in text, f"got {text}"


def test_what_passes_alone_must_pass_together(runner: Runner, part: Part, solve: Solve) -> None:
    solve(add="global calls\ncalls = 1\nreturn a + b", total="assert 'calls' not in globals()\n" + GOOD_TOTAL)
    checker, console = make_checker(part, runner)
    assert not checker.check(), "add leaves a global that breaks total"
    text = console.export_text()
    assert "all of part 1  fails" in text and "but together" in text, f"got {text}"


def test_watch_checks_at_every_save_and_only_what_changed(runner: Runner, part: Part, solve: Solve) -> None:
    checker, console = make_checker(part, runner)
    bodies = [{"add": "return a - b"}, {"add": "return a + b"}, {"total": "oops ="}, {"total": GOOD_TOTAL}]
    counts: list[int] = []

    def save(body: dict[str, str]) -> None:
        counts.append(checker.num_checks)
        solve(**body)

    with pytest.raises(KeyboardInterrupt):
        watch(checker, SavesOnDemand(*(lambda body=body: save(body) for body in bodies)))  # type: ignore[misc]
    counts.append(checker.num_checks)
    assert counts == [0, 1, 2, 3, 4], f"one check for each save, of the exercise that changed: got {counts}"
    assert runner.num_starts == 1, f"one warm process for all of them, started {runner.num_starts} times"
    text = console.export_text()
    assert text.count("Watching for the next save") == 5 and "all of part 1  passes" in text, f"got {text}"


def test_a_body_that_is_blanked_and_written_again(runner: Runner, part: Part, solve: Solve) -> None:
    checker, console = make_checker(part, runner)
    blank = (part.copy / "engine.py").read_text()
    for text in (None, blank, None):
        if text is not None:
            (part.copy / "engine.py").write_text(text)
        else:
            solve(add="return a + b")
        checker.check()
    states = [line.split(maxsplit=1)[1] for line in console.export_text().splitlines() if line.startswith("  add ")]
    assert states == ["passes: 4 of 4 tests pass", "not started", "passes: 4 of 4 tests pass"], f"got {states}"


def test_windows_line_ends_and_invalid_text(runner: Runner, part: Part, solve: Solve) -> None:
    solve(total=GOOD_TOTAL)
    path = part.copy / "engine.py"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    result = run(runner, "total")
    assert result.passes, f"the markers must be found in a file with CRLF, so that add is lent: {result.failures}"
    path.write_bytes(b"\xff")
    checker, _ = make_checker(part, runner)
    with pytest.raises(WorkshopError, match="workspace/part01_made_up/engine.py is not UTF-8 text"):
        checker.check()


def test_watch_survives_missing_markers(runner: Runner, part: Part) -> None:
    checker, console = make_checker(part, runner)
    path = part.copy / "engine.py"
    whole = path.read_text()
    texts = [whole.replace("    # exercise: end\n", "", 1), whole]
    with pytest.raises(KeyboardInterrupt):
        watch(checker, SavesOnDemand(*(lambda text=text: path.write_text(text) for text in texts)))  # type: ignore[misc]
    text = console.export_text()
    assert "`# exercise: total` comes before the end of `# exercise: add`" in text, f"got {text}"
    assert text.count("not started") == 4, f"checked before and after: got {text}"


def test_a_save_during_a_check_cancels_it(runner: Runner, part: Part, solve: Solve, tmp_path: Path) -> None:
    solve(add=f"import pathlib\npathlib.Path({str(tmp_path / 'running')!r}).touch()\nwhile True:\n    pass")
    checker, console = make_checker(part, runner)
    saves, run_exercise, cancelled_runs = SavesOnDemand(), runner.run_exercise, 0

    def saving(exercise, *, cancelled, **options):
        nonlocal cancelled_runs

        def save_and_ask() -> bool:
            if (tmp_path / "running").exists():
                (tmp_path / "running").unlink()
                solve(add="return a + b")
                saves.is_saved = True
            return cancelled()

        result = run_exercise(exercise, cancelled=save_and_ask, **options)
        cancelled_runs += result is None
        return result

    runner.run_exercise = saving  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        watch(checker, saves)
    assert cancelled_runs == 1, f"the save must cancel the endless run, got {cancelled_runs}"
    assert "add    passes" in console.export_text(), "and the new text be checked at once"


def save_until_noticed(saves: Saves, save: Callable[[], object]) -> None:
    """The watching may begin a moment later."""
    deadline = time.monotonic() + DEADLINE_S
    while not saves.any():
        assert time.monotonic() < deadline, f"a save was not noticed within {DEADLINE_S} s. See saves.py::Saves"
        save()
        time.sleep(0.1)


def test_saves_are_noticed(part: Part) -> None:
    """In any file of the copy, and of a copy that takes its place. Other files do not count."""
    path = part.copy / "numbers.py"
    with Saves(part) as saves:
        save_until_noticed(saves, lambda: path.write_text("ZERO = 0\n"))
        saves.wait()
        workspace.start(part, force=True)
        time.sleep(0.5)
        saves.forget()
        for other in (part.copy / "notes.txt", part.workspace / "backups" / "x.py"):
            other.write_text("")
        time.sleep(0.5)
        assert not saves.any(), "only Python files of the copy count"
        save_until_noticed(saves, lambda: path.write_text("ZERO = 0\n"))
