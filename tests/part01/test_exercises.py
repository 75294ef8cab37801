"""The exercises of part 1: markers in the code, and for each a task with hints and a test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import part01_simple_server

PART_DIR = Path(part01_simple_server.__file__).parent
TESTS_DIR = Path(__file__).parent
ROOT = TESTS_DIR.parents[1]
MARKER = re.compile(r"^\s*# exercise: (\w+)\s*$")
FIELDS = ("Task", "File", "Test", "Lesson", "Hint 1", "Hint 2")


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


def read_tasks() -> dict[str, dict[str, str]]:
    """exercises.md: name → its fields; a field may go on over several lines."""
    tasks: dict[str, dict[str, str]] = {}
    field = ""
    for line in (PART_DIR / "exercises.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            tasks[line[3:].strip()] = {"Task": ""}
            field = "Task"
        elif match := re.match(r"([A-Z][a-z]+(?: \d)?): (.*)", line):
            field = match[1]
            list(tasks.values())[-1][field] = match[2]
        elif tasks and line.strip():
            list(tasks.values())[-1][field] += " " + line.strip()
    return tasks


TASKS = read_tasks()


@pytest.fixture(scope="module")
def markers() -> dict[str, tuple[Path, tuple[int, int]]]:
    """Name → the file, and the lines of the two markers in it."""
    paths = sorted(PART_DIR.rglob("*.py"))
    return {name: (path, lines) for path in paths for name, lines in read_markers(path).items()}


def test_part_1_has_its_exercises(markers: dict) -> None:
    assert {"decode_loop", "sample", "check_stop"} <= markers.keys(), f"got markers {sorted(markers)}"
    assert markers.keys() == TASKS.keys(), (
        f"markers in the code and sections of exercises.md differ: {sorted(markers)} against {sorted(TASKS)}"
    )


@pytest.mark.parametrize("name", sorted(TASKS))
def test_an_exercise_has_a_task(name: str) -> None:
    task = TASKS[name]
    assert tuple(task) == FIELDS, f"exercises.md, {name}: expected the lines {FIELDS}, got {tuple(task)}"
    assert (ROOT / task["Test"]).is_file(), f"exercises.md, {name}: there is no test {task['Test']}"
    assert (ROOT / task["Test"]).parent == TESTS_DIR, f"exercises.md, {name}: {task['Test']} is another part's test"
    for hint in ("Hint 1", "Hint 2"):
        assert len(task[hint]) > 60, f"exercises.md, {name}: {hint} says next to nothing: {task[hint]!r}"
    assert task["Hint 1"] != task["Hint 2"], f"exercises.md, {name}: both hints are the same"
    readme = (PART_DIR / "README.md").read_text(encoding="utf-8")
    assert f"\n## {task['Lesson']}\n" in readme, f"exercises.md, {name}: README.md has no section {task['Lesson']!r}"


@pytest.mark.parametrize("name", sorted(TASKS))
def test_an_exercise_is_the_body_of_the_function_it_names(markers: dict, name: str) -> None:
    path, (start, end) = markers[name]
    file, _, symbol = TASKS[name]["File"].partition("::")
    assert file == path.name, f"exercises.md, {name}: says {file}, but the marker is in {path.name}"
    tree: ast.AST = ast.parse(path.read_text(encoding="utf-8"))
    for part in symbol.split("."):
        tree = next((node for node in ast.iter_child_nodes(tree) if getattr(node, "name", None) == part), ast.Pass())
        assert isinstance(tree, ast.FunctionDef | ast.ClassDef), f"exercises.md, {name}: {file} has no {symbol}"
    assert isinstance(tree, ast.FunctionDef), f"exercises.md, {name}: {symbol} is no function"
    body = [node for node in tree.body if start < node.lineno < end]
    assert body, f"{file}: there is no code between the markers of {name} in {symbol}"
    assert all(node.lineno > end or node.end_lineno < end for node in tree.body if node.lineno > start), (
        f"{file}: `# exercise: end` of {name} stands inside of a statement"
    )
    assert ast.get_docstring(tree), f"{file}::{symbol}: what remains for the learner needs a docstring"
