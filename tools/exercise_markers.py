"""Exercise markers: the lines `# exercise: NAME` and `# exercise: end`, with // in CUDA C++. Each part has its own.

Parts are compared and merged without them: `without_markers`. After a merge, `with_markers_of` restores a part's own.
Both kinds are found in any text, since a marker of the one language would be an error in the other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher

from workshop import bodies

COMMENTS = "|".join(dict.fromkeys(language.comment for language in bodies.LANGUAGES.values()))
MARKER = re.compile(rf"[ \t]*(?:{COMMENTS}) exercise: (\w+)[ \t]*\r?\n?".encode())


@dataclass(frozen=True, slots=True)
class Marker:
    """One marker line. index: the number of non-marker lines above it; exercise: its name."""

    line: bytes
    index: int
    exercise: str
    is_end: bool


def without_markers(content: bytes) -> bytes:
    """The content without its marker lines."""
    return b"".join(line for line in content.splitlines(keepends=True) if not MARKER.fullmatch(line))


def with_markers_of(marked: bytes, content: bytes) -> tuple[bytes, list[str]]:
    """Insert the markers of one text into a text that was made from it and has no markers.

    Returns the text, and the names of the exercises with an uncertain marker: lines that were added or rewritten right
    next to it may or may not belong to the body.
    """
    old, markers = _split(marked)
    new = content.splitlines(keepends=True)
    gaps = _Gaps(old, new)
    placed = [gaps.find(marker) for marker in markers]
    unsure = {marker.exercise: None for marker, (_, is_sure) in zip(markers, placed, strict=True) if not is_sure}
    for marker, (index, _) in reversed(list(zip(markers, placed, strict=True))):
        new.insert(index, marker.line)
    return b"".join(new), list(unsure)


def _split(content: bytes) -> tuple[list[bytes], list[Marker]]:
    """The non-marker lines, and the markers."""
    lines: list[bytes] = []
    markers: list[Marker] = []
    for line in content.splitlines(keepends=True):
        if found := MARKER.fullmatch(line):
            name = found[1].decode()
            exercise = markers[-1].exercise if name == "end" and markers else name
            markers.append(Marker(line, len(lines), exercise, name == "end"))
        else:
            lines.append(line)
    return lines, markers


class _Gaps:
    """Finds the gap between two old lines among the new lines."""

    def __init__(self, old: list[bytes], new: list[bytes]) -> None:
        self.new = new
        self.kept: dict[int, int] = {-1: -1, len(old): len(new)}  # old line -> new line, of lines in both
        matcher = SequenceMatcher(None, old, new, autojunk=False)
        for block in matcher.get_matching_blocks():
            self.kept.update((block.a + i, block.b + i) for i in range(block.size))

    def find(self, marker: Marker) -> tuple[int, bool]:
        """The index among the new lines at which to insert a marker, and whether it is certain.

        A marker stays next to its neighboring line in the body, if that line still exists; else next to the line on its
        other side; else as many lines below the last kept line above it as before.
        """
        above, below = self.kept.get(marker.index - 1), self.kept.get(marker.index)
        if above is not None and below is not None and above + 1 == below:
            return below, True
        in_body, outside = (above, below) if marker.is_end else (below, above)
        if in_body is not None:
            index = in_body + 1 if marker.is_end else in_body
            neighbor = self.new[index] if marker.is_end and index < len(self.new) else self.new[index - 1]
            return index, _indent(neighbor) < _indent(marker.line)
        if outside is not None:
            return (outside if marker.is_end else outside + 1), True
        last_kept = max(old for old in self.kept if old < marker.index)
        next_kept = min(old for old in self.kept if old >= marker.index)
        return min(self.kept[last_kept] + marker.index - last_kept, self.kept[next_kept]), False


def _indent(line: bytes) -> int:
    """Columns before the text; 0 for a blank line."""
    return len(line) - len(line.lstrip()) if line.strip() else 0
