"""Draw the explanatory figures: python -m tools.figures [part01 …]. Each bench draws its own plots."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from common import plotting

ROOT = Path(__file__).parent.parent
PROMPT_COLOR, COMPUTED_COLOR, CACHED_COLOR = plotting.COLORS[0], plotting.COLORS[1], "#E8E8E8"


def draw_passes(axes: Axes, num_prompt: int, num_output: int, use_cache: bool) -> int:
    """One row per forward pass, one cell per position: computed or cached. Returns the number of computed cells."""
    computed = 0
    for row in range(num_output):
        for position in range(num_prompt + row):
            is_new = row == 0 or position == num_prompt + row - 1 or not use_cache
            computed += is_new
            color = (PROMPT_COLOR if position < num_prompt else COMPUTED_COLOR) if is_new else CACHED_COLOR
            axes.add_patch(Rectangle((position + 0.05, row + 0.05), 0.9, 0.9, color=color, linewidth=0))
    axes.set(xlim=(0, num_prompt + num_output - 1), ylim=(num_output, 0), aspect="equal")
    axes.set_xticks([0.5, num_prompt + 0.5], ["0", str(num_prompt)])
    axes.set_yticks([0.5, num_output - 0.5], ["1", str(num_output)])
    axes.grid(visible=False)
    return computed


def part01() -> None:
    """Which positions each pass computes, for a prompt of 6 tokens and 8 new ones."""
    labels = [(title, "position in the text", "forward pass") for title in ("No cache", "KV cache")]
    fig, all_axes = plotting.panels(labels, height_px=330)
    for axes, use_cache in zip(all_axes, (False, True), strict=True):
        computed = draw_passes(axes, num_prompt=6, num_output=8, use_cache=use_cache)
        axes.set_title(f"{axes.get_title(loc='left')}: computes {computed} positions")
    plotting.save(fig, ROOT / "part01_simple_server" / "figure.png")


def draw_lane(axes: Axes, row: int, boxes: list[tuple[float, float]], color: str) -> None:
    """Boxes from start to end on one line of a timeline."""
    for start, end in boxes:
        axes.add_patch(Rectangle((start + 0.04, row + 0.2), end - start - 0.08, 0.6, color=color, linewidth=0))


def part02() -> None:
    """When each thread is busy, while an answer of eight tokens is generated and a client calls /health."""
    labels = [(title, "time", "") for title in ("Part 1: one thread", "Part 2: two threads")]
    fig, (left, right) = plotting.panels(labels, height_px=300)
    num_tokens, asked = 8, 2.4
    draw_lane(left, 1, [(i, i + 1) for i in range(num_tokens)], COMPUTED_COLOR)
    draw_lane(left, 1, [(num_tokens, num_tokens + 0.4)], PROMPT_COLOR)
    draw_lane(left, 2, [(asked, num_tokens + 0.4)], CACHED_COLOR)
    left.text(num_tokens + 0.6, 1.5, "all text", va="center", size=10)
    left.text((asked + num_tokens) / 2, 2.5, "waits", ha="center", va="center", size=10)
    draw_lane(right, 1, [(i, i + 1) for i in range(num_tokens)], COMPUTED_COLOR)
    draw_lane(right, 0, [(i, i + 0.3) for i in range(1, num_tokens + 1)] + [(asked, asked + 0.3)], PROMPT_COLOR)
    draw_lane(right, 2, [(asked, asked + 0.3)], CACHED_COLOR)
    for i in range(1, num_tokens + 1):
        right.annotate(
            "", (i + 0.15, -0.35), (i + 0.15, 0.2), arrowprops={"arrowstyle": "->", "color": plotting.TEXT_COLOR}
        )
    right.text(num_tokens + 0.6, -0.1, "text", va="center", size=10)
    for axes, lanes in (
        (left, ("", "the thread", "/health")),
        (right, ("event loop", "engine", "/health")),
    ):
        axes.set(xlim=(0, 11), ylim=(3, -0.6))
        axes.set_yticks([0.5, 1.5, 2.5], lanes)
        axes.set_xticks([])
        axes.grid(visible=False)
    plotting.save(fig, ROOT / "part02_streaming" / "figure.png")


FIGURES: dict[str, Callable[[], None]] = {"part01": part01, "part02": part02}


def main() -> int:
    names = sys.argv[1:] or list(FIGURES)
    if unknown := [name for name in names if name not in FIGURES]:
        print(f"no figure {unknown[0]!r}: expected {', '.join(FIGURES)}", file=sys.stderr)
        return 2
    for name in names:
        FIGURES[name]()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
