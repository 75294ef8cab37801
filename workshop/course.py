"""The parts of the course, and the exercises that each part's exercises.md describes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PART_NAME = re.compile(r"part(\d\d)_[a-z0-9_]+")
HEADING = re.compile(r"## +(\w+)\s*")
LABELS = ("File", "Test", "Lesson", "Difficulty", "Time", "Hint 1", "Hint 2", "Hint 3")
LABEL = re.compile(rf"({'|'.join(LABELS)}): *(.*)")
DIFFICULTIES = ("easy", "medium", "hard")
TIME = re.compile(r"(\d+) minutes")
SENTENCE = re.compile(r".+?[.!?](?=\s|$)", re.DOTALL)


class WorkshopError(Exception):
    """An error that the user can fix; its text is one line that says how."""


@dataclass(frozen=True, slots=True)
class Exercise:
    """One exercise as exercises.md describes it.

    file: path inside the part; tests: what pytest runs for it, paths from the repository's root; hints: each says more
    than the one before.
    """

    part: str
    name: str
    task: str
    file: str
    symbol: str
    tests: tuple[str, ...]
    lesson: str
    difficulty: str
    minutes: int
    hints: tuple[str, ...]

    @property
    def blank(self) -> str:
        """The start of the message that a blank body raises."""
        return f"{self.part[:6]} {self.name}:"


@dataclass(frozen=True, slots=True)
class Part:
    """A part under root. path is the reference; copy is the learner's, which may not exist yet."""

    root: Path
    name: str
    exercises: tuple[Exercise, ...]

    @property
    def number(self) -> int:
        return int(self.name[4:6])

    @property
    def path(self) -> Path:
        return self.root / self.name

    @property
    def tests(self) -> Path:
        return self.root / "tests" / self.name[:6]

    @property
    def workspace(self) -> Path:
        return self.root / "workspace"

    @property
    def copy(self) -> Path:
        return self.workspace / self.name

    def select(self, names: list[str]) -> list[Exercise]:
        """These exercises, or all of them if none is named. Raises WorkshopError on an unknown name."""
        known = {exercise.name: exercise for exercise in self.exercises}
        for name in names:
            if name not in known:
                raise WorkshopError(f"part {self.number} has no exercise {name!r}: expected {', '.join(known)}")
        return [known[name] for name in names or known]


def read_parts(root: Path) -> list[Part]:
    """All parts under root, in order."""
    names = sorted(path.name for path in root.glob("part*/") if PART_NAME.fullmatch(path.name))
    return [Part(root, name, tuple(read_exercises(root / name))) for name in names]


def find_part(root: Path, number: int) -> Part:
    """Raises WorkshopError listing the existing parts."""
    parts = {part.number: part for part in read_parts(root)}
    if number not in parts:
        raise WorkshopError(f"there is no part {number}; the parts so far: {', '.join(map(str, parts)) or 'none'}")
    return parts[number]


def read_exercises(part: Path) -> list[Exercise]:
    """Read a part's exercises.md; no file means no exercises. Raises WorkshopError naming the line that is wrong.

    `## NAME`, optionally a paragraph that says what to write, then the labels of LABELS, each up to the next one.
    """
    path = part / "exercises.md"
    if not path.is_file():
        return []
    sections: dict[str, dict[str, str]] = {}
    fields: dict[str, str] | None = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if heading := HEADING.fullmatch(line):
            if heading[1] in sections:
                raise WorkshopError(f"{path}:{number}: exercise {heading[1]} is described twice")
            label = "Task"
            fields = sections[heading[1]] = {label: ""}
        elif fields is not None:
            if match := LABEL.fullmatch(line):
                label, line = match[1], match[2]
            fields[label] = f"{fields.get(label, '')}\n{line}".strip()
    return [build_exercise(path, name, fields) for name, fields in sections.items()]


def build_exercise(path: Path, name: str, fields: dict[str, str]) -> Exercise:
    """Check the labels of one section and build an Exercise from them."""
    for label in LABELS:
        if not fields.get(label):
            raise WorkshopError(f"{path}: exercise {name} has no line `{label}: …`")
    difficulty, time = fields["Difficulty"], TIME.fullmatch(fields["Time"])
    if difficulty not in DIFFICULTIES:
        raise WorkshopError(f"{path}: exercise {name}: expected {' or '.join(DIFFICULTIES)}, got {difficulty!r}")
    if time is None:
        raise WorkshopError(f"{path}: exercise {name}: expected `Time: N minutes`, got {fields['Time']!r}")
    file, _, symbol = fields["File"].partition("::")
    tests = tuple(test.strip() for test in fields["Test"].split(","))
    sentence = SENTENCE.match(fields["Task"])
    task = " ".join((sentence[0] if sentence else fields["Task"]).split())
    task = task or f"write {fields['File']}; the lesson's section {fields['Lesson']!r} explains it"
    hints = tuple(fields[label] for label in LABELS if label.startswith("Hint"))
    return Exercise(
        path.parent.name, name, task, file, symbol, tests, fields["Lesson"], difficulty, int(time[1]), hints
    )
