"""Take a test's message apart, so that it can be shown with one fact on a line."""

from __future__ import annotations

import re

# A test names the function and the section of the lesson that it is about. `check` knows better where to look: each
# exercise is checked alone, so whatever fails is that exercise's fault.
POINTER = re.compile(r"[.:;]?\s*\b([Ll]ook at|See) (?:(?!\.\s)[^\n])*?\.(?:py|cuh?)\b[^\n]*?(\.(?=\s|$)|$)")
EXPECTED = re.compile(
    r"(?P<case>.*?)[:,;.]?\s*\b[Ee]xpected (?P<expected>.+?)[,;]? (?:and |but )?got (?P<got>.+)", re.DOTALL
)
NEXT_SENTENCE = re.compile(r"\.\s+(?=[A-Z])")
MAX_CHARS = 300


def without_pointers(message: str) -> str:
    """The message without the sentences that say where to look."""
    return POINTER.sub(".", message).strip().removesuffix(".")


def split_facts(message: str) -> list[tuple[str, str]]:
    """Labels and texts. A message that says what it expected and what it got is split there; any other is one text."""
    match = EXPECTED.fullmatch(message)
    if match is None:
        return [("", message)]
    got, _, rest = partition(NEXT_SENTENCE, match["got"])
    facts = [("", match["case"]), ("expected", match["expected"]), ("got", got), ("", rest)]
    return [(label, text) for label, text in facts if text]


def partition(pattern: re.Pattern[str], text: str) -> tuple[str, str, str]:
    """str.partition with a pattern."""
    found = pattern.search(text)
    return (text[: found.start()], found[0], text[found.end() :]) if found else (text, "", "")


def clip(text: str) -> str:
    """At most MAX_CHARS of a text, without its middle if it is longer."""
    half = MAX_CHARS // 2
    return text if len(text) <= MAX_CHARS else f"{text[:half]} … {text[-half:]}"
