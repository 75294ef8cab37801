"""combinations.md: which combinations of flags are refused, and with which words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import part15_full_architecture

PAGE = Path(part15_full_architecture.__file__).parent / "combinations.md"
ROW = re.compile(r"\| (?P<flags>.+?) \| `(?P<error>\w+: .+?)` \| (?P<why>.+?) \|")


@dataclass(frozen=True)
class Refused:
    """flags: as they stand there, with what else matters in words."""

    flags: str
    error: str
    why: str

    @property
    def words(self) -> list[str]:
        """The command line."""
        [(command)] = re.findall(r"`(--[^`]+)`", self.flags)
        return command.split()

    @property
    def situation(self) -> str:
        """What is not on the command line."""
        return re.sub(r"`--[^`]+`", "", self.flags).replace("`", "").strip(" :,")


def table() -> list[Refused]:
    return [Refused(**match.groupdict()) for match in map(ROW.fullmatch, PAGE.read_text().splitlines()) if match]
