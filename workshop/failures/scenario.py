"""What a scenario of the failure lab is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workshop.failures.lab import Lab


@dataclass(frozen=True, slots=True)
class Choice:
    """A possible answer to a question. why: it is right, or wrong, in one sentence."""

    text: str
    why: str


@dataclass(frozen=True, slots=True)
class Scenario:
    """One failure of a running engine.

    minutes: with a prediction, by hand. choices: by letter; answer: the letter of the right one. look: where the
    recovery is, `file::symbol` → what it does. vllm: the counterpart there. run: starts the servers, breaks something,
    and checks the recovery; it raises CheckFailed. needs_linux: it uses /proc.
    """

    name: str
    part: int
    minutes: int
    about: str
    question: str
    choices: Mapping[str, Choice]
    answer: str
    look: Mapping[str, str]
    vllm: str
    run: Callable[[Lab], None]
    needs_linux: bool = False
