"""Lessons match the code and give no exercise away; links lead to files, and the length is within limits."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LESSONS = sorted(ROOT.glob("part[0-9][0-9]_*/README.md"))
PAGES = [
    *ROOT.glob("part[0-9][0-9]_*/**/[A-Z]*.md"), *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"),
    ROOT / "models" / "README.md", ROOT / "results" / "README.md",
]  # fmt: skip
DETAILS = re.compile(r"<details>.*?</details>", re.DOTALL)
EXERCISE = re.compile(r"# exercise: (\w+)\n(.*?)# exercise: end", re.DOTALL)
SNIPPET = re.compile(r"^`([\w/]+\.py)::([\w.]+)`\n+```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#)([^)\s]+)\)")


def symbol_source(path: Path, symbol: str) -> str:
    """The source of a function, class or method, dedented."""
    text = path.read_text(encoding="utf-8")
    nodes: list[ast.AST] = [ast.parse(text)]
    for name in symbol.split("."):
        found = [n for n in ast.iter_child_nodes(nodes[-1]) if getattr(n, "name", None) == name]
        assert found, f"{path.name} has no {symbol}"
        nodes.append(found[0])
    return textwrap.dedent(ast.get_source_segment(text, nodes[-1], padded=True) or "")


def is_in(snippet: str, source: str) -> bool:
    """Whether the snippet's lines appear in the source one after another, at any indentation."""
    wanted = [line.rstrip() for line in textwrap.dedent(snippet).strip("\n").splitlines()]
    lines = [line.rstrip() for line in source.splitlines()]
    for start in range(len(lines) - len(wanted) + 1):
        window = textwrap.dedent("\n".join(lines[start : start + len(wanted)])).splitlines()
        if window == wanted:
            return True
    return False


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda p: p.parent.name)
def test_snippets_are_verbatim_in_the_code(lesson: Path) -> None:
    snippets = SNIPPET.findall(lesson.read_text(encoding="utf-8"))
    assert snippets, f"{lesson.parent.name}/README.md shows no snippet headed `path::symbol`"
    for path, symbol, snippet in snippets:
        assert is_in(snippet, symbol_source(lesson.parent / path, symbol)), (
            f"{lesson.parent.name}/README.md: the snippet of {path}::{symbol} is not in the code:\n{snippet}"
        )


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda p: p.parent.name)
def test_the_length_of_a_lesson(lesson: Path) -> None:
    text = DETAILS.sub("", lesson.read_text(encoding="utf-8"))
    prose = re.sub(r"```.*?```|^\|.*?$", "", text, flags=re.DOTALL | re.MULTILINE)
    num_words = len(prose.split())
    assert 700 <= num_words <= 1_800, (
        f"{lesson.parent.name}/README.md has {num_words} words outside code, tables and <details>; expected "
        "700 to 1,800"
    )


def lines_of(code: str) -> list[str]:
    """Without indentation and blank lines."""
    return [line.strip() for line in code.splitlines() if line.strip()]


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda p: p.parent.name)
def test_no_body_of_an_exercise_is_in_the_text(lesson: Path) -> None:
    text = DETAILS.sub("", lesson.read_text(encoding="utf-8"))
    shown = "\n".join(["", *lines_of("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))), ""])
    for path in lesson.parent.rglob("*.py"):
        for name, body in EXERCISE.findall(path.read_text(encoding="utf-8")):
            lines = lines_of(body)
            for start in range(max(1, len(lines) - 2)):
                part = lines[start : start + 3]
                assert "\n".join(["", *part, ""]) not in shown, (
                    f"{lesson.parent.name}/README.md shows lines of the exercise {name} outside <details>: {part}"
                )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    links = [link.split("#")[0] for link in LINK.findall(page.read_text(encoding="utf-8"))]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing, f"{page.relative_to(ROOT)} has broken links: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_page_has_a_placeholder(page: Path) -> None:
    gaps = re.findall(r"@@\w+@@|TODO|TBD|XXX", page.read_text(encoding="utf-8"))
    assert not gaps, f"{page.relative_to(ROOT)} still has {gaps}"


def test_a_missing_snippet_is_caught() -> None:
    source = "def f():\n    if x:\n        a = 1\n        b = 2\n"
    assert is_in("a = 1\nb = 2\n", source), "the same lines at another indentation are in the code"
    assert not is_in("a = 1\nb = 3\n", source), "a changed line must be noticed"
    assert not is_in("if x:\na = 1\n", source), "a changed nesting must be noticed"
