"""How wide a text is, approximately, without any font at hand.

The widths are Helvetica's and Arial's. Every text in a drawing carries its width (`textLength`), so a browser with
another font fits its glyphs into it, and what was measured here is true everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

MIN_FONT_SIZE = 12
MONO_WIDTH = 0.6  # of the font size, in every common monospace font
LINE_HEIGHT = 1.35

REGULAR_WIDTHS = {
    222: "ijl'’", 260: "|", 278: " !,./:;I[]\\ft·", 333: "()-`r“”", 334: "{}", 355: '"', 389: "*", 469: "^",
    500: "Jcksvxyz", 556: "0123456789#$?L_abdeghnopqu–", 584: "+<=>~×÷−≤≥", 611: "FTZ", 667: "&ABEKPSVXY",
    722: "CDHNRUw", 778: "GOQ", 713: "∞", 833: "Mm", 834: "¼¾", 889: "%", 944: "W", 1000: "—…→←↔", 1015: "@",
}  # fmt: skip
BOLD_WIDTHS = {
    238: "'’", 278: " ,./I\\ijl·", 280: "|", 333: "!()-:;[]`ft", 389: "*r{}", 474: '"', 500: "z“”",
    556: "0123456789#$J_aceksvxy–", 584: "+<=>~×÷−≤≥", 611: "?FLTZbdghnopqu", 667: "EPSVXY", 722: "&ABCDHKNRU",
    713: "∞", 778: "GOQw", 833: "M", 834: "¼¾", 889: "%m", 944: "W", 975: "@", 1000: "—…→←↔",
}  # fmt: skip


def _by_character(widths: dict[int, str]) -> dict[str, float]:
    return {character: width / 1000 for width, characters in widths.items() for character in characters}


_REGULAR, _BOLD = _by_character(REGULAR_WIDTHS), _by_character(BOLD_WIDTHS)


@dataclass(frozen=True, slots=True)
class Font:
    """Sizes are in pixels of the drawing."""

    size: float = 13
    bold: bool = False
    mono: bool = False

    def width(self, text: str) -> float:
        """Raises KeyError for a character that the tables lack."""
        if self.mono:
            return MONO_WIDTH * self.size * len(text)
        widths = _BOLD if self.bold else _REGULAR
        return self.size * sum(widths[character] for character in text)

    @property
    def line_height(self) -> float:
        return self.size * LINE_HEIGHT


TITLE = Font(17, bold=True)
HEAD = Font(14, bold=True)
BOLD = Font(13, bold=True)
BODY = Font(13)
SMALL = Font(12)
SMALL_BOLD = Font(12, bold=True)
CODE = Font(12, mono=True)


def split_code(text: str, font: Font) -> list[tuple[str, Font]]:
    """Runs of a text in which `backticks` mark code, each with its font."""
    code = Font(max(MIN_FONT_SIZE, font.size - 1), bold=font.bold, mono=True)
    runs = [(run, code if index % 2 else font) for index, run in enumerate(text.split("`"))]
    return [(run, run_font) for run, run_font in runs if run]


def text_width(text: str, font: Font) -> float:
    """The width of a text, its `code` included."""
    return sum(run_font.width(run) for run, run_font in split_code(text, font))


def wrap(text: str, font: Font, width: float) -> list[str]:
    """Break a text at spaces into lines of at most this width. Code is not broken."""
    lines, line = list[str](), ""
    for word in _words(text):
        longer = f"{line} {word}" if line else word
        if line and text_width(longer, font) > width:
            lines.append(line)
            longer = word
        line = longer
    return [*lines, line]


def _words(text: str) -> list[str]:
    """Words, where a piece of code counts as part of one word."""
    words, is_code = [""], False
    for character in text:
        is_code ^= character == "`"
        if character == " " and not is_code:
            words.append("")
        else:
            words[-1] += character
    return words
