"""Links of a page, as they have to be in the book: sources, folders and step diffs have pages there."""

from __future__ import annotations

import ast
import posixpath
import re
from functools import cache
from pathlib import PurePosixPath

from .glossary import terms_of, with_anchors, with_links
from .repository import Repository

FENCE = re.compile(r"^(```.*?^```[^\n]*$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()(?!https?://|#|mailto:)([^)\s#]+)(#[^)\s]*)?(?=\))")
LESSON = re.compile(r"part\d\d_\w+/README\.md|docs/transformer_primer\.md")
GLOSSARY = "GLOSSARY.md"
SYMBOL = re.compile(r"(?<![\[`\w])`([\w./-]+\.(?:py|cu|cuh|h))(?:::([\w.]+))?`(?!\]|`)")


class BrokenLinkError(ValueError):
    """A page links to a file that is not there."""


def target_of(repository: Repository, page: str, link: str) -> str:
    """Where a relative link leads in the book, relative to the page. Raises BrokenLinkError."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    if path in repository.files:
        if path in repository.sources:
            return f"{link}.html"
        return link.removesuffix(".diff") + ".html" if path.endswith(".diff") else link
    if path in repository.folders:
        readme = posixpath.join(path, "README.md")
        return f"{link.rstrip('/')}/README.md" if readme in repository.files else f"{link.rstrip('/')}/index.html"
    raise BrokenLinkError(f"{page}: {link} leads nowhere")


@cache
def lines_of(text: str) -> dict[str, int]:
    """The line of each class and function in a Python file, methods as Class.method."""
    found: dict[str, int] = {}

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found[prefix + child.name] = child.lineno
                walk(child, f"{prefix}{child.name}.")

    walk(ast.parse(text), "")
    return found


def source_of(repository: Repository, page: str, name: str) -> str | None:
    """The file that a page means by a name such as core/engine.py: next to the page, in its part, or from the root."""
    folders = [posixpath.dirname(page), page.partition("/")[0], ""]
    for folder in dict.fromkeys(folders):
        path = posixpath.normpath(posixpath.join(folder, name))
        if path in repository.sources:
            return path
    return None


def link_symbol(repository: Repository, page: str, match: re.Match[str]) -> str:
    """`core/engine.py::LLMEngine.step` becomes a link to its line; what is not found stays as it is."""
    path = source_of(repository, page, match[1])
    if path is None:
        return match[0]
    line = lines_of(repository.text(path)).get(match[2]) if match[2] and path.endswith(".py") else None
    relative = posixpath.relpath(path, posixpath.dirname(page) or ".")
    return f"[{match[0]}]({relative}.html{'' if line is None else f'#line-{line}'})"


def rewritten(repository: Repository, page: str) -> str:
    """A page's text with the links of the book. Raises BrokenLinkError."""
    pieces = FENCE.split(repository.text(page))
    terms = terms_of(repository.text(GLOSSARY)) if LESSON.fullmatch(page) else {}
    glossary = posixpath.relpath(GLOSSARY, posixpath.dirname(page) or ".")
    for number in range(0, len(pieces), 2):  # the others are code
        linked = LINK.sub(lambda m: target_of(repository, page, m[1]) + (m[2] or ""), pieces[number])
        linked = SYMBOL.sub(lambda m: link_symbol(repository, page, m), linked)
        pieces[number] = with_links(linked, terms, glossary)
    return with_anchors("".join(pieces)) if page == GLOSSARY else "".join(pieces)


def title_of(text: str, page: str) -> str:
    heading = re.search(r"^# (.+)$", text, re.MULTILINE)
    return heading[1].replace("`", "") if heading else PurePosixPath(page).stem
