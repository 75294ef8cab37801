"""TEACHING.md names exercises, traces and commands that exist."""

from __future__ import annotations

import re

from workshop.__main__ import ROOT

PAGE = (ROOT / "workshop" / "TEACHING.md").read_text("utf-8")
SECTION = re.compile(r"^### Part (\d+): .*?$(.*?)(?=^###? )", re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^\| (\d+) \|(?:[^|]*\|){2}([^|]*)\|", re.MULTILINE)


def exercises_of(part: int) -> set[str]:
    [page] = ROOT.glob(f"part{part:02}_*/exercises.md")
    return set(re.findall(r"^## (\w+)$", page.read_text("utf-8"), re.MULTILINE))


def test_every_part_has_a_section_with_its_exercises() -> None:
    named: dict[int, set[str]] = {}
    for number, text in SECTION.findall(PAGE):
        [line] = re.findall(r"^\*\*Exercises\.\*\* (.*)$", text, re.MULTILINE)
        named[int(number)] = set(re.findall(r"\w+(?=[*,. (]|$)", re.sub(r"\([^)]*\)", "", line)))
    for number, exercises in ROW.findall(PAGE):
        named[int(number)] = set(re.findall(r"\*\*(\w+)\*\*", exercises))
    assert set(named) == set(range(1, 16)), f"parts without a section: {set(range(1, 16)) - set(named)}"
    for number, exercises in named.items():
        assert exercises and exercises <= exercises_of(number), (
            f"part {number}: TEACHING.md names {exercises - exercises_of(number)}, exercises.md doesn't"
        )


def test_the_traces_exist() -> None:
    for name in re.findall(r"`(\w+\.jsonl)`", PAGE):
        assert (ROOT / "results" / "traces" / name).is_file(), f"results/traces has no {name}"


def test_the_commands_name_exercises_that_exist() -> None:
    commands = re.findall(r"workshop (?:hint|catch-up) (\d+) (\w+)`", PAGE)
    assert len(commands) >= 2
    for number, exercise in commands:
        assert exercise in exercises_of(int(number)), f"part {number} has no exercise {exercise}"
