"""What is waited for, what is compared, and how a check fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
DEADLINE_S = 300.0  # for what takes seconds: a busy machine is slow


class CheckFailed(Exception):
    """A recovery that is not as promised. what: was checked."""

    def __init__(self, what: str, expected: object, found: object) -> None:
        super().__init__(f"{what}: expected {expected}, found {found}")
        self.what, self.expected, self.found = what, str(expected), str(found)


def until(condition: Callable[[], T], what: str, deadline_s: float | None = None) -> T:
    """Wait until a condition holds, and return its value. Raises CheckFailed after deadline_s (None: DEADLINE_S)."""
    deadline_s = DEADLINE_S if deadline_s is None else deadline_s
    end_s = time.monotonic() + deadline_s
    while not (value := condition()):
        if time.monotonic() > end_s:
            raise CheckFailed("waiting", what, f"that it has not happened within {deadline_s:g} s")
        time.sleep(0.01)
    return value


def first_difference(expected: Sequence[int], found: Sequence[int]) -> tuple[str, str] | None:
    """What was expected, and what was found."""
    for place, (right, got) in enumerate(zip(expected, found, strict=False)):
        if right != got:
            return f"token {right} at place {place}", f"token {got}"
    if len(expected) != len(found):
        return f"{len(expected)} tokens", f"{len(found)} tokens, all of them equal"
    return None
