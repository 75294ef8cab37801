"""Points, rectangles and paths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import hypot

Point = tuple[float, float]
Segment = tuple[Point, Point]

CORNER_RADIUS = 8
HEAD_LENGTH, HEAD_WIDTH = 8, 7
CURVE_SAMPLES = 16


@dataclass(frozen=True, slots=True)
class Rect:
    """An upright rectangle; y grows downwards."""

    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.x + self.width

    @property
    def bottom(self) -> float:
        return self.y + self.height

    @property
    def cx(self) -> float:
        return self.x + self.width / 2

    @property
    def cy(self) -> float:
        return self.y + self.height / 2

    @property
    def top_center(self) -> Point:
        return self.cx, self.y

    @property
    def bottom_center(self) -> Point:
        return self.cx, self.bottom

    @property
    def left_center(self) -> Point:
        return self.x, self.cy

    @property
    def right_center(self) -> Point:
        return self.right, self.cy

    def inset(self, margin: float) -> Rect:
        return Rect(self.x + margin, self.y + margin, self.width - 2 * margin, self.height - 2 * margin)

    def contains(self, other: Rect, tolerance: float = 0.01) -> bool:
        return (
            other.x >= self.x - tolerance
            and other.y >= self.y - tolerance
            and other.right <= self.right + tolerance
            and other.bottom <= self.bottom + tolerance
        )

    def overlaps(self, other: Rect, tolerance: float = 0.01) -> bool:
        return (
            self.x < other.right - tolerance
            and other.x < self.right - tolerance
            and self.y < other.bottom - tolerance
            and other.y < self.bottom - tolerance
        )

    def is_crossed_by(self, segment: Segment) -> bool:
        """Whether a line passes through the inside (Liang and Barsky's clipping)."""
        (x1, y1), (x2, y2) = segment
        start, end = 0.0, 1.0
        for delta, low, high in ((x2 - x1, self.x - x1, self.right - x1), (y2 - y1, self.y - y1, self.bottom - y1)):
            if delta == 0:
                if low >= 0 or high <= 0:
                    return False
                continue
            near, far = sorted((low / delta, high / delta))
            start, end = max(start, near), min(end, far)
        return start < end


def number(value: float) -> str:
    """Short and always the same: at most one decimal."""
    return f"{round(value, 1) + 0.0:g}"


def point(at: Point) -> str:
    return f"{number(at[0])} {number(at[1])}"


def toward(start: Point, end: Point, distance: float) -> Point:
    """The point at this distance from start, in the direction of end."""
    length = hypot(end[0] - start[0], end[1] - start[1])
    share = distance / length if length else 0.0
    return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])


def rounded_path(points: Sequence[Point]) -> str:
    """A path along straight lines, with rounded corners."""
    parts = [f"M{point(points[0])}"]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        radius = min(CORNER_RADIUS, _distance(before, corner) / 2, _distance(corner, after) / 2)
        parts.append(f"L{point(toward(corner, before, radius))}Q{point(corner)} {point(toward(corner, after, radius))}")
    return "".join([*parts, f"L{point(points[-1])}"])


def arrow_head(before: Point, tip: Point) -> str:
    """A triangle whose tip is where the line from `before` ends."""
    base = toward(tip, before, HEAD_LENGTH)
    dx, dy = (tip[0] - base[0]) / HEAD_LENGTH, (tip[1] - base[1]) / HEAD_LENGTH
    half = HEAD_WIDTH / 2
    left, right = (base[0] - dy * half, base[1] + dx * half), (base[0] + dy * half, base[1] - dx * half)
    return f"M{point(tip)}L{point(left)}L{point(right)}Z"


def horizontal_curve(start: Point, end: Point) -> tuple[str, list[Segment]]:
    """An S-shaped path that leaves and arrives horizontally, and lines that follow it closely."""
    middle = (start[0] + end[0]) / 2
    controls = (start, (middle, start[1]), (middle, end[1]), end)
    path = f"M{point(controls[0])}C{point(controls[1])} {point(controls[2])} {point(controls[3])}"
    samples = [_on_curve(controls, index / CURVE_SAMPLES) for index in range(CURVE_SAMPLES + 1)]
    return path, list(pairwise(samples))


def _on_curve(controls: Sequence[Point], t: float) -> Point:
    weights = ((1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3)
    x, y = (sum(weight * at[axis] for weight, at in zip(weights, controls, strict=True)) for axis in (0, 1))
    return x, y


def _distance(a: Point, b: Point) -> float:
    return hypot(b[0] - a[0], b[1] - a[1])
