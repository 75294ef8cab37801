"""common/stats.py against numpy, and the errors it raises."""

import random

import numpy as np
import pytest

from common.stats import percentile, summarize


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
@pytest.mark.parametrize("q", [0, 1, 25, 50, 90, 99, 100])
def test_percentile_interpolates_as_numpy_does(count: int, q: float) -> None:
    values = [random.Random(count).uniform(-5, 5) for _ in range(count)]
    random.Random(q).shuffle(values)
    got, expected = percentile(values, q), float(np.percentile(values, q))
    assert got == pytest.approx(expected), f"p{q} of {count} values: expected {expected}, got {got}"


def test_percentile_leaves_its_argument_alone() -> None:
    values = [3.0, 1.0, 2.0]
    percentile(values, 50)
    assert values == [3.0, 1.0, 2.0], "percentile() sorted the caller's list"


@pytest.mark.parametrize(
    ("values", "q", "message"),
    [([], 50, "no values"), ([1.0], 101, "q=101"), ([1.0], -1, "q=-1"), ([1.0, float("nan")], 50, "NaN")],
)
def test_percentile_refuses(values: list[float], q: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        percentile(values, q)


def test_summary_of_known_values() -> None:
    summary = summarize([float(value) for value in range(100, -1, -1)])
    assert (summary.count, summary.mean, summary.min, summary.max) == (101, 50.0, 0.0, 100.0)
    assert (summary.p50, summary.p90, summary.p99) == (50.0, 90.0, 99.0)


def test_summary_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        summarize([])
