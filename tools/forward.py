"""Carry a fix made in one part's file through all later parts: `python -m tools.forward part03_…/block_manager.py`.

A fix goes into the earliest part that has the bug. From there each next part's copy is merged three ways, part by
part: ours is the next part's file, base is this part's file at HEAD, theirs is this part's file as it is now.
Exercise markers are left out: every part keeps its own.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePath

from tools import snapshots
from tools.exercise_markers import with_markers_of, without_markers

CONFLICT_MARKER = re.compile(rb"^(<{7}|>{7})( |\r?$)", re.MULTILINE)
HELP = """\
Carry a fix through all later parts. Make it in the earliest part that has the bug, do not commit, then name the file:

  python -m tools.forward part03_paged_attention/core/block_manager.py

The change of that file against HEAD is merged into part 4's copy, the resulting change into part 5's, and so on. Copies
that were identical stay identical. A part without the file ends the chain: the module was removed.
Uncommitted changes that a later copy already has are carried on from there too. Then step diffs and the evolution map
are regenerated and the tests of the touched parts run. Nothing is committed.

Exercise markers are left out of the merge, so each part keeps its own. Where the fix adds or rewrites lines right
next to a marker, the exercise is named: check that its markers still enclose the right lines.

At a conflict it stops and leaves the markers in that part's file. Resolve them, then name that file to go on:

  python -m tools.forward part06_chunked_prefill/core/block_manager.py

If the resolved file is as it was at HEAD, the fix ends there: run `python -m tools.snapshots` and the tests.
If you change the fix after carrying it, first `git restore` the later copies: the old fix in them would conflict.
"""


class UsageError(Exception):
    """The command cannot be carried out; the message is one line for the user."""


@dataclass(frozen=True, slots=True)
class PartFile:
    """A file of a part: the part's folder name and the path inside it."""

    part: str
    path: str

    def __str__(self) -> str:
        return f"{self.part}/{self.path}"

    def under(self, root: Path) -> Path:
        """Where the file is, in the repository at root."""
        return root / self.part / self.path


def read_head(root: Path, file: PartFile) -> bytes | None:
    """The file at HEAD, with the line ends a checkout gives it, or None if HEAD has no such file."""
    done = subprocess.run(["git", "cat-file", "--filters", f"HEAD:./{file}"], cwd=root, capture_output=True)
    return done.stdout if done.returncode == 0 else None


def conflict_lines(content: bytes) -> str:
    """The line ranges between conflict markers, such as "12-18, 40-44"; empty if there are none."""
    numbers = [str(content.count(b"\n", 0, match.start()) + 1) for match in CONFLICT_MARKER.finditer(content)]
    return ", ".join("-".join(numbers[i : i + 2]) for i in range(0, len(numbers), 2))


def parse_source(root: Path, argument: str) -> PartFile:
    """Check one command-line path (relative to root, or absolute) and split it.

    Raises UsageError unless it names a part's source file that differs from HEAD and has no conflict markers.
    """
    absolute = (root / argument).resolve()
    inside = absolute.relative_to(root) if absolute.is_relative_to(root) else PurePath()
    if len(inside.parts) < 2 or not snapshots.PART_NAME.fullmatch(inside.parts[0]):
        raise UsageError(f"{argument}: not a file of a part; expected, say, part03_paged_attention/core/engine.py")
    file = PartFile(inside.parts[0], PurePath(*inside.parts[1:]).as_posix())
    if not absolute.is_file():
        raise UsageError(f"{file}: no such file")
    if not snapshots.is_source(PurePath(file.path)):
        raise UsageError(f"{file}: not a source file; lessons and generated files differ from part to part")
    head, now = read_head(root, file), absolute.read_bytes()
    if head is None:
        raise UsageError(f"{file}: not in HEAD, so there is no change to merge; copy a new file to later parts by hand")
    if head == now:
        raise UsageError(f"{file}: same as in HEAD, so there is nothing to carry")
    if without_markers(head) == without_markers(now):
        raise UsageError(f"{file}: only exercise markers changed, and every part keeps its own; nothing to carry")
    check_resolved(file, now)
    return file


def check_resolved(file: PartFile, content: bytes) -> None:
    """Raise UsageError if the file still has conflict markers."""
    if lines := conflict_lines(content):
        raise UsageError(f"{file}: conflict markers at lines {lines}; resolve them, then run forward on this file")


def merge(root: Path, ours: PartFile, base: bytes, theirs: PartFile) -> tuple[bytes, bool]:
    """Merge theirs, a change of base, into ours, all without exercise markers.

    Returns the text and whether it is free of conflict markers. Raises UsageError if git cannot merge the file at all.
    """
    labels = ["-L", str(ours), "-L", f"{theirs} at HEAD", "-L", str(theirs)]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("ours", "base", "theirs")]
        contents = (ours.under(root).read_bytes(), base, theirs.under(root).read_bytes())
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(without_markers(content))
        done = subprocess.run(["git", "merge-file", "-p", "--quiet", *labels, *paths], cwd=root, capture_output=True)
    if done.returncode > 127:  # up to 127 it counts conflicts
        raise UsageError(f"{ours}: git merge-file failed: {done.stderr.decode().strip() or done.returncode}")
    return done.stdout, done.returncode == 0


def carry_once(root: Path, ours: PartFile, base: bytes, theirs: PartFile) -> str | None:
    """Bring the change from base to theirs into the next part's file; returns what happened, None for a conflict."""
    before = ours.under(root).read_bytes()
    check_resolved(ours, before)
    was_identical = without_markers(before) == without_markers(base)
    merged, is_clean = merge(root, ours, base, theirs)
    content, unsure = with_markers_of(before, merged)
    if content == before:
        return "already has it"
    ours.under(root).write_bytes(content)
    if not is_clean:
        return None
    outcome = "copied (the two were identical)" if was_identical else "merged"
    return "; ".join([outcome, *(f"check where the exercise {name} begins and ends" for name in unsure)])


def carry(root: Path, source: PartFile) -> PartFile | None:
    """Carry one file's change through the later parts; returns the file where it conflicted, None if nowhere."""
    parts = snapshots.list_parts(root)
    base = read_head(root, source)
    print(source)
    for this, following in pairwise(parts[parts.index(source.part) :]):
        theirs, ours = PartFile(this, source.path), PartFile(following, source.path)
        if not ours.under(root).is_file():
            print(f"  {following}: has no {source.path}; the chain ends here")
            return None
        before = ours.under(root).read_bytes()
        assert base is not None, f"{theirs} must have a base to merge from"
        if without_markers(theirs.under(root).read_bytes()) == without_markers(base):
            print(f"  {this}: already had the fix, so nothing is left to carry; the chain ends here")
            return None
        outcome = carry_once(root, ours, base, theirs)
        print(f"  {following}: {outcome or 'conflict'}")
        if outcome is None:
            return ours
        head = read_head(root, ours)
        base = before if head is None else head  # a part that was never committed changes only by this merge
    return None


def explain_conflict(root: Path, conflict: PartFile, others: list[PartFile]) -> str:
    """Say where the conflict is and which command continues from it, with the files not yet carried."""
    lines = conflict_lines(conflict.under(root).read_bytes())
    files = " ".join(map(str, [conflict, *others]))
    return (
        f"forward: CONFLICT in {conflict}, lines {lines}\n"
        f"Resolve the markers there, then go on with:\n  python -m tools.forward {files}"
    )


def touched_parts(root: Path, sources: list[PartFile]) -> list[str]:
    """The parts whose copy of any of the files differs from HEAD, including those of an earlier, interrupted run."""
    copies = [PartFile(part, path) for part in snapshots.list_parts(root) for path in sorted({s.path for s in sources})]
    present = [file for file in copies if file.under(root).is_file()]
    return sorted({file.part for file in present if read_head(root, file) != file.under(root).read_bytes()})


def folders_to_test(root: Path, parts: list[str]) -> list[str]:
    """The existing test folders that cover these parts."""
    names = [f"tests/{part[:6]}" for part in parts] + ["tests/contract"]
    return [name for name in names if (root / name).is_dir()]


def run_tests(root: Path, parts: list[str]) -> bool:
    """Run the tests of these parts in one pytest; returns whether all passed (or there were none)."""
    folders = folders_to_test(root, parts)
    if not folders:
        print("no tests to run")
        return True
    print("pytest", *folders, flush=True)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *folders], cwd=root)
    return done.returncode in (0, 5)  # 5: the folders hold no test


def forward(root: Path, arguments: list[str], *, with_tests: bool) -> int:
    """Carry every named file, then regenerate and test; returns the exit status 0 or 1. Raises UsageError."""
    sources = [parse_source(root, argument) for argument in arguments]  # all of them before anything is written
    for done, source in enumerate(sources, start=1):
        if conflict := carry(root, source):
            print(explain_conflict(root, conflict, sources[done:]), file=sys.stderr)
            return 1
    problems = snapshots.update(root, check=False)
    for problem in problems:
        print(problem, file=sys.stderr)
    passed = not with_tests or run_tests(root, touched_parts(root, sources))
    return 0 if passed and not problems else 1


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 carried, 1 conflict or something to fix, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.forward",
        description=HELP,
        epilog="Exit status: 0 success; 1 conflict, failing test or a table to fix; 2 wrong usage.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", metavar="partNN_name/file", help="a file with an uncommitted fix")
    parser.add_argument("--no-tests", action="store_true", help="do not run the tests of the touched parts")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="the repository, if not this one")
    args = parser.parse_args(argv)
    try:
        return forward(args.root.resolve(), args.files, with_tests=not args.no_tests)
    except UsageError as error:
        print(f"forward: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
