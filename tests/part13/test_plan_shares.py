"""Which layers and heads a rank fetches from which rank of the other engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from part13_disaggregation.messages import KVSource
from part13_disaggregation.worker.kv_receiver import plan_shares

LOOK = 'Look at worker/kv_receiver.py::plan_shares; README "On the wire".'
Parts = list[tuple[range, range]]  # layers and heads
ALL, FIRST, SECOND = range(6), range(3), range(3, 6)  # layers: of one stage, and of two

CASES: dict[str, tuple[Parts, tuple[range, range], list[tuple[int, range, range]]]] = {
    # the other engine's ranks, this rank, and the expected shares: rank, layers, heads
    "tp 1 to tp 1": ([(ALL, range(4))], (ALL, range(4)), [(0, ALL, range(4))]),
    "tp 2 to tp 1": (
        [(ALL, range(2)), (ALL, range(2, 4))], (ALL, range(4)), [(0, ALL, range(2)), (1, ALL, range(2, 4))],
    ),
    "ranks in another order": (
        [(ALL, range(2, 4)), (ALL, range(2))], (ALL, range(4)), [(0, ALL, range(2, 4)), (1, ALL, range(2))],
    ),
    "tp 1 to rank 1 of tp 2": ([(ALL, range(4))], (ALL, range(2, 4)), [(0, ALL, range(2, 4))]),
    "tp 4 to rank 1 of tp 2": (
        [(ALL, range(head, head + 1)) for head in range(4)], (ALL, range(2, 4)),
        [(2, ALL, range(2, 3)), (3, ALL, range(3, 4))],
    ),
    "4 ranks with 2 KV heads": (
        [(ALL, range(head, head + 1)) for head in (0, 0, 1, 1)], (ALL, range(2)),
        [(0, ALL, range(1)), (2, ALL, range(1, 2))],
    ),
    "2 stages to 1": (
        [(FIRST, range(4)), (SECOND, range(4))], (ALL, range(4)), [(0, FIRST, range(4)), (1, SECOND, range(4))],
    ),
    "1 stage to the second of 2": ([(ALL, range(4))], (SECOND, range(4)), [(0, SECOND, range(4))]),
    "tp 2 with 2 stages to tp 1 with 2 stages": (
        [(FIRST, range(2)), (FIRST, range(2, 4)), (SECOND, range(2)), (SECOND, range(2, 4))], (SECOND, range(4)),
        [(2, SECOND, range(2)), (3, SECOND, range(2, 4))],
    ),
    "nobody has the second half of the layers": ([(FIRST, range(4))], (ALL, range(4)), []),
    "nobody has the last heads": ([(ALL, range(2))], (ALL, range(4)), []),
    "no sources": ([], (ALL, range(4)), []),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_layer_and_head_is_fetched_once(case: str) -> None:
    parts, (layers, heads), expected = CASES[case]
    connections: list[Any] = [
        SimpleNamespace(source=KVSource("", "", part.start, len(part), of.start, len(of))) for part, of in parts
    ]
    shard: Any = SimpleNamespace(layers=layers, heads=heads)
    shares = plan_shares(connections, shard, start=48)
    got = [(connections.index(share.connection), share.layers, share.heads) for share in shares]
    assert got == expected, f"{case}: expected (rank, layers, heads) {expected}, got {got}. {LOOK}"
    for share in shares:
        assert share.arrived == dict.fromkeys(share.layers, 48), (
            f"{case}: nothing has arrived yet after position 48, in none of the layers; got {share.arrived}. {LOOK}"
        )
