"""The learner's copies under workspace/: create, compare and replace them, always with a backup."""

from __future__ import annotations

import difflib
import hashlib
import shutil
import time
from pathlib import Path

from workshop import COMMAND
from workshop.bodies import LANGUAGES, Body, blank_bodies, find_bodies, language_of, replace_bodies
from workshop.course import Exercise, Part, WorkshopError
from workshop.lesson import place_lesson
from workshop.results import State

IGNORED = shutil.ignore_patterns("__pycache__", "build", "*.pyc", ".*")


def start(part: Part, *, force: bool = False) -> Path | None:
    """Write the part to workspace/ with its bodies blanked. Returns the backup of what was there, if anything was.

    Raises WorkshopError if a copy exists, unless force.
    """
    if part.copy.exists() and not force:
        raise WorkshopError(
            f"{relative(part, part.copy)} already exists, and your work in it is kept. To start over: "
            f"`{COMMAND} start {part.number} --force` (it makes a backup)"
        )
    blanked = {
        path.relative_to(part.path): blank_bodies(path.read_text(encoding="utf-8"), part.exercises, str(path))
        for path in sources(part.path)
    }
    backup = put_in_place(part)
    for path, text in blanked.items():
        (part.copy / path).write_text(text, encoding="utf-8")
    State.load(part).path.unlink(missing_ok=True)
    return backup


def catch_up(part: Part, exercises: list[Exercise]) -> Path | None:
    """Replace these exercises, or the whole part if there are none, with the reference. Returns the backup.

    What the learner has not solved is noted as filled in.
    """
    solved = solved_names(part)
    is_whole = not exercises or not part.copy.exists()
    backup = put_in_place(part) if is_whole else fill_in(part, exercises)
    state = State.load(part)
    for exercise in part.exercises if is_whole else exercises:
        is_own = exercise.name in solved
        state.of(exercise).caught_up = "" if is_own else digest(body_of(part, exercise))
    state.write()
    return backup


def fill_in(part: Part, exercises: list[Exercise]) -> Path:
    """Replace some exercises of the learner's copy. Returns the backup."""
    texts = {exercise.file: read_copy(part, exercise.file) for exercise in exercises}
    for exercise in exercises:
        if exercise.name not in find_bodies(texts[exercise.file], exercise.file):
            marker = language_of(exercise.file).show_marker(exercise.name)
            raise WorkshopError(
                f"{exercise.file} no longer has the line {marker}; "
                f"`{COMMAND} catch-up {part.number}` replaces the whole part"
            )
        new = {exercise.name: reference_bodies(part)[exercise.name].lines}
        texts[exercise.file], _ = replace_bodies(texts[exercise.file], new, exercise.file)
    backup = make_backup(part)
    shutil.copytree(backup, part.copy)
    for file, text in texts.items():
        (part.copy / file).write_text(text, encoding="utf-8")
    return backup


def put_in_place(part: Part) -> Path | None:
    """Copy the whole reference to the learner's copy; an existing copy becomes a backup."""
    backup = make_backup(part) if part.copy.exists() else None
    shutil.copytree(part.path, part.copy, ignore=IGNORED)
    place_lesson(part)
    return backup


def make_backup(part: Part) -> Path:
    """Move the learner's copy to workspace/backups/."""
    folder = part.workspace / "backups"
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{part.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    number = 0
    while (target := folder / (stem + (f"-{number}" if number else ""))).exists():
        number += 1
    return Path(shutil.move(part.copy, target))


def diff(part: Part, names: list[str]) -> list[str]:
    """The lines of a unified diff from the learner's files to the reference's.

    An exercise that is still blank and not named shows nothing, so that it does not reveal the solution.
    """
    require_copy(part)
    wanted = [e for e in part.select(names) if names or not body_of(part, e).is_blank(e)]
    bodies = reference_bodies(part)
    hidden = {e.name: bodies[e.name].lines for e in part.exercises if e not in wanted}
    lines: list[str] = []
    for path in sources(part.path):
        file = path.relative_to(part.path).as_posix()
        if names and file not in {exercise.file for exercise in wanted}:
            continue
        yours, _ = replace_bodies(read_copy(part, file), hidden, file)
        theirs = path.read_text(encoding="utf-8")
        labels = (f"yours/{file}", f"reference/{file}")
        lines += difflib.unified_diff(yours.split("\n"), theirs.split("\n"), *labels, lineterm="")
    return lines


def require_copy(part: Part) -> None:
    if not part.copy.is_dir():
        raise WorkshopError(f"part {part.number} is not started: run `{COMMAND} start {part.number}`")


def body_of(part: Part, exercise: Exercise) -> Body:
    """The learner's body of an exercise; an empty one, which is not blank, if its markers are missing."""
    where = relative(part, part.copy / exercise.file)
    bodies = find_bodies(read_copy(part, exercise.file), where)
    return bodies.get(exercise.name, Body(exercise.name, "", 0, ()))


def is_started(part: Part, exercise: Exercise) -> bool:
    return part.copy.is_dir() and not body_of(part, exercise).is_blank(exercise)


def is_caught_up(part: Part, exercise: Exercise) -> bool:
    """Whether the body is the one that `catch-up` filled in."""
    return is_started(part, exercise) and State.load(part).of(exercise).caught_up == digest(body_of(part, exercise))


def is_solved(part: Part, exercise: Exercise) -> bool:
    """Whether the learner's own body passed when it was last checked."""
    return is_started(part, exercise) and State.load(part).of(exercise).passes and not is_caught_up(part, exercise)


def solved_names(part: Part) -> set[str]:
    """No names if the copy is broken."""
    try:
        return {exercise.name for exercise in part.exercises if is_solved(part, exercise)}
    except WorkshopError:
        return set()


def digest(body: Body) -> str:
    return hashlib.sha256("\n".join(body.lines).encode()).hexdigest()[:16]


def fingerprints(part: Part) -> dict[str, str]:
    """For each exercise, a hash of what its check depends on: all lines of the copy but the other bodies, and the
    reference, the tests, and what they import."""
    files = [path.relative_to(part.copy).as_posix() for path in sources(part.copy)]
    texts = {relative(part, part.copy / file): read_copy(part, file) for file in files}
    bodies: dict[str, Body] = {}
    for file, text in texts.items():
        bodies |= find_bodies(text, file)
    rest = [replace_bodies(text, dict.fromkeys(bodies, ()), file)[0] for file, text in texts.items()]
    folders = (part.path, part.tests, part.root / "common")
    rest += [path.read_text(encoding="utf-8") for folder in folders for path in sources(folder)]
    own = {e.name: bodies[e.name].lines if e.name in bodies else () for e in part.exercises}
    return {name: hashlib.sha256(repr((lines, rest)).encode()).hexdigest() for name, lines in own.items()}


def reference_bodies(part: Part) -> dict[str, Body]:
    """All bodies of the reference. Raises WorkshopError if exercises.md names one that is missing."""
    bodies: dict[str, Body] = {}
    for path in sources(part.path):
        bodies |= find_bodies(path.read_text(encoding="utf-8"), str(path))
    for exercise in part.exercises:
        if exercise.name not in bodies:
            marker = language_of(exercise.file).show_marker(exercise.name)
            raise WorkshopError(f"{part.name} has no line {marker}, which exercises.md describes")
    return bodies


def sources(folder: Path) -> list[Path]:
    """The files of a part that may have exercises: Python and CUDA C++."""
    paths = (path for path in folder.rglob("*") if path.suffix in LANGUAGES)
    return sorted(path for path in paths if "build" not in path.relative_to(folder).parts)


def read_copy(part: Part, file: str) -> str:
    """Raises WorkshopError if the learner's copy lacks the file, or it is not text."""
    path = part.copy / file
    if not path.is_file():
        raise WorkshopError(f"{relative(part, path)} is missing; `{COMMAND} catch-up {part.number}` restores it")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise WorkshopError(f"{relative(part, path)} is not UTF-8 text: {error}") from error


def relative(part: Part, path: Path) -> str:
    """A path as the learner types it."""
    return path.relative_to(part.root).as_posix()
