"""`workshop` on a made-up course: what each command prints and its exit status."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from workshop.__main__ import ROOT, main
from workshop.course import Part

Solve = Callable[..., None]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(root: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    def call(line: str) -> tuple[int, str, str]:
        status = main(line.split(), root)
        out, err = capsys.readouterr()
        return status, out, err

    return call


def test_from_start_to_finish(call: Call, part: Part, solve: Solve) -> None:
    status, out, _ = call("list")
    assert status == 0 and ".venv/bin/workshop start 1" in out, out
    assert "add    easy      5 min  not started" in out and "total  hard    120 min  not started" in out, out
    assert "no exercises" in out, f"part 2 has none: {out}"
    status, out, _ = call("start 1")
    assert status == 0 and "workspace/part01_made_up" in out and "check 1 --watch" in out, out
    assert "add    engine.py::add  (easy, 5 min, lesson: Adding)" in out, out
    solve(add="return a - b")
    assert "5 min  started" in call("list")[1]
    status, out, _ = call("check 1 --verbose")
    assert status == 1 and "add    fails: 1 of 4 tests pass" in out, out
    assert "def test_add" in out and "a known mistake: it subtracts" in out, f"--verbose shows tracebacks: {out}"
    assert "5 min  fails" in call("list")[1]
    solve(add="return a + b")
    assert "5 min  fails, before your last change" in call("list")[1]
    status, out, _ = call("check 1 add")
    assert status == 0 and "total" not in out and "Next: .venv/bin/workshop check 1" in out, out
    assert "5 min  solved" in call("list")[1]
    status, out, _ = call("hint 1")
    assert status == 0 and out.startswith("total") and "Hint 1: A loop." in out, f"add passes, so total: {out}"
    status, out, _ = call("diff 1")
    assert status == 0 and "-    return a + b" in out, out
    status, out, _ = call("catch-up 1")
    assert status == 0 and "is in workspace/backups/part01_made_up-" in out, out
    status, out, _ = call("check 1")
    assert status == 0 and "all of part 1  passes" in out, out


def test_what_was_filled_in_does_not_count_as_solved(call: Call, part: Part, solve: Solve) -> None:
    call("start 1")
    call("catch-up 1 add")
    assert "5 min  filled in by catch-up" in call("list")[1]
    assert call("hint 1")[1].startswith("total"), "it need not be solved any more"
    assert call("check 1 add")[0] == 0
    assert "5 min  filled in by catch-up" in call("list")[1], "it passes, and is still the reference's"
    solve(add="return a + b")
    assert call("check 1 add")[0] == 0
    assert "5 min  solved" in call("list")[1], "written anew, it is the learner's"
    call("catch-up 1")
    out = call("list")[1]
    assert "5 min  solved" in out, f"the learner had solved it before: {out}"
    assert "120 min  filled in by catch-up" in out, out
    call("start 1 --force")
    assert call("list")[1].count("not started") == 2, "a new start"


def test_each_hint_says_more(call: Call) -> None:
    for number, hint in enumerate(("There is an operator for it.", "It is +.", "a, +, b."), 1):
        status, out, _ = call("hint 1 add")
        assert status == 0 and f"Hint {number}: {hint}" in out and out.count("Hint") == 1, out
        expected = f"{3 - number} more: .venv/bin/workshop hint 1 add" if number < 3 else "diff 1 add"
        assert expected in out, f"it must say how many are left: {out}"
    assert "Hint 3" in call("hint 1 add")[1], "after the last one, the last one again"
    assert "Hint 1: There" in call("hint 1 add --level 1")[1]
    assert "Hint 1: A loop" in call("hint 1 total")[1], "each exercise has its own count"
    call("start 1")
    assert "Hint 1" in call("hint 1 add")[1], "a new start"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("start 7", "there is no part 7; the parts so far: 1, 2"),
        ("start 2", "part 2 has no exercises"),
        ("check 1", "part 1 is not started: run `.venv/bin/workshop start 1`"),
        ("diff 1", "part 1 is not started"),
        ("hint 1 ad", "part 1 has no exercise 'ad': expected add, total"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(call: Call, line: str, message: str) -> None:
    status, out, err = call(line)
    assert (status, out) == (2, ""), f"expected status 2 and nothing on stdout, got {status} and {out!r}"
    assert message in err and err.count("\n") == 1, f"expected one line with {message!r}, got {err!r}"


@pytest.mark.parametrize("line", ["", "strat 1", "start one", "hint 1 add --level 4"])
def test_wrong_usage_ends_with_2(call: Call, line: str) -> None:
    with pytest.raises(SystemExit) as ended:
        call(line)
    assert ended.value.code == 2, f"expected status 2, got {ended.value.code}"


def test_without_the_packages_it_says_what_to_do() -> None:
    code = "import sys; sys.modules['rich'] = None; from workshop.__main__ import main; sys.exit(main(['list']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "run `make setup`" in done.stderr, f"got {done.returncode}, {done.stderr!r}"
    assert "Traceback" not in done.stderr, done.stderr
