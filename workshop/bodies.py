"""The bodies between `# exercise: NAME` and `# exercise: end`: find, blank and replace them.

In CUDA C++ the markers are `// exercise: NAME` and `// exercise: end`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath

from workshop.course import Exercise, WorkshopError


@dataclass(frozen=True, slots=True)
class Language:
    """How a language writes markers and blank bodies. comment: what begins a comment; before, after: what a blank body
    has around its message."""

    comment: str
    before: str
    after: str

    @property
    def marker(self) -> re.Pattern[str]:
        """A whole marker line: its indent and its name."""
        return re.compile(rf"([ \t]*){self.comment} exercise: (\w+)[ \t]*")

    def show_marker(self, name: str) -> str:
        """A marker as it stands in a message to the learner."""
        return f"`{self.comment} exercise: {name}`"


PYTHON = Language("#", "raise NotImplementedError(", ")")
CUDA = Language("//", "EXERCISE(", ");")  # a macro that ends the launch with this message
LANGUAGES = {".py": PYTHON, ".cu": CUDA, ".cuh": CUDA}


def language_of(file: str) -> Language:
    """Raises WorkshopError if a file of this kind can't have exercises."""
    suffix = PurePath(file).suffix
    if suffix not in LANGUAGES:
        raise WorkshopError(f"{file}: an exercise must be in a file that ends with {' or '.join(LANGUAGES)}")
    return LANGUAGES[suffix]


@dataclass(frozen=True, slots=True)
class Body:
    """One exercise's lines. first: the index, from 0, of its first line in the file."""

    name: str
    indent: str
    first: int
    lines: tuple[str, ...]

    def is_blank(self, exercise: Exercise) -> bool:
        """Whether the body is still only the line that blanking wrote."""
        before = language_of(exercise.file).before
        written = [line.strip() for line in self.lines if line.strip()]
        return len(written) == 1 and written[0].startswith(f'{before}"{exercise.blank}')


def find_bodies(text: str, where: str) -> dict[str, Body]:
    """All bodies of a file, in order. where: the file, whose suffix decides how its markers are written.

    Raises WorkshopError naming the line of an unmatched marker.
    """
    language = language_of(where)
    pattern, show = language.marker, language.show_marker
    bodies: dict[str, Body] = {}
    opened: tuple[str, str, int] | None = None
    lines = text.split("\n")
    for index, line in enumerate(lines):
        marker = pattern.fullmatch(line)
        if marker is None:
            continue
        indent, name = marker.groups()
        if (name == "end") != (opened is not None):
            what = "has no start marker" if opened is None else f"comes before the end of {show(opened[1])}"
            raise WorkshopError(f"{where}:{index + 1}: {show(name)} {what}")
        if opened is None:
            if name in bodies:
                raise WorkshopError(f"{where}:{index + 1}: exercise {name} appears a second time")
            opened = (indent, name, index + 1)
        else:
            bodies[opened[1]] = Body(opened[1], opened[0], opened[2], tuple(lines[opened[2] : index]))
            opened = None
    if opened is not None:
        raise WorkshopError(f"{where}:{opened[2]}: {show(opened[1])} has no {show('end')}; put it back")
    return bodies


def replace_bodies(text: str, new: Mapping[str, Iterable[str]], where: str) -> tuple[str, list[int]]:
    """Replace some bodies with new lines; names without markers in the text are skipped.

    Returns the text and, for each of its lines, the line number (from 1) in the old text; a new line gets the number of
    the marker above it.
    """
    lines = text.split("\n")
    kept = list(enumerate(lines, 1))
    for body in reversed(find_bodies(text, where).values()):
        if body.name in new:
            kept[body.first : body.first + len(body.lines)] = [(body.first, line) for line in new[body.name]]
    return "\n".join(line for _, line in kept), [number for number, _ in kept]


def blank_bodies(text: str, exercises: Iterable[Exercise], where: str) -> str:
    """Replace every body with one line that fails and names it.

    Raises WorkshopError if exercises.md does not describe one of them.
    """
    known = {exercise.name: exercise for exercise in exercises}
    language, new = language_of(where), {}
    for name, body in find_bodies(text, where).items():
        if name not in known:
            raise WorkshopError(f"{where}: exercise {name} is not described in exercises.md")
        message = json.dumps(f"{known[name].blank} {known[name].task}", ensure_ascii=False)
        new[name] = [f"{body.indent}{language.before}{message}{language.after}"]
    return replace_bodies(text, new, where)[0]
