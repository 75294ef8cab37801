"""`workshop`: start an exercise, check it, get a hint, compare, catch up."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from workshop import COMMAND

ROOT = Path(__file__).resolve().parents[1]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="workshop",
        description="Do the course's exercises: they are written to workspace/, checked there, and come with hints.",
        epilog="Exit status: 0 success; 1 something fails or is not done yet; 2 wrong usage.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str, exercises: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        if name not in ("list", "doctor"):
            command.add_argument("part", type=int, metavar="N", help="the part's number")
        if exercises:
            command.add_argument("exercises", nargs=exercises, metavar="EXERCISE", help="only this (default: all)")
        return command

    add("doctor", "check that this machine has what the course needs, and say how to fix what is missing")
    add("list", "list the parts, their exercises and your progress")
    start = add("start", "write part N to workspace/ with the bodies of its exercises blanked")
    start.add_argument("--force", action="store_true", help="start over; your current copy is backed up")
    check = add("check", "test your copy of part N: each exercise alone, then all tests of the part", "*")
    check.add_argument("--watch", action="store_true", help="check again after every save, until Ctrl-C")
    check.add_argument("--verbose", action="store_true", help="show all failures, with tracebacks")
    hint = add("hint", "the next hint for an exercise of part N (default: the first that is not solved yet)", "?")
    hint.add_argument("--level", type=int, choices=(1, 2, 3), help="this one again; 3 is nearly the solution")
    add("diff", "compare your part N with the reference; a blank exercise is shown only if you name it", "*")
    add("catch-up", "replace part N, or one exercise, with the reference; your version is backed up", "*")
    return parser


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    if args.command == "doctor":  # must work before anything is installed
        from workshop import doctor

        return doctor.main(root)
    try:
        from workshop.commands import run
    except ModuleNotFoundError as error:
        print(f"workshop: the package {error.name} is not installed here: run `make setup`, then use "
              f"`{COMMAND}`. This is {sys.executable}", file=sys.stderr)  # fmt: skip
        return 2
    try:
        return run(args, root)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
