"""Which experts are where: busy ones get copies, and all copies are spread so that the ranks have about equal loads.

The rule is that of DeepSeek's EPLB (https://github.com/deepseek-ai/EPLB).
"""

from __future__ import annotations

from collections.abc import Sequence


def place_experts(
    loads: Sequence[float], num_slots: int, num_ranks: int, num_groups: int = 1, num_nodes: int = 1
) -> list[int]:
    """For each slot, the expert that it holds; the slots of rank 0 come first.

    loads: of each expert, say in tokens. num_slots: experts and their extra copies together, equally many on each
    rank. If num_groups, the groups that experts are chosen in, can be divided among num_nodes, all copies of a group's
    experts stay on one node.
    """
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    size = len(loads) // num_groups
    groups = [range(first, first + size) for first in range(0, len(loads), size)]
    slots = list[int]()
    for packed in pack([sum(loads[expert] for expert in group) for group in groups], num_nodes):
        experts = replicate(
            [(expert, loads[expert]) for number in packed for expert in groups[number]], num_slots // num_nodes
        )
        for ranks in pack([loads[e] / experts.count(e) for e in experts], num_ranks // num_nodes):
            slots += [experts[i] for i in ranks]
    return slots


def replicate(loads: Sequence[tuple[int, float]], num_slots: int) -> list[int]:
    """All experts, then extra copies: each of the expert whose copies have the most to do."""
    experts, copies = [expert for expert, _ in loads], {expert: 1 for expert, _ in loads}
    while len(experts) < num_slots:
        busiest, _ = max(loads, key=lambda each: each[1] / copies[each[0]])
        copies[busiest] += 1
        experts.append(busiest)
    return experts


def pack(loads: Sequence[float], num_packs: int) -> list[list[int]]:
    """Divide items into packs of equal size and about equal load: the heaviest item first, each into the lightest pack
    that has room. Returns the items' numbers."""
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    totals = [0.0] * num_packs
    for item in sorted(range(len(loads)), key=lambda item: -loads[item]):
        with_room = [number for number in range(num_packs) if len(packs[number]) < len(loads) // num_packs]
        lightest = min(with_room, key=lambda number: totals[number])
        packs[lightest].append(item)
        totals[lightest] += loads[item]
    return packs


def rank_loads(loads: Sequence[float], slots: Sequence[int], num_ranks: int) -> list[float]:
    """What each rank has to do, if the copies of an expert share its load equally."""
    shares, size = [loads[expert] / slots.count(expert) for expert in slots], len(slots) // num_ranks
    return [sum(shares[rank * size : (rank + 1) * size]) for rank in range(num_ranks)]


def balancedness(loads: Sequence[Sequence[float]], placements: Sequence[Sequence[int]], num_ranks: int) -> float:
    """The mean of the ranks' loads, divided by the largest, since all wait for the busiest rank in every layer.

    loads, placements: of each layer. 1 if there is no load.
    """
    layers = [rank_loads(each, slots, num_ranks) for each, slots in zip(loads, placements, strict=True)]
    largest = sum(map(max, layers))
    return sum(map(sum, layers)) / num_ranks / largest if largest else 1.0
