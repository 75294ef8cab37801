"""Links from the terms that lessons print in bold to their entries in the glossary."""

from __future__ import annotations

import re

ENTRY = re.compile(r"^\*\*([^*\n]+)\.\*\*", re.MULTILINE)
TERM = re.compile(r"(?<![\w*\[|])\*\*([^*\n`]+?)([.:,]?)\*\*(?![\w*])")
IN_PARENTHESES = re.compile(r"\s*\(([^)]*)\)")
PLURAL = re.compile(r"(?<=\w\w\w)s$")


def anchor_of(entry: str) -> str:
    return "term-" + re.sub(r"[^a-z0-9]+", "-", entry.lower()).strip("-")


def key_of(term: str) -> str:
    """How a term is looked up: its letters, without a plural's s. KV caches → kv cache."""
    return PLURAL.sub("", " ".join(re.split(r"[\s-]+", term.lower().strip())))


def terms_of(glossary: str) -> dict[str, str]:
    """Key of a term → anchor of its entry. An entry such as **GQA (grouped-query attention).** explains two terms, and
    so does **Top-k, top-p.**"""
    found: dict[str, str] = {}
    for entry in ENTRY.findall(glossary):
        for term in [*IN_PARENTHESES.sub("", entry).split(","), *IN_PARENTHESES.findall(entry)]:
            found.setdefault(key_of(term), anchor_of(entry))
    return found


def with_anchors(glossary: str) -> str:
    return ENTRY.sub(lambda match: f'<span id="{anchor_of(match[1])}"></span>{match[0]}', glossary)


def with_links(text: str, terms: dict[str, str], glossary: str) -> str:
    """The first time that a text without code blocks has a term in bold, it becomes a link.

    terms: as terms_of() gives them; those that were found are taken out. glossary: its address, seen from the text.
    """

    def link(match: re.Match[str]) -> str:
        anchor = terms.pop(key_of(IN_PARENTHESES.sub("", match[1])), None)
        return match[0] if anchor is None else f"[{match[0]}]({glossary}#{anchor})"

    return TERM.sub(link, text)
