"""check and watch on a made-up part: each exercise alone, the test's own message, and errors in a learner's file."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from workshop import runner as runner_module
from workshop import workspace
from workshop.check import Checker, watch
from workshop.course import Part, WorkshopError
from workshop.report import Report
from workshop.results import Result, State
from workshop.runner import Runner

Solve = Callable[..., None]
GOOD_TOTAL = "for value in values:\n    result = add(result, value)"


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


def test_a_failure_shows_the_tests_own_message(runner: Runner, solve: Solve) -> None:
    solve(add="return a - b", total="print('here')\nraise ValueError(len(values))")
    add = run(runner, "add")
    failure = add.failures[0]
    assert failure.message == "2 and 1 make 3, got 1. See engine.py::add", (
        f"pytest's appendix must be removed: {failure}"
    )
    assert failure.location is None and "def test_add" in failure.traceback
    assert (add.num_tests, add.num_passed) == (4, 1), f"2 - 0 is right by chance, got {add}"
    assert add.failures[-1].message == "assert 0 == 2\n +  where 0 = add(1, 1)", (
        f"no message of its own: {add.failures[-1]}"
    )
    failure = run(runner, "total").failures[0]
    lines = (runner.part.copy / "engine.py").read_text().split("\n")
    number = 1 + next(i for i, line in enumerate(lines) if "ValueError" in line)
    assert failure.message == "ValueError: 3" and "three numbers\nhere" in failure.output, f"got {failure}"
    assert failure.location == f"engine.py:{number} in total", (
        f"lines count as in the learner's file: {failure.location}"
    )


@pytest.mark.parametrize(
    ("body", "message", "line"),
    [
        ("return a +", "SyntaxError: invalid syntax", "return a +"),
        ("if a:\nreturn b", "IndentationError: expected an indented block", "return b"),
        ("break  # no loop", "SyntaxError: 'break' outside loop", "break  # no loop"),
    ],
)
def test_code_that_does_not_compile(runner: Runner, solve: Solve, body: str, message: str, line: str) -> None:
    solve(add=body)
    failure = run(runner, "add").failures[0]
    assert failure.message.startswith(message) and line in failure.message, f"got {failure}"
    text = (runner.part.copy / "engine.py").read_text().split("\n")
    expected = f"engine.py:{1 + next(i for i, row in enumerate(text) if line in row)}"
    assert failure.location == expected, f"expected {expected}, got {failure.location}"


def test_a_file_that_cannot_be_imported(runner: Runner, part: Part, solve: Solve) -> None:
    solve(add="return a + b")
    path = part.copy / "engine.py"
    path.write_text(path.read_text() + "\nnothing_of_that_name\n")
    (part.root / "tests" / "part01" / "conftest.py").write_text("import part01_made_up.engine\n")
    checker, console = make_checker(part, runner)
    checker.check()
    text = console.export_text()
    number = len(path.read_text().split("\n")) - 1
    assert "add           cannot be run" in text, f"got {text}"
    assert "NameError: name 'nothing_of_that_name' is not defined" in text, f"got {text}"
    assert f"at engine.py:{number} in <module>" in text, f"got {text}"


def test_an_endless_loop_is_stopped_and_located(part: Part, solve: Solve) -> None:
    solve(add="while True:\n    pass")
    with Runner(part, limit_s=4) as runner:
        failure = run(runner, "add").failures[-1]
        assert failure.message.startswith("still running after 4 s"), f"got {failure}"
        assert failure.test.endswith("test_add[1]"), f"the test that ran: got {failure.test}"
        assert failure.location is not None and failure.location.endswith(" in add"), f"got {failure.location}"
        solve(add="return a + b")
        assert run(runner, "add").passes, "the next run must not be affected"
        assert runner.num_starts == 1, f"the warm process must survive its child: started {runner.num_starts} times"


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


def test_check_names_the_known_mistake(runner: Runner, part: Part, solve: Solve) -> None:
    solve(add="return a - b")
    checker, console = make_checker(part, runner)
    assert not checker.check(), "add fails"
    text = console.export_text()
    assert "add looks like: it subtracts\n  The sign is wrong." in text, f"got {text}"
    assert "gives back the first" not in text, f"the other mistake fails otherwise: {text}"
    assert text.index("2 and 1 make 3, got 1") < text.index("test_add[1]"), (
        f"the test's own message comes first: {text}"
    )
    assert "Traceback" not in text and "def test_add" not in text, f"no traceback without --verbose: {text}"
    assert "total         not started" in text and "fix add" in text, f"got {text}"
    cached = list((part.workspace / ".cache" / "wrong").iterdir())
    assert len(cached) == 2, f"both mistakes were run once and are kept: {cached}"
    solve(add="return 5")
    _, console = checker, checker.report.console
    checker.check()
    assert "looks like" not in console.export_text(), "an unknown mistake must match none"


def test_check_shows_the_next_step(runner: Runner, part: Part, solve: Solve) -> None:
    checker, console = make_checker(part, runner)
    assert not checker.check() and checker.num_checks == 0, "what is blank need not be run"
    assert "write add in workspace/part01_made_up/engine.py" in console.export_text()
    solve(add="return a + b")
    assert not checker.check() and checker.num_checks == 1
    text = console.export_text()
    assert "add           passes: 4 of 4 tests pass" in text and "write total" in text, f"got {text}"
    solve(total=GOOD_TOTAL)
    assert checker.check() and checker.num_checks == 2, "add has not changed, so only total runs"
    text = console.export_text()
    assert "all together  passes: 6 of 6 tests pass" in text and "workshop diff 1" in text, f"got {text}"
    saved = State.load(part).saved
    assert {name: entry.passes for name, entry in saved.items()} == {"add": True, "total": True}


def test_what_passes_alone_must_pass_together(runner: Runner, part: Part, solve: Solve) -> None:
    solve(add="global calls\ncalls = 1\nreturn a + b", total="assert 'calls' not in globals()\n" + GOOD_TOTAL)
    checker, console = make_checker(part, runner)
    assert not checker.check(), "add leaves a global that breaks total"
    text = console.export_text()
    assert "but all of yours together fail" in text, f"got {text}"


def test_watch_checks_at_every_save_and_only_what_changed(runner: Runner, part: Part, solve: Solve) -> None:
    checker, console = make_checker(part, runner)
    saves = [{"add": "return a - b"}, {"add": "return a + b"}, {"total": "oops ="}, {"total": GOOD_TOTAL}]
    counts: list[int] = []
    sleeps = 0

    def sleep(_: float) -> None:
        nonlocal sleeps
        sleeps += 1
        if sleeps % 3 == 0:  # some polls find nothing new
            counts.append(checker.num_checks)
            if len(counts) > len(saves):
                raise KeyboardInterrupt
            solve(**saves[len(counts) - 1])

    with pytest.raises(KeyboardInterrupt):
        watch(checker, sleep)
    assert counts == [0, 1, 2, 3, 4], f"one check for each save, of the exercise that changed: got {counts}"
    assert runner.num_starts == 1, f"one warm process for all of them, started {runner.num_starts} times"
    text = console.export_text()
    assert text.count("Watching for the next save") == 5 and "all together" in text, f"got {text}"


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
    texts = [whole.replace("    # exercise: end\n", "", 1), whole, None]

    def sleep(_: float) -> None:
        text = texts.pop(0)
        if text is None:
            raise KeyboardInterrupt
        path.write_text(text)

    with pytest.raises(KeyboardInterrupt):
        watch(checker, sleep)
    text = console.export_text()
    assert "`# exercise: total` comes before the end of `# exercise: add`" in text, f"got {text}"
    assert text.count("not started") == 4, f"checked before and after: got {text}"


def test_a_save_during_a_check_cancels_it(runner: Runner, part: Part, solve: Solve, tmp_path: Path) -> None:
    solve(add=f"import pathlib\npathlib.Path({str(tmp_path / 'running')!r}).touch()\nwhile True:\n    pass")
    checker, console = make_checker(part, runner)
    run_exercise, cancelled_runs = runner.run_exercise, 0

    def saving(exercise, *, cancelled, **options):
        nonlocal cancelled_runs

        def save_and_ask() -> bool:
            if (tmp_path / "running").exists():
                (tmp_path / "running").unlink()
                solve(add="return a + b")
            return cancelled()

        result = run_exercise(exercise, cancelled=save_and_ask, **options)
        cancelled_runs += result is None
        return result

    def stop(_: float) -> None:
        raise KeyboardInterrupt

    runner.run_exercise = saving  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        watch(checker, stop)
    assert cancelled_runs == 1, f"the save must cancel the endless run, got {cancelled_runs}"
    assert "add           passes" in console.export_text(), "and the new text be checked at once"
