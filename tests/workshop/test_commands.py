"""`python -m workshop` on a made-up course: what each command prints and its exit status."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from workshop.__main__ import ROOT, main
from workshop.course import Part

Solve = Callable[..., None]


@pytest.fixture
def call(root: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(line: str) -> tuple[int, str, str]:
        status = main(line.split(), root)
        out, err = capsys.readouterr()
        return status, out, err

    return call


def test_from_start_to_finish(call: Callable[..., tuple[int, str, str]], part: Part, solve: Solve) -> None:
    status, out, _ = call("list")
    assert status == 0 and "add           not started" in out and "python -m workshop start 1" in out, out
    assert "no exercises" in out, f"part 2 has none: {out}"
    status, out, _ = call("start 1")
    assert status == 0 and "workspace/part01_made_up" in out and "check 1 --watch" in out, out
    solve(add="return a - b")
    assert "add           started" in call("list")[1]
    status, out, _ = call("check 1 --verbose")
    assert status == 1 and "add           fails: 1 of 4 tests pass" in out, out
    assert "def test_add" in out and "looks like: it subtracts" in out, f"--verbose shows tracebacks: {out}"
    solve(add="return a + b")
    assert "fails: 1 of 4 tests pass, before your last change" in call("list")[1]
    status, out, _ = call("check 1 add")
    assert status == 0 and "total" not in out and "Next: python -m workshop check 1" in out, out
    assert "add           passes: 4 of 4 tests pass" in call("list")[1]
    status, out, _ = call("hint 1")
    assert status == 0 and out.startswith("total") and "Hint 1: A loop." in out, f"add passes, so total: {out}"
    status, out, _ = call("diff 1")
    assert status == 0 and "-    return a + b" in out, out
    status, out, _ = call("catch-up 1")
    assert status == 0 and "is in workspace/backups/part01_made_up-" in out, out
    status, out, _ = call("check 1")
    assert status == 0 and "all together  passes" in out, out


def test_hints_come_one_at_a_time(call: Callable[..., tuple[int, str, str]]) -> None:
    status, out, _ = call("hint 1 add")
    assert status == 0 and "Hint 1: There is an operator for it." in out and "It is +." not in out, out
    assert "python -m workshop hint 1 add --level 2" in out, f"it must say how to get the next: {out}"
    status, out, _ = call("hint 1 add --level 2")
    assert "Hint 2: It is +." in out and "--level" not in out, out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("start 7", "there is no part 7; the parts so far: 1, 2"),
        ("start 2", "part 2 has no exercises"),
        ("check 1", "part 1 is not started: run `python -m workshop start 1`"),
        ("diff 1", "part 1 is not started"),
        ("hint 1 ad", "part 1 has no exercise 'ad': expected add, total"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(call: Callable[..., tuple[int, str, str]], line: str, message: str) -> None:
    status, out, err = call(line)
    assert (status, out) == (2, ""), f"expected status 2 and nothing on stdout, got {status} and {out!r}"
    assert message in err and err.count("\n") == 1, f"expected one line with {message!r}, got {err!r}"


@pytest.mark.parametrize("line", ["", "strat 1", "start one", "hint 1 add --level 3"])
def test_wrong_usage_ends_with_2(call: Callable[..., tuple[int, str, str]], line: str) -> None:
    with pytest.raises(SystemExit) as ended:
        call(line)
    assert ended.value.code == 2, f"expected status 2, got {ended.value.code}"


def test_without_the_packages_it_says_what_to_do() -> None:
    code = "import sys; sys.modules['rich'] = None; from workshop.__main__ import main; sys.exit(main(['list']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "run `make setup`" in done.stderr, f"got {done.returncode}, {done.stderr!r}"
    assert "Traceback" not in done.stderr, done.stderr
