"""Percentiles and summaries of measured values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Summary:
    """A summary of measurements. All fields but count have the unit of the measurements."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    min: float
    max: float


def percentile(values: Sequence[float], q: float) -> float:
    """The value below which q percent of the values lie, interpolated linearly between the two nearest ranks.

    q: 0 (the minimum) to 100 (the maximum); same rule as numpy's default. The order of the values does not matter.
    Raises ValueError if values is empty, holds a NaN, or q is out of range.
    """
    if not values:
        raise ValueError("percentile of no values: nothing was measured")
    if not 0 <= q <= 100:
        raise ValueError(f"q={q} must be a percentage between 0 and 100")
    if any(math.isnan(value) for value in values):
        raise ValueError(f"percentile of {len(values)} values, at least one of which is NaN")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * q / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def summarize(values: Sequence[float]) -> Summary:
    """Count, mean, percentiles and extremes of the values; raises ValueError as percentile() does."""
    return Summary(
        count=len(values),
        p50=percentile(values, 50),
        p90=percentile(values, 90),
        p99=percentile(values, 99),
        mean=math.fsum(values) / len(values),
        min=min(values),
        max=max(values),
    )
