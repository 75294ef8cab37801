"""Regenerate the files that derive from the parts: `python -m tools.snapshots`, or `--check` to compare only.

These are each part's `step.diff` (from the previous part) and the evolution map in CONTRIBUTING.md. The table
"What changed" in a part's README is written by hand, because it says why; here it is compared with the files.

Only source files count: those with a suffix in SOURCE_SUFFIXES, outside hidden, `__pycache__` and `build` folders. So
lessons, pictures, compiled kernels and editor leftovers never reach a diff. Exercise markers don't count either:
every part has its own, so a module that differs only in its markers is the same.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

from tools.exercise_markers import without_markers

PART_NAME = re.compile(r"part\d\d_[a-z0-9_]+")
SOURCE_SUFFIXES = frozenset([".py", ".cpp", ".cu", ".cuh", ".h", ".html", ".jinja", ".json", ".sh", ".toml", ".yaml"])
MAP_PAGE = "CONTRIBUTING.md"
MAP_BEGIN, MAP_END = "<!-- evolution-map:begin -->", "<!-- evolution-map:end -->"
TABLE_SECTION = re.compile(r"^## What changed[ \t]*$(.*?)(?=^#{1,2} |\Z)", re.MULTILINE | re.DOTALL)
TABLE_RULE = re.compile(r"\|[-:| ]+\|")  # the line below a table's header
TABLE_ROW = re.compile(r"\|\s*`([^`]+)`\s*\|\s*(new|changed|removed)\s*\|.*\|")
INDEX_LINE = re.compile(rb"^index [0-9a-f]+\.\.[0-9a-f]+( \d+)?\n", re.MULTILINE)
DIFF_OPTIONS = ["--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "--diff-algorithm=histogram"]
DIFF_OPTIONS += ["--indent-heuristic", "--unified=3", "--inter-hunk-context=0", "--src-prefix=a/", "--dst-prefix=b/"]
FIX = "run `python -m tools.snapshots`"


@dataclass(frozen=True, slots=True)
class Part:
    """One part's folder name and its source files.

    files: path inside the part -> content, with LF line ends and without exercise markers.
    """

    name: str
    files: dict[str, bytes]


def list_parts(root: Path) -> list[str]:
    """Names of the part folders under root, in order."""
    return sorted(path.name for path in root.iterdir() if path.is_dir() and PART_NAME.fullmatch(path.name))


def is_source(path: PurePath) -> bool:
    """Whether a path, relative to its part, is a source file as the module's docstring defines it."""
    skipped = any(name.startswith(".") or name in ("__pycache__", "build") for name in path.parts)
    return path.suffix in SOURCE_SUFFIXES and not skipped


def load_parts(root: Path) -> list[Part]:
    """Read every part's source files."""
    parts = []
    for name in list_parts(root):
        paths = {path.relative_to(root / name): path for path in (root / name).rglob("*") if path.is_file()}
        files = {rel.as_posix(): without_markers(read_lf(path)) for rel, path in paths.items() if is_source(rel)}
        parts.append(Part(name, dict(sorted(files.items()))))
    return parts


def read_lf(path: Path) -> bytes:
    """A file's bytes with LF line ends, so that a checkout with CRLF gives the same results."""
    return path.read_bytes().replace(b"\r\n", b"\n")


def compare(old: Part | None, new: Part) -> dict[str, str]:
    """Path -> "new", "changed", "same" or "removed", for every source file of both parts."""
    before = old.files if old else {}
    changes = dict.fromkeys(before, "removed")
    for path, content in new.files.items():
        changes[path] = "new" if path not in before else "same" if before[path] == content else "changed"
    return dict(sorted(changes.items()))


def step_diff(old: Part, new: Part) -> bytes:
    """The unified diff between two parts, the same bytes on every machine.

    Raises CalledProcessError if git fails.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        for part in (old, new):
            write_part(folder, part)
        attributes = folder / "attributes"
        attributes.write_text("*.py diff=python\n", encoding="utf-8")  # hunk headers name the method, not the class
        command = ["git", "-c", f"core.attributesFile={attributes}", "diff", "--no-index", *DIFF_OPTIONS]
        done = subprocess.run([*command, old.name, new.name], cwd=folder, env=clean_env(folder), capture_output=True)
    if done.returncode not in (0, 1):  # 1: they differ
        raise subprocess.CalledProcessError(done.returncode, done.args, done.stdout, done.stderr)
    return INDEX_LINE.sub(b"", done.stdout)


def write_part(folder: Path, part: Part) -> None:
    """Write a part's source files, and nothing else, under folder."""
    (folder / part.name).mkdir()
    for path, content in part.files.items():
        target = folder / part.name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def clean_env(folder: Path) -> dict[str, str]:
    """The environment without anything that lets a user, a system or an outer repository configure git."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    fixed = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_ATTR_NOSYSTEM": "1", "LC_ALL": "C"}
    return env | fixed | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}


def steps(parts: list[Part]) -> list[tuple[Part | None, Part]]:
    """Each part with the previous one."""
    return list(zip([None, *parts[:-1]], parts, strict=True))


def evolution_map(parts: list[Part]) -> str:
    """The Markdown table of Python modules (down) and parts (across), and the share of modules that a step kept.

    The modules of a folder are grouped, those of the part's root first, in the order of their first appearance.
    """
    columns = [compare(old, new) for old, new in steps(parts)]
    modules: dict[str, None] = {}  # an ordered set
    for column in columns:
        modules.update((path, None) for path in column if path.endswith(".py"))
    lines = [["module", *(str(int(part.name[4:6])) for part in parts)], ["---"] * (len(parts) + 1)]
    for path in sorted(modules, key=lambda path: PurePosixPath(path).parent.as_posix()):
        cells = [column.get(path, "") for column in columns]
        lines.append([f"`{path}`", *("" if cell == "removed" else cell for cell in cells)])
    shares = [unchanged_share({path: column[path] for path in modules if path in column}) for column in columns]
    lines.append(["files unchanged from the part before", "", *(f"{share:.0%}" for share in shares[1:])])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def unchanged_share(changes: dict[str, str]) -> float:
    """The share of a part's files that are the same as in the part before."""
    present = [change for change in changes.values() if change != "removed"]
    return present.count("same") / len(present) if present else 0.0


def table_rows(readme: str) -> tuple[dict[str, str], list[str]]:
    """The rows of the tables in "What changed": (file -> word, problems about rows that cannot be read)."""
    section = TABLE_SECTION.search(readme)
    if section is None:
        return {}, ["has no section `## What changed`"]
    rows: dict[str, str] = {}
    problems = []
    lines = [line.strip() for line in section[1].splitlines() if line.startswith("|")]
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if TABLE_RULE.fullmatch(line) or TABLE_RULE.fullmatch(below):
            continue
        row = TABLE_ROW.fullmatch(line)
        if row is None:
            problems.append(f"cannot read the row {line!r}: expected | `file.py` | new, changed or removed | why |")
        elif row[1] in rows:
            problems.append(f"lists `{row[1]}` twice: delete one row")
        else:
            rows[row[1]] = row[2]
    return rows, problems


def check_table(root: Path, old: Part, new: Part) -> list[str]:
    """What is wrong with the table "What changed" of a part's README, one message each.

    Python files must be listed; other source files may be, and are then checked too.
    """
    path = root / new.name / "README.md"
    if not path.is_file():
        return [f"{new.name}/README.md is missing: its section `## What changed` must list this part's files"]
    rows, problems = table_rows(path.read_text(encoding="utf-8"))
    changes = compare(old, new)
    for name, change in changes.items():
        if change != "same" and name.endswith(".py") and name not in rows:
            problems.append(f"does not list `{name}`: add the row | `{name}` | {change} | why |")
    for name, word in rows.items():
        actual = changes.get(name)
        if actual is None:
            problems.append(f"lists `{name}`, which is not a source file of this part or of {old.name}: delete the row")
        elif actual == "same":
            problems.append(f"lists `{name}`, which is the same in {old.name} (except markers): delete the row")
        elif actual != word:
            problems.append(f"lists `{name}` as {word}, but compared with {old.name} it is {actual}: write {actual}")
    return [f'{new.name}/README.md, "What changed": {problem}' for problem in problems]


def page_with_map(page: str, table: str) -> str | None:
    """A page with the evolution map put between its markers, or None if it lacks them."""
    head, begin, rest = page.partition(MAP_BEGIN)
    _, end, tail = rest.partition(MAP_END)
    return f"{head}{begin}\n\n{table}\n{end}{tail}" if begin and end else None


def generate(root: Path, parts: list[Part]) -> tuple[dict[Path, bytes], list[str]]:
    """The contents of the generated files, and problems with those that cannot be generated."""
    generated: dict[Path, bytes] = {}
    problems = []
    for old, new in steps(parts):
        diff_path = root / new.name / "step.diff"
        if old is not None:
            generated[diff_path] = step_diff(old, new)
        elif diff_path.exists():
            problems.append(f"{new.name}/step.diff: the first part has no previous part, so delete this file")
    page = root / MAP_PAGE
    text = page_with_map(read_lf(page).decode() if page.is_file() else "", evolution_map(parts))
    if text is None:
        problems.append(f"{MAP_PAGE} needs the lines `{MAP_BEGIN}` and `{MAP_END}`: add them, then {FIX}")
    else:
        generated[page] = text.encode()
    return generated, problems


def update(root: Path, *, check: bool) -> list[str]:
    """Write the generated files (or, if check, compare them) and check the tables; returns the problems."""
    parts = load_parts(root)
    generated, problems = generate(root, parts)
    for path, content in generated.items():
        name = path.relative_to(root).as_posix()
        if path.is_file() and read_lf(path) == content:
            continue
        if check:
            problems.append(f"{name} is {'out of date' if path.is_file() else 'missing'}: {FIX}")
        else:
            path.write_bytes(content)
            print(f"wrote {name}")
    for old, new in steps(parts):
        problems += check_table(root, old, new) if old else []
    return problems


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 no problems, 1 something to fix, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.snapshots",
        description="Write each part's step.diff and CONTRIBUTING.md's evolution map; check the tables 'What changed'.",
        epilog="Exit status: 0 no problems; 1 problems left to fix, one per line; 2 wrong usage.",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; report what is out of date")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="the repository, if not this one")
    args = parser.parse_args(argv)
    if not args.root.is_dir() or not list_parts(args.root):
        print(f"snapshots: no folder named partNN_… in {args.root}", file=sys.stderr)
        return 2
    problems = update(args.root, check=args.check)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
