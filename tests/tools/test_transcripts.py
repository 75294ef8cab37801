"""tools/transcripts.py: what a lesson shows of a command is what the command prints, but for its numbers."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tools.transcripts import Runner, check_lesson, compare, split_block, stable

PRINTED = [
    "── 1. Title ──────",
    "4 requests in 12.5 ms",
    "│ a  │ 1,204 │",
    "the end",
    "id 0123456789abcdef0123456789abcdef",
]


@pytest.mark.parametrize(
    ("shown", "num_problems"),
    [
        (PRINTED, 0),
        (["─── 1. Title ──", "4 requests in 7 ms", "│ a │ 99 │", "the end", "id …"], 0),
        (["── 1. Title ──", "…", "the end", "…"], 0),
        (["…", "4 requests in 7 ms", "…"], 0),
        (["── 1. Title ──", "4 requests in … ms", "…"], 0),
        (["── 1. Title ──", "4 requests took 7 ms", "…"], 1),
        (["── 1. Title ──", "the end", "…"], 1),
        (["…", "the end", "│ a │ 99 │", "…"], 1),
        (["── 1. Title ──"], 1),
        (["…", "the beginning", "…"], 1),
        (["── 1. Title ──", "4 requests", "in 7", "ms", *PRINTED[2:]], 0),
        (["── 1. Title ──", "4 requests", "in 7", "hours", *PRINTED[2:]], 3),
    ],
    ids=str,
)
def test_what_differs(shown: list[str], num_problems: int) -> None:
    _, problems = compare(shown, PRINTED)
    assert len(problems) == num_problems, f"expected {num_problems}, got {problems}"


def test_bars_of_times_may_differ_and_pictures_may_not() -> None:
    assert stable("  13.3 ms █") == stable("  909.4 ms ██████")
    assert stable("model " + "█" * 40) == stable("model " + "█▒·█" * 10)
    assert stable("row 0 ██··") != stable("row 0 ███·")


def test_a_here_document_belongs_to_its_command() -> None:
    [command] = split_block("$ python - <<'END'\nprint(1)\nEND\n1\n")
    assert (command.text, command.output) == ("python - <<'END'\nprint(1)\nEND", ["1"])


def test_this_runs_numbers_take_the_place_of_the_old_ones() -> None:
    renewed, _ = compare(["…", "4 requests in 7 ms", "│ a │ 99 │", "…", "id …"], PRINTED)
    assert renewed == ["…", "4 requests in 12.5 ms", "│ a  │ 1,204 │", "…", "id …"], "gaps stay as they are"


def test_commands_and_their_output() -> None:
    block = '$ curl -s url \\\n    -d \'{"a": 1}\'\n{"b":2}\n\n$ make test\n$ echo hi\nhi\n'
    commands = split_block(block)
    assert [command.text for command in commands] == ["curl -s url -d '{\"a\": 1}'", "make test", "echo hi"]
    assert [command.output for command in commands] == [['{"b":2}', ""], [], ["hi"]]
    lines = block.splitlines()
    for command in commands:
        assert lines[command.line : command.line + len(command.output)] == command.output


def test_numbers_and_widths_are_not_stable() -> None:
    assert stable("──── 3 of  1,204.5 ────") == stable("── 17 of 9 ──")
    assert stable("3 of 4") != stable("3 in 4")


def test_a_lesson(tmp_path: Path) -> None:
    lesson = (
        "Text.\n\n```console\n$ echo took 5 ms\ntook 7 ms\n$ make bench PART=1\n```\n\n```python\n$ no command\n```\n"
    )
    with contextlib.ExitStack() as stack:
        runner = Runner(tmp_path, stack)
        renewed, problems = check_lesson(lesson, runner)
        assert (renewed, problems) == (lesson.replace("took 7", "took 5"), [])
        _, problems = check_lesson(lesson.replace("took 7", "takes 7"), runner)
        assert len(problems) == 1 and "takes 7 ms" in problems[0] and "took 5 ms" in problems[0], f"got {problems}"
        prepared = "```console\n$ echo 5 > file\n$ cat file\n7\n```\n"
        assert check_lesson(prepared, runner) == (prepared.replace("7\n", "5\n"), []), "cat needs the silent command"
        assert runner.run("pwd") == [str(tmp_path)], "files that a command writes do not stay"
