"""tools/exercise_markers.py: markers are removed, and restored at the right lines of a changed text."""

from __future__ import annotations

import random

import pytest

from tools.exercise_markers import with_markers_of, without_markers
from workshop.bodies import find_bodies

MARKED = """\
def f(x):
    \"""Words.\"""
    # exercise: one
    a = x
    return a
    # exercise: end


def g(x):
    b = x
    # exercise: two
    return b
    # exercise: end
"""
PLAIN = without_markers(MARKED.encode()).decode()


def test_only_lines_that_are_just_a_marker_are_removed() -> None:
    assert "exercise" not in PLAIN and len(PLAIN.splitlines()) == len(MARKED.splitlines()) - 4
    text = b"x  # exercise: one\r\n# exercise: two words\r\n  # exercise: one \r\n# exercise: end"
    assert without_markers(text) == b"x  # exercise: one\r\n# exercise: two words\r\n"
    text = b"x;  // exercise: one\r\n  // exercise: one\n/ exercise: one\n/// exercise: one\n// exercise: end"
    assert without_markers(text) == b"x;  // exercise: one\r\n/ exercise: one\n/// exercise: one\n", "CUDA C++, too"


def test_markers_of_cuda_go_back_to_their_lines() -> None:
    marked = MARKED.replace("# exercise", "// exercise")
    plain = without_markers(marked.encode())
    assert plain == PLAIN.encode(), f"expected {PLAIN}, got {plain.decode()}"
    content, unsure = with_markers_of(marked.encode(), plain.replace(b"    a = x\n", b"    a = x + 1\n"))
    assert content.decode() == marked.replace("a = x\n", "a = x + 1\n"), f"got {content.decode()}"
    assert list(find_bodies(content.decode(), "f.cu")) == ["one", "two"] and unsure == [], f"got {unsure}"


@pytest.mark.parametrize(
    ("old", "new", "bodies", "unsure"),
    [
        ("x = 0", "x = 0", (["a = x", "return a"], ["return b"]), []),
        ("    a = x\n", "    a = x + 1\n", (["a = x + 1", "return a"], ["return b"]), []),
        ("    a = x\n    return a\n", "    return x\n", (["return x"], ["return b"]), []),
        ("    return a\n", "    a += 1\n    return a\n", (["a = x", "a += 1", "return a"], ["return b"]), []),
        ("    return b\n", "    return b\n\n\ndef h():\n    pass\n", (["a = x", "return a"], ["return b"]), []),
        ("    return b\n", "    b += 1\n    return -b\n", (["a = x", "return a"], ["b += 1", "return -b"]), []),
        ("Words", "Other words", (["a = x", "return a"], ["return b"]), ["one"]),
        ("    return a\n", "    return a\n    more()\n", (["a = x", "return a"], ["return b"]), ["one"]),
        ("    b = x\n    return b\n", "    c = x\n    return c\n", (["a = x", "return a"], ["return c"]), ["two"]),
    ],
)
def test_markers_go_back_to_their_lines(old: str, new: str, bodies: tuple[list[str], ...], unsure: list[str]) -> None:
    content, got_unsure = with_markers_of(MARKED.encode(), PLAIN.replace(old, new).encode())
    found = find_bodies(content.decode(), "f.py")
    assert [name for name in found] == ["one", "two"], content.decode()
    assert tuple([line.strip() for line in body.lines] for body in found.values()) == bodies, content.decode()
    assert got_unsure == unsure, f"exercises to look at: expected {unsure}, got {got_unsure}\n{content.decode()}"


def test_markers_are_never_lost_or_crossed() -> None:
    rng = random.Random(0)
    for _ in range(300):
        lines = PLAIN.splitlines(keepends=True)
        for _ in range(rng.randint(1, 8)):
            at = rng.randrange(len(lines) + 1)
            lines[at : at + rng.randint(0, 3)] = [f"    new {rng.randint(0, 9)}\n"] * rng.randint(0, 3)
        new = "".join(lines).encode()
        content, _ = with_markers_of(MARKED.encode(), new)
        assert without_markers(content) == new, "putting markers in must change no other line"
        assert list(find_bodies(content.decode(), "f.py")) == ["one", "two"], content.decode()
