"""Pages that are not Markdown: source files, folders, and step diffs side by side."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import PurePosixPath

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexer import Lexer
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1f2328; --muted: #57606a; --frame: #d1d9e0; --added: #dafbe1;
  --removed: #ffebe9; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --ink: #e6edf3; --muted: #9da7b3; --frame: #30363d;
  --added: #12361f; --removed: #48191c; --accent: #4aa8e0; } }
body { margin: 0 auto; max-width: 110rem; padding: 0 1rem 3rem; background: var(--page); color: var(--ink);
  font: 0.9375rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.2rem; } h2, summary { font-size: 1rem; font-weight: 600; cursor: pointer; }
a { color: var(--accent); } pre, td { font: 0.8125rem/1.45 ui-monospace, monospace; }
pre { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; margin: 0.5rem 0 1.5rem; }
td { vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere; padding: 0 0.4rem; border: 0; }
td.number { width: 3.5rem; text-align: right; color: var(--muted); user-select: none; }
td.added { background: var(--added); } td.removed { background: var(--removed); }
tr.gap td { color: var(--muted); border-top: 1px solid var(--frame); padding-top: 0.3rem; }
details { border: 1px solid var(--frame); border-radius: 0.5rem; padding: 0.4rem 0.8rem; margin: 0.5rem 0; }
span[id^=line-]:target { background: color-mix(in srgb, var(--accent) 25%, transparent); }
"""
LIGHT, DARK = HtmlFormatter(style="default"), HtmlFormatter(style="github-dark")
HUNK = re.compile(r"@@ -(\d+)(?:,\d+)? \+(\d+)(?:,\d+)? @@(.*)")


def colors() -> str:
    """Pygments' styles, light and dark, without their backgrounds."""
    light, dark = (re.sub(r"background(-color)?: [^;}]+;?", "", each.get_style_defs(".code")) for each in (LIGHT, DARK))
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"


def document(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{colors()}</style></head><body>\n{body}\n</body></html>\n"
    )


def lexer_for(name: str) -> Lexer:
    try:
        return get_lexer_for_filename(name.removesuffix("h") if name.endswith(".cuh") else name, stripnl=False)
    except ClassNotFound:
        return TextLexer(stripnl=False)


def way_back(name: str) -> str:
    """A link to the page of the folder's part, or to the front page."""
    part, slash, rest = name.partition("/")
    depth = name.count("/")
    if not slash or not part.startswith("part"):
        return f'<p><a href="{"../" * depth}index.html">The course</a></p>'
    return f'<p><a href="{"../" * (depth - 1)}index.html">{html.escape(part)}</a> / {html.escape(rest)}</p>'


def source_page(name: str, text: str) -> str:
    """A source file with numbered lines, each with an id: #line-7."""
    formatter = HtmlFormatter(cssclass="code", linenos="inline", linespans="line")
    return document(name, f"{way_back(name)}<h1>{html.escape(name)}</h1>{highlight(text, lexer_for(name), formatter)}")


def folder_page(name: str, files: Sequence[str], folders: Sequence[str]) -> str:
    """files: of this folder, with the addresses of their pages. folders: below it that have a page."""
    items = "".join(f'<li><a href="{html.escape(each)}/index.html">{html.escape(each)}/</a></li>' for each in folders)
    for each in files:
        label = each.removesuffix(".html") if "." in each.removesuffix(".html") else each
        items += f'<li><a href="{html.escape(each)}">{html.escape(label)}</a></li>'
    return document(name, f"{way_back(f'{name}/')}<h1>{html.escape(name)}/</h1><ul>{items}</ul>")


@dataclass(slots=True)
class FileDiff:
    """One file of a step diff. rows: old number and line, new number and line; None where one side has none. A row of
    two strings is the heading of a hunk."""

    name: str
    kind: str = "changed"
    rows: list[tuple[tuple[int, str] | None, tuple[int, str] | None] | str] = field(default_factory=list)


def parse_diff(text: str) -> Iterator[FileDiff]:
    """The files of a unified diff, as git writes it."""
    for block in re.split(r"^(?=diff --git )", text, flags=re.MULTILINE)[1:]:
        header, _, body = block.partition("\n@@ ")
        name = header.splitlines()[0].rpartition(" b/")[2]
        kind = "new" if "\n--- /dev/null" in header else "removed" if "\n+++ /dev/null" in header else "changed"
        diff = FileDiff(name.partition("/")[2] if name.startswith("part") else name, kind)
        if body:
            add_hunks(diff, f"@@ {body}".splitlines())
        yield diff


def add_hunks(diff: FileDiff, lines: Sequence[str]) -> None:
    old = new = 0
    removed: list[tuple[int, str]] = []
    added: list[tuple[int, str]] = []

    def flush() -> None:
        diff.rows += zip_longest(removed, added)
        removed.clear()
        added.clear()

    for line in lines:
        if hunk := HUNK.match(line):
            flush()
            old, new = int(hunk[1]), int(hunk[2])
            diff.rows.append(hunk[3].strip())
        elif line.startswith("-"):
            removed.append((old, line[1:]))
            old += 1
        elif line.startswith("+"):
            added.append((new, line[1:]))
            new += 1
        elif line.startswith(" "):
            flush()
            diff.rows.append(((old, line[1:]), (new, line[1:])))
            old, new = old + 1, new + 1
    flush()


def highlighted(name: str, lines: Sequence[str]) -> list[str]:
    """Each line as HTML. The lines are colored together, so that a string over several lines is one."""
    if not lines:
        return []
    found = highlight("\n".join(lines), lexer_for(name), HtmlFormatter(nowrap=True)).split("\n")
    return [*found, *([""] * len(lines))][: len(lines)]


def side_by_side(diff: FileDiff) -> str:
    """A table of the old file and the new one."""
    pairs = [row for row in diff.rows if not isinstance(row, str)]
    before = iter(highlighted(diff.name, [row[0][1] for row in pairs if row[0] is not None]))
    after = iter(highlighted(diff.name, [row[1][1] for row in pairs if row[1] is not None]))
    rows = []
    for row in diff.rows:
        if isinstance(row, str):
            rows.append(f'<tr class="gap"><td class="number">…</td><td colspan="3">{html.escape(row)}</td></tr>')
            continue
        left, right = row
        is_same = left is not None and right is not None and left[1] == right[1]
        cells = [
            cell(left, before, "" if is_same else "removed"), cell(right, after, "" if is_same else "added"),
        ]  # fmt: skip
        rows.append(f"<tr>{''.join(cells)}</tr>")
    columns = '<colgroup><col style="width:3.5rem"><col><col style="width:3.5rem"><col></colgroup>'
    return f'<table class="code">{columns}{"".join(rows)}</table>'


def cell(side: tuple[int, str] | None, texts: Iterator[str], kind: str) -> str:
    if side is None:
        return '<td class="number"></td><td></td>'
    return f'<td class="number">{side[0]}</td><td class="{kind}">{next(texts)}</td>'


def diff_page(part: str, before: str, text: str) -> str:
    """A step diff: changed files side by side, and links to the new ones."""
    files = list(parse_diff(text))
    new = [(each.name, sum(not isinstance(row, str) for row in each.rows)) for each in files if each.kind == "new"]
    body = [
        f'<p><a href="index.html">{html.escape(part)}</a></p><h1>From {html.escape(before)} to {html.escape(part)}</h1>'
    ]
    if new:
        items = ", ".join(
            f'<a href="{html.escape(name)}.html">{html.escape(name)}</a> ({count})' for name, count in new
        )
        body.append(f"<p>New files, with their numbers of lines: {items}.</p>")
    if removed := [each.name for each in files if each.kind == "removed"]:
        body.append(f"<p>Removed: {html.escape(', '.join(removed))}.</p>")
    for each in files:
        if each.kind == "changed" and each.rows:
            is_open = " open" if PurePosixPath(each.name).suffix == ".py" and len(each.rows) < 400 else ""
            body.append(f"<details{is_open}><summary>{html.escape(each.name)}</summary>{side_by_side(each)}</details>")
    return document(f"From {before} to {part}", "\n".join(body))
