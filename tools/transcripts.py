"""Run the commands that the lessons show, and compare what they print: python -m tools.transcripts [--write] [PART …].

A lesson shows commands and their output in ```console blocks: lines that begin with `$ ` are commands, the others are
output. `…` stands for omitted output: alone on a line for omitted lines, within a line for omitted text. Numbers and
column widths may differ from run to run. All other differences are reported, and the exit status is 1.
--write: put the numbers of this run into the lessons.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.serve import server_process

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(?<=```console\n)(.*?)(?=^```)", re.DOTALL | re.MULTILINE)
ADDRESS = re.compile(r"(?:127\.0\.0\.1|localhost):8000")
HERE_DOCUMENT = re.compile(r"<<'(\w+)'$")
NUMBER = re.compile(r"\d[\d,.]*\d|\d")
OTHER_NUMBERS = re.compile(r"[0-9a-f]{32}")  # random ids
GAP = "…"
WIDTH = "80"  # of the terminal


@dataclass(slots=True)
class Command:
    """A command and the output that a lesson shows for it. line: where the output begins in the block."""

    text: str
    output: list[str]
    line: int


def split_block(block: str) -> list[Command]:
    """Split a block into its commands.

    A command continues on the next line if its line ends with a backslash, and up to END after <<'END'.
    """
    commands: list[Command] = []
    is_open, end = False, ""
    for number, line in enumerate(block.splitlines()):
        if end:
            commands[-1].text += f"\n{line}"
            end = "" if line == end else end
        elif is_open:
            commands[-1].text += line.strip().removesuffix("\\")
        elif line.startswith("$ "):
            commands.append(Command(line[2:].removesuffix("\\"), [], number))
            end = match[1] if (match := HERE_DOCUMENT.search(line)) else ""
        elif commands:
            commands[-1].output.append(line)
            continue
        is_open = line.endswith("\\")
        if commands:
            commands[-1].line = number + 1
    return commands


def stable(line: str) -> str:
    """The part of a line that must not differ: without numbers, bars of measured times and widths of table columns."""
    line = NUMBER.sub("#", OTHER_NUMBERS.sub("#", line))
    line = re.sub(r"[━─═]+", "─", line)
    line = re.sub(r"[█▒·]{20,}|(?<= ms )█+", "█", line)
    return re.sub(r"\s+", " ", line).strip()


def is_like(shown: str, printed: str) -> bool:
    pattern = ".*".join(map(re.escape, stable(shown).split(GAP)))
    return re.fullmatch(pattern, stable(printed)) is not None


def wraps_differently(shown: list[str], printed: list[str]) -> tuple[int, int] | None:
    """How many lines of each are the same text in other lines: a longer number can move the end of a line."""
    for num_shown, num_printed in itertools.product(range(1, 5), range(1, 5)):
        if is_like(" ".join(shown[:num_shown]), " ".join(printed[:num_printed])):
            return num_shown, num_printed
    return None


def compare(shown: list[str], printed: list[str]) -> tuple[list[str], list[str]]:
    """Find each shown line among the printed ones, in order. Returns (the shown lines with this run's numbers, what
    differs)."""
    renewed, problems, at, may_skip, num_joined = list[str](), list[str](), 0, False, 0
    for number, line in enumerate(shown):
        if num_joined:
            renewed.append(line)
            num_joined -= 1
            continue
        if line.strip() == GAP:
            renewed.append(line)
            may_skip = True
            continue
        places = range(at, len(printed)) if may_skip else range(at, min(at + 1, len(printed)))
        found = next((place for place in places if is_like(line, printed[place])), None)
        if found is None and (wrapped := wraps_differently(shown[number:], printed[at:])):
            renewed.append(line)
            num_joined, at, may_skip = wrapped[0] - 1, at + wrapped[1], False
            continue
        if found is None:
            expected = printed[at] if at < len(printed) and not may_skip else "no such line"
            problems.append(f"the lesson shows {line!r}, printed was {expected!r}")
            renewed.append(line)
            may_skip = True  # the lines after it may be right
            continue
        renewed.append(line if GAP in line else printed[found])
        at, may_skip = found + 1, False
    if not problems and not may_skip and at < len(printed):
        problems.append(f"the lesson lacks {printed[at]!r}, and has no {GAP} there")
    return renewed, problems


class Runner:
    """Runs a lesson's commands in their own directory. A server that `make serve` starts runs until the end."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self.directory, self.stack, self.url = directory, stack, ""
        self.env = {
            **os.environ, "COLUMNS": WIDTH, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8",
        }  # fmt: skip

    def run(self, command: str) -> list[str]:
        """Run a command. Returns the lines that it prints."""
        if command.startswith("make serve"):
            return self._serve(command)
        if self.url:
            command = ADDRESS.sub(self.url.removeprefix("http://"), command)
        if command.startswith("make demo"):
            command = f"{sys.executable} -m {self._part(command)}.demo"
        command = re.sub(r"(?<![\w/])\.venv/bin/", f"{Path(sys.executable).parent}/", command)
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.directory, env=self.env, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        return done.stdout.splitlines()

    def _serve(self, command: str) -> list[str]:
        flags = shlex.split(match[1]) if (match := re.search(r'ARGS="(.*?)"', command)) else []
        server = server_process(self._part(command), *flags, env=self.env, cwd=self.directory)
        self.url = self.stack.enter_context(server)
        return []

    def _part(self, command: str) -> str:
        number = match[1] if (match := re.search(r"PART=(\d+)", command)) else "[0-9]*"
        return sorted(ROOT.glob(f"part{number:0>2}_*"))[-1].name


def check_lesson(text: str, runner: Runner) -> tuple[str, list[str]]:
    """Returns (the lesson with this run's numbers, what differs)."""
    problems: list[str] = []

    def renew(match: re.Match[str]) -> str:
        lines = match[1].splitlines()
        commands = split_block(match[1])
        for index, command in enumerate(commands):
            shown = [line for line in command.output if line.strip()]
            is_server = command.text.startswith("make serve")
            if not is_server and not any(later.output for later in commands[index:]):
                continue  # the lesson shows no output, as for make bench
            printed = [line.rstrip() for line in runner.run(command.text) if line.strip()]
            if is_server or not command.output:
                continue
            renewed, differences = compare(shown, printed)
            problems.extend(f"$ {command.text}: {difference}" for difference in differences)
            numbers = [command.line + i for i, line in enumerate(command.output) if line.strip()]
            for number, line in zip(numbers, renewed, strict=True):
                lines[number] = line
        return "".join(f"{line}\n" for line in lines)

    return BLOCK.sub(renew, text), problems


def lessons(parts: list[int]) -> Iterator[Path]:
    for path in [ROOT / "README.md", *sorted(ROOT.glob("part[0-9][0-9]_*/[A-Z]*.md"))]:
        if not parts or (path.parent != ROOT and int(path.parent.name[4:6]) in parts):
            yield path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", type=int, help="numbers of parts (none: README and all parts)")
    parser.add_argument("--write", action="store_true", help="put the numbers of this run into the lessons")
    options = parser.parse_args()
    failed = False
    for path in lessons(options.parts):
        with contextlib.ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            renewed, problems = check_lesson(path.read_text(encoding="utf-8"), Runner(directory, stack))
        if options.write:
            path.write_text(renewed, encoding="utf-8")
        print(
            f"{path.relative_to(ROOT)}: {'as shown' if not problems else 'differs'}", *problems, sep="\n  ", flush=True
        )
        failed |= bool(problems)
    sys.exit(failed)


if __name__ == "__main__":
    main()
