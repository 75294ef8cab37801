"""core/cost_model.py: rates, and when loading is faster than computing."""

from __future__ import annotations

from typing import Any

import pytest

from part12_cpu_offloading.core.cost_model import DECAY, RISE, CostModel, Rate

BLOCK_SIZE = 4
LOOK = 'Look at core/cost_model.py::CostModel.num_to_load; README "Load or compute".'


def test_rates() -> None:
    rate = Rate()
    assert rate.tokens_per_s == 0 == rate.seconds_for(100)
    rate.add(100, 1.0)
    assert rate.tokens_per_s == 100 and rate.seconds_for(50) == 0.5
    rate.add(300, 1.0)
    assert rate.tokens_per_s == (DECAY * 100 + 300) / (DECAY + 1)
    before = rate.tokens_per_s
    rate.rise()
    assert rate.tokens_per_s == pytest.approx(RISE * before)


def model_with(compute: float, host: float, tiers: float) -> CostModel:
    """Rates in tokens per second; 0: not measured."""
    cost = CostModel(BLOCK_SIZE)
    for rate, speed in ((cost.compute, compute), (cost.host, host), (cost.tiers, tiers)):
        if speed:
            rate.add(speed, 1.0)
    return cost


@pytest.mark.parametrize(
    ("rates", "num_host", "num_found", "expected"),
    [
        ((1_000, 2_000, 500), 5, 5, 5),  # half the time
        ((1_000, 500, 500), 5, 5, 0),  # twice the time
        ((1_000, 2_000, 500), 0, 5, 0),
        ((1_000, 2_000, 500), 5, 10, 5),  # all: 10 + 40 ms; from host: 10 + 20 ms; none: 40 ms
        ((1_000, 2_000, 2_000), 5, 10, 10),
        ((10_000, 1_000_000, 1_000), 100, 110, 100),  # all would be faster than none, but the tiers cost too much
        ((1_000, 900, 4_000), 5, 10, 10),  # 22 + 5 ms; none: 40 ms
        ((1_000, 1_000, 0), 5, 5, 5),  # as fast: the device is free for others
        ((0, 500, 500), 5, 10, 10),  # computing has not been measured
        ((1_000, 0, 0), 5, 10, 10),  # loading has not been measured: it will be, then
        ((1_000, 2_000, 500), 0, 0, 0),
    ],
)
def test_the_fastest_way_is_taken(rates: Any, num_host: int, num_found: int, expected: int) -> None:
    got = model_with(*rates).num_to_load(num_host, num_found)
    assert got == expected, (
        f"tokens/s: computing {rates[0]}, host {rates[1]}, tiers {rates[2]} (0: not measured). Of {num_found} blocks "
        f"of {BLOCK_SIZE} tokens, {num_host} are in host memory, the others in the tiers: expected {expected} to be "
        f"loaded, got {got}. {LOOK}"
    )


@pytest.mark.parametrize(
    ("num_host", "num_found", "num_blocks", "host_rises", "tiers_rise"),
    [(5, 10, 10, False, False), (5, 10, 5, False, True), (5, 10, 0, True, True), (5, 5, 0, True, False),
     (0, 5, 0, False, True)],
)  # fmt: skip
def test_what_is_refused_is_assumed_to_get_faster(
    num_host: int, num_found: int, num_blocks: int, host_rises: bool, tiers_rise: bool
) -> None:
    cost = model_with(1_000, 500, 500)
    cost.note_refused(num_host, num_found, num_blocks)
    assert (cost.host.tokens_per_s > 500, cost.tiers.tokens_per_s > 500) == (host_rises, tiers_rise), (
        "Look at core/cost_model.py::CostModel.note_refused."
    )
