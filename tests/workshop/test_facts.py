"""A test's message, one fact on a line, and without what it says about where to look."""

from __future__ import annotations

import pytest

from workshop.facts import MAX_CHARS, clip, split_facts, without_pointers

LOOK = 'Look at core/scheduler.py::Scheduler._admit; README "Who may join".'


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (f"two run: expected 2, got 3. {LOOK}", [("", "two run"), ("expected", "2"), ("got", "3")]),
        ("a, b: expected (1, 2), got (3, 4).", [("", "a, b"), ("expected", "(1, 2)"), ("got", "(3, 4)")]),
        ("expected a result but got None", [("expected", "a result"), ("got", "None")]),
        (
            f"three: the last ends it. Expected 'ab', got 'a'. It waits, then. {LOOK}",
            [("", "three: the last ends it"), ("expected", "'ab'"), ("got", "'a'"), ("", "It waits, then")],
        ),
        (f"two are free, and two are enough. {LOOK}", [("", "two are free, and two are enough")]),
        ("KeyError: '2'", [("", "KeyError: '2'")]),
    ],
)
def test_facts(message: str, expected: list[tuple[str, str]]) -> None:
    got = split_facts(without_pointers(message))
    assert got == expected, f"{message!r}: expected {expected}, got {got}. See facts.py::split_facts"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("a: 1. See engine.py::add", "a: 1"),
        (f"a: 1. {LOOK} The next one.", "a: 1. The next one"),
        (f"prompt 'x'. {LOOK} Difference: token 3", "prompt 'x'. Difference: token 3"),
        ('wrong: look at server.py::LLM.forward; README "Prefill".', "wrong"),
        ("wrong. Look at llm.py::LLM.generate.", "wrong"),
        ('wrong. Look at a.py::f (what is cut) and g; README of part 1, "When".', "wrong"),
        ("look at positions. The rest", "look at positions. The rest"),
    ],
)
def test_pointers_are_left_out(message: str, expected: str) -> None:
    got = without_pointers(message)
    assert got == expected, f"{message!r}: expected {expected!r}, got {got!r}. See facts.py::POINTER"


def test_long_texts_lose_their_middle() -> None:
    assert clip("short") == "short"
    got = clip("a" * 1_000 + "b")
    assert len(got) <= MAX_CHARS + 3 and got.startswith("aaa") and " … " in got and got.endswith("ab"), f"got {got}"
