"""The exercises of every part: markers in the code, and for each a task, three hints and a test.

Markers are `# exercise: NAME` in Python and `// exercise: NAME` in CUDA C++.
"""

from __future__ import annotations

import ast
import re
from itertools import accumulate
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MIN_EXERCISES = 3
COMMENTS = {".py": "#", ".cu": "//", ".cuh": "//"}
HINTS = ("Hint 1", "Hint 2", "Hint 3")
FIELDS = ("Task", "File", "Test", "Lesson", "Difficulty", "Time", *HINTS)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def read_markers(path: Path) -> dict[str, tuple[int, int]]:
    """Name → the lines of its two markers. Raises AssertionError on one that is not closed, or opened twice."""
    marker = re.compile(rf"^\s*{COMMENTS[path.suffix]} exercise: (\w+)\s*$")
    found: dict[str, tuple[int, int]] = {}
    opened: tuple[str, int] | None = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        match = marker.match(line)
        assert "exercise:" not in line or match, f"{path.name}:{number} is no marker: {line.strip()!r}"
        if not match:
            continue
        if match[1] == "end":
            assert opened, f"{path.name}:{number} closes an exercise that is not open"
            found[opened[0]], opened = (opened[1], number), None
        else:
            assert opened is None, f"{path.name}:{number} opens {match[1]} inside of {opened}"
            assert match[1] not in found, f"{path.name}:{number} opens {match[1]} a second time"
            opened = (match[1], number)
    assert opened is None, f"{path.name}: exercise {opened} is never closed by `{COMMENTS[path.suffix]} exercise: end`"
    return found


def read_tasks(part_dir: Path) -> dict[str, dict[str, str]]:
    """exercises.md: name → its fields; a field may go on over several lines."""
    tasks: dict[str, dict[str, str]] = {}
    field = ""
    for line in (part_dir / "exercises.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            tasks[line[3:].strip()] = {"Task": ""}
            field = "Task"
        elif match := re.match(r"([A-Z][a-z]+(?: \d)?): (.*)", line):
            field = match[1]
            list(tasks.values())[-1][field] = match[2]
        elif tasks and line.strip():
            list(tasks.values())[-1][field] += " " + line.strip()
    return tasks


@pytest.mark.since(1)
def test_code_and_exercises_md_name_the_same_exercises(part_dir: Path) -> None:
    paths = [path for path in part_dir.rglob("*") if path.suffix in COMMENTS]
    markers = {name for path in paths for name in read_markers(path)}
    tasks = read_tasks(part_dir)
    assert len(markers) >= MIN_EXERCISES, f"{part_dir.name}: expected {MIN_EXERCISES} exercises, got {sorted(markers)}"
    assert markers == set(tasks), (
        f"{part_dir.name}: the code has the markers {sorted(markers)}, exercises.md the sections {sorted(tasks)}"
    )


@pytest.mark.since(1)
def test_each_exercise_has_a_complete_task(part_dir: Path) -> None:
    """And what it points to is there."""
    tests = ROOT / "tests" / part_dir.name[:6]
    for name, task in read_tasks(part_dir).items():
        where = f"{part_dir.name}/exercises.md, {name}"
        assert tuple(task) == FIELDS, f"{where}: expected the lines {FIELDS}, got {tuple(task)}"
        for test in task["Test"].split(", "):
            file = ROOT / test.partition("::")[0]
            assert file.is_file(), f"{where}: there is no test {test}"
            assert file.parent == tests, f"{where}: {test} is another part's test"
        for hint in HINTS:
            assert len(task[hint]) > 60, f"{where}: {hint} says next to nothing: {task[hint]!r}"
        assert len({task[hint] for hint in HINTS}) == len(HINTS), f"{where}: two hints are the same"
        page, _, section = task["Lesson"].rpartition(".md: ")  # of the lesson, if no page is named
        text = (part_dir / f"{page or 'README'}.md").read_text(encoding="utf-8")
        assert f"\n## {section}\n" in text, f"{where}: {page or 'README'}.md has no section {section!r}"


@pytest.mark.since(1)
def test_each_exercise_is_the_body_of_the_function_it_names(part_dir: Path) -> None:
    for name, task in read_tasks(part_dir).items():
        where, (file, symbol) = f"{part_dir.name}/exercises.md, {name}", task["File"].split("::")
        markers = read_markers(part_dir / file)
        assert name in markers, f"{where}: {file} has no marker of it"
        check_body = check_python if file.endswith(".py") else check_cuda
        check_body((part_dir / file).read_text(encoding="utf-8"), where, file, symbol, name, *markers[name])


def check_python(text: str, where: str, file: str, symbol: str, name: str, start: int, end: int) -> None:
    """The markers, in these lines, enclose statements of the function that the task names, and its docstring stays for
    the learner."""
    node: ast.AST = ast.parse(text)
    for part in symbol.split("."):
        node = next((child for child in ast.iter_child_nodes(node) if getattr(child, "name", None) == part), ast.Pass())
        assert isinstance(node, Function | ast.ClassDef), f"{where}: {file} has no {symbol}"
    assert isinstance(node, Function), f"{where}: {symbol} is no function"
    assert [child for child in node.body if start < child.lineno < end], (
        f"{file}: there is no code between the markers of {name} in {symbol}"
    )
    assert all(child.lineno > end or child.end_lineno < end for child in node.body if child.lineno > start), (
        f"{file}: `# exercise: end` of {name} stands inside of a statement"
    )
    assert ast.get_docstring(node), f"{file}::{symbol}: what remains for the learner needs a docstring"


# What says nothing about the structure of C++: comments, strings, characters, and the lines of the preprocessor.
NO_STRUCTURE = re.compile(
    r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])'|^[ \t]*\#(?:\\\n|[^\n])*""", re.DOTALL | re.MULTILINE
)
PAIRS = {"(": ")", "{": "}", "[": "]"}


def blank_out(text: str) -> str:
    """C++ with spaces in place of what says nothing about its structure; everything else keeps its place."""
    return NO_STRUCTURE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)


def find_pair(code: str, opening: int) -> int:
    """The index of the bracket that closes the one at an index. code: from blank_out()."""
    open_brackets: list[str] = []
    for index in range(opening, len(code)):
        if code[index] in PAIRS:
            open_brackets.append(PAIRS[code[index]])
        elif code[index] in PAIRS.values():
            expected = open_brackets.pop()
            assert code[index] == expected, f"line {line_at(code, index)}: expected {expected!r}, got {code[index]!r}"
            if not open_brackets:
                return index
    raise AssertionError(f"line {line_at(code, opening)}: {code[opening]!r} is never closed")


def line_at(text: str, index: int) -> int:
    return text.count("\n", 0, index) + 1


def find_definitions(code: str, symbol: str) -> list[tuple[int, int, int]]:
    """Every definition of a function with this name: the indices of its beginning and of the braces of its body."""
    found = []
    for call in re.finditer(rf"\b{symbol}\s*(\()", code):
        body = re.compile(r"(?:\s|const\b|noexcept\b|override\b)*\{").match(code, find_pair(code, call.start(1)) + 1)
        if body:
            before = max(code.rfind(character, 0, call.start()) for character in ";{}") + 1
            start = before + len(code[before:]) - len(code[before:].lstrip())
            found.append((start, body.end() - 1, find_pair(code, body.end() - 1)))
    return found


def check_cuda(text: str, where: str, file: str, symbol: str, name: str, start: int, end: int) -> None:
    """The same in CUDA C++, where a comment above the function stays for the learner."""
    code = blank_out(text)
    assert symbol.isidentifier(), f"{where}: expected {file}::FUNCTION, got {symbol!r}"
    definitions = find_definitions(code, symbol)
    assert len(definitions) == 1, f"{where}: expected one definition of {symbol} in {file}, got {len(definitions)}"
    [(beginning, opening, closing)] = definitions
    top, first, last = (line_at(code, index) for index in (beginning, opening, closing))
    assert first < start < end < last, (
        f"{file}: the markers of {name} are in lines {start} and {end}, not between the braces of {symbol}, which are "
        f"in lines {first} and {last}"
    )
    above = ["", *text.splitlines()][top - 1].strip()
    assert above.startswith("//") or above.endswith("*/"), (
        f"{file}::{symbol}: what remains for the learner needs a comment, directly above line {top}"
    )
    check_statements(code, f"{file}: the markers of {name}", start, end)


def check_statements(code: str, what: str, start: int, end: int) -> None:
    """Between the markers are whole statements: what blanking replaces them by is one, too."""
    lines = code.splitlines()
    before, body = ("\n".join(some).rstrip() for some in (lines[:start], lines[start : end - 1]))
    assert body.strip(), f"{what} have no code between them"
    for edge, code in (("begin", before), ("end", body)):
        assert code[-1] in ";{}", f"{what} {edge} inside of a statement, after {code.splitlines()[-1].strip()!r}"
    depths = list(accumulate((character in PAIRS) - (character in PAIRS.values()) for character in body))
    assert min(depths) == depths[-1] == 0, f"{what} enclose only one of the two braces of a block"


BODY = """\
    // exercise: solve
    if (x > 0) {
        x += f(x - 1);
    }
    return x;
    // exercise: end
"""
FUNCTION = f"""\
#include "common.cuh"
#define OPEN {{

__device__ int other(int x) {{ return f(x) + (x ? 1 : 2); }}  // a call, before f(x) {{

// What it does.
template <class T>
__device__ T f(T x) {{
    const char* text = "}}"; const char brace = '}}';  /* }} */
{BODY}}}
"""


def check_function(tmp_path: Path, old: str = "", new: str = "", symbol: str = "f") -> None:
    """Check FUNCTION after a change."""
    path = tmp_path / "f.cu"
    path.write_text(FUNCTION.replace(old, new, 1), encoding="utf-8")
    markers = read_markers(path)["solve"]
    check_cuda(path.read_text(encoding="utf-8"), "exercises.md, solve", "f.cu", symbol, "solve", *markers)


def test_a_body_in_cuda_is_accepted(tmp_path: Path) -> None:
    check_function(tmp_path)
    check_function(tmp_path, "// What it does.", "/* What\n   it does. */")
    check_function(tmp_path, "T f(T x) {", "T f(T x) const\n{")
    check_function(tmp_path, "    const char*", "    for (;;) {}\n    const char*")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("__device__ T f(T x) {", "__device__ T f(T x);\nT g(T x) {", "expected one definition of f in f.cu, got 0"),
        ("// What", "int f(int x) { return x; }\n\n// What", "expected one definition of f in f.cu, got 2"),
        ("    // exercise: end\n}", "}\n    // exercise: end", "not between the braces of f"),
        ("// What it does.\n", "", "needs a comment, directly above line 6"),
        ("// What it does.\n", "// What it does.\n\n", "needs a comment, directly above line 8"),
        (BODY, "    // exercise: solve\n    // nothing\n    // exercise: end\n", "have no code between them"),
        ("/* } */\n", "if (x)\n", "begin inside of a statement, after .*if .x."),
        ("x;\n    // exercise: end", "x\n    // exercise: end\n;", "end inside of a statement, after 'return x"),
        (BODY, "// exercise: solve\nif (x) {\nx++;\n// exercise: end\n}\n", "enclose only one"),
        (BODY, "if (x) {\n// exercise: solve\n}\n// exercise: end\n", "enclose only one"),
        (BODY, "if (x) {\n// exercise: solve\n} else { x++; }\n// exercise: end\n", "enclose only one"),
        (BODY, "if (x) {\n// exercise: solve\n} if (x) {\n// exercise: end\n}\n", "enclose only one"),
        ("// exercise: end\n", "# exercise: end\n", "f.cu:15 is no marker"),
        ("// exercise: end\n", "// end\n", "is never closed by `// exercise: end`"),
    ],
)
def test_a_body_in_cuda_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in FUNCTION, f"the test must change something, and {old!r} is not there"
    with pytest.raises(AssertionError, match=message):
        check_function(tmp_path, old, new)


def test_a_method_in_cuda_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"expected f.cu::FUNCTION, got 'Tile.f'"):
        check_function(tmp_path, symbol="Tile.f")
