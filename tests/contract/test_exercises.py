"""The exercises of every part: markers in the code, and for each a task, three hints and a test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MIN_EXERCISES = 3
MARKER = re.compile(r"^\s*# exercise: (\w+)\s*$")
HINTS = ("Hint 1", "Hint 2", "Hint 3")
FIELDS = ("Task", "File", "Test", "Lesson", "Difficulty", "Time", *HINTS)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def read_markers(path: Path) -> dict[str, tuple[int, int]]:
    """Name → the lines of its two markers. Raises AssertionError on one that is not closed, or opened twice."""
    found: dict[str, tuple[int, int]] = {}
    opened: tuple[str, int] | None = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        assert "exercise:" not in line or MARKER.match(line), f"{path.name}:{number} is no marker: {line.strip()!r}"
        if not (match := MARKER.match(line)):
            continue
        if match[1] == "end":
            assert opened, f"{path.name}:{number} closes an exercise that is not open"
            found[opened[0]], opened = (opened[1], number), None
        else:
            assert opened is None, f"{path.name}:{number} opens {match[1]} inside of {opened}"
            assert match[1] not in found, f"{path.name}:{number} opens {match[1]} a second time"
            opened = (match[1], number)
    assert opened is None, f"{path.name}: exercise {opened} is never closed by `# exercise: end`"
    return found


def read_tasks(part_dir: Path) -> dict[str, dict[str, str]]:
    """exercises.md: name → its fields; a field may go on over several lines."""
    tasks: dict[str, dict[str, str]] = {}
    field = ""
    for line in (part_dir / "exercises.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            tasks[line[3:].strip()] = {"Task": ""}
            field = "Task"
        elif match := re.match(r"([A-Z][a-z]+(?: \d)?): (.*)", line):
            field = match[1]
            list(tasks.values())[-1][field] = match[2]
        elif tasks and line.strip():
            list(tasks.values())[-1][field] += " " + line.strip()
    return tasks


@pytest.mark.since(1)
def test_code_and_exercises_md_name_the_same_exercises(part_dir: Path) -> None:
    markers = {name for path in part_dir.rglob("*.py") for name in read_markers(path)}
    tasks = read_tasks(part_dir)
    assert len(markers) >= MIN_EXERCISES, f"{part_dir.name}: expected {MIN_EXERCISES} exercises, got {sorted(markers)}"
    assert markers == set(tasks), (
        f"{part_dir.name}: the code has the markers {sorted(markers)}, exercises.md the sections {sorted(tasks)}"
    )


@pytest.mark.since(1)
def test_each_exercise_has_a_complete_task(part_dir: Path) -> None:
    """And what it points to is there."""
    readme = (part_dir / "README.md").read_text(encoding="utf-8")
    tests = ROOT / "tests" / part_dir.name[:6]
    for name, task in read_tasks(part_dir).items():
        where = f"{part_dir.name}/exercises.md, {name}"
        assert tuple(task) == FIELDS, f"{where}: expected the lines {FIELDS}, got {tuple(task)}"
        for test in task["Test"].split(", "):
            file = ROOT / test.partition("::")[0]
            assert file.is_file(), f"{where}: there is no test {test}"
            assert file.parent == tests, f"{where}: {test} is another part's test"
        for hint in HINTS:
            assert len(task[hint]) > 60, f"{where}: {hint} says next to nothing: {task[hint]!r}"
        assert len({task[hint] for hint in HINTS}) == len(HINTS), f"{where}: two hints are the same"
        assert f"\n## {task['Lesson']}\n" in readme, f"{where}: README.md has no section {task['Lesson']!r}"


@pytest.mark.since(1)
def test_each_exercise_is_the_body_of_the_function_it_names(part_dir: Path) -> None:
    for name, task in read_tasks(part_dir).items():
        check_body(part_dir, name, *task["File"].split("::"))


def check_body(part_dir: Path, name: str, file: str, symbol: str) -> None:
    """The markers enclose statements of the function that the task names, and its docstring stays for the learner."""
    where, path = f"{part_dir.name}/exercises.md, {name}", part_dir / file
    markers = read_markers(path)
    assert name in markers, f"{where}: {file} has no marker of it"
    start, end = markers[name]
    node: ast.AST = ast.parse(path.read_text(encoding="utf-8"))
    for part in symbol.split("."):
        node = next((child for child in ast.iter_child_nodes(node) if getattr(child, "name", None) == part), ast.Pass())
        assert isinstance(node, Function | ast.ClassDef), f"{where}: {file} has no {symbol}"
    assert isinstance(node, Function), f"{where}: {symbol} is no function"
    assert [child for child in node.body if start < child.lineno < end], (
        f"{file}: there is no code between the markers of {name} in {symbol}"
    )
    assert all(child.lineno > end or child.end_lineno < end for child in node.body if child.lineno > start), (
        f"{file}: `# exercise: end` of {name} stands inside of a statement"
    )
    assert ast.get_docstring(node), f"{file}::{symbol}: what remains for the learner needs a docstring"
