"""A made-up course of two parts, small enough that its tests run in no time."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from workshop.course import Part, find_part
from workshop.runner import Runner

ENGINE = '''"""A made-up engine."""

from . import numbers


def add(a: int, b: int) -> int:
    """The sum of a and b."""
    # exercise: add
    result = a
    result += b
    return result
    # exercise: end


def total(values: list[int]) -> int:
    """The sum of all values."""
    result = numbers.ZERO
    # exercise: total
    for value in values:
        result = add(result, value)
    # exercise: end
    return result
'''
EXERCISES = """# Exercises of a made-up part

Read the lesson first.

## add
Add two numbers. Use what Python
offers.
File: engine.py::add
Test: tests/part01/test_add.py
Lesson: Adding
Difficulty: easy
Time: 5 minutes
Hint 1: There is an operator
for it.
Hint 2: It is +.
Hint 3: a, +, b.

## total
File: engine.py::total
Test: tests/part01/test_total.py::test_three, tests/part01/test_total.py::test_none
Lesson: Adding many
Difficulty: hard
Time: 120 minutes
Hint 1: A loop.
Hint 2: With add in it.
Hint 3: For each value, add it.
"""
TEST_ADD = """import pytest

from part01_made_up.engine import add


@pytest.mark.parametrize("b", [1, 0, -1])
def test_add(b):
    got = add(2, b)
    assert got == 2 + b, f"2 and {b} make {2 + b}, got {got}. See engine.py::add"


def test_no_message():
    assert add(1, 1) == 2


@pytest.mark.slow
def test_large_numbers():
    assert add(10**9, 1) == 10**9 + 1, f"expected 1000000001, got {add(10**9, 1)}. See engine.py::add"
"""
TEST_TOTAL = """from part01_made_up.engine import total


def test_three():
    print("three numbers")
    assert total([1, 2, 3]) == 6, f"1, 2, 3: expected 6, got {total([1, 2, 3])}"


def test_none():
    assert total([]) == 0, "no numbers make 0"
"""
TEST_REST = """from part01_made_up.engine import add, total


def test_both():
    assert total([add(1, 2), 3]) == 6, f"1 + 2 + 3: expected 6, got {total([add(1, 2), 3])}. See engine.py::total"
"""
WRONG = {  # title: name, explanation, caught by, what is replaced by what
    "add-minus": ("it subtracts", "The sign\nis wrong.", "test_add.py::test_add", "result += b", "result -= b"),
    "add-first": ("it gives back the first", "b is not used.", "test_add.py::test_add", "result += b", "result += 0"),
    "total-last": (
        "it takes the last",
        "Add them.",
        "test_total.py::test_three",
        "result = add(result, value)",
        "result = value",
    ),
}


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The made-up repository: part 1 has the exercises add and total, part 2 has none."""
    for name, text in {
        "part01_made_up/__init__.py": "",
        "part01_made_up/engine.py": ENGINE,
        "part01_made_up/numbers.py": "ZERO = 0\n",
        "part01_made_up/exercises.md": EXERCISES,
        "part01_made_up/__pycache__/x.pyc": "",
        "part02_bare/engine.py": "",
        "tests/part01/test_add.py": TEST_ADD,
        "tests/part01/test_total.py": TEST_TOTAL,
        "tests/part01/test_rest.py": TEST_REST,
        "tests/part01/test_process.py": "raise ImportError",
    }.items():
        write(tmp_path, name, text)
    for stem, (name, explanation, caught_by, old, new) in WRONG.items():
        lines = [text.splitlines(keepends=True) for text in (ENGINE, ENGINE.replace(old, new))]
        diff = difflib.unified_diff(*lines, "a/part01_made_up/engine.py", "b/part01_made_up/engine.py")
        text = f"Name: {name}\nCaught by: tests/part01/{caught_by}\nExplanation: {explanation}\n\n{''.join(diff)}"
        write(tmp_path, f"tests/part01/wrong/{stem}.patch", text)
    return tmp_path


@pytest.fixture
def part(root: Path) -> Part:
    return find_part(root, 1)


@pytest.fixture
def runner(part: Part) -> Iterator[Runner]:
    with Runner(part, limit_s=60) as runner:
        yield runner


@pytest.fixture
def solve(part: Part) -> Callable[..., None]:
    """Write bodies into the learner's copy: solve(add="return a + b")."""

    def solve(**bodies: str) -> None:
        path = part.copy / "engine.py"
        text = path.read_text(encoding="utf-8")
        for name, body in bodies.items():
            before, marker, rest = text.partition(f"    # exercise: {name}\n")
            _, end, after = rest.partition("    # exercise: end\n")
            indented = "".join(f"    {line}\n" for line in body.splitlines())
            text = before + marker + indented + end + after
        path.write_text(text, encoding="utf-8")

    return solve
