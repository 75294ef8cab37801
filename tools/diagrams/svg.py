"""A small vocabulary for diagrams: text, boxes, panels, cells, arrows, braces, badges and legends.

A drawing remembers where it put text, boxes and lines, so that checks.py can find what overlaps or sticks out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from xml.sax.saxutils import escape

from . import metrics, theme
from .geometry import HEAD_LENGTH, Point, Rect, Segment, arrow_head, horizontal_curve, number, rounded_path, toward
from .metrics import BODY, BOLD, SMALL, SMALL_BOLD, TITLE, Font

WIDTH, MARGIN = 860, 24
BOX_RADIUS, PANEL_RADIUS, CELL_RADIUS = 7, 12, 3
DASH = "5 4"
TEXT_HEIGHT = 1.15  # of the font size: the ink of a line, without the space between lines
BASELINE = 0.36  # of the font size: from the middle of a line down to its baseline
LABEL_GAP = 11  # from a line to the middle of the text beside it

Row = tuple[str, Font, str]  # a line of text, its font and its ink


@dataclass(frozen=True, slots=True)
class PlacedText:
    """A line of text, and the rectangle that its ink fills. on_badge: it may lie across the edge of a box."""

    text: str
    font: Font
    rect: Rect
    on_badge: bool = False


@dataclass(slots=True)
class Drawing:
    """One SVG file. title and desc are what a screen reader says."""

    title: str
    desc: str
    width: float = WIDTH
    min_height: float = 0
    body: list[str] = field(default_factory=list)
    texts: list[PlacedText] = field(default_factory=list)
    boxes: list[Rect] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)

    @property
    def page(self) -> Rect:
        """The whole drawing, which ends a margin below the lowest thing in it."""
        bottoms = [*(placed.rect.bottom for placed in self.texts), *(box.bottom for box in self.boxes)]
        return Rect(0, 0, self.width, max(self.min_height, ceil(max(bottoms, default=0) + MARGIN)))

    def heading(self, subtitle: str = "") -> float:
        """The title, and a sentence below it. Returns where the picture may begin."""
        self.text(MARGIN, 34, self.title, TITLE)
        if not subtitle:
            return 56
        return self.paragraph(MARGIN, 59, subtitle, self.width - 2 * MARGIN, ink="muted").bottom + 14

    def text(self, x: float, y: float, text: str, font: Font = BODY, ink: str = "", anchor: str = "start") -> Rect:
        """One line, its middle at height y; x is its start, middle or end. `Backticks` mark code."""
        width = metrics.text_width(text, font)
        left = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * width
        rect = Rect(left, y - font.size * TEXT_HEIGHT / 2, width, font.size * TEXT_HEIGHT)
        self.texts.append(PlacedText(text, font, rect))
        for run, run_font in metrics.split_code(text, font):
            self._run(left, y, run, run_font, ink)
            left += run_font.width(run)
        return rect

    def _run(self, x: float, y: float, run: str, font: Font, ink: str) -> None:
        """Text of one font. Its width is given, so that every browser's font fits where it was measured."""
        x += font.width(run[: len(run) - len(run.lstrip())])
        run = run.strip()
        if not run:
            return
        classes = " ".join(name for name in ("mono" * font.mono, "bold" * font.bold, ink) if name)
        attributes = f' class="{classes}"' if classes else ""
        self.body.append(
            f'<text x="{number(x)}" y="{number(y + BASELINE * font.size)}" font-size="{number(font.size)}"{attributes} '
            f'textLength="{number(font.width(run))}" lengthAdjust="spacingAndGlyphs">{escape(run)}</text>'
        )

    def paragraph(
        self, x: float, y: float, text: str, width: float, font: Font = BODY, ink: str = "", anchor: str = "start"
    ) -> Rect:
        """A text broken into lines of this width. y: the middle of the first line."""
        rects = [
            self.text(x, y + index * font.line_height, line, font, ink, anchor)
            for index, line in enumerate(metrics.wrap(text, font, width))
        ]
        left, right = min(rect.x for rect in rects), max(rect.right for rect in rects)
        return Rect(left, rects[0].y, right - left, rects[-1].bottom - rects[0].y)

    def rows(self, rect: Rect, rows: Sequence[Row], align: str = "middle", padding: float = 12) -> None:
        """Lines of text in the middle of a rectangle's height."""
        y = rect.cy - sum(font.line_height for _, font, _ in rows) / 2
        x = rect.cx if align == "middle" else rect.x + padding
        for text, font, ink in rows:
            self.text(x, y + font.line_height / 2, text, font, ink, align)
            y += font.line_height

    def shape(
        self, rect: Rect, style: str, radius: float = BOX_RADIUS, *, dashed: bool = False, check: bool = True
    ) -> Rect:
        """A rounded rectangle. style: a class of the theme; check: whether nothing may lie across its edge."""
        if check:
            self.boxes.append(rect)
        dash = f' stroke-dasharray="{DASH}"' if dashed else ""
        self.body.append(
            f'<rect class="{style}" x="{number(rect.x)}" y="{number(rect.y)}" width="{number(rect.width)}" '
            f'height="{number(rect.height)}" rx="{number(radius)}"{dash}/>'
        )
        return rect

    def box(
        self, rect: Rect, title: str = "", lines: Sequence[str] = (), hue: str = "grey", *,
        strong: bool = False, dashed: bool = False, align: str = "middle",
    ) -> Rect:  # fmt: skip
        """A box with a bold title and small lines below it."""
        self.shape(rect, f"{hue}-strong" if strong else hue, dashed=dashed)
        rows: list[Row] = [(title, BOLD, "")] if title else []
        self.rows(rect, [*rows, *((line, SMALL, "") for line in lines)], align)
        return rect

    def panel(self, rect: Rect, title: str = "", hue: str = "", dashed: bool = False) -> Rect:
        """A large, quiet box around others, with a title at its top left."""
        self.shape(rect, "panel", PANEL_RADIUS, dashed=dashed)
        if title:
            self.text(rect.x + 14, rect.y + 18, title, BOLD, f"{hue}-ink" if hue else "")
        return rect

    def cells(
        self, x: float, y: float, labels: Sequence[str], size: tuple[float, float], hue: str = "grey", *,
        strong: bool = False, font: Font = SMALL, dashed: bool = False,
    ) -> list[Rect]:  # fmt: skip
        """A row of cells side by side, a label in each."""
        width, height = size
        rects = [Rect(x + index * width, y, width, height) for index in range(len(labels))]
        for rect, label in zip(rects, labels, strict=True):
            self.shape(rect, f"{hue}-strong" if strong else hue, CELL_RADIUS, dashed=dashed)
            if label:
                self.text(rect.cx, rect.cy, label, font, anchor="middle")
        return rects

    def line(self, points: Sequence[Point], hue: str = "", dashed: bool = False, check: bool = True) -> None:
        """A line without a head. check: whether it may not cross text."""
        dash = f' stroke-dasharray="{DASH}"' if dashed else ""
        self.body.append(f'<path class="{f"{hue}-line" if hue else "line"}" d="{rounded_path(points)}"{dash}/>')
        if check:
            self.segments += pairwise(points)

    def arrow(
        self, points: Sequence[Point], label: str = "", side: str = "above", *, at: int = 0, hue: str = "",
        both: bool = False, dashed: bool = False,
    ) -> None:  # fmt: skip
        """Straight lines with round corners and a head at the end, or at both ends.

        label: written beside the middle of segment number `at`: above, below, left or right of it.
        """
        tips = [(points[-2], points[-1]), *([(points[1], points[0])] if both else [])]
        shaft = [*points[:-1], toward(points[-1], points[-2], HEAD_LENGTH - 1)]
        if both:
            shaft[0] = toward(points[0], points[1], HEAD_LENGTH - 1)
        self.line(shaft, hue, dashed)
        self._heads(tips, hue)
        if label:
            self._label((points[at], points[at + 1]), label, side)

    def curve(self, start: Point, end: Point, hue: str = "") -> None:
        """An arrow that leaves and arrives horizontally."""
        tip = end[0] - (HEAD_LENGTH - 1 if end[0] > start[0] else 1 - HEAD_LENGTH), end[1]
        path, segments = horizontal_curve(start, tip)
        self.body.append(f'<path class="{f"{hue}-line" if hue else "line"}" d="{path}"/>')
        self.segments += segments
        self._heads([(tip, end)], hue)

    def _heads(self, tips: Sequence[tuple[Point, Point]], hue: str) -> None:
        paths = "".join(arrow_head(before, tip) for before, tip in tips)
        self.body.append(f'<path class="{f"{hue}-head" if hue else "line-head"}" d="{paths}"/>')

    def _label(self, segment: Segment, label: str, side: str) -> None:
        (x1, y1), (x2, y2) = segment
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        match side:
            case "above":
                self.text(x, y - LABEL_GAP, label, SMALL, "muted", "middle")
            case "below":
                self.text(x, y + LABEL_GAP, label, SMALL, "muted", "middle")
            case "left":
                self.text(x - LABEL_GAP + 2, y, label, SMALL, "muted", "end")
            case _:
                self.text(x + LABEL_GAP - 2, y, label, SMALL, "muted")

    def brace(self, left: float, right: float, y: float, label: str, *, above: bool = False, font: Font = BODY) -> None:
        """A curly brace from left to right that points to a label. y: the height of its ends."""
        way, middle, depth = (-1 if above else 1), (left + right) / 2, min(6, (right - left) / 4)
        bend, tip = y + way * 6, y + way * 12
        self.body.append(
            f'<path class="line" d="M{number(left)} {number(y)}Q{number(left)} {number(bend)} '
            f"{number(left + depth)} {number(bend)}H{number(middle - depth)}Q{number(middle)} {number(bend)} "
            f"{number(middle)} {number(tip)}Q{number(middle)} {number(bend)} {number(middle + depth)} {number(bend)}"
            f'H{number(right - depth)}Q{number(right)} {number(bend)} {number(right)} {number(y)}"/>'
        )
        self.text(middle, tip + way * 10, label, font, anchor="middle")

    def badge(self, x: float, y: float, label: str, hue: str = "orange") -> Rect:
        """A small solid pill, its center at x, y."""
        text_width = metrics.text_width(label, SMALL_BOLD)
        width = max(20.0, text_width + 12)
        rect = Rect(x - width / 2, y - 9, width, 18)
        self.shape(rect, f"{hue}-head", 9, check=False)
        self._run(x - text_width / 2, y, label, SMALL_BOLD, "on-accent")
        self.texts.append(PlacedText(label, SMALL_BOLD, rect, on_badge=True))
        return rect

    def legend(self, x: float, y: float, items: Sequence[tuple[str, str]]) -> float:
        """Small squares with a word each: (class of the theme, label). y: their middle. Returns where they end.

        A class followed by " dashed" gives a dashed edge.
        """
        for style, label in items:
            name = style.removesuffix(" dashed")
            self.shape(Rect(x, y - 7, 14, 14), name, CELL_RADIUS, dashed=name != style)
            x = self.text(x + 21, y, label, SMALL).right + 20
        return x - 20

    def dot(self, x: float, y: float) -> None:
        """Where lines meet."""
        self.body.append(f'<circle class="line-head" cx="{number(x)}" cy="{number(y)}" r="3"/>')

    def mark(self, x: float, y: float, is_right: bool) -> None:
        """A check mark or a cross, its center at x, y."""
        if is_right:
            path, style = f"M{number(x - 5)} {number(y)}l4 4l7 -9", "green-line"
        else:
            path, style = f"M{number(x - 4)} {number(y - 4)}l8 8m0 -8l-8 8", "orange-line"
        self.body.append(f'<path class="{style} mark" d="{path}"/>')

    def svg(self) -> str:
        """The file. The page's own rectangle keeps it readable on a page of another color."""
        width, height = number(self.page.width), number(self.page.height)
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
                f'viewBox="0 0 {width} {height}" role="img" aria-labelledby="title desc">',
                f'<title id="title">{escape(self.title)}</title>',
                f'<desc id="desc">{escape(self.desc)}</desc>',
                f"<style>\n{theme.style_sheet()}\n</style>",
                '<defs><pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse" '
                'patternTransform="rotate(45)"><path class="grey-line" d="M0 0V7"/></pattern></defs>',
                f'<rect class="page" x="0.5" y="0.5" width="{number(self.page.width - 1)}" '
                f'height="{number(self.page.height - 1)}" rx="{PANEL_RADIUS}"/>',
                *self.body,
                "</svg>\n",
            ]
        )
