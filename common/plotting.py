"""One style for all plots: about 900 pixels wide in a README, colors that color-blind readers can tell apart.

matplotlib is imported inside the functions, so importing this module costs nothing.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import BarContainer
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Okabe and Ito's palette, darkest first, without its yellow, which is hard to see on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BASELINE_COLOR = "#7F7F7F"  # for the baseline of a comparison
TEXT_COLOR = "#333333"
WIDTH_PX = 900
MAX_PNG_BYTES = 150_000

_DPI = 100  # figure sizes in pixels refer to this resolution
_SHARPNESS = 1.6  # saved pixels per shown pixel, for high-resolution screens
_STYLE: dict[str, Any] = {
    "figure.dpi": _DPI,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same bytes on every machine
    "font.size": 12,
    "text.color": TEXT_COLOR,
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.labelcolor": TEXT_COLOR,
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.8,
    "xtick.color": TEXT_COLOR,
    "ytick.color": TEXT_COLOR,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 2.2,
    "lines.markersize": 6,
    "legend.frameon": False,
}


def figure(title: str, xlabel: str, ylabel: str, *, height_px: int = 480) -> tuple[Figure, Axes]:
    """A figure with one set of axes. Draw on the axes with matplotlib's own methods, then save()."""
    fig, (axes,) = panels([(title, xlabel, ylabel)], height_px=height_px)
    return fig, axes


def panels(labels: Sequence[tuple[str, str, str]], *, height_px: int = 420) -> tuple[Figure, list[Axes]]:
    """A figure with several sets of axes side by side, one for each (title, xlabel, ylabel).

    Sets matplotlib's process-wide style, so everything drawn on the axes later uses it too.
    """
    import matplotlib.style
    from cycler import cycler
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.style.use(["default", {**_STYLE, "axes.prop_cycle": cycler(color=COLORS)}])
    fig = Figure(figsize=(WIDTH_PX / _DPI, height_px / _DPI))
    FigureCanvasAgg(fig)
    axes_list = list(fig.subplots(1, len(labels), squeeze=False)[0])
    for axes, (title, xlabel, ylabel) in zip(axes_list, labels, strict=True):
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return fig, axes_list


def label_line(axes: Axes, line: Line2D, text: str) -> None:
    """Write text in the line's color next to its last point, which is easier to read than a legend."""
    import numpy as np

    last_point = float(np.asarray(line.get_xdata())[-1]), float(np.asarray(line.get_ydata())[-1])
    axes.annotate(
        text, last_point, (8, 0), textcoords="offset points", va="center", color=line.get_color(), weight="bold"
    )


def label_bars(axes: Axes, bars: BarContainer, fmt: str = "{:,.0f}", fontsize: float | None = None) -> None:
    """Write each bar's value above it and remove the vertical grid lines. fontsize: in points; None: the plot's."""
    axes.bar_label(bars, fmt=fmt, padding=3, fontsize=fontsize)
    axes.grid(visible=False, axis="x")


def save(fig: Figure, path: Path) -> None:
    """Write the figure as a PNG whose bytes depend only on the picture, not on the date.

    Raises ValueError, and writes nothing, for a path that does not end in .png or a picture over MAX_PNG_BYTES.
    """
    from PIL import Image

    if path.suffix != ".png":
        raise ValueError(f"{path}: plots are saved as .png")
    drawn, png = io.BytesIO(), io.BytesIO()
    fig.savefig(drawn, format="png", dpi=_DPI * _SHARPNESS)
    with Image.open(drawn) as image:  # a palette of 256 colors makes the file three times smaller
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(png, format="png", optimize=True)
    if png.tell() > MAX_PNG_BYTES:
        raise ValueError(f"{path}: {png.tell():,} bytes, over MAX_PNG_BYTES={MAX_PNG_BYTES:,}; draw fewer points")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png.getvalue())
