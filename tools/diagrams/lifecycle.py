"""Part 15: one traced request, from results/part15_lifecycle.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .geometry import Rect
from .metrics import BOLD, CODE, SMALL
from .svg import CELL_RADIUS, MARGIN, WIDTH, Drawing

RESULT = Path(__file__).parents[2] / "results" / "part15_lifecycle.json"
HUES = {"client": "grey", "API": "blue", "core": "purple", "worker": "green"}
ROW, LANE, BAR_LEFT = 27.0, 62.0, 440.0
MIN_BAR = 3.0


def lifecycle() -> Drawing:
    """Which process has the request when: up to the first token, and in one decode step."""
    measured = json.loads(RESULT.read_text(encoding="utf-8"))["measurements"]
    drawing = Drawing(
        "One request, from HTTP to the forward pass and back",
        "A row for each stage, with the process that is busy, the time in milliseconds, and a bar on a common time "
        "axis: first all stages up to the first token, then those of one decode step. The forward pass in the worker "
        "takes most of both.",
    )
    top = drawing.heading(
        f"Measured with `tiny` on two CPU cores: TTFT {1e3 * measured['ttft_s']:.1f} ms, then a decode step per token."
    )
    y = _stages(drawing, top, "Up to the first token", measured["to_first_token"])
    _stages(drawing, y + 18, "One decode step", measured["decode_step"])
    return drawing


def _stages(drawing: Drawing, top: float, title: str, stages: list[dict[str, Any]]) -> float:
    """Returns where it ends."""
    drawing.text(MARGIN, top + 8, title, BOLD)
    drawing.text(BAR_LEFT - 14, top + 8, "ms", SMALL, "muted", "end")
    whole_s = max(stage["end_s"] for stage in stages)
    scale = (WIDTH - MARGIN - BAR_LEFT) / whole_s
    y = top + 24
    for stage in stages:
        hue, name = HUES[stage["process"]], stage["process"]
        label = drawing.shape(Rect(MARGIN, y, LANE, ROW - 5), hue, CELL_RADIUS)
        drawing.text(label.cx, label.cy, name, SMALL, anchor="middle")
        drawing.text(MARGIN + LANE + 12, label.cy, stage["name"], SMALL)
        milliseconds = 1e3 * (stage["end_s"] - stage["start_s"])
        drawing.text(BAR_LEFT - 14, label.cy, f"{milliseconds:.2f}", CODE, anchor="end")
        left = min(BAR_LEFT + scale * stage["start_s"], WIDTH - MARGIN - MIN_BAR)
        width = max(MIN_BAR, scale * (stage["end_s"] - stage["start_s"]))
        drawing.shape(Rect(left, y + 3, min(width, WIDTH - MARGIN - left), ROW - 11), f"{hue}-strong", 1)
        y += ROW
    return y
