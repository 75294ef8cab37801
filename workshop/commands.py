"""The commands behind `workshop`, one function each."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from workshop import COMMAND, progress, workspace
from workshop.bodies import language_of
from workshop.check import Checker, watch
from workshop.course import Exercise, Part, WorkshopError, find_part, read_parts
from workshop.report import Report, width
from workshop.results import State
from workshop.runner import Runner
from workshop.saves import Saves


def run(args: argparse.Namespace, root: Path) -> int:
    """Run one command; returns the exit status. An error that the user can fix prints one line and returns 2."""
    report = Report(verbose=getattr(args, "verbose", False))
    try:
        if args.command in OF_THE_COURSE:
            return OF_THE_COURSE[args.command](root, args, report)
        part = find_part(root, args.part)
        if not part.exercises:
            raise WorkshopError(f"part {part.number} has no exercises")
        status = COMMANDS[args.command](part, args, report)
        report_to_board(root)
        return status
    except (WorkshopError, OSError) as error:
        Report(Console(stderr=True, highlight=False)).error(error)
        return 2


def list_parts(root: Path, args: argparse.Namespace, report: Report) -> int:
    report.parts(read_parts(root))
    return 0


def show_progress(root: Path, args: argparse.Namespace, report: Report) -> int:
    report.progress(progress.progress_of(root))
    report_to_board(root)
    return 0


def join(root: Path, args: argparse.Namespace, report: Report) -> int:
    member = progress.join(root, args.url, args.code, args.name)
    report.say(
        f"The board at {member.url} shows your progress as {member.name!r} from now on: which exercises you have"
    )
    report.say(f"started and solved, and how many hints you have read. `{COMMAND} leave` ends this.")
    return 0


def leave(root: Path, args: argparse.Namespace, report: Report) -> int:
    report.say(
        "You have left the board. It keeps what it already shows."
        if progress.leave(root)
        else "You had not joined a board."
    )
    return 0


def board(root: Path, args: argparse.Namespace, report: Report) -> int:
    from workshop.board import main  # the web framework takes a moment to import

    main(args.port, is_for_room=args.lan)
    return 0


def bundle(root: Path, args: argparse.Namespace, report: Report) -> int:
    from workshop.bundle import make_bundle

    make_bundle(root, Path(args.folder), args.pip_args.split(), report.say)
    return 0


def failure(root: Path, args: argparse.Namespace, report: Report) -> int:
    from workshop.failures import main  # it imports the parts

    return main(args.name, is_auto=args.auto, prediction=args.predict, report=report)


def report_to_board(root: Path) -> None:
    """Whether it works changes nothing for the learner, but a line."""
    if (problem := progress.tell_board(root)) is not None:
        Report(Console(stderr=True, highlight=False)).say(f"{problem} (`{COMMAND} leave` ends this)", "dim")


def start(part: Part, args: argparse.Namespace, report: Report) -> int:
    backup = workspace.start(part, force=args.force)
    say_backup(part, backup, report)
    copy = workspace.relative(part, part.copy)
    report.say(f"Part {part.number} is in {copy}, with these function bodies for you to write, in any order:\n")
    for exercise in part.exercises:
        about = f"{exercise.difficulty}, {exercise.minutes} min, lesson: {exercise.lesson}"
        where = f"{exercise.file}::{exercise.symbol}"
        report.say(f"{exercise.name:<{width(part.exercises)}}  {where}  ({about})", indent=2)
    file = part.exercises[0].file
    comment = language_of(file).comment
    report.say(f"\nRead {copy}/README.md first. Then open {copy}/{file}, look for `{comment} exercise:` and keep")
    report.say(f"`{COMMAND} check {part.number} --watch` running beside the editor.")
    return 0


def check(part: Part, args: argparse.Namespace, report: Report) -> int:
    workspace.require_copy(part)
    part.select(args.exercises)  # report a misspelled name before starting the runner
    with Runner(part) as runner:
        checker = Checker(part, args.exercises, runner, report)
        if args.watch:
            with Saves(part) as saves:
                watch(checker, saves, lambda: report_to_board(part.root))
        return 0 if checker.check() else 1


def hint(part: Part, args: argparse.Namespace, report: Report) -> int:
    """The next hint of an exercise, or the one that was asked for."""
    exercise = part.select([args.exercises])[0] if args.exercises else first_open(part)
    state = State.load(part)
    level = args.level or min(state.of(exercise).num_hints + 1, len(exercise.hints))
    state.of(exercise).num_hints = max(state.of(exercise).num_hints, level)
    state.write()
    report.say(f"{exercise.name}  {exercise.file}::{exercise.symbol}, lesson: {exercise.lesson}\n", "bold")
    report.say(f"Hint {level}: {' '.join(exercise.hints[level - 1].split())}")
    num_left = len(exercise.hints) - level
    name = f"{part.number} {exercise.name}"
    if num_left:
        report.say(f"\n{num_left} more: {COMMAND} hint {name}", "dim")
    else:
        report.say(f"\nThat was the last hint. The reference's body: {COMMAND} diff {name}", "dim")
    return 0


def first_open(part: Part) -> Exercise:
    """The first exercise that the learner has not solved, and `catch-up` has not filled in."""
    for exercise in part.exercises:
        if not workspace.is_solved(part, exercise) and not workspace.is_caught_up(part, exercise):
            return exercise
    return part.exercises[0]


def diff(part: Part, args: argparse.Namespace, report: Report) -> int:
    report.diff(workspace.diff(part, args.exercises))
    return 0


def catch_up(part: Part, args: argparse.Namespace, report: Report) -> int:
    exercises = part.select(args.exercises) if args.exercises else []
    say_backup(part, workspace.catch_up(part, exercises), report)
    what = ", ".join(args.exercises) or f"part {part.number}"
    report.say(f"The reference's {what} is now in {workspace.relative(part, part.copy)}.")
    return 0


def say_backup(part: Part, backup: Path | None, report: Report) -> None:
    if backup is not None:
        report.say(f"Your previous version is in {workspace.relative(part, backup)}.")


OF_THE_COURSE: dict[str, Callable[[Path, argparse.Namespace, Report], int]] = {
    "list": list_parts, "progress": show_progress, "join": join, "leave": leave, "board": board, "bundle": bundle,
    "failure": failure,
}  # fmt: skip
COMMANDS = {"start": start, "check": check, "hint": hint, "diff": diff, "catch-up": catch_up}  # of a part
