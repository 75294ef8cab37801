"""The commands behind `workshop`, one function each."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from workshop import COMMAND, workspace
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
        if args.command == "list":
            report.parts(read_parts(root))
            return 0
        part = find_part(root, args.part)
        if not part.exercises:
            raise WorkshopError(f"part {part.number} has no exercises")
        return COMMANDS[args.command](part, args, report)
    except (WorkshopError, OSError) as error:
        Report(Console(stderr=True, highlight=False)).error(error)
        return 2


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
                watch(checker, saves)
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


COMMANDS = {"start": start, "check": check, "hint": hint, "diff": diff, "catch-up": catch_up}
