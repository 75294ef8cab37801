"""The bodies between `# exercise: NAME` and `# exercise: end`: find, blank and replace them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from workshop.course import Exercise, WorkshopError

MARKER = re.compile(r"([ \t]*)# exercise: (\w+)[ \t]*")


@dataclass(frozen=True, slots=True)
class Body:
    """One exercise's lines. first: the index, from 0, of its first line in the file."""

    name: str
    indent: str
    first: int
    lines: tuple[str, ...]

    def is_blank(self, exercise: Exercise) -> bool:
        """Whether the body is still only the `raise` that blanking wrote."""
        written = [line.strip() for line in self.lines if line.strip()]
        return len(written) == 1 and written[0].startswith(f'raise NotImplementedError("{exercise.blank}')


def find_bodies(text: str, where: str) -> dict[str, Body]:
    """All bodies of a file, in order. Raises WorkshopError naming the line of an unmatched marker."""
    bodies: dict[str, Body] = {}
    opened: tuple[str, str, int] | None = None
    lines = text.split("\n")
    for index, line in enumerate(lines):
        marker = MARKER.fullmatch(line)
        if marker is None:
            continue
        indent, name = marker.groups()
        if (name == "end") != (opened is not None):
            what = "has no start marker" if opened is None else f"comes before the end of `# exercise: {opened[1]}`"
            raise WorkshopError(f"{where}:{index + 1}: `# exercise: {name}` {what}")
        if opened is None:
            if name in bodies:
                raise WorkshopError(f"{where}:{index + 1}: exercise {name} appears a second time")
            opened = (indent, name, index + 1)
        else:
            bodies[opened[1]] = Body(opened[1], opened[0], opened[2], tuple(lines[opened[2] : index]))
            opened = None
    if opened is not None:
        raise WorkshopError(f"{where}:{opened[2]}: `# exercise: {opened[1]}` has no `# exercise: end`; put it back")
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
    """Replace every body with one `raise` that names it. Raises WorkshopError if exercises.md does not describe it."""
    known = {exercise.name: exercise for exercise in exercises}
    new = {}
    for name, body in find_bodies(text, where).items():
        if name not in known:
            raise WorkshopError(f"{where}: exercise {name} is not described in exercises.md")
        message = json.dumps(f"{known[name].blank} {known[name].task}", ensure_ascii=False)
        new[name] = [f"{body.indent}raise NotImplementedError({message})"]
    return replace_bodies(text, new, where)[0]
