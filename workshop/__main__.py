"""`workshop`: start an exercise, check it, get a hint, compare, catch up; and what a teacher needs on the day."""

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

    def add(name: str, help: str, exercises: str = "", takes_part: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        if takes_part:
            command.add_argument("part", type=int, metavar="N", help="the part's number")
        if exercises:
            command.add_argument("exercises", nargs=exercises, metavar="EXERCISE", help="only this one")
        return command

    add("doctor", "check that this machine has what the course needs, and say how to fix it", takes_part=False)
    add("list", "list the parts, their exercises and your progress", takes_part=False)
    add("progress", "what you have started and solved so far", takes_part=False)
    start = add("start", "write part N to workspace/ with the bodies of its exercises blanked")
    start.add_argument("--force", action="store_true", help="start over; your current copy is backed up")
    check = add("check", "test your copy of part N: each exercise alone, then all tests of the part", "*")
    check.add_argument("--watch", action="store_true", help="check again after every save, until Ctrl-C")
    check.add_argument("--verbose", action="store_true", help="show all failures, with tracebacks")
    hint = add("hint", "the next hint for an exercise of part N (default: the first that is not solved yet)", "?")
    hint.add_argument("--level", type=int, choices=(1, 2, 3), help="show this hint again; 3 is close to the solution")
    add("diff", "compare your part N with the reference; a blank exercise is shown only if you name it", "*")
    add("catch-up", "replace part N, or one exercise, with the reference; your version is backed up", "*")
    failure = add(
        "failure", "break a running engine, and check how it recovers; without a name: list", takes_part=False
    )
    failure.add_argument("name", nargs="?", metavar="NAME", help="what to break")
    failure.add_argument(
        "--auto", action="store_true", help="don't wait for you to break it, and ask for no prediction"
    )
    failure.add_argument("--predict", metavar="LETTER", help="your prediction, instead of being asked")
    join = add("join", "let a teacher's board on the local network show your progress", takes_part=False)
    join.add_argument("url", metavar="URL", help="the board's address")
    join.add_argument("code", metavar="CODE", help="the room code")
    join.add_argument("name", metavar="NAME", help="what the board calls you")
    add("leave", "stop reporting to the board", takes_part=False)
    board = add("board", "a page with the progress of all learners who have joined", takes_part=False)
    board.add_argument("--port", type=int, default=8080, help="0 picks a free one (default: 8080)")
    board.add_argument("--lan", action="store_true", help="let other machines of the network join, not only this one")
    bundle = add("bundle", "write all that set-up needs without a network to a folder", takes_part=False)
    bundle.add_argument("folder", metavar="FOLDER", help="it must not exist, or be empty")
    bundle.add_argument("--pip-args", default="", metavar="ARGS", help="for pip download, such as --index-url=…")
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
