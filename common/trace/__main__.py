"""The command line: `python -m common.trace view FILE` and `python -m common.trace export FILE OUT.json`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from common.cli import exit_on_error
from common.errors import FieldError
from common.trace import export_perfetto, read_trace
from common.trace.view import print_view


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m common.trace", description="Show a trace that an engine wrote with --trace FILE.")
    commands = parser.add_subparsers(dest="command", required=True)
    view = commands.add_parser("view", help="print a summary; common/pages/engine.html shows each step in a browser")
    view.add_argument("file", help="a trace")
    view.add_argument("--from", dest="first", type=int, metavar="STEP", help="the first step to show")
    view.add_argument("--to", dest="last", type=int, metavar="STEP", help="the last step to show")
    view.add_argument("--width", type=int, metavar="N", help="characters in a line (default: the terminal's)")
    view.add_argument("--chart", action="store_true", help="also draw a chart, one row for each request")
    view.add_argument("--rows", type=int, metavar="N", default=40, help="the most rows of the chart (default: 40)")
    export = commands.add_parser("export", help="convert to JSON for https://ui.perfetto.dev")
    export.add_argument("file", help="a trace")
    export.add_argument("out", metavar="OUT.json", help="the file to write")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    if arguments.command == "export":
        if Path(arguments.out).exists() and Path(arguments.out).samefile(arguments.file):
            raise FieldError("OUT.json", f"expected another file than the trace, got {arguments.out}")
        trace = read_trace(arguments.file)
        export_perfetto(trace, arguments.out)
        if trace.note is not None:
            print(f"note: {trace.note}")
        print(f"{arguments.out}: open it in https://ui.perfetto.dev")
        return
    if arguments.width is not None and arguments.width < 40:
        raise FieldError("--width", f"expected at least 40, got {arguments.width}")
    if arguments.rows < 1:
        raise FieldError("--rows", f"expected at least 1, got {arguments.rows}")
    console = Console(width=arguments.width, highlight=False)
    trace = read_trace(arguments.file)
    max_rows = arguments.rows if arguments.chart else 0
    print_view(trace, console, first=arguments.first, last=arguments.last, max_rows=max_rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. An error prints one line and exits with status 2."""
    arguments = _parser().parse_args(argv)
    exit_on_error(f"python -m common.trace {arguments.command}", lambda: _run(arguments))


if __name__ == "__main__":
    main()
