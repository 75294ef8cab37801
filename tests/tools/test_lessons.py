"""Lessons match the code and give no exercise away; links lead to files, and the length is within limits."""

from __future__ import annotations

import ast
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import kernel_tables

ROOT = Path(__file__).resolve().parents[2]
LESSONS = sorted(ROOT.glob("part[0-9][0-9]_*/README.md"))
PAGES = [
    *ROOT.glob("part[0-9][0-9]_*/**/[A-Z]*.md"), *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"),
    ROOT / "models" / "README.md", ROOT / "results" / "README.md",
]  # fmt: skip
DETAILS = re.compile(r"<details>.*?</details>", re.DOTALL)
EXERCISE = re.compile(r"(?:#|//) exercise: (\w+)\n(.*?)(?:#|//) exercise: end", re.DOTALL)
SNIPPET = re.compile(r"^`([\w/]+\.(?:py|cuh?|h))::([\w.]+)`\n+```(?:python|cpp)\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"```(?:python|cpp)\n(.*?)```", re.DOTALL)
# All pages of the parts that show code: those beside a lesson, too
WITH_SNIPPETS = sorted(
    page for page in ROOT.glob("part[0-9][0-9]_*/**/[A-Z]*.md")
    if page in LESSONS or SNIPPET.search(page.read_text(encoding="utf-8"))
)  # fmt: skip
LONG_PAGES = [*LESSONS, ROOT / "part15_full_architecture" / "KERNELS.md"]  # whose length is limited
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?://|#)([^)\s]+)\)")


def page_id(page: Path) -> str:
    folder = str(page.parent.relative_to(ROOT))
    return folder if page.name == "README.md" else f"{folder}/{page.name}"


def symbol_source(path: Path, symbol: str) -> str:
    """The source of a function, class or method, dedented."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return cpp_source(path.name, text, symbol)
    nodes: list[ast.AST] = [ast.parse(text)]
    for name in symbol.split("."):
        found = [n for n in ast.iter_child_nodes(nodes[-1]) if getattr(n, "name", None) == name]
        assert found, f"{path.name} has no {symbol}"
        nodes.append(found[0])
    return textwrap.dedent(ast.get_source_segment(text, nodes[-1], padded=True) or "")


def cpp_source(name: str, text: str, symbol: str) -> str:
    """The definition of a function or struct in C++ as this repository formats it, from its template on: it ends with a
    brace at the indentation of its first line, or is a single line."""
    lines = text.splitlines()
    code = [re.sub(r"\s*//.*", "", line) for line in lines]
    named = re.compile(rf"(?:\b(?:struct|class) {symbol}\b|(?<![.>])\b{symbol}\()")
    for number, line in enumerate(code):
        if not named.search(line) or re.match(r" *(?:return|if)\b", line):
            continue
        opened = next(at for at in range(number, len(code)) if code[at].endswith(("{", "}", ";")))
        if code[opened].endswith(";"):
            continue  # a declaration, or a call
        first = number
        while first and code[first - 1] and not code[first - 1].endswith((";", "{", "}")):
            first -= 1  # `template <…>` and the type stand before the name
        indent = re.match(" *", code[first])[0]  # type: ignore[index]
        is_closed = code[opened].endswith("}")
        end = opened if is_closed else next(at for at in range(opened, len(code)) if code[at].startswith(f"{indent}}}"))
        return textwrap.dedent("\n".join(lines[first : end + 1]))
    raise AssertionError(f"{name} has no {symbol}")


def is_in(snippet: str, source: str) -> bool:
    """Whether the snippet's lines appear in the source one after another, at any indentation."""
    wanted = [line.rstrip() for line in textwrap.dedent(snippet).strip("\n").splitlines()]
    lines = [line.rstrip() for line in source.splitlines()]
    for start in range(len(lines) - len(wanted) + 1):
        window = textwrap.dedent("\n".join(lines[start : start + len(wanted)])).splitlines()
        if window == wanted:
            return True
    return False


@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=page_id)
def test_snippets_are_verbatim_in_the_code(page: Path) -> None:
    snippets = SNIPPET.findall(page.read_text(encoding="utf-8"))
    assert snippets, f"{page.relative_to(ROOT)} shows no snippet headed `path::symbol`"
    for path, symbol, snippet in snippets:
        assert is_in(snippet, symbol_source(page.parent / path, symbol)), (
            f"{page.relative_to(ROOT)}: the snippet of {path}::{symbol} is not in the code:\n{snippet}"
        )


@pytest.mark.parametrize("lesson", LONG_PAGES, ids=page_id)
def test_the_length_of_a_lesson(lesson: Path) -> None:
    text = DETAILS.sub("", lesson.read_text(encoding="utf-8"))
    prose = re.sub(r"```.*?```|^\|.*?$", "", text, flags=re.DOTALL | re.MULTILINE)
    num_words = len(prose.split())
    assert 700 <= num_words <= 1_800, (
        f"{lesson.relative_to(ROOT)} has {num_words} words outside code, tables and <details>; expected 700 to 1,800"
    )


def lines_of(code: str) -> list[str]:
    """Without indentation and blank lines."""
    return [line.strip() for line in code.splitlines() if line.strip()]


def sources(part: Path) -> Iterator[Path]:
    for suffix in ("py", "cu", "cuh"):
        yield from part.rglob(f"*.{suffix}")


@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=page_id)
def test_no_body_of_an_exercise_is_in_the_text(page: Path) -> None:
    text = DETAILS.sub("", page.read_text(encoding="utf-8"))
    shown = "\n".join(["", *lines_of("\n".join(CODE.findall(text))), ""])
    part = ROOT / page.relative_to(ROOT).parts[0]
    for path in sources(part):
        for name, body in EXERCISE.findall(path.read_text(encoding="utf-8")):
            lines = lines_of(body)
            for start in range(max(1, len(lines) - 2)):
                shown_lines = lines[start : start + 3]
                assert "\n".join(["", *shown_lines, ""]) not in shown, (
                    f"{page.relative_to(ROOT)} shows lines of the exercise {name} outside <details>: {shown_lines}"
                )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    links = [link.split("#")[0] for link in LINK.findall(text)]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing, f"{page.relative_to(ROOT)} has broken links: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_page_has_a_placeholder(page: Path) -> None:
    gaps = re.findall(r"@@\w+@@|TODO|TBD|XXX", page.read_text(encoding="utf-8"))
    assert not gaps, f"{page.relative_to(ROOT)} still has {gaps}"


def test_the_tables_of_kernels_have_the_numbers_of_the_results() -> None:
    page = kernel_tables.PAGE.read_text(encoding="utf-8")
    measurements = json.loads(kernel_tables.RESULTS.read_text(encoding="utf-8"))["measurements"]
    assert kernel_tables.renew(page, measurements) == page, "KERNELS.md differs: run `python -m tools.kernel_tables`"


CPP = """\
int f(int x);  // declared
// f(x) in a comment
template <class T>
__global__ void
f(const T* x,
  int y) {
    if (g(x)) {
        a();
    }
}
struct S {
    int one(int x) const { return f(x); }
    // two
    int two(int x) const {
        return x;
    }
};
"""


@pytest.mark.parametrize(("symbol", "first", "last"), [("f", 3, 10), ("S", 11, 17), ("one", 12, 12), ("two", 14, 16)])
def test_the_source_of_a_symbol_in_cpp(symbol: str, first: int, last: int) -> None:
    expected = textwrap.dedent("\n".join(CPP.splitlines()[first - 1 : last]))
    assert cpp_source("f.cu", CPP, symbol) == expected


def test_a_missing_snippet_is_caught() -> None:
    source = "def f():\n    if x:\n        a = 1\n        b = 2\n"
    assert is_in("a = 1\nb = 2\n", source), "the same lines at another indentation are in the code"
    assert not is_in("a = 1\nb = 3\n", source), "a changed line must be noticed"
    assert not is_in("if x:\na = 1\n", source), "a changed nesting must be noticed"
