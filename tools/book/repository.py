"""The files that the book is made of."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[2]
PART = re.compile(r"part(\d\d)_(\w+)")
CODE_SUFFIXES = (".py", ".cu", ".cuh", ".h", ".cpp", ".html", ".yaml", ".yml", ".json", ".toml", ".sh", ".jinja")
MAX_SOURCE_BYTES = 500_000  # a tokenizer's vocabulary is no page


@dataclass(frozen=True)
class Repository:
    """root: a checkout. Paths are relative to it, with slashes."""

    root: Path = ROOT

    @cached_property
    def files(self) -> frozenset[str]:
        """All files that git knows, those that are not committed yet included."""
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=True).stdout
        return frozenset(name for name in listed.splitlines() if (self.root / name).is_file())

    @cached_property
    def folders(self) -> frozenset[str]:
        return frozenset(str(parent) for name in self.files for parent in PurePosixPath(name).parents)

    @cached_property
    def parts(self) -> list[str]:
        return sorted({name.partition("/")[0] for name in self.files if PART.match(name)})

    @cached_property
    def pages(self) -> list[str]:
        return sorted(name for name in self.files if name.endswith(".md"))

    @cached_property
    def sources(self) -> list[str]:
        """Files that get a page with their source."""
        return sorted(
            name
            for name in self.files
            if name.endswith(CODE_SUFFIXES) or PurePosixPath(name).name in ("Makefile", "Dockerfile")
            if (self.root / name).stat().st_size < MAX_SOURCE_BYTES
        )

    def text(self, name: str) -> str:
        return (self.root / name).read_text(encoding="utf-8")


def part_title(lesson: str) -> str:
    """# Part 4: continuous batching → 4. Continuous batching."""
    match = re.search(r"^# Part (\d+): (.+)$", lesson, re.MULTILINE)
    assert match is not None, f"a lesson begins with # Part N: its title, not with {lesson[:80]!r}"
    return f"{match[1]}. {match[2][0].upper()}{match[2][1:]}"
