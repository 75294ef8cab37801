"""core/eplb.py: which expert is where."""

from __future__ import annotations

import random

import pytest

from part11_expert_parallelism.core.eplb import balancedness, pack, place_experts, rank_loads, replicate

LOOK = 'Look at core/eplb.py::place_experts; README "Balancing".'
LOOK_REPLICATE = 'Look at core/eplb.py::replicate; README "Balancing".'
LOOK_PACK = 'Look at core/eplb.py::pack; README "Balancing".'
# The example of DeepSeek's EPLB: 12 experts in 4 groups, 16 slots on 8 GPUs of 2 nodes.
PUBLISHED = [
    (
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        0.828,
    ),
    (
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
        0.805,
    ),
]


@pytest.mark.parametrize(("loads", "expected", "balance"), PUBLISHED)
def test_the_published_example(loads: list[int], expected: list[int], balance: float) -> None:
    got = place_experts(loads, 16, 8, num_groups=4, num_nodes=2)
    assert got == expected, f"expected {expected}, got {got}. {LOOK}"
    ranks = rank_loads(loads, got, 8)
    assert round(sum(ranks) / 8 / max(ranks), 3) == balance, f"mean/max of {ranks}. {LOOK}"


def test_busy_experts_are_replicated() -> None:
    """Each further copy goes to the expert whose copies have the most to do."""
    got = replicate([(0, 10.0), (1, 60.0), (2, 25.0)], 6)
    assert got == [0, 1, 2, 1, 1, 2], f"60, then 30, then 25 is the most that a copy has: got {got}. {LOOK_REPLICATE}"


def test_packs_are_of_equal_size_and_about_equal_load() -> None:
    got = pack([1, 8, 5, 4], 2)
    assert got == [[1, 0], [2, 3]], f"8 + 1 and 5 + 4: got {got}. {LOOK_PACK}"
    got = pack([9, 1, 1, 1], 2)
    assert got == [[0, 3], [1, 2]], f"two in each, although 9 alone is more: got {got}. {LOOK_PACK}"
    assert pack([3, 3, 3], 3) == [[0], [1], [2]], LOOK_PACK


@pytest.mark.parametrize("seed", range(20))
def test_any_loads(seed: int) -> None:
    """Every expert has a slot, all slots are used, and no copy has more to do than with copies of the first experts."""
    rng = random.Random(seed)
    num_ranks = rng.choice([1, 2, 4, 8])
    num_experts = num_ranks * rng.randint(1, 8)
    num_slots = num_experts + num_ranks * rng.randint(0, 3)
    loads = [int(rng.paretovariate(0.8)) for _ in range(num_experts)]
    slots = place_experts(loads, num_slots, num_ranks)
    assert len(slots) == num_slots and set(slots) == set(range(num_experts)), f"got {slots}. {LOOK}"
    in_order = [slot % num_experts for slot in range(num_slots)]
    most, before = (max(loads[e] / each.count(e) for e in each) for each in (slots, in_order))
    assert most <= before, f"{loads}: a copy has {most}, with copies of the first experts {before}. {LOOK_REPLICATE}"


def test_no_tokens_at_all() -> None:
    assert set(place_experts([0, 0, 0, 0], 6, 2)) == {0, 1, 2, 3}, LOOK


# Balancedness


def test_loads_of_ranks_with_copies() -> None:
    got = rank_loads([60, 10, 10, 10], [0, 0, 1, 0, 2, 3], 2)
    assert got == [50.0, 40.0], f"the copies of expert 0 have 20 each, two of them on rank 0: {got}. {LOOK}"


def test_balancedness_is_that_of_the_ranks() -> None:
    """In each layer, all wait for the busiest rank. It is easy to compare the layers by mistake, which are equal."""
    loads = [[100, 200], [100, 200]]
    got = balancedness(loads, [[0, 1], [0, 1]], 2)
    assert got == 0.75, f"in both layers, the ranks have 100 and 200: 150 / 200, got {got}. {LOOK}"
    got = balancedness([[100, 0], [0, 300]], [[0, 1], [0, 1]], 2)
    assert got == 0.5, f"one rank works in each layer, and the other one waits: {got}. {LOOK}"
    assert balancedness([[0, 0]], [[0, 1]], 2) == 1.0, f"without loads, nobody waits. {LOOK}"
