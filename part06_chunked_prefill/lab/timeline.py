"""What a trace says about the device: when it was busy, and how long it was idle between two steps."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from common.results import median
from common.trace import StepTrace, read_trace

from ..config import EngineConfig
from ..core.engine import LLMEngine

Interval = tuple[float, float]


def traced(config: EngineConfig, run: Callable[[LLMEngine], object]) -> list[StepTrace]:
    """Run an engine with a trace. Returns its steps."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "trace")
        engine = LLMEngine(config)
        engine.tracer = type(engine.tracer)(path, engine.scheduler, config.model)
        try:
            run(engine)
        finally:
            engine.tracer.close()
        return read_trace(path).steps


def forward(step: StepTrace) -> Interval:
    """When the device began and finished a step, in seconds."""
    assert step.forward_start_s is not None and step.forward_s is not None, "this trace has no device times"
    return step.forward_start_s, step.forward_start_s + step.forward_s


def host(step: StepTrace) -> list[Interval]:
    """When the engine itself worked on a step: to schedule and launch it, and to process its results."""
    return [(step.start_s, step.start_s + step.schedule_s), (step.end_s - step.update_s, step.end_s)]


def gaps_s(steps: list[StepTrace]) -> list[float]:
    """How long the device was idle between one step and the next."""
    return [max(0.0, forward(later)[0] - forward(earlier)[1]) for earlier, later in pairwise(steps)]


def summary(steps: list[StepTrace]) -> dict[str, float]:
    """Medians in milliseconds: a step of the device, the gap after it, the engine's own work; and the gap's share."""
    forward_s, gap_s = median([end - start for start, end in map(forward, steps)]), median(gaps_s(steps))
    host_s = median([step.schedule_s + step.update_s for step in steps])
    return {
        "forward_ms": round(1e3 * forward_s, 3),
        "gap_ms": round(1e3 * gap_s, 3),
        "host_ms": round(1e3 * host_s, 3),
        "gap_share": round(gap_s / (forward_s + gap_s), 4),
    }
